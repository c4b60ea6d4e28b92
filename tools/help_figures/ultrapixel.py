"""UltraPixel, none of whose weights come with PixStack: sizes, schedules, tiles and hints."""
from __future__ import annotations

import re
from importlib import import_module
from itertools import pairwise

import torch
from PIL import Image

from ...models_impl.ultrapixel import sampling as ultrapixel
from ...models_impl.ultrapixel.config import StageAConfig
from ...models_impl.ultrapixel.guidance import up_weight
from . import figure
from .annotators import scene
from .calls import call, example, module
from .drawing import BLUES, DIM, GAP, INK, ORANGE, PAPER, SMALL, Drawing, Photo, gray, pictures


def grid(drawing: Drawing, left: float, bottom: float, size: float, cells: int, colour: str):
    drawing.box(left, bottom - size, left + size, bottom, colour)
    for i in range(1, cells):
        at = size * i / cells
        drawing.line((left + at, bottom - size), (left + at, bottom), colour=PAPER, width=0.6)
        drawing.line((left, bottom - at), (left + size, bottom - at), colour=PAPER, width=0.6)


@figure
def CascadeLoader():
    side = 256
    size = ultrapixel.sizes(side, side)
    drawing, bottom = Drawing(290), 232
    parts = [("Stage C", size.stage_c[0], BLUES[1], 14), ("Stage B", size.stage_b[0], BLUES[2], 2.6)]
    left = GAP
    for name, cells, colour, scale in parts:
        grid(drawing, left, bottom, cells * scale, cells, colour)
        drawing.text(left, bottom + 8, name, INK, SMALL)
        drawing.text(left, bottom + 32, f"{cells} x {cells} cells", DIM, 18)
        drawing.arrow((left + cells * scale + 20, bottom - 40), (left + cells * scale + 66, bottom - 40))
        left += max(cells * scale, 84) + 84
    picture = 204
    drawing.box(left, bottom - picture, left + picture, bottom, ORANGE)
    drawing.text(left, bottom + 8, "picture", INK, SMALL)
    drawing.text(left, bottom + 32, f"{side} x {side} pixels", DIM, 18)
    return drawing


@figure
def UltraPixelGuideLoader():
    side = 4096
    size = ultrapixel.sizes(side, side)
    drawing, bottom = Drawing(310), 250
    small, large = size.low[0], size.stage_c[0]
    grid(drawing, GAP + 10, bottom, small * 2.3, small, BLUES[1])
    drawing.text(GAP, bottom + 10, f"{small} x {small} cells", INK, SMALL)
    drawing.text(GAP, bottom + 34, "first, at low resolution", DIM, 18)
    drawing.arrow((100, bottom - 60), (156, bottom - 60))
    drawing.box(160, bottom - 90, 280, bottom - 30, None, ORANGE, 3)
    drawing.text(220, bottom - 60, "guide", ORANGE, 24, "mm")
    drawing.arrow((284, bottom - 60), (346, bottom - 60))
    grid(drawing, 360, bottom, large * 2.3, large, BLUES[2])
    drawing.text(360, bottom + 10, f"{large} x {large} cells", INK, SMALL)
    drawing.text(360, bottom + 34, f"{side} x {side} pixels", DIM, 18)
    return drawing


@figure
def UltraPixelGuide():
    """The released strength `up` by the size of a square picture."""
    drawing, left, right, top, bottom = Drawing(310), 70, 610, 30, 250
    low, high = 1024, 6144
    x = lambda side: left + (right - left) * (side - low) / (high - low)  # noqa: E731
    y = lambda up: bottom - (bottom - top) * up  # noqa: E731
    points, jumps, last = [], [], None
    for side in range(low, high + 1, 2):
        up = up_weight(*ultrapixel.sizes(side, side).stage_c)
        if last is not None and up != last:
            jumps.append(side)
            points.append((x(side), y(last)))
        points.append((x(side), y(up)))
        last = up
    drawing.line((left, bottom), (right, bottom), colour=BLUES[0])
    drawing.line((left, top), (left, bottom), colour=BLUES[0])
    drawing.line(*points, colour=ORANGE, width=4)
    for side in (low, 2048, *jumps, 5120, high):
        drawing.line((x(side), bottom), (x(side), bottom + 6), colour=DIM)
        drawing.text(x(side), bottom + 10, str(side), INK if side in jumps else DIM, 18, "ma")
    for start, end in pairwise((low, *jumps, high)):
        up = up_weight(*ultrapixel.sizes(start + 2, start + 2).stage_c)
        drawing.text((x(start) + x(end)) / 2, y(up) - 10, f"{up}", INK, SMALL, "ms")
    drawing.text(left - 10, top, "up", DIM, SMALL, "rm")
    drawing.text(left - 10, bottom, "0", DIM, SMALL, "rm")
    drawing.text(right, bottom + 34, "pixels along the side of a square", DIM, 18, "ra")
    return drawing


