"""Pictures from files to tensors: decoding, and the one cut that a picture and its conditions share."""
from __future__ import annotations

import io
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...models_impl.pictures import levels, readable, remedy
from ..config.schema import LARGEST_SIDE, Data
from . import augment
from .items import Item, Items, spread
from .mask_files import MASK

KEPT_BYTES = 2**31
MEASURED = 10_000  # pictures of a set whose shape is looked at before a run
AT_ONCE = 4096  # pictures whose sizes are asked for together
MARGIN = 1.125  # of PixelFlow's random crop
DOCTOR = "`python -m trainer doctor` finds all such pictures before a run does."
Size = tuple[int, int]  # (height, width) in pixels


def opened(file) -> Image.Image:
    """file: a Path, or what stands for one inside an archive (layouts.InTar, layouts.InRow)."""
    readable()  # with the plugins that are installed
    return Image.open(file if isinstance(file, Path) else io.BytesIO(file.read_bytes()))


def decode(file, advice: str = DOCTOR) -> Image.Image:
    """RGB, turned as the EXIF says, on white where transparent; see `levels` for gray of more than 8 bits. Raises
    ValueError with the file's name, and with advice."""
    try:
        with opened(file) as picture:
            return on_white(ImageOps.exif_transpose(picture), picture.format)
    except Exception as error:  # Pillow's readers raise whatever their formats lead to
        raise unreadable(file, error, advice) from error


def unreadable(file, error: Exception, advice: str) -> ValueError:
    ending = Path(getattr(file, "name", "")).suffix.lower()
    why, more = str(error) or type(error).__name__, " ".join(filter(None, (remedy(ending), advice)))
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{file} is too large to be opened: {why} Make it smaller. {more}".strip())
    return ValueError(f"{file} cannot be read as a picture: {why.rstrip('.')}. {more}".strip())


def on_white(picture: Image.Image, format: str | None = None) -> Image.Image:
    """format: of its file, as Pillow calls it."""
    gray = levels(picture, sixteen_bits=format in ("PNG", "PPM"))
    if gray is not None:
        return Image.fromarray((gray * 255).round().astype(np.uint8)).convert("RGB")
    if not transparent(picture):
        return picture.convert("RGB")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    return page.convert("RGB")


def has_alpha(file) -> bool:
    """Whether a picture has transparency, from its header; not one that cannot be read."""
    try:
        with opened(file) as picture:
            return transparent(picture)
    except Exception:  # Pillow's readers raise whatever their formats lead to
        return False


