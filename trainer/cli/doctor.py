"""`python -m trainer doctor`."""
from __future__ import annotations

import json
from pathlib import Path


def add_arguments(one):
    one.add_argument("data", nargs="?", type=Path, help="a file or folder in any layout; without it, the recipe's")
    one.add_argument("settings", nargs="*", metavar="key=value", help="change a setting: data.buckets=pixart")
    one.add_argument("--recipe", help="look with the eyes of a recipe: its resolution, buckets, encoder and needs")
    one.add_argument("--tokenizer", type=Path, help="T5's tokenizer.json, or its folder, to count tokens with")
    one.add_argument("--report", type=Path, help="a .json file for all names, of which the screen shows ten each")


def run(args):
    """Look for everything that is wrong with a data set."""
    from tqdm import tqdm

    from ..config import check
    from ..data import doctor

    words = list(args.settings)
    if args.data and "=" in str(args.data) and not args.data.exists():  # a setting, where no data were named
        words, args.data = [str(args.data), *words], None
    if not (args.data or args.recipe):
        raise ValueError("name the data: python -m trainer doctor DATA, or a recipe: --recipe recipe.toml.")
    tokens = doctor.tokens_of(args.tokenizer) if args.tokenizer else None
    if args.recipe:
        words += [f"data.path={json.dumps(str(args.data))}"] if args.data else []
        whole = check.load(args.recipe, words)
        chosen, need, sizes = whole.data, whole.needs, (whole.batch_size, whole.micro_batch_size)
        if need == "captions" and not tokens:
            tokens = doctor.tokens_of_recipe(whole)
    else:
        chosen, need, sizes = doctor.settings_of(args.data, words), "", (1, 0)
    if any(one.prior_count and not Path(one.path).expanduser().is_dir() for one in chosen.each):
        print("The class pictures that a run would draw are not there yet, and are not looked at.")
        chosen = chosen.without_drawn()
    report = doctor.examine(chosen, need, tokens, *sizes, progress=lambda items, total: tqdm(items, total=total))
    print("\n".join(report.lines()))
    if args.report:
        args.report.write_text(report.as_json(), encoding="utf-8")
    if report.errors:
        which = ", ".join(one.path for one in chosen.each)
        raise ValueError(f"{which} cannot be trained on before the errors above are mended.")
    print("\nnothing stands in the way of training.")
