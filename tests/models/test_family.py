"""The small models of every family in ComfyUI: with core's nodes around them they draw what the trainer draws."""
from importlib import import_module
from pathlib import Path

import pytest
import tiny_family
import torch
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.state_dict import read_file, write_file
from pixstack.trainer.data.pictures import shown
from pixstack.trainer.export import exporting
from tiny_family import SIDE

PROMPT, SEED, STEPS, CFG = "smiling red card", 7, 4, 3.0  # core's scheduler "simple" is exact where steps divide 10,000
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def family(host, tmp_path_factory):
    made = tiny_family.make(host.models, tmp_path_factory.mktemp("family"))
    made.nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    made.models = host.models
    return made


def run(family, name, **inputs):
    """All outputs of a node, ours or core's."""
    cls = family.nodes.get(f"PixStack_{name}") or family.nodes[name]
    if hasattr(cls, "execute"):
        return cls.execute(**inputs).args
    return getattr(cls(), cls.FUNCTION)(**inputs)


def close(theirs: torch.Tensor, ours: torch.Tensor):
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < TOLERANCE * ours.abs().max()


def texts(family, kind, *prompts):
    (clip,) = run(family, "PixelFlowTextEncoderLoader", encoder_name=tiny_family.T5.name, dtype="fp32", device="cpu",
                  type=kind)
    return [run(family, "CLIPTextEncode", clip=clip, text=prompt)[0] for prompt in prompts]


def without_type(conditionings: list) -> list:
    """As core's encoders give text."""
    return [[[tokens, {"pooled_output": entries["pooled_output"]}]] for ((tokens, entries),) in conditionings]


def of_trainer(recipe, sampled) -> torch.Tensor:
    """The latent that `recipe.sample` decodes, in the units of its VAE. sampled: calls it."""
    flow = getattr(recipe, "flow", None) or recipe.denoising
    decode, flow.vae.decode = flow.vae.decode, lambda latent: latent
    try:
        return sampled(recipe)
    finally:
        flow.vae.decode = decode


def sample(recipe, **more):
    return recipe.sample([PROMPT], SIDE, SIDE, STEPS, 1.0, CFG, SEED, **more)


# --- PixArt


def pixart_model(family):
    return run(family, "PixArtLoader", model_name=family.pixart.file, variant="auto", prediction="auto",
               positions="auto", weights="ema", dtype="fp32")[0]


def pixart_latent(family, model, positive, negative, algorithm="dpm-solver++", schedule="reference (time-uniform)"):
    (sampler,) = run(family, "PixArtSampler", algorithm=algorithm, order=2, eta=1.0, inpaint="core")
    (sigmas,) = run(family, "PixArtSigmas", model=model, schedule=schedule, steps=STEPS, denoise=1.0, timestep=400)
    canvas = run(family, "PixArtCanvas", resolution="auto", shape="1:1", width=64, height=64, batch_size=1,
                 model=model)[0]
    done = run(family, "SamplerCustom", model=model, add_noise=True, noise_seed=SEED, cfg=CFG, positive=positive,
               negative=negative, sampler=sampler, sigmas=sigmas, latent_image=canvas)
    return done[0]["samples"]


@pytest.mark.parametrize("algorithm, schedule", [("dpm-solver++", "reference (time-uniform)"),
                                                 ("dpm-solver++ (diffusers)", "diffusers (linspace)")])
def test_pixart_draws_what_the_trainer_draws(family, monkeypatch, algorithm, schedule):
    positive, negative = texts(family, "pixelflow, pixart", PROMPT, "")
    theirs = pixart_latent(family, pixart_model(family), positive, negative, algorithm, schedule)
    monkeypatch.setattr(family.pixart.recipe, "algorithm", algorithm)
    close(theirs, of_trainer(family.pixart.recipe, sample))


