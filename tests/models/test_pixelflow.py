"""PixelFlow without a host: its configuration, files, network and cascade."""
import argparse
import math
import os
import pickle

import pytest
import torch
from pixstack.kernels.attention import attention
from pixstack.kernels.varlen_attention import packed_attention, packed_backends
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint, packing, sampling
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PackedLayout, PixelFlow
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule, guidance_scales
from pixstack.models_impl.pixelflow.stages import Stages, stage_size

TEXT = PixelFlowConfig(heads=2, head_dim=8, depth=2, context_dim=12, num_stages=3, resolution=32)
CLASS = PixelFlowConfig(heads=2, head_dim=8, depth=2, num_classes=5, num_stages=3, resolution=32)


def network(config, seed=0) -> PixelFlow:
    torch.manual_seed(seed)
    model = PixelFlow(config).initialise()
    for parameter in model.parameters():  # the initial zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# --- Configuration

def test_a_configuration_refuses_nonsense_with_both_numbers():
    with pytest.raises(ValueError, match=r"resolution=40 .* multiple of 16"):
        PixelFlowConfig(heads=2, head_dim=8, depth=1, num_stages=3, resolution=40)
    with pytest.raises(ValueError, match="head_dim=10"):
        PixelFlowConfig(heads=2, head_dim=10, depth=1)


def test_a_configuration_reads_the_released_yaml():
    entries = {"model": {"params": {"num_attention_heads": 2, "attention_head_dim": 8, "depth": 1}},
               "scheduler": {"params": {"num_stages": 2}}}
    assert PixelFlowConfig.from_dict(entries) == PixelFlowConfig(heads=2, head_dim=8, depth=1, num_stages=2)


def test_a_configuration_names_an_unknown_entry():
    with pytest.raises(ValueError, match="'deepth'"):
        PixelFlowConfig.from_dict({"heads": 2, "head_dim": 8, "deepth": 1})


# --- Files

