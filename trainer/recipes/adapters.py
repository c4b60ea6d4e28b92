"""LoRA, DoRA, LoHa and LoKr on any network of ours, by peft, and OFT (`rotation`): put in, switched off, and out again
in the words of `models_impl.lora`."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...models_impl import lora
from .. import libraries
from ..config.schema import Adapter
from ..memory.quantization import QuantizedLinear
from .adapter_plan import NamesOf, Place, planned

NAME = "default"  # of the one adapter, in peft's names
PARTS = {"loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),  # in peft's and LyCORIS'
         "oft": ("oft_blocks",),
         "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}


class InputDropout(nn.Module):
    """Takes some of a layer's inputs from its adapter, the same for all pictures of a step and all their tokens, so
    that neither passes nor processes change what is learned. The loop seeds torch by (seed, step) before every step:
    which inputs these are depends on that and the layer's number."""

    def __init__(self, share: float, number: int, dim: int):
        """dim: of the inputs, counted from the end."""
        super().__init__()
        self.share, self.number, self.dim = share, number, dim

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the recipes' modules stay in training mode while they draw and validate
            return x
        rng = torch.Generator().manual_seed((torch.initial_seed() * 65_537 + self.number) % 2**63)
        kept = torch.rand(x.shape[self.dim], generator=rng) >= self.share
        return x * (kept / (1 - self.share)).to(x).reshape(-1, *[1] * (-self.dim - 1))


def attach(net: nn.Module, settings: Adapter, targets: list[str], names: NamesOf = lora.names_of) -> nn.Module:
    """Freezes `net` and puts an adapter, whose weights are float32, on every layer that [adapter] names, or without
    that on those whose names end with one of `targets`. Returns `net`. names: the family's. Raises ValueError where a
    name fits no layer."""
    libraries.hide_broken_torchvision()
    from peft import inject_adapter_in_model

    plan = planned(net, settings, targets, names)
    plain = not settings.layers and not settings.start
    net.requires_grad_(False)
    if settings.kind == "oft":
        from . import rotation

        rotation.put(net, {name: place.rank for name, place in plan.items()}, NAME)
    else:
        layers = settings.targets or targets if plain else list(plan)
        inject_adapter_in_model(of_peft(settings, layers, plan), net, NAME)
        if settings.kind == "lora":
            from . import lora_layer

            lora_layer.put(net)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    put = adapted(net)
    for number, (name, place) in enumerate(plan.items()):
        if place.dropout:
            dim = -3 if isinstance(put[name].base_layer, nn.Conv2d) else -1
            put[name].lora_dropout[NAME] = InputDropout(place.dropout, number, dim)
        if place.start:
            begin(put[name], name, place.start)
    return net


def problems(make: Callable[[], nn.Module], settings: Adapter, targets: list[str],
             names: NamesOf = lora.names_of) -> list[str]:
    """What [adapter] names that a network has no place for. make: the network, which is made without memory."""
    if not (settings.layers or settings.targets or settings.start):
        return []
    try:
        with torch.device("meta"):
            net = make()
        planned(net, settings, targets, names)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def of_peft(settings: Adapter, targets: list[str], plan: dict[str, Place]):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    first = next(iter(plan.values()))
    patterns = {"rank_pattern": {re.escape(name): p.rank for name, p in plan.items() if p.rank != first.rank},
                "alpha_pattern": {re.escape(name): p.alpha for name, p in plan.items() if p.alpha != first.alpha}}
    if settings.kind == "loha":
        return LoHaConfig(r=first.rank, alpha=first.alpha, target_modules=targets, **patterns)
    if settings.kind == "lokr":
        return LoKrConfig(r=first.rank, alpha=first.alpha, target_modules=targets, decompose_factor=settings.factor,
                          **patterns)
    return LoraConfig(r=first.rank, lora_alpha=first.alpha, target_modules=targets, use_dora=settings.dora,
                      use_rslora=settings.rslora, init_lora_weights="gaussian" if settings.gaussian else True,
                      **patterns)


