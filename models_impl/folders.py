"""Files of folders, linked folders included."""
from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path


def below(folder: str | os.PathLike) -> Iterator[Path]:
    """Every file below a folder, also behind links to folders, each folder once however it is reached: a link may lead
    back to where it lies. What other programs hide in folders or files that begin with a dot is left out."""
    seen, pending = set(), [os.fspath(folder)] if os.path.isdir(folder) else []
    while pending:
        links = []  # after all that lies there itself, so that a file has its own path where it has one
        for start in pending:
            for here, folders, files in os.walk(start, onerror=_closed):
                real = os.path.realpath(here)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                links += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
                yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))
        pending = links


def _closed(error: OSError):
    logging.getLogger(__name__).warning("%s is left out: %s", error.filename, error.strerror)
