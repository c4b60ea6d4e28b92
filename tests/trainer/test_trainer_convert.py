"""python -m trainer convert: what it writes, and what it says."""
import json
import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import needed
from merged_lora import merge
from pixstack.models_impl import lora
from pixstack.models_impl.pixart import checkpoint
from pixstack.models_impl.pixart import lora as pixart_lora
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.pixart.sampling import NoiseSchedule
from pixstack.models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.state_dict import load_into, read_file, write_file
from pixstack.models_impl.ultrapixel import checkpoint as ultrapixel_checkpoint
from pixstack.models_impl.ultrapixel import lora as ultrapixel_lora
from pixstack.models_impl.ultrapixel.config import GuideConfig, StageAConfig, StageBConfig, StageCConfig
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from pixstack.trainer.cli import main as cli

WIDTH = 72
CONFIG = PixArtConfig(depth=2, hidden=WIDTH, heads=1, context_dim=16, token_limit=120, latent_scale=0.18215,
                      micro_conditions=True, null_caption=True, sample_size=32)  # fmt: skip


def convert(*words):
    cli.main(["convert", *map(str, words)])


def refusal(*words):
    with pytest.raises(SystemExit) as caught:
        convert(*words)
    return str(caught.value.code)


def random_weights(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in net.state_dict().items()}


def model_weights(config=CONFIG, seed=0):
    return random_weights(PixArt(config, device="meta"), seed)


def control_weights():
    return random_weights(PixArtControlNet(CONFIG, 1, device="meta"))


def bundle():
    return {**{f"base_model.{k}": v for k, v in model_weights().items()},
            **{f"controlnet.{k}": v for k, v in control_weights().items()}}


def stored(path, tensors, metadata=None):
    write_file(path, tensors, metadata)
    return path


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) and got[key].dtype == wanted[key].dtype for key in wanted)


# Models


def test_a_release_becomes_safetensors_that_say_what_they_are(tmp_path, capsys):
    weights = model_weights()
    torch.save({"state_dict": weights | {"pos_embed": torch.zeros(1, 256, WIDTH)}, "epoch": 3}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "sample_size=64")
    tensors, metadata = read_file(tmp_path / "b.safetensors")
    assert_equal(tensors, weights)
    assert checkpoint.read(tensors, metadata)[0].sample_size == 64
    output = capsys.readouterr().out
    for part in ("PixArt model", "alpha: depth=2, hidden=72", f"comfyui names, {len(weights)} tensors"):
        assert part in output, part


def test_an_entry_after_the_options_counts(tmp_path):
    source = stored(tmp_path / "a.safetensors", model_weights())
    convert(source, tmp_path / "b.safetensors", "--to", "original", "prediction=v")
    assert checkpoint.read(*read_file(tmp_path / "b.safetensors"))[0].prediction == "v"


@pytest.mark.parametrize("variant", ["alpha", "sigma"])
def test_the_variant_can_be_given(tmp_path, variant):
    config = PixArtConfig(depth=1, hidden=WIDTH, heads=1, context_dim=16)
    source = stored(tmp_path / "a.safetensors", model_weights(config))
    convert(source, tmp_path / "b.safetensors", f"variant={variant}")
    assert checkpoint.read(*read_file(tmp_path / "b.safetensors"))[0].variant == variant


@pytest.mark.parametrize("weights, seed", [("ema", 1), ("model", 0)])
def test_the_weights_of_a_training_file_are_chosen(tmp_path, weights, seed):
    torch.save({"state_dict": model_weights(), "state_dict_ema": model_weights(seed=1)}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "--weights", weights)
    assert_equal(read_file(tmp_path / "b.safetensors")[0], model_weights(seed=seed))


