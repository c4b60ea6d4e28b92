"""The pictures of data sets as sequences of items, of which each takes its words and 32 bytes: ten million are an
ordinary pretraining set, and a Python object for each would be 13 GB in every process.

    listing = Listing(home)           # a reader (`layouts`) adds what it finds
    found = listing.found()           # -> Found, whose items are made anew whenever they are asked for

A listing may be kept in a folder (`data.index`): it is then read as a memory map, at once, and the processes of a
machine share it.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...models_impl.parsing import from_json

NOTHING: dict = {}
VERSION = 1  # of what is kept
A_SHARD = 1000  # items in a row that count as one where there are no tars


@dataclass(frozen=True)
class InTar:
    """A file inside an uncompressed tar."""

    tar: Path
    name: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read_bytes(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True)
class InRow:
    """A picture in a row of a Hugging Face data set, whose column holds undecoded pictures."""

    path: Path
    rows: Any
    column: str
    number: int

    @property
    def name(self) -> str:
        return f"row {self.number}"

    def __str__(self) -> str:
        return f"{self.path}, {self.column} of row {self.number}"

    def read_bytes(self) -> bytes:
        picture = self.rows[self.number][self.column]
        if picture is None:
            raise ValueError(f"{self} is empty.")
        return picture["bytes"] or Path(picture["path"]).read_bytes()


@dataclass(frozen=True, slots=True)
class Item:
    file: Path | InTar | InRow
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    label: int = -1
    described: tuple[str, ...] = ()
    """Captions that a model wrote, as Sigma's sharegpt4v; `data.described_share` mixes them with the others."""
    conditions: dict[str, Path | InTar | InRow] = field(default_factory=lambda: NOTHING)
    """What a ControlNet sees, by name, for the names in `data.conditions`; with data.masks="files" the mask too."""
    size: tuple[int, int] | None = None
    """(height, width) where the data set says it."""
    prior: bool = False
    """What the model must not forget (DreamBooth's class pictures)."""
    set: int = 0
    """Number of its data set in `Data.each`."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.captions + self.described


# --- Records of one listing

ROW = np.dtype([("start", "<i8"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4"), ("texts", "<u2"),
                ("tags", "<u2"), ("set", "<u2"), ("prior", "u1"), ("held_out", "u1"), ("conditions", "<u4")])
"""Where an item's words begin, and what is asked of all items at once. height: 0 where the data set does not say it;
texts, tags: how many; conditions: a bit for each of `Records.names`."""
PACK = struct.Struct("<qiiiHHHBBI").pack
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass
class Records:
    home: Path
    """Names of files begin here."""
    tars: list[Path]
    tables: list[tuple[Path, Any, str]]
    """(path, rows, column) of Hugging Face data sets."""
    names: list[str]
    """Names of conditions; a bit of `ROW`'s conditions stands for each."""
    rows: np.ndarray
    """(N + 1,) ROW; of the last only `start` counts."""
    words: np.ndarray
    """(bytes,) uint8: JSON, [file, captions, tags, described, conditions] for each item, less what is empty behind."""
    digest: str
    """Hash of the names and words of all items."""
    starts: list[int]
    """The first item of each tar; empty where there is none."""
    folder: Path | None = None
    """Where they are kept."""

    def item(self, i: int, said: Part) -> Item:
        """said: what a run says of it."""
        start, label, height, width, *_, number, prior, _, _ = self.rows[i].item()
        number, prior = number if said.set is None else said.set, bool(prior if said.prior is None else said.prior)
        if said.labels is not None and label >= 0:
            label = int(said.labels[label])
        text = self.words[start:self.rows["start"][i + 1]].tobytes().decode(errors="surrogatepass")
        file, captions, tags, described, conditions = (*json.loads(text), (), (), (), ())[:5]
        return Item(self.file(file), tuple(captions), tuple(tags), label, tuple(described),
                    {name: self.file(place) for name, place in conditions.items()} if conditions else NOTHING,
                    (height, width) if height else None, prior, number)

    def keep_sizes(self, chosen: np.ndarray, sizes: np.ndarray):
        """What pictures measure of which the data set does not say it, (N, 2), for the next run."""
        rows = self.rows.copy()
        rows["height"][chosen], rows["width"][chosen] = sizes.T
        if self.folder:
            unfinished = self.folder / f"rows-{uuid.uuid4().hex[:8]}"
            try:
                rows.tofile(unfinished)
                unfinished.replace(self.folder / "rows")
                rows = mapped(self.folder)[0]
            except OSError:  # another process reads it, on Windows, or the folder is not ours: they are for this run
                unfinished.unlink(missing_ok=True)
        self.rows = rows

    def file(self, place) -> Path | InTar | InRow | None:
        if isinstance(place, str):
            return self.home / place
        if place is None or len(place) == 1:
            return place and Path(place[0])
        if len(place) == 2:
            path, rows, column = self.tables[place[0]]
            return InRow(path, rows, column, place[1])
        return InTar(self.tars[place[0]], *place[1:])


