"""UltraPixel's personalisation: low-rank changes of Stage C's attentions, and a token that it learned.

(LoRA, arXiv 2106.09685; modules/lora.py of Stability-AI/StableCascade@7a7d341f, MIT.) The released file numbers its
modules; `module.{2j}` is `out_proj` and `module.{2j+1}` `in_proj` of attention j, in the order of the net, and the last
entry is the change of the token's row in the text encoder's table. Which word the row was started from is not in it.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import patterns
from ..state_dict import check_values, without_prefix
from .config import StageCConfig

ALPHA = 1.0
NUMBERED = re.compile(r"(?:module\.|weights\.)?(\d{1,6})\.(lora_down|lora_up|embeddings|indices)$")
NAMED = re.compile(r"diffusion_model\.(down|up)_blocks\.\d+\.\d+\.attention\.attn\..+\.lora_down\.weight$")
CORE = "diffusion_model."  # how ComfyUI names the layers of a diffusion model in a LoRA
KOHYA = "lora_prior_unet_"  # how sd-scripts and OneTrainer name them, which ComfyUI reads too
KOHYA_NAME = re.compile(KOHYA + r"(down|up)_blocks_(\d{1,6})_(\d{1,6})_attention_attn_(to_[qkv]|out_proj)\.(.+)$")
LONGEST_WORD = 200  # characters of a text encoder's word that are looked at; CLIP's have up to 32
SPLIT = ("to_q", "to_k", "to_v")  # into which it splits the fused projection
TOKEN = "retoken."


@dataclass
class Personalisation:
    layers: dict[str, tuple[Tensor, Tensor]]
    """Key of a weight of our Stage C -> (up, down); the change is scale * up @ down."""
    scale: float
    token_rows: list[int] = field(default_factory=list)
    """Rows of the text encoder's embedding table that are changed; 49408 is the first that CLIP itself lacks."""
    token_change: Tensor | None = None
    """(rows, width)."""
    token: str | None = None
    """Word to write in a prompt; None where the file does not say."""
    base: str | None = None
    """The pattern of the words whose mean the token's row began as."""

    def change(self, key: str, shape: torch.Size) -> Tensor:
        """The change of one weight, float32."""
        up, down = self.layers[key]
        return (self.scale * (up.float() @ down.float())).reshape(shape)

    def merge(self, weights: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
        """Weights of Stage C with the change inside, new tensors where there is one."""
        missing = [key for key in self.layers if key not in weights]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.layers)} personalised layers are not in this Stage C: "
                             f"{', '.join(missing[:3])}.")
        merged = dict(weights)
        for key in self.layers:
            weight = weights[key]
            merged[key] = (weight.float() + strength * self.change(key, weight.shape)).to(weight.dtype)
        return merged

    def embed(self, table: Tensor, strength: float = 1.0) -> Tensor:
        """A new embedding table (rows, width) with the learned token in it."""
        if not self.token_rows:
            return table
        if max(self.token_rows) >= len(table):
            raise ValueError(f"The token's row is {max(self.token_rows)}, the table has {len(table)}: first append the "
                             "mean of the words that it began as.")
        change = torch.zeros_like(table, dtype=torch.float32)
        change.index_add_(0, torch.tensor(self.token_rows, device=table.device), self.token_change.to(change))
        return (table.float() + strength * change).to(table.dtype)


def base_rows(vocabulary: Mapping[str, int], pattern: str) -> list[int]:
    """Rows of the text encoder's table whose mean a token begins as: of the words that a pattern such as "^cat</w>" is
    found in. Raises ValueError if there are none, or for a pattern that could take forever (`patterns.compiled`)."""
    found_in = patterns.compiled(pattern, "The pattern of a token's words").search
    rows = sorted(row for word, row in vocabulary.items() if found_in(word[:LONGEST_WORD]))
    if not rows:
        raise ValueError(f"{pattern!r} is found in none of the text encoder's {len(vocabulary):,} words. A whole word "
                         "ends in </w>: \"^cat</w>\".")
    return rows


