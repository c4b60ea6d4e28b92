"""Features that frozen encoders made of pictures, found by the bytes of a picture and how it was cut: the command
`cache` makes them, and a run that finds all of its own opens no picture. They lie in a `store.Store`.

An encoder of pictures is anything with `name`, `of` ("" for the picture, or the name of a condition), `store` (a Store
or None) and `encode(pictures (B, 3, H, W) uint8, device) -> {part: (B, ...)}`; `vaes.FrozenVae` is one.
"""
from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..config.schema import Config, Data
from ..data import loader as data
from ..data.items import Item, Items, spread
from ..data.layouts import listed
from ..data.pictures import KEPT_BYTES, Picture, Pictures, Size, mask_of, plan
from .store import Digests

AT_ONCE = 8  # pictures decoded and encoded together
LOOKED_FOR = 100_000  # pictures of a data set, evenly spread, that a run looks for in the cache before its first step
ORIGINAL, BOX = "original", "box"  # parts beside an encoder's own: what `pictures.Picture` says of the cut



def key_of(item: Item, of: str, size: Size, crop: str, mirrored: bool, digests: Digests) -> str:
    """Where the features of a picture, or of its condition `of`, lie. A condition is cut as its picture is."""
    content = digests.of(item.file)[0]
    if of:
        content += "+" + digests.of(item.conditions[of])[0]
    return f"{content}@{size[0]}x{size[1]} {crop}{' mirrored' if mirrored else ''}"


class ShownItems:
    """Every item with every size it is shown at: prior pictures take the size of whatever they stand beside."""

    def __init__(self, items: Sequence[Item], settings: Data):
        self.items = Items.of(items)
        prior = self.items.column("prior") > 0
        self.prior = self.items.only(prior)
        self.buckets = {} if prior.all() else data.in_buckets(self.items, settings)

    def __len__(self) -> int:
        return sum(len(indices) + len(self.prior) for indices in self.buckets.values())

    def __iter__(self) -> Iterator[tuple[Item, Size]]:
        for size, indices in self.buckets.items():
            yield from ((self.items[i], size) for i in indices)
            yield from ((i, size) for i in self.prior)


def lacking(items: list[Item], settings: Data, encoders: list, digests: Digests,
            progress: Callable = lambda some: some, most: int = 0) -> tuple[list, list]:
    """([(item, size, mirrored)] that some encoder has no features of, the files among them that have changed). most:
    look at so many of the items, evenly spread; 0 = all."""
    missing, changed = [], []
    for item, size in progress(ShownItems(spread(items, most or len(items)), settings)):
        altered = digests.of(item.file)[1] or any(digests.of(item.conditions[e.of])[1] for e in encoders if e.of)
        one = settings.each[item.set]
        for mirrored in (False, True) if one.flip else (False,):
            if any(key_of(item, e.of, size, one.crop, mirrored, digests) not in e.store for e in encoders):
                missing.append((item, size, mirrored))
                changed += [item.file] if altered and item.file not in changed[-1:] else []
    return missing, changed


class Known(Digests):
    """Digests of the pictures that were read once; no picture is read for it."""

    def of(self, file) -> tuple[str, bool]:
        return self.known_of(file)


def counted(config: Config, encoders: list, items: list[Item]) -> tuple[int, int]:
    """(how many pictures, at all sizes that they are shown at, the cache has everything of; how many there are). No
    picture is read."""
    settings, stores = config.data, [e.store for e in encoders]
    every = sum(2 if settings.each[item.set].flip else 1 for item, _ in ShownItems(items, settings))
    if None in stores or any(settings.each[number].crop == "random" for number in {i.set for i in items}):
        return 0, every
    for store in stores:
        store.refresh()
    missing, _ = lacking(items, settings, encoders, Known(Path(config.cache.folder).expanduser()))
    return every - len(missing), every


class Cached:
    """In place of `pictures.Pictures` where the cache has all features of all pictures: no picture is opened, but for
    masks, which are no part of it."""

    def __init__(self, items: list[Item], settings: Data, encoders: list, digests: Digests):
        self.items, self.settings, self.encoders, self.digests = items, settings, encoders, digests
        self.pool = ThreadPoolExecutor(settings.workers) if settings.masks else None
        small = max(settings.sides) ** 2 * len(items) <= KEPT_BYTES
        self.masks: dict | None = {} if settings.cache and small else None

    def submit(self, index: int, size: Size, rng: random.Random) -> Future:
        if self.pool:
            return self.pool.submit(self.load, index, size, rng)
        found = Future()
        found.set_result(self.load(index, size, rng))
        return found

    def load(self, index: int, size: Size, rng: random.Random) -> Picture:
        item, features, cut = self.items[index], {}, {}
        one = self.settings.each[item.set]
        mirrored = one.flip and rng.random() < 0.5
        for e in self.encoders:
            key = key_of(item, e.of, size, one.crop, mirrored, self.digests)
            record = e.store.get(key)
            cut = {part: tuple(record.pop(part).tolist()) for part in (ORIGINAL, BOX)}
            features |= {f"{e.name}.{part}": value for part, value in record.items()}
        original = tuple(map(int, cut[ORIGINAL]))
        mask = self.mask(index, original, size) if self.pool else None
        return Picture(None, {}, original, cut[BOX], size, features,
                       mask.flip(-1) if mask is not None and mirrored else mask)

    def mask(self, index: int, original: Size, size: Size) -> torch.Tensor | None:
        if self.masks is not None and (index, size) in self.masks:
            return self.masks[index, size]
        cut = plan(original, size, self.settings.crop, random.Random(0))  # which is fixed, or nothing were cached
        found = mask_of(self.items[index], self.settings, cut)
        if self.masks is not None:
            self.masks[index, size] = found
        return found


