"""Random draws of training, which depend only on (seed, step, place in the whole batch).

So a resumed run repeats the unbroken one, and neither micro batches nor processes change what is learned.
"""
from __future__ import annotations

import torch
from torch import Tensor

VALIDATION = -1
"""The seed of everything that is fixed, so that two validations differ only by the network."""


def generator(seed: int, step: int) -> torch.Generator:
    """Generator of what is drawn once a step, for the whole batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def picture_noise(seed: int, step: int, position: int, shape, device, kind: int = 0) -> Tensor:
    """Noise of one picture, by its place in the whole batch: it does not change with micro batches or processes.

    kind: another number gives another draw for the same picture.
    """
    number = (seed * 1_000_003 + step) * 65_536 + position + kind * 7_046_029_254_386_353_087
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(number % 2**63), device=device)


def batch_noise(seed: int, step: int, positions: range, shape, device, kind: int = 0) -> Tensor:
    """`picture_noise` of every position: (B, *shape)."""
    return torch.stack([picture_noise(seed, step, p, shape, device, kind) for p in positions])


def spread(positions: range, count: int) -> Tensor:
    """A number below `count` for every position, spread evenly over them all and always the same: (B,) int64."""
    return (torch.tensor(list(positions)) * 619 + 7) % count
