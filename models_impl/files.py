"""Files that are whole or not there."""
from __future__ import annotations

import os
import time
from pathlib import Path

IN_USE = 5, 32  # Windows' errors for a file that another program has open
WAITS = 0.05, 0.1, 0.2, 0.4, 0.8, 1.6  # seconds: virus scanners and monitors read for a moment


def put(unfinished: Path, path: Path):
    """Give what is finished its name, in place of the file that had it. Raises OSError where another program keeps that
    one open, which only Windows minds; nothing is left behind then."""
    for wait in (*WAITS, None):
        try:
            return os.replace(unfinished, path)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IN_USE:  # other systems' errors have no such number
                raise
            if wait is None:
                unfinished.unlink(missing_ok=True)
                raise OSError(f"{path} is in use by another program, and cannot be replaced: close it there, or choose "
                              "another name.") from error
        time.sleep(wait)


def write_whole(path: Path, content: str | bytes):
    """Write a file at once or not at all: a process that reads meanwhile, or a killed one, finds no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def flush(path: Path):
    """Have the system write a file's contents to the disk."""
    with open(path, "r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
