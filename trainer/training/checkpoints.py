"""Checkpoints of a run as safetensors: what learns, whole tensors, tied ones once."""
from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...models_impl import state_dict
from ...models_impl.guard import reading
from ...models_impl.parsing import from_json
from ..distributed import sharded
from ..files import digest, entries, line_of_log

STATE = "state.json"


@cache
def is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint can be read. One that was cut, by a full disk for example, is named."""
    try:
        int(entries(folder / STATE)["step"])
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt"):  # looks at its header and its length
                pass
    except (ValueError, TypeError, OSError, KeyError, SafetensorError) as error:
        print(f"{folder} is not complete ({error}): it counts as missing, and the run goes on from the one before, if "
              "there is one. Delete it, or put a copy of it there.", file=sys.stderr)
        return False
    return True


def damage(folder: Path) -> str:
    """What is wrong with the bytes of a checkpoint, by the digests that were written with it; empty where nothing is.
    Reads all of it."""
    for name, written in entries(folder / STATE).get("sha256", {}).items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if digest(file) != written:
            return f"{name} has other bytes than were written"
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run that are whole, oldest first."""
    there = (folder / "checkpoints").glob("*")
    return sorted(p for p in there if p.name.isdigit() and (p / STATE).exists() and is_whole(p))


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl; a run shorter than log_every has none."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [entry for entry in map(line_of_log, lines) if entry]


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What learns, and what is counted along with it; frozen weights stay where they came from."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: sharded.whole(value) for name, value in module.state_dict().items() if name not in frozen}


def restore_module(module: nn.Module, tensors: dict[str, torch.Tensor]):
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    own = {name: value for name, value in module.state_dict().items() if name not in frozen}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"The checkpoint is of another model: {len(odd)} names differ ({', '.join(odd[:3])} ...).")
    with torch.no_grad():
        for name, value in own.items():
            sharded.local(value).copy_(sharded.local(sharded.part(tensors[name], value)))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    seen, whole = {}, {}
    for name, value in tensors.items():  # safetensors refuses shared memory; a tied weight is written once
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue
        seen[place] = name
        whole[name] = value.detach().contiguous()
    tied = {n: seen[(v.data_ptr(), v.shape)] for n, v in tensors.items() if n not in whole}
    state_dict.save(whole, path, {"tied": json.dumps(tied)})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with reading(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        tied = from_json((file.metadata() or {}).get("tied", "{}"), "tied in its metadata")
        return {**tensors, **{name: tensors[other] for name, other in tied.items()}}
