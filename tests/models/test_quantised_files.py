"""Quantised files outside ComfyUI: what their numbers are, under which names, and which are refused by name."""
import json
from importlib.util import find_spec

import pytest
import quantised_files as made
import torch
from pixstack.models_impl import quantised_files
from pixstack.models_impl.pixart import checkpoint, key_names
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.quantised_files import Quantised
from pixstack.models_impl.state_dict import load_into, read_file, write_file
from pixstack.trainer.cli import main as cli
from weights import random_state

CONFIG = PixArtConfig(depth=2, hidden=288, heads=4, context_dim=64, null_caption=True)
FORMATS = [format for format in made.FORMATS if find_spec("bitsandbytes") or "nf4" not in format]


def close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def weight():
    return torch.randn(160, 192, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain():
    return random_state(PixArt(CONFIG))


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_of_each_format_is_the_number_that_the_format_says(weight, format, tmp_path):
    packed, whole = made.FORMATS[format]("layer", weight)
    write_file(tmp_path / "a.safetensors", {**packed, "norm.weight": torch.ones(3)})
    tensors, _ = read_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"layer.weight", "norm.weight"}
    assert (tensors["layer.weight"].shape, tensors["layer.weight"].dtype) == (weight.shape, torch.float32)
    close(tensors["layer.weight"].clone(), whole)
    assert 0 < (whole - weight).norm() < 0.15 * weight.norm()


def test_the_weights_of_a_file_stay_in_few_bits_until_they_are_used(weight, tmp_path):
    packed, _ = made.scaled_fp8("layer", weight)
    write_file(tmp_path / "a.safetensors", packed)
    value = read_file(tmp_path / "a.safetensors")[0]["layer.weight"]
    assert isinstance(value, Quantised)
    assert sum(part.nbytes for part in value.parts.values()) < 1.01 * weight.numel()


@pytest.mark.parametrize("use", [
    lambda w: w.to(torch.bfloat16), lambda w: w.float(), lambda w: w.to("cpu"), lambda w: w.detach().contiguous(),
    lambda w: torch.cat([w, w])[:160], lambda w: w.chunk(2)[0], lambda w: w @ torch.eye(192).to(w.dtype),
], ids=["to", "float", "device", "detach", "cat", "chunk", "matmul"])  # fmt: skip
def test_whatever_computes_with_such_a_weight_gets_a_plain_tensor(weight, use):
    packed, whole = made.comfy_fp8("layer", weight)
    value = quantised_files.gathered(packed)[0]["layer.weight"]
    found = use(value)
    assert type(found) is torch.Tensor
    close(found.float(), whole[: len(found)], 2**-8)  # the file has no plain weight, so bfloat16 is assumed


def test_a_copy_is_rounded_once(weight):
    packed, whole = made.comfy_fp8("layer", weight)
    target = torch.empty_like(weight)
    target.copy_(quantised_files.gathered(packed)[0]["layer.weight"])
    close(target, whole, 1e-7)


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4", "int8_tensorwise", "int8_tensorwise convrot"])
def test_what_comfy_kitchen_writes_is_read_as_it_reads_it(weight, format):
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="ComfyUI after 0.3.75 brings it")
    name, _, rotated = format.partition(" ")
    layout = {"mxfp8": "TensorCoreMXFP8Layout", "nvfp4": "TensorCoreNVFP4Layout",
              "int8_tensorwise": "TensorWiseINT8Layout"}[name]
    settings = {"convrot": True, "convrot_groupsize": 64} if rotated else {}
    more = {"per_channel": True, **settings} if name == "int8_tensorwise" else {}
    theirs = kitchen.QuantizedTensor.from_float(weight, layout, **more)
    file = {**theirs.state_dict("layer.weight"),
            "layer.comfy_quant": made.as_json({"format": name, **settings}), "norm.weight": torch.ones(3)}
    close(quantised_files.gathered(file)[0]["layer.weight"].clone(), theirs.dequantize(), 1e-6)


def test_rows_that_were_added_to_fill_blocks_are_left_out(weight):
    packed, whole = made.nvfp4("layer", weight)
    file = {**packed, "layer.bias": torch.zeros(150)}
    close(quantised_files.gathered(file)[0]["layer.weight"].clone(), whole[:150])


def test_the_formats_of_layers_may_stand_in_the_metadata(weight, tmp_path):
    packed, whole = made.nvfp4("model.diffusion_model.layer", weight)
    del packed["model.diffusion_model.layer.comfy_quant"]
    layers = {"layers": {"layer": {"format": "nvfp4"}}, "format_version": "1.0"}
    write_file(tmp_path / "a.safetensors", packed, {"_quantization_metadata": json.dumps(layers), "of": "mine"})
    tensors, metadata = read_file(tmp_path / "a.safetensors")
    assert metadata == {"of": "mine"}  # it would be untrue of what is saved from these tensors
    close(tensors["model.diffusion_model.layer.weight"].float(), whole, 2**-8)


def test_a_scale_of_the_inputs_is_multiplied_into_their_columns(weight):
    packed, whole = made.nvfp4("layer", weight)
    smooth = torch.rand(192, generator=torch.Generator().manual_seed(1)) + 0.5
    file = {**packed, "layer.pre_quant_scale": smooth, "norm.weight": torch.ones(3)}
    close(quantised_files.gathered(file)[0]["layer.weight"].clone(), whole * smooth)


