"""A safetensors file that is written tensor by tensor: no more than one that was changed is in memory at a time.

The format: the length of the header in eight bytes, the header in JSON, the bytes of all tensors.
(github.com/huggingface/safetensors, "Format")
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import put

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write(path: str | os.PathLike, like: Mapping[str, Tensor], made: Callable[[str], Tensor],
          metadata: Mapping[str, str] | None = None):
    """Writes under `path` at once or not at all. like: shapes and dtypes. made: the tensor of a name, asked for once
    each, in order of the names' place in the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As safetensors orders them: the widest elements first, so that all are aligned.
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(header(names, like, metadata or {}))
            for name in names:
                value = made(name).detach().cpu()
                assert value.dtype == like[name].dtype and value.shape == like[name].shape, name
                file.write(value.contiguous().flatten().view(torch.uint8).numpy().data if value.numel() else b"")
        put(unfinished, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def header(names: list[str], like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries, end = ({"__metadata__": dict(metadata)} if metadata else {}), 0
    for name in names:
        value = like[name]
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} is in {value.dtype}, which is not written here.")
        start, end = end, end + value.numel() * value.element_size()
        entries[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
