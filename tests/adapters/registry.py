"""Where the adapters of all families are registered under the (family, component) of a parity case."""
from __future__ import annotations

TOLERANCE = 1e-4
ADAPTERS = {}


def adapter(family, component):
    def register(function):
        ADAPTERS[family, component] = function
        return function

    return register
