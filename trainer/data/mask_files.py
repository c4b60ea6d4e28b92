"""Where the masks of pictures lie, in the ways of other trainers: they are added to items as the condition MASK."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from ...models_impl.folders import below
from ...models_impl.pictures import readable

MASK = "mask"
BESIDE = "-masklabel"  # a.png has a-masklabel.png (OneTrainer)
PICTURES, MASKS = "images", "masks"  # DIR/images/a.png has DIR/masks/a.png (kohya's folder of conditioning pictures)

SomeItem = TypeVar("SomeItem")


def with_masks(items: list[SomeItem], root: Path) -> list[SomeItem]:
    """The items (layouts.Item) with the masks that lie beside their files; what is a mask itself is no item. root: the
    folder of the data set, whose masks lie in `masks` beside it whatever it is called."""
    in_folder, in_masks = cache(beside), cache(inside)
    found: dict[Path, Path] = {}
    for item in items:
        if isinstance(item.file, Path) and MASK not in item.conditions:
            mask = in_folder(item.file.parent).get(item.file.stem.lower())
            for home in homes(item.file, root):
                mask = mask or in_masks(home.parent / MASKS).get(item.file.relative_to(home).with_suffix(""))
            if mask:
                found[item.file] = mask
    masks = set(found.values())
    return [replace(item, conditions={**item.conditions, MASK: found[item.file]}) if item.file in found else item
            for item in items if item.file not in masks]


def homes(file: Path, root: Path) -> Iterable[Path]:
    return (parent for parent in file.parents if parent.name == PICTURES or parent == root)


def beside(folder: Path) -> dict[str, Path]:
    """Name of a picture in small letters -> its mask in the same folder."""
    return {file.stem.lower().removesuffix(BESIDE): file for file in sorted(folder.iterdir(), reverse=True)
            if file.stem.lower().endswith(BESIDE) and file.suffix.lower() in readable()} if folder.is_dir() else {}


def inside(folder: Path) -> dict[Path, Path]:
    """a/b -> FOLDER/a/b.png, or another ending."""
    return {file.relative_to(folder).with_suffix(""): file for file in sorted(below(folder), reverse=True)
            if file.suffix.lower() in readable()} if folder.is_dir() else {}
