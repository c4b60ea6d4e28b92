"""Files whose keys, shapes and settings are absurd: decided in bounded time and memory, before a network is built."""

import json
from dataclasses import replace

import pytest
import torch
from pixstack.models_impl import guard, quantised_files, state_dict
from pixstack.models_impl.flux import checkpoint as flux
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.pixart import lora as pixart_lora
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixelflow import checkpoint as pixelflow
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder import checkpoint as pixelponder
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.text import shapes as text_shapes
from pixstack.models_impl.ultrapixel import checkpoint as ultrapixel
from pixstack.models_impl.ultrapixel import lora as personalisation
from pixstack.models_impl.ultrapixel.config import GuideConfig, StageAConfig, StageBConfig, StageCConfig
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from weights import tiny_pixelflow

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


# --- Settings

CONFIGS = {
    "PixelFlow": (FLOW, {"num_stages": 10**9, "resolution": 10**12, "depth": "many", "heads": None,
                         "attention_bias": 1}),
    "FLUX": (FLUX, {"theta": 10**12, "axes": 8, "guidance": "yes", "hidden": 2.5, "depth": [2]}),
    "PixelPonder": (PONDER, {"text_tokens": 10**9, "types": 7, "trunk": {}}),
    "selection network": (PONDER.select, {"select_num": 10**9, "patch_size": "two"}),
    "Stage B": (B, {"dropout": (float("nan"), 0.0), "conditions": ("a",) * 2000, "patch_size": 10**9}),
    "Stage C": (C, {"switch": ("no",), "text_dim": True}),
    "Stage A": (A, {"scale_factor": float("nan"), "levels": 10**9}),
    "guide": (GUIDE, {"scale_tokens": 10**12, "frequency_range": float("inf"), "layers": 8}),
    "PixArt": (PixArtConfig(), {"sample_size": 10**9, "latent_scale": float("nan"), "prediction": 5, "depth": 28.0,
                                "kv_compression": "conv", "position_range": "wide"}),
}


@pytest.mark.parametrize("name, entry", [(name, entry) for name, (_, entries) in CONFIGS.items() for entry in entries])
def test_an_absurd_entry_of_a_configuration_is_refused_by_its_name(name, entry):
    config, entries = CONFIGS[name]
    with pytest.raises(ValueError, match=f"configuration cannot work:\n  {entry}="):
        replace(config, **{entry: entries[entry]})


@pytest.mark.parametrize("entries", [
    {"num_attention_heads": "x", "attention_head_dim": 10**12},
    {"layers": [1] * 10_000},
    {"name": "x" * 10**6},
    {"model": {"params": {"depth": float("inf")}}},
    {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": {}}}}}}}}}},
], ids=["number", "list", "text", "infinite", "deep"])  # fmt: skip
@pytest.mark.parametrize("cls", [PixelFlowConfig, FluxConfig, PixelPonderConfig, StageBConfig, GuideConfig,
                                 PixArtConfig])
def test_nothing_is_computed_from_entries_of_absurd_sizes(cls, entries):
    with pytest.raises(ValueError, match="onfiguration"):
        cls.entries_of(entries)


@pytest.mark.parametrize("text", [
    "[" * 100_000, "{", "[]", "7", '{"depth": 1e999}', '{"a": "' + "x" * 10**6 + '"}', "",
], ids=range(7))  # fmt: skip
def test_metadata_that_hold_no_configuration_are_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="The configuration in this file's metadata"):
        state_dict.metadata_config({"pixstack.family": "pixelflow", "pixstack.config": text}, "pixelflow")


def t5(**stated):
    shapes = {"shared.weight": (20, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2),
              "encoder.block.0.layer.1.DenseReluDense.wi.weight": (16, 8)}
    metadata = {"pixstack.family": "t5_encoder", "pixstack.config": json.dumps(stated)}
    return {key: torch.zeros(shape) for key, shape in shapes.items()}, metadata


def test_a_text_encoder_s_configuration_is_that_of_its_shapes_with_what_they_do_not_say():
    config = text_shapes.configuration(*t5(max_length=32, dense_act_fn="gelu_new", num_layers=1))
    assert (config["max_length"], config["dense_act_fn"], config["num_heads"], config["d_kv"]) == (32, "gelu_new", 2, 4)


@pytest.mark.parametrize("stated", [
    {"num_layers": 10**9}, {"d_model": 10**6}, {"vocab_size": "all"}, {"max_length": 10**9}, {"max_length": 0},
    {"max_length": None}, {"dense_act_fn": "eval"}, {"is_gated_act": True},
])  # fmt: skip
def test_a_text_encoder_is_not_built_from_what_its_metadata_say_against_its_shapes(stated):
    with pytest.raises(ValueError, match=f"configuration says {next(iter(stated))}="):
        text_shapes.configuration(*t5(**stated))


