"""What the PixArt recipes share: [model], the network a run starts from, and the way from a batch to a loss and back to
pictures. (arXiv 2310.00426, 2403.04692; train_scripts/ of PixArt-alpha/PixArt-sigma@1ce521a)"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl.pixart import buckets, checkpoint, sampling
from ....models_impl.pixart.config import VAE_FACTOR, PixArtConfig
from ....models_impl.pixart.lora import names as lora_names
from ....models_impl.pixart.model import PixArt
from ...config import Config
from ...features import text_encoders, vaes
from ...training import plan
from ...training.noise import VALIDATION, batch_noise, generator, spread
from .. import adapters
from .start import start

Predict = Callable[..., Tensor]
"""(x, timestep, context=, mask=, size=, aspect_ratio=) -> what a PixArt network says, (B, out_channels, h, w)."""


def problems(config: Config) -> list[str]:
    """What every PixArt recipe needs."""
    found, shape = [], None
    try:
        shape = start(config).config
    except (ValueError, OSError) as error:
        if not config.init_from or Path(config.init_from).expanduser().exists():  # else that is said already
            found.append(f"init_from={config.init_from}: {error}" if config.init_from else str(error))
    if not config.text.encoder:
        found.append("text.encoder is empty: PixArt reads captions. Name the folder of its T5, or a text encoder.")
    if not config.vae.path:
        found.append("vae.path is empty: PixArt draws latents. Name its VAE, a folder of diffusers or a .safetensors "
                     "file.")
    if config.samples.classes:
        found.append("samples.classes is for class-conditional runs: use samples.prompts.")
    if shape:
        found += vaes.vae_problems(config.vae.path, shape.in_channels, "this PixArt")
        if config.text.max_length > shape.token_limit:
            found.append(f"text.max_length={config.text.max_length} is more than the {shape.token_limit} tokens that "
                         "this PixArt takes.")
        sizes = {"data.resolution": config.data.resolution, "samples.height": config.samples.height,
                 "samples.width": config.samples.width}
        found += [f"{name}={size} is not a multiple of {shape.size_multiple}." for name, size in sizes.items()
                  if size % shape.size_multiple]
    return found


@dataclass(frozen=True)
class Noising:
    """What one training step asks the network about a batch."""

    latent: Tensor
    """(B, C, h, w) times latent_scale"""
    noise: Tensor
    noisy: Tensor
    timestep: Tensor
    """(B,) whole, int64"""
    condition: dict[str, Tensor]
    """context, mask, and for a micro-conditioned network size and aspect_ratio."""


def losses(predict: Predict, step: Noising, shape: PixArtConfig, schedule: sampling.NoiseSchedule,
           variance: float = 1.0, snr_switch: bool = False, snr_gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """(squared error, variational bound of the variance times its weight), (B,) each; a picture's loss is the sum.

    variance: weight of the bound, 0 leaves it out; snr_switch: learn the sample instead of the noise up to timestep
    249; snr_gamma: weigh the error by Min-SNR with this gamma, 0 = not.
    """
    s, C = step, shape.in_channels
    said = predict(s.noisy, s.timestep, **s.condition).float()
    first, logits = said[:, :C], said[:, C:] if variance and said.shape[1] > C else None
    if shape.prediction == "eps":
        found = sampling.iddpm_loss(first, logits, s.latent, s.noise, s.timestep, schedule, snr_switch)
        error, bound = found.mse, found.vb
    else:
        error = (first - schedule.velocity(s.latent, s.noise, s.timestep)).square().flatten(1).mean(1)
        eps, bound = schedule.eps(s.noisy, first.detach(), s.timestep), torch.zeros_like(error)
        if logits is not None:
            bound = sampling.variance_bound(eps, logits, s.latent, s.noisy, s.timestep, schedule)
    if snr_gamma:
        error = error * schedule.min_snr_weight(s.timestep, snr_gamma, shape.prediction).to(error)
    return error, variance * bound


class Denoising:
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
        self.schedule = sampling.NoiseSchedule.of(self.shape)
        self.bf16 = config.precision == "bf16"

    @property
    def device(self) -> torch.device:
        return self.net.final_layer.linear.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def draw(self, step: int, dropout: float) -> tuple[Tensor, Tensor]:
        """What chance decides about the pictures of a whole batch: timestep (B,) and whether the caption is dropped."""
        rng, B = generator(self.seed, step), self.config.batch_size
        timestep = torch.randint(self.schedule.steps, (B,), generator=rng)
        return timestep, torch.rand(B, generator=rng) < dropout

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
        null = hasattr(embedder, "y_embedding")
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

    def noising(self, batch, timestep: Tensor, dropped: Tensor | None, seed: int) -> Noising:
        latent = self.latents(batch, seed)
        noise = batch_noise(seed, batch.step, batch.positions, latent.shape[1:], self.device)
        timestep = timestep.to(self.device)
        condition = self.condition(batch.captions, dropped, batch.size, batch.sizes)
        return Noising(latent, noise, self.schedule.add_noise(latent, noise, timestep), timestep, condition)

    def eps(self, predict: Predict, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """What the network says about the noise alone, (B, C, h, w) float32."""
        said = predict(x, timestep, **condition)[:, : self.shape.in_channels].float()
        return said if self.shape.prediction == "eps" else self.schedule.eps(x, said, timestep)

    def losses(self, predict: Predict, step: Noising, variance: float = 1.0, snr_switch: bool = False,
               snr_gamma: float = 0.0) -> tuple[Tensor, Tensor]:
        """`losses` of this network's shape and schedule."""
        return losses(predict, step, self.shape, self.schedule, variance, snr_switch, snr_gamma)

    @torch.no_grad()
    def validate(self, losses: Callable, batches: list) -> dict[str, float]:
        """Means over the held-out pictures, at timesteps and with noise that never change; by quarters of the
        timesteps too, because the whole hides what happens where there is little noise.

        losses: (batch, timestep, dropped, seed) -> what `losses` here gives.
        """
        found = [(*losses(batch, timestep, None, VALIDATION), timestep)
                 for batch in batches for timestep in [spread(batch.positions, self.schedule.steps)]]
        error, bound, timestep = (torch.cat(some).float().cpu() for some in zip(*found, strict=True))
        quarter = timestep * 4 // self.schedule.steps
        return {
            "loss": (error + bound).mean().item(),
            **({"variance": bound.mean().item()} if bound.any() else {}),
            **{f"quarter{q}": error[quarter == q].mean().item() for q in range(4) if (quarter == q).any()},
        }

    @torch.no_grad()
    def sample(self, predict: Predict, prompts: list[str], height: int, width: int, cfg: float, seed: int,
               walk: Callable) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1]. Picture i begins with the noise that ComfyUI draws for
        seed + i, whatever it is drawn together with.

        walk(eps, x, noise) -> latents: a sampler of models_impl/pixart/sampling.py, eps: (x, timestep) -> guided eps,
        noise: (index of the step, shape) -> noise.
        """
        device, shape = self.device, self.shape
        size = (shape.in_channels, height // VAE_FACTOR, width // VAE_FACTOR)
        chances = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

        def noise(index=0, whole=None):
            return torch.stack([torch.randn(size, generator=g) for g in chances]).to(device)

        with self.autocast():
            latent = walk(self.guided(predict, prompts, height, width, cfg), noise(), noise)
        return self.vae.decode(latent / shape.latent_scale)

    def guided(self, predict: Predict, prompts: list[str], height: int, width: int, cfg: float) -> sampling.Predict:
        """(x, timestep) -> eps of pictures of prompts, guided from the empty caption. Under `autocast`."""
        B = len(prompts)
        told = [*([""] * B if cfg != 1 else []), *prompts]
        condition = self.condition(told, None, (height, width))

        def eps(x, timestep):
            both = x.repeat(len(told) // B, 1, 1, 1)
            t = torch.full((len(both),), float(timestep), device=self.device)
            found = self.eps(predict, both, t, condition)
            if cfg == 1:
                return found
            uncond, cond = found.chunk(2)
            return uncond + cfg * (cond - uncond)

        return eps

    def solver(self, steps: int) -> Callable:
        """DPM-Solver++ as the releases run it."""
        def walk(eps, x, noise):
            return sampling.dpm_solver_pp(eps, x, self.schedule, sampling.time_uniform(steps))

        return walk


def label(height: int, width: int) -> float:
    """What a micro-conditioned network is told as the aspect ratio of a picture of this size: the label of a bucket."""
    for table in buckets.TABLES.values():
        for ratio, size in table.items():
            if size == (height, width):
                return ratio
    return height / width


def frozen_vae(config: Config, name: str = "latent", of: str = "", writer: int = 0, annotator: str = ""):
    return vaes.FrozenVae(config.vae.path, config.vae.precision, config.cache.folder, name, of, writer, annotator)


def lora_file(net: PixArt) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What export writes of an adapter, for our LoRA node and for core's: (tensors, metadata)."""
    return adapters.tensors(net, lora_names(adapters.shapes(net))), {"pixstack.family": "pixart_lora"}


