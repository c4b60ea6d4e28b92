"""What a benchmark reports: that ours and a peer compute the same, then how they compare, round by round.

    with Report() as report:
        equal = report.equal("PixArt, 512 px", "diffusers", difference(theirs, ours), "float32")
        report.row(Row(what="PixArt", peer="diffusers", ours=[...], theirs=[...], equal=equal), "the line for people")

A side that computes something else fails the benchmark at its end, unless the row says why it differs. It is measured
all the same, for time on a GPU is rare, and its row says that it is not equal.
Where the environment variable PIXSTACK_BENCH_ROWS names a file, each row is added to it as a line of JSON.
"""
from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROWS = "PIXSTACK_BENCH_ROWS"
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Greatest difference of two results that are called equal, by dtype: in standard deviations of the result."""
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One comparison of ours with a peer."""

    what: str
    """What was done, without the sizes in `axes`."""
    peer: str
    ours: Sequence[float]
    """Seconds of ours, one per round."""
    theirs: Sequence[float]
    """Seconds of the peer in the same rounds."""
    details: str = ""
    """Depth, dtype: what is the same in all rows that differ in an axis only."""
    axes: Mapping[str, float] = field(default_factory=dict)
    """Size (pixels), batch, conditions: what the cost may grow with."""
    memory: tuple[float, float] | None = None
    """Peak memory of ours and of the peer in GiB; None: not measured."""
    difference: float | None = None
    """Greatest difference of the results in standard deviations; None: not compared."""
    equal: bool = True
    """Whether the results are the same within the tolerance, where they should be."""
    note: str = ""
    """Why the results differ or are not compared, and what else the reader must know."""

    @property
    def ratios(self) -> list[float]:
        """Seconds of the peer / ours, one per round: above 1 = ours is faster."""
        return [theirs / ours for theirs, ours in zip(self.theirs, self.ours, strict=True)]

    def as_json(self) -> dict:
        ratios = self.ratios
        return {**asdict(self), "ratios": ratios, "seconds": statistics.median(self.ours),
                "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}}


class Report:
    """Rows of one benchmark. Leaving it ends the benchmark with an error where two sides were not equal."""

    def __init__(self):
        self.unequal: list[str] = []

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None and self.unequal:
            sys.exit("\n".join(self.unequal))

    def equal(self, what: str, peer: str, difference: float, dtype: str) -> bool:
        """Whether the results are the same within the tolerance of the dtype. If not, the benchmark will fail."""
        if difference <= TOLERANCE[dtype]:  # False for nan
            return True
        self.unequal.append(f"{what}: the results of ours and of {peer} differ by {difference:.1e} of the standard "
                            f"deviation, more than the {TOLERANCE[dtype]:g} allowed in {dtype}.")
        print(self.unequal[-1], flush=True)
        return False

    def row(self, row: Row, line: str = ""):
        """Prints the line, and adds the row to the file that the suite reads."""
        if line:
            print(line, flush=True)
        if path := os.environ.get(ROWS):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.as_json()) + "\n")


# --- Figures

def difference(theirs, ours) -> float:
    """Greatest difference of two tensors in standard deviations of ours; 0 where they are the same to the bit."""
    theirs, ours = theirs.double(), ours.double()
    distance = float((theirs - ours).abs().max())
    return distance / max(float(ours.std()), sys.float_info.min) if distance else 0.0


def spread(values: Sequence[float]) -> str:
    """Median (least to most), with three digits or more."""
    greatest = max(map(abs, values))
    digits = max(2, 2 - math.floor(math.log10(greatest))) if greatest else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares: 2 = twice the size costs four times as much."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(n) for n in costs]).slope


# --- Time and memory

class Memory:
    """Peak over what was held when it was made, in bytes; on a CPU of the process, and only on Linux (else 0)."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            forget_peak()
            self.before = status_bytes("VmRSS")

    def peak(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self.before
        return status_bytes("VmHWM") - self.before


def forget_peak():
    """The peak memory of this process is counted anew, after what was freed went back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):  # only on Linux with glibc
        pass


def status_bytes(name: str) -> int:
    """Entry of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def clock(device: str) -> float:
    """Seconds: of the clock with a GPU, else of the processor, all threads together, which neighbours change less."""
    if device != "cuda":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float, int]:
    """(result, seconds, peak bytes)."""
    memory, start = Memory(device), clock(device)
    result = work()
    return result, clock(device) - start, memory.peak()