NO_END = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, "{", '{"model": {"type": "Unigram"}}', NO_END])
def test_a_tokenizer_that_is_none_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="The tokenizer in this file"):
        text_shapes.tokenizer(text)


# --- Shapes

def test_a_matrix_without_values_is_refused_by_its_key(tmp_path):
    tensors = {"a.weight": torch.zeros(0, 10**12), "marker": torch.zeros(0)}
    state_dict.write_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"a.safetensors: a.weight has the shape \[0, 1000000000000\] and no values"):
        state_dict.read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_a_tensor_of_more_than_its_file_holds_is_refused_by_its_key(tmp_path, nested):
    repeated = {"x": torch.zeros(1).expand(10**5, 10**5), "row": torch.zeros(1, 4).expand(3, 4)}
    torch.save({"state_dict": repeated} if nested else repeated, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: x has the shape \[100000, 100000\], 40,000,000,000 bytes"):
        state_dict.read_file(tmp_path / "a.pth")


# --- Quantised files

def test_metadata_of_many_layers_are_not_compared_with_every_key():
    class Keys(dict):
        looked = 0

        def __iter__(self):
            Keys.looked += 1
            return super().__iter__()

    layers = {f"layer.{i}": {"format": "float8_e4m3fn"} for i in range(3000)}
    tensors = Keys({f"net.layer.{i}.weight": torch.zeros(1, 1) for i in range(3000)})
    file = quantised_files._File(tensors, layers, ())
    assert file.stated.keys() == {f"net.layer.{i}" for i in range(3000)} and Keys.looked <= 5


def nf4(**settings):
    state = {"shape": [4, 4], "blocksize": 4, "dtype": "float32", **settings}
    return {
        "a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(4),
        "a.weight.quant_map": torch.zeros(16),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


@pytest.mark.parametrize("settings", [
    {"shape": [10**9, 10**9]}, {"shape": None}, {"shape": [-4, -4]}, {"blocksize": 10**12}, {"blocksize": 0},
    {"blocksize": "four"}, {"dtype": "load"},
])  # fmt: skip
def test_sizes_that_do_not_go_with_the_values_of_a_quantised_weight_are_refused(settings):
    if "dtype" in settings:
        return assert_float(nf4(**settings))
    with pytest.raises(ValueError, match="a.weight of this quantised file holds 16 values in 4 blocks"):
        quantised_files.gathered(nf4(**settings))


def assert_float(tensors):
    assert quantised_files.gathered(tensors)[0]["a.weight"].float().shape == (4, 4)


def test_groups_that_do_not_divide_a_row_are_no_rotation_of_gigabytes():
    settings = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**12}).encode()
    weight, _ = quantised_files.gathered({
        "a.weight": torch.zeros(4, 16, dtype=torch.int8), "a.weight_scale": torch.ones(1),
        "a.comfy_quant": torch.tensor(list(settings), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="groups of 16777216, which do not divide 16 columns"):
        weight["a.weight"].float()


def test_settings_of_megabytes_are_not_parsed():
    settings = torch.zeros(10**5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a.comfy_quant of this quantised file has 100,000 bytes"):
        quantised_files.gathered({"a.weight": torch.zeros(1, 1), "a.comfy_quant": settings})


def test_a_list_of_blocks_is_counted():
    keys = [f"blocks.{i}.{name}" for i in (1, 0, 2) for name in ("a.weight", "b")]
    keys += ["blocks.x.a", "other.0.a", "blocks."]
    assert state_dict.count(keys, "blocks") == 3 and state_dict.count(keys, "none") == 0


@pytest.mark.parametrize("entry, value, words", [
    ("head_dim", "x", "head_dim='x' must be a whole number"), ("num_stages", [None], "num_stages="),
    ("unknown", 1, "'unknown' is no entry of a PixelFlowConfig"),
])
def test_a_configuration_in_the_metadata_is_read_by_the_kinds_of_its_entries(tmp_path, entry, value, words):
    config = tiny_pixelflow(tmp_path / "a.safetensors")
    tensors, metadata = state_dict.read_file(tmp_path / "a.safetensors")
    stated = json.dumps({**config.as_dict(), entry: value})
    with pytest.raises(ValueError, match=words):
        pixelflow.read(tensors, {**metadata, "pixstack.config": stated})


@pytest.mark.parametrize("error", [IndexError("list index out of range"), AttributeError("'list' has no 'items'"),
                                   TypeError("'NoneType' object is not iterable")])
def test_a_sentence_says_nothing_of_python(error):
    said = guard.sentence("a.pth", error)
    assert str(error) not in said and said.startswith("a.pth cannot be read") and "download it again" in said


def test_a_sentence_does_not_repeat_a_key_of_any_length():
    said = guard.sentence("a.pth", ValueError(f"There is no place for {'x.' * 5000}weight."))
    assert len(said) < 300 and said.startswith("a.pth: There is no place for x.x.")
