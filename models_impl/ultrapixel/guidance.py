"""UltraPixel's guide: features of a low-resolution pass, made continuous and fused into the high-resolution one.

For each level of Stage C, on the way down and on the way up (arXiv 2407.02158): a transformer reads the
low-resolution features and writes the weights of a small coordinate network ("implicit neural representation"), which
is evaluated at the cells of the high-resolution picture; together with the nearest low-resolution feature that is the
reconstruction; an MLP fuses it with the current features, and the "scale-aware normalisation" reads the size.

The guide acts on features only, through a callable `hook(direction, level, features) -> features` that the caller of
Stage C runs after the first attention block of each level: our own `model.StageC`, or hooks on another implementation.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attention as dense_attention
from ...kernels.modulated_norm import modulate
from .blocks import channels_first, channels_last, norm, timestep_embedding
from .config import GuideConfig

UP_WEIGHTS = ((96 * 96, 0.7), (72 * 72, 0.5), (0, 0.3))  # cells of the latent, at least -> weight, tuned by its authors


def up_weight(height: int, width: int) -> float:
    """Weight of the guide on the way up, by the size of the Stage C latent; a step function, as released."""
    return next(weight for cells, weight in UP_WEIGHTS if height * width >= cells)


def weight_of(direction: str, size: Sequence[int], down: float, up: float | None) -> float:
    """Weight of the guide at a level of (height, width) cells; up None: the released step function."""
    return down if direction == "down" else up_weight(*size) if up is None else up


@dataclass
class Features:
    """Outputs of Stage C's first attention block of every level: (B, D, h, w) each, in the order the net runs."""

    down: list[Tensor] = field(default_factory=list)
    up: list[Tensor] = field(default_factory=list)

    def rows(self, start: int, stop: int) -> Features:
        """The features of a part of the batch, for example its conditional half."""
        return Features([x[start:stop] for x in self.down], [x[start:stop] for x in self.up])

    def to(self, device: torch.device, copy: bool = False) -> Features:
        return Features(*([x.to(device, copy=copy) for x in levels] for levels in (self.down, self.up)))


class FeatureTap:
    """A hook that changes nothing and keeps `features`."""

    def __init__(self):
        self.features = Features()

    def __call__(self, direction: str, level: int, x: Tensor) -> Tensor:
        kept = getattr(self.features, direction)
        assert level == len(kept), f"{direction} level {level} came after {len(kept)} levels"
        kept.append(x)
        return x


def cell_centres(height: int, width: int, device=None) -> Tensor:
    """(height*width, 2) float32: (row, column) of every cell in [-1, 1], row-major."""
    # In this order of operations: an error in the last place of a coordinate, times 1024 pi, is 2e-4 in a sine.
    row, column = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)


def frequencies(highest: float, count: int) -> Tensor:
    """(count,) float32, on the CPU: 1 ... highest in equal ratios, rounded in the same way on every processor.

    As `torch.linspace(0, log(highest), count).exp()` is on a processor with fused multiply-add, where the weights were
    made. Without one linspace rounds twice: that is 1.8e-4 in a frequency of 1024 and 4e-4 in its sine.
    """
    exponent = torch.tensor(math.log(highest), dtype=torch.float32)
    step = (exponent / max(count - 1, 1)).double()  # its products with an index are exact in float64
    index = torch.arange(count, dtype=torch.float64)
    from_below = index < max(count // 2, 1)
    exponents = torch.where(from_below, step * index, exponent.double() - step * (count - 1 - index)).float()
    return exponents.double().exp().float()


class Tokenizer(nn.Module):
    """Low-resolution cells as tokens. The position is the running number of the cell, whatever the aspect ratio."""

    def __init__(self, config: GuideConfig, operations, to: dict):
        super().__init__()
        self.prefc = operations.Linear(config.width, config.width, **to)
        self.posemb = nn.Parameter(torch.empty(config.max_tokens, config.width, **to))

    def forward(self, x: Tensor) -> Tensor:
        # x: (B, D, h, w) -> (B, h*w, D)
        tokens, limit = x.shape[-2] * x.shape[-1], self.posemb.shape[0]
        if tokens > limit:
            raise ValueError(f"The low-resolution pass has {x.shape[-1]}x{x.shape[-2]} = {tokens} cells, the guide was "
                             f"trained with at most {limit}: make the low-resolution latent smaller.")
        x = self.prefc(channels_last(x).flatten(1, 2))
        return x + self.posemb[:tokens].to(x)


class TokenAttention(nn.Module):
    """SiLU before the projections and none after: as released."""

    def __init__(self, config: GuideConfig, operations, to: dict):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.to_q = nn.Sequential(nn.SiLU(), operations.Linear(D, D, **to))
        self.to_kv = nn.Sequential(nn.SiLU(), operations.Linear(D, 2 * D, **to))

    def forward(self, x: Tensor, attention: Callable) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))  # each (B, heads, N, D/heads)
        return attention(q, k, v).transpose(1, 2).flatten(2)


