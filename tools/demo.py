"""`make demo`: prompts into pictures on the embedded checkpoint, in one ComfyUI, and a contact sheet of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .comfyui import ROOT
from .host import Host
from .workflow import read, shipped

WORKFLOW = shipped()["pixelflow_text_to_image"]
PROMPTS = (
    "red apple", "smiling cat face", "blue car", "dog face",
    "pizza", "red heart", "sun", "house",
    "rocket", "tree", "rainbow", "guitar",
    "ghost", "soccer ball", "cup of coffee", "flag of japan",
)  # fmt: skip
SEED = 1
COLUMNS, TILE, CAPTION = 4, 160, 28  # tiles in a row; pixels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="instead of the 16 that the demo draws")
    args = parser.parse_args(arguments)
    prompts = args.prompts or PROMPTS

    host = Host(output=args.output).start()
    graph = read(WORKFLOW, host.object_info())
    pictures, seconds = [], 0.0
    for prompt in prompts:
        run = host.run(with_prompt(graph, prompt, args.seed), fresh=False)  # the model stays loaded
        if run.error:
            print(f"error: {prompt}: {run.error}", file=sys.stderr)
            return 1
        pictures.append(Image.open(run.images[0]).convert("RGB"))
        seconds += run.seconds
        print(f"{run.seconds:5.1f} s  {prompt}")
    path = args.output.resolve() / "contact_sheet.png"
    contact_sheet(pictures, prompts).save(path)
    print(f"{len(prompts)} pictures in {seconds:.1f} s, loading included. Contact sheet:\n{path}")
    return 0


def with_prompt(graph: dict, prompt: str, seed: int) -> dict:
    """One picture of `prompt`."""
    graph = {i: {**node, "inputs": dict(node["inputs"])} for i, node in graph.items()}

    def inputs_of(kind: str) -> dict:
        (inputs,) = (node["inputs"] for node in graph.values() if node["class_type"] == kind)
        return inputs

    sample = inputs_of("PixStack_PixelFlowSample")
    sample["seed"] = seed
    graph[sample["positive"][0]]["inputs"]["text"] = prompt
    inputs_of("PixStack_PixelFlowCanvas")["batch_size"] = 1
    inputs_of("SaveImage")["filename_prefix"] = "".join(c if c.isalnum() else "_" for c in prompt)
    return graph


def contact_sheet(pictures: list[Image.Image], captions) -> Image.Image:
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = n % COLUMNS * TILE, n // COLUMNS * (TILE + CAPTION)
        sheet.paste(ImageOps.contain(picture, (TILE - 16, TILE - 16)), (x + 8, y + 8))
        draw.text((x + TILE // 2, y + TILE + CAPTION // 2 - 4), caption, fill="black", font=font, anchor="mm")
    return sheet


if __name__ == "__main__":
    sys.exit(main())
