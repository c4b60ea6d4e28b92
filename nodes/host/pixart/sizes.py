"""Sizes in words: what PixArt was trained on, and what to expect at other sizes."""
from __future__ import annotations

from math import sqrt

from ....models_impl.pixart.buckets import TABLES, nearest
from ....models_impl.pixart.config import VAE_FACTOR, PixArtConfig

LONGEST = 4.0  # times the short side
MULTIPLE = 16  # pixels: eight to a latent cell, two cells to a token


def small_side(config: PixArtConfig | None) -> int | None:
    """The side in pixels of the squares that a model smaller than the releases' was trained on; None for others."""
    side = VAE_FACTOR * config.sample_size if config else min(TABLES)
    return side if side < min(TABLES) else None


def size(side: int, height: float, width: float) -> tuple[int, int]:
    """(height, width) of about side**2 pixels nearest to this shape: of the table, where the releases have one, whose
    shapes end at 1:4 as they do for other models."""
    if side in TABLES:
        return nearest(TABLES[side], height, width)[1:]
    ratio = sqrt(min(max(height / width, 1 / LONGEST), LONGEST))
    return tuple(max(1, round(edge / MULTIPLE)) * MULTIPLE for edge in (side * ratio, side / ratio))


def table_side(config: PixArtConfig | None) -> int:
    """The side in pixels of the square whose table a model was trained on; 1024 where it is not known."""
    wanted = VAE_FACTOR * config.sample_size if config else 1024
    return min(TABLES, key=lambda side: abs(side - wanted))


def only_squares(config: PixArtConfig) -> bool:
    """Whether the releases of this kind were trained only on squares: alpha's 256 and 512 (and DMD), Sigma's 256."""
    alpha = config.token_limit < 300
    return config.sample_size <= 32 or (alpha and not config.micro_conditions)


def about(side: int, height: int, width: int, config: PixArtConfig | None = None) -> str:
    """One or two sentences on a size of the table of `side`; config: the model that it is for, if it is known."""
    return f"{width} x {height} pixels, {tokens(height, width)} tokens: {judged(side, height, width, config)[0]}"


def tokens(height: int, width: int) -> int:
    return (height // MULTIPLE) * (width // MULTIPLE)


def judged(side: int, height: int, width: int, config: PixArtConfig | None = None) -> tuple[str, bool]:
    """What `about` says of the size's training, and whether that is a warning."""
    if own := small_side(config):
        if height == width == own:
            return "the size of this model's training.", False
        return f"this model was trained on {own} x {own} pixels. Expect odd shapes, or repeated objects.", True
    label, *bucket = nearest(TABLES[side], height, width)
    if bucket == [height, width]:
        listed = f"height/width {label:g} of the {side} table"
        if config is None and side <= 512 and height != width:
            return (f"{listed}. Sigma's 512 model was trained on it; alpha's 256 and 512, DMD and Sigma's 256 on "
                    "squares only."), False
        if config is not None and only_squares(config) and height != width:
            return f"{listed}. But this kind of model was trained on squares only: expect odd shapes.", True
        return f"a size of the {side} training, height/width {label:g}.", False
    scale = sqrt(height * width) / side
    near = f"{bucket[1]} x {bucket[0]}"
    if not 0.9 < scale < 1.1:
        kind, fault = ("more", "repeated objects") if scale > 1 else ("fewer", "blurred or cropped objects")
        return (f"{max(scale, 1 / scale) ** 2:.1f} times {kind} pixels than the {side} model was trained on. Expect "
                f"{fault}; its nearest size is {near}."), True
    return f"near {near} of the {side} table. Shapes may be slightly distorted.", True


def check(height: int, width: int):
    """Refuse sizes that do not fall into whole tokens."""
    if height % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"{width}x{height} pixels do not fit PixArt: width and height must be multiples of "
                         f"{MULTIPLE}, for example {max(1, round(width / MULTIPLE)) * MULTIPLE}x"
                         f"{max(1, round(height / MULTIPLE)) * MULTIPLE}.")
