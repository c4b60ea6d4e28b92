"""Which pictures of which bucket make up which batch."""
from __future__ import annotations

from bisect import bisect_right
from itertools import count

import torch

from .buckets import Size


class BucketSchedule:
    """Which pictures make up which batch: a function only of (seed, step, position).

    A bucket shows its pictures in an endless row, all of them in one order, then all of them in another, and so on. The
    row is cut into groups of `group` pictures. An epoch has the groups that begin in it, in random order; so the
    rest of a bucket that does not fill a group is padded with what the bucket shows next, which the next epoch does
    not show again. After n epochs every picture was shown n times at least, and in its bucket's row exactly once in
    each order. With one bucket this is plain shuffling.
    """

    def __init__(self, buckets: dict[Size, list[int]], seed: int, batch_size: int, group: int = 0):
        """group: so many pictures in a row have one size; it divides batch_size. 0: the whole batch."""
        self.sizes, self.rows = list(buckets), list(buckets.values())
        self.seed, self.group = seed, group or batch_size
        self.batch_groups = batch_size // self.group
        self.pictures = sum(map(len, self.rows))
        self.orders: list[dict[int, list[int]]] = [{} for _ in self.rows]
        self.epochs: dict[int, tuple[int, list]] = {}

    def begun(self, epoch: int) -> int:
        """Groups that begin before an epoch."""
        return sum(-(-len(row) * epoch // self.group) for row in self.rows)

    def epoch_of(self, number: int) -> int:
        for epoch, (before, groups) in self.epochs.items():
            if before <= number < before + len(groups):
                return epoch
        last = number * self.group // self.pictures + 1  # begun(last) > number, since no epoch has fewer groups
        return bisect_right(range(last + 1), number, key=self.begun) - 1

    def groups(self, epoch: int) -> tuple[int, list[tuple[int, int]]]:
        """(groups before it, [(bucket, number of the group in the bucket's row)])"""
        if epoch not in self.epochs:
            self.epochs = {e: known for e, known in self.epochs.items() if e == epoch - 1}
            starts, ends = ([-(-len(row) * e // self.group) for row in self.rows] for e in (epoch, epoch + 1))
            turns = [b for b, (start, end) in enumerate(zip(starts, ends, strict=True)) for _ in range(start, end)]
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 7_919 % 2**63)
            numbers = [count(start) for start in starts]  # every bucket's groups come in the order of its row
            shuffled = [turns[i] for i in torch.randperm(len(turns), generator=generator).tolist()]
            found = [(bucket, next(numbers[bucket])) for bucket in shuffled]
            self.epochs[epoch] = (self.begun(epoch), found)
        return self.epochs[epoch]

    def order(self, bucket: int, epoch: int) -> list[int]:
        kept, number = self.orders[bucket], len(self.rows[bucket])
        if epoch not in kept:
            for old in [e for e in kept if e < epoch - 1 - self.group // number]:
                del kept[old]
            seed = self.seed * 1_000_003 + epoch + bucket * 1_000_000_007_000
            generator = torch.Generator().manual_seed(seed % 2**63)
            kept[epoch] = torch.randperm(number, generator=generator).tolist()
        return kept[epoch]

    def at(self, step: int, position: int) -> tuple[int, Size]:
        """(index of the picture, size it is shown at)"""
        number = step * self.batch_groups + position // self.group
        before, groups = self.groups(self.epoch_of(number))
        bucket, turn = groups[number - before]
        row = self.rows[bucket]
        epoch, place = divmod(turn * self.group + position % self.group, len(row))
        return row[self.order(bucket, epoch)[place]], self.sizes[bucket]