def test_a_model_comes_back_equal_from_diffusers(tmp_path):
    weights = model_weights()
    source = stored(tmp_path / "a.safetensors", weights)
    convert(source, tmp_path / "b.safetensors", "--to", "diffusers")
    assert "transformer_blocks.1.attn1.to_q.weight" in read_file(tmp_path / "b.safetensors")[0]
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "original")
    tensors, metadata = read_file(tmp_path / "c.safetensors")
    del weights["y_embedder.y_embedding"]  # diffusers has no place for it
    assert_equal(tensors, weights)
    assert checkpoint.read(tensors, metadata)[0].micro_conditions


def test_what_diffusers_has_no_place_for_is_said(tmp_path, capsys):
    convert(stored(tmp_path / "a.safetensors", model_weights()), tmp_path / "b.safetensors", "--to", "diffusers")
    assert "left out: y_embedder.y_embedding" in capsys.readouterr().out


@pytest.mark.parametrize("micro", [True, False])
def test_diffusers_opens_the_folder_and_predicts_the_same(tmp_path, micro):
    needed(find_spec("diffusers") and "diffusers", "diffusers is not installed")
    from diffusers import PixArtTransformer2DModel

    config = PixArtConfig(**{**CONFIG.as_dict(), "micro_conditions": micro, "null_caption": False})
    weights = {key: 0.2 * value for key, value in model_weights(config).items()}
    convert(stored(tmp_path / "a.safetensors", weights, checkpoint.metadata(config)), tmp_path / "transformer",
            "--to", "diffusers")
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    ours = PixArt(config)
    load_into(ours, weights, "the model")
    torch.manual_seed(0)
    x, context, timestep = torch.randn(2, 4, 32, 32), torch.randn(2, 5, 16), torch.tensor([3.0, 700.0])
    size, ratio = torch.tensor([[256.0, 256.0]]).repeat(2, 1), torch.ones(2, 1)
    with torch.no_grad():
        wanted = theirs(x, context, timestep, {"resolution": size, "aspect_ratio": ratio} if micro else
                        {"resolution": None, "aspect_ratio": None}).sample
        got = ours(x, timestep, context, size=size if micro else None, aspect_ratio=ratio if micro else None)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_a_diffusers_folder_is_a_source(tmp_path):
    source = stored(tmp_path / "a.safetensors", model_weights(), checkpoint.metadata(CONFIG))
    convert(source, tmp_path / "pipe" / "transformer", "--to", "diffusers")
    convert(tmp_path / "pipe", tmp_path / "b.safetensors")
    assert "blocks.1.attn.qkv.weight" in read_file(tmp_path / "b.safetensors")[0]


def test_the_noise_that_a_model_was_trained_on_goes_to_diffusers_and_comes_back(tmp_path):
    needed(find_spec("diffusers") and "diffusers", "diffusers is not installed")
    from diffusers import DPMSolverMultistepScheduler

    config = replace(CONFIG, prediction="v", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                     zero_terminal_snr=True, null_caption=False)
    convert(stored(tmp_path / "a.safetensors", model_weights(config), checkpoint.metadata(config)), tmp_path / "made",
            "--to", "diffusers")
    theirs = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "made")
    assert theirs.config.prediction_type == "v_prediction" and theirs.config.rescale_betas_zero_snr
    wanted = NoiseSchedule.of(config).alphas_cumprod[:-1].double()
    torch.testing.assert_close(theirs.alphas_cumprod[:-1].double(), wanted, rtol=1e-3, atol=0)
    (file,) = (tmp_path / "made").glob("*.safetensors")
    read, _ = checkpoint.read(read_file(file)[0], {}, beside=checkpoint.beside(file))
    names = ("prediction", "schedule", "beta_start", "beta_end", "zero_terminal_snr")
    assert [getattr(read, name) for name in names] == [getattr(config, name) for name in names]


