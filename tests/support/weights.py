"""Tiny random weights under the names that the shipped workflows use, so that each of them can run anywhere."""

import json
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import cascade_weights
import numpy
import recorded_pose
import torch
from PIL import Image
from pixstack.models_impl.annotators import pose
from pixstack.models_impl.annotators.hed import HED
from pixstack.models_impl.flux import checkpoint as flux_checkpoint
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.pixart import checkpoint as pixart_checkpoint
from pixstack.models_impl.pixart import key_names
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt, axis_table, position_table
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder import checkpoint as ponder_checkpoint
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.text.t5 import TextEncoder
from pixstack.tools import model_files
from pixstack.trainer.features import tokenizer

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 32  # of the text tokens
EMBEDDED = (
    ("diffusion_models", "pixelflow_emoji_64.safetensors"), ("text_encoders", "pixelflow_emoji_t5.safetensors"),
    ("diffusion_models", "pixelflow_emoji_classes_64.safetensors"),
    ("diffusion_models", "pixart_emoji_128.safetensors"), ("vae", "pixart_emoji_vae.safetensors"),
    ("loras", "pixart_emoji_fluent.safetensors"), ("controlnet", "pixart_emoji_hed.safetensors"),
    ("diffusion_models", "flux_emoji_128.safetensors"), ("vae", "flux_emoji_vae.safetensors"),
    ("controlnet", "pixelponder_emoji.safetensors"),
)  # fmt: skip
OWN = (("loras", "your_pixart_lora.safetensors"), ("loras", "your_flux_lora.safetensors"))
"""Files that no release has and the user must supply."""
DATA_SET = "dataset"  # in input/, for workflows that walk one
PICTURE = "example.png"  # a new ComfyUI has a picture of this name in input/


def tiny_pixelflow(
    path: Path, text: bool = True, num_stages: int = 4, resolution: int = 64, num_classes: int = 1000, names=()
) -> PixelFlowConfig:
    condition = dict(context_dim=WIDTH) if text else dict(num_classes=num_classes)
    config = PixelFlowConfig(
        heads=2, head_dim=8, depth=1, num_stages=num_stages, resolution=resolution, **condition
    )
    torch.manual_seed(0)
    weights = {k: 0.1 * torch.randn_like(v) for k, v in PixelFlow(config).state_dict().items()}
    write_file(path, weights, checkpoint.metadata(config, names))
    return config


def tiny_t5(path: Path) -> TextEncoder:
    torch.manual_seed(0)
    words = tokenizer.train(["a red apple", "the blue car", "a cat"], 40)
    encoder = TextEncoder(
        dict(
            d_model=WIDTH, d_ff=64, d_kv=16, num_heads=2, num_layers=1, vocab_size=words.get_vocab_size(),
            is_gated_act=True, dense_act_fn="gelu_new", relative_attention_num_buckets=32, layer_norm_epsilon=1e-6,
            max_length=64,
        ),
        words,
    )  # fmt: skip
    write_file(path, encoder.weights(), encoder.metadata())
    return encoder


def random_state(net: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(value.shape, generator=generator) for key, value in net.state_dict().items()}


def tiny_pixart_config(**entries) -> PixArtConfig:
    """The released width of a head, so that files without a configuration are recognised."""
    return PixArtConfig(**{**dict(depth=4, hidden=72, heads=1, null_caption=True), **entries})


ALPHA = dict(latent_scale=0.18215, token_limit=120)


def tiny_pixart(path: Path, **entries) -> PixArtConfig:
    """A PixArt as the release stores it when `path` is a .pth, in diffusers' names otherwise (a .bin is torch's)."""
    config = tiny_pixart_config(**entries)
    weights = random_state(PixArt(config))
    if config.sample_size <= 64 and not config.micro_conditions:  # single-scale networks store their positions
        axis = axis_table(config.sample_size // config.patch_size, config.hidden // 2, config.position_range)
        weights["pos_embed"] = position_table(axis, axis)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"state_dict": weights}, path)
    elif path.suffix == ".bin":
        torch.save(key_names.to_diffusers(weights), path)
    else:
        write_file(path, key_names.to_diffusers(weights))
    return config


