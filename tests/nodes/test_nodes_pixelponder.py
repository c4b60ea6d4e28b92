"""PixelPonder inside a real ComfyUI: what FLUX receives, which condition wins where, the map, and what is refused."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import SimpleNamespace

import dynamic_vram
import pytest
import torch
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux, FluxTrunk, Residuals, pack, positions, residual_index, unpack
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.pixelponder import checkpoint
from pixstack.models_impl.pixelponder.accumulate import Accumulate
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.pixelponder.patch_select import Blend, Released
from pixstack.models_impl.pixelponder.sampling import schedule
from pixstack.models_impl.state_dict import write_file
from torch import nn
from weights import one_norms, random_state

TOLERANCE = 1e-4
BASE, CONTROLNET, PLAIN = "tiny_flux.safetensors", "tiny_ponder.safetensors", "tiny_ponder_released.safetensors"
FLUX = FluxConfig(hidden=128, heads=1, mlp_hidden=512, depth=3, single_depth=5)  # heads as wide as the release's
TRUNK = FluxConfig(hidden=128, heads=1, mlp_hidden=512, depth=2, single_depth=4)
PONDER = PixelPonderConfig(
    TRUNK, select=SelectConfig(hidden=128, heads=1, mlp_hidden=256), selector=SelectorConfig(128)
)
SIZE = (8, 12)  # latent cells: 4 by 6 patches
STEPS = 3


@pytest.fixture(scope="module")
def flux(host):
    """Our nodes by their short name, a tiny FLUX out of core's loader, and PixelPonder files."""
    core, comfy = import_module("nodes"), import_module("comfy")
    for name in ("sample", "samplers", "model_detection", "ldm.flux.model", "ldm.flux.layers"):
        import_module(f"comfy.{name}")
    write_file(host.models / "diffusion_models" / BASE, state(Flux(FLUX), 1))
    weights = state(PixelPonder(PONDER), 2)
    write_file(host.models / "controlnet" / CONTROLNET, weights, checkpoint.metadata(PONDER))
    write_file(host.models / "controlnet" / PLAIN,
               {key: value for key, value in weights.items() if not key.startswith("selector.")})
    flux = SimpleNamespace(host=host, core=core, comfy=comfy, nodes=core.NODE_CLASS_MAPPINGS)
    flux.model = core.UNETLoader().load_unet(BASE, "default")[0]
    flux.small = core.UNETLoader().load_unet(BASE, "fp8_e4m3fn")[0]
    flux.control = load(flux)
    flux.ours = sys.modules[type(flux.control).__module__]
    flux.alone, flux.ponder = Flux(FLUX).eval(), PixelPonder(PONDER.without_unused()).eval()
    flux.alone.load_state_dict(state(Flux(FLUX), 1))
    flux.ponder.load_state_dict(checkpoint.read(weights, checkpoint.metadata(PONDER), select_net=True)[1])
    return flux


def state(net, seed: int) -> dict:
    return one_norms(random_state(net, seed, scale=0.08))


def node(flux, name: str, **inputs):
    """All outputs of one of our nodes."""
    return flux.nodes[f"PixStack_PixelPonder{name}"].execute(**inputs).args


def load(flux, name=CONTROLNET, selection_network="keep", dtype="fp32"):
    return node(flux, "Loader", control_net_name=name, selection_network=selection_network, dtype=dtype)[0]


def condition(flux, kind="canny", seed=0, before=(), image=None, **entries):
    if image is None:
        image = hint(seed)
    entries = {**dict(strength=1.0, priority=0, start_percent=0.0, end_percent=1.0), **entries}
    return node(flux, "Condition", image=image, kind=kind, conditions=before, **entries)[0]


def hint(seed=0, height=8 * SIZE[0], width=8 * SIZE[1], batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def several(flux, *kinds, **entries):
    """Conditions of these kinds in a row, the n-th with hint n."""
    row = ()
    for seed, kind in enumerate(kinds):
        row = condition(flux, kind, seed, row, **entries)
    return row


def apply(flux, conditions, positive=None, negative=None, control=None, **entries):
    entries = {**dict(strength=0.8, start_percent=0.0, end_percent=1.0, strategy="released", rounds=1), **entries}
    return node(flux, "Apply", positive=positive or text(6), negative=negative or text(4, 1),
                control_net=control or flux.control, conditions=conditions, **entries)  # fmt: skip


def text(length: int, seed: int = 0, batch: int = 1, **entries) -> list:
    """A conditioning of random text; guidance 4 as in the release."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(batch, 768, generator=generator)
    return [[torch.randn(batch, length, 4096, generator=generator), {"pooled_output": pooled, "guidance": 4.0,
                                                                     **entries}]]  # fmt: skip


def noise_of(batch=1, size=SIZE, seed=5):
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(seed))


def draw(flux, positive, negative=None, model=None, noise=None, cfg=1.0, sampler="euler", steps=STEPS):
    """What core's sampler makes, at the scale that the network sees latents in."""
    model, noise = model or flux.model, noise_of() if noise is None else noise
    picture = flux.comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative or text(4, 1),
                                       torch.zeros_like(noise), seed=3)  # fmt: skip
    return model.model.process_latent_in(picture)


