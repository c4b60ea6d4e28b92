"""A node's schema, with the fields that only newer ComfyUIs know."""
from __future__ import annotations

from dataclasses import fields

from comfy_api.latest import io

KNOWN = {one.name for one in fields(io.Schema)}


def schema(inputs, advanced: tuple[str, ...] = (), **entries) -> io.Schema:
    """`io.Schema`, less what this ComfyUI does not know (0.3.75 has neither search_aliases nor essentials_category).

    search_aliases: other words that people type; the frontend finds a node by its id and name first, so the words that
    matter most stand in the name, in parentheses. They are aliases too, for a translated name may lack them. advanced:
    names of inputs that the browser's new nodes show on demand only. Raises ValueError for one that is not there.
    """
    missing = set(advanced) - {one.id for one in inputs}
    if missing:
        raise ValueError(f"{entries.get('node_id')} has no inputs {', '.join(sorted(missing))} to be advanced")
    for one in inputs:
        if one.id in advanced:
            one.extra_dict = {**one.extra_dict, "advanced": True}  # 0.3.75's inputs have no argument for it
    in_name = entries["display_name"].partition(" (")[2].rstrip(")").lower()
    entries["search_aliases"] = [*entries.get("search_aliases", ()), *filter(None, in_name.split(", "))]
    return io.Schema(inputs=inputs, **{name: value for name, value in entries.items() if name in KNOWN})
