"""A PixelPonder run so small that it takes a second: its FLUX, T5, CLIP and VAE, pictures with hints."""
import json
from dataclasses import replace

import tiny_pixart
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl.flux import checkpoint
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer import libraries
from pixstack.trainer.config import check
from pixstack.trainer.features import tokenizer

# heads as wide as the release's, which core's loader counts on
FLUX = FluxConfig(hidden=128, heads=1, mlp_hidden=512, depth=2, single_depth=2, context_dim=tiny_pixart.WIDTH,
                  pooled_dim=12)
IMAGE = {"resolution": 32, "crop": "none", "conditions": ["canny", "depth"]}
MODEL = {"depth": 1, "selector_width": 128, "types": ["depth", "canny", "hed"]}
POOLED = 12


def clip(folder):
    """A CLIP, as transformers saves one, of another width than the T5."""
    libraries.hide_broken_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    trained = tokenizer.train([f"a {c} {s}" for c in tiny_run.COLOURS for s in ("square", "card")], 60)
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=trained, **names).save_pretrained(folder)
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=60, hidden_size=POOLED, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )).save_pretrained(folder)
    return folder


def base(path, **entries):
    """A FLUX with weights none of which is zero."""
    rng, shape = torch.Generator().manual_seed(0), replace(FLUX, **entries)
    weights = {k: v if k.endswith("norm.scale") else 0.08 * torch.randn(v.shape, generator=rng)
               for k, v in Flux(shape).state_dict().items()}
    write_file(path, weights, checkpoint.metadata(shape))
    return path


def parts(folder):
    """The sections around a run, with files made in `folder`."""
    return {"text": {"encoder": str(tiny_pixart.t5(folder / "t5")), "clip": str(clip(folder / "clip")),
                     "max_length": 12, "padded": True},
            "vae": {"path": str(tiny_pixart.vae(folder / "vae", 16))},
            "recipe": {"base": str(base(folder / "flux.safetensors"))}}


def pictures(folder):
    """Squares as in tiny_run, each with the hints canny and depth."""
    path = tiny_run.pictures(folder, size=32)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        for kind, colour in (("canny", 20 * number), ("depth", 255 - 10 * number)):
            line[kind] = line["file"].replace("images/", f"{kind}_")
            Image.new("RGB", (32, 32), (colour, 128, colour)).save(folder / line[kind])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(path, out, sections, *words, **more):
    """Settings of a run. sections: those of `parts`."""
    raw = {**tiny_run.SETTINGS, "precision": "fp32", "model": MODEL, "data": {"path": str(path), **IMAGE},
           "out": str(out), **sections, "recipe": {"name": "pixelponder", **sections["recipe"]}, **more}
    return check.parse(raw, words)
