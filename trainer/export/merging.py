"""LoRAs merged into the model that they were made for: a file of the same dtypes, written tensor by tensor."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...models_impl import known_files, lora, state_dict, streamed_file
from ...models_impl.flux import checkpoint as flux_checkpoint
from ...models_impl.guard import reading
from ...models_impl.pixart import checkpoint as pixart_checkpoint
from ...models_impl.pixart import lora as pixart_lora
from ...models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from ...models_impl.quantised_files import Quantised
from ...models_impl.ultrapixel import checkpoint as ultrapixel_checkpoint
from ...models_impl.ultrapixel import lora as ultrapixel_lora
from .places import refuse_dest, said


@dataclass(frozen=True)
class OpenedModel:
    config: object
    tensors: dict[str, Tensor]
    """As the file has them, in memory or mapped from it."""
    metadata: dict[str, str]
    names: lora.Names
    keys: Mapping[str, str] | None = None
    """Key in the file that is written -> ours, where they differ."""


def _pixart(path: Path, tensors: dict, metadata: dict) -> OpenedModel:
    config, own = pixart_checkpoint.read(tensors, metadata, beside=pixart_checkpoint.beside(path))
    return OpenedModel(config, own, pixart_checkpoint.metadata(config), pixart_lora.names(shapes(own)))


def _pixelflow(path: Path, tensors: dict, metadata: dict) -> OpenedModel:
    config, own = pixelflow_checkpoint.read(tensors, metadata, beside=pixelflow_checkpoint.config_beside(path))
    known = pixelflow_checkpoint.metadata(config, pixelflow_checkpoint.class_names(metadata, config))
    return OpenedModel(config, own, known, lora.names_of(shapes(own)))


def _flux(path: Path, tensors: dict, metadata: dict) -> OpenedModel:
    config, own = flux_checkpoint.read(tensors, metadata)
    return OpenedModel(config, own, flux_checkpoint.metadata(config), lora.names_of(shapes(own)))


def _stage_c(path: Path, tensors: dict, metadata: dict) -> OpenedModel:
    config, own = ultrapixel_checkpoint.read_stage_c(tensors, metadata)
    keys = ultrapixel_checkpoint.released_attention_names({key: key for key in own})  # those that core reads too
    return OpenedModel(config, own, ultrapixel_checkpoint.metadata(config), lora.names_of(shapes(own)), keys)


READERS: dict[str, Callable[[Path, dict, dict], OpenedModel]] = {  # by known_files.KINDS
    "PixArt": _pixart, "PixelFlow": _pixelflow, "FLUX": _flux, "Stable Cascade's Stage C": _stage_c,
}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items()}


def merge_into(base: Path, sources: Sequence[tuple[Path, float]], dest: Path, force: bool = False) -> list[str]:
    """Writes `dest`, the model with the changes of LoRAs in it, each times its weight, in the base's dtypes. Returns
    what was done."""
    refuse_dest(dest, [base, *(path for path, _ in sources)], force)
    with reading(base):
        tensors, metadata = state_dict.read_file(base)
        family = known_files.family_of(known_files.names(tensors))
        if family not in READERS:
            raise ValueError(f"LoRAs are merged into {', '.join(READERS)}. {known_files.whose(tensors)}")
        model = READERS[family](base, tensors, metadata)
        if packed := next((key for key, value in model.tensors.items() if isinstance(value, Quantised)), None):
            raise ValueError(f"{packed} is quantised there, and a change smaller than its steps would be lost: merge "
                             "into the model that it was made of.")
    changes, notes = {}, []
    for path, weight in sources:
        with reading(path):
            layers, more = changes_of(path, model)
        notes += [f"{path.name}: {note}" for note in more]
        for layer in layers:
            changes.setdefault(layer.key, []).append((layer, weight))

    keys = model.keys or {key: key for key in model.tensors}

    def made(name: str) -> Tensor:
        key = keys[name]
        return changed(model.tensors[key], changes[key]) if key in changes else model.tensors[key]

    told = [{"file": path.name, "weight": weight} for path, weight in sources]
    origin = {"format": "pt", "pixstack.merged": json.dumps({"into": base.name, "loras": told})}
    streamed_file.write(dest, {name: model.tensors[key] for name, key in keys.items()}, made,
                        {**model.metadata, **origin})
    return [*notes, f"{len(changes)} weights of {len(model.tensors)} are changed by {len(sources)} LoRAs", said(dest)]


def changes_of(path: Path, model: OpenedModel) -> tuple[list[lora.Layer], list[str]]:
    """(the layers of a LoRA file for this model, what to say of them). Raises ValueError where a part has no place."""
    tensors, metadata = state_dict.read_file(path)
    if ultrapixel_lora.is_personalisation(tensors):
        return of_personalisation(tensors, metadata, model)
    read = lora.read(tensors, model.names, metadata, lora.beside(path))
    if read.unmatched:
        raise ValueError(f"{len(read.unmatched)} of its keys have no place in this model, such as {read.unmatched[0]}.")
    left = [f"{len(read.text_encoder)} keys of the text encoder are left out"] if read.text_encoder else []
    return read.layers, left


def of_personalisation(tensors: dict, metadata: dict, model: OpenedModel) -> tuple[list[lora.Layer], list[str]]:
    stage_c = next((c for c in [model.config] if isinstance(c, ultrapixel_checkpoint.StageCConfig)), None)
    if stage_c is None:
        raise ValueError("its modules are those of Stable Cascade's Stage C, and the base is another model.")
    read = ultrapixel_lora.read(tensors, metadata, stage_c)
    layers = [lora.Layer(key, None, "lora", {"lora_up": up, "lora_down": down}, read.scale)
              for key, (up, down) in read.layers.items()]
    if missing := [layer.key for layer in layers if layer.key not in model.tensors]:
        raise ValueError(f"{len(missing)} of its layers are not in this Stage C, such as {missing[0]}.")
    word = [f"its word {read.token or ''} is the text encoder's and stays in the LoRA"] if read.token_rows else []
    return layers, word


@torch.no_grad()
def changed(weight: Tensor, changes: Sequence[tuple[lora.Layer, float]]) -> Tensor:
    """A weight with its changes, in float32 until the last of them, in its own dtype."""
    after = weight.to(torch.promote_types(torch.float32, weight.dtype), copy=True)
    for layer, strength in changes:
        start, length = layer.rows or (0, after.shape[0])
        part = after[start : start + length]
        part += strength * lora.delta(layer, part.shape, part)
    limit = torch.finfo(weight.dtype).max
    return after.clamp(-limit, limit).to(weight.dtype)  # what is beyond becomes NaN in fp8
