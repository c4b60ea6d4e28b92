"""PixArt's nodes inside a real ComfyUI: conditioning, sampling, ControlNets, LoRAs, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import SimpleNamespace

import dynamic_vram
import pytest
import torch
from merged_lora import merge
from parity_cases import cases
from pixstack.models_impl import lora as lora_files
from pixstack.models_impl.pixart import checkpoint, key_names, sampling
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.lora import names
from pixstack.models_impl.pixart.model import HintedControlNet, PixArt
from pixstack.models_impl.state_dict import read_file, write_file
from safetensors import safe_open
from weights import ALPHA, tiny_pixart, tiny_pixart_controlnet, tiny_pixart_lora, tiny_t5xxl, tiny_vae

TOLERANCE = 1e-4
ALPHA_512, ALPHA_1024, SIGMA = "tiny_alpha_512.pth", "tiny_alpha_1024.pth", "tiny_sigma.pth"
CONTROLNET, LORA, T5XXL, VAE = (
    "tiny_controlnet.pth",
    "tiny_lora.safetensors",
    "tiny_t5xxl.safetensors",
    "tiny_vae.safetensors",
)


@pytest.fixture(scope="module")
def art(host):
    """Our nodes by their short name, the modules of ComfyUI they work with, and tiny models."""
    models = host.models
    tiny_pixart(models / "diffusion_models" / ALPHA_512, **ALPHA, sample_size=64)
    tiny_pixart(models / "diffusion_models" / ALPHA_1024, **ALPHA, micro_conditions=True)
    tiny_pixart(models / "diffusion_models" / SIGMA)
    tiny_pixart_controlnet(models / "controlnet" / CONTROLNET, **ALPHA, sample_size=64)
    tiny_pixart_lora(models / "loras" / LORA)
    tiny_t5xxl(models / "text_encoders" / T5XXL)
    tiny_vae(models / "vae" / VAE)
    core = import_module("nodes")
    art = SimpleNamespace(host=host, core=core, nodes=core.NODE_CLASS_MAPPINGS, comfy=import_module("comfy"))
    for name in ("sample", "samplers", "sd", "model_management", "patcher_extension", "ldm.pixart.pixartms"):
        import_module(f"comfy.{name}")
    art.alpha, art.micro, art.sigma = (load(art, name) for name in (ALPHA_512, ALPHA_1024, SIGMA))
    art.clip = core.CLIPLoader().load_clip(T5XXL, "pixart")[0]
    art.vae = core.VAELoader().load_vae(VAE)[0]
    art.sampling = sys.modules[type(sampler(art)).__module__]
    return art


def run(art, name: str, **inputs):
    """All outputs of one of our nodes."""
    return art.nodes[f"PixStack_PixArt{name}"].execute(**inputs).args


def load(art, name: str, variant="auto", prediction="auto", positions="auto", weights="ema", dtype="fp32"):
    return run(
        art,
        "Loader",
        model_name=name,
        variant=variant,
        prediction=prediction,
        positions=positions,
        weights=weights,
        dtype=dtype,
    )[0]


def sampler(art, algorithm="dpm-solver++", order=2, eta=1.0, inpaint="core"):
    return run(art, "Sampler", algorithm=algorithm, order=order, eta=eta, inpaint=inpaint)[0]


def sigmas(art, model, schedule="reference (time-uniform)", steps=4, denoise=1.0, timestep=400):
    return run(art, "Sigmas", model=model, schedule=schedule, steps=steps, denoise=denoise, timestep=timestep)[0]


def tokens(length: int, seed: int = 0, **entries) -> list:
    """A conditioning of random text tokens."""
    text = torch.randn(1, length, 4096, generator=torch.Generator().manual_seed(seed))
    return [[text, entries]]


def noise_of(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(art, model, positive, negative, sampler, sigmas, cfg=4.5, noise=None, latent=None, **more):
    noise = noise_of(1, 4, 8, 12) if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    return art.comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent, seed=7, **more
    )


def network(art, model) -> PixArt:
    """A network of its own with the weights of a MODEL, outside ComfyUI."""
    net = PixArt(model.model.config)
    net.load_state_dict(model.model.diffusion_model.state_dict())
    return net.eval()


def predictor(net: PixArt, positive, negative, cfg, **more):
    """predict(x, timestep) -> (guided eps of all channels, eps of the positive prompt, its variance)."""

    @torch.no_grad()
    def predict(x, timestep):
        t = torch.full((len(x),), float(timestep))
        cond, uncond = (net(x, t, c[0][0].expand(len(x), -1, -1), **more) for c in (positive, negative))
        eps, variance = cond.chunk(2, dim=1)
        return eps + (cfg - 1) * (eps - uncond[:, :4]), eps, variance

    return predict


def close(ours, reference, tolerance=TOLERANCE):
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.std().item()), (
        (ours - reference).abs().max()
    )


# --- What the network is conditioned on


@pytest.mark.parametrize("timestep", [999.0, 500.0, 123.4, 0.0])
@pytest.mark.parametrize("kind", ["alpha", "micro", "sigma"])
def test_the_model_predicts_what_its_network_does_at_whole_and_fractional_timesteps(art, kind, timestep):
    model = getattr(art, kind)
    net, schedule = network(art, model), sampling.NoiseSchedule()
    x, text = noise_of(2, 4, 8, 12), tokens(7)
    alpha, sigma = schedule.alpha(timestep), schedule.sigma(timestep)
    seen = []
    draw(
        art,
        model,
        text,
        text,
        art.comfy.samplers.KSAMPLER(capture(seen, x / alpha, sigma)),
        torch.tensor([sigma, 0.0]),
        cfg=1.0,
        noise=x,
    )
    with torch.no_grad():
        eps = net(x, torch.full((2,), timestep), text[0][0].expand(2, -1, -1))[:, :4]
    close(seen[0] * alpha, x - schedule.std(timestep) * eps)


def capture(seen: list, x, sigma):
    """A sampler that asks once, for x at sigma."""

    def sample(model, noise, sigmas, extra_args=None, callback=None, disable=None):
        seen.append(model(x, x.new_full((len(x),), sigma), **extra_args))
        return noise

    return sample


@pytest.mark.parametrize("lengths", [(9, 3), (3, 9), (5, 5)])
def test_prompts_of_different_lengths_run_in_one_pass_and_do_not_mix(art, lengths):
    positive, negative = (tokens(length, seed) for seed, length in enumerate(lengths))
    calls = []
    model = art.sigma.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: calls.append(len(args["input"])) or apply(args["input"], args["timestep"], **args["c"])
    )
    ours = draw(art, model, positive, negative, sampler(art), sigmas(art, model))
    predict = predictor(network(art, model), positive, negative, 4.5)
    reference = sampling.dpm_solver_pp(
        lambda x, t: predict(x, t)[0], noise_of(1, 4, 8, 12), sampling.NoiseSchedule(), sampling.time_uniform(4)
    )
    assert calls == [2] * 4
    close(ours * 0.13025, reference)


def test_on_a_cpu_prompts_of_different_lengths_share_only_a_small_pass(art, monkeypatch):
    conds = sys.modules[sys.modules[type(art.sigma.model).__module__].TextCond.__module__]
    calls, pictures = [], []
    model = art.sigma.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: calls.append(len(args["input"])) or apply(args["input"], args["timestep"], **args["c"])
    )
    for few, second, rows in ((24, 3, [2]), (23, 3, [1, 1]), (23, 9, [2])):  # 8 x 12 latents are 24 patch tokens
        monkeypatch.setattr(conds, "FEW", few)
        calls.clear()
        pictures.append(draw(art, model, tokens(9), tokens(second, 1), sampler(art), sigmas(art, model)))
        assert calls == rows * 4
    close(*pictures[:2])


def test_padding_behind_an_attention_mask_changes_nothing(art):
    short = tokens(5)
    padded = torch.cat([short[0][0], torch.full((1, 7, 4096), 9.0)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 7])
    pictures = [
        draw(art, art.sigma, c, tokens(4, 1), sampler(art), sigmas(art, art.sigma))
        for c in (short, [[padded, {"attention_mask": mask}]])
    ]
    close(*pictures)


def test_a_mask_with_holes_hides_what_it_should(art):
    text = tokens(6)
    kept = [[text[0][0][:, [0, 1, 4, 5]], {}]]
    holed = [[text[0][0], {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1]])}]]
    close(*(draw(art, art.sigma, c, tokens(4, 1), sampler(art), sigmas(art, art.sigma)) for c in (kept, holed)))


def test_the_text_is_read_once_for_all_steps_and_again_in_the_next_run(art):
    net, calls = art.sigma.model.diffusion_model, []
    hook = net.y_embedder.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(2):
            draw(art, art.sigma, tokens(9), tokens(3, 1), sampler(art), sigmas(art, art.sigma))
    finally:
        hook.remove()
    assert len(calls) == 2


def test_a_lora_changes_the_text_that_was_read_before(art):
    """The kept keys and values must not outlive the weights that made them."""
    plain = draw(art, art.sigma, tokens(9), tokens(3, 1), sampler(art), sigmas(art, art.sigma))
    key = "diffusion_model.y_embedder.y_proj.fc2.weight"
    patched = art.sigma.clone()
    patched.add_patches({key: (torch.full(art.sigma.model.state_dict()[key].shape, 0.05),)}, 1.0)
    changed = draw(art, patched, tokens(9), tokens(3, 1), sampler(art), sigmas(art, patched))
    again = draw(art, art.sigma, tokens(9), tokens(3, 1), sampler(art), sigmas(art, art.sigma))
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(again, plain)


def test_alpha_1024_is_conditioned_on_its_own_size_unless_the_conditioning_says_another(art):
    text = tokens(5)
    sized = run(art, "SizeCondition", conditioning=text, width=96, height=64, aspect_ratio=64 / 96)[0]
    other = run(art, "SizeCondition", conditioning=text, width=1024, height=512, aspect_ratio=0.0)[0]
    pictures = [draw(art, art.micro, c, c, sampler(art), sigmas(art, art.micro), cfg=1.0) for c in (text, sized, other)]
    close(pictures[1], pictures[0])
    assert (pictures[2] - pictures[0]).abs().max() > 1e-2
    net = network(art, art.micro)
    sizes = dict(size=torch.tensor([[512.0, 1024.0]]), aspect_ratio=torch.tensor([[0.5]]))  # the bucket's label
    predict = predictor(net, text, text, 1.0, **sizes)
    reference = sampling.dpm_solver_pp(
        lambda x, t: predict(x, t)[1], noise_of(1, 4, 8, 12), sampling.NoiseSchedule(), sampling.time_uniform(4)
    )
    close(pictures[2] * 0.18215, reference)


def test_core_attention_overrides_reach_every_attention(art):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    model = art.sigma.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    draw(art, model, tokens(4), tokens(4, 1), sampler(art), sigmas(art, model, steps=2))
    assert len(calls) == 2 * 2 * model.model.config.depth  # steps, self and cross attention, blocks


def test_core_easycache_skips_calls_of_the_network(art):
    easy = (
        art.nodes["EasyCache"]
        .execute(model=art.sigma, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
        .args[0]
    )
    calls = []
    hook = art.sigma.model.diffusion_model.final_layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        draw(art, easy, tokens(4), tokens(4, 1), sampler(art), sigmas(art, art.sigma, steps=10))
    finally:
        hook.remove()
    assert 0 < len(calls) < 10


def test_fp8_storage_keeps_the_picture(art):
    small = load(art, SIGMA, dtype="fp8_e4m3fn")
    assert dynamic_vram.stored_dtype(small.model.diffusion_model.blocks[0].mlp.fc1) == torch.float8_e4m3fn
    conditions = tokens(4), tokens(4, 1)
    pictures = [draw(art, m, *conditions, sampler(art), sigmas(art, m)) for m in (art.sigma, small)]
    assert torch.nn.functional.cosine_similarity(*(p.flatten() for p in pictures), dim=0) > 0.98


# --- Samplers

ALGORITHMS = {
    "dpm-solver++": ("reference (time-uniform)", sampling.time_uniform, sampling.dpm_solver_pp),
    "dpm-solver++ (diffusers)": ("diffusers (linspace)", sampling.linspace_timesteps, sampling.dpm_diffusers),
    "sa-solver": ("reference (time-uniform)", sampling.time_uniform, sampling.sa_solver),
    "iddpm": ("iddpm (respaced)", sampling.iddpm_timesteps, sampling.iddpm),
    "lcm": ("lcm", sampling.lcm_timesteps, sampling.lcm),
}
STOCHASTIC = ("sa-solver", "iddpm", "lcm")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_released_sampler_draws_in_comfyui_what_it_draws_alone(art, algorithm):
    schedule_name, timesteps, solve = ALGORITHMS[algorithm]
    positive, negative = tokens(6), tokens(3, 1)
    cfg = 1.0 if algorithm == "lcm" else 4.5
    schedule, x = sampling.NoiseSchedule(), noise_of(2, 4, 8, 12)
    predict = predictor(network(art, art.sigma), positive, negative, cfg)

    def alone(x, t):
        guided, eps, variance = predict(x, t)
        if algorithm != "iddpm":
            return guided
        return torch.cat([guided[:, :3], eps[:, 3:], variance], dim=1)  # the reference guides three channels

    more = {}
    if algorithm in STOCHASTIC:
        more["noise"] = art.sampling._noise(7, timesteps(4), x)
    reference = solve(alone, x, schedule, timesteps(4), **more)
    ours = draw(
        art,
        art.sigma,
        positive,
        negative,
        sampler(art, algorithm),
        sigmas(art, art.sigma, schedule_name),
        cfg=cfg,
        noise=x,
    )
    close(ours * 0.13025, reference, 1e-3)


def parts(*entries):
    """A conditioning of several prompts: (length, seed, what else is in the entry)."""
    return [tokens(length, seed, **more)[0] for length, seed, more in entries]


def test_iddpm_blends_the_variance_of_masked_prompts_as_it_does_their_noise(art):
    left, right, negative, x = tokens(5), tokens(7, 3), tokens(4, 1), noise_of(1, 4, 8, 12)
    mask = torch.zeros(1, 8, 12)
    mask[..., :5] = 1
    net = network(art, art.sigma)
    first, second = (predictor(net, text, negative, 4.5) for text in (left, right))

    def alone(x, t):
        (_, eps, variance), (_, other, other_variance) = first(x, t), second(x, t)
        with torch.no_grad():
            uncond = net(x, torch.full((1,), float(t)), negative[0][0])[:, :4]
        cond = mask * eps + (1 - mask) * other
        return torch.cat([sampling.guided(cond, uncond, 4.5, 3), mask * variance + (1 - mask) * other_variance], dim=1)

    timesteps = sampling.iddpm_timesteps(4)
    reference = sampling.iddpm(alone, x, sampling.NoiseSchedule(), timesteps, art.sampling._noise(7, timesteps, x))
    both = parts((5, 0, {"mask": mask}), (7, 3, {"mask": 1 - mask}))
    ours = draw(art, art.sigma, both, negative, sampler(art, "iddpm"), sigmas(art, art.sigma, "iddpm (respaced)"))
    close(ours * 0.13025, reference, 1e-3)


def test_iddpm_follows_conditioning_areas(art):
    small = parts((5, 0, {}), (7, 3, {"area": (4, 6, 2, 2), "strength": 1.0}))
    plain, ours = (draw(art, art.sigma, text, tokens(4, 1), sampler(art, "iddpm"),
                        sigmas(art, art.sigma, "iddpm (respaced)")) for text in (small[:1], small))
    assert ours.isfinite().all() and not torch.equal(ours, plain)


def test_iddpm_draws_with_hooks_what_it_draws_with_the_patched_model(art):
    name, rng = "diffusion_model.blocks.1.attn.proj", torch.Generator().manual_seed(3)
    width = art.sigma.model.config.hidden
    lora = {f"{name}.lora_A.weight": torch.randn(2, width, generator=rng),
            f"{name}.lora_B.weight": torch.randn(width, 2, generator=rng)}
    hooks = import_module("comfy.hooks").create_hook_lora(lora, 1.0, 0.0)
    patched, _ = import_module("comfy.sd").load_lora_for_models(art.sigma, None, lora, 1.0, 0.0)
    fall = sigmas(art, art.sigma, "iddpm (respaced)")
    plain = draw(art, art.sigma, tokens(6), tokens(3, 1), sampler(art, "iddpm"), fall)
    wanted = draw(art, patched, tokens(6), tokens(3, 1), sampler(art, "iddpm"), fall)
    ours = draw(art, art.sigma, tokens(6, hooks=hooks), tokens(3, 1, hooks=hooks), sampler(art, "iddpm"), fall)
    close(ours, wanted, 1e-3)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_iddpm_keeps_the_variance_where_a_cache_skips_the_network(art, cache):
    calls = []
    hook = art.sigma.model.diffusion_model.final_layer.register_forward_hook(lambda *_: calls.append(1))
    cached = art.nodes[cache].execute(art.sigma, 0.5, 0.15, 0.95, False).args[0]
    try:
        ours = draw(art, cached, tokens(4), tokens(4, 1), sampler(art, "iddpm"),
                    sigmas(art, art.sigma, "iddpm (respaced)", steps=10))
    finally:
        hook.remove()
    assert 1 < len(calls) < 10 and ours.isfinite().all()


def test_iddpm_refuses_a_network_that_predicts_no_variance(art):
    tiny_pixart(art.host.models / "diffusion_models" / "tiny_no_variance.pth", **ALPHA, out_channels=4)
    model = load(art, "tiny_no_variance.pth")
    with pytest.raises(ValueError, match="IDDPM needs the variance"):
        draw(art, model, tokens(4), tokens(4, 1), sampler(art, "iddpm"), sigmas(art, model, "iddpm (respaced)"))


def test_dmd_takes_one_step_from_noise_of_variance_one(art):
    text, x = tokens(6), noise_of(2, 4, 8, 12)
    predict = predictor(network(art, art.alpha), text, text, 1.0)
    reference = sampling.dmd(lambda x, t: predict(x, t)[1], x, sampling.NoiseSchedule(), sampling.one_step())
    ours = draw(
        art, art.alpha, text, text, sampler(art, "dmd"), sigmas(art, art.alpha, "dmd (one step)"), cfg=1.0, noise=x
    )
    close(ours * 0.18215, reference)


def test_dmd_refuses_a_schedule_of_several_steps(art):
    with pytest.raises(ValueError, match=r"one step, but these SIGMAS have 4.*dmd \(one step\)"):
        draw(art, art.alpha, tokens(4), tokens(4), sampler(art, "dmd"), sigmas(art, art.alpha, steps=4), cfg=1.0)


def test_a_schedule_too_long_for_lcm_says_how_denoise_made_it_so(art):
    with pytest.raises(ValueError, match=r"'lcm' cannot have 20 steps at denoise 0.1, which are the last of 200: .*50"):
        sigmas(art, art.sigma, "lcm", steps=20, denoise=0.1)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
def test_core_samplers_work(art, name):
    noise, latent = noise_of(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    picture = art.comfy.sample.sample(art.sigma, noise, 4, 4.5, name, "normal", tokens(5), tokens(2, 1), latent, seed=3)
    assert picture.isfinite().all() and picture.std() > 0.1


@pytest.mark.parametrize("algorithm", ["iddpm", "lcm"])
def test_a_schedule_cut_in_two_ends_as_the_whole_one(art, algorithm):
    name = ALGORITHMS[algorithm][0]
    steps, text, x = sigmas(art, art.sigma, name, steps=5), tokens(4), noise_of(1, 4, 8, 8)
    whole = draw(art, art.sigma, text, text, sampler(art, algorithm), steps, cfg=1.0, noise=x)
    first = draw(art, art.sigma, text, text, sampler(art, algorithm), steps[:3], cfg=1.0, noise=x)
    second = draw(
        art, art.sigma, text, text, sampler(art, algorithm), steps[2:], cfg=1.0, noise=torch.zeros_like(x), latent=first
    )
    close(second, whole, 1e-3)


@pytest.mark.parametrize("algorithm", ["dpm-solver++", "sa-solver", "iddpm"])
def test_an_interrupt_stops_between_steps_which_each_show_a_preview(art, algorithm):
    heard, management = [], art.comfy.model_management

    def stop(step, denoised, x, steps):
        heard.append((step, steps, tuple(denoised.shape)))
        if step == 1:
            management.interrupt_current_processing()

    fall = sigmas(art, art.sigma, ALGORITHMS[algorithm][0], steps=5)
    with pytest.raises(management.InterruptProcessingException):
        draw(art, art.sigma, tokens(4), tokens(4, 1), sampler(art, algorithm), fall, callback=stop)
    assert heard == [(step, 5, (1, 4, 8, 12)) for step in (0, 1)]


def test_part_of_a_schedule_changes_a_picture_instead_of_drawing_a_new_one(art):
    latent = 5 * noise_of(1, 4, 8, 8, seed=9)
    text = tokens(4)
    light, heavy = (
        draw(
            art,
            art.sigma,
            text,
            text,
            sampler(art),
            sigmas(art, art.sigma, denoise=d),
            cfg=1.0,
            noise=noise_of(1, 4, 8, 8),
            latent=latent,
        )
        for d in (0.1, 0.9)
    )
    assert (light - latent).abs().mean() < 0.3 * (heavy - latent).abs().mean()


@pytest.mark.parametrize("inpaint", ["core", "reference"])
def test_inpainting_leaves_the_rest_of_the_picture_as_it_was(art, inpaint):
    latent, mask = noise_of(1, 4, 8, 8, seed=9), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    text = tokens(4)
    picture = draw(
        art,
        art.sigma,
        text,
        text,
        sampler(art, inpaint=inpaint),
        sigmas(art, art.sigma),
        noise=noise_of(1, 4, 8, 8),
        latent=latent,
        noise_mask=mask,
    )
    close(picture[..., :4], latent[..., :4], 2e-2)
    assert (picture[..., 4:] - latent[..., 4:]).abs().max() > 0.1


def test_a_v_prediction_model_with_zero_terminal_snr_draws(art):
    model = load(art, SIGMA, prediction="v, zero terminal SNR")
    text = tokens(4)
    assert float(model.get_model_object("model_sampling").sigma_max) > 1000
    picture = draw(
        art, model, text, text, sampler(art, "dpm-solver++ (diffusers)"), sigmas(art, model, "diffusers (trailing)")
    )
    assert picture.isfinite().all()


def test_prediction_can_be_set_to_v_on_scaled_linear_betas(art):
    """The 900M revisions that predict v: their files do not say it, unless diffusers' configurations lie beside."""
    model = load(art, SIGMA, prediction="v, scaled linear, zero terminal SNR")
    own = model.get_model_object("model_sampling")
    expected = sampling.NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    close(own.sigmas, expected.sigma(torch.arange(1000).float()))
    linear = load(art, SIGMA, prediction="v, zero terminal SNR").get_model_object("model_sampling")
    assert own.sigmas[500] < 0.8 * linear.sigmas[500]
    core = art.nodes["ModelSamplingDiscrete"]().patch(model, "v_prediction", True)[0].get_model_object("model_sampling")
    close(core.sigmas[:999], own.sigmas[:999])  # the last is infinite, and each names a large number instead