def loader(config: Config, encoders: list, items: list[Item], settings: Data, say: Callable[[str], None],
           progress: Callable = lambda some: some) -> Callable:
    """What loads pictures for `loader.Batches` and `loader.fixed`: `Cached` if the cache has them all, else Pictures.

    say: called with a sentence or two on why the cache is not used where there is one. progress: goes round what takes
    long, the pictures whose bytes are read.
    """
    stores = [e.store for e in encoders]
    if not encoders or None in stores or not items:
        return Pictures
    if any(settings.each[number].crop == "random" for number in {i.set for i in items}):
        say(f"data.crop=\"random\" makes another picture every time: pictures are encoded as they are shown, and not "
            f"taken from cache.folder={config.cache.folder!r}.")
        return Pictures
    for store in stores:
        store.refresh()
    digests = Digests(Path(config.cache.folder).expanduser())
    missing, changed = lacking(items, settings, encoders, digests, progress, LOOKED_FOR)
    if not missing:
        return partial(Cached, encoders=encoders, digests=digests)
    lines = listed([f"{item.file} at {size[1]}x{size[0]}" for item, size, _ in missing],
                   f"pictures are not in cache.folder={config.cache.folder!r}")
    lines += listed(changed, "of them have changed since they were cached")
    if others := [line for store in stores if not len(store) for line in store.others()]:
        lines += listed(others, "caches there are of other encoders or settings")
    say("Pictures are encoded as they are shown. `python -m trainer cache` with the same recipe would do it once.\n  "
        + "\n  ".join(lines))
    return Pictures


def stop_once():
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once, so that what was made can be written: launchers send a signal
    several times. A Ctrl-C that comes a second later, or more, ends that too."""
    asked = None

    def stop(number, frame):
        nonlocal asked
        now = time.monotonic()
        if asked is None or (number == signal.SIGINT and now > asked + 1):
            asked = now
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def fill(items: list[Item], settings: Data, encoders: list, folder: Path, device,
         progress: Callable = lambda some: some, share: tuple[int, int] = (0, 1)) -> int:
    """Makes what is missing, and says how many features that was. What is there already is not made again, so an
    interrupted run goes on. share: (number of this process, of how many), which each take a part. Raises ValueError
    for a picture that cannot be read."""
    digests = Digests(folder)
    missing = lacking(items, settings, encoders, digests)[0][share[0]::share[1]]
    if not share[0]:
        digests.write()
    load = Pictures([item for item, _, _ in missing], replace(settings.unvaried(), cache=False, masks=""))
    made, order = 0, sorted(range(len(missing)), key=lambda i: missing[i][1])  # one size after another
    groups = [order[i:i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    try:
        for group in progress(groups):
            loads = [load.submit(i, missing[i][1], random.Random(0)) for i in group]
            found = [f.result().mirrored() if missing[i][2] else f.result() for i, f in zip(group, loads, strict=True)]
            for e in encoders:
                for size in dict.fromkeys(missing[i][1] for i in group):
                    made += _encode(e, [(missing[i], picture) for i, picture in zip(group, found, strict=True)
                                        if missing[i][1] == size], settings, digests, device)
    finally:  # a picture that cannot be read, or Ctrl-C, costs nothing that was made before
        for e in encoders:
            e.store.write()
    return made


def _encode(encoder, some: list, settings: Data, digests: Digests, device) -> int:
    """some: [((item, size, mirrored), Picture)] of one size."""
    keys = [key_of(item, encoder.of, size, settings.each[item.set].crop, mirrored, digests)
            for (item, size, mirrored), _ in some]
    new = [i for i, key in enumerate(keys) if key not in encoder.store]
    if not new:
        return 0
    pictures = [some[i][1] for i in new]
    pixels = [p.conditions[encoder.of] if encoder.of else p.pixels for p in pictures]
    parts = encoder.encode(torch.stack(pixels), device)
    for row, (i, picture) in enumerate(zip(new, pictures, strict=True)):
        encoder.store.put(keys[i], {
            **{part: value[row] for part, value in parts.items()},
            ORIGINAL: torch.tensor(picture.original), BOX: torch.tensor(picture.box, dtype=torch.float32),
        })
    return len(new)
