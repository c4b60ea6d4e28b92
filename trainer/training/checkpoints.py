"""Checkpoints of a run as safetensors: what learns, whole tensors, tied ones once."""
from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...models_impl import state_dict
from ...models_impl.files import flush, put
from ...models_impl.guard import reading
from ...models_impl.parsing import from_json
from ..distributed import sharded
from ..files import digest, entries, line_of_log

STATE, UNFINISHED = "state.json", ".unfinished"


@cache
def is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint can be read. One that was cut, by a full disk for example, is named."""
    try:
        state = entries(folder / STATE)
        if state["step"] != int(folder.name) or not isinstance(state.get("sha256", {}), dict):
            raise ValueError(f"{STATE} is not the one that was written with it")
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


def newest_good(run: Path, wanted: int = 0) -> Path | None:
    """The checkpoint of a run to go on from: that of the step `wanted`, else the newest whose bytes are those written.
    Raises ValueError where the wanted one is not there or is damaged; a damaged one is named."""
    saved = checkpoints(run)
    if wanted and not any(int(one.name) == wanted for one in saved):
        there = ", ".join(str(int(one.name)) for one in saved) or "none"
        raise ValueError(f"resume_from={wanted}: {run} has no whole checkpoint of that step. There are: {there}.")
    for one in reversed(saved):
        if wanted and int(one.name) != wanted:
            continue
        if not (why := damage(one)):
            return one
        if wanted:
            raise ValueError(f"{one} is damaged ({why}). Choose another step: resume_from=...")
        print(f"{one} is damaged ({why}): it is passed over, and the run goes on from the one before, if there is one.",
              file=sys.stderr)
    return None


def write_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]]):
    """Writes the checkpoint of a step, a file for each name, at once or not at all."""
    final = run / "checkpoints" / f"{step:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, some in tensors.items():
        write_tensors(unfinished / f"{name}.safetensors", some)
    written = {file.name: digest(file) for file in sorted(unfinished.glob("*.safetensors"))}
    (unfinished / STATE).write_text(json.dumps({"step": step, "sha256": written}), encoding="utf-8")
    for file in unfinished.iterdir():
        flush(file)
    if final.exists():
        shutil.rmtree(final)
    put(unfinished, final)


def rotate(run: Path, keep: int, calm: int | None):
    """Only the newest `keep` checkpoints stay, all with 0. calm: of a run that diverges, the last step when it did not;
    the last checkpoint from before stays, too."""
    saved = checkpoints(run)
    before = [] if calm is None else [one for one in saved if int(one.name) <= calm]
    for old in saved[:-keep] if keep else ():
        if old not in before[-1:]:
            forget(old)


def forget(checkpoint: Path):
    """Delete a checkpoint. One that another program reads, a sampling for example, stays on Windows until the next
    time."""
    unfinished = checkpoint.with_name(checkpoint.name + UNFINISHED)
    try:
        checkpoint.rename(unfinished)  # so that no half of it is ever taken for a whole one
    except PermissionError as error:
        print(f"{checkpoint} is in use, and stays for now: {error}", file=sys.stderr)
    else:
        shutil.rmtree(unfinished)


def put_aside_after(run: Path, step: int):
    """Checkpoints of later steps than this get names that no run goes on from."""
    for one in (run / "checkpoints").glob("*"):
        if one.name.isdigit() and int(one.name) > step:
            places = (one.with_name(f"{one.name}.before{n or ''}") for n in range(1000))
            one.rename(next(place for place in places if not place.exists()))


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
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise ValueError(f"The checkpoint is of another model: {name} is {list(tensors[name].shape)} in it, and "
                             f"{list(value.shape)} by the run's other files (settings, facts.json, tokenizer.json).")
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
