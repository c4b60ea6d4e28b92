"""PixArt's ControlNet workflows where ComfyUI computes in half precision, as it does on GPUs: real tensors, whatever
dtype the base network and the ControlNet are stored in."""

import json

import numpy
import pytest
import torch
from conftest import ROOT
from PIL import Image

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STORED = ("fp32", "bf16", "fp16", "fp8_e4m3fn")
# Grey levels of 255, on average over the picture. Measured: up to 0.67 in 16 bits, up to 2.5 where fp8 is stored, and
# the ControlNet changes 23 of them, 5.5 under the mask.
NEAR, NEAR_FP8 = 1.0, 3.0
# Every storage of either beside bf16, and fp8 in both; the other pairs were drawn once and are as near.
PAIRS = [(base, control) for base in STORED for control in STORED if "bf16" in (base, control)] + [STORED[-1:] * 2]
EVERY = [(BF16, *pair) for pair in PAIRS] + [(FP16, stored, stored) for stored in STORED]


@pytest.fixture
def compute_in(host, monkeypatch):
    """compute_in(dtype): what ComfyUI believes of its device from then on."""
    import comfy.model_management as mm

    def choose(dtype):
        monkeypatch.setattr(mm, "should_use_bf16", lambda *_, **__: dtype == BF16)
        monkeypatch.setattr(mm, "should_use_fp16", lambda *_, **__: dtype == FP16)
        monkeypatch.setattr(mm, "vae_dtype", lambda *_, **__: FP32)  # core's: a minute a picture in bf16 on a CPU

    return choose


def graph_of(name: str, masked=False, strength=1.0, base="default", control="default") -> dict:
    """The shipped workflow, smaller and of two steps; base, control: what their loaders store the weights in."""
    graph = json.loads((ROOT / "tests/workflows/prompts" / f"{name}.json").read_text(encoding="utf-8"))
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    inputs["PixStack_PixArtLoader"]["dtype"] = base
    inputs["PixStack_PixArtControlNetLoader"]["dtype"] = control
    inputs.get("PixStack_PixArtSigmas", inputs.get("KSampler"))["steps"] = 2
    inputs["PixStack_PixArtCanvas"]["batch_size"] = 2
    if name == "pixart_controlnet":
        inputs["PixStack_PixArtCanvas"]["resolution"] = "256"
    inputs["ControlNetApplyAdvanced"]["strength"] = strength
    if masked:  # core's node has no mask, ours is the same with one
        next(n for n in graph.values() if n["class_type"] == "ControlNetApplyAdvanced").update(
            class_type="PixStack_PixArtControlNetApply")
        graph["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "example.png", "channel": "alpha"}}
        inputs["ControlNetApplyAdvanced"]["mask"] = ["mask", 0]
    return graph


def draw(host, graph: dict) -> numpy.ndarray:
    """What the workflow saves, (pictures, height, width, 3) in 0 to 255."""
    run = host.run(graph)
    assert not run.errors, run.errors
    saved = [path for path in run.images if path.parent == host.output]
    return numpy.stack([numpy.asarray(Image.open(path).convert("RGB"), dtype=float) for path in saved])


@pytest.fixture(scope="module")
def in_float32(host) -> dict:
    """(workflow, masked) -> its pictures in float32, and without the ControlNet (workflow, None)."""
    drawn = {}
    for name in ("pixart_controlnet", "pixart_emoji_controlnet"):
        drawn[name, None] = draw(host, graph_of(name, strength=0.0))
        drawn |= {(name, masked): draw(host, graph_of(name, masked)) for masked in (False, True)}
    return drawn


@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["pixart_controlnet", "pixart_emoji_controlnet"])
def test_a_controlnet_workflow_draws_in_half_precision_what_it_draws_in_float32(
    name, dtype, masked, host, compute_in, in_float32,
):
    compute_in(dtype)
    drawn = draw(host, graph_of(name, masked))
    assert abs(drawn - in_float32[name, masked]).mean() < NEAR
    if "emoji" in name:  # the other's stand-ins draw mostly black and white, which hides what guides them
        assert abs(drawn - in_float32[name, None]).mean() > 5


@pytest.mark.parametrize(("dtype", "base", "control"), EVERY, ids=str)
def test_base_and_controlnet_may_be_stored_differently(dtype, base, control, host, compute_in, in_float32):
    compute_in(dtype)
    drawn = draw(host, graph_of("pixart_emoji_controlnet", True, base=base, control=control))
    near = NEAR_FP8 if "fp8_e4m3fn" in (base, control) else NEAR
    assert abs(drawn - in_float32["pixart_emoji_controlnet", True]).mean() < near


@pytest.mark.parametrize("control", STORED)
def test_a_base_that_computes_in_float32_takes_a_controlnet_of_any_storage(control, host, compute_in, in_float32):
    compute_in(FP32)
    drawn = draw(host, graph_of("pixart_emoji_controlnet", control=control))
    assert abs(drawn - in_float32["pixart_emoji_controlnet", False]).mean() < NEAR
