"""Our networks take the whole key list of every released checkpoint: nothing missing, nothing unexpected.

Not here, because they are no networks of ours: `text_bigg` and `clip_vision_l14` (transformers), `previewer` (ComfyUI's
own). `live_extras` is no file but what a running reference holds: its guide is `t2i`'s, the rest is dead.
"""
import json
from pathlib import Path

import pytest
import torch
from pixstack.models_impl.ultrapixel import checkpoint, lora
from pixstack.models_impl.ultrapixel.config import (
    STAGE_B_PRESETS,
    STAGE_C_PRESETS,
    ControlNetConfig,
    GuideConfig,
    StageAConfig,
)
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import EffnetEncoder
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "tests" / "fixtures" / "manifests", ROOT.parent / "shared" / "manifests"]
MANIFESTS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("ultrapixel_*.json"))}
NETWORKS = {
    "stage_c_3.6b": (StageC, STAGE_C_PRESETS["3.6b"]),
    "stage_c_1b": (StageC, STAGE_C_PRESETS["1b"]),
    "stage_b_3b": (StageB, STAGE_B_PRESETS["3b"]),
    "stage_b_700m": (StageB, STAGE_B_PRESETS["700m"]),
    "stage_a": (StageA, StageAConfig()),
    "t2i": (Guide, GuideConfig()),
    "live_extras": (Guide, GuideConfig()),
    "controlnet_canny": (ControlNet, ControlNetConfig()),
    "controlnet_inpainting": (ControlNet, ControlNetConfig(in_channels=4)),
    "controlnet_super_resolution": (ControlNet, ControlNetConfig(in_channels=16, backbone="large")),
}
ELSEWHERE = {"lora_cat", "effnet_encoder"}  # have a test of their own
NOT_OURS = {"text_bigg", "clip_vision_l14", "previewer"}
DEAD = {"t2i": ".hr_norm.", "live_extras": "", "stage_a": "vquantizer."}  # unused weights, not read


def manifest(name):
    path = MANIFESTS.get(f"ultrapixel_{name}")
    if path is None:
        pytest.skip(f"the manifest ultrapixel_{name} is not in this checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(about):
    return {key: torch.empty(shape, device="meta") for key, shape in about["keys"].items()}




@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_released_checkpoint_fits_its_network(name):
    given = tensors(manifest(name))
    network, _ = NETWORKS[name]
    config, weights = checkpoint.read(given)
    own = {key: value.shape for key, value in network(config, device="meta").state_dict().items()}
    assert own == {key: value.shape for key, value in weights.items()}
    unread = sum(v.numel() for v in given.values()) - sum(v.numel() for v in weights.values())
    assert unread == 0 or name in DEAD


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_released_checkpoint_is_recognised_as_its_preset(name):
    about = manifest(name)
    _, preset = NETWORKS[name]
    assert checkpoint.read(tensors(about))[0] == preset


@pytest.mark.parametrize("name", sorted(n for n in NETWORKS if n.startswith("stage_")))
def test_a_preset_is_what_the_release_says_of_itself(name):
    about = manifest(name)
    _, preset = NETWORKS[name]
    stated = type(preset).from_dict(about["config"])
    unused = {"heads": preset.heads} if name == "stage_b_700m" else {}  # the release names heads where none attends
    assert type(preset)(**{**stated.as_dict(), **unused}) == preset


def test_the_unused_third_of_the_guide_is_dropped():
    given = tensors(manifest("t2i"))
    _, weights = checkpoint.read(given)
    dropped = sum(v.numel() for v in given.values()) - sum(v.numel() for v in weights.values())
    assert dropped == 4 * 2 * (2048 * 2048 + 2048)


def test_the_guide_goes_back_to_its_released_names():
    given = tensors(manifest("t2i"))
    _, weights = checkpoint.read(given)
    back = checkpoint.released_guide_names(weights)
    alive = {key: value.shape for key, value in given.items() if not checkpoint.DEAD["guide"].search(key)}
    assert {key: value.shape for key, value in back.items()} == alive


def test_the_released_semantic_encoder_fits_its_network():
    config, weights = checkpoint.read_effnet(tensors(manifest("effnet_encoder")))
    own = EffnetEncoder(config, device="meta").state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in weights.items()}


def test_the_released_personalisation_fits_the_layers_that_it_was_trained_on():
    about = manifest("lora_cat")
    given = {key: torch.zeros(shape, dtype=torch.long if key.endswith("indices") else torch.float32)
             for key, shape in about["keys"].items()}
    file = lora.read(given)
    assert list(file.layers) == [lora._key(name) for name in about["index_to_module"].values()]
    shapes = {key: value.shape for key, value in StageC(STAGE_C_PRESETS["3.6b"], device="meta").state_dict().items()}
    for key, (up, down) in file.layers.items():
        assert shapes[key] == (up.shape[0], down.shape[1])
    assert (file.scale, file.token_rows) == (0.25, [0])


@pytest.mark.skipif(not MANIFESTS, reason="no UltraPixel manifests in this checkout")
def test_every_manifest_is_accounted_for():
    assert {name.removeprefix("ultrapixel_") for name in MANIFESTS} <= {*NETWORKS, *ELSEWHERE, *NOT_OURS}
