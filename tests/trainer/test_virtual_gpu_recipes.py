"""Every recipe by the trainer's own loop, on a virtual GPU (virtual_gpu.py), without float64."""
from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import tiny_recipes
import virtual_gpu
from pixstack.trainer.data import loader
from pixstack.trainer.features import cache as features
from pixstack.trainer.features import text_encoders
from pixstack.trainer.memory import offload
from pixstack.trainer.training import build, loop
from pixstack.trainer.training.run import Run
from virtual_gpu import VirtualGPU, Waits

pytestmark = pytest.mark.long

FOLDER = tempfile.TemporaryDirectory()


@cache
def made() -> dict:
    root = Path(FOLDER.name)
    return tiny_recipes.every(root / "parts", root / "runs")


def trained(name: str, precision: str) -> Waits:
    """Two steps of two pictures; counted is what the second one waits for, in all of its micro-batches."""
    config = replace(made()[name], precision=precision, device="auto", steps=2, save_every=2, batch_size=2)
    marks = []
    with VirtualGPU() as gpu:
        accelerator, found = virtual_gpu.accelerator(), build.collection(config)
        run = Run(config, accelerator, found.held_out)
        run.open()
        recipe = build.recipe(config, found, run.folder)
        offload.place(recipe, config, accelerator.device)
        if isinstance(recipe.text, text_encoders.FROZEN):
            captions = [caption for item in found.train + found.held_out for caption in item.texts]
            recipe.text.prepare(["", *config.samples.captions, *captions], accelerator.device)
        load = features.loader(config, recipe.encoders, found.train, config.data, accelerator.print)
        batches = loader.Batches(found.train, config.data, config.seed, config.batch_size, load)
        build.write_facts(run.folder, recipe, found, config)
        run.save = lambda *_: None  # which reads every weight
        run.log = lambda step, **_: marks.append(dict(gpu.waits))
        with closing(run):
            loop.train(recipe, batches, config, run, accelerator)
    return Waits({key: n - marks[0].get(key, 0) for key, n in marks[1].items() if n != marks[0].get(key, 0)})


REHEARSALS = {**{f"{name}, bf16": partial(trained, name, "bf16") for name in tiny_recipes.NAMES},
              "pixart, fp32": partial(trained, "pixart", "fp32")}


@pytest.mark.parametrize("rehearsal", REHEARSALS)
def test_a_recipe_trains_on_a_gpu_without_float64(rehearsal, rehearsed_on_gpu):
    virtual_gpu.check("trains " + rehearsal.rpartition(", ")[0], rehearsed_on_gpu[rehearsal])
