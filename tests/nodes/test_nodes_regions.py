"""Painted conditions, several conditions in one node, and two pictures under a slider, in a real ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_nodes_pixelponder import condition, flux, graph, graph_host, hint  # noqa: F401


@pytest.fixture(scope="module")
def strokes(host):
    return next(module for name, module in sys.modules.items() if name.endswith(".nodes.host.pixelponder.strokes"))


def painted(strokes, text: str, height=64, width=96) -> torch.Tensor:
    return strokes.masks(strokes.read(text), height, width)


def under_the_brush(strokes, text: str, height: int, width: int) -> torch.Tensor:
    """What `label_map` gives, by the distance of every pixel to every segment."""
    labels = torch.zeros(height, width, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    middle = torch.stack((x, y), dim=-1).double()
    for stroke in strokes.read(text):
        points = torch.from_numpy(stroke.points) * torch.tensor([width, height]).double() / strokes.GRID
        for a, b in zip(points[:-1] if len(points) > 1 else points, points[1:] if len(points) > 1 else points,
                        strict=True):
            length = (b - a).square().sum()
            t = ((middle - a) @ (b - a) / length).clip(0, 1) if length else torch.zeros(height, width)
            distance = (middle - a - t[..., None] * (b - a)).norm(dim=-1)
            labels[distance <= stroke.size / 2000 * min(height, width)] = stroke.colour
    return labels


# --- Strokes


@pytest.mark.parametrize("size", [(64, 96), (37, 21), (1, 5)])
def test_a_pixel_is_painted_if_its_middle_is_under_the_brush(strokes, size):
    text = ("1 300 400 400 2000 900 -700 1500; 2 150 3000 3000; 0 90 200 600 1800 0; 3 500 4090 2000 0 0; "
            "4 7 0 0 4096 4096")
    ours = torch.from_numpy(strokes.label_map(strokes.read(text), *size))
    assert torch.equal(ours, under_the_brush(strokes, text, *size))
    assert size[0] < 30 or set(ours.unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_later_stroke_covers_and_colour_0_erases(strokes):
    masks = painted(strokes, "1 1000 2048 2048; 2 500 2048 2048; 0 100 2048 2048")
    assert [int(mask[32, x]) for x in (48, 56, 76) for mask in masks[:2]] == [0, 0, 0, 1, 1, 0]
    assert masks.sum(dim=0).max() == 1


def test_a_long_stroke_is_drawn_as_its_parts_are(strokes):
    """Longer than the segments whose rows are found at once."""
    steps = " ".join(["3 2"] * (2 * strokes.AT_ONCE + 7))
    ours = strokes.label_map(strokes.read(f"1 60 100 100 {steps}"), 80, 120)
    assert torch.equal(torch.from_numpy(ours), under_the_brush(strokes, f"1 60 100 100 {steps}", 80, 120))


def test_masks_larger_than_what_strokes_are_drawn_at_are_that_enlarged(strokes):
    text, side = "1 400 1000 2000 1500 300; 2 200 3000 1000", strokes.SIDE
    half = painted(strokes, text, side // 2, side)
    assert torch.equal(painted(strokes, text, side, 2 * side), half.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(("text", "words"), [
    ("1 20 x 5", "Stroke 1 .*something else than whole numbers"),
    ("1 20 5 5; 1 20 5", "Stroke 2 .*has 3 numbers"),
    ("1 20 5 5 6", "has 5 numbers"),
    ("5 20 5 5", "has the colour 5, not one of 1 to 4"),
    ("1 0 5 5", "a brush of 0 thousandths"),
    ("1 1001 5 5", "a brush of 1001 thousandths"),
    ("1 20 5 5 999999 0", "leaves the picture"),
    ("1 20 9999999 5", "whole numbers below a million"),
    ("1 20 1e3 5", "whole numbers"),
    ("1 20 \N{ARABIC-INDIC DIGIT ONE} 5", "whole numbers"),
    ("1 20 5 5;" * 1001, "1001 strokes, the most is 1000"),
    ("1 20 5 5" + " 1 -1" * 20000, "characters, the most is 65536"),
])  # fmt: skip
def test_a_text_that_is_no_painting_is_refused_before_anything_runs(host, text, words):
    graph = {"1": paint(strokes=text)}
    with pytest.raises(AssertionError, match=words):
        assert not host.check(graph), str(host.check(graph)[0])


# --- Paint Conditions


def paint(strokes="", **inputs) -> dict:
    return {"class_type": "PixStack_PaintConditions", "inputs": dict(strokes=strokes, width=48, height=32, **inputs)}


def example(name="lion") -> dict:
    return {"class_type": "PixStack_ExamplePicture", "inputs": {"picture": name}}


def test_without_a_hint_the_masks_are_of_the_given_size_and_the_board_is_shown(host):
    graph = {"1": paint("2 500 2048 2048"), "2": {"class_type": "MaskPreview", "inputs": {"mask": ["1", 1]}}}
    run = host.run(graph)
    assert not run.errors
    board, mask = (Image.open(path) for path in run.images)
    assert board.size == mask.size == (48, 32)
    assert mask.getpixel((24, 16))[0] == 255 and mask.getpixel((2, 2))[0] == 0
    assert run.outputs["1"]["pixstack_paint"] == [{"size": [48, 32], "hints": {}}]


def test_the_masks_are_as_large_as_the_first_hint_and_each_hint_is_sent_for_its_colour(host):
    graph = {"1": example(), "2": example("lion_hed"),
             "3": paint("4 500 2048 2048", hint_2=["1", 0], hint_4=["2", 0]),
             "4": {"class_type": "MaskPreview", "inputs": {"mask": ["3", 3]}}}  # fmt: skip
    run = host.run(graph)
    assert not run.errors
    (about,) = run.outputs["3"]["pixstack_paint"]
    assert about["size"] == [128, 128] and set(about["hints"]) == {"hint_2", "hint_4"}
    name, folder = about["hints"]["hint_4"]
    (kept,) = Path(host._folders.get_temp_directory(), folder).glob(name)
    assert Image.open(kept).size == (128, 128)
    assert Image.open(run.images[-1]).size == (128, 128)


def test_the_preview_tints_what_is_painted(host):
    run = host.run({"1": example(), "2": paint("1 300 2048 2048", hint_1=["1", 0]),
                    "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
    (whole,), (tinted,) = ([host._path(image) for image in run.outputs[i]["images"]] for i in ("3", "2"))
    whole, tinted = Image.open(whole).convert("RGB"), Image.open(tinted).convert("RGB")
    assert whole.getpixel((3, 3)) == tinted.getpixel((3, 3))
    orange = (230, 159, 0)
    wanted = [(a + b) / 2 for a, b in zip(whole.getpixel((64, 64)), orange, strict=True)]
    assert tinted.getpixel((64, 64)) == pytest.approx(wanted, abs=1)


# --- PixelPonder Conditions


def several(settings: str, **slots) -> dict:
    return {"class_type": "PixStack_PixelPonderConditions", "inputs": {"settings": settings, **slots}}


def drawn(host, prompt: dict, monkeypatch) -> torch.Tensor:
    kept = []

    class TestKeep:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "test", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"latent": ("LATENT",)}}

        def keep(self, latent):
            kept.append(latent["samples"])
            return {}

    monkeypatch.setitem(host._nodes.NODE_CLASS_MAPPINGS, "TestKeep", TestKeep)
    run = host.run({**prompt, "99": {"class_type": "TestKeep", "inputs": {"latent": ["9", 0]}}})
    assert not run.errors, run.errors
    return kept[0]


def test_one_node_gives_what_a_row_of_conditions_gives(graph_host, monkeypatch):  # noqa: F811
    row = graph("blend")
    row["20"] = paint("2 600 3000 2048")
    row["4"]["inputs"] |= dict(strength=0.5, priority=-2)
    row["5"]["inputs"] |= dict(kind="hed", strength=2.0, priority=3, end_percent=0.75, mask=["20", 1])
    plain = drawn(graph_host, graph("blend"), monkeypatch)
    one = {**row, "5": several("canny strength=0.5 priority=-2\nhed strength=2 priority=3 end=0.75",
                               **{"hints.hint_1": ["3", 0], "hints.hint_2": ["3", 0], "masks.mask_2": ["20", 1]})}
    del one["4"]
    in_a_row = drawn(graph_host, row, monkeypatch)
    assert torch.equal(drawn(graph_host, one, monkeypatch), in_a_row)
    assert not torch.equal(plain, in_a_row)


def test_conditions_of_the_node_before_come_first(flux):  # noqa: F811
    before = condition(flux, "pose")
    execute = flux.nodes["PixStack_PixelPonderConditions"].execute
    (row,) = execute(settings="canny\n\ndepth", conditions=before, hints={"hint_1": hint(1), "hint_3": hint(2)}).args
    assert [one.kind for one in row] == ["openpose", "canny", "depth"] and row[0] is before[0]


@pytest.mark.parametrize(("settings", "words"), [
    ("edges", "Line 1 of settings, 'edges', begins with 'edges', which is no kind of hint: canny, depth, hed, pose"),
    ("canny\ndepth 0.5", "Line 2 .*has '0.5'. After the kind it may have strength, priority, start, end"),
    ("canny strength=strong", "strength=strong', has strength='strong', which is no number"),
    ("canny priority=1.5", "has priority='1.5', which is no whole number"),
    ("canny strength=nan", "strength=nan, not in 0 to 10"),
    ("canny start=0.8 end=0.2", "starts at 0.8 and ends at 0.2, which leaves no part"),
])  # fmt: skip
def test_settings_that_cannot_be_read_are_refused_before_anything_runs(host, settings, words):
    graph = {"1": example(), "2": several(settings, **{"hints.hint_1": ["1", 0]}),
             "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}}
    with pytest.raises(AssertionError, match=words):
        assert not host.check(graph), str(host.check(graph)[0])


@pytest.mark.parametrize(("slots", "words"), [
    (dict(hint_1=hint(1), hint_2=hint(2)), "hint_2 has no line in settings: write its kind into line 2"),
    (dict(hint_1=hint(1), mask_2=torch.ones(1, 8, 8)), "mask_2 has no hint"),
    ({}, "No hint is connected"),
])
def test_slots_that_do_not_go_together_are_refused(flux, slots, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        flux.nodes["PixStack_PixelPonderConditions"].execute(settings="canny", **slots)


# --- Compare Pictures


def test_both_batches_are_previewed_as_core_does_and_counted(host):
    graph = {"1": example(), "2": example("rose"), "3": {"class_type": "RepeatImageBatch",
                                                         "inputs": {"image": ["2", 0], "amount": 2}},
             "4": {"class_type": "PixStack_ComparePictures", "inputs": {"image_a": ["1", 0], "image_b": ["3", 0]}}}
    run = host.run(graph)
    assert not run.errors and run.outputs["4"]["pixstack_compare"] == [1, 2]
    a, b, c = (Image.open(path).convert("RGB").tobytes() for path in run.images)
    assert a != b == c and {image["type"] for image in run.outputs["4"]["images"]} == {"temp"}
