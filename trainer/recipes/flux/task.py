"""What the recipes on FLUX share: the network a run starts from or stands on, text and latents as FLUX reads them, the
flow that is learned, and the way back to pictures. (black-forest-labs/flux; train.py of chfyfr/PixelPonder@3326c73)"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.flux import checkpoint, sampling
from ....models_impl.flux.config import FluxConfig
from ....models_impl.flux.model import DoubleStreamBlock, Flux, SingleStreamBlock, pack, positions, rope_table, unpack
from ....models_impl.guard import reading
from ...config.schema import Config
from ...features import text_encoders, vaes
from ...memory.activations import fused, kept_bytes, of_stack
from ...training import objective
from ...training.noise import VALIDATION, generator, spread, state_noise, training_noise
from ...training.validation import certainty, quarters
from ..noised import NoisedBatch
from .settings import CELL, of_shape

LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # FLUX reads (latent - shift) * scale
VAE_FACTOR = 8  # pixels along a side of a latent cell
QUANTILES = 1000  # of the noise levels of a validation

Predict = Callable[..., Tensor]
"""(x (B, C, h, w), sigma (B,), condition) -> velocity of the shape of x."""


def read(file: str) -> tuple[FluxConfig, dict[str, Tensor]]:
    """Shape and weights of a FLUX file. Raises ValueError, FileNotFoundError."""
    with reading(file):
        return checkpoint.read(*state_dict.read_file(Path(file).expanduser()))


def frozen(file: str, bf16: bool, checkpointed: bool) -> Flux:
    """A FLUX that does not learn, its weights as they lie in the file where that has the same precision."""
    shape, tensors = read(file)
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device("meta"):
        net = Flux(shape)
    state_dict.check_fit(net, tensors, f"FLUX ({Path(file).name})")
    net.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    net.gradient_checkpointing = checkpointed
    return net.eval().requires_grad_(False)


def frozen_vae(config: Config, writer: int = 0) -> vaes.FrozenVae:
    return vaes.FrozenVae(config.vae.path, config.vae.precision, config.cache.folder, writer=writer)


def shape_problems(config: Config, shape: FluxConfig) -> list[str]:
    """Problems with the VAE and the text beside a FLUX of this shape."""
    return vaes.vae_problems(config.vae.path, shape.in_channels // 4, "this FLUX") + of_shape(config, shape)


class FluxFlow:
    """Everything about a FLUX but its weights: latents, captions, noise, the loss, samples."""

    def __init__(self, config: Config, shape: FluxConfig, text: nn.Module, vae: vaes.FrozenVae, guidance: float):
        """guidance: what a distilled network is conditioned on while training."""
        self.config, self.shape, self.text, self.vae, self.guidance = config, shape, text, vae, guidance
        self.diffusion = sampling.RectifiedFlow()
        self.draws, self.objective = objective.draws(config.noise, sampling.DRAWN), objective.objective(config.loss)
        self.bf16 = config.precision == "bf16"
        if text_encoders.width(text) != shape.context_dim:
            raise ValueError(f"text.encoder makes tokens of width {text_encoders.width(text)}, and this FLUX reads "
                             f"{shape.context_dim}: use the encoder that belongs to it.")

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def draw(self, step: int, dropout: float) -> tuple[Tensor, Tensor, torch.Generator]:
        """Random draws for the pictures of a whole batch: sigma (B,), whether the caption is dropped (B,);
        and the generator, for what else is to be drawn."""
        rng = generator(self.config.seed, step)
        sigma = self.diffusion.draw(self.config.batch_size, rng, self.draws)
        return sigma, torch.rand(self.config.batch_size, generator=rng) < dropout, rng

    def condition(self, captions: list[str], device, guidance: float | None = None) -> dict[str, Tensor]:
        context, _ = text_encoders.encode(self.text, captions, device, padded=True)
        if isinstance(self.text, text_encoders.FrozenT5) and self.text.clip:
            pooled = self.text.pooled(captions, device)
        else:
            pooled = torch.zeros(len(captions), self.shape.pooled_dim, device=device)
        scale = torch.full((len(captions),), self.guidance if guidance is None else guidance, device=device)
        return {"context": context, "pooled": pooled, "guidance": scale}

    def noising(self, batch, sigma: Tensor, device, seed: int, dropped: Tensor | None = None) -> NoisedBatch:
        """dropped: (B,) bool, captions that are replaced by the empty one."""
        latent = (self.vae.latents(batch, device, seed) - LATENT_SHIFT) * LATENT_SCALE
        drawn, settings = (seed, batch.step, batch.positions), self.config.noise
        noise = training_noise(settings, *drawn, latent.shape[1:], device)
        drop = [False] * len(batch.captions) if dropped is None else dropped.tolist()
        captions = ["" if d else c for c, d in zip(batch.captions, drop, strict=True)]
        sigma = sigma.to(device)
        noisy = self.diffusion.add_noise(latent, state_noise(settings, noise, *drawn), sigma)
        cells = objective.cells(self.config.loss, batch, latent.shape[-2:], device)
        return NoisedBatch(latent, noise, noisy, sigma, self.condition(captions, device), cells)

    def loss(self, velocity: Tensor, step: NoisedBatch) -> Tensor:
        """(B,), of what a network predicts."""
        return self.diffusion.loss(velocity, step.latent, step.noise, step.time, self.objective, step.cells)

    def fixed_sigma(self, positions: range) -> Tensor:
        """Noise levels that never change, spread over their distribution in training: (B,)."""
        quantile = (spread(positions, QUANTILES) + 0.5) / QUANTILES
        return sampling.training_sigma(torch.special.ndtri(quantile.double()).float())

    @torch.no_grad()
    def validate(self, batches: list, device, losses: Callable[[object, NoisedBatch], Tensor]) -> dict[str, float]:
        """Mean loss of the held-out pictures, whole and by quarters of the noise level. losses: (batch, noising) ->
        (B,)."""
        found, levels = [], []
        for batch in batches:
            sigma = self.fixed_sigma(batch.positions)
            found.append(losses(batch, self.noising(batch, sigma, device, VALIDATION)))
            levels.append(sigma)
        loss = torch.cat(found).float().cpu()
        return {"loss": loss.mean().item(), **certainty(loss), **quarters(loss, torch.cat(levels))}

    @torch.no_grad()
    def sample(self, predict: Predict, prompts: list[str], height: int, width: int, steps: int, cfg: float, seed: int,
               device, negative: str = "") -> Tensor:
        """Pictures of prompts, (B, 3, H, W) in [-1, 1]. Picture i begins with ComfyUI's noise for seed + i.

        cfg: the guidance that a distilled network is conditioned on; of any other, the scale of classifier-free
        guidance.
        """
        B, distilled = len(prompts), self.shape.guidance
        if negative and distilled:
            raise ValueError(f"negative={negative!r}: this FLUX is distilled, and draws without a negative prompt: "
                             "take it out of [[samples.prompts]].")
        size = self.shape.in_channels // 4, height // VAE_FACTOR, width // VAE_FACTOR
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed + i)) for i in range(B)])
        guided = not distilled and cfg != 1
        condition = self.condition([*([negative] * B if guided else []), *prompts], device, cfg if distilled else None)

        def guided_velocity(x, sigma):
            if not guided:
                return predict(x, sigma, condition).float()
            uncond, cond = predict(x.repeat(2, 1, 1, 1), sigma.repeat(2), condition).float().chunk(2)
            return torch.lerp(uncond, cond, cfg)

        sigmas = self.diffusion.schedule(steps, (height // CELL) * (width // CELL))
        latent = self.diffusion.sample(guided_velocity, noise.to(device), sigmas)
        return self.vae.decode(latent / LATENT_SCALE + LATENT_SHIFT)


def ids_of(x: Tensor) -> Tensor:
    """Positions of the tokens of latents (B, C, h, w)."""
    return positions(x.shape[-2] // 2, x.shape[-1] // 2, x.device)


def velocity(net: Flux, x: Tensor, sigma: Tensor, condition: dict[str, Tensor], residuals=None) -> Tensor:
    """What a FLUX says about latents (B, C, h, w), in its own precision."""
    dtype = net.img_in.weight.dtype
    tokens = net(pack(x).to(dtype), sigma, condition["context"].to(dtype), condition["pooled"].to(dtype),
                 condition["guidance"], img_ids=ids_of(x), residuals=residuals)
    return unpack(tokens, *x.shape[-2:])


def lines(config: Config) -> list[str]:
    side = config.data.resolution
    return [f"{config.batch_size} pictures of {side}x{side} pixels, {(side // CELL) ** 2} tokens each, and "
            f"{config.text.max_length} of text"]


def activation_bytes(shape: FluxConfig, config: Config, pictures: int, learns: bool) -> float:
    """What the blocks of a trunk keep of so many pictures for the backward pass: probes of one narrow head and few
    tokens, extrapolated. learns: whether its weights do."""
    narrow = replace(shape, hidden=shape.head_dim, heads=1, mlp_hidden=max(1, shape.mlp_hidden // shape.heads), depth=1,
                     single_depth=1)
    D, N, bf16 = narrow.hidden, 64, config.precision == "bf16"
    image, text = (config.data.resolution // CELL) ** 2, config.text.max_length
    img, txt, both = (torch.zeros(1, n, D, requires_grad=True) for n in (N // 2, N // 2, N))  # both streams cost alike
    rope, vec = rope_table(torch.zeros(N, 3), narrow.axes), torch.zeros(1, D)
    double, single = (block(narrow, nn, {}).requires_grad_(learns) for block in (DoubleStreamBlock, SingleStreamBlock))
    blocks = [(shape.depth, kept_bytes(double, lambda: double(img, txt, vec, rope, fused), bf16)),
              (shape.single_depth, kept_bytes(single, lambda: single(both, vec, rope, fused), bf16))]
    heads = pictures * shape.heads * (image + text) / N
    return heads * of_stack(blocks, N * D * (2 if bf16 else 4), config.checkpoint_activations)
