"""Files from one program's format to another's: models, ControlNets and LoRAs.

A family takes part by one `Converter` in CONVERTERS for each kind of file; the first whose `matches` says yes does it.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ...models_impl import known_files, lora, state_dict
from ...models_impl.guard import reading
from ...models_impl.pixart import checkpoint as pixart_checkpoint
from ...models_impl.pixart import key_names
from ...models_impl.pixart import lora as pixart_lora
from ...models_impl.pixart.config import PixArtConfig
from ...models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from ...models_impl.ultrapixel import checkpoint as ultrapixel_checkpoint
from ...models_impl.ultrapixel import lora as ultrapixel_lora
from ...models_impl.ultrapixel.config import GuideConfig, StageAConfig
from .exporting import DTYPES

KINDS = ("auto", "model", "controlnet", "lora")
FORMATS = ("original", "diffusers", "comfyui", "kohya")
IN_A_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors",
               "transformer/diffusion_pytorch_model.safetensors")
WRITTEN = (IN_A_FOLDER[2], "config.json", "scheduler_config.json", IN_A_FOLDER[0], "adapter_config.json")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """What is converted, and what the command line said about it."""

    path: Path
    tensors: dict
    metadata: dict[str, str]
    to: str
    weights: str = "ema"
    config: dict = field(default_factory=dict)
    """Entries of the configuration that the file does not say."""
    base: Path | None = None
    alpha: float | None = None
    folder: bool = False
    """Whether what is written is a folder."""


@dataclass(frozen=True)
class Result:
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    found: list[str]
    """What the source turned out to be, in sentences."""
    beside: dict[str, dict] | None = None
    """Files of JSON that diffusers or peft wants beside the weights: name -> content."""
    file: str = IN_A_FOLDER[2]
    """What the weights are called in a folder."""


@dataclass(frozen=True)
class Converter:
    family: str
    kind: str
    formats: tuple[str, ...]
    matches: Callable[[set[str]], bool]
    """By the file's keys."""
    convert: Callable[[Source], Result]


