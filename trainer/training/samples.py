"""Pictures of a run's sample prompts: what each is drawn with, and the files that they are kept in.

    samples/<step>.png       all of a step on one sheet, their prompts beneath
    samples/<step>/<i>.png   each by itself, as it was drawn; its settings are in the file's text
"""
from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...models_impl.files import put
from ..config.schema import Config, SamplePrompt
from ..data.pictures import shown
from ..data.sheets import captioned, to_images

FOLDER = "samples"


def wanted(config: Config) -> list[SamplePrompt]:
    """What is drawn, every setting filled in. Raises ValueError where nothing is named."""
    s, side = config.samples, config.data.resolution
    own = {"height": s.height or side, "width": s.width or side, "steps": s.steps, "shift": s.shift, "cfg": s.cfg}
    named = [SamplePrompt(prompt=one) if isinstance(one, str) else one for one in s.prompts] \
        or [SamplePrompt(class_index=one) for one in s.classes]
    if not named:
        raise ValueError("samples.prompts names nothing to draw.")
    return [replace(one, **{name: value for name, value in (*own.items(), ("seed", s.seed + i))
                            if getattr(one, name) is None}) for i, one in enumerate(named)]


def together(prompts: list[SamplePrompt]) -> list[list[SamplePrompt]]:
    """Prompts in a row that a recipe can draw at once: all is the same but what they show, and their seeds count up
    from that of the first."""
    rows: list[list[SamplePrompt]] = []
    for one in prompts:
        first = rows[-1][0] if rows else None
        alike = first and replace(first, prompt=one.prompt, class_index=one.class_index, hint=one.hint,
                                  seed=first.seed + len(rows[-1])) == one and bool(first.hint) == bool(one.hint)
        if alike:
            rows[-1].append(one)
        else:
            rows.append([one])
    return rows


def draw(recipe, config: Config, base: bool = False) -> list[tuple[SamplePrompt, Tensor]]:
    """(what it was drawn with, (3, H, W) in [-1, 1]) of each prompt. base: without the adapter, if there is one. No
    random draw of the training changes: a recipe draws from generators of its own."""
    adapter, found = config.recipe.has_strength, []
    for row in together(wanted(config)):
        first, given = row[0], {}
        strength = 0.0 if base and adapter else first.strength
        if first.hint:
            files = [one.hint.split(",") for one in row]
            given["conditions"] = {name: torch.stack([shown(Path(some[n]).expanduser(), first.height, first.width)
                                                      for some in files])
                                   for n, name in enumerate(config.recipe.hint_names(config))}
        what = [one.prompt if one.class_index is None else one.class_index for one in row]
        with recipe.at_strength(strength) if adapter else nullcontext():
            pictures = recipe.sample(what, first.height, first.width, first.steps, first.shift, first.cfg, first.seed,
                                     negative=first.negative, **given)
        found += [(replace(one, strength=strength), picture) for one, picture in zip(row, pictures, strict=True)]
    return found


def title(one: SamplePrompt, files: bool) -> str:
    """What stands beneath a picture. files: whether prompts are picture files, whose folders are nobody's business
    where a sheet is published."""
    if one.class_index is not None:
        return f"class {one.class_index}"
    return Path(one.prompt).name if files else one.prompt


def write(folder: Path, step: int, found: list[tuple[SamplePrompt, Tensor]], files: bool = False) -> Image.Image:
    """Writes the files of a step into a run folder, and returns the sheet. files: see `title`."""
    titles = [title(one, files) for one, _ in found]
    images = [to_images(picture[None])[0] for _, picture in found]
    own = folder / FOLDER / f"{step:08d}"
    own.mkdir(parents=True, exist_ok=True)
    for i, ((one, _), image) in enumerate(zip(found, images, strict=True)):
        notes = PngInfo()
        notes.add_itxt("title", titles[i])
        notes.add_itxt("settings", json.dumps(asdict(one), ensure_ascii=False))
        save_whole(image, own / f"{i:02d}.png", pnginfo=notes)
    page = captioned(titles, images)
    save_whole(page, own.with_suffix(".png"))
    return page


def save_whole(image: Image.Image, path: Path, **how):
    """At once or not at all, for somebody may look at it meanwhile."""
    unfinished = path.with_name(path.name + ".unfinished")
    image.save(unfinished, "PNG", **how)
    put(unfinished, path)
