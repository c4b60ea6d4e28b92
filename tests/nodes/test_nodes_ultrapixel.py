"""UltraPixel's nodes on ComfyUI's own Stage C: the same numbers as the reference, and what a user may do to them."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import cascade_weights as tiny
import dynamic_vram
import pytest
import torch
from adapters.ultrapixel import guide_model, trajectory
from parity_cases import cases
from pixstack.models_impl.annotators.canny import canny
from pixstack.models_impl.state_dict import read_file, write_file
from pixstack.models_impl.ultrapixel import checkpoint, lora, sampling
from pixstack.models_impl.ultrapixel.model import StageC
from safetensors import safe_open
from test_counts import count

STAGE_C, STAGE_B, GUIDE, CLIP = "stage_c_tiny.safetensors", "stage_b_tiny.safetensors", "ultrapixel_tiny.safetensors", \
    "stable_cascade_tiny.safetensors"
LOW, HIGH = (4, 4), (8, 8)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ultra(host):
    """Our nodes by their short name, the modules of ComfyUI they work with, and tiny models."""
    models = host.models
    tiny.tiny_stage_c(models / "diffusion_models" / STAGE_C)
    tiny.tiny_stage_b(models / "diffusion_models" / STAGE_B)
    tiny.tiny_guide(models / "model_patches" / GUIDE)
    tiny.tiny_clip_g(models / "text_encoders" / CLIP)
    core = import_module("nodes")
    ultra = SimpleNamespace(host=host, core=core, nodes=core.NODE_CLASS_MAPPINGS, comfy=import_module("comfy"))
    for name in ("sample", "samplers", "sd", "model_management", "model_base", "supported_models", "lora",
                 "patcher_extension", "controlnet", "ldm.cascade.common", "ldm.cascade.controlnet"):
        import_module(f"comfy.{name}")
    ultra.base = core.UNETLoader().load_unet(STAGE_C, "default")[0]
    ultra.guide = run(ultra, "GuideLoader", guide_name=GUIDE)[0]
    ultra.sampling = sys.modules[type(sampler(ultra)).__module__]
    ultra.guided = sys.modules[ultra.sampling.Plain.__module__]
    return ultra


def run(ultra, name: str, **inputs):
    return ultra.nodes[f"PixStack_UltraPixel{name}"].execute(**inputs).args


def guided(ultra, model=None, guide=None, **given):
    given = {**dict(down=1.0, up=-1.0, rescale=0.7, shift=1.0), **given}
    return run(ultra, "Guide", model=model or ultra.base, guide=guide or ultra.guide, **given)[0]


def sampler(ultra, low=LOW, reference=False):
    latent = {"samples": torch.zeros(1, 16, *low) if isinstance(low, tuple) else low} if low is not None else None
    return run(ultra, "Sampler", reference=reference, low_latent=latent)[0]


def text(seed: int, width=tiny.TEXT, **entries) -> list:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, width, generator=generator)
    return [[torch.randn(1, 5, width, generator=generator), {"pooled_output": pooled, **entries}]]


def noise_of(batch=1, size=HIGH, seed=5) -> torch.Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(seed))


def levels(ultra, model, steps=3, denoise=1.0):
    return ultra.nodes["BasicScheduler"].execute(model, "simple", steps, denoise)[0]


def draw(ultra, model, low=LOW, noise=None, latent=None, cfg=4.0, steps=3, positive=None, negative=None, seed=7,
         reference=False, sigmas=None, guider=None, denoise=1.0, **more):
    """What SamplerCustomAdvanced does with a CFGGuider."""
    noise = noise_of() if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    guider = guider or ultra.comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or text(1), negative or text(2))
    guider.set_cfg(cfg)
    sigmas = levels(ultra, model, steps, denoise) if sigmas is None else sigmas
    with torch.inference_mode():
        return guider.sample(noise, latent, sampler(ultra, low, reference), sigmas, seed=seed, disable_pbar=True,
                             **more)


# --- The same numbers as the reference


def case(request, name):
    path = next((p for p in cases(request.config) if p.stem.startswith(name)), None)
    if path is None:
        pytest.skip(f"no parity case {name}")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    found = {kind: {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}
             for kind in ("weight", "input", "output")}
    return SimpleNamespace(config=config, weights=found["weight"], inputs=found["input"], outputs=found["output"])


def core_stage_c(ultra, weights, config):
    """Core's own Stage C with the weights of a case, split as core keeps them, as a MODEL."""
    entries = {k: v for k, v in config.items() if k in (
        "c_in", "c_out", "c_r", "patch_size", "c_cond", "c_hidden", "nhead", "blocks", "block_repeat", "level_config",
        "c_clip_text", "c_clip_text_pooled", "c_clip_img", "c_clip_seq", "kernel_size", "self_attn", "t_conds",
        "switch_level")}
    core_config = ultra.comfy.supported_models.Stable_Cascade_C(entries)
    core_config.set_inference_dtype(torch.float32, None)
    model = core_config.get_model({})
    model.load_model_weights({k: v for k, v in weights.items() if not k.startswith("module.")})
    cpu = torch.device("cpu")
    return ultra.comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def prompt_of(inputs, kind):
    image = SimpleNamespace(image_embeds=inputs[f"{kind}.clip_img"][0])
    return [[inputs[f"{kind}.clip_text"], {
        "pooled_output": inputs[f"{kind}.clip_text_pooled"],
        "unclip_conditioning": [{"strength": 1.0, "clip_vision_output": image}],
    }]]


class GivenNoise:
    """The noise of a case, in place of a source."""

    def __init__(self, inputs, *_):
        self.inputs, self.high_start, self.low_start = inputs, inputs["x_init"], inputs["x_lr_init"]

    def low(self, step, shape):
        return self.inputs["noise_lr"][step]

    def high(self, step, shape):
        return self.inputs["noise"][step]

    def end_low(self, drawn, steps):
        pass


@pytest.mark.parametrize("reference", [True, False])
def test_both_passes_through_cores_stage_c_are_those_of_the_reference(ultra, request, monkeypatch, reference):
    given = case(request, "ultrapixel_pipeline_stage_c")
    i, c = given.inputs, given.config
    guide = ultra.comfy.model_patcher.ModelPatcher(guide_model(given.weights, c["inr"]), torch.device("cpu"),
                                                torch.device("cpu"))
    model = guided(ultra, core_stage_c(ultra, given.weights, c), guide, rescale=c["cfg_rho"], shift=c["shift"])
    for name in ("SeededNoise", "ReferencePassNoise"):
        monkeypatch.setattr(ultra.sampling, name, partial(GivenNoise, i))
    seen = []
    final = draw(
        ultra, model, i["x_lr_init"].shape[-2:], i["x_init"], cfg=c["cfg"], steps=c["steps"],
        positive=prompt_of(i, "cond"), negative=prompt_of(i, "uncond"), reference=reference,
        callback=lambda step, x0, x, total: seen.append((step, total, x0)),
    )
    steps = c["steps"]
    assert [(step, total) for step, total, _ in seen] == [(s, 2 * steps) for s in range(2 * steps)]
    x0 = torch.stack([x0 for _, _, x0 in seen[steps:]])
    for name, (ours, tolerance) in trajectory({"x0": x0, "x0_final": final}).items():
        assert (ours - given.outputs[name]).abs().max() <= tolerance * given.outputs[name].std(), name


