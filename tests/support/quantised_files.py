"""Plain weights as quantised files hold them, written out anew here, with what the formats make of the numbers."""
import json
from collections.abc import Callable

import torch

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def as_json(settings: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def fp8(weight, dtype=torch.float8_e4m3fn):
    scale = weight.abs().max() / torch.finfo(dtype).max
    packed = (weight / scale).to(dtype)
    return packed, scale, packed.float() * scale


def scaled_fp8(layer, weight):
    packed, scale, whole = fp8(weight)
    return {f"{layer}.weight": packed, f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}, whole


def comfy_fp8(layer, weight, dtype=torch.float8_e4m3fn):
    packed, scale, whole = fp8(weight, dtype)
    settings = {"format": str(dtype).removeprefix("torch.")}
    return {f"{layer}.weight": packed, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": as_json(settings)}, whole


def comfy_fp8_e5m2(layer, weight):
    return comfy_fp8(layer, weight, torch.float8_e5m2)


def int8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    packed = (weight / scale).round().to(torch.int8)
    return packed, scale, packed.float() * scale


def comfy_int8(layer, weight):
    packed, scale, whole = int8_rows(weight)
    return {f"{layer}.weight": packed, f"{layer}.weight_scale": scale,
            f"{layer}.comfy_quant": as_json({"format": "int8_tensorwise"})}, whole


def in_tiles(scales):
    """Block scales in the order of cuBLAS's tiles, each where the manual's formula puts it."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    tiled = torch.zeros(down * across * 512, dtype=scales.dtype)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * across + column // 4
            tiled[tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4] = scales[row, column]
    return tiled.view(128 * down, 4 * across)


def mxfp8(layer, weight):
    blocks = weight.unflatten(1, (-1, 32))
    power = (blocks.abs().amax(2) / 448).log2().ceil().int()
    packed = (blocks / 2.0 ** power[..., None]).to(torch.float8_e4m3fn)
    whole = (packed.float() * 2.0 ** power[..., None]).flatten(1)
    return {f"{layer}.weight": packed.flatten(1), f"{layer}.weight_scale": in_tiles((power + 127).to(torch.uint8)),
            f"{layer}.comfy_quant": as_json({"format": "mxfp8"})}, whole


def nvfp4(layer, weight):
    overall = weight.abs().max() / (448 * 6)
    blocks = weight.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / 6 / overall).to(torch.float8_e4m3fn)
    each = scale.float()[..., None] * overall
    codes = ((blocks / each).abs()[..., None] - FP4).abs().argmin(-1)
    whole = (FP4[codes] * blocks.sign() * each).flatten(1)
    codes = (codes + 8 * (blocks < 0)).to(torch.uint8).flatten(1)
    tiles = in_tiles(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return {f"{layer}.weight": codes[:, ::2] << 4 | codes[:, 1::2], f"{layer}.weight_scale": tiles,
            f"{layer}.weight_scale_2": overall, f"{layer}.comfy_quant": as_json({"format": "nvfp4"})}, whole


def bitsandbytes_nf4(layer, weight, nested=False):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Row by row of a block: bitsandbytes 0.50 makes other numbers on a CPU where a block goes on in the next row.
    packed, state = quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=nested)
    entries = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    beside = {"absmax": state.absmax, "quant_map": state.code}
    if nested:
        entries |= {"nested_blocksize": state.state2.blocksize, "nested_dtype": "float32",
                    "nested_offset": state.offset.item()}
        beside |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
    return {f"{layer}.weight": packed, **{f"{layer}.weight.{name}": value for name, value in beside.items()},
            f"{layer}.weight.quant_state.bitsandbytes__nf4": as_json(entries)}, dequantize_4bit(packed, state).reshape(
                weight.shape)


def bitsandbytes_nf4_twice(layer, weight):
    return bitsandbytes_nf4(layer, weight, nested=True)


def bitsandbytes_int8(layer, weight):
    largest = weight.abs().amax(1)
    packed = (weight * 127 / largest[:, None]).round().to(torch.int8)
    order = torch.zeros((), dtype=torch.uint8)
    return {f"{layer}.weight": packed, f"{layer}.SCB": largest, f"{layer}.weight_format": order
            }, packed.float() * largest[:, None] / 127


def quanto(layer, weight):
    packed, scale, whole = int8_rows(weight)
    return {f"{layer}.weight._data": packed, f"{layer}.weight._scale": scale, f"{layer}.input_scale": torch.ones(()),
            f"{layer}.output_scale": torch.ones(())}, whole


def deepseek_fp8(layer, weight):
    packed, whole = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-len(weight) // 128), -(-weight.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            packed[here], scales[i, j], whole[here] = fp8(weight[here])
    return {f"{layer}.weight": packed, f"{layer}.weight_scale_inv": scales}, whole


def fp8_rows(layer, weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{layer}.weight": packed, f"{layer}.weight_scale": scale}, packed.float() * scale


FORMATS = {
    made.__name__: made for made in (
        scaled_fp8, comfy_fp8, comfy_fp8_e5m2, comfy_int8, mxfp8, nvfp4, bitsandbytes_nf4, bitsandbytes_nf4_twice,
        bitsandbytes_int8, quanto, deepseek_fp8, fp8_rows,
    )
}  # fmt: skip


def quantised(tensors: dict, format: str, chosen: Callable[[str, torch.Tensor], bool]) -> tuple[dict, dict]:
    """(the file's tensors, the plain ones that stand for the same numbers). chosen: which weights are quantised."""
    packed, whole = {}, {}
    for key, value in tensors.items():
        if key.endswith(".weight") and chosen(key, value):
            parts, whole[key] = FORMATS[format](key.removesuffix(".weight"), value)
            packed |= parts
        else:
            packed[key] = whole[key] = value
    if format == "scaled_fp8":
        packed["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return packed, whole


def in_blocks(key: str, value: torch.Tensor) -> bool:
    """Matrices inside the blocks whose sizes suit every format. ComfyUI after 0.3.75 quantises those under 16 KB anew,
    with random rounding, where it moves weights at use."""
    return (value.ndim == 2 and "block" in key and value.shape[1] % 32 == 0 and value.shape[0] % 16 == 0
            and value.numel() >= 2**15)
