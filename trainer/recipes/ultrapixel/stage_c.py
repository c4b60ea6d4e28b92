"""Stage C, all of its weights: latents of the semantic encoder from texts, from nothing or from a file.
(arXiv 2306.00637; train/train_c.py of Stability-AI/StableCascade@7a7d341f, MIT)

The small base that a small guide stands on is made with it; the released one takes a GPU that holds its moments.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.model import StageC
from ...config.schema import Config
from ...data import buckets
from ...features import text_encoders
from ...libraries import probing
from ...memory.activations import casts, fused, kept_bytes
from ...training.groups import Group, groups
from ...training.noise import VALIDATION
from ..contract import Files
from .encoders import make_encoders
from .networks import read
from .settings import PIXELS, new_stage_c
from .task import StageCRecipe, of_unet, text_problems, text_widths


class Recipe(StageCRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        shape, tensors = (StageCConfig.from_dict(network), {}) if network else start(config, *text_widths(text))
        net = StageC(shape)
        if tensors:
            state_dict.load_into(net, tensors, f"Stage C ({config.init_from})")
        elif not network:
            net.initialise()
        net.gradient_checkpointing = config.checkpoint_activations
        super().__init__(config, text, net)
        self.bf16 = config.precision == "bf16"
        self.prepare()

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return make_encoders(config, None, writer)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems = text_problems(config)
        if config.init_from:
            try:
                read(config.init_from)
            except (ValueError, OSError) as error:
                problems.append(f"init_from={config.init_from}: {error}")
        return problems

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"net": 1.0, "text": config.text.learning_rate_multiple}, of_unet)

    def autocast(self):
        return torch.autocast(self.denoising.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def losses(self, batch, draws, seed: int) -> Tensor:
        d = self.denoising
        with self.autocast():
            return d.plain(d.latents(batch, seed).high, draws.t, d.conditioning(batch, draws))

    def forward(self, batch) -> Tensor:
        return self.weighted(batch, lambda draws: self.losses(batch, draws, self.denoising.seed))

    def validate(self, batches: list) -> dict[str, float]:
        with self.at_rest():
            return self.denoising.validate(
                batches, lambda batch, draws: {"loss": self.losses(batch, draws, VALIDATION)})

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """In one pass, without a guide."""
        with self.at_rest(), self.autocast():
            return self.denoising.sample(what, height, width, steps, shift, cfg, seed, negative=negative)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        shape, (height, width) = self.net.config, max(buckets.sizes(self.config.data), key=lambda s: s[0] * s[1])
        with probing():
            net = StageC(shape)
            net.gradient_checkpointing = self.config.checkpoint_activations
            x = torch.zeros(1, shape.in_channels, height // PIXELS, width // PIXELS)
            text, vector = torch.zeros(1, self.config.text.max_length, shape.text_dim), torch.zeros(1, shape.pooled_dim)
            kept = kept_bytes(net, lambda: net(x, torch.zeros(1), text, vector, attention=fused), self.bf16)
        return pictures * kept + casts(self.net, self.bf16)

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> Files:
        tensors = checkpoint.released_attention_names(self.net.state_dict())
        return {"diffusion_models/{name}.safetensors": (tensors, checkpoint.metadata(self.net.config)),
                **text_encoders.files(self.text)}


def start(config: Config, text: int, pooled: int) -> tuple[StageCConfig, dict[str, Tensor]]:
    """(shape, weights of init_from if any). Raises ValueError for nonsense."""
    return read(config.init_from) if config.init_from else (new_stage_c(config, text, pooled), {})
