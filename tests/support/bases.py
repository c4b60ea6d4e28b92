"""Base folders of ComfyUI with something behind every file that a shipped workflow names."""
from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import copytree

import weights
from conftest import WORKFLOWS
from filelock import FileLock  # a requirement of torch
from pixstack.tools.comfyui import make_base


def filled(base: Path, shared: Path) -> Path:
    """`base`, filled with copies of files that the first process of a run makes in `shared`."""
    made = shared / "stand_ins"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            unfinished = shared / "stand_ins.unfinished"
            for path in WORKFLOWS:
                weights.place(unfinished / "models", json.loads(path.read_text(encoding="utf-8")))
            unfinished.rename(made)
    base = make_base(base)
    for name in ("models", "input"):
        copytree(made / name, base / name, dirs_exist_ok=True)
    return base


def shared_folder(own: Path) -> Path:
    """The folder that all workers of pytest-xdist have in common, of one's own basetemp."""
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