def tiny_pixart_controlnet(path: Path, blocks: int = 2, **entries) -> PixArtConfig:
    """The release's layout: the base model and the ControlNet in one file."""
    config = tiny_pixart_config(**entries)
    base = {f"base_model.{key}": value for key, value in random_state(PixArt(config)).items()}
    copied = random_state(PixArtControlNet(config, blocks), seed=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {**base, **key_names.to_released_controlnet(copied)}}, path)
    return config


def tiny_pixart_lora(path: Path, rank: int = 4):
    """A LoRA as the official scripts save it: PEFT's names in diffusers' modules, and no alpha."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    tensors = {}
    for block in range(4):
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q"):
            module = f"base_model.model.transformer_blocks.{block}.{name}"
            tensors[f"{module}.lora_A.weight"] = random(rank, 72)
            tensors[f"{module}.lora_B.weight"] = random(72, rank)
    write_file(path, tensors)


T5XXL_SHRUNK = dict(d_ff=16, d_kv=8, num_heads=2)
"""The tests' T5-XXL: as wide and as deep, for ComfyUI 0.3.75 recognises it by that, but nearly empty."""


def tiny_t5xxl(path: Path):
    inner, width = T5XXL_SHRUNK["d_kv"] * T5XXL_SHRUNK["num_heads"], 4096
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (0.05 * torch.randn(*shape, generator=generator)).bfloat16()

    tensors = {"shared.weight": random(32128, width), "encoder.final_layer_norm.weight": torch.ones(width).bfloat16()}
    for block in range(24):
        attention = f"encoder.block.{block}.layer.0."
        for name in "qkv":
            tensors[f"{attention}SelfAttention.{name}.weight"] = random(inner, width)
        tensors[f"{attention}SelfAttention.o.weight"] = random(width, inner)
        tensors[f"{attention}layer_norm.weight"] = torch.ones(width).bfloat16()
        dense = f"encoder.block.{block}.layer.1."
        for name in ("wi_0", "wi_1"):
            tensors[f"{dense}DenseReluDense.{name}.weight"] = random(T5XXL_SHRUNK["d_ff"], width)
        tensors[f"{dense}DenseReluDense.wo.weight"] = random(width, T5XXL_SHRUNK["d_ff"])
        tensors[f"{dense}layer_norm.weight"] = torch.ones(width).bfloat16()
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = random(32, 2)
    write_file(path, tensors)


def is_tiny_t5xxl(tensors: dict) -> bool:
    weight = tensors.get("encoder.block.23.layer.1.DenseReluDense.wi_1.weight")
    return weight is not None and weight.shape[0] == T5XXL_SHRUNK["d_ff"]


CLIP_L_SHRUNK = dict(num_hidden_layers=2, intermediate_size=16)
"""The tests' CLIP-L, of whose width FLUX takes the pooled vector."""


def tiny_clip_l(path: Path):
    width, inner = 768, CLIP_L_SHRUNK["intermediate_size"]
    shapes = {"embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width)}
    norms = ["final_layer_norm"]
    for block in range(CLIP_L_SHRUNK["num_hidden_layers"]):
        layer = f"encoder.layers.{block}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name, shape in (*((f"self_attn.{p}_proj", (width, width)) for p in ("q", "k", "v", "out")),
                            ("mlp.fc1", (inner, width)), ("mlp.fc2", (width, inner))):
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    tensors = {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(width) for name in norms}
    tensors |= {f"{name}.bias": torch.zeros(width) for name in norms}
    write_file(path, {f"text_model.{key}": value.half() for key, value in tensors.items()})


TAESD = {  # part -> its convolutions: index, channels in, channels out, whether it has a bias; the rest are blocks
    "taesd_encoder": ([(0, 3, 64, True), *((i, 64, 64, False) for i in (2, 6, 10)), (14, 64, 4, True)],
                      (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)),
    "taesd_decoder": ([(1, 4, 64, True), *((i, 64, 64, False) for i in (7, 12, 17)), (19, 64, 3, True)],
                      (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)),
}  # fmt: skip


