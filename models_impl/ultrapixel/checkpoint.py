"""The files of UltraPixel and Stable Cascade: the guide, Stage C, B and A, the semantic encoder and the ControlNets."""
from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..guard import shape_of
from ..known_files import WrongFile
from ..state_dict import config_metadata, metadata_config, refuse_contradictions, unwrapped
from .config import (
    ControlNetConfig,
    GuideConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from .effnet import EffnetConfig

FAMILY = "ultrapixel"
HEAD_DIM = 64  # of every released Stage C and B; not in keys or shapes
GUIDE_HEAD_DIM = 32
MOST_LEVELS = 16  # of blocks of one width
RELEASED_BLOCKS = ControlNetConfig().blocks
PARTS = {
    StageCConfig: "stage_c", StageBConfig: "stage_b", StageAConfig: "stage_a", GuideConfig: "guide",
    ControlNetConfig: "controlnet",
}
# module.64.0.wtokens or 64.0.wtokens: the release, a list of 64 empty modules before the two; agg_net.0.wtokens: ours
GUIDE = re.compile(r"(?:module\.)?(agg_net_up|agg_net|\d{1,6})\.(\d{1,6})\.(.+)$")
DEAD = {  # stored and used by nothing
    "guide": re.compile(r"hr_norm\.(alpha|gamma)\."),
    "stage_c": re.compile(r"(?:module\.)?(agg_net|agg_net_up|norm_down_blocks|norm_up_blocks|train_norm|\d+)\."),
    "stage_a": re.compile(r"vquantizer\."),
}
FUSED = re.compile(r"(.*\.attn\.)in_proj_(weight|bias)$")
SPLIT = re.compile(r"(.*\.attn\.)to_q\.(weight|bias)$")  # ComfyUI's Stage C and B

State = tuple[object, dict[str, Tensor]]
Metadata = Mapping[str, str] | None


def metadata(config) -> dict[str, str]:
    """Metadata of our exported safetensors."""
    return config_metadata(f"{FAMILY}.{PARTS[type(config)]}", config.as_dict())


def _stated(cls: type, file: Metadata, config: Mapping | None) -> dict:
    return {**cls.entries_of(metadata_config(file or {}, f"{FAMILY}.{PARTS[cls]}", cls) or {}),
            **cls.entries_of(config or {})}


def _checked(cls: type, stated: dict, shapes: dict):
    """The configuration that follows from the shapes, completed by the stated entries."""
    refuse_contradictions(shapes, stated)
    return cls(**{**stated, **shapes})


def _refuse(tensors: Mapping, what: str):
    raise WrongFile(f"This is not {what}.", tensors)


def unwrap(tensors: Mapping) -> dict:
    """The weights, out of the table and without the prefixes of other programs."""
    return unwrapped(tensors, ("state_dict",))


# --- Stage C and Stage B

def attention_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`in_proj_weight` as torch stores it, or `to_q`, `to_k`, `to_v` as ComfyUI does -> `in_proj.weight`."""
    joined = {}
    for key, tensor in tensors.items():
        fused, split = FUSED.match(key), SPLIT.match(key)
        if fused:
            joined[f"{fused[1]}in_proj.{fused[2]}"] = tensor
        elif split:
            parts = [tensors[f"{split[1]}{part}.{split[2]}"] for part in ("to_q", "to_k", "to_v")]
            joined[f"{split[1]}in_proj.{split[2]}"] = torch.cat(parts)
        elif not re.search(r"\.attn\.to_[kv]\.(weight|bias)$", key):
            joined[key] = tensor
    return joined


def released_attention_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`in_proj.weight` -> `in_proj_weight`, as the released files have it."""
    return {re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", key): tensor for key, tensor in tensors.items()}


def core_attention_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`in_proj.weight` -> `to_q.weight`, `to_k.weight`, `to_v.weight`, as ComfyUI's Stage C and B have it."""
    split = {}
    for key, tensor in tensors.items():
        name, fused, kind = key.partition(".in_proj.")
        split |= {f"{name}.to_{part}.{kind}": t.clone() for part, t in zip("qkv", tensor.chunk(3), strict=True)
                  } if fused else {key: tensor}
    return split


def read_stage_c(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    """(StageCConfig, weights) of a released, core or own file, or of a live UltraPixel model, whose guide is left out.

    config: entries, under our names or the reference's, that keys and shapes do not determine.
    """
    tensors = unwrap(tensors)
    if "clip_txt_mapper.weight" not in tensors:
        _refuse(tensors, "a Stage C of Stable Cascade")
    tensors = attention_names({key: value for key, value in tensors.items() if not DEAD["stage_c"].match(key)})
    stated = _stated(StageCConfig, metadata, config)
    shapes = _cascade(tensors, stated, StageCConfig.patch_size)
    context, text = shape_of(tensors, "clip_txt_mapper.weight", 2)
    pooled, pooled_dim = shape_of(tensors, "clip_txt_pooled_mapper.weight", 2)
    shapes.update(context_dim=context, text_dim=text, pooled_dim=pooled_dim, pooled_tokens=pooled // context,
                  image_dim=shape_of(tensors, "clip_img_mapper.weight", 2)[1])
    stated.setdefault("switch", (False,) * (len(shapes["hidden"]) - 1))
    return _checked(StageCConfig, stated, shapes), tensors


def read_stage_b(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    tensors = unwrap(tensors)
    if "effnet_mapper.0.weight" not in tensors:
        _refuse(tensors, "a Stage B of Stable Cascade")
    tensors = attention_names(tensors)
    stated = _stated(StageBConfig, metadata, config)
    shapes = _cascade(tensors, stated, StageBConfig.patch_size)
    context = next((t.shape[1] for key, t in tensors.items() if key.endswith("kv_mapper.1.weight")),
                   stated.get("context_dim", StageBConfig.context_dim))
    pooled, pooled_dim = shape_of(tensors, "clip_mapper.weight", 2)
    shapes.update(context_dim=context, pooled_dim=pooled_dim, pooled_tokens=pooled // context,
                  semantic_channels=shape_of(tensors, "effnet_mapper.0.weight", 4)[1],
                  pixel_channels=shape_of(tensors, "pixels_mapper.0.weight", 4)[1])
    return _checked(StageBConfig, stated, shapes), tensors


def _cascade(tensors: Mapping[str, Tensor], stated: dict, released_patch_size: int) -> dict:
    """The entries that keys and shapes of a Stage C or B give; completes `stated` with those of the released nets."""

    def strings(direction: str) -> tuple[str, ...]:
        kinds: dict[int, dict[int, str]] = {}
        for key in tensors:
            match = re.match(rf"{direction}_blocks\.(\d{{1,6}})\.(\d{{1,6}})\.(\w+)", key)
            if match:
                level = kinds.setdefault(int(match[1]), {})
                kind = {"depthwise": "C", "attention": "A", "kv_mapper": "A", "channelwise": "F"}.get(match[3], "T")
                if level.get(int(match[2])) != "C":  # a ResBlock has the MLP of a feed-forward block too
                    level[int(match[2])] = kind
        return tuple("".join(kinds[i][j] for j in sorted(kinds[i])) for i in sorted(kinds))

    def repeats(direction: str, levels: int) -> tuple[int, ...]:
        return tuple(1 + sum(f"{direction}_repeat_mappers.{i}.{j}.weight" in tensors for j in range(len(tensors)))
                     if f"{direction}_repeat_mappers.{i}.0.weight" in tensors else 1 for i in range(levels))

    down, up = strings("down"), strings("up")
    levels = len(down)
    if levels > MOST_LEVELS:
        raise ValueError(f"This file has {levels:,} levels of blocks, the released networks 2 and 4: it is damaged, or "
                         "of another model.")

    def width(level: int) -> int:
        for key, tensor in tensors.items():
            if key.startswith(f"down_blocks.{level}."):
                if key.endswith((".depthwise.weight", ".out_proj.weight", ".channelwise.4.weight")):
                    return tensor.shape[0]
                if key.endswith(".mapper.weight"):
                    return tensor.shape[0] // 2
        raise ValueError(f"Level {level} has no block whose width could be read.")

    hidden = tuple(width(level) for level in range(levels))
    mapper = next((t for key, t in tensors.items() if key.endswith("_blocks.0.1.mapper.weight")),
                  next((t for key, t in tensors.items() if re.search(r"\.\d+\.mapper\.weight$", key)), None))
    kernel = next((t for key, t in tensors.items() if key.endswith(".depthwise.weight")), None)
    patch_size = stated.setdefault("patch_size", released_patch_size)
    stated.setdefault("heads", tuple(
        width // HEAD_DIM if "A" in down[i] + up[levels - 1 - i] else -1 for i, width in enumerate(hidden)
    ))
    stated.setdefault("self_attention", (True,) * levels)
    stated.setdefault("dropout", tuple(0.1 if "A" in down[i] else 0.0 for i in range(levels)))
    from_shapes = dict(
        hidden=hidden, down=down, up=up, down_repeats=repeats("down", levels), up_repeats=repeats("up", levels),
        in_channels=shape_of(tensors, "embedding.1.weight", 4)[1] // patch_size**2,
        out_channels=shape_of(tensors, "clf.1.weight", 4)[0] // patch_size**2,
    )
    if mapper is not None:
        from_shapes["timestep_dim"] = mapper.shape[1]
        names = {m[1] for m in (re.search(r"\.mapper_(\w+)\.weight$", key) for key in tensors) if m}
        order = stated.pop("conditions", ("sca", "crp"))  # of no consequence: each has a mapper of its own
        from_shapes["conditions"] = (*(n for n in order if n in names), *sorted(names - set(order)))
    if kernel is not None:
        from_shapes["kernel_size"] = kernel.shape[-1]
    return from_shapes


# --- Stage A

def read_stage_a(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    """(StageAConfig, weights). scale_factor is not in the weights: the released 0.43 unless `config` says otherwise."""
    tensors = {key: value for key, value in unwrap(tensors).items() if not DEAD["stage_a"].match(key)}
    if "in_block.1.weight" not in tensors or "up_blocks.0.0.weight" not in tensors:
        _refuse(tensors, "a Stage A of Stable Cascade")
    hidden, latent, *_ = shape_of(tensors, "up_blocks.0.0.weight", 4)
    finest = shape_of(tensors, "in_block.1.weight", 4)[0]
    levels = (hidden // finest).bit_length()
    blocks = {m[1] for m in (re.match(r"up_blocks\.(\d+)\.gammas$", key) for key in tensors) if m}
    shapes = dict(levels=levels, hidden=hidden, latent_channels=latent, bottleneck_blocks=len(blocks) - (levels - 1))
    return _checked(StageAConfig, _stated(StageAConfig, metadata, config), shapes), tensors


# --- The guide

def read_guide(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    """(GuideConfig, weights as `guidance.Guide` names them) from `ultrapixel_t2i` or our own file.

    Also from a live model's weights, where the guide is among Stage C's. The unused third of the released file is
    dropped. config: entries that the shapes do not determine, above all `heads`.
    """
    rows, numbers, tensors = [], set(), unwrap(tensors)
    for key, tensor in tensors.items():
        match = GUIDE.match(key)
        if match and not DEAD["guide"].match(match[3]):
            rows.append((match[1], int(match[2]), match[3], tensor))
            numbers |= {int(match[1])} if match[1].isdigit() else set()
    names = dict(zip(map(str, sorted(numbers)), ("agg_net", "agg_net_up"), strict=False))
    guide = {f"{names.get(group, group)}.{level}.{name}": tensor for group, level, name, tensor in rows}
    if len(numbers) > 2 or not any(key.endswith(".wtokens") for key in guide):
        _refuse(tensors, "a guide of UltraPixel")
    weights = {}
    for key, tensor in guide.items():
        if key.endswith(".toout.0.weight"):
            for half, part in zip(("guide", "target"), tensor.chunk(2, dim=1), strict=True):
                weights[key.replace(".toout.0.", f".toout.{half}.")] = part
        else:
            weights[key.replace(".toout.0.bias", ".toout.guide.bias")] = tensor
    shapes = _guide_shapes(weights)
    stated = _stated(GuideConfig, metadata, config)
    stated.pop("groups", None)  # any number above the columns of a layer means the same
    stated.setdefault("heads", max(1, shapes["width"] // GUIDE_HEAD_DIM))
    return _checked(GuideConfig, stated, shapes), weights


def _guide_shapes(weights: Mapping[str, Tensor]) -> dict:
    def channels(net: str) -> tuple[int, ...]:
        levels = sorted(int(m[1]) for m in (re.match(rf"{net}\.(\d{{1,6}})\.wtokens$", key) for key in weights) if m)
        return tuple(shape_of(weights, f"{net}.{level}.input_layer.weight", 4)[1] for level in levels)

    first = next(key.removesuffix("wtokens") for key in weights if key.endswith(".wtokens"))
    own = {key.removeprefix(first): tensor for key, tensor in weights.items() if key.startswith(first)}
    layers = tuple(shape_of(own, f"base_params.wb{i}", 2)[1] for i in range(len(own)) if f"base_params.wb{i}" in own)
    tokens, width = shape_of(own, "wtokens", 2)
    every = range(1, max(layers, default=0) + 1)
    place = bisect_left(every, tokens, key=lambda g: sum(min(g, size) for size in layers))
    groups = every[place] if place < len(every) else 0
    if sum(min(groups, size) for size in layers) != tokens:
        raise ValueError(f"{tokens} weight tokens do not divide among layers of {layers} columns.")
    return dict(
        down=channels("agg_net"), up=channels("agg_net_up"), width=width, groups=groups, layers=layers,
        encoder_layers=sum(key.startswith("transformer_encoder") and key.endswith(".0.norm.weight") for key in own),
        feedforward=shape_of(own, "transformer_encoder.layers.0.1.fn.net.0.weight", 2)[0],
        max_tokens=shape_of(own, "tokenizer.posemb", 2)[0],
        frequencies=(shape_of(own, "base_params.wb0", 2)[0] - 1) // 4,
        timestep_dim=shape_of(own, "mapp_t.mapper.weight", 2)[1],
        scale_dim=shape_of(own, "hr_norm.mapping.mapper.weight", 2)[1],
    )


def released_guide_names(tensors: Mapping[str, Tensor], number: int = 64) -> dict[str, Tensor]:
    """Our names -> `module.{number}.*` on the way down, `module.{number + 1}.*` on the way up, without the dead third.

    number: the ResBlocks of Stage C.
    """
    def released(key: str) -> str:
        return re.sub(r"^agg_net(_up)?\.", lambda m: f"module.{number + bool(m[1])}.", key)

    renamed = {}
    for key, tensor in tensors.items():
        stem, guide, name = key.partition(".toout.guide.")
        if guide and name == "weight":
            tensor = torch.cat((tensor, tensors[f"{stem}.toout.target.weight"]), dim=1)
        if not key.endswith(".toout.target.weight"):
            renamed[released(f"{stem}.toout.0.{name}" if guide else key)] = tensor
    return renamed


# --- ControlNet and semantic encoder

def read_controlnet(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    tensors = unwrap(tensors)
    count = sum(re.match(r"projections\.\d+\.0\.weight$", key) is not None for key in tensors)
    if not count or not any(key.startswith("backbone.0.") for key in tensors):
        _refuse(tensors, "a ControlNet of Stable Cascade's Stage C")
    if "backbone.0.0.weight" in tensors:
        backbone, first = "effnet", tensors["backbone.0.0.weight"]
    else:
        first = tensors["backbone.0.weight"]
        backbone = "simple" if first.shape[-1] == 3 else "large"
    stated = _stated(ControlNetConfig, metadata, config)
    if "blocks" not in stated:
        if count != len(RELEASED_BLOCKS):
            raise ValueError(f"This ControlNet has {count} projections, the released ones have {len(RELEASED_BLOCKS)}: "
                             "say in `blocks` to which ResBlocks they belong.")
        stated["blocks"] = RELEASED_BLOCKS
    elif len(stated["blocks"]) != count:
        raise ValueError(f"The configuration names {len(stated['blocks'])} blocks, the weights have {count} "
                         "projections.")
    shapes = dict(in_channels=first.shape[1], backbone=backbone,
                  hidden=shape_of(tensors, "projections.0.2.weight", 4)[0])
    return _checked(ControlNetConfig, stated, shapes), tensors


def read_effnet(tensors: Mapping) -> tuple[EffnetConfig, dict[str, Tensor]]:
    """(configuration, weights) of `effnet_encoder`."""
    tensors = unwrap(tensors)
    if "mapper.0.weight" not in tensors or "backbone.0.0.weight" not in tensors:
        _refuse(tensors, "a semantic encoder of Stable Cascade")
    blocks = tuple(max(1, sum(bool(re.fullmatch(rf"backbone\.{stage}\.\d+\.block\.0\.0\.weight", key))
                              for key in tensors)) for stage in range(1, len(EffnetConfig().blocks) + 1))
    return EffnetConfig(tensors["mapper.0.weight"].shape[0], blocks), tensors


KINDS: tuple[tuple[str, Callable[[Mapping], bool]], ...] = (
    ("guide", lambda keys: any(GUIDE.match(key) and key.endswith(".wtokens") for key in keys)
     and "clip_txt_mapper.weight" not in keys),
    ("stage_c", lambda keys: "clip_txt_mapper.weight" in keys),
    ("stage_b", lambda keys: "effnet_mapper.0.weight" in keys),
    ("stage_a", lambda keys: "in_block.1.weight" in keys),
    ("controlnet", lambda keys: "projections.0.0.weight" in keys),
)
READERS = {"guide": read_guide, "stage_c": read_stage_c, "stage_b": read_stage_b, "stage_a": read_stage_a,
           "controlnet": read_controlnet}


def kind(tensors: Mapping) -> str | None:
    """Which of the files it is: a name of `KINDS`; None for another family's."""
    tensors = unwrap(tensors)
    return next((name for name, matches in KINDS if matches(tensors)), None)


def read(tensors: Mapping, metadata: Metadata = None, config: Mapping | None = None) -> State:
    """(configuration, weights) of any of the files; the type of the configuration shows which file it is."""
    what = kind(tensors)
    if what not in READERS:
        _refuse(unwrap(tensors), "a file of UltraPixel")
    return READERS[what](tensors, metadata, config)