def test_a_sampler_of_another_model_kind_is_refused(art):
    flow = art.nodes["ModelSamplingSD3"]().patch(art.sigma, 3.0)[0]
    with pytest.raises(ValueError, match="not with PixArt's schedule"):
        sigmas(art, flow)


# --- ControlNet


def controlled(art, model, hint, positive=None, negative=None, sizes=(8, 12), cfg=4.5, **settings):
    positive, negative = positive or tokens(6), negative or tokens(3, 1)
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    settings = {**dict(strength=1.0, start_percent=0.0, end_percent=1.0), **settings}
    both = run(
        art,
        "ControlNetApply",
        positive=positive,
        negative=negative,
        control_net=net,
        latent=None if hint is None else {"samples": hint},
        **settings,
    )
    return draw(art, model, *both, sampler(art), sigmas(art, model), noise=noise_of(1, 4, *sizes), cfg=cfg)


def alone_with(art, model, controls, cfg=4.5):
    predict = predictor(network(art, model), tokens(6), tokens(3, 1), cfg, control=controls)
    out = sampling.dpm_solver_pp(
        lambda x, t: predict(x, t)[0], noise_of(1, 4, 8, 12), sampling.NoiseSchedule(), sampling.time_uniform(4)
    )
    return out / 0.18215


