"""`--dry-run`: what a run would do, said before it does it."""
from __future__ import annotations

import warnings

import torch

from ...models_impl.state_dict import first_line
from ..config.schema import Config
from ..data import loader, sets, wording
from ..features import cache, text_encoders
from ..memory import offload, quantization
from . import cost, footprint
from .optim import Optimizers


def describe(config: Config, collection: loader.Collection, recipe, batches: loader.Batches, parts: list[range],
             processes: int, device: torch.device):
    """The plan in lines of text. recipe: with its weights on the meta device; it cannot be used afterwards."""
    learns = [(n, p) for n, p in recipe.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in learns)
    lines = [f"run        {config.folder} ({config.recipe.name}, {config.precision}, seed {config.seed})",
             f"data       {loader.summary(collection)}",
             *(f"           {line}" for line in sets.counted(collection.train, collection.held_out, config.data)),
             *captions(config, collection, recipe.text),
             f"parameters {count:,} learn, {quantization.size(recipe) - count:,} frozen"]
    parents: dict[str, int] = {}
    for name, p in learns:
        parents[name.split(".")[0]] = parents.get(name.split(".")[0], 0) + p.numel()
    lines += [f"           {parent}: {number:,}" for parent, number in parents.items()]

    optimizers = Optimizers(recipe.groups(config), config.optimizer, config.steps, config.batch_size, config.seed,
                            config.memory.fused_backward)
    trained = ", ".join(f"{name} on {count:,}" for name, count in optimizers.counted().items())
    lines.append(f"optimizer  {trained}; learning rate {optimizers.learning_rate:.3g}, {config.optimizer.decay}, "
                 f"warm-up {config.optimizer.warm_up} steps")
    lines += [f"           {line}" for line in optimizers.described()]
    images = config.steps * config.batch_size
    lines.append(f"steps      {config.steps:,} of {config.batch_size} pictures = {images:,} pictures, "
                 f"{images / batches.an_epoch:.1f} epochs; {processes} process(es), "
                 f"{len(parts)} pass(es) of {len(parts[0])}")
    if len(batches.buckets) > 1:
        lines.append("sizes      " + ", ".join(f"{w}x{h}: {len(some):,}" for (h, w), some in batches.buckets.items()))
    lines += [("buckets    " if i == 0 else "           ") + line for i, line in enumerate(recipe.buckets(0))]

    sizes = footprint.estimate(config, recipe, optimizers, len(parts[0]), processes, device.type == "cpu")
    swapped = offload.spared(recipe, config)
    lines.append(f"memory     about {sum(sizes.values()) / 2**30:.2f} GiB a process: "
                 + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
                 + (f"; {swapped / 2**30:.2f} more in host memory" if swapped else ""))
    lines.append("first batch")
    need = config.needs
    batch = batches(0, range(min(8, config.batch_size)))
    for i, draws in zip(batch.positions, recipe.described(0), strict=False):
        item = batches.items[batches.index(0, i)]
        what = {"captions": f"{batch.captions[i]!r}, ", "classes": f"class {int(batch.labels[i])}, "}.get(need, "")
        lines.append(f"  {item.file.name}: {what}{draws}, mean colour "
                     f"{batch.pictures[i].float().mean() / 255:.2f}")
    if config.batch_size > 8:
        lines.append(f"  ... {config.batch_size - 8} more")
    where = next(i for i, line in enumerate(lines) if line.startswith("memory"))
    return lines[:where + 1] + duration(config, collection, recipe, parts, device) + lines[where + 1:]


def captions(config: Config, collection: loader.Collection, text) -> list[str]:
    """How many captions a frozen encoder embeds before the first step, and how many of them it did before."""
    if not isinstance(text, text_encoders.FROZEN) or text.word:
        return []
    if not config.text.ahead:
        return ["captions   each is embedded when it is first shown (text.ahead=false)"]

    def asked():
        return wording.every(collection.train, collection.held_out, config.data, config.seed)

    count, missing = wording.different(asked()), len(text.missing(asked()))
    said = wording.counted(count, collection.train, config.data) if config.data.caption_variants else \
        f"{count:,} captions"
    return [f"captions   {said}; {count - missing:,} are embedded already"]


SLOWER = 2  # than estimated were real steps of pixelflow_emoji (2.1 times) and flux_emoji (1.9), on one CPU core


def duration(config: Config, collection: loader.Collection, recipe, parts: list[range],
             device: torch.device) -> list[str]:
    """How long a step and the run would take on this device, and how that is known."""
    rates = cost.Rates(device)
    known, every = cache.counted(config, recipe.encoders, collection.train) if recipe.encoders else (0, 0)
    try:
        step = cost.of_a_step(config, collection, recipe, parts, rates, cached=known == every)
    except (RuntimeError, NotImplementedError) as error:  # of operations that look at values, which are not there
        return [f"time       cannot be estimated for these settings: {first_line(error)}"]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    encoded = "no encoder of pictures" if not recipe.encoders else "all pictures are cached" if known == every else \
        f"pictures are encoded at every step, for {known:,} of {every:,} are cached"
    rest = " " * 11
    least, most = step.seconds, SLOWER * step.seconds
    return [f"time       about {spoken(least)} to {spoken(most)} a step, {spoken(config.steps * least)} to "
            f"{spoken(config.steps * most)} in all on this {device.type}: estimated, not measured",
            f"{rest}from {step.flops / 1e12:,.3g} TFLOP a step and process, and what it reads and writes, at",
            f"{rest}{rates.flops(dtype) / 1e12:,.2g} TFLOP/s and {rates.bytes / 1e9:,.0f} GB/s that a product and a "
            "copy reach here now;",
            f"{rest}{encoded}; without samples, validation and communication between processes",
            *(f"{rest}{line}" for line in [cost.slow_precision(config, rates)] if line)]


def spoken(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= 1.5 * size or unit == "s":
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def on_meta(make):
    """A module as `make` makes it, without its memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # what a start's file holds
        return make()
