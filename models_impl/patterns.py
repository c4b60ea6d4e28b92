"""Regular expressions out of files, which are only run where they cannot take long.

Python's engine tries every way of dividing a text among the repeats and alternatives of a pattern: (a|a)*b, or
(a+)+$, is at work on a name of fifty letters for years. With a few choices, none inside of another, the tries are
bounded by the length of the text to the power of their number.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

LONGEST = 500  # characters of a pattern, and of a name that is compared with one
MOST = 50  # patterns of a table, names as they stand not counted
CHOICES = 2  # repeats, and alternatives but for those of the whole pattern
ONE = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}  # what takes one character
PLAIN = re.compile(r"[\w.]+")  # a module's name as it stands, whose dots are to be dots


def compiled(pattern: str, what: str, choices: int = CHOICES) -> re.Pattern:
    """A pattern of a file, which may have so many choices. what: its entry as errors call it. Raises ValueError."""
    if len(pattern) > LONGEST:
        raise ValueError(f"{what} is a pattern of {len(pattern):,} characters; at most {LONGEST} are read.")
    try:
        tree = parser.parse(pattern)
        number = _choices(tree, top=True)
        if number <= choices:
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}={pattern[:80]!r} is not a regular expression: {error or 'nested too deeply'}."
                         ) from error
    raise ValueError(f"{what}={pattern[:80]!r} is not run, because that may take forever: a pattern of a file may hold "
                     f"{choices} repeats (* + ? {{}}) or choices (|) in groups, none inside of another.")


def _choices(tree: Iterable, top: bool = False) -> float:
    """Number of choices of a parsed pattern; infinite where one is inside of another, or is of another kind."""
    number = 0.0
    for kind, value in tree:
        if kind in ONE or kind is sre.AT:
            continue
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, body = value
            if low == high and high * len(body) <= LONGEST and _choices(body) == 0:
                continue
            number += 1 if len(body) == 1 and body[0][0] in ONE else float("inf")
        elif kind is sre.BRANCH:
            inside = max(map(_choices, value[1]))
            number += inside + (0 if top else 1)
        elif kind is sre.SUBPATTERN:
            number += _choices(value[-1], top and len(tree) == 1)
        else:  # a group referred to, or looked ahead for
            return float("inf")
    return number


class Ends:
    """PEFT's tables of patterns (rank_pattern, alpha_pattern): each is the end of a module's name, the first counts.

    Most are names as they stand, a thousand of them for a thousand modules: those are looked up.
    """

    def __init__(self, table: Mapping[str, Any] | None, what: str):
        """Raises ValueError for a pattern that is not run."""
        self.names: dict[str, tuple[int, Any]] = {}
        self.patterns: list[tuple[int, re.Pattern, Any]] = []
        for place, (pattern, value) in enumerate((table or {}).items()):
            if PLAIN.fullmatch(pattern):
                self.names.setdefault(pattern, (place, value))
            elif len(self.patterns) == MOST:
                raise ValueError(f"{what} holds more than {MOST} patterns that are not plain names.")
            else:
                self.patterns.append((place, compiled(pattern, what, choices=1), value))

    def value(self, module: str, otherwise: Any = None) -> Any:
        """What the table says of a module, by its name with dots."""
        module = module[-LONGEST:]
        starts = [0, *(match.end() for match in re.finditer(r"\.", module))]
        named = [self.names[end] for start in starts if (end := module[start:]) in self.names]
        first, value = min(named, key=lambda entry: entry[0], default=(float("inf"), otherwise))
        for place, pattern, other in self.patterns:
            if place > first:
                break
            if any(pattern.fullmatch(module, start) for start in starts):
                return other
        return value
