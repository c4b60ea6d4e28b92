"""The picture beside each workflow: what it draws, or, where its weights are missing, a card with its numbers.

    python -m pixstack.tools.make_workflow_pictures [NAME ...]

Run it again after the embedded checkpoint has changed. Weights of the released models are used if they lie in the base
folder's models/ (`--base`); otherwise their workflows get the card: sizes in true proportion, and for PixArt and
UltraPixel the timesteps at which the network is called, for PixelPonder which condition counts where, all read from the
workflow.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..models_impl.annotators import canny, openpose
from ..models_impl.pixart.sampling import lcm_timesteps, time_uniform
from ..models_impl.ultrapixel.sampling import CosineDiffusion, sizes
from .comfyui import CACHE
from .host import Host, Run
from .workflow import read, shipped

SIDE, GAP, BAND = 512, 8, 56  # pixels of a whole picture, between the parts of one, and above them
PAPER, INK, STAGES = "#20242b", "#f2efe9", ("#3d5a80", "#5f8fb0", "#98c1d9", "#ee6c4d")
PIXART_SIDES = (256, 512, 1024, 2048)  # of its releases
NEEDS = "needs the released weights"


@dataclass(frozen=True)
class Card:
    family: str
    title: str
    needs: str = NEEDS
    stages: tuple[int, ...] = ()
    """Sides of PixelFlow's stages in pixels. Without any it is a card of another family."""
    given: str = ""
    """Part of the canvas that is given: "all", "left" half, all "around" a hole, its "edges"."""
    hints: bool = False
    """A card of the annotators: what two of them draw without a model."""


