"""The network that a PixArt run starts from: init_from and [model]."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.pixart import checkpoint
from ....models_impl.pixart.config import LATENT_SCALES, PRESETS, TOKEN_LIMITS, VAE_FACTOR, KVCompression, PixArtConfig
from ....models_impl.pixart.model import PixArt
from ...config import Config, nearest
from ...features import text_encoders
from .settings import Model

NEW = {  # setting -> parts of the names of weights that it adds to a start that has none
    "kv_compression": (".attn.sr.", ".attn.norm."),
    "micro_conditions": ("csize_embedder.", "ar_embedder."),
}
CHANGEABLE = ("micro_conditions", "kv_compression", "prediction", "schedule", "zero_terminal_snr", "position_range")
"""What a run may have otherwise than the file it starts from."""


def requested(model: Model) -> dict:
    """The entries of a PixArtConfig that [model] states, a preset filled in. Raises ValueError for nonsense."""
    if model.preset and model.preset not in PRESETS:
        raise ValueError(f"model.preset={model.preset!r} is none of {', '.join(PRESETS)}"
                         f"{nearest(model.preset, PRESETS)}.")
    if model.variant and model.variant not in LATENT_SCALES:
        raise ValueError(f"model.variant={model.variant!r} is none of {', '.join(LATENT_SCALES)}.")
    known = PRESETS[model.preset].as_dict() if model.preset else {}
    for name in ("null_caption", "kv_compression"):
        known.pop(name, None)
    if model.variant:
        known |= {"latent_scale": LATENT_SCALES[model.variant], "token_limit": TOKEN_LIMITS[model.variant]}
    own = {k: v for k, v in vars(model).items() if k in PixArtConfig.__dataclass_fields__ and v is not None}
    known |= own
    if model.variance is not None:
        known["out_channels"] = known.get("in_channels", PixArtConfig.in_channels) * (2 if model.variance else 1)
    return known


@dataclass(frozen=True)
class Start:
    config: PixArtConfig
    tensors: dict[str, Tensor]
    """Of the file; empty without one."""

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


def start(config: Config, text_width: int | None = None, file: str = "") -> Start:
    """From init_from and [model]. file: read in place of init_from (a teacher). Raises ValueError where they do not
    fit, or [model] does not say enough."""
    asked, tensors = requested(config.model), {}
    if file := file or config.init_from:
        path = Path(file).expanduser()
        told = {k: v for k, v in asked.items() if k not in (*CHANGEABLE, "sample_size")}
        found, tensors = checkpoint.read(*state_dict.read_file(path), config=told, beside=checkpoint.beside(path))
        asked = {**found.as_dict(), **{k: v for k, v in asked.items() if k in CHANGEABLE}}
    else:
        if text_width:
            asked.setdefault("context_dim", text_width)
        if missing := [k for k in ("depth", "hidden", "heads") if k not in asked]:
            raise ValueError(f"[model] needs a preset ({', '.join(PRESETS)}), or {', '.join(missing)}; or name a file: "
                             "init_from.")
    if factor := config.model.kv_factor:
        layers = config.model.kv_layers or range(asked["depth"] // 2, asked["depth"])
        asked["kv_compression"] = KVCompression(config.model.kv_sampling, factor, tuple(layers))
    return Start(PixArtConfig(**{**asked, "sample_size": max(config.data.resolution // VAE_FACTOR, 1)}), tensors)


def opened(config: Config, text: nn.Module | None, network: dict | None = None) -> PixArt:
    """The network at its start; or, of a run that is opened again, in the shape that `network` tells."""
    if network:
        return PixArt(PixArtConfig.from_dict(network))
    return start(config, text_encoders.width(text) if text is not None else None).network()


def frozen(net: PixArt, config: Config) -> PixArt:
    """What an adapter or a ControlNet stands on, or a student learns from: never trained, in bf16 where the run is."""
    net.requires_grad_(False)
    return net.to(torch.bfloat16) if config.precision == "bf16" else net