class Listing:
    """What a reader adds items to, one by one."""

    def __init__(self, home: Path, folder: Path | None = None):
        """folder: where the listing is written as it grows; without it, it is kept in memory."""
        self.home, self.folder, self.prefix = home, folder, f"{home}{os.sep}"
        if folder:
            folder.mkdir(parents=True)
        self.rows, self.words = ((open(folder / name, "w+b") if folder else io.BytesIO()) for name in ("rows", "words"))
        self.tars: dict[Path, int] = {}
        self.starts: list[int] = []
        self.tables: dict[tuple, tuple] = {}
        self.names: dict[str, int] = {}
        self.start, self.count, self.held_out = 0, 0, 0
        self.identity = hashlib.sha256()

    def add(self, item: Item, held_out: bool = False):
        record = [self.place(item.file), item.captions, item.tags, item.described,
                  {name: self.place(file) for name, file in item.conditions.items()}]
        while not record[-1] and len(record) > 1:
            record.pop()
        words = encode(record).encode(errors="surrogatepass")
        bits = 0
        for name in item.conditions:
            bits |= 1 << self.names.setdefault(name, len(self.names))
        height, width = item.size or (0, 0)
        self.rows.write(PACK(self.start, item.label, height, width, min(len(item.texts), 65535),
                             min(len(item.tags), 65535), item.set, item.prior, held_out, bits))
        self.words.write(words)
        if not held_out:
            self.identity.update(repr((item.file and item.file.name, item.texts, item.tags, item.label)).encode(
                errors="surrogatepass"))
        self.start += len(words)
        self.count += 1
        self.held_out += held_out

    def place(self, file):
        if isinstance(file, InTar):
            if file.tar not in self.tars:
                self.starts.append(self.count)
            return [self.tars.setdefault(file.tar, len(self.tars)), file.name, file.offset, file.length]
        if isinstance(file, InRow):
            table = self.tables.setdefault((id(file.rows), file.column),
                                           (len(self.tables), file.path, file.rows, file.column))
            return [table[0], file.number]
        text = file and str(file)
        return text[len(self.prefix):] if text and text.startswith(self.prefix) else text and [text]

    def found(self, classes: Sequence[str] = (), left_out: Sequence[Path] = ()) -> Found:
        self.rows.write(PACK(self.start, *[0] * 9))
        if self.folder:
            for file in (self.rows, self.words):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            rows, words = mapped(self.folder)
        else:
            rows = np.frombuffer(self.rows.getbuffer(), ROW)
            words = np.frombuffer(self.words.getbuffer(), np.uint8)
        records = Records(self.home, [*self.tars], [table[1:] for table in self.tables.values()], [*self.names], rows,
                          words, self.identity.hexdigest()[:40], self.starts)
        return found_in(records, self.held_out, classes, left_out)


@dataclass(frozen=True)
class Found:
    train: Items
    held_out: Items
    classes: list[str] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    """Pictures in a folder whose formats are not read here."""


def found_in(records: Records, held_out: int, classes: Sequence[str], left_out: Sequence[Path]) -> Found:
    """held_out: how many of the items are."""
    count = len(records.rows) - 1
    train, held = range(count), range(0)
    if held_out:
        apart = records.rows["held_out"][:-1].astype(bool)
        train, held = (np.flatnonzero(some).astype(np.int32) for some in (~apart, apart))
    return Found(*(Items([Part(records, some)] if len(some) else []) for some in (train, held)), list(classes),
                 list(left_out))


# --- Listings that are kept

