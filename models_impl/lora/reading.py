"""LoRA files of every trainer into layers: which spelling a file uses, and how it scales."""
from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..known_files import WrongFile
from ..parsing import from_json
from ..patterns import Ends
from ..state_dict import check_values
from .adapter import Layer, Lora, Names, Target, kind_of, rank_of, size_of

PEFT_ALPHA = 8  # peft's LoraConfig.lora_alpha, LoHaConfig.alpha and LoKrConfig.alpha when a script sets only r
METADATA_KEY = "lora_adapter_metadata"  # diffusers: loaders/lora_base.py

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
    r"|(?P<other>alpha|scalar|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|oft_blocks))$"
)
CANONICAL = {"lora_A": "lora_down", "lora_B": "lora_up", "w_norm": "diff", "b_norm": "diff_b"}
SPELLINGS = [(re.compile(pattern), ours) for pattern, ours in (
    # what other programs put into the names of modules and parts -> what PART reads
    (r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", r"\1"),
    (r"^\.|(?<=\.)\.", ""),
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),  # diffusers' attention processors
    (r"\.processor\.(\w+?)_lora\.", r".\1.lora."),
    (r"\.(?:lora|lora_linear_layer)\.(up|down|mid)\.", r".lora_\1."),
    (r"\.(?:lora|lora_linear_layer)\.(?:network_)?alpha$", ".alpha"),
    (r"\.network_alpha$", ".alpha"),
    (r"\.(lora_[AB]|lora_(?:up|down|mid))$", r".\1.weight"),
)]
UNSUPPORTED = {"PEFT's OFT or BOFT": (".oft_", ".boft_"), "GLoRA": (".a1.weight", ".b1.weight"),
               "IA3": (".ia3_l",)}
ELSEWHERE = (  # family -> what its modules are called, with "_" for every "."
    ("FLUX", ("double_blocks", "single_blocks", "single_transformer_blocks")),
    ("Stable Diffusion 1, 2 or SDXL", ("down_blocks", "input_blocks", "up_blocks", "output_blocks")),
    ("Stable Diffusion 3", ("joint_blocks",)),
    ("Stable Cascade", ("prior_unet",)),
    ("an MMDiT such as Stable Diffusion 3, FLUX or Qwen-Image", ("add_k_proj",)),
    ("Wan", ("self_attn_q", "self_attn_to_q")),
    ("a PixArt ControlNet, which the LoRA node of the model does not change",
     ("controlnet_blocks_", "controlnet_0_", "copied_block")),
    ("PixelFlow", ("attn1_q_proj", "attn1_o_proj", "attn2_q_proj")),
    ("PixArt", ("cross_attn_kv_linear", "cross_attn_q_linear", "blocks_0_attn_qkv", "transformer_blocks_0_attn1_to_q",
                "t_block_1")),
)


def beside(path: str | os.PathLike) -> dict | None:
    """The adapter_config.json that PEFT writes into an adapter's folder; None when there is none."""
    file = Path(path).with_name("adapter_config.json")
    if not file.is_file():
        return None
    adapter_config = from_json(file.read_bytes(), f"{file.name} beside {Path(path).name}")
    return adapter_config if isinstance(adapter_config, dict) else None


def is_lora(keys: Iterable[str]) -> bool:
    """Whether the keys are those of an adapter file."""
    keys = spelled(dict.fromkeys(keys))
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
    tensors = spelled(tensors)
    keys, odd = _modules(tensors)
    check_values({key: tensors[key] for parts in keys.values() for part, key in parts.items() if part != "alpha"},
                 "this LoRA")  # an alpha may be a whole number
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
            if fault := _rank_fault(layer) or (None if math.isfinite(layer.scale) else f"its scale is {layer.scale}"):
                raise ValueError(f"The layer {module} of this LoRA is broken: {fault}. Get the file again.")
            if problem := _misfit(layer, known[name]):
                wrong.append(problem)
                unmatched.append(f"{module} ({problem})")
            else:
                layers.append(layer)
                kinds[spelling, layer.kind, why] += 1
    if not layers:
        raise _why_nothing(tensors, modules, wrong, text_encoder)
    if len(unmatched) > len(tensors) - len(text_encoder) - len(unmatched):
        raise ValueError(f"Most of this LoRA has no place in this network: {len(unmatched)} of "
                         f"{len(tensors) - len(text_encoder)} keys, such as {unmatched[0]}. It was made for another "
                         "model, or by a program whose names are not known here.")
    notes += [f"{count} {kind} layers, {spelling} names; {why}." for (spelling, kind, why), count in kinds.items()]
    if text_encoder:
        notes.append(f"{len(text_encoder)} keys belong to the text encoder and are not used here.")
    if unmatched:
        notes.append(f"{len(unmatched)} keys have no place in this network: {', '.join(unmatched[:3])}"
                     f"{' ...' if len(unmatched) > 3 else ''}.")
    return Lora(layers, notes, unmatched, text_encoder)


