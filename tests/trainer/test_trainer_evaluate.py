"""python -m trainer evaluate: each number is what its paper says, and pictures are measured with the judges named."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators.canny import canny
from pixstack.models_impl.annotators.hed import HED, HEDConfig
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import schema
from pixstack.trainer.evaluation import metrics, retrieval
from torch import nn


def test_retrieval_finds_a_picture_that_was_copied():
    references = metrics.colours(torch.rand(20, 3, 16, 16) * 2 - 1)
    truth = torch.tensor([3, 7])
    place, nearest = metrics.ranks(references[truth] * 0.9 + 0.01, references, truth)
    assert place.tolist() == [0, 0] and nearest.tolist() == [3, 7]


def test_retrieval_of_noise_is_near_chance():
    torch.manual_seed(0)
    references = torch.randn(200, 30)
    place, _ = metrics.ranks(torch.randn(400, 30), references, torch.arange(400) % 200)
    assert (place < 10).float().mean().item() == pytest.approx(10 / 200, abs=0.03)


def test_the_frechet_distance_is_that_of_the_normal_distributions():
    torch.manual_seed(0)
    x = torch.randn(500, 6)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # unit covariance, exactly
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-4)
    assert metrics.frechet(x, x + 2) == pytest.approx(6 * 4, rel=1e-4)
    scaled = x * torch.tensor([1.0, 2, 3, 4, 5, 6])  # sum (s - 1)^2 for covariances that commute
    assert metrics.frechet(x, scaled) == pytest.approx(0 + 1 + 4 + 9 + 16 + 25, rel=1e-4)
    assert metrics.frechet(scaled @ rotation(6), x @ rotation(6)) == pytest.approx(55, rel=1e-4)


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]


def test_the_frechet_distance_stands_fewer_pictures_than_features():
    torch.manual_seed(0)
    assert math.isfinite(metrics.frechet(torch.randn(5, 40), torch.randn(7, 40)))


def test_the_kernel_distance_is_zero_in_the_mean_for_one_distribution_and_not_for_two():
    torch.manual_seed(0)
    x, y, other = torch.randn(600, 8), torch.randn(600, 8), torch.randn(600, 8) + 0.5
    same, spread = metrics.kid(x, y, size=200)
    assert abs(same) < 2 * spread
    far, _ = metrics.kid(x, other, size=200)
    assert far > 10 * abs(same)


def test_the_kernel_distance_is_the_papers_sum():
    x, y = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1], [2, 0]])
    k = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / 2 + 1) ** 3  # noqa: E731
    by_hand = (k([1, 0], [0, 2]) + k([1, 1], [2, 0])
               - 2 * np.mean([k(a, b) for a in ([1, 0], [0, 2]) for b in ([1, 1], [2, 0])]))
    assert metrics.kid(x, y)[0] == pytest.approx(by_hand)


def test_the_inception_score_counts_the_classes_that_are_distinguished():
    assert metrics.inception_score(torch.eye(5).repeat(4, 1), splits=1)[0] == pytest.approx(5, rel=1e-4)
    assert metrics.inception_score(torch.full((20, 5), 0.2), splits=2) == pytest.approx((1, 0), abs=1e-4)


def test_edges_a_pixel_off_are_common_and_others_are_not():
    one = torch.zeros(1, 1, 64, 64)
    one[..., 20] = 1
    assert metrics.edge_iou(one, one).item() == 1
    assert metrics.edge_iou(one, one.roll(1, -1)).item() == 1
    assert metrics.edge_iou(one, one.roll(3, -1)).item() == 0
    half = one.clone()
    half[..., :32, :] = 0
    assert metrics.edge_iou(one, half).item() == pytest.approx(33 / 64)  # 32 rows, and the one beside them
    assert metrics.edge_iou(one * 0, one * 0).item() == 1 and metrics.edge_iou(one, one * 0).item() == 0


def body(shift=0.0, sure=1.0, size=100):
    points = [(10, 10), (30, 60), (50, 90)]
    return [value for x, y in points for value in ((x + shift) * size / 100, y * size / 100, sure)]


def test_joints_are_right_within_a_tenth_of_the_box(tmp_path):
    for name, bodies in (("found", [body(40), body(7)]), ("wanted", [body()])):
        (tmp_path / name).mkdir()
        people = [{"pose_keypoints_2d": b} for b in bodies]
        (tmp_path / name / "0.json").write_text(json.dumps({"people": people}))
    found, wanted = (metrics.people(tmp_path / name / "0.json") for name in ("found", "wanted"))
    assert metrics.pck(found, wanted) == (3, 3) and metrics.pck(found[:1], wanted) == (0, 3)
    assert metrics.pck([], wanted) == (0, 3)


def test_keypoints_of_canvases_of_other_sizes_are_compared(tmp_path):
    for name, size in (("a", 100), ("b", 400)):
        frame = {"people": [{"pose_keypoints_2d": body(size=size)}], "canvas_width": size, "canvas_height": size}
        (tmp_path / f"{name}.json").write_text(json.dumps([frame]))
    a, b = (metrics.people(tmp_path / f"{name}.json") for name in ("a", "b"))
    assert metrics.pck(a, b) == (3, 3)


def test_keypoints_are_read_in_every_way_that_they_are_drawn(tmp_path):
    pixels = {"people": [{"pose_keypoints_2d": [*body(), 0, 0, 0]}], "canvas_width": 100, "canvas_height": 100}
    parts = {"people": [None, {"pose_keypoints_2d": [*body(size=1), None, None, None]}], "canvas_width": "100",
             "canvas_height": "100"}
    for name, frame in (("a", pixels), ("b", parts)):
        (tmp_path / f"{name}.json").write_text("\ufeff" + json.dumps(frame), encoding="utf-8")
    (a,), (b,) = (metrics.people(tmp_path / f"{name}.json") for name in ("a", "b"))
    assert torch.allclose(a, b)


class Inception(nn.Module):
    """What inception-2015-12-05.pt can be asked, of the mean colour."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        colour = img.float().mean(dim=[2, 3])
        if return_features:
            return torch.cat([colour, colour.square() / 255], dim=1)
        return torch.softmax(colour if no_output_bias else colour + 5, dim=1)


