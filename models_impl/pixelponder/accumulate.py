"""The paper's rule, made trainable: a selector scores the conditions, and patches once chosen stay."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..flux.model import norm, pack, unpack
from .config import PixelPonderConfig
from .patch_select import FREE, Conditions, Selection, SelectionInputs, check_forced
from .select_net import ImageStreamBlock


class Selector(nn.Module):
    """Scores for `Accumulate`: a logit per condition and patch, from text, timestep, the condition and the map so far.

    One network serves all conditions and distinguishes them only by a type embedding. So their order does not matter,
    any number can take part, and a kind may take part twice.
    """

    def __init__(self, config: PixelPonderConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        trunk, width = config.trunk, config.selector.width
        self.cond_in = operations.Linear(trunk.in_channels, width, **to)
        self.map_in = operations.Linear(trunk.in_channels + 1, width, **to)  # the map so far, and whether it is taken
        self.type_embedding = operations.Embedding(len(config.types), width, **to)
        self.txt_in = operations.Linear(trunk.hidden, width, **to)
        self.vec_in = operations.Linear(trunk.hidden, width, **to)
        self.blocks = nn.ModuleList(
            ImageStreamBlock(width, width // trunk.head_dim, 4 * width, True, operations, to)
            for _ in range(config.selector.depth)
        )
        self.score = operations.Linear(width, 1, **to)

    def embed(self, hints: Tensor, types: tuple[int, ...]) -> Tensor:
        """Hint tokens (B, K, N, C*4) -> (B, K, N, width), once per picture."""
        kinds = self.type_embedding(torch.tensor(types, device=hints.device)).to(hints.dtype)  # (K, width)
        return self.cond_in(hints) + kinds[:, None]

    def prepare(self, guide: SelectionInputs, conditions: int) -> SelectorStep:
        """The text's keys and values, which all rounds of a step share, each for every condition."""
        L = guide.txt.shape[1]
        txt, vec = self.txt_in(norm(guide.txt)), self.vec_in(F.silu(guide.vec))
        text_rope, rope = guide.rope[:, :, :L], guide.rope[:, :, L:]
        text = tuple(
            tuple(t.repeat_interleave(conditions, dim=0) for t in block.text(txt, vec, text_rope))
            for block in self.blocks
        )
        if rope.shape[0] > 1:
            rope = rope.repeat_interleave(conditions, dim=0)
        return SelectorStep(vec.repeat_interleave(conditions, dim=0), rope, text, guide.attention)

    def forward(self, x: Tensor, so_far: Tensor, taken: Tensor, step: SelectorStep) -> Tensor:
        """x: `embed`; so_far: (B, N, C*4) the map, zero where free; taken: (B, N) bool. Returns logits (B, N, K)."""
        B, K = x.shape[:2]
        x = x + self.map_in(torch.cat((so_far, taken[..., None].to(so_far.dtype)), dim=-1))[:, None]
        x = x.flatten(0, 1)  # (B*K, N, width)
        for block, text in zip(self.blocks, step.text, strict=True):
            x = block(x, text, step.vec, step.rope, step.attention)
        return self.score(norm(x))[..., 0].unflatten(0, (B, K)).transpose(1, 2)


@dataclass(frozen=True)
class SelectorStep:
    vec: Tensor
    rope: Tensor
    text: tuple[tuple[Tensor, Tensor], ...]
    attention: Callable


def _mix(share: Tensor, hints: Tensor) -> Tensor:
    """(B, N, K), (1 or B, K, N, C) -> (B, N, C); no matrix product, which TF32 would round."""
    return (share.transpose(1, 2)[..., None] * hints).sum(dim=1)


class Accumulate:
    """The paper's rule (arXiv 2503.06684): a map built round by round, in which a patch once chosen stays.

    In every round the selector scores the conditions of all patches; of the patches still free the most certain ones,
    1/rounds of all, are fixed to their winner. Straight-through: the choice is hard, its gradient that of the softmax.
    The released code picks only by argmax and topk, so its selection gets no gradient. On an easy task one round did
    as well as four, at half the cost.
    """

    stepwise = True

    def __init__(self, selector: Selector, rounds: int = 1):
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1.")
        self.selector, self.rounds = selector, rounds

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[SelectionInputs], Selection]:
        check_forced(forced, conditions)
        B, K, _, H, W = conditions.embeds.shape
        hints = pack(conditions.embeds.flatten(0, 1)).unflatten(0, (B, K))  # (B, K, N, C*4)
        x = self.selector.embed(hints, conditions.types)
        if forced is not None:
            forced = forced.to(hints.device).flatten(1)  # (1 or B, N)

        def choose(guide: SelectionInputs) -> Selection:
            share = self._share(x, hints, guide, forced)  # (B, N, K)
            return Selection(unpack(_mix(share, hints), H, W), share.transpose(1, 2).unflatten(2, conditions.grid()))

        return choose

    def _share(self, x: Tensor, hints: Tensor, guide: SelectionInputs, forced: Tensor | None) -> Tensor:
        B, (K, N) = guide.vec.shape[0], hints.shape[1:3]
        if hints.shape[0] not in (1, B):
            raise ValueError(f"There are hints for {hints.shape[0]} pictures, the batch has {B}.")
        x, hints = (t.expand(B, -1, -1, -1) for t in (x, hints))
        taken = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        share = hints.new_zeros(B, N, K)
        if forced is not None:  # the selector sees them from the first round on
            taken = taken | (forced != FREE)
            share = (share + F.one_hot(forced.clamp_min(0), K)) * taken[..., None]
        free = N - taken.sum(dim=1, keepdim=True)  # (B, 1) when the rounds begin
        step = self.selector.prepare(guide, K)
        done = torch.zeros_like(free)
        for index in range(self.rounds):
            logits = self.selector(x, _mix(share, hints), taken, step)
            soft = logits.float().softmax(dim=-1).to(hints.dtype)  # (B, N, K)
            best, winner = soft.detach().max(dim=-1)
            # soft - soft.detach() is exactly 0: the choice stays hard, the gradient is the softmax's
            choice = F.one_hot(winner, K) + (soft - soft.detach())
            rank = best.masked_fill(taken, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            quota = -(-free * (index + 1) // self.rounds)  # rounded up; all in the last round
            new = (rank < quota - done) & ~taken
            share = share + choice * new[..., None]
            taken, done = taken | new, quota
        return share
