"""`python -m trainer lora`."""
from __future__ import annotations

import math
from pathlib import Path

WAYS = {"sv_ratio": "layers keep the singular values above their largest / this",
        "sv_fro": "... the fewest that keep this share of the Frobenius norm",
        "sv_cumulative": "... the fewest whose sum is this share of all"}


def add_arguments(one):
    ways = one.add_subparsers(dest="way", required=True, metavar="inspect | resize | merge")
    look = ways.add_parser("inspect", help="say what LoRA files hold")
    look.add_argument("files", nargs="+", type=Path, metavar="file")
    size = ways.add_parser("resize", help="write a LoRA of lower ranks, by SVD")
    size.add_argument("file", type=Path)
    size.add_argument("out", type=Path)
    with_ranks(size)
    both = ways.add_parser("merge", help="write several LoRAs as one, or a model with LoRAs in it")
    both.add_argument("files", nargs="+", metavar="file[=weight]", help="LoRA files, each times its weight (1)")
    both.add_argument("--out", type=Path, required=True)
    both.add_argument("--base", type=Path, help="a model: it is written with the LoRAs in it, in its own dtypes")
    with_ranks(both)


def with_ranks(one):
    one.add_argument("--rank", type=int, help="of every layer, or at most so much with one of the following")
    for name, text in WAYS.items():
        one.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)
    one.add_argument("--dtype", choices=["keep", "fp32", "bf16", "fp16"], default="keep", help="keep: the file's own")
    one.add_argument("--force", action="store_true", help="replace a file that exists")


def run(args):
    """Look into LoRA files, bring them to another rank, or merge them."""
    for line in {"inspect": inspect, "resize": resize, "merge": merge}[args.way](args):
        print(line)


def inspect(args) -> list[str]:
    from ..export import loras

    return [line for file in args.files for line in loras.inspected(file)]


def resize(args) -> list[str]:
    from ..export import loras

    choose = chosen(args)
    if choose is None and args.rank is None:
        raise ValueError("say how far: --rank, --sv-ratio, --sv-fro or --sv-cumulative.")
    return loras.resize(args.file, args.out, choose or len, args.rank, args.dtype, args.force)


def merge(args) -> list[str]:
    from ..export import loras, merging

    sources, choose = [weighted(word) for word in args.files], chosen(args)
    if args.base is None:
        return loras.merge(sources, args.out, choose, args.rank, args.dtype, args.force)
    if choose or args.rank is not None or args.dtype != "keep":
        raise ValueError("--base keeps the model's dtypes and takes LoRAs as they are: leave out --dtype and what is "
                         "about ranks.")
    return merging.merge_into(args.base, sources, args.out, args.force)


def weighted(word: str) -> tuple[Path, float]:
    """("a.safetensors", 0.5) of "a.safetensors=0.5"."""
    name, equals, text = word.rpartition("=")
    if not equals or Path(word).exists():
        return Path(word), 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{word}: {text!r} is no weight. Files are written FILE or FILE=0.8.")
    return Path(name), weight


def chosen(args):
    """What is kept of a layer's singular values, or None. Raises ValueError for nonsense."""
    from ...models_impl.lora import arithmetic

    given = {name: value for name in WAYS if (value := vars(args)[name]) is not None}
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank {args.rank} must be at least 1.")
    if len(given) > 1:
        raise ValueError(f"{' and '.join('--' + name.replace('_', '-') for name in given)}: one of them decides.")
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if name == "sv_ratio" and not 1 < value < math.inf:
            raise ValueError(f"{option} {value:g} must be more than 1.")
        if name != "sv_ratio" and not 0 < value <= 1:
            raise ValueError(f"{option} {value:g} is outside (0, 1].")
        return {"sv_ratio": arithmetic.by_ratio, "sv_fro": arithmetic.by_frobenius,
                "sv_cumulative": arithmetic.by_sum}[name](value)
    return None
