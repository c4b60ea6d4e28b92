"""`python -m trainer data`."""
from __future__ import annotations

from pathlib import Path


def add_arguments(one):
    one.add_argument("set", choices=["emoji"])
    one.add_argument("--source", type=Path, help="a folder that holds the npm packages; without it, npm fetches them")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--style", nargs="+", choices=["noto", "fluent-3d"], default=["noto"],
                     help="whose pictures (default: noto)")
    one.add_argument("--skin-tones", action="store_true", help="the skin tone variants too")


def run(args):
    """Make a data set."""
    from ..data import emoji

    print(emoji.build(args.out, args.source, args.skin_tones, tuple(args.style)))
