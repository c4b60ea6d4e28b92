"""A dict of strings to a few numbers in some bytes a key: a hundred of Python's would be 4 GB at ten million."""
from __future__ import annotations

import hashlib

import numpy as np

FEW = 2**14


def short(key: str) -> bytes:
    """What stands for a key: 15 bytes of its digest, and one that is not 0, which numpy would cut off."""
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=15).digest() + b"."


class KeyTable:
    """Keys are kept as digests: they can be looked up, and not listed."""

    def __init__(self, columns: list[tuple[str, str]]):
        """columns: (name, type) of the values, as numpy calls them."""
        self.sorted = np.empty(0, "S16"), np.empty(0, columns)
        self.fresh: dict[bytes, tuple] = {}
        """Those that came last, until they are enough to be sorted in."""

    def __len__(self) -> int:
        self.sort_in()
        return len(self.sorted[0])

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __setitem__(self, key: str, value: tuple):
        self.fresh[short(key)] = value
        if len(self.fresh) > max(FEW, len(self.sorted[0]) // 4):
            self.sort_in()

    def get(self, key: str) -> tuple | None:
        key = short(key)
        if key in self.fresh:
            return self.fresh[key]
        keys, values = self.sorted
        place = int(np.searchsorted(keys, key))
        return values[place].item() if place < len(keys) and keys[place] == key else None

    def sort_in(self):
        if not self.fresh:
            return
        keys, values = self.sorted
        keys, first = np.unique(np.concatenate([np.array([*self.fresh], "S16"), keys]), return_index=True)
        # of equal keys the first, which is fresh
        values = np.concatenate([np.array([*self.fresh.values()], values.dtype), values])[first]
        self.sorted = keys, values  # before the other place is emptied: threads look into both
        self.fresh = {}