def test_a_model_that_diffusers_cannot_have_is_refused(tmp_path):
    config = PixArtConfig(**{**CONFIG.as_dict(), "mlp_ratio": 2.0})
    source = stored(tmp_path / "a.safetensors", model_weights(config))
    message = refusal(source, tmp_path / "b", "--to", "diffusers")
    assert "a.safetensors: diffusers' PixArt has" in message and "mlp_ratio=2" in message


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_dtype_is_that_asked_for(tmp_path, capsys, name, dtype):
    weights = model_weights()
    convert(stored(tmp_path / "a.safetensors", weights), tmp_path / "b.safetensors", "--dtype", name)
    assert_equal(read_file(tmp_path / "b.safetensors")[0], {k: v.to(dtype) for k, v in weights.items()})
    assert f"({len(weights)} {name})" in capsys.readouterr().out


def test_a_pixelflow_training_file_becomes_safetensors(tmp_path):
    config = PixelFlowConfig(heads=2, head_dim=72, depth=1, num_classes=10)
    weights = random_weights(PixelFlow(config, device="meta"))
    optimizer = {"state": {0: {"step": 1}}, "param_groups": []}
    torch.save({"model": weights, "ema": {k: v + 1 for k, v in weights.items()}, "opt": optimizer}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "--weights", "model", "resolution=64")
    tensors, metadata = read_file(tmp_path / "b.safetensors")
    assert_equal(tensors, weights)
    assert pixelflow_checkpoint.read(tensors, metadata)[0].resolution == 64


# ControlNets


def test_a_controlnet_comes_out_of_its_bundle(tmp_path, capsys):
    torch.save({"state_dict": bundle()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    tensors, metadata = read_file(tmp_path / "b.safetensors")
    assert_equal(tensors, {f"controlnet.{k}": v for k, v in control_weights().items()})
    config, blocks, net = checkpoint.read_controlnet(tensors, metadata)
    assert (blocks, config.hidden) == (1, WIDTH)
    assert_equal(net, control_weights())
    output = capsys.readouterr().out
    assert "PixArt controlnet" in output and "its base model" in output and "is left out" in output


@pytest.mark.parametrize("between", ["comfyui", "diffusers"])
def test_a_bundle_comes_back_equal_with_its_base(tmp_path, between):
    source = stored(tmp_path / "a.safetensors", bundle())
    base = stored(tmp_path / "base.safetensors", model_weights())
    convert(source, tmp_path / "b.safetensors", "--to", between)
    assert not any("base_model" in key for key in read_file(tmp_path / "b.safetensors")[0])
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "original", "--base", base)
    assert_equal(read_file(tmp_path / "c.safetensors")[0], bundle())


def test_the_base_model_of_a_bundle_can_be_had(tmp_path):
    source = stored(tmp_path / "a.safetensors", bundle())
    convert(source, tmp_path / "b.safetensors", "--kind", "model")
    assert_equal(read_file(tmp_path / "b.safetensors")[0], model_weights())


def test_a_base_is_refused_where_it_has_no_place(tmp_path):
    source = stored(tmp_path / "a.safetensors", bundle())
    message = refusal(source, tmp_path / "b.safetensors", "--base", source)
    assert "Only --to original holds the base model" in message


# LoRAs


def peft_folder(folder, rank=4, **more):
    generator = torch.Generator().manual_seed(0)
    file = {}
    for module in ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.net.2"):
        columns = 4 * WIDTH if "ff" in module else WIDTH
        name = f"base_model.model.transformer_blocks.1.{module}"
        file[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        file[f"{name}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator)
    folder.mkdir()
    write_file(folder / "adapter_model.safetensors", file | more)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2}), encoding="utf-8")
    return file


def changed(tensors, metadata=None, config=None):
    weights = model_weights()
    names = pixart_lora.names({key: value.shape for key, value in weights.items()})
    return merge(weights, lora.read(tensors, names, metadata, config))


@pytest.mark.parametrize("to", ["comfyui", "original", "diffusers", "kohya"])
def test_a_converted_lora_makes_the_same_changes(tmp_path, capsys, to):
    file = peft_folder(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", "--to", to)
    wanted, got = changed(file, config={"r": 4, "lora_alpha": 2}), changed(*read_file(tmp_path / "b.safetensors"))
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=1e-5)
    assert "4 layers" in (output := capsys.readouterr().out)
    assert "alpha 2 of its configuration" in output


