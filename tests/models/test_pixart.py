"""PixArt without a host: its configuration, files, network, ControlNet and picture sizes."""
import json
import logging
from dataclasses import replace

import pytest
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.layers import sinusoid
from pixstack.models_impl.pixart import buckets, checkpoint, key_names
from pixstack.models_impl.pixart.config import PRESETS, KVCompression, PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import HintedControlNet, PixArt, axis_table, position_table
from pixstack.models_impl.pixart.sampling import NoiseSchedule

TINY = PixArtConfig(depth=3, hidden=24, heads=2, context_dim=6, token_limit=5, sample_size=8, null_caption=True)
MICRO = replace(TINY, micro_conditions=True, latent_scale=0.18215)  # as alpha
STATED = {"heads": 2}  # in no key or shape


def network(config=TINY, seed=0, dtype=torch.float32) -> PixArt:
    torch.manual_seed(seed)
    model = PixArt(config, dtype=dtype).initialise()
    for tensor in [*model.parameters(), *model.buffers()]:  # the initial zeros would hide mistakes
        torch.nn.init.normal_(tensor, std=0.2)
    return model.eval()


def control_network(config=TINY, blocks=2, seed=1, dtype=torch.float32) -> PixArtControlNet:
    torch.manual_seed(seed)
    net = PixArtControlNet(config, blocks, dtype=dtype)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def inputs(batch=2, height=8, width=6, length=5, dtype=torch.float32, config=TINY):
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(batch, config.in_channels, height, width, generator=rng, dtype=dtype)
    context = torch.randn(batch, length, config.context_dim, generator=rng, dtype=dtype)
    return x, torch.linspace(200.5, 801.25, batch), context


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(n, position_range, hidden=TINY.hidden):
    axis = axis_table(n, hidden // 2, position_range)
    return position_table(axis, axis)[None]


# --- Configuration

def test_a_configuration_refuses_nonsense_with_both_numbers():
    with pytest.raises(ValueError, match="hidden=50 cannot be split into heads=4"):
        PixArtConfig(hidden=50, heads=4)
    with pytest.raises(ValueError, match="out_channels=6 must be in_channels=4"):
        PixArtConfig(out_channels=6)
    with pytest.raises(ValueError, match=r"names the blocks \[5\]; with depth=3"):
        replace(TINY, kv_compression=KVCompression("conv", 2, (5,)))


def test_a_configuration_survives_json():
    config = replace(MICRO, kv_compression=KVCompression("ave", 2, (0, 2)))
    assert PixArtConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_a_configuration_names_an_unknown_entry():
    with pytest.raises(ValueError, match="'hiden'"):
        PixArtConfig.from_dict({"hiden": 24})


@pytest.mark.parametrize("input_size, scale, expected", [(32, 1.0, 16), (32, 0.5, 32), (64, 1.0, 32), (128, 2.0, 32),
                                                         (256, 4.0, 32)])
def test_positions_run_over_the_range_that_size_and_scale_make(input_size, scale, expected):
    for name in ("pe_interpolation", "lewei_scale", "interpolation_scale"):
        assert PixArtConfig.from_dict({"input_size": input_size, name: scale}).position_range == expected


def test_an_absent_scale_in_a_diffusers_configuration_is_what_diffusers_takes():
    entries = {"num_attention_heads": 16, "attention_head_dim": 72, "interpolation_scale": None}
    assert PixArtConfig.from_dict({**entries, "sample_size": 128}).position_range == 32
    assert PixArtConfig.from_dict({**entries, "sample_size": 32}).position_range == 16


def test_a_kv_compression_that_compresses_nothing_is_none():
    for entries in ({"sampling": None, "scale_factor": 2, "kv_compress_layer": [1]},
                    {"sampling": "conv", "scale_factor": 1, "kv_compress_layer": [1]},
                    {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": []}):
        assert PixArtConfig.from_dict({"kv_compress_config": entries}).kv_compression is None


# --- Files

def wrapped(form, tensors):
    prefixed = {"module": "module.", "comfyui": "model.diffusion_model.", "bundle": "base_model."}
    if form in prefixed:
        tensors = {prefixed[form] + key: value for key, value in tensors.items()}
    if form == "bundle":
        net = control_network().state_dict()
        tensors |= key_names.to_released_controlnet(net)
    if form == "onetrainer":
        tensors = {**tensors, "pos_embed": table(64, 64.0)}
    return {form: tensors} if form in ("state_dict", "state_dict_ema", "model") else tensors


@pytest.mark.parametrize("form", ["flat", "state_dict", "state_dict_ema", "model", "module", "comfyui", "bundle",
                                  "onetrainer"])
def test_every_form_of_the_file_gives_the_same_weights(tmp_path, form):
    tensors = network().state_dict()
    torch.save(wrapped(form, tensors), tmp_path / "a.pth")
    config, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.pth"), config={**STATED, "sample_size": 8})
    assert same(loaded, tensors)
    assert config == TINY
    state_dict.load_into(PixArt(config), loaded, "PixArt")


@pytest.mark.parametrize("weights, expected", [("ema", 2.0), ("model", 1.0)])
def test_a_training_file_gives_the_weights_that_are_asked_for(weights, expected):
    tensors = network().state_dict()
    file = {"state_dict": {k: torch.full_like(v, 1.0) for k, v in tensors.items()},
            "state_dict_ema": {k: torch.full_like(v, 2.0) for k, v in tensors.items()}, "optimizer": {}, "epoch": 3}
    _, loaded = checkpoint.read(file, weights=weights, config=STATED)
    assert loaded["t_block.1.bias"].eq(expected).all()


def test_without_ema_the_model_stands_in():
    file = {"state_dict": network().state_dict(), "state_dict_ema": None}
    assert same(checkpoint.read(file, config=STATED)[1], network().state_dict())


def test_our_own_file_says_everything_about_itself(tmp_path):
    config = replace(MICRO, kv_compression=KVCompression("uniform", 2, (1,)), prediction="v", mlp_ratio=4.3)
    tensors = network(config).state_dict()
    state_dict.write_file(tmp_path / "a.safetensors", tensors, checkpoint.metadata(config))
    read, loaded = checkpoint.read(*state_dict.read_file(tmp_path / "a.safetensors"), beside={"sample_size": 64})
    assert read == config and same(loaded, tensors)


@pytest.mark.parametrize("config", [MICRO, replace(TINY, qk_norm=True)], ids=["micro", "qk_norm"])
def test_the_way_to_diffusers_and_back_changes_no_bit(config):
    tensors = network(config, dtype=torch.float64).state_dict()
    del tensors["y_embedder.y_embedding"]  # which diffusers does not store
    there = key_names.to_diffusers(tensors)
    assert same(key_names.to_original(there), tensors)
    read, loaded = checkpoint.read(there, config={**STATED, "token_limit": 5, "sample_size": 8})
    assert same(loaded, tensors) and read == replace(config, null_caption=False)


def test_a_null_caption_in_a_diffusers_file_is_kept():
    tensors = network().state_dict()
    there = {**key_names.to_diffusers(tensors), "caption_projection.y_embedding": tensors["y_embedder.y_embedding"],
             "pos_embed.pos_embed": table(8, 8.0)}
    assert same(checkpoint.read(there, config=STATED)[1], tensors)


def test_diffusers_is_not_given_what_it_cannot_run():
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.sr.*KV compression"):
        key_names.to_diffusers(network(replace(TINY, kv_compression=KVCompression("conv", 2, (1,)))).state_dict())


def test_a_diffusers_file_that_lacks_a_part_of_a_fused_projection_says_which():
    there = key_names.to_diffusers(network().state_dict())
    del there["transformer_blocks.2.attn2.to_v.bias"]
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.attn2\.to_v\.bias"):
        checkpoint.read(there, config=STATED)


@pytest.mark.parametrize("config", [
    replace(TINY, depth=5),
    replace(TINY, hidden=36),
    replace(TINY, in_channels=3, out_channels=3),
    replace(TINY, patch_size=4),
    replace(TINY, mlp_ratio=2.5),
    replace(TINY, context_dim=9, token_limit=11),
    replace(TINY, qk_norm=True),
    replace(TINY, micro_conditions=True, latent_scale=0.18215),
    replace(TINY, kv_compression=KVCompression("conv", 2, (1, 2))),
    replace(TINY, qk_norm=True, kv_compression=KVCompression("conv", 3, (0,))),
    replace(TINY, null_caption=False, token_limit=300),
])  # fmt: skip
def test_keys_and_shapes_determine_the_network(config):
    read, _ = checkpoint.read(network(config).state_dict(), config={**STATED, "sample_size": 8})
    assert read == config


def test_a_kv_compression_without_weights_comes_from_the_configuration():
    tensors = network().state_dict()
    stated = {"sampling": "ave", "scale_factor": 2, "kv_compress_layer": [1, 14]}
    assert checkpoint.read(tensors, config=STATED)[0].kv_compression is None
    config, _ = checkpoint.read(tensors, config={**STATED, "kv_compress_config": stated})
    assert config.kv_compression == KVCompression("ave", 2, (1,))
    with pytest.raises(ValueError, match="kv_compression=.*conv.*the weights say None"):
        checkpoint.read(tensors, config={**STATED, "kv_compress_config": {**stated, "sampling": "conv"}})


def test_a_configuration_must_not_contradict_the_weights():
    with pytest.raises(ValueError, match="depth=28, the weights say 3"):
        checkpoint.read(network().state_dict(), config={**STATED, "depth": 28})


def test_a_width_that_the_released_head_size_does_not_divide_asks_for_the_configuration():
    with pytest.raises(ValueError, match="24 wide.*72.*config.json"):
        checkpoint.read(network().state_dict())


@pytest.mark.parametrize("config, stated, expected", [
    (replace(TINY, token_limit=120), {}, "alpha"),
    (replace(TINY, token_limit=300), {}, "sigma"),
    (replace(TINY, token_limit=300, micro_conditions=True), {}, "sigma"),
    (MICRO, {}, "alpha"),
    (replace(TINY, null_caption=False), {"variant": "alpha"}, "alpha"),
    (replace(TINY, token_limit=120), {"variant": "sigma"}, "sigma"),
])  # fmt: skip
def test_alpha_is_distinguished_from_sigma(config, stated, expected, caplog):
    read, _ = checkpoint.read(network(config).state_dict(), config={**STATED, **stated})
    assert read.variant == expected and not caplog.records
    assert read.token_limit == (config.token_limit if config.null_caption else {"alpha": 120, "sigma": 300}[expected])


def test_a_file_that_could_be_alpha_or_sigma_is_taken_for_sigma_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        read, _ = checkpoint.read(network(replace(TINY, null_caption=False)).state_dict(), config=STATED)
    assert read.variant == "sigma" and "alpha" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, position_range", [(16, 16.0), (16, 32.0), (32, 32.0), (5, 20.0), (64, 32.0)])
def test_a_stored_table_of_positions_gives_its_range(n, position_range, dtype):
    tensors = {**network().state_dict(), "pos_embed": table(n, position_range).to(dtype)}
    read, loaded = checkpoint.read(tensors, config=STATED)
    assert (read.position_range, read.sample_size) == (position_range, 2 * n)
    assert "pos_embed" not in loaded


def test_the_range_that_a_table_gives_can_be_overridden():
    tensors = {**network(replace(TINY, token_limit=120)).state_dict(), "pos_embed": table(16, 16.0)}
    assert checkpoint.read(tensors, config={**STATED, "position_range": 32.0})[0].position_range == 32


def test_a_table_that_is_none_is_not_believed():
    tensors = {**network().state_dict(), "pos_embed": torch.randn(1, 64, TINY.hidden)}
    assert checkpoint.read(tensors, config=STATED)[0].position_range == 32


def test_an_alpha_of_256_pixels_has_half_the_range():
    tensors = network(replace(TINY, token_limit=120)).state_dict()
    assert checkpoint.read(tensors, config={**STATED, "sample_size": 32})[0].position_range == 16
    assert checkpoint.read(tensors, config={**STATED, "sample_size": 64})[0].position_range == 32


SCHEDULER = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "beta_end": 0.012, "rescale_betas_zero_snr": True}
NOISE = dict(prediction="v", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)


def diffusers_folder(folder, scale=0.18215, **transformer):
    entries = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 12,
               "num_layers": 3, "sample_size": 64, "caption_channels": 6, "norm_type": "ada_norm_single", **transformer}
    files = {"transformer/config.json": entries,
             "scheduler/scheduler_config.json": SCHEDULER,
             "vae/config.json": {"scaling_factor": scale}}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps(content))
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_a_diffusers_folder_says_what_its_file_does_not(tmp_path, caplog):
    there = key_names.to_diffusers(network().state_dict())
    config, _ = checkpoint.read(there, beside=checkpoint.beside(diffusers_folder(tmp_path)))
    assert config == replace(TINY, null_caption=False, sample_size=64, token_limit=120, latent_scale=0.18215,
                             **NOISE)
    assert not caplog.records


