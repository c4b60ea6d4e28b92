"""Features that frozen encoders made of captions and pictures, kept on disk: `python -m trainer cache recipe.toml`.

    FOLDER/
      pictures.jsonl                  what every picture file was when it was last read, and the digest of its bytes
      NAME-<digest>/encoder.json      which encoder, with which settings, made what lies here
      NAME-<digest>/*.safetensors     shards; the header of each is its part of the index

A feature is found by the content it was made from (a caption, or the bytes of a picture and how it was cut) and by what
made it, so nothing that changed is ever taken for what it was: it is missing, and `lacking` says why. Shards appear
whole or not at all, so a process that is killed leaves nothing half-written and the next one goes on after it.

An encoder of pictures is anything with `name`, `of` ("" for the picture, or the name of a condition), `store` (a Store
or None) and `encode(pictures (B, 3, H, W) uint8, device) -> {part: (B, ...)}`; `encoders.FrozenVae` is one.
"""
from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...models_impl import state_dict
from ..config import Config, Data
from ..data import loader as data
from ..data.layouts import Item, listed
from ..data.pictures import Picture, Pictures, Size, measure, plan
from ..training.run import write_whole

SHARD_BYTES = 2**28
OPEN_SHARDS = 128
EDGE = 2**20  # bytes at both ends of a weight file that stand for all of it
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5"}
ENCODER = "encoder.json"
AT_ONCE = 8  # pictures decoded and encoded together
ORIGINAL, BOX = "original", "box"  # parts beside an encoder's own: what `pictures.Picture` says of the cut


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:40]


def fingerprint(path: Path) -> str:
    """What tells the files of an encoder from others, wherever they lie: names, sizes and contents, of files of weights
    the first and last MiB alone. path: a file or a folder."""
    files = [path] if path.is_file() else sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in WEIGHTS | {".json", ".model", ".txt"})
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{'' if file == path else file.relative_to(path).as_posix()} {size} ".encode())
        with open(file, "rb") as opened:
            if file.suffix not in WEIGHTS or size <= 2 * EDGE:
                found.update(opened.read())
            else:
                found.update(opened.read(EDGE))
                opened.seek(-EDGE, os.SEEK_END)
                found.update(opened.read())
    return found.hexdigest()[:40]


