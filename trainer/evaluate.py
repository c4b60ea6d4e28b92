"""`python -m trainer evaluate`: does a picture show what its prompt said? Retrieval among all pictures of the data set.

Each prompt is the first caption of an item. Its generated picture and every reference picture are shrunk to 16 x 16
RGB by area, the mean reference is subtracted, and the references are ranked by the cosine of the angle to the generated
one. top1, top10: the prompted item is the nearest, or one of the ten nearest. subcategory: the nearest item is of the
same subcategory (any field named so in the jsonl). Chance is what a random ranking would give. It measures colours and
shapes at a coarse scale: no network judges, and nothing is downloaded.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from . import data, layouts
from .config import Config
from .run import to_images

SIDE = 16
AT_ONCE = 32


def features(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3*SIDE*SIDE)"""
    return F.adaptive_avg_pool2d(pictures.float(), SIDE).flatten(1)


def ranks(generated: Tensor, references: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(place of the true reference, 0 = nearest; index of the nearest one). Rows are features; truth: indices."""
    centre = references.mean(0)
    score = F.normalize(generated - centre, dim=1) @ F.normalize(references - centre, dim=1).T  # (B, R)
    own = score.gather(1, truth[:, None])
    return (score > own).sum(1), score.argmax(1)


def evaluate(recipe, config: Config, path: Path, seen: int = 256, steps: int = 10, cfg: float = 4.0, shift: float = 1.0,
             seed: int = 0, progress=lambda items: items) -> tuple[dict, list]:
    """(numbers per split, [(prompt, split, picture, place, reference)]) for the jsonl at `path`."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    items = [data.Item(path.parent / e["file"], layouts.texts(e)) for e in entries]
    batches = data.fixed(items, config.data)
    references = torch.cat([b.pictures for b in batches]).float() / 127.5 - 1
    known = features(references)
    kinds = [e.get("subcategory", "") for e in entries]
    side, results, rows = config.data.resolution, {}, []
    for split in ("train", "held_out"):
        chosen = [i for i, e in enumerate(entries) if e.get("split", "train") == split]
        if split == "train":  # a fixed selection that nobody chose
            chosen = sorted(sorted(chosen, key=lambda i: hashlib.sha256(entries[i]["file"].encode()).digest())[:seen])
        if not chosen:
            continue
        pictures = []
        for start in progress(range(0, len(chosen), AT_ONCE)):
            prompts = [items[i].captions[0] for i in chosen[start:start + AT_ONCE]]
            pictures.append(recipe.sample(prompts, side, side, steps, shift, cfg, seed + start).cpu())
        pictures = torch.cat(pictures)
        place, nearest = ranks(features(pictures), known, torch.tensor(chosen))
        same = torch.tensor([kinds[i] == kinds[n] for i, n in zip(chosen, nearest.tolist(), strict=True)])
        count = Counter(kinds)
        results[split] = {
            "prompts": len(chosen),
            "top1": (place < 1).float().mean().item(), "top10": (place < 10).float().mean().item(),
            "subcategory": same.float().mean().item(), "median_place": int(place.median()) + 1,
            "chance": {"top1": 1 / len(items), "top10": 10 / len(items),
                       "subcategory": sum(count[kinds[i]] for i in chosen) / len(chosen) / len(items)},
        }
        rows += [(items[i].captions[0], split, p, int(r), references[i])
                 for i, p, r in zip(chosen, pictures, place, strict=True)]
    return results, rows


def contact_sheet(prompts: list[str], pictures: Tensor, columns: int = 4, notes: list[str] = ()) -> Image.Image:
    """Pictures with their prompts beneath."""
    images = to_images(pictures)
    width, height = images[0].width * 2, images[0].height * 2
    cell_w, cell_h = width + 16, height + 22
    page = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % columns * cell_w + 8, i // columns * cell_h + 4
        page.paste(image.resize((width, height), Image.LANCZOS), (x, y))
        text = prompt + (f" {notes[i]}" if notes else "")
        while draw.textlength(text) > cell_w - 4:
            text = text[:-2] + "…"
        draw.text((x, y + height + 2), text, fill="black")
    return page


def loss_curve(log: Path, width: int = 640, height: int = 320) -> Image.Image:
    """The losses in a log.jsonl: training grey, its mean over 2 % of the run black, validation red. Log scale."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    training = [(one["step"], one["loss"]) for one in lines if "loss" in one]
    reach = max(1, len(training) // 50)
    smooth = [(step, sum(v for _, v in training[max(0, i - reach + 1):i + 1]) / min(reach, i + 1))
              for i, (step, _) in enumerate(training)]
    validation = [(one["step"], one["validation_loss"]) for one in lines if "validation_loss" in one]
    values = [math.log(v) for _, v in training + validation]
    low, high, last = min(values), max(values), max(step for step, _ in training + validation)
    page = Image.new("RGB", (width, height), "white")
    draw, left, edge = ImageDraw.Draw(page), 52, 18

    def at(step, value):
        share = (math.log(value) - low) / max(high - low, 1e-9)
        return left + (width - left - edge) * step / last, height - edge - (height - 2 * edge) * share

    for i in range(5):
        value = math.exp(low + (high - low) * i / 4)
        y = at(0, value)[1]
        draw.line((left, y, width - edge, y), fill="#dddddd")
        draw.text((4, y - 6), f"{value:.4f}", fill="black")
    for curve, colour in ((training, "#bbbbbb"), (smooth, "black"), (validation, "#cc0000")):
        if len(curve) > 1:
            draw.line([at(*point) for point in curve], fill=colour, width=2 if colour != "#bbbbbb" else 1)
    draw.text((left, height - 14), "0", fill="black")
    draw.text((width - 90, height - 14), f"step {last:,}", fill="black")
    return page
