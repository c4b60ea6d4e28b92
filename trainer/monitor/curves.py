"""What a run has logged, read on from where the last reading ended, and thinned out for a screen."""
from __future__ import annotations

import math
import os
from pathlib import Path
from threading import Lock

from ..files import line_of_log


class RunLog:
    """The numbers of a log.jsonl by their names: steps and values."""

    def __init__(self, path: Path):
        self.path, self.lock = path, Lock()
        self.forget()

    def forget(self):
        self.place, self.file, self.series = 0, None, {}

    def refresh(self):
        """Reads what was added. A run that goes on from a checkpoint writes its log anew, and so is it read."""
        with self.lock:
            try:
                with open(self.path, "rb") as file:
                    about = os.fstat(file.fileno())
                    if (about.st_dev, about.st_ino) != self.file or about.st_size < self.place:
                        self.forget()
                        self.file = about.st_dev, about.st_ino
                    file.seek(self.place)
                    lines, end, _ = file.read().rpartition(b"\n")  # what follows the last end of line is being written
            except FileNotFoundError:
                return self.forget()
            self.place += len(lines) + len(end)
            for line in lines.split(b"\n"):
                if entry := line_of_log(line.decode(errors="replace")):
                    self.add(entry)

    def add(self, entry: dict):
        step = entry.pop("step")
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = self.series.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))

    def last(self) -> dict[str, float | None]:
        """The newest value of each name."""
        with self.lock:
            return {name: as_json(values[-1]) for name, (_, values) in self.series.items()}

    def step(self) -> int:
        with self.lock:
            return max((steps[-1] for steps, _ in self.series.values()), default=0)

    def curves(self, points: int) -> dict[str, dict[str, list]]:
        with self.lock:
            return {name: thinned(steps, values, points) for name, (steps, values) in self.series.items()}


def thinned(steps: list[int], values: list[float], points: int) -> dict[str, list]:
    """At most so many points (x, y). Where there are more values, y is the mean of each stretch and low and high are
    its ends, so that no peak is lost."""
    if len(steps) <= points:
        return {"x": steps[:], "y": [as_json(value) for value in values]}
    found = {"x": [], "y": [], "low": [], "high": []}
    for i in range(points):
        first, end = i * len(steps) // points, (i + 1) * len(steps) // points
        finite = [value for value in values[first:end] if math.isfinite(value)]
        found["x"].append(steps[end - 1])
        found["y"].append(as_json(sum(finite) / len(finite)) if finite else None)
        found["low"].append(as_json(min(finite)) if finite else None)
        found["high"].append(as_json(max(finite)) if finite else None)
    return found


def as_json(value: float) -> float | None:
    """JSON has no NaN and no infinity, and a screen no more than six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
