"""What the loss is. A recipe is a small torch module; its file also defines the settings of [recipe] and [model].

    Settings, Model            dataclasses of the two sections, the doc under each field
    sections                   which of [vae], [adapter], memory.base and text.padded it reads
    problems(config)           everything wrong with the settings, in sentences, before anything is allocated
    make_encoders(config)      the frozen encoders of pictures whose features the cache may keep; `encoders`: its own
    Recipe(config, text, classes, network)   network: what `network()` said, of a run that is opened again
    look_at(items)             only where a recipe wants to see what it will be trained on, before it is
    groups(config)             what learns: {"params": [(name, parameter)], "rate": multiple, "matrices": names}
    forward(batch)             the loss of each picture, (B,)
    described(step), buckets(step), activation_bytes(pictures, cpu)      for --dry-run
    validate(batches), sample(what, height, width, steps, shift, cfg, seed)
    previews                   where there is one: whether samples may be smaller than what was asked for
    whole                      where parts of it are called one by one: names of what FSDP2 leaves whole (`shard`)
    of_pictures                where there are hints: whether `sample` makes them of pictures, conditions[""]
    network(), files()         for the run folder, and what export writes: path -> (tensors, metadata)

Recipes are not made of one another: what several need has a module of its own (`pixart.py`, `adapters.py`).
"""
from __future__ import annotations

from importlib import import_module

RECIPES = {  # name in [recipe] -> module here, whose class `Recipe` it is
    "pixelflow": "pixelflow.recipe",
    "pixart": "pixart.full",
    "pixart_lora": "pixart.lora",
    "pixart_controlnet": "pixart.controlnet",
    "pixart_dreambooth": "pixart.dreambooth",
    "pixart_lcm": "pixart.lcm",
    "pixart_dmd": "pixart.dmd",
    "ultrapixel_guide": "ultrapixel.guide",
    "ultrapixel_lora": "ultrapixel.lora",
    "ultrapixel_controlnet": "ultrapixel.controlnet",
    "pixelponder": "pixelponder.recipe",
    "flux": "flux.recipe",
    "autoencoder": "autoencoder.recipe",
}
PICTURES_ALONE = {"autoencoder"}  # of these: neither captions nor classes, and samples.prompts are picture files


def find(name: str):
    return import_module(f".{RECIPES[name]}", __package__).Recipe
