"""The ways in which people keep pictures with captions: every layout becomes a list of items.

A picture inside an archive is an item like any other, because it is read at its place: a batch is named by its step
(`loader.Batches`), so any picture may be asked for at any time, and a reader that only streams would not do.
"""
from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.schema import Data

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FILE_KEYS = ("file", "file_name", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
LISTED = 10
NOTHING: dict = {}


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


@dataclass(frozen=True, slots=True)  # a million of them is an ordinary data set
class Item:
    file: Path | InTar | InRow
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    label: int = -1
    described: tuple[str, ...] = ()
    """Captions that a model wrote, as Sigma's sharegpt4v; `data.described_share` mixes them with the others."""
    conditions: dict[str, Path | InTar | InRow] = field(default_factory=lambda: NOTHING)
    """What a ControlNet sees, by name, for the names in `data.conditions`."""
    size: tuple[int, int] | None = None
    """(height, width) where the data set says it."""
    prior: bool = False
    """A picture of `data.prior_path`: what the model must not forget (DreamBooth's class pictures)."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.captions + self.described


@dataclass(frozen=True)
class Found:
    train: list[Item]
    held_out: list[Item] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def listed(what: list, sentence: str, remedy: str = "") -> list[str]:
    """One complaint with its number and the first few cases, or none."""
    if not what:
        return []
    shown = [*map(str, what[:LISTED]), *([f"... and {len(what) - LISTED} more"] if len(what) > LISTED else []), remedy]
    return [f"{len(what)} {sentence}:" + "".join(f"\n    {line}" for line in shown if line)]


# --- One entry

def texts(entry) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,) if entry else ()
    if isinstance(entry, list):
        return tuple(text for one in entry if one for text in texts(one))
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no caption")
    return texts(next((entry[key] for key in CAPTION_KEYS if entry.get(key)), []))


def item_of(entry: dict, place: Callable[[str], Path], conditions: list[str]) -> Item:
    """An object of a jsonl or a label file. place: where a file lies that it names. Raises KeyError, TypeError."""
    key = next((key for key in FILE_KEYS if key in entry), FILE_KEYS[0])
    tags = entry.get("tags") or ()
    if isinstance(tags, str):  # as booru's are written
        tags = [tag.strip() for tag in tags.split(",") if tag.strip()]
    named = {**entry, **entry.get("conditions", {})}
    height, width = entry.get("height"), entry.get("width")
    return Item(
        place(entry[key]), texts(entry), tuple(tags), entry.get("class", -1),
        texts(entry.get("sharegpt4v") or []),
        {name: place(named[name]) for name in conditions if named.get(name)} or NOTHING,
        (int(height), int(width)) if height and width else None,
    )


def read_text(path: Path) -> str:
    """With or without the mark that Windows' editors put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from None


def condition_names(path: Path) -> list[str]:
    """The keys of a jsonl's first entry that name pictures, but for the picture itself."""
    first = next((line for line in read_text(path).split("\n") if line.strip()), "{}")
    try:
        entry = json.loads(first)
        entry = {**entry, **entry.get("conditions", {})}
    except (json.JSONDecodeError, AttributeError, TypeError):
        return []  # read_jsonl says it with the line
    return [key for key, value in entry.items() if key not in FILE_KEYS and isinstance(value, str)
            and Path(value).suffix.lower() in SUFFIXES]


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


# --- Layouts: (path, settings, classes of the training set or None) -> Found

def read_jsonl(path: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """One object a line: file (or file_name, image, path), captions (or caption, text, prompt), tags, class, split, and
    a key for every condition, as PixelPonder's (image, text, canny, depth, openpose, hed)."""
    splits, numbers = {"train": [], "held_out": []}, {name: i for i, name in enumerate(classes or ())}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # JSON may hold what else splitlines() splits at
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            item = item_of(entry, lambda name: path.parent / name, settings.conditions)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not an object with a \"file\" ({error}).") from None
        split = entry.get("split", "train")
        if split not in splits:
            raise ValueError(f"{path}, line {number}: split {split!r} is neither \"train\" nor \"held_out\".")
        if isinstance(item.label, str):
            item = replace(item, label=numbers.setdefault(item.label, len(numbers)))
        splits[split].append(item)
    return Found(splits["train"], splits["held_out"], list(numbers))


def pictures_in(folder: Path) -> list[Path]:
    """What other programs hide in folders or files that begin with a dot is not of the set."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                  and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def beside(folder: Path, file: Path, conditions: list[str]) -> dict[str, Path]:
    """The conditions of FOLDER/a/b.png: FOLDER/../NAME/a/b.png, of any kind of picture."""
    found = {}
    for name in conditions:
        stem = folder.parent / name / file.relative_to(folder)
        if there := next((p for s in sorted(SUFFIXES) if (p := stem.with_suffix(s)).is_file()), None):
            found[name] = there
    return found or NOTHING


def read_folder(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """Pictures, each with a .txt (a caption a line) or a .json ({"caption": ...}) of its name, in folders of any depth:
    UltraPixel's path/*/*.jpg too."""
    items, wrong = [], []
    for file in pictures_in(folder):
        text, facts = file.with_suffix(".txt"), file.with_suffix(".json")
        captions = ()
        try:
            if text.is_file():
                captions = tuple(line.strip() for line in read_text(text).splitlines() if line.strip())
            elif facts.is_file():
                captions = texts(read_json(facts))
        except ValueError as error:
            wrong.append(error if str(file.with_suffix("")) in str(error) else f"{facts}: {error}")
        items.append(Item(file, captions, conditions=beside(folder, file, settings.conditions)))
    if wrong:
        raise ValueError(f"{folder} cannot be read:\n  " + "\n  ".join(listed(wrong, "caption files are not readable")))
    return Found(items)


def read_classes(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """One folder per class (ImageNet)."""
    named = {p.name: pictures_in(p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    named = {name: files for name, files in named.items() if files}
    classes = list(named) if classes is None else classes
    if unknown := [name for name in named if name not in classes]:
        raise ValueError(f"{folder} cannot be used:\n  " + "\n  ".join(listed(
            unknown, "folders have the name of no class that is trained on", "Rename them, or take them out.")))
    number = {name: i for i, name in enumerate(classes)}
    return Found([Item(f, label=number[name]) for name, files in named.items() for f in files], classes=classes)


def read_sam(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """PixArt-alpha's SAM: images/STEM.jpg, captions/STEM.txt, and in partition/part*.txt the stems that count."""
    parts = sorted((folder / "partition").glob("part*.txt"))
    if not parts:
        raise ValueError(f"{folder} is no SAM layout: it has no partition/part*.txt with the stems of its pictures.")
    items = []
    for stem in (line.strip() for part in parts for line in read_text(part).splitlines()):
        if stem:
            text = folder / "captions" / f"{stem}.txt"
            words = read_text(text).split() if text.is_file() else ()
            items.append(Item(folder / "images" / f"{stem}.jpg", (" ".join(words),) if words else ()))
    return Found(items)


def read_labels(path: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """PixArt's data_info.json, alpha's InternData and Sigma's: a list of objects (path, prompt, sharegpt4v, height,
    width, ratio). Pictures lie in InternImgs beside it or beside its folder, or in its own folder."""
    entries = read_json(path)
    try:
        homes = [path.parent.parent / "InternImgs", path.parent / "InternImgs", path.parent]
        first = next((e[k] for e in entries[:1] for k in FILE_KEYS if k in e), "")
        home = next((h for h in homes if (h / first).is_file()), path.parent)
        return Found([item_of(entry, lambda name: home / name, settings.conditions) for entry in entries])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of objects with a \"path\" ({error}).") from None


def read_tars(path: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """WebDataset shards: in every .tar, KEY.jpg (or .png, ...) with KEY.txt or KEY.json, KEY.cls, and for a condition
    KEY.NAME.png."""
    tars = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    items = []
    for tar in tars:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    if member.isfile() and key:
                        samples.setdefault(f"{folder}/{key}", {})[kind.lower()] = member
                items += [item for sample in samples.values() if (item := in_tar(tar, archive, sample, settings))]
        except tarfile.ReadError as error:
            raise ValueError(f"{tar} cannot be read as a plain tar ({error}). Unpack it if it is compressed: pictures "
                             "are read at their places inside.") from None
    return Found(items)


def in_tar(tar: Path, archive: tarfile.TarFile, sample: dict[str, tarfile.TarInfo], settings: Data) -> Item | None:
    def picture(prefix: str) -> InTar | None:
        member = next((sample[k] for k in sample if k.startswith(prefix) and f".{k[len(prefix):]}" in SUFFIXES), None)
        return member and InTar(tar, member.name, member.offset_data, member.size)

    def text(kind: str) -> str:
        return archive.extractfile(sample[kind]).read().decode("utf-8-sig") if kind in sample else ""

    if not (file := picture("")):
        return None
    try:
        facts = json.loads(text("json") or "[]")
        label = int(text("cls") or -1)
        captions = tuple(line.strip() for line in text("txt").splitlines() if line.strip()) or texts(facts)
    except ValueError as error:
        raise ValueError(f"{tar}: the .txt, .json or .cls of {file.name} cannot be read ({error}).") from None
    described = texts(facts.get("sharegpt4v") or []) if isinstance(facts, dict) else ()
    conditions = {name: where for name in settings.conditions if (where := picture(f"{name}."))}
    return Item(file, captions, (), label, described, conditions or NOTHING)


def read_rows(path: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """A Hugging Face data set on disk (save_to_disk), or its parquet files (which the library unpacks once into its own
    cache, for rows to be read at any place). Splits other than train are held out."""
    try:
        import datasets
    except ImportError:
        raise ValueError("data.kind=\"datasets\" needs the package datasets: pip install datasets") from None
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        splits = datasets.load_from_disk(str(path))
    else:
        files: dict[str, list[str]] = {}
        for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
            split = re.split(r"[-_.]", file.name)[0].lower()
            other = split if split in ("validation", "val", "test") else "train"
            files.setdefault(other, []).append(str(file))
        if not files:
            raise ValueError(f"{path} holds neither a data set of save_to_disk nor parquet files.")
        splits = datasets.load_dataset("parquet", data_files=files)
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    if "train" not in splits:
        raise ValueError(f"{path} has no split named train, but {', '.join(splits)}.")
    other = next((name for name in ("validation", "val", "test") if name in splits), None)
    train, names = rows_of(path, splits["train"], settings)
    return Found(train, rows_of(path, splits[other], settings)[0] if other else [], names)


def rows_of(path: Path, rows, settings: Data) -> tuple[list[Item], list[str]]:
    from datasets import ClassLabel, Image

    def column(wanted) -> str | None:
        return next((name for name in rows.column_names if wanted(name)), None)

    image = column(lambda name: isinstance(rows.features[name], Image)) or column(
        lambda name: name.lower() in ("image", "img", "picture", "png", "jpg", "webp"))
    if image is None or any(name not in rows.column_names for name in settings.conditions):
        wanted = ", ".join(["a picture", *settings.conditions])
        raise ValueError(f"{path} has the columns {', '.join(rows.column_names)}; wanted are {wanted}.")
    pictures = {}
    for name in (image, *settings.conditions):
        pictures[name] = rows.select_columns([name]).cast_column(name, Image(decode=False))
    text, described = column(lambda name: name.lower() in CAPTION_KEYS), column(lambda name: name == "sharegpt4v")
    label = column(lambda name: isinstance(rows.features[name], ClassLabel))
    captions, longer, labels = (list(rows[c]) if c else None for c in (text, described, label))
    items = [Item(
        InRow(path, pictures[image], image, i), texts(captions[i] or []) if captions else (), (),
        labels[i] if labels else -1, texts(longer[i] or []) if longer else (),
        {name: InRow(path, pictures[name], name, i) for name in settings.conditions} or NOTHING,
    ) for i in range(len(rows))]
    return items, rows.features[label].names if label else []


READERS = {"jsonl": read_jsonl, "folder": read_folder, "classes": read_classes, "sam": read_sam,
           "data_info": read_labels, "datasets": read_rows, "webdataset": read_tars}


NAMED = {"data.jsonl": "jsonl", "metadata.jsonl": "jsonl", "data_info.json": "data_info",
         "InternData/data_info.json": "data_info", "partition/data_info.json": "data_info",
         "dataset_dict.json": "datasets", "state.json": "datasets"}
"""Files by which the layout of a folder is recognised."""
ENDINGS = {".jsonl": "jsonl", ".json": "data_info", ".parquet": "datasets", ".tar": "webdataset"}


def recognised(path: Path) -> tuple[str, Path]:
    """The layout of a file or folder, and where it begins."""
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path} is of no known kind: name a folder, or a {', '.join(ENDINGS)} file.")
        return ENDINGS[path.suffix.lower()], path
    for name, kind in NAMED.items():
        if (path / name).is_file():
            return kind, path if kind == "datasets" else path / name
    if (path / "partition").is_dir() and (path / "images").is_dir():
        return "sam", path
    for pattern, kind in (("*.tar", "webdataset"), ("*.parquet", "datasets")):
        if next(path.rglob(pattern), None):
            return kind, path
    pictures = pictures_in(path)
    captioned = any(p.with_suffix(s).is_file() for p in pictures for s in (".txt", ".json"))
    return "folder" if captioned or any(p.parent == path for p in pictures) else "classes", path


def read(path: Path, kind: str, settings: Data, classes: list[str] | None = None) -> Found:
    """The items of a data set as they are found, none looked into. Raises ValueError, FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if kind == "auto":
        kind, path = recognised(path)
    return READERS[kind](path, settings, classes)
