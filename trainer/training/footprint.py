"""How much memory a step takes: estimated beforehand, and measured in the first steps of a run, so that every run says
how good the estimate was."""
from __future__ import annotations

import sys

import psutil
import torch

from ..config import rules
from ..config.schema import Config
from ..distributed import deepspeed, fsdp2
from ..memory import offload
from .optim import Optimizers

PROMISED, SPARE = 1.25, 2**29
"""What was measured lies within this factor of the estimate, give or take so many bytes: of libraries, of what an
allocator keeps, and of what is no tensor."""
LOOKED_AT = 3  # steps: with the second, all moments are there


def estimate(config: Config, recipe, optimizers: Optimizers, pictures: int, processes: int,
             cpu: bool) -> dict[str, float]:
    """Bytes that a process holds in a step, by what they are."""
    learns = [p for p in recipe.parameters() if p.requires_grad]
    count = sum(p.numel() for p in learns)
    weights = sum(p.nbytes for net in (recipe, *recipe.teacher) for p in net.parameters())
    with torch.random.fork_rng(devices=[]):  # of the probes' weights
        activations = recipe.activation_bytes(pictures, cpu)
    sizes = {
        "weights": weights - offload.spared(recipe, config),
        "gradients": max(p.nbytes for p in learns) if config.memory.fused_backward else sum(p.nbytes for p in learns),
        "optimizer": optimizers.state_bytes()
        + max((8 * p.numel() for p in learns if p.dtype == torch.bfloat16), default=0),  # one in float32, and gradient
        "ema": 4 * count if config.ema.decay else 0,
        "activations": activations,
    }
    way = rules.way(config)
    if way == rules.FSDP2:
        blocks = [p for block in fsdp2.blocks(recipe) for p in block.parameters()]
        learning = sum(p.numel() for p in blocks if p.requires_grad)
        elsewhere = {"weights": sum(p.nbytes for p in blocks), "gradients": 4 * learning,
                     "optimizer": optimizers.state_bytes({id(p) for p in blocks}),
                     "ema": 4 * learning if config.ema.decay else 0}
        for name, size in elsewhere.items():
            sizes[name] -= (1 - 1 / processes) * size
    if way == rules.DEEPSPEED:
        gradients, moments = deepspeed.shares(processes)
        sizes["gradients"] *= gradients
        sizes["optimizer"] = moments * (sizes["optimizer"] + 4 * count)  # and a copy of the weights
    return sizes


def at_most(device: torch.device) -> int | None:
    """Bytes in use, at most until now: of tensors on a GPU, else of the process, where the system says so."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Footprint:
    """What a run measures. To be made before its network is."""

    def __init__(self, device: torch.device):
        self.device, self.estimated, self.first, self.most = device, 0, 0, 0
        self.before = psutil.Process().memory_info().rss
        self.peak_before = at_most(device) or 0

    def begin(self, step: int, estimated: float):
        """Before the first step."""
        self.first, self.estimated = step, round(estimated)
        if self.device.type == "cuda":  # samples before the first step are no part of one
            self.most = at_most(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Bytes in use, at most until now."""
        now = at_most(self.device)
        return now and max(now, self.most)

    def of_steps(self) -> int | None:
        """Bytes that the steps took until now; None where that cannot be said. On a CPU: by how much the process has
        grown, unless it was as large before."""
        now = at_most(self.device)
        if self.device.type == "cuda":
            return now
        known = self.device.type == "cpu" and now and now > self.peak_before
        return now - self.before if known else None

    def complaint(self, step: int) -> str:
        """After some steps, a sentence if the estimate was off by more than it promises; else nothing."""
        measured = self.of_steps() if step == self.first + LOOKED_AT and self.estimated else None
        if measured is None or (self.estimated / PROMISED - SPARE <= measured <= self.estimated * PROMISED + SPARE):
            return ""
        way = "more" if measured > self.estimated else "less"
        return (f"A step takes {measured / 2**30:.2f} GiB, {way} than --dry-run's {self.estimated / 2**30:.2f}: that "
                f"estimate is off by more than the quarter that it promises. Go by what was measured (memory in "
                "log.jsonl).")
