"""Stage A of a small Stable Cascade: pictures to latents of 4 pixels a cell and back, from nothing or from a file.

The reference (arXiv 2306.00637) has a VQGAN, whose codebook Stage B does without: it draws latents that are not
quantised. Noise on the latent asks of the decoder what quantisation does, to bear errors of that width, without the
search through a codebook.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ....models_impl import previews, state_dict
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import StageAConfig
from ....models_impl.ultrapixel.stage_a import StageA, StageABlock
from ...config.schema import Config
from ...libraries import probing
from ...memory.activations import kept_bytes
from ...training.groups import Group, groups
from ..contract import Files
from ..reconstruction import Reconstruction
from .networks import read


class Recipe(Reconstruction):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config)
        if network:
            shape, tensors = StageAConfig.from_dict(network), {}
        else:
            shape, tensors = start(config)
        self.net, self.factor, self.channels = StageA(shape), shape.compression, shape.latent_channels
        norm(self.net).eval().requires_grad_(False)
        if tensors:
            state_dict.load_into(self.net, tensors, f"Stage A ({config.init_from})")
            fold(self.net)
        self.net.to(memory_format=torch.channels_last)

    def encode(self, shown: Tensor) -> Tensor:
        return self.net.encode(((shown + 1) / 2).contiguous(memory_format=torch.channels_last), strip=None)

    def decode(self, latent: Tensor) -> Tensor:
        return 2 * self.net.decode(latent, strip=None) - 1

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        try:
            start(config)
        except (ValueError, OSError) as error:
            return [f"init_from={config.init_from}: {error}"]
        return []

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"net": 1.0}, lambda name: "channelwise" in name and name.endswith("weight"))

    def blocks(self) -> list[nn.Module]:
        return [part for part in (*self.net.down_blocks, *self.net.up_blocks) if isinstance(part, StageABlock)]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        with probing():
            net, side = StageA(self.net.config), self.config.data.resolution
            norm(net).eval()
            kept = kept_bytes(net, lambda: net.decode(net.encode(torch.zeros(1, 3, side, side))), self.bf16)
        return pictures * kept

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> Files:
        """Latents of unit variance, as Stage B draws them."""
        net, scale = StageA(self.net.config), self.square.sqrt().cpu()
        net.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            net.down_blocks[-1][0].weight.div_(scale)
            norm(net).running_mean.div_(scale)
            net.up_blocks[0][0].weight.mul_(scale)
        net.eval()
        # of the latents that ComfyUI's VAE gives, before the family's scale
        colours = previews.metadata(lambda shown: net.encode((shown + 1) / 2) * net.config.scale_factor, self.factor)
        return {"vae/{name}.safetensors": (net.state_dict(), checkpoint.metadata(net.config) | colours)}


def start(config: Config) -> tuple[StageAConfig, dict[str, Tensor]]:
    """(shape, weights of init_from if any). Raises ValueError."""
    if config.init_from:
        return read(config.init_from, checkpoint.read_stage_a)
    return StageAConfig(hidden=config.model.hidden, bottleneck_blocks=config.model.bottleneck_blocks), {}


def norm(net: StageA) -> nn.BatchNorm2d:
    """The norm of the latent. It stays as it is: the means of a pass would be others in every process, and the scale of
    the latent is set once, on export."""
    return net.down_blocks[-1][1]


@torch.no_grad()
def fold(net: StageA):
    """Bring a file's norm of the latent to weights of 1 and biases of 0, which a run does not save: the rest goes into
    the convolution before it and into the norm's mean."""
    one = norm(net)
    factor = one.weight / (one.running_var + one.eps).sqrt()
    net.down_blocks[-1][0].weight.mul_(factor[:, None, None, None])
    one.running_mean.mul_(factor).sub_(one.bias)
    one.running_var.fill_(1 - one.eps)
    nn.init.ones_(one.weight)
    nn.init.zeros_(one.bias)