def test_the_noise_of_a_training_may_lie_right_beside_its_file(tmp_path):
    file = diffusers_folder(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").rename(file.with_name("scheduler_config.json"))
    config, _ = checkpoint.read(key_names.to_diffusers(network().state_dict()), beside=checkpoint.beside(file))
    assert {name: getattr(config, name) for name in NOISE} == NOISE
    there, expected = NoiseSchedule.of(config), NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, True)
    assert torch.equal(there.alphas_cumprod, expected.alphas_cumprod)


def test_what_lies_beside_a_file_counts_only_where_it_fits(tmp_path):
    beside = checkpoint.beside(diffusers_folder(tmp_path, num_layers=28))
    config, _ = checkpoint.read(network().state_dict(), config=STATED, beside=beside)
    assert (config.prediction, config.sample_size) == ("eps", 128)


def test_what_lies_beside_a_file_does_not_overrule_it(tmp_path):
    tensors = {**network(replace(TINY, token_limit=300)).state_dict(), "pos_embed": table(16, 32.0)}
    config, _ = checkpoint.read(tensors, beside=checkpoint.beside(diffusers_folder(tmp_path)))
    assert (config.variant, config.token_limit, config.sample_size) == ("sigma", 300, 32)


def test_the_configuration_of_another_model_beside_a_file_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 19}))
    assert checkpoint.beside(tmp_path / "a.safetensors") is None


