"""Every shipped workflow through a ComfyUI, on a virtual GPU (virtual_gpu.py), without float64: all of them
where it computes in bf16, and one of each family in float16."""
from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import bases
import cascade_weights
import conftest
import pytest
import torch
import virtual_gpu
from conftest import ROOT, SHIPPED
from pixstack.tools.host import Host
from virtual_gpu import VirtualGPU, Waits

pytestmark = pytest.mark.long

FOLDER = tempfile.TemporaryDirectory()
STEPS, SMALLER = 2, 4
IN_FP16 = ("pixart_controlnet", "pixart_emoji_controlnet", "pixelflow_text_to_image", "pixelponder_emoji",
           "ultrapixel_2048", "annotators")


@cache
def host() -> Host:
    """A ComfyUI with the tests' stand-ins, of a card of 24 GB."""
    made = Host(bases.filled(Path(FOLDER.name) / "base", Path.cwd())).start()
    conftest.take_stand_ins()
    cascade_weights.shrink_core()
    return made


def graph_of(name: str) -> dict:
    """The workflow's prompt, of few steps, and UltraPixel's of small pictures: its decoder goes by strips."""
    graph = json.loads((ROOT / "tests/workflows/prompts" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if isinstance(steps := node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = min(steps, STEPS)
        if node["class_type"] == "SplitSigmas":
            node["inputs"]["step"] = min(node["inputs"]["step"], STEPS - 1)
        if isinstance(steps, str):  # of every stage
            node["inputs"]["steps"] = ", ".join(["2"] * len(steps.split(",")))
        if node["class_type"] == "PixStack_UltraPixelCanvas":
            node["inputs"] |= {side: node["inputs"][side] // SMALLER // 16 * 16 for side in ("width", "height")}
    return graph


def drawn(name: str, half: torch.dtype) -> Waits:
    """The waits of our own lines between the last two steps of the node that counts the most of them."""
    comfyui, marks = host(), defaultdict(list)
    virtual_gpu.be_gpu_of_comfyui(half)
    with VirtualGPU() as gpu:
        def event(kind, about):
            if kind == "progress":
                marks[about["node"]].append(dict(gpu.waits))

        run = comfyui.run(graph_of(name), on_event=event)
    if run.errors:
        raise RuntimeError("; ".join(map(str, run.errors)))
    if not run.images and "folder" not in name:
        raise AssertionError("no picture came out")
    steps = [(after.get(key, 0) - before.get(key, 0), key) for each in marks.values() if len(each) > 1
             for before, after in [each[-2:]] for key in after]
    found: dict[str, float] = defaultdict(float)
    for n, key in steps:
        if n and any(f" at {folder[1:]}" in key for folder in virtual_gpu.OURS):
            found[key] = max(found[key], n)
    return Waits(dict(found))


REHEARSALS = {
    **{f"{name}, bf16": partial(drawn, name, torch.bfloat16) for name in SHIPPED},
    **{f"{name}, fp16": partial(drawn, name, torch.float16) for name in IN_FP16},
}


@pytest.mark.parametrize("rehearsal", REHEARSALS)
def test_a_workflow_draws_on_a_gpu_without_float64(rehearsal, rehearsed_on_gpu):
    virtual_gpu.check("workflow " + rehearsal.rpartition(", ")[0], rehearsed_on_gpu[rehearsal])
