"""LoRA files of every trainer, as changes to the weights of our networks (arXiv 2106.09685, and what followed it).

A family says how other programs name its modules (`Names`); everything else is the same for all families: which
spelling a file uses, how it scales, and the weight change that each kind of adapter stands for.

    lora   W + s up @ down                            s = alpha / rank; rsLoRA (arXiv 2312.03732): alpha / sqrt(rank)
    dora   m (W + s up @ down) / |W + s up @ down|    m and the length per output or per input (arXiv 2402.09353)
    loha   W + s (w1_a @ w1_b) * (w2_a @ w2_b)        (arXiv 2108.06098)
    lokr   W + s kron(w1, w2)                         w1 and w2 whole, or each a product (LyCORIS, arXiv 2309.14859)
    diff   W + s diff
"""
from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .known_files import whose

PEFT_ALPHA = 8  # peft's LoraConfig.lora_alpha, LoHaConfig.alpha and LoKrConfig.alpha when a script sets only r
METADATA_KEY = "lora_adapter_metadata"  # diffusers: loaders/lora_base.py
FORMATS = ("diffusers", "original", "comfyui", "kohya")

# Prefixes of a module's name -> what such a file is called in messages.
PREFIXES = {
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "controlnet.": "diffusers",
    "diffusion_model.": "ComfyUI",
    "model.": "ComfyUI",
    "module.": "DDP",
    "lora_transformer_": "OneTrainer",
    "lora_unet_": "kohya",
    "lycoris_": "LyCORIS",
}
TEXT_ENCODER = re.compile(r"^(lora_te\d?_|text_encoders?[._\d]|bundle_emb\.)|(^|[._])(encoder[._]block|text_model)[._]")
PART = re.compile(
    r"\.(?:(?P<ab>lora_[AB])(?:\.[^.]+)?\.(?P<ab_what>weight|bias)"  # peft may leave the adapter's name in between
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)*"
    r"|(?P<updown>lora_(?:up|down|mid))\.weight"
    r"|(?P<other>alpha|scalar|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))$"
)
CANONICAL = {"lora_A": "lora_down", "lora_B": "lora_up", "w_norm": "diff", "b_norm": "diff_b"}
UNSUPPORTED = {"OFT or BOFT": (".oft_", ".boft_"), "GLoRA": (".a1.weight", ".b1.weight"), "IA3": (".ia3_l",)}
ELSEWHERE = (  # family -> what its modules are called, with "_" for every "."
    ("FLUX", ("double_blocks", "single_blocks", "single_transformer_blocks")),
    ("Stable Diffusion 1, 2 or SDXL", ("down_blocks", "input_blocks", "up_blocks", "output_blocks")),
    ("Stable Diffusion 3", ("joint_blocks",)),
    ("Stable Cascade", ("prior_unet",)),
    ("an MMDiT such as Stable Diffusion 3, FLUX or Qwen-Image", ("add_k_proj",)),
    ("Wan", ("self_attn_q", "self_attn_to_q")),
    ("PixArt", ("cross_attn_kv_linear", "transformer_blocks_0_attn1_to_q", "t_block_1")),
)


@dataclass(frozen=True)
class Target:
    """The parameter of our network that a module's name stands for."""

    key: str
    """The parameter, such as blocks.0.attn.qkv.weight."""
    rows: tuple[int, int] | None = None
    """(start, length) along dim 0 where the module is a part of the parameter; None for all of it."""
    shape: tuple[int, ...] | None = None
    """Shape of these rows in the parameter; None when there is no network to check against."""


Names = Mapping[str, Mapping[str, Target]]
"""Spelling ("original", "diffusers") -> module name, with dots -> target."""


@dataclass(frozen=True)
class Layer:
    """One adapter. Tensors are as the file has them, under LyCORIS' names: lora_up, lora_down, lora_mid, hada_w1_a,
    lokr_w1, diff and so on; a dora_scale broadcasts against the weight: (out, 1, ...) or (1, in, ...)."""

    key: str
    rows: tuple[int, int] | None
    kind: str
    """lora, dora, loha, lokr or diff. A loha or lokr may have a dora_scale too."""
    tensors: dict[str, Tensor]
    scale: float


