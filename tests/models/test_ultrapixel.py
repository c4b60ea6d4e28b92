"""UltraPixel without a host: its files, networks, guide, samplers and exact decodes."""
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators.canny import canny
from pixstack.models_impl.ultrapixel import checkpoint, lora, sampling
from pixstack.models_impl.ultrapixel.buckets import Buckets, shorter_edge
from pixstack.models_impl.ultrapixel.config import (
    ControlNetConfig,
    GuideConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import MEAN, STD, EffnetConfig, EffnetEncoder, features
from pixstack.models_impl.ultrapixel.guidance import Features, FeatureTap, Guide, up_weight
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.sampling import CosineDiffusion
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB

C = StageCConfig(
    hidden=(16, 16), heads=(2, 2), down=("CTA", "CTA" * 2), up=("CTA" * 2, "CTA"), context_dim=12, text_dim=10,
    pooled_dim=10, image_dim=6, pooled_tokens=2, timestep_dim=8, in_channels=4, out_channels=4,
)
B = StageBConfig(
    hidden=(8, 16), heads=(-1, 2), down=("CT", "CTA"), up=("CTA", "CT"), down_repeats=(1, 1), up_repeats=(2, 1),
    context_dim=12, pooled_dim=10, dropout=(0.0, 0.1), self_attention=(True, True), timestep_dim=8,
)
A = StageAConfig(bottleneck_blocks=3, hidden=16)
GUIDE = GuideConfig(down=(16, 16), up=(16, 16), width=8, heads=2, feedforward=8, max_tokens=64, groups=4, layers=(8, 8),
                    frequencies=4, timestep_dim=8, scale_dim=8)
CONTROL = ControlNetConfig(in_channels=3, hidden=16, blocks=(0, 2, 5), backbone="simple")


def network(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():  # the initial zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


stage_c, stage_b = partial(network, StageC, C), partial(network, StageB, B)
stage_a, guide = partial(network, StageA, A), partial(network, Guide, GUIDE)


def inputs(batch=2, height=7, width=5, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(x=(batch, 4, height, width), text=(batch, 3, 10), pooled=(batch, 1, 10), image=(batch, 1, 6))
    found = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return {**found, "timestep": torch.rand(batch, generator=rng)}


@pytest.fixture
def low() -> Features:
    return stage_c().features(**inputs(height=4, width=3, seed=2))[1]


# --- Configuration

def test_a_configuration_refuses_nonsense_with_both_numbers():
    with pytest.raises(ValueError, match="Level 1 is 16 wide, which 3 heads do not divide"):
        replace(C, heads=(2, 3))
    with pytest.raises(ValueError, match="heads has 1 levels, hidden has 2"):
        replace(C, heads=(2,))
    with pytest.raises(ValueError, match="Blocks X are unknown"):
        replace(C, down=("CTX", "CTA"))
    with pytest.raises(ValueError, match="hidden=10 cannot be halved 2 times"):
        StageAConfig(levels=3, hidden=10)
    with pytest.raises(ValueError, match="width=8 is not a multiple of heads=3"):
        replace(GUIDE, heads=3)


def test_a_configuration_reads_the_arguments_of_the_reference():
    entries = dict(
        c_in=4, c_out=4, c_r=8, c_cond=12, c_hidden=[16, 16], nhead=[2, 2], blocks=[[1, 2], [2, 1]],
        block_repeat=[[1, 1], [1, 1]], level_config=["CTA", "CTA"], c_clip_text=10, c_clip_text_pooled=10, c_clip_img=6,
        c_clip_seq=2, dropout=0.1, self_attn=True, switch_level=[False],
    )  # fmt: skip
    assert StageCConfig.from_dict(entries) == C
    assert StageCConfig.from_dict(C.as_dict()) == C


# --- Files

@pytest.mark.parametrize("kind, config", [(StageC, C), (StageB, B), (StageA, A), (Guide, GUIDE), (ControlNet, CONTROL)])
def test_our_own_file_says_everything_about_itself(tmp_path, kind, config):
    weights = network(kind, config).state_dict()
    state_dict.write_file(tmp_path / "a.safetensors", weights, checkpoint.metadata(config))
    found, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.safetensors"))
    assert found == config
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_released_pickle_under_a_safetensors_name_is_read(tmp_path, prefix):
    weights = guide().state_dict()
    released = checkpoint.released_guide_names(weights, number=6)
    released |= {f"module.{i}.{j}.hr_norm.{dead}.weight": torch.ones(16, 16, 1, 1)
                 for i in (6, 7) for j in (0, 1) for dead in ("alpha", "gamma")}
    torch.save({prefix + key.removeprefix("module."): value for key, value in released.items()},
               tmp_path / "ultrapixel_t2i.safetensors")
    config, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "ultrapixel_t2i.safetensors"), {"heads": 2})
    assert config == GUIDE
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_the_guide_among_the_weights_of_a_live_model_is_found():
    live = {**checkpoint.released_attention_names(stage_c().state_dict()), **guide().state_dict(),
            "norm_down_blocks.0.gamma": torch.ones(1), "agg_net.0.hr_norm.alpha.bias": torch.ones(16)}
    _, weights = checkpoint.read_guide(live, config={"heads": 2})
    assert weights.keys() == guide().state_dict().keys()
    _, weights = checkpoint.read_stage_c(live, config=C.as_dict())
    assert weights.keys() == stage_c().state_dict().keys()


def test_the_split_projections_of_comfyui_are_joined():
    weights = stage_c().state_dict()
    core = {}
    for key, value in weights.items():
        stem, fused, name = key.partition("in_proj.")
        names = [f"{stem}to_{p}.{name}" for p in "qkv"] if fused else [key]
        core.update(zip(names, value.chunk(3) if fused else [value], strict=True))
    _, loaded = checkpoint.read({f"model.diffusion_model.{k}": v for k, v in core.items()}, config=C.as_dict())
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_a_configuration_that_contradicts_the_weights_is_refused():
    with pytest.raises(ValueError, match="text_dim=11, the weights say 10"):
        checkpoint.read(stage_c().state_dict(), config={**C.as_dict(), "text_dim": 11})


@pytest.mark.parametrize("kind, config, words", [
    (StageB, B, "Stable Cascade's Stage B"), (StageA, A, "Stable Cascade's Stage A"),
    (Guide, GUIDE, "the guide of UltraPixel"),
])
def test_another_part_is_refused_by_name(kind, config, words):
    with pytest.raises(ValueError, match=f"not a Stage C.*{words}"):
        checkpoint.read_stage_c(network(kind, config).state_dict())


def test_another_family_is_refused_by_name():
    with pytest.raises(ValueError, match="not a file of UltraPixel.*PixArt"):
        checkpoint.read({"blocks.0.scale_shift_table": torch.zeros(1)})


def test_a_controlnet_of_unknown_places_asks_for_them():
    with pytest.raises(ValueError, match="3 projections, the released ones have 8.*`blocks`"):
        checkpoint.read(network(ControlNet, CONTROL).state_dict())


# --- Stage C and B

@torch.no_grad()
def test_the_initial_stage_c_predicts_no_noise():
    assert StageC(C).initialise()(**inputs()).abs().max() == 0


@torch.no_grad()
def test_a_pooled_vector_without_its_token_axis_is_taken():
    given = inputs()
    flat = {**given, "pooled": given["pooled"][:, 0], "image": given["image"][:, 0]}
    torch.testing.assert_close(stage_c()(**flat), stage_c()(**given))


@torch.no_grad()
def test_no_image_is_an_image_of_zeros():
    given = inputs()
    zeros = {**given, "image": torch.zeros_like(given["image"])}
    assert torch.equal(stage_c()(**{k: v for k, v in given.items() if k != "image"}), stage_c()(**zeros))


@torch.no_grad()
def test_the_hosts_attention_is_used():
    seen = []

    def attention(q, k, v, mask=None):
        seen.append((q.shape[2], k.shape[2]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    stage_c()(**inputs(), attention=attention)
    assert seen == [(35, 35 + 3 + 2 * 2)] * 6


@torch.no_grad()
def test_half_precision_stays_half_precision():
    half = torch.bfloat16
    given = {k: v if k == "timestep" else v.to(half) for k, v in inputs(height=8, width=6).items()}
    model = stage_c().to(half)
    low = model.features(**given)[1]
    out = model(**given, hook=guide().to(half).image(low).hook(given["timestep"]), control=[torch.randn(2, 16, 3, 3)])
    assert {out.dtype, *(x.dtype for x in low.down)} == {half} and out.isfinite().all()
    latent = stage_b().to(half)(out, given["timestep"], torch.randn(2, 16, 2, 3, dtype=half), given["pooled"])
    assert latent.dtype == half
    assert stage_a().to(half).decode_tiled(latent, 4).dtype == half
    diffusion = CosineDiffusion()
    assert diffusion.sample(lambda x, timestep: 0.5 * x, latent, diffusion.steps(2),
                            lambda i, shape: torch.randn(shape)).dtype == half


def test_unknown_conditions_are_refused():
    with pytest.raises(ValueError, match="aesthetic are unknown here; there are sca, crp"):
        stage_c()(**inputs(), conditions={"aesthetic": torch.zeros(2)})


def test_a_text_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match="7 wide, this Stage C was trained with 10"):
        stage_c()(**{**inputs(), "text": torch.zeros(2, 3, 7)})


@torch.no_grad()
def test_control_reaches_the_res_block_that_it_is_meant_for():
    residual, seen = torch.randn(2, 16, 3, 3), []
    model = stage_c()
    for block in (b for level in (*model.down_blocks, *model.up_blocks) for b in level if hasattr(b, "depthwise")):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs())
    before, seen[:] = list(seen), []
    model(**inputs(), control=[None, residual])
    changed = [not torch.equal(a, b) for a, b in zip(before, seen, strict=True)]
    assert changed == [False, True, True, True, True, True]


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = stage_c()
        model.gradient_checkpointing = checkpointing
        model(**inputs()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_stage_b_takes_sides_that_do_not_halve():
    model, x = stage_b(), torch.randn(1, 4, 18, 22)
    assert model(x, torch.rand(1), torch.randn(1, 16, 2, 3), torch.randn(1, 1, 10)).shape == x.shape


def test_stage_b_refuses_a_latent_that_it_cannot_cut():
    with pytest.raises(ValueError, match="21x18 cells.*multiples of 2"):
        stage_b()(torch.randn(1, 4, 18, 21), torch.rand(1), torch.randn(1, 16, 2, 3), torch.randn(1, 1, 10))


# --- The guide

@torch.no_grad()
def test_hooks_on_the_blocks_of_any_stage_c_guide_it_as_our_own_call_does(low):
    model, image, given = stage_c(), guide().image(low), inputs()
    own = model(**given, hook=image.hook(given["timestep"]))
    hook = image.hook(given["timestep"])
    for direction in ("down", "up"):
        for i, level in enumerate(getattr(model, f"{direction}_blocks")):
            level[2].register_forward_hook(lambda m, args, out, d=direction, i=i: hook(d, i, out))
    assert torch.equal(model(**given), own)


@torch.no_grad()
def test_what_depends_on_neither_x_nor_the_timestep_is_computed_once_an_image(low):
    model, net, calls = stage_c(), guide(), []
    net.agg_net[0].output_layer.register_forward_hook(lambda *_: calls.append(1))
    image = net.image(low)
    steps = [inputs(seed=3), inputs(seed=4)]
    kept = [model(**given, hook=image.hook(given["timestep"])) for given in steps]
    assert len(calls) == 1
    fresh = [model(**given, hook=guide().image(low).hook(given["timestep"])) for given in steps]
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))