def our_network(ultra, model=None):
    """Our own Stage C with the weights of a MODEL."""
    config, weights = checkpoint.read_stage_c((model or ultra.base).model.diffusion_model.state_dict())
    net = StageC(config)
    net.load_state_dict(weights)
    return net.eval()


def predictor(net, positive, negative, cfg, rescale=0.7):
    def predict(x, timestep, hook=None):
        given = [dict(text=c[0][0].expand(len(x), -1, -1), pooled=c[0][1]["pooled_output"].expand(len(x), -1))
                 for c in (positive, negative)]
        cond, uncond = (net(x, timestep, **entries, hook=hook) for entries in given)
        return sampling.guided(cond, uncond, cfg, rescale)

    return predict


@torch.no_grad()
def test_strength_0_is_stage_c_without_a_low_resolution_pass(ultra, monkeypatch):
    sigmas, sizes = levels(ultra, guided(ultra)), []
    ours = draw(ultra, guided(ultra, down=0.0, up=0.0), sigmas=sigmas,
                callback=lambda step, x0, x, total: sizes.append((x0.shape[-1], total)))
    assert sizes == [(HIGH[1], 3)] * 3
    noise = ultra.sampling.SeededNoise(noise_of(), 7, torch.Size((1, 16, *LOW)))
    predict = predictor(our_network(ultra), text(1), text(2), 4.0)
    expected = sampling.CosineDiffusion().sample(predict, noise_of(), -2 * sigmas.log(), noise.high)
    close(ours, expected)
    assert (ours - draw(ultra, guided(ultra), sigmas=sigmas)).abs().max() > 0.1


def close(ours, expected, tolerance=1e-4):
    scale = max(1.0, expected.std().item())
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * scale, (ours - expected).abs().max() / scale


@torch.no_grad()
def test_the_kept_features_are_those_of_the_positive_prompt(ultra, monkeypatch):
    kept, real = [], ultra.sampling.GuidedImage
    monkeypatch.setattr(ultra.sampling, "GuidedImage", lambda guide, features, *a: kept.append(features) or real(
        guide, features, *a))
    seen = []
    draw(ultra, guided(ultra), callback=lambda step, x0, x, total: seen.append((step, x)))
    step, x = seen[2]  # the third and last of the low-resolution pass
    sigma = levels(ultra, guided(ultra))[2]
    net, x = our_network(ultra), x / (1 + sigma**2).sqrt()
    timestep = sampling.CosineDiffusion().timestep(-2 * sigma.log()).expand(1)
    _, features = net.features(x, timestep, text(1)[0][0], text(1)[0][1]["pooled_output"])
    for way in ("down", "up"):
        for ours, expected in zip(getattr(kept[0], way), getattr(features, way), strict=True):
            close(ours, expected)


@pytest.mark.parametrize("steps, kept", [(3, 2), (20, 19), (40, 38)])
def test_the_features_are_of_the_step_nearest_to_the_trained_noise_and_the_low_pass_ends_there(ultra, steps, kept):
    sizes = []
    draw(ultra, guided(ultra), steps=steps, callback=lambda step, x0, x, total: sizes.append((x0.shape[-1], total)))
    assert sizes == [(LOW[1], kept + 1 + steps)] * (kept + 1) + [(HIGH[1], kept + 1 + steps)] * steps


def test_the_guide_is_prepared_once_for_an_image(ultra, monkeypatch):
    level, calls = type(ultra.guide.model.agg_net[0]), []
    real = level.prepare
    monkeypatch.setattr(level, "prepare", lambda self, *a: calls.append(self) or real(self, *a))
    draw(ultra, guided(ultra), steps=4)
    assert len(calls) == len(set(calls)) == 4


# --- Noise


def test_a_picture_comes_out_alone_as_in_its_batch(ultra):
    model, noise = guided(ultra), noise_of(2)
    both = draw(ultra, model, noise=noise)
    for i in range(2):
        close(draw(ultra, model, noise=noise[i : i + 1]), both[i : i + 1])


def test_equal_noise_twice_in_a_batch_gives_two_pictures(ultra):
    both = draw(ultra, guided(ultra), noise=noise_of(1).repeat(2, 1, 1, 1))
    assert (both[0] - both[1]).abs().max() > 0.1


def test_the_size_of_the_low_resolution_pass_does_not_move_the_noise_of_the_picture(ultra):
    draws = [ultra.sampling.SeededNoise(noise_of(), 7, torch.Size((1, 16, *low))) for low in ((4, 4), (5, 3))]
    for draw in draws:
        draw.low(0, draw.low_start.shape)
    assert torch.equal(*(draw.high(0, (1, 16, *HIGH)) for draw in draws))


def test_another_seed_is_another_picture_though_its_first_noise_is_the_same(ultra):
    model = guided(ultra)
    assert (draw(ultra, model, seed=7) - draw(ultra, model, seed=8)).abs().max() > 0.1
    assert torch.equal(draw(ultra, model, seed=7), draw(ultra, model, seed=7))


def test_reference_noise_is_one_stream_in_the_order_of_the_original(ultra):
    shape, low, steps = (2, 16, *HIGH), (2, 16, *LOW), 4
    draw = ultra.sampling.ReferencePassNoise(noise_of(2), 11, torch.Size(low))
    ours = [draw.high_start, draw.low_start, *(draw.low(i, low) for i in range(3))]
    draw.end_low(3, steps)
    ours += [draw.high(i, shape) for i in range(steps)]
    torch.manual_seed(11)
    high_start, low_start = torch.randn(shape), torch.randn(low)
    steps_low, steps_high = ([torch.randn(s) for _ in range(steps)] for s in (low, shape))
    expected = [high_start, low_start, *steps_low[:3], *steps_high]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_reference_draws_its_first_noise_as_core_does(ultra):
    noise = ultra.comfy.sample.prepare_noise(torch.zeros(1, 16, *HIGH), 11)
    assert torch.equal(ultra.sampling.ReferencePassNoise(noise, 11, torch.Size((1, 16, *LOW))).high_start, noise)


def test_reference_rescales_over_the_batch_and_leaves_steps_after_20_unguided(ultra, monkeypatch):
    model, noise = guided(ultra), noise_of(2)
    runs = []
    real = ultra.sampling.GuiderPrediction.__call__
    monkeypatch.setattr(ultra.sampling.GuiderPrediction, "__call__", lambda self, x, t, run=None: runs.append(
        (x.shape[-1], type(run).__name__)) or real(self, x, t, run))
    batch = draw(ultra, model, noise=noise, steps=22, reference=True)
    assert [name for _, name in runs] == ["NoneType"] * 21 + ["Kept"] + ["Guided"] * 20 + ["NoneType"] * 2
    monkeypatch.setattr(ultra.sampling, "ReferencePassNoise", lambda noise, seed, low: ultra.sampling.SeededNoise(
        noise, seed, low))
    batch = draw(ultra, model, noise=noise, reference=True)
    assert (batch[:1] - draw(ultra, model, noise=noise[:1], reference=True)).abs().max() > 1e-3


