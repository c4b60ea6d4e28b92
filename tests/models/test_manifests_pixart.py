"""PixArt's networks take the whole key list of every released checkpoint, and its size tables are the released ones."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pixstack.models_impl.pixart import buckets, checkpoint, key_names
from pixstack.models_impl.pixart.config import PRESETS, PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "tests" / "fixtures" / "manifests", ROOT.parent / "shared" / "manifests"]
FILES = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("pixart_*.json"))}
MANIFESTS = sorted(FILES.keys() - {"pixart_buckets", "pixart_hed"})
CONTROLNETS = [name for name in MANIFESTS if "controlnet" in name]
PRESET_OF = {
    "pixart_alpha_256": "alpha_256",
    "pixart_alpha_512": "alpha_512",
    "pixart_alpha_1024ms": "alpha_1024",
    "pixart_sigma_256": "sigma_256",
    "pixart_sigma_512ms": "sigma_512",
    "pixart_sigma_1024ms": "sigma_1024",
    "pixart_sigma_2kms": "sigma_2k",
    "pixart_sigma_900m": "sigma_900m",
    "pixart_diffusers_alpha_512": "alpha_512",
    "pixart_diffusers_alpha_1024ms": "alpha_1024",
    "pixart_diffusers_sigma_1024ms": "sigma_1024",
    "pixart_diffusers_sigma_2kms": "sigma_2k",
    "pixart_diffusers_sigma_900m": "sigma_900m",
}


def opened(name) -> tuple[dict, dict]:
    manifest = json.loads(FILES[name].read_text(encoding="utf-8"))
    return manifest["config"], {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}


def shapes(tensors) -> dict:
    return {key: value.shape for key, value in tensors.items()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_released_checkpoint_fits_its_network(name):
    stated, tensors = opened(name)
    config, weights = checkpoint.read(tensors)
    assert shapes(PixArt(config, device="meta").state_dict()) == shapes(weights)
    entries = PixArtConfig.entries_of(stated)
    if stated.get("class") == "ControlPixArtHalf":
        entries["micro_conditions"] = False  # its forward leaves the embedders of sizes that a base may have aside
    names = ("depth", "hidden", "heads", "micro_conditions", "kv_compression", "out_channels", "mlp_ratio")
    shared = [name for name in names if name in entries]
    assert {n: getattr(config, n) for n in shared} == {n: entries[n] for n in shared}


@pytest.mark.parametrize("name", sorted(PRESET_OF.keys() & set(MANIFESTS)))
def test_a_released_checkpoint_is_recognised_as_its_preset(name):
    stated, tensors = opened(name)
    variant = {} if "y_embedder.y_embedding" in tensors else {"variant": PRESETS[PRESET_OF[name]].variant}
    config, _ = checkpoint.read(tensors, config=variant, beside=stated)
    assert replace(config, null_caption=False) == PRESETS[PRESET_OF[name]]


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_released_controlnet_fits_its_network(name):
    stated, tensors = opened(name)
    config, blocks, weights = checkpoint.read_controlnet(tensors)
    assert (blocks, config.variant) == (stated["copy_blocks_num"], "alpha")
    assert shapes(PixArtControlNet(config, blocks, device="meta").state_dict()) == shapes(weights)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if "diffusers" in name])
def test_our_weights_go_back_to_the_names_of_diffusers(name):
    _, tensors = opened(name)
    _, weights = checkpoint.read(tensors)
    assert shapes(key_names.to_diffusers(weights)) == shapes(tensors)


def test_the_size_tables_are_the_released_ones():
    released = json.loads(FILES["pixart_buckets"].read_text(encoding="utf-8"))["tables"]
    for name, table in released.items():
        side = int(name.split("_")[2])
        if name.endswith("_TEST"):
            ours = buckets.INFERENCE_TABLES[4096 if side == 2880 else side]
        else:
            ours = buckets.TABLES[side]
        assert list(ours.items()) == [(float(label), tuple(map(int, size))) for label, size in table.items()], name
