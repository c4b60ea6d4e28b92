"""Pictures with their prompts beneath, and the curve of a run's losses."""
from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..data.sheets import LEAST, LINE, to_images, wrapped


def contact_sheet(prompts: list[str], pictures: Tensor, columns: int = 4, notes: list[str] = ()) -> Image.Image:
    """Pictures with their prompts beneath."""
    images = to_images(pictures)
    width, height = images[0].width * 2, images[0].height * 2
    cell_w, cell_h = width + 16, height + 22
    page = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % columns * cell_w + 8, i // columns * cell_h + 4
        page.paste(image.resize((width, height), Image.LANCZOS), (x, y))
        text = prompt + (f" {notes[i]}" if notes else "")
        while draw.textlength(text) > cell_w - 4:
            text = text[:-2] + "…"
        draw.text((x, y + height + 2), text, fill="black")
    return page


def over_steps(folder: Path, columns: int, rows: int, side: int) -> Image.Image:
    """How the samples of a run became what they are: a row for each prompt, a column for each step, spread evenly over
    the run where there are more than `columns`. A picture is at most `side` pixels wide and high. Raises ValueError
    where there are no samples."""
    steps = drawn(folder)
    if not steps:
        raise ValueError(f"{folder} has no samples of single prompts: samples.every draws them.")
    chosen = [list(steps)[i] for i in evenly(len(steps), columns)]
    count = min(rows, max(len(steps[step]) for step in chosen))
    cells, texts = {}, {}
    for column, step in enumerate(chosen):
        for row, file in enumerate(steps[step][:count]):
            with Image.open(file) as image:
                texts[row] = image.info.get("title", "")  # the newest, where prompts have changed
                cells[row, column] = ImageOps.contain(image.convert("RGB"), (side, side))
    width, height = (max(getattr(one, name) for one in cells.values()) for name in ("width", "height"))
    cell_w, cell_h = max(width, LEAST) + 4, height + 4
    left, top = 160, LINE + 4
    page = Image.new("RGB", (left + len(chosen) * cell_w, top + count * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for column, step in enumerate(chosen):
        draw.text((left + column * cell_w, 2), f"step {step:,}" if step else "before", fill="black")
    for row in range(count):
        for n, line in enumerate(wrapped(texts.get(row, ""), draw, left - 8, max(1, height // LINE))):
            draw.text((2, top + row * cell_h + n * LINE), line, fill="black")
    for (row, column), image in cells.items():
        page.paste(image, (left + column * cell_w, top + row * cell_h))
    return page


def drawn(folder: Path) -> dict[int, list[Path]]:
    """Step -> the pictures of its sample prompts, in order of the steps."""
    places = sorted((int(p.name), p) for p in (folder / "samples").glob("*") if p.name.isdigit() and p.is_dir())
    found = {step: sorted(p for p in place.glob("*.png") if p.stem.isdigit()) for step, place in places}
    return {step: files for step, files in found.items() if files}


def evenly(count: int, most: int) -> list[int]:
    """At most so many places of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)} | {count - 1})[-most:]


def loss_curve(lines: list[dict]) -> Image.Image:
    """The losses of a run's log: training grey, its mean black (over 2 % of the run, at least five lines),
    validation red. Log scale. Raises ValueError where nothing was logged."""
    def logged(name):  # what is not above zero has no place on the scale
        return [(one["step"], one[name]) for one in lines if 0 < one.get(name, 0) < math.inf]

    training, validation = logged("loss"), logged("validation_loss")
    if not training and not validation:
        raise ValueError("The log has no losses yet.")
    reach = max(5, len(training) // 50)
    smooth = [(step, sum(v for _, v in training[max(0, i - reach + 1):i + 1]) / min(reach, i + 1))
              for i, (step, _) in enumerate(training)]
    values = [math.log(v) for _, v in training + validation]
    low, high, last = min(values), max(values), max(step for step, _ in training + validation)
    width, height = 640, 320
    page = Image.new("RGB", (width, height), "white")
    draw, left, edge = ImageDraw.Draw(page), 52, 18

    def at(step, value):
        share = (math.log(value) - low) / max(high - low, 1e-9)
        return left + (width - left - edge) * step / max(last, 1), height - edge - (height - 2 * edge) * share

    for i in range(5):
        value = math.exp(low + (high - low) * i / 4)
        y = at(0, value)[1]
        draw.line((left, y, width - edge, y), fill="#dddddd")
        draw.text((4, y - 6), f"{value:.4f}", fill="black")
    curves = {"training": (training, "#bbbbbb"), "its mean": (smooth, "black"), "validation": (validation, "#cc0000")}
    x = left
    for name, (curve, colour) in curves.items():
        if len(curve) > 1:
            draw.line([at(*point) for point in curve], fill=colour, width=2 if colour != "#bbbbbb" else 1)
            draw.line((x, 8, x + 16, 8), fill=colour, width=2)
            draw.text((x + 20, 2), name, fill="black")
            x += 100
    draw.text((left, height - 14), "0", fill="black")
    draw.text((width - 90, height - 14), f"step {last:,}", fill="black")
    return page