# --- The MODEL that it is put on


def test_the_model_given_stays_as_it_was(ultra):
    def plain():
        return draw_core(ultra, ultra.base)

    before, sampling_before = plain(), ultra.base.get_model_object("model_sampling")
    model = guided(ultra)
    draw(ultra, model)
    assert torch.equal(plain(), before)
    assert ultra.base.get_model_object("model_sampling") is sampling_before
    assert model.get_model_object("model_sampling").shift == 1 and sampling_before.shift == 2
    assert not isinstance(ultra.base.get_model_object("diffusion_model"), ultra.guided.GuidedStageC)


def test_the_noise_levels_of_a_guided_model_stay_its_own(ultra):
    """DynamicVRAM gives buffers back by name, to the object that has the name by then: the base's or the guide's."""
    sampling = guided(ultra).get_model_object("model_sampling")
    levels = sampling.sigmas.clone()
    assert not list(sampling.buffers())  # so that none of them can be kept for the base
    sampling.register_buffer("sigmas", torch.zeros_like(levels))  # as core does it
    assert torch.equal(sampling.sigmas, levels)


def draw_core(ultra, model, name="euler", noise=None):
    noise = noise_of() if noise is None else noise
    with torch.inference_mode():
        return ultra.comfy.sample.sample(model, noise, 2, 4.0, name, "simple", text(1), text(2),
                                         torch.zeros_like(noise), seed=3, disable_pbar=True)


def test_a_guided_model_in_another_sampler_says_which_one_it_needs(ultra):
    with pytest.raises(ValueError, match="with SamplerCustomAdvanced and 'UltraPixel Sampler'"):
        draw_core(ultra, guided(ultra))


def test_the_sampler_without_a_guide_says_what_is_missing(ultra):
    with pytest.raises(ValueError, match="has no guide: put 'UltraPixel Guide'"):
        draw(ultra, ultra.base)


def test_a_second_guide_node_replaces_the_first(ultra):
    once = guided(ultra, down=0.5, up=0.1)
    assert torch.equal(draw(ultra, guided(ultra, guided(ultra), down=0.5, up=0.1)), draw(ultra, once))


