"""`python -m trainer sample`: numbered pictures of a run, made by any number of processes, gone on with when stopped.

Picture i shows the prompt, class or item i, from the beginning again where they are fewer than --count. Pictures are
made in groups of `batch`, always whole ones, and group g draws its noise from (seed, g): so picture i is the same, bit
for bit, whatever the number of processes and of pictures, as long as batch stays the same. A folder gets
    000000.png ...  samples.json (how they were made)  and with --npz FOLDER.npz, whose arr_0 is (N, H, W, 3) uint8, as
ADM's evaluation suite reads it.
"""
from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from ...models_impl.files import write_whole
from ...models_impl.parsing import from_json
from ..config.schema import Config
from ..data import layouts
from ..data.layouts import Item
from ..data.pictures import decode, shown
from ..data.sheets import to_images

NOTES = "samples.json"


@dataclass(frozen=True)
class Request:
    """How pictures are made. Everything but `count` makes them other pictures."""

    run: str
    step: int
    weights: str
    what: list
    """Prompts, or indices of classes."""
    count: int
    batch: int
    height: int
    width: int
    steps: int
    shift: float
    cfg: float
    seed: int
    data: str = ""
    """Where prompts, classes and conditions came from, if they did not stand on the command line."""
    conditions: list[str] = field(default_factory=list)
    """Names of the items' conditions; "" for the picture, of which the recipe makes the hint."""

    def __post_init__(self):
        if not self.what:
            raise ValueError("there is nothing to draw: give prompts or class indices, or --data.")
        for name in ("count", "batch", "height", "width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1.")

    @property
    def groups(self) -> int:
        return -(-self.count // self.batch)


def source(path: Path, config: Config, need: str) -> tuple[list, list[Item]]:
    """(what to draw, the items it comes from) of a .txt with a prompt a line, or of a data set in any layout. need:
    "captions", "classes" or "pictures"."""
    classes = need == "classes"
    if path.suffix == ".txt":
        prompts = [line.strip() for line in layouts.read_text(path).splitlines() if line.strip()]
        return ([int(p) for p in prompts] if classes and all(p.isdigit() for p in prompts) else prompts), []
    data_set = layouts.read(path, "auto", replace(config.data, path=str(path)))
    items = data_set.train + data_set.held_out
    if need == "pictures":
        return [str(i.file) for i in items], items
    if classes:
        lacking = [i.file for i in items if i.label < 0]
    else:
        lacking = [i.file for i in items if not i.texts]
    complaints = layouts.listed(lacking, f"pictures have no {'class' if classes else 'caption'}")
    for name in config.data.conditions:
        complaints += layouts.listed([i.file for i in items if name not in i.conditions],
                                     f"pictures have no condition {name!r}")
    if complaints:
        raise ValueError(f"{path} cannot be drawn from:\n  " + "\n  ".join(complaints))
    return [i.label if classes else i.texts[0] for i in items], items


def conditions_of(item: Item, names: list[str], height: int, width: int) -> dict[str, Tensor]:
    """Each (3, height, width) uint8, the middle of the condition picture; "" is the picture itself, which need not be
    there otherwise."""
    return {name: shown(item.conditions[name] if name else item.file, height, width) for name in names}


def made(recipe, request: Request, items: list[Item], group: int) -> Tensor:
    """The pictures of one group: (at most batch, 3, H, W) in [-1, 1]."""
    first = group * request.batch
    numbers = range(first, first + request.batch)  # a last group is made whole too
    given = {}
    if names := request.conditions:
        found = [conditions_of(items[n % len(items)], names, request.height, request.width) for n in numbers]
        given["conditions"] = {name: torch.stack([one[name] for one in found]) for name in names}  # (B, 3, H, W)
    what = [request.what[n % len(request.what)] for n in numbers]
    pictures = recipe.sample(what, request.height, request.width, steps=request.steps, shift=request.shift,
                             cfg=request.cfg, seed=request.seed + group * 1_000_003, **given)
    height, width = pictures.shape[-2:]
    # an autoencoder's show two pictures side by side, and a previewer's are small
    if not recipe.previews and (height != request.height or width % request.width):
        raise ValueError(f"--height={request.height} --width={request.width} is no size of this model, which draws "
                         f"{height} and {width} for it: give those.")
    return pictures[:request.count - first]


def draw(recipe, request: Request, items: list[Item], out: Path, process: int = 0, processes: int = 1,
         progress=lambda groups: groups):
    """Writes the pictures of this process's groups that are not there yet."""
    groups = range(process, request.groups, processes)
    for group in progress([g for g in groups if not all(p.is_file() for p in paths(out, request, g))]):
        for path, picture in zip(paths(out, request, group), to_images(made(recipe, request, items, group)),
                                 strict=True):
            unfinished = path.with_suffix(".unfinished")
            picture.save(unfinished, "PNG")
            unfinished.replace(path)


def paths(out: Path, request: Request, group: int) -> list[Path]:
    first = group * request.batch
    return [out / f"{n:06d}.png" for n in range(first, min(first + request.batch, request.count))]


def begin(out: Path, request: Request):
    """Makes the folder, or checks that the pictures in it are made as these will be."""
    notes, new = out / NOTES, asdict(request)
    if notes.is_file() and any(out.glob("*.png")):
        old = read_notes(notes)
        if other := [f"{key} was {old.get(key)!r:.80}, now {value!r:.80}" for key, value in new.items()
                     if key != "count" and old.get(key) != value]:
            raise ValueError(f"{out} holds pictures that were made otherwise:\n  " + "\n  ".join(other)
                             + "\nChoose another folder: --out.")
    elif out.is_dir() and any(out.glob("*.png")):
        raise ValueError(f"{out} holds other pictures already. Choose another folder: --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(notes, json.dumps(new, ensure_ascii=False))


def pack(out: Path, request: Request) -> Path:
    """The pictures as arr_0 of an .npz, one after the other, so that 50,000 need no memory."""
    path = out.with_name(out.name + ".npz")
    unfinished = path.with_name(path.name + ".unfinished")
    with Image.open(out / f"{0:06d}.png") as first:
        shape = (request.count, first.height, first.width, 3)
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive, \
            archive.open("arr_0.npy", "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for number in range(request.count):
            with Image.open(out / f"{number:06d}.png") as picture:
                file.write(np.asarray(picture.convert("RGB")).tobytes())
    unfinished.replace(path)
    return path


def opened(path: Path) -> tuple[list[Path] | np.ndarray, dict]:
    """(pictures, what samples.json says or {}) of a folder of pictures or of an .npz. Raises ValueError."""
    if path.is_file():
        with np.load(path) as archive:
            if "arr_0" not in archive:
                raise ValueError(f"{path} has no arr_0 of pictures, but {', '.join(archive.files)}.")
            return archive["arr_0"], {}
    files = sorted(layouts.pictures_in(path))
    if not files:
        raise ValueError(f"{path} holds no pictures.")
    notes = path / NOTES
    return files, read_notes(notes) if notes.is_file() else {}


def read_notes(file: Path) -> dict:
    """What samples.json says. Raises ValueError where another program wrote it."""
    notes = from_json(file.read_bytes(), str(file))
    if not isinstance(notes, dict):
        raise ValueError(f"{file} is not what `python -m trainer sample` wrote.")
    return notes


def tensors(pictures: list[Path] | np.ndarray, at_once: int):
    """Batches of (B, 3, H, W) uint8. Raises ValueError for pictures of several sizes."""
    first = None
    for start in range(0, len(pictures), at_once):
        some = []
        for one in pictures[start:start + at_once]:
            if isinstance(one, Path):
                pixels = np.array(decode(one, advice=""))
            else:
                pixels = one
            first = first or (pixels.shape, one)
            if pixels.shape != first[0]:
                raise ValueError(f"{one} is {pixels.shape[1]}x{pixels.shape[0]}, and {first[1]} is "
                                 f"{first[0][1]}x{first[0][0]}: pictures of one size are compared.")
            some.append(torch.from_numpy(pixels))
        yield torch.stack(some).permute(0, 3, 1, 2)  # (B, 3, H, W)


def as_unit(pictures: Tensor) -> Tensor:
    """uint8 -> [0, 1]"""
    return pictures.float() / 255
