"""A trainer run so small that it takes a second: pictures, settings, and the pieces of a run around them."""
import json
from contextlib import closing
from pathlib import Path
from shutil import copytree, rmtree

import torch
from accelerate import Accelerator
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import check, rules
from pixstack.trainer.data import loader, wording
from pixstack.trainer.features import text_encoders
from pixstack.trainer.training import build, loop
from pixstack.trainer.training.run import Run

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "black": (0, 0, 0),
           "white": (250, 250, 250), "yellow": (240, 220, 40)}
SETTINGS = {
    "recipe": {"name": "pixelflow"},
    "model": {"heads": 2, "head_dim": 8, "depth": 1, "num_stages": 2},
    "text": {"encoder": "small", "vocabulary": 60, "width": 16, "depth": 1, "heads": 2, "hidden": 32, "max_length": 16},
    "optimizer": {"learning_rate": 1e-3, "warm_up": 2, "decay": "linear"},
    "ema": {"decay": 0.9},
    "steps": 6, "batch_size": 6, "save_every": 3, "log_every": 1, "device": "cpu",
}
IMAGE = {"resolution": 16, "crop": "none"}


def pictures(folder, size=16):
    """A jsonl of plain squares; every third one is held out."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        for shape in ("square", "card"):
            file = f"images/{name}_{shape}.png"
            picture = Image.new("RGB", (size, size), colour)
            if shape == "card":
                picture.paste((128, 128, 128), (0, 0, size, size // 4))
            picture.save(folder / file)
            lines.append({"file": file, "captions": [f"{name} {shape}", f"a {name} {shape}"], "tags": [name, "colour"],
                          "class": name, "subcategory": shape, "split": "held_out" if i % 3 == 2 else "train"})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(path, out, *words, **sections):
    raw = {**SETTINGS, "data": {"path": str(path), **IMAGE}, "out": str(out), **sections}
    return check.parse(raw, words)


def train(settings, interrupt=None):
    """Runs to the end, or until `interrupt(run, step)` says so. Returns (recipe, run)."""
    accelerator = Accelerator(cpu=True)
    items = build.collection(settings)
    with closing(Run(settings, accelerator, items.held_out)) as run:
        with accelerator.main_process_first():
            run.open()
            recipe = build.recipe(settings, items, run.folder)
            if isinstance(recipe.text, text_encoders.FROZEN) and settings.text.ahead:
                # As the command does: embedded with others than in the step before, a caption is rounded otherwise.
                recipe.text.prepare(wording.every(items.train, items.held_out, settings.data, settings.seed),
                                    accelerator.device)
        if accelerator.is_main_process:
            build.write_facts(run.folder, recipe, items, settings)
        if interrupt:
            log = run.log
            run.log = lambda step, **values: (log(step, **values), interrupt(run, step))
        batches = loader.Batches(items.train, settings.data, settings.seed, settings.batch_size)
        loop.train(recipe, batches, settings, run, accelerator)
    return recipe, run


def toml(folder, path, out, **sections):
    """The same settings as a file, for the command line."""
    raw = {**SETTINGS, "data": {"path": str(path), **IMAGE}, "out": str(out), **sections}
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in raw.items() if not isinstance(v, dict)]
    for section, values in raw.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items())]
    file = folder / "tiny.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def remembered(kind: type, *identity: str):
    """A context in which every picture is encoded once, by the encoders of this kind that agree in these attributes."""
    encode, known = kind.encode, {}

    def once(self, pictures, device):
        latents = []
        for one in pictures.split(1):
            key = (one.numpy().tobytes(), one.shape, *(str(getattr(self, name)) for name in identity))
            if key not in known:
                known[key] = encode(self, one, device)
            latents.append(known[key])
        return {name: torch.cat([f[name] for f in latents]) for name in latents[0]}

    kind.encode = once
    yield
    kind.encode = encode


def cut(folder: Path, out: Path, step: int):
    """A copy of a run at `out`, as if it had ended before this step."""
    copytree(folder, out)
    rmtree(out / f"checkpoints/{step:08}")
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "out": str(out)}))


def every(runs: list[dict | list[str]]):
    """Trains with all these settings, and gives the words to the command line, in this process and in those launched
    with it."""
    for raw in runs:
        if isinstance(raw, list):
            cli.main(raw)
            continue
        if origin := raw.pop("goes on from", None):  # a run before it in the list, whose last checkpoint is lost
            with Accelerator().main_process_first():
                if Accelerator().is_main_process:
                    cut(Path(origin), Path(raw["out"]), raw["steps"])
        made = check.parse(raw)
        train(made)
        if Accelerator().is_main_process:
            print(f"{rules.way(made)} of {Accelerator().num_processes} processes")
