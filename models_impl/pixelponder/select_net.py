"""The released selection network, and the rule that its scores serve (SelectNet.py of the release)."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.modulated_norm import modulate, modulated_norm
from ...kernels.rope import rotate
from ..flux.model import FluxModulation, FluxSelfAttention, mlp, norm, pack
from .config import SelectConfig
from .patch_select import FREE, Conditions, Released, Selection, SelectionInputs, check_forced, gather


class ImageStreamBlock(nn.Module):
    """The image half of a FLUX double-stream block: text is attended to but not updated (SelectNet.py)."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int, qkv_bias: bool, operations, to: dict):
        super().__init__()
        self.img_mod = FluxModulation(hidden, 6, operations, to)
        self.img_attn = FluxSelfAttention(hidden, heads, qkv_bias, operations, to)
        self.img_mlp = mlp(hidden, mlp_hidden, operations, to)
        self.txt_mod = FluxModulation(hidden, 6, operations, to)
        # Its proj is released but never used.
        self.txt_attn = FluxSelfAttention(hidden, heads, qkv_bias, operations, to)

    def text(self, txt: Tensor, vec: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of the text, (B, heads, L, D/heads) each."""
        shift, scale, *_ = self.txt_mod(vec)
        _, k, v = self.txt_attn.split(modulated_norm(txt, shift, scale))
        return rotate(k, rope), v

    def image(self, normed: Tensor, mods: tuple[Tensor, ...], rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, turned, and v of image tokens that `norm` has seen. mods: `img_mod(vec)`."""
        return self.img_attn.split(modulate(normed, mods[0], mods[1]), rope)

    def finish(self, x: Tensor, attended: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """x: (B, N, D) block input; attended: (B, heads, N, D/heads)."""
        x = torch.addcmul(x, mods[2], self.img_attn.proj(attended.transpose(1, 2).flatten(2)))
        return torch.addcmul(x, mods[5], self.img_mlp(modulated_norm(x, mods[3], mods[4])))

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], vec: Tensor, rope: Tensor, attention: Callable) -> Tensor:
        """x: (B, N, D); text: what `self.text` gave; rope of only the image tokens."""
        mods = self.img_mod(vec)
        q, k, v = self.image(norm(x), mods, rope)
        return self.finish(x, attention(q, torch.cat((text[0], k), 2), torch.cat((text[1], v), 2)), mods)


