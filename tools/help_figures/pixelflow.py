"""PixelFlow."""
from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from . import figure
from .calls import PROMPTS, SMILE, call, module, pixelflow, pixelflow_model, vae
from .drawing import BLUES, DIM, GAP, INK, LARGE, ORANGE, PAPER, SMALL, Drawing, Photo


@figure
def PixelFlowLoader():
    return Photo([(pixelflow(text), short) for text, short in PROMPTS.items()])


@figure
def PixelFlowTextEncoderLoader():
    return Photo([(pixelflow(text), text) for text in ("red heart", "blue heart", "house", "flag of japan")])


@figure
def PixelFlowClass():
    menu = next(one for one in module("PixelFlowClass").PixelFlowClass.define_schema().inputs).options
    text = "207, otter, 417"
    conditioning, null = call("PixelFlowClass", imagenet_class=menu[0], classes=text)
    labels = next(v for v in conditioning[0][1].values() if isinstance(v, Tensor)).tolist()
    drawing = Drawing(250)
    drawing.text(GAP, 14, f"classes:  {text}", ORANGE)
    drawing.text(GAP, 54, "a batch of five pictures:", DIM, SMALL)
    for i in range(5):
        left, label = GAP + i * 125, labels[i % len(labels)]
        drawing.box(left, 88, left + 112, 200, BLUES[0], BLUES[1])
        drawing.text(left + 56, 118, str(label), INK, LARGE, "mm")
        name = menu[label].partition(" ")[2].lstrip(": ").split(",")[0]
        for row, word in enumerate(name.split()):
            drawing.text(left + 56, 152 + 22 * row, word, BLUES[2], SMALL, "mm")
    drawing.text(GAP, 214, "null conditioning:  the class that stands for none", DIM, SMALL)
    return drawing


@figure
def PixelFlowCanvas():
    drawing, left = Drawing(266), GAP
    stages = pixelflow_model().model.model_config.unet_config["num_stages"]
    for shape in ("square", "landscape 3:2", "portrait 2:3", "custom (width, height)"):
        latent, = call("PixelFlowCanvas", model=pixelflow_model(), shape=shape, width=96, height=64, batch_size=1)
        height, width = latent["samples"].shape[-2:]
        scale = 1.75
        for stage in reversed(range(stages)):
            part = scale / 2 ** (stages - 1 - stage)
            drawing.box(left, 226 - height * part, left + width * part, 226, (*BLUES, ORANGE)[stage], PAPER)
        drawing.text(left, 234, f"{width} x {height}", INK, SMALL)
        drawing.text(left, 226 - height * scale - 26, shape.partition(" (")[0].split()[-1], DIM, SMALL)
        left += max(width * scale, 100) + 12
    return drawing


@figure
def PixelFlowSigmas():
    drawing, counts = Drawing(330), (20, 10, 5)
    text = ", ".join(map(str, counts))
    plot = dict(left=70, top=24, right=620, bottom=280)
    even, shifted = (call("PixelFlowSigmas", model=pixelflow_model(), steps=text, shift=shift, start_stage=0,
                          end_stage=-1)[0].tolist() for shift in ("1", "4"))
    x = [plot["left"] + 550 * i / (len(even) - 1) for i in range(len(even))]
    y = lambda sigma: plot["bottom"] - (plot["bottom"] - plot["top"]) * sigma  # noqa: E731
    start, sides = 0, (16, 32, 64)
    for stage, count in enumerate(counts):
        drawing.box(x[start], plot["top"], x[start + count], plot["bottom"], ("#262c35", "#2b333e", "#313b48")[stage])
        drawing.text((x[start] + x[start + count]) / 2, plot["bottom"] + 8, f"{count} steps", INK, SMALL, "ma")
        drawing.text((x[start] + x[start + count]) / 2, plot["bottom"] + 30, f"{sides[stage]} px", DIM, 16, "ma")
        start += count
    for values, colour in ((shifted, BLUES[1]), (even, ORANGE)):
        drawing.line(*zip(x, map(y, values), strict=True), colour=colour)
        for at, sigma in zip(x, values, strict=True):
            drawing.dot(at, y(sigma), colour, 4)
    for sigma in (0, 1):
        drawing.text(plot["left"] - 10, y(sigma), str(sigma), DIM, SMALL, "rm")
    drawing.text(plot["left"] - 10, y(0.5), "sigma", DIM, 16, "rm")
    drawing.text(600, 32, "shift 1", ORANGE, SMALL, "ra")
    drawing.text(600, 58, "shift 4", BLUES[1], SMALL, "ra")
    return drawing


@figure
def PixelFlowSampler():
    drawing, left = Drawing(336), GAP
    for stage, side in enumerate((16, 32, 64)):
        drawn = pixelflow(SMILE, end_stage=stage)
        assert drawn.width == side, drawn.size
        shown = 4.5 * side
        drawing.picture(drawn.resize((side * 9, side * 9), Image.Resampling.NEAREST), left, 296 - shown, shown, shown)
        drawing.text(left, 302, f"stage {stage}: {side} px", INK, SMALL)
        left += max(shown, 130) + 16
    return drawing


@figure
def PixelFlowSample():
    before = pixelflow("red heart")
    pixels = torch.frombuffer(bytearray(before.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).float() / 255
    latent, = call("VAEEncode", pixels=pixels, vae=vae("pixel_space"))
    after = [(pixelflow("blue heart", latent, stage), f"start_stage {stage}") for stage in range(3)]
    return Photo([(before, "red heart"), *after])
