"""The releases' own feature files, into a cache and out of it (PixArt-alpha/PixArt-sigma@1ce521a,
tools/extract_features.py)."""
from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch

from ..config.schema import Data
from ..data.layouts import Item, listed
from ..data.pictures import measure, plan
from .cache import BOX, ORIGINAL, ShownItems, key_of
from .store import Digests, Store, digest


def file_names(item: Item, root: Path) -> tuple[str, str]:
    """What the releases may call the features of a picture: the stem of its file (SAM), or "folder_stem" with every
    folder above still a folder (InternData)."""
    name = Path(item.file.name if not isinstance(item.file, Path) else item.file)
    try:
        inner = name.relative_to(root).with_suffix("").as_posix()
    except ValueError:
        inner = name.stem
    return "_".join(inner.rsplit("/", 1)), name.stem


def root_of(item: Item, settings: Data) -> Path:
    """What the names of feature files of a data set are relative to."""
    path = Path(settings.each[item.set].path).expanduser()
    base = path if path.is_dir() else path.parent
    return next((base / name for name in ("InternImgs", "images") if (base / name).is_dir()), base)


def read_released(items: list[Item], settings: Data, text: Store | None, latent: Store | None, captions: Path | None,
                  latents: Path | None) -> list[str]:
    """Feature files of a release into stores: .npz with caption_feature (1, L, C) and attention_mask (1, L), of each
    picture's first caption; .npy with mean and standard deviation of the latent, (2C, h, w). What was done, in lines.

    The files do not say which encoder made them; they count as those of the stores, which is for the user to know.
    """
    import numpy as np

    digests, done, absent, wrong = None, Counter(), [], []
    if latent is not None:
        digests = Digests(latent.root)
    for item, size in ShownItems(items, settings):
        names, crop = file_names(item, root_of(item, settings)), settings.each[item.set].crop
        if text is not None and item.texts:
            if file := _first(captions, names, ".npz"):
                with np.load(file) as found:
                    feature = torch.from_numpy(found["caption_feature"]).flatten(0, -2)
                    keep = torch.from_numpy(found["attention_mask"].astype(bool)).flatten() \
                        if "attention_mask" in found else torch.ones(len(feature), dtype=torch.bool)
                text.put(digest(item.texts[0]), {"tokens": feature[keep].to(torch.bfloat16)})
                done["captions"] += 1
            else:
                absent.append(captions / f"{names[0]}.npz")
        if latent is not None:
            if not (file := _first(latents, names, ".npy")):
                absent.append(latents / f"{names[0]}.npy")
                continue
            mean, std = torch.from_numpy(np.load(file)).float().chunk(2)
            if tuple(8 * n for n in mean.shape[1:]) != size:
                wrong.append(f"{file}: {8 * mean.shape[2]}x{8 * mean.shape[1]}, shown at {size[1]}x{size[0]}")
                continue
            original = item.size or measure(item.file)
            cut = plan(original, size, crop, random.Random(0))
            latent.put(key_of(item, "", size, crop, False, digests), {
                "mean": mean, "std": std, ORIGINAL: torch.tensor(original),
                BOX: torch.tensor(cut.box(), dtype=torch.float32)})
            done["latents"] += 1
    for store in (s for s in (text, latent) if s is not None):
        store.write()
    if digests:
        digests.write()
    return [f"read {', '.join(f'{n} {what}' for what, n in done.items()) or 'nothing'}",
            *listed(absent, "feature files are not there"), *listed(wrong, "latents are of another size")]


def write_released(items: list[Item], settings: Data, text: Store | None, latent: Store | None, captions: Path | None,
                   latents: Path | None, limit: int) -> list[str]:
    """The other way round. limit: tokens that captions are padded to, by their last token under a mask of 0."""
    import numpy as np

    digests, done, absent = Digests(latent.root) if latent is not None else None, Counter(), []
    for item, size in ShownItems(items, settings):
        name, crop = file_names(item, root_of(item, settings))[0], settings.each[item.set].crop
        if text is not None and item.texts:
            key = digest(item.texts[0])
            if key in text:
                tokens = text.get(key)["tokens"].float()
                fill = tokens[-1:].expand(limit - len(tokens), -1)
                file = captions / f"{name}.npz"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(file, caption_feature=torch.cat([tokens, fill])[None].half().numpy(),
                                    attention_mask=(np.arange(limit) < len(tokens))[None].astype(np.int16))
                done["captions"] += 1
            else:
                absent.append(item.texts[0])
        if latent is not None:
            key = key_of(item, "", size, crop, False, digests)
            if key in latent:
                record, file = latent.get(key), latents / f"{name}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, torch.cat([record["mean"], record["std"]]).numpy())
                done["latents"] += 1
            else:
                absent.append(f"{item.file} at {size[1]}x{size[0]}")
    return [f"wrote {', '.join(f'{n} {what}' for what, n in done.items()) or 'nothing'}",
            *listed(absent, "features are not in the cache")]


def _first(folder: Path, names: tuple[str, ...], suffix: str) -> Path | None:
    return next((file for name in names if (file := folder / (name + suffix)).is_file()), None)
