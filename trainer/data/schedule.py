"""Which pictures of which bucket make up which batch."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import count

import torch

from .buckets import Size

NOTHING: dict = {}


class Cycle:
    """The pictures of one size in an endless row, epoch after epoch, each in an order of its own.

    A picture is in every epoch as often as the whole part of its `times` says. Those with a rest of 1/3 have a third of
    their number of places more in every epoch, which they take in turn.
    """

    def __init__(self, pictures: list[int], seed: int, times: Mapping[int, Fraction]):
        """times: how often an epoch shows a picture; once where it says nothing."""
        self.seed, self.orders = seed, {}
        self.always = [p for p in pictures for _ in range(int(times.get(p, 1)))]
        self.rests: dict[Fraction, list[int]] = {}
        for p in pictures:
            if rest := times.get(p, 1) % 1:
                self.rests.setdefault(rest, []).append(p)
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

    def at(self, place: int, group: int) -> int:
        """The picture at a place. group: so many places may be asked for together."""
        epoch = self.epoch_of(place)
        if epoch not in self.orders:
            for old in [e for e in self.orders if e < epoch - 1 - group / self.an_epoch]:
                del self.orders[old]
            self.orders[epoch] = self.order(epoch)
        return self.orders[epoch][place - self.before(epoch)]

    def order(self, epoch: int) -> list[int]:
        shown = self.always
        for number, (rest, some) in enumerate(self.rests.items()):
            turns = range(self.taken(rest, epoch), self.taken(rest, epoch + 1))
            orders = {turn // len(some): shuffled(len(some), self.seed + (1 + number) * 7_046_029_254_386_353_087
                                                  + turn // len(some) * 2_654_435_761) for turn in turns}
            shown = shown + [some[orders[turn // len(some)][turn % len(some)]] for turn in turns]
        return [shown[i] for i in shuffled(len(shown), self.seed + epoch)]


def shuffled(number: int, seed: int) -> list[int]:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


class BucketSchedule:
    """Which pictures make up which batch: a function only of (seed, step, position).

    A bucket shows its pictures in an endless row, all of them in one order, then all of them in another, and so on. The
    row (`Cycle`) is cut into groups of `group` pictures. An epoch has the groups that begin in it, in random order; so
    the rest of a bucket that does not fill a group is padded with what the bucket shows next, which the next epoch does
    not show again. After n epochs every picture was shown n times at least, and in its bucket's row exactly once in
    each order. With one bucket this is plain shuffling.
    """

    def __init__(self, buckets: dict[Size, list[int]], seed: int, batch_size: int, group: int = 0,
                 times: Mapping[int, Fraction] = NOTHING):
        """group: so many pictures in a row have one size; it divides batch_size. 0: the whole batch. times: how often
        an epoch shows a picture; once where it says nothing."""
        self.sizes = list(buckets)
        self.rows = [Cycle(pictures, seed * 1_000_003 + bucket * 1_000_000_007_000, times)
                     for bucket, pictures in enumerate(buckets.values())]
        self.seed, self.group = seed, group or batch_size
        self.batch_groups = batch_size // self.group
        self.pictures = sum(row.an_epoch for row in self.rows)
        self.epochs: dict[int, tuple[int, list]] = {}

    def begun(self, epoch: int) -> int:
        """Groups that begin before an epoch."""
        return sum(-(-row.before(epoch) // self.group) for row in self.rows)

    def epoch_of(self, number: int) -> int:
        for epoch, (before, groups) in self.epochs.items():
            if before <= number < before + len(groups):
                return epoch
        # begun(last) > number: the row of a size is shorter than epochs * an_epoch by less than its number of rests
        last = (number * self.group + sum(len(row.rests) for row in self.rows)) // self.pictures + 1
        return bisect_right(range(last + 1), number, key=self.begun) - 1

    def groups(self, epoch: int) -> tuple[int, list[tuple[int, int]]]:
        """(groups before it, [(bucket, number of the group in the bucket's row)])"""
        if epoch not in self.epochs:
            self.epochs = {e: known for e, known in self.epochs.items() if e == epoch - 1}
            starts, ends = ([-(-row.before(e) // self.group) for row in self.rows] for e in (epoch, epoch + 1))
            turns = [b for b, (start, end) in enumerate(zip(starts, ends, strict=True)) for _ in range(start, end)]
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 7_919 % 2**63)
            numbers = [count(start) for start in starts]  # every bucket's groups come in the order of its row
            shuffled = [turns[i] for i in torch.randperm(len(turns), generator=generator).tolist()]
            found = [(bucket, next(numbers[bucket])) for bucket in shuffled]
            self.epochs[epoch] = (self.begun(epoch), found)
        return self.epochs[epoch]

    def at(self, step: int, position: int) -> tuple[int, Size]:
        """(index of the picture, size it is shown at)"""
        number = step * self.batch_groups + position // self.group
        before, groups = self.groups(self.epoch_of(number))
        bucket, turn = groups[number - before]
        return self.rows[bucket].at(turn * self.group + position % self.group, self.group), self.sizes[bucket]
