"""How long a run is and how often something is done: steps, epochs, minutes."""
from __future__ import annotations

import math
from collections.abc import Sequence

from .rows import Draft, number
from .sets import PRIOR_SHARE, Folder

MINUTES = {"SECOND": 1 / 60, "MINUTE": 1, "HOUR": 60}


def epoch(draft: Draft, folders: Sequence[Folder]) -> int:
    """Steps in which every picture is shown as often as its data set says; 0 where they cannot be counted."""
    own = draft.get("batch_size", 1) * (1 - PRIOR_SHARE if any(folder.prior for folder in folders) else 1)
    return math.ceil(pictures(folders) / own)


def pictures(folders: Sequence[Folder]) -> float:
    counts = [folder.count for folder in folders if not folder.prior]
    return sum(counts) if all(counts) else 0


def epochs(draft: Draft, key: str, count, folders: Sequence[Folder]):
    """Steps of so many epochs."""
    count, steps = number(count), epoch(draft, folders)
    if not steps:
        draft.missing.append(f"steps: {key} = {count:g} rounds through pictures that are not here to be counted: "
                             "steps = rounds x pictures / batch_size.")
        return
    draft.set("steps", max(1, math.ceil(count * steps)))
    draft.changed.append(f"{key} = {count:g} is steps = {draft.get('steps')}: {pictures(folders):g} pictures, "
                         f"{draft.get('batch_size', 1)} in a batch.")


def save(draft: Draft, key: str, count, unit, folders: Sequence[Folder]):
    """How often a checkpoint is written, in steps, epochs or time."""
    unit = str(unit).upper().removesuffix("S")
    if is_never(count, unit):
        return
    if unit == "STEP":
        draft.set("save_every", max(1, round(number(count))))
        return
    draft.set("save_every", 0)
    if unit == "EPOCH":  # which shows each picture of a single data set once here
        single = len(folders) == 1 and not folders[0].shown
        draft.set("save_epochs", number(count) * (folders[0].repeats if single else 1))
    else:
        draft.set("save_minutes", number(count) * MINUTES[unit])


def sample(draft: Draft, key: str, count, unit, folders: Sequence[Folder]):
    """How often samples are drawn, which is in steps here."""
    unit = str(unit).upper().removesuffix("S")
    if is_never(count, unit):
        return
    if unit == "STEP":
        draft.set("samples.every", max(1, round(number(count))))
    elif unit == "EPOCH" and epoch(draft, folders):
        draft.set("samples.every", max(1, round(number(count) * epoch(draft, folders))))
        draft.changed.append(f"{key} = {count} epochs is samples.every = {draft.get('samples.every')} steps.")
    else:
        draft.missing.append(f"samples.every: {key} = {count} {unit.lower()}s, and here it is in steps.")


def is_never(count, unit: str) -> bool:
    return not count or unit not in ("STEP", "EPOCH", *MINUTES)
