"""The recipes by name. Each family has a folder: the settings of its recipes (settings.py, without torch), its task, a
small class `Recipe` for each recipe (contract.py says what it must have), and a TOML file for each run that somebody
can start."""
from __future__ import annotations

from importlib import import_module

RECIPES = {  # name in [recipe] -> family
    "pixelflow": "pixelflow",
    "pixart": "pixart",
    "pixart_lora": "pixart",
    "pixart_controlnet": "pixart",
    "pixart_dreambooth": "pixart",
    "pixart_lcm": "pixart",
    "pixart_dmd": "pixart",
    "ultrapixel_guide": "ultrapixel",
    "ultrapixel_lora": "ultrapixel",
    "ultrapixel_controlnet": "ultrapixel",
    "ultrapixel_stage_a": "ultrapixel",
    "ultrapixel_stage_b": "ultrapixel",
    "ultrapixel_stage_c": "ultrapixel",
    "pixelponder": "pixelponder",
    "flux": "flux",
    "autoencoder": "autoencoder",
}


def settings_of(name: str) -> type:
    """The dataclass of [recipe]; imports no torch."""
    return import_module(f".{RECIPES[name]}.settings", __package__).RECIPES[name]


def find(name: str) -> type:
    """The class that is trained."""
    return import_module(f".{settings_of(name).module}", __package__).Recipe
