"""Run folders of the trainer in which something is broken: the commands that read them, and the monitor."""
from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import broken_files
import tiny_run
from pixstack.trainer.monitor.folders import RunFolders
from pixstack.trainer.training.checkpoints import is_whole
from soak_loaders import broken_texts, command
from trials import CLEAN, RECOVERED, Trial, Wrong

TEXTS = ("config.json", "facts.json", "log.jsonl", "status.json", "tokenizer.json",
         "checkpoints/00000004/state.json")
WEIGHTS = ("model", "ema", "optimizer")


def broken(good: Path, seed: int, count: int) -> Iterator[tuple[str, str, bytes]]:
    """(file, what is wrong with it, its bytes)"""
    for name in TEXTS:
        for what, content in broken_texts((good / name).read_text(encoding="utf-8"), random.Random(seed), count):
            yield name, what, content
    for name in WEIGHTS:
        file = f"checkpoints/00000004/{name}.safetensors"
        data = (good / file).read_bytes()
        for what, _, content in (*broken_files.damaged(data, random.Random(seed)),
                                 *broken_files.headers(data, random.Random(seed))):
            yield file, what, content


def trials(folder: Path, seed: int, count: int,
           chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    good, run, out = folder / "good_run", folder / "run", folder / "exported"
    path = tiny_run.pictures(folder / "set_of_runs") if not good.exists() else folder / "set_of_runs" / "data.jsonl"
    settings = tiny_run.settings(path, run, "save_every=2", "keep=0", steps=4)
    recipe = tiny_run.toml(folder, path, run)
    if not good.exists():
        tiny_run.train(settings)
        run.rename(good)
    words = [str(recipe), "steps=4", "save_every=2", "keep=0"]
    commands = {
        "export": lambda: command("export", str(run), "--out", str(out)),
        "train": lambda: command("train", *words[:1], "steps=5", *words[2:], "resume=changed"),
        "monitor": lambda: watched(run),
    }
    number = 0
    for name, act in commands.items():
        for file, what, content in broken(good, seed, count):
            number += 1
            if not chosen(number):
                continue

            def trial(act=act, file=file, content=content):
                shutil.rmtree(run, ignore_errors=True)
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(good, run)
                (run / file).write_bytes(content)
                is_whole.cache_clear()  # a command has a process of its own
                outcome = act()
                if outcome == CLEAN and out.exists() and any(one.is_file() for one in out.rglob("*")):
                    raise Wrong("refused, and something was written")
                return outcome

            yield Trial(f"runs: {name}", f"{file}: {what}", trial)


def watched(run: Path) -> str:
    """What the monitor tells its page of it, as JSON that a browser reads."""
    folders = RunFolders(run)
    for name in folders.folders():
        told = folders.about(name), folders.log(name).curves(100), folders.samples(name), folders.settings([name])
        json.dumps(told, allow_nan=False).encode()
    return RECOVERED
