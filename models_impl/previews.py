"""Colours of a VAE's latents: the linear map by which ComfyUI previews a latent without decoding it."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from .state_dict import from_json

KEY = "pixstack.preview"
PICTURES, PATCHES, CELLS = 8, 4, 4  # patches along a side of a picture, latent cells along a side of a patch


@torch.no_grad()
def metadata(encode: Callable[[Tensor], Tensor], factor: int) -> dict[str, str]:
    """The entry for a file's metadata, fitted to patches of random colours by least squares.

    encode: pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, H / factor, W / factor).
    """
    colours = 2 * torch.rand(PICTURES, 3, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0)) - 1
    cells = F.interpolate(colours, scale_factor=CELLS)
    latents = encode(F.interpolate(cells, scale_factor=factor)).float().cpu()
    rows = latents.movedim(1, -1).flatten(0, -2)  # (cells, C)
    map_ = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), cells.movedim(1, -1).flatten(0, -2))
    *factors, bias = [[round(value, 5) for value in row] for row in map_.solution.tolist()]
    return {KEY: json.dumps({"factors": factors, "bias": bias})}


def read(entries: Mapping[str, str], channels: int) -> tuple[Tensor, Tensor] | None:
    """(factors (C, 3), bias (3,)) of a file's metadata: picture in [-1, 1] = latent @ factors + bias; None where a file
    says nothing. Raises ValueError for an entry that is no such map."""
    if KEY not in entries:
        return None
    where = f"The entry {KEY} in this file's metadata"
    found = from_json(entries[KEY], where)
    found = found if isinstance(found, dict) else {}
    rows = [*factors, found.get("bias")] if isinstance(factors := found.get("factors"), list) else []
    if len(rows) != channels + 1 or not all(map(_colour, rows)):
        raise ValueError(f"{where} is no map of {channels} latent channels to colours: the file is damaged.")
    return torch.tensor(rows[:-1]), torch.tensor(rows[-1])


def _colour(row) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(
        isinstance(value, int | float) and math.isfinite(value) for value in row)


def of_file(path: Path) -> dict[str, str]:
    """The entry of a safetensors file, to be passed on; empty where it has none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key == KEY}
