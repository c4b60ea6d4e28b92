"""Quantised files: weights in few bits with their scales beside them, gathered into one tensor for each weight.

A gathered weight (`Quantised`) has the name, the shape and the dtype of the plain one, so that readers of files treat
both alike. Whoever can compute with the few bits takes its `parts`; everybody else gets it dequantised.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..kernels.quantized_linear import dequantize_4bit, nibbles
from .parsing import from_json

METADATA = "_quantization_metadata"  # where a file may say what `comfy_quant` says, for all layers at once
MARKER = "scaled_fp8"  # a tensor of no content beside the weights; with two elements: multiply in full precision
LONGEST_JSON = 2**16  # bytes of a layer's settings
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NVFP4_BLOCK, MXFP8_BLOCK, INVERSE_BLOCK = 16, 32, 128  # weights along a row that share a scale; the last: rows as well
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, by the lower three bits; the fourth is the sign
SIDES = (  # tensors of a layer beside its weight and bias, under ComfyUI's names
    "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "weight_s_rel", "weight_s_channel",
    "weight_codebook",
)  # fmt: skip


MAY_RETURN_ITSELF = {  # methods that do nothing to a tensor that is already as they make it
    Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.cpu,
    Tensor.cuda, Tensor.contiguous, Tensor.numpy,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    name: str
    """Name in messages."""
    whole: Callable[[Mapping[str, Tensor], Mapping, tuple], Tensor] | None
    """(parts, settings of the layer, shape) -> the weight in float32; None where only ComfyUI can."""


class Quantised(Tensor):
    """A weight as its file keeps it. Counted, renamed and passed on like any other; operations get it dequantised.

    parts: the tensors of the file, "weight" and those of SIDES, or those of the format's own. settings: what the file
    says about the layer; under "format" what ComfyUI calls the format, where it has a name for it.
    """

    format: Format
    parts: dict[str, Tensor]
    settings: dict

    @staticmethod
    def __new__(cls, format: Format, parts: dict, settings: Mapping, shape: tuple, dtype: torch.dtype):
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=next(iter(parts.values())).device)
        tensor.format, tensor.parts, tensor.settings = format, parts, dict(settings)
        return tensor

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight, in its own dtype or another."""
        return self.format.whole(self.parts, self.settings, tuple(self.shape)).to(dtype or self.dtype)

    def __repr__(self, **unused) -> str:
        return f"Quantised({self.format.name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in MAY_RETURN_ITSELF:
            args = tree_map_only(cls, cls.whole, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        dtype = torch.float32 if func is torch.ops.aten.copy_.default else None  # rounded once, not twice
        args, kwargs = tree_map_only(cls, lambda weight: weight.whole(dtype), (args, kwargs or {}))
        return func(*args, **kwargs)


def gathered(tensors: Mapping, metadata: Mapping[str, str] | None = None, runnable: Collection[str] = ()
             ) -> tuple[dict, dict[str, str]]:
    """(weights, metadata) of a file with what belongs to one weight in one `Quantised`; others as they were.

    runnable: formats, as ComfyUI calls them, that the caller has a use for even where they cannot be dequantised here.
    Raises ValueError, which names the format, for a file that neither can read, and for an incomplete one.
    """
    metadata = dict(metadata or {})
    stated = _layers(metadata.pop(METADATA, None))
    plain = {key: gathered(value, None, runnable)[0] if _is_state_dict(value) else value
             for key, value in tensors.items()}
    if all(isinstance(value, Tensor) for value in plain.values()):
        _refuse_foreign(plain)
        plain = _File(plain, stated, runnable).gathered()
    return plain, metadata


def formats(tensors: Mapping) -> dict[str, int]:
    """Name of each format among the weights -> how many have it."""
    counts = {}
    for value in tensors.values():
        if isinstance(value, Quantised):
            counts[value.format.name] = counts.get(value.format.name, 0) + 1
    return counts


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _layers(text: str | None) -> dict[str, dict]:
    if text is None:
        return {}
    stated = from_json(text, f"This file's {METADATA}")
    layers = stated.get("layers") if isinstance(stated, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(settings, dict) for settings in layers.values()):
        raise ValueError(f"This file's {METADATA} does not list its layers: it is damaged, download it again.")
    return layers


class _File:
    """The tensors of a file while those of quantised layers are taken out."""

    def __init__(self, tensors: dict[str, Tensor], stated: Mapping[str, Mapping], runnable: Collection[str]):
        self.left, self.runnable = dict(tensors), runnable
        self.ends = {key[i:]: key for key in [*tensors][::-1] if key.endswith(".weight")
                     for i in range(len(key)) if key[i] == "."}
        self.stated = {self._layer(name): settings for name, settings in stated.items()}
        self.dtype = _plain_dtype(tensors)
        self.exact = any(_is_marker(key) and value.numel() == 2 for key, value in tensors.items())

    def gathered(self) -> dict[str, Tensor]:
        gathered_weights = {}
        for mark, read in (
            (".comfy_quant", self._comfy), (".scale_weight", self._scaled), (".weight_scale_inv", self._inverse),
            (".weight_scale", self._unnamed), (".SCB", self._bitsandbytes8), (".weight._data", self._quanto),
            (".weight.absmax", self._bitsandbytes4),
        ):  # fmt: skip
            stated = self.stated if read == self._comfy else ()
            for layer in dict.fromkeys([*(k.removesuffix(mark) for k in self.left if k.endswith(mark)), *stated]):
                if (weight := read(layer)) is not None:
                    gathered_weights[f"{layer}.weight"] = weight
        if not gathered_weights:
            return {key: value for key, value in self.left.items() if not _is_marker(key)}
        layers = {key.removesuffix(".weight") for key in gathered_weights}
        unquantised = {
            key: value for key, value in self.left.items()
            if not _is_marker(key) and not (key.endswith((".input_scale", ".output_scale", ".scale_input"))
                                            and key.rpartition(".")[0] in layers)
        }
        return unquantised | gathered_weights

    def _layer(self, name: str) -> str:
        """A layer of the metadata as the keys have it: they may have a prefix that the metadata leaves out."""
        if f"{name}.weight" in self.left:
            return name
        return self.ends.get(f".{name}.weight", name).removesuffix(".weight")

    def _take(self, layer: str, name: str, needed: bool = True) -> Tensor | None:
        value = self.left.pop(f"{layer}.{name}", None)
        if value is None and needed:
            raise ValueError(f"This quantised file is incomplete: it has no {layer}.{name}. Download it again.")
        return value

    def _comfy(self, layer: str) -> Quantised:
        """ComfyUI's own: the layer's settings as JSON in a tensor, or in the metadata."""
        entry = self._take(layer, "comfy_quant", needed=False)
        settings = dict(self.stated.get(layer, {})) if entry is None else _json(entry, f"{layer}.comfy_quant")
        name = settings.get("format")
        if name not in COMFY:
            if name not in self.runnable:
                raise ValueError(_refusal(f"{name} (comfy_quant)"))
            format = Format(str(name), None)
        else:
            format = COMFY[name]
            if format.whole is None and name not in self.runnable:
                raise ValueError(_refusal(format.name))
        parts = {"weight": self._take(layer, "weight")}
        for side in SIDES:
            value = self._take(layer, side, needed=side in NEEDED.get(name, ()))
            if value is not None:
                parts[side] = value
        return self._made(layer, format, parts, settings)

    def _scaled(self, layer: str) -> Quantised:
        """Core's scaled fp8 from before comfy_quant."""
        parts = {"weight": self._take(layer, "weight"), "weight_scale": self._take(layer, "scale_weight")}
        given = self._take(layer, "scale_input", needed=False)
        if given is not None and not self.exact and given.numel() == 1 and given.item() != 1:
            parts["input_scale"] = given
        return self._made(layer, SCALED_FP8, parts, {"full_precision_matrix_mult": True} if self.exact else {})

    def _unnamed(self, layer: str) -> Quantised | None:
        """A scale without a format entry: the dtype of the weight shows the format."""
        weight = self.left.get(f"{layer}.weight")
        if weight is None:
            return None
        if weight.dtype == torch.uint8:
            raise ValueError(_refusal("4 bits with a scale for each block (as ModelOpt and compressed-tensors write)"))
        parts = {"weight": self._take(layer, "weight"), "weight_scale": self._take(layer, "weight_scale")}
        for side in ("input_scale", "pre_quant_scale"):
            if (value := self._take(layer, side, needed=False)) is not None and value.numel() >= 1:
                parts[side] = value
        return self._made(layer, INT8 if weight.dtype == torch.int8 else SCALED_FP8, parts, {})

    def _inverse(self, layer: str) -> Quantised:
        parts = {"weight": self._take(layer, "weight"), "scale": self._take(layer, "weight_scale_inv")}
        return self._made(layer, BLOCK_FP8, parts, {})

    def _bitsandbytes8(self, layer: str) -> Quantised:
        order = self._take(layer, "weight_format", needed=False)
        if order is not None and order.numel() == 1 and order.item() != 0:
            raise ValueError(_refusal("bitsandbytes in the order of one kind of GPU (weight_format)"))
        parts = {"weight": self._take(layer, "weight"), "scale": self._take(layer, "SCB")}
        return self._made(layer, BITSANDBYTES8, parts, {})

    def _bitsandbytes4(self, layer: str) -> Quantised:
        start = f"{layer}.weight."
        kind = next((k for k in BITSANDBYTES4 if f"{start}quant_state.bitsandbytes__{k}" in self.left), None)
        if kind is None:
            raise ValueError(f"This quantised file is incomplete: it has no {start}quant_state. Download it again.")
        state = f"{start}quant_state.bitsandbytes__{kind}"
        settings = _json(self.left.pop(state), state)
        parts = {"weight": self._take(layer, "weight")}
        for side in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            needed = not side.startswith("nested") or "nested_blocksize" in settings
            value = self._take(layer, f"weight.{side}", needed)
            if value is not None:
                parts[side] = value
        dtype = getattr(torch, str(settings.get("dtype")), None)
        dtype = dtype if isinstance(dtype, torch.dtype) else self.dtype
        _check_blocks(layer, parts, settings)
        return Quantised(BITSANDBYTES4[kind], parts, settings, tuple(settings["shape"]), dtype)

    def _quanto(self, layer: str) -> Quantised:
        parts = {"weight": self._take(layer, "weight._data"), "scale": self._take(layer, "weight._scale")}
        return self._made(layer, QUANTO, parts, {})

    def _made(self, layer: str, format: Format, parts: dict[str, Tensor], settings: Mapping) -> Quantised:
        weight = parts["weight"]
        settings = dict(settings)
        if format is SCALED_FP8 and weight.dtype in FP8 and parts.get("weight_scale", weight[:0]).numel() <= 1:
            settings["format"] = str(weight.dtype).removeprefix("torch.")
        elif format is SCALED_FP8:
            settings.pop("format", None)  # ComfyUI knows one scale for the whole weight
        name, shape = settings.get("format"), tuple(weight.shape)
        if name in ("nvfp4", "convrot_w4a4", "asym_w4a8_int8"):  # two weights a byte
            shape = (shape[0], 2 * shape[1])
        bias = self.left.get(f"{layer}.bias")
        if name in ("nvfp4", "mxfp8") and bias is not None and len(bias) < shape[0]:
            shape = (len(bias), shape[1])  # rows are added until they fill blocks
        return Quantised(format, parts, settings, shape, self.dtype)


def _check_blocks(layer: str, parts: Mapping[str, Tensor], settings: Mapping):
    """Raise ValueError where a layer's settings do not go with its parts, before anything of those sizes is made."""
    shape, block = settings.get("shape"), settings.get("blocksize")
    whole = isinstance(shape, list) and all(isinstance(side, int) and 0 < side <= 2**31 for side in shape)
    fits = whole and prod(shape) <= 2 * parts["weight"].numel() < prod(shape) + 2
    if not fits or not isinstance(block, int) or not -(-prod(shape) // max(1, block)) == parts["absmax"].numel():
        raise ValueError(f"{layer}.weight of this quantised file holds {2 * parts['weight'].numel():,} values in "
                         f"{parts['absmax'].numel():,} blocks, and says shape={str(shape)[:60]}, "
                         f"blocksize={str(block)[:20]}: it is damaged, download it again.")
    inner = settings.get("nested_blocksize", 1)
    if "nested_absmax" in parts and not (isinstance(inner, int) and inner > 0 and
                                         -(-parts["absmax"].numel() // inner) == parts["nested_absmax"].numel()):
        raise ValueError(f"{layer}.weight of this quantised file says nested_blocksize={str(inner)[:20]}, which does "
                         "not go with its blocks: it is damaged, download it again.")


def _is_marker(key: str) -> bool:
    return key == MARKER or key.endswith("." + MARKER)


def _plain_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the unquantised weights, in which quantised ones are dequantised."""
    count = {}
    for key, value in tensors.items():
        if value.dtype in (torch.float32, torch.float16, torch.bfloat16) and not key.endswith(("scale", "absmax")):
            count[value.dtype] = count.get(value.dtype, 0) + value.numel()
    return max(count, key=count.get, default=torch.bfloat16)


def _json(value: Tensor, key: str) -> dict:
    if value.numel() > LONGEST_JSON:
        raise ValueError(f"{key} of this quantised file has {value.numel():,} bytes, and holds a line of settings: it "
                         "is damaged, download it again.")
    settings = from_json(bytes(value.to(torch.uint8).flatten().tolist()), f"{key} of this quantised file")
    if not isinstance(settings, dict):
        raise ValueError(f"{key} of this quantised file is no table of settings: it is damaged, download it again.")
    return settings


FOREIGN = (  # every one of these endings is in a file of the format
    ((".qweight", ".wscales"), "SVDQuant (Nunchaku)"),
    ((".qweight", ".wtscale"), "SVDQuant (Nunchaku)"),
    ((".qweight", ".qzeros"), "GPTQ or AWQ"),
    ((".weight._data", ".weight._shift"), "optimum-quanto (qint2 or qint4)"),
    ((".weight._data._data",), "optimum-quanto (qint2 or qint4)"),
    ((".W_q",), "HQQ"),
)


def _refuse_foreign(tensors: Mapping[str, Tensor]):
    for endings, name in FOREIGN:
        if all(any(key.endswith(ending) for key in tensors) for ending in endings):
            raise ValueError(_refusal(name))


def _refusal(name: str) -> str:
    return (f"This file is quantised as {name}: it can neither be run as it is nor dequantised here. Get the "
            "bf16, fp16 or fp8 file of the same model.")


# --- Formulas: parts of the file -> the weight in float32

def _scaled(parts, settings, shape) -> Tensor:
    """weight * scale, the scale one for all or one for each row; a scale of the inputs belongs to their columns."""
    weight, scale = parts["weight"].float(), parts.get("weight_scale", parts.get("scale"))
    if scale is not None:
        weight = weight * (scale.float().reshape(()) if scale.numel() == 1
                           else scale.float().reshape(-1, *[1] * (weight.ndim - 1)))
    return _smoothed(weight, parts)


def _smoothed(weight: Tensor, parts) -> Tensor:
    """The weight with the inputs' own scale (AWQ) multiplied in."""
    return weight if "pre_quant_scale" not in parts else weight * parts["pre_quant_scale"].float()


def _int8(parts, settings, shape) -> Tensor:
    weight = _scaled({key: value for key, value in parts.items() if key != "pre_quant_scale"}, settings, shape)
    more = settings.get("params") if isinstance(settings.get("params"), Mapping) else {}
    if settings.get("convrot", more.get("convrot", False)):
        size = settings.get("convrot_groupsize", more.get("convrot_groupsize", 256))
        if not isinstance(size, int) or size < 1 or weight.shape[-1] % size:
            raise ValueError(f"This file rotates its weights in groups of {str(size)[:20]}, which do not divide "
                             f"{weight.shape[-1]} columns.")
        weight = (weight.unflatten(-1, (-1, size)) @ _rotation(size, weight.device)).flatten(-2)
    return _smoothed(weight, parts)


def _rotation(size: int, device) -> Tensor:
    """Regular Hadamard matrix of a power of 4, (size, size): symmetric and its own inverse."""
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    if len(matrix) != size:
        raise ValueError(f"This file rotates its weights in groups of {size}, which is not a power of 4.")
    return matrix / size**0.5


def _in_rows(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) out of the tiles of 128 x 4 that cuBLAS wants them in.

    https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
    """
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(down, across, 32, 4, 4)  # row 32 a + b of a tile is at [b, a]
    return rearrange(tiles, "down across b a column -> (down a b) (across column)")[:rows, :columns]


def _mxfp8(parts, settings, shape) -> Tensor:
    weight = parts["weight"].float()
    rows, columns = weight.shape
    power = _in_rows(parts["weight_scale"].view(torch.uint8), rows, columns // MXFP8_BLOCK).int() - 127
    scale = torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)
    whole = (weight.unflatten(1, (-1, MXFP8_BLOCK)) * scale[..., None]).flatten(1)
    return _smoothed(whole, parts)[: shape[0]]


def _nvfp4(parts, settings, shape) -> Tensor:
    codes = nibbles(parts["weight"]).flatten(1)  # (rows, columns)
    rows, columns = codes.shape
    values = codes.new_tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES), dtype=torch.float32)[codes.long()]
    scale = _in_rows(parts["weight_scale"].view(torch.float8_e4m3fn), rows, columns // NVFP4_BLOCK).float()
    scale = scale * parts["weight_scale_2"].float()
    whole = (values.unflatten(1, (-1, NVFP4_BLOCK)) * scale[..., None]).flatten(1)
    return _smoothed(whole, parts)[: shape[0]]


def _blocks(parts, settings, shape) -> Tensor:
    weight, scale = parts["weight"].float(), parts["scale"].float()
    for axis in (0, 1):
        scale = scale.repeat_interleave(INVERSE_BLOCK, axis).narrow(axis, 0, weight.shape[axis])
    return weight * scale


def _bitsandbytes4(parts, settings, shape) -> Tensor:
    """arXiv 2305.14314: one of 16 values times the largest of its block, which may be quantised in turn."""
    largest, block = parts["absmax"], int(settings["blocksize"])
    if "nested_absmax" in parts:
        inner = parts["nested_quant_map"].float()[largest.long()]
        outer = parts["nested_absmax"].float().repeat_interleave(int(settings["nested_blocksize"]))
        largest = inner * outer[: len(inner)] + float(settings["nested_offset"])
    return dequantize_4bit(parts["weight"], largest, parts["quant_map"], shape, block)


def _bitsandbytes8(parts, settings, shape) -> Tensor:
    return parts["weight"].float() * (parts["scale"].float() / 127).reshape(-1, 1)


SCALED_FP8 = Format("scaled fp8", _scaled)
INT8 = Format("int8", _int8)
BLOCK_FP8 = Format("fp8 with a scale for each 128 x 128 weights", _blocks)
BITSANDBYTES4 = {kind: Format(f"bitsandbytes ({kind})", _bitsandbytes4) for kind in ("nf4", "fp4")}
BITSANDBYTES8 = Format("bitsandbytes (int8)", _bitsandbytes8)
QUANTO = Format("optimum-quanto", _scaled)
COMFY = {  # as `comfy_quant` calls them
    "float8_e4m3fn": SCALED_FP8,
    "float8_e5m2": SCALED_FP8,
    "mxfp8": Format("mxfp8", _mxfp8),
    "nvfp4": Format("nvfp4", _nvfp4),
    "int8_tensorwise": INT8,
    "convrot_w4a4": Format("convrot_w4a4", None),
    "asym_w4a8_int8": Format("asym_w4a8_int8", None),
}
NEEDED = {
    "mxfp8": ("weight_scale",), "nvfp4": ("weight_scale", "weight_scale_2"), "int8_tensorwise": ("weight_scale",),
    "convrot_w4a4": ("weight_scale",), "asym_w4a8_int8": ("weight_s_rel",),
}  # fmt: skip
