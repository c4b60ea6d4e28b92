"""The whole of training. A recipe says what the loss is, a run says where things are written."""
from __future__ import annotations

from contextlib import nullcontext

import torch

from . import shard
from .config import Config
from .ema import Ema
from .optim import Optimizers


def train(recipe, batches, config: Config, run, accelerator):
    spread = shard.spread(recipe, config, accelerator)
    optimizer = Optimizers(recipe.groups(config), config.optimizer, config.steps, config.batch_size)
    ema = recipe.average = Ema(recipe, config.ema.decay, config.ema.warm_up)  # LCM's target is made of it
    step = run.restore(recipe, ema, optimizer)
    placed = bool(config.memory.swap_blocks)  # by `swap`
    model = recipe if spread else accelerator.prepare(recipe, device_placement=[not placed])
    parts = parts_of(config, accelerator.process_index, accelerator.num_processes)

    while step < config.steps and not run.asked_to_stop():
        # Chance depends on (seed, step) alone, so a resumed run repeats the unbroken one.
        torch.manual_seed(config.seed * 1_000_003 + step)
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            batch = batches(step, part, following=(step + 1, parts[0]) if last else (step, parts[i + 1]))
            with nullcontext() if last else accelerator.no_sync(model):
                loss = model(batch).mean() / len(parts)
                accelerator.backward(loss)
            total += loss.detach()
        if spread:
            shard.join_gradients(optimizer.parameters)
        norm = optimizer.clip()
        if not norm.isfinite():
            raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}. Lower optimizer.rate="
                                     f"{config.optimizer.rate} or raise optimizer.warm_up={config.optimizer.warm_up}.")
        share = optimizer.step(step)
        ema.update(step)
        step += 1
        run.log(step, loss=total, grad_norm=norm, rate=share * optimizer.rate)
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
