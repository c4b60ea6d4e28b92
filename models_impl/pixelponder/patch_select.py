"""Selection of a condition for each patch of the picture.

A strategy is used in two steps. `choose = strategy.begin(conditions, forced)` does once per picture all that no step
changes; `choose(guide)` returns the Selection of one step. `stepwise` says whether it depends on the step at all.

    Released    the primary condition everywhere: what the released rule amounts to, and no network is needed
    AsRun       the released network, executed as the reference does: for study, and for weights that somebody trained
                (select_net.py)
    Accumulate  the paper's rule, made trainable: patches once chosen stay (accumulate.py)
    Blend       weight maps, one per condition

Everywhere `forced` ((1 or B, rows, columns) int64, see `forced_map`) names the condition that must win a patch; -1 is
none.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FREE = -1  # no condition is forced here


@dataclass(frozen=True)
class Conditions:
    """Embedded hints, the primary one first; the order is part of the input, as it is in the reference."""

    embeds: Tensor
    """(1 or B, K, C, H, W) in latent cells."""
    types: tuple[int, ...]
    """Index of each one's kind; kinds may repeat."""

    def __post_init__(self):
        if self.embeds.ndim != 5 or self.embeds.shape[1] != len(self.types) or not self.types:
            raise ValueError(f"{len(self.types)} types of conditions for embeddings of shape "
                             f"{list(self.embeds.shape)}: expected (B, K, C, H, W) with K of at least 1.")
        H, W = self.embeds.shape[-2:]
        if H % 2 or W % 2:
            raise ValueError(f"Hints of {W}x{H} latent cells do not fill FLUX's tokens of 2x2: their sides must be "
                             "multiples of 16 pixels.")

    @property
    def count(self) -> int:
        return len(self.types)

    def grid(self, patch_size: int = 2) -> tuple[int, int]:
        """(rows, columns) of patches."""
        H, W = self.embeds.shape[-2:]
        if H % patch_size or W % patch_size:
            raise ValueError(f"Hints of {W}x{H} latent cells cannot be cut into patches of {patch_size}x{patch_size}.")
        return H // patch_size, W // patch_size


@dataclass(frozen=True)
class SelectionInputs:
    """Inputs of a selection network in one step, all from inside the ControlNet's trunk."""

    txt: Tensor
    """(B, L, D) embedded text."""
    vec: Tensor
    """(B, D): timestep, guidance and pooled text."""
    rope: Tensor
    """(1 or B, 1, L+N, D/heads/2, 2, 2), text first."""
    attention: Callable


@dataclass(frozen=True)
class Selection:
    map: Tensor
    """(B, C, H, W), the one hint that the ControlNet sees."""
    share: Tensor
    """(B, K, rows, columns): how much of each condition is in a patch, one 1 and zeros but for Blend."""

    @property
    def winner(self) -> Tensor:
        """(B, rows, columns) int64: the condition with the largest share, the first at ties; -1 where none has any."""
        share, index = self.share.max(dim=1)
        return torch.where(share > 0, index, FREE)


def forced_map(masks: Sequence[Tensor | None], rows: int, columns: int) -> Tensor | None:
    """Painted masks (H, W) or (B, H, W) in [0, 1], one or None per condition, of any size -> `forced`.

    A patch is forced where at least half of it is painted; where masks overlap, the earlier condition wins.
    """
    forced = None
    for index, mask in reversed(list(enumerate(masks))):
        if mask is None:
            continue
        mask = mask if mask.ndim == 3 else mask[None]
        painted = F.interpolate(mask[:, None].float(), (rows, columns), mode="area")[:, 0] >= 0.5
        below = painted.new_full((1, rows, columns), FREE, dtype=torch.int64) if forced is None else forced
        forced = torch.where(painted, index, below.to(painted.device))
    return forced


