"""OFT on any network of ours (arXiv 2306.07280): the outputs of a layer, in blocks, each turned by a matrix that is
orthogonal by Cayley's transform, as LyCORIS and ComfyUI have it in their files. peft's OFT turns inputs."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...models_impl import lora


class TurnedLayer(nn.Module, BaseTunerLayer):
    """A linear layer or a convolution, which stays as it is, and its turn."""

    adapter_layer_names = ("oft_blocks",)
    other_param_names = ()

    def __init__(self, layer: nn.Linear | nn.Conv2d, blocks: Tensor, name: str):
        """blocks: (number, side, side); zeros turn nothing. name: of the adapter."""
        super().__init__()
        self.base_layer, self.name = layer, name
        self.oft_blocks = nn.ParameterDict({name: nn.Parameter(blocks)})
        self.scaling = {name: 1.0}
        self.channels = -3 if isinstance(layer, nn.Conv2d) else -1  # dimension of the outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        with torch.autocast(y.device.type, enabled=False):
            change = self.scaling[self.name] * lora.turn(self.oft_blocks[self.name].float())
        own = y.movedim(self.channels, -1)
        own = own if self.base_layer.bias is None else own - self.base_layer.bias.to(own)
        K, side, _ = change.shape
        turned = torch.einsum("... k n, k n m -> ... k m", own.unflatten(-1, (K, side)), change.to(own))
        return y + turned.flatten(-2).movedim(-1, self.channels)


def put(net: nn.Module, sides: Mapping[str, int], name: str):
    """Puts a turn on layers. sides: name of a layer -> of its blocks, at most (the outputs are divided evenly)."""
    for path, most in sides.items():
        parent, _, own = path.rpartition(".")
        layer = net.get_submodule(path)
        side = side_of(layer.weight.shape[0], most)
        blocks = torch.zeros(layer.weight.shape[0] // side, side, side, device=layer.weight.device)
        setattr(net.get_submodule(parent), own, TurnedLayer(layer, blocks, name))


def side_of(outputs: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(side for side in range(min(most, outputs), 0, -1) if outputs % side == 0)
