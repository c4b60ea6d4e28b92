"""`python -m trainer doctor DATA`: everything that is wrong with pictures and captions, before a run meets it.

Every picture is decoded once. Alike are those whose difference hashes (64 bits: is a cell of the shrunk grey picture
brighter than its left neighbour) differ in at most 3 bits and whose 8 x 8 thumbnails differ by at most 6 of 255 in the
mean; two hashes so near share one of four 16-bit quarters, so not every pair is compared.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...models_impl.folders import below
from ...models_impl.pictures import readable, remedy
from ...models_impl.text.captions import clean_caption
from ..config import data_sets, rules
from ..config.load import build, put, value_of
from ..config.schema import Config, Data, DataSet
from . import buckets, layouts, loader, pictures, sets, wording
from .layouts import LISTED, Item

LIMITS = (120, 300, 512)  # tokens: PixArt-alpha; PixArt-Sigma; PixelFlow and FLUX
NEAR_BITS, NEAR_MEAN = 3, 6
CROPPED = 0.25  # share of a picture that is cropped away, from which on it is worth a remark
LISTS = (".csv", ".tsv", ".jsonl", ".parquet", ".yaml", ".xml")  # that may hold captions
FLAT = 2  # a condition whose values lie no further apart shows nothing


@dataclass(frozen=True)
class Finding:
    error: bool
    """It stops a run, or makes it learn what is wrong."""
    sentence: str
    cases: list[str]
    fix: str

    def lines(self, most: int = LISTED) -> list[str]:
        more = [f"... and {len(self.cases) - most:,} more"] if len(self.cases) > most else []
        return [f"{len(self.cases):,} {self.sentence}:", *(f"    {c}" for c in [*self.cases[:most], *more]),
                f"    fix: {self.fix}"]


@dataclass
class Report:
    summary: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, error: bool, cases, sentence: str, fix: str):
        if cases := [str(case) for case in cases]:
            self.findings.append(Finding(error, sentence, cases, fix))

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.error]

    def lines(self) -> list[str]:
        lines = list(self.summary)
        for name, some in (("errors", self.errors), ("remarks", [f for f in self.findings if not f.error])):
            if some:
                lines += ["", name, *(f"  {line}" for finding in some for line in finding.lines())]
        return lines

    def as_json(self) -> str:
        return json.dumps({"summary": self.summary, "findings": [asdict(f) for f in self.findings]}, indent=2,
                          ensure_ascii=False)


@dataclass(frozen=True)
class Looked:
    """What one picture turned out to be."""

    why: str = ""
    """Why it cannot be read."""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    hash: int = 0
    thumbnail: np.ndarray | None = None
    """(8, 8, 3) uint8"""
    said: str = ""
    """The size that the data set says, where it is wrong."""
    misaligned: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def look(item: Item) -> Looked:
    try:
        picture = pictures.decode(item.file, advice="")
    except ValueError as error:
        return Looked(why=str(error))
    size = picture.height, picture.width
    digest = hashlib.sha256(f"{size}".encode() + picture.tobytes()).digest()
    misaligned, resized, blank, unreadable = [], [], [], []
    for file in item.conditions.values():
        if isinstance(file, Path) and not file.is_file():
            continue  # said as missing
        try:
            condition = pictures.decode(file, advice="")
        except ValueError as error:
            unreadable.append(str(error))
            continue
        other = condition.height, condition.width
        if other != size:
            words = f"{file} is {other[1]}x{other[0]}, {item.file} is {size[1]}x{size[0]}"
            (resized if pictures.aligned(other, size) else misaligned).append(words)
        if max(high - low for low, high in condition.getextrema()) <= FLAT:
            blank.append(str(file))
    said = f"{item.file} is {size[1]}x{size[0]}, not {item.size[1]}x{item.size[0]}" if item.size not in (None, size) \
        else ""
    return Looked("", size, digest, difference_hash(picture), thumbnail(picture), said, tuple(misaligned),
                  tuple(resized), tuple(blank), tuple(unreadable))


def difference_hash(picture: Image.Image) -> int:
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.BOX), np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def thumbnail(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((8, 8), Image.BOX))


def alike(looked: list[Looked]) -> list[tuple[int, int]]:
    """Pairs (index, an earlier index that it is like) among pictures that were read; equal ones are not named."""
    firsts: dict[int, list[int]] = {}  # of every hash the pictures that are not like one before
    quarters: dict[tuple[int, int], list[int]] = {}
    pairs, known = [], set()
    for index, one in enumerate(looked):
        if one.why or one.digest in known:
            continue
        known.add(one.digest)
        parts = [(k, one.hash >> 16 * k & 0xFFFF) for k in range(4)]
        near = {h for part in parts for h in quarters.get(part, ()) if (h ^ one.hash).bit_count() <= NEAR_BITS}
        match = next((i for h in sorted(near) for i in firsts[h] if same_thumbnail(looked[i], one)), None)
        if match is not None:
            pairs.append((index, match))
            continue
        if one.hash not in firsts:
            for part in parts:
                quarters.setdefault(part, []).append(one.hash)
        firsts.setdefault(one.hash, []).append(index)
    return pairs


def same_thumbnail(one: Looked, other: Looked) -> bool:
    difference = one.thumbnail.astype(np.int16) - other.thumbnail
    return float(np.abs(difference).mean()) <= NEAR_MEAN


# --- Tokens

@dataclass(frozen=True)
class Tokens:
    count: Callable[[str], int]
    exact: bool
    limits: tuple[int, ...] = LIMITS


def estimated(caption: str) -> int:
    """T5's tokens, guessed: one for a sign or up to six letters, and the end. On English prose 1 % off, on technical
    text up to 15 % too few."""
    return 1 + sum(-(-len(part) // 6) for part in re.findall(r"\w+|[^\w\s]", caption))


def tokens_of(path: Path) -> Tokens:
    """The tokenizer of a tokenizer.json, or of a folder that transformers reads."""
    if path.is_file():
        from ...models_impl.text import shapes

        reader = shapes.tokenizer_of(path)
        reader.no_truncation()
        reader.no_padding()
        return Tokens(lambda caption: len(reader.encode(caption).ids), True)
    from transformers import AutoTokenizer

    from ..libraries import LOCAL

    try:
        reader = AutoTokenizer.from_pretrained(path, **LOCAL)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer.json, nor a folder with a tokenizer: {error}") from None
    return Tokens(lambda caption: len(reader(caption, verbose=False).input_ids), True)


def tokens_of_recipe(config: Config) -> Tokens | None:
    """None for a text encoder whose vocabulary the captions make, where there are none."""
    from ..features import text_encoders

    collection = loader.read(config.data, need="", strict=False)
    captions = [t for i in collection.train for t in (*i.texts, *i.tags)]
    if not captions and config.text.encoder == "small":
        return None
    text = text_encoders.make(config, captions, None)
    limits = (text.places if isinstance(text, text_encoders.FrozenClip) else config.text.max_length,)
    if isinstance(text, text_encoders.FROZEN):
        read = clean_caption if isinstance(text, text_encoders.FrozenT5) and text.clean else str
        return Tokens(lambda caption: len(text.tokens(read(caption), verbose=False).input_ids), True, limits)
    text.tokenizer.no_truncation()
    return Tokens(lambda caption: len(text.tokenizer.encode(caption).ids), True, limits)


# --- The examination

def settings_of(path: Path, words: list[str]) -> Data:
    """The settings of data that are looked at without a recipe: words are `data.key=value`, and conditions are those
    that a jsonl's entries name. Raises ValueError."""
    problems: list[str] = []
    raw = {"data": {"path": str(path)}}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.startswith("data."):
            problems.append(f"{word!r}: without --recipe, settings are written data.key=value.")
        else:
            problems += put(raw, name, value_of(value))
    settings = build(Data, raw["data"], {}, problems, "data.")
    if settings:
        problems += [*data_sets.problems(settings), *rules.data(settings, settings.bucket_group or 1, 0)]
    if problems:
        raise ValueError("these settings cannot work:\n  " + "\n  ".join(problems))
    if not settings.conditions and settings.kind in ("auto", "jsonl"):
        kind, file = layouts.recognised(path)
        if kind == "jsonl":
            settings = replace(settings, conditions=layouts.condition_names(file))
    return settings