def controlnet(art) -> PixArtControlNet:
    config, blocks, weights = checkpoint.read_controlnet(*read_file(art.host.models / "controlnet" / CONTROLNET))
    net = PixArtControlNet(config, blocks)
    net.load_state_dict(weights)
    return net.eval()


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_controlnet_guides_as_the_network_alone_does(art, strength):
    hint = noise_of(1, 4, 8, 12, seed=2)
    control = HintedControlNet(controlnet(art), hint * 0.18215, strength)
    close(controlled(art, art.alpha, hint, strength=strength), alone_with(art, art.alpha, [control]))


def test_a_mask_limits_where_a_controlnet_counts(art):
    hint = noise_of(1, 4, 8, 12, seed=2)
    mask = torch.zeros(1, 64, 96)
    mask[..., :48] = 1
    strength = torch.zeros(1, 4, 6)
    strength[..., :3] = 0.7
    control = HintedControlNet(controlnet(art), hint * 0.18215, strength.reshape(1, -1, 1))
    close(controlled(art, art.alpha, hint, strength=0.7, mask=mask), alone_with(art, art.alpha, [control]))


def test_two_controlnets_in_a_row_add_up(art):
    hints = [noise_of(1, 4, 8, 12, seed=s) for s in (2, 3)]
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    both = tokens(6), tokens(3, 1)
    for hint in hints:
        both = run(
            art,
            "ControlNetApply",
            positive=both[0],
            negative=both[1],
            control_net=net,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            latent={"samples": hint},
        )
    ours = draw(art, art.alpha, *both, sampler(art), sigmas(art, art.alpha))
    close(ours, alone_with(art, art.alpha, [HintedControlNet(controlnet(art), h * 0.18215) for h in hints]))


