"""Picture files: which are read, and their values as they are meant."""
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image

ALWAYS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAYBE: dict[str, tuple[str, Callable | None]] = {  # ending -> (package that reads it with Pillow, how it is called)
    ".avif": ("pillow-avif-plugin", None),  # Pillow 11.3 and later read it themselves
    ".jxl": ("pillow-jxl-plugin", None),
    ".heic": ("pillow-heif", lambda module: module.register_heif_opener()),
    ".heif": ("pillow-heif", lambda module: module.register_heif_opener()),
}
MODULES = {"pillow-avif-plugin": "pillow_avif", "pillow-jxl-plugin": "pillow_jxl", "pillow-heif": "pillow_heif"}
NEVER = (".jp2", ".tga", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".exr", ".hdr")
"""Pictures all the same."""
OVERSHOOT = 0.5 / 255  # beyond black and white, by which resampled floats may be off


@lru_cache
def readable() -> frozenset[str]:
    """The endings of files that are read here, with what Pillow and its plugins read in this Python."""
    Image.init()
    for package, start in set(MAYBE.values()):
        if find_spec(MODULES[package]) is not None:
            module = import_module(MODULES[package])
            if start is not None:
                start(module)
    return frozenset((*ALWAYS, *(ending for ending in MAYBE if ending in Image.registered_extensions())))


def remedy(ending: str) -> str:
    """What to do about a picture of an ending that is not read here; "" for one that is, and for no picture's."""
    if ending in readable():
        return ""
    if ending in MAYBE:
        return f"Install {MAYBE[ending][0]}, or save it as PNG, JPEG or WebP."
    return "Save it as PNG, JPEG or WebP." if ending in NEVER else ""


def levels(picture: Image.Image, sixteen_bits: bool = False) -> np.ndarray | None:
    """(H, W) float32 in [0, 1] of a gray picture with more than 8 bits, which Pillow would clip to 8; None for others.

    16 bits: white is 65535. Floats: black is 0, white 1. 32 bits: white is 65535, and 255 where no value is above it,
    as there would be nothing to see otherwise. sixteen_bits: the file holds no more, though Pillow opens it as if it
    did (PNG, before Pillow 11). Raises ValueError for values beyond white, below black, or that are no numbers.
    """
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.float32) / 65535
    if picture.mode not in ("I", "F"):
        return None
    values = np.asarray(picture)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers (NaN or infinite)")
    low, high = float(values.min()), float(values.max())
    white = 1.0 if picture.mode == "F" else 255.0 if high <= 255 and not sixteen_bits else 65535.0
    spare = OVERSHOOT * white if picture.mode == "F" else 0
    if low < -spare or high > white + spare:
        raise ValueError(f"its values are {low:g} to {high:g}, and {'floats' if white == 1 else 'whole numbers'} are "
                         f"read from 0 (black) to {white:g} (white): bring them to that")
    return (values / white).clip(0, 1).astype(np.float32)