def attention_keys(config: StageCConfig) -> list[str]:
    """The weights that the release personalises, in the order in which it numbers them."""
    return [
        f"{direction}_blocks.{level}.{position}.attention.attn.{part}.weight"
        for direction in ("down", "up")
        for level, kinds in enumerate(getattr(config, direction))
        for position, kind in enumerate(kinds) if kind == "A"
        for part in ("out_proj", "in_proj")
    ]


def is_personalisation(keys: Iterable[str]) -> bool:
    """Whether the keys are those of the release's file, of one for ComfyUI, or of another trainer's."""
    return any(NUMBERED.match(key) or NAMED.match(key) or KOHYA_NAME.match(key) for key in keys)


def read(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, config: StageCConfig | None = None,
    alpha: float = ALPHA, modules: Iterable[str] | None = None,
) -> Personalisation:
    """A personalisation file, the release's or our own, from what `state_dict.read_file` says.

    config: the Stage C that the modules are numbered for, the released one by default. modules: their names in the
    order of the numbers, where others than the attentions were trained. alpha: the change is alpha / rank * up @ down.
    """
    metadata = metadata or {}
    tensors = next((one for name in ("state_dict", "module") if isinstance(one := tensors.get(name), Mapping)), tensors)
    if any(key.startswith(KOHYA) for key in tensors):
        tensors = {KOHYA_NAME.sub(rf"{CORE}\1_blocks.\2.\3.attention.attn.\4.\5", k): v for k, v in tensors.items()}
        if odd := [k for k in tensors if k.startswith(KOHYA)]:
            raise ValueError(f"{len(odd)} keys do not belong to an attention, such as {odd[0]}: load this file "
                             "with core's LoRA loader; a personalisation changes only attentions.")
    check_values({key: value for key, value in tensors.items() if "indices" not in key and "alpha" not in key},
                 "this personalisation")
    if any(key.startswith(CORE) for key in tensors):
        return _read_named(tensors, metadata)
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in without_prefix(tensors).items():
        match = NUMBERED.match(key)
        if not match:
            raise ValueError(f"This is not a personalisation of UltraPixel: it holds {key}.")
        parts.setdefault(int(match[1]), {})[match[2]] = tensor
    loras = {number: part for number, part in sorted(parts.items()) if "lora_up" in part}
    keys = [_key(name) for name in modules] if modules is not None else attention_keys(config or StageCConfig())
    if len(loras) != len(keys) or not all(number < len(keys) for number in loras):
        raise ValueError(f"This personalisation changes {len(loras)} layers, this Stage C has {len(keys)} to change: "
                         "they belong to different models.")
    layers = {keys[number]: (part["lora_up"], part["lora_down"]) for number, part in loras.items()}
    _check_ranks(layers)
    token = next((part for part in parts.values() if "embeddings" in part), {})
    rank = next(iter(layers.values()))[1].shape[0]
    return Personalisation(layers, alpha / rank, token["indices"].tolist() if token else [], token.get("embeddings"),
                           metadata.get("pixstack.token"), metadata.get("pixstack.token_base"))


