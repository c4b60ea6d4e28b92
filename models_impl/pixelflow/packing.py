"""Pictures of all stages as one sequence, for training (data_in1k.py)."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .model import PackedLayout
from .sampling import shrink, training_pair
from .stages import Stages


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


def pack(
    images: Tensor,
    stage: Tensor,
    t_index: Tensor,
    noise: Callable[[int, torch.Size], Tensor],
    stages: Stages,
    patch_size: int,
    context_lengths: Sequence[int] | None = None,
) -> PackedBatch:
    """Noise a batch and pack it (data_in1k.py, collate).

    images: (B, C, H, W) at full size; stage, t_index: (B,), t_index in [0, num_train_timesteps); noise(stage, shape) ->
    noise of the stage's pictures in batch order; context_lengths: text tokens of each picture.
    """
    grid_t = torch.arange(stages.num_train_timesteps) / stages.num_train_timesteps
    rows, targets, timesteps, grids, order = [], [], [], [], []
    for k in reversed(range(stages.num_stages)):
        items = (stage == k).nonzero().flatten()
        if not len(items):
            continue
        small = shrink(images[items], k, stages.num_stages)
        index = t_index[items]
        x, target = training_pair(small, k, grid_t[index].to(small), noise(k, small.shape), stages)
        rows.append(patches(x, patch_size))
        targets.append(patches(target, patch_size))
        timesteps.append(stages.train_timesteps(k)[index].float())
        grids += [(small.shape[-2] // patch_size, small.shape[-1] // patch_size)] * len(items)
        order.append(items)
    order = torch.cat(order)
    lengths = None if context_lengths is None else tuple(int(context_lengths[i]) for i in order)
    return PackedBatch(
        torch.cat(rows), torch.cat(targets), torch.cat(timesteps).to(images.device),
        PackedLayout(tuple(grids), lengths), order,
    )


def packed_loss(velocity: Tensor, target: Tensor, layout: PackedLayout) -> Tensor:
    """Squared error, mean over the tokens of each item: (S,). Every picture weighs the same whatever its stage."""
    rows = (velocity.float() - target.float()).square().mean(dim=-1)  # (N,)
    return torch.stack([part.mean() for part in rows.split(layout.lengths)])