def check_forced(forced: Tensor | None, conditions: Conditions, patch_size: int = 2):
    if forced is None:
        return
    grid = conditions.grid(patch_size)
    if tuple(forced.shape[-2:]) != grid:
        raise ValueError(f"The forced map has {list(forced.shape[-2:])} patches, the picture {list(grid)}.")
    if forced.max() >= conditions.count:
        raise ValueError(f"The forced map names condition {int(forced.max())}, there are {conditions.count}, from 0.")


def one_hot(winner: Tensor, conditions: int) -> Tensor:
    """(B, rows, columns) -> (B, K, rows, columns) bool"""
    return winner[:, None] == torch.arange(conditions, device=winner.device).view(-1, 1, 1)


def gather(conditions: Conditions, winner: Tensor) -> Selection:
    """Each patch taken from only its winner."""
    share = one_hot(winner, conditions.count)  # (B, K, rows, columns)
    H, W = conditions.embeds.shape[-2:]
    cells = share.repeat_interleave(H // share.shape[-2], dim=-2).repeat_interleave(W // share.shape[-1], dim=-1)
    # where, not a product: a condition that lost must not leak, not even as a nan
    embeds = torch.where(cells[:, :, None], conditions.embeds, 0.0).sum(dim=1)
    return Selection(embeds, share.to(embeds.dtype))


class Released:
    """The primary condition everywhere.

    In exact arithmetic the released score is zero (a sum of values whose mean was just subtracted), ties go to the
    first condition, and the map is not accumulated but replaced in every round. What remains of the reference is
    rounding noise, which picks the last 32 of 1024 patches, which are doubled in the map; it is left out here.
    """

    stepwise = False

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[SelectionInputs], Selection]:
        check_forced(forced, conditions)
        winner = torch.zeros((1, *conditions.grid()), dtype=torch.int64, device=conditions.embeds.device)
        if forced is not None:
            winner = torch.where(forced.to(winner) == FREE, winner, forced.to(winner))
        selection = gather(conditions, winner)
        return lambda guide: selection


class Blend:
    """Weighted mean of the conditions in every cell; all stems feed one shared tower, so their maps can be mixed.

    weights: one per condition, a number or a map (H, W) or (B, H, W) of any size, at least 0. Only their proportion
    counts; where all are 0 the map is 0.
    """

    stepwise = False

    def __init__(self, weights: Sequence[float | Tensor]):
        self.weights = tuple(weights)

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[SelectionInputs], Selection]:
        check_forced(forced, conditions)
        if len(self.weights) != conditions.count:
            raise ValueError(f"{len(self.weights)} weights for {conditions.count} conditions.")
        embeds, grid = conditions.embeds, conditions.grid()
        weights = self._maps(embeds)  # (1 or B, K, H, W)
        if forced is not None:
            forced = forced.to(embeds.device)
            cells = forced.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
            weights = torch.where((cells == FREE)[:, None], weights, one_hot(cells, conditions.count).float())
        share = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        mixed = (share[:, :, None] * embeds).sum(dim=1).to(embeds.dtype)
        selection = Selection(mixed, F.adaptive_avg_pool2d(share, grid).to(embeds.dtype))
        return lambda guide: selection

    def _maps(self, embeds: Tensor) -> Tensor:
        H, W = embeds.shape[-2:]
        maps = []
        for weight in self.weights:
            weight = torch.as_tensor(weight, dtype=torch.float32, device=embeds.device)
            if weight.min() < 0:
                raise ValueError(f"A weight of {float(weight.min())} cannot be blended: weights are at least 0.")
            if weight.ndim == 0:
                weight = weight.expand(1, H, W)
            weight = weight if weight.ndim == 3 else weight[None]
            if tuple(weight.shape[-2:]) != (H, W):
                weight = F.interpolate(weight[:, None], (H, W), mode="area")[:, 0]
            maps.append(weight)
        B = max(len(m) for m in maps)
        return torch.stack([m.expand(B, -1, -1) for m in maps], dim=1)