def parts_of(module: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """(kind, weights of an adapter by their names in `models_impl.lora`) of one of peft's layers."""
    kind = next((k for k, parts in PARTS.items() if parts[0] in module.adapter_layer_names), "lora")
    if kind != "lora":
        parts = {part: getattr(module, part) for part in PARTS[kind]}
        return kind, {part: there[NAME] for part, there in parts.items() if NAME in there}
    own = {"lora_up": module.lora_B[NAME].weight, "lora_down": module.lora_A[NAME].weight}
    if NAME in module.lora_magnitude_vector:
        return "dora", {**own, "dora_scale": module.lora_magnitude_vector[NAME].weight}
    return kind, own


@torch.no_grad()
def begin(module: nn.Module, name: str, start: lora.Layer):
    """One of peft's layers as a layer of a file has it. Raises ValueError where its weights are of other shapes."""
    kind, own = parts_of(module)
    folded = {"lora": "lora_up", "dora": "lora_up", "loha": "hada_w1_a", "oft": "",
              "lokr": "lokr_w1" if "lokr_w1" in own else "lokr_w1_a"}[kind]
    shapes = [{part: list(value.squeeze().shape) for part, value in sorted(some.items())}
              for some in (own, start.tensors)]
    if shapes[0] != shapes[1]:
        factor = " Set adapter.factor and adapter.rank as the file was trained with." if kind == "lokr" else ""
        raise ValueError(f"adapter.start does not fit {name}: it has {shapes[1]} there, the settings make "
                         f"{shapes[0]}.{factor}")
    for part, value in own.items():
        given = start.tensors[part].float()
        scale = start.scale / module.scaling[NAME] if part == folded else 1.0
        value.copy_((given if scale == 1 else given * scale).reshape(value.shape))


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


@contextlib.contextmanager
def at_strength(net: nn.Module, strength: float):
    """Inside, the adapters count `strength` times as much."""
    if strength == 1:
        yield
        return
    if strength == 0:  # of DoRA too, whose lengths stay at any scaling
        with without(net):
            yield
        return
    scalings = [module.scaling for module in adapted(net).values()]
    kept = [dict(one) for one in scalings]  # a product and its quotient would not always be the same to the bit
    for one in scalings:
        one.update({name: strength * value for name, value in one.items()})
    try:
        yield
    finally:
        for one, before in zip(scalings, kept, strict=True):
            one.update(before)


def layers(net: nn.Module) -> list[lora.Layer]:
    """What has been learned, by the names of the parameters that it changes."""
    found = []
    for name, module in adapted(net).items():
        kind, parts = parts_of(module)
        own = {part: value.detach() for part, value in parts.items()}
        if kind == "dora":
            own["dora_scale"] = own["dora_scale"].reshape(-1, *[1] * (own["lora_up"].ndim - 1))
        found.append(lora.Layer(f"{name}.weight", None, kind, own, module.scaling[NAME]))
    return found


def tensors(net: nn.Module, names: lora.Names, format: str = "comfyui") -> dict[str, torch.Tensor]:
    """The file of what has been learned, in one of lora.FORMATS. names: the family's, for the network's own shapes
    (`shapes`)."""
    return lora.write(lora.Lora(layers(net), [], []), names, format)


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the network's own parameters, under its own names: what `lora.names` of a family reads."""
    found = {key.replace(".base_layer.", "."): value.shape for key, value in net.state_dict().items()
             if not any(mark in key for mark in (".lora_", ".hada_", ".lokr_", ".oft_"))}
    few = {name.replace(".base_layer", ""): m for name, m in net.named_modules() if isinstance(m, QuantizedLinear)}
    return found | {f"{name}.weight": torch.Size((m.out_features, m.in_features)) for name, m in few.items()}
