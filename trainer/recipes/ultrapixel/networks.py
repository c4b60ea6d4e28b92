"""The frozen networks of Stable Cascade and UltraPixel that recipes stand on, from their files."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl import state_dict
from ....models_impl.guard import reading
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import GuideConfig, StageCConfig
from ....models_impl.ultrapixel.guidance import Guide
from ....models_impl.ultrapixel.model import StageC
from ...config.schema import Config
from ...memory import quantization


class Cast:
    """`operations` whose float32 weights work in the type of what they are given, as ComfyUI's do: so the guide learns
    in float32 and computes as it will when it is used."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))

    class Conv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x)
            return F.conv2d(x, self.weight.to(x), bias, self.stride, self.padding, self.dilation, self.groups)

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)


def read(path: str, reader: Callable = checkpoint.read_stage_c) -> tuple[object, dict[str, Tensor]]:
    """(configuration, weights). Raises ValueError with the file's name."""
    file = Path(path).expanduser()
    with reading(file):
        return reader(*state_dict.read_file(file))


def loaded(kind: type, path: str, reader: Callable, dtype: torch.dtype) -> nn.Module:
    """A network that does not learn. Its weights stay where the file has them until they are moved or cast."""
    config, tensors = read(path, reader)
    net = kind(config, dtype=dtype, device="meta")
    state_dict.check_fit(net, tensors, f"the {kind.__name__} of {Path(path).name}")
    meta = torch.get_default_device().type == "meta"  # --dry-run: nothing is to be held
    if not meta:
        net.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def dtype_of(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def base(config: Config, reopened: bool = False) -> StageC | None:
    """The frozen Stage C; None for a finished run that is opened where the file is not."""
    if reopened and not Path(config.model.stage_c).expanduser().is_file():
        return None
    net = loaded(StageC, config.model.stage_c, checkpoint.read_stage_c, dtype_of(config))
    net.gradient_checkpointing = config.checkpoint_activations
    return quantization.frozen(net, config)


def guide_of(config: Config) -> Guide | None:
    """The frozen guide that [model] names."""
    path = config.model.guide
    if not path or not Path(path).expanduser().is_file():
        return None
    return loaded(Guide, path, checkpoint.read_guide, dtype_of(config))


def fitting(guide: GuideConfig, stage_c: StageCConfig, file: str):
    """Raises ValueError where a guide was made for another Stage C."""
    wanted = stage_c.hidden, tuple(reversed(stage_c.hidden))
    if (guide.down, guide.up) != wanted:
        raise ValueError(f"{file} is a guide for levels of {guide.down} and {guide.up} channels, model.stage_c has "
                         f"{wanted[0]} and {wanted[1]}: use the Stage C that it was made for.")
