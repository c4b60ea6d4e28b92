"""`python -m trainer evaluate`: how good are pictures? Of a run: retrieval. Of a folder of `sample`: distances and
scores.

Retrieval: each prompt is the first caption of an item. Its generated picture and every reference picture are shrunk to
16 x 16 RGB by area, the mean reference is subtracted, and the references are ranked by the cosine of the angle to the
generated one. top1, top10: the prompted item is the nearest, or one of the ten nearest. subcategory: the nearest item
is of the same subcategory (any field named so in the jsonl). Chance is what a random ranking would give. It measures
colours and shapes at a coarse scale: no network judges, and nothing is downloaded.

Pictures (`measure`) are compared with a reference set, their prompts and their conditions, by the networks that the
user names; see trainer/evaluation/metrics.py for each.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from ...models_impl.parsing import from_json
from ..config.schema import Config
from ..data import layouts, loader
from . import metrics
from .measure import AT_ONCE


def evaluate(recipe, config: Config, path: Path, seen: int = 256, steps: int = 10, cfg: float = 4.0, shift: float = 1.0,
             seed: int = 0, progress=lambda items: items) -> tuple[dict, list]:
    """(numbers per split, [(prompt, split, picture, place, reference)]) for the jsonl at `path`. References are the
    pictures as squares; a run with conditions draws each item after its own."""
    data_set, side, results, rows = layouts.read(path, "jsonl", config.data), config.data.resolution, {}, []
    items, names = data_set.train + data_set.held_out, config.data.conditions
    loader.complain(path, items, config.data, "captions")
    entries = [from_json(line, path.name) for line in layouts.read_text(path).split("\n") if line.strip()]
    entries = sorted(entries, key=lambda e: e.get("split", "train") != "train")  # as `items` are
    files = [next(e[key] for key in layouts.FILE_KEYS if key in e) for e in entries]
    kinds = [e.get("subcategory", "") for e in entries]
    batches = loader.fixed(items, replace(config.data, buckets="", resolutions=[]))
    pixels = torch.cat([b.pictures for b in batches])
    references = pixels.float() / 127.5 - 1
    conditions = {name: torch.cat([b.conditions[name] for b in batches]) for name in names}
    if recipe.of_pictures:
        conditions[""] = pixels
    known = metrics.colours(references)
    for split in ("train", "held_out"):
        chosen = range(len(data_set.train)) if split == "train" else range(len(data_set.train), len(items))
        if split == "train":  # a fixed selection that nobody chose
            chosen = sorted(sorted(chosen, key=lambda i: hashlib.sha256(files[i].encode()).digest())[:seen])
        if not chosen:
            continue
        pictures = []
        for start in progress(range(0, len(chosen), AT_ONCE)):
            some = list(chosen[start:start + AT_ONCE])
            given = {"conditions": {name: c[some] for name, c in conditions.items()}} if conditions else {}
            prompts = [items[i].texts[0] for i in some]
            pictures.append(recipe.sample(prompts, side, side, steps, shift, cfg, seed + start, **given).cpu())
        pictures = torch.cat(pictures)
        place, nearest = metrics.ranks(metrics.colours(pictures), known, torch.tensor(chosen))
        same = torch.tensor([kinds[i] == kinds[n] for i, n in zip(chosen, nearest.tolist(), strict=True)])
        count = Counter(kinds)
        results[split] = {
            "prompts": len(chosen),
            "top1": (place < 1).float().mean().item(), "top10": (place < 10).float().mean().item(),
            "subcategory": same.float().mean().item(), "median_place": int(place.median()) + 1,
            "chance": {"top1": 1 / len(items), "top10": 10 / len(items),
                       "subcategory": sum(count[kinds[i]] for i in chosen) / len(chosen) / len(items)},
        }
        rows += [(items[i].texts[0], split, p, int(r), references[i])
                 for i, p, r in zip(chosen, pictures, place, strict=True)]
    return results, rows
