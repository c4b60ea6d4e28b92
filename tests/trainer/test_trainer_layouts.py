"""Every layout becomes the same items, and a picture keeps its conditions and captions through it."""
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import layouts, loader, pictures


def picture(path, colour=(200, 30, 30), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def read(path, need="captions", **settings):
    return loader.read(Data(path=str(path), **settings), need)


def test_sigmas_labels_have_both_captions_and_the_size(tmp_path):
    picture(tmp_path / "InternImgs/a/0.png")
    (tmp_path / "InternData").mkdir()
    (tmp_path / "InternData/data_info.json").write_text(json.dumps([{
        "path": "a/0.png", "prompt": "a wall", "sharegpt4v": "A red wall, evenly lit.", "height": 16, "width": 20,
        "ratio": 0.8}]))
    for path in (tmp_path, tmp_path / "InternData/data_info.json"):  # auto knows the release's folder
        item, = read(path).train
        assert item.file == tmp_path / "InternImgs/a/0.png" and item.size == (16, 20)
        assert (item.captions, item.described) == (("a wall",), ("A red wall, evenly lit.",))


def test_captions_are_mixed_in_the_share_that_is_asked_for(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "data_info.json").write_text(json.dumps([{"path": "0.png", "prompt": "p", "sharegpt4v": "long"}]))
    for share in (0.0, 0.25, 1.0):
        settings = Data(path=str(tmp_path), described_share=share, resolution=8)
        made = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)
        item = made.items[0]
        captions = [made.caption(item, made.rng(step, 0, "caption")) for step in range(400)]
        assert captions.count("long") / 400 == pytest.approx(share, abs=0.06)


def test_an_item_with_only_a_long_caption_is_captioned(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "data_info.json").write_text(json.dumps([{"path": "0.png", "sharegpt4v": "long"}]))
    settings = Data(path=str(tmp_path), described_share=0.0, resolution=8)
    batch = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))
    assert batch.captions == ["long"]


def test_sam_reads_the_stems_of_its_partitions_and_no_others(tmp_path):
    for stem in ("sa_1", "sa_2", "sa_3"):
        picture(tmp_path / f"images/{stem}.jpg")
        (tmp_path / "captions").mkdir(exist_ok=True)
        (tmp_path / f"captions/{stem}.txt").write_text(f"picture\n{stem}\n")
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition/part0.txt").write_text("sa_1\n")
    (tmp_path / "partition/part1.txt").write_text("sa_3\n")
    assert [i.captions for i in read(tmp_path).train] == [("picture sa_1",), ("picture sa_3",)]


def test_ultrapixels_folders_are_folders_flat_or_one_deep(tmp_path):
    for name in ("b.jpg", "deep/a.jpg"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".json").write_text(json.dumps({"caption": name}))
    assert [i.captions for i in read(tmp_path).train] == [("b.jpg",), ("deep/a.jpg",)]


NAMES = ("canny", "depth", "openpose", "hed")


