"""Problems of settings, put into sentences: what was wrong, where, what to do."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ...models_impl import patterns


class Problems(list[str]):
    """A list of sentences, and the questions that are asked of many settings."""

    def need(self, good, sentence: str):
        if not good:
            self.append(sentence)

    def one_of(self, name: str, value, choices: Iterable[str]):
        self.need(value in choices, f"{name}={value!r} is none of {', '.join(filter(None, choices))}"
                                    f"{nearest(value, choices)}.")

    def at_least(self, name: str, value: float, least: float):
        self.need(value >= least, f"{name}={value} must {'not be negative' if least == 0 else f'be at least {least}'}.")

    def above_zero(self, name: str, value: float):
        self.need(value > 0, f"{name}={value} must be more than 0.")

    def share(self, name: str, value: float):
        self.need(0 <= value <= 1, f"{name}={value} is outside [0, 1].")

    def dropout(self, value: float):
        self.need(0 <= value < 1, f"recipe.dropout={value} is outside [0, 1).")

    def patterns(self, setting: str, tables: Iterable, things: str):
        """The `pattern` of each of [[setting]]. things: whose names they are found in, in words."""
        for i, table in enumerate(tables, 1):
            name = f"{setting}.{i}.pattern"
            self.need(table.pattern, f"{name} is empty: say in which {things}' names it is found.")
            try:
                patterns.compiled(table.pattern, name)
            except ValueError as error:
                self.append(str(error))

    def exists(self, name: str, path: str, kind: str = "file or folder"):
        """Whether a path that may be empty is there."""
        place = Path(path).expanduser()
        there = place.is_file() if kind == "file" else place.exists()
        within = "" if place.is_absolute() else f" in {Path.cwd()}"
        self.need(not path or there, f"{name}={path!r}: there is no such {kind}{within}.")


def nearest(name, choices) -> str:
    """"; did you mean x", where one of the choices is like the name."""
    close = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}" if close else ""
