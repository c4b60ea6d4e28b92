"""A dict of strings to a few numbers in some bytes a key: a hundred of Python's would be 4 GB at ten million."""
from __future__ import annotations

import hashlib

import numpy as np

FEW = 2**16
Run = tuple[np.ndarray, np.ndarray]  # (keys in order, their values)


def short(key: str) -> bytes:
    """What stands for a key: 15 bytes of its digest, and one that is not 0, which numpy would cut off."""
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=15).digest() + b"."


class KeyTable:
    """Keys are kept as digests: they can be looked up, and not listed."""

    def __init__(self, columns: list[tuple[str, str]]):
        """columns: (name, type) of the values, as numpy calls them."""
        self.runs: tuple[Run, ...] = ((np.empty(0, "S16"), np.empty(0, columns)),)
        """Each at least twice as long as the next, and older."""
        self.fresh: dict[bytes, tuple] = {}
        """Those that came last, until they are enough for a run."""

    def __len__(self) -> int:
        self.sort_in(least=0)
        return len(self.runs[0][0])

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __setitem__(self, key: str, value: tuple):
        self.fresh[short(key)] = value
        if len(self.fresh) > FEW:
            self.sort_in()

    def get(self, key: str) -> tuple | None:
        key = short(key)
        if key in self.fresh:
            return self.fresh[key]
        for keys, values in reversed(self.runs):
            place = int(np.searchsorted(keys, key))
            if place < len(keys) and keys[place] == key:
                return values[place].item()
        return None

    def sort_in(self, least: int = 2):
        """least: how many times as long as the next a run stays by itself; 0: all become one."""
        runs = list(self.runs)
        if self.fresh:
            runs.append(merged((np.array([*self.fresh], "S16"), np.array([*self.fresh.values()], runs[0][1].dtype))))
        while len(runs) > 1 and (not least or len(runs[-2][0]) < least * len(runs[-1][0])):
            runs[-2:] = [merged(runs[-1], runs[-2])]
        self.runs = tuple(runs)  # before the other place is emptied: threads look into both
        self.fresh = {}


def merged(*runs: Run) -> Run:
    """One of several. Of equal keys the first counts."""
    keys, first = np.unique(np.concatenate([keys for keys, _ in runs]), return_index=True)
    return keys, np.concatenate([values for _, values in runs])[first]
