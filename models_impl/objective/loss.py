"""How the errors of a prediction become the loss of a picture: their kind, their weight by the noise level, masks.

Weights by the signal-to-noise ratio are meant for the squared error of the sample, w(SNR), and are brought to that of
what the network predicts. The state is x = a sample + b noise, and SNR = a^2 / b^2. In place of the sample's squared
error that of eps is SNR times as large, that of the velocity a noise - b sample with a^2 + b^2 = 1 is SNR + 1 times,
and that of a flow's noise - sample with a + b = 1 is (1 + sqrt(SNR))^2 times as large.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

KINDS = ("mse", "mae", "huber", "pseudo_huber")
SCHEDULES = ("constant", "exponential", "snr")
PER_SAMPLE_ERROR = {  # what is predicted -> its squared error over that of the sample, from the SNR
    "eps": lambda snr: snr,
    "v": lambda snr: snr + 1,
    "flow": lambda snr: (1 + snr.sqrt()).square(),
}


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR (arXiv 2303.09556, section 3.4): w = min(SNR, gamma). For a flow the same w, which the paper, of
    diffusion, does not treat."""
    return snr.clamp(max=gamma) / PER_SAMPLE_ERROR[prediction](snr)


def debiased_weight(snr: Tensor, prediction: str) -> Tensor:
    """Debiased estimation (arXiv 2310.08442): 1 / sqrt(SNR) on the error of eps, so w = sqrt(SNR). kohya's scripts and
    OneTrainer cut the SNR off at 1000, where the weight is small anyway, and have others for v."""
    return snr.sqrt() / PER_SAMPLE_ERROR[prediction](snr)


def cell_weights(mask: Tensor, size: tuple[int, int], unmasked: float, normalise: bool) -> Tensor:
    """What the error of each cell counts, (B, 1, h, w). mask: (B, 1, H, W) in [0, 1], brought to `size` by means over
    areas, as kohya's apply_masked_loss; unmasked: what a cell outside counts. normalise: divide by the mean, so that a
    small mask counts as much as a large one, as OneTrainer's normalize_masked_area_loss."""
    weight = F.interpolate(mask, size, mode="area").clamp(min=unmasked)
    return weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-6) if normalise else weight


def mean(values: Tensor, cells: Tensor | None = None) -> Tensor:
    """The mean of each picture, (B,). values: (B, C, h, w); cells: what each cell counts, (B, 1, h, w)."""
    return (values if cells is None else values * cells).flatten(1).mean(1)


@dataclass(frozen=True)
class Objective:
    """The kind of error, and its weight by the noise level."""

    kind: str = "mse"
    """mse, mae, huber: quadratic up to `delta`, then linear, twice torch's; pseudo_huber: smooth, 2 delta (sqrt(error^2
    + delta^2) - delta) (arXiv 2403.16728; kohya's "huber"). Both are the mse where errors are small."""
    delta: float = 0.1
    schedule: str = "constant"
    """exponential: delta^level; snr: (1 - delta) / (1 + sigma)^2 + delta with sigma = SNR^-1/2, as in
    library/train_util.py of kohya-ss/sd-scripts."""
    snr_gamma: float = 0.0
    """0 = no Min-SNR."""
    debiased: bool = False

    def __post_init__(self):
        if self.kind not in KINDS or self.schedule not in SCHEDULES:
            raise ValueError(f"An error of the kind {self.kind!r} with the schedule {self.schedule!r} is none of "
                             f"{', '.join(KINDS)} with {', '.join(SCHEDULES)}.")

    def errors(self, difference: Tensor, level: Tensor | None = None, snr: Tensor | None = None) -> Tensor:
        """(B, ...), of every value. level: (B,) in [0, 1], and snr: (B,), for a scheduled delta."""
        if self.kind == "mse":
            return difference.square()
        if self.kind == "mae":
            return difference.abs()
        delta = self.delta
        if self.schedule == "exponential":
            delta = delta**level
        elif self.schedule == "snr":
            delta = (1 - delta) / (1 + snr.rsqrt()).square() + delta
        if isinstance(delta, Tensor):
            delta = delta.to(difference).view(-1, *[1] * (difference.ndim - 1))
        if self.kind == "pseudo_huber":
            return 2 * delta * ((difference.square() + delta**2).sqrt() - delta)
        inside = difference.abs().clamp(max=delta)
        return inside * (2 * difference.abs() - inside)

    def weighted(self, loss: Tensor, snr: Tensor, prediction: str) -> Tensor:
        """The loss of each picture times the weight of its noise level, (B,). prediction: in PER_SAMPLE_ERROR."""
        if self.snr_gamma:
            loss = loss * min_snr_weight(snr, self.snr_gamma, prediction).to(loss)
        if self.debiased:
            loss = loss * debiased_weight(snr, prediction).to(loss)
        return loss


RELEASED = Objective()
"""The mean squared error, as every family was released."""
