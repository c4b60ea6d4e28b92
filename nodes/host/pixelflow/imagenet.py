"""The names of ImageNet's classes, and what a person may write for them."""
from __future__ import annotations

import difflib
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


def parse_classes(text: str) -> list[int]:
    """'207, otter; 417' -> [207, 360, 417]. An index may be past ImageNet's, for models trained on other classes."""
    return [_index(entry.strip()) for entry in text.replace(";", ",").replace("\n", ",").split(",") if entry.strip()]


def _index(entry: str) -> int:
    number = entry.split(":", 1)[0].strip()
    if number.isdecimal():
        return int(number)
    if entry in class_names():  # as written first: Cardigan is a dog, cardigan a garment
        return class_names().index(entry)
    names = {name.lower(): index for index, name in enumerate(class_names())}
    name = entry.lower()
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = near or [known for known in names if name in known.split()][:3]
    hint = f" Near it are {', '.join(f'{names[n]}: {n}' for n in near)}." if near else ""
    raise ValueError(f"{entry!r:.100} is neither a class index nor one of ImageNet's names.{hint}")
