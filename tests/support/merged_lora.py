"""Weights with the changes of a LoRA file merged, to compare what a host or a trainer makes of the file with."""
from collections.abc import Mapping

import torch
from pixstack.models_impl.lora import Lora, delta
from torch import Tensor


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """A new table with `strength` times every layer's change added in float32; tensors that no layer changes are the
    same objects, and none is written to. Raises ValueError when a layer's parameter is missing or of another size."""
    merged, touched = dict(weights), {}
    for layer in lora.layers:
        if layer.key not in weights:
            raise ValueError(f"The LoRA changes {layer.key}, which these weights do not have.")
        before = weights[layer.key]
        if layer.key not in touched:
            touched[layer.key] = before.to(torch.promote_types(torch.float32, before.dtype), copy=True)
        after = touched[layer.key]
        start, length = layer.rows or (0, after.shape[0])
        part = after[start : start + length]
        part += strength * delta(layer, part.shape, part)
    return {**merged, **{key: value.to(weights[key].dtype) for key, value in touched.items()}}
