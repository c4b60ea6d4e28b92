"""`python -m trainer import`."""
from __future__ import annotations

import sys
from pathlib import Path


def add_arguments(one):
    one.add_argument("files", nargs="+", type=Path, metavar="file", help="a OneTrainer .json, kohya .toml, SimpleTuner "
                     "config.json or ai-toolkit .yaml; and its file of data sets, where that does not lie beside it")
    one.add_argument("--out", type=Path, help="a .toml file; without it, it is printed")
    one.add_argument("--force", action="store_true", help="replace a file that exists")


def run(args):
    """Turn the settings of another trainer into a recipe file, and say what has no counterpart."""
    from ...models_impl.files import write_whole
    from ...models_impl.parsing import without_surrogates
    from ..importing import programs, toml_text

    if args.out and args.out.suffix != ".toml":
        raise ValueError(f"{args.out} must end in .toml.")
    if args.out and args.out.exists() and (not args.force or any(args.out.samefile(file) for file in args.files
                                                                 if file.exists())):
        raise ValueError(f"{args.out} exists. Name another file to write, or give --force.")
    draft, program = programs.imported(args.files)
    lines = programs.report(draft, program, args.files)
    text = without_surrogates(toml_text.comment(lines) + "\n" + toml_text.written(draft.settings))
    if not args.out:
        print(text, end="")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, text)
    print("\n".join([*lines, "", f"{args.out}: python -m trainer train {args.out} --dry-run"]), file=sys.stdout)