ALPHA, SIGMA, ULTRA = "PixArt-alpha", "PixArt-Sigma", "UltraPixel"
LONGEST = 5120  # pixels of the largest UltraPixel picture that has a card
HINTS = "needs files of yours, and says which"
CARDS = {
    "annotators": Card("Annotators", "Canny, HED, depth, poses", HINTS, hints=True),
    "annotators_folder": Card("Annotators", "a whole data set", HINTS, hints=True),
    "pixelflow_class_to_image": Card("PixelFlow", "class to image", stages=(32, 64, 128, 256)),
    "pixelflow_text_to_image_1024": Card("PixelFlow", "text to image, 1024 pixels", stages=(128, 256, 512, 1024)),
    "pixelflow_one_node": Card("PixelFlow", "everything in one node", stages=(128, 256, 512, 1024)),
    "pixart_sigma_one_node": Card(SIGMA, "everything in one node"),
    "pixelponder_one_node": Card("PixelPonder", "everything in one node"),
    "ultrapixel_one_node": Card(ULTRA, "4096 x 4096 pixels in one node"),
    "pixart_alpha_1024": Card(ALPHA, "text to image, 1024 pixels"),
    "pixart_sigma_1024": Card(SIGMA, "text to image, 1024 pixels"),
    "pixart_sigma_2k": Card(SIGMA, "text to image, 2048 pixels"),
    "pixart_sigma_900m": Card("PixArt-Sigma 900M", "text to image in two stages"),
    "pixart_lcm": Card("PixArt-LCM", "text to image in four steps"),
    "pixart_lcm_lora": Card(ALPHA, "four steps with the LCM-LoRA"),
    "pixart_dmd": Card("PixArt-DMD", "text to image in one step"),
    "pixart_controlnet": Card(ALPHA, "ControlNet of soft edges", given="edges"),
    "pixart_lora": Card(SIGMA, "with a LoRA", "needs the released weights and a LoRA of yours"),
    "pixart_inpaint": Card(SIGMA, "inpainting", given="around"),
    "pixart_reference": Card(ALPHA, "a picture after a reference", given="left"),
    "pixart_image_to_image": Card(SIGMA, "image to image", given="all"),
    "ultrapixel_2048": Card(ULTRA, "text to image, 2048 x 2048 pixels"),
    "ultrapixel_4096": Card(ULTRA, "text to image, 4096 x 4096 pixels"),
    "ultrapixel_2560x5120": Card(ULTRA, "text to image, 2560 x 5120 pixels"),
    "ultrapixel_low_memory": Card(ULTRA, "4096 x 4096 pixels, less memory"),
    "pixelponder_one_condition": Card("PixelPonder", "FLUX with one condition"),
    "pixelponder_four_conditions": Card("PixelPonder", "FLUX with four conditions"),
    "pixelponder_regional_masks": Card("PixelPonder", "a condition for each region"),
    "pixelponder_lora": Card("PixelPonder", "FLUX with a LoRA", "needs the released weights and a LoRA of yours"),
    "ultrapixel_image_to_image": Card(ULTRA, "image to image", given="all"),
    "ultrapixel_personalised": Card(ULTRA, "a cat that was learned, 2048 pixels"),
    "ultrapixel_controlnet": Card(ULTRA, "ControlNet of edges, 2048 pixels", given="edges"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make_workflow_pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, default=CACHE / "base", help="holds models/ (%(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows; all when none is given")
    args = parser.parse_args()
    host = Host(args.base).start()
    for name, path in shipped().items():
        if args.names and name not in args.names:
            continue
        graph = read(path, host.object_info())
        if name in CARDS and host.check(graph):  # a file that it names is not there
            picture = card(CARDS[name], graph)
        else:
            run = host.run(graph)
            if run.error:
                print(f"error: {name}: {run.error}", file=sys.stderr)
                return 1
            picture = sheet(rows_of(run), path.stem[3:].partition(" - ")[0].removesuffix("(no download)"))
        picture.save(path.with_suffix(".jpg"), quality=90)
        print(path.with_suffix(".jpg"))
    return 0


def rows_of(run: Run) -> list[list[Image.Image]]:
    """One row for each node that shows pictures, as the graph ran."""
    named = [(path.name.rsplit("_", 2)[0], path) for path in run.images]
    return [[Image.open(path).convert("RGB") for _, path in group] for _, group in groupby(named, key=lambda p: p[0])]


def chosen(rows: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """The rows of a thumbnail: about as many pictures across as down, the first of each row where there are more."""
    if len(rows) > 1 and min(map(len, rows)) > 1:
        return [row[: max(len(rows), 2)] for row in rows]
    flat = [picture for row in rows for picture in row]
    if len(rows) > 1 and max(map(len, rows)) > 1:  # a hint and what was drawn along it
        flat = flat[:4]
    columns = 2 if len(flat) in (2, 4) else min(len(flat), 3)
    return [flat[i : i + columns] for i in range(0, len(flat), columns)]


def sheet(rows: list[list[Image.Image]], name: str = "") -> Image.Image:
    """Rows of pictures in a square, as large as they go, so that single pixels stay visible. Above them stays a band,
    over whose left the browser writes; name: what stands at its right."""
    rows = chosen(rows)
    columns = max(map(len, rows))
    side = min((SIDE - GAP * (columns + 1)) // columns, (SIDE - BAND - GAP * len(rows)) // len(rows))
    left = (SIDE - columns * side - GAP * (columns - 1)) // 2
    top = BAND + (SIDE - BAND - len(rows) * (side + GAP)) // 2
    result = Image.new("RGB", (SIDE, SIDE), PAPER)
    ImageDraw.Draw(result).text((SIDE - GAP, BAND // 2), name, INK, ImageFont.load_default(26), anchor="rm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            how = Image.Resampling.NEAREST if side > 3 * picture.width else Image.Resampling.LANCZOS
            small = ImageOps.contain(picture, (side, side), how)  # a map has its legend below
            result.paste(small, (left + x * (side + GAP), top + y * (side + GAP)))
    return result


def card(about: Card, graph: dict) -> Image.Image:
    """A card for a workflow whose pictures cannot be drawn here. graph: the workflow in the API format."""
    result = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(result)
    draw.text((32, BAND), about.family, INK, ImageFont.load_default(36))
    draw.text((32, BAND + 42), about.title, INK, ImageFont.load_default(22))
    draw.text((32, BAND + 72), about.needs, STAGES[2], ImageFont.load_default(16))
    if about.hints:
        figure = openpose.draw({"people": [{"pose_keypoints_2d": WAVING}]}, 320, 220, stick=6)
        edges = canny.edges(figure.movedim(-1, 0)[None]).movedim(1, -1)[0].expand(-1, -1, 3)
        for left, hint, name in ((32, figure, "Draw Poses"), (260, edges, "its Canny Edges")):
            result.paste(Image.fromarray((hint * 255).to(torch.uint8).numpy()), (left, 156))
            draw.text((left, 480), name, INK, ImageFont.load_default(18))
    elif about.stages:
        for side, colour in sorted(zip(about.stages, STAGES, strict=True), reverse=True):
            square(draw, f"{side} x {side}", 320 * side // about.stages[-1], SIDE - 32, colour, colour)
    elif about.family == ULTRA:
        two_passes(draw, about.given, graph)
    elif competing(graph):
        patches(draw, *competing(graph))
    else:
        menus = (node["inputs"].get("resolution") for node in graph.values())
        side = next(int(menu) for menu in menus if isinstance(menu, str))
        edges = {other: 240 * other // PIXART_SIDES[-1] for other in PIXART_SIDES}
        for other, edge in edges.items():
            square(draw, f"{other} pixels", edge, 400, None, STAGES[1])
        square(draw, f"{side} pixels", edges[side], 400, STAGES[3], STAGES[3])
        inside(draw, about.given, 32, 400 - edges[side], 32 + edges[side], 400)
        timeline(draw, *calls(graph))
    return result


WAVING = [  # x, y, confidence of OpenPose's eighteen points, in parts of the picture
    0.50, 0.14, 1, 0.50, 0.28, 1, 0.36, 0.28, 1, 0.26, 0.44, 1, 0.32, 0.58, 1, 0.64, 0.28, 1, 0.80, 0.22, 1,
    0.84, 0.07, 1, 0.42, 0.56, 1, 0.38, 0.75, 1, 0.36, 0.94, 1, 0.58, 0.56, 1, 0.63, 0.75, 1, 0.66, 0.94, 1,
    0.46, 0.12, 1, 0.54, 0.12, 1, 0.41, 0.14, 1, 0.59, 0.14, 1,
]  # fmt: skip


def square(draw: ImageDraw.ImageDraw, size: str, edge: int, bottom: int, fill: str | None, colour: str):
    """One of several from the same corner, `edge` wide, its size in words beside it."""
    draw.rectangle((32, bottom - edge, 32 + edge, bottom), fill, colour)
    draw.text((376, bottom - edge), size, colour, ImageFont.load_default(20))
    draw.line((32 + edge, bottom - edge, 370, bottom - edge), colour)


def inside(draw: ImageDraw.ImageDraw, given: str, left: int, top: int, right: int, bottom: int):
    """Marks what a picture of the user's gives to the canvas."""
    part = (right - left) // 4
    if given == "all":
        draw.rectangle((left, top, right, bottom), STAGES[2], STAGES[3], 3)
    elif given == "left":
        draw.rectangle((left, top, (left + right) // 2, bottom), STAGES[2])
    elif given == "around":
        draw.rectangle((left, top, right, bottom), STAGES[2])
        draw.rectangle((left + part, top + part, right - part, bottom - part), STAGES[3])
    elif given == "edges":
        draw.ellipse((left + part, top + part // 2, right - part, bottom - 2 * part), outline=STAGES[2], width=3)
        draw.line((left, bottom - part, right, bottom - part), STAGES[2], 3)


def two_passes(draw: ImageDraw.ImageDraw, given: str, graph: dict):
    """The picture and its low-resolution pass in true proportion, and the calls of both."""
    canvas = next(node["inputs"] for node in graph.values() if "side" in node["inputs"])
    size = sizes(canvas["height"], canvas["width"])
    small = ImageFont.load_default(18)
    passes = (canvas["height"], canvas["width"], size.stage_c, STAGES[3]), (*size.low_pixels, size.low, STAGES[1])
    for i, (height, width, (rows, columns), colour) in enumerate(passes):
        high, wide = (260 * side // LONGEST for side in (height, width))
        box = (32, 410 - high, 32 + wide, 410)
        draw.rectangle(box, colour, colour)
        if i == (0 if given == "all" else 1):
            inside(draw, given, *box)
        draw.text((310, 180 + 84 * i), ("then" if i == 0 else "first") + f" {width} x {height}", colour, small)
        draw.text((310, 204 + 84 * i), f"{columns} x {rows} cells of Stage C", STAGES[2], ImageFont.load_default(14))
        draw.line((32 + wide, box[1], 300, 190 + 84 * i), colour)
    timesteps, cfg = cascade_calls(graph)
    timeline(draw, [999 * timestep for timestep in timesteps], cfg, (434, 452), (STAGES[1], STAGES[3]))


def cascade_calls(graph: dict) -> tuple[list[float], float]:
    """(timesteps in [0, 1] at which each pass calls Stage C, cfg)."""
    inputs = [node["inputs"] for node in graph.values()]
    steps = next(i for i in inputs if "denoise" in i and "model" in i)
    schedule = CosineDiffusion(next(i["shift"] for i in inputs if "shift" in i))
    levels = schedule.steps(int(steps["steps"] / steps["denoise"]))[-steps["steps"] - 1 : -1]
    return schedule.timestep(levels).tolist(), next(i["cfg"] for i in inputs if "cfg" in i)


def competing(graph: dict) -> tuple[list[tuple[str, bool]], bool]:
    """([(kind, whether it has a mask)] of PixelPonder's conditions as they count, whether they are blended); empty for
    a workflow without them."""
    apply = next((n["inputs"] for n in graph.values() if n["class_type"] == "PixStack_PixelPonderApply"), None)
    if apply is None:
        return ()
    conditions, source = [], apply["conditions"]
    while source:
        inputs = graph[source[0]]["inputs"]
        conditions.insert(0, inputs)
        source = inputs.get("conditions")
    conditions.sort(key=lambda inputs: -inputs["priority"])
    return [(inputs["kind"], "mask" in inputs) for inputs in conditions], apply["strategy"] == "blend"


def patches(draw: ImageDraw.ImageDraw, conditions: list[tuple[str, bool]], blended: bool, count=16, edge=20):
    """A picture of `count` patches a side: the first condition's, but for a disc under another's mask; or mixed."""
    top, legend, shown = SIDE - 32 - count * edge, ImageFont.load_default(20), (3, 0, 2, 1)
    masked = next((k for k, (_, mask) in enumerate(conditions) if mask), 0)
    for row in range(count):
        for column in range(count):
            inside = (row - 0.4 * count) ** 2 + (column - 0.6 * count) ** 2 < (0.27 * count) ** 2
            winners = range(len(conditions)) if blended else [masked if inside else 0]
            width = (edge - 2) / len(winners)
            x, y = 32 + column * edge, top + row * edge
            for k, winner in enumerate(winners):
                box = (x + round(k * width), y, x + round((k + 1) * width) - 1, y + edge - 3)
                draw.rectangle(box, STAGES[shown[winner]])
    for k, (kind, mask) in enumerate(conditions):
        y = top + 34 * k
        draw.rectangle((376, y, 390, y + 14), STAGES[shown[k]])
        draw.text((400, y + 7), kind + (", mask" if mask else ""), INK, legend, anchor="lm")


SCHEDULES = {"reference (time-uniform)": time_uniform, "sgm_uniform": time_uniform, "lcm": lcm_timesteps}


def calls(graph: dict) -> tuple[list[float], float]:
    """(timesteps at which the workflow calls its network, cfg)."""
    inputs = [node["inputs"] for node in graph.values()]
    cfg = next((i["cfg"] for i in inputs if "cfg" in i), 1.0)
    one = next(i for i in inputs if "steps" in i)
    schedule, steps = one["schedule" if "schedule" in one else "scheduler"], one["steps"]
    if schedule.startswith("dmd"):
        return [float(one["timestep"])], cfg
    timesteps = SCHEDULES[schedule](max(steps, round(steps / one["denoise"])))
    return timesteps[-(steps + 1) : -1], cfg


def timeline(draw: ImageDraw.ImageDraw, timesteps: list[float], cfg: float, ys: tuple[int, ...] = (446,),
             colours: tuple[str, ...] = (STAGES[3],)):
    """A row at each of `ys`, with a dot for each call of the network, noise on the left."""
    left, right, small = 92, 420, ImageFont.load_default(16)
    for y, colour in zip(ys, colours, strict=True):
        draw.line((left, y, right, y), STAGES[0], 2)
        for timestep in timesteps:
            x = left + (right - left) * (999 - timestep) / 999
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
    middle = sum(ys) // len(ys)
    draw.text((left - 10, middle), "noise", STAGES[2], small, anchor="rm")
    draw.text((right + 10, middle), "picture", STAGES[2], small, anchor="lm")
    count = f"{len(timesteps)} step" + ("s" if len(timesteps) > 1 else "") + (" twice" if len(ys) > 1 else "")
    draw.text((32, 466), f"{count}, cfg {cfg:g}" if cfg != 1 else f"{count}, without cfg", INK, small)


if __name__ == "__main__":
    sys.exit(main())