def sigmas(flux, steps=STEPS):
    return flux.comfy.samplers.calculate_sigmas(flux.model.get_model_object("model_sampling"), "simple", steps).tolist()


@torch.no_grad()
def expected(flux, plan=None, cfg=1.0, noise=None, prompts=None, change=lambda residuals, selection: residuals):
    """The same picture from our own networks. plan(sigma) -> (hints, strategy, strength), or None for no control."""
    noise = noise_of() if noise is None else noise
    rows, columns = noise.shape[-2] // 2, noise.shape[-1] // 2
    ids = positions(rows, columns)

    def velocity(x, t, prompt):
        B = len(x)
        tokens, entries = prompt[0]
        given = (t, tokens.expand(B, -1, -1), entries["pooled_output"].expand(B, -1), torch.full((B,), 4.0))
        residuals = Residuals()
        planned = plan and plan(float(t[0]))
        if planned:
            hints, strategy, strength = planned
            choose = strategy.begin(flux.ponder.conditions(hints))
            control = flux.ponder(pack(x), *given, select=choose, img_ids=ids)
            residuals = change(control.residuals(strength), control.selection)
        out = flux.alone(pack(x), *given, img_ids=ids, residuals=residuals)
        return unpack(out, *x.shape[-2:])

    def predict(x, t):
        positive, negative = prompts or (text(6), text(4, 1))
        v = velocity(x, t, positive)
        return v if cfg == 1 else torch.lerp(velocity(x, t, negative), v, cfg)

    return RectifiedFlow().sample(predict, noise, sigmas(flux))


def seen(kind: str, seed: int, batch=1):
    """A condition's hint as the network wants it."""
    return kind, 2 * hint(seed, batch=batch).movedim(-1, 1) - 1


def close(ours, reference, tolerance=TOLERANCE):
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.std().item()), (
        (ours - reference).abs().max()
    )


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


# --- What FLUX receives


def test_core_flux_draws_without_pixelponder_what_our_flux_does(flux):
    close(draw(flux, text(6)), expected(flux))


def test_a_condition_guides_core_flux_as_the_two_networks_alone_do(flux):
    positive, negative = apply(flux, condition(flux, "depth", 1))
    plan = lambda sigma: ([seen("depth", 1)], Released(), 0.8)  # noqa: E731
    close(draw(flux, positive, negative), expected(flux, plan))

    def image_only(residuals, selection):
        text_tokens = 6
        return Residuals(residuals.double, tuple(
            torch.cat((torch.zeros_like(r[:, :text_tokens]), r[:, text_tokens:]), dim=1) for r in residuals.single
        ))

    differ(draw(flux, positive, negative), expected(flux, plan, change=image_only))  # the text's share matters


def test_positive_and_negative_prompts_and_batches_are_guided_alike(flux):
    prompts = text(6), text(6, 1)  # of one length, so that they share a batch
    conditions = several(flux, "canny", "pose")
    both = apply(flux, conditions, *prompts)
    noise = noise_of(2)
    plan = lambda sigma: ([seen("canny", 0), seen("openpose", 1)], Released(), 0.8)  # noqa: E731
    close(draw(flux, *both, noise=noise, cfg=3.0), expected(flux, plan, cfg=3.0, noise=noise, prompts=prompts))
    prompts = text(6), text(4, 1)  # of two lengths: one after the other
    both = apply(flux, conditions, *prompts)
    close(draw(flux, *both, noise=noise, cfg=3.0), expected(flux, plan, cfg=3.0, noise=noise, prompts=prompts))


def test_a_batch_of_hints_guides_each_picture_with_its_own(flux):
    noise, prompts = noise_of(2), (text(6), text(6, 1))
    row = condition(flux, "hed", image=hint(3, batch=2), before=condition(flux, "canny", 4))
    both = apply(flux, row, *prompts, strategy="blend")
    plan = lambda sigma: ([seen("canny", 4), seen("hed", 3, batch=2)], Blend([1.0, 1.0]), 0.8)  # noqa: E731
    close(draw(flux, *both, noise=noise, cfg=2.0), expected(flux, plan, cfg=2.0, noise=noise, prompts=prompts))


@pytest.mark.parametrize("strength", [0.3, 1.5])
def test_the_strengths_of_the_node_and_of_the_condition_multiply(flux, strength):
    positive, _ = apply(flux, condition(flux, strength=strength), strength=0.5)
    plan = lambda sigma: ([seen("canny", 0)], Released(), 0.5 * strength)  # noqa: E731
    close(draw(flux, positive), expected(flux, plan))


