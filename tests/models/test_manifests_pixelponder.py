"""PixelPonder and its FLUX take the whole key list of the released checkpoints: nothing missing, nothing unexpected."""
import json
from pathlib import Path

import pytest
import torch
from pixstack.models_impl.flux import checkpoint as flux_checkpoint
from pixstack.models_impl.flux.config import PRESETS as FLUX_PRESETS
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.pixelponder import checkpoint
from pixstack.models_impl.pixelponder.config import PRESETS, PixelPonderConfig
from pixstack.models_impl.pixelponder.model import PixelPonder

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "tests" / "fixtures" / "manifests", ROOT.parent / "shared" / "manifests"]


def manifest(name: str) -> tuple[dict, dict]:
    """(the reference's parameters, tensors without contents)"""
    path = next((folder / f"{name}.json" for folder in FOLDERS if (folder / f"{name}.json").exists()), None)
    if path is None:
        pytest.skip(f"{name}.json is not here")
    about = json.loads(path.read_text(encoding="utf-8"))
    return about["config"], {key: torch.empty(shape, device="meta") for key, shape in about["keys"].items()}


def shapes(tensors) -> dict:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def test_flux_dev_fits_its_network():
    stated, tensors = manifest("pixelponder_flux_dev_base")
    config, weights = flux_checkpoint.read(tensors)
    assert shapes(Flux(config, device="meta").state_dict()) == shapes(weights)
    assert config == FLUX_PRESETS["dev"] == FluxConfig.from_dict(stated)


def test_the_whole_released_controlnet_fits_its_network():
    stated, tensors = manifest("pixelponder_controlnet")
    config, weights = checkpoint.read(tensors, select_net=True, unused=True)
    assert shapes(weights) == shapes(tensors) == shapes(PixelPonder(config, device="meta").state_dict())
    assert config == PixelPonderConfig.from_dict({**stated, "select_net": {**stated["select_net"], "select_num": None}})


def test_what_the_default_selection_loads_of_the_release_is_its_preset():
    _, tensors = manifest("pixelponder_controlnet")
    config, weights = checkpoint.read(tensors)
    assert config == PRESETS["released"]
    assert shapes(PixelPonder(config, device="meta").state_dict()) == shapes(weights)
    assert sum(w.numel() for w in weights.values()) < 0.4 * sum(w.numel() for w in tensors.values())