def examine(settings: Data, need: str, tokens: Tokens | None = None, batch_size: int = 1, micro: int = 0,
            progress=lambda items, total: items) -> Report:
    """need: "captions", "classes", "pictures" for neither, or "" for whichever the data have."""
    report = Report()
    collection = loader.read(settings, need="", strict=False)
    items = [*collection.train, *collection.held_out]
    held = set(map(id, items[len(collection.train):]))
    need = need or ("classes" if all(i.label >= 0 and not i.texts for i in items) else "captions")
    missing = {id(i) for i in items if isinstance(i.file, Path) and not i.file.is_file()}
    with ThreadPoolExecutor(settings.workers) as pool:
        there = [i for i in items if id(i) not in missing]
        looked = list(progress(pool.map(look, there), len(there)))
    report.summary += [loader.summary(collection), *sets.counted(collection.train, collection.held_out, settings)]
    files(report, settings, items, missing, there, looked)
    for one in settings.each:
        passed_over(report, one, settings)
    doubles(report, there, looked, held)
    conditions(report, settings, items, looked)
    words(report, settings, items, need, tokens or Tokens(estimated, False))
    read = [(i, one) for i, one in zip(there, looked, strict=True) if not one.why]
    shapes(report, settings, read, held, batch_size, micro)
    return report


