"""Small FLUX files as core's own MODEL."""
from __future__ import annotations

from pathlib import Path

import torch

from ....models_impl.flux import checkpoint
from ....models_impl.guard import reading
from ....models_impl.state_dict import metadata_config, read_file
from ..common import quantised, step_cache
from ..common.load import as_model
from ..common.patcher import reloadable
from ..common.previews import colour
from .model import model_config


def load_flux(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """A FLUX that states its configuration, as the trainer's exports do, as core's own model in a ModelPatcher."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        config, tensors = checkpoint.read(tensors, metadata)
        if metadata_config(metadata, checkpoint.FAMILY) is None:
            raise ValueError("This FLUX does not state its configuration, as exports of PixStack's trainer do. Load "
                             "released FLUX files with core's 'Load Diffusion Model'.")
        model = as_model(model_config(config), tensors, dtype, f"FLUX ({file.name})", disable_dynamic)
        colour(model, metadata)
    return reloadable(step_cache.on_a_copy(step_cache.attach(model)), load_flux, path, dtype)
