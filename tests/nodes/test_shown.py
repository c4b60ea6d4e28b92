"""Texts that stand below nodes in the browser."""
import json

import pytest
from conftest import ROOT


def texts(host, graph: dict) -> dict[str, str]:
    """The last text below each node, by the node's class."""
    run = host.run(graph, fresh=False)
    assert not run.errors, run.errors
    return {graph[event["node"]]["class_type"].removeprefix("PixStack_"): event["text"]
            for kind, event in run.events if kind == "progress_text"}


def previewed(kind: str, **inputs) -> dict:
    return {"1": {"class_type": f"PixStack_{kind}", "inputs": inputs},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}


def prompt(name: str) -> dict:
    return json.loads((ROOT / "tests/workflows/prompts" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind, inputs, part", [
    ("PixArtCanvas", {"resolution": "512", "shape": "exactly width x height", "width": 528, "height": 1504},
     "528 x 1504"),
    ("UltraPixelCanvas", {"shape": "square", "side": 2048, "width": 1024, "height": 1024}, "2048"),
])
def test_a_canvas_says_what_kind_of_size_it_has(host, kind, inputs, part):
    assert part in texts(host, previewed(kind, batch_size=1, **inputs))[kind]


def test_pixelflows_canvas_shows_its_stages_and_warns_far_above_the_trained_size(host):
    graph = prompt("pixelflow_text_to_image")
    (canvas,) = (i for i, node in graph.items() if node["class_type"] == "PixStack_PixelFlowCanvas")
    graph[canvas]["inputs"] |= {"shape": "custom (width, height)", "width": 128, "height": 64}
    wanted = {i: graph[i] for i in (canvas, graph[canvas]["inputs"]["model"][0])}
    wanted["end"] = {"class_type": "PreviewAny", "inputs": {"source": [canvas, 0]}}
    assert texts(host, wanted)["PixelFlowCanvas"] == "32x16 → 64x32 → 128x64 pixels"
    graph[canvas]["inputs"]["width"] = 192
    assert "3 times the 64x64 pixels of its training" in texts(host, wanted)["PixelFlowCanvas"]


def test_a_lora_reports_and_a_prompt_that_is_cut_warns(host):
    graph = prompt("pixart_emoji_lora")
    encode, lora = (next(i for i, node in graph.items() if node["class_type"] == kind)
                    for kind in ("CLIPTextEncode", "PixStack_PixArtLoraLoader"))
    graph[encode]["inputs"]["text"] = "a red apple " * 200
    sources = graph[encode]["inputs"]["clip"][0], graph[lora]["inputs"]["model"][0]
    wanted = {i: graph[i] for i in (encode, lora, *sources)}
    for i in (encode, lora):
        wanted[f"end {i}"] = {"class_type": "PreviewAny", "inputs": {"source": [i, 0]}}
    found = texts(host, wanted)
    assert "layers" in found["PixArtLoraLoader"]
    assert "Its end is left out" in found["CLIPTextEncode"]
