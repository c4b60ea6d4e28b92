"""Stage C and B of any size, as the trainer exports them, on ComfyUI's own model classes."""
from importlib import import_module

import pytest
import torch
import weights
from cascade_weights import A, random_state
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.ultrapixel import checkpoint
from pixstack.models_impl.ultrapixel.config import GuideConfig, StageBConfig, StageCConfig
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB

WIDTH = weights.WIDTH  # of its T5
C = StageCConfig(hidden=(24, 32), heads=(3, 2), down=("CTA", "CTA" * 2), up=("CTA", "CTA" * 3),
                 context_dim=12, text_dim=WIDTH, pooled_dim=WIDTH, pooled_tokens=2, image_dim=1, timestep_dim=16)
B = StageBConfig(hidden=(8, 16, 24), heads=(-1, -1, 2), down=("CT", "CT" * 2, "CTA"), up=("CTA", "CT", "CT"),
                 down_repeats=(1, 1, 1), up_repeats=(1, 2, 1), context_dim=12, pooled_dim=WIDTH, dropout=(0.0,) * 3,
                 self_attention=(True,) * 3, timestep_dim=16)


def write(host, name, kind, config, metadata=None):
    tensors = checkpoint.released_attention_names(random_state(kind(config)))
    write_file(host.models / "diffusion_models" / name, tensors,
               checkpoint.metadata(config) if metadata is None else metadata)
    import_module("folder_paths").filename_list_cache.clear()
    return name


@pytest.fixture(scope="module")
def small(host):
    """Runs a node: small(class, **inputs) -> outputs."""
    write(host, "small_c.safetensors", StageC, C)
    write(host, "small_b.safetensors", StageB, B)
    weights.tiny_t5(host.models / "text_encoders/small_cascade_t5.safetensors")
    known = import_module("nodes").NODE_CLASS_MAPPINGS

    def run(name, **inputs):
        node = known.get(f"PixStack_{name}") or known[name]
        if hasattr(node, "define_schema"):
            return node.execute(**inputs).args
        instance = node()
        return getattr(instance, instance.FUNCTION)(**inputs)

    return run


def model(small, name):
    return small("CascadeLoader", model_name=f"{name}.safetensors", dtype="fp32")[0]


def prompt(small, text, kind="flux"):
    (clip,) = small("PixelFlowTextEncoderLoader", encoder_name="small_cascade_t5.safetensors", dtype="default",
                    device="default", type=kind)
    return small("CLIPTextEncode", clip=clip, text=text)[0]


def drawn(small, loaded, positive, latent):
    return small("KSampler", model=loaded, seed=1, steps=1, cfg=2.0, sampler_name="ddpm", scheduler="simple",
                 positive=positive, negative=prompt(small, ""), latent_image={"samples": latent},
                 denoise=1.0)[0]["samples"]


def of_ours(kind, config):
    net = kind(config)
    net.load_state_dict(random_state(net))
    return net.eval()


