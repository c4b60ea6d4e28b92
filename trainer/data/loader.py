"""Pictures with captions or classes: what is there, and batches that depend only on (seed, step).

A batch is named by its step, not by an iterator's past, so a run that resumes needs no state of the data.
"""
from __future__ import annotations

import hashlib
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Data
from . import buckets, schedule, sets, wording
from .items import Item, Items, spread
from .layouts import listed
from .mask_files import MASK
from .pictures import Picture, Pictures, has_alpha, measured, oblong

Size = tuple[int, int]  # (height, width) in pixels
LOOKED_INTO, STARTS = 256, 2**18  # pictures that identify a data set by their bytes, and bytes of each


@dataclass(frozen=True)
class Batch:
    pictures: Tensor | None
    """(B, 3, H, W) uint8; None where `features` stand for them"""
    captions: list[str]
    labels: Tensor
    """(B,) int64; -1 where the data have no classes"""
    positions: range
    """Where these items stand in the whole batch of the step."""
    step: int
    items: list[Item]
    """Where each picture came from."""
    conditions: dict[str, Tensor]
    """By the names in data.conditions, (B, 3, H, W) uint8, cut and mirrored as the pictures."""
    sizes: Tensor
    """(B, 2) int64: height and width of each picture as it was in its file."""
    boxes: Tensor
    """(B, 4) float32: what was cut out of it, in its own pixels: top, left, bottom, right."""
    prior: Tensor
    """(B,) bool: pictures of prior data sets"""
    size: Size
    """(height, width) of every picture in the batch, whether it is there or its features."""
    weights: Tensor | None = None
    """(B,) float32: what the loss of each picture counts; None where all count alike."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """What the cache holds of the pictures, "encoder.part" -> (B, ...)."""
    mask: Tensor | None = None
    """(B, 1, H, W) uint8, where the loss counts; None: everywhere."""


@dataclass(frozen=True)
class Collection:
    train: Items
    """Prior pictures, if there are, after all others."""
    held_out: Items
    classes: list[str]


def read(settings: Data, need: str, strict: bool = True) -> Collection:
    """The items of all data sets. need: "captions" or "classes", which every item must then have; else neither. strict:
    refuse items whose files are missing, and pictures that the crop refuses."""
    found, problems, several = {}, [], len(settings.each) > 1
    for number, one in enumerate(settings.each):
        try:
            of_one = sets.read(one, number, settings)
            train, held_out = (wording.named(some, one) for some in (of_one.train, of_one.held_out))
            found[number] = replace(of_one, train=train, held_out=held_out)
        except (ValueError, OSError) as error:
            if not several:
                raise
            problems.append(f"{sets.label(settings, number)}: {error}")
    found, classes, wrong = sets.joined(found, settings)
    problems += wrong
    for number, one in found.items() if strict else ():
        where = f"{sets.label(settings, number)}: " * several
        items = one.train + one.held_out
        said = sets.complaints(items, settings, need, settings.balance_classes)
        if settings.each[number].crop == "none":
            said += listed(oblong(items, settings.workers),
                           "pictures are not square, and data.crop=\"none\" takes squares",
                           "Set data.crop to centre or random, or crop them.")
        problems += [where + one for one in said]
    own, prior = ([one for n, one in found.items() if settings.each[n].prior is kind] for kind in (False, True))
    held_out = sum((one.held_out for one in found.values()), Items())
    if strict and settings.masks:
        problems += of_masks(sum((one.train for one in own), Items()) + held_out, settings)
    if problems:
        raise ValueError(cannot("the data" if several else Path(settings.path).expanduser(), problems))
    found = Collection(sum((one.train for one in own + prior), Items()), held_out, classes)
    if settings.index and len(buckets.sizes(settings)) > 1:
        measured(found.train, settings.workers, settings.skip_broken)  # and keeps it
    return found


def complain(path: Path, items: Sequence[Item], settings: Data, need: str):
    """Raises ValueError for everything that the items lack."""
    if said := sets.complaints(items, settings, need):
        raise ValueError(cannot(path, said))


def cannot(what, problems: list[str]) -> str:
    return f"{what} cannot be trained on:\n  " + "\n  ".join(problems)


def of_masks(items: Items, settings: Data) -> list[str]:
    """What is wrong with the masks of the items, as far as that shows without decoding a picture."""
    some = spread(items, sets.LOOKED_FOR)
    if settings.masks == "alpha" and not any(has_alpha(i.file) for i in some):
        return ["data.masks=\"alpha\", and no picture has transparency: save them with an alpha channel (PNG, WebP)."]
    if settings.masks != "files":
        return []
    if not items.has(MASK).any():
        return ["data.masks=\"files\", and no picture has a mask: put a-masklabel.png beside each a.png, or masks of "
                "the same names into a folder masks beside the folder images."]
    there = [i.conditions[MASK] for i in some if MASK in i.conditions]
    return listed([file for file in there if isinstance(file, Path) and not file.is_file()],
                  "masks are named but not there")


def identity(collection: Collection) -> dict:
    """What identifies the training pictures and captions, wherever they lie: names and captions of all, and the bytes
    of LOOKED_INTO pictures evenly spread over them, the first STARTS of each."""
    digest, contents = hashlib.sha256(), hashlib.sha256()
    for part in collection.train.parts:
        digest.update(f"{part.records.digest} {len(part.chosen)} {part.set} {part.prior}".encode())
    for i in spread(collection.train, LOOKED_INTO):
        contents.update(start_of(i.file))
    return {"pictures": len(collection.train), "listing": digest.hexdigest()[:40],
            "contents": contents.hexdigest()[:40]}


def start_of(file) -> bytes:
    """The first bytes of a picture, and its length; nothing of one that is not there."""
    try:
        if not isinstance(file, Path):
            whole = file.read_bytes()
            return whole[:STARTS] + str(len(whole)).encode()
        with open(file, "rb") as opened:
            return opened.read(STARTS) + str(os.fstat(opened.fileno()).st_size).encode()
    except OSError:
        return b""


def in_buckets(items: Sequence[Item], settings: Data) -> dict[Size, np.ndarray]:
    """The indices of the items, but for prior ones, that are shown at each (height, width). Looks into files only where
    sizes differ, and the data set does not say them."""
    items = Items.of(items)
    wanted, known = items.column("prior") == 0, buckets.sizes(settings)
    own = np.flatnonzero(wanted).astype(np.int32)
    if len(known) == 1:
        return {known[0]: own}
    shown = grouped(measured(items.only(wanted), settings.workers, settings.skip_broken), settings)
    if not shown:
        raise ValueError(f"None of the {len(own):,} pictures can be read.")
    return {size: own[indices] for size, indices in shown.items()}


def grouped(measures: np.ndarray, settings: Data) -> dict[Size, np.ndarray]:
    """The indices of the pictures of every size that has some. measures: (N, 2), what the pictures measure themselves;
    those of height 0 are left out."""
    kinds, which = np.unique(measures[:, 0].astype(np.int64) << 32 | measures[:, 1], return_inverse=True)
    places = [buckets.nearest(settings, *divmod(int(kind), 2**32)) if kind >> 32 else None for kind in kinds]
    shown = sorted({size for size in places if size})
    number = np.array([shown.index(size) if size else -1 for size in places], np.int32)[which]
    return {size: np.flatnonzero(number == n).astype(np.int32) for n, size in enumerate(shown)}


def priors(position: int, share: float) -> int:
    """How many of the positions before this one have prior pictures: they come evenly spread."""
    return math.floor(position * share + 1e-9)


class Batches:
    """`batches(step, part)`: the items at `part` of the step's batch; what comes next is decoded meanwhile.

    `data.prior_share` of every group of one size are prior pictures, brought to the size of the others.
    """

    def __init__(self, items: Sequence[Item], settings: Data, seed: int, batch_size: int, load=Pictures):
        """load: Pictures, or what takes its place (`cache.loader`)."""
        self.items, self.settings, self.seed, self.batch_size = Items.of(items), settings, seed, batch_size
        self.pictures = load(self.items, settings)
        self.group = settings.bucket_group or batch_size
        prior = np.flatnonzero(self.items.column("prior")).astype(np.int32)
        self.share = settings.prior_share if len(prior) else 0.0
        mixed, groups = priors(self.group, self.share), batch_size // self.group
        self.buckets = in_buckets(self.items, settings)
        shown = np.concatenate([*self.buckets.values()])
        shards = schedule.Shards(self.items.starts(), settings.shards_at_once, settings.streams) \
            if settings.shards_at_once else None
        self.schedule = schedule.BucketSchedule(self.buckets, seed, batch_size - groups * mixed, self.group - mixed,
                                                sets.times(self.items, shown, settings), shards)
        self.prior = schedule.BucketSchedule({(0, 0): prior}, seed + 1, groups * mixed, mixed,
                                             sets.times(self.items, prior, settings)) if mixed else None
        self.of_prior, self.broken = prior, set()
        self.weights = [one.loss_weight for one in settings.each]
        self.pending: dict[tuple, list] = {}

    def at(self, step: int, position: int) -> tuple[int, Size]:
        """(index of the item, (height, width) it is shown at)"""
        group, place = divmod(position, self.group)
        before, mixed = priors(place, self.share), priors(self.group, self.share)
        if priors(place + 1, self.share) == before:
            return self.schedule.at(step, group * (self.group - mixed) + place - before)
        size = self.schedule.at(step, group * (self.group - mixed))[1]
        return self.prior.at(step, group * mixed + before)[0], size

    @property
    def an_epoch(self) -> float:
        """Pictures that are shown until each of the training pictures was as often as it is in an epoch."""
        mixed = priors(self.group, self.share)
        return float(self.schedule.pictures * self.group / (self.group - mixed))

    def index(self, step: int, position: int) -> int:
        return self.at(step, position)[0]

    def rng(self, step: int, position: int, what: str) -> random.Random:
        return random.Random(f"{self.seed} {step} {position} {what}")

    def __call__(self, step: int, part: range, following: tuple[int, range] | None = None) -> Batch:
        loads = self.pending.pop((step, part), None) or self.submit(step, part)
        if following:
            self.pending[following] = self.submit(*following)
        items, loaded = zip(*(self.loaded(step, p, load) for p, load in zip(part, loads, strict=True)), strict=True)
        captions = [wording.at(i, self.settings, self.seed, self.rng(step, p, "caption"))
                    for p, i in zip(part, items, strict=True)]
        return collate(items, loaded, captions, part, step, self.weights)

    def loaded(self, step: int, position: int, load) -> tuple[Item, Picture]:
        """The item of a position and its picture. With data.skip_broken, in place of one that cannot be read the next
        one of its size that can, whatever was found broken before: a run that resumes gets the same."""
        index, size = self.at(step, position)
        try:
            return self.items[index], load.result()
        except ValueError as error:
            if not self.settings.skip_broken:
                raise
            self.leave_out(index, error)
        others = self.of_prior if self.items[index].prior else self.buckets[size]
        place = int(np.searchsorted(others, index))  # they are in the order of their indices
        for following in map(int, chain(others[place + 1:], others[:place])):
            again = self.pictures.submit(following, size, self.rng(step, position, "picture"))
            try:
                return self.items[following], again.result()
            except ValueError as error:
                self.leave_out(following, error)
        raise ValueError(f"None of the {len(others):,} pictures of this size can be read.")

    def leave_out(self, index: int, error: ValueError):
        if index not in self.broken:
            self.broken.add(index)
            print(f"{error} It is left out ({len(self.broken):,} so far).", file=sys.stderr)

    def submit(self, step: int, part: range):
        shown = [self.at(step, p) for p in part]
        if len({size for _, size in shown}) > 1:
            raise ValueError(f"data.bucket_group={self.settings.bucket_group}: a pass of {len(part)} pictures has "
                             f"several sizes. Make it a multiple of the pictures in a pass (micro_batch_size, or "
                             "batch_size over the number of processes).")
        return [self.pictures.submit(*one, self.rng(step, p, "picture")) for p, one in zip(part, shown, strict=True)]


def collate(items: Sequence[Item], loaded: Sequence[Picture], captions: list[str], part: range, step: int,
            weights: Sequence[float] = (1.0,)) -> Batch:
    """weights: what the loss of each data set's pictures counts."""
    for item, one in zip(items, loaded, strict=True):
        refuse_spoilt(item, one)
    names = loaded[0].conditions
    return Batch(
        pictures=None if loaded[0].pixels is None else torch.stack([one.pixels for one in loaded]),
        captions=captions,
        labels=torch.tensor([i.label for i in items]),
        positions=part,
        step=step,
        items=list(items),
        conditions={name: torch.stack([one.conditions[name] for one in loaded]) for name in names},
        sizes=torch.tensor([one.original for one in loaded]),
        boxes=torch.tensor([one.box for one in loaded], dtype=torch.float32),
        prior=torch.tensor([i.prior for i in items]),
        size=loaded[0].size,
        weights=None if set(weights) == {1.0} else torch.tensor([weights[i.set] for i in items]),
        features={name: torch.stack([one.features[name] for one in loaded]) for name in loaded[0].features},
        mask=masks(loaded),
    )