class TokenFeedForward(nn.Module):
    def __init__(self, config: GuideConfig, operations, to: dict):
        super().__init__()
        self.net = nn.Sequential(
            operations.Linear(config.width, config.feedforward, **to), nn.GELU(), nn.Identity(),
            operations.Linear(config.feedforward, config.width, **to),
        )

    def forward(self, x: Tensor, attention: Callable) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module, operations, to: dict):
        super().__init__()
        self.norm, self.fn = operations.LayerNorm(width, **to), fn

    def forward(self, x: Tensor, attention: Callable) -> Tensor:
        return x + self.fn(self.norm(x), attention)


class TokenEncoder(nn.Module):
    def __init__(self, config: GuideConfig, operations, to: dict):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(PreNorm(config.width, part(config, operations, to), operations, to)
                          for part in (TokenAttention, TokenFeedForward))
            for _ in range(config.encoder_layers)
        )

    def forward(self, x: Tensor, attention: Callable) -> Tensor:
        for attend, feed in self.layers:
            x = feed(attend(x, attention), attention)
        return x


class TimeScale(nn.Module):
    """x * (1 + a) + b with (a, b) of an embedding. x: (B, H, W, D); embedding: (B, C)."""

    def __init__(self, channels: int, embedding: int, operations, to: dict):
        super().__init__()
        self.mapper = operations.Linear(embedding, 2 * channels, **to)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mapper(embedding)[:, None, None].chunk(2, dim=-1)
        return modulate(x, shift, scale)


class ScaleMapping(nn.Module):
    def __init__(self, channels: int, embedding: int, conditions: tuple[str, ...], operations, to: dict):
        super().__init__()
        self.conditions = conditions
        self.mapper = operations.Linear(embedding, 2 * channels, **to)
        for name in conditions:
            setattr(self, f"mapper_{name}", operations.Linear(embedding, 2 * channels, **to))

    def forward(self, embedding: Tensor, nothing: Tensor) -> Tensor:
        return self.mapper(embedding) + sum(getattr(self, f"mapper_{name}")(nothing) for name in self.conditions)


class ScaleNorm(nn.Module):
    """Scale-aware normalisation: x + (x * (1 + a) + b), with (a, b) of v = sqrt(log(h*w) / log(scale_tokens)).

    x: (B, h, w, D). The released files also hold two convolutions `alpha` and `gamma` that nothing uses.
    """

    def __init__(self, channels: int, embedding: int, scale_tokens: int, operations, to: dict,
                 conditions: tuple[str, ...] = ()):
        super().__init__()
        self.embedding, self.scale_tokens = embedding, scale_tokens
        self.mapping = ScaleMapping(channels, embedding, conditions, operations, to)

    def forward(self, x: Tensor) -> Tensor:
        value = math.sqrt(math.log(x.shape[1] * x.shape[2]) / math.log(self.scale_tokens))
        value, nothing = (timestep_embedding(torch.full((1,), v, device=x.device), self.embedding).to(x.dtype)
                          for v in (value, 0.0))  # torch.tensor would be an upload, which waits for a GPU
        scale, shift = self.mapping(value, nothing)[:, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, x, 2 + scale)


