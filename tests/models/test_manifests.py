"""Our networks take the whole key list of every released checkpoint: nothing missing, nothing unexpected."""
import json
from pathlib import Path

import pytest
import torch
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.models_impl.pixelflow.config import PRESETS, PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "tests" / "fixtures" / "manifests", ROOT.parent / "shared" / "manifests"]
MANIFESTS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("pixelflow_*.json"))}


@pytest.fixture(params=sorted(MANIFESTS))
def manifest(request):
    return json.loads(MANIFESTS[request.param].read_text(encoding="utf-8"))


def test_a_released_checkpoint_fits_its_network(manifest):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    config, weights = checkpoint.read(tensors)
    own = {key: value.shape for key, value in PixelFlow(config, device="meta").state_dict().items()}
    assert own == {key: value.shape for key, value in weights.items()}


def test_a_released_checkpoint_is_recognised_as_its_preset(manifest):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    config, _ = checkpoint.read(tensors)
    assert config == PRESETS["xl_t2i" if "cross_attention_dim" in manifest["config"] else "xl_c2i"]
    assert config == PixelFlowConfig.from_dict({**manifest["config"], "resolution": config.resolution})
