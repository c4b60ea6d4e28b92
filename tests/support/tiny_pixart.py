"""A PixArt run so small that it takes a second: its T5, its VAE, and the settings around them."""
import json
from pathlib import Path

import tiny_run
import torch
from pixstack.models_impl.pixart import checkpoint
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer import libraries
from pixstack.trainer.config import check, load
from pixstack.trainer.data import loader
from pixstack.trainer.features import tokenizer
from pixstack.trainer.features.vaes import FrozenVae
from pixstack.trainer.training import build
from safetensors import safe_open
from tiny_run import COLOURS, SETTINGS

WIDTH = 16  # of the text tokens
SHAPE = dict(depth=2, hidden=72, heads=2, context_dim=WIDTH)
IMAGE = {"resolution": 64, "crop": "none"}


def t5(folder, width=WIDTH):
    """A T5, as transformers saves one."""
    libraries.hide_broken_torchvision()
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    trained = tokenizer.train([f"a {c} {s}" for c in COLOURS for s in ("square", "card")], 60)
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=trained, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = T5Config(vocab_size=60, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(shape).save_pretrained(folder)
    return folder


def vae(folder, latent_channels=4):
    """A VAE, as diffusers saves one: eight pixels along a side of a latent cell."""
    libraries.hide_broken_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=latent_channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)
    return folder


def parts(folder):
    """The sections that name a T5 and a VAE in `folder`, which are made there."""
    return {"text": {"encoder": str(t5(folder / "t5")), "max_length": 16}, "vae": {"path": str(vae(folder / "vae"))}}


def settings(path, out, sections, *words, recipe="pixart", **more):
    """Settings of a run. sections: those of `parts`."""
    raw = {**SETTINGS, "recipe": {"name": recipe}, "model": {k: v for k, v in SHAPE.items() if k != "context_dim"},
           "data": {"path": str(path), **IMAGE}, "out": str(out), "precision": "fp32", **sections, **more}
    return check.parse(raw, words)


def released(path, seed=0, scale=0.1, **entries):
    """A checkpoint of ours with weights none of which is zero; a null caption unless `entries` say otherwise."""
    shape = PixArtConfig(**{**SHAPE, "sample_size": 8, "null_caption": True, **entries})
    rng = torch.Generator().manual_seed(seed)
    weights = {k: scale * torch.randn(v.shape, generator=rng) for k, v in PixArt(shape).state_dict().items()}
    write_file(path, weights, checkpoint.metadata(shape))
    return shape, weights


def remembered():
    """A context in which each picture is encoded once."""
    yield from tiny_run.remembered(FrozenVae, "path", "annotator", "dtype")


def recipe_of(made):
    """(the recipe of settings, its batches), nothing in it zero, so that every part shows in the loss."""
    items = build.collection(made)
    recipe = build.recipe(made, items)
    torch.manual_seed(1)
    for p in recipe.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return recipe, loader.Batches(items.train, made.data, made.seed, made.batch_size)


def toml(folder, made):
    """Settings as a file, for the command line."""
    raw = load.as_dict(made)
    lines = [f"{k} = {json.dumps(v)}" for k, v in raw.items() if not isinstance(v, dict)]
    for section, values in raw.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None)]
    (folder / "tiny.toml").write_text("\n".join(lines))
    return str(folder / "tiny.toml")


def case(name):
    """(config, inputs, outputs) of a parity case among the fixtures."""
    tensors = {"input": {}, "output": {}}
    with safe_open(Path(__file__).parents[1] / "fixtures/parity" / f"{name}.safetensors", framework="pt") as file:
        for key in file.keys():
            kind, _, part = key.partition(".")
            tensors[kind][part] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), tensors["input"], tensors["output"]


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.split("_")[0] not in ("images", "memory")} for line in lines]
