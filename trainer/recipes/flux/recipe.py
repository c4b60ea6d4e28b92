"""FLUX (Black Forest Labs), all of its weights: rectified flow on latents, from a file or from nothing.

The small base that a small PixelPonder guides is made with it; a released one of 12 billion parameters needs a GPU to
match. Undistilled networks (guidance = false) learn from dropped captions and are sampled with classifier-free
guidance.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.flux import checkpoint
from ....models_impl.flux.config import FluxConfig
from ....models_impl.flux.model import Flux
from ...config.schema import Config
from ...features import text_encoders
from ...memory.activations import casts
from ...training.groups import Group, groups
from ..contract import Base, Files
from ..noised import NoisedBatch
from . import task
from .settings import new_shape


class Recipe(Base):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
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
        self.flow = task.FluxFlow(config, shape, text, *self.encoders, self.settings.guidance)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return [task.frozen_vae(config, writer)]

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        try:
            shape = start(config, config.text.width)[0]
        except (ValueError, OSError) as error:
            return [f"init_from={config.init_from}: {error}"]
        return task.shape_problems(config, shape)

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"net": 1.0, "text": config.text.learning_rate_multiple})

    @property
    def device(self) -> torch.device:
        return self.net.img_in.weight.device

    def forward(self, batch) -> Tensor:
        own = slice(batch.positions.start, batch.positions.stop)
        sigma, dropped, _ = self.flow.draw(batch.step, self.settings.dropout)
        with self.flow.autocast(self.device):
            step = self.flow.noising(batch, sigma[own], self.device, self.config.seed, dropped[own])
            return self.losses(batch, step)

    def losses(self, batch, step: NoisedBatch) -> Tensor:
        return self.flow.loss(self.predict(step.noisy, step.time, step.condition), step)

    def predict(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Velocity of latents (B, C, h, w)."""
        with self.flow.autocast(self.device):
            return task.velocity(self.net, x, sigma, condition)

    def blocks(self) -> list[nn.Module]:
        return [*self.net.double_blocks, *self.net.single_blocks]

    def described(self, step: int) -> list[str]:
        sigma, dropped, _ = self.flow.draw(step, self.settings.dropout)
        return [f"sigma {s:.3f}{' (caption dropped)' if d else ''}"
                for s, d in zip(sigma.tolist(), dropped.tolist(), strict=True)]

    def buckets(self, step: int) -> list[str]:
        return task.lines(self.config)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return task.activation_bytes(self.net.config, self.config, pictures, learns=True) \
            + casts(self.net, self.flow.bf16)

    def validate(self, batches: list) -> dict[str, float]:
        return self.flow.validate(batches, self.device, self.losses)

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """cfg: see `task.FluxFlow.sample`; shift is not read."""
        return self.flow.sample(self.predict, what, height, width, steps, cfg, seed, self.device, negative)

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> Files:
        found = {"diffusion_models/{name}.safetensors": (self.net.state_dict(), checkpoint.metadata(self.net.config))}
        return found | text_encoders.files(self.text)


def start(config: Config, text_width: int) -> tuple[FluxConfig, dict[str, Tensor]]:
    """(shape, weights of init_from if any). Raises ValueError for nonsense."""
    return task.read(config.init_from) if config.init_from else (new_shape(config, text_width), {})


def initialise(net: Flux):
    """DiT's start (arXiv 2212.09748, section 3.2: adaLN-Zero), which FLUX's authors do not publish: linear layers
    Xavier, modulations and the last layer zero, so that every block begins as the identity."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            zero = name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")) or name == "final_layer.linear"
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
