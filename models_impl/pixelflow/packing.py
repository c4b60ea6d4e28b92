"""Pictures of all stages as one sequence, for training (data_in1k.py)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..family import Noise
from ..objective.loss import RELEASED, Objective
from .model import PackedLayout
from .sampling import CascadeFlow, StageTime, shrink


def patches(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B*N, C*p*p), rows ordered (c ph pw), the layout of `PixelFlow.forward_packed`."""
    return rearrange(x, "B C (h p) (w q) -> (B h w) (C p q)", p=patch_size, q=patch_size)


@dataclass(frozen=True)
class PackedBatch:
    """Pictures of all stages as one sequence, the highest resolution first, as `PixelFlow.forward_packed` takes it."""

    x: Tensor  # (N, C*p*p) noisy
    target: Tensor  # (N, C*p*p) velocity
    timestep: Tensor  # (S,)
    layout: PackedLayout
    order: Tensor  # (S,) index of each item in the unpacked batch
    cells: Tensor | None = None  # (N, p*p) what the pixels count, of masks


def pack(
    images: Tensor,
    times: StageTime,
    noise: Noise,
    flow: CascadeFlow,
    patch_size: int,
    context_lengths: Sequence[int] | None = None,
    cells: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Noise a batch and pack it (data_in1k.py, collate).

    images: (B, C, H, W) at full size; times: as `CascadeFlow.draw` gives them; noise(stage, shape) -> noise of the
    stage's pictures in batch order; context_lengths: text tokens of each picture; cells: what the pixels of each count
    at the size of every stage, (B, 1, h, w) each.
    """
    rows, targets, timesteps, grids, order, counts = [], [], [], [], [], []
    for items, time in reversed(list(times.by_stage())):
        small = shrink(images[items], time.stage, flow.stages.num_stages)
        x, target = flow.pair(small, noise(time.stage, small.shape), time)
        rows.append(patches(x, patch_size))
        targets.append(patches(target, patch_size))
        timesteps.append(flow.network_timestep(time))
        grids += [(small.shape[-2] // patch_size, small.shape[-1] // patch_size)] * len(items)
        order.append(items)
        if cells is not None:
            counts.append(patches(cells[time.stage][items], patch_size))
    order = torch.cat(order)
    lengths = None if context_lengths is None else tuple(int(context_lengths[i]) for i in order)
    return PackedBatch(
        torch.cat(rows), torch.cat(targets), torch.cat(timesteps).to(images.device),
        PackedLayout(tuple(grids), lengths), order, torch.cat(counts) if counts else None,
    )


def packed_loss(velocity: Tensor, target: Tensor, layout: PackedLayout, objective: Objective = RELEASED,
                cells: Tensor | None = None) -> Tensor:
    """The error, mean over the tokens of each item: (S,). Every picture weighs the same whatever its stage. cells: what
    the pixels of each token count, (N, p*p)."""
    errors = objective.errors(velocity.float() - target.float())
    if cells is not None:
        errors = (errors.unflatten(1, (-1, cells.shape[1])) * cells[:, None]).flatten(1)
    rows = errors.mean(dim=-1)  # (N,)
    return torch.stack([part.mean() for part in rows.split(layout.lengths)])
