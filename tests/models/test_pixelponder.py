"""PixelPonder and the FLUX under it, without a host: files, networks, selection of patches."""
import math
from dataclasses import replace

import pytest
import torch
from pixstack.kernels.attention import attention
from pixstack.models_impl import state_dict
from pixstack.models_impl.flux import checkpoint as flux_checkpoint
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import (
    Flux,
    Residuals,
    pack,
    positions,
    residual_index,
    rope_table,
    unpack,
)
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.pixelponder import checkpoint
from pixstack.models_impl.pixelponder import sampling as released_sampling
from pixstack.models_impl.pixelponder.accumulate import Accumulate, Selector
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.pixelponder.patch_select import Blend, Conditions, Released, SelectionInputs, forced_map
from pixstack.models_impl.pixelponder.select_net import AsRun, SelectNet, pick

FLOW = RectifiedFlow()
BASE = FluxConfig(hidden=16, heads=2, axes=(2, 2, 4), mlp_hidden=32, depth=3, single_depth=5, pooled_dim=6,
                  context_dim=10)
TRUNK = replace(BASE, depth=2, single_depth=4)
SELECT = SelectConfig(hidden=16, heads=2, mlp_hidden=24)
CONTROL = PixelPonderConfig(TRUNK, select=SELECT)
STATED = {"trunk": {"axes": BASE.axes}}  # the one thing that is in no key or shape


def randomised(net, seed=0):
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():  # zeros and ones would hide mistakes
        torch.nn.init.normal_(parameter, mean=float(name.endswith("scale")), std=0.2)
    return net.eval()


def inputs(rows=3, columns=4, B=2, L=5, config=BASE):
    torch.manual_seed(1)
    N = rows * columns
    return dict(
        img=torch.randn(B, N, config.in_channels),
        timestep=torch.rand(B),
        context=torch.randn(B, L, config.context_dim),
        pooled=torch.randn(B, config.pooled_dim),
        guidance=torch.full((B,), 4.0),
        img_ids=positions(rows, columns),
    )


def hints(*kinds, rows=3, columns=4, B=2):
    torch.manual_seed(2)
    return [(kind, torch.rand(B, 3, 16 * rows, 16 * columns) * 2 - 1) for kind in kinds]


def conditions(K=3, rows=3, columns=4, B=2, dtype=torch.float32) -> Conditions:
    torch.manual_seed(3)
    return Conditions(torch.randn(B, K, 16, 2 * rows, 2 * columns, dtype=dtype), tuple(range(K)))


def guide(rows=3, columns=4, B=2, L=5, D=16, dtype=torch.float32) -> SelectionInputs:
    torch.manual_seed(4)
    ids = torch.cat((torch.zeros(L, 3), positions(rows, columns)))
    rope = rope_table(ids, BASE.axes)
    return SelectionInputs(torch.randn(B, L, D, dtype=dtype), torch.randn(B, D, dtype=dtype), rope, attention)


def patches_of(picture):
    return pack(picture)  # (B, N, C*4): a patch of 2x2 cells is a token


# --- Configuration

def test_a_configuration_refuses_nonsense_with_both_numbers():
    with pytest.raises(ValueError, match=r"axes=\(16, 56, 56\) add up to 128, a head is 8"):
        FluxConfig(hidden=16, heads=2)
    with pytest.raises(ValueError, match="hidden=16, the selection network 32"):
        PixelPonderConfig(TRUNK, select=replace(SELECT, hidden=32))
    with pytest.raises(ValueError, match="width=20 is not a multiple of the head size 8"):
        PixelPonderConfig(TRUNK, selector=SelectorConfig(width=20))


