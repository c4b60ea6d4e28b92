"""What comes in at a node and is not what its schema says ends in a sentence, before the node does anything."""
from importlib import import_module
from types import SimpleNamespace

import numpy
import pytest
import torch
from pixstack.tools.host import Host


@pytest.fixture(scope="module")
def ours(host) -> dict:
    return {name.removeprefix("PixStack_"): node for name, node in import_module("nodes").NODE_CLASS_MAPPINGS.items()
            if name.startswith("PixStack_")}


PICTURE = torch.rand(1, 8, 8, 3)
PROMPT = [[torch.rand(1, 4, 8), {}]]


def canny(**inputs):
    return {"image": PICTURE, "detector": "opencv", "low": 100.0, "high": 200.0, "resolution": 0, **inputs}


@pytest.mark.parametrize("inputs, words", [
    ({"detector": None}, r"detector is empty \(None\), and the node needs one of its menu"),
    ({"detector": 5}, "detector is of type int"),
    ({"detector": "unknown"}, "detector='unknown' is not one of"),
    ({"low": "much"}, "low is of type str, and the node needs a number"),
    ({"low": 300.0}, "low=300 is above high=200"),
    ({"image": None}, r"image is empty \(None\), and the node needs IMAGE there"),
    ({"image": [PICTURE]}, "image is of type list"),
    ({"image": PICTURE.numpy()}, "image is of type ndarray"),
    ({"image": PICTURE[:, :0]}, "image has no pixels"),
    ({"image": PICTURE[0]}, "image has the shape"),
    ({"image": PICTURE * float("nan")}, "image holds values that are no numbers"),
])  # fmt: skip
def test_a_value_that_another_node_gives_is_checked_like_one_that_a_person_sets(ours, inputs, words):
    with pytest.raises(ValueError, match=words):
        ours["CannyEdges"].execute(**canny(**inputs))


def test_numbers_of_numpy_are_numbers(ours):
    given = canny(low=numpy.float32(100), high=numpy.float64(200), resolution=numpy.int64(0))
    assert ours["CannyEdges"].execute(**given).args[0].shape == PICTURE.shape


@pytest.mark.parametrize("name, value, words", [
    ("model", "x", "model is of type str, and the node needs MODEL"),
    ("model", object(), "model is of type object, and the node needs MODEL"),
    ("positive", None, "positive is empty"),
    ("positive", {}, "positive is of type dict"),
    ("positive", [5], "positive holds an entry that is no prompt"),
    ("positive", [[torch.rand(1, 0, 8), {}]], "positive holds a prompt of no tokens"),
    ("positive", [[torch.full((1, 4, 8), float("inf")), {}]], "a prompt with values that are no numbers"),
    ("positive", [[torch.rand(1, 4, 8), {"pooled_output": torch.full((1, 4), float("nan"))}]], "that are no numbers"),
    ("positive", [[PROMPT[0][0], {"strength": float("nan")}]], "positive holds a prompt whose strength is nan"),
    ("negative", [[PROMPT[0][0], {"start_percent": float("inf")}]], "a prompt whose start_percent is inf"),
    ("latent", torch.rand(1, 4, 8, 8), "latent is of type Tensor"),
    ("latent", {}, "latent holds samples that are None"),
    ("latent", {"samples": torch.rand(8, 8)}, r"latent has samples of the shape \[8, 8\]"),
    ("latent", {"samples": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, "no finite numbers"),
])  # fmt: skip
def test_an_object_that_is_none_is_told_by_its_input(ours, name, value, words):
    good = {"model": SimpleNamespace(get_model_object=None), "positive": PROMPT, "negative": PROMPT,
            "latent": {"samples": torch.zeros(1, 3, 8, 8)}}
    numbers = {"seed": 0, "steps": 1, "cfg": 1.0, "shift": 1.0, "solver": "euler", "start_stage": 0, "end_stage": 0}
    with pytest.raises(ValueError, match=words):
        ours["PixelFlowSample"].execute(**{**good, **numbers, name: value})


@pytest.mark.parametrize("value", [torch.zeros(3), "x", 5, {}], ids=["tensor", "text", "number", "mapping"])
def test_an_object_of_ours_is_not_taken_for_another(ours, value):
    with pytest.raises(ValueError, match="conditions is of type"):
        ours["PixelPonderCondition"].execute(image=PICTURE, kind="canny", strength=1.0, priority=0, start_percent=0.0,
                                             end_percent=1.0, conditions=value)


def test_half_of_a_character_in_a_prompt_is_refused(ours):
    clip = SimpleNamespace(tokenize=None)
    with pytest.raises(ValueError, match=r"text holds half of a character \(U\+D83D\).*type it again"):
        ours["PixArtTextEncode"].execute(clip=clip, text="a smile \ud83d", tokens="300", clean_caption=False)


@pytest.mark.parametrize("node, inputs, words", [
    ("LoadEntry", {"folder": "dataset", "index": -2**63}, "index is -9223372036854775808, not in 0 to"),
    ("PixelFlowSigmas", {"steps": "2", "shift": "1e309"}, "shift='1e309' holds a number that is not finite"),
])  # fmt: skip
def test_what_a_node_looks_at_beforehand_keeps_to_its_bounds(ours, node, inputs, words):
    looked_at = {name: value for name, value in inputs.items() if name in ours[node].CHECKED}
    assert words in ours[node].validate_inputs(**looked_at)


@pytest.mark.parametrize("node, menus", [
    ("PixelFlowTextEncoderLoader", ("encoder_name", "dtype", "device", "type")), ("PixArtSampler", ("algorithm",)),
    ("ExamplePicture", ("picture",)), ("CannyEdges", ("detector",)), ("PixArtPrompt", ("style",)),
])  # fmt: skip
def test_null_in_a_menu_is_an_error_with_the_menu_s_name(host: Host, node, menus, monkeypatch):
    from soak_loaders import Taken, widgets

    monkeypatch.setitem(import_module("nodes").NODE_CLASS_MAPPINGS, "Soak_Taken", Taken)
    inputs = widgets(host.object_info(), f"PixStack_{node}")
    if node == "CannyEdges":
        inputs["image"] = ["picture", 0]
    for menu in menus:
        graph = {"picture": {"class_type": "PixStack_ExamplePicture", "inputs": {"picture": "rose"}},
                 "node": {"class_type": f"PixStack_{node}", "inputs": {**inputs, menu: None}},
                 "end": {"class_type": "Soak_Taken", "inputs": {"value": ["node", 0], "name": ""}}}
        run = host.run(graph)
        assert run.error and menu in run.error.message, run.errors
        assert "Error" not in run.error.message.replace("ValueError", "").split(":")[0]