def test_a_controlnet_that_ends_before_it_begins_changes_nothing(art):
    hint = noise_of(1, 4, 8, 12, seed=2)
    plain = draw(art, art.alpha, tokens(6), tokens(3, 1), sampler(art), sigmas(art, art.alpha))
    assert torch.equal(controlled(art, art.alpha, hint, strength=0.0), plain)
    assert torch.equal(controlled(art, art.alpha, hint, start_percent=1.0, end_percent=1.0), plain)
    early = controlled(art, art.alpha, hint, end_percent=0.3)
    assert 1e-4 < (early - plain).abs().max()
    assert not torch.equal(early, controlled(art, art.alpha, hint))


def test_core_apply_node_encodes_the_image_with_the_vae_of_the_model(art):
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    both = art.core.ControlNetApplyAdvanced().apply_controlnet(
        tokens(6), tokens(3, 1), net, image, 1.0, 0.0, 1.0, art.vae
    )
    ours = draw(art, art.alpha, *both, sampler(art), sigmas(art, art.alpha))
    close(ours, controlled(art, art.alpha, art.vae.encode(image)))
    assert torch.equal(ours, controlled(art, art.alpha, None, image=image, vae=art.vae))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_gray_or_transparent_hint_is_read_by_its_colours(art, channels):
    image = torch.rand(1, 64, 96, channels, generator=torch.Generator().manual_seed(1))
    seen = image.expand(-1, -1, -1, 3) if channels == 1 else image[..., :3]
    ours = controlled(art, art.alpha, None, image=image, vae=art.vae)
    close(ours, controlled(art, art.alpha, None, image=seen.contiguous(), vae=art.vae))


