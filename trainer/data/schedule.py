"""Which pictures of which bucket make up which batch, by arrays of four bytes a picture."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Times:
    """How often an epoch shows each item."""

    rates: list[Fraction] = field(default_factory=lambda: [Fraction(1)])
    which: np.ndarray | None = None
    """(N,) for each of all items the place in `rates`; None: the first."""

    def of(self, indices) -> np.ndarray:
        """(len(indices),) places in `rates`."""
        return np.zeros(len(indices), np.int32) if self.which is None else self.which[indices]


@dataclass(frozen=True)
class Shards:
    """Pictures that lie together come together, so that files are read nearly from end to end."""

    starts: np.ndarray
    """The first picture of each shard."""
    at_once: int
    """So many shards at a time are mixed, ..."""
    streams: int = 1
    """... in so many places of the data at once: each has a stretch of its own of every batch."""

    def ordered(self, shown: np.ndarray, seed: int, order_seed: int) -> np.ndarray:
        """Pictures in a random order. order_seed: that of the shards, which the rows of all sizes have in common."""
        ranks = np.empty(len(self.starts), np.int32)
        ranks[shuffled(len(ranks), order_seed)] = np.arange(len(ranks), dtype=np.int32)
        mixed = ranks[np.searchsorted(self.starts, shown, side="right") - 1] // self.at_once
        return shown[np.lexsort((shuffled(len(shown), seed), mixed))]

    def streamed(self, order: np.ndarray, before: int, group: int) -> np.ndarray:
        """The same, so that each stream goes through a stretch of it. before: the places of the row before these."""
        stream = (np.arange(before, before + len(order)) % group * self.streams // group).astype(np.int32)
        found = np.empty_like(order)
        found[np.argsort(stream, kind="stable")] = order
        return found


ONCE = Times()


class Cycle:
    """The pictures of one size in an endless row, epoch after epoch, each in an order of its own.

    A picture is in every epoch as often as the whole part of its `times` says. Those with a rest of 1/3 have a third of
    their number of places more in every epoch, which they take in turn.
    """

    def __init__(self, pictures: Sequence[int], seed: int, times: Times, group: int, shards: Shards | None = None,
                 order_seed: int = 0):
        """times: how often an epoch shows a picture; group: so many places may be asked for together."""
        pictures, which = np.asarray(pictures, np.int32), times.of(pictures)
        self.seed, self.orders, self.group = seed, {}, group
        self.shards, self.order_seed = shards, order_seed
        whole = np.array([int(rate) for rate in times.rates])
        self.always = pictures if (whole == 1).all() else np.repeat(pictures, whole[which])
        self.rests: dict[Fraction, np.ndarray] = {}
        rests = [rate % 1 for rate in times.rates]
        if any(rests):
            kinds, first = np.unique(which, return_index=True)
            for kind in kinds[np.argsort(first)].tolist():
                if (rest := rests[kind]) and rest not in self.rests:
                    self.rests[rest] = pictures[np.isin(which, [k for k, r in enumerate(rests) if r == rest])]
        self.an_epoch = len(self.always) + sum(rest * len(some) for rest, some in self.rests.items())

    def taken(self, rest: Fraction, epoch: int) -> int:
        """Places before an epoch of the pictures that have this rest."""
        return epoch * len(self.rests[rest]) * rest.numerator // rest.denominator

    def before(self, epoch: int) -> int:
        """Pictures before an epoch."""
        return len(self.always) * epoch + sum(self.taken(rest, epoch) for rest in self.rests)

    def epoch_of(self, place: int) -> int:
        if not self.rests:
            return place // len(self.always)
        last = (place + len(self.rests)) // self.an_epoch + 1
        return bisect_right(range(last + 1), place, key=self.before) - 1

    def at(self, place: int) -> int:
        """The picture at a place."""
        epoch = self.epoch_of(place)
        if epoch not in self.orders:
            for old in [e for e in self.orders if e < epoch - 1 - self.group / self.an_epoch]:
                del self.orders[old]
            self.orders[epoch] = self.order(epoch)
        return int(self.orders[epoch][place - self.before(epoch)])

    def order(self, epoch: int) -> np.ndarray:
        shown = [self.always]
        for number, (rest, some) in enumerate(self.rests.items()):
            turns = range(self.taken(rest, epoch), self.taken(rest, epoch + 1))
            orders = {turn // len(some): shuffled(len(some), self.seed + (1 + number) * 7_046_029_254_386_353_087
                                                  + turn // len(some) * 2_654_435_761) for turn in turns}
            shown.append(some[[orders[turn // len(some)][turn % len(some)] for turn in turns]])
        shown = np.concatenate(shown) if len(shown) > 1 else shown[0]
        if self.shards is None:
            return shown[shuffled(len(shown), self.seed + epoch)]
        order = self.shards.ordered(shown, self.seed + epoch, self.order_seed + epoch)
        return self.shards.streamed(order, self.before(epoch), self.group)


def shuffled(number: int, seed: int) -> np.ndarray:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed % 2**63)).numpy()


class BucketSchedule:
    """Which pictures make up which batch: a function only of (seed, step, position).

    A bucket shows its pictures in an endless row, all of them in one order, then all of them in another, and so on. The
    row (`Cycle`) is cut into groups of `group` pictures. An epoch has the groups that begin in it, in random order; so
    the rest of a bucket that does not fill a group is padded with what the bucket shows next, which the next epoch does
    not show again. After n epochs every picture was shown n times at least, and in its bucket's row exactly once in
    each order. With one bucket this is plain shuffling.
    """

    def __init__(self, buckets: Mapping[Size, Sequence[int]], seed: int, batch_size: int, group: int = 0,
                 times: Times = ONCE, shards: Shards | None = None):
        """group: so many pictures in a row have one size; it divides batch_size. 0: the whole batch. times: how often
        an epoch shows a picture."""
        self.sizes = list(buckets)
        self.seed, self.group = seed, group or batch_size
        self.rows = [Cycle(pictures, seed * 1_000_003 + bucket * 1_000_000_007_000, times, self.group, shards,
                           seed * 1_000_003) for bucket, pictures in enumerate(buckets.values())]
        self.batch_groups = batch_size // self.group
        self.pictures = sum(row.an_epoch for row in self.rows)
        self.epochs: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def begun(self, epoch: int) -> int:
        """Groups that begin before an epoch."""
        return sum(-(-row.before(epoch) // self.group) for row in self.rows)

    def epoch_of(self, number: int) -> int:
        for epoch, (before, buckets, _) in self.epochs.items():
            if before <= number < before + len(buckets):
                return epoch
        # begun(last) > number: the row of a size is shorter than epochs * an_epoch by less than its number of rests
        last = (number * self.group + sum(len(row.rests) for row in self.rows)) // self.pictures + 1
        return bisect_right(range(last + 1), number, key=self.begun) - 1

    def groups(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(groups before it, the bucket of each, its number in the bucket's row)"""
        if epoch not in self.epochs:
            self.epochs = {e: known for e, known in self.epochs.items() if e == epoch - 1}
            starts, ends = ([-(-row.before(e) // self.group) for row in self.rows] for e in (epoch, epoch + 1))
            turns = np.repeat(np.arange(len(self.rows), dtype=np.int32), np.subtract(ends, starts))
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 7_919 % 2**63)
            turns = turns[torch.randperm(len(turns), generator=generator).numpy()]
            numbers = np.empty(len(turns), np.int64)
            for bucket, (start, end) in enumerate(zip(starts, ends, strict=True)):
                numbers[turns == bucket] = np.arange(start, end)  # a bucket's groups come in the order of its row
            self.epochs[epoch] = (self.begun(epoch), turns, numbers)
        return self.epochs[epoch]

    def at(self, step: int, position: int) -> tuple[int, Size]:
        """(index of the picture, size it is shown at)"""
        number = step * self.batch_groups + position // self.group
        before, buckets, numbers = self.groups(self.epoch_of(number))
        bucket, turn = int(buckets[number - before]), int(numbers[number - before])
        return self.rows[bucket].at(turn * self.group + position % self.group), self.sizes[bucket]
