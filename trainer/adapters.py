"""LoRA and DoRA on any network of ours, by peft: put in, switched off, and out again as `models_impl.lora` has them."""
from __future__ import annotations

import contextlib
from importlib.util import find_spec

import torch
from torch import nn

from ..models_impl import lora
from .config import Adapter
from .encoders import hide_broken_torchvision
from .quantised import FewBits

NAME = "default"  # of the one adapter, in peft's names


def problems(settings: Adapter) -> list[str]:
    found = []
    if settings.rank < 1:
        found.append(f"adapter.rank={settings.rank} must be at least 1.")
    if settings.alpha < 0:
        found.append(f"adapter.alpha={settings.alpha} must not be negative; 0 = the rank.")
    if find_spec("peft") is None:
        found.append("a LoRA needs peft: pip install peft.")
    return found


def attach(net: nn.Module, settings: Adapter, targets: list[str]) -> nn.Module:
    """Freezes `net` and puts an adapter, whose weights are float32, on every module whose name ends with one of
    adapter.targets, or without those of `targets`. Returns `net`. Raises ValueError where a name fits no module."""
    hide_broken_torchvision()
    from peft import LoraConfig, inject_adapter_in_model

    wanted = settings.targets or targets
    modules = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    odd = [t for t in wanted if not any(m == t or m.endswith(f".{t}") for m in modules)]
    if odd:
        raise ValueError(f"adapter.targets: no layer's name ends with {', '.join(odd)}. There are, for instance, "
                         f"{', '.join(modules[:8])}.")
    net.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=wanted, use_dora=settings.dora,
        use_rslora=settings.rslora, init_lora_weights="gaussian" if settings.gaussian else True,
    ), net, NAME)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return net


def adapted(net: nn.Module) -> dict[str, nn.Module]:
    """Module name -> peft's layer."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


@contextlib.contextmanager
def without(net: nn.Module):
    """Inside, the network is what it was before its adapter."""
    layers = list(adapted(net).values())
    for layer in layers:  # not enable_adapters, which would take requires_grad from the weights in between
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def layers(net: nn.Module) -> list[lora.Layer]:
    """What has been learned, by the names of the parameters that it changes."""
    found = []
    for name, module in adapted(net).items():
        own = {"lora_up": module.lora_B[NAME].weight.detach(), "lora_down": module.lora_A[NAME].weight.detach()}
        magnitude = module.lora_magnitude_vector
        if NAME in magnitude:
            own["dora_scale"] = magnitude[NAME].weight.detach().reshape(-1, *[1] * (own["lora_up"].ndim - 1))
        found.append(lora.Layer(f"{name}.weight", None, "dora" if "dora_scale" in own else "lora", own,
                                module.scaling[NAME]))
    return found


def tensors(net: nn.Module, names: lora.Names, format: str = "comfyui") -> dict[str, torch.Tensor]:
    """The file of what has been learned, in one of lora.FORMATS. names: the family's, for the network's own shapes
    (`shapes`)."""
    return lora.write(lora.Lora(layers(net), [], []), names, format)


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    """Of the network's own parameters, under its own names: what `lora.names` of a family reads."""
    found = {key.replace(".base_layer.", "."): value.shape for key, value in net.state_dict().items()
             if ".lora_" not in key}
    few = {name.replace(".base_layer", ""): m for name, m in net.named_modules() if isinstance(m, FewBits)}
    return found | {f"{name}.weight": torch.Size((m.out_features, m.in_features)) for name, m in few.items()}
