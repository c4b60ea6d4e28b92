"""Tables of settings that are about names in which a regular expression is found; the first that fits counts."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ...models_impl import patterns


class Ruled(Protocol):
    pattern: str


R = TypeVar("R", bound=Ruled)


def ruled(names: list[str], tables: Sequence[R], setting: str, thing: str) -> dict[str, R]:
    """Name -> the first table whose pattern is found in it. Raises ValueError for a table that counts for none.
    thing: what has these names, in words."""
    found_in = [patterns.compiled(table.pattern, f"{setting}.{i}.pattern").search for i, table in enumerate(tables, 1)]
    rules, hits = {}, [0] * len(tables)
    for name in names:
        own = [i for i, search in enumerate(found_in) if search(name[-patterns.LONGEST:])]
        for i in own:
            hits[i] += 1
        if own:
            rules[name] = own[0]
    for i, table in enumerate(tables):
        said = f"{setting}.{i + 1}.pattern={table.pattern!r}"
        if not hits[i]:
            raise ValueError(f"{said} is found in no {thing}'s name. There are, for instance, {', '.join(names[:8])}.")
        if i not in rules.values():
            raise ValueError(f"{said} counts for no {thing}: its {hits[i]} have the tables before it. Move it before "
                             "those.")
    return {name: tables[i] for name, i in rules.items()}
