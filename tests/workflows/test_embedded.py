"""The small models of emoji that come with the repository do what their names say, with their own weights."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.long
HERE = Path(__file__).parent
SHOWN = ("PixStack_PixelPonderMap", "PreviewImage")


def drawn(host, name: str, changes: dict) -> np.ndarray:
    """Pictures (B, H, W, 3) in [0, 1] that a workflow saves. changes: (class of nodes, input) -> value."""
    graph = json.loads((HERE / f"prompts/{name}.json").read_text(encoding="utf-8"))
    graph = {i: node for i, node in graph.items() if node["class_type"] not in SHOWN}
    for (kind, part), value in changes.items():
        some = [node["inputs"] for node in graph.values() if node["class_type"] == kind and node["inputs"][part] != ""]
        assert some, kind
        for inputs in some:
            inputs[part] = value
    done = host.run(graph)
    assert done.error is None, done.error
    return np.stack([np.asarray(Image.open(file).convert("RGB")) / 255 for file in done.images])


@pytest.mark.parametrize("text, strongest", [("red heart", 0), ("green heart", 1), ("blue heart", 2)])
def test_pixart_draws_a_heart_in_the_colour_that_is_asked_for(host, text, strongest):
    pictures = drawn(host, "pixart_emoji", {("CLIPTextEncode", "text"): text})
    inked = pictures[pictures.min(-1) < 0.8]
    assert 0.1 < inked.size / pictures.size < 0.9
    colour = inked.mean(0)
    assert colour.argmax() == strongest and colour[strongest] > 1.3 * np.delete(colour, strongest).mean()


def edges(picture: np.ndarray) -> np.ndarray:
    gray = picture.mean(-1)
    return np.hypot(*np.gradient(gray))


def follows(pictures: np.ndarray, hint: str, columns: tuple[int, int] = (0, 128)) -> float:
    """The mean correlation between the edges that are drawn and those of some columns of a hint."""
    wanted = np.asarray(Image.open(HERE.parents[1] / f"assets/pictures/{hint}.png").convert("L")) / 255
    wanted = wanted[:, slice(*columns)]
    return float(np.mean([np.corrcoef(edges(p).ravel(), wanted.ravel())[0, 1] for p in pictures]))


@pytest.mark.parametrize("name, apply", [("pixart_emoji_controlnet", "ControlNetApplyAdvanced"),
                                         ("pixelponder_emoji", "PixStack_PixelPonderApply")])
def test_edges_lie_where_the_hint_has_them(host, name, apply):
    with_hint, without = (drawn(host, name, {(apply, "strength"): strength}) for strength in (1.0, 0.0))
    assert follows(with_hint, "lion_hed") > follows(without, "lion_hed") + 0.1


def test_all_three_families_draw_a_heart_in_the_colour_that_is_asked_for(host):
    graph = json.loads((HERE / "prompts/compare_families.json").read_text(encoding="utf-8"))
    graph["1"]["inputs"]["value"] = "green heart"
    done = host.run(graph)
    assert done.error is None, done.error
    pictures = [np.asarray(Image.open(file).convert("RGB")) / 255 for file in done.images]
    assert {len(p) for p in pictures} == {64, 128} and len(pictures) == 12
    for first in range(0, 12, 4):  # of each family
        inked = np.concatenate([p[p.min(-1) < 0.8] for p in pictures[first : first + 4]])
        assert inked.mean(0).argmax() == 1


def test_each_region_follows_its_own_hint(host):
    def halves(strength):
        pictures = drawn(host, "pixelponder_emoji_regions", {("PixStack_PixelPonderApply", "strength"): strength})
        left, right = pictures[:, :, :64], pictures[:, :, 64:]
        return follows(left, "lion_hed", (0, 64)), follows(right, "cat_face_hed", (64, 128))

    (left, right), (left_without, right_without) = halves(1.0), halves(0.0)
    assert left > left_without + 0.05 and right > right_without + 0.05


def test_the_last_stage_sharpens_an_enlarged_picture(host):
    before, after = drawn(host, "pixelflow_upscale", {("ImageScaleBy", "scale_by"): 1.0})
    sharp = [np.hypot(*np.gradient(picture.mean(-1))) for picture in (before, after)]
    assert np.quantile(sharp[1], 0.98) > 1.2 * np.quantile(sharp[0], 0.98)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.8


def test_pixelflow_draws_what_a_class_looks_like(host):
    pictures = drawn(host, "pixelflow_emoji_classes", {
        ("PixStack_PixelFlowClass", "classes"): "face-smiling, transport-water, monkey-face",
        ("PixStack_PixelFlowSigmas", "steps"): "6"})
    faces, ships, monkeys = (np.concatenate([p[p.min(-1) < 0.8] for p in pictures[i::3]]).mean(0) for i in range(3))
    assert faces[1] > 1.8 * faces[2] and ships[2] > ships[0] + 0.1 and monkeys[0] > 1.5 * monkeys[2]
    assert faces[1] > 1.1 * monkeys[1]  # yellow, not brown


def example(name: str) -> np.ndarray:
    return np.asarray(Image.open(HERE.parents[1] / f"assets/pictures/{name}.png").convert("RGB")) / 255


def test_inpainting_draws_the_painted_part_anew_and_leaves_the_rest(host):
    changed = np.abs(drawn(host, "pixart_emoji_inpaint", {}) - example("rose"))
    painted, kept = changed[:, :80], changed[:, 88:]  # the VAE looks a little across the edge
    assert painted.mean() > 0.1 and kept.mean() < 0.05


def test_the_lora_draws_the_apple_in_the_colours_of_its_style(host):
    """Fluent 3D's red apple is pinker than Noto's: more blue beside its red."""
    noto, between, fluent = drawn(host, "pixart_emoji_lora", {("CLIPTextEncode", "text"): "red apple"})
    red = [p[(p[..., 0] > 0.6) & (p[..., 1] < 0.4)].mean(0) for p in (noto, between, fluent)]
    assert red[0][2] < red[1][2] < red[2][2] and red[2][2] > red[0][2] + 0.1


@pytest.mark.parametrize("name", ["pixart_emoji", "pixelponder_emoji"])
def test_the_last_preview_has_the_colours_of_the_picture(host, name):
    graph = json.loads((HERE / f"prompts/{name}.json").read_text(encoding="utf-8"))
    graph = {i: node for i, node in graph.items() if node["class_type"] not in SHOWN}
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]:
            node["inputs"]["text"] = "red heart"
    done = host.run(graph)
    preview = done.previews[-1][1].convert("RGB")
    picture = Image.open(done.images[0]).convert("RGB").resize(preview.size, Image.Resampling.BOX)
    shown, wanted = (np.asarray(image).ravel() / 255 for image in (preview, picture))
    assert np.abs(shown - wanted).mean() < 0.2
    assert np.corrcoef(shown, wanted)[0, 1] > 0.7
