"""Pictures with captions or classes: what is there, and batches that depend on (seed, step) alone.

A batch is named by its step, not by an iterator's past, so a run that resumes needs no state of the data.
"""
from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import Data

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LISTED = 10
KEPT_BYTES = 2**31


@dataclass(frozen=True, slots=True)  # a million of them is an ordinary data set
class Item:
    file: Path
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    label: int = -1


@dataclass(frozen=True)
class Batch:
    pictures: Tensor
    """(B, 3, H, W) uint8"""
    captions: list[str]
    labels: Tensor
    """(B,) int64; -1 where the data have no classes"""
    positions: range
    """Where these items stand in the whole batch of the step."""
    step: int


@dataclass(frozen=True)
class Collection:
    train: list[Item]
    held_out: list[Item]
    classes: list[str]


def read(settings: Data, need: str) -> Collection:
    """The items of a data set. need: "captions" or "classes", which every item must then have."""
    path = Path(settings.path).expanduser()
    if settings.kind == "jsonl":
        train, held_out, classes = read_jsonl(path)
    else:
        reader = read_folder if settings.kind == "folder" else read_classes
        train, classes = reader(path)
        other = Path(settings.held_out_path).expanduser()
        held_out = reader(other, classes)[0] if settings.held_out_path else []
    if not train:
        raise ValueError(f"{path} holds no training pictures (looked for {settings.kind}: "
                         f"{', '.join(sorted(SUFFIXES))}).")
    items = train + held_out
    complaints = []
    if settings.kind == "jsonl":
        complaints += listed([i.file for i in items if not i.file.is_file()], "pictures are named but not there")
    if need == "captions":
        complaints += listed([i.file for i in items if not i.captions], "pictures have no caption",
                             "Put a .txt or .json beside each, or use data.kind = \"jsonl\".")
    if need == "classes":
        complaints += listed([i.file for i in items if i.label < 0], "pictures have no class",
                             "Use data.kind = \"classes\" (one folder per class), or a jsonl with \"class\".")
    if complaints:
        raise ValueError(f"{path} cannot be trained on:\n  " + "\n  ".join(complaints))
    return Collection(train, held_out, classes)


def listed(what: list, sentence: str, remedy: str = "") -> list[str]:
    """One complaint with its number and the first few cases, or none."""
    if not what:
        return []
    shown = [*map(str, what[:LISTED]), *([f"... and {len(what) - LISTED} more"] if len(what) > LISTED else []), remedy]
    return [f"{len(what)} {sentence}:" + "".join(f"\n    {line}" for line in shown if line)]


def read_jsonl(path: Path):
    splits, classes = {"train": [], "held_out": []}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file = path.parent / entry["file"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an object with a \"file\" ({error}).") from None
        split = entry.get("split", "train")
        if split not in splits:
            raise ValueError(f"{path}, line {number}: split {split!r} is neither \"train\" nor \"held_out\".")
        label = entry.get("class", -1)
        if isinstance(label, str):
            label = classes.setdefault(label, len(classes))
        splits[split].append(Item(file, texts(entry), tuple(entry.get("tags", ())), label))
    return splits["train"], splits["held_out"], list(classes)


def texts(entry) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    if isinstance(entry, list):
        return tuple(entry)
    return texts(entry.get("captions", entry.get("caption", [])))


