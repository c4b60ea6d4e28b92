"""Everything wrong with settings, found and reported together before anything is allocated; past that edge nobody
checks again. Only the commands import this.

What shows in the settings themselves (names, types, values, files that are absent) is reported first and costs nothing;
files are looked into, and the recipe with everything it needs is imported, where all that is right.
"""
from __future__ import annotations

from pathlib import Path

from ..recipes import find
from . import data_sets, objective, rules
from .load import read, read_toml
from .schema import Config


def load(path: Path, words: list[str] = ()) -> Config:
    """The settings of a TOML file, changed by words such as `optimizer.learning_rate=3e-4`."""
    return parse(read_toml(path), words, str(path))


def parse(raw: dict, words: list[str] = (), origin: str = "the settings") -> Config:
    """The settings of a TOML file's content. Raises ValueError with all problems; origin: its name in that."""
    config, problems = read(raw, words)
    if config:  # what did not fit stands at its default, so that everything else is still looked at
        problems += [*data_sets.problems(config.data), *rules.problems(config)]
        problems += [*data_sets.of_run(config), *objective.problems(config)] if config.recipe else []
    if config and config.recipe and not any(p.startswith("model.") for p in problems):
        problems += config.recipe.problems(config)
    if not problems:
        problems = find(config.recipe.name).file_problems(config)
    if problems:
        raise ValueError(f"{origin} cannot work:\n  " + "\n  ".join(problems))
    return config