@torch.no_grad()
def test_both_halves_of_a_guided_batch_see_the_features_of_their_picture(low):
    model, given = stage_c(), inputs(batch=4)
    rows = [{k: v[i : i + 1] for k, v in given.items()} for i in range(4)]
    together = model(**given, hook=guide().image(low).hook(given["timestep"]))
    for i, row in enumerate(rows):
        alone = model(**row, hook=guide().image(low.rows(i % 2, i % 2 + 1)).hook(row["timestep"]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_guide_of_no_weight_changes_nothing(low):
    model, given = stage_c(), inputs()
    hook = guide().image(low).hook(given["timestep"], down=0, up=0)
    assert torch.equal(model(**given, hook=hook), model(**given))


@torch.no_grad()
def test_the_weight_on_the_way_up_is_the_released_function_of_the_size_unless_given(low):
    model, given = stage_c(), inputs()
    image = guide().image(low)
    released, same, other = (model(**given, hook=image.hook(given["timestep"], up=up)) for up in (None, 0.3, 1.0))
    assert torch.equal(released, same) and not torch.allclose(released, other)


@pytest.mark.parametrize("size, weight", [((71, 73), 0.3), ((72, 72), 0.5), ((72, 127), 0.5), ((72, 128), 0.7)])
def test_the_released_weight_jumps_at_two_areas(size, weight):
    assert up_weight(*size) == weight


def test_more_low_resolution_cells_than_positions_are_refused():
    with pytest.raises(ValueError, match="9x8 = 72 cells.*at most 64"):
        guide().agg_net[0].prepare(torch.zeros(1, 16, 8, 9), 10, 10)


def test_features_of_another_net_are_refused(low):
    with pytest.raises(ValueError, match="1 levels on the way down, the guide has 2"):
        guide().image(Features(low.down[:1], low.up))


def test_only_the_guide_learns_when_the_net_is_frozen(low):
    model, net, given = stage_c().requires_grad_(False), guide(), inputs()
    model(**given, hook=net.image(low).hook(given["timestep"], up=1.0)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_a_tap_changes_nothing():
    model, given, tap = stage_c(), inputs(), FeatureTap()
    assert torch.equal(model(**given, hook=tap), model(**given))
    assert [len(tap.features.down), len(tap.features.up)] == [2, 2]


# --- Stage A

@torch.no_grad()
@pytest.mark.parametrize("strip", [1, 17, 60, 100_000])
@pytest.mark.parametrize("config", [A, replace(A, levels=1), replace(A, levels=3, latent_channels=5)],
                         ids=["levels2", "levels1", "levels3"])
def test_strips_do_not_change_a_bit_of_the_decode(strip, config):
    model, latent = network(StageA, config), torch.randn(2, config.latent_channels, 13, 9)
    assert torch.equal(model.decode(latent, strip=strip), model.decode(latent, strip=None))


@torch.no_grad()
@pytest.mark.parametrize("tile", [1, 7, 16, 64])
@pytest.mark.parametrize("config", [A, replace(A, levels=1), replace(A, levels=3)],
                         ids=["levels2", "levels1", "levels3"])
def test_tiles_with_their_halo_repeat_the_whole_decode(tile, config):
    model, latent = network(StageA, config).double(), torch.randn(1, 4, 19, 23, dtype=torch.float64)
    whole = model.decode(latent, strip=None)
    torch.testing.assert_close(model.decode_tiled(latent, tile), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.float().decode_tiled(latent.float(), tile), whole.float(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_halo_smaller_by_one_would_not_do(monkeypatch):
    model, latent = stage_a().double(), torch.randn(1, 4, 19, 23, dtype=torch.float64)
    whole, halo = model.decode(latent), A.halo
    monkeypatch.setattr(StageAConfig, "halo", property(lambda self: halo - 1))
    assert (model.decode_tiled(latent, 7) - whole).abs().max() > 1e-9


def test_the_released_decoder_sees_thirteen_cells():
    assert StageAConfig().halo == 13


def test_a_decode_with_gradients_is_not_cut():
    model, latent = stage_a(), torch.randn(1, 4, 6, 6, requires_grad=True)
    model.decode(latent, strip=8).sum().backward()
    assert latent.grad.abs().sum() > 0


@torch.no_grad()
def test_decoding_leaves_the_latent_alone():
    latent = torch.randn(1, 4, 8, 8)
    before = latent.clone()
    stage_a().decode_tiled(latent, 4)
    assert torch.equal(latent, before)


@torch.no_grad()
def test_tiles_report_their_progress():
    seen = []
    stage_a().decode_tiled(torch.randn(1, 4, 9, 5), 4, callback=lambda done, whole: seen.append((done, whole)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_a_picture_that_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="34x32 pixels.*multiples of 4"):
        stage_a().encode(torch.rand(1, 3, 32, 34))


# --- ControlNet, semantic encoder, edges

@torch.no_grad()
def test_residuals_stand_at_the_numbers_of_their_blocks():
    residuals = network(ControlNet, CONTROL)(torch.rand(1, 3, 8, 6))
    assert [None if r is None else r.shape[1] for r in residuals] == [16, None, 16, None, None, 16]


@torch.no_grad()
def test_the_semantic_encoder_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.efficientnet_v2_s().features.eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.1, 0.3)  # as they begin, the features would die away
    encoder = EffnetEncoder(EffnetConfig(4)).eval()
    encoder.backbone.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 3, 70, 101)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = theirs((image - mean) / std)
    assert expected.std() > 1e-3
    torch.testing.assert_close(encoder.backbone((image - mean) / std), expected)
    torch.testing.assert_close(encoder(image), encoder.mapper(expected))


def test_the_backbone_of_a_controlnet_has_no_padding_before_other_than_three_channels():
    assert [features(torch.nn, {}, channels)[0][0].padding for channels in (1, 3, 4)] == [(0, 0), (1, 1), (0, 0)]


def test_edges_are_detected_at_the_size_that_is_asked_for():
    pytest.importorskip("cv2")
    image = torch.zeros(2, 3, 48, 64)
    image[:, :, 12:36, 16:48] = 1
    sharp, stretched = canny(image, resize=None), canny(image, resize=24)
    assert sharp.shape == stretched.shape == (2, 1, 48, 64)
    assert set(sharp.unique().tolist()) == {0.0, 1.0} and sharp[:, :, :8].sum() == 0
    assert ((stretched > 0) & (stretched < 1)).any()


def test_edges_without_opencv_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        canny(torch.zeros(1, 3, 8, 8))


# --- Schedule and samplers

@pytest.mark.parametrize("t", [0.9, 0.5, 0.05])
def test_the_timestep_is_the_t_of_the_unshifted_schedule(t):
    schedule, t = CosineDiffusion(), torch.tensor(t)
    torch.testing.assert_close(schedule.timestep(schedule.logsnr(t)), t, atol=1e-4, rtol=0)
    assert CosineDiffusion(shift=2).timestep(CosineDiffusion(shift=2).logsnr(t)) > t


def test_noise_that_was_added_is_taken_off_again():
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    logsnr = CosineDiffusion().logsnr(torch.tensor([0.2, 0.7])).double()
    noisy = sampling.add_noise(clean, noise, logsnr)
    torch.testing.assert_close(sampling.denoised(noisy, noise, logsnr), clean)


def test_a_net_that_knows_the_noise_is_sampled_to_its_picture():
    clean = torch.randn(1, 2, 4, 4)
    schedule = CosineDiffusion()
    logsnrs = schedule.steps(5)
    noise_levels = iter(logsnrs)

    def predict(x, timestep):
        a, b = sampling.scales(next(noise_levels), x)
        return (x - a * clean) / b

    out = schedule.sample(predict, torch.randn(1, 2, 4, 4), logsnrs, lambda i, shape: torch.randn(shape))
    torch.testing.assert_close(out, clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps, shift, kept", [(20, 1, 19), (24, 1, 23), (40, 1, 38), (9, 1, 8), (20, 2, 19)])
def test_the_kept_step_is_the_one_nearest_to_the_noise_of_training(steps, shift, kept):
    schedule = CosineDiffusion(shift)
    assert sampling.kept_step(schedule, schedule.steps(steps)) == kept


def test_the_low_resolution_pass_ends_where_its_features_are_kept():
    schedule, calls = CosineDiffusion(), []
    logsnrs = schedule.steps(40)

    def predict(x, timestep):
        calls.append(timestep.item())
        return 0.5 * x

    kept = sampling.sample_features(predict, lambda x, timestep: timestep.item(), torch.randn(1, 1, 2, 2), schedule,
                                    logsnrs, lambda i, shape: torch.randn(shape))
    assert len(calls) == 38 and abs(kept - 0.05) < 1e-3


def test_a_step_to_keep_that_is_none_is_refused():
    with pytest.raises(ValueError, match="keep=20 is not one of the steps 0 to 19"):
        diffusion = CosineDiffusion()
        sampling.sample_features(None, None, torch.zeros(1), diffusion, diffusion.steps(20), None, keep=20)


@pytest.mark.parametrize("limit, expected", [(None, 24), (20, 20)])
def test_every_step_is_guided_unless_the_references_numbers_are_asked_for(limit, expected):
    schedule, seen = CosineDiffusion(), []

    def high(x, timestep, kept):
        seen.append(kept is not None)
        return 0.5 * x

    sampling.sample_guided(lambda x, timestep: 0.5 * x, lambda x, timestep: "kept", high, torch.randn(1, 1, 2, 2),
                           torch.randn(1, 1, 4, 4), schedule, schedule.steps(24), lambda i, shape: torch.zeros(shape),
                           lambda i, shape: torch.zeros(shape), guide_steps=limit)
    assert seen == [True] * expected + [False] * (24 - expected)


def test_guidance_of_an_image_does_not_depend_on_its_batch():
    cond, uncond = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    cond[1] *= 5
    together = sampling.guided(cond, uncond, 4.0)
    alone = torch.cat([sampling.guided(cond[i : i + 1], uncond[i : i + 1], 4.0) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(sampling.guided(cond, uncond, 4.0, whole_batch=True), alone)


def test_guidance_of_one_is_the_conditional_prediction():
    cond = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(sampling.guided(cond, torch.randn_like(cond), 1.0), cond)


def test_sizes_are_those_of_the_published_table():
    found = {(h, w): sampling.sizes(h, w) for h, w in ((2048, 2048), (2560, 5120), (3840, 2160), (4096, 1024))}
    assert [s.stage_c for s in found.values()] == [(48, 48), (60, 120), (90, 51), (96, 24)]
    assert [s.stage_b for s in found.values()] == [(512, 512), (640, 1280), (960, 540), (1024, 256)]
    assert [s.low for s in found.values()] == [(24, 24), (17, 34), (32, 18), (48, 12)]
    assert found[2560, 5120].low_pixels == (704, 1440)


# --- Training

def test_the_drawn_times_stay_inside_their_range():
    t = CosineDiffusion().draw(10_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0.001 and t.max() <= 1 and 0.48 < t.mean() < 0.52


def test_the_loss_weight_follows_the_loss_at_its_noise_level():
    adaptive = sampling.AdaptiveLossWeight()
    before, logsnr = adaptive.losses, torch.tensor([-3.0, 4.0])
    for _ in range(2000):
        adaptive.update(logsnr, torch.tensor([4.0, 0.5]))
    torch.testing.assert_close(adaptive.weight(logsnr), torch.tensor([0.25, 2.0]), rtol=1e-3, atol=0)
    assert adaptive.weight(torch.tensor([0.0])) == 1 and before.eq(1).all()


def test_a_resized_picture_covers_its_bucket():
    offered = Buckets()
    for size in ((700, 4000), (4000, 700), (1024, 1024), (3000, 1999), (1500, 1600)):
        bucket = offered.nearest(*size)
        edge = shorter_edge(size, bucket)
        assert all(s % offered.factor == 0 for s in bucket)
        assert all(edge * side / min(size) >= b - 1e-6 for side, b in zip(size, bucket, strict=True))


# --- Personalisation

def personalisation(rank=2) -> lora.Personalisation:
    torch.manual_seed(5)
    shapes = {key: value.shape for key, value in stage_c().state_dict().items()}
    layers = {key: (torch.randn(shapes[key][0], rank), torch.randn(rank, shapes[key][1]))
              for key in lora.attention_keys(C)}
    return lora.Personalisation(layers, 1 / rank, [4], torch.randn(1, 10), "[cat]", "^cat</w>")


def released_file(file: lora.Personalisation) -> dict:
    tensors = {f"module.{i}.lora_{name}": value for i, pair in enumerate(file.layers.values())
               for name, value in zip(("up", "down"), pair, strict=True)}
    n = len(file.layers)
    token = {f"module.{n}.embeddings": file.token_change, f"module.{n}.indices": torch.tensor(file.token_rows)}
    return {**tensors, **token}


def assert_same(a: lora.Personalisation, b: lora.Personalisation):
    assert list(a.layers) == list(b.layers) and a.scale == pytest.approx(b.scale)
    for key in a.layers:
        assert all(torch.equal(x, y) for x, y in zip(a.layers[key], b.layers[key], strict=True))
    assert a.token_rows == b.token_rows and torch.equal(a.token_change, b.token_change)


def test_the_released_pickle_is_read_by_its_numbers(tmp_path):
    file = personalisation()
    torch.save(released_file(file), tmp_path / "lora_cat.safetensors")
    assert_same(lora.read(*state_dict.read_file(tmp_path / "lora_cat.safetensors"), config=C), file)


def test_a_file_for_comfyui_comes_back_as_it_was(tmp_path):
    file = personalisation()
    state_dict.write_file(tmp_path / "cat.safetensors", *lora.to_core(file))
    back = lora.read(*state_dict.read_file(tmp_path / "cat.safetensors"))
    assert_same(back, file)
    assert (back.token, back.base) == ("[cat]", "^cat</w>")


def test_a_file_for_comfyui_changes_its_split_projections_by_the_same():
    file = personalisation()
    tensors, _ = lora.to_core(file)
    name, parts = "down_blocks.1.5.attention.attn.", []
    for part in ("to_q", "to_k", "to_v"):
        up, down, alpha = (tensors[f"diffusion_model.{name}{part}.{what}"]
                           for what in ("lora_up.weight", "lora_down.weight", "alpha"))
        parts.append(alpha / down.shape[0] * up @ down)
    change = file.change(f"{name}in_proj.weight", (48, 16))
    torch.testing.assert_close(torch.cat(parts), change)


@torch.no_grad()
def test_strength_scales_the_change():
    weights, file = stage_c().state_dict(), personalisation()
    before = {key: value.clone() for key, value in weights.items()}
    half, whole = file.merge(weights, 0.5), file.merge(weights)
    key = "up_blocks.0.2.attention.attn.out_proj.weight"
    torch.testing.assert_close(2 * (half[key] - weights[key]), whole[key] - weights[key])
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert whole["clf.1.weight"] is weights["clf.1.weight"]


def test_a_table_without_the_tokens_row_is_refused():
    with pytest.raises(ValueError, match="row is 4, the table has 4"):
        personalisation().embed(torch.zeros(4, 10))


def test_the_learned_token_changes_only_its_row():
    table = torch.randn(6, 10)
    changed = (personalisation().embed(table) != table).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True, False]


def test_a_personalisation_of_another_net_is_refused():
    with pytest.raises(ValueError, match="changes 12 layers, this Stage C has 128"):
        lora.read(released_file(personalisation()))


def test_an_ordinary_lora_is_not_taken_for_a_personalisation():
    with pytest.raises(ValueError, match="it holds blocks.0.attn.lora_A.weight"):
        lora.read({"blocks.0.attn.lora_A.weight": torch.zeros(1, 1)})


def test_a_pattern_of_words_that_could_take_forever_is_refused_before_a_word_is_looked_at():
    class Vocabulary(dict):
        def items(self):
            pytest.fail("looked at")

    with pytest.raises(ValueError, match="pattern of a token's words='.*' is not run"):
        lora.base_rows(Vocabulary(), "(a+)+$")
    assert lora.base_rows({"cat</w>": 2, "cats</w>": 5, "a" * 10**6: 7}, "^cats?</w>") == [2, 5]