@pytest.mark.parametrize("format", FORMATS)
def test_a_pixart_of_diffusers_names_joins_parts_that_have_scales_of_their_own(plain, format, tmp_path):
    packed, whole = made.quantised(key_names.to_diffusers(plain), format, made.in_blocks)
    assert len(packed) > len(whole)
    write_file(tmp_path / "a.safetensors", packed)
    config, tensors = checkpoint.read(*read_file(tmp_path / "a.safetensors"))
    _, expected = checkpoint.read(whole)
    assert config.hidden == CONFIG.hidden and set(tensors) == set(expected)
    for key, value in expected.items():
        close(tensors[key].clone(), value)
    assert isinstance(tensors["blocks.0.mlp.fc1.weight"], Quantised)  # as one part, renamed with its scales
    assert type(tensors["blocks.0.attn.qkv.weight"]) is torch.Tensor


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "module."])
def test_the_wrappers_around_keys_come_off_a_quantised_file_too(plain, prefix, tmp_path):
    packed, whole = made.quantised(plain, "scaled_fp8", made.in_blocks)
    write_file(tmp_path / "a.safetensors", {prefix + key: value for key, value in packed.items()})
    _, tensors = checkpoint.read(*read_file(tmp_path / "a.safetensors"))
    assert set(tensors) == set(plain)
    net = PixArt(CONFIG)
    load_into(net, tensors, "a PixArt")
    close(net.blocks[1].attn.qkv.weight.detach(), whole["blocks.1.attn.qkv.weight"])


def test_a_training_file_may_hold_quantised_weights(plain, tmp_path):
    packed, whole = made.quantised(plain, "quanto", made.in_blocks)
    torch.save({"state_dict": packed, "epoch": 3}, tmp_path / "a.pth")
    _, tensors = checkpoint.read(*read_file(tmp_path / "a.pth"))
    close(tensors["blocks.0.mlp.fc2.weight"].clone(), whole["blocks.0.mlp.fc2.weight"])


@pytest.mark.parametrize("endings, name", [
    (("qweight", "wscales", "smooth_factor", "lora_down", "lora_up"), "SVDQuant (Nunchaku)"),
    (("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
    (("weight._data", "weight._scale", "weight._shift"), "optimum-quanto (qint2 or qint4)"),
    (("W_q", "scale", "zero"), "HQQ"),
])  # fmt: skip
def test_a_format_that_nobody_here_reads_is_refused_by_its_name(endings, name, tmp_path):
    write_file(tmp_path / "a.safetensors", {f"blocks.0.attn.qkv.{end}": torch.zeros(4, 4) for end in endings})
    with pytest.raises(ValueError) as caught:
        read_file(tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"a.safetensors: This file is quantised as {name}: it can neither be run as it is nor dequantised here. "
        "Get the bf16, fp16 or fp8 file of the same model."
    )


@pytest.mark.parametrize("format", ["convrot_w4a4", "asym_w4a8_int8", "newer"])
def test_a_format_of_comfyui_s_without_a_formula_here_is_kept_only_for_who_runs_it(format):
    file = {"layer.weight": torch.zeros(16, 8, dtype=torch.int8), "layer.weight_scale": torch.ones(16),
            "layer.weight_s_rel": torch.ones(16), "layer.comfy_quant": made.as_json({"format": format})}
    with pytest.raises(ValueError, match=f"quantised as {format}.*Get the bf16"):
        quantised_files.gathered(file)
    kept, _ = quantised_files.gathered(file, runnable={format})
    assert kept["layer.weight"].settings["format"] == format


@pytest.mark.parametrize("format, lost", [
    ("nvfp4", "weight_scale_2"), ("mxfp8", "weight_scale"), ("comfy_int8", "weight_scale"),
    pytest.param("bitsandbytes_nf4_twice", "weight.nested_absmax", marks=pytest.mark.skipif(
        not find_spec("bitsandbytes"), reason="needs bitsandbytes")),
])  # fmt: skip
def test_a_quantised_file_that_is_not_whole_says_what_it_lacks(weight, format, lost):
    packed, _ = made.FORMATS[format]("layer", weight)
    del packed[f"layer.{lost}"]
    with pytest.raises(ValueError, match=f"incomplete: it has no layer.{lost}"):
        quantised_files.gathered(packed)


def test_a_damaged_description_of_the_layers_is_said(weight, tmp_path):
    packed, _ = made.comfy_fp8("layer", weight)
    with pytest.raises(ValueError, match="layer.comfy_quant of this quantised file is not valid JSON"):
        quantised_files.gathered({**packed, "layer.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)})
    write_file(tmp_path / "a.safetensors", packed, {"_quantization_metadata": "{}"})
    with pytest.raises(ValueError, match="a.safetensors: .*_quantization_metadata does not list its layers"):
        read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["t5.gguf", "t5.safetensors", "t5.pth"])
def test_a_gguf_file_is_called_gguf_whatever_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=f"{name} is a GGUF file.*'CLIPLoader \\(GGUF\\)'.*safetensors"):
        read_file(tmp_path / name)


def test_the_trainer_converts_a_quantised_file_into_a_plain_one(plain, tmp_path):
    packed, whole = made.quantised(plain, "nvfp4", made.in_blocks)
    write_file(tmp_path / "a.safetensors", packed, checkpoint.metadata(CONFIG))
    cli.main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    tensors, _ = read_file(tmp_path / "b.safetensors")
    assert not any(isinstance(value, Quantised) for value in tensors.values())
    close(tensors["blocks.0.attn.qkv.weight"], whole["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("content, reason", [
    ({"blocks.0.attn.qkv.qweight": torch.zeros(4, 4), "blocks.0.attn.qkv.wscales": torch.zeros(4, 4)}, "SVDQuant"),
    (b"GGUF" + bytes(60), "is a GGUF file"),
])  # fmt: skip
def test_the_trainer_refuses_what_it_cannot_read_by_name(content, reason, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else write_file(path, content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(path), str(tmp_path / "b.safetensors")])
    assert reason in str(caught.value.code)
