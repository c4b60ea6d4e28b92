"""The weights under a run that do not learn, known again wherever they lie."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

from torch import nn

from ..config.schema import Config

SECTIONS = ("recipe", "model", "text", "vae")  # whose settings name frozen files
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
LOOKS, LOOK = 64, 2**16  # places in a file that its fingerprint is made of, and bytes at each


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


def fingerprint(path: Path) -> str:
    """Of the lengths of a file of weights, or of all in a folder, and of what stands at places evenly spread over each:
    a model of 24 GB is known by 4 MiB of it."""
    found = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.suffix in WEIGHTS) if path.is_dir() else [path]:
        size = file.stat().st_size
        found.update(str(size).encode())
        with open(file, "rb") as opened:
            for place in range(LOOKS):
                opened.seek(place * max(size - LOOK, 0) // (LOOKS - 1))
                found.update(opened.read(LOOK))
    return found.hexdigest()[:40]


def others(had: Mapping[str, str], has: Mapping[str, str]) -> list[str]:
    """The settings whose weights have changed; what an earlier version did not write down is believed."""
    return [name for name, value in has.items() if had.get(name, value) != value]
