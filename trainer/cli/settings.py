"""`python -m trainer settings`."""
from __future__ import annotations


def add_arguments(one):
    """None."""


def run(args):
    """List every setting of a recipe file."""
    from ..config import describe

    print("\n".join(describe.describe()))