def test_our_own_file_says_everything_about_itself(tmp_path):
    weights = network(TEXT).state_dict()
    state_dict.write_file(tmp_path / "a.safetensors", weights, checkpoint.metadata(TEXT))
    config, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.safetensors"))
    assert config == TEXT
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("weights, expected", [("ema", 2.0), ("model", 1.0)])
def test_a_training_file_gives_the_weights_that_are_asked_for(tmp_path, weights, expected):
    tensors = network(CLASS).state_dict()
    wrapped = {name: {f"module.{k}": torch.full_like(v, value) for k, v in tensors.items()}
               for name, value in (("model", 1.0), ("ema", 2.0))}
    torch.save({**wrapped, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pt")
    _, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.pt"), weights=weights, config=CLASS.as_dict())
    assert loaded["proj_out_2.bias"].eq(expected).all()


def test_a_width_that_the_released_head_size_does_not_divide_asks_for_the_configuration():
    with pytest.raises(ValueError, match="16 wide.*72.*config.yaml"):
        checkpoint.read(network(CLASS).state_dict())


def test_a_yaml_beside_the_file_counts_only_where_it_fits(tmp_path):
    small = "model: {params: {num_attention_heads: 2, attention_head_dim: 8, depth: 2, num_classes: 5}}"
    (tmp_path / "config.yaml").write_text(small + "\nscheduler: {num_stages: 3}")
    beside = checkpoint.config_beside(tmp_path / "model.pt")
    assert checkpoint.read(network(CLASS).state_dict(), beside=beside)[0].head_dim == 8
    ours, _ = checkpoint.read(network(TEXT).state_dict(), checkpoint.metadata(TEXT), beside=beside)
    assert ours == TEXT
    released = PixelFlowConfig(heads=1, head_dim=72, depth=1, num_classes=3)
    found, _ = checkpoint.read(PixelFlow(released).state_dict(), beside=beside)
    assert (found.head_dim, found.num_classes) == (72, 3)


@pytest.mark.parametrize("key", ["proj_out_2.weight", "transformer_blocks.0.attn1.q_proj.weight"])
def test_a_file_that_lacks_what_its_shape_is_read_from_is_named_as_incomplete(key):
    weights = network(CLASS).state_dict()
    del weights[key]
    with pytest.raises(ValueError, match=f"incomplete: it has no {key}"):
        checkpoint.read(weights, config=CLASS.as_dict())


def test_a_configuration_that_contradicts_the_weights_is_refused():
    with pytest.raises(ValueError, match="depth=3, the weights say 2"):
        checkpoint.read(network(CLASS).state_dict(), config={**CLASS.as_dict(), "depth": 3})


@pytest.mark.parametrize("key, family", [
    ("blocks.0.scale_shift_table", "PixArt"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ("diffusion_model.transformer_blocks.0.attn1.q_proj.lora_A.weight", "LoRA"),
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
])
def test_another_family_is_refused_by_name(key, family):
    with pytest.raises(ValueError, match=f"not a PixelFlow checkpoint.*{family}"):
        checkpoint.read({key: torch.zeros(1, 1)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named_as_such(tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    weights = network(TEXT).state_dict()
    state_dict.write_file(path, weights) if suffix == ".safetensors" else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=f"cut{suffix}.*(not a complete|empty|neither)"):
        state_dict.read_file(path)


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({"model": Evil()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds more than weights \(\w+\.mkdir\), so it is not opened") as refused:
        state_dict.read_file(tmp_path / name)
    assert "can still be loaded" not in str(refused.value)  # torch's advice to run the code all the same
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError):
        state_dict.read_file(tmp_path / "old.pt")
    assert not (tmp_path / "it-ran").exists()


def test_weights_that_do_not_fit_are_counted_and_named():
    weights = network(CLASS).state_dict()
    del weights["proj_out_2.bias"]
    weights["stranger"] = torch.zeros(1)
    with pytest.raises(ValueError, match="1 missing: proj_out_2.bias; 1 unexpected: stranger"):
        state_dict.load_into(PixelFlow(CLASS), weights, "PixelFlow")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    state_dict.write_file(path, {"a": torch.ones(2)})
    with pytest.raises(Exception):  # noqa: B017 - whichever error safetensors has for this
        state_dict.write_file(path, {"a": "not a tensor"})
    assert state_dict.read_file(path)[0]["a"].eq(1).all()
    assert list(tmp_path.iterdir()) == [path]


# --- Network

@torch.no_grad()
def test_masked_padding_changes_nothing():
    model = network(TEXT)
    x, t, context = torch.randn(2, 3, 16, 24), torch.tensor([10.0, 700.0]), torch.randn(2, 5, 12)
    padded = torch.cat((context, torch.randn(2, 3, 12) * 50), dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(model(x, t, padded, mask), model(x, t, context))


@torch.no_grad()
@pytest.mark.parametrize("config", [TEXT, CLASS], ids=["text", "class"])
def test_the_packed_pass_equals_the_dense_one(config):
    model = network(config)
    grids, lengths = [(4, 4), (4, 4), (2, 3)], (3, 5, 2)
    x = [torch.randn(1, 3, h * 4, w * 4) for h, w in grids]
    timestep = torch.tensor([5.0, 300.0, 900.0])
    if config.text_conditional:
        context = [torch.randn(n, 12) for n in lengths]
        given = [{"context": c[None]} for c in context]
        packed_given = {"context": torch.cat(context)}
    else:
        given = [{"class_labels": torch.tensor([i])} for i in range(3)]
        packed_given = {"class_labels": torch.arange(3)}
    dense = [model(a, t[None], **g) for a, t, g in zip(x, timestep, given, strict=True)]
    rows = torch.cat([packing.patches(a, 4) for a in x])
    packed = model.forward_packed(rows, timestep, PackedLayout(tuple(grids), lengths), **packed_given)
    torch.testing.assert_close(packed, torch.cat([packing.patches(d, 4) for d in dense]), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model = network(CLASS)
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
        model(x, torch.tensor([10.0]), class_labels=torch.tensor([2])).square().mean().backward()
        gradients.append(model.transformer_blocks[0].mlp.fc1.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "xformers", "segments"])
def test_every_packed_attention_equals_the_dense_one(backend):
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    lengths_q, lengths_k = [5, 5, 3, 8], [4, 4, 7, 1]
    q, k, v = (torch.randn(sum(n), 2, 16, device=device, dtype=dtype) for n in (lengths_q, lengths_k, lengths_k))
    if backend not in packed_backends(q):
        pytest.skip(f"{backend} is not installed, or cannot run on {device}")
    packed = packed_attention(q, k, v, lengths_q, lengths_k, backend)
    for part, a, b, c in zip(packed.split(lengths_q), q.split(lengths_q), k.split(lengths_k), v.split(lengths_k),
                             strict=True):
        alone = attention(*(x[None].transpose(1, 2).double() for x in (a, b, c)))[0].transpose(0, 1)
        torch.testing.assert_close(part.double(), alone, rtol=1e-5 if dtype == torch.float32 else 2e-2,
                                   atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_attention_that_learns_on_a_cpu_equals_the_fused_one():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (6, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None]
    torch.testing.assert_close(attention(q.clone().requires_grad_(), k, v, mask).detach(), attention(q, k, v, mask))


@pytest.mark.parametrize("config, given, message", [
    (TEXT, {}, "needs the tokens"),
    (TEXT, {"context": torch.zeros(1, 2, 7)}, "7 wide.*12"),
    (CLASS, {}, "needs a class: 0 to 4.*null class 5"),
    (CLASS, {"context": torch.zeros(1, 2, 12)}, "takes no text"),
])
def test_a_wrong_condition_is_explained(config, given, message):
    with pytest.raises(ValueError, match=message):
        network(config)(torch.zeros(1, 3, 16, 16), torch.zeros(1), **given)


# --- Cascade

@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 7])
def test_the_noise_after_a_jump_is_white_again_at_the_right_level(num_stages):
    stages = Stages(num_stages)
    for k in range(1, num_stages):
        alpha, beta = stages.jump(k)
        doubled = alpha**2 * (1 - stages.origin[k]) ** 2 * torch.ones(4, 4)
        added = beta**2 * ((1 - stages.gamma) * torch.eye(4) + stages.gamma * torch.ones(4, 4))
        torch.testing.assert_close(doubled + added, (1 - stages.start[k]) ** 2 * torch.eye(4), rtol=0, atol=1e-6)
        assert alpha * stages.end[k - 1] == pytest.approx(stages.start[k])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_schedule_survives_the_way_through_sigmas(num_stages, shift):
    stages = Stages(num_stages)
    schedule = CascadeSchedule.build(stages, 5, shift, guidance=2.0)
    back = CascadeSchedule.from_sigmas(stages, schedule.sigmas(), 2.0)
    assert [p.stage for p in back.plans] == list(range(num_stages))
    for a, b in zip(schedule.plans, back.plans, strict=True):
        assert b.timesteps == pytest.approx(a.timesteps, abs=1e-3)
        assert b.times == pytest.approx(a.times, abs=1e-4)


def test_sigmas_fall_strictly_from_one_to_zero():
    sigmas = CascadeSchedule.build(Stages(4), 10).sigmas()
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def field(x, timestep, stage, cfg):
    return torch.sin(x * 3) * cfg + timestep / 1000


def noise_of(stage, shape):
    return sampling.block_noise(shape, torch.Generator().manual_seed(stage))


@pytest.mark.parametrize("cut", [1, 3, 4, 6, 8, 11])
def test_two_samplers_one_after_another_repeat_one(cut):
    stages, x = Stages(3), torch.randn(1, 3, 8, 8)
    whole = CascadeSchedule.build(stages, 4)
    sigmas = whole.sigmas()
    first = CascadeSchedule.from_sigmas(stages, sigmas[: cut + 1])
    second = CascadeSchedule.from_sigmas(stages, sigmas[cut:])
    flow = sampling.CascadeFlow(stages)
    between = flow.sample(field, x, first, noise_of)
    torch.testing.assert_close(
        flow.sample(field, between, second, noise_of), flow.sample(field, x, whole, noise_of), rtol=1e-3, atol=1e-3,
    )


def test_a_cascade_that_ends_early_gives_the_clean_estimate():
    stages, clean = Stages(3), torch.rand(1, 3, 4, 4)
    noise = torch.randn(1, 3, 4, 4)
    smooth = sampling.double(clean)  # halving and doubling lose nothing
    noise = sampling.double(noise)

    def exact(x, timestep, stage, cfg):
        return (stages.end[0] - stages.start[0]) * (smooth - noise)

    draft = sampling.CascadeFlow(stages).sample(exact, noise, CascadeSchedule.build(stages, 3, end_stage=0), noise_of)
    torch.testing.assert_close(draft, smooth)


def test_an_adaptive_draft_is_estimated_at_the_end_of_its_stage():
    stages, progress = Stages(2), []
    x = torch.randn(1, 3, 4, 4)
    schedule = CascadeSchedule.build(stages, 4, solver="dopri5", end_stage=0)
    flow = sampling.CascadeFlow(stages)
    draft = flow.sample(field, x, schedule, noise_of, lambda *said: progress.append(said))
    state = sampling.CascadeFlow(stages).sample(field, x, CascadeSchedule(stages, schedule.plans, "dopri5"), noise_of)
    velocity = field(state, stages.last_timestep[0], 0, 1.0)
    torch.testing.assert_close(draft, stages.denoised(state, velocity, 0, 1.0))
    assert progress[-1][0] == schedule.steps - 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_cascade_started_from_a_picture_gets_back_to_it(stage):
    stages, image = Stages(3), sampling.double(sampling.double(sampling.double(torch.rand(1, 3, 4, 4) * 2 - 1)))
    size = stage_size(32, 32, stage, 3)
    noise = torch.randn(1, 3, *size)
    small = sampling.shrink(image, stage, 3)
    x = sampling.CascadeFlow(stages).add_noise(small, noise, sampling.StageTime(stage, torch.zeros(1)))
    velocity = (stages.end[stage] - stages.start[stage]) * (small - noise)
    torch.testing.assert_close(stages.denoised(x, velocity, stage, 0.0), small, rtol=1e-5, atol=1e-5)


def test_denoised_is_undone_by_velocity():
    stages = Stages(4)
    x, velocity = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for k in range(4):
        for t in (0.0, 0.5, 0.999):
            torch.testing.assert_close(stages.velocity(x, stages.denoised(x, velocity, k, t), k, t), velocity)


def test_block_noise_has_the_covariance_of_the_reference():
    noise = sampling.block_noise((64, 3, 128, 128), torch.Generator().manual_seed(0))
    blocks = noise.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4).double()
    covariance = blocks.T @ blocks / len(blocks)
    expected = 4 / 3 * torch.eye(4, dtype=torch.float64) - 1 / 3 * torch.ones(4, 4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.01)


def test_seed_exact_noise_is_drawn_as_the_reference_draws_it():
    shape = (2, 3, 4, 6)
    covariance = (4 / 3 + 1e-6) * torch.eye(4) - 1 / 3 * torch.ones(4, 4)
    torch.manual_seed(7)
    normal = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    drawn = torch.stack([normal.sample() for _ in range(2 * 3 * 2 * 3)])
    expected = drawn.view(2, 3, 2, 3, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(shape)
    torch.manual_seed(7)
    torch.testing.assert_close(sampling.block_noise_reference(shape), expected)


@pytest.mark.parametrize("solver, tolerance", [
    ("dopri5", 1e-3),
    ("dopri5_reference", 5e-3),  # its end is interpolated, one order less
])
def test_the_adaptive_solver_is_as_accurate_as_it_promises(solver, tolerance):
    stages = Stages(1)

    def growth(x, timestep, stage, cfg):
        return 2 * x * math.cos(timestep / 999 * 6)

    x = torch.tensor([[[[1.0, -2.0]]]])
    end = sampling.CascadeFlow(stages).sample(growth, x, CascadeSchedule.build(stages, 4, solver=solver), noise_of)
    torch.testing.assert_close(end, x * math.exp(2 * math.sin(6) / 6), rtol=tolerance, atol=0)


def test_guidance_policies():
    assert guidance_scales("constant", 4, 3) == [4, 4, 4]
    assert guidance_scales("scaled", 4, 4) == pytest.approx([1, 1.5, 3, 4])
    assert guidance_scales("scaled", 4, 6)[0] == 1 and guidance_scales("scaled", 4, 6)[-1] == 4
    assert guidance_scales("custom", 4, 2, [1, 7]) == [1, 7]
    with pytest.raises(ValueError, match="each of the 3 stages, got 2"):
        guidance_scales("custom", 4, 3, [1, 7])


@pytest.mark.parametrize("sigmas, message", [
    ([1.0, 1.0, 0.0], "must fall"),
    ([1.0, 0.2, 0.0], "from stage 0 to stage"),
])
def test_sigmas_that_are_not_a_cascade_are_explained(sigmas, message):
    with pytest.raises(ValueError, match=message):
        CascadeSchedule.from_sigmas(Stages(4), torch.tensor(sigmas))


# --- Training

def test_stages_are_drawn_in_near_equal_numbers():
    for batch in (3, 8, 10):
        counts = sampling.assign_stages(batch, 4, torch.Generator().manual_seed(1)).bincount(minlength=4)
        assert counts.sum() == batch and counts.max() - counts.min() <= 1


def test_weighted_stages_are_drawn_in_proportion():
    rng = torch.Generator().manual_seed(0)
    counts = sum(sampling.assign_stages(10, 3, rng, (4, 3, 1)).bincount(minlength=3) for _ in range(400))
    assert (counts / counts.sum()).tolist() == pytest.approx([0.5, 0.375, 0.125], abs=0.01)