def lora_of(ultra, rank=2):
    """A LoRA over all attentions of the tiny Stage C, in core's names."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for key, weight in ultra.base.model.diffusion_model.state_dict().items():
        if ".attn." in key and key.endswith(".weight"):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
    return tensors


@pytest.mark.parametrize("first", ["lora", "guide"])
def test_a_lora_stays_on_the_base_in_both_passes(ultra, first):
    write_file(ultra.host.models / "loras" / "tiny_cascade_lora.safetensors", lora_of(ultra))

    def with_lora(model):
        return ultra.core.LoraLoaderModelOnly().load_lora_model_only(model, "tiny_cascade_lora.safetensors", 0.7)[0]

    model = guided(ultra, with_lora(ultra.base)) if first == "lora" else with_lora(guided(ultra))
    attention, seen = ultra.base.model.diffusion_model.down_blocks[0][2].attention.attn.to_q, []
    before = attention.weight.detach().clone()
    handle = attention.register_forward_hook(
        lambda module, args, out: seen.append((args[0].shape[1], (module.weight - before).abs().max().item())))
    try:
        drawn = draw(ultra, model)
    finally:
        handle.remove()
    assert {n for n, _ in seen} == {LOW[0] * LOW[1], HIGH[0] * HIGH[1]}
    if not dynamic_vram.wanted():  # there it is applied where the weight is used, which stays as it is
        assert all(change > 0.1 for _, change in seen)
    assert (drawn - draw(ultra, guided(ultra))).abs().max() > 0.1
    assert torch.equal(attention.weight, before)  # the next MODEL found it as it had been


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_a_base_in_other_storage_is_guided(ultra, storage):
    path = ultra.host.models / "diffusion_models" / STAGE_C
    base = ultra.comfy.sd.load_diffusion_model(str(path), model_options={"dtype": storage})
    layer = base.model.diffusion_model.down_blocks[0][2].attention.attn.to_q
    assert dynamic_vram.stored_dtype(layer) == storage
    drawn, full = draw(ultra, guided(ultra, base)), draw(ultra, guided(ultra))
    assert drawn.isfinite().all()
    unguided = draw(ultra, guided(ultra, base, down=0.0, up=0.0))
    assert (drawn - full).abs().mean() < (unguided - full).abs().mean()


def test_comfyui_loads_the_guide_with_the_base_and_can_take_it_away_again(ultra):
    mm, model, held = ultra.comfy.model_management, guided(ultra), []
    draw(ultra, model,
         callback=lambda *a: held.append({type(m.model.model).__name__ for m in mm.current_loaded_models}))
    assert {"Guide", "StableCascade_C"} <= held[0]
    mm.unload_all_models()
    assert not mm.current_loaded_models
    close(draw(ultra, model), draw(ultra, model))


def test_the_memory_asked_for_is_that_of_a_resblock_and_only_while_sampling(ultra, monkeypatch):
    mm, asked = ultra.comfy.model_management, []
    real = mm.load_models_gpu
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, memory_required=0, **k: asked.append(memory_required)
                        or real(models, memory_required=memory_required, **k))
    draw(ultra, guided(ultra), noise=noise_of(size=(12, 12)))
    assert asked == [pytest.approx(1.1 * 4 * 15 * tiny.HIDDEN * 2 * 144)]  # with a negative prompt, in float32
    assert "memory_required" not in vars(ultra.base.model)
    with pytest.raises(ValueError, match="conditioning areas"):
        draw(ultra, guided(ultra), positive=text(1, area=(4, 4, 0, 0)))
    assert "memory_required" not in vars(ultra.base.model)


def test_the_guide_of_several_models_is_one_and_the_same(ultra):
    one, two = guided(ultra), guided(ultra, down=0.5)
    assert one.get_additional_models_with_key(ultra.guided.KEY)[0].model is ultra.guide.model
    assert two.get_additional_models_with_key(ultra.guided.KEY)[0].model is ultra.guide.model
    assert one.model is two.model is ultra.base.model


def test_a_network_that_would_leave_the_guide_out_is_refused(ultra):
    model = guided(ultra)
    model.add_object_patch("diffusion_model", ultra.base.get_model_object("diffusion_model"))
    with pytest.raises(ValueError, match="put a StageC in the place .*: put 'UltraPixel Guide' after that node"):
        draw(ultra, model)


def test_the_names_of_torch_compiles_wrapper_are_core_s(ultra):
    core = import_module("comfy_api.torch_helpers.torch_compile")
    assert (ultra.guided.COMPILED, ultra.guided.COMPILED_HOW) == (core.COMPILE_KEY, core.TORCH_COMPILE_KWARGS)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("patch_size, size", [(1, (8, 8)), (1, (9, 7)), (2, (12, 20))])
def test_the_sizes_of_the_levels_are_those_of_the_features(ultra, switch, patch_size, size):
    net = ultra.guided.guided_network(import_module("comfy.ldm.cascade.stage_c").StageC(
        **{**tiny.CORE_C, "switch_level": [switch]}, patch_size=patch_size, operations=torch.nn))
    tap = ultra.guided.FeatureTap()
    with torch.no_grad():
        net(torch.randn(1, 16, *size), torch.rand(1), torch.randn(1, 5, tiny.TEXT), torch.randn(1, 1, tiny.TEXT),
            torch.zeros(1, 1, 768), transformer_options={}, **{ultra.guided.HOOK: tap})
    sizes = ultra.guided.level_sizes(net, *size)
    assert [x.shape[-2:] for x in tap.features.down] == sizes
    assert [x.shape[-2:] for x in tap.features.up] == sizes[::-1]


def test_a_guided_network_goes_over_its_features_less_often_than_cores(ultra, monkeypatch):
    attention = import_module("comfy.ldm.modules.attention").attention_pytorch  # as on a GPU
    monkeypatch.setattr(import_module("comfy.ldm.cascade.common"), "optimized_attention", attention)
    core = import_module("comfy.ldm.cascade.stage_c").StageC(
        operations=import_module("comfy.ops").disable_weight_init, **count.BF16)
    given = *count.stage_c_inputs(24), count.meta(1, 1, 768)
    plain = count.counted(lambda: ([core], lambda: core(*given)))
    net = ultra.guided.guided_network(core)
    ours = count.counted(lambda: ([net], lambda: net(*given, transformer_options={})))
    assert ours.launches < plain.launches and ours.bytes < 0.65 * plain.bytes and ours.peak < 0.8 * plain.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_a_guided_network_is_as_near_to_float64_as_cores(ultra, dtype):
    core = import_module("comfy.ldm.cascade.common").GlobalResponseNorm(64)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
        x = torch.randn(2, 9, 7, 64, generator=rng).to(dtype)
        exact = core.double()(x.double())
        core.to(dtype)
        ours = ultra.guided.made_of(core, ultra.guided.GuidedResponseNorm)(x)
        far, near = ((y.double() - exact).norm() for y in (core(x), ours))
    assert ours.dtype == dtype and near <= 1.05 * far


def test_a_second_run_with_another_seed_loads_nothing_again(ultra, monkeypatch):
    graph = json.loads((ROOT / "tests/workflows/prompts" / "ultrapixel_2048.json").read_text(encoding="utf-8"))
    graph["6"]["inputs"] |= dict(width=256, height=256)
    graph["10"]["inputs"]["steps"] = graph["16"]["inputs"]["steps"] = 2
    first = ultra.host.run(graph)
    assert first.error is None
    assert {image.size for node, image in first.previews if node == "13"} == {(24, 24), (6, 6)}  # both passes
    mm, read = ultra.comfy.model_management, []
    inside = {id(m.model.model) for m in mm.current_loaded_models}
    for module, name in ((ultra.comfy.utils, "load_torch_file"), (ultra.guided, "read_file")):
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: read.append(name))
    graph["12"]["inputs"]["noise_seed"] = 99
    second = ultra.host.run(graph, fresh=False)
    assert second.error is None and not read
    assert {id(m.model.model) for m in mm.current_loaded_models} == inside
    assert first.images[0].read_bytes() != second.images[0].read_bytes()


# --- Interrupted, prompted, refused


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_an_interruption_in_either_pass_leaves_nothing_behind(ultra, step):
    mm, model = ultra.comfy.model_management, guided(ultra)
    guider, before = ultra.comfy.samplers.CFGGuider(model), draw(ultra, model)

    def stop(i, *rest):
        if i == step:
            mm.interrupt_current_processing()

    if step < 5:
        with pytest.raises(mm.InterruptProcessingException):
            draw(ultra, model, guider=guider, callback=stop)
    else:  # after the last step nothing is left to interrupt
        draw(ultra, model, guider=guider, callback=stop)
        mm.interrupt_current_processing(False)
    assert ultra.guided.KEY not in model.model_options.get("transformer_options", {})
    assert torch.equal(draw(ultra, model), before)


def test_after_an_error_in_the_network_the_base_draws_as_before(ultra, monkeypatch):
    before = draw_core(ultra, ultra.base)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(ultra.base.model.diffusion_model.clf, "forward", lambda x: 1 / 0)
        draw(ultra, guided(ultra))
    assert torch.equal(draw_core(ultra, ultra.base), before)


def test_rows_that_run_one_after_the_other_are_guided_as_in_one_batch(ultra, monkeypatch):
    together = draw(ultra, guided(ultra))
    longer = text(2)
    longer[0][0] = torch.cat((longer[0][0], longer[0][0]), dim=1)  # text of another length needs a call of its own
    monkeypatch.setattr(ultra.comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    close(draw(ultra, guided(ultra)), together)
    monkeypatch.undo()
    assert draw(ultra, guided(ultra), negative=longer).isfinite().all()


def test_equal_prompts_combined_are_as_one(ultra):
    close(draw(ultra, guided(ultra), positive=text(1) + text(1)), draw(ultra, guided(ultra)))


def test_a_mask_over_a_prompt_is_followed_at_both_sizes(ultra):
    half = torch.zeros(1, 16, 16)
    half[..., 8:] = 1
    both = [[c[0], {**c[1], "mask": m}] for c, m in ((text(1)[0], half), (text(3)[0], 1 - half))]
    masked = draw(ultra, guided(ultra), positive=both)
    assert (masked - draw(ultra, guided(ultra))).abs().max() > 0.1


@pytest.mark.parametrize("entries", [{"mask": torch.zeros(1, 16, 16)}, {"strength": 0.0}])
def test_a_prompt_without_weight_does_not_move_the_guide(ultra, entries):
    close(draw(ultra, guided(ultra), positive=text(1) + text(3, **entries)), draw(ultra, guided(ultra)))


def test_where_no_prompt_weighs_the_guide_is_their_plain_mean(ultra):
    features = ultra.guided.Features
    kept, mask = ultra.guided.Kept({}), torch.tensor([[[[0.0, 3.0]]]])
    kept.parts = [(weight, features([torch.full((1, 1, 1, 2), value)], []))
                  for weight, value in ((mask, 4.0), (mask / 3, 8.0))]
    assert kept.features().down[0].flatten().tolist() == [6.0, 5.0]


def test_an_area_is_refused(ultra):
    with pytest.raises(ValueError, match="conditioning areas cannot be followed"):
        draw(ultra, guided(ultra), positive=text(1, area=(4, 4, 0, 0)))


def test_a_prompt_that_ends_early_cannot_make_a_guide(ultra):
    with pytest.raises(ValueError, match="No positive prompt is active at the end"):
        draw(ultra, guided(ultra), positive=text(1, start_percent=0.0, end_percent=0.2))


def test_a_guider_without_negative_prompt_draws(ultra):
    model = guided(ultra)
    guider = import_module("comfy_extras.nodes_custom_sampler").Guider_Basic(model)
    guider.set_conds(text(1))
    with torch.inference_mode():
        alone = guider.sample(noise_of(), torch.zeros(1, 16, *HIGH), sampler(ultra), levels(ultra, model), seed=7,
                              disable_pbar=True)
    close(alone, draw(ultra, model, cfg=1.0))


def test_a_split_schedule_is_refused(ultra):
    model = guided(ultra)
    with pytest.raises(ValueError, match="ends without noise.*Do not split"):
        draw(ultra, model, sigmas=levels(ultra, model, 4)[:3])


def test_other_noise_levels_are_refused(ultra):
    model = ultra.nodes["ModelSamplingDiscrete"]().patch(guided(ultra), "eps", False)[0]
    with pytest.raises(ValueError, match="A ModelSampling node has replaced"):
        draw(ultra, model, sigmas=levels(ultra, guided(ultra)))


def test_cores_shift_node_behind_the_guide_counts(ultra):
    model = ultra.nodes["ModelSamplingStableCascade"]().patch(guided(ultra), 2.0)[0]
    assert torch.equal(draw(ultra, model), draw(ultra, guided(ultra, shift=2.0)))


def test_the_latent_of_stage_b_is_refused(ultra):
    with pytest.raises(ValueError, match="512 x 512 cells.*21847 x 21847 pixels.*'stage_c'"):
        draw(ultra, guided(ultra), noise=torch.zeros(1, 16, 512, 512))


@pytest.mark.parametrize("low, words", [
    (torch.zeros(1, 4, 4, 4), "low_latent has 4 channels"), (torch.zeros(1, 16, 4, 8), "of different shapes"),
    (torch.ones(3, 16, *LOW), "low_latent has 3 pictures, the latent 1: put the same 'Latent From Batch' after both"),
])  # fmt: skip
def test_a_low_latent_that_does_not_belong_to_the_picture_is_refused(ultra, low, words):
    with pytest.raises(ValueError, match=words):
        draw(ultra, guided(ultra), low=low)


def test_without_a_low_latent_its_size_follows_from_the_picture(ultra):
    sizes = []
    draw(ultra, guided(ultra), low=None, noise=noise_of(size=(12, 24)), steps=1, callback=lambda step, x0, x, total:
         sizes.append(tuple(x0.shape[-2:])))
    assert sizes == [(17, 34), (12, 24)]


def test_more_low_resolution_cells_than_the_guide_knows_are_refused_before_the_first_step(ultra):
    steps = []
    with pytest.raises(ValueError, match="33 x 32 = 1056 cells, .* at most 1024: connect the output 'low'.* 'stage_c'"):
        draw(ultra, guided(ultra), low=(32, 33), noise=noise_of(size=(32, 33)), steps=1,
             callback=lambda *step: steps.append(step))
    assert not steps


@pytest.mark.parametrize("folder, name, make, words", [
    ("diffusion_models", STAGE_C, None, "Stable Cascade's Stage C"),
    ("diffusion_models", STAGE_B, None, "Stable Cascade's Stage B"),
    ("loras", "a_lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "a LoRA"),
    ("loras", "numbered.safetensors", {"module.0.lora_down": torch.zeros(4, 8), "module.0.lora_up": torch.zeros(8, 4)},
     "a personalisation of UltraPixel"),
    ("diffusion_models", "a_pixart.safetensors", {"blocks.0.scale_shift_table": torch.zeros(1)}, "PixArt"),
])  # fmt: skip
def test_a_file_that_is_no_guide_is_refused_by_name(ultra, folder, name, make, words):
    source, place = ultra.host.models / folder / name, ultra.host.models / "model_patches" / name
    if make:
        write_file(source, make)
    place.write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=f"^{name}: This is not a guide of UltraPixel. The keys are those of {words}"):
        run(ultra, "GuideLoader", guide_name=name)
    place.unlink()


def test_a_model_that_is_no_stage_c_is_refused_by_name(ultra):
    stage_b = ultra.core.UNETLoader().load_unet(STAGE_B, "default")[0]
    with pytest.raises(ValueError, match="is Stable Cascade's Stage B.*stage_c_bf16.safetensors"):
        guided(ultra, stage_b)
    with pytest.raises(ValueError, match="is a Flux, but UltraPixel works on Stable Cascade's Stage C"):
        guided(ultra, SimpleNamespace(model=type("Flux", (), {})()))


def test_the_small_stage_c_is_refused_by_name(ultra):
    core_config = ultra.comfy.supported_models.Stable_Cascade_C(
        dict(c_cond=1536, c_hidden=[1536, 1536], nhead=[24, 24], blocks=[[1, 1], [1, 1]]))
    core_config.set_inference_dtype(torch.float32, None)
    with pytest.raises(ValueError, match="Stage C 1B.*1536 and 1536 channels.*3.6B"):
        guided(ultra, SimpleNamespace(model=core_config.get_model({}, device="meta")))


@pytest.mark.parametrize("value, answer", [(-1.0, True), (0.0, True), (0.6, True)])
def test_a_strength_is_0_or_more_or_as_released(ultra, value, answer):
    node = ultra.nodes["PixStack_UltraPixelGuide"]
    assert node.validate_inputs(up=value) is answer
    assert "up=-0.5 means nothing" in node.validate_inputs(up=-0.5)


# --- Sizes


def canvas(ultra, **given):
    given = {**dict(shape="custom (width, height)", side=2048, width=2048, height=2048, batch_size=1), **given}
    return run(ultra, "Canvas", **given)


@pytest.mark.parametrize("width, height, stage_c, low, stage_b", [
    (2048, 2048, (48, 48), (24, 24), (512, 512)),
    (4096, 4096, (96, 96), (24, 24), (1024, 1024)),
    (5120, 2560, (60, 120), (17, 34), (640, 1280)),
    (2160, 3840, (90, 51), (32, 18), (960, 540)),
])  # fmt: skip
def test_the_latents_of_a_size_are_those_of_the_release(ultra, width, height, stage_c, low, stage_b):
    c, small, b, report = canvas(ultra, width=width, height=height, batch_size=2)
    assert c["samples"].shape == (2, 16, *stage_c) and small["samples"].shape == (2, 16, *low)
    assert b["samples"].shape == (2, 4, *stage_b)
    assert f"{width} x {height} pixels\n" in report and f"= {stage_c[0] * stage_c[1]} tokens" in report
    assert "GB" in report


def test_sizes_are_snapped_to_what_stage_b_can_fold_and_said_so(ultra):
    *_, b, report = canvas(ultra, width=2051, height=2045)
    assert b["samples"].shape[-2:] == (512, 512)
    assert "2048 x 2048 pixels (instead of 2051 x 2045: multiples of 8)" in report


@pytest.mark.parametrize("shape", ["square", "landscape 16:9", "portrait 9:21", "landscape 2:1"])
def test_a_preset_has_its_shape_and_the_pixels_of_its_side(ultra, shape):
    *_, b, report = canvas(ultra, shape=shape, side=3072)
    height, width = (4 * n for n in b["samples"].shape[-2:])
    across, down = sys.modules[ultra.nodes["PixStack_UltraPixelCanvas"].__module__].SHAPES[shape]
    assert abs(width / height / (across / down) - 1) < 0.01
    assert abs(width * height / 3072**2 - 1) < 0.01
    assert width % 8 == height % 8 == 0


@pytest.mark.parametrize("width, height, words", [
    (512, 512, "fewer pixels than 1024 x 1024"), (8192, 8192, "more pixels than 6144 x 6144"),
    (8192, 1024, "sides of 8.0 : 1; the training saw up to 6 : 1"),
])  # fmt: skip
def test_a_size_outside_of_the_training_is_explained(ultra, width, height, words):
    assert words in canvas(ultra, width=width, height=height)[-1]
    assert "Mind" not in canvas(ultra)[-1]


def test_a_size_that_the_sampler_would_not_take_is_refused_with_what_to_do(ultra):
    with pytest.raises(ValueError, match="16384 x 6144 pixels is 55296 cells.* at most as many pixels as 9216 x 9216"):
        canvas(ultra, width=16384, height=6144)
    assert canvas(ultra, width=9216, height=9216)[0]["samples"].shape[-2:] == (216, 216)


# --- ControlNets


def control(ultra, channels=3, ratio=1, hint=None, strength=0.7, percent=(0.0, 1.0)):
    """One of core's, of the smallest kind, on a conditioning."""
    torch.manual_seed(0)
    net = ultra.comfy.ldm.cascade.controlnet.ControlNet(channels, proj_blocks=[0, 2, 5], bottleneck_mode="simple")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    applied = ultra.comfy.controlnet.T2IAdapter(net.eval(), channels, ratio, "bilinear", device=torch.device("cpu"))
    hint = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(1)) if hint is None else hint
    return applied.set_cond_hint(hint, strength, percent)