def files(report: Report, settings: Data, items, missing, there, looked):
    report.add(True, [i.file for i in items if id(i) in missing], "pictures are named but not there",
               "bring them back, or take their entries out.")
    report.add(True, [one.why for one in looked if one.why], "pictures cannot be read",
               "replace them, or take them out.")
    report.add(False, [one.said for one in looked if one.said], "pictures have another size than the data set says",
               "correct height and width (they choose the bucket), or leave them out.")
    report.add(True, [f"{i.file} is {one.size[1]}x{one.size[0]}" for i, one in zip(there, looked, strict=True)
                      if settings.each[i.set].crop == "none" and not one.why and one.size[0] != one.size[1]],
               "pictures are not square, and data.crop is none",
               "set data.crop to centre or random, or crop them yourself.")


def passed_over(report: Report, one: DataSet, settings: Data):
    """What lies in a folder and is not of the set, though somebody may think so."""
    path = Path(one.path).expanduser()
    kind = layouts.recognised(path)[0] if one.kind == "auto" else one.kind
    folders = [path / "train"] if kind == "splits" else [path] if kind in ("folder", "classes") else []
    rest = [file for folder in folders for file in sorted(below(folder))]
    pictured = {file.with_suffix("") for file in rest if file.suffix.lower() in readable()}
    unread = [file for file in rest if remedy(file.suffix.lower())]
    for how in dict.fromkeys(remedy(file.suffix.lower()) for file in unread):
        report.add(False, [file for file in unread if remedy(file.suffix.lower()) == how],
                   "pictures are of a format that is not read, and are left out", how[0].lower() + how[1:])
    read = layouts.BESIDE if settings.masks == "files" else "\0"
    report.add(False, [file for file in rest if file.suffix.lower() in readable() and layouts.is_mask(file)
                       and not file.stem.lower().endswith(read)],
               "pictures are masks or conditions of another program by their names, and are left out",
               f"rename them, if they are to be trained on: without {' or '.join(layouts.MASKS)} at the end.")
    known = pictured | {file.with_suffix("") for file in unread}
    report.add(False, [file for file in rest if file.suffix.lower() in layouts.CAPTION_FILES
                       and not known & {file.with_suffix(""), file.with_suffix("").with_suffix("")}],
               "captions have no picture of their name", "bring the pictures, or take the files away.")
    report.add(False, [file for file in rest if file.suffix.lower() in LISTS],
               "lists in the folder are not read", "name one itself as data.path, or remove it.")


def doubles(report: Report, there, looked, held):
    first: dict[bytes, Item] = {}
    equal, both = [], []
    for item, one in zip(there, looked, strict=True):
        if not one.why and (other := first.setdefault(one.digest, item)) is not item:
            equal.append(f"{item.file} = {other.file}")
            if (id(item) in held) != (id(other) in held):
                both.append(equal[-1])
    report.add(True, both, "held-out pictures are trained on as well", "take them out of one of the two.")
    report.add(False, equal, "pictures are there twice", "keep one of each; write the captions of all with it.")
    pairs = [f"{there[a].file} ~ {there[b].file}" for a, b in alike(looked)]
    report.add(False, pairs, "pictures look almost the same as another",
               "keep the better one, unless they are meant to be there.")


