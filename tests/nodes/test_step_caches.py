"""Core's EasyCache and LazyCache skip steps of our models and still leave the picture."""
from functools import cache
from importlib import import_module

import pytest
import torch
from test_nodes_ultrapixel import draw as draw_guided
from test_nodes_ultrapixel import guided, ultra  # noqa: F401

CACHES = ("EasyCache", "LazyCache")
LEAST = 20  # dB; 28 to 40 here, and 4 to 14 where the differences are of another size or noise level


@pytest.fixture(scope="module")
def nodes(host):
    import_module("comfy.sample")
    yield import_module("nodes").NODE_CLASS_MAPPINGS
    exactly.cache_clear()  # models are gone before ComfyUI is


@pytest.fixture(scope="module")
def prompts(nodes):
    """Positive and negative of the embedded models."""
    clip = nodes["PixStack_PixelFlowTextEncoderLoader"].execute(
        "pixelflow_emoji_t5.safetensors", "default", "default").args[0]
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("red heart", "")]


@pytest.fixture(scope="module")
def pixelflow(nodes, prompts):
    """The embedded PixelFlow and draw(model) -> (1, 3, 64, 64) in [0, 1]."""
    model = nodes["PixStack_PixelFlowLoader"].execute("pixelflow_emoji_64.safetensors", "ema", "default").args[0]
    sampler = nodes["PixStack_PixelFlowSampler"].execute("euler", "auto", "", False, "auto").args[0]

    def draw(model):
        sigmas = nodes["PixStack_PixelFlowSigmas"].execute(model, "10", "1", 0, -1).args[0]
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            pixels = import_module("comfy.sample").sample_custom(
                model, noise, 3.0, sampler, sigmas, *prompts, torch.zeros_like(noise), disable_pbar=True, seed=1)
        return pixels.clamp(-1, 1) / 2 + 0.5

    return model, draw


@pytest.fixture(scope="module")
def pixart(nodes, prompts):
    """The embedded PixArt and draw(model) -> pictures in [0, 1], drawn by a sampler of core's."""
    model = nodes["PixStack_PixArtLoader"].execute("pixart_emoji_128.safetensors", "auto", "auto", "auto", "ema",
                                                   "default").args[0]
    vae = nodes["VAELoader"]().load_vae("pixart_emoji_vae.safetensors")[0]
    shape = vae.encode(torch.zeros(1, 128, 128, 3)).shape[1:]

    def draw(model):
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            return vae.decode(import_module("comfy.sample").sample(
                model, noise, 20, 4.5, "euler", "normal", *prompts, torch.zeros_like(noise), seed=1,
                disable_pbar=True))

    return model, draw


def cached(nodes, name: str, model, threshold: float, start: float = 0.15, end: float = 0.95):
    return nodes[name].execute(model=model, reuse_threshold=threshold, start_percent=start, end_percent=end,
                               verbose=False).args[0]


def passes(layer, draw, model) -> tuple[torch.Tensor, int]:
    """A picture, and how often this layer of the network ran for it."""
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        return draw(model), len(calls)
    finally:
        handle.remove()


def psnr(a, b) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


@cache
def exactly(layer, draw, model) -> tuple[torch.Tensor, int]:
    """The same without a cache, drawn once."""
    return passes(layer, draw, model)


def check(nodes, name, model, layer, draw, **range_):
    exact, all_passes = exactly(layer, draw, model)
    shortened, some_passes = passes(layer, draw, cached(nodes, name, model, 0.2, **range_))
    again = draw(model)
    assert some_passes < 0.8 * all_passes
    assert psnr(shortened, exact) > LEAST
    assert torch.equal(again, exact), "a run with a cache leaves nothing behind"


@pytest.mark.parametrize("start", [0.15, 0.25])  # 0.25: the caches begin where a stage does
@pytest.mark.parametrize("name", CACHES)
def test_pixelflow_keeps_its_picture(nodes, pixelflow, name, start):
    model, draw = pixelflow
    check(nodes, name, model, model.model.diffusion_model.patch_embed, draw, start=start)


@pytest.mark.parametrize("name", CACHES)
def test_pixart_keeps_its_picture(nodes, pixart, name):
    model, draw = pixart
    check(nodes, name, model, model.model.diffusion_model.x_embedder, draw)


def test_lazycache_does_not_skip_the_step_whose_features_make_the_guide(ultra):  # noqa: F811
    model = guided(ultra)
    exact = draw_guided(ultra, model, steps=8)
    shortened = draw_guided(ultra, cached(ultra.nodes, "LazyCache", model, 0.05, 0.0, 1.0), steps=8)
    assert not torch.equal(shortened, exact)
    assert (shortened - exact).square().mean().sqrt() < 0.1 * exact.std()  # 0.017


def test_a_cache_put_on_before_the_guide_does_the_same(ultra):  # noqa: F811
    after = cached(ultra.nodes, "LazyCache", guided(ultra), 0.05, 0.0, 1.0)
    before = guided(ultra, model=cached(ultra.nodes, "LazyCache", ultra.base, 0.05, 0.0, 1.0))
    assert torch.equal(draw_guided(ultra, before, steps=8), draw_guided(ultra, after, steps=8))


class Reusing:
    """What packs such as TeaCache do: around a network's call, its last output again while its input hardly changes."""

    def __init__(self, threshold: float):
        self.threshold, self.kept, self.skipped = threshold, {}, 0

    def __call__(self, apply_model, args):
        x, kind = args["input"], tuple(args["cond_or_uncond"])
        before, output, changed = self.kept.get(kind, (None, None, 0.0))
        if before is not None and before.shape == x.shape:
            changed += float((x - before).abs().mean() / before.abs().mean())
            if changed < self.threshold:
                self.skipped += 1
                self.kept[kind] = x, output, changed
                return output
        output = apply_model(x, args["timestep"], **args["c"])
        self.kept[kind] = x, output, 0.0
        return output

    def around(self, model):
        patched = model.clone()
        patched.set_model_unet_function_wrapper(self)
        return patched


@pytest.mark.parametrize("family", ["pixelflow", "pixart"])
def test_a_pack_that_repeats_outputs_leaves_the_picture(request, family):
    model, draw = request.getfixturevalue(family)
    exact, reusing = draw(model), Reusing({"pixelflow": 0.1, "pixart": 0.35}[family])
    shortened = draw(reusing.around(model))
    assert reusing.skipped > 2
    assert psnr(shortened, exact) > LEAST
    assert torch.equal(draw(model), exact)


def test_a_pack_that_repeats_outputs_gives_the_guide_features_or_says_why_not(ultra):  # noqa: F811
    model, reusing = guided(ultra), Reusing(0.3)
    exact = draw_guided(ultra, model, steps=8)
    try:
        shortened = draw_guided(ultra, reusing.around(model), steps=8)
    except ValueError as error:
        assert "features" in str(error) and str(error).endswith(".")
    else:
        assert (shortened - exact).square().mean().sqrt() < 0.2 * exact.std()
    assert reusing.skipped
    assert torch.equal(draw_guided(ultra, model, steps=8), exact)
