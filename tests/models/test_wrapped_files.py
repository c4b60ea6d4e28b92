"""Models as other programs wrap them: prefixes, other models beside them, tables, parts, configurations beside."""
import json
from dataclasses import replace

import pytest
import torch
from pixstack.models_impl import known_files
from pixstack.models_impl.pixart import checkpoint, key_names
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.state_dict import config_tensor, read_file, write_file
from weights import ALPHA, random_state, tiny_pixart_config

CONFIG = tiny_pixart_config(depth=2, context_dim=16, null_caption=False)
WEIGHTS = random_state(PixArt(CONFIG))
DIFFUSERS = key_names.to_diffusers(WEIGHTS)
EMPTY = torch.tensor([])


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


def same(found: dict, wanted: dict = WEIGHTS):
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("wrapped", [
    prefixed("transformer.", DIFFUSERS),
    prefixed("model_ema.", WEIGHTS),
    prefixed("model.diffusion_model.", WEIGHTS) | {
        "first_stage_model.decoder.conv_in.weight": torch.zeros(1), "model_ema.decay": torch.tensor(0.9),
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(1)},
    prefixed("transformer.", DIFFUSERS) | {"vae.decoder.conv_in.weight": torch.zeros(1),
                                           "text_encoder.shared.weight": torch.zeros(1)},
    {"module": WEIGHTS, "optimizer": None},
    {"module": prefixed("module.", WEIGHTS), "lr_scheduler": {}},
], ids=["a pipeline's", "EMA", "all in one", "a whole pipeline", "DeepSpeed's", "DeepSpeed's of DDP"])
def test_a_wrapped_pixart_is_read(wrapped):
    same(checkpoint.read(wrapped, config=ALPHA)[1])


def test_what_comfyui_says_of_the_prediction_is_read():
    saved = prefixed("model.diffusion_model.", WEIGHTS) | {"v_pred": EMPTY}
    config, tensors = checkpoint.read(saved)
    assert (config.prediction, config.zero_terminal_snr) == ("v", False)
    same(tensors)
    assert checkpoint.read({**saved, "ztsnr": EMPTY})[0].zero_terminal_snr
    assert checkpoint.read(saved, config={"prediction": "eps"})[0].prediction == "eps"


def test_a_configuration_among_the_weights_is_the_files_own(tmp_path):
    config = replace(CONFIG, prediction="v", sample_size=96, latent_scale=0.18215, token_limit=77)
    write_file(tmp_path / "a.safetensors",
               prefixed("model.diffusion_model.", WEIGHTS) | config_tensor("pixart", config.as_dict()))
    found, tensors = checkpoint.read(*read_file(tmp_path / "a.safetensors"))
    assert found == config
    same(tensors)


def test_the_parts_of_a_model_are_read_together(tmp_path):
    keys = sorted(DIFFUSERS)
    parts = [tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_file(parts[0], {key: DIFFUSERS[key] for key in keys[::2]})
    with pytest.raises(ValueError, match="part 1 of 2 of a model, and .*00002-of-00002.safetensors is not beside it"):
        read_file(parts[0])
    write_file(parts[1], {key: DIFFUSERS[key] for key in keys[1::2]})
    for part in parts:
        same(read_file(part)[0], DIFFUSERS)


def test_the_index_of_a_model_in_parts_stands_for_the_model(tmp_path):
    keys = sorted(WEIGHTS)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        write_file(tmp_path / name, {key: WEIGHTS[key] for key in part})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: names[keys.index(key) % 2] for key in keys}}))
    same(read_file(index)[0])


@pytest.mark.parametrize("content, words", [
    ("{}", "it has no weight_map"), ("[]", "it has no weight_map"), ("{", "is not valid JSON"),
    ('{"weight_map": {"a": "../../a.safetensors"}}', "it has no weight_map of file names"),
    ('{"weight_map": {"a": "a.safetensors"}}', "lists a.safetensors, which is not beside it"),
])
def test_an_index_that_leads_nowhere_is_refused(tmp_path, content, words):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_file(tmp_path / "model.safetensors.index.json")


def test_a_pixelflow_in_diffusers_wrapper_is_read():
    config = PixelFlowConfig(heads=2, head_dim=72, depth=1, context_dim=32, resolution=64)
    weights = random_state(PixelFlow(config))
    same(pixelflow_checkpoint.read(prefixed("model.", weights))[1], weights)


def test_the_configuration_of_an_ema_folder_is_read(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    entries = dict(norm_type="ada_norm_single", caption_channels=4096, num_layers=2, sample_size=128, decay=0.9999,
                   optimization_step=10, inv_gamma=1.0, power=0.75, min_decay=0.0, update_after_step=0,
                   use_ema_warmup=False)
    (folder / "config.json").write_text(json.dumps(entries))
    assert checkpoint.beside(folder / "diffusion_pytorch_model.safetensors")["sample_size"] == 128


def test_weights_in_four_bits_are_told_apart():
    packed = {key: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8) if key.startswith("transformer_blocks.") else
              value for key, value in DIFFUSERS.items()}
    with pytest.raises(ValueError, match="absmax belongs to weights in 4 bits"):
        checkpoint.read({**packed, "transformer_blocks.0.attn1.to_q.weight.absmax": torch.zeros(4)})


@pytest.mark.parametrize("name, variant, prediction", [
    ("yoso_pixart512.safetensors", "alpha", "v"), ("yoso_pixart1024.safetensors", "alpha", "eps"),
    ("pixart-sigma-nitro.safetensors", "sigma", "eps"),
])  # fmt: skip
def test_a_few_step_model_is_known_by_its_name(tmp_path, name, variant, prediction):
    config = checkpoint.read(DIFFUSERS, beside=checkpoint.beside(tmp_path / name))[0]
    assert (config.variant, config.prediction) == (variant, prediction)


@pytest.mark.parametrize("name, sizes", [("PixArt-XL-2-512-ControlNet.pth", False),
                                         ("PixArt-XL-2-1024-ControlNet.pth", True)])
def test_the_base_of_a_512_controlnet_bundle_does_not_look_at_sizes(tmp_path, name, sizes):
    config = replace(CONFIG, micro_conditions=True, latent_scale=0.18215, token_limit=120)
    bundle = prefixed("base_model.", random_state(PixArt(config))) | key_names.to_released_controlnet(
        random_state(PixArtControlNet(config, 1)))
    found, tensors = checkpoint.read(bundle, beside=checkpoint.beside(tmp_path / name))
    assert found.micro_conditions == sizes and ("csize_embedder.mlp.0.weight" in tensors) == sizes


def test_a_wrapped_file_of_another_kind_is_named():
    assert "T5" in known_files.whose({"transformer.encoder.block.0.layer.0.SelfAttention.q.weight": EMPTY})
