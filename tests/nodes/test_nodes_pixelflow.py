"""PixelFlow's nodes inside a real ComfyUI: sampling, previews, guidance, patches, and what is refused."""

import argparse
import copy
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import dynamic_vram
import pytest
import torch
from parity_cases import cases
from PIL import Image, ImageChops
from pixstack.models_impl.pixelflow import sampling
from pixstack.models_impl.pixelflow.config import PRESETS
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule, guidance_scales
from pixstack.models_impl.state_dict import read_file, write_file
from safetensors import safe_open
from test_counts import count
from torch.nn import functional as F
from weights import tiny_pixelflow, tiny_t5

# dopri5 chooses its steps by an error estimate: a velocity that differs by 1e-6 changes the picture by a percent.
TOLERANCE = {"euler": 1e-4, "dopri5": 2e-2}
TEXT, CLASS, ENCODER = "tiny_text.safetensors", "tiny_class.safetensors", "tiny_t5.safetensors"


@pytest.fixture(scope="module")
def flow(host):
    """Our nodes by their short name, the modules of ComfyUI they work with, and tiny models of both kinds."""
    tiny_pixelflow(host.models / "diffusion_models" / TEXT, num_stages=3)
    tiny_pixelflow(host.models / "diffusion_models" / CLASS, text=False)
    tiny_t5(host.models / "text_encoders" / ENCODER)
    known = import_module("nodes").NODE_CLASS_MAPPINGS
    flow = SimpleNamespace(host=host, nodes=known, comfy=import_module("comfy"))
    for name in ("sample", "samplers", "sd", "model_management", "patcher_extension"):
        import_module(f"comfy.{name}")
    flow.cascade = sys.modules[type(sampler(flow)).__module__]
    flow.text, flow.classes = load(flow, TEXT), load(flow, CLASS)
    flow.clip = run(flow, "TextEncoderLoader", encoder_name=ENCODER, dtype="default", device="default")
    return flow


def run(flow, name: str, **inputs):
    """The first output of one of our nodes."""
    return flow.nodes[f"PixStack_PixelFlow{name}"].execute(**inputs)[0]


def load(flow, name: str, weights="ema", dtype="default"):
    return run(flow, "Loader", model_name=name, weights=weights, dtype=dtype)


def prompt(flow, text: str):
    return flow.clip.encode_from_tokens_scheduled(flow.clip.tokenize(text))


def classes(flow, text: str):
    """(positive, negative) conditioning."""
    return flow.nodes["PixStack_PixelFlowClass"].execute(imagenet_class="0: tench", classes=text).args


def conditions(flow, model):
    """(positive, negative) that suit a model."""
    return classes(flow, "207") if model.model.config.num_classes else (prompt(flow, "a red apple"), prompt(flow, ""))


def sampler(flow, solver="euler", guidance="auto", custom_guidance="", reference_noise=False, latent="auto"):
    return run(flow, "Sampler", solver=solver, guidance=guidance, custom_guidance=custom_guidance,
               reference_noise=reference_noise, latent=latent)


def sigmas(flow, model, steps="2", shift="1", start_stage=0, end_stage=-1):
    return run(flow, "Sigmas", model=model, steps=steps, shift=shift, start_stage=start_stage, end_stage=end_stage)


def noise_like(picture, seed=1):
    return torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


def draw(flow, model, conds=None, cfg=3.0, schedule=None, how=None, size=(64, 64), batch=1, latent=None, noise=None,
         seed=1, **more):
    """What core's SamplerCustom does."""
    latent = torch.zeros(batch, 3, *size) if latent is None else latent
    positive, negative = conds or conditions(flow, model)
    with torch.inference_mode():
        return flow.comfy.sample.sample_custom(
            model, noise_like(latent, seed) if noise is None else noise, cfg, how or sampler(flow),
            sigmas(flow, model) if schedule is None else schedule, positive, negative, latent, disable_pbar=True,
            seed=seed, **more,
        )