def test_a_controlnet_that_would_end_before_it_begins_is_refused(art):
    check = art.nodes["PixStack_PixArtControlNetApply"].validate_inputs
    assert "leave no part of the sampling" in check(start_percent=0.8, end_percent=0.2)
    assert check(start_percent=0.2, end_percent=0.8) is True


def test_a_batch_of_hints_guides_each_picture_with_its_own(art):
    hints, noise = noise_of(2, 4, 8, 12, seed=2), noise_of(2, 4, 8, 12, seed=4)
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]

    def with_hints(hint, noise):
        both = run(
            art,
            "ControlNetApply",
            positive=tokens(6),
            negative=tokens(3, 1),
            control_net=net,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            latent={"samples": hint},
        )
        return draw(art, art.alpha, *both, sampler(art), sigmas(art, art.alpha), noise=noise)

    together = with_hints(hints, noise)
    close(together, torch.cat([with_hints(hints[i : i + 1], noise[i : i + 1]) for i in range(2)]))


def test_the_reference_controlnet_cases_come_out_of_comfyui(art, pytestconfig):
    paths = [path for path in cases(pytestconfig) if path.stem.startswith("pixart_controlnet")]
    assert paths
    for path in paths:
        weights, inputs, outputs, config = read_case(path)
        base, base_weights = checkpoint.read(weights, config=config)
        net_weights = checkpoint.read_controlnet(weights, config=config)[2]
        name = f"{path.stem}.safetensors"
        write_file(art.host.models / "diffusion_models" / name, base_weights, checkpoint.metadata(base))
        write_file(
            art.host.models / "controlnet" / name,
            key_names.to_released_controlnet(net_weights),
            checkpoint.metadata_controlnet(base),
        )
        model = load(art, name)
        net = run(art, "ControlNetLoader", control_net_name=name, dtype="fp32")[0]
        schedule = model.model.model_sampling.schedule
        for row in range(len(inputs["x"])):
            x, t = inputs["x"][row : row + 1], float(inputs["timestep"][row])
            entries = {"attention_mask": inputs["mask"][row : row + 1]}
            if "img_hw" in inputs:
                entries["height"], entries["width"] = inputs["img_hw"][row].tolist()
                entries["aspect_ratio"] = inputs["aspect_ratio"][row].item()
            hint = {"samples": inputs["c"][row : row + 1] / base.latent_scale}
            text = [[inputs["y"][row], entries]]
            text = run(art, "ControlNetApply", positive=text, negative=text, control_net=net, strength=1.0,
                       start_percent=0.0, end_percent=1.0, latent=hint)[0]  # fmt: skip
            seen, sigma = [], schedule.sigma(t)
            ask = art.comfy.samplers.KSAMPLER(capture(seen, x / schedule.alpha(t), sigma))
            draw(art, model, text, text, ask, torch.tensor([sigma, 0.0]), cfg=1.0, noise=x)
            reference = x - schedule.std(t) * outputs["x"][row, :4]
            close(seen[0] * schedule.alpha(t), reference)