@dataclass(frozen=True)
class Lora:
    layers: list[Layer]
    notes: list[str]
    """The report, in sentences: spelling, kinds, and where each scale comes from."""
    unmatched: list[str]
    """Keys that were not used, with the reason where it is known."""
    text_encoder: list[str] = field(default_factory=list)
    """Keys that change the text encoder, which this network is not."""


def beside(path: str | os.PathLike) -> dict | None:
    """The adapter_config.json that PEFT writes into an adapter's folder; None when there is none."""
    file = Path(path).with_name("adapter_config.json")
    if not file.is_file():
        return None
    try:
        adapter_config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} beside {Path(path).name} is not valid JSON: {error}") from error
    return adapter_config if isinstance(adapter_config, dict) else None


def is_lora(keys: Iterable[str]) -> bool:
    """Whether the keys are those of an adapter file."""
    marks = [mark for those in UNSUPPORTED.values() for mark in those]
    return any(PART.search(key) or any(mark in key for mark in marks) for key in keys)


def read(
    tensors: Mapping[str, Tensor],
    names: Names,
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping | None = None,
    alpha: float | None = None,
) -> Lora:
    """The layers of a LoRA file (`state_dict.read_file`), keyed by the parameters that `names` leads to.

    The scale of a layer comes from the first of these that exists: its own `.alpha`; lora_alpha (rank_pattern,
    alpha_pattern, use_rslora) of the file's metadata, or, for the names that PEFT writes, of adapter_config (`beside`),
    as long as the ranks they state are the file's; the argument `alpha`; what the format means by saying nothing: 8 for
    PEFT, whose scripts for PixArt set only the rank, and a scale of 1 for all others, which fold it into the weights.
    Raises ValueError with the likely reason when no layer of the file fits the network.
    """
    keys, odd = _modules(tensors)
    modules = {module: {part: tensors[key] for part, key in parts.items()} for module, parts in keys.items()}
    known = {name: target for table in names.values() for name, target in table.items()}
    flat = {name.replace(".", "_"): name for name in known}
    text_encoder = [key for key in tensors if TEXT_ENCODER.search(key)]
    unmatched = [key for key in odd if not TEXT_ENCODER.search(key)]
    inside, notes = _config(_from_metadata(metadata or {}), "its metadata", modules)
    outside, more = _config(adapter_config, "adapter_config.json", modules)
    notes += more
    layers, wrong, kinds = [], [], Counter()
    for module, parts in modules.items():
        if TEXT_ENCODER.search(module):
            continue
        name, spelling = _resolve(module, known, flat)
        # A folder of LoRAs may hold the configuration of one: it says nothing about those that PEFT did not write.
        config = inside or (outside if spelling in ("PEFT", "bare") else None)
        new_layers = _layers(name, parts, known[name], spelling, config, alpha) if name else []
        if not new_layers:
            reason = " (the rest of the adapter is missing)" if name else ""
            unmatched += [key + reason for key in keys[module].values()]
        for layer, why in new_layers:
            if problem := _misfit(layer, known[name]):
                wrong.append(problem)
                unmatched.append(f"{module} ({problem})")
            else:
                layers.append(layer)
                kinds[spelling, layer.kind, why] += 1
    if not layers:
        raise ValueError(_why_nothing(tensors, modules, wrong, text_encoder))
    notes += [f"{count} {kind} layers, {spelling} names; {why}." for (spelling, kind, why), count in kinds.items()]
    if text_encoder:
        notes.append(f"{len(text_encoder)} keys belong to the text encoder and are not used here.")
    if unmatched:
        notes.append(f"{len(unmatched)} keys have no place in this network: {', '.join(unmatched[:3])}"
                     f"{' ...' if len(unmatched) > 3 else ''}.")
    return Lora(layers, notes, unmatched, text_encoder)


