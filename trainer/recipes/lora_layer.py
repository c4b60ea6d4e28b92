"""peft's LoRA of a linear layer, whose products are computed together (kernels/lora_linear.py)."""
from __future__ import annotations

from peft.tuners.lora import Linear
from torch import Tensor, nn

from ...kernels.lora_linear import lora_linear


class LoraLinear(Linear):
    """Layers of peft become one by their class: nothing that they hold is another."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or len(names) != 1 or type(layer) is not nn.Linear:
            return super().forward(x, *args, **kwargs)
        name = names[0]
        if name in self.lora_variant or not isinstance(self.lora_dropout[name], nn.Identity):  # DoRA, dropout
            return super().forward(x)
        a, b = self.lora_A[name], self.lora_B[name]
        return lora_linear(x, layer.weight, layer.bias, a.weight, b.weight, self.scaling[name])


def put(net: nn.Module):
    for module in net.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
