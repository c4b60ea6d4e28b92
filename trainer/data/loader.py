"""Pictures with captions or classes: what is there, and batches that depend only on (seed, step).

A batch is named by its step, not by an iterator's past, so a run that resumes needs no state of the data.
"""
from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...models_impl.pictures import readable, remedy
from ..config.schema import Data
from . import buckets, layouts, schedule
from .layouts import Item, listed
from .mask_files import MASK
from .pictures import Picture, Pictures, has_alpha, measured, measured_or_none

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
    """(B,) bool: pictures of data.prior_path"""
    size: Size
    """(height, width) of every picture in the batch, whether it is there or its features."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """What the cache holds of the pictures, "encoder.part" -> (B, ...)."""
    mask: Tensor | None = None
    """(B, 1, H, W) uint8, where the loss counts; None: everywhere."""


@dataclass(frozen=True)
class Collection:
    train: list[Item]
    """Prior pictures, if there are, after all others."""
    held_out: list[Item]
    classes: list[str]


def read(settings: Data, need: str, strict: bool = True) -> Collection:
    """The items of a data set. need: "captions" or "classes", which every item must then have; else neither. strict:
    refuse items whose files are missing."""
    path = Path(settings.path).expanduser()
    data_set = layouts.read(path, settings.kind, settings)
    train, held_out, prior = data_set.train, data_set.held_out, []
    if settings.held_out_path:
        other = layouts.read(Path(settings.held_out_path).expanduser(), settings.kind, settings, data_set.classes)
        held_out = held_out + other.train
    if settings.prior_path:
        prior = layouts.read(Path(settings.prior_path).expanduser(), "auto", settings).train
        prior = [replace(i, prior=True, captions=i.texts or words(settings.prior_caption)) for i in prior]
    if data_set.left_out:
        shown = "".join(f"\n    {file}: {remedy(file.suffix.lower())}" for file in data_set.left_out[:layouts.LISTED])
        logging.getLogger(__name__).warning("%d pictures are of formats that are not read here, and are left out:%s",
                                            len(data_set.left_out), shown)
    if not train:
        raise ValueError(f"{path} holds no training pictures (looked for {settings.kind}: "
                         f"{', '.join(sorted(readable()))}).")
    if settings.caption:
        train, held_out = ([i if i.texts else replace(i, captions=words(settings.caption)) for i in some]
                           for some in (train, held_out))
    train = train + prior
    if strict:
        complain(path, train + held_out, settings, need)
    return Collection(train, held_out, data_set.classes)


def complain(path: Path, items: list[Item], settings: Data, need: str):
    """Raises ValueError for everything that the items lack."""
    complaints = listed([i.file for i in items if isinstance(i.file, Path) and not i.file.is_file()],
                        "pictures are named but not there")
    for name in settings.conditions:
        complaints += listed([i.file for i in items if not i.prior and name not in i.conditions],
                             f"pictures have no condition {name!r}", "See `python -m trainer doctor`.")
        there = [i.conditions[name] for i in items if name in i.conditions]
        complaints += listed([c for c in there if isinstance(c, Path) and not c.is_file()],
                             f"conditions {name!r} are named but not there")
    complaints += of_masks([i for i in items if not i.prior], settings)
    if need == "captions":
        complaints += listed([i.file for i in items if not i.texts], "pictures have no caption",
                             "Put a .txt, .caption or .json beside each, use data.kind = \"jsonl\", or give all one: "
                             "data.caption.")
    if need == "classes":
        complaints += listed([i.file for i in items if i.label < 0], "pictures have no class",
                             "Use data.kind = \"classes\" (one folder per class), or a jsonl with \"class\".")
    if complaints:
        raise ValueError(f"{path} cannot be trained on:\n  " + "\n  ".join(complaints))


def of_masks(items: list[Item], settings: Data) -> list[str]:
    """What is wrong with the masks of the items, as far as that shows without decoding a picture."""
    if settings.masks == "alpha" and not any(has_alpha(i.file) for i in items):
        return ["data.masks=\"alpha\", and no picture has transparency: save them with an alpha channel (PNG, WebP)."]
    if settings.masks != "files":
        return []
    there = [i.conditions[MASK] for i in items if MASK in i.conditions]
    if not there:
        return ["data.masks=\"files\", and no picture has a mask: put a-masklabel.png beside each a.png, or masks of "
                "the same names into a folder masks beside the folder images."]
    return listed([file for file in there if isinstance(file, Path) and not file.is_file()],
                  "masks are named but not there")


def identity(collection: Collection) -> dict:
    """What identifies the training pictures and captions, wherever they lie: names and captions of all, and the bytes
    of LOOKED_INTO pictures evenly spread over them, the first STARTS of each."""
    digest, contents = hashlib.sha256(), hashlib.sha256()
    for i in collection.train:
        digest.update(repr((i.file.name, i.texts, i.tags, i.label, i.prior)).encode())
    for i in collection.train[:: max(1, math.ceil(len(collection.train) / LOOKED_INTO))]:
        contents.update(start_of(i.file))
    return {"pictures": len(collection.train), "digest": digest.hexdigest()[:40],
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


def words(caption: str) -> tuple[str, ...]:
    return (caption,) if caption else ()


def in_buckets(items: list[Item], settings: Data) -> dict[Size, list[int]]:
    """The indices of the items that are shown at each (height, width). Looks into files only where sizes differ."""
    known = buckets.sizes(settings)
    if len(known) == 1:
        return {known[0]: list(range(len(items)))}
    if not settings.skip_broken:
        return buckets.grouped(measured(items, settings.workers), settings)
    sizes = measured_or_none(items, settings.workers)
    whole = [i for i, size in enumerate(sizes) if size]
    if not whole:
        raise ValueError(f"None of the {len(items):,} pictures can be read.")
    shown = buckets.grouped([sizes[i] for i in whole], settings)
    return {size: [whole[i] for i in some] for size, some in shown.items()}


def priors(position: int, share: float) -> int:
    """How many of the positions before this one have prior pictures: they come evenly spread."""
    return math.floor(position * share + 1e-9)


class Batches:
    """`batches(step, part)`: the items at `part` of the step's batch; what comes next is decoded meanwhile.

    `data.prior_share` of every group of one size are prior pictures, brought to the size of the others.
    """

    def __init__(self, items: list[Item], settings: Data, seed: int, batch_size: int, load=Pictures):
        """load: Pictures, or what takes its place (`cache.loader`)."""
        self.items, self.settings, self.seed, self.batch_size = items, settings, seed, batch_size
        self.pictures = load(items, settings)
        self.group = settings.bucket_group or batch_size
        own = [i for i, item in enumerate(items) if not item.prior]
        prior = [i for i, item in enumerate(items) if item.prior]
        self.share = settings.prior_share if prior else 0.0
        mixed, groups = priors(self.group, self.share), batch_size // self.group
        shown = in_buckets([items[i] for i in own], settings)
        self.buckets = {size: [own[i] for i in some] for size, some in shown.items()}
        self.schedule = schedule.BucketSchedule(self.buckets, seed, batch_size - groups * mixed, self.group - mixed)
        self.prior = schedule.BucketSchedule({(0, 0): prior}, seed + 1, groups * mixed, mixed) if mixed else None
        self.of_prior, self.broken = prior, set()
        self.pending: dict[tuple, list] = {}

    def at(self, step: int, position: int) -> tuple[int, Size]:
        """(index of the item, (height, width) it is shown at)"""
        group, place = divmod(position, self.group)
        before, mixed = priors(place, self.share), priors(self.group, self.share)
        if priors(place + 1, self.share) == before:
            return self.schedule.at(step, group * (self.group - mixed) + place - before)
        size = self.schedule.at(step, group * (self.group - mixed))[1]
        return self.prior.at(step, group * mixed + before)[0], size

    def index(self, step: int, position: int) -> int:
        return self.at(step, position)[0]

    def rng(self, step: int, position: int, what: str) -> random.Random:
        return random.Random(f"{self.seed} {step} {position} {what}")

    def __call__(self, step: int, part: range, following: tuple[int, range] | None = None) -> Batch:
        loads = self.pending.pop((step, part), None) or self.submit(step, part)
        if following:
            self.pending[following] = self.submit(*following)
        items, loaded = zip(*(self.loaded(step, p, load) for p, load in zip(part, loads, strict=True)), strict=True)
        captions = [self.caption(i, self.rng(step, p, "caption")) for p, i in zip(part, items, strict=True)]
        return collate(items, loaded, captions, part, step)

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
        place = others.index(index)
        for following in (*others[place + 1:], *others[:place]):
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

    def caption(self, item: Item, rng: random.Random) -> str:
        settings, own = self.settings, item.captions
        if item.described and (not own or rng.random() < settings.described_share):
            own = item.described
        if not own:
            return ""
        text = rng.choice(own)
        if item.tags and rng.random() < settings.tag_share:
            return ", ".join([text, *rng.sample(item.tags, min(settings.tag_count, len(item.tags)))])
        if settings.templates and rng.random() < settings.template_share:
            return rng.choice(settings.templates).replace("{}", text)
        return text


def collate(items: Sequence[Item], loaded: Sequence[Picture], captions: list[str], part: range, step: int) -> Batch:
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


def fixed(items: list[Item], settings: Data, at_once: int = 64, load=Pictures) -> list[Batch]:
    """All items with their first caption and nothing random, up to `at_once` of one size a batch, for validation and
    evaluation."""
    crop = "centre" if settings.crop == "random" else settings.crop
    shown = [(i, size) for size, some in in_buckets(items, settings).items() for i in some] if items else []
    ordered = [items[i] for i, _ in shown]
    pictures, batches, start = load(ordered, replace(settings, flip=False, crop=crop)), [], 0
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
            captions = [(i.texts or ("",))[0] for i in some]
            batches.append(collate(some, [load.result() for load in loads], captions, part[:len(some)], 0))
    return batches


def summary(collection: Collection) -> str:
    own = [i for i in collection.train if not i.prior]
    lines = [f"{len(own):,} training pictures, {len(collection.held_out):,} held out"]
    if len(own) < len(collection.train):
        lines.append(f"{len(collection.train) - len(own):,} prior pictures")
    if collection.classes or any(i.label >= 0 for i in own[:1]):
        counts = Counter(i.label for i in own)
        lines.append(f"{len(counts):,} classes, {min(counts.values())} to {max(counts.values())} pictures each")
    if masked := sum(MASK in i.conditions for i in own):
        lines.append(f"{masked:,} of them with a mask")
    if own[0].texts:
        number = sum(len(i.texts) for i in own)
        lines.append(f"{number / len(own):.1f} captions and {sum(len(i.tags) for i in own) / len(own):.1f} tags a "
                     "picture")
    return "; ".join(lines)