def watched(flow, model):
    """A clone of the model, and the (rows, size) of every forward pass that it will make."""
    seen, model = [], model.clone()

    def wrapper(executor, x, *args, **kwargs):
        seen.append((len(x), x.shape[-1]))
        return executor(x, *args, **kwargs)

    model.add_wrapper(flow.comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
    return model, seen


def graph(flow, model=TEXT, **changes):
    """A whole graph in API format; `sample__steps=3` changes an input of the node `sample`."""
    nodes = {
        "model": ("PixStack_PixelFlowLoader", dict(model_name=model, weights="ema", dtype="default")),
        "clip": ("PixStack_PixelFlowTextEncoderLoader", dict(encoder_name=ENCODER, dtype="default", device="default")),
        "positive": ("CLIPTextEncode", dict(clip=["clip", 0], text="a red apple")),
        "negative": ("CLIPTextEncode", dict(clip=["clip", 0], text="")),
        "canvas": ("PixStack_PixelFlowCanvas", dict(
            model=["model", 0], shape="square", width=64, height=64, batch_size=1)),
        "sample": ("PixStack_PixelFlowSample", dict(
            model=["model", 0], positive=["positive", 0], negative=["negative", 0], latent=["canvas", 0], seed=1,
            steps=2, cfg=3.0, shift=1.0, solver="euler", start_stage=0, end_stage=-1)),
        "vae": ("VAELoader", dict(vae_name="pixel_space")),
        "decode": ("VAEDecode", dict(samples=["sample", 0], vae=["vae", 0])),
        "save": ("SaveImage", dict(images=["decode", 0], filename_prefix="flow")),
    }
    result = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    for place, value in changes.items():
        node, name = place.split("__")
        result[node]["inputs"][name] = value
    return result


# The cascade


def unguided(flow, model, conds):
    """`predict` of the library's loop, with one forward pass each for the positive and the negative."""
    def velocity(x, timestep, cond):
        _, conditioning = cond[0]
        labels = conditioning.get("pixelflow_class_labels")
        if labels is None:
            conditioning = dict(context=cond[0][0].expand(len(x), -1, -1))
        else:
            conditioning = dict(class_labels=torch.where(labels < 0, 1000, labels).expand(len(x)))
        return model.model.diffusion_model(x, torch.full((len(x),), timestep, dtype=torch.float32), **conditioning)

    def predict(x, timestep, stage, cfg):
        negative = velocity(x, timestep, conds[1])
        return negative + cfg * (velocity(x, timestep, conds[0]) - negative)

    return predict


@pytest.mark.parametrize(
    "kind, policy, solver",
    [("text", "constant", "euler"), ("classes", "scaled", "euler"), ("classes", "scaled", "dopri5")],
)
def test_the_sampler_draws_what_the_library_draws(flow, kind, policy, solver):
    model = getattr(flow, kind)
    stages = model.model.model_sampling.stages
    scales = guidance_scales(policy, 3.0, stages.num_stages)
    schedule = CascadeSchedule.build(stages, 2, 1.5, scales, solver)
    noise, small = noise_like(torch.zeros(1, 3, 64, 64)), 64 // 2 ** (stages.num_stages - 1)
    with torch.inference_mode():
        expected = sampling.CascadeFlow(stages).sample(
            unguided(flow, model, conditions(flow, model)), noise[..., :small, :small], schedule,
            flow.cascade.StageNoise(1),
        )
    drawn = draw(flow, model, schedule=sigmas(flow, model, shift="1.5"), how=sampler(flow, solver), noise=noise)
    assert (drawn - expected).abs().max() < TOLERANCE[solver] * expected.abs().max()


def cascades(config):
    return [p for p in cases(config) if p.stem.startswith("pixelflow_cascade")]


def test_the_reference_s_cascades_come_out_of_the_nodes(flow, request, monkeypatch):
    files = cascades(request.config)
    assert files, "no parity case of a cascade was found"
    for file in files:
        with safe_open(file, "pt") as case:
            tensors, config = {k: case.get_tensor(k) for k in case.keys()}, json.loads(case.metadata()["config"])
        weights = flow.host.models / "diffusion_models" / f"{file.stem}.pt"
        torch.save({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}, weights)
        params, stages = config["model"], config["num_stages"]
        weights.with_suffix(".yaml").write_text(
            json.dumps({"model": {"params": params}, "scheduler": {"num_stages": stages}})
        )
        model = load(flow, weights.name)
        picture = tensors["output.image"].movedim(-1, 1)
        noise = F.pad(start := tensors["input.noise0"], (0, picture.shape[-1] - start.shape[-1],
                                                         0, picture.shape[-2] - start.shape[-2]))
        monkeypatch.setattr(flow.cascade.StageNoise, "__call__", lambda _, stage, shape, t=tensors: t[
            f"input.noise{stage}"][: shape[0]])
        if params["num_classes"]:
            conds = classes(flow, ",".join(str(int(i)) for i in tensors["input.class_labels"]))
        else:
            conds = [[[context, {"attention_mask": mask}]] for context, mask in zip(
                tensors["input.context"].chunk(2), tensors["input.context_mask"].chunk(2), strict=True)][::-1]
        steps = ",".join(str(n) for n in config["steps"][:stages])
        drawn = draw(
            flow, model, conds, config["guidance"], sigmas(flow, model, steps, str(config["shift"])),
            sampler(flow, config["solver"]), noise=noise, latent=torch.zeros_like(picture),
        )
        assert ((drawn / 2 + 0.5).clamp(0, 1) - picture).abs().max() < TOLERANCE[config["solver"]], file.stem


def test_the_sigmas_of_all_stages_fall_from_1_to_0(flow):
    fall = sigmas(flow, flow.classes, "3, 1, 2, 4", "1, 2, 3, 100")
    assert len(fall) == 11 and fall[0] == 1 and fall[-1] == 0
    assert (fall[:-1] > fall[1:]).all()


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("how", ["with noise disabled", "with the same noise"])
def test_a_schedule_may_be_split_anywhere(flow, cut, how):
    model, fall = flow.text, sigmas(flow, flow.text)
    whole = draw(flow, model, schedule=fall)
    first = draw(flow, model, schedule=fall[: cut + 1])
    assert first.shape[-1] == 16 * 2 ** (cut // 2)  # a cut between stages hands the state over after the jump
    noise = torch.zeros_like(first) if how == "with noise disabled" else None
    second = draw(flow, model, schedule=fall[cut:], latent=first, noise=noise, how=sampler(flow, latent="state"))
    assert (second - whole).abs().max() < 1e-5 * whole.abs().max()
    if how == "with noise disabled" or cut % 2:
        assert torch.equal(second, draw(flow, model, schedule=fall[cut:], latent=first, noise=noise))


def test_a_batch_equals_its_pictures_one_by_one(flow, monkeypatch):
    def same_noise_for_all(_, stage, shape):
        return noise_like(torch.zeros(1, *shape[1:]), stage).expand(shape)

    monkeypatch.setattr(flow.cascade.StageNoise, "__call__", same_noise_for_all)
    noise = noise_like(torch.zeros(3, 3, 64, 96))
    for model, names in ((flow.text, None), (flow.classes, ("207", "360", "417"))):
        batch = draw(flow, model, names and classes(flow, ",".join(names)), noise=noise, latent=torch.zeros_like(noise))
        for i, picture in enumerate(batch):
            conds = names and classes(flow, names[i])
            single = draw(flow, model, conds, noise=noise[i:i + 1], latent=torch.zeros(1, 3, 64, 96))
            assert (single[0] - picture).abs().max() < 1e-4 * picture.abs().max()


def test_a_seed_draws_the_same_picture_twice(flow):
    assert torch.equal(draw(flow, flow.text), draw(flow, flow.text))
    same_start = noise_like(torch.zeros(1, 3, 64, 64))
    assert not torch.allclose(draw(flow, flow.text), draw(flow, flow.text, seed=2, noise=same_start))


def test_reference_noise_is_the_stream_of_the_reference(flow):
    stages = flow.text.model.model_sampling.stages
    torch.manual_seed(5)
    noise = [torch.randn(1, 3, 16, 16)]
    noise += [sampling.block_noise_reference((1, 3, side, side)) for side in (32, 64)]
    predict = unguided(flow, flow.text, conditions(flow, flow.text))
    with torch.inference_mode():
        expected = sampling.CascadeFlow(stages).sample(
            predict, noise[0], CascadeSchedule.build(stages, 2, 1.0, 3.0), lambda stage, shape: noise[stage]
        )
    how = sampler(flow, reference_noise=True)
    assert (draw(flow, flow.text, how=how, seed=5) - expected).abs().max() < 1e-4 * expected.abs().max()
    fall = sigmas(flow, flow.text)
    half = draw(flow, flow.text, how=how, seed=5, schedule=fall[:4])
    rest = draw(flow, flow.text, how=how, seed=5, schedule=fall[3:], latent=half)
    assert (rest - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_picture_may_enter_in_the_middle_of_a_stage(flow, stage):
    picture, fall = torch.full((1, 3, 64, 64), -0.5), sigmas(flow, flow.text)
    how = sampler(flow, latent="picture")
    start, late = (
        (draw(flow, flow.text, latent=picture, schedule=fall[i:], how=how) - picture).norm()
        for i in (2 * stage, 2 * stage + 1)
    )
    assert late < start


def test_a_later_start_stays_closer_to_the_picture(flow):
    picture = torch.full((1, 3, 64, 64), -0.5)
    distance = [
        (draw(flow, flow.text, latent=picture, schedule=sigmas(flow, flow.text, start_stage=stage)) - picture).norm()
        for stage in (0, 1, 2)
    ]
    assert distance[0] > distance[1] > distance[2]


@pytest.mark.parametrize("stage", [0, 1])
def test_an_early_end_gives_a_clean_draft_of_that_stage(flow, stage):
    heard = []
    draft = draw(flow, flow.text, schedule=sigmas(flow, flow.text, end_stage=stage),
                 callback=lambda step, clean, x, steps: heard.append((step, steps, clean)))
    assert draft.shape[-1] == 16 * 2**stage
    assert heard[-1][:2] == (2 * stage + 1, 2 * stage + 2)
    assert (draft - heard[-1][2]).abs().max() < 1e-4 * draft.abs().max()


def test_sizes_need_not_be_square(flow):
    assert draw(flow, flow.text, size=(32, 80)).shape == (1, 3, 32, 80)


# Guidance


@pytest.mark.parametrize("how", ["PixelFlow Sample", "SamplerCustom"])
def test_core_s_empty_latent_is_fitted_to_the_picture_where_core_fits_it(flow, how):
    empty = flow.nodes["EmptyLatentImage"]().generate(128, 64)[0]
    if "downscale_ratio_spacial" not in empty:
        pytest.skip("this ComfyUI's empty latents do not say what they are made for")
    positive, negative = conditions(flow, flow.text)
    about = dict(model=flow.text, positive=positive, negative=negative, cfg=1.0)
    with torch.inference_mode():
        if how == "SamplerCustom":
            drawn = flow.nodes[how].execute(**about, add_noise=True, noise_seed=1, sampler=sampler(flow),
                                            sigmas=sigmas(flow, flow.text, "1"), latent_image=empty)[0]
        else:
            drawn = run(flow, "Sample", **about, latent=empty, seed=1, steps=1, shift=1.0, solver="euler",
                        start_stage=0, end_stage=-1)
    assert drawn["samples"].shape == (1, 3, 64, 128)
    assert "downscale_ratio_spacial" not in drawn


def test_guidance_1_costs_one_forward_pass_a_step(flow):
    model, seen = watched(flow, flow.text)
    draw(flow, model, cfg=1.0)
    assert seen == [(1, side) for side in (16, 16, 32, 32, 64, 64)]


def test_prompts_of_different_lengths_share_a_forward_pass(flow):
    model, seen = watched(flow, flow.text)
    draw(flow, model, (prompt(flow, "a red apple on the blue car"), prompt(flow, "")))
    assert seen == [(2, side) for side in (16, 16, 32, 32, 64, 64)]


@pytest.mark.parametrize("how, times", [({}, 1), ({"how": "custom"}, 2)])
def test_a_prompt_is_read_once_for_all_steps_and_stages(flow, how, times):
    """Again only where guidance 1 leaves the negative prompt out."""
    calls, block = [], flow.text.model.diffusion_model.transformer_blocks[0]
    hook = block.attn2.k_proj.register_forward_hook(lambda *_: calls.append(1))
    if how:
        how = {"how": sampler(flow, guidance="custom", custom_guidance="1, 3, 1")}
    try:
        draw(flow, flow.text, (prompt(flow, "a red apple on the blue car"), prompt(flow, "")), **how)
    finally:
        hook.remove()
    assert len(calls) == times


def test_a_lora_changes_the_prompt_that_was_read_before(flow):
    plain, patched = draw(flow, flow.text), flow.text.clone()
    key = "diffusion_model.transformer_blocks.0.attn2.v_proj.weight"
    patched.add_patches({key: (torch.full(flow.text.model.state_dict()[key].shape, 0.5),)}, 1.0)
    assert (draw(flow, patched) - plain).abs().max() > 1e-3
    assert torch.equal(draw(flow, flow.text), plain)


@pytest.mark.parametrize("preset", ["xl_c2i", "xl_t2i"])
def test_the_memory_asked_for_is_what_a_step_takes(flow, monkeypatch, preset):
    monkeypatch.setattr(flow.comfy.model_management, "pytorch_attention_flash_attention", lambda: True)  # on a GPU
    config = PRESETS[preset]
    described = sys.modules[type(flow.text.model).__module__].ModelConfig(config)
    described.set_inference_dtype(torch.bfloat16, None)
    model = described.get_model({}, device=torch.device("meta"))
    asked = model.memory_required((2, 3, config.resolution, config.resolution))
    assert 1 <= asked / count.counted(count.CASES[f"PixelFlow {preset}"]["ours"]).peak <= 1.2


def test_class_guidance_does_without_the_null_class_in_the_first_stage(flow):
    model, seen = watched(flow, flow.classes)
    draw(flow, model)
    assert seen == [(1, 8), (1, 8)] + [(2, side) for side in (16, 16, 32, 32, 64, 64)]


def test_custom_guidance_replaces_the_cfg(flow):
    model, seen = watched(flow, flow.text)
    drawn = draw(flow, model, cfg=9.0, how=sampler(flow, guidance="custom", custom_guidance="1, 3, 1"))
    assert [rows for rows, _ in seen] == [1, 1, 2, 2, 1, 1]
    constant = draw(flow, flow.text, cfg=3.0)
    assert not torch.allclose(drawn, constant)
    assert torch.equal(draw(flow, flow.text, cfg=9.0, how=sampler(flow, guidance="custom", custom_guidance="3,3,3")),
                       constant)


def test_a_guider_without_a_negative_is_not_guided(flow):
    model, seen = watched(flow, flow.classes)
    guider = import_module("comfy_extras.nodes_custom_sampler").Guider_Basic(model)
    guider.set_conds(conditions(flow, model)[0])
    latent = torch.zeros(1, 3, 64, 64)
    how = sampler(flow, guidance="custom", custom_guidance="4,4,4,4")
    with torch.inference_mode():
        drawn = guider.sample(noise_like(latent), latent, how, sigmas(flow, model), disable_pbar=True, seed=1)
    assert {rows for rows, _ in seen} == {1}
    assert torch.equal(drawn, draw(flow, flow.classes, cfg=1.0))


def test_the_guider_s_cfg_is_given_back_after_an_error(flow):
    model = flow.classes.clone()
    model.add_wrapper(flow.comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, lambda *_, **__: 1 / 0)
    guider = flow.comfy.samplers.CFGGuider(model)
    guider.set_conds(*conditions(flow, model))
    guider.set_cfg(3.0)
    latent = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ZeroDivisionError), torch.inference_mode():
        guider.sample(noise_like(latent), latent, sampler(flow), sigmas(flow, model), disable_pbar=True, seed=1)
    assert guider.cfg == 3.0


def test_a_masked_prompt_follows_its_mask_through_all_stages(flow):
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    negative, left, right = prompt(flow, ""), prompt(flow, "a cat"), prompt(flow, "the blue car")
    whole = draw(flow, flow.text, (left, negative))
    halves = [[left[0][0], {**left[0][1], "mask": 1 - mask}], [right[0][0], {**right[0][1], "mask": mask}]]
    assert not torch.allclose(draw(flow, flow.text, (halves, negative)), whole)
    halves[1][0] = left[0][0]
    assert (draw(flow, flow.text, (halves, negative)) - whole).abs().max() < 1e-4 * whole.abs().max()


# What ComfyUI gives: previews, progress, interrupts, patches, storage


def test_every_step_shows_a_preview_of_its_stage_s_size(flow):
    done = flow.host.run(graph(flow))
    assert not done.errors
    assert [image.size for _, image in done.previews] == [(side, side) for side in (16, 16, 32, 32, 64, 64)]


def test_progress_counts_over_all_stages(flow):
    done = flow.host.run(graph(flow, sample__steps=3))
    assert [(e["value"], e["max"]) for name, e in done.events if name == "progress"] == [(i, 9) for i in range(1, 10)]


def test_an_interrupt_stops_between_steps(flow):
    heard = []

    def stop(event, data):
        heard.append(event)
        if heard.count("progress") == 3:
            flow.host.interrupt()

    done = flow.host.run(graph(flow, sample__steps=50), on_event=stop)
    assert heard.count("progress") == 3
    assert [(e.node, e.message) for e in done.errors] == [("sample", "interrupted")]
    assert not flow.host.run(graph(flow)).errors


def test_a_lora_through_core_s_loader_changes_the_picture_and_leaves_the_model_as_it_was(flow):
    before, lora = draw(flow, flow.text), {}
    for name in ("attn1.q_proj", "attn2.k_proj", "mlp.fc1"):
        key = f"diffusion_model.transformer_blocks.0.{name}"
        height, width = flow.text.model.state_dict()[f"{key}.weight"].shape
        lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"] = torch.ones(2, width), torch.ones(height, 2)
    write_file(flow.host.models / "loras" / "tiny_lora.safetensors", lora)
    (patched,) = flow.nodes["LoraLoaderModelOnly"]().load_lora_model_only(flow.text, "tiny_lora.safetensors", 0.5)
    assert len(patched.patches) == 3
    assert not torch.allclose(draw(flow, patched), before)
    assert torch.equal(draw(flow, flow.text), before)


@pytest.mark.parametrize("name", [TEXT, CLASS])
def test_fp8_storage_draws_nearly_the_same(flow, name):
    model = load(flow, name, dtype="fp8_e4m3fn")
    layer = model.model.diffusion_model.transformer_blocks[0].mlp.fc1
    assert dynamic_vram.stored_dtype(layer) == torch.float8_e4m3fn
    drawn, exact = draw(flow, model), draw(flow, flow.text if name == TEXT else flow.classes)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - exact).norm() < 0.1 * exact.norm()


def test_an_attention_override_is_asked_for_every_attention(flow):
    model, asked = flow.text.clone(), []
    options = model.model_options["transformer_options"] = copy.copy(model.model_options["transformer_options"])
    options["optimized_attention_override"] = lambda f, *a, **k: (asked.append(a[0].shape[1]), f(*a, **k))[1]
    drawn = draw(flow, model)
    assert asked == [2] * 6 * 2  # two heads; six steps, each self and cross attention in one block
    assert torch.equal(drawn, draw(flow, flow.text))


@pytest.mark.parametrize("backend", ["attention_basic", "attention_sub_quad", "attention_split"])
def test_core_s_other_attention_functions_read_the_text_mask(flow, backend):
    other = getattr(import_module("comfy.ldm.modules.attention"), backend)
    model = flow.text.clone()
    options = model.model_options["transformer_options"] = copy.copy(model.model_options["transformer_options"])
    options["optimized_attention_override"] = lambda _, *args, **kwargs: other(*args, **kwargs)
    conds = prompt(flow, "a red apple on the blue car"), prompt(flow, "")
    exact = draw(flow, flow.text, conds)
    assert (draw(flow, model, conds) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_core_s_easycache_skips_forward_passes(flow):
    model, seen = watched(flow, flow.nodes["EasyCache"].execute(flow.text, 1e9, 0.0, 1.0, False)[0])
    draw(flow, model, cfg=1.0, schedule=sigmas(flow, flow.text, "6"))
    assert {side for _, side in seen} == {16, 32, 64}
    assert len(seen) < 18


# Files


def test_a_training_file_offers_its_averaged_and_its_raw_weights(flow):
    weights, _ = read_file(flow.host.models / "diffusion_models" / TEXT)
    path = flow.host.models / "diffusion_models" / "0001000.pt"
    averaged = {k: v * 0.5 for k, v in weights.items()}
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "ema": averaged, "opt": {"step": 3},
                "args": argparse.Namespace(lr=1e-4)}, path)
    params = dict(num_attention_heads=2, attention_head_dim=8, depth=1, patch_size=4, cross_attention_dim=32)
    path.with_name("config.yaml").write_text(json.dumps({"model": {"params": params}, "scheduler": {"num_stages": 3}}))
    try:
        raw, ema = load(flow, path.name, "model"), load(flow, path.name)
    finally:
        path.with_name("config.yaml").unlink()
    exact = draw(flow, flow.text)
    assert torch.equal(draw(flow, raw), exact)
    assert not torch.allclose(draw(flow, ema), exact)