def controlled(ultra, seed, applied):
    return text(seed, control=applied, control_apply_to_uncond=True)


@torch.no_grad()
def test_a_controlnet_acts_only_on_the_low_resolution_pass(ultra):
    net, seen = ultra.base.model.diffusion_model, []
    handle = net.register_forward_pre_hook(
        lambda module, args, given: seen.append((args[0].shape[-1], given["control"] is not None)), with_kwargs=True)
    applied = control(ultra)
    try:
        drawn = draw(ultra, guided(ultra), positive=controlled(ultra, 1, applied), negative=text(2))
    finally:
        handle.remove()
    assert set(seen) == {(LOW[1], True), (HIGH[1], False)}
    assert (drawn - draw(ultra, guided(ultra))).abs().max() > 0.05
    assert applied.cond_hint is None  # cleaned up


@torch.no_grad()
def test_residuals_of_a_controlnet_reach_the_features_as_in_the_reference(ultra, monkeypatch):
    kept, real = [], ultra.sampling.GuidedImage
    monkeypatch.setattr(ultra.sampling, "GuidedImage", lambda guide, features, *a: kept.append(features) or real(
        guide, features, *a))
    seen, hint = [], torch.rand(1, 3, 8, 8)
    applied = control(ultra, hint=hint)
    draw(ultra, guided(ultra), low=(8, 8), cfg=1.0, positive=controlled(ultra, 1, applied), steps=1,
         callback=lambda step, x0, x, total: seen.append(x))
    sigma = levels(ultra, guided(ultra), 1)[0]
    timestep = sampling.CosineDiffusion().timestep(-2 * sigma.log()).expand(1)
    residuals = [None if r is None else 0.7 * r for r in reversed(applied.t2i_model(hint)["input"])]
    _, features = our_network(ultra).features(seen[0] / (1 + sigma**2).sqrt(), timestep, text(1)[0][0],
                                              text(1)[0][1]["pooled_output"], control=residuals)
    for way in ("down", "up"):
        for ours, expected in zip(getattr(kept[0], way), getattr(features, way), strict=True):
            close(ours, expected)


