"""Pairs of a noise and of the latent that a teacher makes of it, which DMD's student learns to reproduce: one of each
training picture, for its first caption.

    FOLDER/
      pairs.json                          how `python -m trainer pairs` made them, and of which captions; the release's
                                          have none
      InternImgs_DMD_noises/NAME.npy      (C, h, w) float16
      InternImgs_DMD_latents/NAME.npy     of the same shape, times latent_scale
NAME is what the release calls the features of a picture (`released.file_names`). Each file is whole or not there.
(diffusion/data/datasets/dmd.py, tools/generate_dmd_data_noise_pairs.py of PixArt-alpha/PixArt-sigma@1ce521a)
"""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....models_impl.files import put, write_whole
from ....models_impl.parsing import from_json
from ....models_impl.pixart.config import VAE_FACTOR
from ...config.schema import Config, Data
from ...data.layouts import Item, listed
from ...features import cache, released, text_encoders
from ...features.cache import Size
from ...features.store import fingerprint
from .settings import PAIRS, PAIRS_AGAIN
from .start import frozen, opened
from .task import PixArtDenoising, frozen_vae

NOTES = "pairs.json"
ALGORITHM = "dpm-solver++ (diffusers)"  # the release's pairs were made with it
OTHERWISE = "Give the captions back, or make pairs in another folder: --out."


class Pairs:
    """The pairs of training pictures, read when they are asked for."""

    def __init__(self, folder: Path, items: list[Item], settings: Data, channels: int):
        """Raises ValueError where a picture has no pair, two share one, or the first one is of another size."""
        self.folder, self.settings, self.channels = folder, settings, channels
        absent, owners, others, notes = [], {}, [], folder / NOTES
        captions = read_notes(notes)["captions"] if notes.is_file() else {}
        for item in items:
            names = released.file_names(item, released.root_of(item, self.settings))
            if captions.get(names[0], item.texts[0]) != item.texts[0]:
                others.append(f"{names[0]}: {captions[names[0]]!r:.60}, now {item.texts[0]!r:.60}")
            for kind in PAIRS:
                if file := self.file(kind, names):
                    owners.setdefault(file, []).append(item.file)
                else:
                    absent.append(folder / kind / f"{names[0]}.npy")
        shared = [f"{file} is that of {', '.join(map(str, of[:3]))}" for file, of in owners.items() if len(of) > 1]
        if complaints := [*listed(absent, "files are not there", PAIRS_AGAIN),
                          *listed(others, "pairs were made of another caption", OTHERWISE),
                          *listed(shared, "files would be of several pictures", "Give the pictures other names.")]:
            raise ValueError(f"recipe.pairs={str(folder)!r} cannot be used:\n  " + "\n  ".join(complaints))
        self.of(*next(iter(cache.ShownItems(items, settings))))

    def file(self, kind: str, names: tuple[str, ...]) -> Path | None:
        return next((file for name in names if (file := self.folder / kind / f"{name}.npy").is_file()), None)

    def of(self, item: Item, size: Size) -> tuple[Tensor, Tensor]:
        """(noise, latent), (C, h, w) float32 each, of an item that is shown at `size` in pixels."""
        names, shape = released.file_names(item, released.root_of(item, self.settings)), shape_of(size, self.channels)
        return tuple(read(self.file(kind, names) or self.folder / kind / f"{names[0]}.npy", shape) for kind in PAIRS)