class Store:
    """Features by key. Several processes may write at once, each under its own `writer` number.

    identity: everything that shapes the features, as JSON takes it.
    """

    def __init__(self, root: Path, name: str, identity: Mapping, writer: int = 0):
        self.root, self.name, self.identity, self.writer = Path(root), name, dict(identity), writer
        self.folder = self.root / f"{name}-{digest(json.dumps(self.identity, sort_keys=True))[:16]}"
        self.places: dict[str, tuple[Path, tuple[str, ...]]] = {}
        self.new: dict[str, dict[str, Tensor]] = {}
        self.new_bytes = 0
        self.indexed: set[Path] = set()
        self.handles: OrderedDict[Path, object] = OrderedDict()
        self.lock = threading.Lock()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.new

    def __len__(self) -> int:
        return len(self.places.keys() | self.new.keys())

    def refresh(self):
        """Take in what other processes have written."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.indexed:
                self.index(shard)

    def index(self, shard: Path):
        parts: dict[str, list[str]] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                key, _, part = name.partition("/")
                parts.setdefault(key, []).append(part)
        self.places.update({key: (shard, tuple(found)) for key, found in parts.items()})
        self.indexed.add(shard)

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key. Raises KeyError where there are none."""
        if key in self.new:
            return self.new[key]
        shard, parts = self.places[key]
        with self.lock:
            handle = self.handles.pop(shard, None) or safe_open(shard, framework="pt")
            self.handles[shard] = handle
            if len(self.handles) > OPEN_SHARDS:
                self.handles.popitem(last=False)
        return {part: handle.get_tensor(f"{key}/{part}") for part in parts}

    def put(self, key: str, tensors: Mapping[str, Tensor]):
        """Kept in memory until there is enough for a shard, or `write` is called."""
        self.new[key] = {part: value.detach().to("cpu", copy=True).contiguous() for part, value in tensors.items()}
        self.new_bytes += sum(value.nbytes for value in self.new[key].values())
        if self.new_bytes >= SHARD_BYTES:
            self.write()

    def write(self):
        if not self.new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ENCODER).exists():
            write_whole(self.folder / ENCODER, json.dumps(self.identity, indent=2, ensure_ascii=False))
        mine = [int(p.stem.split("-")[1]) for p in self.folder.glob(f"{self.writer:03d}-*.safetensors")]
        shard = self.folder / f"{self.writer:03d}-{max(mine, default=-1) + 1:06d}.safetensors"
        unfinished = shard.with_suffix(".unfinished")
        state_dict.save({f"{key}/{part}": value for key, parts in self.new.items() for part, value in parts.items()},
                        unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, shard)
        self.new, self.new_bytes = {}, 0
        self.index(shard)

    def others(self) -> list[str]:
        """Stores of the same name that another encoder filled, in words: what it had otherwise."""
        found = []
        for file in sorted(self.root.glob(f"{self.name}-*/{ENCODER}")):
            if file.parent != self.folder:
                theirs = json.loads(file.read_text(encoding="utf-8"))
                differs = [f"{k} was {theirs.get(k)!r}, now {self.identity.get(k)!r}"
                           for k in sorted(theirs.keys() | self.identity.keys())
                           if theirs.get(k) != self.identity.get(k)]
                found.append(f"{file.parent}: {', '.join(differs)}")
        return found


class Digests:
    """The digest of every picture file's bytes, read again only where its size or time has changed."""

    def __init__(self, root: Path):
        self.file = Path(root) / "pictures.jsonl"
        self.known: dict[str, tuple] = {}
        self.lock = threading.Lock()
        self.fresh: list[str] = []
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    name, *rest = json.loads(line)
                except ValueError:
                    continue  # what a killed process was writing
                self.known[name] = tuple(rest)

    def of(self, file) -> tuple[str, bool]:
        """(digest, whether the same place held other bytes before). file: a Path, or what has `read_bytes` and says
        where it lies by `str`."""
        name = str(file)
        before = self.known.get(name)
        if isinstance(file, Path):
            name = str(file.resolve())
            before, state = self.known.get(name), file.stat()
            if before and before[:2] == (state.st_size, state.st_mtime_ns):
                return before[2], False
            stamp = (state.st_size, state.st_mtime_ns)
        else:
            stamp = (0, 0)
        found = digest(file.read_bytes())
        with self.lock:
            self.known[name] = (*stamp, found)
            self.fresh.append(json.dumps([name, *stamp, found]))
        return found, bool(before) and before[2] != found

    def write(self):
        with self.lock:
            if self.fresh:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write("".join(line + "\n" for line in self.fresh))
                self.fresh = []


# --- Pictures

def key_of(item: Item, of: str, size: Size, crop: str, mirrored: bool, digests: Digests) -> str:
    """Where the features of a picture, or of its condition `of`, lie. A condition is cut as its picture is."""
    content = digests.of(item.file)[0]
    if of:
        content += "+" + digests.of(item.conditions[of])[0]
    return f"{content}@{size[0]}x{size[1]} {crop}{' mirrored' if mirrored else ''}"


def shown(items: list[Item], settings: Data) -> Iterator[tuple[Item, Size]]:
    """Every item with every size it is shown at: prior pictures take the size of whatever they stand beside."""
    own = [i for i in items if not i.prior]
    grouped = data.in_buckets(own, settings) if own else {}
    for size, indices in grouped.items():
        yield from ((own[i], size) for i in indices)
        yield from ((i, size) for i in items if i.prior)