TARGETS = ["attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1",
           "mlp.fc2"]
"""Where an adapter stands if the settings do not say: all linear layers of the blocks."""


def problems_of_loss(settings) -> list[str]:
    """Of the settings of a recipe that has some of dropout, variance and snr_gamma."""
    found = []
    if not 0 <= settings.dropout < 1:
        found.append(f"recipe.dropout={settings.dropout} is outside [0, 1).")
    for name in ("variance", "snr_gamma", "prior_weight"):
        if getattr(settings, name, 0) < 0:
            found.append(f"recipe.{name}={getattr(settings, name)} must not be negative.")
    return found


def needs_a_start(config: Config) -> list[str]:
    return [] if config.init_from else [f"init_from is empty: recipe.name={config.recipe.name!r} begins with a network "
                                        "that is trained already. Name its file."]


# --- What the recipes share as methods. A recipe has settings, config, text, net and denoising.

def groups_of(**modules: nn.Module | None) -> list[dict]:
    """Of the parameters that learn; matrices: those of blocks, which Muon may train."""
    found = []
    for module in filter(None, modules.values()):
        if named := [(n, p) for n, p in module.named_parameters() if p.requires_grad]:
            hidden = {n for n, _ in named if "block" in n and not any(w in n for w in ("norm", "bias", "embed"))}
            found.append({"params": named, "rate": 1.0, "matrices": hidden})
    return found