@pytest.fixture
def judges(tmp_path):
    """Files of a tiny HED and of a TorchScript with Inception's calls."""
    torch.manual_seed(0)
    net = HED(HEDConfig(channels=(4, 6, 8, 8, 8), layers=(1, 1, 1, 1, 1)))
    state_dict.write_file(tmp_path / "hed.safetensors", net.state_dict(), {})
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    return tmp_path


def pictures(folder, count, change=lambda p: p, size=(32, 24)):
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        change(Image.fromarray(coarse).resize(size, Image.BICUBIC)).save(folder / f"{i:06d}.png")
    return folder


def measured(out, *words):
    cli.main(["evaluate", *map(str, words), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "evaluation.json").read_text())


def test_pictures_are_nearer_to_themselves_than_to_grey_ones(tmp_path, judges):
    same, grey = pictures(tmp_path / "same", 20), pictures(tmp_path / "grey", 20, lambda p: p.convert("L"))
    words = ("--hed", judges / "hed.safetensors", "--inception", judges / "inception.pt", "--reference", same)
    near = measured(tmp_path / "near", same, *words)["reference"]
    far = measured(tmp_path / "far", grey, *words)["reference"]
    assert near["pictures"] == 20 and near["hed_vgg_frechet"] == pytest.approx(0, abs=1e-3)
    for name in ("hed_vgg_frechet", "fid"):
        assert far[name] > 10 * abs(near[name]) + 1e-6
    for name in ("hed_vgg_kid", "kid"):
        assert far[name][0] > near[name][0]
    assert "hed_vgg_frechet_remark" not in near  # 20 pictures, 8 features


def test_too_few_pictures_for_a_frechet_distance_are_remarked_on(tmp_path, judges):
    few = pictures(tmp_path / "few", 5)
    report = measured(tmp_path / "out", few, "--hed", judges / "hed.safetensors", "--reference", few)["reference"]
    assert "fewer pictures than the 8 features" in report["hed_vgg_frechet_remark"]


def test_a_reference_of_another_size_is_brought_to_the_pictures(tmp_path, judges):
    small, large = pictures(tmp_path / "small", 8), pictures(tmp_path / "large", 8, size=(96, 72))
    report = measured(tmp_path / "out", small, "--hed", judges / "hed.safetensors", "--reference", large)
    assert report["reference"]["pictures"] == 8 and (report["width"], report["height"]) == (32, 24)


def test_pictures_drawn_from_a_data_set_are_held_against_their_conditions(tmp_path, judges):
    def hard(picture):
        return picture.point(lambda value: 255 * (value > 128))

    size = (160, 120)
    folder = pictures(tmp_path / "set/images", 6, hard, size)
    lines = []
    for file in sorted(folder.iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
        edges = canny(pixels, resize=None)[0, 0].mul(255).to(torch.uint8).numpy()
        Image.fromarray(edges).save(tmp_path / f"set/{file.stem}_canny.png")
        lines.append({"file": f"images/{file.name}", "caption": "x", "canny": f"{file.stem}_canny.png"})
    (tmp_path / "set/data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good = pictures(tmp_path / "good", 6, hard, size)
    bad = pictures(tmp_path / "bad", 6, lambda p: hard(p).rotate(180), size)
    for made in (good, bad):
        notes = {"data": str(tmp_path / "set/data.jsonl"), "conditions": ["canny"], "what": ["x"] * 6}
        (made / "samples.json").write_text(json.dumps(notes))
    well, badly = measured(tmp_path / "a", good), measured(tmp_path / "b", bad)
    assert well["edge_iou_canny"] > 0.9 > 0.6 > badly["edge_iou_canny"]
    assert well["retrieval"]["top1"] == 1 and well["retrieval"]["chance"]["top1"] == pytest.approx(1 / 6)


def clip_folder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<start>", "<end>", "red", "blue", "card"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 0), ("<end>", 1)])
    reader = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<start>", eos_token="<end>",
                                     pad_token="<end>", model_max_length=8)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=dict(vocab_size=5, max_position_embeddings=8, eos_token_id=1, **sizes),
                        vision_config=dict(image_size=16, patch_size=8, **sizes), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), reader).save_pretrained(folder)
    return folder


