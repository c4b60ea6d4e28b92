"""Adapters that compute each (family, component) of a parity case with our code: output -> (ours, tolerance).

A tolerance is a number, or a tensor with one for every value of the output.

An adapter reads shapes and settings only from the case.
"""
from importlib import import_module
from pkgutil import iter_modules

from .registry import ADAPTERS, UNUSED

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")

__all__ = ["ADAPTERS", "UNUSED"]