def test_a_config_of_another_family_beside_the_file_is_not_read(flow):
    other = flow.host.models / "diffusion_models" / "config.yaml"
    other.write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {timesteps: 1000}}")
    try:
        assert load(flow, TEXT).model.config == flow.text.model.config
    finally:
        other.unlink()


# Conditioning


def test_prompts_padded_to_share_a_batch_equal_separate_ones(flow):
    conds = prompt(flow, "a red apple on the blue car"), prompt(flow, "a cat")
    together = draw(flow, flow.text, conds)
    predict = unguided(flow, flow.text, conds)
    stages = flow.text.model.model_sampling.stages
    noise = noise_like(torch.zeros(1, 3, 64, 64))
    with torch.inference_mode():
        apart = sampling.CascadeFlow(stages).sample(
            predict, noise[..., :16, :16], CascadeSchedule.build(stages, 2, 1.0, 3.0), flow.cascade.StageNoise(1))
    assert (together - apart).abs().max() < 1e-4 * apart.abs().max()


def test_classes_are_taken_in_turn_over_a_batch(flow):
    noise = noise_like(torch.zeros(1, 3, 64, 64)).expand(4, 3, 64, 64)
    two = draw(flow, flow.classes, classes(flow, "1, 2"), noise=noise, latent=torch.zeros(4, 3, 64, 64))
    four = draw(flow, flow.classes, classes(flow, "1, 2, 1, 2"), noise=noise, latent=torch.zeros(4, 3, 64, 64))
    assert torch.equal(two, four)
    assert not torch.allclose(two[0], two[1])


