"""Features by key in files of safetensors, and the digests by which keys are made.

    FOLDER/
      pictures.jsonl                  what every picture file was when it was last read, and the digest of its bytes
      NAME-<digest>/encoder.json      which encoder, with which settings, made what lies here
      NAME-<digest>/*.safetensors     shards; the header of each is its part of the index

A feature is found by the content it was made from and by what made it, so nothing that changed is ever taken for what
it was: it is missing. Shards appear whole or not at all, so a process that is killed leaves nothing half-written and
the next one goes on after it.
"""
from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models_impl import state_dict
from ...models_impl.files import flush, put, write_whole
from ...models_impl.folders import below
from ..files import entries
from .table import KeyTable

SHARD_BYTES = 2**28
OPEN_SHARDS = 128
EDGE = 2**20  # bytes at both ends of a weight file that stand for all of it
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5"}
ENCODER = "encoder.json"


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:40]


def fingerprint(path: Path) -> str:
    """What identifies the files of an encoder, wherever they lie: names, sizes and contents, of files of weights
    only the first and last MiB. path: a file or a folder."""
    files = [path] if path.is_file() else sorted(
        p for p in below(path) if p.suffix in WEIGHTS | {".json", ".model", ".txt"} and p.is_file())
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
        self.shards: list[Path] = []
        self.parts: dict[tuple[str, ...], int] = {}
        """The names of what a key has -> their number: mostly one for all."""
        self.places = KeyTable([("shard", "<i4"), ("parts", "<i4")])
        self.new: dict[str, dict[str, Tensor]] = {}
        self.new_bytes = 0
        self.indexed: set[str] = set()
        self.handles: OrderedDict[Path, object] = OrderedDict()
        self.lock = threading.Lock()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.new

    def __len__(self) -> int:
        return len(self.places) + sum(key not in self.places for key in self.new)

    def refresh(self):
        """Take in what other processes have written."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard.name not in self.indexed:
                self.index(shard)

    def index(self, shard: Path):
        parts: dict[str, list[str]] = {}
        self.indexed.add(shard.name)
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    key, _, part = name.partition("/")
                    parts.setdefault(key, []).append(part)
        except (SafetensorError, OSError) as error:
            print(f"{shard} is damaged ({error}): what it held counts as missing and is made again. Delete it.",
                  file=sys.stderr)
            return
        for key, found in parts.items():
            self.places[key] = len(self.shards), self.parts.setdefault(tuple(found), len(self.parts))
        self.shards.append(shard)

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key. Raises KeyError where there are none."""
        if key in self.new:
            return self.new[key]
        place = self.places.get(key)
        if place is None:
            raise KeyError(key)
        shard, parts = self.shards[place[0]], [*self.parts][place[1]]
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
        flush(unfinished)
        put(unfinished, shard)
        self.new, self.new_bytes = {}, 0
        self.index(shard)

    def others(self) -> list[str]:
        """Stores of the same name that another encoder filled, in words: what it had otherwise."""
        found = []
        for file in sorted(self.root.glob(f"{self.name}-*/{ENCODER}")):
            if file.parent != self.folder:
                theirs = entries(file)
                differs = [f"{k} was {theirs.get(k)!r}, now {self.identity.get(k)!r}"
                           for k in sorted(theirs.keys() | self.identity.keys())
                           if theirs.get(k) != self.identity.get(k)]
                found.append(f"{file.parent}: {', '.join(differs)}")
        return found


def named(file) -> tuple[str, tuple[int, int]]:
    """(where a picture lies, (size, time) of its file, or of the archive that it is in; zeros where that is unknown)"""
    where, name = (file, str(file.resolve())) if isinstance(file, Path) else (getattr(file, "tar", None), str(file))
    if where is None:
        return name, (0, 0)
    state = where.stat()
    return name, (state.st_size, state.st_mtime_ns)


class Digests:
    """The digest of every picture file's bytes, read again only where its size or time has changed."""

    def __init__(self, root: Path):
        self.file = Path(root) / "pictures.jsonl"
        self.known = KeyTable([("size", "<i8"), ("time", "<i8"), ("digest", "S40")])
        self.lock = threading.Lock()
        self.fresh: list[str] = []
        if self.file.exists():
            with open(self.file, encoding="utf-8") as lines:
                for line in lines:
                    try:
                        name, size, when, found = json.loads(line)
                        self.known[name] = size, when, found.encode()
                    except (ValueError, TypeError, AttributeError):
                        continue  # what a killed process was writing, or a disk lost

    def of(self, file) -> tuple[str, bool]:
        """(digest, whether the same place held other bytes before). file: a Path, or what has `read_bytes` and says
        where it lies by `str`."""
        name, stamp = named(file)
        before = self.known.get(name)
        if before and any(stamp) and before[:2] == stamp:
            return before[2].decode(), False
        found = digest(file.read_bytes())
        with self.lock:
            self.known[name] = (*stamp, found.encode())
            self.fresh.append(json.dumps([name, *stamp, found]))
        return found, bool(before) and before[2].decode() != found

    def known_of(self, file) -> tuple[str, bool]:
        """The same without reading the file: of one that is new or has changed, a digest that nothing has."""
        name, stamp = named(file)
        before = self.known.get(name)
        return (before[2].decode(), False) if before and before[:2] == stamp else ("unknown", False)

    def write(self):
        with self.lock:
            if self.fresh:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write("".join(line + "\n" for line in self.fresh))
                self.fresh = []
