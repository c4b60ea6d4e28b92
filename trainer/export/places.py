"""Where a command writes one file, and what it says of that."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def refuse_dest(dest: Path, sources: Sequence[Path], force: bool):
    """Raises ValueError where `dest` must not be written."""
    if dest.suffix != ".safetensors":
        raise ValueError(f"{dest} must end in .safetensors: nothing else is written.")
    if dest.exists() and any(path.exists() and dest.samefile(path) for path in sources):
        raise ValueError(f"{dest} is a source itself. Name another file to write.")
    if dest.exists() and not force:
        raise ValueError(f"{dest} exists. Name another file to write, or give --force.")


def said(dest: Path) -> str:
    return f"{dest}  {dest.stat().st_size / 1e6:.1f} MB"
