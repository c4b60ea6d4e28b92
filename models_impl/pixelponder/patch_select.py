"""Selection of a condition for each patch of the picture.

A strategy is used in two steps. `choose = strategy.begin(conditions, forced)` does once per picture all that no step
changes; `choose(guide)` returns the Selection of one step. `stepwise` says whether it depends on the step at all.

    Released    the primary condition everywhere: what the released rule amounts to, and no network is needed
    AsRun       the released network, executed as the reference does: for study, and for weights that somebody trained
    Accumulate  the paper's rule, made trainable: patches once chosen stay
    Blend       weight maps, one per condition

Everywhere `forced` ((1 or B, rows, columns) int64, see `forced_map`) names the condition that must win a patch; -1 is
none.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.modulated_norm import modulate, modulated_norm
from ...kernels.rope import rotate
from ..flux.model import Modulation, SelfAttention, mlp, norm, pack, unpack
from .config import PixelPonderConfig, SelectConfig

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
class Guide:
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


def _check_forced(forced: Tensor | None, conditions: Conditions, patch_size: int = 2):
    if forced is None:
        return
    grid = conditions.grid(patch_size)
    if tuple(forced.shape[-2:]) != grid:
        raise ValueError(f"The forced map has {list(forced.shape[-2:])} patches, the picture {list(grid)}.")
    if forced.max() >= conditions.count:
        raise ValueError(f"The forced map names condition {int(forced.max())}, there are {conditions.count}, from 0.")


def _one_hot(winner: Tensor, conditions: int) -> Tensor:
    """(B, rows, columns) -> (B, K, rows, columns) bool"""
    return winner[:, None] == torch.arange(conditions, device=winner.device).view(-1, 1, 1)


def _gather(conditions: Conditions, winner: Tensor) -> Selection:
    """Each patch taken from only its winner."""
    share = _one_hot(winner, conditions.count)  # (B, K, rows, columns)
    H, W = conditions.embeds.shape[-2:]
    cells = share.repeat_interleave(H // share.shape[-2], dim=-2).repeat_interleave(W // share.shape[-1], dim=-1)
    # where, not a product: a condition that lost must not leak, not even as a nan
    embeds = torch.where(cells[:, :, None], conditions.embeds, 0.0).sum(dim=1)
    return Selection(embeds, share.to(embeds.dtype))


# --- Strategies without a network

class Released:
    """One condition everywhere, by default the first.

    In exact arithmetic the released score is zero (a sum of values whose mean was just subtracted), ties go to the
    first condition, and the map is not accumulated but replaced in every round. What remains of the reference is
    rounding noise, which picks the last 32 of 1024 patches, which are doubled in the map; it is left out here.
    """

    stepwise = False

    def __init__(self, primary: int = 0):
        self.primary = primary

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[Guide], Selection]:
        _check_forced(forced, conditions)
        if not 0 <= self.primary < conditions.count:
            raise ValueError(f"primary={self.primary} is none of the {conditions.count} conditions, from 0.")
        winner = torch.full((1, *conditions.grid()), self.primary, device=conditions.embeds.device)
        if forced is not None:
            winner = torch.where(forced.to(winner) == FREE, winner, forced.to(winner))
        selection = _gather(conditions, winner)
        return lambda guide: selection


class Blend:
    """Weighted mean of the conditions in every cell; all stems feed one shared tower, so their maps can be mixed.

    weights: one per condition, a number or a map (H, W) or (B, H, W) of any size, at least 0. Only their proportion
    counts; where all are 0 the map is 0.
    """

    stepwise = False

    def __init__(self, weights: Sequence[float | Tensor]):
        self.weights = tuple(weights)

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[Guide], Selection]:
        _check_forced(forced, conditions)
        if len(self.weights) != conditions.count:
            raise ValueError(f"{len(self.weights)} weights for {conditions.count} conditions.")
        embeds, grid = conditions.embeds, conditions.grid()
        weights = self._maps(embeds)  # (1 or B, K, H, W)
        if forced is not None:
            forced = forced.to(embeds.device)
            cells = forced.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
            weights = torch.where((cells == FREE)[:, None], weights, _one_hot(cells, conditions.count).float())
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


# --- The released network

class ImageStreamBlock(nn.Module):
    """The image half of a FLUX double-stream block: text is attended to but not updated (SelectNet.py)."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int, qkv_bias: bool, operations, to: dict):
        super().__init__()
        self.img_mod = Modulation(hidden, 6, operations, to)
        self.img_attn = SelfAttention(hidden, heads, qkv_bias, operations, to)
        self.img_mlp = mlp(hidden, mlp_hidden, operations, to)
        self.txt_mod = Modulation(hidden, 6, operations, to)
        self.txt_attn = SelfAttention(hidden, heads, qkv_bias, operations, to)  # its proj is released but never used

    def text(self, txt: Tensor, vec: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of the text, (B, heads, L, D/heads) each."""
        shift, scale, *_ = self.txt_mod(vec)
        _, k, v = self.txt_attn.split(modulated_norm(txt, shift, scale))
        return rotate(k, rope), v

    def image(self, normed: Tensor, mods: tuple[Tensor, ...], rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, turned, and v of image tokens that `norm` has seen. mods: `img_mod(vec)`."""
        q, k, v = self.img_attn.split(modulate(normed, mods[0], mods[1]))
        return rotate(q, rope), rotate(k, rope), v

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

    def step(self, tokens: SelectTokens, guide: Guide) -> SelectStep:
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
        x = self.pos_embed_output(x).unflatten(-1, (-1, 2, 2)).unflatten(1, (-1, side, side))  # (B, n, i, j, C, ph, pw)
        x = x.permute(0, 1, 2, 5, 3, 6, 4).flatten(2, 5)  # (B, n, positions, C)
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
    def of(cls, block, normed, tokens: SelectTokens, guide: Guide, text_rope, rope) -> _StreamState:
        mods = block.img_mod(guide.vec)
        _, zero_k, zero_v = _zero_heads(block, tokens, mods, rope)
        text = block.text(guide.txt, guide.vec, text_rope)
        q, k, v = block.image(normed, mods, rope)
        return cls(mods, text, q.contiguous(), k, v, zero_k, zero_v)


@dataclass(frozen=True)
class SelectStep:
    tokens: SelectTokens
    guide: Guide
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

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[Guide], Selection]:
        _check_forced(forced, conditions, self.patch_size)
        if conditions.count == 1:
            return Released().begin(conditions)
        tokens = None if self.net is None else self.net.tokens(conditions)

        def choose(guide: Guide) -> Selection:
            *_, last = self.rounds(conditions, guide, tokens)
            return self.result(conditions, last, forced)

        return choose

    def rounds(
        self, conditions: Conditions, guide: Guide | None = None, tokens: SelectTokens | None = None
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
        selection = _gather(conditions, winner)
        cells = times.repeat_interleave(self.patch_size, dim=-2).repeat_interleave(self.patch_size, dim=-1)
        return Selection(selection.map * cells[:, None], selection.share)


# --- The paper's rule

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

    def prepare(self, guide: Guide, conditions: int) -> SelectorStep:
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

    def begin(self, conditions: Conditions, forced: Tensor | None = None) -> Callable[[Guide], Selection]:
        _check_forced(forced, conditions)
        B, K, _, H, W = conditions.embeds.shape
        hints = pack(conditions.embeds.flatten(0, 1)).unflatten(0, (B, K))  # (B, K, N, C*4)
        x = self.selector.embed(hints, conditions.types)
        if forced is not None:
            forced = forced.to(hints.device).flatten(1)  # (1 or B, N)

        def choose(guide: Guide) -> Selection:
            share = self._share(x, hints, guide, forced)  # (B, N, K)
            return Selection(unpack(_mix(share, hints), H, W), share.transpose(1, 2).unflatten(2, conditions.grid()))

        return choose

    def _share(self, x: Tensor, hints: Tensor, guide: Guide, forced: Tensor | None) -> Tensor:
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
