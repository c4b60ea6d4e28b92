"""What the loss is. A recipe is a small torch module; its file also defines the settings of [recipe] and [model]."""
from __future__ import annotations

from importlib import import_module

RECIPES = {"pixelflow": "pixelflow", "pixart": "pixart"}  # name in [recipe] -> module here, whose class `Recipe` it is


def find(name: str):
    return import_module(f".{RECIPES[name]}", __package__).Recipe
