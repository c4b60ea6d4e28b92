"""The picture of each node's help page: what the node gives, or, where it needs weights that do not come with PixStack,
what it computes without them.

    python -m pixstack.tools.make_help_pictures [NAME ...]

writes `web/docs/<name>.jpg` for pictures and `<name>.png` for drawings. A name is a node's id without `PixStack_`. Run
it again after an embedded model or a node has changed. All comes out of this tree: tools/help_figures calls its nodes
as a graph would, with the weights in assets/ and the pictures that come with it. A second run on the same machine gives
the same files.
"""
from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

from .comfyui import CACHE, ROOT
from .help_figures import (
    FIGURES,
    annotators,  # noqa: F401  each registers its own
    calls,
    pixart,  # noqa: F401
    pixelflow,  # noqa: F401
    pixelponder,  # noqa: F401
    ultrapixel,  # noqa: F401
)
from .help_figures.drawing import Drawing
from .host import Host

DOCS = ROOT / "web" / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make_help_pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="nodes without PixStack_; all when none is given")
    args = parser.parse_args()
    if unknown := set(args.names) - set(FIGURES):
        parser.error(f"no picture is made for {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as output:
        Host(CACHE / "base", Path(output)).start()
        logging.disable(logging.INFO)  # what core says of each model that it loads
        for name in args.names or FIGURES:
            with torch.inference_mode():
                figure = FIGURES[name]()
            path = DOCS / (name + (".png" if isinstance(figure, Drawing) else ".jpg"))
            figure.save(path)
            print(f"{path}  {path.stat().st_size // 1000 + 1} KB", flush=True)
        calls.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