def own_layers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, adapter_config: Mapping | None = None,
    alpha: float | None = None,
) -> tuple[dict[str, list[Layer]], dict[str, Tensor], list[str]]:
    """A file without the network that it is for: (module as the file spells it -> its layers, whose keys are the
    module's weight and bias; what belongs to no layer; the spellings). Scales are those of `read`. Raises ValueError
    for a broken file, not for values that are no numbers."""
    tensors = spelled(tensors)
    keys, odd = _modules(tensors)
    modules = {module: {part: tensors[key] for part, key in parts.items()} for module, parts in keys.items()}
    if not modules:
        raise _why_nothing(tensors, modules, [], [])
    inside, _ = _config(_from_metadata(metadata or {}), "its metadata", modules)
    outside, _ = _config(adapter_config, "adapter_config.json", modules)
    layers, rest, spellings = {}, {key: tensors[key] for key in odd}, []
    for module, parts in modules.items():
        _, spelling = _resolve(module, {}, {})
        config = inside or (outside if spelling in ("PEFT", "bare") else None)
        own = [layer for layer, _ in _layers(module, parts, Target(f"{module}.weight"), spelling, config, alpha)]
        if not own:
            raise ValueError(f"{module} has {', '.join(parts)}, and the rest of its layer is missing.")
        for layer in own:
            if fault := _rank_fault(layer) or (None if math.isfinite(layer.scale) else f"its scale is {layer.scale}"):
                raise ValueError(f"The layer {module} of this LoRA is broken: {fault}. Get the file again.")
        layers[module] = own
        if spelling not in spellings:
            spellings.append(spelling)
    return layers, rest, spellings


def bare(module: str) -> str:
    """A module's name without the prefixes of programs, "_" for every "."."""
    while prefix := next((p for p in PREFIXES if module.startswith(p)), None):
        module = module[len(prefix):]
    return module.replace(".", "_")


def family_of(modules: Iterable[str]) -> str | None:
    """Whose modules they are, in words."""
    joined = " ".join(modules).replace(".", "_")
    return next((family for family, marks in ELSEWHERE if any(mark in joined for mark in marks)), None)


def spelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that PART reads. Raises ValueError where two of them get the same."""
    renamed = {}
    for key, value in tensors.items():
        name = key
        for pattern, ours in SPELLINGS:
            name = pattern.sub(ours, name)
        if name in renamed:
            raise ValueError(f"This LoRA holds {key} twice, under the names of two programs.")
        renamed[name] = value
    return renamed


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
    config = {**stated, **{name: Ends(_table(stated, name, where), f"{name} in {where}")
                           for name in ("rank_pattern", "alpha_pattern")}}
    for name in ("r", "lora_alpha", "alpha"):
        _check_number(stated.get(name), f"{name} in {where}")
    for module, parts in modules.items():
        rank, wanted = rank_of(parts), config["rank_pattern"].value(module, stated.get("r"))
        if rank and wanted and rank != wanted and not TEXT_ENCODER.search(module):
            return None, [f"The alpha in {where} is not used: it goes with rank {wanted}, {module} has rank {rank}."]
    return config, []


def _table(stated: Mapping, name: str, where: str) -> Mapping[str, float]:
    table = stated.get(name) or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} in {where} is a {type(table).__name__}, not a table of patterns and numbers.")
    for pattern, value in table.items():
        _check_number(value, f"{name}[{pattern[:80]!r}] in {where}")
    return table


def _check_number(value, what: str):
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
                              or not math.isfinite(value)):
        raise ValueError(f"{what} is {str(value)[:80]!r}, not a number above 0.")


def _from_metadata(metadata: Mapping[str, str]) -> dict | None:
    """The entries that diffusers writes beside the weights: PEFT's, under the name of the component or bare."""
    try:
        stated = from_json(metadata.get(METADATA_KEY, "{}"), METADATA_KEY)
    except ValueError:
        return None
    if not isinstance(stated, dict):
        return None
    return {key.rpartition(".")[2]: value for key, value in stated.items() if not key.startswith("text_encoder")}


def _layers(name, parts, target, spelling, config, alpha) -> list[tuple[Layer, str]]:
    """The layers that a module's parts make, each with where its scale comes from, in words."""
    layers, kind = [], kind_of(parts)
    if kind is not None:
        scale, why = (1.0, "whole differences") if kind == "diff" else (1.0, "turns") if kind == "oft" else \
            _scale(name, parts, spelling, config, alpha)
        begin = {"lora": "lora_", "dora": "lora_", "loha": "hada_", "lokr": "lokr_", "oft": "oft_",
                 "diff": "diff"}[kind]
        of_their_own = ("lora_up_bias", "lora_magnitude_vector", "diff_b")
        own = {part: value for part, value in parts.items() if part.startswith(begin) and part not in of_their_own}
        if kind == "oft":
            own["oft_blocks"] = _constrained(own["oft_blocks"], parts.get("alpha"))
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


