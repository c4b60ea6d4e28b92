"""Names that other programs give to the modules of PixArt, for `models_impl/lora`.

original: the release's modules, with one qkv and one kv_linear. diffusers: to_q, to_k and to_v, each a third or a half
of the rows (the tables of key_names.py). The ControlNet's modules are in both too.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .. import lora
from ..lora import Target
from .key_names import BLOCK, TOP

COPY = re.compile(r"^(\d+)\.copied_block\.")  # our ControlNet's keys
BLOCK_NUMBER = re.compile(r"(?:^|[._])(?:transformer_)?blocks[._](\d{1,3})[._]")
COPY_NUMBER = re.compile(r"(?:^|[._])(?:controlnet_blocks|controlnet)[._](\d{1,3})[._]")


def names(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Target]]:
    """The tables for a PixArt or its ControlNet with parameters of these shapes, by our key names."""
    return _names({key: tuple(shape) for key, shape in shapes.items()})


def guessed_names(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Target]]:
    """The tables for the network that a LoRA file was made for, as far as the file shows: its depth and width from
    the layers it has, sizes that only the network knows unchecked. For converting without the network."""
    sizes = lora.sizes(tensors)
    depth = 1 + max((int(m[1]) for m in map(BLOCK_NUMBER.search, sizes) if m), default=27)
    copies = 1 + max((int(m[1]) for m in map(COPY_NUMBER.search, sizes) if m), default=-1)
    parts = {name.replace(".", "_"): len(them) for name, them in BLOCK.items() if "attn" in name}
    parts |= {them.replace(".", "_"): 1 for name in BLOCK if "attn" in name for them in BLOCK[name]}
    widths = {size[0] // n for module, size in sizes.items() for name, n in parts.items()
              if module.replace(".", "_").endswith("_" + name)}
    if len(widths) > 1:
        raise ValueError(f"The layers of this LoRA are for networks of different widths: {sorted(widths)}.")
    width = widths.pop() if widths else 1152
    shapes = {f"{name}.weight": None for name in TOP}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}.weight": _parts_shape(name, width) for name in BLOCK}
    for i in range(copies):
        shapes |= {f"{i}.copied_block.{name}.weight": _parts_shape(name, width) for name in BLOCK}
        shapes |= {f"{i}.{name}.weight": None for name in ("before_proj", "after_proj")}
    return _names(shapes)


def _parts_shape(name: str, width: int) -> tuple[int, int] | None:
    parts = len(BLOCK[name])
    return (parts * width, width) if parts > 1 else None


def _names(shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, dict[str, Target]]:
    original, diffusers = {}, {}
    for key, shape in shapes.items():
        module, suffix, _ = key.rpartition(".weight")
        if not suffix:
            continue
        original["controlnet." * module[0].isdigit() + module] = Target(key, None, shape)
        parts = _to_diffusers(module)
        for i, name in enumerate(parts):
            rows = None if len(parts) == 1 else (i * (shape[0] // len(parts)), shape[0] // len(parts))
            part_shape = shape if rows is None else (rows[1], *shape[1:])
            diffusers[name] = Target(key, rows, part_shape)
    return {"original": original, "diffusers": diffusers}


def _to_diffusers(module: str) -> tuple[str, ...]:
    """The diffusers modules of one of ours; none for what diffusers does not have."""
    if module in TOP:
        return (TOP[module],)
    number, _, inner = module.removeprefix("blocks.").partition(".")
    if module.startswith("blocks."):
        return tuple(f"transformer_blocks.{number}.{name}" for name in BLOCK.get(inner, ()))
    if COPY.match(module):
        inner = inner.removeprefix("copied_block.")
        return tuple(f"controlnet_blocks.{number}.transformer_block.{name}" for name in BLOCK.get(inner, ()))
    if inner in ("before_proj", "after_proj"):
        return (f"controlnet_blocks.{module}",)
    return ()