def kept(folder: Path, key: dict, read: Callable[[Path], Found]) -> Found:
    """What `read(an empty folder)` makes, which lists items there; or what it made before, for the same key. key: what
    the listing depends on, as JSON takes it, "of" what it is a listing of: an older one of that is removed."""
    start = hashlib.sha256(json.dumps(key["of"]).encode()).hexdigest()[:16]
    there = folder / f"{start}-{hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:16]}"
    if not there.is_dir():
        making = folder / f".{there.name}-{uuid.uuid4().hex[:8]}"
        try:
            found = read(making)
            if not found.train and not found.held_out:
                return found
            records = (found.train.parts or found.held_out.parts)[0].records
            facts = {"home": str(records.home), "tars": [*map(str, records.tars)], "names": records.names,
                     "digest": records.digest, "starts": records.starts, "held_out": len(found.held_out),
                     "classes": found.classes, "left_out": [*map(str, found.left_out)]}
            del found, records  # Windows renames nothing that is mapped
            (making / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            try:
                making.rename(there)
            except OSError:  # another process was first
                if not there.is_dir():
                    raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
        for old in folder.glob(f"{start}-*"):
            if old != there:
                shutil.rmtree(old, ignore_errors=True)
    facts = from_json((there / "facts.json").read_bytes(), str(there))
    records = Records(Path(facts["home"]), [Path(tar) for tar in facts["tars"]], [], facts["names"], *mapped(there),
                      facts["digest"], facts["starts"], there)
    return found_in(records, facts["held_out"], facts["classes"], [Path(file) for file in facts["left_out"]])


def mapped(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(rows, words) of a listing that was written."""
    words = folder / "words"
    return np.memmap(folder / "rows", ROW, "r"), np.memmap(words, np.uint8, "r") if words.stat().st_size else \
        np.empty(0, np.uint8)


# --- Items of several listings in a row

@dataclass(frozen=True)
class Part:
    """Some items of a listing, and what a run says of them. None: as the listing has it."""

    records: Records
    chosen: range | np.ndarray
    set: int | None = None
    prior: bool | None = None
    words: Callable[[Item], tuple[str, ...]] | None = None
    """Captions of an item that has none."""
    labels: np.ndarray | None = None
    """The label of a run for each of the listing."""

    def item(self, i: int) -> Item:
        item = self.records.item(int(self.chosen[i]), self)
        return replace(item, captions=self.words(item)) if self.words and not item.texts else item

    def column(self, name: str) -> np.ndarray:
        if (value := getattr(self, name, None)) is not None and name in ("set", "prior"):
            return np.full(len(self.chosen), value, ROW[name])
        chosen = self.chosen if isinstance(self.chosen, np.ndarray) else slice(self.chosen.start, self.chosen.stop)
        values = self.records.rows[name][chosen]
        if name == "label" and self.labels is not None:
            values = np.where(values < 0, values, self.labels[values])
        if name == "texts" and self.words:
            values = values.copy()
            for i in np.flatnonzero(values == 0):
                values[i] = len(self.item(i).texts)
        return values

    def has(self, condition: str) -> np.ndarray:
        """(N,) bool"""
        names = self.records.names
        bit = 1 << names.index(condition) if condition in names else 0
        return (self.column("conditions") & bit) > 0


class Items(Sequence[Item]):
    """Items in a row, made when they are asked for, so none is the same object twice."""

    def __init__(self, parts: Sequence[Part] = ()):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part.chosen) for part in self.parts], dtype=np.int64)

    @staticmethod
    def of(some: Sequence[Item]) -> Items:
        if isinstance(some, Items):
            return some
        listing = Listing(Path())
        for item in some:
            listing.add(item)
        return listing.found().train

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        number = int(np.searchsorted(self.ends, i, side="right"))
        part = self.parts[number]
        return part.item(i - int(self.ends[number]) + len(part.chosen))

    def __iter__(self) -> Iterator[Item]:
        return (part.item(i) for part in self.parts for i in range(len(part.chosen)))

    def __add__(self, others: Items) -> Items:
        return Items([*self.parts, *others.parts])

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def changed(self, **changes) -> Items:
        """changes: those of `Part`."""
        return Items([replace(part, **changes) for part in self.parts])

    def only(self, wanted: np.ndarray) -> Items:
        """Those for which `wanted`, (N,) bool, says so."""
        if wanted.all():
            return self
        pieces = np.split(wanted, self.ends[:-1])
        return Items([replace(part, chosen=np.asarray(part.chosen, np.int32)[piece])
                      for part, piece in zip(self.parts, pieces, strict=True) if piece.any()])

    def column(self, name: str) -> np.ndarray:
        """(N,) of the numbers in ROW."""
        return np.concatenate([part.column(name) for part in self.parts]) if self.parts else np.empty(0, ROW[name])

    def has(self, condition: str) -> np.ndarray:
        """(N,) bool: whether an item has a condition of this name."""
        return np.concatenate([part.has(condition) for part in self.parts]) if self.parts else np.empty(0, bool)

    def starts(self) -> np.ndarray:
        """The first item of each shard, or of each thousand where there are none."""
        found, first = [np.empty(0, np.int64)], 0
        for part in self.parts:
            whole = part.records.starts or range(0, len(part.records.rows) - 1, A_SHARD)
            chosen = part.chosen
            inside = np.searchsorted(chosen, whole) if isinstance(chosen, np.ndarray) else np.asarray(whole)
            found.append(first + np.unique(np.append(0, inside[inside < len(chosen)])))
            first += len(chosen)
        return np.concatenate(found)

    def at(self, indices) -> list[Item]:
        return [self[int(i)] for i in indices]


def spread(some: Sequence, most: int) -> Sequence:
    """At most so many of them, evenly spread."""
    return some if len(some) <= most else some[::-(-len(some) // most)]
