"""The network that a PixArt run starts from: init_from and [model]."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.guard import reading
from ....models_impl.pixart import checkpoint
from ....models_impl.pixart.config import PixArtConfig
from ....models_impl.pixart.model import PixArt
from ...config.schema import Config
from ...features import text_encoders, vaes
from .settings import new_shape, of_shape, requested, shape_of

NEW = {  # setting -> parts of the names of weights that it adds to a start that has none
    "kv_compression": (".attn.sr.", ".attn.norm."),
    "micro_conditions": ("csize_embedder.", "ar_embedder."),
}
CHANGEABLE = ("micro_conditions", "kv_compression", "prediction", "schedule", "zero_terminal_snr", "position_range")
"""What a run may have otherwise than the file it starts from."""



@dataclass(frozen=True)
class Start:
    config: PixArtConfig
    tensors: dict[str, Tensor]
    """Weights of the file; empty without one."""

    def network(self) -> PixArt:
        """At its start: what the file lacks begins as in a new network."""
        net = PixArt(self.config).initialise()
        if self.tensors:
            own = net.state_dict()
            added = {k: v for parts in NEW.values() for part in parts for k, v in own.items()
                     if part in k and k not in self.tensors}
            meta = net.final_layer.linear.weight.is_meta  # a dry run, which only counts
            (state_dict.check_fit if meta else state_dict.load_into)(
                net, {**added, **self.tensors}, "the network of [model] and init_from")
        return net


def start(config: Config, text_width: int | None = None) -> Start:
    """From init_from and [model]. Raises ValueError where they do not fit, or [model] does not say enough."""
    if not config.init_from:
        return Start(new_shape(config, text_width), {})
    path, wanted = Path(config.init_from).expanduser(), requested(config.model)
    stated = {k: v for k, v in wanted.items() if k not in (*CHANGEABLE, "sample_size")}
    with reading(path):
        own, tensors = checkpoint.read(*state_dict.read_file(path), config=stated, beside=checkpoint.beside(path))
    changed = {k: v for k, v in wanted.items() if k in CHANGEABLE}
    return Start(shape_of(config, {**own.as_dict(), **changed}), tensors)


def file_problems(config: Config) -> list[str]:
    """Problems with init_from and vae.path."""
    try:
        shape = start(config).config
    except (ValueError, OSError) as error:
        return [f"init_from={config.init_from}: {error}"]
    return vaes.vae_problems(config.vae.path, shape.in_channels, "this PixArt") + of_shape(config, shape)


def opened(config: Config, text: nn.Module | None, network: dict | None = None) -> PixArt:
    """The network at its start; or, of a run that is opened again, in the shape that `network` says."""
    if network:
        return PixArt(PixArtConfig.from_dict(network))
    return start(config, text_encoders.width(text) if text is not None else None).network()


def frozen(net: PixArt, config: Config) -> PixArt:
    """What an adapter or a ControlNet stands on, or a student learns from: never trained, in bf16 where the run is."""
    net.requires_grad_(False)
    return net.to(torch.bfloat16) if config.precision == "bf16" else net
