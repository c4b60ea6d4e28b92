"""Data sets of other programs: [data] of a single one, [[data.sets]] of several."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.schema import DataSet
from ..data.mask_files import BESIDE
from .rows import Draft, none, number, to

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".tif", ".tiff")
PRIOR_SHARE = 0.5  # of data.prior_share


@dataclass
class Folder:
    """A data set of another program."""

    path: str
    key: str
    """What it is called there, for the report."""
    repeats: float = 1
    prior: bool = False
    name: str = ""
    own: dict = field(default_factory=dict)
    """Its settings in the words of [[data.sets]], which `Draft.apply` fills."""
    dropout: float | None = None
    """How often its captions are left out."""
    shown: float = 0
    """So many of its pictures in an epoch, however many it has; 0 = by repeats."""
    counted: str = ""
    """The folder of its pictures, where `path` is a file."""

    @property
    def count(self) -> float:
        """Pictures of it in an epoch, 0 where they are not here to be counted."""
        return self.shown or max(self.repeats, 0) * pictured(self.counted or self.path)


def pictured(path: str) -> int:
    folder = Path(path).expanduser() if path else None
    if not folder or not folder.is_dir():
        return 0
    return sum(1 for file in folder.rglob("*") if file.suffix.lower() in PICTURES and not file.stem.endswith(BESIDE))


def data(draft: Draft, folders: Sequence[Folder]) -> list[Folder]:
    """Sets [data]. Those that count are returned: a folder that is named again for another size is none."""
    folders = once(draft, folders)
    dropout(draft, folders)
    if not any(not folder.prior for folder in folders):
        draft.absent += [(folder.key, folder.path, "regularisation pictures stand beside others") for folder in folders]
        return []
    if len(folders) == 1:
        single(draft, folders[0])
        return folders
    tables = [{**named(folder, folders[:number]), "path": folder.path, **folder.own,
               **({"prior": True} if folder.prior else {})} for number, folder in enumerate(folders)]
    for prior in (False, True):
        group = [number for number, folder in enumerate(folders) if folder.prior == prior]
        shares(draft, [folders[number] for number in group], [tables[number] for number in group])
    for key, value in shared(tables).items():
        draft.set(f"data.{key}", value)
        for table in tables:
            del table[key]
    draft.set("data.sets", tables)
    return folders


def once(draft: Draft, folders: Sequence[Folder]) -> list[Folder]:
    found: list[Folder] = []
    for folder in folders:
        twin = next((one for one in found if (one.path, one.prior, one.own) ==
                     (folder.path, folder.prior, folder.own)), None)
        if twin is None:
            found.append(folder)
        else:
            twin.repeats += folder.repeats
            draft.changed.append(f"{folder.key} has the pictures of {twin.key} again: they are one data set, their "
                                 "repeats added, and each picture has the size nearest to its own (data.resolutions).")
    return found


def single(draft: Draft, folder: Folder):
    if folder.path:
        draft.set("data.path", folder.path)
    for key, value in folder.own.items():
        if key == "loss_weight":
            draft.absent.append((f"{folder.key} {key}", value, "a single data set counts once"))
        else:
            draft.set(f"data.{key}", value)


def named(folder: Folder, before: Sequence[Folder]) -> dict:
    """The set's name, where it has one of its own."""
    name = re.sub(r"[^\w.-]+", "_", folder.name).strip("_")
    taken = {re.sub(r"[^\w.-]+", "_", one.name).strip("_") for one in before}
    return {"name": name} if name and name not in taken else {}


def shares(draft: Draft, folders: Sequence[Folder], tables: Sequence[dict]):
    """How often each set is shown: repeats where those are whole numbers, else weights."""
    if all(not folder.shown and folder.repeats >= 1 and folder.repeats == int(folder.repeats) for folder in folders):
        for folder, table in zip(folders, tables, strict=True):
            if folder.repeats != 1:
                table["repeats"] = int(folder.repeats)
    elif len(folders) > 1 and all(folder.count > 0 for folder in folders):
        for folder, table in zip(folders, tables, strict=True):
            table["weight"] = float(folder.count)
        draft.changed.append(f"Repeats of {', '.join(folder.key for folder in folders)} are weights here, as they are "
                             "no whole numbers: how many pictures of each an epoch shows there.")
    elif len(folders) > 1:
        for folder, table in zip(folders, tables, strict=True):
            table["repeats"] = max(1, round(folder.repeats))
            draft.absent.append((f"{folder.key} repeats", folder.shown or folder.repeats,
                                 f"whole numbers are, and {table['repeats']} is taken; or give all sets a weight"))


def shared(tables: Sequence[dict]) -> dict:
    """What all sets say alike and may take from [data]."""
    names = set.intersection(*(set(table) for table in tables)) & {*DataSet.INHERITED} - {"caption"}
    return {name: tables[0][name] for name in sorted(names) if all(t[name] == tables[0][name] for t in tables)}


def dropout(draft: Draft, folders: Sequence[Folder]):
    """How often captions are left out, which is one number for a run."""
    rates = [folder for folder in folders if folder.dropout is not None]
    if not rates:
        return
    key, rate = f"{rates[0].key} caption dropout", rates[0].dropout
    if not draft.has("recipe.dropout"):
        draft.absent += [(key, rate, f"{draft.recipe} has no recipe.dropout")] * bool(rate)
        return
    draft.set("recipe.dropout", float(rate))
    draft.absent += [(f"{one.key} caption dropout", one.dropout, f"recipe.dropout = {rate:g} is for all data sets")
                     for one in rates if one.dropout != rate]


def framed(folder: Folder, before: str, after: str = ""):
    """Words that stand before and after every caption."""
    if before or after:
        folder.own |= {"templates": [" ".join(filter(None, (before, "{}", after)))], "template_share": 1.0}


def masked(draft: Draft, key: str, given, kind: str):
    """Masks of a data set, which are of one kind for all. kind: in data.masks."""
    other = draft.get("data.masks")
    draft.apply(key, given, to("data.masks", value=lambda _: kind) if other in (None, kind) else
                none(f"data.masks = {other!r} is for all data sets"))


def masked_by(draft: Draft, folder: Folder, key: str, masks: str):
    """Masks that are files in a folder of their own, which has a fixed place here."""
    masked(draft, key, masks, "files")
    place = Path(folder.counted or folder.path).parent / "masks"
    if draft.get("data.masks") == "files" and Path(masks).expanduser() != place.expanduser():
        draft.missing.append(f"data.masks: {key} = {masks!r}, and masks are looked for in {place.as_posix()!r}: put "
                             "them there, with the names of the pictures.")


def loss_weight(given) -> float | None:
    return None if number(given) == 1 else number(given)
