"""The names of ImageNet's classes, and what a person may write for them."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

NAMES_FILE = Path(__file__).resolve().with_name("imagenet_classes.txt")


@cache
def class_names() -> tuple[str, ...]:
    """Names by index, 0 to 999."""
    lines = NAMES_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(line.split(": ", 1)[1] for line in lines if not line.startswith("#"))


def options() -> list[str]:
    """Entries of a menu: '207: golden retriever'. Typing a part of one finds it."""
    return [f"{index}: {name}" for index, name in enumerate(class_names())]


def parse_classes(text: str, known: Sequence[str] = ()) -> list[int]:
    """'207, otter; 417' -> [207, 360, 417]. known: names by index of a model trained on other classes; without them the
    names are ImageNet's, and an index may be past those."""
    entries = text.replace(";", ",").replace("\n", ",").split(",")
    return [_index(entry.strip(), known) for entry in entries if entry.strip()]


def _index(entry: str, known: Sequence[str]) -> int:
    number = entry.split(":", 1)[0].strip()
    if number.isdecimal():
        return int(number)
    everything = known or class_names()
    if entry in everything:  # as written first: Cardigan is a dog, cardigan a garment
        return everything.index(entry)
    names = {name.lower(): index for index, name in enumerate(everything)}
    name = entry.lower()
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = near or [other for other in names if name in other.split()][:3]
    hint = f" Near it are {', '.join(f'{names[n]}: {n}' for n in near)}." if near else ""
    fault = ("is neither a class index nor one of the names of this model's classes" if known else
             "is neither a class index nor one of ImageNet's names")
    raise ValueError(f"{entry!r:.100} {fault}.{hint}")