def test_without_the_guide_a_controlnet_acts_on_the_picture(ultra):
    model = guided(ultra, down=0.0, up=0.0)
    assert (draw(ultra, model, positive=controlled(ultra, 1, control(ultra))) - draw(ultra, model)).abs().max() > 0.05


def test_controlnets_follow_one_another_and_start_and_end(ultra):
    model = guided(ultra)

    def drawn(applied):
        return draw(ultra, model, positive=controlled(ultra, 1, applied))

    one, two = control(ultra), control(ultra, hint=torch.zeros(1, 3, 4, 4) + 0.5)
    chained = drawn(two.set_previous_controlnet(one))
    assert (chained - drawn(control(ultra))).abs().max() > 0.01
    never = drawn(control(ultra, percent=(0.0, 0.0)))  # only at the very first noise level
    assert (never - drawn(control(ultra))).abs().max() > 0.01
    assert torch.equal(drawn(control(ultra, strength=0.0)), draw(ultra, model))


def test_the_hint_of_super_resolution_meets_the_latent_cell_by_cell(ultra):
    applied = control(ultra, channels=16, ratio=1, hint=torch.rand(1, 16, 6, 6))
    sizes = []
    applied.t2i_model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[1:])))
    draw(ultra, guided(ultra), low=(8, 8), positive=controlled(ultra, 1, applied))
    assert sizes == [(16, 8, 8)]  # once for the whole pass


def test_canny_seeks_edges_as_the_release_does_and_keeps_the_shape(ultra, request):
    given = case(request, "ultrapixel_canny_filter")
    image = given.inputs["image"].movedim(1, -1)
    edges = run(ultra, "Canny", image=image, filter="reference", low=100, high=200)[0]
    assert edges.shape == (1, 768, int(768 * 208 / 160), 3) and edges.max() <= 1 and edges.min() >= 0
    assert torch.equal(edges[..., 0], edges[..., 2])
    # On a picture that is scaled already the result is the reference's own.
    square = torch.nn.functional.interpolate(given.inputs["image"], (768, 998), mode="bilinear", antialias=True)
    assert torch.equal(edges[..., 0], canny(square)[:, 0])
    fine = run(ultra, "Canny", image=image, filter="fine", low=100, high=200)[0]
    assert fine.shape == edges.shape and set(fine.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(fine, edges)


def test_the_inpainting_hint_is_white_where_it_is_to_be_painted(ultra):
    image, mask = torch.rand(2, 16, 24, 3), torch.zeros(1, 8, 12)
    mask[:, 2:4, 3:9] = 1
    (hint,) = run(ultra, "InpaintHint", image=image, mask=mask)
    assert hint.shape == (2, 16, 24, 4)
    painted = hint[..., 3] == 1
    assert painted[:, 4:8, 6:18].all() and painted.float().mean() == pytest.approx(4 * 12 / (16 * 24))
    assert (hint[..., :3][painted] == 1).all()
    assert torch.equal(hint[..., :3][~painted], image[~painted])


# --- Personalisation

CAT = "lora_cat_tiny.safetensors"


@pytest.fixture(scope="module")
def clip(ultra):
    return ultra.core.CLIPLoader().load_clip(CLIP, "stable_cascade")[0]


def personal(ultra, clip, model=None, name=CAT, **given):
    if not (ultra.host.models / "loras" / name).exists():
        tiny.tiny_personalisation(ultra.host.models / "loras" / name)
    given = {**dict(strength=1.0, token_strength=1.0, token="[roubaobao]", base_token="^cat</w>"), **given}
    return run(ultra, "Personalise", model=model or ultra.base, clip=clip, lora_name=name, **given)


def encode(clip, prompt):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)


