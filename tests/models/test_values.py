"""What is no weight inside of a file that has the right names: values, packing, ranks."""
import zipfile

import pytest
import torch
from pixstack.models_impl import lora, state_dict
from pixstack.models_impl.lora import names_of
from pixstack.models_impl.state_dict import read_file, write_file
from pixstack.models_impl.ultrapixel import lora as personalisation
from pixstack.models_impl.ultrapixel.config import StageCConfig
from torch import nn


def packed_again(source, target):
    """The same archive, compressed, as file managers pack it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return target


def test_a_compressed_torch_file_has_the_weights_of_the_original(tmp_path):
    weights = {"a.weight": torch.randn(64, 64), "b.weight": torch.zeros(64), "c.weight": torch.randn(7).bfloat16()}
    torch.save(weights, tmp_path / "a.pth")
    again, _ = read_file(packed_again(tmp_path / "a.pth", tmp_path / "b.pth"))
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4 << 20)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="b.pth would unpack to 16,.* bytes, .* times its size"):
        read_file(packed_again(tmp_path / "a.pth", tmp_path / "b.pth"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])
def test_one_value_that_is_no_number_is_found(dtype):
    value = torch.full((1000,), 57000.0 if dtype in (torch.float16, torch.float8_e5m2) else 400.0).to(dtype)
    assert state_dict.all_finite(value)
    value[123] = float("nan")
    assert not state_dict.all_finite(value)
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        value[123] = float("-inf")
        assert not state_dict.all_finite(value)


def test_numbers_whose_sum_overflows_are_numbers():
    assert state_dict.all_finite(torch.full((1000,), 3e38))


@pytest.mark.parametrize("value, words", [
    (torch.full((3, 2), float("nan")), "weight of a layer holds values that are no numbers"),
    (torch.ones(3, 2, dtype=torch.int8), "weight of a layer is in int8"),
    (torch.ones(3, 2, dtype=torch.bool), "weight of a layer is in bool"),
    (torch.ones(3, 2, dtype=torch.complex64), "weight of a layer is in complex64"),
])  # fmt: skip
def test_weights_that_are_none_are_refused_by_name(value, words):
    with pytest.raises(ValueError, match=words):
        state_dict.check_fit(nn.Linear(2, 3, bias=False), {"weight": value}, "a layer")


def test_counts_of_batches_stay_whole_numbers():
    net = nn.BatchNorm2d(4)
    state_dict.check_fit(net, net.state_dict(), "a norm")


# LoRAs

SHAPES = {"blocks.0.attn.to_q.weight": (12, 8), "blocks.0.attn.to_out.0.weight": (12, 8), "proj.weight": (12, 8)}
NAMES = names_of(SHAPES)
DOWN, UP = torch.randn(4, 8), torch.randn(12, 4)
SPELLED = {
    "PEFT": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "PEFT with an adapter's name": ("base_model.model.{}.lora_A.default.weight",
                                    "base_model.model.{}.lora_B.default.weight"),
    "PEFT without an ending": ("{}.lora_A", "{}.lora_B"),
    "diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "diffusers, linear layers": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "compiled": ("_orig_mod.{}.lora_A.weight", "_orig_mod.{}.lora_B.weight"),
    "compiled inside": ("transformer._orig_mod.{}.lora_A.weight", "transformer._orig_mod.{}.lora_B.weight"),
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_every_spelling_is_the_same_lora(spelling):
    down, up = SPELLED[spelling]
    modules = [key.removesuffix(".weight") for key in SHAPES]
    tensors = {form.format(module): value for module in modules for form, value in ((down, DOWN), (up, UP))}
    read = lora.read(tensors, NAMES, alpha=4)
    assert len(read.layers) == 3 and not read.unmatched
    assert all(torch.equal(lora.delta(layer, (12, 8)), UP @ DOWN) for layer in read.layers)


def test_names_of_attention_processors_are_read():
    tensors = {}
    for name, values in (("to_q", (DOWN, UP)), ("to_out", (DOWN, UP))):
        for part, value in zip(("down", "up"), values, strict=True):
            tensors[f"unet.blocks.0.attn.processor.{name}_lora.{part}.weight"] = value
        tensors[f"unet.blocks.0.attn.processor.{name}_lora.network_alpha"] = torch.tensor(2)
    read = lora.read(tensors, NAMES)
    assert {layer.key for layer in read.layers} == set(SHAPES) - {"proj.weight"} and not read.unmatched
    assert {layer.scale for layer in read.layers} == {0.5}


def test_a_lora_of_which_most_has_no_place_is_refused():
    tensors = {f"{module}.lora_{part}.weight": value for module in ("proj", "other.1", "other.2")
               for part, value in (("down", DOWN), ("up", UP))}
    with pytest.raises(ValueError, match="Most of this LoRA has no place in this network: 4 of 6 keys, such as other"):
        lora.read(tensors, NAMES)


@pytest.mark.parametrize("parts, words", [
    ({"lora_down.weight": DOWN, "lora_up.weight": torch.randn(12, 2)}, "lora_up has the rank 2, lora_down 4"),
    ({"lora_down.weight": DOWN.flatten(), "lora_up.weight": UP}, "and both are matrices"),
    ({"lora_down.weight": DOWN * float("nan"), "lora_up.weight": UP}, "no numbers"),
    ({"lora_down.weight": DOWN.to(torch.int8), "lora_up.weight": UP}, "in int8"),
    ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(float("inf"))}, "its scale is inf"),
    ({"hada_w1_a": UP, "hada_w1_b": DOWN[:2], "hada_w2_a": UP, "hada_w2_b": DOWN}, "hada_w1_a has the rank 4"),
    ({"lokr_w1": torch.randn(3, 2), "lokr_w2_a": torch.randn(4, 3), "lokr_w2_b": torch.randn(2, 4)},
     "lokr_w2_a has the rank 3"),
])  # fmt: skip
def test_a_broken_layer_is_named(parts, words):
    with pytest.raises(ValueError, match=words):
        lora.read({f"proj.{part}": value for part, value in parts.items()}, NAMES)


def test_a_controlnet_s_lora_is_called_one():
    tensors = {"controlnet.0.copied_block.attn.qkv.lora_A.weight": DOWN,
               "controlnet.0.copied_block.attn.qkv.lora_B.weight": UP}
    with pytest.raises(ValueError, match="those of a PixArt ControlNet"):
        lora.read(tensors, NAMES)
    with pytest.raises(ValueError, match="This is a Control-LoRA"):
        lora.read({"lora_controlnet": torch.zeros(0), "input_blocks.0.0.up": UP}, NAMES)


def test_stable_cascade_s_numbers_are_ultrapixel_s(tmp_path):
    config = StageCConfig()
    parts = {f"weights.{n}.{part}": torch.randn(*shape) for n, _ in enumerate(personalisation.attention_keys(config))
             for part, shape in (("lora_up", (32, 4)), ("lora_down", (4, 32)))}
    assert personalisation.is_personalisation(parts)
    write_file(tmp_path / "a.safetensors", parts)
    theirs = personalisation.read(*read_file(tmp_path / "a.safetensors"))
    ours = personalisation.read({key.replace("weights.", "module."): value for key, value in parts.items()})
    assert theirs.layers.keys() == ours.layers.keys()
    parts["weights.3.lora_down"] = torch.randn(5, 32)
    with pytest.raises(ValueError, match="do not belong together"):
        personalisation.read(parts)


@pytest.mark.parametrize("entries, words", [
    ({"r": 4, "rank_pattern": {"(a|a)*b": 2}}, "rank_pattern in adapter_config.json.* is not run"),
    ({"r": 4, "alpha_pattern": ["proj"]}, "alpha_pattern in adapter_config.json is a list"),
    ({"r": 4, "alpha_pattern": {"proj": "4"}}, r"alpha_pattern\['proj'\] in adapter_config.json is '4', not a number"),
    ({"r": 4, "lora_alpha": float("nan")}, "lora_alpha in adapter_config.json is 'nan'"),
    ({"r": True}, "r in adapter_config.json is 'True'"),
])  # fmt: skip
def test_a_configuration_that_is_none_is_refused_by_its_entry(entries, words):
    tensors = {"proj.lora_A.weight": DOWN, "proj.lora_B.weight": UP}
    with pytest.raises(ValueError, match=words):
        lora.read(tensors, NAMES, adapter_config=entries)
