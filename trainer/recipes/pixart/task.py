"""What the PixArt recipes share: the way from a batch to a loss, and back to pictures.
(arXiv 2310.00426, 2403.04692; train_scripts/ of PixArt-alpha/PixArt-sigma@1ce521a)"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from ....models_impl.pixart import buckets, checkpoint, sampling
from ....models_impl.pixart.config import VAE_FACTOR, PixArtConfig
from ....models_impl.pixart.lora import names as lora_names
from ....models_impl.pixart.model import PixArt
from ...config.schema import Config
from ...features import text_encoders, vaes
from ...libraries import probing
from ...memory import quantization
from ...memory.activations import casts, fused, kept_bytes, of_network
from ...training import objective
from ...training.groups import Group, groups
from ...training.noise import VALIDATION, generator, spread, state_noise, training_noise
from ...training.validation import certainty, quarters
from .. import adapters
from ..contract import Base, Files
from ..noised import NoisedBatch
from .start import file_problems, frozen, opened, start

Predict = Callable[..., Tensor]
"""(x, timestep, context=, mask=, size=, aspect_ratio=) -> what a PixArt network says, (B, out_channels, h, w)."""


class PixArtDenoising:
    """Everything about a PixArt but its weights: latents, captions, noise, the loss, samples.

    net: the PixArt whose configuration and null caption count.
    """

    def __init__(self, config: Config, net: PixArt, text: nn.Module, vae: vaes.FrozenVae):
        self.vae = vae
        self.config, self.shape, self.net, self.text, self.seed = config, net.config, net, text, config.seed
        width = text_encoders.width(text)
        if width != self.shape.context_dim:
            raise ValueError(f"text.encoder makes tokens of width {width}, and this PixArt reads "
                             f"{self.shape.context_dim}: use the encoder that belongs to it.")
        self.diffusion = sampling.PixArtDiffusion.of(self.shape)
        self.schedule = self.diffusion.schedule
        self.draws = objective.draws(config.noise, sampling.DRAWN)
        self.bf16 = config.precision == "bf16"

    @property
    def device(self) -> torch.device:
        return self.net.final_layer.linear.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def draw(self, step: int, dropout: float) -> tuple[Tensor, Tensor]:
        """Random draws for the pictures of a whole batch: timestep (B,) and whether the caption is dropped."""
        rng, B = generator(self.seed, step), self.config.batch_size
        return self.diffusion.draw(B, rng, self.draws), torch.rand(B, generator=rng) < dropout

    def drawn(self, batch, dropout: float) -> tuple[Tensor, Tensor]:
        """The part of `draw` that is about this batch."""
        own = slice(batch.positions.start, batch.positions.stop)
        timestep, dropped = self.draw(batch.step, dropout)
        return timestep[own], dropped[own]

    def latents(self, batch, seed: int, vae: vaes.FrozenVae | None = None) -> Tensor:
        """(B, C, h, w) times latent_scale. vae: another that makes them, a ControlNet's hint for instance."""
        return self.shape.latent_scale * (vae or self.vae).latents(batch, self.device, seed)

    def condition(self, captions: list[str], dropped: Tensor | None = None, pixels: tuple[int, int] | None = None,
                  sizes: Tensor | None = None) -> dict[str, Tensor]:
        """What a network is given beside the latent. dropped: (B,) bool, captions that are taken away: by the null
        caption of the weights under the mask of the caption, as the releases were trained, or, where a file has none,
        by the tokens of the empty caption. pixels: (height, width) of the pictures; sizes: (B, 2), of their files."""
        embedder, device = self.net.y_embedder, self.device
        null = self.shape.null_caption
        if dropped is not None and not null:
            captions = ["" if drop else c for c, drop in zip(captions, dropped.tolist(), strict=True)]
        context, mask = text_encoders.encode(self.text, captions, device)
        if dropped is not None and null:
            context = embedder.drop(context, dropped.to(device))
        found = {"context": context, "mask": mask}
        if self.shape.micro_conditions and pixels:
            size = torch.tensor([pixels]).expand(len(captions), 2) if sizes is None else sizes
            found["size"] = size.float().to(device)
            found["aspect_ratio"] = torch.full((len(captions), 1), label(*pixels), device=device)
        return found

    def noising(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> NoisedBatch:
        latent = self.latents(batch, seed)
        drawn, settings = (seed, batch.step, batch.positions), self.config.noise
        noise = training_noise(settings, *drawn, latent.shape[1:], self.device)
        noisy = self.diffusion.add_noise(latent, state_noise(settings, noise, *drawn), timestep)
        condition = self.condition(batch.captions, dropped, batch.size, batch.sizes)
        cells = objective.cells(self.config.loss, batch, latent.shape[-2:], self.device)
        return NoisedBatch(latent, noise, noisy, timestep, condition, cells)

    def losses(self, predict: Predict, step: NoisedBatch, **settings) -> tuple[Tensor, Tensor]:
        """(squared error, variational bound of the variance), (B,) each, weighted; a picture's loss is the sum.
        settings: of `PixArtDiffusion.losses`."""
        timestep = self.diffusion.network_timestep(step.time).to(step.noisy.device)
        prediction = predict(step.noisy, timestep, **step.condition)
        loss = self.diffusion.losses(prediction, step.latent, step.noise, step.time, cells=step.cells,
                                     noisy=step.noisy, **settings)
        return loss.mse, loss.vb

    def prediction(self, predict: Predict, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's prediction of the noise, and behind it of its variance if it has one, (B, C or 2C, h, w)
        float32."""
        return self.diffusion.eps(x, predict(x, timestep.to(x.device), **condition).float(), timestep)

    def eps(self, predict: Predict, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's prediction of the noise, without its variance, (B, C, h, w) float32."""
        return self.prediction(predict, x, timestep, condition)[:, : self.shape.in_channels]

    @torch.no_grad()
    def validate(self, losses: Callable, batches: list) -> dict[str, float]:
        """Means over the held-out pictures, at timesteps and with noise that never change; by quarters of the
        timesteps too, because the whole hides what happens where there is little noise.

        losses: (batch, timestep, dropped, seed) -> as `self.losses` gives them.
        """
        found = [(*losses(batch, timestep, None, VALIDATION), timestep)
                 for batch in batches for timestep in [spread(batch.positions, self.schedule.steps)]]
        error, bound, timestep = (torch.cat(some).float().cpu() for some in zip(*found, strict=True))
        return {
            "loss": (error + bound).mean().item(), **certainty(error + bound),
            **({"variance": bound.mean().item()} if bound.any() else {}),
            **quarters(error, timestep / self.schedule.steps),
        }

    @torch.no_grad()
    def sample(self, predict: Predict, prompts: list[str], height: int, width: int, cfg: float, seed: int,
               algorithm: str, timesteps: list[float], negative: str = "") -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1]. Picture i begins with the noise that ComfyUI draws for
        seed + i, whatever it is drawn together with. algorithm: in `sampling.ALGORITHMS`, of which those that are not
        `guided` draw as with cfg 1."""
        device, shape = self.device, self.shape
        size = (shape.in_channels, height // VAE_FACTOR, width // VAE_FACTOR)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

        def noise(*_):
            return torch.stack([torch.randn(size, generator=g) for g in generators]).to(device)

        with self.autocast():
            guided = self.guided(predict, prompts, height, width, cfg, algorithm, negative)
            latent = self.diffusion.sample(guided, noise(), timesteps, noise, algorithm=algorithm)
        return self.vae.decode(latent / shape.latent_scale)

    def guided(self, predict: Predict, prompts: list[str], height: int, width: int, cfg: float,
               algorithm: str, negative: str = "") -> sampling.Predict:
        """What an algorithm asks about pictures of prompts, guided from a negative or the empty caption. Under
        `autocast`."""
        B, channels, about = len(prompts), self.shape.in_channels, sampling.ALGORITHMS[algorithm]
        cfg = cfg if about.guided else 1
        captions = [*([negative] * B if cfg != 1 else []), *prompts]
        condition = self.condition(captions, None, (height, width))

        def prediction(x, timestep):
            both = x.repeat(len(captions) // B, 1, 1, 1)
            t = torch.full((len(both),), float(timestep), device=self.device)
            found = self.prediction(predict, both, t, condition)
            if not about.learned_variance:
                found = found[:, :channels]
            if cfg == 1:
                return found
            uncond, cond = found.chunk(2)
            return sampling.guided(cond, uncond, cfg, about.guided_channels)

        return prediction


def label(height: int, width: int) -> float:
    """Aspect ratio that a micro-conditioned network is conditioned on for this size: the label of a bucket."""
    for table in buckets.TABLES.values():
        for ratio, size in table.items():
            if size == (height, width):
                return ratio
    return height / width


def frozen_vae(config: Config, name: str = "latent", of: str = "", writer: int = 0, annotator: str = ""):
    return vaes.FrozenVae(config.vae.path, config.vae.precision, config.cache.folder, name, of, writer, annotator)


class PixArtRecipe(Base):
    """What the PixArt recipes share. Each sets `net` and calls `prepare`; those that add to the released loss have
    their own `predict`, `losses` or `forward`."""

    net: PixArt
    denoising: PixArtDenoising
    algorithm = "dpm-solver++"
    """In `sampling.ALGORITHMS`: what samples are drawn with, for validation and by `python -m trainer sample`."""

    def __init__(self, config: Config, text: nn.Module | None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text

    def prepare(self):
        """When `net` is there."""
        self.net.gradient_checkpointing = self.config.checkpoint_activations
        self.encoders = self.make_encoders(self.config)
        self.denoising = PixArtDenoising(self.config, self.net, self.text, self.encoders[0])

    def adapted(self) -> PixArt:
        """The network of the settings, frozen, with an adapter."""
        base = frozen(opened(self.config, self.text), self.config)
        adapters.attach(base, self.config.adapter, TARGETS, lora_names)
        return quantization.frozen(base, self.config)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems = file_problems(config)
        if problems or not config.recipe.has_adapter:
            return problems
        return adapters.problems(lambda: PixArt(start(config).config), config.adapter, TARGETS, lora_names)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [frozen_vae(config, writer=writer)]

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"net": 1.0, "text": config.text.learning_rate_multiple})

    def loss_settings(self) -> dict:
        """Settings of `PixArtDiffusion.losses`."""
        return {"variance": self.settings.variance, "objective": objective.objective(self.config.loss)}

    def losses(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """(error, bound of the variance), (B,) each."""
        d = self.denoising
        with d.autocast():
            step = d.noising(batch, timestep, dropped, seed)
            return d.losses(self.net, step, **self.loss_settings())

    def forward(self, batch) -> Tensor:
        d = self.denoising
        return sum(self.losses(batch, *d.drawn(batch, self.settings.dropout), d.seed))

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(self.losses, batches)

    def described(self, step: int) -> list[str]:
        timestep, dropped = self.denoising.draw(step, self.settings.dropout)
        return [f"timestep {t}{' (caption dropped)' if drop else ''}"
                for t, drop in zip(timestep.tolist(), dropped.tolist(), strict=True)]

    def buckets(self, step: int) -> list[str]:
        side, multiple = self.config.data.resolution, self.net.config.size_multiple
        return [f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // multiple) ** 2} tokens each"
                + (" (or about as many, in other shapes)" if self.config.data.buckets else "")]

    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        bf16 = self.config.precision == "bf16"
        return casts(self.net, bf16) + pictures * activation_bytes(self.net.config, max(self.config.data.sides), bf16,
                                                                   self.config.checkpoint_activations)

    def timesteps(self, steps: int) -> list[float]:
        """The list that `algorithm` walks."""
        return self.denoising.diffusion.timesteps(steps, self.algorithm)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """shift is PixelFlow's and is not read."""
        return self.sample_with(self.net, what, height, width, steps, cfg, seed, negative)

    def sample_with(self, predict: Predict, what: list, height: int, width: int, steps: int, cfg: float,
                    seed: int, negative: str) -> Tensor:
        """`sample` with a network of which `net` is a part."""
        return self.denoising.sample(predict, what, height, width, cfg, seed, self.algorithm, self.timesteps(steps),
                                     negative)

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> Files:
        """A network of which all weights were trained."""
        model = {"diffusion_models/{name}.safetensors": (self.net.state_dict(), checkpoint.metadata(self.net.config))}
        return model | text_encoders.files(self.text)

    def adapter_files(self) -> Files:
        """An adapter, for our LoRA node and for core's."""
        tensors = adapters.tensors(self.net, lora_names(adapters.shapes(self.net)))
        return {"loras/{name}.safetensors": (tensors, {"pixstack.family": "pixart_lora"})}


TARGETS = ["attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1",
           "mlp.fc2"]
"""Where an adapter stands if the settings do not say: all linear layers of the blocks."""


def activation_bytes(shape: PixArtConfig, resolution: int, bf16: bool, checkpointed: bool) -> float:
    """Bytes kept of one picture; see `activations.of_network`."""
    def probe(depth: int, side: int) -> int:
        return kept(replace(shape, depth=depth, kv_compression=None), side, bf16)

    tokens = (resolution // VAE_FACTOR // shape.patch_size) ** 2
    return of_network(probe, (4, 8), tokens, shape.depth, tokens * shape.hidden * 4, checkpointed)


@cache
def kept(shape: PixArtConfig, side: int, bf16: bool) -> int:
    """What one forward pass keeps of one picture; side: in tokens."""
    with probing():
        net, cells = PixArt(shape), side * shape.patch_size
        x, context = torch.zeros(1, shape.in_channels, cells, cells), torch.zeros(1, 16, shape.context_dim)
        return kept_bytes(net, lambda: net(x, torch.zeros(1), context, attention=fused), bf16)
