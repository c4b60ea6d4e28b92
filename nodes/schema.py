"""A node's schema, with the fields that only newer ComfyUIs know."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from comfy_api.latest import io

KNOWN = {one.name for one in fields(io.Schema)}


def schema(
    inputs, advanced: tuple[str, ...] = (), counts: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    replaced: Mapping[str, Sequence[str]] | None = None, **entries,
) -> io.Schema:
    """`io.Schema`, less what this ComfyUI does not know (0.3.75 has neither search_aliases nor essentials_category).

    search_aliases: other words that people type; the frontend finds a node by its id and name first, so the words that
    matter most stand in the name, in parentheses. They are aliases too, for a translated name may lack them. advanced:
    names of inputs that the browser's new nodes show on demand only. counts: for an input that does not always count,
    the menus and the words in them with which it does; replaced: the inputs that stand in for it when they are linked.
    Our widgets in the browser hide what does not count. Raises ValueError for an input that is not there.
    """
    counts, replaced, names = counts or {}, replaced or {}, {one.id for one in inputs}
    for why, wanted in (("be advanced", advanced), ("count", {*counts, *sum(map(list, counts.values()), [])}),
                        ("be replaced", {*replaced, *sum(map(list, replaced.values()), [])})):
        if missing := set(wanted) - names:
            raise ValueError(f"{entries.get('node_id')} has no inputs {', '.join(sorted(missing))} to {why}")
    for one in inputs:  # 0.3.75's inputs have no arguments for these
        extra = {"advanced": True} if one.id in advanced else {}
        extra |= {"pixstack_counts": counts[one.id]} if one.id in counts else {}
        extra |= {"pixstack_replaced": replaced[one.id]} if one.id in replaced else {}
        if extra:
            one.extra_dict = {**one.extra_dict, **extra}
    in_name = entries["display_name"].partition(" (")[2].rstrip(")").lower()
    entries["search_aliases"] = [*entries.get("search_aliases", ()), *filter(None, in_name.split(", "))]
    return io.Schema(inputs=inputs, **{name: value for name, value in entries.items() if name in KNOWN})
