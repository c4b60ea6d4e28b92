"""LoRA files as ComfyUI patches of a PixArt MODEL."""
from __future__ import annotations

from pathlib import Path

import comfy.weight_adapter
import torch
from torch import Tensor

from ...models_impl import lora
from ...models_impl.pixart.lora import names
from ...models_impl.state_dict import read_file
from .pixart import config_of

PREFIX = "diffusion_model."


class LayerAdapter(comfy.weight_adapter.WeightAdapterBase):
    """One layer of `models_impl.lora`, so that the nodes and the trainer change weights by the same formulas."""

    name = "pixstack"

    def __init__(self, layer: lora.Layer):
        self.layer = layer
        self.loaded_keys = set()
        self.weights = list(layer.tensors.values())  # ComfyUI counts their memory

    def calculate_weight(self, weight: Tensor, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None) -> Tensor:
        # in place: with an offset ComfyUI gives a view, and keeps the whole
        weight += function((strength * lora.delta(self.layer, weight.shape, weight)).to(weight.dtype))
        return weight


def load(model, path: str, strength: float, alpha: float | None) -> tuple:
    """(a clone of MODEL with the LoRA of the file, what was found in words). Raises ValueError when nothing fits."""
    config_of(model)
    file = Path(path)
    shapes = {key: value.shape for key, value in model.model.diffusion_model.state_dict().items()}
    tensors, metadata = read_file(file)
    try:
        found = lora.read(tensors, names(shapes), metadata, lora.beside(file), alpha)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    patches = {_place(layer): LayerAdapter(layer) for layer in found.layers}
    patched = model.clone()
    taken = set(patched.add_patches(patches, strength))
    missed = [layer.key for layer in found.layers if _place(layer) not in taken]
    assert not missed, f"the names table leads to parameters that are not in the model: {missed[:3]}"
    matched = f"{file.name}: {len(found.layers)} layers applied with strength {strength:g}."
    return patched, "\n".join([matched, *found.notes])


def _place(layer: lora.Layer) -> str | tuple:
    key = PREFIX + layer.key
    return key if layer.rows is None else (key, (0, *layer.rows))
