"""Pictures changed at random, by Pillow: colours, and turned. torchvision would do the same, and need not be there."""
from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageEnhance

from ..config.schema import SetSettings

Size = tuple[int, int]  # (height, width) in pixels
ENHANCERS = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def angle(one: SetSettings, rng: random.Random) -> float:
    """Degrees to turn a picture by, 0 for none. Draws nothing where the settings turn none."""
    return rng.uniform(-one.rotation, one.rotation) if one.rotation and rng.random() < one.rotation_share else 0.0


def coloured(picture: Image.Image, one: SetSettings, rng: random.Random) -> Image.Image:
    """RGB with its colours changed, in an order that is drawn too."""
    changes = list(one.colours.items())
    if not changes or rng.random() >= one.colour_share:
        return picture
    rng.shuffle(changes)
    for name, most in changes:
        by = rng.uniform(-most, most)
        picture = hued(picture, by) if name == "hue" else ENHANCERS[name](picture).enhance(1 + by)
    return picture


def hued(picture: Image.Image, by: float) -> Image.Image:
    """by: a part of the circle of colours."""
    hue, saturation, value = picture.convert("HSV").split()
    moved = Image.fromarray(np.asarray(hue) + np.uint8(round(by * 256) % 256))
    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")


def inner(size: Size, degrees: float) -> Size:
    """The largest rectangle of the same shape within a picture that is turned about its middle."""
    height, width = size
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    share = min(width / (width * cos + height * sin), height / (width * sin + height * cos))
    share *= 1 - 2 / min(size)  # the pixels of an edge mix with the emptiness beyond
    return max(1, math.floor(height * share)), max(1, math.floor(width * share))


def turned(picture: Image.Image, degrees: float, resample: int = Image.BICUBIC) -> Image.Image:
    """The `inner` of a picture turned counterclockwise. resample: a filter of Pillow."""
    height, width = inner((picture.height, picture.width), degrees)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.rotate(degrees, resample).crop((left, top, left + width, top + height))
