"""The registry of the adapters of all families under the (family, component) of a parity case."""
from __future__ import annotations

TOLERANCE = 1e-4
"""Share of the spread of a reference in float32. Ours in float32 is within a quarter of it in every case that has no
tolerance of its own, with torch's instructions of AVX-512 (one thread and two), AVX2 and none."""
ADAPTERS = {}
UNUSED = {}


def adapter(family, component, unused=None):
    """unused: name of an output that feeds no weight, so that no user sees it -> why. Only it is not compared."""

    def register(function):
        ADAPTERS[family, component] = function
        UNUSED[family, component] = unused or {}
        return function

    return register
