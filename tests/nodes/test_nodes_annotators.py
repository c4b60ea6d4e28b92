"""The annotators and the data set nodes in ComfyUI."""

import json
import shutil
from importlib import import_module

import numpy
import pytest
import torch
from PIL import Image
from pixstack.models_impl.annotators import pose
from recorded_pose import write
from safetensors.torch import load_file
from weights import tiny_depth, tiny_hed

RGB = numpy.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype="uint8")


@pytest.fixture(scope="module")
def nodes(host):
    """Our node classes by name, with the files they read in models/annotators."""
    folder = host.models / "annotators"
    tiny_hed(folder / "ControlNetHED_nodes.pth")
    tiny_depth(folder / "nodes" / "depth" / "model.safetensors")
    for part, file in pose.FILES.items():
        write(folder / file.split("/")[-1], part)
    import_module("folder_paths").filename_list_cache.clear()
    return {name.removeprefix("PixStack_"): node for name, node in import_module("nodes").NODE_CLASS_MAPPINGS.items()}


def run(node, **inputs):
    return node.execute(**inputs).args


def batch(*pictures):
    return torch.stack([torch.from_numpy(p.astype("float32") / 255) for p in pictures])


BATCH = batch(RGB, RGB[::-1].copy())
POSES = dict(body="full", hands=True, face=True, most=10, confidence=0.5, search=0, resolution=0)
LINES = dict(body=True, hands=True, face=True, stick=4.0, confidence=0.3, width=0, height=0, openpose_json="")


def test_every_example_picture_has_its_soft_edges(nodes):
    node = nodes["ExamplePicture"]
    (menu,) = (part.options for part in node.define_schema().inputs)
    plain = [name for name in menu if not name.endswith("_hed")]
    assert sorted(menu) == sorted([*plain, *(f"{name}_hed" for name in plain)])
    for name in plain:
        picture, edges = (run(node, picture=one)[0] for one in (name, f"{name}_hed"))
        assert picture.shape == edges.shape == (1, 128, 128, 3)
        assert torch.equal(edges[..., 0], edges[..., 1]) and edges.max() > 0.9 and edges.mean() < 0.3
        thin = run(nodes["CannyEdges"], image=picture, detector="opencv", low=100.0, high=200.0,
                   resolution=0)[0]
        assert edges[thin > 0.5].mean() > 2 * edges.mean(), f"{name}: the edges are not those of the picture"
    assert node.validate_inputs(picture="unicorn").startswith("picture='unicorn' is not one of cat_face, cat_face_hed")


@pytest.mark.parametrize("resolution", [0, -1, 64])
@pytest.mark.parametrize("name, inputs", [
    ("HEDEdges", dict(hed_name="ControlNetHED_nodes.pth", strength=1.0)),
    ("CannyEdges", dict(detector="opencv", low=100.0, high=200.0)),
    ("CannyEdges", dict(detector="kornia", low=100.0, high=200.0)),
    ("DepthMap", dict(model_name="nodes/depth", numbers="auto")),
    ("FindPoses", POSES),
])  # fmt: skip
def test_a_hint_has_the_size_and_the_batch_of_its_picture(nodes, name, inputs, resolution):
    inputs = {**inputs, "image": BATCH, "resolution": resolution}
    hint, *_ = run(nodes[name], **inputs)
    assert hint.shape == BATCH.shape and hint.dtype == torch.float32
    assert 0 <= hint.min() and hint.max() <= 1 and hint.std() > 0.01
    if name in ("HEDEdges", "DepthMap"):
        alone, *_ = run(nodes[name], **{**inputs, "image": BATCH[1:]})
        assert torch.allclose(alone, hint[1:], atol=1e-3)


