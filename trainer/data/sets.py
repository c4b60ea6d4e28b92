"""The data sets of a run: each read by its own settings, all of them together, and what there is of each."""
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

from ...models_impl.pictures import readable, remedy
from ..config.schema import Data, DataSet
from . import layouts
from .layouts import Found, Item, listed


def label(settings: Data, number: int) -> str:
    """What a set is called in a sentence."""
    return settings.called(number) if number < len(settings.sets or settings.each[:1]) else "data.prior_path"


def read(one: DataSet, number: int, settings: Data) -> Found:
    """The items of one set, with its number. Raises ValueError, FileNotFoundError."""
    path = Path(one.path).expanduser()
    if one.prior_count and not path.is_dir():
        raise ValueError(f"{path}: {one.prior_count} class pictures are not drawn yet; `train` and `cache` do that.")
    found = layouts.read(path, one.kind, settings)
    held_out = [] if one.prior else found.held_out
    if one.held_out_path:
        other = layouts.read(Path(one.held_out_path).expanduser(), one.kind, settings, found.classes)
        held_out = held_out + other.train
    if found.left_out:
        shown = "".join(f"\n    {file}: {remedy(file.suffix.lower())}" for file in found.left_out[:layouts.LISTED])
        logging.getLogger(__name__).warning("%d pictures are of formats that are not read here, and are left out:%s",
                                            len(found.left_out), shown)
    if not found.train:
        raise ValueError(f"{path} holds no {'prior' if one.prior else 'training'} pictures (looked for {one.kind}: "
                         f"{', '.join(sorted(readable()))}).")
    train = found.train
    if number or one.prior:
        train, held_out = ([replace(i, set=number, prior=one.prior) for i in some] for some in (train, held_out))
    return Found(train, held_out, found.classes)


def joined(found: dict[int, Found], settings: Data) -> tuple[dict[int, Found], list[str], list[str]]:
    """(the sets with one numbering of classes for all, its names, what is wrong with it)"""
    own = {n: one for n, one in found.items() if not settings.each[n].prior}
    numbered = [n for n, one in own.items() if not one.classes and any(i.label >= 0 for i in one.train)]
    classes = list(dict.fromkeys(name for one in own.values() for name in one.classes))
    if classes and numbered:
        return found, classes, [f"{label(settings, n)}: its classes have numbers, and those of other sets names. Write "
                                "the names." for n in numbered]
    new = {name: i for i, name in enumerate(classes)}
    for n, one in own.items():
        if one.classes and one.classes != classes[:len(one.classes)]:
            train, held_out = ([replace(i, label=new[one.classes[i.label]]) if i.label >= 0 else i for i in some]
                               for some in (one.train, one.held_out))
            found[n] = Found(train, held_out, classes)
    return found, classes, []


def complaints(items: list[Item], settings: Data, need: str, balanced: bool = False) -> list[str]:
    """Everything that items of one data set lack. balanced: each class is to be shown equally often."""
    said = listed([i.file for i in items if isinstance(i.file, Path) and not i.file.is_file()],
                  "pictures are named but not there")
    for name in settings.conditions:
        said += listed([i.file for i in items if not i.prior and name not in i.conditions],
                       f"pictures have no condition {name!r}", "See `python -m trainer doctor`.")
        there = [i.conditions[name] for i in items if name in i.conditions]
        said += listed([c for c in there if isinstance(c, Path) and not c.is_file()],
                       f"conditions {name!r} are named but not there")
    if need == "captions":
        said += listed([i.file for i in items if not i.texts], "pictures have no caption",
                       "Put a .txt, .caption or .json beside each, use data.kind = \"jsonl\", or set data.caption, "
                       "which all pictures without one get.")
    if need == "classes" or balanced:
        said += listed([i.file for i in items if i.label < 0 and (need == "classes" or not i.prior)],
                       "pictures have no class",
                       "Use data.kind = \"classes\" (one folder per class), or a jsonl with \"class\".")
    return said


def taken(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count`, of several data sets as many of each as there are."""
    of_each: dict[int, list[Item]] = {}
    for item in items:
        of_each.setdefault(item.set, []).append(item)
    turns = [item for turn in zip_longest(*of_each.values()) for item in turn if item is not None]
    return sorted(turns[:count], key=lambda item: item.set)


# --- How often each is shown

def times(items: list[Item], indices: Iterable[int], settings: Data) -> dict[int, Fraction]:
    """How often an epoch shows each of the items, by index, where that is not once. An epoch has as many pictures as
    the repeats make."""
    indices, sets = list(indices), settings.each
    weighted = any(sets[items[i].set].weight for i in indices)
    balanced = settings.balance_classes and not any(items[i].prior for i in indices)
    strata: dict[tuple[int, int], list[int]] = {}  # (set, class), with 0 where it does not matter
    for i in indices:
        item = items[i]
        strata.setdefault((item.set if weighted else 0, item.label if balanced else 0), []).append(i)
    if not (weighted or balanced):
        rates = [Fraction(one.repeats) for one in sets]
        return {i: rates[items[i].set] for i in indices if rates[items[i].set] != 1}
    pictures = {key: sum(sets[items[i].set].repeats for i in some) for key, some in strata.items()}
    total, classes = sum(pictures.values()), Counter(number for number, _ in strata)
    weight = {number: Fraction(str(sets[number].weight)) if weighted else Fraction(1) for number in classes}
    found = {}
    for (number, kind), some in strata.items():
        share = weight[number] / sum(weight.values()) / classes[number]
        for i in some:
            found[i] = share * total / pictures[number, kind] * sets[items[i].set].repeats
    return found


def counted(train: list[Item], held_out: list[Item], settings: Data) -> list[str]:
    """What there is of each set, a line for each, where there are several."""
    if not settings.sets:
        return []
    lines, groups = [], [[i for i, item in enumerate(train) if item.prior == prior] for prior in (False, True)]
    share = settings.prior_share if groups[1] else 0.0
    shown: Counter = Counter()
    for some, part in zip(groups, (1 - share, share), strict=True):
        rates = times(train, some, settings)
        total = sum(rates.get(i, 1) for i in some)
        for i in some:
            shown[train[i].set] += part * float(rates.get(i, 1) / total)
    own, held = (Counter(i.set for i in some) for some in (train, held_out))
    for number, one in enumerate(settings.each):
        more = [f"{held[number]:,} held out"] * bool(held[number]) + [f"{one.repeats} times an epoch"] * (
            one.repeats > 1) + ["prior"] * one.prior + [f"their loss counts {one.loss_weight:g}"] * (
            one.loss_weight != 1)
        lines.append(f"{' '.join(filter(None, (label(settings, number), one.name)))}: "
                     f"{', '.join([f'{own[number]:,} pictures', *more])}; {shown[number]:.0%} of what is shown")
    return lines
