"""UltraPixel's guide (arXiv 2407.02158): the modules that turn features of a low-resolution pass into those of a large
picture. Stage C stays as it is.

From the released guide, from one of ours, or from nothing.
"""
from __future__ import annotations

from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import GuideConfig
from ....models_impl.ultrapixel.guidance import Guide
from ...config.schema import Config
from ...memory.activations import casts
from ...training.groups import Group, groups
from ...training.noise import VALIDATION
from ..contract import Files
from .encoders import Low, make_encoders
from .networks import Cast, base, fitting, read
from .task import StageCRecipe, file_problems, in_transformer


def shape_of(config: Config, stage_c) -> GuideConfig:
    """Shape of the guide in init_from, else of [recipe]. Raises ValueError where it does not fit Stage C."""
    if config.init_from:
        found = read(config.init_from, checkpoint.read_guide)[0]
        fitting(found, stage_c, f"init_from={config.init_from}")
        return found
    s = config.recipe
    more = {"layers": tuple(s.layers)} if s.layers else {}
    return GuideConfig(down=stage_c.hidden, up=tuple(reversed(stage_c.hidden)), width=s.width, heads=s.heads,
                       feedforward=s.feedforward, max_tokens=s.max_tokens, groups=s.groups,
                       timestep_dim=stage_c.timestep_dim, **more)


class Recipe(StageCRecipe):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text, base(config, reopened=bool(network)))
        shape = GuideConfig.from_dict(network) if network else shape_of(config, self.net.config)
        self.guide = Guide(shape, operations=Cast).initialise()
        if config.init_from and not network:
            tensors = read(config.init_from, checkpoint.read_guide)[1]
            state_dict.load_into(self.guide, tensors, f"the guide ({config.init_from})")
        self.prepare(low_of(config))

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        return make_encoders(config, low_of(config), writer)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems, side = file_problems(config), config.recipe.low_side
        if any(p.startswith("[model]") for p in problems):
            return problems
        try:
            shape = shape_of(config, read(config.model.stage_c)[0])
        except ValueError as error:
            return [*problems, str(error)]
        if side**2 > shape.max_tokens:
            problems.append(f"recipe.low_side={side} makes {side**2} cells, the guide takes {shape.max_tokens}.")
        return problems

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"guide": 1.0}, in_transformer)

    def losses(self, batch, draws, seed: int) -> Tensor:
        d = self.denoising
        return d.guided(self.guide, d.latents(batch, seed), draws.t, d.conditioning(batch, draws))

    def forward(self, batch) -> Tensor:
        return self.weighted(batch, lambda draws: self.losses(batch, draws, self.denoising.seed))

    def validate(self, batches: list) -> dict[str, float]:
        return self.denoising.validate(
            batches, lambda batch, draws: {"loss": self.losses(batch, draws, VALIDATION)})

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return super().activation_bytes(pictures, cpu) + casts(self.guide, self.config.precision == "bf16")

    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """In two passes. shift is 1 for the release."""
        return self.denoising.sample(what, height, width, steps, shift, cfg, seed, self.guide,
                                     negative=negative)

    def network(self) -> dict:
        return self.guide.config.as_dict()

    def files(self) -> Files:
        return {"model_patches/{name}.safetensors": (self.guide.state_dict(), checkpoint.metadata(self.guide.config))}


def low_of(config: Config) -> Low:
    return Low(config.recipe.low_side, config.recipe.low_filter)
