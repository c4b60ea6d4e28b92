"""Divergence: a loss or gradient norm that is far from its own past."""
from __future__ import annotations

from math import isfinite
from statistics import median

IN_A_ROW = 5  # lines of the log; a single one may be a batch of hard pictures
WINDOW, LEAST = 200, 20  # lines of the past that count, and without which nothing is said
NORM = 10  # times the factor is what a gradient norm may be: it is noisier, and clipped


class Divergence:
    """Follows the lines of a run's log. factor: how many times the median of its past a loss may be; 0 = any."""

    def __init__(self, factor: float):
        self.factor, self.lines, self.far = factor, [], []
        self.calm = 0
        """Step of the last line that was as usual."""

    def see(self, step: int, loss: float, norm: float) -> str:
        """What has diverged, in words, once `IN_A_ROW` lines did; empty before."""
        words = self.compared(loss, norm)
        if not words:
            self.lines = [*self.lines, *((one, two) for _, one, two in self.far), (loss, norm)][-WINDOW:]
            self.far, self.calm = [], step
            return ""
        self.far.append((step, loss, norm))
        return words if len(self.far) >= IN_A_ROW else ""

    def compared(self, loss: float, norm: float) -> str:
        if not self.factor or len(self.lines) < LEAST:
            return ""
        for name, value, past, factor in (("loss", loss, [one for one, _ in self.lines], self.factor),
                                          ("gradient norm", norm, [two for _, two in self.lines], NORM * self.factor)):
            usual = median(past)
            if usual > 0 and not value <= factor * usual:  # NaN is far, too
                return f"the {name} is {value:.4g}, and was {usual:.4g} before"
        return ""

    def remember(self, entries: list[dict]):
        """The past of a run that goes on, of its log."""
        for entry in entries:
            loss, norm = entry.get("loss"), entry.get("grad_norm")
            if isinstance(loss, float) and isinstance(norm, float) and isfinite(loss) and isfinite(norm):
                self.see(entry["step"], loss, norm)
