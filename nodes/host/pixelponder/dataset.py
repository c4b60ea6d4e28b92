"""Data sets in ComfyUI's input and output folders: one entry of a list after another."""
from __future__ import annotations

import io
import os
from pathlib import Path

import folder_paths
import numpy
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image, ImageOps
from torch import Tensor

from ....models_impl.folders import refuse_unportable
from ....models_impl.pictures import levels, readable, remedy
from ....models_impl.pixelponder import entries
from ..common.pictures import colours

SAME_SHAPE = 0.01  # relative difference of aspect ratios that rounding to whole pixels explains


def find(folder: str) -> Path:
    """A data set's folder in ComfyUI's input, else in its output. Raises ValueError for one that is in neither."""
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    for root in roots:
        path = Path(os.path.abspath(os.path.join(root, folder)))
        if _within(path, roots) and (path / entries.LIST).is_file():
            return path
    raise ValueError(f"There is no {entries.LIST} in input/{folder} or output/{folder}. A data set is a folder in "
                     "ComfyUI's input or output folder (a link will do) with that list in it.")


def target(folder: str) -> Path:
    """The folder in ComfyUI's output that a data set is written to. Raises ValueError for one outside."""
    root = folder_paths.get_output_directory()
    path = Path(os.path.abspath(os.path.join(root, folder)))
    if not folder.strip() or path == Path(root) or not _within(path, [root]):
        raise ValueError(f"{folder!r} is not a folder inside of ComfyUI's output folder. Use a name like pixelponder.")
    for part in path.relative_to(os.path.abspath(root)).parts:
        refuse_unportable(part, "folder")
    return path


def _within(path: Path, roots: list[str]) -> bool:
    return any(path.is_relative_to(os.path.abspath(root)) for root in roots)


def entry(folder: str, index: int) -> tuple[dict, str, int]:
    """(entry, its name, how many there are). Raises ValueError past the end of the list."""
    listed = entries.read(find(folder) / entries.LIST)
    if index >= len(listed):
        raise ValueError(f"The data set {folder} has {len(listed)} entries, and index {index} is past its end (the "
                         "first is 0): it is done.")
    return listed[index], entries.names(listed)[index], len(listed)


def pictures(folder: str, listed: dict) -> list[Tensor | ExecutionBlocker]:
    """The picture of each of entries.PICTURES as (1, H, W, 3); where the entry has none or its file is missing, what
    stops the nodes after it, with a message."""
    return [ExecutionBlocker(f"This entry of {folder} has no {key}.") if path is None
            else _picture(path) if path.is_file()
            else ExecutionBlocker(f"{key} of this entry of {folder} is missing: {listed[key]}. Paths begin at the "
                                  f"folder of {entries.LIST}.")
            for key, path in files(folder, listed).items()]


def files(folder: str, listed: dict) -> dict[str, Path | None]:
    """key -> file of an entry. Raises ValueError for one outside of input and output."""
    root, roots = find(folder), [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    files: dict[str, Path | None] = dict.fromkeys(entries.PICTURES)
    for key in files:
        if name := listed.get(key):
            path = Path(os.path.abspath(root / name))
            if not _within(path, roots):
                raise ValueError(f"{key} of this entry, {name}, lies outside of ComfyUI's input and output folders.")
            files[key] = path
    return files


def _picture(path: Path) -> Tensor:
    try:
        readable()  # with the plugins that are installed
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            gray = levels(upright, sixteen_bits=file.format == "PNG")
            pixels = numpy.asarray(upright.convert("RGB"), dtype=numpy.float32) / 255 if gray is None \
                else gray[..., None].repeat(3, axis=-1)
    except Exception as error:  # Pillow's readers raise whatever their formats lead to
        raise _unreadable(path, error) from error
    return torch.from_numpy(pixels)[None]


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path.name} is not a complete picture ({str(error) or type(error).__name__}). "
                      f"{remedy(path.suffix.lower())}".strip())


def _size(path: Path) -> tuple[int, int] | None:
    """(height, width) of a picture as it stands upright; None for a file that is missing."""
    if not path.is_file():
        return None
    try:
        readable()
        with Image.open(path) as file:
            width, height = ImageOps.exif_transpose(file).size
    except Exception as error:
        raise _unreadable(path, error) from error
    return height, width


def state(folder: str, index: int) -> str:
    """Changes when the entry's line, its name or one of its files does."""
    listed, name, _ = entry(folder, index)
    stamps = {key: path.stat().st_mtime_ns for key, path in files(folder, listed).items() if path and path.is_file()}
    return repr((listed, name, stamps))


def save(folder: str, name: str, text: str, given: dict[str, Tensor | None]) -> Path:
    """Write an entry; given: key -> an IMAGE of one picture, or None. Returns its folder.

    Raises ValueError for batches and for conditions of another shape than the image, which cropping would shift,
    whether given or kept from before.
    """
    there = {key: colours(picture, key) for key, picture in given.items() if picture is not None}
    for key, picture in there.items():
        if len(picture) != 1:
            raise ValueError(f"{key} is a batch of {len(picture)} pictures, and an entry has one of each. Take single "
                             "ones out of it, or raise the index of 'Load Data Set Entry'.")
    own_height, own_width = there[entries.IMAGE].shape[1:3]

    def fits(height: int, width: int) -> bool:
        return abs(height * own_width / (width * own_height) - 1) <= SAME_SHAPE

    for key, picture in there.items():
        height, width = picture.shape[1:3]
        if not fits(height, width):
            raise ValueError(f"{key} is {width}x{height} and the image {own_width}x{own_height}: of another shape, it "
                             "would be cropped to another part.")
    path = target(folder)
    kept = {key: _size(path / listed) for key, listed in entries.keeps(path, name, there).items()}
    if old := [f"{key} ({size[1]}x{size[0]})" for key, size in kept.items() if size and not fits(*size)]:
        raise ValueError(f"The image is {own_width}x{own_height}, and what the entry {name} of {folder} keeps is of "
                         f"another shape: {', '.join(old)}. Give conditions of the new shape with it, or save under "
                         "another name.")
    entries.save(path, name, text, {key: _png(picture[0]) for key, picture in there.items()})
    return path


def _png(picture: Tensor) -> bytes:
    pixels = picture.clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
