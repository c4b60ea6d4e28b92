"""The pictures of help pages, by node; tools/make_help_pictures.py saves them."""
from __future__ import annotations

from collections.abc import Callable

from .drawing import Drawing, Photo

FIGURES: dict[str, Callable[[], Drawing | Photo]] = {}
"""What draws the picture of each node, by the node's id without PixStack_."""


def figure(make: Callable[[], Drawing | Photo]):
    """`make` draws the picture of the node of its name."""
    FIGURES[make.__name__] = make
    return make
