"""Files by which others see and steer a run that is at work.

    in_use.lock  held while a process trains      status.json  what it is doing
    sample  pause  stop                           orders: `touch RUN/sample`
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, STATUS = "in_use.lock", "status.json"
SAMPLE, PAUSE, STOP = ORDERS = "sample", "pause", "stop"


class Orders(NamedTuple):
    """What is wanted between two steps."""

    sample: bool = False
    """Samples of the weights as they are."""
    pause: bool = False
    """To wait for as long as the file is there."""
    stop: bool = False
    """To save and end, by the file."""
    signal: bool = False
    """To save and end, by Ctrl-C or SIGTERM."""
    save: bool = False
    """A checkpoint, because save_minutes have passed."""

    @property
    def any(self) -> bool:
        return True in self


def given(folder: Path) -> list[str]:
    """The orders that lie in a run folder."""
    return [name for name in ORDERS if (folder / name).is_file()]


def take(folder: Path, name: str):
    """Removes an order that is obeyed."""
    (folder / name).unlink(missing_ok=True)


def is_running(folder: Path) -> bool:
    """Whether a process trains in a run folder. The lock file that a killed one left is held by nobody."""
    try:
        file = open(folder / LOCK, "r+b")
    except FileNotFoundError:
        return False
    except OSError:  # may be read by its owner only, who is another person and at work, as far as anybody can say
        return True
    with file:
        return held(file)


def held(file) -> bool:
    """Whether another process has locked an open file. Asks for the lock as filelock does, and lets go of it at once;
    a run that starts in that moment tries again (`Run.open`)."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    except OSError:
        return True
    return False