@pytest.mark.parametrize("name, preset", [
    ("PixArt-XL-2-SAM-256x256.pth", "alpha_256"),
    ("PixArt-XL-2-512-ControlNet.pth", "alpha_512"),
    ("PixArt-Sigma-XL-2-256x256.pth", "sigma_256"),
    ("PixArt-Sigma-XL-2-2K-MS.pth", "sigma_2k"),
    ("PixArt-Sigma-XL-2-512-MS/transformer/diffusion_pytorch_model.safetensors", "sigma_512"),
])  # fmt: skip
def test_a_released_name_gives_the_resolution(tmp_path, name, preset):
    config = replace(TINY, null_caption=False)
    read, _ = checkpoint.read(network(config).state_dict(), config=STATED, beside=checkpoint.beside(tmp_path / name))
    for entry in ("sample_size", "position_range", "variant", "token_limit"):
        assert getattr(read, entry) == getattr(PRESETS[preset], entry)


@pytest.mark.parametrize("keys, family", [
    (["latent_size_embedder.linear_1.weight", "patch_embed.proj.weight"], "PixelFlow"),
    (["base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA"),
    (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    (["blocks.0.adaLN_modulation.1.weight", "x_embedder.proj.weight"], "DiT"),
    (["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.weight"], "LTX-Video"),
])  # fmt: skip
def test_files_of_others_are_refused_by_name(keys, family):
    tensors = {key: torch.zeros(2, 2, 2, 2) for key in keys}
    with pytest.raises(ValueError, match=f"not a PixArt checkpoint.*{family}"):
        checkpoint.read(tensors)
    with pytest.raises(ValueError, match=f"not a PixArt ControlNet.*{family}"):
        checkpoint.read_controlnet(tensors)


def test_half_a_file_says_what_is_missing():
    tensors = network().state_dict()
    del tensors["t_block.1.weight"]
    with pytest.raises(ValueError, match=r"incomplete.*t_block\.1\.weight"):
        checkpoint.read(tensors, config=STATED)


# --- ControlNet files

CONTROL_FORMS = {
    "ours": lambda net: net,
    "released": key_names.to_released_controlnet,
    "bundle": lambda net: {**{f"base_model.{k}": v for k, v in network().state_dict().items()},
                           **key_names.to_released_controlnet(net)},
    "wrapped": lambda net: {"state_dict": {f"module.{k}": v for k, v in CONTROL_FORMS["bundle"](net).items()}},
    "diffusers": key_names.to_diffusers_controlnet,
    "simpletuner": lambda net: {f"controlnet.{k}": v for k, v in key_names.to_diffusers_controlnet(net).items()},
}


@pytest.mark.parametrize("form", CONTROL_FORMS)
def test_every_form_of_a_controlnet_gives_the_same_weights(form):
    tensors = control_network(dtype=torch.float64).state_dict()
    config, blocks, loaded = checkpoint.read_controlnet(CONTROL_FORMS[form](tensors), config=TINY.as_dict())
    assert same(loaded, tensors)
    assert (blocks, config.depth, config.hidden, config.heads) == (2, 3, 24, 2)
    state_dict.load_into(PixArtControlNet(config, blocks), {k: v.float() for k, v in loaded.items()}, "a ControlNet")


def test_our_own_controlnet_file_says_which_model_it_controls(tmp_path):
    tensors = control_network(MICRO).state_dict()
    state_dict.write_file(tmp_path / "a.safetensors", tensors, checkpoint.metadata_controlnet(MICRO))
    config, blocks, loaded = checkpoint.read_controlnet(*state_dict.read_file(tmp_path / "a.safetensors"))
    assert (config, blocks) == (MICRO, 2) and same(loaded, tensors)


def test_a_controlnet_for_another_width_is_refused_with_both():
    tensors = control_network().state_dict()
    with pytest.raises(ValueError, match="hidden=48, the weights say 24"):
        checkpoint.read_controlnet(tensors, config=replace(TINY, hidden=48).as_dict())


def test_a_controlnet_without_its_base_is_no_model():
    with pytest.raises(ValueError, match="not a PixArt checkpoint. The keys are those of a PixArt ControlNet"):
        checkpoint.read(key_names.to_released_controlnet(control_network().state_dict()), config=STATED)


@pytest.mark.parametrize("names", [dict, key_names.to_diffusers], ids=["released", "diffusers"])
def test_a_model_is_no_controlnet(names):
    with pytest.raises(ValueError, match="not a PixArt ControlNet. The keys are those of PixArt"):
        checkpoint.read_controlnet(names(network().state_dict()), config=STATED)


def test_a_controlnet_that_lacks_a_block_says_so():
    tensors = {k: v for k, v in control_network().state_dict().items() if not k.startswith("1.copied_block.mlp")}
    with pytest.raises(ValueError, match=r"incomplete.*1\.copied_block\.mlp\.fc1\.weight"):
        checkpoint.read_controlnet(tensors, config=TINY.as_dict())


# --- Network

@torch.no_grad()
def test_tokens_that_the_mask_leaves_out_are_never_seen():
    model, (x, t, context) = network(), inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    out = model(x, t, context, mask)
    for i in range(2):
        alone = model(x[i : i + 1], t[i : i + 1], context[i : i + 1, mask[i].bool()])
        torch.testing.assert_close(out[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_without_tokens_adds_only_the_bias_of_the_projection():
    model, (x, t, context) = network(), inputs()
    out = model(x, t, context, torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]))
    without = network()
    for block in without.blocks:
        block.cross_attn.kv_linear.weight.zero_()
        block.cross_attn.kv_linear.bias.zero_()
    torch.testing.assert_close(out[:1], without(x[:1], t[:1], context[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1:], model(x[1:], t[1:], context[1:, :3]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_that_was_encoded_before_gives_the_same_picture():
    model, (x, t, context) = network(), inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for given in (None, mask):
        text = model.encode_text(context, given)
        for more in (dict(), dict(control=[HintedControlNet(control_network(), x)])):
            assert torch.equal(model(x, t, None, text=text, **more), model(x, t, context, given, **more))


@torch.no_grad()
def test_positions_of_one_size_are_not_used_for_another():
    model = network()
    for height, width in ((8, 6), (6, 8), (4, 12), (8, 6)):
        x, t, context = inputs(height=height, width=width)
        torch.testing.assert_close(model(x, t, context), network()(x, t, context))


@torch.no_grad()
def test_positions_of_one_precision_or_device_are_not_used_for_another():
    model, (x, t, context) = network(), inputs()
    single = model(x, t, context)
    double = model.double()(x.double(), t, context.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=1e-5)
    x, t, context = (tensor.to("meta") for tensor in (x, t, context))
    assert model.float().to("meta")(x, t, context).is_meta


def test_a_network_that_has_drawn_can_be_trained():
    model, (x, t, context) = network(), inputs()
    with torch.inference_mode():
        model(x, t, context)
    model(x, t, context).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_distinguishes_neighbouring_timesteps(dtype):
    model, (x, _, context) = network(dtype=dtype), inputs(dtype=dtype, batch=1)
    near = [model(x, torch.tensor([t]), context) for t in (949.0, 949.5)]  # one number in bfloat16
    assert not torch.equal(*near)
    single = network(dtype=dtype).float()(x.float(), torch.tensor([949.0]), context.float())
    error = (near[0].float() - single).square().mean().sqrt() / single.std()
    assert error < 0.05


def test_the_embedding_of_a_timestep_is_cosine_first():
    embedding = sinusoid(torch.tensor([2.0]))
    torch.testing.assert_close(embedding[0, 0], torch.tensor(2.0).cos())
    torch.testing.assert_close(embedding[0, 128], torch.tensor(2.0).sin())


@torch.no_grad()
def test_a_micro_conditioned_network_gets_the_size_of_the_latent_by_default():
    model, (x, t, context) = network(MICRO), inputs()
    sizes = dict(size=torch.tensor([[64, 48]]), aspect_ratio=torch.tensor([[8 / 6]]))
    torch.testing.assert_close(model(x, t, context), model(x, t, context, **sizes))
    each = {name: value.repeat(2, 1) for name, value in sizes.items()}
    torch.testing.assert_close(model(x, t, context), model(x, t, context, **each))
    other = model(x, t, context, size=torch.tensor([[64, 64]]), aspect_ratio=sizes["aspect_ratio"])
    assert not torch.allclose(other, model(x, t, context))


@torch.no_grad()
@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform"])
def test_kv_compression_leaves_out_what_does_not_fill_a_factor(sampling):
    model = network(replace(TINY, kv_compression=KVCompression(sampling, 2, (1,))))
    lengths = []

    def attention(q, k, v, mask=None):
        lengths.append(k.shape[-2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model(*inputs(height=10, width=6), attention=attention)  # 5x3 tokens
    assert lengths == [15, 5, 2, 5, 15, 5]


@torch.no_grad()
def test_a_fresh_convolution_compresses_by_the_mean():
    config = replace(TINY, kv_compression=KVCompression("conv", 2, (0,)))
    attention = PixArt(config).initialise().blocks[0].attn
    x = torch.randn(1, 12, config.hidden)
    mean = x.unflatten(1, (2, 3, 2)).mean((1, 3))  # rows, columns, column within the factor
    torch.testing.assert_close(attention.compress(x, (2, 6)), attention.norm(mean))


def test_a_fresh_network_predicts_zero():
    torch.manual_seed(0)
    model, arguments = PixArt(TINY).initialise(), inputs()
    assert model(*arguments).eq(0).all()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_latent_that_cannot_be_cut_is_refused_with_its_size():
    x, t, context = inputs(height=7)
    with pytest.raises(ValueError, match="6x7 cells into patches of 2x2.*multiples of 16"):
        network()(x, t, context)


def test_text_that_does_not_belong_is_refused_with_its_size():
    model, (x, t, context) = network(), inputs()
    with pytest.raises(ValueError, match=r"\(2, 5, 5\).*\(B, L, 6\)"):
        model(x, t, context[..., :5])
    with pytest.raises(ValueError, match="needs the tokens"):
        model(x, t)
    with pytest.raises(ValueError, match="1 texts for 2 latents"):
        model(x, t, context[:1])
    with pytest.raises(ValueError, match=r"mask is \(2, 4\), the text tokens are \(2, 5\)"):
        model(x, t, context, torch.ones(2, 4))


def test_a_dropped_caption_is_cut_to_the_length_of_the_others():
    model, (_, _, context) = network(), inputs(length=3)
    dropped = model.y_embedder.drop(context, torch.tensor([True, False]))
    assert torch.equal(dropped[0], model.y_embedder.y_embedding[:3]) and torch.equal(dropped[1], context[1])
    with pytest.raises(ValueError, match="have 9 tokens, the null caption 5"):
        model.y_embedder.drop(torch.zeros(2, 9, 6), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="stores no null caption"):
        network(replace(TINY, null_caption=False)).y_embedder.drop(context, torch.tensor([True, False]))


@pytest.mark.parametrize("config", [MICRO, replace(TINY, qk_norm=True, kv_compression=KVCompression("conv", 2, (1,)))],
                         ids=["micro", "kv_compression"])
def test_gradient_checkpointing_changes_no_gradient(config):
    def gradients(checkpointing):
        model, net, (x, t, context) = network(config), control_network(config), inputs()
        model.gradient_checkpointing = checkpointing
        model(x, t, context, control=[HintedControlNet(net, 2 * x)]).square().mean().backward()
        return [p.grad for p in (*model.parameters(), *net.parameters())]

    for with_, without in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(with_, without)


def test_under_autocast_the_residual_stream_stays_in_single_precision():
    config = replace(TINY, qk_norm=True, kv_compression=KVCompression("conv", 2, (1,)))
    model, (x, t, context) = network(config), inputs()
    seen = []
    model.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t, context, mask)
    assert seen == [torch.float32]
    single = model(x, t, context, mask)
    assert (out.float() - single).square().mean().sqrt() / single.std() < 0.05


# --- ControlNet

@torch.no_grad()
def test_a_fresh_controlnet_changes_nothing():
    model, (x, t, context) = network(), inputs()
    net = PixArtControlNet(TINY, 2).initialise(model)
    assert torch.equal(model(x, t, context, control=[HintedControlNet(net, x)]), model(x, t, context))
    assert torch.equal(net[1].copied_block.attn.qkv.weight, model.blocks[1].attn.qkv.weight)


@torch.no_grad()
def test_the_strength_scales_the_residuals_where_it_applies():
    model, net, (x, t, context) = network(), control_network(), inputs()
    plain, full = model(x, t, context), model(x, t, context, control=[HintedControlNet(net, 2 * x)])
    assert not torch.allclose(plain, full)
    assert torch.equal(model(x, t, context, control=[HintedControlNet(net, 2 * x, 0.0)]), plain)
    rows = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    mixed = model(x, t, context, control=[HintedControlNet(net, 2 * x, rows.expand(2, 12, 1))])
    torch.testing.assert_close(mixed, torch.cat((full[:1], plain[1:])), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_controlnets_do_not_depend_on_their_order():
    model, (x, t, context) = network(), inputs()
    a = HintedControlNet(control_network(seed=1), 2 * x)
    b = HintedControlNet(control_network(seed=2, blocks=1), -x[:1], 0.5)
    both = model(x, t, context, control=[a, b])
    torch.testing.assert_close(both, model(x, t, context, control=[b, a]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, model(x, t, context, control=[a]))


def test_a_hint_of_another_size_is_refused_with_both():
    model, net, (x, t, context) = network(), control_network(), inputs()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 4\), the latent \(2, 4, 8, 6\)"):
        model(x, t, context, control=[HintedControlNet(net, x[..., :4])])


def test_a_controlnet_with_as_many_blocks_as_the_model_is_refused():
    with pytest.raises(ValueError, match="3 blocks does not fit a PixArt of 3"):
        PixArtControlNet(TINY, 3)


# --- Picture sizes

@pytest.mark.parametrize("side", sorted(buckets.TABLES))
def test_every_size_of_a_table_can_be_drawn(side):
    sizes = buckets.TABLES[side].values()
    assert len(sizes) == 40
    for height, width in sizes:
        assert height % 16 == width % 16 == 0 and 0.87 * side**2 < height * width <= side**2


def test_the_nearest_size_goes_by_height_over_width():
    table = buckets.TABLES[1024]
    assert buckets.nearest(table, 1080, 1920) == (0.57, 768, 1344)
    assert buckets.nearest(table, 3000, 1000) == (3.0, 1728, 576)
    assert buckets.nearest(table, 1, 100) == (0.25, 512, 2048)
    with pytest.raises(ValueError, match="width of 10 and a height of 0"):
        buckets.nearest(table, 0, 10)