def test_a_lora_of_a_fused_layer_is_written_for_each_of_its_parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    file = {"blocks.1.attn.qkv.lora_A.weight": torch.randn(4, WIDTH, generator=generator),
            "blocks.1.attn.qkv.lora_B.weight": torch.randn(3 * WIDTH, 4, generator=generator)}
    convert(stored(tmp_path / "a.safetensors", file), tmp_path / "b.safetensors", "--to", "diffusers")
    wanted, got = changed(file), changed(*read_file(tmp_path / "b.safetensors"))
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=1e-5)


def test_a_lora_in_half_precision_keeps_its_alpha(tmp_path):
    peft_folder(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "b.safetensors", "--dtype", "bf16")
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in read_file(tmp_path / "b.safetensors")[0].items()}
    assert dtypes == {"weight": torch.bfloat16, "alpha": torch.float32}


def test_the_keys_of_the_text_encoder_are_carried_along(tmp_path, capsys):
    key = "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    peft_folder(tmp_path / "peft", **{key: torch.ones(2, 2)})
    convert(tmp_path / "peft", tmp_path / "b.safetensors")
    assert torch.equal(read_file(tmp_path / "b.safetensors")[0][key], torch.ones(2, 2))
    assert "1 keys of the text encoder are copied as they are" in capsys.readouterr().out


def test_the_alpha_of_a_lora_can_be_given(tmp_path, capsys):
    file = peft_folder(tmp_path / "peft")
    source = stored(tmp_path / "alone.safetensors", file)
    convert(source, tmp_path / "b.safetensors", "--alpha", "2")
    got, wanted = changed(*read_file(tmp_path / "b.safetensors")), changed(file, config={"r": 4, "lora_alpha": 2})
    torch.testing.assert_close(got["blocks.1.mlp.fc2.weight"], wanted["blocks.1.mlp.fc2.weight"], rtol=0, atol=1e-5)
    assert "alpha 2 as given" in capsys.readouterr().out


def test_a_lora_is_checked_against_the_base(tmp_path):
    peft_folder(tmp_path / "peft")
    other = PixArtConfig(depth=2, hidden=144, heads=2, context_dim=16)
    base = stored(tmp_path / "base.safetensors", model_weights(other))
    message = refusal(tmp_path / "peft", tmp_path / "b.safetensors", "--base", base)
    assert "144 x 144 here" in message
    assert not (tmp_path / "b.safetensors").exists()


# Refusals


