"""What core's nodes save of our models, and what they merge, loads again as what it was."""
from importlib import import_module

import cascade_weights
import pytest
import torch
import weights

LOADERS = {  # family -> loader, its file's input, file, what makes it, the rest of its inputs
    "pixelflow class": ("PixelFlowLoader", "saved_c2i.safetensors", lambda path: weights.tiny_pixelflow(
        path, text=False, num_classes=2, names=("cat", "dog")), dict(weights="ema", dtype="fp32")),
    "pixelflow text": ("PixelFlowLoader", "saved_t2i.safetensors", lambda path: weights.tiny_pixelflow(
        path, num_stages=3, resolution=96), dict(weights="ema", dtype="fp32")),
    "pixart sigma": ("PixArtLoader", "saved_sigma.safetensors", weights.tiny_pixart, dict(
        variant="sigma", prediction="auto", positions="auto", weights="ema", dtype="fp32")),
    "pixart alpha": ("PixArtLoader", "saved_alpha.pth", lambda path: weights.tiny_pixart(
        path, **weights.ALPHA, micro_conditions=True), dict(
        variant="alpha", prediction="v, zero terminal SNR", positions="16 (alpha 256)", weights="ema", dtype="fp32")),
    "flux": ("FluxLoader", "flux_saved.safetensors", weights.tiny_emoji, dict(dtype="fp32")),
}


@pytest.fixture(scope="module")
def core(host):
    return import_module("nodes").NODE_CLASS_MAPPINGS


def loaded(core, host, what: str, name: str, **changed):
    loader, _, _, inputs = LOADERS[what]
    node = core[f"PixStack_{loader}"]
    return node.execute(**{"model_name": name, **inputs, **changed}).args[0]


def original(core, host, what: str):
    _, name, make, _ = LOADERS[what]
    path = host.models / "diffusion_models" / name
    if not path.exists():
        make(path)
    return loaded(core, host, what, name)


def saved(core, host, node: str, *given) -> str:
    """The name in models/diffusion_models of what a saving node of core's writes."""
    before = set(host.output.rglob("*.safetensors"))
    instance = core[node]()
    getattr(instance, instance.FUNCTION)(*given, "saved_by_core")
    (path,) = set(host.output.rglob("*.safetensors")) - before
    target = host.models / "diffusion_models" / f"again_{len(before)}_{path.name}"
    path.rename(target)
    import_module("folder_paths").filename_list_cache.clear()
    return target.name


def config(model):
    network = model.model.diffusion_model
    return getattr(network, "config", None) or vars(network.params)


def same(found, wanted):
    assert config(found) == config(wanted)
    assert getattr(found.model, "class_names", ()) == getattr(wanted.model, "class_names", ())
    ours, theirs = found.model.diffusion_model.state_dict(), wanted.model.diffusion_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value.float(), theirs[key].float())] == []
    assert type(found.model.model_sampling).__mro__[1:] == type(wanted.model.model_sampling).__mro__[1:]
    sigmas = [getattr(one.model.model_sampling, "sigmas", torch.zeros(0)) for one in (found, wanted)]
    assert torch.equal(*sigmas)
    assert found.model.latent_format.scale_factor == wanted.model.latent_format.scale_factor


@pytest.mark.parametrize("what", LOADERS)
def test_a_model_that_core_saves_loads_again_as_what_it_was(core, host, what):
    model = original(core, host, what)
    unsaid = {"prediction": "auto", "positions": "auto", "variant": "auto"} if "pixart" in what else {}
    same(loaded(core, host, what, saved(core, host, "ModelSave", model), **unsaid), model)


@pytest.mark.parametrize("what", ["pixelflow text", "pixart alpha"])
def test_a_checkpoint_that_core_saves_gives_its_model_back(core, host, what):
    model = original(core, host, what)
    weights.tiny_t5(host.models / "text_encoders" / "saved_t5.safetensors")
    weights.tiny_vae(host.models / "vae" / "saved_vae.safetensors")
    import_module("folder_paths").filename_list_cache.clear()
    clip = core["PixStack_PixelFlowTextEncoderLoader"].execute(
        encoder_name="saved_t5.safetensors", dtype="fp32", device="cpu").args[0]
    (vae,) = core["VAELoader"]().load_vae("saved_vae.safetensors")
    unsaid = {"prediction": "auto", "positions": "auto", "variant": "auto"} if "pixart" in what else {}
    same(loaded(core, host, what, saved(core, host, "CheckpointSave", model, clip, vae), **unsaid), model)


@pytest.mark.parametrize("what", LOADERS)
def test_a_merge_of_a_model_with_itself_is_the_model(core, host, what):
    model = original(core, host, what)
    (merged,) = core["ModelMergeSimple"]().merge(model, original(core, host, what), 0.25)
    unsaid = {"prediction": "auto", "positions": "auto", "variant": "auto"} if "pixart" in what else {}
    again = loaded(core, host, what, saved(core, host, "ModelSave", merged), **unsaid)
    assert config(again) == config(model)
    ours, theirs = again.model.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].float(), value.float(), atol=1e-5, rtol=1e-4)


def test_a_text_encoder_that_core_saves_loads_again(core, host):
    weights.tiny_t5(host.models / "text_encoders" / "saved_t5.safetensors")
    import_module("folder_paths").filename_list_cache.clear()
    node = core["PixStack_PixelFlowTextEncoderLoader"]

    def load(name):
        return node.execute(encoder_name=name, dtype="fp32", device="cpu").args[0]

    clip = load("saved_t5.safetensors")
    before = set(host.output.rglob("*.safetensors"))
    core["CLIPSave"]().save(clip, "saved_by_core")
    (path,) = set(host.output.rglob("*.safetensors")) - before
    path.rename(host.models / "text_encoders" / "saved_t5_again.safetensors")
    import_module("folder_paths").filename_list_cache.clear()
    again = load("saved_t5_again.safetensors")
    tokens = [one.encode_from_tokens(one.tokenize("a red apple")) for one in (clip, again)]
    assert torch.equal(*tokens)


def test_a_guided_stage_c_that_core_saves_is_the_stage_c(core, host):
    cascade_weights.tiny_stage_c(host.models / "diffusion_models" / "saved_stage_c.safetensors")
    cascade_weights.tiny_guide(host.models / "model_patches" / "saved_guide.pth")
    import_module("folder_paths").filename_list_cache.clear()
    (plain,) = core["UNETLoader"]().load_unet("saved_stage_c.safetensors", "default")
    guide = core["PixStack_UltraPixelGuideLoader"].execute(guide_name="saved_guide.pth").args[0]
    guided = core["PixStack_UltraPixelGuide"].execute(
        model=plain, guide=guide, down=1.0, up=1.0, rescale=0.0, shift=2.0).args[0]
    (again,) = core["UNETLoader"]().load_unet(saved(core, host, "ModelSave", guided), "default")
    ours, theirs = again.model.diffusion_model.state_dict(), plain.model.diffusion_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in theirs)
