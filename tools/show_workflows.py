"""Pictures of all templates as people see them, to look at: tests/artifacts/templates/ and contact sheets beside it.

    python -m pixstack.tools.show_workflows [NAME ...] [--front-end-root DIR] [--address URL]

Each template is opened in headless Chromium on the classic canvas and in Nodes 2.0 (`NAME.RENDERER.opened.png`), those
that need no download are run (`NAME.RENDERER.after.png`); the sheets are templates.RENDERER.opened.png and so on.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .comfyui import ROOT
from .layout_workflows import RENDERERS, bare_server, browse
from .model_files import nodes_of
from .workflow import shipped

FOLDER = ROOT / "tests" / "artifacts" / "templates"
COLUMNS, TILE, CAPTION = 3, (960, 540), 30


def without_download(workflow: dict) -> bool:
    return not any(node.get("properties", {}).get("models") for node in nodes_of(workflow))


def jobs_of(paths: dict[str, Path]) -> list[dict]:
    jobs = []
    for name, path in paths.items():
        workflow = json.loads(path.read_text(encoding="utf-8"))
        runs = without_download(workflow)
        for renderer in RENDERERS:
            job = dict(name=name, renderer=renderer, workflow=workflow, queue=runs)
            job["opened"] = str(FOLDER / f"{name}.{renderer}.opened.png")
            if runs:
                job["after"] = str(FOLDER / f"{name}.{renderer}.after.png")
            jobs.append(job)
    return jobs


def sheet(files: list[tuple[str, Path]]) -> Image.Image:
    rows = -(-len(files) // COLUMNS)
    made = Image.new("RGB", (COLUMNS * TILE[0], rows * (TILE[1] + CAPTION)), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(20)
    for i, (title, file) in enumerate(files):
        x, y = i % COLUMNS * TILE[0], i // COLUMNS * (TILE[1] + CAPTION)
        draw.text((x + 6, y + 3), title, "black", font)
        with Image.open(file) as picture:
            made.paste(picture.convert("RGB").resize(TILE), (x, y + CAPTION))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="show_workflows", description=__doc__.split("\n\n")[0])
    parser.add_argument("--front-end-root", metavar="DIR", help="another frontend than ComfyUI's own")
    parser.add_argument("--address", metavar="URL", help="a ComfyUI that runs already")
    parser.add_argument("names", nargs="*", metavar="NAME", help="short names; all when none is given")
    args = parser.parse_args()
    paths = {name: path for name, path in shipped().items() if not args.names or name in args.names}
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(paths)
    with contextlib.nullcontext(args.address) if args.address else bare_server(args.front_end_root) as address:
        answer = browse(address, jobs, timeout=3600)
    for job in answer["jobs"]:
        if job.get("event", "execution_success") != "execution_success":
            print(f"{job['name']}: {job['event']} {job.get('message', '')}", file=sys.stderr)
    for renderer in RENDERERS:
        for when in ("opened", "after"):
            files = [(paths[job["name"]].stem, Path(job[when])) for job in jobs
                     if job["renderer"] == renderer and when in job]
            if files:
                file = FOLDER.parent / f"templates.{renderer}.{when}.png"
                sheet(files).save(file)
                print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
