"""Checkpoints of a run as safetensors: what learns, whole tensors, tied ones once."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ...models_impl import state_dict
from ..distributed import sharded


def checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "checkpoints").glob("*") if p.name.isdigit() and (p / "state.json").exists())


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl; a run shorter than log_every has none."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed process may have cut the last one


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
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return {**tensors, **{name: tensors[other] for name, other in tied.items()}}
