"""What the UltraPixel recipes share: the frozen Stage C, the encoders of pictures, and the way from a batch to a loss
and back to pictures. (arXiv 2407.02158 and 2306.00637; train/ of Stability-AI/StableCascade@7a7d341f, MIT)"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl.ultrapixel import checkpoint, sampling
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.guidance import Guide
from ....models_impl.ultrapixel.model import StageC
from ...config import Config, nearest
from ...data import buckets
from ...features import text_encoders
from ...training import plan
from ...training.noise import batch_noise, generator, spread
from .decoder import Decoder
from .encoders import FILTERS, Low
from .loss_weight import WEIGHTS
from .networks import dtype_of, fitting, read
from .settings import FILES

PIXELS = 32  # along a side of a cell of the latents that are trained on; at inference it is 42.67
LOW_NOISE = 2  # the kind of `noise.picture_noise` that goes on low-resolution latents
T_STEPS = 1000  # different t of a validation
PROBED = 128  # channels of the nets that memory is measured on; what a net keeps grows with its width


def problems(config: Config) -> list[str]:
    """What every UltraPixel recipe needs."""
    found, model, shape = [], config.model, None
    for name in (*FILES, "image_encoder"):
        path = getattr(model, name)
        if path and not Path(path).expanduser().exists():
            found.append(f"model.{name}={path!r}: there is no such file or folder.")
    if not model.stage_c:
        found.append("model.stage_c is empty: name Stage C of Stable Cascade (stage_c_bf16.safetensors), the base that "
                     "UltraPixel builds on.")
    elif Path(model.stage_c).expanduser().exists():
        try:
            shape = read(model.stage_c)[0]
            if model.guide and Path(model.guide).expanduser().exists():
                fitting(read(model.guide, checkpoint.read_guide)[0], shape, f"model.guide={model.guide}")
        except (ValueError, OSError) as error:
            found.append(f"[model]: {error}")
    if not config.text.encoder:
        found.append("text.encoder is empty: Stage C reads captions. Name the folder of CLIP-G's text tower "
                     "(text_encoder of stabilityai/stable-cascade, with its tokenizer).")
    elif config.text.frozen and Path(config.text.encoder).expanduser().is_dir():
        if not text_encoders.is_clip(config.text.encoder):
            found.append(f"text.encoder={config.text.encoder!r} is no CLIP: Stage C reads CLIP-G.")
    elif not config.text.frozen:
        found.append(f"text.encoder={config.text.encoder!r}: Stage C reads CLIP-G, a folder as transformers saves it.")
    if not config.vae.path:
        found.append("vae.path is empty: Stage C draws latents of Stable Cascade's semantic encoder. Name "
                     "effnet_encoder.safetensors.")
    if config.samples.classes:
        found.append("samples.classes is for class-conditional runs: use samples.prompts.")
    if bool(model.stage_b) != bool(model.stage_a):
        found.append("model.stage_b and model.stage_a belong together: name both, or neither.")
    if config.samples.every and not (model.previewer or model.stage_a):
        found.append(f"samples.every={config.samples.every} asks for pictures, and nothing here makes pictures of "
                     "latents: name model.previewer, or model.stage_b and model.stage_a, or set it to 0.")
    known = config.data.problems(config.batch_size, config.micro_batch_size)  # said already
    if not known and (odd := [s for s in buckets.sizes(config.data) if s[0] % PIXELS or s[1] % PIXELS]):
        found.append(f"data.resolution has sizes such as {odd[0][1]}x{odd[0][0]}, which are no multiples of {PIXELS}: "
                     "data.buckets=\"ultrapixel\" has such alone.")
    found += [f"samples.{side}={size} is not a multiple of 8, which Stage B needs." for side in ("height", "width")
              if model.stage_b and (size := getattr(config.samples, side)) % 8]
    return found


def problems_of_loss(settings) -> list[str]:
    """Of the settings of a recipe that has dropout, image_share and weight."""
    found = []
    for name in ("dropout", "image_share"):
        if not 0 <= getattr(settings, name) <= 1:
            found.append(f"recipe.{name}={getattr(settings, name)} is outside [0, 1].")
    if settings.weight not in WEIGHTS:
        found.append(f"recipe.weight={settings.weight!r} is none of {', '.join(WEIGHTS)}"
                     f"{nearest(settings.weight, WEIGHTS)}.")
    return found


def problems_of_low(config: Config) -> list[str]:
    """Of the settings of a recipe that has low_side and low_filter."""
    s, found = config.recipe, []
    if s.low_side < 1:
        return [f"recipe.low_side={s.low_side} must be at least 1."]
    if s.low_filter not in FILTERS:
        found.append(f"recipe.low_filter={s.low_filter!r} is none of {', '.join(FILTERS)}"
                     f"{nearest(s.low_filter, FILTERS)}.")
    if min(config.data.sides) <= PIXELS * s.low_side:
        found.append(f"data.resolution={min(config.data.sides)} is not larger than the low resolution, "
                     f"{PIXELS * s.low_side} pixels (recipe.low_side={s.low_side} cells): there is nothing to guide.")
    return found


# --- From a batch to a loss

@dataclass(frozen=True)
class Chance:
    """What chance decides about the pictures of a batch, (B,) each, and about all of it together."""

    t: Tensor
    dropped: Tensor
    """Whose caption is taken away."""
    shown: Tensor
    """Whose image embedding is told."""
    turn: float
    """In [0, 1), the same for the whole batch."""

    def part(self, positions: range) -> Chance:
        own = slice(positions.start, positions.stop)
        return replace(self, t=self.t[own], dropped=self.dropped[own], shown=self.shown[own])

    def described(self, extra: str = "") -> list[str]:
        return [f"t {t:.3f}{' (caption dropped)' if drop else ''}{' (image told)' if show else ''}{extra}"
                for t, drop, show in zip(self.t.tolist(), self.dropped.tolist(), self.shown.tolist(), strict=True)]


@dataclass(frozen=True)
class Latents:
    """Of a batch, with the noise that goes on them."""

    high: Tensor
    """(B, C, h, w)"""
    noise: Tensor
    low: Tensor | None = None
    noise_low: Tensor | None = None


class Denoising:
    """Everything about Stage C but what learns: latents, captions, noise, the loss, samples."""

    def __init__(self, config: Config, net: StageC | None, text: text_encoders.FrozenClip, readers: list,
                 low: Low | None = None):
        """readers: of `make_encoders`."""
        self.config, self.net, self.text, self.readers, self.low = config, net, text, readers, low
        self.seed, self.schedule, self.decoder = config.seed, sampling.Schedule(), Decoder(config)
        if net is not None and (text.width, text.pooled_width) != (net.config.text_dim, net.config.pooled_dim):
            raise ValueError(f"text.encoder makes tokens of width {text.width} and vectors of {text.pooled_width}, "
                             f"this Stage C reads {net.config.text_dim} and {net.config.pooled_dim}: use CLIP-G.")

    @property
    def device(self) -> torch.device:
        return self.net.clip_txt_mapper.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.clip_txt_mapper.weight.dtype

    def draw(self, step: int) -> Chance:
        """Of a whole batch; it depends on (seed, step) alone."""
        rng, B, s = generator(self.seed, step), self.config.batch_size, self.config.recipe
        t = sampling.training_t(B, rng)
        dropped, shown = (torch.rand(B, generator=rng) < share for share in (s.dropout, s.image_share))
        return Chance(t, dropped, shown & bool(self.config.model.image_encoder), torch.rand((), generator=rng).item())

    def features(self, batch, part: str) -> Tensor:
        """"effnet.high" and so on: from the cache if it gave the batch some, else made now. (B, ...) float32."""
        if part in batch.features:
            return batch.features[part].to(self.device).float()
        name, _, part = part.partition(".")
        reader = next(r for r in self.readers if r.name == name)
        pictures = batch.conditions[reader.of] if reader.of else batch.pictures
        return reader.encode(pictures, self.device)[part].to(self.device).float()

    def latents(self, batch, seed: int, low: bool = True) -> Latents:
        def noise(like, kind=0):
            return batch_noise(seed, batch.step, batch.positions, like.shape[1:], self.device, kind)

        high = self.features(batch, "effnet.high")
        if self.low is None or not low:
            return Latents(high, noise(high))
        small = self.features(batch, "effnet.low")
        return Latents(high, noise(high), small, noise(small, LOW_NOISE))

    def condition(self, captions: list[str], dropped: Tensor | None = None, images: Tensor | None = None,
                  change: Tensor | None = None) -> dict[str, Tensor]:
        """What Stage C is told. dropped: (B,) bool, captions that are taken away; images: (B, D) embeddings, zeros
        where none is told; change: of the word that the text encoder was taught."""
        if dropped is not None:
            captions = ["" if drop else c for c, drop in zip(captions, dropped.tolist(), strict=True)]
        text, pooled = self.text.lookup(captions, self.device) if self.text.word is None \
            else self.text.read(captions, self.device, change)
        found = {"text": text.to(self.dtype), "pooled": pooled[:, None].to(self.dtype)}
        if images is not None:
            found["image"] = images[:, None].to(self.device, self.dtype)
        return found

    def told(self, batch, chance: Chance, change: Tensor | None = None) -> dict[str, Tensor]:
        """`condition` of a batch."""
        images = None
        if chance.shown.any():
            images = self.features(batch, "clip_image.embed") * chance.shown[:, None].to(self.device)
        return self.condition(batch.captions, chance.dropped, images, change)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(the noisy latent, what the network is told of its noise)"""
        logsnr = self.schedule.logsnr(t)
        return sampling.add_noise(clean, noise, logsnr).to(self.dtype), \
            self.schedule.timestep(logsnr).to(clean.device)

    def plain(self, clean: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Tensor], **more) -> Tensor:
        """Loss of each picture without a guide, (B,). more: what StageC.forward takes beside."""
        x, timestep = self.noisy(clean, noise, t)
        return sampling.noise_loss(self.net(x, timestep, **condition, **more).float(), noise)

    def guided(self, guide: Guide, latents: Latents, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Loss of each picture, (B,), as the release computes it: features of the low-resolution latent at one fixed
        noise level, without gradients, guide the prediction of the high-resolution noise at full weight."""
        kept = torch.full_like(t, sampling.KEPT_TIMESTEP)
        with torch.no_grad():
            x, timestep = self.noisy(latents.low, latents.noise_low, kept)
            _, features = self.net.features(x, timestep, **condition)
        _, timestep = self.noisy(latents.high[:, :1], latents.noise[:, :1], t)
        hook = guide.image(features).hook(timestep, up=1.0)
        return self.plain(latents.high, latents.noise, t, condition, hook=hook)

    @torch.no_grad()
    def validate(self, batches: list, losses: Callable) -> dict[str, float]:
        """Means over the held-out pictures, at t and with noise that never change, and by quarters of t.

        losses(batch, chance) -> {name: (B,)}.
        """
        found, ts = {}, []
        for batch in batches:
            B = len(batch.positions)
            no = torch.zeros(B, dtype=torch.bool)
            t = (spread(batch.positions, T_STEPS) + 0.5) / T_STEPS
            for name, loss in losses(batch, Chance(t, no, no, 0.0)).items():
                found.setdefault(name, []).append(loss.cpu())
            ts.append(t)
        found, quarter = {name: torch.cat(some) for name, some in found.items()}, (4 * torch.cat(ts)).long()
        whole = {name: loss.mean().item() for name, loss in found.items()}
        return {"loss": sum(whole.values()) / len(whole), **(whole if len(whole) > 1 else {}),
                **{f"quarter{q}": sum(loss[quarter == q].mean().item() for loss in found.values()) / len(found)
                   for q in range(4) if (quarter == q).any()}}

    @torch.no_grad()
    def sample(self, prompts: list[str], height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               guide: Guide | None = None, change: Tensor | None = None, control: list | None = None) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1], as the nodes draw them. With a guide in two passes, the first
        at low resolution. control: residuals for (B) pictures, in the first pass alone where there are two."""
        if self.net is None:
            raise ValueError(f"model.stage_c={self.config.model.stage_c!r}: there is no such file, and nothing is "
                             "drawn without Stage C.")
        self.decoder.check()
        B, device, net = len(prompts), self.device, self.net
        low_side = max(1, round((self.low or Low()).side * sampling.COMPRESSION_C / PIXELS))
        sizes = sampling.sizes(height, width, low_side=low_side)
        schedule = sampling.Schedule(shift)
        logsnrs = schedule.steps(steps)
        condition = self.condition([*([""] * B if cfg != 1 else []), *prompts], change=change)
        positive = {name: value[-B:] for name, value in condition.items()}
        rows = len(condition["text"])
        residuals = [None if r is None else r.repeat(rows // B, 1, 1, 1) for r in control or ()]

        def noise(size, stream):
            chances = [torch.Generator().manual_seed(seed + i + stream * 2**32) for i in range(B)]
            return lambda *_: torch.stack([torch.randn(net.config.in_channels, *size, generator=g)
                                           for g in chances]).to(device)

        def predict(x, timestep, hook=None, control=()):
            eps = net(x.repeat(rows // B, 1, 1, 1).to(self.dtype), timestep.repeat(rows // B), **condition, hook=hook,
                      control=control).float()
            return eps if cfg == 1 else sampling.guided(eps[B:], eps[:B], cfg)

        def first(x, timestep):
            return predict(x, timestep, control=residuals)

        high = noise(sizes.stage_c, 0)
        if guide is None:
            latent = sampling.sample(first, high(), schedule, logsnrs, high)
        else:
            low, image = noise(sizes.low, 1), []

            def features(x, timestep):
                found = net.features(x.to(self.dtype), timestep, **positive, control=control or ())[1]
                image.append(guide.image(found))
                return found

            def second(x, timestep, _):
                return predict(x, timestep, image[0].hook(timestep.repeat(rows // B)))

            latent = sampling.sample_guided(first, features, second, low(), high(), schedule, logsnrs, low, high)
        pooled = condition["pooled"]
        return self.decoder(latent, pooled[-B:], self.condition([""], change=change)["pooled"], sizes.stage_b, seed)


def previews(recipe) -> bool:
    """Whether its pictures are the previewer's, of 8 pixels a cell, and so smaller than what was asked for."""
    return not recipe.config.model.stage_a


# --- What --dry-run says

def sizes(config: Config, low: Low | None) -> list[str]:
    side = config.data.resolution
    line = f"{config.batch_size} pictures of {side}x{side} pixels, {(side // PIXELS) ** 2} cells each"
    if low:
        h, w = (n // PIXELS for n in low.size(side, side))
        line += f", guided by {w}x{h} cells"
    return [line]


def activation_bytes(shape: StageCConfig, config: Config, pictures: int, trained: int = 0) -> float:
    """What a forward pass of so many pictures of the largest size keeps for the backward pass: probes of frozen nets of
    one and two rounds of blocks a level, narrow ones on small latents, extrapolated. trained: weights that learn, which
    are cast once."""
    bf16 = config.precision == "bf16"
    narrow = min(PROBED, shape.hidden[0])
    times = shape.hidden[0] / narrow
    levels = len(shape.hidden)
    heads = max(1, min(shape.heads) * narrow // shape.hidden[0])

    def probe(rounds: int, side: int) -> int:
        small = replace(shape, hidden=(narrow,) * levels, heads=(heads,) * levels, context_dim=narrow,
                        down=("CTA" * rounds,) * levels, up=("CTA" * rounds,) * levels, down_repeats=(1,) * levels,
                        up_repeats=(1,) * levels, switch=(False,) * (levels - 1))
        dtype = dtype_of(config)
        net = StageC(small, dtype=dtype).eval().requires_grad_(False)
        x = torch.zeros(1, shape.in_channels, side, side, dtype=dtype, requires_grad=True)
        text = torch.zeros(1, 77, shape.text_dim, dtype=dtype), torch.zeros(1, 1, shape.pooled_dim, dtype=dtype)
        return plan.kept_bytes(net, lambda: net(x, torch.zeros(1), *text, attention=plan.fused), False)

    cells = max(h * w for h, w in buckets.sizes(config.data)) // PIXELS**2

    def at(rounds: int) -> float:  # linear in the cells
        few, many = probe(rounds, 8), probe(rounds, 16)
        return times * (few + (many - few) / 192 * (cells - 64))

    rounds = sum(s.count("A") for s in (*shape.down, *shape.up))
    one, two = at(1), at(2)
    block = (two - one) / (2 * levels)
    inputs = 3 * cells * shape.hidden[0] * (2 if bf16 else 4)  # of the three blocks of a round
    kept = rounds * (inputs if config.checkpoint_activations else block)
    return pictures * (max(one - 2 * levels * block, 0) + block + kept) + (2 * trained if bf16 else 0)


def groups(modules: Mapping[str, tuple[nn.Module | None, float]]) -> list[dict]:
    """Of the parameters that learn, with their rates; matrices: those of transformers, which Muon may train."""
    found = []
    for module, rate in modules.values():
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad] if module is not None else []
        if named:
            found.append({"params": named, "rate": rate,
                          "matrices": {n for n, _ in named if "transformer_encoder" in n and "norm" not in n}})
    return found



def compile_blocks(net: StageC):
    for level in (*net.down_blocks, *net.up_blocks):
        for block in level:
            block.compile()