def cut_by(settings: Data) -> Data:
    """The settings under which held-out pictures are shown (`data.fixed`)."""
    return replace(settings, flip=False, crop="centre" if settings.crop == "random" else settings.crop)


def lacking(items: list[Item], settings: Data, encoders: list, digests: Digests) -> tuple[list, list]:
    """([(item, size, mirrored)] that some encoder has no features of, the files among them that have changed)."""
    missing, changed = [], []
    for item, size in shown(items, settings):
        altered = digests.of(item.file)[1] or any(digests.of(item.conditions[e.of])[1] for e in encoders if e.of)
        for mirrored in (False, True) if settings.flip else (False,):
            if any(key_of(item, e.of, size, settings.crop, mirrored, digests) not in e.store for e in encoders):
                missing.append((item, size, mirrored))
                changed += [item.file] if altered and item.file not in changed[-1:] else []
    return missing, changed


class Cached:
    """In place of `pictures.Pictures` where the cache has all features of all pictures: no picture is opened."""

    def __init__(self, items: list[Item], settings: Data, encoders: list, digests: Digests):
        self.items, self.settings, self.encoders, self.digests = items, settings, encoders, digests

    def submit(self, index: int, size: Size, rng: random.Random) -> Future:
        found = Future()
        found.set_result(self.load(index, size, rng))
        return found

    def load(self, index: int, size: Size, rng: random.Random) -> Picture:
        mirrored = self.settings.flip and rng.random() < 0.5
        features, cut = {}, {}
        for e in self.encoders:
            key = key_of(self.items[index], e.of, size, self.settings.crop, mirrored, self.digests)
            record = e.store.get(key)
            cut = {part: tuple(record.pop(part).tolist()) for part in (ORIGINAL, BOX)}
            features |= {f"{e.name}.{part}": value for part, value in record.items()}
        return Picture(None, {}, tuple(map(int, cut[ORIGINAL])), cut[BOX], size, features)


def loader(config: Config, encoders: list, items: list[Item], settings: Data, say: Callable[[str], None]) -> Callable:
    """What loads pictures for `data.Batches` and `data.fixed`: `Cached` if the cache has them all, else Pictures.

    say: told, in a sentence or two, why the cache is not used where there is one.
    """
    stores = [e.store for e in encoders]
    if not encoders or None in stores or not items:
        return Pictures
    if settings.crop == "random":
        say(f"data.crop=\"random\" makes another picture every time: pictures are encoded as they are shown, and not "
            f"taken from cache.folder={config.cache.folder!r}.")
        return Pictures
    for store in stores:
        store.refresh()
    digests = Digests(Path(config.cache.folder).expanduser())
    missing, changed = lacking(items, settings, encoders, digests)
    if not missing:
        return partial(Cached, encoders=encoders, digests=digests)
    lines = listed([f"{item.file} at {size[1]}x{size[0]}" for item, size, _ in missing],
                   f"pictures are not in cache.folder={config.cache.folder!r}")
    lines += listed(changed, "of them have changed since they were cached")
    if others := [line for store in stores if not len(store) for line in store.others()]:
        lines += listed(others, "caches there are of other encoders or settings")
    say("Pictures are encoded as they are shown. `python -m trainer cache` with the same recipe would do it once.\n  "
        + "\n  ".join(lines))
    return Pictures