def test_a_strength_counts_where_its_condition_wins(flux):
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[..., : mask.shape[-1] // 2] = 1
    row = condition(flux, "depth", 1, condition(flux, "canny", 0), strength=0.0, mask=mask)
    positive, _ = apply(flux, row)
    half = (torch.arange(SIZE[1] // 2) >= SIZE[1] // 4).float().expand(SIZE[0] // 2, -1).reshape(1, -1, 1)

    def change(residuals, selection):
        whole = torch.cat((half, half.mean().expand(1, 6, 1)), dim=1)
        return Residuals(tuple(r * half for r in residuals.double), tuple(r * whole for r in residuals.single))

    forced = (mask[:, ::16, ::16] > 0).long() * 2 - 1  # condition 1, or nobody

    class Forced(Released):
        def begin(self, conditions, _=None):
            return super().begin(conditions, forced)

    plan = lambda sigma: ([seen("canny", 0), seen("depth", 1)], Forced(), 0.8)  # noqa: E731
    close(draw(flux, positive), expected(flux, plan, change=change))


def test_pixelponder_begins_and_ends_where_it_is_set_to(flux):
    middle = sigmas(flux)[1]
    one = condition(flux)
    plain = draw(flux, text(6))
    assert torch.equal(draw(flux, apply(flux, one, strength=0.0)[0]), plain)
    assert torch.equal(draw(flux, apply(flux, one, start_percent=1.0)[0]), plain)
    late = draw(flux, apply(flux, one, start_percent=0.01)[0])
    close(late, expected(flux, lambda s: ([seen("canny", 0)], Released(), 0.8) if s <= middle else None))


def test_conditions_take_turns_when_their_parts_of_the_sampling_follow_each_other(flux):
    first = sigmas(flux)[0]
    row = condition(flux, "depth", 0, end_percent=0.01)
    row = condition(flux, "canny", 1, row, start_percent=0.01)
    close(draw(flux, apply(flux, row)[0]), expected(
        flux, lambda s: ([seen("depth", 0) if s >= first else seen("canny", 1)], Released(), 0.8)
    ))


def test_pixelponders_in_a_row_add_up_and_other_replacements_of_blocks_still_run(flux):
    positive, _ = apply(flux, condition(flux, "canny", 0))
    positive, _ = apply(flux, condition(flux, "hed", 1), positive, strength=0.4)

    calls = []
    model = flux.model.clone()
    model.set_model_patch_replace(lambda args, extra: calls.append(1) or extra["original_block"](args), "dit",
                                  "single_block", 2)
    both = draw(flux, positive, model=model)
    assert len(calls) == STEPS

    latest = {}

    def remember(module, args, kwargs):
        latest.update(args=args, kwargs=kwargs)

    def add(residuals, selection):
        kwargs = {**latest["kwargs"], "select": Released().begin(flux.ponder.conditions([seen("hed", 1)]))}
        more = flux.ponder.forward(*latest["args"], **kwargs).residuals(0.4)
        return Residuals(*([a + b for a, b in zip(*parts, strict=True)] for parts in
                           ((residuals.double, more.double), (residuals.single, more.single))))

    hook = flux.ponder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        close(both, expected(flux, lambda sigma: ([seen("canny", 0)], Released(), 0.8), change=add))
    finally:
        hook.remove()


def core_controlnet(flux):
    """An XLabs ControlNet out of core's own loader."""
    path = flux.host.models / "controlnet" / "xlabs_for_core.safetensors"
    if not path.exists():
        write_file(path, xlabs())
    return flux.core.ControlNetLoader().load_controlnet(path.name)[0]


def by_core(flux, positive, negative=None):
    apply_core = flux.core.ControlNetApplyAdvanced().apply_controlnet
    return apply_core(positive, negative or text(4, 1), core_controlnet(flux), hint(9), 0.7, 0.0, 1.0)


def test_a_controlnet_of_cores_adds_up_with_ours_whichever_comes_first(flux):
    first = by_core(flux, *apply(flux, condition(flux), text(6), text(6, 1)))
    second = apply(flux, condition(flux), *by_core(flux, text(6), text(6, 1)))
    cores = core_controlnet(flux).control_model

    def add(residuals, selection):
        img, t, context, pooled, guidance = flux.latest
        theirs = cores(unpack(img, *SIZE), t, context, pooled, guidance, hint(9).movedim(-1, 1))["input"]
        blocks = len(flux.alone.double_blocks)
        ours = [residuals.double[residual_index(i, blocks, len(residuals.double))] for i in range(blocks)]
        return Residuals(tuple(a + 0.7 * b for a, b in zip(ours, theirs, strict=False)), residuals.single)

    def remember(module, args, kwargs):
        flux.latest = args

    hook = flux.ponder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        reference = expected(flux, lambda sigma: ([seen("canny", 0)], Released(), 0.8), cfg=2.0, change=add,
                             prompts=(text(6), text(6, 1)))
    finally:
        hook.remove()
    close(draw(flux, *first, cfg=2.0), reference)
    close(draw(flux, *second, cfg=2.0), reference)
    differ(reference, draw(flux, *apply(flux, condition(flux), text(6), text(6, 1)), cfg=2.0))


def test_nothing_of_pixelponder_stays_in_the_model(flux):
    plain = draw(flux, text(6))
    differ(draw(flux, apply(flux, condition(flux))[0]), plain)
    assert torch.equal(draw(flux, text(6)), plain)
    assert not flux.model.model_options["transformer_options"].get("patches_replace")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_core_samplers_work(flux, sampler):
    picture = draw(flux, *apply(flux, several(flux, "canny", "depth")), sampler=sampler, cfg=2.0)
    assert picture.isfinite().all() and picture.std() > 0.05


def test_an_fp8_flux_and_an_fp8_controlnet_give_nearly_the_same_picture(flux):
    small = apply(flux, condition(flux), control=load(flux, dtype="fp8_e4m3fn"))[0]
    exact, rough = draw(flux, apply(flux, condition(flux))[0]), draw(flux, small, model=flux.small)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.97


def test_a_lora_on_flux_changes_the_picture_and_not_the_guidance(flux):
    key = "diffusion_model.single_blocks.1.linear2.weight"
    patched = flux.model.clone()
    patched.add_patches({key: (torch.full(flux.alone.single_blocks[1].linear2.weight.shape, 0.01),)}, 1.0)
    positive, _ = apply(flux, condition(flux))
    ours = draw(flux, positive, model=patched)
    weight = flux.alone.single_blocks[1].linear2.weight
    with torch.no_grad():
        weight += 0.01
        try:
            close(ours, expected(flux, lambda sigma: ([seen("canny", 0)], Released(), 0.8)))
        finally:
            weight -= 0.01


def test_a_latent_with_odd_sides_is_guided_too(flux):
    picture = draw(flux, apply(flux, condition(flux))[0], noise=noise_of(1, (7, 9)))
    assert picture.shape[-2:] == (7, 9) and picture.isfinite().all()


def test_the_workflows_schedule_is_the_releases(flux):
    (model,) = flux.nodes["ModelSamplingFlux"]().patch(flux.model, 0.46, 0.46, 512, 512)
    shifted = flux.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 25)
    torch.testing.assert_close(shifted, torch.tensor(schedule(25)), atol=1e-3, rtol=0)


def test_the_hint_encoders_run_once_for_all_steps(flux):
    calls = []
    stem = flux.control.net_patcher.model.input_hint_block_share
    hook = stem.register_forward_hook(lambda *_: calls.append(1))
    try:
        draw(flux, *apply(flux, several(flux, "canny", "depth", "canny")), cfg=2.0)
    finally:
        hook.remove()
    assert len(calls) == 3


def test_comfyui_loads_and_unloads_the_controlnet_like_any_model(flux):
    positive, _ = apply(flux, condition(flux))
    chained = positive[0][1]["control"]
    assert chained.get_models() == [flux.control.net_patcher]
    draw(flux, positive)
    loaded = import_module("comfy.model_management").current_loaded_models
    assert any(model.model is flux.control.net_patcher for model in loaded)


@dynamic_vram.inapplicable("weights are offloaded one by one, which PIXSTACK_DYNAMIC_VRAM=none has of all of them")
def test_weights_that_stay_offloaded_give_the_same_picture(flux, monkeypatch):
    control = load(flux)
    patcher, whole = control.net_patcher, control.net_patcher.load
    monkeypatch.setattr(patcher, "load", lambda device_to=None, **_: whole(device_to, lowvram_model_memory=1))
    row = several(flux, "canny", "depth")
    ours = draw(flux, apply(flux, row, control=control, strategy="accumulate")[0])
    assert patcher.model.model_lowvram and patcher.model.double_blocks[0].img_mlp[0].comfy_cast_weights
    close(ours, draw(flux, apply(flux, row, strategy="accumulate")[0]))


def test_a_network_in_torch_compiles_wrapper_is_recognised(flux):
    model = flux.model.clone()
    model.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    ready = apply(flux, condition(flux))[0][0][1]["control"]
    model.patch_model(load_weights=False)
    try:
        ready.pre_run(model.model, lambda percent: percent)
        assert ready._base is flux.model.model.diffusion_model._orig_mod
    finally:
        model.unpatch_model(unpatch_weights=False)


# --- Which condition wins


def test_the_highest_priority_is_the_primary_condition_and_equal_ones_stay_in_order(flux):
    row = condition(flux, "hed", 2, several(flux, "canny", "depth"), priority=3)
    ready = apply(flux, row)[0][0][1]["control"]
    assert [c.kind for c in ready.conditions] == ["hed", "canny", "depth"]
    close(draw(flux, apply(flux, row)[0]), expected(flux, lambda sigma: ([seen("hed", 2)], Released(), 0.8)))


@pytest.mark.parametrize("rounds", [1, 3])
def test_accumulate_runs_the_trained_selector(flux, rounds):
    kinds = ("canny", "depth", "canny")
    hints = [seen(kind, seed) for seed, kind in enumerate(kinds)]
    positive, _ = apply(flux, several(flux, *kinds), strategy="accumulate", rounds=rounds)
    shares = []

    def change(residuals, selection):
        shares.append(selection.share)
        return residuals

    ours = draw(flux, positive)
    # Where two conditions score nearly alike, the shares multiply rounding by about a hundred: apart by 1e-6 with AVX2
    # and AVX-512, by 1.4e-4 without vector instructions. Other choices differ by more than 1e-3 (`differ`).
    reference = expected(flux, lambda sigma: (hints, Accumulate(flux.ponder.selector, rounds), 0.8), change=change)
    close(ours, reference, tolerance=1e-3)
    last = positive[0][1]["control"].shown.share
    assert torch.equal(last, shares[-1]) and (last.mean(dim=(2, 3)) > 0).sum() >= 2


def test_blend_mixes_by_strength_and_mask(flux):
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[:, 32:] = 0.5
    row = condition(flux, "depth", 1, condition(flux, "canny", 0), strength=2.0, mask=mask)
    weight = 2 * mask[:, ::8, ::8]
    plan = lambda sigma: ([seen("canny", 0), seen("depth", 1)], Blend([1.0, weight]), 0.8)  # noqa: E731
    positive, _ = apply(flux, row, strategy="blend")
    close(draw(flux, positive), expected(flux, plan))
    share = positive[0][1]["control"].shown.share
    assert share[0, 1, 0].eq(0).all() and share[0, 1, -1].eq(0.5).all()


def test_as_run_executes_the_released_network(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"), strategy="as run")
    assert draw(flux, positive).isfinite().all()
    share = positive[0][1]["control"].shown.share
    rows, columns = SIZE[0] // 2, SIZE[1] // 2
    assert share[0, 0].sum() >= (rows - 1) * columns  # only the last row's worth of patches may be another's


def test_a_single_negative_prompt_is_guided_and_shown(flux):
    negative = apply(flux, several(flux, "canny", "depth"), strategy="accumulate")[1]
    negative[0][1]["control"].node_id = "7"
    assert draw(flux, text(6), negative, steps=1, cfg=3.0).isfinite().all()
    assert negative[0][1]["control"].shown.share.sum() == SIZE[0] // 2 * (SIZE[1] // 2)


def test_a_second_pass_at_another_size_leaves_the_map_of_the_first(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"), strategy="accumulate")
    draw(flux, positive, steps=1)
    _, before = node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)
    draw(flux, positive, steps=1, noise=noise_of(size=(12, 16)))
    _, after = node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)
    assert all(map(torch.equal, before, after))


def test_the_map_of_an_odd_latent_is_as_large_as_its_picture(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"))
    picture, masks = node(flux, "Map", positive=positive, latent=latent((7, 9)), overlay=0.5)
    assert picture.shape[1] > 56 and picture.shape[2] == 72 and {m.shape for m in masks} == {(1, 56, 72)}


def test_a_blend_of_nothing_changes_nothing(flux):
    positive, _ = apply(flux, condition(flux, strength=0.0), strategy="blend")
    assert torch.equal(draw(flux, positive), draw(flux, text(6)))


def test_the_node_that_previews_the_map_ends_as_finished(graph_host):
    run = graph_host.run(graph("accumulate"))
    (*_, last) = [data["nodes"] for event, data in run.events if event == "progress_state"]
    assert run.error is None and {node["state"] for node in last.values()} == {"finished"}


@pytest.mark.parametrize("strategy", ["released", "as run", "accumulate"])
def test_a_painted_mask_makes_its_condition_win_there(flux, strategy):
    mask = torch.zeros(1, 64, 96)
    mask[:, 32:, :48] = 1
    row = condition(flux, "hed", 1, condition(flux, "canny", 0), mask=mask)
    positive, _ = apply(flux, row, strategy=strategy)
    draw(flux, positive, steps=1)
    share = positive[0][1]["control"].shown.share
    assert share[0, 1, 2:, :3].eq(1).all()
    if strategy == "released":
        assert share[0, 1].sum() == 6


# --- The map


def latent(size=SIZE):
    return {"samples": torch.zeros(1, 16, *size)}


def test_the_map_shows_hints_tinted_and_one_mask_for_each_condition(flux):
    mask = torch.zeros(1, 64, 96)
    mask[..., 48:] = 1
    row = condition(flux, "depth", 1, condition(flux, "canny", 0), mask=mask)
    positive, _ = apply(flux, row)
    picture, masks = node(flux, "Map", positive=positive, latent=latent(), overlay=0.0)
    expected_map = torch.cat((hint(0)[:, :, :48], hint(1)[:, :, 48:]), dim=2)
    assert torch.allclose(picture[:, :64], expected_map, atol=1e-6)
    assert picture.shape[1] > 64 + 2 * 10 and picture.shape[2:] == (96, 3)  # the legend has a line for each
    assert torch.equal(masks[1], mask) and torch.equal(masks[0], 1 - mask)
    coloured, _ = node(flux, "Map", positive=positive, latent=latent(), overlay=1.0)
    assert len(coloured[0, :64].reshape(-1, 3).unique(dim=0)) == 2


def test_the_map_of_released_is_the_same_before_and_after_sampling(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"))
    before = node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)[0]
    draw(flux, positive)
    assert torch.equal(node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)[0], before)


def test_a_map_that_depends_on_the_step_is_that_of_the_last_one_and_refused_before(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"), strategy="accumulate")
    with pytest.raises(ValueError, match="made while sampling.*96x64.*connect the LATENT"):
        node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)
    draw(flux, positive, noise=noise_of(2))
    picture, masks = node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)
    assert len(picture) == 2 and len(masks) == 2 and torch.equal(masks[0] + masks[1], torch.ones(2, 64, 96))


@pytest.mark.parametrize("strategy", ["released", "accumulate", "blend"])
def test_without_strength_no_condition_wins_a_patch(flux, strategy):
    positive, _ = apply(flux, several(flux, "canny", "depth"), strategy=strategy, strength=0.0)
    draw(flux, positive)
    picture, masks = node(flux, "Map", positive=positive, latent=latent(), overlay=0.5)
    assert not picture[:, :64].any() and not torch.stack(masks).any()


@pytest.mark.parametrize("length", [6, 4])
def test_the_map_is_that_of_the_positive_prompt_in_one_batch_with_the_negative_or_after_it(flux, length):
    row = several(flux, "canny", "depth")
    alone = apply(flux, row, strategy="accumulate")[0]
    draw(flux, alone, steps=1)
    both = apply(flux, row, text(6), text(length, 1), strategy="accumulate")
    draw(flux, *both, steps=1, cfg=3.0)
    assert torch.equal(both[0][0][1]["control"].shown.share, alone[0][1]["control"].shown.share)


def test_a_conditioning_without_pixelponder_has_no_map(flux):
    with pytest.raises(ValueError, match="has no PixelPonder"):
        node(flux, "Map", positive=text(3), latent=latent(), overlay=0.5)


def graph(strategy: str) -> dict:
    def of(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    return {
        "1": of("UNETLoader", unet_name=BASE, weight_dtype="default"),
        "2": of("PixStack_PixelPonderLoader", control_net_name=CONTROLNET, selection_network="keep", dtype="fp32"),
        "3": of("LoadImage", image="ponder.png"),
        "4": of("PixStack_PixelPonderCondition", image=["3", 0], kind="canny", strength=1.0, priority=0,
                start_percent=0.0, end_percent=1.0),
        "5": of("PixStack_PixelPonderCondition", image=["3", 0], kind="depth", strength=1.0, priority=0,
                start_percent=0.0, end_percent=1.0, conditions=["4", 0]),
        "6": of("TestText"),
        "7": of("PixStack_PixelPonderApply", positive=["6", 0], negative=["6", 0], control_net=["2", 0],
                conditions=["5", 0], strength=0.8, start_percent=0.0, end_percent=1.0, strategy=strategy, rounds=1),
        "8": of("EmptySD3LatentImage", width=96, height=64, batch_size=1),
        "9": of("KSampler", model=["1", 0], seed=1, steps=3, cfg=1.0, sampler_name="euler", scheduler="simple",
                positive=["7", 0], negative=["7", 1], latent_image=["8", 0], denoise=1.0),
        "10": of("PixStack_PixelPonderMap", positive=["7", 0], latent=["9", 0], overlay=0.5),
        "11": of("PreviewImage", images=["10", 0]),
        "12": of("MaskPreview", mask=["10", 1]),
    }  # fmt: skip


@pytest.fixture
def graph_host(flux, host, monkeypatch):
    """The host with a prompt that needs no encoder."""

    class TestText:
        RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def make(self):
            return (text(6),)

    monkeypatch.setitem(flux.nodes, "TestText", TestText)
    from PIL import Image

    Image.new("RGB", (96, 64), (90, 20, 200)).save(host.input / "ponder.png")
    return host


@pytest.mark.parametrize("strategy, previews", [("accumulate", 3), ("released", 0)])
def test_a_whole_graph_shows_the_map_live_where_the_strategy_depends_on_the_step(graph_host, strategy, previews):
    run = graph_host.run(graph(strategy))
    assert not run.errors
    assert sum(node_id == "7" for node_id, _ in run.previews) == previews
    assert len(run.outputs["11"]["images"]) == 1 and len(run.outputs["12"]["images"]) == 2


def test_a_second_run_with_another_seed_loads_nothing_again(graph_host, monkeypatch):
    prompt, loads = graph("accumulate"), []
    assert not graph_host.run(prompt).errors
    patcher = import_module("comfy.model_patcher").ModelPatcher
    whole = patcher.load
    monkeypatch.setattr(patcher, "load", lambda self, *a, **k: (loads.append(self), whole(self, *a, **k))[1])
    prompt["9"]["inputs"]["seed"] = 2
    second = graph_host.run(prompt, fresh=False)
    ran = {data["node"] for event, data in second.events if event == "executing"} - {None}
    assert ran == {"9", "10", "11", "12"} and not loads and not second.errors
    assert sum(node_id == "7" for node_id, _ in second.previews) == 3  # live, though that node itself did not run


def test_an_interrupt_stops_the_sampling_and_leaves_nothing_behind(graph_host):
    prompt, steps = graph("accumulate"), []
    prompt["9"]["inputs"].update(steps=50, seed=3)

    def stop(event, data):
        if event == "progress" and data["node"] == "9":
            steps.append(data["value"])
            if len(steps) == 2:
                graph_host.interrupt()

    stopped = graph_host.run(prompt, on_event=stop)
    assert [error.message for error in stopped.errors] == ["interrupted"] and len(steps) < 5
    prompt["9"]["inputs"].update(steps=3)
    assert not graph_host.run(prompt).errors


# --- Hints


def test_a_hint_of_another_shape_is_cut_from_its_middle_and_that_is_said(flux, caplog):
    wide = hint(7, 64, 160)
    with caplog.at_level(logging.WARNING):
        ours = draw(flux, apply(flux, condition(flux, "canny", image=wide))[0])
    assert "hint of condition 1 (canny) is 160x64 pixels, the picture 96x64" in caplog.text and "40%" in caplog.text
    assert torch.equal(ours, draw(flux, apply(flux, condition(flux, "canny", image=wide[:, :, 32:128]))[0]))


def test_a_mask_of_another_shape_is_cut_likewise_and_that_is_said(flux, caplog):
    mask = torch.zeros(1, 64, 160)
    mask[..., 80:] = 1
    row = condition(flux, "depth", 1, condition(flux, "canny", 0), mask=mask)
    positive, _ = apply(flux, row)
    with caplog.at_level(logging.WARNING):
        draw(flux, positive, steps=1)
    assert "mask of condition 2 (depth) is 160x64 pixels, the picture 96x64" in caplog.text
    assert torch.equal(positive[0][1]["control"].shown.share[0, 1].sum(dim=0), torch.tensor([0.0, 0, 0, 4, 4, 4]))


def test_a_mask_without_paint_is_as_none(flux, caplog):
    row = condition(flux, "depth", 1, condition(flux, "canny", 0), mask=torch.zeros(1, 64, 64))
    with caplog.at_level(logging.WARNING):
        ours = draw(flux, apply(flux, row, text(512))[0], steps=1)
    assert "PixelPonder" not in caplog.text
    assert torch.equal(ours, draw(flux, apply(flux, several(flux, "canny", "depth"), text(512))[0], steps=1))


def test_a_hint_of_another_size_is_resized_without_a_word(flux, caplog):
    large = hint(7).repeat_interleave(2, 1).repeat_interleave(2, 2)
    with caplog.at_level(logging.WARNING):
        ours = draw(flux, apply(flux, condition(flux, "canny", image=large), text(512))[0], steps=1)
    assert "PixelPonder" not in caplog.text
    close(ours, draw(flux, apply(flux, condition(flux, "canny", 7), text(512))[0], steps=1), 5e-2)


def test_a_prompt_that_is_not_as_long_as_in_training_is_said(flux, caplog):
    with caplog.at_level(logging.WARNING):
        apply(flux, condition(flux), text(256))
    assert "trained with 512 text tokens, this prompt has 256" in caplog.text and "T5TokenizerOptions" in caplog.text


def test_keeping_a_selection_network_that_nobody_trained_is_said(flux, host, caplog):
    torch.manual_seed(0)
    config = PixelPonderConfig(TRUNK, select=PONDER.select)
    write_file(host.models / "controlnet" / "fresh_ponder.safetensors", PixelPonder(config).state_dict())
    with caplog.at_level(logging.WARNING):
        load(flux, "fresh_ponder.safetensors")
    assert "before any training" in caplog.text


# --- What is refused


def xlabs() -> dict:
    """An XLabs ControlNet for the tiny FLUX, in their keys: two double-stream blocks, and hints in pixels."""
    trunk = FluxTrunk(FluxConfig(hidden=128, heads=1, mlp_hidden=512, depth=2, single_depth=0))
    extra = nn.ModuleDict({
        "pos_embed_input": nn.Linear(64, 128),
        "input_hint_block": nn.Sequential(*(
            nn.Conv2d(3 if i == 0 else 16, 16, 3, 2 if i in (4, 8, 12) else 1, 1) if i % 2 == 0 else nn.SiLU()
            for i in range(15)
        )),
        "controlnet_blocks": nn.ModuleList(nn.Linear(128, 128) for _ in range(2)),
    })
    return {**state(trunk, 3), **state(extra, 4)}


def instantx() -> dict:
    keys = ("controlnet_x_embedder.weight", "controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight")
    return {key: torch.zeros(4, 4) for key in keys}


def pixart() -> dict:
    return {"controlnet.0.copied_block.scale_shift_table": torch.zeros(6, 4)}


@pytest.mark.parametrize("make, whose, loader", [
    (xlabs, "an XLabs ControlNet for FLUX", "core's 'Load ControlNet Model'"),
    (instantx, "a ControlNet for FLUX or Qwen-Image in diffusers' format", "core's 'Load ControlNet Model'"),
    (pixart, "a PixArt ControlNet", "'Load PixArt ControlNet'"),
])
def test_another_familys_controlnet_is_refused_by_name_and_what_loads_it_is_said(flux, host, make, whose, loader):
    name = f"{make.__name__}.safetensors"
    write_file(host.models / "controlnet" / name, make())
    with pytest.raises(ValueError, match=f"{name}: This is not a PixelPonder checkpoint. .*{whose}.*{loader}"):
        load(flux, name)


def test_core_refuses_pixelponders_file(flux):
    """It has most keys of an XLabs ControlNet, but core looks for those that it lacks."""
    with pytest.raises(RuntimeError, match="controlnet file is invalid"):
        flux.core.ControlNetLoader().load_controlnet(PLAIN)


def test_pixelponder_on_another_model_is_refused(flux, host):
    from weights import tiny_pixelflow

    tiny_pixelflow(host.models / "diffusion_models" / "flow_for_ponder.safetensors", num_stages=3)
    flow = flux.nodes["PixStack_PixelFlowLoader"].execute("flow_for_ponder.safetensors", "ema", "default").args[0]
    ready = apply(flux, condition(flux))[0][0][1]["control"]
    with pytest.raises(ValueError, match="cannot guide a PixelFlowModel"):
        ready.pre_run(flow.model, lambda percent: percent)


def test_pixelponder_on_a_flux_of_another_width_is_refused_with_both_widths(flux):
    ready = apply(flux, condition(flux))[0][0][1]["control"]
    other = SimpleNamespace(**{**vars(flux.model.model.diffusion_model.params), "hidden_size": 3072})
    base = flux.model.model.diffusion_model
    params, base.params = base.params, other
    try:
        with pytest.raises(ValueError, match="width 128, the model has 3072"):
            ready.pre_run(flux.model.model, lambda percent: percent)
    finally:
        base.params = params


def test_a_user_of_core_apply_node_is_sent_to_ours(flux):
    both = flux.core.ControlNetApplyAdvanced().apply_controlnet(text(3), text(3), flux.control, hint(), 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="has no conditions.*Apply PixelPonder"):
        draw(flux, *both)


def test_a_part_of_the_sampling_that_is_empty_is_refused_before_anything_runs(graph_host):
    prompt = graph("released")
    prompt["5"]["inputs"].update(start_percent=0.6, end_percent=0.4)
    prompt["7"]["inputs"].update(end_percent=1.2)
    message = " ".join(map(str, graph_host.check(prompt)))
    assert "start_percent=0.6 and end_percent=0.4 leave no part" in message
    assert "end_percent is 1.2, not in 0.0 to 1.0" in message


def test_another_control_net_is_refused(flux):
    with pytest.raises(ValueError, match="not one of 'Load PixelPonder'"):
        apply(flux, condition(flux), control=SimpleNamespace(get_control=None))


def test_no_condition_is_refused(flux):
    with pytest.raises(ValueError, match="at least one condition"):
        apply(flux, ())


def test_a_kind_that_the_checkpoint_does_not_know_is_refused(flux, host):
    config = PixelPonderConfig(TRUNK, types=("canny", "hed"))
    write_file(host.models / "controlnet" / "two.safetensors", state(PixelPonder(config), 0),
               checkpoint.metadata(config))
    with pytest.raises(ValueError, match="no hints of the kind 'depth'; it knows canny, hed"):
        apply(flux, condition(flux, "depth"), control=load(flux, "two.safetensors", "leave out"))


@pytest.mark.parametrize("strategy, words", [("as run", "was not kept"), ("accumulate", "the release has none")])
def test_a_strategy_whose_network_is_missing_is_refused(flux, strategy, words):
    with pytest.raises(ValueError, match=words):
        apply(flux, condition(flux), control=load(flux, PLAIN, "leave out"), strategy=strategy)


# --- The map in the browser


def shares(host, about: dict) -> torch.Tensor:
    """(B, S, K, rows, columns) of 255, from the tiles that the widget gets."""
    from pathlib import Path

    import numpy
    from PIL import Image

    files = [Path(host._folders.get_temp_directory(), folder, name) for name, folder in about["tiles"]]
    alpha = torch.from_numpy(numpy.stack([numpy.array(Image.open(file))[..., 3] for file in files]))
    rows, columns = about["rows"], about["columns"]
    B, height, width = alpha.shape
    return alpha.view(B, height // rows, rows, width // columns, columns).transpose(2, 3)


def test_the_map_of_every_step_reaches_the_browser_while_sampling_and_after(graph_host):
    import base64
    from io import BytesIO

    import numpy
    from PIL import Image

    prompt = graph("accumulate")
    prompt["8"]["inputs"]["batch_size"] = 2
    run = graph_host.run(prompt)
    live = [data for event, data in run.events if event == "pixstack.map"]
    (about,) = run.outputs["10"]["pixstack_map"]
    assert [(data["node"], data["step"], data["steps"]) for data in live] == [("7", n, 3) for n in (1, 2, 3)]
    assert (about["steps"], about["total"], about["names"]) == ([1, 2, 3], 3, ["1 canny", "2 depth"])
    assert [len(pictures) for pictures in about["hints"]] == [1, 1]
    share = shares(graph_host, about)
    assert share.shape == (2, 3, 2, SIZE[0] // 2, SIZE[1] // 2) and share.sum(dim=2).eq(255).all()
    for step, data in enumerate(live):
        picture = Image.open(BytesIO(base64.b64decode(data["tiles"].partition(",")[2])))
        tiles = torch.from_numpy(numpy.array(picture)[..., 1]).view(SIZE[0] // 2, 2, SIZE[1] // 2).transpose(0, 1)
        assert torch.equal(tiles, share[0, step])


def test_a_map_that_no_step_changes_is_sent_once_for_each_set_of_conditions_that_takes_part(flux):
    row = condition(flux, "canny", 1, condition(flux, "depth", 0, end_percent=0.01), start_percent=0.01)
    positive, _ = apply(flux, row)
    draw(flux, positive)
    control = positive[0][1]["control"]
    steps = control.shown.steps[SIZE]
    assert list(steps) == [1, 2] and control.shown.total[SIZE] == STEPS
    assert steps[1][0, 0].eq(255).all() and steps[2][0, 1].eq(255).all()
    draw(flux, positive)
    assert list(control.shown.steps[SIZE]) == [1, 2], "another sampling begins anew"


def test_a_map_before_sampling_has_no_step(flux):
    positive, _ = apply(flux, several(flux, "canny", "depth"))
    execute = flux.nodes["PixStack_PixelPonderMap"].execute
    (about,) = execute(positive=positive, latent=latent(), overlay=0.5).ui["pixstack_map"]
    assert (about["steps"], about["total"]) == ([0], 0)
    assert shares(flux.host, about)[0, 0, 0].eq(255).all()
