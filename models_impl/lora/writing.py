"""Layers into LoRA files that other programs read."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .adapter import Layer, Lora, Names, Target, rank_of

FORMATS = ("diffusers", "original", "comfyui", "kohya")


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
    if layer.kind == "oft":
        side = own["oft_blocks"].shape[1]
        if start % side or length % side:
            raise ValueError(f"{layer.key}: its oft blocks do not end where its modules do, so it cannot be split. "
                             "Write it as original, comfyui or kohya.")
        own["oft_blocks"] = own["oft_blocks"][start // side : (start + length) // side]
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
    if first.kind == "oft":
        sides = {layer.tensors["oft_blocks"].shape[1] for layer in layers}
        if len(sides) > 1 or sum(layer.rows[1] for layer in layers) != height:
            raise ValueError(f"{first.key}: layers of kind oft are fused only when every part has one, with blocks of "
                             "one size. Write it as diffusers.")
        return replace(first, rows=None, tensors={"oft_blocks": torch.cat([x.tensors["oft_blocks"] for x in layers])})
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
    own, scale, rank = dict(layer.tensors), layer.scale, rank_of(layer.tensors)
    if layer.kind == "diff":
        return {f"{name}.diff_b" if bias else f"{name}.diff": _times(own["diff"], scale)}
    if layer.kind in ("lora", "dora") and format == "diffusers":
        own["lora_up"], scale, rank = _times(own["lora_up"], scale), 1.0, None
        if layer.kind == "dora" and own["dora_scale"].shape[0] != 1:
            vector = own.pop("dora_scale")
            own["lora_magnitude_vector"] = vector.flatten() if vector.ndim == 2 else vector.transpose(0, 1)
    elif rank is None and layer.kind == "lokr":  # of two whole factors: nobody scales it
        own["lokr_w1"] = _times(own["lokr_w1"], scale)
    return named(name, replace(layer, tensors=own, scale=scale), rank, kohya=format == "kohya")


def named(name: str, layer: Layer, rank: int | None, kohya: bool) -> dict[str, Tensor]:
    """A layer under the name of a module, its scale in `.alpha` where it has a rank. kohya: lora_up and lora_down
    instead of lora_B and lora_A."""
    up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
    file_names = {"lora_up": f"{up}.weight", "lora_down": f"{down}.weight", "lora_mid": "lora_mid.weight"}
    tensors = {f"{name}.{file_names.get(part, part)}": value for part, value in layer.tensors.items()}
    if rank is not None:
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.scale * rank))
    return tensors


def write_own(layers: dict[str, list[Layer]], kohya: bool) -> dict[str, Tensor]:
    """The tensors of a file of layers by their modules' own names (`own_layers`)."""
    tensors = {}
    for module, own in layers.items():
        for layer in own:
            if layer.kind == "diff":
                part = "diff_b" if layer.key.endswith(".bias") else "diff"
                tensors[f"{module}.{part}"] = _times(layer.tensors["diff"], layer.scale)
            elif (rank := rank_of(layer.tensors)) is None and layer.kind == "lokr":  # of two whole factors: unscaled
                whole = {**layer.tensors, "lokr_w1": _times(layer.tensors["lokr_w1"], layer.scale)}
                tensors |= named(module, replace(layer, tensors=whole), None, kohya)
            else:
                tensors |= named(module, layer, rank, kohya)
    return tensors


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)