def pictures_in(folder: Path) -> list[Path]:
    """What other programs hide in folders or files that begin with a dot is not of the set."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                  and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_folder(folder: Path, classes=()):
    items = []
    for file in pictures_in(folder):
        text, facts = file.with_suffix(".txt"), file.with_suffix(".json")
        captions = ()
        if text.is_file():
            captions = tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        elif facts.is_file():
            try:
                captions = texts(json.loads(facts.read_text(encoding="utf-8")))
            except json.JSONDecodeError as error:
                raise ValueError(f"{facts} is not valid JSON: {error}") from None
        items.append(Item(file, captions))
    return items, []


def read_classes(folder: Path, classes: list[str] | None = None):
    """classes: what the folders are numbered by, of the training set; without it, those found here are."""
    named = {p.name: pictures_in(p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    named = {name: files for name, files in named.items() if files}
    classes = list(named) if classes is None else classes
    if unknown := [name for name in named if name not in classes]:
        raise ValueError(f"{folder} cannot be used:\n  " + "\n  ".join(listed(
            unknown, "folders have the name of no class that is trained on", "Rename them, or take them out.")))
    number = {name: i for i, name in enumerate(classes)}
    return [Item(f, label=number[name]) for name, files in named.items() for f in files], classes


def decode(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return on_white(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} is too large to be opened: {error} Make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def on_white(picture: Image.Image) -> Image.Image:
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    return page.convert("RGB")


def fit(picture: Image.Image, size: int, crop: str, rng: random.Random) -> Image.Image:
    if crop == "none":
        if picture.width != picture.height:
            raise ValueError(f"a picture is {picture.width}x{picture.height}, and data.crop=\"none\" takes squares.")
        return picture if picture.width == size else picture.resize((size, size), Image.LANCZOS)
    if crop == "centre":  # ADM: halve with a box filter while that is possible, then bicubic
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
        picture = resize_short_side(picture, size, Image.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
    else:
        picture = resize_short_side(picture, round(size * 1.125), Image.LANCZOS)
        left, top = rng.randint(0, picture.width - size), rng.randint(0, picture.height - size)
    return picture.crop((left, top, left + size, top + size))


def resize_short_side(picture: Image.Image, side: int, how) -> Image.Image:
    share = side / min(picture.size)
    return picture.resize((max(side, round(picture.width * share)), max(side, round(picture.height * share))), how)


class Pictures:
    """The pictures of a list of items, as uint8, decoded in threads and kept where the crop is fixed."""

    def __init__(self, items: list[Item], settings: Data):
        self.items, self.settings = items, settings
        self.pool = ThreadPoolExecutor(settings.workers)
        small = 3 * settings.resolution**2 * len(items) <= KEPT_BYTES
        self.kept = {} if settings.cache and small and settings.crop != "random" else None

    def load(self, index: int, rng: random.Random) -> Tensor:
        picture = self.kept.get(index) if self.kept is not None else None
        if picture is None:
            file = self.items[index].file
            try:
                picture = fit(decode(file), self.settings.resolution, self.settings.crop, rng)
            except ValueError as error:
                raise error if str(file) in str(error) else ValueError(f"{file}: {error}") from error
            picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, H, W)
            if self.kept is not None:
                self.kept[index] = picture
        return picture.flip(-1) if self.settings.flip and rng.random() < 0.5 else picture

    def submit(self, index: int, rng: random.Random):
        return self.pool.submit(self.load, index, rng)


class Batches:
    """`batches(step, part)`: the items at `part` of the step's batch; what comes next is decoded meanwhile."""

    def __init__(self, items: list[Item], settings: Data, seed: int, batch_size: int):
        self.items, self.settings, self.seed, self.batch_size = items, settings, seed, batch_size
        self.pictures = Pictures(items, settings)
        self.orders: dict[int, list[int]] = {}
        self.pending: dict[tuple, list] = {}

    def order(self, epoch: int) -> list[int]:
        if epoch not in self.orders:
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.orders[epoch] = torch.randperm(len(self.items), generator=generator).tolist()
        return self.orders[epoch]

    def index(self, step: int, position: int) -> int:
        epoch, place = divmod(step * self.batch_size + position, len(self.items))
        return self.order(epoch)[place]

    def rng(self, step: int, position: int, what: str) -> random.Random:
        return random.Random(f"{self.seed} {step} {position} {what}")

    def __call__(self, step: int, part: range, following: tuple[int, range] | None = None) -> Batch:
        loads = self.pending.pop((step, part), None) or self.submit(step, part)
        if following:
            self.pending[following] = self.submit(*following)
        items = [self.items[self.index(step, p)] for p in part]
        return Batch(
            pictures=torch.stack([f.result() for f in loads]),
            captions=[self.caption(i, self.rng(step, p, "caption")) for p, i in zip(part, items, strict=True)],
            labels=torch.tensor([i.label for i in items]),
            positions=part,
            step=step,
        )

    def submit(self, step: int, part: range):
        return [self.pictures.submit(self.index(step, p), self.rng(step, p, "picture")) for p in part]

    def caption(self, item: Item, rng: random.Random) -> str:
        if not item.captions:
            return ""
        settings, text = self.settings, rng.choice(item.captions)
        if item.tags and rng.random() < settings.tag_share:
            return ", ".join([text, *rng.sample(item.tags, min(settings.tag_count, len(item.tags)))])
        if settings.templates and rng.random() < settings.template_share:
            return rng.choice(settings.templates).replace("{}", text)
        return text


def fixed(items: list[Item], settings: Data, at_once: int = 64) -> list[Batch]:
    """All items with their first caption and nothing random, `at_once` a batch, for validation and evaluation."""
    crop = "centre" if settings.crop == "random" else settings.crop
    pictures = Pictures(items, replace(settings, flip=False, crop=crop))
    parts = [range(i, min(i + at_once, len(items))) for i in range(0, len(items), at_once)]
    return [Batch(
        pictures=torch.stack([f.result() for f in [pictures.submit(i, random.Random(0)) for i in part]]),
        captions=[(items[i].captions or ("",))[0] for i in part],
        labels=torch.tensor([items[i].label for i in part]),
        positions=part,
        step=0,
    ) for part in parts]


def summary(collection: Collection) -> str:
    lines = [f"{len(collection.train):,} training pictures, {len(collection.held_out):,} held out"]
    if collection.classes or any(i.label >= 0 for i in collection.train[:1]):
        counts = Counter(i.label for i in collection.train)
        lines.append(f"{len(counts):,} classes, {min(counts.values())} to {max(counts.values())} pictures each")
    if collection.train[0].captions:
        number = sum(len(i.captions) for i in collection.train)
        lines.append(f"{number / len(collection.train):.1f} captions and "
                     f"{sum(len(i.tags) for i in collection.train) / len(collection.train):.1f} tags a picture")
    return "; ".join(lines)
