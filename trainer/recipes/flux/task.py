"""What the recipes on FLUX share: the network a run starts from or stands on, text and latents as FLUX reads them, the
flow that is learned, and the way back to pictures. (black-forest-labs/flux; train.py of chfyfr/PixelPonder@3326c73)"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.flux import checkpoint, sampling
from ....models_impl.flux.config import FluxConfig
from ....models_impl.flux.model import DoubleStreamBlock, Flux, SingleStreamBlock, pack, positions, rope_table, unpack
from ...config import Config
from ...data import buckets
from ...features import text_encoders, vaes
from ...training import plan
from ...training.noise import VALIDATION, batch_noise, generator, spread

LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # FLUX reads (latent - shift) * scale
VAE_FACTOR, CELL = 8, 16  # pixels along a side of a latent cell, and of a token
QUANTILES = 1000  # of the noise levels of a validation

Predict = Callable[..., Tensor]
"""(x (B, C, h, w), sigma (B,), condition) -> velocity of the shape of x."""


def read(file: str) -> tuple[FluxConfig, dict[str, Tensor]]:
    """Shape and weights of a FLUX file. Raises ValueError, FileNotFoundError."""
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


def problems(config: Config, shape: FluxConfig | None) -> list[str]:
    """What every recipe on FLUX needs. shape: of the FLUX, if it is known."""
    found = []
    if not config.text.encoder:
        found.append("text.encoder is empty: FLUX reads captions. Name the folder of its T5, or a text encoder.")
    elif not config.text.padded:
        found.append("text.padded=false: FLUX attends to all of text.max_length tokens, those that fill it up too. Set "
                     "text.padded=true.")
    if not config.vae.path:
        found.append("vae.path is empty: FLUX draws latents. Name its VAE, a folder or a .safetensors file.")
    if shape:
        found += vaes.vae_problems(config.vae.path, shape.in_channels // 4, "this FLUX")
    if config.samples.classes:
        found.append("samples.classes is for class-conditional runs: use samples.prompts.")
    sizes = {"data.resolution": config.data.resolution, "samples.height": config.samples.height,
             "samples.width": config.samples.width}
    found += [f"{name}={size} is not a multiple of {CELL}." for name, size in sizes.items() if size % CELL]
    known = config.data.problems(config.batch_size, config.micro_batch_size)  # said already
    odd = [size for size in buckets.sizes(config.data) if any(side % CELL for side in size)] \
        if config.data.buckets and not known else []
    if odd:
        found.append(f"data.buckets={config.data.buckets!r} has sizes such as {odd[0][1]}x{odd[0][0]}, no multiples of "
                     f"{CELL}: take \"area\" with a data.bucket_multiple.")
    if shape and config.text.encoder == "small" and config.text.width != shape.context_dim:
        found.append(f"text.width={config.text.width}, and this FLUX reads tokens of width {shape.context_dim}.")
    return found


@dataclass(frozen=True)
class Noising:
    """What one training step asks the network about a batch."""

    latent: Tensor
    """(B, C, h, w) as FLUX reads it"""
    noise: Tensor
    noisy: Tensor
    sigma: Tensor
    """(B,) in (0, 1)"""
    condition: dict[str, Tensor]
    """context (B, L, D), pooled (B, P), guidance (B,)."""

    def rows(self, index: list[int]) -> Noising:
        """Some pictures of the batch."""
        return Noising(*(t[index] for t in (self.latent, self.noise, self.noisy, self.sigma)),
                       {name: value[index] for name, value in self.condition.items()})


class Flow:
    """Everything about a FLUX but its weights: latents, captions, noise, the loss, samples."""

    def __init__(self, config: Config, shape: FluxConfig, text: nn.Module, vae: vaes.FrozenVae, guidance: float):
        """guidance: what a distilled network is told while training."""
        self.config, self.shape, self.text, self.vae, self.guidance = config, shape, text, vae, guidance
        self.bf16 = config.precision == "bf16"
        if text_encoders.width(text) != shape.context_dim:
            raise ValueError(f"text.encoder makes tokens of width {text_encoders.width(text)}, and this FLUX reads "
                             f"{shape.context_dim}: use the encoder that belongs to it.")

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def draw(self, step: int, dropout: float) -> tuple[Tensor, Tensor, torch.Generator]:
        """What chance decides about the pictures of a whole batch: sigma (B,), whether the caption is dropped (B,);
        and the generator, for what else is to be drawn."""
        rng = generator(self.config.seed, step)
        normal = torch.randn(self.config.batch_size, generator=rng)
        dropped = torch.rand(self.config.batch_size, generator=rng) < dropout
        return sampling.training_sigma(normal), dropped, rng

    def condition(self, captions: list[str], device, guidance: float | None = None) -> dict[str, Tensor]:
        context, _ = text_encoders.encode(self.text, captions, device, padded=True)
        if getattr(self.text, "clip", None):
            pooled = self.text.pooled(captions, device)
        else:
            pooled = torch.zeros(len(captions), self.shape.pooled_dim, device=device)
        told = torch.full((len(captions),), self.guidance if guidance is None else guidance, device=device)
        return {"context": context, "pooled": pooled, "guidance": told}

    def noising(self, batch, sigma: Tensor, device, seed: int, dropped: Tensor | None = None) -> Noising:
        """dropped: (B,) bool, captions that are replaced by the empty one."""
        latent = (self.vae.latents(batch, device, seed) - LATENT_SHIFT) * LATENT_SCALE
        noise = batch_noise(seed, batch.step, batch.positions, latent.shape[1:], device)
        drop = [False] * len(batch.captions) if dropped is None else dropped.tolist()
        captions = ["" if d else c for c, d in zip(batch.captions, drop, strict=True)]
        sigma = sigma.to(device)
        return Noising(latent, noise, sampling.add_noise(latent, noise, sigma), sigma, self.condition(captions, device))

    def fixed_sigma(self, positions: range) -> Tensor:
        """Noise levels that never change, spread over their distribution in training: (B,)."""
        quantile = (spread(positions, QUANTILES) + 0.5) / QUANTILES
        return sampling.training_sigma(torch.special.ndtri(quantile.double()).float())

    @torch.no_grad()
    def validate(self, batches: list, device, losses: Callable[[object, Noising], Tensor]) -> dict[str, float]:
        """Mean loss of the held-out pictures, whole and by quarters of the noise level. losses: (batch, noising) ->
        (B,)."""
        found, levels = [], []
        for batch in batches:
            sigma = self.fixed_sigma(batch.positions)
            found.append(losses(batch, self.noising(batch, sigma, device, VALIDATION)))
            levels.append(sigma)
        loss, quarter = torch.cat(found).float().cpu(), (torch.cat(levels) * 4).long()
        return {"loss": loss.mean().item()} | {f"quarter{q}": loss[quarter == q].mean().item()
                                               for q in range(4) if (quarter == q).any()}

    @torch.no_grad()
    def sample(self, predict: Predict, prompts: list[str], height: int, width: int, steps: int, cfg: float, seed: int,
               device) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) in [-1, 1]. Picture i begins with ComfyUI's noise for seed + i.

        cfg: what a distilled network is told as its guidance; of any other, the scale of classifier-free guidance.
        """
        B, distilled = len(prompts), self.shape.guidance
        size = self.shape.in_channels // 4, height // VAE_FACTOR, width // VAE_FACTOR
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed + i)) for i in range(B)])
        guided = not distilled and cfg != 1
        condition = self.condition([*([""] * B if guided else []), *prompts], device, cfg if distilled else None)

        def told(x, sigma):
            if not guided:
                return predict(x, sigma, condition).float()
            uncond, cond = predict(x.repeat(2, 1, 1, 1), sigma.repeat(2), condition).float().chunk(2)
            return torch.lerp(uncond, cond, cfg)

        sigmas = sampling.schedule(steps, (height // CELL) * (width // CELL))
        latent = sampling.sample(told, noise.to(device), sigmas)
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


def groups(modules: dict[str, tuple[nn.Module | None, float]]) -> list[dict]:
    """Of the parameters that learn, with their rates; matrices: those of blocks, which Muon may train."""
    found = []
    for module, rate in modules.values():
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad] if module is not None else []
        if named:
            hidden = {n for n, _ in named if "blocks." in n and not any(w in n for w in ("norm", "bias", "embed"))}
            found.append({"params": named, "rate": rate, "matrices": hidden})
    return found


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
    img, txt, whole = (torch.zeros(1, n, D, requires_grad=True) for n in (N // 2, N // 2, N))  # both streams cost alike
    rope, vec = rope_table(torch.zeros(N, 3), narrow.axes), torch.zeros(1, D)
    double, single = (block(narrow, nn, {}).requires_grad_(learns) for block in (DoubleStreamBlock, SingleStreamBlock))
    kept = {"double": plan.kept_bytes(double, lambda: double(img, txt, vec, rope, plan.fused), bf16),
            "single": plan.kept_bytes(single, lambda: single(whole, vec, rope, plan.fused), bf16)}
    tokens = shape.heads * (image + text) / N
    blocks = shape.depth * kept["double"] + shape.single_depth * kept["single"]
    if config.checkpoint_activations:
        blocks = max(kept.values()) + (shape.depth + shape.single_depth) * N * D * (2 if bf16 else 4)
    return pictures * tokens * blocks