def test_a_configuration_reads_diffusers_config_json():
    entries = {"_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
               "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
               "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}
    assert FluxConfig.from_dict(entries) == FluxConfig()


def test_a_configuration_comes_back_from_its_own_dictionary():
    config = PixelPonderConfig(TRUNK, types=("a", "b"), select=replace(SELECT, types=2), selector=SelectorConfig(24))
    assert PixelPonderConfig.from_dict(config.as_dict()) == config


def test_a_configuration_names_an_unknown_entry():
    with pytest.raises(ValueError, match="'hiden_size'"):
        PixelPonderConfig.entries_of({"hiden_size": 3072})


# --- Files

def test_our_own_file_says_everything_about_itself(tmp_path):
    config = PixelPonderConfig(replace(TRUNK, theta=500), types=("x", "y"), selector=SelectorConfig(24, depth=2))
    weights = PixelPonder(config).state_dict()
    state_dict.write_file(tmp_path / "a.safetensors", weights, checkpoint.metadata(config))
    found, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.safetensors"), unused=True)
    assert found == config
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_the_released_kind_of_file_opens_without_the_weights_that_do_nothing(tmp_path):
    torch.save(PixelPonder(CONTROL).state_dict(), tmp_path / "pixelponder-fp32.bin")
    config, weights = checkpoint.read(*state_dict.read_file(tmp_path / "pixelponder-fp32.bin"), config=STATED)
    assert config == PixelPonderConfig(replace(TRUNK, single_depth=2))
    assert not any(key.startswith(("select_net.", "single_blocks.2.", "single_blocks.3.")) for key in weights)
    state_dict.load_into(PixelPonder(config), weights, "PixelPonder")


def test_a_file_saved_without_its_selection_network_still_opens_for_other_selections():
    config, weights = checkpoint.read(PixelPonder(CONTROL).state_dict(), config=STATED)
    again, kept = checkpoint.read(weights, checkpoint.metadata(config))
    assert again == config and kept.keys() == weights.keys()
    with pytest.raises(ValueError, match="saved without its selection network"):
        checkpoint.read(weights, checkpoint.metadata(config), select_net=True)


@pytest.mark.parametrize("keys, what", [
    (("controlnet_blocks.0.weight", "input_hint_block.0.weight", "pos_embed_input.weight",
      "double_blocks.0.img_attn.norm.query_norm.scale"), "XLabs"),
    (("controlnet_x_embedder.weight", "controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"),
     "diffusers"),
    (("double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"), "FLUX"),
    (("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",), "LoRA"),
    (("blocks.0.scale_shift_table",), "PixArt"),
])
def test_another_file_is_refused_by_name(keys, what):
    with pytest.raises(ValueError, match=f"not a PixelPonder checkpoint.*{what}"):
        checkpoint.read({key: torch.zeros(1, 1) for key in keys})


def test_a_controlnet_is_refused_as_a_base():
    with pytest.raises(ValueError, match="not a FLUX checkpoint. The keys are those of PixelPonder"):
        flux_checkpoint.read(PixelPonder(CONTROL).state_dict())


def test_a_flux_that_wants_a_second_picture_is_refused():
    weights = {**Flux(BASE).state_dict(), "img_in.weight": torch.zeros(16, 384)}
    with pytest.raises(ValueError, match="384 values and gives 64"):
        flux_checkpoint.read(weights, config={"axes": BASE.axes})


def test_a_file_that_lacks_what_its_shape_is_read_from_is_named_as_incomplete():
    weights = PixelPonder(CONTROL).state_dict()
    del weights["txt_in.weight"]
    with pytest.raises(ValueError, match="incomplete: it has no txt_in.weight"):
        checkpoint.read(weights, config=STATED)


def test_what_the_keys_do_not_say_is_asked_for():
    with pytest.raises(ValueError, match="heads of this checkpoint are 8 wide.*axes_dim"):
        checkpoint.read(PixelPonder(CONTROL).state_dict())
    three = PixelPonderConfig(TRUNK, types=("a", "b", "c"))
    with pytest.raises(ValueError, match="3 hint encoders.*type2id"):
        checkpoint.read(PixelPonder(three).state_dict(), config=STATED)


def test_a_configuration_that_contradicts_the_weights_is_refused():
    with pytest.raises(ValueError, match="depth=3, the weights say 2"):
        checkpoint.read(PixelPonder(CONTROL).state_dict(), config={"controlnet_depth": 3, "axes_dim": [2, 2, 4]})


def test_a_selection_network_that_was_never_trained_is_recognised():
    weights = PixelPonder(CONTROL).state_dict()
    assert checkpoint.select_net_is_untrained(weights)
    trained = {**weights, "select_net.pos_embed_input.weight": weights["select_net.pos_embed_input.weight"] * 1.5}
    assert not checkpoint.select_net_is_untrained(trained)


def test_diffusers_weights_give_diffusers_prediction():
    diffusers = pytest.importorskip("diffusers")
    theirs = randomised(diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ))  # fmt: skip
    config, weights = flux_checkpoint.read(theirs.state_dict(), config=dict(theirs.config))
    ours = Flux(config).eval()
    state_dict.load_into(ours, weights, "FLUX")
    i = inputs()
    with torch.no_grad():
        expected = theirs(i["img"], i["context"], i["pooled"], i["timestep"], i["img_ids"], torch.zeros(5, 3),
                          i["guidance"], return_dict=False)[0]
        torch.testing.assert_close(ours(**i), expected, rtol=1e-4, atol=1e-5)


