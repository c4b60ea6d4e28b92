"""The picture beside each workflow: what it draws, or, where its weights are not at hand, the sizes that it draws.

    python -m pixstack.tools.make_workflow_pictures [NAME ...]

Run it again after the embedded checkpoint has changed. Weights of the released models are used if they lie in the base
folder's models/ (`--base`); otherwise their workflows get the card with sizes.
"""
from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .comfy_host import CACHE, ROOT, Host, Run
from .workflow import read

SIDE, GAP = 512, 8  # pixels of a whole picture, and between the parts of one
CARDS = {  # workflow -> (title, what is needed, sides of the stages in pixels)
    "pixelflow_class_to_image": ("class to image", "needs the released weights", (32, 64, 128, 256)),
    "pixelflow_text_to_image_1024": ("text to image, 1024 pixels", "needs the released weights", (128, 256, 512, 1024)),
}
PAPER, INK, STAGES = "#20242b", "#f2efe9", ("#3d5a80", "#5f8fb0", "#98c1d9", "#ee6c4d")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make_workflow_pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, default=CACHE / "base", help="holds models/ (%(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows; all when none is given")
    args = parser.parse_args()
    host = Host(args.base).start()
    for path in sorted((ROOT / "workflows").glob("*.json")):
        if args.names and path.stem not in args.names:
            continue
        if path.stem in CARDS and not weights_are_there(path, host.models):
            picture = card(*CARDS[path.stem])
        else:
            run = host.run(read(path, host.object_info()))
            if run.error:
                print(f"error: {path.stem}: {run.error}", file=sys.stderr)
                return 1
            picture = sheet(rows_of(run))
        picture.save(path.with_suffix(".jpg"), quality=90)
        print(path.with_suffix(".jpg"))
    return 0


def weights_are_there(workflow: Path, models: Path) -> bool:
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    files = [m for node in nodes for m in node["properties"].get("models", [])]
    return all((models / m["directory"] / m["name"]).is_file() for m in files)


def rows_of(run: Run) -> list[list[Image.Image]]:
    """One row for each node that shows pictures, as the graph ran."""
    named = [(path.name.rsplit("_", 2)[0], path) for path in run.images]
    return [[Image.open(path).convert("RGB") for _, path in group] for _, group in groupby(named, key=lambda p: p[0])]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures, enlarged so that single pixels stay visible; a single row of four becomes two of two."""
    if len(rows) == 1 and len(rows[0]) == 4:
        rows = [rows[0][:2], rows[0][2:]]
    columns = max(map(len, rows))
    side = (SIDE - GAP * (columns + 1)) // columns
    result = Image.new("RGB", (SIDE, GAP + len(rows) * (side + GAP)), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            how = Image.Resampling.NEAREST if side > 3 * picture.width else Image.Resampling.LANCZOS
            result.paste(picture.resize((side, side), how), (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    return result


def card(title: str, needs: str, sides: tuple[int, ...]) -> Image.Image:
    """The stages as squares in true proportion, for a workflow whose pictures cannot be drawn here."""
    result = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(result)
    draw.text((32, 28), "PixelFlow", INK, ImageFont.load_default(40))
    draw.text((32, 78), title, INK, ImageFont.load_default(24))
    draw.text((32, 110), needs, STAGES[2], ImageFont.load_default(18))
    for side, colour in sorted(zip(sides, STAGES, strict=True), reverse=True):
        edge = round(320 * side / sides[-1])
        draw.rectangle((32, SIDE - 32 - edge, 32 + edge, SIDE - 32), fill=colour)
        draw.text((376, SIDE - 32 - edge), f"{side} x {side}", colour, ImageFont.load_default(20))
        draw.line((32 + edge, SIDE - 32 - edge, 370, SIDE - 32 - edge), colour)
    return result


if __name__ == "__main__":
    sys.exit(main())
