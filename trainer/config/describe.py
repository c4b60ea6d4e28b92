"""`python -m trainer settings`: every setting with its default and the doc that stands under it."""
from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import typing

from ..recipes import RECIPES, settings_of
from .load import listed_section
from .schema import Config, Table


def describe() -> list[str]:
    lines = []
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            lines += ["", f"[{name}]", *section(kind)]
            for inner, listed in typing.get_type_hints(kind).items():
                if one := listed_section(listed):
                    lines += ["", f"[[{name}.{inner}]]", *section(one)]
    for name in RECIPES:
        settings = settings_of(name)
        lines += ["", f"[recipe]  with name = {name!r}", *section(settings)]
        lines += ["", "[model]", *section(settings.Model)]
    return section(Config) + lines


def section(kind) -> list[str]:
    docs, lines = docs_of(kind), []
    inherited = kind.INHERITED if issubclass(kind, Table) else ()
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in inherited}
    for name, field in fields.items():
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default) or name in ("recipe", "model"):
            continue
        shown = "(none)" if default is None else json.dumps(default)
        lines.append(f"{name} = {shown}")
        lines += textwrap.wrap(docs.get(name, ""), 108, initial_indent="    ", subsequent_indent="    ")
    return lines


def docs_of(kind) -> dict[str, str]:
    """Python drops the strings under fields; the source has them."""
    docs = {}
    for one in reversed(kind.__mro__):
        if dataclasses.is_dataclass(one):
            tree = ast.parse(inspect.getsource(sys.modules[one.__module__]))
            body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == one.__name__).body
            docs |= {field.target.id: " ".join(below.value.value.split())
                     for field, below in zip(body, body[1:], strict=False)
                     if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)}
    return docs
