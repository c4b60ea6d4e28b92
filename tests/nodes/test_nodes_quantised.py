"""Quantised files inside a real ComfyUI: what its own operations compute with, what is dequantised, what is refused."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec

import pytest
import quantised_files as made
import test_nodes_pixart as on_pixart
import test_nodes_pixelflow as on_pixelflow
import test_nodes_pixelponder as on_ponder
import torch
from pixstack.models_impl.pixart import checkpoint as pixart_checkpoint
from pixstack.models_impl.pixart import key_names
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder import checkpoint as ponder_checkpoint
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.state_dict import write_file
from test_nodes_pixart import art  # noqa: F401
from test_nodes_pixelflow import flow  # noqa: F401
from test_nodes_pixelponder import flux  # noqa: F401
from test_nodes_text import encode, text  # noqa: F401
from transformers import T5Config, T5EncoderModel
from weights import T5XXL_SHRUNK, random_state

ART = PixArtConfig(depth=3, hidden=288, heads=4, context_dim=64, null_caption=True, sample_size=16)
FLOW = PixelFlowConfig(heads=4, head_dim=48, depth=1, num_stages=3, resolution=64, context_dim=32)
BY_COMFYUI = {  # format of a file -> what ComfyUI calls it
    "scaled_fp8": "float8_e4m3fn", "comfy_fp8": "float8_e4m3fn", "comfy_fp8_e5m2": "float8_e5m2",
    "comfy_int8": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
OTHERS = ["quanto", "fp8_rows", *(["bitsandbytes_nf4"] if find_spec("bitsandbytes") else [])]
EVERY = [*BY_COMFYUI, *OTHERS]
EXACT = 1e-4
INT8 = 0.1  # of the norm; its operations round the activations to 8 bits too: 0.007 to 0.052 were measured


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    """Weights are loaded and used in this mode there, and its quantised tensors are made for it."""
    with torch.inference_mode():
        yield


def stored_in(layer) -> torch.dtype:
    """What a weight is kept in on the device. Until it is moved, it may be as in the file."""
    return getattr(layer, "weight_comfy_model_dtype", layer.weight.dtype)


def runs(format: str) -> bool:
    """Whether the ComfyUI of this test run has operations for it."""
    known = import_module("comfy.quant_ops")
    return getattr(known, "_CK_AVAILABLE", True) and BY_COMFYUI.get(format) in known.QUANT_ALGOS


def stays(module) -> bool:
    """Whether the weight of a layer is in few bits."""
    return isinstance(module.weight, import_module("comfy.quant_ops").QuantizedTensor)


def compare(found, expected, format):
    if runs(format) and format == "comfy_int8":
        assert 0 < (found - expected).norm() < INT8 * expected.norm()
    else:
        assert (found - expected).abs().max() < EXACT * expected.abs().max()


def place(folder, name, tensors, metadata, format, chosen=made.in_blocks):
    """Writes {format}_{name} and, of the same numbers, whole_{name}."""
    packed, whole = made.quantised(tensors, format, chosen)
    assert len(packed) > len(whole)
    for prefix, file in ((format, packed), ("whole", whole)):
        write_file(folder / f"{prefix}_{name}", file, metadata)
    import_module("folder_paths").filename_list_cache.clear()
    return f"{format}_{name}", f"whole_{name}"


# --- Models

def pixart(art, format, name="pixart.safetensors", tensors=None, **inputs):  # noqa: F811
    files = place(art.host.models / "diffusion_models", name, random_state(PixArt(ART)) if tensors is None else tensors,
                  pixart_checkpoint.metadata(ART), format)
    inputs = {"dtype": "default", **inputs}
    return on_pixart.load(art, files[0], **inputs), on_pixart.load(art, files[1])


def drawn(art, model, both=None):  # noqa: F811
    rng = torch.Generator().manual_seed(2)
    prompts = [[[torch.randn(1, length, 64, generator=rng), {}]] for length in (6, 3)] if both is None else both
    return on_pixart.draw(art, model, *prompts, on_pixart.sampler(art), on_pixart.sigmas(art, model))


@pytest.mark.parametrize("format", EVERY)
def test_pixart_draws_from_a_quantised_file_what_its_numbers_draw(art, format):  # noqa: F811
    model, whole = pixart(art, format)
    assert stays(model.model.diffusion_model.blocks[0].mlp.fc1) == runs(format)
    compare(drawn(art, model), drawn(art, whole), format)


@pytest.mark.parametrize("format", ["scaled_fp8", "nvfp4"])
def test_layers_that_a_diffusers_file_has_in_parts_are_made_whole(art, format):  # noqa: F811
    tensors = key_names.to_diffusers(random_state(PixArt(ART)))
    model, whole = pixart(art, format, "parts.safetensors", tensors)
    block = model.model.diffusion_model.blocks[0]
    assert not stays(block.attn.qkv) and stays(block.mlp.fc1) == runs(format)
    compare(drawn(art, model), drawn(art, whole), format)


@pytest.mark.parametrize("dtype, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_dtype_of_more_bits_makes_a_quantised_file_whole(art, dtype, kind):  # noqa: F811
    model, whole = pixart(art, "scaled_fp8", dtype=dtype)
    found, expected = (m.model.diffusion_model.blocks[0].mlp.fc1.weight.detach() for m in (model, whole))
    assert found.dtype == kind and torch.equal(found, expected.to(kind))


def test_the_log_says_what_became_of_the_weights(art, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO):
        pixart(art, "scaled_fp8")
    count = sum(made.in_blocks(*entry) for entry in PixArt(ART).state_dict().items())
    assert f"scaled_fp8_pixart.safetensors: {count} weights are quantised (scaled fp8)" in caplog.text
    assert f"of {count} quantised weights {count} stay so in ComfyUI's operations, 0 are dequantised" in caplog.text


@pytest.mark.parametrize("format", ["scaled_fp8", "nvfp4", "quanto"])
def test_a_lora_changes_a_quantised_pixart_as_it_changes_the_plain_one(art, format):  # noqa: F811
    model, whole = pixart(art, format, f"lora_{format}.safetensors")
    lora, rng = {}, torch.Generator().manual_seed(4)
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"):
        key = f"base_model.model.transformer_blocks.0.{name}"
        lora[f"{key}.lora_A.weight"] = torch.randn(4, 288, generator=rng)
        lora[f"{key}.lora_B.weight"] = torch.randn(288, 4, generator=rng)
    write_file(art.host.models / "loras" / "quantised_lora.safetensors", lora)
    import_module("folder_paths").filename_list_cache.clear()
    plain = drawn(art, whole)
    changed = []
    for one in (model, whole):
        patched = on_pixart.run(art, "LoraLoader", model=one, lora_name="quantised_lora.safetensors", strength=0.3,
                                alpha=0.0)[0]
        changed.append(drawn(art, patched))
    # ComfyUI quantises a changed weight again, with its own rounding.
    error, effect = (changed[0] - changed[1]).norm(), (changed[1] - plain).norm()
    assert error < (0.5 if runs(format) else EXACT) * effect


@pytest.mark.parametrize("format", ["scaled_fp8", "nvfp4", "comfy_int8", "quanto"])
def test_pixelflow_draws_from_a_quantised_file_what_its_numbers_draw(flow, format):  # noqa: F811
    files = place(flow.host.models / "diffusion_models", "pixelflow.safetensors", random_state(PixelFlow(FLOW)),
                  pixelflow_checkpoint.metadata(FLOW), format)
    model, whole = (on_pixelflow.load(flow, name) for name in files)
    assert stays(model.model.diffusion_model.transformer_blocks[0].mlp.fc1) == runs(format)
    compare(on_pixelflow.draw(flow, model), on_pixelflow.draw(flow, whole), format)


# --- ControlNets

@pytest.mark.parametrize("format", ["scaled_fp8", "nvfp4", "comfy_int8", "quanto"])
def test_a_quantised_pixart_controlnet_guides_as_its_numbers_do(art, format):  # noqa: F811
    _, model = pixart(art, "scaled_fp8")
    net = key_names.to_released_controlnet(random_state(PixArtControlNet(ART, 2), seed=1))
    files = place(art.host.models / "controlnet", "pixart_net.safetensors", net,
                  pixart_checkpoint.metadata_controlnet(ART), format,
                  lambda key, value: value.ndim == 2 and "mlp" in key or made.in_blocks(key, value))
    rng = torch.Generator().manual_seed(2)
    prompts = [[[torch.randn(1, length, 64, generator=rng), {}]] for length in (6, 3)]
    pictures = []
    for name in files:
        control = on_pixart.run(art, "ControlNetLoader", control_net_name=name, dtype="default")[0]
        if name == files[0]:
            assert stays(control.net_patcher.model[0].copied_block.mlp.fc1) == runs(format)
        both = on_pixart.run(art, "ControlNetApply", positive=prompts[0], negative=prompts[1], control_net=control,
                             latent={"samples": on_pixart.noise_of(1, 4, 8, 12, seed=8)}, strength=1.0,
                             start_percent=0.0, end_percent=1.0)
        pictures.append(drawn(art, model, both))
    compare(*pictures, format)
    assert (pictures[1] - drawn(art, model, prompts)).norm() > 0.01 * pictures[1].norm()


@pytest.mark.parametrize("format", ["scaled_fp8", "nvfp4", "comfy_int8", "quanto"])
def test_a_quantised_pixelponder_guides_as_its_numbers_do(flux, format):  # noqa: F811
    config = on_ponder.PONDER
    files = place(flux.host.models / "controlnet", "ponder.safetensors", on_ponder.state(PixelPonder(config), 2),
                  ponder_checkpoint.metadata(config), format)
    pictures = []
    for name in files:
        control = on_ponder.load(flux, name, selection_network="leave out", dtype="default")
        if name == files[0]:
            assert stays(control.net_patcher.model.double_blocks[0].img_mlp[0]) == runs(format)
        positive, negative = on_ponder.apply(flux, on_ponder.several(flux, "canny", "depth"), control=control)
        pictures.append(on_ponder.draw(flux, positive, negative))
    compare(*pictures, format)


# --- T5

@pytest.fixture(scope="module")
def t5() -> dict:
    torch.manual_seed(0)
    net = T5EncoderModel(T5Config(d_model=64, d_ff=512, d_kv=16, num_heads=4, num_layers=2,
                                  feed_forward_proj="gated-gelu", vocab_size=32128))
    return {key: value.detach().clone() for key, value in net.state_dict().items() if "embed_tokens" not in key}


@pytest.mark.parametrize("format", EVERY)
def test_a_quantised_t5_encodes_as_its_numbers_do(text, host, t5, format):  # noqa: F811
    files = place(host.models / "text_encoders", "t5.safetensors", t5, None, format,
                  lambda key, value: "wi_" in key or key == "shared.weight" and format not in ("mxfp8", "nvfp4"))
    ours, right = (text.load(name) for name in files)
    assert stays(ours.cond_stage_model.t5.transformer.encoder.block[0].layer[1].DenseReluDense.wi_0) == runs(format)
    compare(encode(ours, "a red apple"), encode(right, "a red apple"), format)


def test_a_scaled_t5_may_be_made_whole_in_another_dtype(text, host, t5):  # noqa: F811
    names = place(host.models / "text_encoders", "t5_dtype.safetensors", t5, None, "scaled_fp8",
                  lambda key, value: "DenseReluDense" in key)
    clip = text.load(names[0], dtype="fp16")
    weight = clip.cond_stage_model.t5.transformer.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert type(weight.data) is torch.Tensor and weight.dtype == torch.float16


# --- Refusals

@pytest.mark.parametrize("node, entry, folder, more", [
    ("PixArtLoader", "model_name", "diffusion_models",
     dict(variant="auto", prediction="auto", positions="auto", weights="ema", dtype="default")),
    ("PixelFlowLoader", "model_name", "diffusion_models", dict(weights="ema", dtype="default")),
    ("FluxLoader", "model_name", "diffusion_models", dict(dtype="default")),
    ("CascadeLoader", "model_name", "diffusion_models", dict(dtype="default")),
    ("PixArtControlNetLoader", "control_net_name", "controlnet", dict(dtype="default")),
    ("PixelPonderLoader", "control_net_name", "controlnet", dict(dtype="default", selection_network="leave out")),
    ("PixelFlowTextEncoderLoader", "encoder_name", "text_encoders", dict(dtype="default", device="default")),
    ("UltraPixelGuideLoader", "guide_name", "model_patches", {}),
    ("UltraPixelStageALoader", "vae_name", "vae", dict(dtype="default")),
])  # fmt: skip
@pytest.mark.parametrize("said", ["SVDQuant (Nunchaku)", "is a GGUF file"])
def test_every_loader_names_a_format_that_it_cannot_read(host, node, entry, folder, more, said):
    name = f"refused_{'gguf' if 'GGUF' in said else 'svdquant'}.safetensors"
    path = host.models / folder / name
    if "GGUF" in said:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF" + bytes(60))
    else:
        write_file(path, {f"blocks.0.attn.qkv.{end}": torch.zeros(4, 4) for end in ("qweight", "wscales")})
    import_module("folder_paths").filename_list_cache.clear()
    with pytest.raises(ValueError) as caught:
        import_module("nodes").NODE_CLASS_MAPPINGS[f"PixStack_{node}"].execute(**{entry: name, **more})
    assert str(caught.value).startswith(name) and said in str(caught.value)


# --- Multiplying in fp8

def operations(model):
    return type(model.model.diffusion_model.blocks[0].mlp.fc1)


@pytest.mark.parametrize("able", [True, False])
def test_fp8_e4m3fn_fast_takes_core_s_fp8_operations_where_the_device_can(art, able, monkeypatch, caplog):  # noqa: F811
    ops = import_module("comfy.ops")
    monkeypatch.setattr(import_module("comfy.model_management"), "supports_fp8_compute", lambda device=None: able)
    _, whole = pixart(art, "scaled_fp8")
    fast, stored = (on_pixart.load(art, "whole_pixart.safetensors", dtype=dtype)
                    for dtype in ("fp8_e4m3fn_fast", "fp8_e4m3fn"))
    assert operations(fast) is (ops.fp8_ops if able else ops.manual_cast).Linear
    assert operations(stored) is ops.manual_cast.Linear
    assert stored_in(fast.model.diffusion_model.blocks[0].mlp.fc1) == torch.float8_e4m3fn
    with caplog.at_level(logging.INFO):
        pictures = [drawn(art, model) for model in (fast, stored, whole)]
    assert "Exception during fp8 op" not in caplog.text
    assert torch.equal(pictures[0], pictures[1]) != able  # it does multiply in fp8
    for picture in pictures[:2]:
        assert torch.nn.functional.cosine_similarity(picture.flatten(), pictures[2].flatten(), dim=0) > 0.95


def test_pixelflow_has_fp8_e4m3fn_fast_too(flow, monkeypatch):  # noqa: F811
    monkeypatch.setattr(import_module("comfy.model_management"), "supports_fp8_compute", lambda device=None: True)
    model = on_pixelflow.load(flow, on_pixelflow.TEXT, dtype="fp8_e4m3fn_fast")
    kind = type(model.model.diffusion_model.transformer_blocks[0].mlp.fc1)
    assert kind is import_module("comfy.ops").fp8_ops.Linear


@pytest.mark.parametrize("node", ["PixArtLoader", "PixelFlowLoader"])
def test_the_new_dtype_is_the_last_so_that_saved_workflows_keep_theirs(host, node):
    (options,) = (entry.options for entry in
                  import_module("nodes").NODE_CLASS_MAPPINGS[f"PixStack_{node}"].define_schema().inputs
                  if entry.id == "dtype")
    assert options == ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fn_fast"]


# --- GGUF

class Q8(torch.Tensor):
    """32 weights a block, each with a float16 scale, as ComfyUI-GGUF wraps them: bytes that say the shape they stand
    for. A stand-in of the kind of its tensors, not its code."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Q8:
        blocks = weight.float().reshape(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        codes = (blocks / scale.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
        made = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1).as_subclass(cls)
        made.stands_for = weight.shape
        return made

    @property
    def shape(self):
        return getattr(self, "stands_for", self.size())

    def whole(self) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        scale, codes = plain[:, :2].contiguous().view(torch.float16), plain[:, 2:].contiguous().view(torch.int8)
        return (codes.float() * scale.float()).reshape(self.stands_for).bfloat16()


def q8_operations():
    cast = import_module("comfy.ops").manual_cast

    class Q8Operations(cast):
        class Linear(cast.Linear):
            def _load_from_state_dict(self, state, prefix, *rest):
                weight = state.pop(f"{prefix}weight")
                self.packed, self.weight = weight, torch.nn.Parameter(weight.as_subclass(torch.Tensor), False)
                super()._load_from_state_dict({**state, f"{prefix}weight": self.weight}, prefix, *rest)

            def forward(self, x):
                return torch.nn.functional.linear(x, self.packed.whole().to(x.dtype))

    return Q8Operations


def test_a_t5_whose_weights_are_wrapped_like_gguf_s_encodes_prompts_for_pixart(art):  # noqa: F811
    """ComfyUI-GGUF loads a T5 by core's function with operations of its own: what comes out is core's CLIP."""
    sd, file = import_module("comfy.sd"), art.host.models / "text_encoders" / on_pixart.T5XXL
    plain, wrapped, rounded = import_module("comfy.utils").load_torch_file(str(file)), {}, {}
    for key, value in plain.items():
        linear = value.ndim == 2 and "shared" not in key and "relative" not in key
        wrapped[key] = Q8.of(value) if linear else value
        rounded[key] = wrapped[key].whole() if linear else value
    clips = []
    for tensors, more in ((wrapped, {"custom_operations": q8_operations()}), (rounded, {})):
        clips.append(sd.load_text_encoder_state_dicts(
            [tensors], clip_type=sd.CLIPType.PIXART, model_options={"t5xxl_model_config": T5XXL_SHRUNK, **more}))
    prompts = [[on_pixart.run(art, "TextEncode", clip=clip, text="a red apple", tokens="auto", clean_caption=False)[0],
                art.core.CLIPTextEncode().encode(clip, "a red apple")[0]] for clip in clips]
    for (ours, _), (expected, _) in zip((row[0] for row in prompts[0]), (row[0] for row in prompts[1]), strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < EXACT * expected.abs().max()
    picture = on_pixart.draw(art, art.sigma, prompts[0][0], prompts[0][1], on_pixart.sampler(art),
                             on_pixart.sigmas(art, art.sigma))
    assert picture.isfinite().all()