def shape_of(size: Size, channels: int) -> tuple[int, int, int]:
    return channels, *(n // VAE_FACTOR for n in size)


def read(file: Path, shape: tuple[int, ...]) -> Tensor:
    """float32. Raises ValueError, with the name of the file, for one that is not of this shape or not finite."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as .npy ({error}). Delete it: {PAIRS_AGAIN}") from None
    if found.shape != shape or found.dtype.kind != "f":
        raise ValueError(f"{file} holds {found.dtype} of {list(found.shape)}, and the pictures that are trained on are "
                         f"floats of {list(shape)}: set data.resolution as it was when the pairs were made, or make "
                         "others in another folder.")
    found = torch.from_numpy(found.astype(np.float32))
    if not found.isfinite().all():
        raise ValueError(f"{file} has numbers that are not finite. Delete it: {PAIRS_AGAIN}")
    return found


# --- Making them

def make(config: Config, items: list[Item], folder: Path, steps: int, cfg: float, at_once: int, accelerator,
         progress: Callable = lambda some: some) -> int:
    """Makes the pairs that are not there, and says how many this process made. The teacher is the network that the run
    would start from; DPM-Solver++ as diffusers' pipeline of PixArt runs it, as the release's pairs were made.

    A noise depends only on seed and name. Groups of `at_once` are always the same pictures, made whole, so that what
    an interrupted command makes later is what it would have made, to the bit.
    """
    for name, value in (("--steps", steps), ("--batch", at_once)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    todo = [(released.file_names(item, released.root_of(item, config.data))[0], item.texts[0], size)
            for item, size in cache.ShownItems([i for i in items if not i.prior], config.data)]
    counts = Counter(name for name, _, _ in todo)
    if twice := listed([f"{name}.npy" for name, count in counts.items() if count > 1],
                       "pairs would be of several pictures", "Give the pictures other names."):
        raise ValueError("no pairs can be made:\n  " + "\n  ".join(twice))
    torch.manual_seed(config.seed)  # as in `build.recipe`: a text encoder may begin with random weights
    with accelerator.main_process_first():
        text = text_encoders.make(config, [t for i in items for t in i.texts],
                                  config.folder if config.text.frozen else None)
        if isinstance(text, text_encoders.FROZEN):
            text.prepare(["", *(caption for _, caption, _ in todo)], accelerator.device)
        if accelerator.is_main_process:
            begin(folder, notes(config, text, steps, cfg), {name: caption for name, caption, _ in todo})
    net = frozen(opened(config, text), config).to(accelerator.device).eval()
    d = PixArtDenoising(config, net, text.to(accelerator.device), frozen_vae(config))
    own = groups(todo, at_once)[accelerator.process_index::accelerator.num_processes]
    made = 0
    for group in progress([g for g in own if not all(there(folder, name) for name, _, _ in g)]):
        for (name, _, _), noise, latent in zip(group, *draw(d, group, steps, cfg, config.seed), strict=True):
            if not latent.isfinite().all():
                raise ValueError(f"the teacher's latent of {name} is not finite. Is init_from={config.init_from} "
                                 "a whole file?")
            if not there(folder, name):
                for kind, value in zip(PAIRS, (noise, latent), strict=True):
                    write(folder / kind / f"{name}.npy", value)
                made += 1
    accelerator.wait_for_everyone()
    return made


def groups(todo: list[tuple[str, str, Size]], at_once: int) -> list[list]:
    """Neighbours of one size, up to `at_once` of them."""
    found = []
    for one in todo:
        if not found or len(found[-1]) == at_once or found[-1][0][2] != one[2]:
            found.append([])
        found[-1].append(one)
    return found


def there(folder: Path, name: str) -> bool:
    return all((folder / kind / f"{name}.npy").is_file() for kind in PAIRS)


@torch.no_grad()
def draw(d: PixArtDenoising, group: list[tuple[str, str, Size]], steps: int, cfg: float,
         seed: int) -> tuple[Tensor, Tensor]:
    """(noise, latent), (B, C, h, w) float16 on the CPU each."""
    size = group[0][2]
    noise = torch.stack([noise_of(seed, name, shape_of(size, d.shape.in_channels)) for name, _, _ in group])
    with d.autocast():
        guided = d.guided(d.net, [caption for _, caption, _ in group], *size, cfg, ALGORITHM)
        latent = d.diffusion.sample(guided, noise.to(d.device, torch.float32), d.diffusion.timesteps(steps, ALGORITHM),
                                    algorithm=ALGORITHM)
    return noise, latent.to("cpu", torch.float16)


def noise_of(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """float16, because that is what is written, and what the teacher begins with."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(number), device="cpu").half()


def write(file: Path, value: Tensor):
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".unfinished")
    with open(unfinished, "wb") as opened:
        np.save(opened, value.numpy())
        opened.flush()
        os.fsync(opened.fileno())
    put(unfinished, file)


def notes(config: Config, text, steps: int, cfg: float) -> dict:
    """Everything that makes a pair what it is, but its picture's name and caption."""
    if isinstance(text, text_encoders.FROZEN):
        reader = text.store.identity
    else:
        file = Path(config.text.encoder).expanduser()
        reader = fingerprint(file) if file.exists() else config.text.encoder
    return {"teacher": fingerprint(Path(config.init_from).expanduser()), "model": asdict(config.model), "text": reader,
            "precision": config.precision, "resolution": config.data.resolution, "buckets": config.data.buckets,
            "steps": steps, "cfg": cfg, "seed": config.seed}


def read_notes(file: Path) -> dict[str, dict]:
    """How the pairs beside a file were made, and of which captions. Raises ValueError for another program's file."""
    notes = from_json(file.read_bytes(), str(file))
    if not isinstance(notes, dict) or not all(isinstance(notes.get(name), dict) for name in ("how", "captions")):
        raise ValueError(f"{file} is not what `python -m trainer pairs` wrote.")
    return notes


def begin(folder: Path, new: dict, captions: dict[str, str]):
    """Makes the folder, or checks that the pairs in it were made as these will be. captions: by the names of pairs."""
    file, before = folder / NOTES, {}
    if any(next((folder / kind).rglob("*.npy"), None) for kind in PAIRS):
        if not file.is_file():
            raise ValueError(f"{folder} holds pairs without {NOTES}, so another program made them. Choose another "
                             "folder: --out.")
        old = read_notes(file)
        before = old["captions"]
        if complaints := [
            *(f"{key} was {old['how'].get(key)!r:.80}, now {value!r:.80}" for key, value in new.items()
              if old["how"].get(key) != value),
            *listed([f"{name}: {before[name]!r:.60}, now {caption!r:.60}" for name, caption in captions.items()
                     if before.get(name, caption) != caption], "captions were others", OTHERWISE)]:
            raise ValueError(f"{folder} holds pairs that were made otherwise:\n  " + "\n  ".join(complaints)
                             + "\nChoose another folder: --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"how": new, "captions": {**before, **captions}}, indent=2, ensure_ascii=False))
