"""Files that are whole or not there."""
from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str):
    """At once or not at all: a process that reads meanwhile, or a killed one, finds no half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def flush(path: Path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