@figure
def UltraPixelSampler():
    schedule, steps = ultrapixel.CosineDiffusion(1.0), 20
    times = schedule.timestep(schedule.steps(steps)[:-1]).tolist()
    size = ultrapixel.sizes(4096, 4096)
    kept = min(times, key=lambda t: abs(t - ultrapixel.KEPT_TIMESTEP))
    drawing, left, right = Drawing(270), 150, 610
    x = lambda t: left + (right - left) * (1 - t)  # noqa: E731
    for y, cells, colour, word in ((60, size.low[0], BLUES[2], "first"), (180, size.stage_c[0], ORANGE, "then")):
        drawing.text(GAP, y, word, INK, SMALL, "lm")
        drawing.text(GAP, y + 24, f"{cells} x {cells}", DIM, 18, "lm")
        drawing.line((left, y), (right, y), colour=BLUES[0])
        for t in times:
            drawing.dot(x(t), y, colour, 6)
    drawing.dot(x(kept), 60, ORANGE, 10, INK)
    drawing.text(x(kept), 24, "its features are kept", INK, 18, "rm")
    for t in times:
        drawing.line((x(kept), 72), (x(t), 172), colour=BLUES[0], width=1)
    drawing.text(left, 240, "noise", DIM, SMALL, "lm")
    drawing.text(right, 240, "picture", DIM, SMALL, "rm")
    drawing.text((left + right) / 2, 214, "and guide every step of the large picture", DIM, 18, "mm")
    return drawing


@figure
def UltraPixelCanvas():
    drawing, left, bottom, scale = Drawing(330), GAP, 232, 0.036
    for shape in ("square", "landscape 16:9", "portrait 1:2"):
        latents = call("UltraPixelCanvas", shape=shape, side=4096, width=2048, height=2048, batch_size=1)
        stage_c, low, stage_b = ([*latent["samples"].shape[-2:]] for latent in latents[:3])
        height, width = (4 * cells for cells in stage_b)
        drawing.box(left, bottom - height * scale, left + width * scale, bottom, ORANGE)
        small = [cells * ultrapixel.COMPRESSION_C * scale for cells in low]
        drawing.box(left, bottom - small[0], left + small[1], bottom, BLUES[1], PAPER)
        drawing.text(left, bottom + 8, f"{width} x {height}", INK, SMALL)
        drawing.text(left, bottom + 34, f"stage_c {stage_c[1]} x {stage_c[0]}", DIM, 18)
        drawing.text(left, bottom + 56, f"low {low[1]} x {low[0]}", BLUES[1], 18)
        left += max(width * scale, 150) + 24
    return drawing