def read_case(path):
    with safe_open(path, framework="pt") as file:
        parts = {"weight": {}, "input": {}, "output": {}}
        for key in file.keys():
            kind, name = key.split(".", 1)
            parts[kind][name] = file.get_tensor(key)
        return *parts.values(), json.loads(file.metadata()["config"])


@pytest.mark.parametrize(
    "inputs, words",
    [
        (dict(), "one hint: an image, or a latent"),
        (dict(image=torch.rand(1, 64, 64, 3)), "connect the VAE"),
        (
            dict(image=torch.rand(1, 64, 64, 3), latent={"samples": torch.zeros(1, 4, 8, 8)}),
            "one hint: an image, or a latent",
        ),
    ],
)
def test_a_hint_that_is_missing_or_doubled_is_refused(art, inputs, words):
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    with pytest.raises(ValueError, match=words):
        run(
            art,
            "ControlNetApply",
            positive=tokens(3),
            negative=tokens(3),
            control_net=net,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            **inputs,
        )


@pytest.mark.parametrize("made", ["image", "latent"])
def test_a_hint_of_another_model_s_vae_is_refused_with_both_numbers_of_channels(art, made):
    tiny_vae(art.host.models / "vae" / "sixteen.safetensors", latent_channels=16)
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    hint = dict(image=torch.rand(1, 64, 96, 3), vae=art.core.VAELoader().load_vae("sixteen.safetensors")[0]) \
        if made == "image" else dict(latent={"samples": torch.zeros(1, 16, 8, 12)})
    both = run(art, "ControlNetApply", positive=tokens(6), negative=tokens(3, 1), control_net=net, strength=1.0,
               start_percent=0.0, end_percent=1.0, **hint)
    with pytest.raises(ValueError, match="16 channels, this PixArt reads 4: take the VAE of the PixArt model"):
        draw(art, art.alpha, *both, sampler(art), sigmas(art, art.alpha))


def test_core_apply_without_a_vae_says_what_to_connect(art):
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    both = art.core.ControlNetApplyAdvanced().apply_controlnet(
        tokens(6), tokens(3, 1), net, torch.rand(1, 64, 96, 3), 1.0, 0.0, 1.0
    )
    with pytest.raises(ValueError, match="connect the VAE"):
        draw(art, art.alpha, *both, sampler(art), sigmas(art, art.alpha))


def test_a_pixart_controlnet_on_another_model_is_refused(art, host):
    from weights import tiny_pixelflow

    tiny_pixelflow(host.models / "diffusion_models" / "flow_for_control.safetensors", num_stages=3)
    flow = art.nodes["PixStack_PixelFlowLoader"].execute("flow_for_control.safetensors", "ema", "default").args[0]
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    with pytest.raises(ValueError, match="cannot guide a PixelFlowModel"):
        net.pre_run(flow.model, lambda percent: percent)


# --- LoRA


def test_a_lora_is_applied_at_its_true_scale(art, host):
    patched, report = run(art, "LoraLoader", model=art.alpha, lora_name=LORA, strength=0.8, alpha=0.0)
    found = lora_files.read(
        *(lambda t, m: (t, names({k: v.shape for k, v in network(art, art.alpha).state_dict().items()}), m))(
            *read_file(host.models / "loras" / LORA)
        )
    )
    net = network(art, art.alpha)
    net.load_state_dict(merge(net.state_dict(), found, 0.8))
    positive, negative = tokens(6), tokens(3, 1)
    predict = predictor(net, positive, negative, 4.5)
    reference = sampling.dpm_solver_pp(
        lambda x, t: predict(x, t)[0], noise_of(1, 4, 8, 12), sampling.NoiseSchedule(), sampling.time_uniform(4)
    )
    close(draw(art, patched, positive, negative, sampler(art), sigmas(art, patched)) * 0.18215, reference)
    assert "20 layers applied" in report and "scale 2" in report  # PEFT's alpha of 8, rank 4


