"""`python -m trainer evaluate`: how good are pictures? Of a run: retrieval. Of a folder of `sample`: what can be told.

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
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...models_impl.annotators import hed
from ...models_impl.annotators.canny import canny
from ..config import Config, Data
from ..data import layouts, loader
from ..data.layouts import Item
from ..data.pictures import decode, plan, tensor
from ..training.run import to_images
from . import metrics, sample

AT_ONCE = 32


@dataclass(frozen=True)
class Judges:
    """Files of networks that judge, of which any may be missing."""

    hed: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    keypoints: tuple[Path, Path] | None = None
    """Folders of OpenPose JSON with equal names: of the pictures, and as they were wanted."""


@torch.no_grad()
def measure(pictures: Path, reference: Path | None, judges: Judges, device="cpu", progress=lambda items: items) -> dict:
    """Everything that can be told about a folder of pictures or an .npz, with the judges that there are."""
    generated, notes = sample.opened(pictures)
    items, what, names = drawn_from(notes), notes.get("what", []), notes.get("conditions", [])
    if reference and not (judges.hed or judges.inception):
        raise ValueError("--reference needs a network to compare with: --hed or --inception.")
    look = Look(judges, device)
    if judges.clip and not (what and all(isinstance(w, str) for w in what)):
        raise ValueError(f"--clip: {pictures} has no samples.json that tells the prompts of its pictures.")
    clip = metrics.clip_scores(judges.clip, device) if judges.clip else None
    kept: dict[str, list[Tensor]] = {}
    number = 0
    for batch in progress(sample.tensors(generated, AT_ONCE)):
        numbers, there = range(number, number + len(batch)), batch.to(device)
        found = look.features(there)
        if clip:
            found["clip_score"] = clip(batch, [what[n % len(what)] for n in numbers])
        if items:
            found["colours"] = metrics.colours(there)
            found |= look.edges_common(there, [items[n % len(items)] for n in numbers], names)
        for name, value in found.items():
            kept.setdefault(name, []).append(value.cpu())
        number += len(batch)
    found, size = {name: torch.cat(values) for name, values in kept.items()}, tuple(batch.shape[-2:])
    report = {"pictures": number, "width": size[1], "height": size[0]}
    report |= {name: value.mean().item() for name, value in found.items()
               if name == "clip_score" or name.startswith("edge_iou")}
    if "probabilities" in found:
        report["inception_score"] = metrics.inception_score(found["probabilities"])
    if reference:
        report["reference"] = compared(found, reference, size, look, progress)
    if items and all(not isinstance(i.file, Path) or i.file.is_file() for i in items):
        report["retrieval"] = retrieved(found["colours"], items, size)
    if judges.keypoints:
        report[f"pck@{metrics.PCK}"] = joints(*judges.keypoints)
    return report


class Look:
    """The judges that see a picture by itself."""

    def __init__(self, judges: Judges, device):
        self.device = device
        self.hed = hed.load(judges.hed).to(device) if judges.hed else None
        self.sees, self.knows = metrics.inception(judges.inception, device) if judges.inception else (None, None)

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """pictures: (B, 3, H, W) uint8"""
        found = {}
        if self.hed:
            found["hed_vgg"] = metrics.hed_features(self.hed, sample.as_unit(pictures))
        if self.sees:
            found |= {"inception": self.sees(pictures), "probabilities": self.knows(pictures)}
        return found

    def edges_common(self, pictures: Tensor, items: list[Item], names: list[str]) -> dict[str, Tensor]:
        """How far the edges of the pictures are those of their conditions."""
        finders = {"canny": lambda x: canny(x, resize=None)}
        if self.hed:
            finders["hed"] = lambda x: self.hed(x)[1]
        found, shown = {}, sample.as_unit(pictures)
        for name in finders.keys() & set(names):
            wanted = [sample.conditions_of(item, [name], *pictures.shape[-2:])[name] for item in items]
            wanted = sample.as_unit(torch.stack(wanted).to(pictures.device)).mean(1, keepdim=True)  # (B, 1, H, W)
            found[f"edge_iou_{name}"] = metrics.edge_iou(finders[name](shown), wanted)
        return found


def drawn_from(notes: dict) -> list[Item]:
    """The items of the data set that pictures were drawn from, in the order in which they were."""
    if not notes.get("data") or Path(notes["data"]).suffix == ".txt":
        return []
    names = list(filter(None, notes["conditions"]))  # "" is the picture itself
    found = layouts.read(Path(notes["data"]), "auto", Data(path=notes["data"], conditions=names))
    return found.train + found.held_out


def shown_at(items: list[Item], size: tuple[int, int]) -> Iterator[Tensor]:
    """Batches of the items' pictures, their middles: (B, 3, H, W) uint8."""
    for start in range(0, len(items), AT_ONCE):
        some = []
        for item in items[start:start + AT_ONCE]:
            picture = decode(item.file)
            cut = plan((picture.height, picture.width), size, "centre", random.Random(0))
            some.append(tensor(cut.apply(picture)))
        yield torch.stack(some)