class SelectNet(nn.Module):
    """PatchSelectNetwork (SelectNet.py): features of every patch and condition in every round."""

    def __init__(self, config: SelectConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        self.config = config
        D = config.hidden
        self.pos_embed_input = operations.Linear(config.in_channels, D, **to)
        self.pos_embed_output = operations.Linear(D, config.in_channels, **to)
        shape = (D, config.heads, config.mlp_hidden, config.qkv_bias, operations, to)
        self.combine_attn_block = nn.ModuleList([ImageStreamBlock(*shape)])
        self.attn_block = nn.ModuleList(ImageStreamBlock(*shape) for _ in range(config.types))

    def tokens(self, conditions: Conditions) -> SelectTokens:
        """The part that depends only on the conditions, computed once per picture."""
        if max(conditions.types) >= self.config.types:
            raise ValueError(f"The selection network has {self.config.types} types, got {max(conditions.types)}.")
        B, K, C, H, W = conditions.embeds.shape
        hints = pack(conditions.embeds.flatten(0, 1)).unflatten(0, (B, K))  # (B, K, N, C*4)
        rows, columns = conditions.grid(self.config.patch_size)
        side = self.config.patch_size // 2
        index = torch.arange(hints.shape[2], device=hints.device).view(rows, side, columns, side)
        x = self.pos_embed_input(hints)
        zero = self.pos_embed_input(torch.zeros_like(hints[:1, 0, :1]))  # a patch that was taken
        return SelectTokens(conditions.types, x, norm(x), zero, norm(zero), index.transpose(1, 2).reshape(-1, side**2))

    def step(self, tokens: SelectTokens, guide: SelectionInputs) -> SelectStep:
        """Keys and values that all rounds of one step share: every one that a round may need.

        In a round only patches that were taken change, and they become one constant token; so queries, keys and values
        of all others are those of the first round.
        """
        B, L = guide.vec.shape[0], guide.txt.shape[1]
        text_rope, rope = guide.rope[:, :, :L], guide.rope[:, :, L:]
        if rope.shape[2] != tokens.x.shape[2]:
            raise ValueError(f"The hints make {tokens.x.shape[2]} tokens, but the picture has {rope.shape[2]}: resize "
                             "the hints to it.")
        if tokens.x.shape[0] not in (1, B):
            raise ValueError(f"There are hints for {tokens.x.shape[0]} pictures, the batch has {B}.")
        tokens = tokens.expand(B)
        states, combine = [], self.combine_attn_block[0]
        for k, kind in enumerate(tokens.types):
            states.append(_StreamState.of(self.attn_block[kind], tokens.normed[:, k], tokens, guide, text_rope, rope))
        mods = combine.img_mod(guide.vec)
        every = [combine.image(tokens.normed[:, k], mods, rope) for k in range(len(tokens.types))]
        shown = tuple(torch.stack(parts, dim=1) for parts in zip(*every, strict=True))  # (B, K, heads, N, D/heads)
        zero = _zero_heads(combine, tokens, mods, rope)
        return SelectStep(tokens, guide, rope, tuple(states), mods, combine.text(guide.txt, guide.vec, text_rope),
                          shown, zero)

    def features(self, step: SelectStep, free: Tensor, last: Picked | None) -> Tensor:
        """Features of the patches that are still free, un-summed: (B, free patches, K, positions * C), positions first.

        free: (B, free patches) indices, the same number for every picture; last: what the round before picked.
        """
        tokens, guide = step.tokens, step.guide
        index = tokens.index[free].flatten(1)  # (B, M) of the tokens still free
        taken = torch.ones(index.shape[0], tokens.x.shape[2], dtype=torch.bool, device=index.device)
        taken = taken.scatter(1, index, False)[:, None, :, None]  # (B, 1, N, 1)
        combined = self._patches(self._combine(step, index, last))  # (B, free, P)
        features = []
        for k, (kind, state) in enumerate(zip(tokens.types, step.states, strict=True)):
            block = self.attn_block[kind]
            key = torch.cat((state.text[0], torch.where(taken, state.zero_k, state.k)), dim=2)
            value = torch.cat((state.text[1], torch.where(taken, state.zero_v, state.v)), dim=2)
            attended = guide.attention(_take(state.q, index), key, value)
            x = block.finish(_take(tokens.x[:, k], index), attended, state.mods)
            features.append(self._patches(x) + combined)
        return torch.stack(features, dim=2)

    def _combine(self, step: SelectStep, index: Tensor, last: Picked | None) -> Tensor:
        """The block that reads the map so far, for the tokens at `index`."""
        tokens, block = step.tokens, self.combine_attn_block[0]
        if last is None:  # the map is empty: every token is the zero token
            x = tokens.zero.expand(*index.shape, -1)
            q, k, v = step.zero
            q = _take(q, index)
        else:
            winner = tokens.of_patches(last.winner)  # (B, N)
            q, k, v = (_choose(heads, winner) for heads in step.shown)
            q, x = _take(q, index), _take(_choose(tokens.x, winner), index)
            # The patches picked last stand doubled in the map. They are not free, so only as keys and values.
            double = tokens.index[last.top].flatten(1)  # (B, M')
            doubled = 2 * _take(_choose(tokens.x, winner), double) - tokens.zero  # In(2 c) = 2 In(c) - bias
            _, new_k, new_v = block.image(norm(doubled), step.mods, _take(step.rope, double))
            places = double[:, None, :, None].expand_as(new_k)
            k, v = k.scatter(2, places, new_k), v.scatter(2, places, new_v)
        key, value = torch.cat((step.text[0], k), dim=2), torch.cat((step.text[1], v), dim=2)
        return block.finish(x, step.guide.attention(q, key, value), step.mods)

    def _patches(self, x: Tensor) -> Tensor:
        """Tokens (B, patches * tokens, D) -> (B, patches, positions * C), normalised over the positions of a patch."""
        side = self.config.patch_size // 2
        x = self.pos_embed_output(x)
        x = rearrange(x, "B (n i j) (C p q) -> B n (i p j q) C", i=side, j=side, p=2, q=2)
        return ((x - x.mean(dim=2, keepdim=True)) / (x.std(dim=2, keepdim=True) + 1e-6)).flatten(2)


@dataclass(frozen=True)
class SelectTokens:
    types: tuple[int, ...]
    x: Tensor
    """(B, K, N, D) embedded hint tokens."""
    normed: Tensor
    zero: Tensor
    """(1, 1, D), the embedding of nothing: the bias."""
    zero_normed: Tensor
    index: Tensor
    """(patches, tokens of a patch) int64."""

    def expand(self, B: int) -> SelectTokens:
        x, normed = (t.expand(B, -1, -1, -1) for t in (self.x, self.normed))
        return SelectTokens(self.types, x, normed, self.zero, self.zero_normed, self.index)

    def of_patches(self, values: Tensor) -> Tensor:
        """(B, patches) -> (B, N)"""
        values = values.repeat_interleave(self.index.shape[1], dim=1)
        return torch.empty_like(values).scatter(1, self.index.flatten().expand_as(values), values)


@dataclass(frozen=True)
class _StreamState:
    """Queries, keys and values of one condition in one step, (B, heads, N, D/heads) each."""

    mods: tuple[Tensor, ...]
    text: tuple[Tensor, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    zero_k: Tensor
    zero_v: Tensor

    @classmethod
    def of(cls, block, normed, tokens: SelectTokens, guide: SelectionInputs, text_rope, rope) -> _StreamState:
        mods = block.img_mod(guide.vec)
        _, zero_k, zero_v = _zero_heads(block, tokens, mods, rope)
        text = block.text(guide.txt, guide.vec, text_rope)
        q, k, v = block.image(normed, mods, rope)
        return cls(mods, text, q.contiguous(), k, v, zero_k, zero_v)


@dataclass(frozen=True)
class SelectStep:
    tokens: SelectTokens
    guide: SelectionInputs
    rope: Tensor
    states: tuple[_StreamState, ...]
    mods: tuple[Tensor, ...]
    text: tuple[Tensor, Tensor]
    shown: tuple[Tensor, Tensor, Tensor]
    """q, k, v of the combining block for every condition's token at every place, (B, K, heads, N, D/heads) each."""
    zero: tuple[Tensor, Tensor, Tensor]


def _zero_heads(block, tokens: SelectTokens, mods, rope) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as if every token were the zero token; they differ in their rotation only."""
    q, k, v = block.img_attn.split(modulate(tokens.zero_normed, mods[0], mods[1]))  # (B, heads, 1, D/heads)
    N = rope.shape[2]
    return tuple((rotate(t.expand(-1, -1, N, -1), rope)) for t in (q, k)) + (v.expand(-1, -1, N, -1),)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of the dimension before the last, or of the third of a rope table."""
    if x.ndim == 6:  # (1 or B, 1, N, D/2, 2, 2)
        x = x.expand(len(index), *[-1] * 5)
        return x.gather(2, index[:, None, :, None, None, None].expand(-1, 1, -1, *x.shape[3:]))
    B, N, middle = x.shape[0], x.shape[-2], x.shape[1:-2].numel()
    places = torch.arange(B * middle, device=x.device).view(B, middle, 1) * N + index[:, None]
    return _rows(x, places).unflatten(0, (*x.shape[:-2], index.shape[1]))


def _choose(x: Tensor, winner: Tensor) -> Tensor:
    """(B, K, ..., N, D) and the winner of each token (B, N) -> (B, ..., N, D)"""
    B, K, N, middle = *x.shape[:2], x.shape[-2], x.shape[2:-2].numel()
    source = torch.arange(B, device=x.device)[:, None] * K + winner  # (B, N), which of the B*K
    places = (source[:, None] * middle + torch.arange(middle, device=x.device)[:, None]) * N
    places = places + torch.arange(N, device=x.device)
    return _rows(x, places).unflatten(0, (B, *x.shape[2:-1]))


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows (places, D) of x (..., D), counted over all of its other dimensions; faster than a gather of elements."""
    return x.reshape(-1, x.shape[-1]).index_select(0, places.flatten())


@dataclass(frozen=True)
class Picked:
    """One round of the released rule."""

    winner: Tensor
    """(B, patches) int64; the first condition where a patch was taken before."""
    top: Tensor
    """(B, select_num) int64: the patches taken in this round."""


def pick(score: Tensor, free: Tensor, select_num: int) -> Picked:
    """score: (B, patches, K); free: (B, patches) bool. The released rule (SelectNet.py:187-252)."""
    probability = F.normalize(score, dim=-1).softmax(dim=-1).masked_fill(~free[..., None], 0)
    best, winner = probability.max(dim=-1)  # ties: the first
    return Picked(winner, best.topk(select_num, dim=-1).indices)


class AsRun:
    """The released selection as the reference executes it, its return value included.

    Every round scores all patches, takes the `select_num` most certain, and replaces the map by everyone's winner,
    those just taken doubled; taken patches count for the first condition from then on. So the map of the last round is
    the first condition but for its last patches. The score of the released network is rounding noise: expect another
    map on another machine. One condition is passed on as it is.

    net: a SelectNet. scores: (rounds, B, patches, K) in place of the network's, which is then not needed.
    """

    stepwise = True

    def __init__(
        self, net: SelectNet | None = None, scores: Tensor | None = None, patch_size: int = 2,
        select_num: int | None = None,
    ):  # fmt: skip
        if (net is None) == (scores is None):
            raise ValueError("AsRun needs either the selection network or the scores of every round.")
        self.net, self.scores = net, scores
        self.patch_size = patch_size if net is None else net.config.patch_size
        self.select_num = select_num if net is None else net.config.select_num

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[SelectionInputs], Selection]:
        check_forced(forced, conditions, self.patch_size)
        if conditions.count == 1:
            return Released().begin(conditions)
        tokens = None if self.net is None else self.net.tokens(conditions)

        def choose(guide: SelectionInputs) -> Selection:
            *_, last = self.rounds(conditions, guide, tokens)
            return self.result(conditions, last, forced)

        return choose

    def rounds(
        self, conditions: Conditions, guide: SelectionInputs | None = None, tokens: SelectTokens | None = None
    ) -> Iterator[Picked]:
        """The picks of every round. tokens: `net.tokens(conditions)`, if there is a network."""
        rows, columns = conditions.grid(self.patch_size)
        n, select_num = rows * columns, self.select_num or columns
        if n % select_num:
            raise ValueError(f"{n} patches ({rows} rows, {columns} columns) cannot be taken {select_num} at a time: it "
                             "must divide them. Leave select_num empty to take a row at a time.")
        step = None if self.net is None else self.net.step(tokens, guide)
        B = self.scores.shape[1] if self.net is None else guide.vec.shape[0]
        free = torch.ones(B, n, dtype=torch.bool, device=conditions.embeds.device)
        last = None
        for index in range(n // select_num):
            if step is None:
                score = self.scores[index].to(conditions.embeds.device)
            else:
                left = free.nonzero()[:, 1].view(B, -1)  # every picture has as many
                feature = self.net.features(step, left, last).sum(dim=-1)  # (B, left, K)
                score = feature.new_zeros(B, n, conditions.count)
                score = score.scatter(1, left[..., None].expand_as(feature), feature)
            last = pick(score, free, select_num)
            free = free.scatter(1, last.top, False)
            yield last

    def result(self, conditions: Conditions, last: Picked, forced: Tensor | None = None) -> Selection:
        """The map that the picks of the last round leave behind; those before it do not matter."""
        grid = conditions.grid(self.patch_size)
        times = torch.ones_like(last.winner).scatter(1, last.top, 2).unflatten(1, grid)  # (B, rows, columns)
        winner = last.winner.unflatten(1, grid)
        if forced is not None:
            forced = forced.to(winner)
            winner = torch.where(forced == FREE, winner, forced)
            times = torch.where(forced == FREE, times, 1)
        selection = gather(conditions, winner)
        cells = times.repeat_interleave(self.patch_size, dim=-2).repeat_interleave(self.patch_size, dim=-1)
        return Selection(selection.map * cells[:, None], selection.share)