@torch.no_grad()
def test_a_personalised_core_stage_c_predicts_what_the_reference_does(ultra, clip, request):
    given = case(request, "ultrapixel_lora")
    i, c = given.inputs, given.config
    own = {k: v for k, v in given.weights.items() if k.startswith("module.") and int(k.split(".")[1]) < 12}
    write_file(ultra.host.models / "loras" / "parity.safetensors", own)
    base = core_stage_c(ultra, given.weights, c)
    model = personal(ultra, clip, base, "parity.safetensors")[0]

    def predict(model):
        net = model.patch_model().diffusion_model
        pred = net(i["x"], i["r"], i["clip_text"], i["clip_text_pooled"], i["clip_img"])
        model.unpatch_model()
        return pred

    close(predict(model), given.outputs["pred"])
    close(predict(base), given.outputs["pred_without_lora"])


def test_a_word_that_learned_to_be_another_is_that_other(ultra, clip):
    table = clip.cond_stage_model.clip_g.transformer.get_input_embeddings().weight.float()
    words = clip.tokenizer.clip_g.tokenizer.get_vocab()
    difference = table[words["dog</w>"]] - table[words["cat</w>"]]
    own = read_file(_cat(ultra))[0]
    own["module.12.embeddings"] = difference[None]
    torch.save(own, ultra.host.models / "loras" / "to_dog.safetensors")
    learned = personal(ultra, clip, name="to_dog.safetensors")[1]
    for prompt in ("a photo of a {}", "a {} on (a {}:1.3) chair", "{}"):
        ours, expected = (encode(learned, prompt.replace("{}", word)) for word in ("[roubaobao]", "dog"))
        close(ours[0], expected[0])
        close(ours[1], expected[1])
    half = personal(ultra, clip, name="to_dog.safetensors", token_strength=0.0)[1]
    close(encode(half, "a [roubaobao]")[0], encode(clip, "a cat")[0])


def _cat(ultra):
    path = ultra.host.models / "loras" / CAT
    if not path.exists():
        tiny.tiny_personalisation(path)
    return path


def test_the_clip_given_knows_no_new_word(ultra, clip):
    before = clip.tokenize("a cat [roubaobao]")
    learned = personal(ultra, clip)[1]
    assert [len(batch) for batch in learned.tokenize("a cat [roubaobao]")["g"]] == [77]
    kinds = [type(token) for token, _ in learned.tokenize("a cat [roubaobao]")["g"][0]]
    assert kinds.count(torch.Tensor) == 1 and kinds[3] is torch.Tensor
    assert clip.tokenize("a cat [roubaobao]") == before
    assert learned.tokenize("a dog") == clip.tokenize("a dog")


def test_a_prompt_without_the_word_is_warned_about(ultra, clip, caplog):
    learned = personal(ultra, clip)[1]
    for prompt in ("", "a cat [roubaobao]"):
        learned.tokenize(prompt)
        assert "learned word" not in caplog.text
    learned.tokenize("a photo of a cat")
    assert "'a photo of a cat' does not hold the learned word [roubaobao]" in caplog.text


def test_the_words_show_and_come_from_a_file_that_says_them(ultra, clip):
    assert personal(ultra, clip)[2:] == ("[roubaobao]", "^cat</w>")
    own = lora.read(read_file(_cat(ultra))[0], {}, tiny.C)
    own.token, own.base = "<pet>", "^dog</w>"
    write_file(ultra.host.models / "loras" / "named.safetensors", *lora.to_core(own))
    model, learned, token, base = personal(ultra, clip, name="named.safetensors", token="", base_token="")
    assert (token, base) == ("<pet>", "^dog</w>")
    assert any(isinstance(t, torch.Tensor) for t, _ in learned.tokenize("my <pet>")["g"][0])
    numbered = personal(ultra, clip)[0]
    for key, patches in model.patches.items():
        ours, released = (p[0][1].weights for p in (patches, numbered.patches[key]))
        assert torch.equal(ours[0] @ ours[1] * ours[2], released[0] @ released[1] * released[2])


def test_a_file_that_does_not_say_its_word_asks_for_it(ultra, clip):
    with pytest.raises(ValueError, match=r"^lora_cat_tiny.*give token and base_token.*\[roubaobao\] and \^cat</w>"):
        personal(ultra, clip, token="", base_token="")


def test_two_personalisations_keep_their_words_apart(ultra, clip):
    model, learned, *_ = personal(ultra, clip)
    model, both, *_ = personal(ultra, learned, model, token="[other]", base_token="^dog</w>")
    tokens = [t for t, _ in both.tokenize("a [roubaobao] and an [other]")["g"][0] if isinstance(t, torch.Tensor)]
    assert len(tokens) == 2 and not torch.equal(*tokens)
    with pytest.raises(ValueError, match="is a word that this CLIP knows already"):
        personal(ultra, learned)


def test_a_personalisation_works_with_the_guide_and_leaves_the_base(ultra, clip):
    before = draw(ultra, guided(ultra))
    own = draw(ultra, guided(ultra, personal(ultra, clip)[0]))
    assert (own - before).abs().max() > 0.1
    close(draw(ultra, personal(ultra, clip, guided(ultra))[0]), own)
    close(draw(ultra, guided(ultra, personal(ultra, clip, strength=0.0)[0])), before)
    assert torch.equal(draw(ultra, guided(ultra)), before)


