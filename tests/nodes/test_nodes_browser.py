"""What the widgets in the browser show is what the nodes do: sizes, costs, warnings, errors and schedules."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

EMBEDDED = ROOT / "assets" / "diffusion_models"
PIXART, PIXELFLOW = "pixart_emoji_128.safetensors", "pixelflow_emoji_64.safetensors"
PIXART_LOADER = {"node": "PixStack_PixArtLoader", "values": dict(
    model_name=PIXART, variant="auto", prediction="auto", positions="auto", weights="ema", dtype="default")}
PIXELFLOW_LOADER = {"node": "PixStack_PixelFlowLoader", "values": dict(
    model_name=PIXELFLOW, weights="ema", dtype="default")}
PIXART_VALUES = dict(resolution="1024", shape="1:1", width=1024, height=1024, batch_size=1)
ULTRA_VALUES = dict(shape="square", side=2048, width=2048, height=1024, batch_size=1)
FLOW_VALUES = dict(shape="square", width=256, height=128, batch_size=1)
SIGMAS_VALUES = dict(steps="10", shift="1.0", start_stage=0, end_stage=-1)
SAMPLER_VALUES = dict(solver="euler", guidance="auto", custom_guidance="", reference_noise=False, latent="auto")


@pytest.fixture(scope="module")
def ours(host):
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    modules = {name: next(module for key, module in sys.modules.items() if key.endswith(f".nodes.{name}"))
               for name in ("browser", "size_picker", "stage_editor")}
    ours = SimpleNamespace(nodes=nodes, **modules)
    ours.model = nodes["PixStack_PixArtLoader"].execute(**PIXART_LOADER["values"]).args[0]
    ours.flow = nodes["PixStack_PixelFlowLoader"].execute(**PIXELFLOW_LOADER["values"]).args[0]
    return ours


def picked(ours, node, values, **more) -> dict:
    return ours.size_picker.answer({"node": f"PixStack_{node}Canvas", "values": values, **more})


def staged(ours, node, values, **more) -> dict:
    return ours.stage_editor.answer({"node": f"PixStack_PixelFlow{node}", "values": values, **more})


def drawn(ours, node, values, **inputs):
    """(what came out, [width, height]) of running a canvas."""
    out = ours.nodes[f"PixStack_{node}Canvas"].execute(**values, **inputs)
    if node == "PixArt":
        return out, list(out.args[1:3])
    if node == "UltraPixel":
        first = out.args[3].split(" pixels")[0]
        return out, [int(edge) for edge in first.split(" x ")]
    height, width = out.args[0]["samples"].shape[-2:]
    return out, [width, height]


@pytest.mark.parametrize(("node", "values", "model"), [
    *(("PixArt", dict(resolution=side), None) for side in ("256", "512", "1024", "2048", "2880")),
    ("PixArt", dict(resolution="auto"), "model"), ("PixelFlow", {}, "flow"), ("UltraPixel", dict(side=1536), None),
])  # fmt: skip
def test_a_size_to_choose_is_the_one_that_the_node_then_takes(ours, node, values, model):
    values = {**{"PixArt": PIXART_VALUES, "PixelFlow": FLOW_VALUES, "UltraPixel": ULTRA_VALUES}[node], **values}
    loader = {"model": PIXART_LOADER, "flow": PIXELFLOW_LOADER, None: None}[model]
    inputs = {"model": getattr(ours, model)} if model else {}
    choices = picked(ours, node, values, model=loader)["choices"]
    counts = {"2880": 37, "auto": 11}
    assert len(choices) == {"PixArt": counts.get(values.get("resolution"), 40), "PixelFlow": 5}.get(node, 11)
    for one in choices:
        set_to = {**values, **{name: value for name, value in one["set"].items() if name in values}}
        assert drawn(ours, node, set_to, **inputs)[1] == one["size"]
        assert picked(ours, node, set_to, model=loader)["size"] == one["size"]


@pytest.mark.parametrize("values", [
    {}, dict(shape="16:9"), dict(shape="nearest to width x height", width=800, height=1600),
    dict(shape="exactly width x height", width=1504, height=800),
    dict(shape="exactly width x height", width=4096, height=4096), dict(resolution="auto"),
])  # fmt: skip
@pytest.mark.parametrize("known", [False, True])
def test_what_a_pixart_canvas_says_is_shown_before_it_runs(ours, values, known):
    values = {**PIXART_VALUES, **values}
    out, size = drawn(ours, "PixArt", values, **({"model": ours.model} if known else {}))
    said = picked(ours, "PixArt", values, model=PIXART_LOADER if known else None)
    (sentence,) = said["notes"] + said["warnings"]
    about = out.args[3].partition(": ")
    assert said["size"] == size and about[0].endswith(f"{said['tokens']} tokens")
    assert sentence.lower() == about[2].lower()
    assert bool(said["warnings"]) == any(word in sentence for word in ("Expect", "distorted", "expect"))


@pytest.mark.parametrize("values", [{}, dict(side=8192), dict(shape="custom (width, height)", width=7000, height=1001)])
def test_what_an_ultrapixel_canvas_reports_is_shown_before_it_runs(ours, values):
    values = {**ULTRA_VALUES, **values}
    out, size = drawn(ours, "UltraPixel", values)
    said, report = picked(ours, "UltraPixel", values), out.args[3]
    assert said["size"] == size and f"= {said['tokens']} tokens" in report
    warnings = [line.removeprefix("Mind: ") for line in report.splitlines() if line.startswith("Mind: ")]
    assert [one.lower() for one in said["warnings"]] == [one.lower() for one in warnings]
    for (_, gigabytes), part in zip(said["memory"], ("Stage C", "Stage B 700M", "Stage A"), strict=True):
        assert f"{part} {gigabytes:.1f} GB" in report


def test_the_stages_of_a_pixelflow_canvas_are_shown_before_it_runs(ours):
    values = {**FLOW_VALUES, "shape": "custom (width, height)"}
    said = picked(ours, "PixelFlow", values, model=PIXELFLOW_LOADER)
    text = drawn(ours, "PixelFlow", values, model=ours.flow)[0].ui.value
    shown = " → ".join(f"{width}x{height}" for width, height in (*said["inner"], said["size"]))
    assert text.splitlines() == [f"{shown} pixels", *said["warnings"]] and said["warnings"]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("node", "family"), [("PixArt", "pixart"), ("PixelFlow", "pixelflow")])
def test_memory_is_what_comfyui_keeps_free_for_a_step(ours, monkeypatch, node, family, flash):
    mm = import_module("comfy.model_management")
    monkeypatch.setattr(mm, "pytorch_attention_flash_attention", lambda: flash)  # as on most GPUs
    model, loader = (ours.model, PIXART_LOADER) if family == "pixart" else (ours.flow, PIXELFLOW_LOADER)
    values = {**(PIXART_VALUES | {"resolution": "auto"} if node == "PixArt" else FLOW_VALUES), "batch_size": 3}
    latent = drawn(ours, node, values, model=model)[0].args[0]["samples"]
    ((_, gigabytes),) = picked(ours, node, values, model=loader)["memory"]
    assert gigabytes == pytest.approx(model.model.memory_required([2 * latent.shape[0], *latent.shape[1:]]) / 1e9)


def test_a_reference_canvas_is_shown_with_its_two_halves(ours):
    values = dict(resolution="1024", shape="3:2", fit="crop")
    said = picked(ours, "PixArtReference", values, linked=["image"])
    vae = SimpleNamespace(encode=lambda picture: picture.movedim(-1, 1)[:, :, ::8, ::8])
    picture = torch.zeros(1, 64, 64, 3)
    latent = ours.nodes["PixStack_PixArtReferenceCanvas"].execute(**values, image=picture, vae=vae).args[0]["samples"]
    assert said["size"] == [8 * latent.shape[-1], 8 * latent.shape[-2]]
    assert said["inner"] == [[said["size"][0] // 2, said["size"][1]]]


@pytest.mark.parametrize(("node", "values"), [
    ("PixArt", dict(shape="exactly width x height", width=1000)), ("PixArt", dict(shape="round")),
    ("PixArt", dict(width=8)), ("UltraPixel", dict(shape="as the image")), ("UltraPixel", dict(side=8192, shape=3)),
    ("UltraPixel", dict(shape="custom (width, height)", width=16384, height=16384)),
    ("PixelFlow", dict(shape="custom (width, height)", width=248)),
])  # fmt: skip
def test_a_wrong_value_is_answered_with_what_the_node_would_say(ours, node, values):
    values = {**{"PixArt": PIXART_VALUES, "PixelFlow": FLOW_VALUES, "UltraPixel": ULTRA_VALUES}[node], **values}
    inputs = {"model": ours.flow} if node == "PixelFlow" else {}
    with pytest.raises(ValueError) as refused:
        drawn(ours, node, values, **inputs)
    said = picked(ours, node, values, model=PIXELFLOW_LOADER)
    assert said["error"] == str(refused.value)
    assert "choices" in said or not str(values["shape"]).startswith(("exactly", "custom"))


@pytest.mark.parametrize(("node", "values", "linked", "waits"), [
    ("PixArt", PIXART_VALUES, ["image"], "image"), ("PixArt", PIXART_VALUES, ["ratio"], "ratio"),
    ("PixArt", PIXART_VALUES, ["shape"], "shape"), ("PixelFlow", FLOW_VALUES, [], "model"),
    ("UltraPixel", {**ULTRA_VALUES, "shape": "as the image"}, ["image"], "image"),
    ("PixArtReference", dict(resolution="auto", shape="as the reference", fit="crop"), ["image"], "image"),
])  # fmt: skip
def test_what_only_a_run_can_know_is_not_guessed(ours, node, values, linked, waits):
    assert picked(ours, node, values, linked=linked) == {"waits": waits}


def test_a_linked_number_that_does_not_count_hinders_nothing(ours):
    assert picked(ours, "PixArt", PIXART_VALUES, linked=["width"])["size"] == [1024, 1024]


def test_a_picture_that_the_browser_shows_decides(ours):
    said = picked(ours, "PixArt", PIXART_VALUES, linked=["image"], image=[1600, 900])
    assert said["size"] == drawn(ours, "PixArt", PIXART_VALUES, image=torch.zeros(1, 900, 1600, 3))[1]
    assert said["fixed"]


@pytest.mark.parametrize("node", ["PixArt", "PixelFlow", "UltraPixel"])
def test_what_the_schema_says_does_not_count_changes_no_size(ours, node):
    values = {"PixArt": PIXART_VALUES, "PixelFlow": FLOW_VALUES, "UltraPixel": ULTRA_VALUES}[node]
    shapes = ours.nodes[f"PixStack_{node}Canvas"].define_schema().inputs
    menu = next(spec for spec in shapes if spec.id == "shape")
    inputs = {"model": ours.flow} if node == "PixelFlow" else {}
    for shape in set(menu.options) - {"as the image"}:
        for spec in shapes:
            counts = spec.extra_dict.get("pixstack_counts")
            if counts and spec.id in values:
                other = {**values, "shape": shape, spec.id: 512}
                before = drawn(ours, node, {**values, "shape": shape}, **inputs)[1]
                changes = drawn(ours, node, other, **inputs)[1] != before
                assert changes == (shape in counts["shape"]), f"{spec.id} at {shape}"


def test_a_file_is_described_without_being_loaded(ours):
    assert ours.browser.configuration(**dict(loader=PIXART_LOADER["node"], values=PIXART_LOADER["values"])) == (
        ours.model.model.config)
    assert ours.browser.configuration("PixStack_PixelFlowLoader", PIXELFLOW_LOADER["values"]) == ours.flow.model.config


@pytest.mark.parametrize("name", ["nothing.safetensors", "../../x", PIXELFLOW, 7, None])
def test_a_model_that_cannot_be_read_is_an_unknown_one(ours, name):
    loader = {**PIXART_LOADER, "values": {**PIXART_LOADER["values"], "model_name": name}}
    assert picked(ours, "PixArt", {**PIXART_VALUES, "resolution": "auto"}, model=loader)["size"] == [1024, 1024]


@pytest.mark.parametrize("body", [
    {}, [], {"node": "KSampler", "values": {}}, {"node": "PixStack_PixArtCanvas", "values": {}},
    {"node": "PixStack_PixArtCanvas", "values": PIXART_VALUES, "image": [0, 1]},
    {"node": "PixStack_PixArtCanvas", "values": PIXART_VALUES, "model": "x"},
])  # fmt: skip
def test_what_no_widget_sends_is_refused(ours, body):
    with pytest.raises(ValueError, match="no state of a node"):
        ours.size_picker.answer(body)


# --- Stages

@pytest.mark.parametrize("values", [{}, dict(steps="20, 10, 5", shift="1, 1, 2"), dict(steps="3", start_stage=1)])
def test_marks_stand_where_the_steps_fall(ours, values):
    values = {**SIGMAS_VALUES, **values}
    said = staged(ours, "Sigmas", values, model=PIXELFLOW_LOADER)
    sigmas = ours.nodes["PixStack_PixelFlowSigmas"].execute(model=ours.flow, **values).args[0]
    assert [1 - mark for stage in said["marks"] for mark in stage] == pytest.approx(sigmas[:-1].tolist(), abs=1e-6)
    assert said["total"] == len(sigmas) - 1 and said["error"] is None


@pytest.mark.parametrize(("values", "stages", "steps"), [
    ({}, 4, [10] * 4), (dict(steps="20, 10, 5"), 3, [20, 10, 5]), (dict(steps="x"), 4, [10] * 4),
    (dict(steps="1, 2, 3, 4, 5", shift="2"), 5, [1, 2, 3, 4, 5]),
])  # fmt: skip
def test_an_unknown_model_has_the_stages_of_the_lists(ours, values, stages, steps):
    said = staged(ours, "Sigmas", {**SIGMAS_VALUES, **values})
    assert (said["stages"], said["rows"][0]["values"]) == (stages, steps)


@pytest.mark.parametrize(("values", "words"), [
    (dict(steps="20, x"), "is not a number"), (dict(steps=""), "steps is empty"), (dict(shift="0"), "above 0"),
    (dict(steps="20, 10"), "has 2 numbers, this model has 3 stages"),
    (dict(start_stage=2, end_stage=1), "do not go together"), (dict(start_stage=9), "is 9, not in 0 to 7"),
])  # fmt: skip
def test_an_error_of_the_stages_is_the_nodes(ours, values, words):
    values = {**SIGMAS_VALUES, **values}
    with pytest.raises(ValueError) as refused:
        ours.nodes["PixStack_PixelFlowSigmas"].execute(model=ours.flow, **values)
    said = staged(ours, "Sigmas", values, model=PIXELFLOW_LOADER)
    assert said["error"] == str(refused.value) and words in said["error"]
    assert all(len(row["values"]) == 3 for row in said["rows"])


def test_a_million_steps_are_not_drawn(ours):
    said = staged(ours, "Sigmas", {**SIGMAS_VALUES, "steps": "1000000000", "shift": "nan"})
    assert "marks" not in said and all(value == value for row in said["rows"] for value in row["values"])


@pytest.mark.parametrize("name", ["demo", "evaluation", "draft"])
def test_a_preset_fits_the_node_that_offers_it(ours, name):
    for node, values in (("Sigmas", SIGMAS_VALUES), ("Sample", dict(
            seed=0, steps=7, cfg=1.0, shift=1.0, solver="euler", start_stage=0, end_stage=-1))):
        preset = next(one for one in staged(ours, node, values)["presets"] if one["name"] == name)
        said = staged(ours, node, {**values, **preset["set"]})
        assert said["error"] is None and set(preset["set"]) <= set(values)


def test_custom_guidance_is_shown_by_stage_and_other_guidance_as_it_spreads(ours):
    custom = staged(ours, "Sampler", {**SAMPLER_VALUES, "guidance": "custom", "custom_guidance": "1, 2, 3"})
    assert (custom["stages"], custom["rows"][0]["values"]) == (3, [1, 2, 3])
    scaled = staged(ours, "Sampler", {**SAMPLER_VALUES, "guidance": "scaled"})
    assert scaled["rows"][0]["values"] == pytest.approx([1, 1.5, 3, 4]) and scaled["cfg"] == 4
    assert "is empty" in staged(ours, "Sampler", {**SAMPLER_VALUES, "guidance": "custom"})["error"]
