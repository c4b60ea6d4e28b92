"""Settings from TOML and `key=value` words, strictly: names and types."""
from __future__ import annotations

import copy
import dataclasses
import math
import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from ...models_impl.parsing import DEEPEST, TOO_DEEP, is_deep
from ..files import entries
from ..recipes import RECIPES, settings_of
from .problems import nearest
from .schema import Config, look_up

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TRAINER = Path(__file__).resolve().parents[1]
RENAMED = {
    "optimizer.rate": "learning_rate",
    "optimizer.scale_rate": "learning_rate_scaling",
    "optimizer.muon_rate": "muon_learning_rate",
    "text.rate": "learning_rate_multiple",
    "recipe.follower_rate": "follower_learning_rate_multiple",
    "recipe.selector_rate": "selector_learning_rate_multiple",
    "recipe.made": "annotators",
    "recipe.least": "min_conditions",
    "recipe.most": "max_conditions",
    "recipe.snr_gamma": "loss.snr_gamma",
}
"""What settings were called once -> their name in the section now, or with another section's."""


def read_toml(path) -> dict:
    found = next((p for p in (Path(path), TRAINER / path, TRAINER / "recipes" / path) if p.is_file()), None)
    if found is None:
        shipped = {p.name: p.relative_to(TRAINER).as_posix() for p in sorted(TRAINER.glob("recipes/*/*.toml"))}
        if moved := shipped.get(Path(path).name):
            raise ValueError(f"{path}: there is no such recipe file. It is trainer/{moved} now.")
        raise ValueError(f"{path}: there is no such recipe file. Shipped with the trainer: "
                         f"{', '.join(shipped.values())}.")
    try:
        return from_toml(found.read_text(encoding="utf-8-sig"))  # Windows' editors put a mark first
    except ValueError as error:
        raise ValueError(f"{found} is not valid TOML: {error}.") from None


def from_toml(text: str) -> dict:
    """The tables of a TOML text. Raises ValueError, also for one that is nested too deeply: a dotted key of 100,000
    parts takes the parser minutes."""
    if is_deep(text) or any(line.partition("=")[0].count(".") > DEEPEST for line in text.splitlines()):
        raise ValueError(TOO_DEEP)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def read(raw: dict, words: list[str] = ()) -> tuple[Config | None, list[str]]:
    """(the settings, what does not fit): names and types only. What does not fit stands at its default; the recipe is
    None where its name is unknown. words: key=value each, which count before `raw`."""
    problems, raw = [], copy.deepcopy(raw)
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            problems.append(f"{word!r} is not of the form key=value; a value with spaces is written in quotes, "
                            "\"data.caption=a cat\".")
            continue
        problems += put(raw, name.strip(), value_of(text))

    recipe, kinds = raw.get("recipe", {}), {}
    name = recipe.pop("name", None) if isinstance(recipe, dict) else None
    if name in RECIPES:
        settings = settings_of(name)
        kinds = {"recipe": settings, "model": settings.Model}
    else:
        problems.append(f"[recipe] name = {name!r} is none of {', '.join(RECIPES)}{nearest(name, RECIPES)}.")
    config = build(Config, raw, kinds, problems)
    if config and kinds:
        config = dataclasses.replace(config, **{k: look_up(config, k) or kind() for k, kind in kinds.items()})
    return config, problems


def put(raw: dict, name: str, value) -> list[str]:
    """Sets the value of a dotted name, in which a number names a table of an array: data.sets.2.repeats. What is wrong
    with the name, or nothing."""
    *sections, key = name.split(".")
    place: dict | list = raw
    for number, one in enumerate(sections):
        within, array = ".".join(sections[:number + 1]), (*sections[number + 1:], key)[0].isdecimal()
        if isinstance(place, list):
            if not 1 <= int(one) <= len(place) + 1:
                return [f"{name}: there is no {within}, the array has {len(place)}."]
            if int(one) > len(place):
                place.append({})
            place = place[int(one) - 1]
        else:
            place = place.setdefault(one, [] if array else {})
        if not isinstance(place, list if array else dict):
            what = "an array, whose tables have numbers" if isinstance(place, list) else \
                "a section, no array" if isinstance(place, dict) else "a value, no section"
            return [f"{name}: {within} is {what}."]
    if isinstance(place, list):
        return [f"{name} is a section: name one of its settings."]
    place[key] = value
    return []


def stored(folder: Path) -> Config:
    """The settings of a run folder. Values are not looked at: the data of a finished run may be gone."""
    path = folder / "config.json"
    raw = entries(path)
    for old, name in RENAMED.items():  # of a run that is older than the names
        section, _, key = old.partition(".")
        new, _, name = name.rpartition(".")
        if key in raw.get(section, {}) and name not in raw.get(new or section, {}):
            raw.setdefault(new or section, {})[name] = raw[section].pop(key)
    config, problems = read(raw)
    if problems:
        raise ValueError(f"{path} cannot work:\n  " + "\n  ".join(problems))
    return config


def value_of(text: str):
    """A word's value as TOML reads it; what TOML cannot read is a plain string."""
    try:
        return from_toml(f"x = {text}")["x"]
    except ValueError:
        return text