def tiny_vae(path: Path, latent_channels: int = 4):
    """A VAE as TAESD has it: the smallest that core's VAELoader knows, with eight pixels to a latent cell as well.

    Written out, for ComfyUI must not be imported before its host is started.
    """
    shapes = {}
    for part, (convolutions, blocks) in TAESD.items():
        inner = [(f"{index}.conv.{i}", 64, 64, True) for index in blocks for i in (0, 2, 4)]
        for index, channels_in, channels_out, bias in [*convolutions, *inner]:
            channels_in, channels_out = (latent_channels if n == 4 else n for n in (channels_in, channels_out))
            shapes[f"{part}.{index}.weight"] = (channels_out, channels_in, 3, 3)
            if bias:
                shapes[f"{part}.{index}.bias"] = (channels_out,)
    generator = torch.Generator().manual_seed(0)
    write_file(path, {  # small enough that activations stay as they are from layer to layer
        key: 0.7 * torch.randn(shape, generator=generator) / max(1, prod(shape[1:])) ** 0.5
        for key, shape in shapes.items()
    })


FLUX = dict(hidden=128, heads=1, mlp_hidden=512)  # heads as wide as the release's, for its positions need that


def one_norms(weights: dict) -> dict:
    """Random weights, but the scales of norms around 1."""
    return {key: 1 + value if key.endswith("norm.scale") else value for key, value in weights.items()}