# --- FLUX

def test_tokens_come_back_as_the_latent():
    x = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack(pack(x), 6, 10), x)
    with pytest.raises(ValueError, match="7x10 cells"):
        pack(torch.zeros(1, 16, 7, 10))


@pytest.mark.parametrize("blocks, residuals, expected", [
    (19, 2, [0] * 10 + [1] * 9), (38, 2, [0] * 19 + [1] * 19), (5, 3, [0, 0, 1, 1, 2]),
])
def test_neighbouring_blocks_share_a_residual(blocks, residuals, expected):
    assert [residual_index(i, blocks, residuals) for i in range(blocks)] == expected


def test_zero_residuals_change_nothing():
    base, i = randomised(Flux(BASE)), inputs()
    nothing = Residuals((torch.zeros(2, 12, 16),) * 2, (torch.zeros(2, 17, 16),) * 2)
    assert torch.equal(base(**i, residuals=nothing), base(**i))


def test_missing_guidance_is_named():
    with pytest.raises(ValueError, match="distilled with guidance"):
        Flux(BASE)(**{**inputs(), "guidance": None})


def test_text_of_another_encoder_is_refused_with_both_widths():
    with pytest.raises(ValueError, match="text tokens are 11 wide.*10"):
        Flux(BASE)(**{**inputs(), "context": torch.zeros(2, 5, 11)})


def test_euler_steps_are_exact_on_a_straight_flow():
    latent, noise = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    end = FLOW.sample(lambda x, sigma: FLOW.target(latent, noise, sigma), noise, released_sampling.schedule(3))
    torch.testing.assert_close(end, latent)


def test_the_clean_latent_is_estimated_from_noise_and_velocity():
    latent, noise, sigma = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.tensor([0.2, 0.9])
    noisy = FLOW.add_noise(latent, noise, sigma)
    torch.testing.assert_close(FLOW.denoised(noisy, FLOW.target(latent, noise, sigma), sigma), latent)


def test_the_released_schedule_shifts_as_for_sixteen_tokens():
    mu = 0.5 + (16 - 256) * 0.65 / (4096 - 256)
    expected = math.exp(mu) / (math.exp(mu) + 1 / 0.5 - 1)
    assert released_sampling.schedule(2) == pytest.approx([1, expected, 0])


def test_sigmas_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="must fall"):
        FLOW.sample(lambda x, t: x, torch.zeros(1, 1, 1), [1.0, 1.0])


# --- The ControlNet

def run(net, i, select):
    with torch.no_grad():
        return net(**i, select=select)


