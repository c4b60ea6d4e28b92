"""The ways in which people keep pictures with captions: every layout becomes a list of items.

A picture inside an archive is an item like any other, because it is read at its place: a batch is named by its step
(`loader.Batches`), so any picture may be asked for at any time, and a reader that only streams would not do.
"""
from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...models_impl.folders import below
from ...models_impl.parsing import from_json, without_surrogates
from ...models_impl.pictures import readable, remedy
from ..config.schema import Data
from .items import NOTHING, Found, InRow, InTar, Item, Items, Listing, kept
from .mask_files import BESIDE, MASK, finder

FILE_KEYS = ("file", "file_name", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
CAPTION_FILES = (".txt", ".caption", ".json")  # beside a.png as a.txt or a.png.txt, in any case; the first with words
MASKS = (BESIDE, "-condlabel")  # how OneTrainer names what it keeps beside a picture
HELD_OUT = ("validation", "val", "valid", "dev", "test")  # splits of data sets beside train, of which the first counts
LARGEST = 2**20  # of a side that a data set states
DEEPEST = 10  # lists of captions in lists
LISTED = 10
READ_AT_ONCE = 1000  # rows of a Hugging Face data set


def listed(what: list, sentence: str, remedy: str = "") -> list[str]:
    """One complaint with its number and the first few cases, or none."""
    if not what:
        return []
    shown = [*map(str, what[:LISTED]), *([f"... and {len(what) - LISTED} more"] if len(what) > LISTED else []), remedy]
    return [f"{len(what)} {sentence}:" + "".join(f"\n    {line}" for line in shown if line)]


# --- One entry

def texts(entry, level: int = 0) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (without_surrogates(entry),) if entry else ()
    if level > DEEPEST or not isinstance(entry, list | dict):
        raise ValueError(f"{repr(entry)[:60]} is no caption")
    if isinstance(entry, list):
        return tuple(text for one in entry if one for text in texts(one, level + 1))
    return texts(next((entry[key] for key in CAPTION_KEYS if entry.get(key)), []), level + 1)


def tags_of(entry) -> tuple[str, ...]:
    if isinstance(entry, str):  # as booru's are written
        entry = [tag.strip() for tag in entry.split(",") if tag.strip()]
    if not isinstance(entry, list | tuple) or not all(isinstance(tag, str) for tag in entry):
        raise ValueError(f"tags {str(entry)[:60]!r} are neither a list of words nor words with commas between")
    return tuple(map(without_surrogates, entry))


def item_of(entry: dict, place: Callable[[str], Path], conditions: list[str]) -> Item:
    """An object of a jsonl or a label file. place: where a file lies that it names. Raises ValueError, TypeError,
    AttributeError, OverflowError for what is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"{repr(entry)[:60]} is no object")
    key = next((key for key in FILE_KEYS if key in entry), None)
    if key is None or not isinstance(entry[key], str):
        raise ValueError(f"{repr(entry.get(key))[:60]} names no file" if key else "it names no file")
    named = {**{name.removesuffix("_file_name"): value for name, value in entry.items()},  # as Hugging Face has several
             **entry, **(entry.get("conditions") or {})}
    size, label = None, entry.get("class", -1)
    if entry.get("height") and entry.get("width"):
        size = int(entry["height"]), int(entry["width"])
        if not all(0 < side <= LARGEST for side in size):
            raise ValueError(f"height={str(size[0])[:20]} and width={str(size[1])[:20]} are of no picture")
    if not isinstance(label, int | str) or isinstance(label, int) and not -1 <= label < LARGEST:
        raise ValueError(f"class={str(label)[:40]} is neither a number nor a name")
    return Item(
        place(entry[key]), texts(entry), tags_of(entry.get("tags") or ()), label,
        texts(entry.get("sharegpt4v") or []),
        {name: place(named[name]) for name in conditions if named.get(name)} or NOTHING, size,
    )


def numbered(item: Item, numbers: dict[str, int]) -> Item:
    """With a number for a class that is named; numbers: those known before, and after it those added."""
    return replace(item, label=numbers.setdefault(item.label, len(numbers))) if isinstance(item.label, str) else item


def read_text(path: Path) -> str:
    """With or without the mark that Windows' editors put first."""
    with as_text(path):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def as_text(path: Path):
    """Block that reads a file, which is named where it is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from None


def lines(path: Path) -> Iterator[str]:
    """The lines of a file one after the other, without their ends: JSON may hold what else splitlines() splits at."""
    with as_text(path), open(path, encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def condition_names(path: Path) -> list[str]:
    """The keys of a jsonl's first entry that name pictures, but for the picture itself."""
    first = next((line for line in lines(path) if line.strip()), "{}")
    try:
        entry = from_json(first, str(path))
        entry = {**entry, **entry.get("conditions", {})}
    except (ValueError, AttributeError, TypeError):
        return []  # read_jsonl says it with the line
    return [key for key, value in entry.items() if key not in FILE_KEYS and isinstance(value, str)
            and Path(value).suffix.lower() in readable()]


def read_json(path: Path):
    return from_json(read_text(path), str(path))


# --- Layouts: (path, settings, classes of the training set or None, folder for the listing or None) -> Found

def read_jsonl(path: Path, settings: Data, classes: list[str] | None = None, folder: Path | None = None) -> Found:
    """One object a line: file (or file_name, image, path), captions (or caption, text, prompt), tags, class, split, and
    a key for every condition, as PixelPonder's (image, text, canny, depth, openpose, hed)."""
    return of_entries(path, ((f"{path}, line {number}", line) for number, line in enumerate(lines(path), 1)
                             if line.strip()), settings, classes, folder)


def read_csv(path: Path, settings: Data, classes: list[str] | None = None, folder: Path | None = None) -> Found:
    """A Hugging Face folder's metadata.csv: a row for each picture, its columns a jsonl's keys (file_name, text)."""
    def entries(reader) -> Iterator[tuple[str, dict]]:
        for number, row in enumerate(reader, 1):
            entry = {name: value for name, value in row.items() if name is not None and value not in ("", None)}
            if entry.get("class", "").isdecimal():  # a CSV holds text
                entry["class"] = int(entry["class"][:20])
            yield f"{path}, row {number}", entry

    try:
        with as_text(path), open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if not set(reader.fieldnames or ()) & set(FILE_KEYS):
                raise ValueError(f"{path} is of no known kind: none of its columns is {', '.join(FILE_KEYS)}.")
            return of_entries(path, entries(reader), settings, classes, folder)
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV: {error}.") from None


def read_table(path: Path, settings: Data, classes: list[str] | None = None, folder: Path | None = None) -> Found:
    """A Hugging Face folder's metadata.parquet, with the same columns."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow, or write the list as metadata.csv."
                         ) from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            return of_entries(path, ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1)), settings, classes,
                              folder)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not valid parquet: {error}.") from None


def of_entries(path: Path, entries: Iterable[tuple[str, Any]], settings: Data, classes: list[str] | None,
               folder: Path | None) -> Found:
    """entries: where each stands, and what it says, as a line of JSON or read already. Paths in them begin at the
    folder of the list. All that is wrong is said at once."""
    listing, numbers, wrong = Listing(path.parent, folder), {name: i for i, name in enumerate(classes or ())}, []
    for where, entry in entries:
        try:
            entry = from_json(entry, where) if isinstance(entry, str) else entry
            item = item_of(entry, lambda name: path.parent / name, settings.beside)
            split = entry.get("split", "train")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            wrong.append(f"{where}: not an object with a \"file\" ({error}).")
            continue
        if split not in ("train", "held_out"):
            wrong.append(f"{where}: split {str(split)[:40]!r} is neither \"train\" nor \"held_out\".")
            continue
        listing.add(numbered(item, numbers), split == "held_out")
    if len(wrong) == 1:
        raise ValueError(wrong[0])
    if wrong:
        raise ValueError(f"{path} cannot be read:\n  " + "\n  ".join(listed(wrong, "entries are wrong")))
    return listing.found([*numbers])


def pictures_in(folder: Path) -> list[Path]:
    """What other programs hide in folders or files that begin with a dot is not of the set, nor are OneTrainer's masks
    and conditions beside a picture."""
    return sorted(p for p in below(folder) if p.suffix.lower() in readable() and not is_mask(p) and p.is_file())


def unread_in(folder: Path) -> list[Path]:
    """Pictures of formats that are not read here."""
    return sorted(file for file in below(folder) if remedy(file.suffix.lower()))


def is_mask(file: Path) -> bool:
    return file.stem.lower().endswith(MASKS)


def conditions_beside(folder: Path, conditions: list[str]) -> dict[str, dict[Path, Path]]:
    """Where the conditions of a folder's pictures lie: name -> a/b -> FOLDER/../NAME/a/b.png, or another ending."""
    return {name: {file.relative_to(place).with_suffix(""): file for file in reversed(pictures_in(place))}
            for name in conditions if (place := folder.parent / name).is_dir()}


def captions_beside(folder: Path) -> dict[tuple[Path, str], Path]:
    """Files that may hold captions, as (path without ending, ending in small letters)."""
    return {(file.with_suffix(""), file.suffix.lower()): file for file in sorted(below(folder))
            if file.suffix.lower() in CAPTION_FILES}


def read_folder(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """Pictures, each with a .txt or .caption (a caption a line) or a .json ({"caption": ...}) of its name, with or
    without the picture's own ending in between, in folders of any depth: UltraPixel's path/*/*.jpg too."""
    listing, wrong, there = Listing(folder), [], captions_beside(folder)
    conditions = conditions_beside(folder, settings.conditions)
    for file in pictures_in(folder):
        captions, tags = (), ()
        for text in (there[key] for ending in CAPTION_FILES for stem in (file.with_suffix(""), file)
                     if (key := (stem, ending)) in there):
            try:
                captions, more = caption_file(text)
                tags = tags or more
            except ValueError as error:
                wrong.append(error if str(text) in str(error) else f"{text}: {error}")
                break
            if captions:
                break
        place = file.relative_to(folder).with_suffix("")
        mine = {name: files[place] for name, files in conditions.items() if place in files}
        listing.add(Item(file, captions, tags, conditions=mine or NOTHING))
    if wrong:
        raise ValueError(f"{folder} cannot be read:\n  " + "\n  ".join(listed(wrong, "caption files are not readable")))
    return listing.found(left_out=unread_in(folder))


def caption_file(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(captions, tags) of a file beside a picture. Raises ValueError."""
    if file.suffix.lower() != ".json":
        return tuple(line.strip() for line in read_text(file).splitlines() if line.strip()), ()
    facts = read_json(file)
    return texts(facts), tags_of(facts.get("tags") or ()) if isinstance(facts, dict) else ()


def read_splits(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """A Hugging Face folder whose splits are folders: train, and what is held out in the first of HELD_OUT, each in any
    layout."""
    train = read(folder / "train", "auto", settings, classes)
    other = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    held_out = read(other, "auto", settings, train.classes or None).train if other else Items()
    return Found(train.train, train.held_out + held_out, train.classes, train.left_out)


def read_classes(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """One folder per class (ImageNet)."""
    named = {p.name: pictures_in(p) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    named = {name: files for name, files in named.items() if files}
    classes = list(named) if classes is None else classes
    if unknown := [name for name in named if name not in classes]:
        raise ValueError(f"{folder} cannot be used:\n  " + "\n  ".join(listed(
            unknown, "folders have the name of no class that is trained on", "Rename them, or take them out.")))
    listing, number = Listing(folder), {name: i for i, name in enumerate(classes)}
    for name, files in named.items():
        for file in files:
            listing.add(Item(file, label=number[name]))
    return listing.found(classes, unread_in(folder))


def read_sam(folder: Path, settings: Data, classes: list[str] | None = None) -> Found:
    """PixArt-alpha's SAM: images/STEM.jpg, captions/STEM.txt, and in partition/part*.txt the stems that count."""
    parts = sorted((folder / "partition").glob("part*.txt"))
    if not parts:
        raise ValueError(f"{folder} is no SAM layout: it has no partition/part*.txt with the stems of its pictures.")
    listing = Listing(folder)
    for stem in (line.strip() for part in parts for line in read_text(part).splitlines()):
        if stem:
            text = folder / "captions" / f"{stem}.txt"
            words = read_text(text).split() if text.is_file() else ()
            listing.add(Item(folder / "images" / f"{stem}.jpg", (" ".join(words),) if words else ()))
    return listing.found()


def read_labels(path: Path, settings: Data, classes: list[str] | None = None, folder: Path | None = None) -> Found:
    """PixArt's data_info.json, alpha's InternData and Sigma's: a list of objects (path, prompt, sharegpt4v, height,
    width, ratio). Pictures lie in InternImgs beside it or beside its folder, or in its own folder. Or kohya's metadata:
    an object for each picture, by its path or its name without ending."""
    entries = read_json(path)
    if isinstance(entries, dict):
        return read_kohya(path, entries, folder)
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds {repr(entries)[:60]}, where a list or a table of pictures belongs.")
    try:
        homes = [path.parent.parent / "InternImgs", path.parent / "InternImgs", path.parent]
        first = next((e[k] for e in entries[:1] if isinstance(e, dict) for k in FILE_KEYS if k in e), "")
        home = next((h for h in homes if (h / str(first)).is_file()), path.parent)
        numbers = {name: i for i, name in enumerate(classes or ())}
        listing = Listing(home, folder)
        for entry in entries:
            listing.add(numbered(item_of(entry, lambda name: home / name, settings.beside), numbers))
        return listing.found([*numbers])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a list of objects with a \"path\" ({error}).") from None


def read_kohya(path: Path, entries: dict, folder: Path | None = None) -> Found:
    """The metadata of kohya's scripts: {"a/b.png" or "b": {"caption": ..., "tags": "one, two"}, ...}. Where there are
    only tags, they are the caption, as there."""
    named: dict[str, list[Path]] = {}
    for file in pictures_in(path.parent):
        named.setdefault(file.stem, []).append(file)
    listing, several = Listing(path.parent, folder), []
    for key, facts in entries.items():
        try:
            captions, tags = texts(facts), tags_of(facts.get("tags") or ())
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: what it says of {key[:80]!r} is no object with a caption ({error}).") from None
        file, same = path.parent / key, named.get(Path(key).name, named.get(Path(key).stem, []))
        if not file.is_file() and same:
            several += [f"{key}: {', '.join(map(str, same[:3]))}"] if len(same) > 1 else []
            file = same[0]
        listing.add(Item(file, captions or ((", ".join(tags),) if tags else ()), tags if captions else ()))
    if several:
        raise ValueError(f"{path} cannot be read:\n  " + "\n  ".join(listed(
            several, "names are those of several pictures", "Make the metadata again with full paths (--full_path).")))
    return listing.found()


def tars_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in below(path) if file.suffix.lower() == ".tar")


def read_tars(path: Path, settings: Data, classes: list[str] | None = None, folder: Path | None = None) -> Found:
    """WebDataset shards: in every .tar, KEY.jpg (or .png, ...) with KEY.txt or KEY.json, KEY.cls, and for a condition
    KEY.NAME.png."""
    listing = Listing(path, folder)
    for tar in tars_in(path):
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    above, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    if member.isfile() and key and not key.lower().endswith(MASKS):
                        samples.setdefault(f"{above}/{key}", {})[kind.lower()] = member
                for sample in samples.values():
                    if item := in_tar(tar, archive, sample, settings):
                        listing.add(item)
        except tarfile.ReadError as error:
            raise ValueError(f"{tar} cannot be read as a plain tar ({error}). Unpack it if it is compressed: pictures "
                             "are read at their places inside.") from None
    return listing.found()


def in_tar(tar: Path, archive: tarfile.TarFile, sample: dict[str, tarfile.TarInfo], settings: Data) -> Item | None:
    def picture(prefix: str) -> InTar | None:
        member = next((sample[k] for k in sample if k.startswith(prefix) and f".{k[len(prefix):]}" in readable()), None)
        return member and InTar(tar, member.name, member.offset_data, member.size)

    def text(*kinds: str) -> str:
        """The first of these that is not empty; beside a.png also as a.png.txt."""
        own = file.name.rpartition("/")[2].partition(".")[2].lower()
        members = [sample[k] for kind in kinds for k in (kind, f"{own}.{kind}") if k in sample]
        if any(member.size > LARGEST for member in members):
            raise ValueError(f"a text of more than {LARGEST:,} bytes")
        return next(filter(str.strip, (archive.extractfile(m).read().decode("utf-8-sig") for m in members)), "")

    if not (file := picture("")):
        return None
    try:
        facts = from_json(text("json") or "[]", "the .json")
        label = int((text("cls") or "-1")[:20])
        captions = tuple(line.strip() for line in text("txt", "caption").splitlines() if line.strip()) or texts(facts)
    except ValueError as error:
        raise ValueError(f"{tar}: the .txt, .json or .cls of {file.name} cannot be read ({error}).") from None
    described = texts(facts.get("sharegpt4v") or []) if isinstance(facts, dict) else ()
    conditions = {name: where for name in settings.beside if (where := picture(f"{name}."))}
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
        for file in [path] if path.is_file() else sorted(f for f in below(path) if f.suffix.lower() == ".parquet"):
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
    return Found(train, rows_of(path, splits[other], settings)[0] if other else Items(), names)


def rows_of(path: Path, rows, settings: Data) -> tuple[Items, list[str]]:
    from datasets import ClassLabel, Image

    def column(wanted) -> str | None:
        return next((name for name in rows.column_names if wanted(name)), None)

    image = column(lambda name: isinstance(rows.features[name], Image)) or column(
        lambda name: name.lower() in ("image", "img", "picture", "png", "jpg", "webp"))
    if image is None or any(name not in rows.column_names for name in settings.beside):
        wanted = ", ".join(["a picture", *settings.beside])
        raise ValueError(f"{path} has the columns {', '.join(rows.column_names)}; wanted are {wanted}.")
    pictures = {}
    for name in (image, *settings.beside):
        pictures[name] = rows.select_columns([name]).cast_column(name, Image(decode=False))
    text, described = column(lambda name: name.lower() in CAPTION_KEYS), column(lambda name: name == "sharegpt4v")
    label = column(lambda name: isinstance(rows.features[name], ClassLabel))
    words, listing = rows.select_columns([c for c in (text, described, label) if c]), Listing(path)
    for i in range(len(rows)):
        if i % READ_AT_ONCE == 0 and words.column_names:
            some = words[i:i + READ_AT_ONCE]
        captions, longer, labels = (some[c][i % READ_AT_ONCE] if c else None for c in (text, described, label))
        listing.add(Item(
            InRow(path, pictures[image], image, i), texts(captions or []), (), -1 if labels is None else labels,
            texts(longer or []), {name: InRow(path, pictures[name], name, i) for name in settings.beside} or NOTHING))
    return listing.found().train, rows.features[label].names if label else []


READERS = {"jsonl": read_jsonl, "folder": read_folder, "classes": read_classes, "sam": read_sam,
           "data_info": read_labels, "datasets": read_rows, "webdataset": read_tars, "csv": read_csv,
           "table": read_table, "splits": read_splits}


NAMED = {"data.jsonl": "jsonl", "metadata.jsonl": "jsonl", "metadata.csv": "csv", "metadata.parquet": "table",
         "data_info.json": "data_info", "InternData/data_info.json": "data_info",
         "partition/data_info.json": "data_info", "meta_lat.json": "data_info", "meta_clean.json": "data_info",
         "meta_cap_dd.json": "data_info", "meta_cap.json": "data_info", "dataset_dict.json": "datasets",
         "state.json": "datasets"}
"""Files by which the layout of a folder is recognised; those of kohya's scripts from the last that they write on."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ENDINGS = {".jsonl": "jsonl", ".json": "data_info", ".csv": "csv", ".parquet": "datasets", ".tar": "webdataset"}


def recognised(path: Path) -> tuple[str, Path]:
    """The layout of a file or folder, and where it begins."""
    if path.is_file():
        if path.name == "metadata.parquet":
            return "table", path
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path} is of no known kind: name a folder, or a {', '.join(ENDINGS)} file.")
        return ENDINGS[path.suffix.lower()], path
    for name, kind in NAMED.items():
        if (path / name).is_file():
            return kind, path if kind == "datasets" else path / name
    if (path / "partition").is_dir() and (path / "images").is_dir():
        return "sam", path
    if (path / "train").is_dir() and any((path / name).is_dir() for name in HELD_OUT):
        return "splits", path
    if (path / "train").is_dir() and any((path / "train" / name).is_file() for name in METADATA):
        return "splits", path
    endings = {file.suffix.lower() for file in below(path)}
    for ending, kind in ((".tar", "webdataset"), (".parquet", "datasets")):
        if ending in endings:
            return kind, path
    pictures, texts_there = pictures_in(path), captions_beside(path)
    captioned = any((stem, ending) in texts_there for p in pictures for stem in (p.with_suffix(""), p)
                    for ending in CAPTION_FILES)
    return "folder" if captioned or any(p.parent == path for p in pictures) else "classes", path


def with_masks(items: Items, root: Path) -> Items:
    """The items with the masks that lie beside their files; what is a mask itself is no item."""
    mask_of, listing = finder(root), Listing(root)
    masks = {mask for item in items if (mask := mask_of(item))}
    for item in items:
        if item.file not in masks:
            mask = mask_of(item)
            listing.add(replace(item, conditions={**item.conditions, MASK: mask}) if mask else item)
    return listing.found().train


LISTS = ("jsonl", "csv", "table", "data_info", "webdataset")
"""Layouts whose listing may be kept: what they say is in few files, whose sizes and times tell whether it is new."""


def read(path: Path, kind: str, settings: Data, classes: list[str] | None = None) -> Found:
    """The items of a data set as they are found, none looked into. Raises ValueError, FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if kind == "auto":
        kind, path = recognised(path)
    if kind in LISTS and settings.index and (settings.masks != "files" or kind == "webdataset"):
        files = tars_in(path) if kind == "webdataset" else [path]
        key = {"of": [kind, str(path.resolve()), str(path), settings.beside], "classes": classes, "files": [
            [str(file), state.st_size, state.st_mtime_ns] for file in files for state in [file.stat()]]}
        return kept(Path(settings.index).expanduser(), key,
                    lambda folder: READERS[kind](path, settings, classes, folder))
    found = READERS[kind](path, settings, classes)
    if settings.masks != "files":
        return found
    root = path if path.is_dir() else path.parent
    return replace(found, train=with_masks(found.train, root), held_out=with_masks(found.held_out, root))