def test_an_existing_file_is_kept(tmp_path):
    source = stored(tmp_path / "a.safetensors", model_weights())
    dest = stored(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    assert "exists" in refusal(source, dest)
    assert list(read_file(dest)[0]) == ["x"]
    convert(source, dest, "--overwrite")
    assert "t_block.1.weight" in read_file(dest)[0]


def test_the_source_is_never_overwritten(tmp_path):
    source = stored(tmp_path / "a.safetensors", model_weights())
    assert "the source itself" in refusal(source, tmp_path / "." / "a.safetensors", "--overwrite")


@pytest.mark.parametrize("words, reason", [
    (["b.ckpt"], "must end in .safetensors"),
    (["b"], "must end in .safetensors"),
    (["b.safetensors", "--to", "kohya"], "PixArt model files have no kohya format"),
    (["b.safetensors", "--kind", "controlnet"], "is not converted as a controlnet. The keys are those of PixArt"),
    (["b.safetensors", "hidden=144"], "hidden=144, the weights say 72"),
    (["b.safetensors", "alpha"], "entries are written key=value"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(tmp_path, capsys, words, reason):
    source = stored(tmp_path / "a.safetensors", model_weights())
    message = refusal(source, tmp_path / words[0], *words[1:])
    assert reason in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


@pytest.mark.parametrize("keys, reason", [
    (["double_blocks.0.img_attn.qkv.weight"], "The keys are those of FLUX"),
    (["a", "b"], "Its first keys are a, b"),
])  # fmt: skip
def test_a_file_of_another_family_is_refused(tmp_path, keys, reason):
    source = stored(tmp_path / "a.safetensors", {key: torch.ones(1) for key in keys})
    message = refusal(source, tmp_path / "b.safetensors")
    assert reason in message and "There are converters for: PixArt controlnet, PixArt model" in message


def test_a_folder_without_a_known_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    assert re.search("is a folder with none of adapter_model", refusal(tmp_path / "folder", tmp_path / "b.safetensors"))


@pytest.mark.parametrize("dora", [False, True])
def test_peft_opens_the_folder_of_a_lora_and_changes_what_it_changes_here(tmp_path, dora):
    needed(find_spec("diffusers") and find_spec("peft") and "diffusers", "diffusers or peft is not installed")
    from diffusers import PixArtTransformer2DModel
    from peft import PeftModel

    config = replace(CONFIG, micro_conditions=False, null_caption=False)
    weights = {key: 0.2 * value for key, value in model_weights(config).items()}
    names, rng, file = pixart_lora.names({k: v.shape for k, v in weights.items()}), torch.Generator(), {}
    for module, rank in (("blocks.0.attn.qkv", 4), ("blocks.1.mlp.fc2", 2)):
        rows, columns = weights[f"{module}.weight"].shape
        file |= {f"{module}.lora_A.weight": torch.randn(rank, columns, generator=rng), f"{module}.alpha":
                 torch.tensor(1.0), f"{module}.lora_B.weight": torch.randn(rows, rank, generator=rng)}
        file |= {f"{module}.dora_scale": torch.rand(rows, 1, generator=rng) + 0.5} if dora else {}
    file = {f"diffusion_model.{key}": value for key, value in file.items()}
    convert(stored(tmp_path / "lora.safetensors", file), tmp_path / "peft", "--to", "diffusers")
    nets = []
    for name, tensors in (("plain", weights), ("merged", merge(weights, lora.read(file, names)))):
        convert(stored(tmp_path / f"{name}.safetensors", tensors, checkpoint.metadata(config)), tmp_path / name, "--to",
                "diffusers")
        nets.append(PixArtTransformer2DModel.from_pretrained(tmp_path / name))
    given = dict(encoder_hidden_states=torch.randn(1, 5, 16), timestep=torch.tensor([500]),
                 added_cond_kwargs={"resolution": None, "aspect_ratio": None})
    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        plain, wanted = (net(x, **given).sample for net in nets)
        found = PeftModel.from_pretrained(nets[0], tmp_path / "peft")(x, **given).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert (wanted - plain).abs().max() > 0.01 * wanted.abs().max()


def test_layers_that_peft_has_no_folder_for_are_refused(tmp_path):
    file = {"diffusion_model.blocks.0.attn.proj.diff": torch.ones(WIDTH, WIDTH)}
    message = refusal(stored(tmp_path / "a.safetensors", file), tmp_path / "b", "--to", "diffusers")
    assert "a folder of peft holds one LoRA or DoRA" in message and not (tmp_path / "b").exists()


def test_a_lora_in_our_names_is_not_written_to_a_folder(tmp_path):
    peft_folder(tmp_path / "peft")
    assert "b must end in .safetensors" in refusal(tmp_path / "peft", tmp_path / "b", "--to", "kohya")


# UltraPixel

GUIDE = GuideConfig(down=(16, 16), up=(16, 16), width=64, feedforward=8, max_tokens=64, groups=4, layers=(8, 8),
                    frequencies=4, timestep_dim=8, scale_dim=8, heads=2)
STAGE_C = StageCConfig(hidden=(64, 64), heads=(1, 1), down=("CTA", "CTA" * 2), up=("CTA" * 2, "CTA"), context_dim=12,
                       text_dim=10, pooled_dim=10, image_dim=6, pooled_tokens=2, timestep_dim=8)
STAGE_B = StageBConfig(hidden=(8, 64), heads=(-1, 1), down=("CT", "CTA"), up=("CTA", "CT"), down_repeats=(1, 1),
                       up_repeats=(2, 1), context_dim=12, pooled_dim=10, dropout=(0.0, 0.1),
                       self_attention=(True, True), timestep_dim=8)  # fmt: skip
STAGE_A = StageAConfig(bottleneck_blocks=3, hidden=16)


def released_guide():
    weights = random_weights(Guide(GUIDE, device="meta"))
    dead = {f"module.{i}.{j}.hr_norm.{name}.weight": torch.ones(16, 16, 1, 1)
            for i in (64, 65) for j in (0, 1) for name in ("alpha", "gamma")}
    return weights, ultrapixel_checkpoint.released_guide_names(weights) | dead


def test_the_released_guide_becomes_real_safetensors_under_our_names(tmp_path, capsys):
    weights, released = released_guide()
    torch.save(released, tmp_path / "ultrapixel_t2i.safetensors")  # a pickle under this suffix, as the release has it
    convert(tmp_path / "ultrapixel_t2i.safetensors", tmp_path / "guide.safetensors", "heads=2")
    tensors, metadata = read_file(tmp_path / "guide.safetensors")
    assert (tmp_path / "guide.safetensors").read_bytes()[8:9] == b"{"
    assert_equal(tensors, weights)
    config, loaded = ultrapixel_checkpoint.read(tensors, metadata)
    assert config == GUIDE and loaded.keys() == weights.keys()
    output = capsys.readouterr().out
    assert "the guide of UltraPixel: down=(16, 16)" in output
    assert "left out: 2,048 of" in output and "not used by the guide" in output


def test_a_guide_comes_back_under_the_names_of_the_release(tmp_path):
    _, released = released_guide()
    source = stored(tmp_path / "a.safetensors", released)
    convert(source, tmp_path / "b.safetensors", "heads=2")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "original")
    assert_equal(read_file(tmp_path / "c.safetensors")[0],
                 {key: value for key, value in released.items() if "alpha" not in key and "gamma" not in key})


@pytest.mark.parametrize("kind, config, key", [(StageC, STAGE_C, "to_q"), (StageB, STAGE_B, "to_q"),
                                               (StageA, STAGE_A, "up_blocks")])
def test_a_wrapped_stage_becomes_what_comfyui_loads_and_comes_back(tmp_path, kind, config, key):
    weights = random_weights(kind(config, device="meta"))
    released = ultrapixel_checkpoint.released_attention_names(weights)
    wrapped = {"state_dict": {f"module.{name}": value for name, value in released.items()}}
    torch.save(wrapped, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    tensors, metadata = read_file(tmp_path / "b.safetensors")
    assert any(key in name for name in tensors) and not any("in_proj" in name for name in tensors)
    read, loaded = ultrapixel_checkpoint.read(tensors, metadata)
    assert read == config
    assert_equal(loaded, weights)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "original")
    assert_equal(read_file(tmp_path / "c.safetensors")[0], released)


def test_stage_c_comes_out_of_a_live_model_without_its_guide(tmp_path, capsys):
    weights = ultrapixel_checkpoint.released_attention_names(random_weights(StageC(STAGE_C, device="meta")))
    live = {**weights, **{f"agg_net.{key}": torch.zeros(2) for key in "01"}, "norm_down_blocks.0.gamma": torch.ones(1)}
    convert(stored(tmp_path / "a.safetensors", live), tmp_path / "b.safetensors", "--to", "original")
    assert_equal(read_file(tmp_path / "b.safetensors")[0], weights)
    assert "left out: 5 of" in capsys.readouterr().out


def test_the_codebook_by_which_comfyui_knows_a_stage_a_is_kept(tmp_path, capsys):
    weights = random_weights(StageA(STAGE_A, device="meta"))
    codebook = {"vquantizer.codebook.weight": torch.ones(8, 4)}
    convert(stored(tmp_path / "a.safetensors", weights | codebook), tmp_path / "b.safetensors")
    assert_equal(read_file(tmp_path / "b.safetensors")[0], weights | codebook)
    assert "no codebook" not in capsys.readouterr().out
    convert(stored(tmp_path / "c.safetensors", weights), tmp_path / "d.safetensors")
    assert "it has no codebook" in capsys.readouterr().out


def released_personalisation(rank=4):
    shapes = {key: value.shape for key, value in StageC(STAGE_C, device="meta").state_dict().items()}
    tensors = {}
    for number, key in enumerate(ultrapixel_lora.attention_keys(STAGE_C)):
        rows, columns = shapes[key]
        tensors[f"module.{number}.lora_up"] = torch.randn(rows, rank)
        tensors[f"module.{number}.lora_down"] = torch.randn(rank, columns)
    last = len(tensors) // 2
    token = {f"module.{last}.embeddings": torch.randn(1, 10), f"module.{last}.indices": torch.tensor([49408])}
    return tensors | token


def test_a_personalisation_becomes_a_lora_of_comfyui_with_its_token(tmp_path, capsys):
    released = released_personalisation()
    torch.save(released, tmp_path / "lora_cat.safetensors")
    base = stored(tmp_path / "c.safetensors", random_weights(StageC(STAGE_C, device="meta")))
    convert(tmp_path / "lora_cat.safetensors", tmp_path / "cat.safetensors", "--base", base, "token=[cat]",
            "token_base=^cat</w>")
    tensors, metadata = read_file(tmp_path / "cat.safetensors")
    assert "diffusion_model.down_blocks.0.2.attention.attn.to_v.lora_up.weight" in tensors
    was = ultrapixel_lora.read(released, config=STAGE_C)
    now = ultrapixel_lora.read(tensors, metadata)
    assert (now.token, now.base, now.token_rows) == ("[cat]", "^cat</w>", [49408])
    assert torch.equal(now.token_change, was.token_change)
    for key in was.layers:
        shape = (was.layers[key][0].shape[0], was.layers[key][1].shape[1])
        torch.testing.assert_close(now.change(key, shape), was.change(key, shape))
    output = capsys.readouterr().out
    assert "UltraPixel lora" in output and "12 layers of Stage C, rank 4, scale 0.25" in output and "[cat]" in output
    convert(tmp_path / "cat.safetensors", tmp_path / "half.safetensors", "--dtype", "bf16")
    assert read_file(tmp_path / "half.safetensors")[1]["pixstack.token"] == "[cat]"


def test_what_a_personalisation_does_not_say_is_asked_for(tmp_path, capsys):
    released = released_personalisation()
    released = {k: 0 * v if "embeddings" in k else v for k, v in released.items()}
    torch.save(released, tmp_path / "a.pt")
    base = stored(tmp_path / "c.safetensors", random_weights(StageC(STAGE_C, device="meta")))
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "--base", base)
    output = capsys.readouterr().out
    assert "say token=[name]" in output and "the token's change is zero" in output
    assert "variant means nothing" in refusal(tmp_path / "a.pt", tmp_path / "d.safetensors", "variant=alpha")
    assert "changes 12 layers, this Stage C has 128" in refusal(tmp_path / "a.pt", tmp_path / "d.safetensors")


def test_a_guide_in_the_diffusers_format_is_refused(tmp_path):
    source = stored(tmp_path / "a.safetensors", released_guide()[1])
    message = refusal(source, tmp_path / "b.safetensors", "--to", "diffusers")
    assert "UltraPixel model files have no diffusers format; they have original, comfyui" in message
