"""What several programs say in other words: batches, sizes, schedules, errors and noise levels."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...models_impl.pixart.buckets import TABLES
from ..config import optimizers
from .rows import Absent, Draft, Row, number, to, whole, yes

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
BUCKET_MULTIPLE = 64  # of data.bucket_multiple
SMALL_MULTIPLE = 16


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


def early(draft: Draft, key: str, given: dict, clip: str):
    """Weights that learn during the backward pass. To be asked when optimizer and batch are known. clip: what the limit
    of the gradients is called there."""
    value = given.pop(key, None)
    if not yes(value):
        return
    if draft.get("batch_size", 1) != draft.get("micro_batch_size", 1):
        draft.absent.append((key, value, "memory.fused_backward takes one pass a step, and passes are accumulated"))
    elif not optimizers.kind(draft.get("optimizer.name", "adamw")).by_parameter:
        draft.absent.append((key, value, "this optimizer looks at all parameters together"))
    else:
        draft.set("memory.fused_backward", True)
        draft.set("optimizer.clip", 0)
        if number(given.pop(clip, 0) or 0):
            draft.changed.append(f"{clip}: with {key} the gradients of each parameter are limited by themselves there, "
                                 "and not at all here; optimizer.name = 'stable_adamw' limits its updates.")


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
        if sides[0] < BUCKET_MULTIPLE:
            draft.set("data.bucket_multiple", SMALL_MULTIPLE)
    draft.set("data.bucket_group", draft.get("micro_batch_size", 1))


def squared(given) -> list[int]:
    """[1024] of 1024, "1024", "1024,1024", "1024x1024" or [1024, 1024]; several of "512,768"."""
    parts = given if isinstance(given, (list, tuple)) else str(given).lower().replace("x", ",").split(",")
    return [whole(part) for part in parts if str(part).strip()]


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


def released(draft: Draft) -> str:
    """The distribution that noise.timesteps = "released" means."""
    return "logit_normal" if draft.recipe.startswith("flux") else "uniform"


def timesteps(draft: Draft, key: str, given, kind: str | None, mean: float = 0.0, deviation: float = 1.0,
              said: bool = True):
    """The distribution of the noise levels. kind: in noise.timesteps, or None for what has no counterpart."""
    if kind is None:
        draft.absent.append((key, given, "noise.timesteps has uniform and logit_normal"))
        return
    apart = kind == "logit_normal" and (mean, deviation) != (0, 1)
    if kind == released(draft) and not apart:
        return
    draft.apply(key, given, to("noise.timesteps", value=lambda _: kind), said)
    if apart and draft.has("noise.mean"):
        draft.set("noise.mean", float(mean))
        draft.set("noise.deviation", float(deviation))


def between(draft: Draft, low: tuple[str, Any, float], high: tuple[str, Any, float], squeezed: bool = False):
    """Nothing below and above a timestep, of 1000. low, high: what it is called there, its value there, the timestep.
    squeezed: there the whole distribution goes between the two."""
    other = draft.get("noise.timesteps", released(draft)) != "uniform" or draft.get("noise.shift", 1) != 1
    changed = "there the distribution is squeezed between the two, here it is cut off." if squeezed and other else ""
    for (key, given, timestep), setting, usual in ((low, "min_timestep", 0), (high, "max_timestep", 1000)):
        if timestep != usual:
            draft.apply(key, given, Row((f"noise.{setting}",), lambda _, value=timestep: float(value), changed))


def error(draft: Draft, key: str, given, kind: str, changed: str = "", delta=None, schedule: str = "constant"):
    """The kind of error, in loss.kind, with what belongs to it."""
    draft.apply(key, given, to("loss.kind", value=lambda _: kind, changed=changed))
    if "huber" in kind and draft.has("loss.huber_delta"):
        draft.set("loss.huber_delta", number(delta))
        draft.set("loss.huber_schedule", schedule)