def convert(
    source: Path,
    dest: Path,
    to: str = "comfyui",
    kind: str = "auto",
    dtype: str = "keep",
    overwrite: bool = False,
    weights: str = "ema",
    config: Mapping | None = None,
    base: Path | None = None,
    alpha: float | None = None,
) -> list[str]:
    """Writes `dest` (a .safetensors file; to diffusers a folder too, of models and LoRAs) and returns what was done.

    source: a file, or a folder of PEFT or diffusers. kind: one of KINDS; "model" takes the base out of a ControlNet
    bundle. to: one of FORMATS. dtype: "keep" or a name of `exporting.DTYPES`. weights: "ema" or "model", of a training
    file that has both. config: entries that the file does not say, such as {"variant": "alpha"}. base: the PixArt
    model that a ControlNet bundle gets, or that a LoRA is checked against. alpha: of a LoRA that states none. Raises
    ValueError for a file that no converter takes, and where `dest` must not be written.
    """
    path = _file(source)
    _check_dest(path, dest, to, overwrite)
    tensors, metadata = state_dict.read_file(path)
    keys = set(known_files.names(tensors))
    kind = _kind(keys) if kind == "auto" else kind
    converter = next((c for c in CONVERTERS if c.kind == kind and c.matches(keys)), None)
    if converter is None:
        known = ", ".join(f"{c.family} {c.kind}" for c in CONVERTERS)
        raise ValueError(f"{path.name} is not converted as a {kind}. {known_files.whose(tensors)} There are converters "
                         f"for: {known}.")
    if to not in converter.formats:
        raise ValueError(f"{converter.family} {kind} files have no {to} format; they have "
                         f"{', '.join(converter.formats)}.")
    with reading(path):
        made = converter.convert(Source(path, tensors, metadata, to, weights, dict(config or {}), base, alpha,
                                        not dest.suffix))
    if not dest.suffix and made.beside is None:
        raise ValueError(f"{dest} is a folder, which only a PixArt model or LoRA in the diffusers format is "
                         "written to. Name a .safetensors file.")
    written = {key: _cast(value, dtype) for key, value in made.tensors.items()}
    file = dest if dest.suffix else dest / made.file
    origin = {"format": "pt", "pixstack.converted": json.dumps({"from": path.name, "to": to})}
    state_dict.write_file(file, written, {**made.metadata, **origin})
    if not dest.suffix:
        for name, content in made.beside.items():
            (dest / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [f"{path}: {converter.family} {kind}", *(f"  {line}" for line in made.found),
            f"{file}: {to} names, {_summary(written)}, {file.stat().st_size / 1e6:.1f} MB"]


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    found = [source / name for name in IN_A_FOLDER if (source / name).is_file()]
    if len(found) != 1:
        listed = ", ".join(str(p.relative_to(source)) for p in found) or f"none of {', '.join(IN_A_FOLDER)}"
        raise ValueError(f"{source} is a folder with {listed}. Name the file to convert.")
    return found[0]


def _check_dest(path: Path, dest: Path, to: str, overwrite: bool):
    if dest.suffix not in (".safetensors", "") or (not dest.suffix and to != "diffusers"):
        raise ValueError(f"{dest} must end in .safetensors: nothing else is written.")
    there = [file for file in ([dest] if dest.suffix else [dest / n for n in WRITTEN])
             if file.exists()]
    if any(path.exists() and file.samefile(path) for file in there):
        raise ValueError(f"{path} is the source itself. Name another file to write.")
    if there and not overwrite:
        raise ValueError(f"{there[0]} exists. Name another file to write, or give --overwrite.")


def _kind(keys: set[str]) -> str:
    if lora.is_lora(keys) or ultrapixel_lora.is_personalisation(keys):
        return "lora"
    return next((c.kind for c in CONVERTERS if c.kind != "lora" and c.matches(keys)), "model")


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    # A LoRA's alpha stays as it is: half of a number here would be half of the LoRA.
    return tensor.to(DTYPES[dtype]) if dtype != "keep" and tensor.is_floating_point() and tensor.ndim else tensor


def _summary(tensors: Mapping[str, Tensor]) -> str:
    counts = Counter(DTYPE_NAMES.get(t.dtype, str(t.dtype).removeprefix("torch.")) for t in tensors.values() if t.ndim)
    return f"{len(tensors)} tensors ({', '.join(f'{n} {name}' for name, n in counts.most_common())})"


def _described(config) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.as_dict().items())


# PixArt


def _pixart_model(source: Source) -> Result:
    beside = pixart_checkpoint.beside(source.path)
    config, tensors = pixart_checkpoint.read(source.tensors, source.metadata, source.weights, source.config, beside)
    found = [f"{config.variant}: {_described(config)}"]
    if source.to != "diffusers":
        return Result(tensors, pixart_checkpoint.metadata(config), found)
    if config.null_caption:
        found.append("left out: y_embedder.y_embedding, the null caption of training, which diffusers has no place for")
        config = replace(config, null_caption=False)
    return Result(key_names.to_diffusers(tensors), pixart_checkpoint.metadata(config), found,
                  {"config.json": _diffusers_config(config), "scheduler_config.json": _diffusers_scheduler(config)})


def _diffusers_config(config: PixArtConfig) -> dict:
    """config.json of diffusers' PixArtTransformer2DModel (models/transformers/pixart_transformer_2d.py)."""
    if config.mlp_hidden != 4 * config.hidden or config.qk_norm or config.kv_compression:
        raise ValueError("diffusers' PixArt has feed-forward layers of 4 times the width, no norm of queries and keys, "
                         f"no KV compression; this model has mlp_ratio={config.mlp_ratio:g}, qk_norm={config.qk_norm}, "
                         f"kv_compression={config.kv_compression}.")
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden // config.heads,
        "caption_channels": config.context_dim,
        "cross_attention_dim": config.hidden,
        "in_channels": config.in_channels,
        "interpolation_scale": config.sample_size // config.patch_size / config.position_range,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "use_additional_conditions": config.micro_conditions,
    }


