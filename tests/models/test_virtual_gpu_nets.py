"""Every network at its released size in bf16 and float16, on a virtual GPU (virtual_gpu.py).

Widths, heads, tokens and pictures are the released ones. Of blocks that repeat there are only a few, for a rehearsal
takes time by the operation; the 900M PixArt has all of its 42.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import virtual_gpu
from pixstack.models_impl.annotators.hed import HED
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux, positions
from pixstack.models_impl.pixart import config as pixart_config
from pixstack.models_impl.pixart.config import KVCompression, PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import HintedControlNet, PixArt
from pixstack.models_impl.pixelflow import config as pixelflow_config
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder.accumulate import Accumulate
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.pixelponder.patch_select import Blend, Released
from pixstack.models_impl.pixelponder.select_net import AsRun
from pixstack.models_impl.ultrapixel.config import (
    STAGE_B_PRESETS,
    STAGE_C_PRESETS,
    ControlNetConfig,
    GuideConfig,
    StageAConfig,
)
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import EffnetEncoder
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.previewer import Previewer
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from virtual_gpu import GPU, Waits, one_pass

pytestmark = pytest.mark.long

BF16, FP16 = torch.bfloat16, torch.float16


def empty(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def rehearsed(build, dtype: torch.dtype) -> Waits:
    """build(to) makes a network by `to` (dtype, device) and returns a function that runs it."""
    with virtual_gpu.VirtualGPU():
        run = build(dict(dtype=dtype, device=GPU))
    return one_pass(run, dtype, count=dtype == BF16)


def pixart(config: PixArtConfig, to, controls: int = 0, masked: bool = False):
    if config.depth == PixArtConfig.depth:
        config = replace(config, depth=4)
    net, side, dtype = PixArt(config, **to), config.sample_size, to["dtype"]
    nets = [PixArtControlNet(config, 3, **to) for _ in range(controls)]
    strength = empty(1, (side // config.patch_size) ** 2, 1, dtype=dtype) if masked else 1.0

    def run():
        return net(empty(2, 4, side, side, dtype=dtype), torch.zeros(2, device=GPU),
                   empty(2, config.token_limit, config.context_dim, dtype=dtype),
                   torch.ones(2, config.token_limit, dtype=torch.bool, device=GPU),
                   control=[HintedControlNet(c, empty(1, 4, side, side, dtype=dtype), strength) for c in nets])

    return run


def compressed(sampling: str) -> PixArtConfig:
    """Sigma 2K with the KV compression of its released training settings."""
    return PixArtConfig(sample_size=256, kv_compression=KVCompression(sampling, 2, (2, 3)), qk_norm=True)


def pixelflow(name: str, to):
    config = replace(pixelflow_config.PRESETS[name], depth=4)
    net, dtype, side = PixelFlow(config, **to), to["dtype"], config.resolution
    inputs = {"class_labels": torch.zeros(2, dtype=torch.long, device=GPU)} if config.num_classes else {
        "context": empty(2, 128, config.context_dim, dtype=dtype),
        "mask": torch.ones(2, 128, dtype=torch.bool, device=GPU)}
    return lambda: net(empty(2, 3, side, side, dtype=dtype), torch.zeros(2, device=GPU), **inputs)


def flux_inputs(config, dtype, side: int = 128) -> dict:
    return dict(img=empty(1, side * side // 4, config.in_channels, dtype=dtype), timestep=torch.ones(1, device=GPU),
                context=empty(1, 512, config.context_dim, dtype=dtype), pooled=empty(1, config.pooled_dim, dtype=dtype),
                guidance=torch.full((1,), 4.0, device=GPU), img_ids=positions(side // 2, side // 2, torch.device(GPU)))


def flux(config, to):
    net = Flux(replace(config, depth=2, single_depth=2), **to)
    return lambda: net(**flux_inputs(config, to["dtype"]))


def ponder(strategy, to, side: int = 128, **networks):
    config = PixelPonderConfig(**networks)
    net, dtype = PixelPonder(config, **to), to["dtype"]
    hints = [(kind, empty(1, 3, 8 * side, 8 * side, dtype=dtype)) for kind in config.types[:4]]
    choose = strategy(net).begin(net.conditions(hints))

    def run():
        residuals = net(**flux_inputs(config.trunk, dtype, side), select=choose).residuals(0.8, dtype)
        return (*residuals.double, *residuals.single)

    return run


def few_blocks(config):
    """A cascade network with two blocks of a kind on each level."""
    return replace(config, **{way: tuple(("CTA" if "A" in level else "CT") * 2 for level in getattr(config, way))
                              for way in ("down", "up")})


def stage_c(preset: str, to, guided: bool = False):
    config, dtype = few_blocks(STAGE_C_PRESETS[preset]), to["dtype"]
    net = StageC(config, **to)
    text, pooled = empty(1, 77, config.text_dim, dtype=dtype), empty(1, 1, config.pooled_dim, dtype=dtype)
    t = torch.full((1,), 0.5, device=GPU)
    if not guided:
        return lambda: net(empty(1, 16, 24, 24, dtype=dtype), t, text, pooled)
    image = Guide(GuideConfig(), **to).image(net.features(empty(1, 16, 24, 24, dtype=dtype), t, text, pooled)[1])
    return lambda: net(empty(1, 16, 96, 96, dtype=dtype), t, text, pooled, hook=image.hook(t))


def stage_b(preset: str, to):
    config, dtype = few_blocks(STAGE_B_PRESETS[preset]), to["dtype"]
    net = StageB(config, **to)
    return lambda: net(empty(1, 4, 512, 512, dtype=dtype), torch.full((1,), 0.5, device=GPU),
                       empty(1, 16, 48, 48, dtype=dtype), empty(1, 1, config.pooled_dim, dtype=dtype))


def stage_a(part: str, to):
    net, dtype = StageA(StageAConfig(bottleneck_blocks=2), **to), to["dtype"]
    given = empty(1, 3, 1024, 1024, dtype=dtype) if part == "encode" else empty(1, 4, 256, 256, dtype=dtype)
    return lambda: getattr(net, part)(given)


def picture_net(net, shape: tuple[int, ...], to):
    net = net(**to).eval()
    return lambda: net(empty(*shape, dtype=to["dtype"]))


def t5(to):
    import transformers

    config = transformers.T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=4, vocab_size=32128, dropout_rate=0.0,
        feed_forward_proj="gated-gelu")
    with torch.device(GPU):
        net = transformers.T5EncoderModel(config).to(**to).eval()
    ids, mask = (torch.ones(1, 300, dtype=torch.long, device=GPU) for _ in range(2))
    return lambda: net(input_ids=ids, attention_mask=mask).last_hidden_state


def consistency_decoder(to):
    from diffusers import ConsistencyDecoderVAE

    with torch.device(GPU):
        net = ConsistencyDecoderVAE().to(**to).eval()
    return lambda: net.decode(empty(1, 4, 32, 32, dtype=to["dtype"]), generator=torch.Generator()).sample


NETS = {
    **{f"PixArt {name}": partial(pixart, config) for name, config in pixart_config.PRESETS.items()},
    "PixArt 2K, compressed by conv": partial(pixart, compressed("conv")),
    "PixArt 2K, compressed by uniform_every": partial(pixart, compressed("uniform_every")),
    "PixArt ControlNet": partial(pixart, pixart_config.PRESETS["alpha_1024"], controls=1),
    "PixArt ControlNets, masked": partial(pixart, pixart_config.PRESETS["alpha_1024"], controls=2, masked=True),
    **{f"PixelFlow {name}": partial(pixelflow, name) for name in pixelflow_config.PRESETS},
    "FLUX dev": partial(flux, FluxConfig()),
    "FLUX schnell": partial(flux, FluxConfig(guidance=False)),
    "FLUX small": partial(flux, FluxConfig(hidden=192, heads=6, axes=(8, 12, 12), mlp_hidden=768, pooled_dim=8,
                                           context_dim=192, guidance=False)),
    **{f"UltraPixel Stage C {name}": partial(stage_c, name) for name in STAGE_C_PRESETS},
    "UltraPixel Stage C 3.6b, guided": partial(stage_c, "3.6b", guided=True),
    **{f"UltraPixel Stage B {name}": partial(stage_b, name) for name in STAGE_B_PRESETS},
    **{f"UltraPixel Stage A {part}": partial(stage_a, part) for part in ("encode", "decode", "decode_tiled")},
    "UltraPixel effnet": partial(picture_net, EffnetEncoder, (1, 3, 768, 768)),
    "UltraPixel previewer": partial(picture_net, Previewer, (1, 16, 24, 24)),
    "UltraPixel ControlNet": partial(picture_net, partial(ControlNet, ControlNetConfig()), (1, 1, 1024, 1024)),
    "HED": partial(picture_net, HED, (1, 3, 1024, 1024)),
    "T5-XXL": t5,
    "Consistency decoder": consistency_decoder,
}
# Residuals of whole hidden states: float16 may not hold them, and the nodes never ask for it.
ONLY_BF16 = {
    "PixelPonder released": partial(ponder, lambda net: Released()),
    "PixelPonder blend": partial(ponder, lambda net: Blend([1.0, 0.8, 0.5, 0.2])),
    "PixelPonder as run": partial(ponder, lambda net: AsRun(net.select_net), side=16, select=SelectConfig()),
    "PixelPonder accumulate": partial(ponder, lambda net: Accumulate(net.selector), selector=SelectorConfig()),
}
REHEARSALS = {
    **{f"{name}, bf16": partial(rehearsed, build, BF16) for name, build in {**NETS, **ONLY_BF16}.items()},
    **{f"{name}, fp16": partial(rehearsed, build, FP16) for name, build in NETS.items()},
}


@pytest.mark.parametrize("rehearsal", REHEARSALS)
def test_a_network_of_released_size_runs_in_half_precision(rehearsal, rehearsed_on_gpu):
    virtual_gpu.check(rehearsal.rpartition(", ")[0], rehearsed_on_gpu[rehearsal])