def groups(recipe, config: Config) -> list[dict]:
    """Parameters that learn, with their rates."""
    found, text = groups_of(net=recipe.net), groups_of(text=recipe.text)
    return found + [{**group, "rate": config.text.rate} for group in text]


def described(recipe, step: int) -> list[str]:
    """What chance decides about each picture of a step's batch, in words."""
    timestep, dropped = recipe.denoising.draw(step, recipe.settings.dropout)
    return [f"timestep {t}{' (caption dropped)' if drop else ''}"
            for t, drop in zip(timestep.tolist(), dropped.tolist(), strict=True)]


def bucket_lines(recipe, step: int) -> list[str]:
    side, shape = recipe.config.data.resolution, recipe.net.config
    return [f"{recipe.config.batch_size} pictures of {side}x{side} pixels, "
            f"{(side // shape.size_multiple) ** 2} tokens each"
            + (" (or about as many, in other shapes)" if recipe.config.data.buckets else "")]


def compile_blocks(recipe):
    for block in recipe.net.blocks:
        block.compile()


def activations(recipe, pictures: int, cpu: bool) -> float:
    """What a forward pass keeps for the backward pass, in bytes."""
    c, bf16 = recipe.config, recipe.config.precision == "bf16"
    casts = 2 * sum(p.numel() for p in recipe.net.parameters() if p.requires_grad) if bf16 else 0  # autocast keeps them
    return casts + activation_bytes(recipe.net.config, max(c.data.sides), pictures, bf16, c.checkpoint_activations)


def sample(recipe, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
    """Pictures of prompts: (B, 3, H, W) in [-1, 1]. shift is PixelFlow's and is not read."""
    d = recipe.denoising
    return d.sample(recipe.net, what, height, width, cfg, seed, d.solver(steps))


def network(recipe) -> dict:
    return recipe.net.config.as_dict()


def net_files(recipe) -> dict[str, tuple[dict, dict]]:
    """What export writes of a network that was trained as a whole: path, with {name} for the name of the export ->
    (tensors, metadata)."""
    found = {"diffusion_models/{name}.safetensors": (recipe.net.state_dict(), checkpoint.metadata(recipe.net.config))}
    return found | text_encoders.files(recipe.text)


def activation_bytes(shape: PixArtConfig, resolution: int, pictures: int, bf16: bool, checkpointed: bool) -> float:
    """What a forward pass of so many pictures keeps for the backward pass: probes of one and two blocks on small
    latents, extrapolated."""
    def probe(depth, side):
        net = PixArt(replace(shape, depth=depth, kv_compression=None))
        x, context = torch.zeros(1, shape.in_channels, side, side), torch.zeros(1, 16, shape.context_dim)
        return plan.kept_bytes(net, lambda: net(x, torch.zeros(1), context, attention=plan.fused), bf16)

    small, large = 4 * shape.patch_size, 8 * shape.patch_size  # 16 and 64 tokens
    tokens = (resolution // VAE_FACTOR // shape.patch_size) ** 2

    def at(values):  # linear in the tokens
        (few, many) = values
        return few + (many - few) / 48 * (tokens - 16)

    one, two = (tuple(probe(depth, side) for side in (small, large)) for depth in (1, 2))
    block = at(two) - at(one)
    inputs = tokens * shape.hidden * 4
    blocks = block + shape.depth * inputs if checkpointed else shape.depth * block
    return pictures * (at(one) - block + blocks)
