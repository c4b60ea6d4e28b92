"""Configurations out of files: every entry of the kind that its field names, and of a size that a network can have."""
from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import lru_cache
from math import isfinite
from types import UnionType
from typing import Any

LARGEST = 2**20
"""The largest whole number: the largest of a release are vocabularies of 32,128 and rows of 49,408."""
MOST_ENTRIES = 1000  # of a list; the longest of a release has 28
LONGEST = 10_000  # characters of a string
DEEPEST = 8  # levels
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def check(config: Any, what: str):
    """Raise ValueError that names every entry of a dataclass that is of another kind than its field, not finite, or
    larger than LARGEST."""
    problems = [f"{name}={str(value)[:60]!r} must be {expected}."
                for name, kind in _kinds(type(config)).items()
                if (expected := _unfit(value := getattr(config, name), kind))]
    if problems:
        raise ValueError(f"This {what} configuration cannot work:\n  " + "\n  ".join(problems))


def entries(cls: type, stated: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Some entries of a dataclass, as they are. Raises ValueError for a name that is no field of it, and for a value of
    another kind than its field; tables of fields that are configurations themselves are left to those."""
    kinds, problems = _kinds(cls), []
    for name, value in stated.items():
        if name not in kinds:
            problems.append(f"{str(name)[:60]!r} is no entry of a {cls.__name__}.")
        elif not (isinstance(value, Mapping) and _of_entries(kinds[name])) and (
                expected := _unfit(as_tuple(value), kinds[name])):
            problems.append(f"{name}={str(value)[:60]!r} must be {expected}.")
    if problems:
        raise ValueError(f"{what} cannot be used:\n  " + "\n  ".join(problems))
    return dict(stated)


def _of_entries(kind: Any) -> bool:
    """Whether a field is a configuration of its own, or may be one."""
    return any(dataclasses.is_dataclass(one) for one in (kind, *typing.get_args(kind)))


def as_tuple(value: Any) -> Any:
    """JSON's lists as tuples, everything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def plain(entries: Any, what: str, level: int = 0) -> Any:
    """`entries` as they are; raises ValueError for numbers, texts and lists of sizes that no configuration has, before
    anything is computed from them. what: the file, or the part of it, as errors call it."""
    if level > DEEPEST:
        raise ValueError(f"{what} is nested too deeply for a configuration.")
    if isinstance(entries, int | float) and not isinstance(entries, bool) and not abs(entries) <= 2**31:
        raise ValueError(f"{what} holds the number {str(entries)[:20]}, which no configuration has.")
    if isinstance(entries, str) and len(entries) > LONGEST:
        raise ValueError(f"{what} holds a text of {len(entries):,} characters, which no configuration has.")
    if isinstance(entries, list | tuple | dict):
        if len(entries) > MOST_ENTRIES:
            raise ValueError(f"{what} holds a list of {len(entries):,} entries, which no configuration has.")
        for value in entries.values() if isinstance(entries, dict) else entries:
            plain(value, what, level + 1)
    return entries


@lru_cache
def _kinds(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unfit(value: Any, kind: Any) -> str | None:
    """What a value should be, in words; None where it is that."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        expected = [_unfit(value, one) for one in args]
        return None if None in expected else " or ".join(e for e in expected if e != "none")
    if kind is type(None):
        return None if value is None else "none"
    if origin is tuple:
        return None if isinstance(value, tuple) and len(value) <= MOST_ENTRIES and not any(
            _unfit(entry, args[0]) for entry in value) else f"a list of {WORDS.get(args[0], args[0].__name__)}s"
    if kind is int and (not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST):
        return f"a whole number of at most {LARGEST:,}"
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value)):
        return "a number"
    if kind is bool and not isinstance(value, bool):
        return WORDS[bool]
    if kind is str and not isinstance(value, str):
        return WORDS[str]
    if isinstance(kind, type) and kind not in WORDS and not isinstance(value, kind):
        return f"the entries of a {kind.__name__}"
    return None
