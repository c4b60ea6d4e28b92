"""What the UltraPixel recipes share: the frozen Stage C, the encoders of pictures, and the way from a batch to a loss
and back to pictures. (arXiv 2407.02158 and 2306.00637; train/ of Stability-AI/StableCascade@7a7d341f, MIT)"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl.ultrapixel import checkpoint, sampling
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.guidance import Guide
from ....models_impl.ultrapixel.model import StageC
from ....models_impl.ultrapixel.texts import pooled
from ...config.schema import Config
from ...data import buckets
from ...features import text_encoders
from ...libraries import probing
from ...memory.activations import fused, kept_bytes, of_network
from ...training import objective
from ...training.noise import generator, spread, state_noise, training_noise
from ...training.validation import certainty, quarters
from ..contract import Base
from .decoder import Decoder
from .encoders import Low
from .loss_weight import LossWeight
from .networks import dtype_of, fitting, read
from .settings import PIXELS

LOW_NOISE = 2  # the kind of `noise.picture_noise` that goes on low-resolution latents
T_STEPS = 1000  # different t of a validation
PROBED = 128  # channels of the nets that memory is measured on; what a net keeps grows with its width


def file_problems(config: Config) -> list[str]:
    """Problems with the files that the recipes on a Stage C read."""
    problems, model = [], config.model
    try:
        shape = read(model.stage_c)[0]
        if model.guide:
            fitting(read(model.guide, checkpoint.read_guide)[0], shape, f"model.guide={model.guide}")
    except (ValueError, OSError) as error:
        problems.append(f"[model]: {error}")
    return problems + text_problems(config)


def text_problems(config: Config) -> list[str]:
    """Problems with the folder of a text encoder."""
    text = config.text
    if not text.frozen or not Path(text.encoder).expanduser().is_dir() or text_encoders.is_clip(text.encoder):
        return []
    return [f"text.encoder={text.encoder!r} is no CLIP: Stage C reads CLIP-G."]


def read_text(text: nn.Module, captions: list[str], device, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens (B, L, D), vectors (B, D')) of captions, float32. change: of the word that a CLIP was taught."""
    if isinstance(text, text_encoders.FrozenClip):
        return text.lookup(captions, device) if text.word is None else text.read(captions, device, change)
    tokens, _ = text_encoders.encode(text, captions, device, padded=True)
    return tokens, pooled(tokens)


def text_widths(text: nn.Module) -> tuple[int, int]:
    """Widths of the tokens and of the vector of `read_text`."""
    width = text_encoders.width(text)
    return width, text.pooled_width if isinstance(text, text_encoders.FrozenClip) else width


@dataclass(frozen=True)
class Draws:
    """Random draws for the pictures of a batch, (B,) each, and for all of it together."""

    t: Tensor
    dropped: Tensor
    """Whose caption is taken away."""
    shown: Tensor
    """Whose image embedding is given."""
    turn: float
    """In [0, 1), the same for the whole batch."""

    def part(self, positions: range) -> Draws:
        own = slice(positions.start, positions.stop)
        return replace(self, t=self.t[own], dropped=self.dropped[own], shown=self.shown[own])

    def described(self, extra: str = "") -> list[str]:
        return [f"t {t:.3f}{' (caption dropped)' if drop else ''}{' (image given)' if show else ''}{extra}"
                for t, drop, show in zip(self.t.tolist(), self.dropped.tolist(), self.shown.tolist(), strict=True)]


@dataclass(frozen=True)
class Latents:
    """Latents of one resolution, with the noise that goes on them."""

    clean: Tensor
    """(B, C, h, w)"""
    noise: Tensor
    """What the network is to predict."""
    on_state: Tensor
    """What makes the state that it sees."""
    cells: Tensor | None = None
    """What the error of each cell counts, (B, 1, h, w), of a mask."""


@dataclass(frozen=True)
class BothLatents:
    """The latents of a batch; the low-resolution ones where they are read."""

    high: Latents
    low: Latents | None = None