def test_blocks_that_never_reach_flux_may_be_left_out():
    whole = randomised(PixelPonder(CONTROL))
    config, weights = checkpoint.read(whole.state_dict(), config=STATED)
    pruned = PixelPonder(config).eval()
    state_dict.load_into(pruned, weights, "PixelPonder")
    select = Released().begin(whole.conditions(hints("canny", "hed")))
    both = [run(net, inputs(), select).residuals(0.8) for net in (whole, pruned)]
    assert len(both[0].single) == 2
    for a, b in zip(both[0].double + both[0].single, both[1].double + both[1].single, strict=True):
        assert torch.equal(a, b)


def test_residuals_reach_the_text():
    net, base, i = randomised(PixelPonder(CONTROL)), randomised(Flux(BASE), 1), inputs()
    given = run(net, i, Released().begin(net.conditions(hints("hed")))).residuals(0.8)
    image_only = Residuals(given.double, tuple(r * (torch.arange(17) >= 5)[:, None] for r in given.single))
    with torch.no_grad():
        assert (base(**i, residuals=given) - base(**i, residuals=image_only)).abs().max() > 1e-3


def test_hints_of_another_size_than_the_picture_are_refused():
    net = PixelPonder(CONTROL)
    select = Released().begin(net.conditions(hints("canny", rows=4)))
    with pytest.raises(ValueError, match="64x64 pixels, which makes 16 tokens, but the picture has 12"):
        run(net, inputs(), select)


def test_an_unknown_kind_of_hint_is_refused_by_name():
    with pytest.raises(ValueError, match="'scribble'.*canny, openpose, depth, hed"):
        PixelPonder(CONTROL).conditions(hints("scribble"))


def test_one_hint_serves_a_whole_batch():
    net, i = randomised(PixelPonder(CONTROL)), inputs()
    single = [(kind, image[:1]) for kind, image in hints("canny", "depth")]
    repeated = [(kind, image.repeat(2, 1, 1, 1)) for kind, image in single]
    for strategy in (Released(), Blend((1, 2)), AsRun(scores=torch.randn(3, 2, 12, 2))):
        a, b = (run(net, i, strategy.begin(net.conditions(h))).double[1] for h in (single, repeated))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_training_starts_from_the_blocks_of_its_base():
    base = randomised(Flux(BASE)).state_dict()
    net = PixelPonder(CONTROL).initialise(base)
    assert torch.equal(net.double_blocks[1].img_mlp[0].weight, base["double_blocks.1.img_mlp.0.weight"])
    assert net.conditions(hints("canny")).embeds.abs().max() == 0
    with pytest.raises(ValueError, match="cannot be the base of the ControlNet"):
        PixelPonder(CONTROL).initialise(Flux(replace(BASE, hidden=32, heads=4)).state_dict())


def test_a_fresh_selector_prefers_no_kind_of_hint():
    config = replace(CONTROL, selector=SelectorConfig(24))
    torch.manual_seed(0)
    net = PixelPonder(config).initialise(randomised(Flux(BASE)).state_dict())
    picture = hints("canny")[0][1]
    ready = net.conditions([("canny", picture), ("depth", picture), ("hed", picture)])
    embedded = net.selector.embed(torch.ones(1, 3, 2, 64), ready.types)
    assert torch.allclose(embedded[:, 0], embedded[:, 2])