def _diffusers_scheduler(config: PixArtConfig) -> dict:
    """scheduler_config.json of the noise that it was trained on, which diffusers has in a folder `scheduler`."""
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_end": config.beta_end,
        "beta_schedule": config.schedule,
        "beta_start": config.beta_start,
        "num_train_timesteps": 1000,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "solver_order": 2,
    }


def _pixart_controlnet(source: Source) -> Result:
    base = _pixart_base(source.base) if source.base else None
    if base and source.to != "original":
        raise ValueError("Only --to original holds the base model beside a ControlNet; leave --base out for "
                         f"{source.to}.")
    entries = {**(base[0].as_dict() if base else {}), **source.config}
    config, blocks, net = pixart_checkpoint.read_controlnet(source.tensors, source.metadata, source.weights, entries)
    found = [f"{blocks} blocks for {config.variant}: {_described(config)}"]
    bundled = sum("base_model." in key for key in known_files.names(source.tensors))
    if bundled:
        found.append(f"its base model ({bundled} tensors) " + ("is replaced by --base" if base else "is left out"))
    if source.to == "diffusers":
        tensors = key_names.to_diffusers_controlnet(net)
    else:
        tensors = key_names.to_released_controlnet(net)
        if base:
            found.append(f"with the base model {source.base} ({len(base[1])} tensors)")
            tensors |= {f"base_model.{key}": value for key, value in base[1].items()}
    return Result(tensors, pixart_checkpoint.metadata_controlnet(config), found)


def _pixart_base(path: Path):
    tensors, metadata = state_dict.read_file(path)
    return pixart_checkpoint.read(tensors, metadata, beside=pixart_checkpoint.beside(path))


def _pixart_lora(source: Source) -> Result:
    if source.base:
        names = pixart_lora.names({key: value.shape for key, value in _pixart_base(source.base)[1].items()})
    else:
        names = pixart_lora.guessed_names(source.tensors)
    read = lora.read(source.tensors, names, source.metadata, lora.beside(source.path), source.alpha)
    tensors = lora.write(read, names, source.to)
    found = [f"{len(read.layers)} layers", *read.notes]
    if read.text_encoder:
        found.append(f"{len(read.text_encoder)} keys of the text encoder are "
                     + ("left out; a .safetensors file keeps them" if source.folder else "copied as they are"))
    if source.folder:
        return Result(_in_peft(tensors), {}, found, {"adapter_config.json": _peft_config(tensors)}, IN_A_FOLDER[0])
    tensors |= {key: source.tensors[key] for key in read.text_encoder}
    kept = {k: v for k, v in source.metadata.items() if k not in ("format", lora.METADATA_KEY)}
    return Result(tensors, {**kept, "pixstack.family": "pixart_lora"}, found)


def _in_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in tensors.items()}


def _peft_config(tensors: dict[str, Tensor]) -> dict:
    """adapter_config.json of peft's LoraConfig, under which the tensors of the diffusers format count once."""
    down, dora = ".lora_A.weight", ".lora_magnitude_vector"
    ranks = {key.removeprefix("transformer.").removesuffix(down): value.shape[0]
             for key, value in tensors.items() if key.endswith(down)}
    other = [key for key in tensors if not key.endswith((down, ".lora_B.weight", dora))]
    lengths = sum(key.endswith(dora) for key in tensors)
    if other or lengths not in (0, len(ranks)):
        raise ValueError(f"a folder of peft holds one LoRA or DoRA, and this file has other layers ("
                         f"{other[0] if other else 'some are DoRA, some not'}). Name a .safetensors file.")
    return {
        "peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": max(ranks.values()), "rank_pattern": ranks,
        "alpha_pattern": ranks, "target_modules": sorted(ranks), "use_dora": bool(lengths), "lora_dropout": 0.0,
        "bias": "none", "base_model_name_or_path": None, "task_type": None, "inference_mode": True,
    }


def _is_pixart(keys: set[str]) -> bool:
    keys = {key.removeprefix("module.") for key in keys}
    base = {key.removeprefix("base_model.") for key in keys if key.startswith("base_model.")}  # of a ControlNet bundle
    return known_files.family_of(base or keys) == "PixArt"