def ponder(tmp_path, size=(64, 48)):
    """A jsonl of PixelPonder: the picture is a ramp in both directions, and so is every condition, its own way up."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    (tmp_path / "set").mkdir()
    for i, name in enumerate(("image", *NAMES)):
        pixels = np.stack([x * 3, y * 3, x * 0 + 40 * i], -1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/{name}.png")
    entry = {"image": "set/image.png", "text": "a ramp", **{n: f"set/{n}.png" for n in NAMES}}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("crop, buckets", [("random", ""), ("centre", ""), ("random", "area"), ("centre", "area")])
def test_a_condition_is_cut_and_mirrored_as_its_picture(tmp_path, crop, buckets):
    settings = Data(path=str(ponder(tmp_path)), conditions=list(NAMES), resolution=32, crop=crop, flip=True,
                    buckets=buckets, bucket_multiple=8)
    made = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)
    mirrored = set()
    for step in range(8):
        batch = made(step, range(1))
        assert list(batch.conditions) == list(NAMES) and batch.captions == ["a ramp"]
        for i, name in enumerate(NAMES, 1):
            assert (batch.conditions[name][:, :2] == batch.pictures[:, :2]).all()
            assert (batch.conditions[name][:, 2] == 40 * i).all()
        mirrored.add(bool(batch.pictures[0, 0, 0, 0] > batch.pictures[0, 0, 0, -1]))
    assert mirrored == {True, False}


def test_a_condition_of_another_size_is_cut_in_proportion(tmp_path):
    path = ponder(tmp_path)
    for size in ((32, 24), (128, 96)):
        with Image.open(tmp_path / "set/image.png") as whole:
            whole.resize(size, Image.BICUBIC).save(tmp_path / "set/hed.png")
        settings = Data(path=str(path), conditions=["hed"], resolution=32, crop="random")
        batch = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))
        difference = batch.conditions["hed"].float() - batch.pictures.float()
        assert difference[:, :, 2:-2, 2:-2].abs().max() <= 4


def test_a_condition_of_another_shape_is_named_with_both_sizes(tmp_path):
    path = ponder(tmp_path)
    picture(tmp_path / "set/depth.png", size=(48, 48))
    settings = Data(path=str(path), conditions=["depth"], resolution=32)
    with pytest.raises(ValueError, match=r"depth\.png: it is 48x48.*its picture, 64x48"):
        loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))


def test_a_condition_that_is_missing_is_named(tmp_path):
    path = ponder(tmp_path)
    (tmp_path / "set/hed.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 pictures have no condition 'pose'.*'hed' are named but not there"):
        read(path, conditions=["pose", "hed"])


def test_conditions_lie_in_folders_beside_the_pictures(tmp_path):
    for name in ("images/a.png", "images/sub/b.png", "hed/a.jpg", "hed/sub/b.png"):
        picture(tmp_path / name)
    found = read(tmp_path / "images", caption="x", conditions=["hed"]).train
    assert [i.conditions["hed"] for i in found] == [tmp_path / "hed/a.jpg", tmp_path / "hed/sub/b.png"]


def test_a_depth_map_of_16_bits_keeps_its_greys(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "d.png")
    assert np.array(pictures.decode(tmp_path / "d.png"))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(colour, size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_are_read_at_their_places(tmp_path):
    for shard, keys in (("0.tar", ("a", "b")), ("1.tar", ("c",))):
        with tarfile.open(tmp_path / shard, "w") as archive:
            for key in keys:
                add(archive, f"x/{key}.hed.png", png((9, 9, 9)))
                add(archive, f"x/{key}.png", png((ord(key), 0, 0)))
                add(archive, f"x/{key}.txt", f"picture {key}".encode())
    settings = Data(path=str(tmp_path), resolution=8, conditions=["hed"])
    found = loader.read(settings, "captions").train
    assert [i.captions for i in found] == [("picture a",), ("picture b",), ("picture c",)]
    batch = loader.Batches(found, settings, 0, 3)(0, range(3))
    for caption, shown, hed in zip(batch.captions, batch.pictures, batch.conditions["hed"], strict=True):
        assert shown[0].float().mean() == ord(caption[-1]) and (hed == 9).all()
    assert batch.sizes.tolist() == [[16, 20]] * 3


def test_shards_may_have_json_and_classes(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.jpg", png((1, 2, 3)))
        add(archive, "a.json", json.dumps({"caption": "short", "sharegpt4v": "long"}).encode())
        add(archive, "a.cls", b"7")
    item, = read(tmp_path / "0.tar").train
    assert (item.captions, item.described, item.label) == (("short",), ("long",), 7)


def test_a_compressed_shard_is_refused_with_the_reason(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as archive:
        add(archive, "a.png", png((1, 2, 3)))
    with pytest.raises(ValueError, match="0.tar cannot be read as a plain tar.*Unpack it"):
        read(tmp_path)


@pytest.fixture
def rows():
    import datasets

    pixels = [Image.new("RGB", (20, 16), (10 * i, 0, 0)) for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "hed": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["ant", "bee"])})
    return datasets.Dataset.from_dict({"image": pixels, "text": [f"number {i}" for i in range(4)], "hed": pixels,
                                       "label": [0, 1, 0, 1]}, features=features)


def test_a_hugging_face_data_set_is_read_from_its_folder(rows, tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "set")
    settings = Data(path=str(tmp_path / "set"), resolution=8, conditions=["hed"])
    found = loader.read(settings, "captions")
    assert (len(found.train), len(found.held_out), found.classes) == (4, 1, ["ant", "bee"])
    assert [i.label for i in found.train] == [0, 1, 0, 1]
    batch = loader.Batches(found.train, settings, 0, 4)(0, range(4))
    for caption, shown, hed in zip(batch.captions, batch.pictures, batch.conditions["hed"], strict=True):
        assert shown[0].float().mean() == 10 * int(caption[-1]) and (hed == shown).all()


def test_parquet_files_are_read_with_their_splits(rows, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    rows.select([1]).to_parquet(tmp_path / "set/validation-00000-of-00001.parquet")
    found = read(tmp_path / "set", resolution=8)
    assert [i.captions[0] for i in found.train] == [f"number {i}" for i in range(4)]
    assert [i.captions[0] for i in found.held_out] == ["number 1"]
    assert pictures.decode(found.train[3].file).getpixel((0, 0)) == (30, 0, 0)


def test_columns_that_are_not_there_are_named(rows, tmp_path):
    rows.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="columns image, text, hed, label; wanted are a picture, depth"):
        read(tmp_path / "set", conditions=["depth"])


def test_the_layout_of_a_folder_is_recognised(tmp_path):
    picture(tmp_path / "classes/ant/0.png"), picture(tmp_path / "flat/0.png"), picture(tmp_path / "deep/a/0.png")
    (tmp_path / "deep/a/0.txt").write_text("x")
    kinds = {name: layouts.recognised(tmp_path / name)[0] for name in ("classes", "flat", "deep")}
    assert kinds == {"classes": "classes", "flat": "folder", "deep": "folder"}


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("")
    with pytest.raises(ValueError, match="data.csv is of no known kind"):
        read(tmp_path / "data.csv")


def test_pictures_without_captions_take_the_one_for_all(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("its own")
    found = read(tmp_path, caption="a photo of sks dog").train
    assert [i.captions for i in found] == [("a photo of sks dog",), ("its own",)]


def test_an_exif_turned_picture_measures_as_it_stands(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert pictures.measure(tmp_path / "a.jpg") == (40, 20) == pictures.decode(tmp_path / "a.jpg").size[::-1]


def test_the_mark_that_windows_editors_put_first_is_no_part_of_a_caption(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa card")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"caption": "a cup"}).encode())
    assert [i.captions for i in read(tmp_path).train] == [("a card",), ("a cup",)]
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"file": "a.png", "caption": "a hat"}).encode())
    assert read(tmp_path / "set.jsonl").train[0].captions == ("a hat",)


def test_a_caption_inside_a_tar_that_is_no_utf8_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.png", png((1, 2, 3)))
        add(archive, "a.txt", "Gemälde".encode("latin-1"))
    with pytest.raises(ValueError, match="0.tar: the .txt, .json or .cls of a.png cannot be read"):
        read(tmp_path / "0.tar")


def test_a_line_separator_in_a_caption_is_no_end_of_its_entry(tmp_path):
    entries = [{"file": "a.png", "caption": f"one{sign}two"} for sign in ("\u2028", "\x85", "\x0c")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), "utf-8")
    found = layouts.read(tmp_path / "data.jsonl", "jsonl", Data()).train
    assert [i.captions for i in found] == [(e["caption"],) for e in entries]


def test_tags_in_one_string_are_split_at_its_commas(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"file": "a.png", "caption": "x", "tags": "red, a card,"}\n')
    assert layouts.read(tmp_path / "data.jsonl", "jsonl", Data()).train[0].tags == ("red", "a card")


@pytest.mark.parametrize("caption", ["5", "[5]", "true"])
def test_a_caption_that_is_no_text_is_named_with_its_line(tmp_path, caption):
    (tmp_path / "data.jsonl").write_text(f'{{"file": "a.png", "caption": {caption}}}\n')
    with pytest.raises(ValueError, match="line 1: .*(5|True) is no caption"):
        layouts.read(tmp_path / "data.jsonl", "jsonl", Data())
    picture(tmp_path / "set/a.png")
    (tmp_path / "set/a.json").write_text(caption)
    with pytest.raises(ValueError, match="set/a.json: (5|True) is no caption"):
        layouts.read(tmp_path / "set", "folder", Data())
