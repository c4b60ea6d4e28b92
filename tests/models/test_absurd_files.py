"""Files whose keys, shapes and settings are absurd: decided in bounded time and memory, before a network is built."""

import pytest
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.flux import checkpoint as flux
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.pixart import lora as pixart_lora
from pixstack.models_impl.pixelflow import checkpoint as pixelflow
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder import checkpoint as pixelponder
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.ultrapixel import checkpoint as ultrapixel
from pixstack.models_impl.ultrapixel import lora as personalisation
from pixstack.models_impl.ultrapixel.config import GuideConfig, StageAConfig, StageBConfig, StageCConfig
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB

FLOW = PixelFlowConfig(heads=2, head_dim=8, depth=2, num_classes=5, num_stages=3, resolution=32)
FLUX = FluxConfig(hidden=16, heads=2, axes=(2, 2, 4), mlp_hidden=32, depth=2, single_depth=2, pooled_dim=6,
                  context_dim=10)
PONDER = PixelPonderConfig(FLUX, select=SelectConfig(hidden=16, heads=2, mlp_hidden=24),
                           selector=SelectorConfig(width=8))
CASCADE = dict(hidden=(8, 16), heads=(-1, 2), down=("CT", "CTA"), up=("CTA", "CT"), down_repeats=(1, 1),
               up_repeats=(2, 1), context_dim=12, pooled_dim=10, dropout=(0.0, 0.1), self_attention=(True, True),
               timestep_dim=8)  # fmt: skip
B, C = StageBConfig(**CASCADE), StageCConfig(**CASCADE, text_dim=10, image_dim=6, in_channels=4, out_channels=4)
A = StageAConfig(bottleneck_blocks=3, hidden=16)
GUIDE = GuideConfig(down=(16, 16), up=(16, 16), width=8, heads=2, feedforward=8, max_tokens=64, groups=4, layers=(8, 8),
                    frequencies=4, timestep_dim=8, scale_dim=8)
READERS = {  # name: (network, how its file is read, a key whose first number counts its blocks)
    "PixelFlow": (PixelFlow(FLOW), lambda t: pixelflow.read(t, config=FLOW.as_dict()), "transformer_blocks.{}.x"),
    "FLUX": (Flux(FLUX), lambda t: flux.read(t, config=FLUX.as_dict()), "double_blocks.{}.x"),
    "FLUX's single blocks": (Flux(FLUX), lambda t: flux.read(t, config=FLUX.as_dict()), "single_blocks.{}.x"),
    "PixelPonder": (PixelPonder(PONDER), lambda t: pixelponder.read(t, config={"trunk": FLUX.as_dict()}),
                    "double_blocks.{}.x"),
    "PixelPonder's hints": (PixelPonder(PONDER), lambda t: pixelponder.read(t, config={"trunk": FLUX.as_dict()}),
                            "input_hint_block_list_moe.{}.0.weight"),
    "PixelPonder's selection": (PixelPonder(PONDER), lambda t: pixelponder.read(
        t, config={"trunk": FLUX.as_dict()}, select_net=True), "select_net.attn_block.{}.x"),
    "PixelPonder's selector": (PixelPonder(PONDER), lambda t: pixelponder.read(t, config={"trunk": FLUX.as_dict()}),
                               "selector.blocks.{}.x"),
}
HUGE = ["999999999", "9" * 5000, "00", "٣"]  # the last is a digit too


@pytest.mark.parametrize("number", HUGE, ids=["huge", "digits", "zeros", "arabic"])
@pytest.mark.parametrize("name", READERS)
def test_one_key_with_a_huge_number_builds_nothing(name, number):
    network, read, key = READERS[name]
    weights = network.state_dict()
    read(dict(weights))
    with pytest.raises(ValueError, match="incomplete, or of another model"):
        read({**weights, key.format(number): torch.zeros(1)})


CASCADES = {
    "Stage C": (StageC(C), ultrapixel.read_stage_c, C, ["down_blocks.{}.0.depthwise.weight", "up_blocks.0.{}.x"]),
    "Stage B": (StageB(B), ultrapixel.read_stage_b, B, ["down_blocks.{}.0.depthwise.weight",
                                                        "up_repeat_mappers.{}.0.weight"]),
    "Stage A": (StageA(A), ultrapixel.read_stage_a, A, ["up_blocks.{}.gammas"]),
}


@pytest.mark.parametrize("number", HUGE[:2], ids=["huge", "digits"])
@pytest.mark.parametrize("name", CASCADES)
def test_a_level_with_a_huge_number_is_a_key_that_does_not_fit(name, number):
    network, read, config, keys = CASCADES[name]
    weights = network.state_dict()
    for key in keys:
        with pytest.raises(ValueError, match="do not fit|the weights say 4"):
            _, given = read({**weights, key.format(number): torch.zeros(4, 4, 1, 1)}, config=config.as_dict())
            state_dict.check_fit(network, given, name)


@pytest.mark.parametrize("key", ["agg_net.{}.wtokens", "module.{}.0.wtokens"])
@pytest.mark.parametrize("number", HUGE[:2], ids=["huge", "digits"])
def test_a_guide_s_module_with_a_huge_number_is_of_no_guide(key, number):
    weights = Guide(GUIDE).state_dict()
    config, given = ultrapixel.read_guide({**weights, key.format(number): torch.zeros(1)}, config=GUIDE.as_dict())
    assert given.keys() == weights.keys() and config.down == GUIDE.down


def test_thousands_of_levels_are_refused_with_their_number():
    weights = {**StageB(B).state_dict(), **{f"down_blocks.{i}.0.depthwise.weight": torch.zeros(1) for i in range(999)}}
    with pytest.raises(ValueError, match="999 levels of blocks"):
        ultrapixel.read_stage_b(weights)


@pytest.mark.parametrize("number", HUGE[:2], ids=["huge", "digits"])
def test_a_lora_of_a_huge_block_is_no_table_of_a_billion_names(number):
    names = pixart_lora.guessed_names({f"blocks.{number}.attn.qkv.lora_up.weight": torch.zeros(6, 1),
                                       f"blocks.{number}.attn.qkv.lora_down.weight": torch.zeros(1, 2)})
    assert len(names["original"]) < 10_000


@pytest.mark.parametrize("key", ["{}.lora_up", "{}.embeddings"])
def test_a_personalisation_of_a_huge_module_is_refused(key):
    for number in HUGE[:2]:
        with pytest.raises(ValueError, match="not a personalisation|changes 1 layers|changes 0 layers"):
            personalisation.read({key.format(number): torch.zeros(2, 2)})


def test_a_list_of_blocks_is_counted():
    keys = [f"blocks.{i}.{name}" for i in (1, 0, 2) for name in ("a.weight", "b")]
    keys += ["blocks.x.a", "other.0.a", "blocks."]
    assert state_dict.count(keys, "blocks") == 3 and state_dict.count(keys, "none") == 0