@pytest.mark.parametrize(
    "text, expected",
    [("207, otter", [207, 360]), ("Golden Retriever; 5\n6", [207, 5, 6]), ("207: golden retriever", [207]),
     ("1203", [1203]), ("Cardigan, cardigan", [264, 474])],
)
def test_classes_are_read_as_indices_or_names(flow, text, expected):
    assert classes(flow, text)[0][0][1]["pixelflow_class_labels"].tolist() == expected


def test_a_misspelled_class_is_refused_with_the_nearest(flow):
    wrong = {"1": {"class_type": "PixStack_PixelFlowClass",
                   "inputs": {"imagenet_class": "0: tench", "classes": "goldn retriever"}},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    assert "neither a class index nor one of ImageNet's names. Near it are 207: golden retriever" in str(
        flow.host.check(wrong)[0])


@pytest.fixture(scope="module")
def named(flow) -> str:
    """A file of a model that names its own classes."""
    tiny_pixelflow(flow.host.models / "diffusion_models" / "named.safetensors", text=False, num_classes=3,
                   names=("cat", "sky & weather", "otter"))
    return "named.safetensors"


def of_own_classes(named: str, text: str, source=("1", 0)) -> dict:
    return {"1": {"class_type": "PixStack_PixelFlowLoader",
                  "inputs": {"model_name": named, "weights": "ema", "dtype": "default"}},
            "2": {"class_type": "PixStack_PixelFlowClass",
                  "inputs": {"imagenet_class": "0: tench", "classes": text, "model": list(source)}},
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}}