HINTS = [
    ("HEDEdges", dict(hed_name="ControlNetHED_nodes.pth", strength=1.0, resolution=0)),
    ("CannyEdges", dict(detector="opencv", low=100.0, high=200.0, resolution=0)),
    ("CannyEdges", dict(detector="kornia", low=100.0, high=200.0, resolution=64)),
    ("DepthMap", dict(model_name="nodes/depth", numbers="auto", resolution=0)),
    ("FindPoses", POSES),
    ("UltraPixelCanny", dict(filter="reference", low=100, high=200)),
    ("UltraPixelCanny", dict(filter="fine", low=100, high=200)),
    ("UltraPixelInpaintHint", dict(mask=torch.ones(1, 48, 80))),
]
GRAY = BATCH[:1, ..., :1]
OTHER_PICTURES = {  # a picture -> the same in three channels
    "gray": (GRAY, GRAY.expand(-1, -1, -1, 3)),
    "gray with alpha": (torch.cat([GRAY, GRAY * 0], -1), GRAY.expand(-1, -1, -1, 3)),
    "with alpha": (torch.cat([BATCH[:1], GRAY * 0], -1), BATCH[:1]),
    "in half precision": (BATCH[:1].half(), BATCH[:1].half().float()),
    "in bytes": ((BATCH[:1] * 255).round().to(torch.uint8), BATCH[:1]),
    "in 16 bits": ((BATCH[:1].double() * 65535).round().to(torch.uint16), BATCH[:1]),
}