class GuideLevel(nn.Module):
    """The guide of one level. `prepare` depends on neither the noisy features nor the timestep, `fuse` on both."""

    def __init__(self, channels: int, config: GuideConfig, operations, to: dict):
        super().__init__()
        self.config = config
        inputs = (4 * config.frequencies, *config.layers[:-1])
        groups = [min(config.groups, size) for size in config.layers]
        self.groups = groups
        self.input_layer = operations.Conv2d(channels, config.width, kernel_size=1, **to)
        self.tokenizer = Tokenizer(config, operations, to)
        self.wtokens = nn.Parameter(torch.empty(sum(groups), config.width, **to))
        self.transformer_encoder = TokenEncoder(config, operations, to)
        self.base_params = nn.ParameterDict({
            f"wb{i}": nn.Parameter(torch.empty(source + 1, size, **to))  # the last row is the bias
            for i, (source, size) in enumerate(zip(inputs, config.layers, strict=True))
        })
        self.wtoken_postfc = nn.ModuleDict({
            f"wb{i}": nn.Sequential(operations.LayerNorm(config.width, **to),
                                    operations.Linear(config.width, source, **to))
            for i, source in enumerate(inputs)
        })
        self.output_layer = operations.Conv2d(config.layers[-1], channels, kernel_size=1, **to)
        # The release keeps `guide` and `target` as one matrix over both, concatenated. Apart, the half that sees the
        # reconstruction is computed once an image, and a quarter of the channels is all that is kept of it.
        self.toout = nn.ModuleDict({
            "guide": operations.Linear(channels, channels // 4, **to),
            "target": operations.Linear(channels, channels // 4, bias=False, **to),
            "2": operations.Linear(channels // 4, channels, **to),
        })
        self.mapp_t = TimeScale(channels, config.timestep_dim, operations, to)
        self.hr_norm = ScaleNorm(channels, config.scale_dim, config.scale_tokens, operations, to)
        self._frequencies: dict[torch.device, Tensor] = {}  # the table of each device, for it is made on the CPU

    def initialise(self) -> GuideLevel:
        """Small random tokens and tables, Kaiming rows in the coordinate network, zero modulation by time and scale."""
        nn.init.normal_(self.wtokens)
        nn.init.normal_(self.tokenizer.posemb)
        for base in self.base_params.values():
            nn.init.kaiming_uniform_(base[:-1].T, a=math.sqrt(5))
            nn.init.zeros_(base[-1])
        for mapper in (self.mapp_t.mapper, self.hr_norm.mapping.mapper):
            nn.init.zeros_(mapper.weight)
            nn.init.zeros_(mapper.bias)
        return self

    def implicit(self, low: Tensor, height: int, width: int, attention: Callable = dense_attention) -> Tensor:
        """The coordinate network that `low` (B, D, h, w) describes, at (height, width) cells: (B, height, width, F)."""
        B = low.shape[0]
        tokens = self.tokenizer(self.input_layer(low))
        weights = self.wtokens.to(tokens).expand(B, -1, -1)
        tokens = self.transformer_encoder(torch.cat((tokens, weights), dim=1), attention)[:, -weights.shape[1]:]
        x = self.encode_position(cell_centres(height, width, low.device)).to(tokens.dtype).expand(B, -1, -1)
        for i, group in enumerate(tokens.split(self.groups, dim=1)):
            base = self.base_params[f"wb{i}"].to(tokens)
            factor = self.wtoken_postfc[f"wb{i}"](group).transpose(1, 2)  # (B, inputs, groups)
            factor = factor.repeat(1, 1, base.shape[1] // factor.shape[2])  # column c takes the token c % groups
            weight = F.normalize(base[:-1] * factor, dim=1)  # (B, inputs, outputs), columns of length 1
            x = torch.baddbmm(base[-1:].expand(B, 1, -1), x if i == 0 else F.relu(x), weight)
        return x.unflatten(1, (height, width))

    def encode_position(self, position: Tensor) -> Tensor:
        """(N, 2) in [-1, 1] -> (N, 4*frequencies): [cos | sin], of the row first, frequencies 1 ... frequency_range."""
        if position.device not in self._frequencies:
            table = frequencies(self.config.frequency_range, self.config.frequencies)
            self._frequencies[position.device] = table.to(position.device)
        frequency = self._frequencies[position.device].to(position.dtype)
        angle = math.pi * (position[..., None] * frequency).flatten(-2)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def reconstruct(self, low: Tensor, height: int, width: int, attention: Callable = dense_attention) -> Tensor:
        """(B, D, h, w) -> (B, D, height, width): the coordinate network, and the nearest cell of `low` itself."""
        detail = self.output_layer(channels_first(self.implicit(low, height, width, attention)))
        return detail + F.interpolate(low, size=(height, width), mode="nearest")

    def prepare(self, low: Tensor, height: int, width: int, attention: Callable = dense_attention) -> Tensor:
        """The reconstruction's part of the fusion: (B, height, width, D/4)."""
        return self.toout["guide"](channels_last(self.reconstruct(low, height, width, attention)))

    def fuse(self, x: Tensor, prepared: Tensor, time_embedding: Tensor) -> Tensor:
        """The term to add to x (k*B, D, H, W), k times the batch of `prepared` in the order of a `repeat`."""
        B = prepared.shape[0]
        if x.shape[0] % B:
            raise ValueError(f"A batch of {x.shape[0]} is guided by features of {B} pictures: it must be a multiple.")
        h = self.toout["target"](channels_last(x)).unflatten(0, (-1, B)) + prepared
        h = self.toout["2"](F.gelu(h.flatten(0, 1)))
        h = norm(self.mapp_t(h, time_embedding))
        return channels_first(self.hr_norm(h))

    def add(self, x: Tensor, prepared: Tensor, time_embedding: Tensor, weight: float) -> Tensor:
        return x + weight * self.fuse(x, prepared, time_embedding)


class Guide(nn.Module):
    def __init__(self, config: GuideConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        self.config, self.dtype = config, dtype
        self.agg_net = nn.ModuleList(GuideLevel(channels, config, operations, to) for channels in config.down)
        self.agg_net_up = nn.ModuleList(GuideLevel(channels, config, operations, to) for channels in config.up)

    def initialise(self) -> Guide:
        for level in (*self.agg_net, *self.agg_net_up):
            level.initialise()
        return self

    def level(self, direction: str, level: int) -> GuideLevel:
        return (self.agg_net if direction == "down" else self.agg_net_up)[level]

    def time_embedding(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep_embedding(timestep, self.config.timestep_dim).to(dtype)

    def image(self, features: Features, attention: Callable = dense_attention) -> GuidedImage:
        """The guide of one image or batch of images, with what its steps have in common."""
        for direction in ("down", "up"):
            given, own = (len(getattr(f, direction)) for f in (features, self.config))
            if given != own:
                raise ValueError(f"The features have {given} levels on the way {direction}, the guide has {own}.")
        return GuidedImage(self, features, attention)


class GuidedImage:
    """A guide with fixed features. What depends on neither x nor the timestep is computed once per size and kept.

    features: those of the low-resolution pass, of the conditional half of the batch.
    """

    def __init__(self, guide: Guide, features: Features, attention: Callable = dense_attention):
        self.guide, self.features, self.attention = guide, features, attention
        self._prepared: dict[tuple, Tensor] = {}

    def prepared(self, direction: str, level: int, size: torch.Size, dtype: torch.dtype, device) -> Tensor:
        key = (direction, level, *size, dtype, device)
        if key not in self._prepared:
            low = getattr(self.features, direction)[level].to(device, dtype)
            self._prepared[key] = self.guide.level(direction, level).prepare(low, *size, self.attention)
        return self._prepared[key]

    def hook(self, timestep: Tensor, down: float = 1.0, up: float | None = None) -> Callable:
        """The hook of one step. timestep: (B,), what the network is conditioned on; down, up: weights of the guide.

        `up` None takes the released step function of the size; training is at 1.
        """

        def add(direction: str, level: int, x: Tensor) -> Tensor:
            size = x.shape[-2:]
            weight = weight_of(direction, size, down, up)
            if weight == 0:
                return x
            prepared = self.prepared(direction, level, size, x.dtype, x.device)
            embedding = self.guide.time_embedding(timestep, x.dtype)
            return self.guide.level(direction, level).add(x, prepared, embedding, weight)

        return add

    def step(self, timestep: Tensor, sizes: dict[str, list], dtype: torch.dtype, down: float = 1.0,
             up: float | None = None) -> GuidedStep:
        """`hook` for features (k*B, D, *size) of sizes known beforehand: direction -> (height, width) of each level."""
        weights = {way: [weight_of(way, size, down, up) for size in sizes[way]] for way in sizes}
        prepared = {way: [self.prepared(way, level, size, dtype, timestep.device) if weights[way][level] else None
                          for level, size in enumerate(sizes[way])] for way in sizes}
        return GuidedStep(self.guide, self.guide.time_embedding(timestep, dtype), prepared, weights)


@dataclass
class GuidedStep:
    """The hook of one step in a form that torch.compile can trace once for all steps: what it computes depends on
    tensors, and nothing is made or kept on the way."""

    guide: Guide
    time_embedding: Tensor
    prepared: dict[str, list[Tensor | None]]
    weights: dict[str, list[float]]

    def __call__(self, direction: str, level: int, x: Tensor) -> Tensor:
        weight = self.weights[direction][level]
        if weight == 0:
            return x
        prepared = self.prepared[direction][level]
        return self.guide.level(direction, level).add(x, prepared, self.time_embedding, weight)
