"""`python -m trainer train`."""
from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain

from .options import accelerator_of, bar, with_recipe


def add_arguments(one):
    with_recipe(one)
    one.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")


def run(args):
    """Train by a recipe file; run it again to go on."""
    from ..config.check import load

    config = load(args.recipe, args.settings)

    import torch
    from tqdm import tqdm

    from ..data import loader
    from ..features import precision, text_encoders
    from ..training import build, class_pictures, cost, loop
    from ..training.run import Run

    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = accelerator_of(config.device)
    precision.set_float32_matmul(config, accelerator.device)
    parts = loop.parts_of(config, accelerator.process_index, accelerator.num_processes)
    if args.dry_run:
        from ..training import plan

        if drawn := class_pictures.planned(config.data):
            accelerator.print("\n".join([*drawn, "This is the plan without them:"]))
            config = replace(config, data=config.data.without_drawn())
        collection = build.collection(config)
        batches = loader.Batches(collection.train, config.data, config.seed, config.batch_size)
        recipe = plan.on_meta(lambda: build.recipe(config, collection))
        lines = plan.describe(config, collection, recipe, batches, parts, accelerator.num_processes, accelerator.device)
        return accelerator.print("\n".join(lines))

    if said := cost.slow_precision(config, cost.Rates(accelerator.device, side=128)):
        accelerator.print(said)
    class_pictures.draw_missing(config, accelerator,
                                lambda groups: tqdm(groups, disable=not accelerator.is_main_process))
    with accelerator.local_main_process_first() if config.data.index else nullcontext():  # one lists for all
        collection = build.collection(config)
    with closing(Run(config, accelerator, collection.held_out)) as run:
        recipe, batches = prepared(run, config, collection, accelerator)
        step = loop.train(recipe, batches, config, run, accelerator)
        if isinstance(recipe.text, text_encoders.FROZEN):
            recipe.text.store.write()  # what steps embedded
    if accelerator.is_main_process:
        print(f"step {step} of {config.steps}: {config.folder}")
    accelerator.end_training()
    if run.ended_by_file and step < config.steps:
        accelerator.print("stopped by the file stop; the same command goes on from there.")
    if run.stopped_by and step < config.steps:
        if accelerator.is_main_process:
            print("stopped; the same command goes on from there.", file=sys.stderr)
        if accelerator.num_processes == 1:  # a launcher would take it for a crash
            sys.exit(128 + run.stopped_by)


def prepared(run, config, collection, accelerator) -> tuple:
    """(recipe, batches) of a run, whose folder is opened."""
    from ..data import loader, sets, wording
    from ..distributed import strategy
    from ..features import cache, text_encoders
    from ..memory import offload
    from ..training import build

    with accelerator.main_process_first():  # it clears the folder and makes the tokenizer that the others read
        run.open()
        recipe = build.recipe(config, collection, run.folder)
        offload.place(recipe, config, accelerator.device)
    if isinstance(recipe.text, text_encoders.FROZEN):
        def captions():
            return wording.every(collection.train if config.text.ahead else (), collection.held_out, config.data,
                                 config.seed)

        if config.data.caption_variants and config.text.ahead and accelerator.is_main_process:
            count = wording.different(captions())
            print(f"{wording.counted(count, collection.train, config.data)}: they are embedded first.")
        with accelerator.main_process_first():
            if accelerator.is_local_main_process:  # of the others none need look through all captions
                recipe.text.prepare(chain(["", *config.samples.captions], captions()), accelerator.device,
                                    bar("embedding captions", accelerator.is_main_process))
        accelerator.wait_for_everyone()
        recipe.text.store.refresh()
        recipe.text.store.writer = accelerator.process_index  # what a step embeds
    hashing = bar("looking for cached pictures", accelerator.is_main_process)
    load = cache.loader(config, recipe.encoders, collection.train, config.data, accelerator.print, hashing)
    run.load = cache.loader(config, recipe.encoders, run.items, config.data.unvaried(), accelerator.print, hashing)
    batches = loader.Batches(collection.train, config.data, config.seed, config.batch_size, load)
    if config.compile:
        recipe.compile_blocks()
    if accelerator.is_main_process:
        if said := build.other_data(run.folder, collection):
            print(said)
        build.write_facts(run.folder, recipe, collection, config)
        count, learning = (sum(p.numel() for p in recipe.parameters() if p.requires_grad or all_of_them)
                           for all_of_them in (True, False))
        print(f"{config.folder}: {loader.summary(collection)}; {learning:,} of {count:,} parameters learn")
        for line in sets.counted(collection.train, collection.held_out, config.data):
            print(f"  {line}")
        if accelerator.num_processes > 1:
            print(f"{accelerator.num_processes} processes, {strategy.IN_WORDS[strategy.way(config)]}")
    return recipe, batches
