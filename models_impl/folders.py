"""Files of folders, linked folders included."""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE)
"""Names of devices, which no file on Windows may have, whatever its ending."""
LONGEST_NAME = 200  # bytes: file systems hold 255, and endings come behind it


def refuse_unportable(name: str, what: str = "name"):
    """Raise ValueError for a file name that Linux, macOS or Windows cannot have: a data set is taken to other systems.

    name: without a folder; what: as the error calls it.
    """
    signs = sorted({sign for sign in name if sign in '<>:"/\\|?*' or sign < " " or "\ud800" <= sign <= "\udfff"})
    if not name.strip(". "):
        why = "it has no letters or digits"
    elif signs:
        why = f"it holds {', '.join(ascii(sign) for sign in signs)}"
    elif RESERVED.fullmatch(name):
        why = "it is a device of Windows"
    elif name[-1] in ". " or name[0] in " .":
        why = "it begins or ends with a dot or space"
    elif len(name.encode()) > LONGEST_NAME:
        why = f"it has {len(name.encode())} bytes, and {LONGEST_NAME} are the most"
    else:
        return
    raise ValueError(f"{what}={ascii(name)[:100]} cannot be the name of a file on every system: {why}. Use letters, "
                     "digits, - and _.")


def portable(name: str) -> str:
    """The name nearest to this one that `refuse_unportable` lets pass."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]', "_", name)
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore").strip(". ") or "_"
    return f"_{name}" if RESERVED.fullmatch(name) else name


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