def test_checkpointed_activations_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        net, base = randomised(PixelPonder(CONTROL)), randomised(Flux(BASE), 1).requires_grad_(False)
        net.gradient_checkpointing = base.gradient_checkpointing = checkpointing
        control = net(**inputs(), select=Released().begin(net.conditions(hints("canny"))))
        base(**inputs(), residuals=control.residuals()).square().mean().backward()
        grads.append(net.double_blocks[0].img_mlp[0].weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("make", [
    lambda net: Released(), lambda net: AsRun(net.select_net), lambda net: Blend((1, 2)),
    lambda net: Accumulate(net.selector, 2),
])
def test_a_selection_runs_in_bfloat16(make):
    config = replace(CONTROL, selector=SelectorConfig(24))
    net = randomised(PixelPonder(config)).bfloat16()
    i = {k: v if "ids" in k else v.bfloat16() for k, v in inputs().items()}
    select = make(net).begin(net.conditions([(kind, image.bfloat16()) for kind, image in hints("canny", "hed")]))
    assert run(net, i, select).single[1].dtype == torch.bfloat16


# --- Selection

def test_the_released_rule_is_the_primary_condition():
    given = conditions()
    selection = Released().begin(given)(None)
    assert torch.equal(selection.map, given.embeds[:, 0])
    assert selection.winner.eq(0).all() and selection.winner.shape == (1, 3, 4)


def test_a_losing_condition_leaks_nothing():
    given = conditions()
    broken = given.embeds.clone()
    broken[:, 1:] = float("nan")
    assert torch.equal(Released().begin(Conditions(broken, given.types))(None).map, given.embeds[:, 0])


def test_running_the_network_gives_the_first_condition_but_for_its_last_patches():
    given, net = conditions(), randomised(SelectNet(SELECT))
    with torch.no_grad():
        selection = AsRun(net).begin(given)(guide())
    found, first = patches_of(selection.map), patches_of(given.embeds[:, 0])
    others = (found != first).any(dim=-1)
    assert others.sum(dim=1).tolist() == [4, 4]  # a row of the picture in every round
    winner = selection.winner.flatten(1)
    assert winner[~others].eq(0).all()
    for b, n in others.nonzero().tolist():
        assert torch.equal(found[b, n], 2 * patches_of(given.embeds[:, winner[b, n]])[b, n])


def test_a_single_condition_passes_unchanged():
    given = conditions(K=1)
    assert torch.equal(AsRun(SelectNet(SELECT)).begin(given)(guide()).map, given.embeds[:, 0])


def plain_features(net, picture, text_and_guide, block):
    """One pass of the released selection without any caching: picture (B, C, H, W) -> (B, N, positions * C)"""
    g, L = text_and_guide, text_and_guide.txt.shape[1]
    x = block(net.pos_embed_input(pack(picture)), block.text(g.txt, g.vec, g.rope[:, :, :L]), g.vec, g.rope[:, :, L:],
              g.attention)
    x = net.pos_embed_output(x).unflatten(-1, (-1, 4)).transpose(-1, -2)  # (B, N, positions, C)
    return ((x - x.mean(-2, keepdim=True)) / (x.std(-2, keepdim=True) + 1e-6)).flatten(2)


@torch.no_grad()
def test_cached_rounds_see_what_uncached_ones_see():
    given, g, net = conditions(dtype=torch.float64), guide(dtype=torch.float64), randomised(SelectNet(SELECT)).double()
    B, K, _, H, W = given.embeds.shape
    step, last = net.step(net.tokens(given), g), None
    free = torch.ones(B, 12, dtype=torch.bool)
    left = [embed.clone() for embed in given.embeds.unbind(1)]
    shown = torch.zeros_like(left[0])
    for _ in range(4):
        combined = plain_features(net, shown, g, net.combine_attn_block[0])
        plain = torch.stack([plain_features(net, picture, g, net.attn_block[k]) + combined
                             for k, picture in enumerate(left)], dim=2)
        where = free.nonzero()[:, 1].view(B, -1)
        cached = net.features(step, where, last)
        torch.testing.assert_close(cached, plain[free].view(B, -1, *plain.shape[2:]))
        last = pick(torch.randn(B, 12, K, dtype=torch.float64), free, 3)
        free = free.scatter(1, last.top, False)
        shown = AsRun(net).result(given, last).map
        taken = torch.zeros(B, 12, dtype=torch.bool).scatter(1, last.top, True)[..., None]
        left = [unpack(pack(picture).masked_fill(taken, 0), H, W) for picture in left]


def test_taken_patches_are_not_picked_again():
    strategy, given = AsRun(scores=torch.randn(6, 2, 12, 3)), conditions()
    strategy.select_num = 2
    picked = torch.cat([r.top for r in strategy.rounds(given)], dim=1)
    assert picked.sort(dim=1).values.tolist() == [list(range(12))] * 2


def test_a_number_of_patches_that_does_not_divide_the_picture_is_refused():
    with pytest.raises(ValueError, match="12 patches .* 5 at a time"):
        AsRun(SelectNet(replace(SELECT, select_num=5))).begin(conditions())(guide())


# --- The accumulating selection

def selector(width=16, seed=5) -> Selector:
    return randomised(Selector(PixelPonderConfig(TRUNK, selector=SelectorConfig(width))), seed)


@pytest.mark.parametrize("rounds", [1, 3, 5, 12, 20])
@torch.no_grad()
def test_every_patch_is_one_whole_condition(rounds):
    given = conditions()
    selection = Accumulate(selector(), rounds).begin(given)(guide())
    assert selection.share.sum(dim=1).eq(1).all() and selection.share.max(dim=1).values.eq(1).all()
    winner = selection.winner.flatten(1)
    whole = torch.stack([patches_of(e) for e in given.embeds.unbind(1)], dim=1)  # (B, K, N, C*4)
    expected = whole.gather(1, winner[:, None, :, None].expand(-1, 1, -1, 64))[:, 0]
    assert torch.equal(patches_of(selection.map), expected)
    assert winner.unique().numel() > 1


@torch.no_grad()
def test_a_patch_once_chosen_stays():
    net, seen = selector(), []
    forward = net.forward
    net.forward = lambda x, so_far, taken, step: seen.append((so_far, taken)) or forward(x, so_far, taken, step)
    final = patches_of(Accumulate(net, 5).begin(conditions())(guide()).map)
    assert [taken.sum(dim=1).tolist() for _, taken in seen] == [[n, n] for n in (0, 3, 5, 8, 10)]
    for so_far, taken in seen:
        assert torch.equal(so_far[taken], final[taken]) and so_far[~taken].eq(0).all()


@pytest.mark.parametrize("rounds", [1, 4])
@torch.no_grad()
def test_the_order_of_the_conditions_does_not_matter(rounds):
    given, net = conditions(), selector()
    order = [2, 0, 1]
    turned = Conditions(given.embeds[:, order], tuple(given.types[k] for k in order))
    a, b = (Accumulate(net, rounds).begin(c)(guide()) for c in (given, turned))
    torch.testing.assert_close(a.map, b.map)
    assert torch.equal(a.winner, torch.tensor(order)[b.winner])


def test_the_selection_learns_through_the_frozen_base():
    net = randomised(PixelPonder(PixelPonderConfig(TRUNK, selector=SelectorConfig(16))))
    base = randomised(Flux(BASE), 1).requires_grad_(False)
    control = net(**inputs(), select=Accumulate(net.selector, 3).begin(net.conditions(hints("canny", "hed", "hed"))))
    base(**inputs(), residuals=control.residuals()).square().mean().backward()
    unused = {"blocks.0.txt_attn.proj", "blocks.0.txt_attn.norm.query_norm"}
    still = [name for name, p in net.selector.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert {name.rpartition(".")[0] for name in still} <= unused
    assert net.input_hint_block_list_moe[3][0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_selector_finds_the_informative_condition(rounds):
    torch.manual_seed(0)
    net, rng = Selector(PixelPonderConfig(TRUNK, selector=SelectorConfig(16))), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    strategy, g = Accumulate(net, rounds), guide(4, 4, B=16)
    for _ in range(60):
        flat = torch.rand(16, 16, 1, 1, generator=rng).expand(-1, -1, 8, 8)  # noise differs from a plain picture
        noise = torch.randn(2, 16, 16, 8, 8, generator=rng)
        left = (torch.arange(8) < 4).expand(16, 16, 8, 8)
        pair = torch.stack((torch.where(left, flat, noise[0]), torch.where(left, noise[1], flat)), dim=1)
        turned = torch.rand(16, generator=rng) < 0.5  # position in the list says nothing
        pair = torch.where(turned.view(-1, 1, 1, 1, 1), pair.flip(1), pair)
        selection = strategy.begin(Conditions(pair, (0, 0)))(g)
        (selection.map - flat).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    best = (torch.arange(4) >= 2).long().expand(16, 4, 4) ^ turned.long().view(-1, 1, 1)
    assert (selection.winner == best).float().mean() > 0.97


# --- Masks

STRATEGIES = {
    "released": lambda: Released(),
    "as_run": lambda: AsRun(randomised(SelectNet(SELECT))),
    "accumulate": lambda: Accumulate(selector(), 3),
    "blend": lambda: Blend((1, 1, 1)),
}


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_a_painted_mask_forces_its_condition_to_win(name):
    given, forced = conditions(), torch.full((1, 3, 4), -1)
    forced[0, :2, 1:3] = 2
    selection = STRATEGIES[name]().begin(given, forced)(guide())
    assert selection.winner[:, :2, 1:3].eq(2).all()
    assert torch.equal(selection.map[..., :4, 2:6], given.embeds[:, 2, :, :4, 2:6])


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_any_number_of_conditions_of_any_size_may_take_part(name):
    for K, rows, columns in ((1, 1, 1), (2, 5, 3), (7, 2, 9)):
        given = conditions(K, rows, columns, B=1)
        given = Conditions(given.embeds, tuple(k % 4 for k in given.types))  # kinds repeat
        strategy = Blend([1] * K) if name == "blend" else STRATEGIES[name]()
        selection = strategy.begin(given)(guide(rows, columns, B=1))
        assert selection.map.shape == (1, 16, 2 * rows, 2 * columns)
        assert selection.winner.shape == (1, rows, columns) and selection.winner.max() < K


def test_the_earlier_condition_wins_where_masks_overlap():
    everywhere, left = torch.ones(64, 64), torch.zeros(64, 64)
    left[:, :32] = 1
    forced = forced_map([None, left, everywhere], 2, 4)
    assert forced.tolist() == [[[1, 1, 2, 2]] * 2]
    assert forced_map([None, None], 2, 4) is None


def test_a_patch_needs_half_of_it_painted():
    mask = torch.zeros(1, 4, 8)
    mask[:, :, :3], mask[:, :1, 4:] = 1, 1  # the first patch three quarters, the second one quarter
    assert forced_map([mask], 1, 2).tolist() == [[[0, -1]]]


def test_a_forced_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 4\] patches, the picture \[3, 4\]"):
        Released().begin(conditions(), torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="names condition 3, there are 3"):
        Released().begin(conditions(), torch.full((1, 3, 4), 3))


# --- Blending

def test_blending_follows_the_proportion_of_the_weights():
    given = conditions()
    left = torch.zeros(48, 64)
    left[:, :32] = 6
    selection = Blend((left, 2.0, 0.0)).begin(given)(None)
    a, b, _ = given.embeds.unbind(1)
    torch.testing.assert_close(selection.map[..., :4], (0.75 * a + 0.25 * b)[..., :4])
    torch.testing.assert_close(selection.map[..., 4:], b[..., 4:])
    assert selection.winner[0].tolist() == [[0, 0, 1, 1]] * 3


def test_nothing_is_shown_where_all_weights_are_zero():
    mask = torch.zeros(6, 8)
    mask[:, :4] = 1
    selection = Blend((mask, mask)).begin(conditions(2))(None)
    assert selection.map[..., 4:].eq(0).all() and selection.winner[..., 2:].eq(-1).all()


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="weight of -1.0"):
        Blend((1, -1, 1)).begin(conditions())


def test_the_pick_of_a_round_follows_the_released_rule():
    score = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -2.0]]])
    picked = pick(score, torch.tensor([[True, True, True, False]]), 2)
    assert picked.winner.tolist() == [[0, 1, 0, 0]]  # a tie, and a patch that was taken: the first
    assert set(picked.top[0].tolist()) == {0, 1}