def build(cls, raw: dict, kinds: dict, problems: list[str], prefix=""):
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    good, tables = {}, {}
    for key, value in raw.items():
        full = prefix + key
        renamed = RENAMED.get(full, "")
        if key not in names and (renamed in names or "." in renamed):
            problems.append(f"{full} is called {renamed if '.' in renamed else prefix + renamed} now.")
            continue
        if key not in names:
            here = {name: kinds.get(name, hints[name]) for name in names}
            problems.append(f"{full} is not a setting{nearest(key, here) if prefix else meant(key, here)}.")
            continue
        kind = kinds.get(key, hints[key])
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                good[key] = build(kind, value, {}, problems, f"{full}.")
            else:
                problems.append(f"{full} is a section, [{full}], not a value ({value!r}).")
        elif kind is Any:
            pass  # a section of an unknown recipe, already reported
        elif listed_section(kind):
            tables[key] = value  # what they take from this section must be known first
        else:
            value, fits = convert(value, kind)
            if fits:
                good[key] = value
            else:
                bound = ", and finite" if isinstance(value, float) else ", finite and below 2**63"
                bound = "" if finite(value) else bound
                problems.append(f"{full}={value!r:.100} should be {in_words(kind)}{bound}.")
    for key, value in tables.items():
        good[key] = build_list(hints[key], value, good, problems, prefix + key)
    try:
        return cls(**good)
    except (TypeError, ValueError) as error:
        problems.append(f"{prefix or 'settings: '}{error}")
        return None


def meant(key: str, kinds: dict) -> str:
    """"; did you mean data.path", where sections have a setting of that name; else what is like it. kinds: of each
    setting outside of sections, and of each section."""
    named = [f"{section}.{key}" for section, kind in sorted(kinds.items())
             if dataclasses.is_dataclass(kind) and key in {f.name for f in dataclasses.fields(kind)}]
    return f"; did you mean {' or '.join(named)}" if named else nearest(key, kinds)


def listed_section(kind):
    """The dataclass that a list holds, alone or beside strings, if it holds one."""
    inside = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    return next((one for one in (inside, *typing.get_args(inside)) if dataclasses.is_dataclass(one)), None)


def build_list(kind, value, outer: dict, problems: list[str], name: str) -> list:
    """An array of tables, each of which has from the section around it, `outer`, what it does not say itself."""
    cls, strings = listed_section(kind), str in typing.get_args(typing.get_args(kind)[0])
    value = [value] if strings and isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(one, (dict, str) if strings else dict) for one in value):
        what = "a list of strings and tables" if strings else f"an array of sections, [[{name}]]"
        problems.append(f"{name} is {what}, not {value!r}.")
        return []
    shared = {name: outer[name] for name in cls.INHERITED if name in outer}
    made = [one if isinstance(one, str) else build(cls, {**shared, **one}, {}, problems, f"{name}.{n}.")
            for n, one in enumerate(value, 1)]
    return [one for one in made if one is not None]


def convert(value, kind):
    """(value as `kind`, whether it fits). An int serves as a float, a string as a list of that one, which needs no
    quotes within quotes on a command line; nothing else is bent."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        for one in args:
            converted, fits = convert(value, one)
            if fits:
                return converted, True
        return value, False
    if origin is dict:
        return value, isinstance(value, dict) and finite(list(value.values()))
    if origin is list:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, list):
            return value, False
        pairs = [convert(v, args[0]) for v in value]
        return [v for v, _ in pairs], all(fits for _, fits in pairs)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value), True) if finite(value) else (value, False)
    return value, isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and finite(value)


def finite(value) -> bool:
    """Whether a value holds no nan, no inf, and no whole number beyond 63 bits."""
    if isinstance(value, list):
        return all(map(finite, value))
    return abs(value) < 2**63 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def in_words(kind) -> str:
    if typing.get_origin(kind) is dict:
        return "a table"
    if typing.get_origin(kind) is list:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    if typing.get_args(kind):
        return " or ".join(in_words(k) for k in typing.get_args(kind) if k is not type(None))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(kind, str(kind))


def differences(old: Config, new: Config, free: set[str]) -> list[str]:
    """Settings with other values, in words, without those that are `free` to change."""
    found = []

    def compare(a: dict, b: dict, prefix: str):
        for key in a.keys() | b.keys():
            name, old, new = prefix + key, a.get(key), b.get(key)
            if re.sub(r"\.\d+\.", ".", name) in free or old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                compare(old, new, name + ".")
            elif tables(old) and tables(new) and len(old) == len(new):
                compare(*({str(n): one for n, one in enumerate(some, 1)} for some in (old, new)), name + ".")
            elif tables(old) or tables(new):
                found.append(f"{name} had {len(old or [])} tables, now {len(new or [])}")
            else:
                found.append(f"{name} was {old!r}, now {new!r}")

    compare(as_dict(old), as_dict(new), "")
    return sorted(found)


def tables(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def as_dict(config: Config) -> dict:
    raw = dataclasses.asdict(config)
    raw["recipe"] = {"name": config.recipe.name, **raw["recipe"]}
    return raw