def test_a_personalisation_that_does_not_fit_is_refused(ultra, clip):
    write_file(ultra.host.models / "loras" / "kohya.safetensors",
               {f"lora_prior_unet_x.lora_{part}.weight": torch.zeros(1) for part in ("down", "up")})
    with pytest.raises(ValueError, match="^kohya.safetensors: 2 keys do not belong to an attent.*core's LoRA loader"):
        personal(ultra, clip, name="kohya.safetensors")
    guide = (ultra.host.models / "model_patches" / GUIDE).read_bytes()
    (ultra.host.models / "loras" / "a_guide.safetensors").write_bytes(guide)
    with pytest.raises(ValueError, match="^a_guide.safetensors: .*not a personalisation.*'Load UltraPixel Guide'"):
        personal(ultra, clip, name="a_guide.safetensors")
    few = {k: v for k, v in read_file(_cat(ultra))[0].items() if int(k.split(".")[1]) < 8}
    torch.save(few, ultra.host.models / "loras" / "few.safetensors")
    with pytest.raises(ValueError, match="changes 8 layers, this Stage C has 12 to change"):
        personal(ultra, clip, name="few.safetensors")
    narrow = {k: v[..., :32] if k.endswith("lora_down") else v
              for k, v in read_file(_cat(ultra))[0].items()}
    torch.save(narrow, ultra.host.models / "loras" / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"out_proj, \[64, 32\]; in this MODEL it is \[64, 64\]"):
        personal(ultra, clip, name="narrow.safetensors")
    with pytest.raises(ValueError, match="Stage B"):
        personal(ultra, clip, ultra.core.UNETLoader().load_unet(STAGE_B, "default")[0])


@pytest.mark.parametrize("given, words", [
    (dict(base_token="^nosuchword</w>"), "matches no word of CLIP's vocabulary"),
    (dict(base_token="("), "is not a regular expression"),
    (dict(base_token="(a|a)*$"), "base_token='.*' is not run"),
])  # fmt: skip
def test_words_to_begin_with_that_are_none_are_refused(ultra, clip, given, words):
    with pytest.raises(ValueError, match=words):
        personal(ultra, clip, **given)


@pytest.mark.parametrize("token", ["(pet)", "pet)", "pe\\t"])
def test_a_word_that_a_prompt_cannot_hold_is_refused(ultra, clip, token):
    with pytest.raises(ValueError, match="^lora_cat_tiny.*holds a bracket .* or a backslash.*choose a name without"):
        personal(ultra, clip, token=token)


def test_another_text_encoder_is_refused(ultra, clip):
    other = SimpleNamespace(tokenizer=object(), cond_stage_model=type("SDXLClipModel", (), {})())
    with pytest.raises(ValueError, match="is a SDXLClipModel; Stage C reads only CLIP-G"):
        personal(ultra, other)


# --- A picture to begin with


class Encoder:
    """In place of the semantic encoder: means of 32 x 32 pixels in every channel."""

    def __init__(self):
        self.seen = []

    def encode(self, pixels):
        self.seen.append(tuple(pixels.shape[1:3]))
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 32)
        return cells.mean(dim=1, keepdim=True).repeat(1, 16, 1, 1)


def test_a_picture_is_encoded_for_both_passes_at_the_size_of_training(ultra):
    encoder, image = Encoder(), torch.rand(2, 300, 500, 3)
    stage_c, low, stage_b, report = canvas(ultra, width=1280, height=768, image=image, vae=encoder, batch_size=5)
    assert stage_c["samples"].shape == (2, 16, 18, 30) and stage_b["samples"].shape == (2, 4, 192, 320)
    assert low["samples"].shape == (2, 16, 18, 31)  # of a picture of 1312 x 768
    assert encoder.seen == [(18 * 32, 30 * 32), (18 * 32, 31 * 32)]
    assert "1280 x 768 pixels" in report


def test_a_canvas_can_take_the_shape_of_its_picture(ultra):
    *_, b, report = canvas(ultra, shape="as the image", side=1024, image=torch.rand(1, 300, 600, 3), vae=Encoder())
    assert b["samples"].shape[-2:] == (724 // 4 + 1, 1448 // 4)  # 728 x 1448 pixels
    with pytest.raises(ValueError, match="needs an image"):
        canvas(ultra, shape="as the image")
    with pytest.raises(ValueError, match="connect both"):
        canvas(ultra, image=torch.rand(1, 8, 8, 3))


def test_another_vae_than_the_encoder_is_refused(ultra):
    vae = SimpleNamespace(encode=lambda pixels: torch.zeros(1, 4, pixels.shape[1] // 8, pixels.shape[2] // 8))
    with pytest.raises(ValueError, match="makes latents of \\(4, .*load effnet_encoder.safetensors"):
        canvas(ultra, image=torch.rand(1, 64, 64, 3), vae=vae)


@torch.no_grad()
def test_image_to_image_begins_both_passes_from_the_picture_at_the_same_noise(ultra):
    model, seen = guided(ultra), []
    picture, small = noise_of(seed=8), noise_of(size=LOW, seed=9)
    sigmas = levels(ultra, model, 4, 0.5)
    assert len(sigmas) == 5 and sigmas[0] < 2
    draw(ultra, model, low=small, latent=picture, sigmas=sigmas,
         callback=lambda step, x0, x, total: seen.append(x.clone()))
    noise = ultra.sampling.SeededNoise(noise_of(), 7, torch.Size((1, 16, *LOW)))
    close(seen[0], small + sigmas[0] * noise.low_start)
    close(seen[4], picture + sigmas[0] * noise_of())


def test_less_noise_keeps_more_of_the_picture(ultra):
    model, picture = guided(ultra), 30 * noise_of(seed=8)
    distances = [(draw(ultra, model, latent=picture, sigmas=levels(ultra, model, 3, denoise)) - picture).abs().mean()
                 for denoise in (0.1, 0.5, 0.9)]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[2]


def test_a_picture_without_a_low_latent_is_scaled_down(ultra):
    model, seen = guided(ultra), []
    picture = noise_of(size=(30, 30), seed=8)
    sigmas = levels(ultra, model, 1, 0.5)
    draw(ultra, model, low=None, latent=picture, noise=noise_of(size=(30, 30)), sigmas=sigmas,
         callback=lambda step, x0, x, total: seen.append(x.clone()))
    start = ultra.sampling.SeededNoise(noise_of(size=(30, 30)), 7, torch.Size((1, 16, 24, 24))).low_start
    close(seen[0] - sigmas[0] * start, torch.nn.functional.interpolate(picture, (24, 24), mode="area"), 1e-3)


def test_sampling_that_goes_on_without_noise_is_refused(ultra):
    model = guided(ultra)
    with pytest.raises(ValueError, match="continues from a noisy latent.*connect RandomNoise"):
        draw(ultra, model, noise=torch.zeros(1, 16, *HIGH), latent=noise_of(), sigmas=levels(ultra, model, 2, 0.5))


@pytest.mark.parametrize("reference", [False, True])
def test_a_noise_mask_keeps_what_is_outside(ultra, reference):
    picture = noise_of(seed=8)
    mask = torch.zeros(1, 1, *HIGH)
    mask[..., 4:] = 1
    seen = []
    drawn = draw(ultra, guided(ultra), latent=picture, denoise_mask=mask, reference=reference,
                 callback=lambda step, x0, x, total: seen.append(x0.clone()))
    close(drawn[..., :4], picture[..., :4])
    assert (drawn[..., 4:] - picture[..., 4:]).abs().max() > 0.1
    small = torch.nn.functional.interpolate(picture, LOW, mode="area")
    close(seen[0][..., :2], small[..., :2])  # in the low-resolution pass too
