"""Files that are whole or not there."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..models_impl.parsing import from_json


def write_whole(path: Path, text: str):
    """At once or not at all: a process that reads meanwhile, or a killed one, finds no half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def entries(path: Path) -> dict:
    """The table of a JSON file. Raises ValueError where it holds something else, FileNotFoundError."""
    found = from_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a table of entries.")
    return found


def flush(path: Path):
    """Have the system write a file's contents to the disk."""
    with open(path, "r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            found.update(part)
    return found.hexdigest()