def stop_once():
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once, so that what was made can be written: launchers send a signal
    several times. A Ctrl-C that comes a second later, or more, ends that too."""
    asked = None

    def stop(number, frame):
        nonlocal asked
        now = time.monotonic()
        if asked is None or (number == signal.SIGINT and now > asked + 1):
            asked = now
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def fill(items: list[Item], settings: Data, encoders: list, folder: Path, device,
         progress: Callable = lambda some: some, share: tuple[int, int] = (0, 1)) -> int:
    """Makes what is missing, and says how many features that was. What is there already is not made again, so an
    interrupted run goes on. share: (number of this process, of how many), which each take a part. Raises ValueError
    for a picture that cannot be read."""
    digests = Digests(folder)
    missing = lacking(items, settings, encoders, digests)[0][share[0]::share[1]]
    if not share[0]:
        digests.write()
    load = Pictures([item for item, _, _ in missing], replace(settings, flip=False, cache=False))
    made, order = 0, sorted(range(len(missing)), key=lambda i: missing[i][1])  # one size after another
    groups = [order[i:i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    try:
        for group in progress(groups):
            loads = [load.submit(i, missing[i][1], random.Random(0)) for i in group]
            found = [f.result().mirrored() if missing[i][2] else f.result() for i, f in zip(group, loads, strict=True)]
            for e in encoders:
                for size in dict.fromkeys(missing[i][1] for i in group):
                    made += _encode(e, [(missing[i], picture) for i, picture in zip(group, found, strict=True)
                                        if missing[i][1] == size], settings, digests, device)
    finally:  # a picture that cannot be read, or Ctrl-C, costs nothing that was made before
        for e in encoders:
            e.store.write()
    return made


def _encode(encoder, some: list, settings: Data, digests: Digests, device) -> int:
    """some: [((item, size, mirrored), Picture)] of one size."""
    keys = [key_of(item, encoder.of, size, settings.crop, mirrored, digests) for (item, size, mirrored), _ in some]
    new = [i for i, key in enumerate(keys) if key not in encoder.store]
    if not new:
        return 0
    pictures = [some[i][1] for i in new]
    pixels = [p.conditions[encoder.of] if encoder.of else p.pixels for p in pictures]
    parts = encoder.encode(torch.stack(pixels), device)
    for row, (i, picture) in enumerate(zip(new, pictures, strict=True)):
        encoder.store.put(keys[i], {
            **{part: value[row] for part, value in parts.items()},
            ORIGINAL: torch.tensor(picture.original), BOX: torch.tensor(picture.box, dtype=torch.float32),
        })
    return len(new)


# --- The releases' own feature files (PixArt-alpha/PixArt-sigma@1ce521a, tools/extract_features.py)

def file_names(item: Item, root: Path) -> tuple[str, str]:
    """What the releases may call the features of a picture: the stem of its file (SAM), or "folder_stem" with every
    folder above still a folder (InternData)."""
    name = Path(item.file.name if not isinstance(item.file, Path) else item.file)
    try:
        inner = name.relative_to(root).with_suffix("").as_posix()
    except ValueError:
        inner = name.stem
    return "_".join(inner.rsplit("/", 1)), name.stem


def root_of(settings: Data) -> Path:
    """What the names of feature files are relative to."""
    path = Path(settings.path).expanduser()
    base = path if path.is_dir() else path.parent
    return next((base / name for name in ("InternImgs", "images") if (base / name).is_dir()), base)


def read_released(items: list[Item], settings: Data, text: Store | None, latent: Store | None, captions: Path | None,
                  latents: Path | None) -> list[str]:
    """Feature files of a release into stores: .npz with caption_feature (1, L, C) and attention_mask (1, L), of each
    picture's first caption; .npy with mean and standard deviation of the latent, (2C, h, w). What was done, in lines.

    The files do not say which encoder made them; they count as those of the stores, which is for the user to know.
    """
    import numpy as np

    root, digests, done, absent, wrong = root_of(settings), None, Counter(), [], []
    if latent is not None:
        digests = Digests(latent.root)
    for item, size in shown(items, settings):
        names = file_names(item, root)
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
            cut = plan(original, size, settings.crop, random.Random(0))
            latent.put(key_of(item, "", size, settings.crop, False, digests), {
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

    root, digests, done, absent = root_of(settings), Digests(latent.root) if latent is not None else None, Counter(), []
    for item, size in shown(items, settings):
        name = file_names(item, root)[0]
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
            key = key_of(item, "", size, settings.crop, False, digests)
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
