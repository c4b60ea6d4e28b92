"""The whole of training. A recipe says what the loss is, a run says where things are written."""
from __future__ import annotations

import torch

from ..config.schema import Config
from ..distributed import strategy
from . import footprint
from .ema import EmaWeights
from .optim import Optimizers


def train(recipe, batches, config: Config, run, accelerator):
    together = strategy.of(recipe, config, accelerator)
    optimizer = Optimizers(recipe.groups(config), config.optimizer, config.steps, config.batch_size, config.seed,
                           config.memory.fused_backward)
    ema = recipe.ema = EmaWeights(recipe, config.ema.decay, config.ema.warm_up)  # LCM's target is made of it
    step = run.restore(recipe, ema, optimizer)
    parts = parts_of(config, accelerator.process_index, accelerator.num_processes)
    device, pictures = accelerator.device, len(parts[0])
    sizes = {}
    if run.main:  # the others would probe the network for nothing
        sizes = footprint.estimate(config, recipe, optimizer, pictures, accelerator.num_processes, device.type == "cpu")
    together.start(optimizer, len(parts), pictures)
    run.pictures = len(batches.items)
    run.baseline(step, recipe, ema, optimizer)
    run.footprint.begin(step, sum(sizes.values()))

    while step < config.steps and run.goes_on(step, recipe, ema, optimizer):
        # Random draws depend only on (seed, step), so a resumed run repeats the unbroken one.
        torch.manual_seed(config.seed * 1_000_003 + step)
        total = torch.zeros((), device=device)
        optimizer.begin(step)
        with run.rescuing(step, recipe, ema, optimizer, Exception):
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                batch = batches(step, part, following=(step + 1, parts[0]) if last else (step, parts[i + 1]))
                total += together.backward(batch, len(parts), last)
        with run.rescuing(step, recipe, ema, optimizer, FloatingPointError):  # comes before anything has changed
            norm, share = together.update(optimizer, step)
        ema.update(step)
        step += 1
        run.log(step, loss=total, grad_norm=norm, learning_rate=share * optimizer.learning_rate * optimizer.estimate)
        run.after(step, recipe, ema, optimizer)
    run.finish(step, recipe, ema, optimizer)
    return step


def parts_of(config: Config, process: int, processes: int) -> list[range]:
    """The positions in the whole batch that this process takes, one range per accumulation round."""
    own = config.batch_size // processes
    micro = min(config.micro_batch_size or own, own)
    if config.batch_size % (processes * micro):
        raise ValueError(f"batch_size={config.batch_size} does not divide into passes of {micro} on {processes} "
                         "processes.")
    start = process * own
    return [range(s, s + micro) for s in range(start, start + own, micro)]
