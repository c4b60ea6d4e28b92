"""How much memory a run takes, measured in its first steps, so that every run says how good the estimate was."""
from __future__ import annotations

import sys

import psutil
import torch

PROMISED, SPARE = 1.25, 2**29
"""What was measured lies within this factor of the estimate, give or take so many bytes: of libraries, of what an
allocator keeps, and of what is no tensor."""
LOOKED_AT = 3  # steps: with the second, all moments are there


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
