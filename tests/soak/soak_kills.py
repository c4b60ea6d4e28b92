"""Training runs that the system kills at any time: the next start goes on to the same weights, to the bit."""
from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import tiny_recipes
import tiny_run
from pixstack.trainer.training.checkpoints import read_tensors
from trials import RECOVERED, Trial, Wrong

PATIENCE = 120.0  # seconds that a run of three steps may take


def in_child(settings, after: float | None) -> bool:
    """A run in a process of its own, which is killed after that many seconds; whether it ended by itself."""
    child = os.fork()
    if not child:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            tiny_run.train(settings)
            status = 0
        finally:
            os._exit(status)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - started
        if done:
            if status:
                raise Wrong(f"the run ended with {status}")
            return True
        if passed > (PATIENCE if after is None else after):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if after is None:
                raise Wrong(f"a run took more than {PATIENCE:.0f} s")
            return False
        time.sleep(0.005)


def digest(folder: Path) -> str:
    """A digest of every tensor of the last checkpoint."""
    last, found = max((folder / "checkpoints").iterdir()), hashlib.sha256(b"")
    for path in sorted(last.glob("*.safetensors")):
        for key, value in sorted(read_tensors(path).items()):
            found.update(f"{path.name} {key} {value.dtype} {list(value.shape)}".encode())
            found.update(value.contiguous().flatten().view(-1).float().numpy().tobytes())
    return found.hexdigest()


def trials(folder: Path, seed: int, count: int, chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    """count: kills, spread over the recipes."""
    runs = {name: replace(one, save_every=1) for name, one in tiny_recipes.every(
        folder / f"files_{os.getpid()}", folder / f"runs_{os.getpid()}").items()}
    right, rng = {}, random.Random(seed)

    def killed(name: str, share: float) -> str:
        settings = runs[name]
        if name not in right:
            started = time.monotonic()
            in_child(settings, None)
            right[name] = digest(Path(settings.out)), time.monotonic() - started
        expected, seconds = right[name]
        shutil.rmtree(settings.out)
        in_child(settings, share * seconds)
        in_child(settings, None)
        if digest(Path(settings.out)) != expected:
            raise Wrong("the run that went on has other weights")
        if left := [str(p) for p in Path(settings.out).rglob("*.unfinished")]:
            raise Wrong(f"half-written files were left: {left}")
        return RECOVERED

    for number in range(count):
        name, share = list(runs)[number % len(runs)], rng.random()
        if chosen(number):
            yield Trial("trainer kills", f"{name} at {share:.2f} of its time",
                        lambda name=name, share=share: killed(name, share), limit=3 * PATIENCE)