def test_a_model_s_own_classes_have_its_names(flow, named):
    model = load(flow, named)
    chosen = run(flow, "Class", imagenet_class="0: tench", classes="Otter, sky & weather; 0", model=model)
    assert chosen[0][1]["pixelflow_class_labels"].tolist() == [2, 1, 0]
    assert flow.host.run(of_own_classes(named, "otter")).error is None


@pytest.mark.parametrize("text, said", [
    ("oter", "neither a class index nor one of the names of this model's classes. Near it are 2: otter"),
    ("goldfish", "neither a class index nor one of the names of this model's classes"),
    ("", "Write one or more of them into `classes`: cat, sky & weather, otter"),
])
def test_what_a_model_has_no_name_for_is_refused(flow, named, text, said):
    assert said in str(flow.host.run(of_own_classes(named, text)).error)


def test_a_model_without_names_takes_imagenet_s(flow):
    chosen = run(flow, "Class", imagenet_class="3: tiger shark", classes="", model=flow.classes)
    assert chosen[0][1]["pixelflow_class_labels"].tolist() == [3]


def test_only_a_pixelflow_is_asked_for_its_classes(flow, named):
    wrong = of_own_classes(named, "otter", ("2", 0)) | {"2": of_own_classes(named, "otter", ("4", 0))["2"]}
    wrong["4"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    assert "model takes a MODEL, and VAE is connected" in str(flow.host.check(wrong)[0])


@pytest.mark.parametrize("names", [("cat",), "cat", {"cat": 1, "dog": 2, "cow": 3}])
def test_a_damaged_list_of_classes_is_named(flow, named, names):
    path = flow.host.models / "diffusion_models" / "damaged.safetensors"
    tensors, metadata = read_file(flow.host.models / "diffusion_models" / named)
    write_file(path, tensors, metadata | {"pixstack.classes": json.dumps(names)})
    with pytest.raises(ValueError, match="the file is damaged"):
        load(flow, path.name)


def test_every_class_of_the_menu_is_found_by_its_name(flow):
    options = flow.nodes["PixStack_PixelFlowClass"].define_schema().inputs[0].options
    names = ", ".join(option.split(": ", 1)[1] for option in options)
    assert classes(flow, names)[0][0][1]["pixelflow_class_labels"].tolist() == list(range(1000))


def test_the_menu_of_classes_has_all_of_imagenet(flow):
    options = flow.nodes["PixStack_PixelFlowClass"].define_schema().inputs[0].options
    assert len(options) == 1000
    assert options[0] == "0: tench" and options[999] == "999: toilet tissue"


def test_the_negative_class_is_the_model_s_own_null_class(flow):
    tiny_pixelflow(flow.host.models / "diffusion_models" / "seven.safetensors", text=False, num_classes=7)
    _, null = classes(flow, "3")
    conds = load(flow, "seven.safetensors").model.extra_conds(**null[0][1])
    assert conds["class_labels"].cond.tolist() == [7]


# Sizes


@pytest.mark.parametrize(
    "name, inputs, words",
    [
        ("Canvas", dict(shape="round"), "shape='round' is not one of square, landscape 3:2"),
        ("Loader", dict(dtype="int7"), "dtype='int7' is not one of default, fp32"),
        ("Loader", dict(weights="best"), "weights='best' is not one of ema, model"),
        ("TextEncoderLoader", dict(dtype="int7"), "dtype='int7' is not one of default, fp32"),
        ("TextEncoderLoader", dict(device="tpu"), "device='tpu' is not one of default, cpu"),
        ("Sampler", dict(solver="rk"), "solver='rk' is not one of euler, dopri5"),
        ("Sampler", dict(guidance="more"), "guidance='more' is not one of auto, constant"),
        ("Sampler", dict(latent="noise"), "latent='noise' is not one of auto, picture"),
        ("Sample", dict(solver="rk"), "solver='rk' is not one of euler, dopri5"),
    ],
)
def test_a_choice_that_a_menu_does_not_offer_is_refused_with_those_it_does(flow, name, inputs, words):
    node = flow.nodes[f"PixStack_PixelFlow{name}"]
    assert words in node.validate_inputs(**inputs)
    assert node.validate_inputs() is True


@pytest.mark.parametrize("shape", ["square", "landscape 3:2", "landscape 16:9", "portrait 2:3", "portrait 9:16"])
@pytest.mark.parametrize("kind", ["text", "classes"])
def test_every_shape_fits_every_stage(flow, kind, shape):
    model = getattr(flow, kind)
    picture = run(flow, "Canvas", model=model, shape=shape, width=16, height=16, batch_size=2)["samples"]
    assert picture.shape[:2] == (2, 3)
    assert all(side % model.model.config.size_multiple == 0 for side in picture.shape[-2:])
    assert 0.6 < picture[0, 0].numel() / 64**2 < 1.6


# What is refused, in the words that the UI shows


def refusal(flow, *args, **changes) -> str:
    error = flow.host.run(graph(flow, *args, **changes)).error
    assert error is not None, "nothing was refused"
    return str(error)


class Harmful:
    def __reduce__(self):
        return print, ("this code must not run",)


def wrong_file(path, kind):
    whole, metadata = read_file(path.with_name(TEXT))
    if kind == "truncated safetensors":
        content = path.with_name(TEXT).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "truncated pt":
        torch.save(whole, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "pickle with code":
        torch.save({"model": whole, "extra": Harmful()}, path)
    elif kind == "half of the weights":
        write_file(path, {k: v for k, v in whole.items() if "mlp" not in k}, metadata)
    else:
        marks = {
            "PixArt": "adaln_single.emb.timestep_embedder.linear_1.weight",
            "FLUX": "double_blocks.0.img_attn.qkv.weight",
            "Stable Diffusion": "model.diffusion_model.input_blocks.0.0.weight",
            "a LoRA": "diffusion_model.transformer_blocks.0.attn1.q_proj.lora_A.weight",
            "a T5 text encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
        }
        torch.save({marks[kind]: torch.zeros(2, 2)}, path)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated safetensors", "is not a complete safetensors file"),
        ("truncated pt", "is not a complete torch file"),
        ("pickle with code", "unpickling it could run code"),
        ("half of the weights", "The weights do not fit PixelFlow"),
        *((family, f"This is not a PixelFlow checkpoint. The keys are those of {family}") for family in (
            "PixArt", "FLUX", "Stable Diffusion", "a LoRA", "a T5 text encoder")),
    ],
)
def test_a_wrong_model_file_is_refused_by_name(flow, kind, words, capsys):
    path = flow.host.models / "diffusion_models" / f"wrong.{'safetensors' if 'safetensors' in kind else 'pt'}"
    wrong_file(path, kind)
    try:
        message = refusal(flow, path.name)
    finally:
        path.unlink()
    assert message.startswith("node model (PixStack_PixelFlowLoader): ")
    assert words in message and message.count(path.name) == 1
    assert "this code must not run" not in capsys.readouterr().out


