"""Conditions whose rows share a batch where core's would not, or reach the network as they are."""
from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import comfy.conds
import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")
FEW = 512
"""Patch tokens. With more of them, a CPU finishes two passes sooner than one of twice the rows."""


def one_pass_is_faster(tokens: int, device: torch.device) -> bool:
    """Whether prompts of different lengths should share a masked pass over so many patch tokens for each prompt: where
    a pass costs more by being one than by its arithmetic (figures: benchmarks/pixart.py)."""
    return device.type != "cpu" or tokens <= FEW


class TextCond(comfy.conds.CONDRegular):
    """Text tokens (B, L, C). Prompts of different lengths share a batch, if they may: the shorter one is padded with
    zeros."""

    def __init__(self, cond: Tensor, fill: bool = True):
        super().__init__(cond)
        self.fill = fill

    def _copy_with(self, cond):
        return type(self)(cond, self.fill)

    def can_concat(self, other) -> bool:
        ours, theirs = self.cond.shape, other.cond.shape
        alike = ours[0] == theirs[0] and ours[2:] == theirs[2:] and self.cond.device == other.cond.device
        return alike and (self.fill or ours == theirs)

    def concat(self, others) -> Tensor:
        rows = [self.cond, *(o.cond for o in others)]
        longest = max(row.shape[1] for row in rows)
        padding = [0, 0] * (self.cond.ndim - 2)
        return torch.cat([F.pad(row, (*padding, 0, longest - row.shape[1])) for row in rows])


class TextMask(TextCond):
    """1 = keep, (B, L), padded like the tokens. It arrives as a tuple of one, so that ComfyUI does not send it to the
    device in every step; as None where all are kept, because a mask rules out flash attention."""

    def concat(self, others) -> tuple[Tensor] | None:
        mask = super().concat(others)
        return None if mask.all() else (mask,)


class Exact(comfy.conds.CONDRegular):
    """A tensor that ComfyUI must not round to the model's dtype: it arrives as a tuple of one."""

    def concat(self, others) -> tuple[Tensor]:
        return (super().concat(others),)


class PromptCache:
    """One prompt of one sampling run; what a network computes only from it can be kept here for as long."""

    def __init__(self):
        self.kept = {}


def once_per_prompt(prompts: tuple | None, rows: int, device: torch.device, encode: Callable[[], T]) -> T:
    """`encode()`, what a network computes on a device only from the prompts of a batch, kept as long as their sampling
    run.

    prompts: of `PromptKey`, None where nothing may be kept; rows: of the batch.
    """
    if not prompts or sum(n for _, n in prompts) != rows:
        return encode()
    kept, key = prompts[0][0].kept, (prompts[1:], prompts[0][1], device)
    if key not in kept:
        kept[key] = encode()
    return kept[key]


class PromptKey(comfy.conds.CONDRegular):
    """Whose tokens the rows of a batch are: a tuple of (Prompt, how many rows)."""

    def __init__(self, prompt: PromptCache, rows: int = 1):
        super().__init__(prompt)
        self.rows = rows

    def process_cond(self, batch_size, **kwargs):
        return PromptKey(self.cond, batch_size)

    def can_concat(self, other) -> bool:
        return True

    def concat(self, others) -> tuple:
        return tuple((key.cond, key.rows) for key in (self, *others))

    def size(self) -> list[int]:
        return [self.rows]
