"""`python -m trainer sheets`."""
from __future__ import annotations

from pathlib import Path


def add_arguments(one):
    one.add_argument("run_folder", type=Path, metavar="run")
    one.add_argument("--out", type=Path, help="of the samples, a .png or .jpg; without it, RUN/over_steps.png")
    one.add_argument("--curve", type=Path, help="of the losses; without it, loss.png beside the samples' file")
    one.add_argument("--columns", type=int, default=10, help="at most so many steps, evenly spread")
    one.add_argument("--rows", type=int, default=16, help="at most so many prompts")
    one.add_argument("--side", type=int, default=256, help="largest side of a picture in pixels")


def run(args):
    """Draw how a run's samples changed, a row for each prompt, a column for each step, and the curve of its losses."""
    from ..evaluation import sheets
    from ..training.checkpoints import read_log

    if not (args.run_folder / "config.json").is_file():
        raise ValueError(f"{args.run_folder} is not a run folder: it has no config.json.")
    for name in ("columns", "rows", "side"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least 1.")
    out = args.out or args.run_folder / "over_steps.png"
    curve = args.curve or out.with_name("loss.png")
    log = read_log(args.run_folder)
    if sheets.drawn(args.run_folder) or not log:
        sheets.over_steps(args.run_folder, args.columns, args.rows, args.side).save(out, optimize=True)
        print(out)
    if log:
        sheets.loss_curve(log).save(curve, optimize=True)
        print(curve)
