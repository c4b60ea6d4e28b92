"""Pictures of a subject's class that a run draws before its first step, with the network as it is then (DreamBooth,
arXiv 2208.12242: what the model knows of the class is kept by what it draws of it itself).

The picture of a number depends on the seed and the number only: those drawn together are always the same, drawn whole.
A file is whole or not there, so what an interrupted command has not drawn is drawn by the next one, to the bit.
Pictures of other origin in the folder count, and are left alone.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...models_impl.files import put
from ..config.schema import Config, Data, DataSet
from ..data import layouts
from ..data.sheets import to_images
from ..features import text_encoders
from ..memory import offload
from . import build

AT_ONCE = 4  # pictures drawn together
UNFINISHED = ".unfinished"


def file_of(folder: Path, number: int) -> Path:
    return folder / f"drawn_{number:05d}.png"


def missing(one: DataSet, settings: Data) -> list[int]:
    """The numbers of the pictures that are to be drawn, so that the set has prior_count. Raises ValueError."""
    folder = Path(one.path).expanduser()
    if not (one.prior and one.prior_count):
        return []
    there = layouts.read(folder, one.kind, settings).train if folder.is_dir() else []
    drawn = {item.file for item in there}
    free = (number for number in range(one.prior_count) if file_of(folder, number) not in drawn)
    return [number for number, _ in zip(free, range(one.prior_count - len(there)), strict=False)]


def planned(settings: Data) -> list[str]:
    """What a run would draw, in lines."""
    return [f"{one.path}: {len(numbers):,} of {one.prior_count:,} class pictures are to be drawn from {one.caption!r}"
            for one in settings.each if (numbers := missing(one, settings))]


def draw_missing(config: Config, accelerator, progress: Callable = lambda some: some):
    """Draws what there is too little of; several processes share it out."""
    wanted = [(one, numbers) for one in config.data.each if (numbers := missing(one, config.data))]
    accelerator.wait_for_everyone()  # all have counted the same
    if not wanted:
        return
    accelerator.print("\n".join(planned(config.data)))
    config = replace(config, data=config.data.without_drawn())
    collection = build.collection(config)
    with accelerator.main_process_first():
        recipe = build.recipe(config, collection, config.folder if config.text.frozen else None)
        if isinstance(recipe.text, text_encoders.FROZEN):
            recipe.text.prepare(["", *(one.caption for one, _ in wanted)], accelerator.device)
    offload.place(recipe, config, accelerator.device)
    recipe.eval()
    for one, numbers in wanted:
        groups = sorted({number // AT_ONCE for number in numbers})
        mine = groups[accelerator.process_index::accelerator.num_processes]
        for group in progress(mine):
            draw(recipe, config, one, group, set(numbers))
    accelerator.wait_for_everyone()


def draw(recipe, config: Config, one: DataSet, group: int, numbers: set[int]):
    """The pictures of a group, those of them that are in `numbers` into the folder of a set."""
    folder, s = Path(one.path).expanduser(), config.samples
    height, width = (side or config.data.resolution for side in (s.height, s.width))
    seed = config.seed * 1_000_003 + group * AT_ONCE  # the noise of picture i is that of seed + i
    drawn = recipe.sample([one.caption] * AT_ONCE, height, width, s.steps, s.shift, s.cfg, seed)
    if drawn.shape[-2:] != (height, width):
        raise ValueError(f"class pictures of {width}x{height} are to be drawn, and {drawn.shape[-1]}x{drawn.shape[-2]} "
                         "came: they are previews. Name what draws whole ones (model.stage_b and model.stage_a), or "
                         "draw them with another program.")
    if not drawn.isfinite().all():
        raise ValueError("The network drew class pictures with values that are no numbers. Use precision=fp32, or look "
                         "whether vae.path and init_from belong together.")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(to_images(drawn), group * AT_ONCE):
        if number in numbers:
            write(picture, file_of(folder, number))


def write(picture: Image.Image, file: Path):
    """At once or not at all."""
    unfinished = file.with_name(file.name + UNFINISHED)
    try:
        picture.save(unfinished, format="PNG")
        put(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