@pytest.mark.parametrize("kind", OTHER_PICTURES)
@pytest.mark.parametrize("name, inputs", HINTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_picture_of_another_kind_is_as_its_three_channels(nodes, name, inputs, kind):
    hint, expected = (run(nodes[name], image=image, **inputs)[0] for image in OTHER_PICTURES[kind])
    assert hint.dtype == torch.float32 and torch.equal(hint, expected)
    assert hint.shape[-1] == (4 if name == "UltraPixelInpaintHint" else 3)


NO_PICTURES = {
    "no rows": (torch.zeros(1, 0, 80, 3), "image has no pixels: it is 1 pictures of 80x0"),
    "no columns": (torch.zeros(1, 48, 0, 3), "image has no pixels: it is 1 pictures of 0x48"),
    "none": (torch.zeros(0, 48, 80, 3), "image has no pixels: it is 0 pictures of 80x48"),
    "no batch": (torch.zeros(48, 80, 3), r"image has the shape \[48, 80, 3\]"),
    "five channels": (torch.zeros(1, 48, 80, 5), r"image has the shape \[1, 48, 80, 5\]"),
    "NaN": (torch.full((1, 48, 80, 3), float("nan")), "image holds values that are no numbers"),
    "counts": (torch.zeros(1, 48, 80, 3, dtype=torch.int64), "image is in int64"),
}


SIDES = dict(width=64, height=64, batch_size=1)
OTHERS = [
    ("PixArtRightHalf", {}),
    ("PixArtReferenceCanvas", dict(vae=None, resolution="1024", shape="1:1", fit="crop")),
    ("PixArtCanvas", dict(SIDES, resolution="1024", shape="1:1")),
    ("UltraPixelCanvas", dict(SIDES, shape="square", side=1024, vae="semantic encoder")),
    ("PixelPonderCondition", dict(kind="canny", strength=1.0, priority=0, start_percent=0.0, end_percent=1.0)),
    ("SaveEntry", dict(folder="sets/none", name="a", text="")),
]


@pytest.mark.parametrize("kind", NO_PICTURES)
@pytest.mark.parametrize("name, inputs", HINTS + OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_picture_is_refused_by_the_input(nodes, name, inputs, kind):
    image, words = NO_PICTURES[kind]
    with pytest.raises(ValueError, match=words):
        run(nodes[name], image=image, **inputs)


@pytest.mark.parametrize("name, inputs", [
    ("HEDEdges", dict(hed_name="ControlNetHED_nodes.pth", strength=1.0, resolution=512)),
    ("CannyEdges", dict(detector="opencv", low=100.0, high=200.0, resolution=-1)),
    ("DepthMap", dict(model_name="nodes/depth", numbers="auto", resolution=512)),
    ("FindPoses", dict(POSES, search=2)),
    ("FindPoses", dict(POSES, resolution=512)),
    ("UltraPixelCanny", dict(filter="fine", low=100, high=200)),
])  # fmt: skip
def test_a_thread_of_a_picture_is_refused_by_every_annotator_that_would_enlarge_it(nodes, name, inputs):
    with pytest.raises(ValueError, match="picture of 30000x1 pixels .*Crop it"):
        run(nodes[name], image=torch.zeros(1, 1, 30_000, 3), **inputs)


def test_a_thread_of_a_canvas_is_not_drawn_at_gigabytes(nodes):
    with pytest.raises(ValueError, match="picture of 16384x1 pixels would be brought to .*Crop it"):
        run(nodes["DrawPoses"], **{**LINES, "width": 16384, "height": 1}, pose=[{"people": []}], resolution=16384)


def test_a_mask_without_pixels_is_refused(nodes):
    with pytest.raises(ValueError, match="mask has no pixels"):
        run(nodes["UltraPixelInpaintHint"], image=GRAY, mask=torch.ones(1, 0, 80))


def test_the_other_reading_of_a_depth_model_turns_near_and_far_around(nodes):
    maps = [run(nodes["DepthMap"], image=BATCH, model_name="nodes/depth", numbers=numbers, resolution=0)[0]
            for numbers in ("shrink with distance", "grow with distance")]
    places = [m[0, ..., 0].flatten() for m in maps]
    assert places[0].argmax() != places[1].argmax()
    auto, = run(nodes["DepthMap"], image=BATCH, model_name="nodes/depth", numbers="auto", resolution=0)
    assert torch.equal(auto, maps[0])


def test_poses_come_as_picture_as_frames_and_as_json(nodes):
    drawn, frames, text = run(nodes["FindPoses"], image=BATCH, **POSES)
    assert json.loads(text) == frames and len(frames) == 2 and len(frames[0]["people"]) == 1
    again, = run(nodes["DrawPoses"], **LINES, pose=frames)
    assert torch.equal(again, drawn)
    pasted, = run(nodes["DrawPoses"], **{**LINES, "openpose_json": text})
    assert torch.equal(pasted, drawn)


def test_a_pose_without_a_canvas_asks_for_a_size(nodes):
    bare = [{"people": []}]
    with pytest.raises(ValueError, match="Set width and height"):
        run(nodes["DrawPoses"], **LINES, pose=bare)
    assert run(nodes["DrawPoses"], **{**LINES, "width": 40, "height": 30}, pose=bare)[0].shape == (1, 30, 40, 3)
    with pytest.raises(ValueError, match="There is no pose"):
        run(nodes["DrawPoses"], **LINES)


def test_a_pose_of_another_pack_is_drawn_at_the_size_that_it_says_in_words(nodes):
    _, frames, text = run(nodes["FindPoses"], image=BATCH[:1], **POSES)
    drawn, = run(nodes["DrawPoses"], **LINES, pose=frames)
    people = [{name: numpy.array(values) for name, values in person.items()} for person in frames[0]["people"]]
    foreign = {"people": people, "canvas_width": "80", "canvas_height": numpy.float32(48)}
    assert torch.equal(run(nodes["DrawPoses"], **LINES, pose=foreign)[0], drawn)
    assert torch.equal(run(nodes["DrawPoses"], **{**LINES, "openpose_json": "\ufeff" + text})[0], drawn)


def test_a_missing_file_of_poses_is_reported_with_where_to_get_it(nodes, host):
    answer = nodes["FindPoses"].validate_inputs(body="heavy", hands=True, face=True)
    for word in ("pose_landmark_heavy.tflite not found", "mediapipe==0.10.21", str(host.models / "annotators"), "npm"):
        assert word in answer
    assert nodes["FindPoses"].validate_inputs(body="full", hands=True, face=True) is True


def test_poses_without_litert_are_refused_with_the_package(nodes, monkeypatch):
    host_module = import_module(nodes["FindPoses"].__module__.rpartition(".")[0] + ".host.annotators.pose")
    monkeypatch.setattr(host_module, "find_spec", lambda name: None)
    answer = nodes["FindPoses"].validate_inputs(body="full", hands=True, face=True)
    assert "pip install ai-edge-litert" in answer


def test_the_networks_are_read_out_of_mediapipe_s_wheel(nodes, host, tmp_path):
    import zipfile

    host_module = import_module(nodes["FindPoses"].__module__.rpartition(".")[0] + ".host.annotators.pose")
    heavy = pose.FILES["body"].replace("full", "heavy")
    write(tmp_path / "body", "body")
    wheel = host.models / "annotators" / "mediapipe-0.0-none.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "body", f"mediapipe/modules/{heavy}")
    import_module("folder_paths").filename_list_cache.clear()
    try:
        assert host_module.existing({"body": heavy}) == {"body": (tmp_path / "body").read_bytes()}
        assert nodes["FindPoses"].validate_inputs(body="heavy", hands=False, face=False) is True
    finally:
        wheel.unlink()
        import_module("folder_paths").filename_list_cache.clear()


@pytest.mark.parametrize("name, inputs, words", [
    ("CannyEdges", dict(detector="opencv", low=200.0, high=100.0), "low=200 is above high=100"),
    ("CannyEdges", dict(detector="best"), "detector='best' is not one of opencv, kornia"),
    ("DepthMap", dict(model_name="nowhere"), "no folder nowhere"),
    ("DepthMap", dict(numbers="up"), "numbers='up' is not one of"),
    ("FindPoses", dict(body="thin"), "body='thin' is not one of"),
    ("LoadEntry", dict(folder="nowhere", index=0), "no data.jsonl in input/nowhere"),
    ("LoadEntry", dict(folder="../..", index=0), "no data.jsonl"),
    ("SaveEntry", dict(folder="../elsewhere"), "not a folder inside of ComfyUI's output"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_it_runs(nodes, name, inputs, words):
    assert words in nodes[name].validate_inputs(**inputs)


# --- Data sets

def save(nodes, folder, name="a", text="a house", image=BATCH[:1], **conditions):
    return nodes["SaveEntry"].execute(image=image, folder=folder, name=name, text=text, **conditions)


def test_an_entry_that_was_saved_loads_as_it_was(nodes):
    save(nodes, "sets/one", canny=BATCH[1:])
    save(nodes, "sets/one", name="b", text="a tree")
    image, text, canny, depth, _, _, name, count = run(nodes["LoadEntry"], folder="sets/one", index=0)
    assert torch.allclose(image, BATCH[:1]) and torch.allclose(canny, BATCH[1:])
    assert (text, name, count) == ("a house", "a", 2)
    assert "no depth" in depth.message
    assert run(nodes["LoadEntry"], folder="sets/one", index=1)[1] == "a tree"


def test_an_index_past_the_end_is_refused_with_the_count(nodes):
    save(nodes, "sets/short")
    answer = nodes["LoadEntry"].validate_inputs(folder="sets/short", index=1)
    assert "has 1 entries" in answer and "index 1" in answer


def test_a_changed_picture_is_loaded_again(nodes, host):
    save(nodes, "sets/changed")
    before = nodes["LoadEntry"].fingerprint_inputs(folder="sets/changed", index=0)
    assert nodes["LoadEntry"].fingerprint_inputs(folder="sets/changed", index=0) == before
    save(nodes, "sets/changed", image=BATCH[1:])
    assert nodes["LoadEntry"].fingerprint_inputs(folder="sets/changed", index=0) != before


def test_a_list_cannot_reach_outside_of_input_and_output(nodes, host):
    folder = host.input / "reaching"
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text(json.dumps({"image": "../../secret.png", "text": ""}) + "\n")
    Image.fromarray(RGB).save(host.base / "secret.png")
    with pytest.raises(ValueError, match="outside of ComfyUI's input and output"):
        run(nodes["LoadEntry"], folder="reaching", index=0)


def test_a_batch_or_a_condition_of_another_shape_is_not_saved(nodes):
    with pytest.raises(ValueError, match="image is a batch of 2"):
        save(nodes, "sets/refused", image=BATCH)
    with pytest.raises(ValueError, match="depth is 48x48 and the image 80x48"):
        save(nodes, "sets/refused", depth=BATCH[:1, :, :48])


def listing(folder, *rows):
    """Write a list and the pictures that it names, each a plain gray of its own."""
    for index, path in enumerate(row[key] for row in rows for key in row if key != "text"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * index,) * 3).save(folder / path)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_depth_map_of_16_bits_keeps_its_grays(nodes, host):
    folder = listing(host.input / "deep", {"image": "a.png", "text": "", "depth": "depth.png"})
    grays = numpy.linspace(0, 65535, 64).reshape(8, 8).astype(numpy.uint16)
    Image.fromarray(grays).save(folder / "depth.png")
    depth = run(nodes["LoadEntry"], folder="deep", index=0)[3]
    assert depth.shape == (1, 8, 8, 3)
    assert torch.allclose(depth, torch.from_numpy(grays / 65535).float()[None, ..., None].expand(1, 8, 8, 3))


@pytest.mark.parametrize("values", [
    numpy.linspace(0, 1, 64, dtype=numpy.float32), numpy.arange(64, dtype=numpy.int32) * 4,
], ids=["floats", "32 bits"])  # fmt: skip
def test_a_depth_map_of_floats_or_32_bits_keeps_its_grays(nodes, host, values):
    folder = listing(host.input / "deeper", {"image": "a.png", "text": "", "depth": "depth.tiff"})
    Image.fromarray(values.reshape(8, 8)).save(folder / "depth.tiff")
    depth = run(nodes["LoadEntry"], folder="deeper", index=0)[3]
    expected = torch.from_numpy(values / (1 if values.dtype == numpy.float32 else 255)).view(1, 8, 8, 1).float()
    assert torch.allclose(depth, expected.expand(-1, -1, -1, 3), atol=1e-6)


def test_a_picture_that_cannot_be_read_is_named_by_the_data_set_s_node(nodes, host):
    folder = listing(host.input / "cut", {"image": "a.png", "text": ""})
    Image.fromarray(RGB).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match="a.png is not a complete picture"):
        run(nodes["LoadEntry"], folder="cut", index=0)


def test_a_depth_model_in_a_bin_draws_what_the_same_in_safetensors_draws(nodes, host):
    """dpt-hybrid-midas is published so."""
    known, binned = host.models / "annotators/nodes/depth", host.models / "annotators/binned"
    shutil.copytree(known, binned)
    try:
        torch.save(load_file(binned / "model.safetensors"), binned / "pytorch_model.bin")
        (binned / "model.safetensors").unlink()
        maps = [run(nodes["DepthMap"], image=BATCH, model_name=name, numbers="auto", resolution=0)[0]
                for name in ("nodes/depth", "binned")]
    finally:
        shutil.rmtree(binned)
    assert maps[0].std() > 0.01 and torch.equal(*maps)


def test_a_depth_model_may_lie_behind_a_link(nodes, host):
    listing = import_module(nodes["DepthMap"].__module__).depth_folders
    before = listing()
    (host.models / "annotators/linked").symlink_to(host.models / "annotators/nodes", target_is_directory=True)
    try:
        assert "nodes/depth" in before and listing() == before  # each folder once
        (host.base / "far").mkdir()
        (host.models / "annotators/nodes").rename(host.base / "far/nodes")
        (host.models / "annotators/linked").unlink()
        (host.models / "annotators/linked").symlink_to(host.base / "far", target_is_directory=True)
        assert listing().keys() == before.keys() - {"nodes/depth"} | {"linked/nodes/depth"}
    finally:
        (host.models / "annotators/linked").unlink()
        if not (host.models / "annotators/nodes").exists():
            (host.base / "far/nodes").rename(host.models / "annotators/nodes")


def test_a_condition_of_one_channel_is_saved_as_gray(nodes):
    save(nodes, "sets/gray", depth=BATCH[1:, ..., :1])
    depth = run(nodes["LoadEntry"], folder="sets/gray", index=0)[3]
    assert torch.allclose(depth, BATCH[1:, ..., :1].expand(-1, -1, -1, 3))


def test_entries_of_the_same_file_name_are_saved_beside_each_other(nodes, host):
    listing(host.input / "pets", *({"image": f"{pet}/1.png", "text": pet} for pet in ("cats", "dogs")))
    for index in range(2):
        image, text, *_, name, _ = run(nodes["LoadEntry"], folder="pets", index=index)
        save(nodes, "pets_done", name=name, text=text, image=image)
    assert [run(nodes["LoadEntry"], folder="pets_done", index=i)[1] for i in range(2)] == ["cats", "dogs"]


def test_an_image_of_another_shape_does_not_leave_old_conditions_behind(nodes, host):
    save(nodes, "sets/stale", canny=BATCH[1:], depth=BATCH[1:])
    square = BATCH[:1, :, :48]
    with pytest.raises(ValueError, match=r"the entry a of sets/stale keeps is of another shape: depth \(80x48\)"):
        save(nodes, "sets/stale", image=square, canny=square)
    assert Image.open(host.output / "sets/stale/image/a.png").size == (80, 48)
    save(nodes, "sets/stale", image=square, canny=square, depth=square)
    assert run(nodes["LoadEntry"], folder="sets/stale", index=0)[0].shape == square.shape


def test_a_missing_file_stops_its_own_output_only(nodes, host):
    folder = listing(host.input / "gone", {"image": "a.png", "text": "t", "hed": "hed/a.png"})
    before = nodes["LoadEntry"].fingerprint_inputs(folder="gone", index=0)
    (folder / "hed" / "a.png").unlink()
    assert nodes["LoadEntry"].fingerprint_inputs(folder="gone", index=0) != before
    image, *_, hed, _, _ = run(nodes["LoadEntry"], folder="gone", index=0)
    assert image.shape == (1, 8, 8, 3)
    assert "hed of this entry of gone is missing: hed/a.png" in hed.message


def test_a_data_set_runs_through_the_queue(nodes, host):
    folder = host.input / "queue"
    folder.mkdir(exist_ok=True)
    rows = []
    for index, text in enumerate(["first", "second"]):
        Image.fromarray(RGB[:: 1 - 2 * index]).save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "text": text}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    for index in range(2):
        graph = {
            "1": {"class_type": "PixStack_LoadEntry", "inputs": {"folder": "queue", "index": index}},
            "2": {"class_type": "PixStack_CannyEdges",
                  "inputs": {"image": ["1", 0], "detector": "opencv", "low": 100.0, "high": 200.0, "resolution": 0}},
            "3": {"class_type": "PixStack_SaveEntry",
                  "inputs": {"image": ["1", 0], "folder": "queue_done", "name": ["1", 6], "text": ["1", 1],
                             "canny": ["2", 0]}},
        }
        assert host.run(graph).error is None
    done = [json.loads(line) for line in (host.output / "queue_done" / "data.jsonl").read_text().splitlines()]
    assert done == [{"image": f"image/{i}.png", "text": text, "canny": f"canny/{i}.png"}
                    for i, text in enumerate(["first", "second"])]
    missing = {"1": {"class_type": "PixStack_LoadEntry", "inputs": {"folder": "queue", "index": 0}},
               "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 3]}}}
    stopped = host.run(missing)
    assert not stopped.images and "This entry of queue has no depth" in str(stopped.events)