def to_core(personalisation: Personalisation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that ComfyUI's own LoRA loader takes, and `read` with it the token too.

    ComfyUI splits `in_proj`, so its three parts repeat the down matrix.
    """
    tensors = {}
    for key, (up, down) in personalisation.layers.items():
        layer = CORE + key.removesuffix(".weight")
        fused = layer.endswith(".in_proj")
        names = [layer.removesuffix("in_proj") + part for part in SPLIT] if fused else [layer]
        for name, rows in zip(names, up.chunk(len(names)), strict=True):
            tensors[f"{name}.lora_up.weight"] = rows.clone()
            tensors[f"{name}.lora_down.weight"] = down.clone()
            tensors[f"{name}.alpha"] = torch.tensor(personalisation.scale * down.shape[0])
    if personalisation.token_rows:
        tensors[f"{TOKEN}embeddings"] = personalisation.token_change
        tensors[f"{TOKEN}indices"] = torch.tensor(personalisation.token_rows)
    return tensors, _told(personalisation)


def to_kohya(personalisation: Personalisation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`to_core` under the names that other trainers give to layers of Stage C."""
    tensors, metadata = to_core(personalisation)

    def name(key):
        layer, part, ending = key.partition(".lora_") if ".lora_" in key else key.partition(".alpha")
        return KOHYA + layer.removeprefix(CORE).replace(".", "_") + part + ending if key.startswith(CORE) else key

    return {name(key): value for key, value in tensors.items()}, metadata


def to_released(personalisation: Personalisation) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) with numbered modules, as released; a scale other than its 1 / rank goes into the weights.
    Raises ValueError where not all attentions of the net are changed: a number would then mean another layer."""
    layers = personalisation.layers
    order = sorted(layers, key=_place)
    pairs = [key.rsplit(".", 2)[0] for key in order]
    if any(pairs.count(one) != 2 for one in pairs):
        raise ValueError("The release's format numbers all attentions of Stage C, in_proj and out_proj of each; this "
                         f"file has {len(layers)} layers that are not such pairs.")
    tensors = {}
    for number, key in enumerate(order):
        up, down = layers[key]
        tensors[f"module.{number}.lora_down"] = down
        share = personalisation.scale * down.shape[0] / ALPHA
        tensors[f"module.{number}.lora_up"] = up if share == 1 else (up.float() * share).to(up.dtype)
    if personalisation.token_rows:
        tensors[f"module.{len(order)}.embeddings"] = personalisation.token_change
        tensors[f"module.{len(order)}.indices"] = torch.tensor(personalisation.token_rows)
    return tensors, _told(personalisation)


def _told(personalisation: Personalisation) -> dict[str, str]:
    entries = {"pixstack.token": personalisation.token, "pixstack.token_base": personalisation.base}
    return {name: value for name, value in entries.items() if value is not None}


def _place(key: str) -> tuple:
    """Sort key of a weight in the release's numbering."""
    way, level, position, part = re.match(r"(down|up)_blocks\.(\d+)\.(\d+)\..*\.(in_proj|out_proj)\.weight$",
                                          key).groups()
    return way, int(level), int(position), part == "in_proj"


def _read_named(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Personalisation:
    layers, scales = {}, set()
    for name in [key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")]:
        if name.endswith(SPLIT[1:]):
            continue
        fused = name.endswith(SPLIT[0])
        parts = [name.removesuffix(SPLIT[0]) + part for part in SPLIT] if fused else [name]
        missing = [key for part in parts for key in (f"{part}.lora_up.weight", f"{part}.lora_down.weight",
                                                     f"{part}.alpha") if key not in tensors]
        if missing:
            raise ValueError(f"This is not a personalisation of UltraPixel: {missing[0]} is not in it.")
        down = tensors[f"{name}.lora_down.weight"]
        ours = (name.removesuffix(SPLIT[0]) + "in_proj" if fused else name).removeprefix(CORE)
        layers[f"{ours}.weight"] = torch.cat([tensors[f"{part}.lora_up.weight"] for part in parts]), down
        scales.add(tensors[f"{name}.alpha"].item() / down.shape[0])
    if not scales:
        raise ValueError(f"This is not a personalisation of UltraPixel: it holds {next(iter(tensors))}.")
    _check_ranks(layers)
    if len(scales) != 1:
        raise ValueError(f"The layers of this file have the scales {sorted(scales)}; a personalisation has one.")
    return Personalisation(layers, scales.pop(), tensors.get(f"{TOKEN}indices", torch.tensor([])).long().tolist(),
                           tensors.get(f"{TOKEN}embeddings"), metadata.get("pixstack.token"),
                           metadata.get("pixstack.token_base"))


def _check_ranks(layers: Mapping[str, tuple[Tensor, Tensor]]):
    for key, (up, down) in layers.items():
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"The matrices for {key} do not belong together: {list(up.shape)} and "
                             f"{list(down.shape)}, whose product has no common rank. Get the file again.")


def _key(module: str) -> str:
    """A module as torch's parametrisation names it -> the key of the weight."""
    name = re.sub(r"\.parametrizations\.(\w+)\.0$", r".\1", module)
    return name.replace(".in_proj_weight", ".in_proj.weight")
