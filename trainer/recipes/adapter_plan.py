"""Which layers of a network get an adapter, and of what rank, scale and dropout: from [adapter] and the file that it
starts from."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...models_impl import lora
from ...models_impl.guard import reading
from ...models_impl.state_dict import read_file
from ..config.schema import Adapter, AdapterLayers
from ..config.tables import ruled

RANK = 16  # where neither the settings nor a file say one
NamesOf = Callable[[Mapping[str, Sequence[int]]], lora.Names]
"""The names of a family's modules, for parameters of these shapes."""


@dataclass(frozen=True)
class Place:
    """The adapter of one layer."""

    rank: int
    alpha: float
    dropout: float
    start: lora.Layer | None = None
    """What it begins with; None for nothing."""


def planned(net: nn.Module, settings: Adapter, targets: list[str], names: NamesOf) -> dict[str, Place]:
    """Name of a layer -> its adapter. targets: how the names of the layers end if nothing says it. Raises ValueError
    for names, patterns and a file that do not fit the network, all that is wrong of one kind in one sentence."""
    modules = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    start = started(net, settings, names) if settings.start else {}
    ends = settings.targets or (list(start) if start else targets)
    refuse_unknown(ends, modules)
    rules = ruled(modules, settings.layers, "adapter.layers", "layer")
    plan = {}
    for name in modules:
        rule = rules.get(name)
        if rule.rank != 0 if rule else any(name == end or name.endswith(f".{end}") for end in ends):
            plan[name] = place(name, settings, rule or AdapterLayers(), start.get(name))
    if not plan:
        raise ValueError("adapter.layers: no layer is left that gets an adapter.")
    if lost := [name for name in start if name not in plan]:
        raise ValueError(f"adapter.start={settings.start!r} changes {len(lost)} layers that would get no adapter, such "
                         f"as {lost[0]}: name them in adapter.targets or adapter.layers, or leave both out.")
    return plan


def refuse_unknown(ends: list[str], modules: list[str]):
    if odd := [end for end in ends if not any(m == end or m.endswith(f".{end}") for m in modules)]:
        raise ValueError(f"adapter.targets: no layer's name ends with {', '.join(odd)}. There are, for instance, "
                         f"{', '.join(modules[:8])}.")


def place(name: str, settings: Adapter, rule: AdapterLayers, start: lora.Layer | None) -> Place:
    wanted = settings.rank if rule.rank is None else rule.rank
    theirs = lora.rank_of(start.tensors) if start else None
    if start and start.kind == "oft":
        theirs = start.tensors["oft_blocks"].shape[1]
    if wanted is not None and theirs is not None and wanted != theirs:
        raise ValueError(f"adapter.start={settings.start!r} has rank {theirs} in {name}, and the settings say "
                         f"{wanted}: leave the rank out, or bring the file to it by `python -m trainer lora resize`.")
    rank = theirs or wanted or RANK
    stated = rule.alpha or settings.alpha
    if start and not stated:
        stated = start.scale * (math.sqrt(rank) if settings.rslora else rank)
    return Place(rank, stated or rank, settings.dropout if rule.dropout is None else rule.dropout, start)


def started(net: nn.Module, settings: Adapter, names: NamesOf) -> dict[str, lora.Layer]:
    """Layer -> what adapter.start has of it, whole where the file has it in parts. Raises ValueError for a file of
    another kind or network."""
    path = Path(settings.start).expanduser()
    with reading(path), torch.device("cpu"):  # a dry run makes the network without memory, and reads the file
        known = names({key: value.shape for key, value in net.state_dict().items()})
        tensors, metadata = read_file(path)
        found = lora.read(tensors, known, metadata, lora.beside(path))
        if found.unmatched:
            raise ValueError(f"{len(found.unmatched)} of its keys have no place in this network, such as "
                             f"{found.unmatched[0]}. It was made for another model, or by a program whose names are "
                             "not known here.")
        if found.text_encoder:
            raise ValueError(f"it changes the text encoder too ({len(found.text_encoder)} keys), which an adapter of "
                             "the network cannot go on with. `python -m trainer convert FILE FOLDER --to diffusers` "
                             "leaves that out.")
        whole = lora.read(lora.write(found, known, "original"), known).layers
        wanted = "dora" if settings.dora else settings.kind
        if odd := next((layer for layer in whole if layer.kind != wanted or
                        ("dora_scale" in layer.tensors) != (wanted == "dora")), None):
            kind = f"{odd.kind} with lengths" if odd.kind != "dora" and "dora_scale" in odd.tensors else odd.kind
            raise ValueError(f"{odd.key} is a {kind} there, and the settings train a {wanted} (adapter.kind, "
                             "adapter.dora).")
        return {layer.key.removesuffix(".weight"): layer for layer in whole}
