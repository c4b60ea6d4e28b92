"""The recipes keep the contract that the loop relies on, and CONTRIBUTING.md teaches the one in the code."""
import inspect
import re
from pathlib import Path

import pytest
from pixstack.models_impl.pixart import controlnet as pixart_controlnet
from pixstack.models_impl.pixart import sampling as pixart_sampling
from pixstack.models_impl.pixelponder import sampling as pixelponder_sampling
from pixstack.models_impl.ultrapixel import checkpoint as ultrapixel_checkpoint
from pixstack.trainer.recipes import RECIPES, contract, find, settings, settings_of
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
METHODS = [name for name, value in vars(contract.Recipe).items()
           if not name.startswith("_") and callable(getattr(contract.Recipe, name, None))]
VALUES = [name for name in contract.Recipe.__annotations__]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_every_member_of_the_contract(name):
    recipe = find(name)
    assert issubclass(recipe, contract.Base) and issubclass(recipe, nn.Module)
    for method in METHODS:
        expected = inspect.signature(getattr(contract.Recipe, method)).parameters
        own = inspect.signature(getattr(recipe, method)).parameters
        assert list(own)[:len(expected)] == list(expected), f"{method}{tuple(own)}"
        assert all(p.default is not p.empty for p in list(own.values())[len(expected):]), f"{method}{tuple(own)}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_its_settings_are(name):
    kind = settings_of(name)
    assert issubclass(kind, settings.Settings) and kind.name == name
    assert set(kind.sections) <= {"vae", "adapter", "memory.base", "text.padded"}
    assert (ROOT / "trainer/recipes" / f"{kind.module.replace('.', '/')}.py").is_file()


def test_released_values_in_settings_are_those_of_the_models():
    assert settings_of("pixart_controlnet")().blocks == pixart_controlnet.RELEASED_BLOCKS
    assert settings_of("pixart_lcm")().huber_c == pixart_sampling.HUBER_C
    assert settings_of("pixart_dmd")().timestep == pixart_sampling.DMD_TIMESTEP
    assert settings_of("pixelponder")().guidance == pixelponder_sampling.GUIDANCE
    assert settings_of("ultrapixel_controlnet")().blocks == list(ultrapixel_checkpoint.RELEASED_BLOCKS)


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_what_contributing_says_of_a_recipe_is_in_the_code():
    known = {*METHODS, *VALUES, *dir(settings.Settings), *settings.Settings.__annotations__, "Settings", "Recipe",
             "Base", "RECIPES"}
    for word in re.findall(r"`([^`]+)`", section("Adding a recipe")):
        if "/" in word or word.endswith(".py"):
            pattern = word.replace("<family>", "*").replace("<recipe>", "*")
            pattern = pattern if "/" in word else f"trainer/recipes/*/{word}" if word == "task.py" else f"**/{word}"
            assert next(ROOT.glob(pattern), None), word
        else:
            assert word in known, word


def test_every_folder_of_the_trainer_is_on_the_map_and_every_one_on_the_map_is_there():
    folders = {p.name for p in (ROOT / "trainer").iterdir() if (p / "__init__.py").is_file()}
    own = section("The layout").split("\ntrainer/ ", 1)[1].split("\ntools/ ")[0]  # others have folders there too
    assert set(re.findall(r"^  (\w+)/", own, flags=re.M)) == folders
