"""What other libraries need to be told before they work here."""
from __future__ import annotations

import sys


def hide_broken_torchvision():
    """transformers imports torchvision wherever it is installed, and fails with one of another torch. T5 needs none."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None