def conditions(report: Report, settings: Data, items, looked):
    for name in settings.conditions:
        report.add(True, [i.file for i in items if not i.prior and name not in i.conditions],
                   f"pictures have no condition {name!r}", "make it, or take it out of data.conditions.")
        report.add(True, [f for i in items if isinstance(f := i.conditions.get(name), Path) and not f.is_file()],
                   f"conditions {name!r} are named but not there", "make them, or take the pictures out.")

    def of(field: str) -> list[str]:
        return [words for one in looked for words in getattr(one, field)]

    report.add(True, of("unreadable"), "conditions cannot be read", "make them anew.")
    report.add(True, of("misaligned"), "conditions have another shape than their picture",
               "make them anew from the picture; cropping by guess would leave them shifted.")
    report.add(False, of("resized"), "conditions have another size than their picture, in the same shape",
               "nothing need be done: they are resized with it. Sharper are those made at its size.")
    report.add(False, of("blank"), "conditions show nothing, they are of one colour",
               "look whether the detector failed; nothing can be learnt from them.")


def shared(one: DataSet, item: Item) -> set[str]:
    """The captions that its settings give to pictures of a set that have none, and so to several."""
    return {one.caption, *([wording.of_name(item.file)] if one.name_captions else [])}


def words(report: Report, settings: Data, items, need: str, tokens: Tokens):
    if need == "pictures":
        return None
    if need == "classes":
        return report.add(True, [i.file for i in items if i.label < 0], "pictures have no class",
                          "put them into folders of classes, or write \"class\" into the jsonl.")
    report.add(True, [i.file for i in items if not i.texts], "pictures have no caption",
               "write a .txt beside each, run `python -m trainer caption`, or set data.caption, which all without one "
               "get.")
    uses = Counter(text for i in items for text in i.texts)
    meant = {text for i in items for text in shared(settings.each[i.set], i)}
    report.add(False, [f"{text!r}: {n:,} pictures" for text, n in uses.most_common() if n > 1 and text not in meant],
               "captions name several pictures", "say what distinguishes them, if the model is to.")
    lengths = {text: tokens.count(text) for text in uses}
    how = "" if tokens.exact else "about "
    fix = "shorten them; what matters most comes first." + (
        "" if tokens.exact else " This is an estimate: name the T5 tokenizer with --tokenizer to be sure.")
    for limit in tokens.limits:
        long = sorted((n, text) for text, n in lengths.items() if n > limit)[::-1]
        report.add(False, [f"{how}{n} tokens: {text[:80]!r}" for n, text in long],
                   f"captions are longer than {limit} tokens and will be cut", fix)
    if lengths:
        report.summary.append(f"captions   {len(uses):,} different, the longest {how}{max(lengths.values())} tokens")


def shapes(report: Report, settings: Data, read: list[tuple[Item, Looked]], held, batch_size: int, micro: int):
    """The table of sizes, and what resizing and cropping to them costs."""
    shown = {size: buckets.nearest(settings, *size) for size in {one.size for _, one in read}}
    small, cropped = [], []
    for item, one in read:
        (H, W), (h, w) = one.size, shown[one.size]
        share = max(h / H, w / W)
        if share > 1:
            small.append((share, f"{item.file} is {W}x{H}, shown at {w}x{h}"))
        lost = 1 - h * w / (H * share * W * share)
        if lost > CROPPED and settings.each[item.set].crop != "none":
            cropped.append((lost, f"{item.file} is {W}x{H}, shown at {w}x{h}: {lost:.0%} is lost"))
    report.add(False, [words for _, words in sorted(small, key=lambda one: -one[0])],
               f"pictures are smaller than what they are shown at (data.resolution="
               f"{'/'.join(map(str, settings.sides))}) and will be enlarged",
               "use larger ones, or a smaller data.resolution.")
    report.add(False, [words for _, words in sorted(cropped, key=lambda one: -one[0])],
               "pictures lose much to the crop",
               f"set data.buckets{' to a rule that reaches them' * bool(settings.buckets)}, or crop them yourself.")
    count = Counter(shown[one.size] for item, one in read if id(item) not in held and not item.prior)
    if len(buckets.sizes(settings)) > 1:
        group = settings.bucket_group or batch_size
        report.summary.append("sizes      " + ", ".join(f"{w}x{h}: {n:,}" for (h, w), n in sorted(count.items())))
        report.add(False, [f"{w}x{h}: {n:,} pictures for {group}" for (h, w), n in sorted(count.items()) if n < group],
                   "sizes have fewer pictures than come together in a batch, which repeats them",
                   f"set data.bucket_group={micro or 1} (pictures in a pass), or add pictures of these shapes.")
