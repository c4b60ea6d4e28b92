"""`python -m trainer caption`."""
from __future__ import annotations

from pathlib import Path

from .options import chosen_device, with_device


def add_arguments(one):
    one.add_argument("data", type=Path, help="a file or folder in any layout but archives")
    one.add_argument("--model", type=Path, required=True, help="the folder of a model that transformers reads")
    one.add_argument("--prompt", default="Describe this picture in two or three sentences.", help="what the model is "
                     "asked (default: %(default)s); {caption}, {tags}, {name} and {folder} are filled in; \"\" asks "
                     "nothing, for models that only name (BLIP)")
    one.add_argument("--answer", default="{}", help="what is written, the model's words in place of {}")
    one.add_argument("--out", type=Path, help="a .jsonl; without it, a .txt beside each picture that has no caption")
    one.add_argument("--overwrite", action="store_true", help="make captions anew that are there")
    one.add_argument("--max-tokens", type=int, default=120)
    one.add_argument("--batch", type=int, default=4, help="pictures at once")
    with_device(one)


def run(args):
    """Caption pictures with a vision-language model; run it again to go on."""
    from tqdm import tqdm

    from ..config.schema import Data
    from ..data import caption, layouts

    if not args.data.exists():
        raise ValueError(f"{args.data}: there is no such file or folder.")
    kind, path = layouts.recognised(args.data)
    names = layouts.condition_names(path) if kind == "jsonl" else []
    if args.out and args.out.exists() and args.out.samefile(path):
        raise ValueError(f"--out {args.out} is what is read. Choose another name.")
    if not args.out and kind not in ("folder", "classes"):
        raise ValueError(f"{path} does not keep its captions in .txt files: name a new jsonl with --out.")
    data_set = layouts.read(path, kind, Data(path=str(path), conditions=names))
    model = caption.Captioner(args.model, chosen_device(args.device), args.max_tokens)
    made = caption.caption(data_set, model, args.prompt, args.answer, args.out, args.overwrite, args.batch, tqdm)
    print(f"{made:,} captions written: {args.out or args.data}")
