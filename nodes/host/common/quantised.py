"""Quantised files in ComfyUI: what its own operations compute with stays in few bits, the rest is dequantised.

ComfyUI has these operations in two forms. 0.3.75 wants the formats of all layers in the model's configuration and knows
float8_e4m3fn; later ones read the format of each layer from a tensor beside its weight, and comfy-kitchen brings more.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from types import SimpleNamespace

import comfy.ops
import comfy.quant_ops
import comfy.supported_models_base
import torch
from torch import nn

from ....models_impl.quantised_files import FP8, Quantised

EMBEDDED = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # formats of which ComfyUI can look up single rows
OPERATIONS = "MixedPrecisionOps"  # ComfyUI's class of them, made anew for each model


def runnable() -> frozenset[str]:
    """Formats that this ComfyUI computes with, by its own names."""
    if not getattr(comfy.quant_ops, "_CK_AVAILABLE", True):  # after 0.3.75, without the package comfy-kitchen
        return frozenset()
    return frozenset(comfy.quant_ops.QUANT_ALGOS)


def kept(tensors: Mapping, dtype: torch.dtype | None = None) -> dict[str, dict]:
    """Layer -> settings, of the weights that stay as their file keeps them; empty for a file that is not quantised.

    dtype: of the storage that the user asks for. One with more bits dequantises the weights, unless only ComfyUI could.
    """
    whole = dtype is not None and dtype not in FP8
    return {key.removesuffix(".weight"): value.settings for key, value in tensors.items()
            if isinstance(value, Quantised) and _is_run(value) and not (whole and value.format.whole)}


def entries(layers: Mapping[str, dict]) -> dict:
    """Entries of a model's configuration with which `pick_operations` chooses operations for `kept` layers."""
    if not layers:
        return {}
    if hasattr(comfy.supported_models_base.BASE, "layer_quant_config"):  # 0.3.75
        return {"layer_quant_config": dict(layers)}
    return {"quant_config": {"mixed_ops": True}}


def operations(stored: torch.dtype, cast: torch.dtype | None, layers: Mapping[str, dict]):
    """ComfyUI's operations for a network without a model's configuration, weights in `stored` but for `kept` layers."""
    if not layers:
        return comfy.ops.pick_operations(stored, cast)
    return comfy.ops.pick_operations(stored, cast, model_config=SimpleNamespace(**entries(layers)))


def encoder_operations(layers: Mapping[str, dict], dtype: torch.dtype):
    """Operations of a text encoder, which core has compute in full precision."""
    return comfy.ops.mixed_precision_ops(dict(layers), dtype, full_precision_mm=True)


def for_net(net: nn.Module, tensors: Mapping, assign: bool = False) -> dict:
    """The tensors as `load_state_dict` of this network takes them: those of `kept` layers under ComfyUI's names, others
    dequantised. assign: the tensors themselves become the network's."""
    loaded, counts = {}, {}
    for key, value in tensors.items():
        if not isinstance(value, Quantised):
            loaded[key] = value
            continue
        layer = key.removesuffix(".weight")
        runs = _is_run(value) and _takes(net.get_submodule(layer), value)
        counts[runs] = counts.get(runs, 0) + 1
        if runs:
            loaded |= _named(layer, value)
        else:
            owner = net.get_submodule(key.rpartition(".")[0])
            loaded[key] = value  # dequantised when it is copied, one after the other
            if assign:
                loaded[key] = value.whole(getattr(owner, "weight_comfy_model_dtype", None))
    if counts:
        logging.info("PixStack: of %d quantised weights %d stay so in ComfyUI's operations, %d are dequantised.",
                     sum(counts.values()), counts.get(True, 0), counts.get(False, 0))
    return loaded


def in_fp8(net: nn.Module, tensors: Mapping) -> dict:
    """The tensors with those weights in float8_e4m3fn that core's fp8 operations multiply with: they look at the dtype
    of the weight that was loaded, which stays the file's where ComfyUI moves weights at use."""
    layers = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, comfy.ops.fp8_ops.Linear)}
    return {key: value.to(torch.float8_e4m3fn) if key in layers else value for key, value in tensors.items()}


def _is_run(value: Quantised) -> bool:
    return value.ndim == 2 and value.settings.get("format") in runnable() and set(value.parts) <= _sides(value)


def _sides(value: Quantised) -> set[str]:
    """Names of tensors that ComfyUI reads in a layer of this format."""
    name = value.settings["format"]
    return {"weight", "weight_s_rel", "weight_s_channel", "weight_codebook",
            *comfy.quant_ops.QUANT_ALGOS[name]["parameters"]}


def _takes(layer: nn.Module, value: Quantised) -> bool:
    """Whether a layer is of the operations that compute with such weights."""
    *_, operations, kind = ("", *type(layer).__qualname__.split("."))
    return operations == OPERATIONS and (
        kind == "Linear" or kind == "Embedding" and value.settings["format"] in EMBEDDED)


def _named(layer: str, value: Quantised) -> dict:
    named = {f"{layer}.{name}": part for name, part in value.parts.items()}
    if hasattr(comfy.supported_models_base.BASE, "layer_quant_config"):  # 0.3.75 multiplies in fp8 where this is
        if value.settings.get("full_precision_matrix_mult"):
            named.pop(f"{layer}.input_scale", None)
    else:
        encoded = json.dumps(value.settings).encode()
        named[f"{layer}.comfy_quant"] = torch.tensor(list(encoded), dtype=torch.uint8)
    return named
