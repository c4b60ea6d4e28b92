"""What every shipped workflow has besides running: a prompt, a picture, notes, fixed seeds, places to download from."""

import json

import pytest
from conftest import ROOT, WORKFLOWS
from PIL import Image
from pixstack.tools import workflow as conversion
from pixstack.tools.make_workflow_pictures import CARDS

EMBEDDED = ("pixelflow_emoji_64.safetensors", "pixelflow_emoji_t5.safetensors")
FILES = {"PixStack_PixelFlowLoader": "diffusion_models", "PixStack_PixelFlowTextEncoderLoader": "text_encoders"}


def nodes(workflow):
    return json.loads(workflow.read_text(encoding="utf-8"))["nodes"]


def test_it_is_the_prompt_it_was_made_from(workflow, host):
    prompt = json.loads((ROOT / "tests" / "prompts" / workflow.name).read_text(encoding="utf-8"))
    converted = conversion.read(workflow, host.object_info())
    assert {i: (n["class_type"], n["inputs"]) for i, n in converted.items()} == {
        i: (n["class_type"], n["inputs"]) for i, n in prompt.items()}


def test_every_prompt_has_its_workflow():
    assert {p.name for p in (ROOT / "tests" / "prompts").glob("*.json")} == {p.name for p in WORKFLOWS}


def test_it_has_a_picture(workflow):
    with Image.open(workflow.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.width == 512


def test_notes_say_what_to_change(workflow):
    assert any(n["type"] == "MarkdownNote" and len(n["widgets_values"][0]) > 200 for n in nodes(workflow))


def test_its_seeds_stay_as_they_are(workflow):
    seeds = {"PixStack_PixelFlowSample": 1, "RandomNoise": 1}  # place of the control behind the seed
    controls = [n["widgets_values"][seeds[n["type"]]] for n in nodes(workflow) if n["type"] in seeds]
    assert controls and set(controls) == {"fixed"}


def test_every_file_is_embedded_or_can_be_downloaded(workflow):
    for node in nodes(workflow):
        if node["type"] in FILES:
            name = node["widgets_values"][0]
            (model,) = node["properties"].get("models") or [None]
            assert (model is None) == (name in EMBEDDED), name
            if model:
                assert model["name"] == name and model["directory"] == FILES[node["type"]]
                assert model["url"].startswith("https://huggingface.co/")


@pytest.mark.parametrize("name", CARDS)
def test_a_workflow_that_cannot_be_drawn_here_has_its_card_described(name):
    assert name in {p.stem for p in WORKFLOWS}
