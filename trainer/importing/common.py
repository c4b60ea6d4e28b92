"""What several programs say in other words: steps, batches, sizes, data sets, schedules."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models_impl.pixart.buckets import TABLES
from .rows import Absent, Draft, Row, number, whole

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".tif", ".tiff")
OPTIMIZERS = {  # their names, without capitals and underscores -> ours
    "adamw": "adamw", "adam": "adamw", "adamwbf16": "adamw", "optimiadamw": "adamw", "adamw8bit": "adamw8bit",
    "bnbadamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "adam8bit": "adamw8bit", "adafactor": "adafactor",
    "prodigy": "prodigy", "prodigyopt": "prodigy", "came": "came", "lion": "lion", "optimilion": "lion",
    "stableadamw": "stable_adamw", "optimistableadamw": "stable_adamw", "muon": "muon", "came8bit": "came",
    "schedulefreeadamw": "schedule_free_adamw", "adamwschedulefree": "schedule_free_adamw",
}
DECAYS = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine", "rex": "rex",
    "cosine_with_restarts": "cosine_restarts", "cosine_with_hard_restarts": "cosine_restarts",
}
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16", "fp32": "fp32", "float32": "fp32",
              "float_32": "fp32", "no": "fp32", "float": "fp32", "fp16": "bf16", "float16": "bf16", "float_16": "bf16",
              "tfloat_32": "fp32"}


@dataclass(frozen=True)
class Folder:
    """A data set of another program."""

    path: str
    key: str
    """What it is called there, for the report."""
    caption: str = ""
    repeats: float = 1
    prior: bool = False


def optimizer(draft: Draft, key: str, name):
    """The optimizer by name; one that averages or estimates comes with what that asks for."""
    plain = str(name).lower().replace("_", "").replace("-", "").rpartition(".")[2]
    ours = OPTIMIZERS.get(plain)
    if ours is None:
        draft.absent.append((key, name, "not known here: adamw is taken, optimizer.name takes others"))
        return
    draft.set("optimizer.name", ours)
    if plain not in (ours.replace("_", ""), "prodigyopt", "bnbadamw8bit"):
        draft.changed.append(f"{key} = {name!r} is optimizer.name = {ours!r}, which is near to it.")
    if ours == "schedule_free_adamw":
        draft.set("optimizer.decay", "constant")


def decay(draft: Draft, key: str, name, cycles=None):
    """The schedule of the learning rate."""
    ours = DECAYS.get(str(name).lower())
    if ours is None:
        draft.absent.append((key, name, f"a schedule is one of {', '.join(DECAYS)} where it has a counterpart"))
    elif draft.get("optimizer.name") != "schedule_free_adamw":
        draft.set("optimizer.decay", ours)
        if ours == "cosine_restarts" and cycles:
            draft.set("optimizer.decay_cycles", max(1, round(number(cycles))))


def precision(draft: Draft, key: str, name):
    ours = PRECISIONS.get(str(name).lower())
    if ours is None:
        draft.absent.append((key, name, "bf16 and fp32 are there"))
        return
    draft.set("precision", ours)
    if str(name).lower() in ("fp16", "float16", "float_16"):
        draft.changed.append(f"{key} = {name!r} is precision = 'bf16': half precision is not trained in here.")


def batch(draft: Draft, size, rounds=1):
    """size: pictures in a pass; rounds: passes that are accumulated."""
    size, rounds = max(1, whole(size or 1)), max(1, whole(rounds or 1))
    draft.set("batch_size", size * rounds)
    draft.set("micro_batch_size", size)
    if rounds > 1:
        draft.changed.append(f"batch_size = {size * rounds} is {size} pictures in a pass times {rounds} accumulated "
                             "passes: it counts all pictures of a step, on all GPUs together.")


def sizes(draft: Draft, key: str, given: Sequence, buckets: bool = True):
    """Sides in pixels, and whether pictures keep their shapes."""
    sides = sorted({whole(side) for side in given})
    if not sides:
        return
    draft.set("data.resolution", sides[-1])
    if len(sides) > 1:
        draft.set("data.resolutions", sides)
        draft.changed.append(f"{key} = {list(given)!r}: each picture is shown at the size nearest to its own, not at "
                             "all of them.")
    if not buckets:
        return
    if draft.recipe.startswith("ultrapixel"):
        draft.set("data.buckets", "ultrapixel")
    elif draft.recipe.startswith("pixart") and set(sides) <= set(TABLES):
        draft.set("data.buckets", "pixart")
    else:
        draft.set("data.buckets", "area")
    draft.set("data.bucket_group", draft.get("micro_batch_size", 1))


def squared(given) -> list[int]:
    """[1024] of 1024, "1024", "1024,1024", "1024x1024" or [1024, 1024]; several of "512,768"."""
    parts = given if isinstance(given, (list, tuple)) else str(given).lower().replace("x", ",").split(",")
    return [whole(part) for part in parts if str(part).strip()]


def data(draft: Draft, folders: Sequence[Folder]):
    """The data sets: one here, the others in the report."""
    own = [folder for folder in folders if not folder.prior]
    for folder in folders:
        if folder.repeats not in (1, None, ""):
            draft.absent.append((f"{folder.key} repeats", folder.repeats, "every picture is shown equally often"))
    if own:
        draft.set("data.path", own[0].path)
        if own[0].caption:
            draft.set("data.caption", own[0].caption)
    for folder in own[1:]:
        if folder.path != own[0].path:
            draft.absent.append((folder.key, folder.path, "[data] names one folder: put the pictures into one"))
    prior = [folder for folder in folders if folder.prior]
    if prior and draft.recipe == "pixart_lora" and draft.has("data.prior_path"):
        draft.set("data.prior_path", prior[0].path)
        draft.set("data.prior_caption", prior[0].caption)
        draft.set("recipe.name", "pixart_dreambooth")
        draft.changed.append("Regularisation pictures are prior pictures: the recipe is pixart_dreambooth, half of "
                             "every batch are such (data.prior_share).")
    else:
        why = f"{draft.recipe} has no regularisation pictures"
        draft.absent += [(folder.key, folder.path, why) for folder in prior]


def epochs(draft: Draft, key: str, count, folders: Sequence[Folder]):
    """Steps of so many rounds through the pictures, where those can be counted."""
    count = number(count)
    pictures = sum(max(folder.repeats or 1, 0) * pictured(folder.path) for folder in folders if not folder.prior)
    if not pictures:
        draft.missing.append(f"steps: {key} = {count:g} rounds through pictures that are not here to be counted: "
                             "steps = rounds x pictures / batch_size.")
        return
    in_batch = draft.get("batch_size", 1)
    steps = max(1, math.ceil(count * math.ceil(pictures / in_batch)))
    draft.set("steps", steps)
    draft.changed.append(f"{key} = {count:g} is steps = {steps}: {pictures:g} pictures, {in_batch} in a batch.")


def pictured(path: str) -> int:
    folder = Path(path).expanduser() if path else None
    if not folder or not folder.is_dir():
        return 0
    return sum(1 for file in folder.rglob("*") if file.suffix.lower() in PICTURES)


def ema(draft: Draft, on: bool, value):
    draft.set("ema.decay", number(value) if on and value else 0.9999 if on else 0)


def kinds(draft: Draft, key: str) -> Row:
    """The kind of an adapter by another program's name."""
    known = {"lora": "lora", "standard": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}

    def value(kind):
        ours = known.get(str(kind).lower())
        if ours is None or ours != "lora" and not draft.has("adapter.kind"):
            raise Absent(f"{draft.recipe} has {'lora, loha and lokr' if draft.has('adapter.kind') else 'plain LoRAs'}")
        return ours if draft.has("adapter.kind") else None

    return Row(("adapter.kind", "recipe.rank"), value, why=f"{draft.recipe} trains no adapter")


def prompts(draft: Draft, texts: Sequence):
    texts = [str(text) for text in texts if str(text).strip()]
    if texts:
        draft.set("samples.prompts", texts)


def every(draft: Draft, key: str, setting: str, count, unit, minutes: str):
    """How often: of steps as it is; of other units, what a person must say."""
    unit = str(unit).upper()
    if is_never(count, unit):
        return
    if unit in ("STEP", "STEPS"):
        draft.set(setting, max(1, round(number(count))))
    else:
        draft.missing.append(f"{setting}: {key} = {count} {unit.lower()}s, and here it is in steps{minutes}.")


def is_never(count, unit: str) -> bool:
    return not count or unit in ("NEVER", "ALWAYS")