def test_pixart_s_own_encode_node_gives_the_same_text(family):
    model, ours = pixart_model(family), texts(family, "pixelflow, pixart", PROMPT)[0]
    (clip,) = run(family, "PixelFlowTextEncoderLoader", encoder_name=tiny_family.T5.name, dtype="fp32", device="cpu",
                  type="pixelflow, pixart")
    (encoded,) = run(family, "PixArtTextEncode", clip=clip, text=PROMPT, tokens="auto", clean_caption=False,
                     model=model)
    assert torch.equal(encoded[0][0], ours[0][0])


@pytest.mark.parametrize("wanted, size, words", [
    (dict(resolution="auto", shape="1:1"), (64, 64), "16 tokens: the size of this model's training"),
    (dict(resolution="auto", shape="2:1"), (96, 48), "trained on 64 x 64 pixels. Expect odd shapes"),
    (dict(resolution="256", shape="1:1"), (256, 256), "trained on 64 x 64 pixels"),
])
def test_a_canvas_knows_a_model_that_is_smaller_than_the_releases(family, wanted, size, words):
    latent, width, height, about = run(family, "PixArtCanvas", width=16, height=16, batch_size=1,
                                       model=pixart_model(family), **wanted)
    assert (width, height) == size and latent["samples"].shape == (1, 4, height // 8, width // 8)
    assert words in about


def test_text_of_another_encoder_is_refused_with_the_one_to_load(family):
    other = [[torch.zeros(1, 20, 4096), {}]]
    with pytest.raises(ValueError, match="PixArt model reads text tokens 192 wide.* 'Load T5 Text Encoder'"):
        pixart_latent(family, pixart_model(family), other, other)


@pytest.mark.parametrize("loader", ["ours", "core"])
def test_a_pixart_lora_changes_the_picture_as_in_the_trainer(family, loader):
    model = pixart_model(family)
    if loader == "ours":
        model = run(family, "PixArtLoraLoader", model=model, lora_name=family.lora.file, strength=1.0, alpha=0.0)[0]
    else:
        (model,) = run(family, "LoraLoaderModelOnly", model=model, lora_name=family.lora.file, strength_model=1.0)
    theirs = pixart_latent(family, model, *texts(family, "pixelflow, pixart", PROMPT, ""))
    expected = of_trainer(family.lora.recipe, sample)
    close(theirs, expected)
    assert (expected - of_trainer(family.pixart.recipe, sample)).abs().max() > 0.01


def hint_image(family):
    """The edges that the trainer's recipe finds in its picture, as LoadImage would give them: (1, H, W, 3)."""
    edges = family.edges.recipe.hint.annotated(shown(family.picture, SIDE, SIDE)[None], "cpu")
    return edges.movedim(1, -1).float() / 255


@pytest.mark.parametrize("apply", ["ours", "core"])
def test_a_pixart_controlnet_draws_after_the_same_edges_what_the_trainer_draws(family, apply):
    positive, negative = texts(family, "pixelflow, pixart", PROMPT, "")
    (net,) = run(family, "PixArtControlNetLoader", control_net_name=family.edges.file, dtype="fp32")
    (vae,) = run(family, "VAELoader", vae_name=family.vae.file)
    wanted = dict(positive=positive, negative=negative, control_net=net, image=hint_image(family), vae=vae,
                  strength=1.0, start_percent=0.0, end_percent=1.0)
    name = "PixArtControlNetApply" if apply == "ours" else "ControlNetApplyAdvanced"
    guided = run(family, name, **wanted)
    theirs, expected = pixart_latent(family, pixart_model(family), *guided), of_trainer(family.edges.recipe, sample)
    close(theirs, expected)
    assert (expected - of_trainer(family.pixart.recipe, sample)).abs().max() > 0.01


# --- FLUX


def flux_model(family, shift=True, dtype="fp32"):
    (model,) = run(family, "FluxLoader", model_name=family.flux.file, dtype=dtype)
    if shift:
        (model,) = run(family, "ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=SIDE,
                       height=SIDE)
    return model


def flux_latent(family, model, positive, negative):
    empty = {"samples": torch.zeros(1, 16, SIDE // 8, SIDE // 8)}
    return run(family, "KSampler", model=model, seed=SEED, steps=STEPS, cfg=CFG, sampler_name="euler",
               scheduler="simple", positive=positive, negative=negative, latent_image=empty,
               denoise=1.0)[0]["samples"]


def test_a_small_flux_draws_what_the_trainer_draws(family):
    positive, negative = texts(family, "flux", PROMPT, "")
    theirs = flux_latent(family, flux_model(family), positive, negative)
    close(theirs, of_trainer(family.flux.recipe, sample))
    other = flux_latent(family, flux_model(family), *without_type(texts(family, "pixelflow, pixart", PROMPT, "")))
    assert (other - theirs).abs().max() > 1e-3, "it does not matter whether the text is padded"


def test_pixelponder_on_a_small_flux_draws_what_the_trainer_draws(family, caplog):
    positive, negative = texts(family, "flux", PROMPT, "")
    rng = torch.Generator().manual_seed(1)
    hints = {kind: torch.randint(256, (1, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
             for kind in ("canny", "hed")}
    (net,) = run(family, "PixelPonderLoader", control_net_name=family.ponder.file, selection_network="leave out",
                 dtype="fp32")
    row = ()
    for kind, hint in hints.items():
        (row,) = run(family, "PixelPonderCondition", image=hint.movedim(1, -1).float() / 255, kind=kind, strength=1.0,
                     priority=0, start_percent=0.0, end_percent=1.0, conditions=row)
    guided = run(family, "PixelPonderApply", positive=positive, negative=negative, control_net=net, conditions=row,
                 strength=1.0, start_percent=0.0, end_percent=1.0, strategy="accumulate", rounds=1)
    assert "text tokens" not in caplog.text
    theirs = flux_latent(family, flux_model(family), *guided)
    expected = of_trainer(family.ponder.recipe, lambda recipe: sample(recipe, conditions=hints))
    close(theirs, expected)
    assert (expected - of_trainer(family.ponder.recipe, sample)).abs().max() > 0.01
    run(family, "PixelPonderApply", positive=texts(family, "pixelflow, pixart", PROMPT)[0], negative=negative,
        control_net=net, conditions=row, strength=1.0, start_percent=0.0, end_percent=1.0, strategy="released",
        rounds=1)
    assert "trained with 32 text tokens" in caplog.text and "'Load T5 Text Encoder', type flux" in caplog.text


def test_a_lora_of_core_s_loader_works_on_a_small_flux(family):
    module, rng = "diffusion_model.single_blocks.1.linear2", torch.Generator().manual_seed(3)
    wide = family.flux.recipe.net.state_dict()["single_blocks.1.linear2.weight"].shape
    write_file(family.models / "loras/tiny_family_flux_lora.safetensors", {
        f"{module}.lora_A.weight": torch.randn(2, wide[1], generator=rng),
        f"{module}.lora_B.weight": torch.randn(wide[0], 2, generator=rng)})
    model, prompts = flux_model(family), texts(family, "flux", PROMPT, "")
    (patched,) = run(family, "LoraLoaderModelOnly", model=model, lora_name="tiny_family_flux_lora.safetensors",
                     strength_model=1.0)
    assert (flux_latent(family, patched, *prompts) - flux_latent(family, model, *prompts)).abs().max() > 0.01


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp8_e4m3fn", torch.float8_e4m3fn)])
def test_the_storage_of_a_small_flux_may_be_chosen(family, dtype, kind):
    model, prompts = flux_model(family, dtype=dtype), texts(family, "flux", PROMPT, "")
    assert model.model.diffusion_model.img_in.weight.dtype == kind
    exact, rough = (flux_latent(family, m, *prompts) for m in (flux_model(family), model))
    assert 0 < (rough - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("name, folder", [("pixart", "diffusion_models"), ("flux", "diffusion_models"),
                                          ("edges", "controlnet"), ("ponder", "controlnet"), ("vae", "vae")])
def test_an_export_in_fp8_loads_as_what_it_holds(family, name, folder):
    tensors, metadata = read_file(Path(getattr(family, name).path))
    file = f"tiny_family_{name}_fp8.safetensors"
    rounded = {key: exporting.written_as(key, value, "fp8") for key, value in tensors.items()}
    write_file(family.models / folder / file, rounded, metadata)
    key, wanted = next((k, v) for k, v in rounded.items() if v.dtype == torch.float8_e4m3fn)
    if name == "pixart":
        net = run(family, "PixArtLoader", model_name=file, variant="auto", prediction="auto", positions="auto",
                  weights="ema", dtype="default")[0].model.diffusion_model
    elif name == "flux":
        net = run(family, "FluxLoader", model_name=file, dtype="default")[0].model.diffusion_model
    elif name == "edges":
        net = run(family, "PixArtControlNetLoader", control_net_name=file, dtype="default")[0].net_patcher.model
        key = key.removeprefix("controlnet.")
    elif name == "ponder":
        net = run(family, "PixelPonderLoader", control_net_name=file, selection_network="leave out",
                  dtype="default")[0].net_patcher.model
    else:
        net = run(family, "VAELoader", vae_name=file)[0].first_stage_model
    assert torch.equal(net.state_dict()[key].float(), wanted.float())


def test_a_flux_that_does_not_say_its_shape_is_sent_to_core_s_loader(family):
    write_file(family.models / "diffusion_models/tiny_flux_mute.safetensors", Flux(FluxConfig(
        hidden=128, heads=1, mlp_hidden=512, depth=1, single_depth=1)).state_dict())
    with pytest.raises(ValueError, match="tiny_flux_mute.safetensors: .* core's 'Load Diffusion Model'"):
        run(family, "FluxLoader", model_name="tiny_flux_mute.safetensors", dtype="default")


def test_a_pixart_is_no_flux(family):
    with pytest.raises(ValueError, match=f"{family.pixart.file}: This is not a FLUX checkpoint. The keys are those of"):
        run(family, "FluxLoader", model_name=family.pixart.file, dtype="default")


@pytest.mark.parametrize("draw, model, kind, wanted", [
    (pixart_latent, pixart_model, "flux", "type 'pixelflow, pixart'"),
    (flux_latent, flux_model, "pixelflow, pixart", "type flux"),
])
def test_text_of_the_other_type_is_refused_and_text_that_says_no_type_is_read(family, draw, model, kind, wanted):
    prompts = texts(family, kind, PROMPT, "")
    with pytest.raises(ValueError, match=f"'Load T5 Text Encoder', {wanted}"):
        draw(family, model(family), *prompts)
    assert draw(family, model(family), *without_type(prompts)).isfinite().all()


def test_text_and_latents_of_another_model_are_refused(family):
    other = [[torch.zeros(1, 77, 4096), {}]]
    with pytest.raises(ValueError, match="FLUX reads text tokens 192 wide, .* 4096 wide. .* type flux"):
        flux_latent(family, flux_model(family), other, other)


# --- VAEs


@pytest.mark.parametrize("name", ["vae", "flux_vae"])
def test_core_s_vae_goes_there_and_back_as_the_trainer_s(family, name):
    (vae,) = run(family, "VAELoader", vae_name=getattr(family, name).file)
    ours = (family.pixart.recipe.denoising if name == "vae" else family.flux.recipe.flow).vae
    picture = shown(family.picture, SIDE, SIDE)[None]
    (latent,) = run(family, "VAEEncode", vae=vae, pixels=picture.movedim(1, -1) / 255)
    expected = ours.encode(picture, "cpu")["mean"]
    close(latent["samples"], expected)
    (again,) = run(family, "VAEDecode", vae=vae, samples=latent)
    torch.testing.assert_close(again.movedim(-1, 1), (ours.decode(expected) + 1) / 2, rtol=1e-3, atol=1e-3)