def _is_pixart_controlnet(keys: set[str]) -> bool:
    return any(".copied_block.attn" in key or ".transformer_block.attn1" in key for key in keys)


# PixelFlow


def _pixelflow_model(source: Source) -> Result:
    beside = pixelflow_checkpoint.config_beside(source.path)
    config, tensors = pixelflow_checkpoint.read(source.tensors, source.metadata, source.weights, source.config, beside)
    return Result(tensors, pixelflow_checkpoint.metadata(config), [_described(config)])


def _is_pixelflow(keys: set[str]) -> bool:
    return known_files.family_of(keys) == "PixelFlow"


# UltraPixel


def _cascade_model(source: Source) -> Result:
    """The guide, or Stage C, B or A of Stable Cascade."""
    config, tensors = ultrapixel_checkpoint.read(source.tensors, source.metadata, source.config)
    given = ultrapixel_checkpoint.unwrap(source.tensors)
    what = known_files.family_of(given)
    found = [f"{what}: {_described(config)}"]
    if isinstance(config, GuideConfig):
        if source.to == "original":
            tensors = ultrapixel_checkpoint.released_guide_names(tensors)
    elif isinstance(config, StageAConfig):
        codebook = {key: value for key, value in given.items() if key.startswith("vquantizer.")}
        tensors = tensors | codebook
        if not codebook:
            found.append("it has no codebook, by which ComfyUI's own Load VAE knows a Stage A: take Load UltraPixel "
                         "Stage A")
    elif source.to == "original":
        tensors = ultrapixel_checkpoint.released_attention_names(tensors)
    else:
        tensors = ultrapixel_checkpoint.core_attention_names(tensors)
    before, after = (sum(t.numel() for t in table.values()) for table in (given, tensors))
    if after < before:
        found.append(f"left out: {before - after:,} of {before:,} values, which are not used by {what}")
    return Result(tensors, ultrapixel_checkpoint.metadata(config), found)


def _personalisation(source: Source) -> Result:
    config = None
    if source.base:
        config = ultrapixel_checkpoint.read_stage_c(*state_dict.read_file(source.base))[0]
    stated = {name: str(source.config.pop(name)) for name in ("token", "token_base") if name in source.config}
    if source.config:
        raise ValueError(f"{', '.join(source.config)} means nothing for a personalisation; token and token_base do.")
    metadata = source.metadata | {f"pixstack.{name}": value for name, value in stated.items()}
    read = ultrapixel_lora.read(source.tensors, metadata, config, source.alpha or ultrapixel_lora.ALPHA)
    rank = next(iter(read.layers.values()))[1].shape[0]
    found = [f"{len(read.layers)} layers of Stage C, rank {rank}, scale {read.scale:g}"]
    if read.token_rows:
        named = read.token or "not named in the file: say token=[name] and token_base=^word</w>, which it began as"
        found.append(f"its token, row {read.token_rows[0]} of the text encoder: {named}")
        if not read.token_change.any():
            found.append("the token's change is zero: it was not trained, and stands for the word that it began as")
    written = {"original": ultrapixel_lora.to_released, "comfyui": ultrapixel_lora.to_core,
               "kohya": ultrapixel_lora.to_kohya}[source.to]
    return Result(*written(read), found)


def _is_cascade(keys: set[str]) -> bool:
    return ultrapixel_checkpoint.kind(dict.fromkeys(keys)) in ("guide", "stage_a", "stage_b", "stage_c")


CONVERTERS = (
    Converter("PixArt", "controlnet", ("original", "diffusers", "comfyui"), _is_pixart_controlnet, _pixart_controlnet),
    Converter("PixArt", "model", ("original", "diffusers", "comfyui"), _is_pixart, _pixart_model),
    Converter("UltraPixel", "lora", ("original", "comfyui", "kohya"), ultrapixel_lora.is_personalisation,
              _personalisation),
    Converter("UltraPixel", "model", ("original", "comfyui"), _is_cascade, _cascade_model),
    Converter("PixArt", "lora", FORMATS, lora.is_lora, _pixart_lora),
    Converter("PixelFlow", "model", ("original", "comfyui"), _is_pixelflow, _pixelflow_model),
)
