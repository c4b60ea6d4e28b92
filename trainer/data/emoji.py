"""`python -m trainer data emoji`: emoji with captions, as a jsonl data set of square pictures, in one style or several.

Pictures: npm `emoji-datasource-google` (noto: 64 pixels, Apache-2.0), npm `@lobehub/fluent-emoji-3d` (fluent-3d: 256
pixels, MIT). Words: emoji.json of the first (MIT) and npm `emojibase-data` (MIT).
Its class, for runs without captions, is its subcategory: one of 99 kinds such as "food-fruit".
An emoji is held out by a hash of only its code points, so that nobody chose which, and in every style the same.
"""
from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

GOOGLE, BASE, FLUENT = "emoji-datasource-google", "emojibase-data", "@lobehub/fluent-emoji-3d"
VERSIONS = {GOOGLE: "16.0.0", BASE: "17.0.0", FLUENT: "1.1.0"}
NEEDED = re.compile(r"package/(LICENSE|README\.md|emoji\.json|en/data\.json|img/google/64/[^/]+\.png"
                    r"|assets/[^/]+\.webp)$")
HELD_OUT = 0.05  # share of the emoji
STYLES = {"noto": (GOOGLE, "img/google/64"), "fluent-3d": (FLUENT, "assets")}  # package, and where its pictures lie

NOTICE = {"": f"""Where this data set comes from
  names          emoji.json of npm {GOOGLE} {VERSIONS[GOOGLE]}, MIT (LICENSE-{GOOGLE}).
  labels, tags   npm {BASE} {VERSIONS[BASE]}, MIT (LICENSE-{BASE}).
""", "noto": f"""  images/noto    Noto Emoji, copyright Google, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0),
                 as 64-pixel pictures from npm {GOOGLE} {VERSIONS[GOOGLE]};
                 changed: alpha composited on a colour.
""", "fluent-3d": f"""  images/fluent-3d  Fluent Emoji, copyright Microsoft, MIT, as 256-pixel pictures from npm
                 {FLUENT} {VERSIONS[FLUENT]} (its README, which names the licence,
                 is README-fluent-emoji-3d.md); changed: alpha composited on a colour.
"""}


def build(out: Path, source: Path | None = None, skin_tones: bool = False, styles: tuple[str, ...] = ("noto",),
          background=(255, 255, 255)) -> Path:
    """Writes `out`/{data.jsonl, images/STYLE/, LICENSE-*, NOTICE}; returns the jsonl. `source` is a node_modules
    folder. A style leaves out the emoji that it does not have."""
    styles = tuple(dict.fromkeys(styles))
    names = dict.fromkeys([GOOGLE, BASE, *(STYLES[style][0] for style in styles)])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = source or fetch(Path(temporary), names)
        folders = {name: find_package(source, name, names) for name in names}
        emoji, items = list(records(folders[GOOGLE], folders[BASE], skin_tones)), []
        for style in styles:
            package, below = STYLES[style]
            drawn = {key(file.stem): file for file in sorted((folders[package] / below).iterdir())}
            (out / "images" / style).mkdir(parents=True, exist_ok=True)
            for one in emoji:
                if not (original := drawn.get(key(one["code_point"]))):
                    continue
                file = f"images/{style}/{one['code_point'].lower()}.png"
                with Image.open(original) as picture:
                    picture = picture.convert("RGBA")
                    side = max(picture.size)  # a few of fluent-3d are not square
                    canvas = Image.new("RGBA", (side, side), (*background, 255))
                    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
                    canvas.convert("RGB").save(out / file)
                items.append({"file": file, **one, "style": style})
        for name in (GOOGLE, BASE):
            shutil.copyfile(folders[name] / "LICENSE", out / f"LICENSE-{name}")
        if FLUENT in folders:
            shutil.copyfile(folders[FLUENT] / "README.md", out / "README-fluent-emoji-3d.md")
    (out / "NOTICE").write_text("".join(NOTICE[part] for part in ("", *styles)), encoding="utf-8")
    path = out / "data.jsonl"
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")
    return path


def fetch(folder: Path, names: Iterable[str]) -> Path:
    """Those packages through the npm client (which checks their integrity), only the files that are needed."""
    if not (npm := shutil.which("npm")):
        wanted = " and ".join(f"{name}@{VERSIONS[name]}" for name in names)
        raise ValueError("npm was not found, and it fetches the emoji packages. Install Node.js, or unpack "
                         f"{wanted} yourself and name the folder: --source DIR.")
    for name in names:
        version = VERSIONS[name]
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


def find_package(source: Path, name: str, names: Iterable[str]) -> Path:
    for folder in (source / name, source / "node_modules" / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"{source} has no package {name}: --source is a folder that holds {' and '.join(names)} "
                     "(a node_modules folder, for instance).")


def records(google: Path, base: Path, skin_tones: bool):
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
                "captions": captions(label, entry) if one is entry else [plain(label)],
                "tags": [t for t in map(plain, tags) if len(t) > 1],
                "label": plain(label),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "class": entry["subcategory"],
                "code_point": one["unified"],
                "split": "held_out" if is_held_out(entry["unified"]) else "train",  # skins go with their base
            }


def key(code_points: str) -> str:
    """Variation selectors are written by one source and dropped by the other."""
    return code_points.upper().replace("-FE0F", "")


def is_held_out(code_points: str) -> bool:
    number = int.from_bytes(hashlib.sha256(key(code_points).encode()).digest()[:8], "big")
    return number < HELD_OUT * 2**64


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