def _constrained(blocks: Tensor, alpha: Tensor | None) -> Tensor:
    """LyCORIS' alpha of an OFT is the largest norm that Q = B - B^T may have; 0 = any."""
    if alpha is None or not 0 < alpha.item() < (norm := (blocks - blocks.mT).float().norm().item()):
        return blocks
    return (blocks.float() * (alpha.item() / norm)).to(blocks.dtype)


def _bias(key: str) -> str:
    return key.removesuffix("weight") + "bias"


def _scale(name, parts, spelling, config, alpha) -> tuple[float, str]:
    rank = rank_of(parts)
    if "alpha" in parts:
        # LyCORIS and OneTrainer store some alpha for a lokr of two whole factors too, and never divide it by a rank.
        return (parts["alpha"].item() / rank if rank else 1.0), "alpha from the file"
    if config:
        rank = rank or config["rank_pattern"].value(name, config.get("r"))
        stated = config["alpha_pattern"].value(name, config.get("lora_alpha", config.get("alpha", PEFT_ALPHA)))
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


def _rank_fault(layer: Layer) -> str | None:
    """What is wrong with the ranks of a layer's matrices, in words."""
    t = layer.tensors
    if layer.kind == "oft" and (t["oft_blocks"].ndim != 3 or len(set(t["oft_blocks"].shape[1:])) > 1):
        return f"oft_blocks is {list(t['oft_blocks'].shape)}, and OFT has square blocks (BOFT is not read)"
    products = [("lora_up", "lora_down", "lora_mid")] + [
        (f"{factor}_a", f"{factor}_b", tucker) for factor, tucker in
        (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"), ("lokr_w1", None), ("lokr_w2", "lokr_t2"))]
    for up, down, middle in products:
        if not {up, down} <= t.keys():
            continue
        if min(t[up].ndim, t[down].ndim) < 2:
            return f"{up} is {list(t[up].shape)} and {down} {list(t[down].shape)}, and both are matrices"
        # With a Tucker core the first matrix of LoHa and LoKr is (rank, outputs), and each rank is one of the core's.
        ranks = t[up].shape[0 if middle in t and up != "lora_up" else 1], t[down].shape[0]
        wanted = tuple(t[middle].shape[:2]) if middle in t else (ranks[1], ranks[1])
        if ranks != wanted:
            return f"{up} has the rank {ranks[0]}, {down} {ranks[1]}" + (f", {middle} {wanted}" if middle in t else "")
    return None


def _misfit(layer: Layer, target: Target) -> str | None:
    if target.shape is None:
        return None
    own = tuple(target.shape[:1]) if layer.key.endswith(".bias") else tuple(target.shape)
    size = size_of(layer)
    if size == (own[0], size[1] and math.prod(own[1:])):
        return None
    return f"it changes a {size[0]} x {size[1]} matrix, and {layer.key} is {own[0]} x {math.prod(own[1:])} here"


def _why_nothing(tensors, modules, wrong, text_encoder) -> ValueError:
    start = f"No layer of this LoRA ({len(modules)} modules) fits this network: "
    if wrong:
        return ValueError(start + f"its names do, its sizes do not. {wrong[0].capitalize()}. It was made for another "
                          "model.")
    if not modules:
        for what, marks in UNSUPPORTED.items():
            if any(mark in key for key in tensors for mark in marks):
                return ValueError(f"This is a file of {what}, which PixStack does not read. Get it as LoRA, DoRA, "
                                  "LoHa, LoKr or LyCORIS' diag-oft.")
        if "lora_controlnet" in tensors:
            return ValueError("This is a Control-LoRA, a ControlNet of Stable Diffusion XL kept as a difference: load "
                              "it with core's 'Load ControlNet Model', for that model.")
        return WrongFile("This is no LoRA file.", tensors)
    if all(TEXT_ENCODER.search(m) for m in modules):
        return ValueError(start + f"all its {len(text_encoder)} keys belong to the text encoder.")
    first = next(m for m in modules if not TEXT_ENCODER.search(m))
    owner = family_of(modules)
    what = f"its modules are those of {owner}" if owner else "its modules are unknown here"
    return ValueError(f"{start}{what} ({first}).")


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Module name as the file spells it -> (outputs, inputs times kernel) of the matrix it changes."""
    sizes = {}
    tensors = spelled(tensors)
    for module, parts in _modules(tensors)[0].items():
        if (kind := kind_of(parts)) and kind != "oft":  # which says nothing of inputs
            sizes[module] = size_of(Layer("", None, kind, {part: tensors[key] for part, key in parts.items()}, 1.0))
    return sizes
