"""The model card of what a run exported."""
from __future__ import annotations

import os
import shutil
from dataclasses import fields
from pathlib import Path

from ...models_impl.files import write_whole
from ..config.load import stored
from ..config.schema import Config, DataSet, SetSettings, look_up
from ..training.checkpoints import checkpoints, read_log
from ..training.run import MAY_CHANGE

USE = {  # folder of ComfyUI's models/, or before it a recipe -> what to do with a file there
    "diffusion_models": "Load it with the loader of its family ('Load PixArt Model', 'Load PixelFlow Model', "
    "'Load Small FLUX Model', 'Load Small Stable Cascade Model').",
    "text_encoders": "Load it with 'Load T5 Text Encoder'; type flux for a FLUX or a Stable Cascade.",
    "loras": "Load it with core's LoraLoaderModelOnly, for PixArt with 'Load PixArt LoRA', and a word that was learned "
    "with 'UltraPixel Personalise'. Strength 1 is as trained.",
    "controlnet": "Load it with core's 'Load ControlNet', and use it with core's 'Apply ControlNet'.",
    "vae": "Load it with core's 'Load VAE'.",
    "model_patches": "Load it with 'Load UltraPixel Guide'.",
    "ultrapixel_stage_a": "Load it with 'Load UltraPixel Stage A (VAE)'.",
    "ultrapixel_stage_b": "Load the model with 'Load Small Stable Cascade Model'; the encoder is vae.path of the "
    "recipe ultrapixel_stage_c.",
    "pixart_controlnet": "Load it with 'Load PixArt ControlNet', and use it with 'Apply PixArt ControlNet'.",
    "pixelponder": "Load it with 'Load PixelPonder', and use it with 'PixelPonder Condition' and 'Apply PixelPonder'.",
}


def card(folder: Path, settings: Config, step: int, files: list[Path]) -> str:
    """A model card in Markdown: what the files are, how to use them, how they were made. It names no folder of the
    machine, and of data and base only the last part of the name."""
    s, name = settings, settings.name
    losses = [one for one in read_log(folder) if "validation_loss" in one and one["step"] <= step]
    lines = [f"# {name}", "", f"Trained with PixStack's recipe `{s.recipe.name}`, step {step} of {s.steps}."]
    stands_on = [path for path in (s.init_from, *s.recipe.bases(s)) if path]
    if stands_on := list(dict.fromkeys(f"`{Path(path).name}`" for path in stands_on)):
        lines[-1] += (f" It stands on {' and '.join(stands_on)}, whose licence"
                      f"{'s apply' if len(stands_on) > 1 else ' applies'}.")
    lines += ["", "## Files", "", *(f"- `{f.parent.name}/{f.name}`, {size_of(f)}. "
                                    f"{USE.get(s.recipe.name, USE.get(f.parent.name, ''))}" for f in files)]
    if (sheet := samples(folder, step)) is not None:
        prompts = [f"{i + 1}. {unplaced(prompt)}" for i, prompt in enumerate(s.samples.texts)]
        lines += ["", "## Samples", "", f"![samples]({files[0].stem}.png)", "", *prompts, "",
                  f"At step {int(sheet.stem)}, {s.samples.steps} steps, cfg {s.samples.cfg:g}, seed {s.samples.seed}."]
    pictures = ", ".join(f"`{Path(one.path).name}`" for one in s.data.each if not one.prior)
    facts = {"data": pictures, "resolution": s.data.resolution, "batch size": s.batch_size,
             "optimizer": s.optimizer.name, "learning rate": s.optimizer.learning_rate, "precision": s.precision,
             "seed": s.seed, "ema": s.ema.decay or "none", **{k: unplaced(v) for k, v in vars(s.recipe).items()}}
    if losses:
        facts["validation loss"] = f"{losses[-1]['validation_loss']:.5f} at step {losses[-1]['step']}"
    if s.recipe.has_adapter:
        facts |= {f"adapter {k}": v for k, v in vars(s.adapter).items()}
    facts |= chosen(s)
    lines += ["", "## Training", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]
    return "\n".join(lines) + "\n"


def chosen(settings: Config) -> dict[str, object]:
    """What else shaped the result and is not as it is by default: "section.key" -> value."""
    named = {"data.path", "data.resolution", "optimizer.name", "optimizer.learning_rate", "ema.decay", "model.stage_c",
            "model.guide"}
    found = {}
    for section in ("model", "data", "text", "vae", "optimizer", "ema", "memory"):
        part = look_up(settings, section)
        found |= others(part, type(part)(), f"{section}.", named | MAY_CHANGE | {"data.sets"})
    for number, one in enumerate(settings.data.sets, 1):
        told = DataSet(**{f.name: look_up(settings.data, f.name) for f in fields(SetSettings)})
        prefix = f"data.sets.{number}."
        found |= others(one, told, prefix, {f"{prefix}{key}" for key in ("path", "held_out_path")})
    return found


def others(part, plain, prefix: str, without: set[str]) -> dict[str, object]:
    """Settings of a section that differ from those of another one."""
    return {name: unplaced(value) for f in fields(part) if (value := look_up(part, f.name)) != look_up(plain, f.name)
            and (name := prefix + f.name) not in without}


def size_of(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def unplaced(value):
    """A setting without the folders of a file that it names, here or where the run was."""
    if isinstance(value, list):
        return [unplaced(v) for v in value]
    if not isinstance(value, str) or "/" not in value.replace(os.sep, "/"):
        return value
    path = Path(value).expanduser()
    return path.name if path.is_absolute() or " " not in value or path.exists() else value  # else it is a sentence


def samples(folder: Path, step: int) -> Path | None:
    """The newest sheet of samples up to a step."""
    found = [p for p in (folder / "samples").glob("*.png") if p.stem.isdigit() and int(p.stem) <= step]
    return max(found, default=None)


def write_card(folder: Path, out: Path, files: list[Path], step: int | None = None) -> list[Path]:
    """Writes out/NAME.md and, where the run drew some, out/NAME.png. files: what `export` wrote."""
    settings = stored(folder)
    step = int(checkpoints(folder)[-1].name) if step is None else step
    written = [out / f"{files[0].stem}.md"]
    write_whole(written[0], card(folder, settings, step, files))
    if (sheet := samples(folder, step)) is not None:
        written.append(out / f"{files[0].stem}.png")
        shutil.copyfile(sheet, written[1])
    return written