@torch.no_grad()
def test_a_small_stage_c_predicts_in_comfyui_what_it_predicts_in_the_trainer(small):
    rng = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 16, 5, 6, generator=rng), torch.randn(2, 7, WIDTH, generator=rng)
    timestep = torch.tensor([0.9, 0.2])
    core = model(small, "small_c").model.diffusion_model.eval()
    found = core(x, timestep, text, text.mean(1), torch.zeros(2, 1, 1))
    expected = of_ours(StageC, C)(x, timestep, text, text.mean(1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@torch.no_grad()
def test_a_small_stage_b_predicts_in_comfyui_what_it_predicts_in_the_trainer(small):
    rng = torch.Generator().manual_seed(3)
    x, semantic = torch.randn(2, 4, 16, 24, generator=rng), torch.randn(2, 16, 3, 4, generator=rng)
    vector, timestep = torch.randn(2, WIDTH, generator=rng), torch.tensor([0.9, 0.2])
    core = model(small, "small_b").model.diffusion_model.eval()
    found = core(x, timestep, semantic, vector)
    expected = of_ours(StageB, B)(x, timestep, semantic, vector)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_both_stages_follow_a_prompt_of_a_t5(small):
    apple, cat = (prompt(small, text) for text in ("red apple", "a cat with a hat"))
    stage_c, stage_b = model(small, "small_c"), model(small, "small_b")
    one, other = (drawn(small, stage_c, p, torch.zeros(1, 16, 5, 6)) for p in (apple, cat))
    assert (one - other).abs().max() > 1e-3
    pictures = []
    for latent, text in ((one, apple), (other, apple), (one, cat)):
        (positive,) = small("StableCascade_StageB_Conditioning", conditioning=text, stage_c={"samples": latent})
        pictures.append(drawn(small, stage_b, positive, torch.zeros(1, 4, 16, 24)))
    assert all((p - pictures[0]).abs().max() > 1e-3 for p in pictures[1:])


def test_a_small_ultrapixel_draws_a_picture_and_its_guide_changes_it(small, host):
    shape = GuideConfig(down=C.hidden, up=C.hidden[::-1], width=16, heads=2, feedforward=16, max_tokens=64, groups=4,
                        layers=(16, 16), frequencies=4, timestep_dim=16, scale_dim=16)
    write_file(host.models / "model_patches/small_guide.safetensors", random_state(Guide(shape)),
               checkpoint.metadata(shape))
    write_file(host.models / "vae/small_a.safetensors", StageA(A).state_dict(), checkpoint.metadata(A))
    positive, negative = prompt(small, "red apple"), prompt(small, "")
    (guide,) = small("UltraPixelGuideLoader", guide_name="small_guide.safetensors")
    latent, _, empty_b, _ = small("UltraPixelCanvas", shape="square", side=256, width=256, height=256, batch_size=1)
    low, _ = small("StableCascade_EmptyLatentImage", width=256, height=256, compression=64, batch_size=1)
    (noise,), (sampler,) = small("RandomNoise", noise_seed=1), small("UltraPixelSampler", reference=False,
                                                                     low_latent=low)
    latents = []
    for strength in (0.0, 1.0):
        (guided,) = small("UltraPixelGuide", model=model(small, "small_c"), guide=guide, down=strength, up=strength,
                          rescale=0.7, shift=1.0)
        (guider,) = small("CFGGuider", model=guided, positive=positive, negative=negative, cfg=4.0)
        (sigmas,) = small("BasicScheduler", model=guided, scheduler="simple", steps=2, denoise=1.0)
        latents.append(small("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                             latent_image=latent)[0])
    plain, guided = (one["samples"] for one in latents)
    assert plain.shape == (1, 16, 6, 6) and (guided - plain).abs().max() > 1e-3
    (positive,) = small("StableCascade_StageB_Conditioning", conditioning=positive, stage_c=latents[1])
    (stage_b,) = small("UltraPixelStageB", model=model(small, "small_b"), rescale=0.7)
    (vae,) = small("UltraPixelStageALoader", vae_name="small_a.safetensors", dtype="fp32")
    (image,) = small("VAEDecode", vae=vae, samples={"samples": drawn(small, stage_b, positive, empty_b["samples"])})
    assert image.shape == (1, 256, 256, 3) and image.isfinite().all()


@pytest.mark.parametrize("name", ["small_c", "small_b"])
def test_what_core_saves_of_a_small_stage_loads_again(small, host, name):
    loaded = model(small, name)
    before = set(host.output.rglob("*.safetensors"))
    small("ModelSave", model=loaded, filename_prefix="small_cascade")
    (path,) = set(host.output.rglob("*.safetensors")) - before
    path.rename(host.models / "diffusion_models" / f"{name}_again.safetensors")
    import_module("folder_paths").filename_list_cache.clear()
    again, first = (m.model.diffusion_model.state_dict() for m in (model(small, f"{name}_again"), loaded))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def test_a_stage_c_that_does_not_state_its_shape_is_sent_to_core_s_loader(small, host):
    write(host, "small_mute.safetensors", StageC, C, {})
    with pytest.raises(ValueError, match="small_mute.safetensors: .* core's 'Load Diffusion Model'"):
        model(small, "small_mute")


def test_another_model_is_named(small, host):
    weights.tiny_pixart(host.models / "diffusion_models/small_pixart.safetensors")
    import_module("folder_paths").filename_list_cache.clear()
    with pytest.raises(ValueError, match="This is not a Stage C or a Stage B of Stable Cascade. .*PixArt"):
        model(small, "small_pixart")


@pytest.mark.parametrize("name, channels", [("small_c", 16), ("small_b", 4)])
def test_text_that_is_not_padded_is_refused(small, name, channels):
    with pytest.raises(ValueError, match="type flux"):
        drawn(small, model(small, name), prompt(small, "apple", "pixelflow, pixart"), torch.zeros(1, channels, 16, 16))


def test_text_of_another_encoder_is_refused(small):
    other = [[torch.zeros(1, 5, WIDTH + 1), {"pooled_output": None}]]
    with pytest.raises(ValueError, match=f"reads text tokens {WIDTH} wide, .* {WIDTH + 1} wide"):
        drawn(small, model(small, "small_c"), other, torch.zeros(1, 16, 5, 6))


def test_a_level_that_repeats_nothing_is_refused():
    odd = StageCConfig(hidden=(8, 8), heads=(1, 1), down=("CTA", "CT"), up=("CA", "CTA"))
    with pytest.raises(ValueError, match="Level 1 has the blocks CT on the way down and CA on the way up"):
        odd.repeated_kinds()
