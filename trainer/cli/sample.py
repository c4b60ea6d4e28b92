"""`python -m trainer sample`."""
from __future__ import annotations

import difflib
import sys
from pathlib import Path

from .options import accelerator_of, sampling, with_run, with_sampling


def add_arguments(one):
    with_run(one)
    one.add_argument("what", nargs="*", metavar="prompt", help="prompts, names or indices of classes, or picture files "
                     "for an autoencoder")
    one.add_argument("--data", type=Path, help="a .txt with a prompt a line, or a data set, whose captions (classes, "
                     "conditions) are drawn")
    one.add_argument("--all-classes", action="store_true", help="every class of the run in turn")
    one.add_argument("--count", type=int, help="pictures; more than there are prompts: the prompts again, other noise")
    one.add_argument("--out", type=Path, required=True, help="a .png or .jpg: all on one sheet; else a folder")
    one.add_argument("--npz", action="store_true", help="write FOLDER.npz too, as ADM's evaluation reads it")
    one.add_argument("--batch", type=int, default=16, help="pictures at once; another number draws other noise")
    one.add_argument("--height", type=int)
    one.add_argument("--width", type=int)
    with_sampling(one)


def asked(args, config):
    """What is drawn (prompts, indices of classes or picture files) and the items of the data set they come from, which
    are none without --data.

    Raises:
        ValueError: a class that the run does not know, or conditions without a data set that has them.
    """
    from ..evaluation import sample
    from ..training import build

    need, items, what = config.needs, [], args.what
    classes = need == "classes"
    known = build.class_names(args.run_folder)
    if args.data:
        what, items = sample.source(args.data, config, need)
    elif args.all_classes and classes:
        what = list(range(len(known)))
    elif classes:
        what = [int(w) if w.isdigit() else known.index(w) if w in known else w for w in what]
    if classes and (odd := [w for w in what if not isinstance(w, int)]):
        near = difflib.get_close_matches(odd[0], known, n=3, cutoff=0.5)
        raise ValueError(f"{args.run_folder} knows classes, not prompts: give their names or indices, not "
                         f"{odd[0]!r:.100}." + (f" Near it are {', '.join(near)}." if near else ""))
    if classes and known and (odd := [w for w in what if w >= len(known)]):
        raise ValueError(f"{args.run_folder} knows the classes 0 to {len(known) - 1}, not {odd[0]}.")
    if config.data.conditions and not items:
        raise ValueError(f"{args.run_folder} draws after conditions ({', '.join(config.data.conditions)}): name a data "
                         "set that has them, --data.")
    return what, items


def run(args):
    """Make pictures with a run, on several processes too (torchrun, accelerate launch); run it again to go on."""
    import torch
    from tqdm import tqdm

    from ..data.sheets import sheet
    from ..evaluation import sample
    from ..export.exporting import open_run

    accelerator = accelerator_of(args.device)
    main = accelerator.is_main_process
    recipe, config, step = open_run(args.run_folder, args.step, args.weights,
                                    accelerator.device if args.device == "auto" else args.device)
    what, items = asked(args, config)
    names = [*config.data.conditions, *([""] if items and recipe.of_pictures else [])]
    s, side, count = config.samples, config.data.resolution, len(what) if args.count is None else args.count
    height, width = (given if given is not None else own or side
                     for given, own in ((args.height, s.height), (args.width, s.width)))
    request = sample.Request(
        run=args.run_folder.resolve().name, step=step, weights=args.weights, what=what, count=count,
        batch=min(args.batch, max(count, 1)), height=height, width=width,
        data=str(args.data.resolve()) if args.data else "", conditions=names, **sampling(args, s))
    hints = config.recipe.hints
    if main and not names and hints is not None and len(hints) not in (len(what), request.batch):
        print("recipe.hints are not as many as the prompts: drawn without any. --data draws after the pictures of a "
              "data set.", file=sys.stderr)
    if args.out.suffix in (".png", ".jpg"):
        if main:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            made = [sample.made(recipe, request, items, group).cpu() for group in range(request.groups)]
            sheet(torch.cat(made)).save(args.out)
    else:
        if main:
            sample.begin(args.out, request)
        accelerator.wait_for_everyone()
        sample.draw(recipe, request, items, args.out, accelerator.process_index, accelerator.num_processes,
                    lambda groups: tqdm(groups, unit="batch", disable=not main))
        accelerator.wait_for_everyone()
        if main and args.npz:
            print(sample.pack(args.out, request))
    if main:
        print(args.out)
    accelerator.end_training()
