"""What stands in files."""
from __future__ import annotations

import hashlib
from pathlib import Path

from ..models_impl.parsing import from_json


def entries(path: Path) -> dict:
    """The table of a JSON file. Raises ValueError where it holds something else, FileNotFoundError."""
    found = from_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {kind}, not a table of entries.")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            found.update(part)
    return found.hexdigest()


def line_of_log(line: str) -> dict | None:
    """What a line of a log says; None for one that a killed process or a disk has damaged."""
    try:
        entry = from_json(line, "log.jsonl")
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