def masks(loaded: Sequence[Picture]) -> Tensor | None:
    if all(one.mask is None for one in loaded):
        return None
    whole = torch.full((1, *loaded[0].size), 255, dtype=torch.uint8)
    return torch.stack([whole if one.mask is None else one.mask for one in loaded])


def refuse_spoilt(item: Item, loaded: Picture):
    """Raise ValueError for features that hold something else than numbers: an encoder in float16 that ran over, or a
    damaged cache."""
    for name, value in loaded.features.items():
        if value.dtype.is_floating_point and value.element_size() > 1 and not value.isfinite().all():
            raise ValueError(f"{item.file}: what the cache holds of it ({name}) has values that are no numbers (NaN or "
                             "infinite). Take the picture out, or make the cache anew.")


def fixed(items: Sequence[Item], settings: Data, at_once: int = 64, load=Pictures, first: int = 0) -> list[Batch]:
    """All items with their first caption and nothing random, up to `at_once` of one size a batch, for validation and
    evaluation. first: the position of the first."""
    shown = [(i, size) for size, some in in_buckets(items, settings).items() for i in some] if items else []
    ordered = [items[i] for i, _ in shown]
    pictures, batches, start = load(ordered, settings.unvaried()), [], 0
    while start < len(shown):
        size = shown[start][1]
        stop = next((p for p in range(start, min(start + at_once, len(shown))) if shown[p][1] != size),
                    min(start + at_once, len(shown)))
        some, part = ordered[start:stop], range(start, stop)
        loads = [pictures.submit(p, size, random.Random(0)) for p in part]
        start = stop
        if settings.skip_broken:
            whole = [n for n, load in enumerate(loads) if not isinstance(load.exception(), ValueError)]
            some, loads = [some[n] for n in whole], [loads[n] for n in whole]
        if some:
            captions = [wording.plain(i, settings.each[i.set]) for i in some]
            place = range(first + part.start, first + part.start + len(some))
            batches.append(collate(some, [load.result() for load in loads], captions, place, 0))
    return batches


def summary(collection: Collection) -> str:
    train = Items.of(collection.train)
    own = train.column("prior") == 0
    count = int(own.sum())
    lines = [f"{count:,} training pictures, {len(collection.held_out):,} held out"]
    if count < len(train):
        lines.append(f"{len(train) - count:,} prior pictures")
    labels = train.column("label")[own]
    if collection.classes or (labels[:1] >= 0).any():
        kinds, counts = np.unique(labels, return_counts=True)
        lines.append(f"{len(kinds):,} classes, {counts.min()} to {counts.max()} pictures each")
    if masked := (train.has(MASK) & own).sum():
        lines.append(f"{masked:,} of them with a mask")
    if (texts := train.column("texts")[own])[0]:
        lines.append(f"{texts.mean():.1f} captions and {train.column('tags')[own].mean():.1f} tags a picture")
    return "; ".join(lines)
