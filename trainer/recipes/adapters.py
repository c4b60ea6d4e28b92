"""LoRA, DoRA, LoHa and LoKr on any network of ours, by peft: put in, switched off, and out again in the words of
`models_impl.lora`."""
from __future__ import annotations

import contextlib

import torch
from torch import nn

from ...models_impl import lora
from .. import libraries
from ..config.schema import Adapter
from ..memory.quantization import QuantizedLinear

NAME = "default"  # of the one adapter, in peft's names
PARTS = {"loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),  # in peft's and LyCORIS'
         "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}


def attach(net: nn.Module, settings: Adapter, targets: list[str]) -> nn.Module:
    """Freezes `net` and puts an adapter, whose weights are float32, on every module whose name ends with one of
    adapter.targets, or without those of `targets`. Returns `net`. Raises ValueError where a name fits no module."""
    libraries.hide_broken_torchvision()
    from peft import inject_adapter_in_model

    wanted = settings.targets or targets
    modules = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    odd = [t for t in wanted if not any(m == t or m.endswith(f".{t}") for m in modules)]
    if odd:
        raise ValueError(f"adapter.targets: no layer's name ends with {', '.join(odd)}. There are, for instance, "
                         f"{', '.join(modules[:8])}.")
    net.requires_grad_(False)
    inject_adapter_in_model(of_peft(settings, wanted), net, NAME)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return net


def of_peft(settings: Adapter, targets: list[str]):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    rank, alpha = settings.rank, settings.alpha or settings.rank
    if settings.kind == "loha":
        return LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
    if settings.kind == "lokr":
        return LoKrConfig(r=rank, alpha=alpha, target_modules=targets, decompose_factor=settings.factor)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=settings.dora,
                      use_rslora=settings.rslora, init_lora_weights="gaussian" if settings.gaussian else True)


def adapted(net: nn.Module) -> dict[str, nn.Module]:
    """Module name -> peft's layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)}


@contextlib.contextmanager
def without(net: nn.Module):
    """Inside, the network is what it was before its adapter."""
    layers = list(adapted(net).values())
    for layer in layers:  # not enable_adapters, which would take requires_grad from the weights in between
        libraries.switch_adapter(layer, on=False)
    try:
        yield
    finally:
        for layer in layers:
            libraries.switch_adapter(layer, on=True)


def layers(net: nn.Module) -> list[lora.Layer]:
    """What has been learned, by the names of the parameters that it changes."""
    found = []
    for name, module in adapted(net).items():
        kind = next((k for k, parts in PARTS.items() if parts[0] in module.adapter_layer_names), "lora")
        if kind != "lora":
            parts = {part: getattr(module, part) for part in PARTS[kind]}
            own = {part: there[NAME].detach() for part, there in parts.items() if NAME in there}
            found.append(lora.Layer(f"{name}.weight", None, kind, own, module.scaling[NAME]))
            continue
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
    """Shapes of the network's own parameters, under its own names: what `lora.names` of a family reads."""
    found = {key.replace(".base_layer.", "."): value.shape for key, value in net.state_dict().items()
             if not any(mark in key for mark in (".lora_", ".hada_", ".lokr_"))}
    few = {name.replace(".base_layer", ""): m for name, m in net.named_modules() if isinstance(m, QuantizedLinear)}
    return found | {f"{name}.weight": torch.Size((m.out_features, m.in_features)) for name, m in few.items()}
