"""PixelFlow's files: the released `model.pt`, training files, and our own safetensors."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..guard import shape_of
from ..known_files import WrongFile, family_of
from ..parsing import LONGEST, from_json, from_yaml
from ..state_dict import (
    config_metadata,
    count,
    metadata_config,
    refuse_contradictions,
    refuse_incomplete,
    unwrapped,
)
from .config import PixelFlowConfig

FAMILY = "pixelflow"
RELEASED_HEAD_DIM = 72  # not in keys or shapes: the query norm spans all heads
CLASSES = "pixstack.classes"  # names of the classes, in the metadata of our exported safetensors
NEEDED = ("patch_embed.proj.weight", "proj_out_2.weight", "transformer_blocks.0.attn1.q_proj.weight")
RELEASED_RESOLUTION = {"class": 256, "text": 1024}


def read(
    tensors: Mapping,
    metadata: Mapping[str, str] | None = None,
    weights: str = "ema",
    config: Mapping | None = None,
    beside: Mapping | None = None,
) -> tuple[PixelFlowConfig, dict[str, Tensor]]:
    """(configuration, weights under the released key names) from the contents of a file (`state_dict.read_file`).

    weights: "ema" or "model", which of the two to take from a training file {model, ema, opt, args}; EMA falls back to
    the model when there is none. config: entries that complete and must not contradict what the shapes say. beside: the
    same from `config_beside`, which may be of another file in the folder: it counts where it fits and the file itself
    says nothing. Raises ValueError for a file of another family.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights={weights!r} must be 'ema' or 'model'.")
    tensors = unwrapped(tensors, ("ema", "model") if weights == "ema" else ("model",))
    if family_of(tensors) != "PixelFlow":
        raise WrongFile("This is not a PixelFlow checkpoint.", tensors)
    refuse_incomplete(tensors, NEEDED, "PixelFlow checkpoint")
    own = metadata_config(metadata or {}, FAMILY, PixelFlowConfig) or {}
    stated = {**own, **PixelFlowConfig.entries_of(config or {})}
    if not stated and beside is not None:
        stated = _if_it_fits(PixelFlowConfig.entries_of(beside), tensors)
    shapes = _from_shapes(tensors, stated.get("head_dim", RELEASED_HEAD_DIM))
    refuse_contradictions(shapes, stated)
    return PixelFlowConfig(**{**_trained_for(shapes, stated), **shapes, **stated}), tensors


def config_beside(path: str | os.PathLike) -> dict | None:
    """The yaml of a release or a training run that lies beside its checkpoint: `<same name>.yaml` or `config.yaml`."""
    path = Path(path)
    for candidate in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if candidate.is_file():
            if candidate.stat().st_size > LONGEST:
                continue  # no configuration
            entries = from_yaml(candidate.read_bytes(), f"{candidate.name} beside {path.name}")
            model = entries.get("model") if isinstance(entries, dict) else None
            params = model.get("params") if isinstance(model, dict) else None
            if isinstance(params, dict) and "attention_head_dim" in params:  # else another family's
                scheduler = entries.get("scheduler")
                return {"model": model, "scheduler": scheduler if isinstance(scheduler, dict) else {}}
    return None


def _if_it_fits(entries: dict, tensors: Mapping[str, Tensor]) -> dict:
    try:
        shapes = _from_shapes(tensors, entries.get("head_dim", RELEASED_HEAD_DIM))
    except ValueError:
        return {}
    return entries if all(entries[name] == shapes[name] for name in shapes.keys() & entries.keys()) else {}


def metadata(config: PixelFlowConfig, classes: Sequence[str] = ()) -> dict[str, str]:
    """Metadata of our exported safetensors: the family, the whole configuration, and the names of classes, if any."""
    return config_metadata(FAMILY, config.as_dict()) | (named(classes) if classes else {})


def named(classes: Sequence[str]) -> dict[str, str]:
    """The entry of the metadata that holds the names of the classes, by index."""
    return {CLASSES: json.dumps(list(classes), ensure_ascii=False)}


def class_names(metadata: Mapping[str, str], config: PixelFlowConfig) -> tuple[str, ...]:
    """Names of the classes that a file of ours was trained on, by index; none in anybody else's file."""
    if CLASSES not in metadata or not config.num_classes:
        return ()
    names = from_json(metadata[CLASSES], "The list of classes in this file's metadata")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("The list of classes in this file's metadata is no list of names: the file is damaged.")
    if len(names) != config.num_classes:
        raise ValueError(f"This PixelFlow checkpoint has {config.num_classes} classes, and its metadata names "
                         f"{len(names)}: the file is damaged.")
    return tuple(names)


def _from_shapes(tensors: Mapping[str, Tensor], head_dim: int) -> dict:
    hidden, channels, patch_size, _ = shape_of(tensors, "patch_embed.proj.weight", 4)
    text, classes = "transformer_blocks.0.attn2.k_proj.weight", "class_embedder.embedding_table.weight"
    if hidden % head_dim:
        raise ValueError(
            f"This PixelFlow checkpoint is {hidden} wide, which is not a multiple of the head size {head_dim}, and its "
            "keys do not give its own. Put the config.yaml that it was trained with beside it."
        )
    return dict(
        heads=hidden // head_dim,
        head_dim=head_dim,
        depth=count(tensors, "transformer_blocks"),
        patch_size=patch_size,
        in_channels=channels,
        out_channels=shape_of(tensors, "proj_out_2.weight", 2)[0] // patch_size**2,
        num_classes=shape_of(tensors, classes, 2)[0] - 1 if classes in tensors else 0,
        context_dim=shape_of(tensors, text, 2)[1] if text in tensors else None,
        attention_bias="transformer_blocks.0.attn1.q_proj.bias" in tensors,
    )


def _trained_for(shapes: Mapping, stated: Mapping) -> dict:
    """The cascade of the released checkpoint of this kind, its resolution brought to whole tokens."""
    num_stages = stated.get("num_stages", 4)
    multiple = shapes["patch_size"] * 2 ** (num_stages - 1)
    resolution = RELEASED_RESOLUTION["class" if shapes["context_dim"] is None else "text"]
    return dict(num_stages=num_stages, resolution=max(resolution // multiple, 1) * multiple)