def narrow_flux(config: dict | None) -> dict | None:
    """Entries that core detects of a network. For FLUX core assumes 24 heads; the stand-in gets its true number."""
    if config and config.get("image_model") == "flux":
        return {**config, "num_heads": config["hidden_size"] // 128}
    return config


def tiny_flux(path: Path):
    write_file(path, one_norms(random_state(Flux(FluxConfig(**FLUX, depth=3, single_depth=5)), scale=0.08)))


EMOJI = dict(context_dim=192, depth=3, hidden=64, heads=4, sample_size=16, latent_scale=0.18215, token_limit=32)
"""The shape of the embedded PixArt, as far as its T5 and its pictures of 128 pixels require it."""
EMOJI_FLUX = FluxConfig(hidden=64, heads=2, axes=(8, 12, 12), mlp_hidden=256, depth=2, single_depth=2, pooled_dim=8,
                        context_dim=192, guidance=False)


def tiny_emoji(path: Path):
    """A stand-in for an embedded file of PixArt or FLUX, as the trainer exports it."""
    config, metadata = PixArtConfig(**EMOJI), {}
    if path.name.startswith("flux"):
        weights = one_norms(random_state(Flux(EMOJI_FLUX)))
        metadata = flux_checkpoint.metadata(EMOJI_FLUX)
    elif path.name.startswith("pixelponder"):
        config = PixelPonderConfig(replace(EMOJI_FLUX, depth=1, single_depth=1), selector=SelectorConfig(32),
                                   text_tokens=32)
        weights, metadata = one_norms(random_state(PixelPonder(config))), ponder_checkpoint.metadata(config)
    elif path.parent.name == "controlnet":
        weights = key_names.to_released_controlnet(random_state(PixArtControlNet(config, 2)))
        metadata = pixart_checkpoint.metadata_controlnet(config)
    elif path.parent.name == "loras":
        weights = random_state(torch.nn.ModuleDict({
            f"lora_{part}": torch.nn.Linear(*sides, bias=False) for part, sides in (("A", (64, 2)), ("B", (2, 192)))}))
        weights = {f"diffusion_model.blocks.1.attn.qkv.{key}": value for key, value in weights.items()}
    else:
        weights, metadata = random_state(PixArt(config)), pixart_checkpoint.metadata(config)
    write_file(path, weights, metadata)


def tiny_pixelponder(path: Path):
    """A PixelPonder as the release stores it: every single-stream block, though FLUX takes half of them."""
    net = PixelPonder(PixelPonderConfig(FluxConfig(**FLUX, depth=2, single_depth=4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(one_norms(random_state(net, seed=1, scale=0.08)), path)


def tiny_flux_lora(path: Path, rank: int = 2):
    module, generator = "diffusion_model.single_blocks.1.linear1", torch.Generator().manual_seed(3)
    width = 3 * FLUX["hidden"] + FLUX["mlp_hidden"]
    write_file(path, {
        f"{module}.lora_A.weight": 0.1 * torch.randn(rank, FLUX["hidden"], generator=generator),
        f"{module}.lora_B.weight": 0.1 * torch.randn(width, rank, generator=generator),
    })


def tiny_hed(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(HED(), scale=0.05), path)


def tiny_depth(path: Path, **entries):
    """The folder around `path`, a model.safetensors: Depth Anything of 32 channels, with its processor."""
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=4, **entries,
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config)
    torch.manual_seed(0)  # after the model, of whose own random draws the versions of transformers make some or none
    with torch.no_grad():
        for weight in model.parameters():  # as large as trained ones, so that there is something to see
            weight.normal_(std=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path.parent)
    processor = transformers.DPTImageProcessor(size=dict(height=56, width=56), keep_aspect_ratio=True,
                                               ensure_multiple_of=14)
    processor.save_pretrained(path.parent)


PIXART_FILES = {  # beginning of a name -> how small a network stands in for it in the tests
    "PixArt-XL-2-512": dict(**ALPHA, sample_size=64),
    "PixArt-XL-2-1024": dict(**ALPHA, micro_conditions=True),
    "PixArt-LCM": dict(**ALPHA, micro_conditions=True),
    "PixArt-Alpha-DMD": dict(**ALPHA, sample_size=64),
    "PixArt-Sigma-XL-2-2K": dict(sample_size=256),
    "PixArt-Sigma": {},
    "pixart-900m": {},
}


def _pixelflow(path: Path):
    tiny_pixelflow(path, text="c2i" not in path.name, num_stages=3 if "emoji" in path.name else 4)


def _pixart(path: Path):
    entries = next(entries for start, entries in PIXART_FILES.items() if path.name.startswith(start))
    (tiny_pixart_controlnet if "ControlNet" in path.name else tiny_pixart)(path, **entries)


STAND_INS = (  # folder, beginning of a name, what makes a file that loads in its place
    *cascade_weights.STAND_INS,
    *((folder, name, tiny_emoji) for folder, name in EMBEDDED if folder != "vae" and "pixelflow" not in name),
    ("diffusion_models", "pixelflow", _pixelflow),
    ("diffusion_models", "PixArt", _pixart),
    ("diffusion_models", "pixart-900m", _pixart),
    ("diffusion_models", "flux1", tiny_flux),
    ("controlnet", "PixArt", _pixart),
    ("controlnet", "pixelponder", tiny_pixelponder),
    ("loras", "your_flux", tiny_flux_lora),
    ("loras", "", tiny_pixart_lora),
    ("text_encoders", "t5xxl", tiny_t5xxl),
    ("text_encoders", "clip_l", tiny_clip_l),
    ("text_encoders", "", tiny_t5),
    *(("vae", name, partial(tiny_vae, latent_channels=16)) for name in ("ae.", "flux_emoji")),
    ("vae", "", tiny_vae),
    ("annotators", "ControlNetHED", tiny_hed),
    ("annotators", "Depth-Anything", tiny_depth),
)


def picture(path: Path):
    """A wide picture with a transparent rectangle, which LoadImage gives as a mask, and whose sides are edges."""
    rows, columns = numpy.mgrid[0:160, 0:256]
    alpha = numpy.where((rows > 40) & (rows < 120) & (columns > 60) & (columns < 160), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = rows, numpy.where(alpha, columns, 255 - columns // 4), rows ^ columns, alpha
    Image.fromarray(numpy.stack(channels, -1).astype("uint8"), "RGBA").save(path)


def data_set(folder: Path):
    """Two entries of PixelPonder's list."""
    for name in "ab":
        picture(folder / f"{name}.png")
    rows = [json.dumps({"image": f"{name}.png", "text": f"picture {name}"}) for name in "ab"]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")


def place(models: Path, workflow: dict) -> None:
    """Every file to download that `workflow` names, the user's own LoRA, picture and data set, MediaPipe's files, and
    the embedded files if not shipped."""
    files = model_files.read()
    wanted = {(f.folder, f.name) for node in model_files.nodes_of(workflow) for f in model_files.wanted(node, files)}
    wanted |= set(OWN)
    wanted |= {(folder, name) for folder, name in EMBEDDED if not (ROOT / "assets" / folder / name).exists()}
    for folder, name in wanted:
        path = models / folder / name
        if not path.exists():
            next(make for where, start, make in STAND_INS if where == folder and name.startswith(start))(path)
    types = {node["type"] for node in model_files.nodes_of(workflow)}
    for part, file in pose.FILES.items() if "PixStack_FindPoses" in types else ():
        if not (path := models / "annotators" / file.split("/")[-1]).exists():
            recorded_pose.write(path, part)
    if "PixStack_LoadEntry" in types and not (models.parent / "input" / DATA_SET).exists():
        data_set(models.parent / "input" / DATA_SET)
    if not (models.parent / "input" / PICTURE).exists():
        picture(models.parent / "input" / PICTURE)
