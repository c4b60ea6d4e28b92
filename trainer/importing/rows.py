"""What a setting of another program becomes here: the rows of the programs' tables, and what a table is applied to."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import optimizers
from ..config.schema import Config, DataSet, look_up
from ..recipes import settings_of

PLAIN = "no counterpart"


class Absent(Exception):
    """A value without counterpart; `given` is the value, where one can look for it."""

    def __init__(self, reason: str, given: Any = None):
        super().__init__(reason)
        self.given = given


Value = Callable[[Any], Any]
"""Their value -> ours. Raises Absent; None = there is nothing to set."""


def same(value):
    return value


@dataclass(frozen=True)
class Row:
    settings: tuple[str, ...] = ()
    """The first of these that the recipe has is set; none = there is no counterpart."""
    value: Value = same
    changed: str = ""
    """What is other here than there, as a sentence."""
    why: str = PLAIN
    usual: tuple = ()
    """Values that say what happens here anyway."""


def to(*settings: str, value: Value = same, changed: str = "", usual: tuple = ()) -> Row:
    return Row(settings, value, changed, usual=usual)


def none(why: str = PLAIN, usual: tuple = ()) -> Row:
    return Row(why=why, usual=usual)


def chosen(table: Mapping[str, Any], what: str = "") -> Value:
    """Of a table, in which capitals do not matter."""
    known = {key.lower(): value for key, value in table.items()}

    def value(given):
        if str(given).lower() not in known:
            raise Absent(f"{what or 'it'} is one of {', '.join(table)} where it has a counterpart")
        return known[str(given).lower()]

    return value


def number(given) -> float:
    """Of a number or a text that is one, as YAML 1.1 leaves 1e-4."""
    try:
        found = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Absent(f"{str(given)[:60]!r} is no number", given)
    return found


def whole(given) -> int:
    if (found := number(given)) != int(found):
        raise Absent(f"{given!r} is no whole number", given)
    return int(found)


def yes(given) -> bool:
    return str(given).lower() in ("true", "1", "yes", "on")


def on(given) -> bool | None:
    """True, or nothing to set."""
    return yes(given) or None


def positive(given) -> float | None:
    """A number above zero, or nothing to set."""
    return max(number(given), 0.0) or None


def share(given) -> float | None:
    """A number in (0, 1), or nothing to set at 0."""
    if number(given) >= 1:
        raise Absent("it is below 1 here")
    return positive(given)


def said(table: Mapping) -> dict:
    """Without what is null, by which a program means its default."""
    return {key: value for key, value in table.items() if value is not None}


def is_off(value) -> bool:
    return value is None or value is False or value in ("", [], {}, 0) or str(value).lower() in ("none", "off", "false")


@dataclass
class Draft:
    """A recipe that is being made of another program's settings."""

    recipe: str
    settings: dict = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """What means something else here."""
    absent: list[tuple[str, Any, str]] = field(default_factory=list)
    """(key, value, reason) of what has no counterpart."""
    missing: list[str] = field(default_factory=list)
    """What a person must still say."""
    off: int = 0
    """How many keys are switched off, or are about the program itself."""

    def __post_init__(self):
        self.kind = settings_of(self.recipe)
        self.settings.setdefault("recipe", {})["name"] = self.recipe

    def has(self, name: str) -> bool:
        """Whether a run of this recipe reads a setting. "data.sets.flip": one of a data set."""
        section, dot, key = name.rpartition(".")
        if self.unread(name):
            return False
        if section == "data.sets":
            return key in {f.name for f in dataclasses.fields(DataSet)}
        if section in ("vae", "adapter") and section not in self.kind.sections:
            return False
        if name in ("memory.base", "memory.swap_blocks") and "memory.base" not in self.kind.sections:
            return False
        if name == "memory.weights" and self.kind().has_strength:  # of an adapter
            return False
        if section == "optimizer.arguments" or name in ("optimizer.betas", "optimizer.eps", "optimizer.weight_decay"):
            takes = optimizers.arguments(optimizers.kind(self.get("optimizer.name", "adamw")))
            return not takes or key in takes
        of = {"recipe": self.kind, "model": self.kind.Model}.get(section)
        try:
            of = of or (type(look_up(Config(), section)) if dot else Config)
        except AttributeError:
            return False
        return dataclasses.is_dataclass(of) and key in {f.name for f in dataclasses.fields(of)}

    def unread(self, name: str) -> str:
        """Why the recipe reads no such setting of [noise] or [loss], or no data.masks; empty where it does."""
        return self.kind.unread.get(name) or self.kind.unread.get(name.partition(".")[0], "")

    def set(self, name: str, value):
        *sections, key = name.split(".")
        place = self.settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value

    def get(self, name: str, otherwise=None):
        place = self.settings
        for part in name.split("."):
            if not isinstance(place, dict) or part not in place:
                return otherwise
            place = place[part]
        return place

    def apply(self, key: str, given, row: Row | None, said: bool = True, into: dict | None = None):
        """One setting of the other program. said: in its file, not by silence; into: the table of a data set, for
        settings such as "data.sets.flip"."""
        if row and given in row.usual:
            return
        name = next((name for name in row.settings if self.has(name)), None) if row else None
        if name is None:
            if is_off(given) or not said:
                self.off += said
            else:
                self.absent.append((key, given, self.why(row)))
            return
        try:
            value = row.value(given)
        except Absent as reason:
            if not is_off(given):
                self.absent.append((key, given, str(reason)))
            return
        if value is not None:
            if name.startswith("data.sets.") and into is not None:
                into[name.rpartition(".")[2]] = value
            else:
                self.set(name, value)
            if row.changed:
                self.changed.append(f"{key} = {given!r} is {name} = {value!r}: {row.changed}")

    def why(self, row: Row | None) -> str:
        """Why a setting that is on has no counterpart."""
        if row is None or row.why != PLAIN or not row.settings:
            return row.why if row else PLAIN
        name = row.settings[0]
        if reason := self.unread(name):
            return f"{self.recipe} does not read {name}, as {reason}"
        return f"{self.get('optimizer.name') if 'optimizer.' in name else self.recipe} has no {name}"


def flat(raw: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots."""
    found = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
