"""Random draws of training, which depend only on (seed, step, place in the whole batch).

So a resumed run repeats the unbroken one, and neither micro batches nor processes change what is learned.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ...models_impl.objective import noise as shaped
from ..config.schema import Noise

OFFSET, PYRAMID, PYRAMID_SIZES, PERTURBATION = 16, 32, 48, 64
"""What they add to the kind of the noise that they are for, so that each has draws of its own."""
VALIDATION = -1
"""The seed of everything that is fixed, so that two validations differ only by the network."""


def generator(seed: int, step: int) -> torch.Generator:
    """Generator of what is drawn once a step, for the whole batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def picture_noise(seed: int, step: int, position: int, shape, device, kind: int = 0) -> Tensor:
    """Noise of one picture, by its place in the whole batch: it does not change with micro batches or processes.

    kind: another number gives another draw for the same picture.
    """
    return torch.randn(*shape, generator=_generator(seed, step, position, device, kind), device=device)


def _generator(seed: int, step: int, position: int, device, kind: int) -> torch.Generator:
    number = (seed * 1_000_003 + step) * 65_536 + position + kind * 7_046_029_254_386_353_087
    return torch.Generator(device).manual_seed(number % 2**63)


def batch_noise(seed: int, step: int, positions: range, shape, device, kind: int = 0) -> Tensor:
    """`picture_noise` of every position: (B, *shape)."""
    return torch.stack([picture_noise(seed, step, p, shape, device, kind) for p in positions])


def training_noise(settings: Noise, seed: int, step: int, positions: range, shape, device, kind: int = 0) -> Tensor:
    """The noise of every position that a network is to predict, (B, C, h, w). For a validation it is white, so that
    runs with other settings can be compared."""
    noise = batch_noise(seed, step, positions, shape, device, kind)
    if seed == VALIDATION:
        return noise
    if settings.offset:
        offset = batch_noise(seed, step, positions, (shape[0], 1, 1), device, kind + OFFSET)
        noise = shaped.with_offset(noise, offset, settings.offset)
    if settings.pyramid:
        pictures = []
        for picture, position in zip(noise, positions, strict=True):
            sizes = _generator(seed, step, position, "cpu", kind + PYRAMID_SIZES)
            rng = _generator(seed, step, position, device, kind + PYRAMID)
            pictures.append(shaped.pyramid(
                picture, settings.pyramid, torch.rand(shaped.PYRAMID_LEVELS, generator=sizes).tolist(),
                lambda size, rng=rng: torch.randn(size, generator=rng, device=device)))
        noise = torch.stack(pictures)
    return noise


def state_noise(settings: Noise, noise: Tensor, seed: int, step: int, positions: range, kind: int = 0) -> Tensor:
    """The noise that makes the state which a network sees, of the noise that it is to predict."""
    if not settings.perturbation or seed == VALIDATION:
        return noise
    other = batch_noise(seed, step, positions, noise.shape[1:], noise.device, kind + PERTURBATION)
    return shaped.perturbed(noise, other, settings.perturbation)


def spread(positions: range, count: int) -> Tensor:
    """A number below `count` for every position, spread evenly over them all and always the same: (B,) int64."""
    return (torch.tensor(list(positions)) * 619 + 7) % count
