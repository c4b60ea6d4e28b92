"""Where the masks of pictures lie, in the ways of other trainers: they are added to items as the condition MASK."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from ...models_impl.folders import below
from ...models_impl.pictures import readable

MASK = "mask"
BESIDE = "-masklabel"  # a.png has a-masklabel.png (OneTrainer)
PICTURES, MASKS = "images", "masks"  # DIR/images/a.png has DIR/masks/a.png (kohya's folder of conditioning pictures)


def finder(root: Path) -> Callable[[Any], Path | None]:
    """What says of an item (items.Item) which mask lies beside its file. root: the folder of the data set, whose masks
    lie in `masks` beside it whatever it is called."""
    in_folder, in_masks = cache(beside), cache(inside)

    def mask_of(item) -> Path | None:
        if not isinstance(item.file, Path) or MASK in item.conditions:
            return None
        mask = in_folder(item.file.parent).get(item.file.stem.lower())
        for home in homes(item.file, root):
            mask = mask or in_masks(home.parent / MASKS).get(item.file.relative_to(home).with_suffix(""))
        return mask

    return mask_of


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
