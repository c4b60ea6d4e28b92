"""Arguments that several commands have."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path


def with_recipe(one):
    one.add_argument("recipe", type=Path, help="a TOML file, such as recipes/pixelflow/pixelflow_emoji.toml (shipped)")
    one.add_argument("settings", nargs="*", metavar="key=value", help="change a setting: optimizer.learning_rate=3e-4")


def with_run(one):
    one.add_argument("run_folder", type=Path, metavar="run")
    one.add_argument("--step", type=int, help="the checkpoint; without it, the newest")
    one.add_argument("--weights", choices=["ema", "model"], default="ema")
    with_device(one)


def with_device(one):
    one.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, ...")


def with_sampling(one):
    one.add_argument("--steps", type=int, help="per stage")
    one.add_argument("--shift", type=float)
    one.add_argument("--cfg", type=float)
    one.add_argument("--seed", type=int)


def chosen_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def accelerator_of(device: str):
    """accelerate's Accelerator for a device that a person named, the same in every command."""
    from accelerate import Accelerator

    # Said outright, because without a GPU accelerate takes the processes of torchrun for separate runs.
    return Accelerator(cpu=chosen_device(device) == "cpu")


def bar(what: str, main: bool = True) -> Callable:
    """A progress bar around an iterable, in the main process, once it takes longer than a second."""
    from tqdm import tqdm

    return partial(tqdm, desc=what, delay=1, leave=False, dynamic_ncols=True, disable=not main)


def sampling(args, settings) -> dict:
    """The words of the command line, else the run's own."""
    names = ("steps", "shift", "cfg", "seed")
    return {n: getattr(settings, n) if getattr(args, n) is None else getattr(args, n) for n in names}