def test_a_missing_file_is_named_before_anything_runs(flow):
    errors = [str(e) for e in flow.host.check(graph(flow, "absent.pt", clip__encoder_name="absent.safetensors"))]
    assert any("absent.pt is not in models/diffusion_models" in e for e in errors)
    assert any("absent.safetensors is not in models/text_encoders" in e for e in errors)


def test_a_wrong_text_encoder_is_refused_by_name(flow):
    folder = flow.host.models / "text_encoders"
    torch.save({"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, folder / "clip.pt")
    message = refusal(flow, clip__encoder_name="clip.pt")
    assert "clip.pt is not a T5 text encoder. The keys are those of a CLIP text encoder" in message


def test_a_size_that_does_not_fit_is_refused_with_the_nearest(flow):
    message = refusal(flow, canvas__shape="custom (width, height)", canvas__width=72, canvas__height=64)
    assert "72x64 pixels do not fit" in message and "multiples of 16. Near it are 64x64, 80x64" in message


def test_an_empty_prompt_draws(flow):
    assert not flow.host.run(graph(flow, positive__text="")).errors


def test_text_of_another_width_is_refused_with_both_widths(flow):
    with pytest.raises(ValueError, match="reads text tokens 32 wide, but its conditioning has text tokens 768 wide. "
                                         "Load .* with 'Load T5 Text Encoder'"):
        draw(flow, flow.text, ([[torch.zeros(1, 77, 768), {}]], prompt(flow, "")))


def test_text_that_is_padded_for_flux_is_refused(flow):
    (positive, entries), = prompt(flow, "a cat")
    with pytest.raises(ValueError, match="PixelFlow would read the padding as words"):
        draw(flow, flow.text, ([[positive, {**entries, "pixstack_filled": True}]], prompt(flow, "")))


def test_classes_are_refused_by_a_text_model(flow):
    with pytest.raises(ValueError, match="draws prompts, but its conditioning holds classes"):
        draw(flow, flow.text, classes(flow, "3"))


def test_prompts_are_refused_by_a_class_model(flow):
    with pytest.raises(ValueError, match="draws classes .0 to 999., but its conditioning names none"):
        draw(flow, flow.classes, (prompt(flow, "a cat"), prompt(flow, "")))


def test_a_class_past_the_model_s_is_refused(flow):
    with pytest.raises(ValueError, match="has no class 1000: it knows 0 to 999"):
        draw(flow, flow.classes, classes(flow, "1000"))


def test_core_s_own_samplers_are_refused_with_the_node_to_use(flow):
    latent = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="Use the node 'PixelFlow Sample'"):
        flow.comfy.sample.sample(flow.text, noise_like(latent), 4, 3.0, "euler", "simple",
                                 *conditions(flow, flow.text), latent, disable_pbar=True, seed=1)


def test_a_node_that_replaces_the_stages_is_refused(flow):
    (model,) = flow.nodes["ModelSamplingAuraFlow"]().patch_aura(flow.text, 3.0)
    with pytest.raises(ValueError, match="ModelSampling node has replaced PixelFlow's stages"):
        draw(flow, model, schedule=sigmas(flow, flow.text))


def test_sigmas_of_another_scheduler_are_refused(flow):
    with pytest.raises(ValueError, match="PixelFlow's sigmas"):
        draw(flow, flow.text, schedule=torch.linspace(1, 0, 5))


def test_a_latent_of_a_vae_is_refused(flow):
    with pytest.raises(ValueError, match="This latent has 4 channels.*pixel_space"):
        draw(flow, flow.text, latent=torch.ones(1, 4, 64, 64))


def test_a_noise_mask_is_refused(flow):
    with pytest.raises(ValueError, match="cannot inpaint"):
        draw(flow, flow.text, noise_mask=torch.ones(1, 64, 64))


def test_a_conditioning_area_is_refused_with_what_to_use(flow):
    positive, negative = conditions(flow, flow.text)
    area = [[positive[0][0], {**positive[0][1], "area": (32, 32, 0, 0)}]]
    with pytest.raises(ValueError, match="conditioning areas cannot be followed. Use masks"):
        draw(flow, flow.text, (area, negative))


@pytest.mark.parametrize(
    "name, inputs, words",
    [
        ("Sigmas", dict(steps="ten"), "steps='ten' is not a number"),
        ("Sigmas", dict(steps="5, 0"), "steps must be above 0"),
        ("Sigmas", dict(shift=""), "shift is empty"),
        ("Sampler", dict(guidance="custom", custom_guidance="1; 2"), "custom_guidance='1; 2' is not a number"),
    ],
)
def test_what_cannot_be_read_as_numbers_is_refused_before_anything_runs(flow, name, inputs, words):
    assert words in flow.nodes[f"PixStack_PixelFlow{name}"].validate_inputs(**inputs)


@pytest.mark.parametrize("start, end", [(2, 1), (0, 3), (3, -1)])
def test_stages_that_the_model_does_not_have_are_refused(flow, start, end):
    with pytest.raises(ValueError, match="do not go together: this model has the stages 0 to 2"):
        sigmas(flow, flow.text, start_stage=start, end_stage=end)


def test_a_later_start_without_a_picture_is_refused(flow):
    assert "the latent is an empty canvas" in refusal(flow, sample__start_stage=1)


def test_a_list_must_have_an_entry_for_each_stage(flow):
    with pytest.raises(ValueError, match="steps='1, 2' has 2 numbers, this model has 3 stages"):
        sigmas(flow, flow.text, "1, 2")
    with pytest.raises(ValueError, match="one number for each of the 3 stages"):
        draw(flow, flow.text, how=sampler(flow, guidance="custom", custom_guidance="1, 2"))


def test_a_model_of_another_family_is_refused(flow):
    with pytest.raises(ValueError, match="This MODEL is a Linear, not a PixelFlow model"):
        run(flow, "Canvas", model=SimpleNamespace(model=torch.nn.Linear(1, 1)), shape="square", width=64, height=64,
            batch_size=1)


# The film strip


def test_the_film_strip_shows_the_picture_after_each_stage(flow):
    run = flow.host.run({**graph(flow, canvas__batch_size=2),
                         "strip": {"class_type": "PreviewImage", "inputs": {"images": ["sample", 1]}}})
    assert not run.errors
    (shown,) = run.outputs["sample"]["pixstack_stages"]
    assert shown["sizes"] == [[16, 16], [32, 32], [64, 64]] and len(shown["strips"]) == 2
    first, _ = run.outputs["strip"]["images"]
    strip, picture = (Image.open(flow.host._path(image)).convert("RGB") for image in (
        first, run.outputs["save"]["images"][0]))
    assert strip.size == (3 * 256 + 2 * 4, 256)
    last = ImageChops.difference(strip.crop((520, 0, 776, 256)), picture.resize((256, 256), Image.Resampling.NEAREST))
    assert max(high for _, high in last.getextrema()) <= 1  # the estimate of the last step, and where that step leads
    small = strip.crop((0, 0, 256, 256))
    assert small.resize((16, 16), Image.Resampling.NEAREST).resize((256, 256), Image.Resampling.NEAREST).tobytes() == (
        small.tobytes())
    name, folder = shown["strips"][0]
    assert Image.open(Path(flow.host._folders.get_temp_directory(), folder, name)).convert("RGB").tobytes() == (
        strip.tobytes())


def test_a_film_strip_of_later_stages_begins_with_them(flow):
    run = flow.host.run(graph(flow, sample__end_stage=1))
    assert run.outputs["sample"]["pixstack_stages"][0]["sizes"] == [[16, 16], [32, 32]]


def test_a_large_film_strip_is_made_smaller(flow):
    strip = sys.modules[flow.cascade.__name__.replace("sampling", "strip")].FilmStrip()
    for side in (64, 128, 256, 512):
        strip(torch.full((1, 3, side, 2 * side), side / 512))
    assert strip.strip().shape == (1, 256, 4 * 512 + 3 * 4, 3) and strip.strip()[0, 9, -1, 0] == 1