def transparent(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or "transparency" in picture.info


def alpha(file, advice: str = DOCTOR) -> Image.Image | None:
    """How opaque a picture is, (H, W) in 8 bits; None where all of it is. Raises ValueError with the file's name."""
    try:
        with opened(file) as picture:
            if not transparent(picture):
                return None
            return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
    except Exception as error:  # as in `decode`
        raise unreadable(file, error, advice) from error


def measure(file, advice: str = DOCTOR) -> Size:
    """(height, width) as the picture stands, read from its header only. Raises ValueError with the file's name."""
    try:
        with opened(file) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5  # the orientations that lie on their side
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise unreadable(file, error, advice) from error


def measured(items: Sequence[Item], workers: int, broken: bool = False) -> np.ndarray:
    """The size of every picture, (N, 2) int32; what the data set says itself is believed. broken: leave 0 for one that
    cannot be read, which is named on stderr, in place of raising ValueError."""
    items = Items.of(items)
    sizes = np.stack([items.column("height"), items.column("width")], 1)

    def size_of(i: int) -> Size:
        try:
            return measure(items[i].file)
        except ValueError as error:
            if not broken:
                raise
            print(f"{error} It is left out.", file=sys.stderr)
            return 0, 0

    unknown = np.flatnonzero(sizes[:, 0] == 0)
    with ThreadPoolExecutor(workers) as pool:
        for some in np.array_split(unknown, -(-len(unknown) // AT_ONCE) or 1):
            sizes[some] = np.array(list(pool.map(size_of, some.tolist())), np.int32).reshape(-1, 2)
    for part, own in zip(items.parts if len(unknown) else (), np.split(sizes, items.ends[:-1]), strict=False):
        if part.records.folder:
            part.records.keep_sizes(np.asarray(part.chosen), own)
    return sizes


def oblong(items: Sequence[Item], workers: int) -> list[str]:
    """Files and sizes of pictures that are not square, among at most MEASURED items, evenly spread. What cannot be read
    is refused later."""
    def said(item: Item) -> str:
        try:
            height, width = item.size or measure(item.file, advice="")
        except ValueError:
            return ""
        return f"{item.file} is {width}x{height}" if height != width else ""

    with ThreadPoolExecutor(workers) as pool:
        return list(filter(None, pool.map(said, spread(items, MEASURED))))


@dataclass(frozen=True)
class Cut:
    """How a picture is brought to a size: resized, then cropped."""

    original: Size
    resized: Size
    top: int
    left: int
    size: Size
    """Size of the crop, which begins at (top, left) of the resized picture."""
    crop: str
    angle: float = 0.0
    """Degrees that the picture is turned by first, counterclockwise; `original` is then what is left of it."""
    whole: Size | None = None
    """With an angle, the size of the picture before."""

    def box(self) -> tuple[float, float, float, float]:
        """The crop in the original's pixels: top, left, bottom, right; of a picture that is turned, before it is."""
        y, x = (o / r for o, r in zip(self.original, self.resized, strict=True))
        down, right = ((w - o) / 2 for w, o in zip(self.whole or self.original, self.original, strict=True))
        return (down + self.top * y, right + self.left * x, down + (self.top + self.size[0]) * y,
                right + (self.left + self.size[1]) * x)

    def apply(self, picture: Image.Image, resample: int | None = None) -> Image.Image:
        """The cut of a picture: of the one it was planned for, or of a condition that shows the same at another size.
        resample: a filter of Pillow in place of bicubic or Lanczos. Raises ValueError for another aspect ratio."""
        (height, width), whole = self.resized, self.whole or self.original
        if (picture.height, picture.width) != whole and not aligned((picture.height, picture.width), whole):
            raise ValueError(f"it is {picture.width}x{picture.height}, which is not the shape of its picture, "
                             f"{whole[1]}x{whole[0]}. Make them match.")
        if self.angle:
            picture = augment.turned(picture, self.angle, Image.BICUBIC if resample is None else Image.BILINEAR)
        if self.crop == "centre":  # ADM: halve with a box filter while that is possible, then bicubic
            while picture.width >= 2 * width and picture.height >= 2 * height:
                picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
        if (picture.height, picture.width) != self.resized:
            own = Image.BICUBIC if self.crop == "centre" else Image.LANCZOS
            picture = picture.resize((width, height), own if resample is None else resample)
        return picture.crop((self.left, self.top, self.left + self.size[1], self.top + self.size[0]))


def aligned(one: Size, other: Size) -> bool:
    """Whether two sizes have one aspect ratio, but for rounding."""
    return abs(one[1] * other[0] / one[0] - other[1]) <= max(1, 0.01 * other[1])


def plan(original: Size, size: Size, crop: str, rng: random.Random, margin: float = 1.0, angle: float = 0.0) -> Cut:
    """margin: how much larger than `size` a picture is made before a random crop; angle: that it is turned by."""
    if angle:
        cut = plan(augment.inner(original, angle), size, crop, rng, margin)
        return replace(cut, angle=angle, whole=original)
    (H, W), (h, w) = original, size
    if crop == "none":
        if H * w != W * h:
            raise ValueError(f"a picture is {W}x{H}, and data.crop=\"none\" takes squares.")
        return Cut(original, size, 0, 0, size, crop)
    if crop == "random":
        h, w = round(h * margin), round(w * margin)
    share = max(h / H, w / W)
    resized = max(h, round(H * share)), max(w, round(W * share))
    if resized[0] * resized[1] > LARGEST_SIDE**2:
        raise ValueError(f"it is {W}x{H} and would be brought to {resized[1]}x{resized[0]} to cover {w}x{h}: crop it "
                         "to a shape that is less elongated, or take it out.")
    spare_y, spare_x = resized[0] - size[0], resized[1] - size[1]
    if crop == "random":
        left, top = rng.randint(0, spare_x), rng.randint(0, spare_y)
    else:
        left, top = spare_x // 2, spare_y // 2
    return Cut(original, resized, top, left, size, crop)


@dataclass(frozen=True)
class Picture:
    pixels: Tensor | None
    """(3, H, W) uint8; None where `features` stand for them"""
    conditions: dict[str, Tensor]
    """By name, of the same shape."""
    original: Size
    box: tuple[float, float, float, float]
    """What was cut out of the original, before it was mirrored: top, left, bottom, right."""
    size: Size
    """(height, width) it is shown at."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """What frozen encoders made of it: "encoder.part" -> (...)."""
    mask: Tensor | None = None
    """(1, H, W) uint8, where the loss counts; None: everywhere."""

    def mirrored(self) -> Picture:
        return Picture(self.pixels.flip(-1), {n: c.flip(-1) for n, c in self.conditions.items()}, self.original,
                       self.box, self.size, mask=None if self.mask is None else self.mask.flip(-1))


class Pictures:
    """The pictures of a list of items, decoded in threads and kept where the crop is fixed."""

    def __init__(self, items: list[Item], settings: Data):
        self.items, self.settings, self.sets = items, settings, settings.each
        self.pool = ThreadPoolExecutor(settings.workers)
        side = max(settings.sides)
        small = 3 * side**2 * len(items) * (1 + len(settings.conditions)) <= KEPT_BYTES
        self.keeps = [settings.cache and small and one.crop != "random" and not one.varies
                      for one in self.sets]
        self.kept: dict[tuple[int, Size], Picture] = {}
        self.margin = 1.0 if settings.buckets else MARGIN

    def load(self, index: int, size: Size, rng: random.Random) -> Picture:
        item = self.items[index]
        found = self.kept.get((index, size))
        if found is None:
            found = self.cut(item, size, rng)
            if self.keeps[item.set]:
                self.kept[index, size] = found
        return found.mirrored() if self.sets[item.set].flip and rng.random() < 0.5 else found

    def cut(self, item: Item, size: Size, rng: random.Random) -> Picture:
        file, one = item.file, self.sets[item.set]
        try:
            picture = decode(file)
            cut = plan((picture.height, picture.width), size, one.crop, rng, self.margin, augment.angle(one, rng))
            pixels, conditions = tensor(augment.coloured(cut.apply(picture), one, rng)), {}
            for name in self.settings.conditions:
                file = item.conditions[name]
                conditions[name] = tensor(cut.apply(decode(file)))
        except ValueError as error:
            raise error if str(file) in str(error) else ValueError(f"{file}: {error} {DOCTOR}") from error
        return Picture(pixels, conditions, cut.original, cut.box(), size, mask=mask_of(item, self.settings, cut))

    def submit(self, index: int, size: Size, rng: random.Random):
        return self.pool.submit(self.load, index, size, rng)


def mask_of(item: Item, settings: Data, cut: Cut) -> Tensor | None:
    """Where the loss of a picture counts, (1, H, W) uint8, cut like it; None: everywhere. Raises ValueError with the
    file's name."""
    file = item.file if settings.masks == "alpha" else item.conditions.get(MASK) if settings.masks else None
    if file is None:
        return None
    mask = alpha(file) if settings.masks == "alpha" else decode(file).convert("L")
    try:  # by means over areas: a filter with negative weights would leave traces outside of the mask
        return None if mask is None else torch.from_numpy(np.array(cut.apply(mask, Image.BOX)))[None]
    except ValueError as error:
        raise ValueError(f"{file}: {error} {DOCTOR}") from error


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, H, W)


def shown(file: Path, height: int, width: int) -> Tensor:
    """The middle of one picture file at a size: (3, height, width) uint8."""
    picture = decode(file, advice="")
    return tensor(plan((picture.height, picture.width), (height, width), "centre", random.Random(0)).apply(picture))