def test_a_clip_reads_every_picture_with_its_own_prompt(tmp_path):
    made, clip = pictures(tmp_path / "s", 40), clip_folder(tmp_path / "clip")
    prompts = ["red card", "blue"]
    (made / "samples.json").write_text(json.dumps({"what": prompts}))
    report = measured(tmp_path / "out", made, "--clip", clip)
    score, by_hand = metrics.clip_scores(clip, "cpu"), []
    for i in range(40):
        pixels = torch.from_numpy(np.array(Image.open(made / f"{i:06d}.png"))).permute(2, 0, 1)[None]
        with torch.no_grad():
            by_hand.append(score(pixels, [prompts[i % 2]]).item())
    assert report["clip_score"] == pytest.approx(np.mean(by_hand), abs=1e-3)


def refusal(*words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", *map(str, words), "--out", "unused", "--device", "cpu"])
    return str(stopped.value.code)


def test_what_cannot_be_measured_is_said(tmp_path, judges):
    made = pictures(tmp_path / "s", 2)
    assert "no such run, folder or file" in refusal(tmp_path / "gone")
    assert "needs a network to compare with: --hed or --inception" in refusal(made, "--reference", made)
    assert "no samples.json with the prompts" in refusal(made, "--clip", tmp_path)
    assert "is no TorchScript file" in refusal(made, "--inception", judges / "hed.safetensors")
    assert "cannot be read as a CLIP" in refusal(write_notes(made), "--clip", tmp_path)


def write_notes(made):
    (made / "samples.json").write_text(json.dumps({"what": ["red"]}))
    return made


def test_joints_of_folders_are_counted_together(tmp_path):
    made = pictures(tmp_path / "s", 1)
    for name, bodies in (("found", [body(7)]), ("wanted", [body()])):
        (tmp_path / name).mkdir()
        for i, those in enumerate((bodies, [] if name == "found" else bodies)):
            frame = {"people": [{"pose_keypoints_2d": b} for b in those]}
            (tmp_path / name / f"{i}.json").write_text(json.dumps(frame))
    report = measured(tmp_path / "out", made, "--keypoints", tmp_path / "found", tmp_path / "wanted")
    assert report["pck@0.1"] == {"share": 0.5, "joints": 6}


class Painter:
    """A recipe that paints the condition, or the mean colour of the prompt's number."""

    of_pictures = False

    def sample(self, what, height, width, steps, shift, cfg, seed, conditions=None):
        if conditions:
            return conditions["depth"].float() / 127.5 - 1
        return torch.stack([torch.full((3, height, width), int(w) / 127.5 - 1) for w in what])


def of_a_run(folder, sizes, **settings):
    for i, size in enumerate(sizes):
        for name in ("picture", "depth"):
            Image.new("RGB", size, (40 * i, 40 * i, 40 * i)).save(folder / f"{name}{i}.png")
    entries = [{"image": f"picture{i}.png", "text": str(40 * i), "depth": f"depth{i}.png",
                "split": ("held_out", "train")[i % 2]} for i in range(len(sizes))]
    (folder / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    made = schema.Config(data=schema.Data(path=str(folder / "data.jsonl"), resolution=32, crop="centre", **settings))
    return retrieval.evaluate(Painter(), made, folder / "data.jsonl")


@pytest.mark.parametrize("settings", [{}, {"buckets": "area", "bucket_multiple": 8}, {"conditions": ["depth"]}])
def test_a_run_is_evaluated_on_whatever_its_jsonl_holds(tmp_path, settings):
    results, rows = of_a_run(tmp_path, [(32, 32), (64, 32), (32, 64), (32, 32)], **settings)
    assert {split: found["prompts"] for split, found in results.items()} == {"train": 2, "held_out": 2}
    for prompt, _, picture, _, reference in rows:
        assert torch.allclose(reference, torch.full((3, 32, 32), int(prompt) / 127.5 - 1))
        assert torch.allclose(picture, reference)
