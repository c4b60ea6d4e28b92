"""`python -m trainer check recipe.toml`: what is wrong with the pictures and captions, before a run meets it."""
from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from . import build, data, pictures
from .config import Config
from .layouts import listed


def check(config: Config, progress=lambda items, total: items) -> tuple[list[str], list[str]]:
    """(errors that would stop a run, remarks), as lines of text."""
    found = data.read(config.data, need="")  # what is missing is listed below with the rest
    items = found.train + found.held_out
    errors, remarks = [], []

    def report(where: list[str], cases: list, sentence: str):
        where += listed(cases, sentence)

    def look(item: data.Item):
        try:
            picture = pictures.decode(item.file)
            return picture.size, hashlib.sha256(picture.tobytes()).digest(), None
        except (ValueError, FileNotFoundError) as error:
            return None, None, str(error)

    with ThreadPoolExecutor(config.data.workers) as pool:
        looked = list(progress(pool.map(look, items), len(items)))
    report(errors, [why for _, _, why in looked if why], "pictures cannot be read")
    need = build.need(config)
    if need == "captions":
        report(errors, [i.file for i in items if not i.texts], "pictures have no caption")
    else:
        report(errors, [i.file for i in items if i.label < 0], "pictures have no class")
    readable = [(i, size, digest) for i, (size, digest, _) in zip(items, looked, strict=True) if size]
    side = config.data.resolution
    if config.data.crop == "none":
        report(errors, [f"{i.file} is {s[0]}x{s[1]}" for i, s, _ in readable if s[0] != s[1]],
               "pictures are not square, and data.crop is none")
    report(remarks, [f"{i.file} is {s[0]}x{s[1]}" for i, s, _ in readable if min(s) < side],
           f"pictures are smaller than data.resolution={side} and will be enlarged")
    first = {}
    doubles = [f"{i.file} = {first[d].file}" for i, _, d in readable if first.setdefault(d, i) is not i]
    report(remarks, doubles, "pictures are there twice")
    train_digests = {d for i, _, d in readable[: len(found.train)]}
    held = set(map(id, found.held_out))
    report(errors, [i.file for i, _, d in readable if id(i) in held and d in train_digests],
           "held-out pictures are trained on as well")
    captions = Counter(c for i in items for c in i.texts)
    report(remarks, [f"{c!r}: {n} pictures" for c, n in captions.most_common() if n > 1],
           "captions name several pictures")
    if config.text.encoder == "small" and need == "captions" and not errors:
        text = build.encoders.make(config, list(captions), None)
        text.tokenizer.no_truncation()
        long = [f"{c!r}: {len(text.tokenizer.encode(c).ids)} tokens" for c in captions
                if len(text.tokenizer.encode(c).ids) > config.text.max_length]
        report(remarks, long, f"captions are longer than text.max_length={config.text.max_length} and will be cut")
    return errors, [data.summary(found)] + remarks
