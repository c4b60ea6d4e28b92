"""`python -m trainer pairs`."""
from __future__ import annotations

from pathlib import Path

from .options import accelerator_of, with_recipe


def add_arguments(one):
    with_recipe(one)
    one.add_argument("--out", type=Path, help="a folder; without it, recipe.pairs")
    one.add_argument("--steps", type=int, default=20, help="of the teacher's DPM-Solver++ (default: %(default)s)")
    one.add_argument("--cfg", type=float, default=4.5, help="of the teacher (default: %(default)s, as the release's)")
    one.add_argument("--batch", type=int, default=8, help="pairs at once; another number rounds otherwise "
                     "(default: %(default)s)")


def run(args):
    """Make the pairs of noise and latent that recipe.regression of pixart_dmd compares with, on several processes
    too; run it again to go on."""
    from ..config import check
    from ..config.load import read_toml

    name = read_toml(args.recipe).get("recipe", {}).get("name")
    if name != "pixart_dmd":
        raise ValueError(f"{args.recipe} is of recipe.name={name!r}: pairs are what pixart_dmd learns from.")
    config = check.load(args.recipe, [*args.settings, "recipe.regression=0"])  # whose files may be absent yet
    out = args.out or (Path(config.recipe.pairs).expanduser() if config.recipe.pairs else None)
    if out is None:
        raise ValueError("name the folder of the pairs: --out, or recipe.pairs.")

    from tqdm import tqdm

    from ..features import precision
    from ..recipes.pixart import pairs
    from ..training import build

    accelerator = accelerator_of(config.device)
    precision.set_float32_matmul(config, accelerator.device)
    pairs.make(config, build.collection(config).train, out, args.steps, args.cfg, args.batch, accelerator,
               lambda groups: tqdm(groups, unit="batch", disable=not accelerator.is_main_process))
    accelerator.print(f"{out}: {sum(1 for _ in (out / pairs.PAIRS[1]).rglob('*.npy')):,} pairs")
    accelerator.end_training()
