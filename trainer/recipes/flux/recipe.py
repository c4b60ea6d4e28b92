"""FLUX (Black Forest Labs), all of its weights: rectified flow on latents, from a file or from nothing.

The small base that a small PixelPonder guides is made with it; a released one of 12 billion parameters needs a GPU to
match. Undistilled networks (guidance = false) learn from dropped captions and are sampled with classifier-free
guidance.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.flux import checkpoint, sampling
from ....models_impl.flux.config import FluxConfig
from ....models_impl.flux.model import Flux
from ...config import Config
from ...features import text_encoders
from . import task


@dataclass(frozen=True)
class Settings:
    name: ClassVar[str] = "flux"
    dropout: float = 0.1
    """How often a picture's caption is taken away, for classifier-free guidance."""
    guidance: float = 1.0
    """What a distilled network (dev) is told while training."""


@dataclass(frozen=True)
class Model:
    hidden: int = 384
    """Without init_from, which says all of this itself: the width of the transformer ..."""
    heads: int = 3
    axes: list[int] = field(default_factory=lambda: [16, 56, 56])
    """Channels of a head that turn with index, row and column; they add up to hidden / heads."""
    mlp_hidden: int = 1536
    depth: int = 4
    """Blocks with separate text and image streams."""
    single_depth: int = 4
    """Blocks on both joined."""
    channels: int = 16
    """Of the latent."""
    pooled_dim: int = 768
    guidance: bool = False
    """Whether the guidance is an input."""


def start(config: Config, text_width: int) -> tuple[FluxConfig, dict[str, Tensor]]:
    """(shape, weights of init_from if any). Raises ValueError for nonsense."""
    if config.init_from:
        return task.read(config.init_from)
    m = config.model
    return FluxConfig(hidden=m.hidden, heads=m.heads, axes=tuple(m.axes), mlp_hidden=m.mlp_hidden, depth=m.depth,
                      single_depth=m.single_depth, in_channels=4 * m.channels, pooled_dim=m.pooled_dim,
                      context_dim=text_width, guidance=m.guidance), {}


class Recipe(nn.Module):
    Settings, Model, sections = Settings, Model, ("vae", "text.padded")

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        """network: what `network()` said of a run that is opened again; without it, [model] and init_from say it."""
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        shape, tensors = (FluxConfig.from_dict(network), {}) if network else start(config, text_encoders.width(text))
        self.net = Flux(shape)
        if tensors:
            state_dict.load_into(self.net, tensors, f"FLUX ({config.init_from})")
        elif not network:
            initialise(self.net)
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        self.flow = task.Flow(config, shape, text, *self.encoders, self.settings.guidance)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """What makes features of pictures, and keeps them (`cache`)."""
        return [task.frozen_vae(config, writer)]

    @staticmethod
    def problems(config: Config) -> list[str]:
        found, shape = [], None
        try:
            shape = start(config, config.text.width)[0]
        except (ValueError, OSError) as error:
            found.append(f"init_from={config.init_from}: {error}" if config.init_from else str(error))
        if not 0 <= config.recipe.dropout < 1:
            found.append(f"recipe.dropout={config.recipe.dropout} is outside [0, 1).")
        return found + task.problems(config, shape)

    def groups(self, config: Config) -> list[dict]:
        """Parameters that learn, with their rates; the matrices inside blocks are what Muon may train."""
        return task.groups({"net": (self.net, 1.0), "text": (self.text, config.text.rate)})

    @property
    def device(self) -> torch.device:
        return self.net.img_in.weight.device

    def forward(self, batch) -> Tensor:
        """Loss of each picture, (B,)."""
        own = slice(batch.positions.start, batch.positions.stop)
        sigma, dropped, _ = self.flow.draw(batch.step, self.settings.dropout)
        with self.flow.autocast(self.device):
            step = self.flow.noising(batch, sigma[own], self.device, self.config.seed, dropped[own])
            return self.losses(batch, step)

    def losses(self, batch, step: task.Noising) -> Tensor:
        said = self.predict(step.noisy, step.sigma, step.condition)
        return sampling.loss(said, step.latent, step.noise)

    def predict(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Velocity of latents (B, C, h, w)."""
        with self.flow.autocast(self.device):
            return task.velocity(self.net, x, sigma, condition)

    def compile_blocks(self):
        for block in (*self.net.double_blocks, *self.net.single_blocks):
            block.compile()

    def described(self, step: int) -> list[str]:
        """What chance decides about each picture of a step's batch, in words."""
        sigma, dropped, _ = self.flow.draw(step, self.settings.dropout)
        return [f"sigma {s:.3f}{' (caption dropped)' if d else ''}"
                for s, d in zip(sigma.tolist(), dropped.tolist(), strict=True)]

    def buckets(self, step: int) -> list[str]:
        return task.lines(self.config)

    def activation_bytes(self, count: int, cpu: bool) -> float:
        copies = 2 * sum(p.numel() for p in self.net.parameters()) if self.flow.bf16 else 0  # that autocast makes
        return task.activation_bytes(self.net.config, self.config, count, learns=True) + copies

    def validate(self, batches: list) -> dict[str, float]:
        return self.flow.validate(batches, self.device, self.losses)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int) -> Tensor:
        """Pictures of prompts: (B, 3, H, W) in [-1, 1]. cfg: see `flux.Flow.sample`; shift is not read."""
        return self.flow.sample(self.predict, what, height, width, steps, cfg, seed, self.device)

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> dict[str, tuple[dict, dict]]:
        """What export writes: path, with {name} for the name of the export -> (tensors, metadata)."""
        found = {"diffusion_models/{name}.safetensors": (self.net.state_dict(), checkpoint.metadata(self.net.config))}
        return found | text_encoders.files(self.text)


def initialise(net: Flux):
    """DiT's start (arXiv 2212.09748, section 3.2: adaLN-Zero), which FLUX's authors do not tell: linear layers Xavier,
    modulations and the last layer zero, so that every block begins as the identity."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            zero = name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")) or name == "final_layer.linear"
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
