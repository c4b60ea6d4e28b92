"""Weights of the loss by its noise level."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ....models_impl.ultrapixel import sampling


class LossWeight(nn.Module):
    """A weight for each noise level. adaptive: `sampling.AdaptiveLossWeight`, whose means are saved with the run,
    change once a step, and see the pictures of all micro batches and processes in the order of their places."""

    def __init__(self, kind: str, batch_size: int):
        super().__init__()
        self.kind, self.batch_size = kind, batch_size
        self.step, self.seen = -1, None
        if kind == "adaptive":
            self.register_buffer("means", torch.ones(300))

    def adaptive(self) -> sampling.AdaptiveLossWeight:
        found = sampling.AdaptiveLossWeight(len(self.means))
        found.losses = self.means.cpu()
        return found

    def forward(self, logsnr: Tensor, loss: Tensor, batch) -> Tensor:
        """(B,) each -> (B,), the loss times its weight."""
        if self.kind == "none":
            return loss
        if self.kind == "p2":
            return loss * sampling.p2_weight(logsnr).to(loss)
        weight = self.adaptive().weight(logsnr).to(loss)
        self.remember(logsnr, loss, batch)
        return loss * weight

    @torch.no_grad()
    def remember(self, logsnr: Tensor, loss: Tensor, batch):
        rows = torch.zeros(self.batch_size, 3, device=loss.device)
        own = slice(batch.positions.start, batch.positions.stop)
        rows[own] = torch.stack([torch.ones_like(loss), logsnr.to(loss), loss], dim=1).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(rows)  # every place is filled by one process only
        if self.step != batch.step:
            self.step, self.seen = batch.step, torch.zeros_like(rows)
        self.seen = torch.where(rows[:, :1] > 0, rows, self.seen)
        if self.seen[:, 0].all():
            mean = self.adaptive()
            mean.update(self.seen[:, 1].contiguous(), self.seen[:, 2])
            self.means.copy_(mean.losses)
            self.seen = torch.zeros_like(rows)
