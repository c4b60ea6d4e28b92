"""PixelFlow files as MODEL."""
from __future__ import annotations

from pathlib import Path

import torch

from ....models_impl.guard import reading
from ....models_impl.pixelflow import checkpoint
from ....models_impl.state_dict import read_file
from ..common import quantised
from ..common.load import as_model
from ..common.patcher import reloadable
from .model import ModelConfig


def load_pixelflow(
    path: str, weights: str = "ema", dtype: torch.dtype | None = None, fast: bool = False,
    disable_dynamic: bool = False,
):
    """A PixelFlow file as a ModelPatcher; dtype None lets ComfyUI choose the storage; fast: multiply in fp8 as well."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        config, tensors = checkpoint.read(
            tensors, metadata, weights=weights, beside=checkpoint.config_beside(file)
        )
        names = checkpoint.class_names(metadata, config)
        model = as_model(ModelConfig(config, names), tensors, dtype, f"PixelFlow ({file.name})", disable_dynamic, fast)
    return reloadable(model, load_pixelflow, path, weights, dtype, fast)
