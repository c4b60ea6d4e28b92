"""The data sets of a run: each read by its own settings, all of them together, and what there is of each."""
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ...models_impl.pictures import readable, remedy
from ..config.schema import Data, DataSet
from . import layouts
from .items import Found, Item, Items, spread
from .layouts import listed
from .schedule import Times

LOOKED_FOR = 100_000  # files of a data set


def label(settings: Data, number: int) -> str:
    """What a set is called in a sentence."""
    return settings.called(number) if number < len(settings.sets or settings.each[:1]) else "data.prior_path"


def read(one: DataSet, number: int, settings: Data) -> Found:
    """The items of one set, with its number. Raises ValueError, FileNotFoundError."""
    path = Path(one.path).expanduser()
    if one.prior_count and not path.is_dir():
        raise ValueError(f"{path}: {one.prior_count} class pictures are not drawn yet; `train` and `cache` do that.")
    found = layouts.read(path, one.kind, settings)
    held_out = Items() if one.prior else found.held_out
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
    return Found(*(some.changed(set=number, prior=one.prior) for some in (found.train, held_out)), found.classes)


def joined(found: dict[int, Found], settings: Data) -> tuple[dict[int, Found], list[str], list[str]]:
    """(the sets with one numbering of classes for all, its names, what is wrong with it)"""
    own = {n: one for n, one in found.items() if not settings.each[n].prior}
    numbered = [n for n, one in own.items() if not one.classes and (one.train.column("label") >= 0).any()]
    classes = list(dict.fromkeys(name for one in own.values() for name in one.classes))
    if classes and numbered:
        return found, classes, [f"{label(settings, n)}: its classes have numbers, and those of other sets names. Write "
                                "the names." for n in numbered]
    new = {name: i for i, name in enumerate(classes)}
    for n, one in own.items():
        if one.classes and one.classes != classes[:len(one.classes)]:
            labels = np.array([new[name] for name in one.classes])
            found[n] = Found(*(some.changed(labels=labels) for some in (one.train, one.held_out)), classes)
    return found, classes, []


def complaints(items: Sequence[Item], settings: Data, need: str, balanced: bool = False) -> list[str]:
    """Everything that items of one data set lack. balanced: each class is to be shown equally often. Of more than
    LOOKED_FOR files it is asked of so many, evenly spread, whether they are there."""
    items = Items.of(items)
    looked = "" if len(items) <= LOOKED_FOR else f" (of {LOOKED_FOR:,} looked for)"
    some = spread(items, LOOKED_FOR)
    said = listed([i.file for i in some if isinstance(i.file, Path) and not i.file.is_file()],
                  f"pictures are named but not there{looked}")
    own, labels = items.column("prior") == 0, items.column("label")
    for name in settings.conditions:
        said += listed(files(items, own & ~items.has(name)), f"pictures have no condition {name!r}",
                       "See `python -m trainer doctor`.")
        there = [i.conditions[name] for i in some if name in i.conditions]
        said += listed([c for c in there if isinstance(c, Path) and not c.is_file()],
                       f"conditions {name!r} are named but not there{looked}")
    if need == "captions":
        said += listed(files(items, items.column("texts") == 0), "pictures have no caption",
                       "Put a .txt, .caption or .json beside each, use data.kind = \"jsonl\", or set data.caption, "
                       "which all pictures without one get.")
    if need == "classes" or balanced:
        said += listed(files(items, (labels < 0) & (own | (need == "classes"))), "pictures have no class",
                       "Use data.kind = \"classes\" (one folder per class), or a jsonl with \"class\".")
    return said


class files(Sequence):
    """The files of the items for which `wanted`, (N,) bool, says so."""

    def __init__(self, items: Items, wanted: np.ndarray):
        self.items, self.chosen = items, np.flatnonzero(wanted)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i):
        return [item.file for item in self.items.at(self.chosen[i])]


def taken(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count`, of several data sets as many of each as there are."""
    of_each: dict[int, list[Item]] = {}
    for item in items:
        of_each.setdefault(item.set, []).append(item)
    turns = [item for turn in zip_longest(*of_each.values()) for item in turn if item is not None]
    return sorted(turns[:count], key=lambda item: item.set)


# --- How often each is shown

def times(items: Items, indices: np.ndarray, settings: Data) -> Times:
    """How often an epoch shows each of the items `indices`. It has as many pictures as the repeats make."""
    sets = settings.each
    own = items.column("set")[indices]
    there = [int(n) for n in np.unique(own)]
    weighted = any(sets[n].weight for n in there)
    balanced = settings.balance_classes and not items.column("prior")[indices].any()
    if not (weighted or balanced) and {sets[n].repeats for n in there} <= {1}:
        return Times()
    kinds = items.column("label")[indices] if balanced else np.zeros(len(own), np.int64)
    pairs, places, counts = np.unique(own.astype(np.int64) << 32 | (kinds.astype(np.int64) + 1), return_inverse=True,
                                      return_counts=True)
    pairs = [(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs]  # (set, class)
    which = np.zeros(len(items), np.int32)
    which[indices] = places
    if not (weighted or balanced):
        return Times([Fraction(sets[n].repeats) for n, _ in pairs], which)
    strata: Counter = Counter()  # (set, class) -> pictures, with 0 where it does not matter
    for (n, kind), count in zip(pairs, counts.tolist(), strict=True):
        strata[n if weighted else 0, kind] += count * sets[n].repeats
    total, classes = sum(strata.values()), Counter(number for number, _ in strata)
    weight = {number: Fraction(str(sets[number].weight)) if weighted else Fraction(1) for number in classes}
    rates = []
    for n, kind in pairs:
        number = n if weighted else 0
        share = weight[number] / sum(weight.values()) / classes[number]
        rates.append(share * total / strata[number, kind] * sets[n].repeats)
    return Times(rates, which)


def counted(train: Sequence[Item], held_out: Sequence[Item], settings: Data) -> list[str]:
    """What there is of each set, a line for each, where there are several."""
    if not settings.sets:
        return []
    train, held_out = Items.of(train), Items.of(held_out)
    lines, prior, numbers = [], train.column("prior") > 0, train.column("set")
    share = settings.prior_share if prior.any() else 0.0
    shown: Counter = Counter()
    for some, part in zip((np.flatnonzero(~prior), np.flatnonzero(prior)), (1 - share, share), strict=True):
        found = times(train, some, settings)
        rates = np.array([float(rate) for rate in found.rates])[found.of(some)]
        for number in np.unique(numbers[some]):
            shown[int(number)] += part * rates[numbers[some] == number].sum() / rates.sum()
    own, held = (np.bincount(i.column("set"), minlength=len(settings.each)) for i in (train, held_out))
    for number, one in enumerate(settings.each):
        more = [f"{held[number]:,} held out"] * bool(held[number]) + [f"{one.repeats} times an epoch"] * (
            one.repeats > 1) + ["prior"] * one.prior + [f"their loss counts {one.loss_weight:g}"] * (
            one.loss_weight != 1)
        lines.append(f"{' '.join(filter(None, (label(settings, number), one.name)))}: "
                     f"{', '.join([f'{own[number]:,} pictures', *more])}; {shown[number]:.0%} of what is shown")
    return lines