@figure
def UltraPixelStageALoader():
    """Tiles of a latent of 4096 pixels, and what one of them reads around it."""
    cells, tile, halo, scale = 1024, 256, StageAConfig().halo, 0.28
    drawing, left, top = Drawing(330), GAP + 8, 18
    for row in range(cells // tile):
        for column in range(cells // tile):
            drawing.box(left + column * tile * scale, top + row * tile * scale, left + (column + 1) * tile * scale,
                        top + (row + 1) * tile * scale, BLUES[0], BLUES[1], 1)
    edge = (left + (tile - halo) * scale, top + (tile - halo) * scale, left + (2 * tile + halo) * scale,
            top + (2 * tile + halo) * scale)
    drawing.box(*edge, BLUES[2])
    drawing.box(left + tile * scale, top + tile * scale, left + 2 * tile * scale, top + 2 * tile * scale, ORANGE)
    legend = (70, ORANGE, "a tile"), (110, BLUES[2], f"read with it: {halo} cells"), (150, BLUES[0], "other tiles")
    for y, colour, words in legend:
        drawing.box(334, y, 356, y + 22, colour)
        drawing.text(368, y + 11, words, INK, SMALL, "lm")
    drawing.text(334, 220, f"{4 * cells} x {4 * cells} pixels,", DIM, SMALL)
    drawing.text(334, 246, f"{cells} x {cells} cells", DIM, SMALL)
    return drawing


@figure
def UltraPixelStageB():
    """Memory of Stage B, as 'UltraPixel Canvas' reports it."""
    sizes = module("UltraPixelCanvas").ultrapixel_sizes
    drawing, sides, row = Drawing(306), (2048, 4096, 6144), 0
    drawing.text(GAP, 12, "Stage B 700M in bf16, with its weights", DIM, SMALL)
    for side in sides:
        cells = (side // 4) ** 2 * 1e-6
        ours, core = (sizes.WEIGHTS_B + one * cells for one in sizes.CELL_B)
        assert f"Stage B 700M {ours:.1f} GB" in sizes.report(side, side, (side, side))
        y = 48 + 82 * row
        drawing.text(GAP, y + 32, f"{side} px", INK, SMALL, "lm")
        for at, value, colour, word in ((y, ours, ORANGE, "with this node"), (y + 34, core, BLUES[1], "without")):
            drawing.box(110, at, 110 + 21 * value, at + 28, colour)
            drawing.text(120 + 21 * value, at + 14, f"{value:.1f} GB {word if row == 0 else ''}", INK, 18, "lm")
        row += 1
    return drawing


@figure
def UltraPixelStageBTiles():
    """Weights of the tiles of 4096 pixels with the node's own settings."""
    loaded = module("UltraPixelStageBTiles").ultrapixel_stage_b
    cells, tile, overlap, scale = 1024, 512, 64, 0.28
    spans = loaded.spans(cells, tile, overlap)
    total, shown = torch.zeros(cells, cells), torch.zeros(cells, cells)
    for i, (top, bottom, rows) in enumerate(spans):
        for j, (left, right, columns) in enumerate(spans):
            fade = rows[:, None] * columns
            total[top:bottom, left:right] += fade
            if i == j == len(spans) // 2:
                shown[top:bottom, left:right] = fade
    drawing, x, y, size = Drawing(320), GAP + 8, 16, cells * scale
    where = gray(shown / total).convert("L")
    orange, blue = (Image.new("RGB", where.size, colour) for colour in (ORANGE, BLUES[0]))
    drawing.picture(Image.composite(orange, blue, where), x, y, size, size)
    for at in (scale * edge for start, end, _ in spans for edge in (start, end)):
        drawing.line((x + at, y), (x + at, y + size), colour=BLUES[2], width=1)
        drawing.line((x, y + at), (x + size, y + at), colour=BLUES[2], width=1)
    words = [f"{4 * cells} x {4 * cells} pixels", f"tile_size {4 * tile}", f"overlap {4 * overlap}",
             f"{len(spans)} x {len(spans)} tiles", "orange: the middle tile's weight"]
    for row, text in enumerate(words):
        drawing.text(320, 50 + 34 * row, text, INK if row else DIM, SMALL)
    return drawing


@figure
def UltraPixelCanny():
    image = scene(768)[0][None, ..., None].expand(-1, -1, -1, 3)
    return Photo([(pictures(image)[0], "image"), *(
        (pictures(call("UltraPixelCanny", image=image, filter=filter, low=100, high=200)[0])[0], filter)
        for filter in ("reference", "fine"))])


@figure
def UltraPixelInpaintHint():
    image = example("lion")
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    mask = ((rows - 76) ** 2 + (columns - 64) ** 2 < 30**2).float()[None]
    hint, = call("UltraPixelInpaintHint", image=image, mask=mask)
    return Photo([(pictures(image)[0], "image"), (gray(mask[0]), "mask"), (pictures(hint)[0], "hint: colours"),
                  (gray(hint[0, ..., 3]), "hint: mask")])


@figure
def UltraPixelPersonalise():
    """Words of CLIP's vocabulary that a base_token finds, and a prompt with the learned word."""
    words = import_module("comfy.sd1_clip").SDTokenizer().tokenizer.get_vocab()
    drawing = Drawing(280)
    drawing.text(GAP, 14, "a prompt:", DIM, SMALL)
    left = GAP
    for word in ("a", "photo", "of", "a", "cat", "[roubaobao]"):
        wide = drawing.width_of(word, 22) + 20
        drawing.box(left, 44, left + wide, 82, ORANGE if word.startswith("[") else BLUES[0])
        drawing.text(left + wide / 2, 63, word, INK, 22, "mm")
        left += wide + 8
    for row, base in enumerate(("^cat</w>", "^cats?</w>", "^kitten")):
        found = sorted((word for word in words if re.search(base, word)), key=lambda word: (len(word), word))
        y = 116 + 52 * row
        drawing.text(GAP, y, base, ORANGE, SMALL)
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        drawing.text(160, y, f"{len(found)} word" + "s" * (len(found) > 1) + f":  {shown}", INK, SMALL)
    return drawing
