"""The weights under a run that do not learn, known again wherever they lie."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

from torch import nn

from ..config.schema import Config
from ..features.store import WEIGHTS, fingerprint

SECTIONS = ("recipe", "model", "text", "vae")  # whose settings name frozen files


def files(config: Config, recipe: nn.Module) -> dict[str, str]:
    """Setting -> fingerprint of the file or folder of frozen weights that it names."""
    partly = any(not p.requires_grad for p in recipe.parameters())
    named = {"init_from": config.init_from} if partly else {}
    for name in SECTIONS:
        if is_dataclass(section := getattr(config, name)):
            named |= {f"{name}.{one.name}": getattr(section, one.name) for one in fields(section)}
    paths = {name: Path(value) for name, value in named.items() if isinstance(value, str) and value}
    return {name: fingerprint(path) for name, path in paths.items()
            if path.is_dir() or path.suffix in WEIGHTS and path.is_file()}


def others(had: Mapping[str, str], has: Mapping[str, str]) -> list[str]:
    """The settings whose weights have changed; what an earlier version did not write down is believed."""
    return [name for name, value in has.items() if had.get(name, value) != value]
