"""`python -m trainer export`."""
from __future__ import annotations

from pathlib import Path

from .options import with_run


def add_arguments(one):
    with_run(one)
    one.add_argument("--out", type=Path, help="gets diffusion_models/, loras/, vae/ ... as ComfyUI's models/ has "
                     "them: models/ itself, for example (default: export/ in the run folder)")
    one.add_argument("--name", help="of the files; without it, the run's")
    one.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp8"], default="bf16",
                     help="fp8: float8_e4m3fn for the matrices of blocks, bf16 for the rest (default: %(default)s)")
    one.add_argument("--card", action="store_true", help="a model card beside them, with the newest sample pictures")


def run(args):
    """Write the files that ComfyUI loads."""
    from ..export import cards, exporting

    name = args.name or args.run_folder.resolve().name
    out = args.out or args.run_folder / "export"
    written = exporting.export(args.run_folder, out, name, args.dtype, args.step, args.weights)
    if args.card:
        written += cards.write_card(args.run_folder, out, written, args.step)
    for path in written:
        print(f"{path}  {cards.size_of(path)}")