def test_taking_a_lora_away_restores_the_model(art):
    plain = draw(art, art.alpha, tokens(6), tokens(3, 1), sampler(art), sigmas(art, art.alpha))
    patched, _ = run(art, "LoraLoader", model=art.alpha, lora_name=LORA, strength=1.0, alpha=0.0)
    assert not torch.equal(draw(art, patched, tokens(6), tokens(3, 1), sampler(art), sigmas(art, patched)), plain)
    assert torch.equal(draw(art, art.alpha, tokens(6), tokens(3, 1), sampler(art), sigmas(art, art.alpha)), plain)


def test_a_lora_for_another_model_is_refused_with_the_reason(art, host):
    write_file(
        host.models / "loras" / "sdxl.safetensors",
        {
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 640),
            "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.zeros(640, 4),
        },
    )
    with pytest.raises(ValueError, match=r"sdxl.safetensors: No layer of this LoRA .* those of Stable Diffusion"):
        run(art, "LoraLoader", model=art.alpha, lora_name="sdxl.safetensors", strength=1.0, alpha=0.0)


# --- Text and sizes


def test_the_encoder_cuts_at_the_length_of_the_model_and_says_so(art, caplog):
    long = "a red apple on a table, " * 60
    lengths = {}
    for name, model in (("alpha", art.alpha), ("sigma", art.sigma)):
        ((text, _),) = run(
            art, "TextEncode", clip=art.clip, text=long, tokens="auto", clean_caption=False, model=model
        )[0]
        lengths[name] = text.shape[1]
    assert lengths == {"alpha": 120, "sigma": 300}
    assert "PixArt reads 120 tokens, this prompt has" in caplog.text
    short, _ = run(art, "TextEncode", clip=art.clip, text="a cat", tokens="120", clean_caption=False)[0][0]
    core = art.clip.encode_from_tokens_scheduled(art.clip.tokenize("a cat"))[0][0]
    assert torch.equal(short, core)


def test_a_cut_prompt_still_ends_with_its_end_token(art):
    tokens_seen = []
    real = art.clip.encode_from_tokens_scheduled
    art.clip.encode_from_tokens_scheduled = lambda tokens, **kw: tokens_seen.append(tokens) or real(tokens, **kw)
    try:
        run(art, "TextEncode", clip=art.clip, text="apple " * 200, tokens="120", clean_caption=False)
    finally:
        del art.clip.encode_from_tokens_scheduled
    (row,) = tokens_seen[0]["t5xxl"]
    assert len(row) == 120 and row[-1][0] == 1


@pytest.mark.parametrize("mask, length", [("positive", 6), ("all", 120)])
def test_the_null_caption_is_the_stored_one_at_the_wanted_length(art, mask, length):
    null = run(art, "NullCaption", model=art.alpha, positive=tokens(6), mask=mask)[0]
    stored = art.alpha.model.diffusion_model.y_embedder.y_embedding
    assert torch.equal(null[0][0][0], stored[:length])
    assert null[0][1]["attention_mask"].sum() == length
    assert draw(art, art.alpha, tokens(6), null, sampler(art), sigmas(art, art.alpha)).isfinite().all()


def test_a_file_without_a_null_caption_says_what_to_do_instead(art, host):
    tiny_pixart(host.models / "diffusion_models" / "diffusers_alpha.safetensors", null_caption=False)
    model = load(art, "diffusers_alpha.safetensors", variant="alpha")
    with pytest.raises(ValueError, match="stores no null caption .* Encode an empty prompt"):
        run(art, "NullCaption", model=model, positive=tokens(6), mask="positive")