def _modules(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module name as the file spells it -> part -> key; and the keys that do not belong to an adapter."""
    modules, odd = {}, []
    for key in keys:
        match = PART.search(key)
        if match is None:
            odd.append(key)
            continue
        part = match["ab"] or match["updown"] or match["other"] or match["magnitude"]
        part = CANONICAL.get(part, part) + ("_bias" if match["ab_what"] == "bias" else "")
        modules.setdefault(key[: match.start()], {})[part] = key
    return modules, odd


def _resolve(module: str, known: Mapping[str, Target], flat: Mapping[str, str]) -> tuple[str | None, str]:
    """(the module's name in the table or None, the spelling in words)."""
    spelling = "bare"
    while True:
        if name := module if module in known else flat.get(module):
            return name, spelling
        prefix = next((p for p in PREFIXES if module.startswith(p)), None)
        if prefix is None:
            return None, spelling
        module, spelling = module[len(prefix):], "PEFT" if spelling == "PEFT" else PREFIXES[prefix]


def _config(stated: Mapping | None, where: str, modules: Mapping) -> tuple[dict | None, list[str]]:
    """PEFT's configuration, unless the ranks it states are not those of the file (then it belongs to another file)."""
    if not stated:
        return None, []
    for module, parts in modules.items():
        rank, wanted = _rank(parts), _pattern(stated.get("rank_pattern"), module, stated.get("r"))
        if rank and wanted and rank != wanted and not TEXT_ENCODER.search(module):
            return None, [f"The alpha in {where} is not used: it goes with rank {wanted}, {module} has rank {rank}."]
    return dict(stated), []


def _from_metadata(metadata: Mapping[str, str]) -> dict | None:
    """The entries that diffusers writes beside the weights: PEFT's, under the name of the component or bare."""
    try:
        stated = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return None
    if not isinstance(stated, dict):
        return None
    return {key.rpartition(".")[2]: value for key, value in stated.items() if not key.startswith("text_encoder")}


def _pattern(patterns: Mapping | None, module: str, otherwise):
    """peft's get_pattern_key: a pattern is the end of a module's name."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)


def _rank(parts: Mapping[str, Tensor]) -> int | None:
    """Rank of a module's adapter; None for a lokr of two whole factors, which has none."""
    for part in ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return parts[part].shape[0]
    return None


def _kind(parts: Mapping[str, object]) -> str | None:
    def whole(factor):
        return factor in parts or {factor + "_a", factor + "_b"} <= parts.keys()

    if {"lora_up", "lora_down"} <= parts.keys():
        return "dora" if parts.keys() & {"dora_scale", "lora_magnitude_vector"} else "lora"
    if whole("hada_w1") and whole("hada_w2"):
        return "loha"
    if whole("lokr_w1") and whole("lokr_w2"):
        return "lokr"
    return "diff" if "diff" in parts else None


def _layers(name, parts, target, spelling, config, alpha) -> list[tuple[Layer, str]]:
    """The layers that a module's parts make, each with where its scale comes from, in words."""
    layers, kind = [], _kind(parts)
    if kind is not None:
        scale, why = (1.0, "whole differences") if kind == "diff" else _scale(name, parts, spelling, config, alpha)
        begin = {"lora": "lora_", "dora": "lora_", "loha": "hada_", "lokr": "lokr_", "diff": "diff"}[kind]
        rest = ("lora_up_bias", "lora_magnitude_vector", "diff_b")
        own = {part: value for part, value in parts.items() if part.startswith(begin) and part not in rest}
        if "scalar" in parts:  # LyCORIS with use_scalar, older files: not folded in
            scale *= parts["scalar"].item()
        length = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
        if length is not None:
            if "lora_magnitude_vector" in parts or length.ndim == 1:  # (out,), and peft's convolutions: (1, out, 1, 1)
                length = length.reshape(-1, *[1] * (max(length.ndim, 2) - 1))
            own["dora_scale"] = length
        layers.append((Layer(target.key, target.rows, kind, own, scale), why))
        if "lora_up_bias" in parts:
            bias = {"diff": parts["lora_up_bias"]}
            layers.append((Layer(_bias(target.key), target.rows, "diff", bias, scale), "biases"))
    if "diff_b" in parts:
        bias = {"diff": parts["diff_b"]}
        layers.append((Layer(_bias(target.key), target.rows, "diff", bias, 1.0), "whole differences"))
    return layers


def _bias(key: str) -> str:
    return key.removesuffix("weight") + "bias"


def _scale(name, parts, spelling, config, alpha) -> tuple[float, str]:
    rank = _rank(parts)
    if "alpha" in parts:
        # LyCORIS and OneTrainer store some alpha for a lokr of two whole factors too, and never divide it by a rank.
        return (parts["alpha"].item() / rank if rank else 1.0), "alpha from the file"
    if config:
        rank = rank or _pattern(config.get("rank_pattern"), name, config.get("r"))
        stated = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha", PEFT_ALPHA)))
        rooted = bool(config.get("use_rslora"))
        if rank:
            scale = stated / (math.sqrt(rank) if rooted else rank)
            return scale, f"alpha {stated:g} of its configuration{' with rsLoRA' if rooted else ''}, scale {scale:.4g}"
    if rank is None:
        return 1.0, "no rank, scale 1"
    if alpha is not None:
        return alpha / rank, f"alpha {alpha:g} as given, scale {alpha / rank:.4g}"
    if spelling == "PEFT":
        return PEFT_ALPHA / rank, f"no alpha anywhere, so PEFT's default of {PEFT_ALPHA}: scale {PEFT_ALPHA / rank:.4g}"
    return 1.0, "no alpha anywhere, so it is folded into the weights: scale 1"


def _misfit(layer: Layer, target: Target) -> str | None:
    if target.shape is None:
        return None
    own = tuple(target.shape[:1]) if layer.key.endswith(".bias") else tuple(target.shape)
    size = _size(layer)
    if size == (own[0], math.prod(own[1:])):
        return None
    return f"it changes a {size[0]} x {size[1]} matrix, and {layer.key} is {own[0]} x {math.prod(own[1:])} here"


def _size(layer: Layer) -> tuple[int, int]:
    """(outputs, inputs times kernel) of the matrix that a layer changes."""
    t = layer.tensors

    def kernel(part):
        return math.prod(t[part].shape[2:]) if part in t else 1

    def factor(name, tucker=None):
        if name in t:
            return t[name].shape[0], t[name][0].numel()
        if tucker in t:
            return t[name + "_a"].shape[1], t[name + "_b"][0].numel() * kernel(tucker)
        return t[name + "_a"].shape[0], t[name + "_b"][0].numel()

    if layer.kind in ("lora", "dora"):
        return t["lora_up"].shape[0], t["lora_down"][0].numel() * kernel("lora_mid")
    if layer.kind == "loha":
        return factor("hada_w1", "hada_t1")
    if layer.kind == "lokr":
        (out1, in1), (out2, in2) = factor("lokr_w1"), factor("lokr_w2", "lokr_t2")
        return out1 * out2, in1 * in2
    return t["diff"].shape[0], t["diff"][0].numel()


def _why_nothing(tensors, modules, wrong, text_encoder) -> str:
    start = f"No layer of this LoRA ({len(modules)} modules) fits this network: "
    if wrong:
        return start + f"its names do, its sizes do not. {wrong[0].capitalize()}. It was made for another model."
    if not modules:
        for what, marks in UNSUPPORTED.items():
            if any(mark in key for key in tensors for mark in marks):
                return f"This is an {what} file, which PixStack does not read. Get it as LoRA, DoRA, LoHa or LoKr."
        return f"This is no LoRA file. {whose(tensors)}"
    if all(TEXT_ENCODER.search(m) for m in modules):
        return start + f"all its {len(text_encoder)} keys belong to the text encoder."
    first = next(m for m in modules if not TEXT_ENCODER.search(m))
    joined = " ".join(modules).replace(".", "_")
    owner = next((family for family, marks in ELSEWHERE if any(mark in joined for mark in marks)), None)
    return start + (f"its modules are those of {owner}" if owner else "its modules are unknown here") + f" ({first})."


@torch.no_grad()
def delta(layer: Layer, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
    """The change of a weight at strength 1, float32, of shape `shape`.

    shape and weight are those of what the layer changes: only of its rows when it has rows. weight: needed, and used,
    only where there is a dora_scale; the result is on its device. Raises ValueError when the sizes do not fit.
    """
    t = {name: tensor.to("cpu" if weight is None else weight.device, torch.float32)
         for name, tensor in layer.tensors.items()}
    if layer.kind in ("lora", "dora"):
        change = _product(t["lora_up"], t["lora_down"], t.get("lora_mid"))
    elif layer.kind == "loha":
        change = _rebuilt(t, "hada_w1", "hada_t1") * _rebuilt(t, "hada_w2", "hada_t2")
    elif layer.kind == "lokr":
        w1, w2 = _rebuilt(t, "lokr_w1"), _rebuilt(t, "lokr_w2", "lokr_t2")
        change = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
    else:
        change = t["diff"]
    if change.shape[0] != shape[0] or change.numel() != math.prod(shape):
        height, width = _size(layer)
        raise ValueError(f"The LoRA layer of {layer.key} is for {height} x {width}, and the weight is {list(shape)}. "
                         "It was made for another model.")
    change = change.reshape(tuple(shape)) * layer.scale
    if "dora_scale" not in t:
        return change
    if weight is None:
        raise ValueError(f"{layer.key}: a DoRA layer changes a weight by its length, so it needs the weight.")
    magnitude, weight = t["dora_scale"], weight.float()
    whole = weight + change
    per_output = magnitude.shape[0] == whole.shape[0]  # a square weight's (1, in) has 1 here
    dims = tuple(range(1, whole.ndim)) if per_output else (0, *range(2, whole.ndim))
    length = torch.linalg.vector_norm(whole, dim=dims, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return magnitude * whole / length - weight


def _product(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    return _tucker(mid, up.flatten(1).T, down.flatten(1))


def _rebuilt(t: Mapping[str, Tensor], factor: str, tucker: str | None = None) -> Tensor:
    if factor in t:
        return t[factor]
    a, b = t[factor + "_a"], t[factor + "_b"]
    return _tucker(t[tucker], a.flatten(1), b.flatten(1)) if tucker in t else a.flatten(1) @ b.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # contiguous: torch.kron cannot take the strides that einsum leaves
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b).contiguous()


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """A new table with `strength` times every layer's change added in float32; tensors that no layer changes are the
    same objects, and none is written to. Raises ValueError when a layer's parameter is missing or of another size."""
    merged, touched = dict(weights), {}
    for layer in lora.layers:
        if layer.key not in weights:
            raise ValueError(f"The LoRA changes {layer.key}, which these weights do not have.")
        before = weights[layer.key]
        if layer.key not in touched:
            touched[layer.key] = before.to(torch.promote_types(torch.float32, before.dtype), copy=True)
        after = touched[layer.key]
        start, length = layer.rows or (0, after.shape[0])
        part = after[start : start + length]
        part += strength * delta(layer, part.shape, part)
    return {**merged, **{key: value.to(weights[key].dtype) for key, value in touched.items()}}


def write(lora: Lora, names: Names, format: str) -> dict[str, Tensor]:
    """The tensors of a file in one of FORMATS that makes the same changes.

    diffusers: `transformer.` and the family's diffusers modules; a LoRA's scale is folded into lora_B, because readers
    of this format assume scale 1. original: the family's own modules; comfyui: the same after `diffusion_model.`;
    kohya: the same after `lora_unet_` with underscores. These three keep `.alpha`. Modules that are one in one
    spelling and several in the other are fused (block-diagonally, or by sharing lora_down where the parts share it) or
    split by rows. Raises ValueError where that cannot be exact: a lokr, and a DoRA of input lengths, do not fuse.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}.")
    places = {}
    for module, target in names["diffusers" if format == "diffusers" else "original"].items():
        places.setdefault(target.key, []).append((module, target))
    by_key = {}
    for layer in lora.layers:
        by_key.setdefault(layer.key, []).append(layer)
    tensors = {}
    for key, layers in by_key.items():
        bias = key.endswith(".bias")
        there = places.get(key.removesuffix("bias") + "weight" if bias else key)
        if not there:
            raise ValueError(f"{key} has no name in the {format} format.")
        for module, layer in _placed(layers, there):
            tensors.update(_spelled(module, layer, bias, format))
    return tensors


def _placed(layers: list[Layer], there: list[tuple[str, Target]]) -> list[tuple[str, Layer]]:
    by_rows = {target.rows: module for module, target in there}
    changed = [layer.rows for layer in layers]
    if len(set(changed)) < len(changed) or (None in changed and len(changed) > 1):
        raise ValueError(f"{layers[0].key}: {len(layers)} layers change the same rows, which no format can hold.")
    if all(layer.rows in by_rows for layer in layers):
        return [(by_rows[layer.rows], layer) for layer in layers]
    if None in by_rows:
        return [(by_rows[None], _fused(layers, next(t for _, t in there)))]
    if any(layer.rows is not None for layer in layers):
        raise ValueError(f"{layers[0].key}: the rows {layers[0].rows} are not a module in this format.")
    return [(module, _part(layer, target.rows)) for layer in layers for module, target in there]


def _part(layer: Layer, rows: tuple[int, int]) -> Layer:
    """A layer cut to some of its rows."""
    start, length = rows
    kept = slice(start, start + length)
    own = dict(layer.tensors)
    assert not own.keys() & {"hada_t1", "lokr_t2"}, "no family has a convolution of several modules"
    if "dora_scale" in own:
        if own["dora_scale"].shape[0] == 1:
            raise ValueError(f"{layer.key}: a DoRA of input lengths spans all rows, so it cannot be split. Write it as "
                             "original, comfyui or kohya.")
        own["dora_scale"] = own["dora_scale"][kept]
    if layer.kind == "lokr":
        w2_rows = own["lokr_w2" if "lokr_w2" in own else "lokr_w2_a"].shape[0]
        if start % w2_rows or length % w2_rows:
            raise ValueError(f"{layer.key}: its lokr factors do not end where its modules do, so it cannot be split. "
                             "Write it as original, comfyui or kohya.")
        w1 = "lokr_w1" if "lokr_w1" in own else "lokr_w1_a"
        own[w1] = own[w1][start // w2_rows : (start + length) // w2_rows]
    for name in ("lora_up", "hada_w1_a", "hada_w2_a", "diff"):
        if name in own:
            own[name] = own[name][kept]
    return replace(layer, rows=rows, tensors=own)


def _fused(layers: list[Layer], whole: Target) -> Layer:
    """One layer that does what layers of distinct rows of a parameter do."""
    first = layers[0]
    alike = {layer.kind for layer in layers} == {first.kind}
    if not alike or first.kind == "lokr":
        kinds = ", ".join(sorted({layer.kind for layer in layers}))
        raise ValueError(f"{first.key}: layers of kind {kinds} cannot be fused without loss. Write it as diffusers.")
    layers = sorted(layers, key=lambda layer: layer.rows)
    height = whole.shape[0]
    own, scale = {}, first.scale
    if first.kind == "diff":
        parts = [layer.tensors["diff"] * layer.scale for layer in layers]
        own["diff"] = _stacked(parts, layers, height, [slice(None)] * len(layers), parts[0].shape[1:])
        return replace(first, rows=None, tensors=own, scale=1.0)
    pairs = [("lora_up", "lora_down")]
    if first.kind == "loha":
        pairs = [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
    folds = len({layer.scale for layer in layers}) > 1
    shared = all(torch.equal(layer.tensors[b], first.tensors[b]) for layer in layers for _, b in pairs)
    for i, (a, b) in enumerate(pairs):
        parts = [layer.tensors[a].flatten(1) for layer in layers]
        if folds and i == 0:
            parts = [(p.float() * layer.scale).to(p.dtype) for p, layer in zip(parts, layers, strict=True)]
        if shared:
            columns = [slice(None)] * len(layers)
            own[b] = first.tensors[b]
        else:
            ends = [0, *torch.tensor([p.shape[1] for p in parts]).cumsum(0).tolist()]
            columns = [slice(x, y) for x, y in zip(ends, ends[1:], strict=False)]
            own[b] = torch.cat([layer.tensors[b] for layer in layers])
        own[a] = _stacked(parts, layers, height, columns, own[b].shape[:1])
    if any("dora_scale" in layer.tensors for layer in layers):
        lengths = [layer.tensors.get("dora_scale") for layer in layers]
        if any(v is None or v.shape[0] == 1 for v in lengths) or sum(layer.rows[1] for layer in layers) != height:
            raise ValueError(f"{first.key}: a DoRA is fused only when every part has its output lengths. "
                             "Write it as diffusers.")
        own["dora_scale"] = torch.cat(lengths)
    return replace(first, rows=None, tensors=own, scale=1.0 if folds else scale)


def _stacked(parts, layers, height, columns, width) -> Tensor:
    out = parts[0].new_zeros(height, *width)
    for part, layer, column in zip(parts, layers, columns, strict=True):
        start, length = layer.rows
        if part.ndim == 1:
            out[start : start + length] = part
        else:
            out[start : start + length, column] = part
    return out


def _spelled(module: str, layer: Layer, bias: bool, format: str) -> dict[str, Tensor]:
    prefix = {"diffusers": "transformer.", "original": "", "comfyui": "diffusion_model.", "kohya": "lora_unet_"}[format]
    name = prefix + (module.replace(".", "_") if format == "kohya" else module)
    own, scale, rank = dict(layer.tensors), layer.scale, _rank(layer.tensors)
    if layer.kind == "diff":
        return {f"{name}.diff_b" if bias else f"{name}.diff": _times(own["diff"], scale)}
    if layer.kind in ("lora", "dora") and format == "diffusers":
        own["lora_up"], scale, rank = _times(own["lora_up"], scale), 1.0, None
        if layer.kind == "dora" and own["dora_scale"].shape[0] != 1:
            vector = own.pop("dora_scale")
            own["lora_magnitude_vector"] = vector.flatten() if vector.ndim == 2 else vector.transpose(0, 1)
    elif rank is None:  # a lokr of two whole factors: nobody scales it
        own["lokr_w1"] = _times(own["lokr_w1"], scale)
    up, down = ("lora_up", "lora_down") if format == "kohya" else ("lora_B", "lora_A")
    file_names = {"lora_up": f"{up}.weight", "lora_down": f"{down}.weight", "lora_mid": "lora_mid.weight"}
    tensors = {f"{name}.{file_names.get(part, part)}": value for part, value in own.items()}
    if rank is not None:
        tensors[f"{name}.alpha"] = torch.tensor(float(scale * rank))
    return tensors


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Module name as the file spells it -> (outputs, inputs times kernel) of the matrix it changes."""
    sizes = {}
    for module, parts in _modules(tensors)[0].items():
        if kind := _kind(parts):
            sizes[module] = _size(Layer("", None, kind, {part: tensors[key] for part, key in parts.items()}, 1.0))
    return sizes


def names_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Target]]:
    """The table of a network whose modules other programs call as we do: each weight's module, in both spellings."""
    own = {key.removesuffix(".weight"): Target(key, None, tuple(shape))
           for key, shape in shapes.items() if key.endswith(".weight")}
    return {"original": own, "diffusers": own}
