"""Pictures compared with a reference set, their prompts and their conditions, by the networks that the user names; see
metrics.py for each."""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...models_impl.annotators import hed
from ...models_impl.annotators.canny import canny
from ..config.schema import Data
from ..data import layouts
from ..data.layouts import Item
from ..data.pictures import decode, plan, tensor
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
    """Everything that can be measured of a folder of pictures or an .npz, with the judges that there are."""
    generated, notes = sample.opened(pictures)
    items, what, names = drawn_from(notes), notes.get("what", []), notes.get("conditions", [])
    if reference and not (judges.hed or judges.inception):
        raise ValueError("--reference needs a network to compare with: --hed or --inception.")
    look = Look(judges, device)
    if judges.clip and not (what and all(isinstance(w, str) for w in what)):
        raise ValueError(f"--clip: {pictures} has no samples.json with the prompts of its pictures.")
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
    data_set = layouts.read(Path(notes["data"]), "auto", Data(path=notes["data"], conditions=names))
    return data_set.train + data_set.held_out


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