@pytest.mark.parametrize(
    "inputs, size, words",
    [
        (dict(resolution="1024", shape="1:1"), (1024, 1024), "a size of the 1024 training, height/width 1"),
        (dict(resolution="512", shape="16:9"), (672, 384), "of the 512 table"),
        (dict(resolution="2048", shape="1:4"), (1024, 4096), "a size of the 2048 training"),
        (dict(resolution="2880", shape="1:1"), (2880, 2880), "a size of the 2880 training"),
        (dict(resolution="1024", shape="nearest to width x height", width=1920, height=1088), (1344, 768), "0.57"),
        (
            dict(resolution="1024", shape="exactly width x height", width=1000 + 8, height=1008),
            (1008, 1008),
            "near 1024 x 1024",
        ),
        (
            dict(resolution="1024", shape="exactly width x height", width=512, height=512),
            (512, 512),
            "4.0 times fewer pixels",
        ),
        (
            dict(resolution="1024", shape="exactly width x height", width=2048, height=2048),
            (2048, 2048),
            "repeated objects",
        ),
        (dict(resolution="1024", shape="1:1", image=torch.zeros(1, 90, 160, 3)), (1344, 768), "training"),
        (dict(resolution="1024", shape="1:1", ratio=2.0), (704, 1408), "training"),
    ],
)
def test_a_canvas_has_the_bucket_that_was_asked_for_and_says_what_it_is(art, inputs, size, words):
    latent, width, height, about = run(art, "Canvas", **{**dict(width=1024, height=1024, batch_size=2), **inputs})
    assert (width, height) == size
    assert latent["samples"].shape == (2, 4, height // 8, width // 8)
    assert words in about


def test_a_canvas_follows_the_model_it_is_connected_to(art):
    _, width, height, _ = run(
        art, "Canvas", resolution="auto", shape="1:1", width=16, height=16, batch_size=1, model=art.alpha
    )
    assert (width, height) == (512, 512)


def test_a_canvas_says_that_alpha_512_saw_only_squares(art):
    wide = dict(shape="4:3", width=16, height=16, batch_size=1)
    assert "squares only" in run(art, "Canvas", resolution="auto", model=art.alpha, **wide)[3]
    assert "DMD" in run(art, "Canvas", resolution="512", **wide)[3]
    square = run(art, "Canvas", resolution="auto", model=art.alpha, **{**wide, "shape": "1:1"})[3]
    assert "size of the 512 training" in square and "only" not in square
    assert "1024 training" in run(art, "Canvas", resolution="auto", model=art.sigma, **wide)[3]


def test_a_size_that_is_no_whole_number_of_tokens_is_refused_with_one_that_is(art):
    with pytest.raises(ValueError, match="1000x1000 pixels do not fit PixArt.* multiples of 16, for example 992x992"):
        run(art, "Canvas", resolution="1024", shape="exactly width x height", width=1000, height=1000, batch_size=1)
    with pytest.raises(ValueError, match="72x64 pixels do not fit PixArt"):
        draw(art, art.sigma, tokens(4), tokens(4), sampler(art), sigmas(art, art.sigma), noise=noise_of(1, 4, 8, 9))


def test_a_prompt_gives_its_ratio_its_size_and_its_style(art):
    positive, negative, ratio, width, height = run(
        art, "Prompt", prompt="a fox --ar 3:4 --hw 768:1024", style="Anime", negative_prompt="text"
    )
    assert "a fox" in positive and positive != "a fox" and "--" not in positive and "text" in negative
    assert (ratio, width, height) == (0.75, 1024, 768)
    assert "--ar" in art.nodes["PixStack_PixArtPrompt"].validate_inputs(prompt="a fox --ar wide", style="Anime")


@pytest.mark.parametrize(
    "conditioning, words",
    [
        ([[torch.zeros(1, 4, 768), {}]], "reads text tokens 4096 wide, but its conditioning has text tokens 768 wide"),
        ([[torch.zeros(1, 4, 4096), {"attention_mask": torch.zeros(1, 4)}]], "keeps no token at all"),
    ],
)
def test_a_conditioning_for_another_model_is_refused(art, conditioning, words):
    with pytest.raises(ValueError, match=words):
        draw(art, art.sigma, conditioning, tokens(4), sampler(art), sigmas(art, art.sigma))


def test_a_latent_of_another_vae_is_refused(art):
    with pytest.raises(ValueError, match="This latent has 16 channels, PixArt's have 4"):
        draw(art, art.sigma, tokens(4), tokens(4), sampler(art), sigmas(art, art.sigma), noise=noise_of(1, 16, 8, 8))


class Harmful:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.parametrize("kind, words", [
    ("cut", "is not a complete torch file"), ("code", r"holds more than weights"), ("empty", "is empty"),
])  # fmt: skip
@pytest.mark.parametrize("node, folder, name", [
    ("Loader", "diffusion_models", "model_name"), ("ControlNetLoader", "controlnet", "control_net_name"),
    ("LoraLoader", "loras", "lora_name"),
])  # fmt: skip
def test_a_broken_or_harmful_file_is_refused_in_the_ui(art, host, capsys, node, folder, name, kind, words):
    path = host.models / folder / "broken.pt"
    torch.save({"state_dict": {"a": torch.zeros(999)}, "extra": Harmful() if kind == "code" else 0}, path)
    if kind != "code":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if kind == "cut" else b"")
    inputs = {
        "Loader": dict(variant="auto", prediction="auto", positions="auto", weights="ema", dtype="default"),
        "ControlNetLoader": dict(dtype="default"),
        "LoraLoader": dict(model=["base", 0], strength=1.0, alpha=0.0),
    }
    graph = {
        "base": {"class_type": "PixStack_PixArtLoader", "inputs": {**inputs["Loader"], "model_name": ALPHA_512}},
        "node": {"class_type": f"PixStack_PixArt{node}", "inputs": {**inputs[node], name: path.name}},
        "out": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}},
    }
    try:
        message = str(host.run(graph).error)
    finally:
        path.unlink()
    assert message.startswith(f"node node (PixStack_PixArt{node}): ")
    assert words in message and message.count(path.name) == 1
    assert "this code must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "node, folder, made, words",
    [
        ("Loader", "diffusion_models", lambda p: tiny_vae(p), "is not a PixArt checkpoint"),
        ("ControlNetLoader", "controlnet", lambda p: tiny_pixart(p), "is not a PixArt ControlNet. .* of PixArt"),
        ("ControlNetLoader", "controlnet", lambda p: tiny_vae(p), "is not a PixArt ControlNet"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(art, host, node, folder, made, words):
    made(host.models / folder / "wrong_kind.safetensors")
    with pytest.raises(ValueError, match=f"wrong_kind.safetensors: .*{words}"):
        if node == "Loader":
            load(art, "wrong_kind.safetensors")
        else:
            run(art, node, control_net_name="wrong_kind.safetensors", dtype="default")


@pytest.mark.parametrize(
    "name, inputs, words",
    [
        ("Loader", dict(variant="beta"), "variant='beta' is not one of auto, alpha, sigma"),
        ("Loader", dict(prediction="x0"), "prediction='x0' is not one of auto, eps"),
        ("Loader", dict(model_name="none.pth"), "none.pth is not in models/diffusion_models. Put it there, or"),
        ("Loader", dict(model_name="PixArt-XL-2-512x512.safetensors"), "Put it there under this name, from https://"
         "huggingface.co/PixArt-alpha/PixArt-XL-2-512x512/resolve/main/transformer/diffusion_pytorch_model.safetensors"),
        ("TextEncode", dict(tokens="77"), "tokens='77' is not one of auto, 120, 300"),
        ("Canvas", dict(resolution="640"), "resolution='640' is not one of auto, 256"),
        ("Sampler", dict(algorithm="ddim"), "algorithm='ddim' is not one of dpm-solver"),
        ("Sigmas", dict(schedule="karras"), "schedule='karras' is not one of reference"),
        ("LoraLoader", dict(lora_name="none.safetensors"), "none.safetensors is not in models/loras"),
    ],
)
def test_a_choice_that_a_menu_does_not_offer_is_refused_with_those_it_does(art, name, inputs, words):
    node = art.nodes[f"PixStack_PixArt{name}"]
    assert words in node.validate_inputs(**inputs)
    assert node.validate_inputs() is True
