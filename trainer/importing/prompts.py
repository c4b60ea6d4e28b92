"""Sample prompts of other programs: plain ones, or tables where they have settings of their own."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .rows import Draft, number, whole

VALUES = {"prompt": str, "negative": str, "height": whole, "width": whole, "steps": whole, "cfg": number,
          "seed": whole, "strength": number}
OPTIONS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "cfg"}
"""Options of kohya's lines, and of programs that read such."""
TOGETHER = ("height", "width", "steps", "cfg")
"""Settings that [samples] has for all prompts."""


def line(text: str, options: Mapping[str, str] = OPTIONS) -> dict:
    """A prompt with options such as --w 1024 --n blurry."""
    prompt, *words = re.split(r"\s--(?=[A-Za-z])", f" {text}")
    found = {"prompt": prompt.strip()}
    for word in words:
        letter, _, value = word.strip().partition(" ")
        if options.get(letter.lower()):
            found[options[letter.lower()]] = value.strip()
    return found


def take(draft: Draft, rows: Iterable[Mapping]):
    """rows: the settings of each prompt, in the words of [[samples.prompts]] and as that program writes values."""
    tables = [{name: value(row[name]) for name, value in VALUES.items() if row.get(name) not in (None, "")}
              for row in rows if str(row.get("prompt") or "").strip()]
    if not tables:
        return
    for table in tables:
        if table.get("seed", 0) < 0:  # any
            del table["seed"]
    for name in TOGETHER:
        values = {table.get(name) for table in tables}
        if len(values) == 1 and None not in values:
            draft.set(f"samples.{name}", values.pop())
            for table in tables:
                del table[name]
    seed = tables[0].get("seed")
    if seed is not None and all(table.get("seed") == seed + place for place, table in enumerate(tables)):
        draft.set("samples.seed", seed)
        for table in tables:
            del table["seed"]
    draft.set("samples.prompts", plain(tables))


def plain(tables: list) -> list:
    """The prompts alone, where tables say nothing else."""
    return [table["prompt"] for table in tables] if all(table.keys() == {"prompt"} for table in tables) else tables
