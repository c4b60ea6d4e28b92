"""`--dry-run`: what a run would do, said before it does it."""
from __future__ import annotations

import torch

from . import data
from .config import Config
from .optim import Optimizers


def describe(config: Config, found: data.Collection, recipe, batches: data.Batches, parts: list[range], processes: int,
             cpu: bool):
    """The plan in lines of text. recipe: with its weights on the meta device."""
    learns = [(n, p) for n, p in recipe.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in learns)
    lines = [f"run        {config.folder} ({config.recipe.name}, {config.precision}, seed {config.seed})",
             f"data       {data.summary(found)}",
             f"parameters {count:,} learn, {sum(p.numel() for p in recipe.parameters()) - count:,} frozen"]
    parents: dict[str, int] = {}
    for name, p in learns:
        parents[name.split(".")[0]] = parents.get(name.split(".")[0], 0) + p.numel()
    lines += [f"           {parent}: {number:,}" for parent, number in parents.items()]

    optimizers = Optimizers(recipe.groups(config), config.optimizer, config.steps)
    lines.append("optimizer  " + ", ".join(
        f"{type(part).__name__} on {sum(p.numel() for g in part.param_groups for p in g['params']):,}"
        for part in optimizers.parts) + f"; rate {config.optimizer.rate}, {config.optimizer.decay}, "
                                        f"warm-up {config.optimizer.warm_up} steps")
    images = config.steps * config.batch_size
    lines.append(f"steps      {config.steps:,} of {config.batch_size} pictures = {images:,} pictures, "
                 f"{images / len(found.train):.1f} epochs; {processes} process(es), "
                 f"{len(parts)} pass(es) of {len(parts[0])}")
    if len(batches.buckets) > 1:
        lines.append("sizes      " + ", ".join(f"{w}x{h}: {len(some):,}" for (h, w), some in batches.buckets.items()))
    lines += [("buckets    " if i == 0 else "           ") + line for i, line in enumerate(recipe.buckets(0))]

    muon = sum(p.numel() for part in optimizers.parts if type(part).__name__ == "Muon"
               for g in part.param_groups for p in g["params"])
    memory = {
        "weights": 4 * sum(p.numel() for p in recipe.parameters()),
        "gradients": 4 * count,
        "optimizer": 8 * count - 4 * muon,
        "average": 4 * count if config.ema.decay else 0,
        "activations": recipe.activation_bytes(len(parts[0]), cpu),
    }
    lines.append(f"memory     about {sum(memory.values()) / 2**30:.2f} GiB a process: "
                 + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()))
    lines.append("first batch")
    stage, t_index, dropped = recipe.draw(0)
    batch = batches(0, range(min(8, config.batch_size)))
    for i in batch.positions:
        item = batches.items[batches.index(0, i)]
        what = batch.captions[i] if config.text.encoder else f"class {int(batch.labels[i])}"
        lines.append(f"  {item.file.name}: {what!r}{' (dropped)' if dropped[i] else ''}, stage {int(stage[i])}, "
                     f"t {t_index[i] / 1000:.3f}, mean colour {batch.pictures[i].float().mean() / 255:.2f}")
    if config.batch_size > 8:
        lines.append(f"  ... {config.batch_size - 8} more")
    return lines


def on_meta(make):
    """A module as `make` makes it, without its memory."""
    with torch.device("meta"):
        return make()
