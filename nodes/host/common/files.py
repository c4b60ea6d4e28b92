"""Model files as our loaders list and find them: ComfyUI's folders, and behind them what comes with PixStack.

Core's loaders preselect the first file of their lists, in its default graph too, and can read none of the embedded
networks: those stay out of core's lists. LoRAs and VAEs core reads; Load VAE gets ours at the end of its list.
"""
from __future__ import annotations

import functools
from pathlib import Path

import folder_paths

ASSETS = Path(__file__).resolve().parents[3] / "assets"
FOR_CORE = ("vae", "loras")
"""Folders of embedded files that core's loaders read."""


def embedded(folder: str) -> list[str]:
    """Names of the files of models/<folder> that come with PixStack."""
    return sorted(path.name for path in (ASSETS / folder).glob("*.safetensors"))


def listed(folder: str) -> list[str]:
    """A loader's menu: the user's files, then the embedded ones."""
    return last(folder_paths.get_filename_list(folder), embedded(folder), missing=True)


def last(names: list[str], own: list[str], missing: bool = False) -> list[str]:
    """`names` with those of `own` at the end. missing: with all of them, listed before or not."""
    return [*(name for name in names if name not in own), *(name for name in own if missing or name in names)]


def find(folder: str, name: str) -> str | None:
    """The path of a file of models/<folder>, the user's before an embedded one of the same name; None without any."""
    path = folder_paths.get_full_path(folder, name)
    return str(ASSETS / folder / name) if path is None and name in embedded(folder) else path


def find_or_raise(folder: str, name: str) -> str:
    """Raises FileNotFoundError as ComfyUI does."""
    return find(folder, name) or folder_paths.get_full_path_or_raise(folder, name)


def register(vae_loader: type | None):
    """Adds to core's folders what core can read. vae_loader: core's class of Load VAE."""
    for folder in FOR_CORE:
        folder_paths.add_model_folder_path(folder, str(ASSETS / folder))
    core = getattr(vae_loader, "vae_list", None)
    if core is None or hasattr(core, "__wrapped__"):  # another ComfyUI's, or done before
        return

    @functools.wraps(core)
    def vae_list(*args) -> list[str]:
        return last(core(*args), embedded("vae"))

    vae_loader.vae_list = staticmethod(vae_list)
