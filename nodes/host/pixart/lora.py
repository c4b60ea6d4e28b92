"""LoRA files as ComfyUI patches of a PixArt MODEL."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.weight_adapter
import torch
from torch import Tensor

from ....models_impl import lora
from ....models_impl.guard import reading
from ....models_impl.pixart.lora import names
from ....models_impl.state_dict import expected_shapes, read_file
from .model import config_of

PREFIX = "diffusion_model."


class LayerAdapter(comfy.weight_adapter.WeightAdapterBase):
    """One layer of `models_impl.lora`, so that the nodes and the trainer change weights by the same formulas.

    ComfyUI counts the memory of the tensors in `weights`. After 0.3.75 it also makes the adapter again, as
    `type(adapter)(adapter.loaded_keys, weights)`, with the tensors of `weights` on another device and everything else
    in there as it was: so the layer comes first, without its tensors.
    """

    name = "pixstack"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, layer: lora.Layer) -> LayerAdapter:
        return cls({layer.key}, (replace(layer, tensors=dict.fromkeys(layer.tensors)), *layer.tensors.values()))

    @property
    def layer(self) -> lora.Layer:
        layer, *tensors = self.weights
        return replace(layer, tensors=dict(zip(layer.tensors, tensors, strict=True)))

    def calculate_weight(self, weight: Tensor, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None) -> Tensor:
        # in place: with an offset ComfyUI gives a view, and keeps the whole
        weight += function((strength * lora.delta(self.layer, weight.shape, weight)).to(weight.dtype))
        return weight


def load(model, path: str, strength: float, alpha: float | None) -> tuple:
    """(a clone of MODEL with the LoRA of the file, a report in words). Raises ValueError when nothing fits."""
    config_of(model)
    file = Path(path)
    shapes = expected_shapes(model.model.diffusion_model)
    with reading(file):
        tensors, metadata = read_file(file)
        adapter = lora.read(tensors, names(shapes), metadata, lora.beside(file), alpha)
    patches = {_place(layer): LayerAdapter.of(layer) for layer in adapter.layers}
    patched = model.clone()
    taken = set(patched.add_patches(patches, strength))
    missed = [layer.key for layer in adapter.layers if _place(layer) not in taken]
    assert not missed, f"the names table leads to parameters that are not in the model: {missed[:3]}"
    matched = f"{file.name}: {len(adapter.layers)} layers applied with strength {strength:g}."
    return patched, "\n".join([matched, *adapter.notes])


def _place(layer: lora.Layer) -> str | tuple:
    key = PREFIX + layer.key
    return key if layer.rows is None else (key, (0, *layer.rows))
