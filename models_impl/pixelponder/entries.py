"""Pictures with captions and conditions in a folder, as PixelPonder's batch script lists them: a line of JSON for each.

    {"image": "image/a.png", "text": "a red house", "canny": "canny/a.png", "depth": ..., "openpose": ..., "hed": ...}

(batch_inference.py of chfyfr/PixelPonder, which opens such paths as they stand; here they begin at the list's folder)
"""
from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock

from ..files import write_whole
from ..folders import portable, refuse_unportable
from ..parsing import from_json, without_surrogates

LIST = "data.jsonl"
IMAGE, TEXT = "image", "text"
CONDITIONS = ("canny", "depth", "openpose", "hed")
PICTURES = (IMAGE, *CONDITIONS)
_ONE_WRITER = Lock()


def read(path: str | os.PathLike) -> list[dict]:
    """The entries of a list, in order; empty lines are left out.

    Raises FileNotFoundError, or ValueError with the line that is not an entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent.name}: it lists the entries, a line of JSON "
                                "with image and text for each.")
    return [entry for entry, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict, int]]:
    """Entries with the byte at which each one's line ends. An unfinished last line, without its newline, that is not
    JSON is what an interrupted write left and is not counted."""
    content, listed, end = path.read_bytes(), [], 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        end += len(line)
        if not line.strip():
            continue
        try:
            entry = from_json(line, f"{path.name}, line {number}")
        except ValueError:
            if end == len(content) and not line.endswith(b"\n"):
                break
            raise
        wrong = [key for key in (TEXT, *PICTURES) if not isinstance(entry.get(key, ""), str)] \
            if isinstance(entry, dict) else ["it"]
        if wrong:
            raise ValueError(f"{path.name}, line {number}: {', '.join(wrong)} must be text, in an entry with "
                             f"{', '.join((IMAGE, TEXT, *CONDITIONS))}.")
        listed.append((entry, end))
    return listed


def names(listed: Sequence[dict]) -> list[str]:
    """A file name without extension for each entry, unique even where case is ignored.

    The stem of its image; where others have the same, its path with "_" for each "/", then with the ending too, and at
    last with the entry's number; signs that a file name cannot have on every system are "_".
    """
    choices = []
    for index, entry in enumerate(listed):
        parts = [part for part in re.split(r"[/\\:]+", entry.get(IMAGE, "")) if part not in ("", ".", "..")]
        parts = parts or [f"{index:06}"]
        whole, last = "_".join(parts), Path(parts[-1])
        short = tuple(map(portable, (last.stem, whole.removesuffix(last.suffix), whole)))
        choices.append((*short, f"{portable(whole[-100:])}_{index:06}"))
    taken = [0] * len(choices)
    while True:
        names = [choice[i] for choice, i in zip(choices, taken, strict=True)]
        count = Counter(name.casefold() for name in names)
        same = [i for i, name in enumerate(names) if count[name.casefold()] > 1 and taken[i] < len(choices[i]) - 1]
        if not same:
            return names
        for i in same:
            taken[i] += 1


def find(listed: Sequence[dict], name: str) -> int | None:
    """Which entry a name means: the one that `names` gives it, else the one whose image has it for its stem.

    Raises ValueError where more than one has.
    """
    own = names(listed)
    if name in own:
        return own.index(name)
    same = [i for i, entry in enumerate(listed) if Path(entry.get(IMAGE, "")).stem == name]
    if len(same) > 1:
        raise ValueError(f"{name} could be {' or '.join(listed[i][IMAGE] for i in same)}: call the entry "
                         f"{' or '.join(own[i] for i in same)}, as 'Load Data Set Entry' does.")
    return same[0] if same else None


def keeps(folder: str | os.PathLike, name: str, given: Iterable[str]) -> dict[str, str]:
    """key -> path, as listed, of the pictures of an entry that stay as they are when those of `given` are saved.

    An image that lies elsewhere than `save` would write it always stays. Raises ValueError as `find` does.
    """
    folder, given = Path(folder), set(given)
    listed = read(folder / LIST) if (folder / LIST).is_file() else []
    index = find(listed, name)
    if index is None:
        return {}
    entry = listed[index]
    if os.path.abspath(folder / entry.get(IMAGE, "")) != os.path.abspath(folder / IMAGE / f"{name}.png"):
        given -= {IMAGE}
    return {key: entry[key] for key in PICTURES if entry.get(key) and key not in given}


def save(folder: str | os.PathLike, name: str, text: str, pictures: Mapping[str, bytes]) -> dict:
    """Write an entry of PNG files and put it on the list, each file whole or not at all; returns the entry.

    A line is only written after its pictures. An entry of the same name keeps what is not given anew, so that
    conditions can be added in several runs; an image that is listed at another path is kept too. One process may write
    to a folder at a time.
    Raises ValueError for a name that no file can have on some system or that could be several entries, or a new entry
    that has no image.
    """
    folder = Path(folder)
    refuse_unportable(name)
    text = without_surrogates(text)
    unknown = set(pictures) - set(PICTURES)
    assert not unknown, unknown
    with _ONE_WRITER:
        listed = _lines(folder / LIST) if (folder / LIST).is_file() else []
        index = find([entry for entry, _ in listed], name)
        entry = {} if index is None else listed[index][0]
        if IMAGE not in pictures and index is None:
            raise ValueError(f"The new entry {name} has no image.")
        stay = keeps(folder, name, pictures)
        pictures = {key: content for key, content in pictures.items() if key not in stay}
        for key, content in pictures.items():
            write_whole(folder / key / f"{name}.png", content)
        new = {**entry, **{key: f"{key}/{name}.png" for key in pictures}, TEXT: text or entry.get(TEXT, "")}
        new = {key: new[key] for key in (IMAGE, TEXT, *CONDITIONS) if key in new} | new  # the release's order
        if index is None:
            _append(folder / LIST, listed[-1][1] if listed else 0, new)
        elif new != entry:
            entries = [new if i == index else other for i, (other, _) in enumerate(listed)]
            write_whole(folder / LIST, b"".join(_line(entry) for entry in entries))
        return new


def _line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _append(path: Path, end: int, entry: dict):
    """Add a line after the last complete one, which ends at byte `end`; the rest of an interrupted write is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "w+b") as file:
        if end:
            file.seek(end - 1)
            start = b"" if file.read(1) == b"\n" else b"\n"  # a list written by hand may lack its last newline
        else:
            start = b""
        file.truncate(end)
        file.seek(end)
        file.write(start + _line(entry))
        file.flush()
        os.fsync(file.fileno())