class StageCDenoising:
    """Everything about Stage C but what learns: latents, captions, noise, the loss, samples."""

    def __init__(self, config: Config, net: StageC | None, text: nn.Module, readers: list,
                 low: Low | None = None):
        """readers: of `make_encoders`."""
        self.config, self.net, self.text, self.readers, self.low = config, net, text, readers, low
        self.seed, self.diffusion, self.decoder = config.seed, sampling.CosineDiffusion(), Decoder(config)
        self.draws, self.objective = objective.draws(config.noise, sampling.DRAWN), objective.objective(config.loss)
        if net is not None and (made := text_widths(text)) != (net.config.text_dim, net.config.pooled_dim):
            raise ValueError(f"text.encoder makes tokens of width {made[0]} and vectors of {made[1]}, this Stage C "
                             f"reads {net.config.text_dim} and {net.config.pooled_dim}: use the encoder that it was "
                             "trained with, CLIP-G for the released ones.")

    @property
    def device(self) -> torch.device:
        return self.net.clip_txt_mapper.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.clip_txt_mapper.weight.dtype

    def draw(self, step: int) -> Draws:
        """Draws for a whole batch, which depend only on (seed, step)."""
        rng, B, s = generator(self.seed, step), self.config.batch_size, self.config.recipe
        t = self.diffusion.draw(B, rng, self.draws)
        dropped, shown = (torch.rand(B, generator=rng) < share for share in (s.dropout, s.image_share))
        return Draws(t, dropped, shown & bool(self.config.model.image_encoder), torch.rand((), generator=rng).item())

    def features(self, batch, part: str) -> Tensor:
        """"effnet.high" and so on: from the cache if it gave the batch some, else made now. (B, ...) float32."""
        if part in batch.features:
            return batch.features[part].to(self.device).float()
        name, _, part = part.partition(".")
        reader = next(r for r in self.readers if r.name == name)
        pictures = batch.conditions[reader.of] if reader.of else batch.pictures
        return reader.encode(pictures, self.device)[part].to(self.device).float()

    def latents(self, batch, seed: int) -> BothLatents:
        drawn, settings = (seed, batch.step, batch.positions), self.config.noise

        def noised(part: str, kind: int = 0) -> Latents:
            clean = self.features(batch, f"effnet.{part}")
            noise = training_noise(settings, *drawn, clean.shape[1:], self.device, kind)
            cells = objective.cells(self.config.loss, batch, clean.shape[-2:], self.device)
            return Latents(clean, noise, state_noise(settings, noise, *drawn, kind), cells)

        return BothLatents(noised("high"), noised("low", LOW_NOISE) if self.low else None)

    def condition(self, captions: list[str], dropped: Tensor | None = None, images: Tensor | None = None,
                  change: Tensor | None = None) -> dict[str, Tensor]:
        """What Stage C is conditioned on. dropped: (B,) bool, captions that are taken away; images: (B, D) embeddings,
        zeros where none is given; change: of the word that the text encoder was taught."""
        if dropped is not None:
            captions = ["" if drop else c for c, drop in zip(captions, dropped.tolist(), strict=True)]
        text, vectors = read_text(self.text, captions, self.device, change)
        found = {"text": text.to(self.dtype), "pooled": vectors[:, None].to(self.dtype)}
        if images is not None:
            found["image"] = images[:, None].to(self.device, self.dtype)
        return found

    def conditioning(self, batch, draws: Draws, change: Tensor | None = None) -> dict[str, Tensor]:
        """`condition` of a batch."""
        images = None
        if draws.shown.any():
            images = self.features(batch, "clip_image.embed") * draws.shown[:, None].to(self.device)
        return self.condition(batch.captions, draws.dropped, images, change)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(the noisy latent, the timestep that says how noisy it is)"""
        noisy = self.diffusion.add_noise(clean, noise, t).to(self.dtype)
        return noisy, self.diffusion.network_timestep(t).to(clean.device)

    def plain(self, latents: Latents, t: Tensor, condition: Mapping[str, Tensor], **more) -> Tensor:
        """Loss of each picture without a guide, (B,). more: what StageC.forward takes beside."""
        x, timestep = self.noisy(latents.clean, latents.on_state, t)
        eps = self.net(x, timestep, **condition, **more)
        return self.diffusion.loss(eps, latents.clean, latents.noise, t, self.objective, latents.cells)

    def guided(self, guide: Guide, latents: BothLatents, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Loss of each picture, (B,), as the release computes it: features of the low-resolution latent at one fixed
        noise level, without gradients, guide the prediction of the high-resolution noise at full weight."""
        kept = torch.full_like(t, sampling.KEPT_TIMESTEP)
        with torch.no_grad():
            x, timestep = self.noisy(latents.low.clean, latents.low.noise, kept)
            _, features = self.net.features(x, timestep, **condition)
        timestep = self.diffusion.network_timestep(t).to(latents.high.clean.device)
        hook = guide.image(features).hook(timestep, up=1.0)
        return self.plain(latents.high, t, condition, hook=hook)

    @torch.no_grad()
    def validate(self, batches: list, losses: Callable) -> dict[str, float]:
        """Means over the held-out pictures, at t and with noise that never change, and by quarters of t.

        losses(batch, draws) -> {name: (B,)}.
        """
        found, ts = {}, []
        for batch in batches:
            B = len(batch.positions)
            no = torch.zeros(B, dtype=torch.bool)
            t = (spread(batch.positions, T_STEPS) + 0.5) / T_STEPS
            for name, loss in losses(batch, Draws(t, no, no, 0.0)).items():
                found.setdefault(name, []).append(loss.cpu())
            ts.append(t)
        found = {name: torch.cat(some) for name, some in found.items()}
        whole = {name: loss.mean().item() for name, loss in found.items()}
        each = sum(found.values()) / len(found)
        return {"loss": sum(whole.values()) / len(whole), **certainty(each), **(whole if len(whole) > 1 else {}),
                **quarters(each, torch.cat(ts))}

    @torch.no_grad()
    def sample(self, prompts: list[str], height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               guide: Guide | None = None, change: Tensor | None = None, control: list | None = None,
               negative: str = "") -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1], as the nodes draw them. With a guide in two passes, the first
        at low resolution. control: residuals for (B) pictures, only in the first pass where there are two."""
        if self.net is None:
            raise ValueError(f"model.stage_c={self.config.model.stage_c!r}: there is no such file, and nothing is "
                             "drawn without Stage C.")
        self.decoder.check()
        B, device, net = len(prompts), self.device, self.net
        low_side = max(1, round((self.low or Low()).side * sampling.COMPRESSION_C / PIXELS))
        sizes = sampling.sizes(height, width, low_side=low_side)
        diffusion = sampling.CosineDiffusion(shift)
        logsnrs = diffusion.steps(steps)
        condition = self.condition([*([negative] * B if cfg != 1 else []), *prompts], change=change)
        positive = {name: value[-B:] for name, value in condition.items()}
        rows = len(condition["text"])
        residuals = [None if r is None else r.repeat(rows // B, 1, 1, 1) for r in control or ()]

        def noise(size, stream):
            generators = [torch.Generator().manual_seed(seed + i + stream * 2**32) for i in range(B)]
            return lambda *_: torch.stack([torch.randn(net.config.in_channels, *size, generator=g)
                                           for g in generators]).to(device)

        def predict(x, timestep, hook=None, control=()):
            eps = net(x.repeat(rows // B, 1, 1, 1).to(self.dtype), timestep.repeat(rows // B), **condition, hook=hook,
                      control=control).float()
            return eps if cfg == 1 else sampling.guided(eps[B:], eps[:B], cfg)

        def first(x, timestep):
            return predict(x, timestep, control=residuals)

        high = noise(sizes.stage_c, 0)
        if guide is None:
            latent = diffusion.sample(first, high(), logsnrs, high)
        else:
            low, image = noise(sizes.low, 1), []

            def features(x, timestep):
                found = net.features(x.to(self.dtype), timestep, **positive, control=control or ())[1]
                image.append(guide.image(found))
                return found

            def second(x, timestep, _):
                return predict(x, timestep, image[0].hook(timestep.repeat(rows // B)))

            latent = sampling.sample_guided(first, features, second, low(), high(), diffusion, logsnrs, low, high)
        pooled = condition["pooled"]
        return self.decoder(latent, pooled[-B:], self.condition([""], change=change)["pooled"], sizes.stage_b, seed)


class StageCRecipe(Base):
    """What the UltraPixel recipes share. Each sets what learns, `weight` and `denoising`."""

    net: StageC | None
    guide: Guide | None
    denoising: StageCDenoising
    weight: LossWeight

    def __init__(self, config: Config, text: nn.Module | None, net: StageC | None):
        super().__init__()
        self.settings, self.config, self.text, self.net = config.recipe, config, text, net

    def prepare(self, low: Low | None = None):
        """When everything that learns is there. low: how the low-resolution pictures are made, if they are."""
        self.weight = LossWeight(self.settings.weight, self.config.batch_size)
        self.encoders = self.make_encoders(self.config)
        self.denoising = StageCDenoising(self.config, self.net, self.text, self.encoders, low)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        return file_problems(config)

    @property
    def previews(self) -> bool:
        """The previewer's are of 8 pixels a cell."""
        return not self.config.model.stage_a

    def weighted(self, batch, loss: Callable[[Draws], Tensor]) -> Tensor:
        """Loss of each picture times the weight of its noise level, (B,)."""
        d = self.denoising
        draws = d.draw(batch.step).part(batch.positions)
        return self.weight(d.diffusion.logsnr(draws.t), loss(draws), batch)

    @contextmanager
    def at_rest(self):
        """Inside, what learns drops nothing out."""
        learning = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(learning)

    def blocks(self) -> list[nn.Module]:
        return [block for level in (*self.net.down_blocks, *self.net.up_blocks) for block in level]

    def described(self, step: int) -> list[str]:
        return self.denoising.draw(step).described()

    def buckets(self, step: int) -> list[str]:
        side, low = self.config.data.resolution, self.denoising.low
        line = f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // PIXELS) ** 2} cells each"
        if low:
            h, w = (n // PIXELS for n in low.size(side, side))
            line += f", guided by {w}x{h} cells"
        return [line]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return pictures * activation_bytes(self.net.config, self.config)


def of_unet(name: str) -> bool:
    """Whether a parameter of Stage C or B is a matrix that Muon may train."""
    return name.endswith("weight") and any(part in name for part in (".channelwise.", ".attention.", ".kv_mapper."))


def in_transformer(name: str) -> bool:
    """Whether a parameter is a matrix that Muon may train."""
    return "transformer_encoder" in name and "norm" not in name


def activation_bytes(shape: StageCConfig, config: Config) -> float:
    """Bytes kept of one picture of the largest size; probes are frozen nets of narrow blocks. See
    `activations.of_network`."""
    narrow = min(PROBED, shape.hidden[0])
    levels, times = len(shape.hidden), shape.hidden[0] / narrow
    heads = max(1, min(shape.heads) * narrow // shape.hidden[0])

    def probe(rounds: int, side: int) -> float:
        small = replace(shape, hidden=(narrow,) * levels, heads=(heads,) * levels, context_dim=narrow,
                        down=("CTA" * rounds,) * levels, up=("CTA" * rounds,) * levels, down_repeats=(1,) * levels,
                        up_repeats=(1,) * levels, switch=(False,) * (levels - 1))
        return times * kept(small, side, dtype_of(config))

    cells = max(h * w for h, w in buckets.sizes(config.data)) // PIXELS**2
    rounds = sum(s.count("A") for s in (*shape.down, *shape.up))
    inputs = 3 * cells * shape.hidden[0] * (2 if config.precision == "bf16" else 4)  # of the three blocks of a round
    return of_network(probe, (8, 16), cells, rounds, inputs, config.checkpoint_activations, blocks=2 * levels)


@cache
def kept(shape: StageCConfig, side: int, dtype: torch.dtype) -> int:
    """What one forward pass of a frozen Stage C keeps of one picture; side: in cells."""
    with probing():
        net = StageC(shape, dtype=dtype).eval().requires_grad_(False)
        x = torch.zeros(1, shape.in_channels, side, side, dtype=dtype, requires_grad=True)
        text = torch.zeros(1, 77, shape.text_dim, dtype=dtype), torch.zeros(1, 1, shape.pooled_dim, dtype=dtype)
        return kept_bytes(net, lambda: net(x, torch.zeros(1), *text, attention=fused), False)
