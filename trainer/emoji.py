"""`python -m trainer data emoji`: Noto emoji with captions, as a jsonl data set of 64 x 64 pictures.

Pictures: npm `emoji-datasource-google` (Noto, Apache-2.0). Words: its emoji.json (MIT) and npm `emojibase-data` (MIT).
An emoji is held out by a hash of its code points alone, so that nobody chose which.
"""
from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PACKAGES = {"emoji-datasource-google": "16.0.0", "emojibase-data": "17.0.0"}
NEEDED = re.compile(r"package/(LICENSE|README\.md|emoji\.json|en/data\.json|img/google/64/[^/]+\.png)$")

NOTICE = """Where this data set comes from
  images/*.png   Noto Emoji, copyright Google, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0),
                 as 64-pixel pictures from npm emoji-datasource-google {emoji-datasource-google};
                 changed: alpha composited on a colour.
  names          emoji.json of the same package, MIT (LICENSE-emoji-datasource-google).
  labels, tags   npm emojibase-data {emojibase-data}, MIT (LICENSE-emojibase-data).
"""


def build(out: Path, source: Path | None = None, skin_tones: bool = False, background=(255, 255, 255),
          held_out: float = 0.05) -> Path:
    """Writes `out`/{data.jsonl, images/, LICENSE-*, NOTICE}; returns the jsonl. `source` is a node_modules folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = source or fetch(Path(temporary))
        google, base = (find_package(source, name) for name in PACKAGES)
        items = list(records(google, base, skin_tones, held_out))
        (out / "images").mkdir(exist_ok=True)
        for item in items:
            with Image.open(google / "img/google/64" / Path(item["file"]).name) as picture:
                picture = picture.convert("RGBA")
                canvas = Image.new("RGBA", picture.size, (*background, 255))
                Image.alpha_composite(canvas, picture).convert("RGB").save(out / item["file"])
        for name, folder in zip(PACKAGES, (google, base), strict=True):
            shutil.copyfile(folder / "LICENSE", out / f"LICENSE-{name}")
    (out / "NOTICE").write_text(NOTICE.format(**PACKAGES), encoding="utf-8")
    path = out / "data.jsonl"
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")
    return path


def fetch(folder: Path) -> Path:
    """The two packages through the npm client (which checks their integrity), only the files that are needed."""
    if not (npm := shutil.which("npm")):
        names = " and ".join(f"{name}@{version}" for name, version in PACKAGES.items())
        raise ValueError("npm was not found, and it fetches the emoji packages. Install Node.js, or unpack "
                         f"{names} yourself and name the folder: --source DIR.")
    for name, version in PACKAGES.items():
        print(f"npm pack {name}@{version} ...", flush=True)
        command = [npm, "pack", f"{name}@{version}", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"npm could not fetch {name}@{version}: {done.stderr.strip() or done.stdout.strip()}")
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            for member in archive:
                if member.isfile() and NEEDED.match(member.name):
                    target = folder / name / member.name.removeprefix("package/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
    return folder


def find_package(source: Path, name: str) -> Path:
    for folder in (source / name, source / "node_modules" / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"{source} has no package {name}: --source is a folder that holds {' and '.join(PACKAGES)} "
                     "(a node_modules folder, for instance).")


def records(google: Path, base: Path, skin_tones: bool, held_out: float):
    words = {}
    for entry in json.loads((base / "en/data.json").read_text(encoding="utf-8")):
        for one in (entry, *entry.get("skins", ())):
            words[key(one["hexcode"])] = (one["label"], entry.get("tags", []))
    for entry in json.loads((google / "emoji.json").read_text(encoding="utf-8")):
        if not entry["has_img_google"]:
            continue
        variants = [entry, *(entry.get("skin_variations", {}).values() if skin_tones else ())]
        for one in variants:
            label, tags = words.get(key(one["unified"]), words[key(entry["unified"])])
            yield {
                "file": f"images/{one['image']}",
                "captions": captions(label, entry) if one is entry else [plain(label)],
                "tags": [t for t in map(plain, tags) if len(t) > 1],
                "label": plain(label),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "code_point": one["unified"],
                "split": "held_out" if is_held_out(entry["unified"], held_out) else "train",  # skins go with their base
            }


def key(code_points: str) -> str:
    """Variation selectors are written by one source and dropped by the other."""
    return code_points.upper().replace("-FE0F", "")


def is_held_out(code_points: str, fraction: float) -> bool:
    number = int.from_bytes(hashlib.sha256(key(code_points).encode()).digest()[:8], "big")
    return number < fraction * 2**64


def plain(text: str) -> str:
    return " ".join(re.sub(r"[_\-:“”,]", " ", text).replace("’", "'").lower().split())


def captions(label: str, entry: dict) -> list[str]:
    """What a person may call it: the label, every short name, the Unicode name; no doubles, the label first."""
    names = [entry["name"], *entry["short_names"]]
    if entry["subcategory"] == "country-flag":  # short names are country codes, unreadable as words
        country = label.removeprefix("flag: ")
        names = [f"{country} flag", f"flag of {country}"]
    found = [plain(n) for n in (label, *names)]
    return list(dict.fromkeys(c for c in found if len(c) > 2 or c == found[0]))
