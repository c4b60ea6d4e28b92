"""`python -m trainer convert`."""
from __future__ import annotations

import json
from pathlib import Path


def add_arguments(one):
    one.add_argument("source", type=Path, help="a .safetensors, .pth or .pt file, or a folder of PEFT or diffusers")
    one.add_argument("dest", type=Path, help="a .safetensors file; to diffusers a folder too: of a model with its "
                     "config.json, and the scheduler_config.json that belongs into the pipeline's scheduler/, of a "
                     "LoRA as peft has it, PeftModel.from_pretrained(pipeline.transformer, folder)")
    one.add_argument("settings", nargs="*", metavar="key=value", help="an entry of the model's configuration that the "
                     "file does not say: variant=alpha, token=[cat]")
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


def run(args):
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
