"""From settings to the things that training needs: data, text encoder, recipe."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ...models_impl.files import write_whole
from ...models_impl.guard import reading
from ..config.schema import Config
from ..data import loader, wording
from ..features import text_encoders
from ..files import entries
from ..memory import rounding
from ..recipes import find
from . import frozen
from .checkpoints import checkpoints
from .groups import divided

TOKENIZER, FACTS = "tokenizer.json", "facts.json"


def collection(config: Config) -> loader.Collection:
    return loader.read(config.data, config.needs)


def recipe(config: Config, collection: loader.Collection, folder: Path | None = None) -> nn.Module:
    """What is trained, at its start. The weights depend only on the seed."""
    torch.manual_seed(config.seed)
    text = text_encoders.make(config, wording.corpus(collection.train, config.data), folder)
    classes = len(collection.classes) or 1 + int(collection.train.column("label").max())
    named = [*config.samples.classes, *(one.class_index or 0 for one in config.samples.tables.values())]
    if config.needs == "classes" and (unknown := [c for c in named if not 0 <= c < classes]):
        raise ValueError(f"samples.classes names {', '.join(map(str, unknown))}, and the data have the classes 0 to "
                         f"{classes - 1}.")
    made = find(config.recipe.name)(config, text, classes)
    divided(made.groups(config), config.optimizer.groups)  # whose patterns are looked at before anything takes long
    made.look_at(collection.train)
    return rounding.lowered(made, config)


def write_facts(folder: Path, recipe: nn.Module, collection: loader.Collection, config: Config):
    """What a run must know to be opened without its data, of those whether they are still the same, and of the frozen
    weights under it too. Raises ValueError where these are others than the run had, but for resume=changed."""
    under = frozen.files(config, recipe)
    if config.resume != "changed" and checkpoints(folder) and (folder / FACTS).is_file():
        if others := frozen.others(entries(folder / FACTS).get("frozen") or {}, under):
            raise ValueError(f"{folder} holds a run over other weights than those of {' and '.join(others)}: what it "
                             "learned belongs to those that it began with. Put them back, choose another folder "
                             "(out=...), or go on with these: resume=changed.")
    facts = {"network": recipe.network(), "classes": collection.classes, "data": loader.identity(collection),
             "frozen": under}
    if recipe.text is not None and not isinstance(recipe.text, text_encoders.FROZEN):
        facts["text"] = {**recipe.text.config, "max_length": recipe.text.max_length}
        write_whole(folder / TOKENIZER, recipe.text.tokenizer.to_str(pretty=True))
    write_whole(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))


def other_data(folder: Path, collection: loader.Collection) -> str:
    """What to say where a run goes on with other pictures or captions than it had, else nothing."""
    if not checkpoints(folder):
        return ""
    old, now = entries(folder / FACTS).get("data") or {}, loader.identity(collection)
    return "" if all(now[name] == value for name, value in old.items() if name in now) else (
        f"the data are not those that this run had: {old['pictures']:,} training pictures then, {now['pictures']:,} "
        "now, or other captions or pixels. It goes on with these, and is no repetition of an unbroken run.")


def class_names(folder: Path) -> list[str]:
    """Names of a run's classes, by index."""
    return entries(folder / FACTS).get("classes", [])


def reopened(config: Config, folder: Path) -> nn.Module:
    """The recipe of a run folder, its weights still to be loaded."""
    facts = entries(folder / FACTS)
    with reading(folder / FACTS):
        classes, network = len(facts["classes"]), facts["network"]
    text = text_encoders.make(config, [], folder, facts if config.text.learn else None)
    return find(config.recipe.name)(config, text, classes, network)