def compared(found: dict[str, Tensor], reference: Path, size: tuple[int, int], look: Look, progress) -> dict:
    """Distances between the pictures and those of a reference set (an .npz, or any layout), brought to their size."""
    if reference.suffix == ".npz":
        batches = sample.tensors(sample.opened(reference)[0], AT_ONCE)
    else:
        other = layouts.read(reference, "auto", Data(path=str(reference)))
        batches = shown_at(other.train + other.held_out, size)
    kept: dict[str, list[Tensor]] = {"hed_vgg": [], "inception": []}
    for batch in progress(batches):
        if tuple(batch.shape[-2:]) != size:
            raise ValueError(f"{reference} has pictures of {batch.shape[3]}x{batch.shape[2]}, and those that are "
                             f"evaluated are {size[1]}x{size[0]}.")
        for name, value in look.features(batch.to(look.device)).items():
            kept.setdefault(name, []).append(value.cpu())
    report = {}
    for name, distance, discrepancy in (("hed_vgg", "hed_vgg_frechet", "hed_vgg_kid"), ("inception", "fid", "kid")):
        if kept[name]:
            other = torch.cat(kept[name])
            report |= {"pictures": len(other), distance: metrics.frechet(found[name], other),
                       discrepancy: metrics.kid(found[name], other)}
            if min(len(found[name]), len(other)) < other.shape[1]:
                report[f"{distance}_remark"] = (f"fewer pictures than the {other.shape[1]} features: the Frechet "
                                                f"distance is too large, read {discrepancy}")
    return report


def retrieved(generated: Tensor, items: list[Item], size: tuple[int, int]) -> dict:
    """Retrieval of the item whose caption or condition each picture was drawn from."""
    known = torch.cat([metrics.colours(batch) for batch in shown_at(items, size)])
    place, _ = metrics.ranks(generated, known, torch.arange(len(generated)) % len(items))
    return {"top1": (place < 1).double().mean().item(), "top10": (place < 10).double().mean().item(),
            "median_place": int(place.median()) + 1,
            "chance": {"top1": 1 / len(items), "top10": min(1.0, 10 / len(items))}}


def joints(found: Path, wanted: Path) -> dict:
    right = total = 0
    for file in sorted(wanted.glob("*.json")):
        other = found / file.name
        good, all_of = metrics.pck(metrics.people(other) if other.is_file() else [], metrics.people(file))
        right, total = right + good, total + all_of
    if not total:
        raise ValueError(f"--keypoints: {wanted} has no OpenPose .json with a visible joint.")
    return {"share": right / total, "joints": total}


def evaluate(recipe, config: Config, path: Path, seen: int = 256, steps: int = 10, cfg: float = 4.0, shift: float = 1.0,
             seed: int = 0, progress=lambda items: items) -> tuple[dict, list]:
    """(numbers per split, [(prompt, split, picture, place, reference)]) for the jsonl at `path`. References are the
    pictures as squares; a run with conditions draws each item after its own."""
    found, side, results, rows = layouts.read(path, "jsonl", config.data), config.data.resolution, {}, []
    items, names = found.train + found.held_out, config.data.conditions
    loader.complain(path, items, config.data, "captions")
    entries = [json.loads(line) for line in layouts.read_text(path).split("\n") if line.strip()]
    entries = sorted(entries, key=lambda e: e.get("split", "train") != "train")  # as `items` are
    files = [next(e[key] for key in layouts.FILE_KEYS if key in e) for e in entries]
    kinds = [e.get("subcategory", "") for e in entries]
    batches = loader.fixed(items, replace(config.data, buckets="", resolutions=[]))
    pixels = torch.cat([b.pictures for b in batches])
    references = pixels.float() / 127.5 - 1
    conditions = {name: torch.cat([b.conditions[name] for b in batches]) for name in names}
    if getattr(recipe, "of_pictures", False):
        conditions[""] = pixels
    known = metrics.colours(references)
    for split in ("train", "held_out"):
        chosen = range(len(found.train)) if split == "train" else range(len(found.train), len(items))
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


def loss_curve(lines: list[dict], width: int = 640, height: int = 320) -> Image.Image:
    """The losses of a run's log: training grey, its mean over 2 % of the run black, validation red. Log scale."""
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
