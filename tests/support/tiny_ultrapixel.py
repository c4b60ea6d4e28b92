"""An UltraPixel run so small that it takes seconds: Stage C, the guide, CLIP-G, the semantic encoder, the decoders."""
import json
from pathlib import Path

import cascade_weights as cascade
import tiny_run
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.ultrapixel import checkpoint
from pixstack.models_impl.ultrapixel.effnet import EffnetConfig, EffnetEncoder
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.previewer import Previewer
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from pixstack.trainer import libraries
from pixstack.trainer.config import check, load
from pixstack.trainer.data import loader
from pixstack.trainer.recipes.ultrapixel.encoders import FrozenEffnet
from pixstack.trainer.training import build, checkpoints
from safetensors import safe_open
from torch import nn

IMAGE = {"resolution": 128, "crop": "none"}
C, GUIDE = cascade.C, cascade.GUIDE  # what the tests' ComfyUI builds too
FRESH = {"width": 32, "heads": 1, "feedforward": 32, "groups": 8, "layers": [32, 32]}
SHALLOW = EffnetConfig(blocks=(1,) * 6)
GUIDED = {"name": "ultrapixel_guide", "low_side": 2, **FRESH}


def network(kind, shape, seed=0, std=0.08):
    torch.manual_seed(seed)
    net = kind(shape)
    for parameter in net.parameters():  # the initial zeros would hide mistakes
        nn.init.normal_(parameter, std=std)
    return net.eval()


def written(path, kind, shape, **more):
    tensors = checkpoint.released_attention_names(network(kind, shape, **more).state_dict())
    state_dict.write_file(path, tensors, checkpoint.metadata(shape))
    return str(path)


def calibrated(net, picture):
    """net with the means and deviations of `picture` in its norms, so that what comes out is of size one."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for one in norms:
        one.momentum = None
    with torch.no_grad():
        net.train()(picture)
    return net.eval()


def effnet(path, config=SHALLOW):
    """A semantic encoder of one block a stage, with random weights; at its full size it takes longer than all the
    rest."""
    torch.manual_seed(0)
    plain = torch.rand(24, 3, 1, 1).expand(-1, -1, 128, 128).clone()
    plain[::2, :, :32] = 0.5  # as the pictures of `tiny_run`, whose latents are then of size one
    net = calibrated(EffnetEncoder(config), plain)
    with torch.no_grad():
        found, last = net(plain), net.mapper[1]
        last.running_mean += found.mean((0, 2, 3)) * last.running_var.sqrt()
        last.running_var *= found.var((0, 2, 3))
    state_dict.write_file(path, net.state_dict())
    return str(path)


def remembered():
    """A context in which each picture is encoded once."""
    yield from tiny_run.remembered(FrozenEffnet, "path", "low", "dtype")


def clip(folder, width=C.text_dim, pooled=C.pooled_dim):
    """CLIP-G's text tower and its tokenizer, as transformers saves them: letters, and the words that tests use."""
    libraries.hide_broken_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words, merges = [], []
    for word in ("cat", "card", "red", "blue", "a"):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], ["".join(parts[:2]), *parts[2:]]
            if tuple(pair) not in merges:
                merges.append(tuple(pair))
                words.append("".join(pair))
    table = [*letters, *(c + "</w>" for c in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(table)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(table), hidden_size=width, intermediate_size=32, projection_dim=pooled, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=len(table) - 1, bos_token_id=len(table) - 2, pad_token_id=len(table) - 1,
        hidden_act="gelu", initializer_range=0.2, initializer_factor=10.0,
    )).save_pretrained(folder)
    return str(folder)


def vision(folder):
    """CLIP-L's image tower, as transformers saves it."""
    libraries.hide_broken_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=C.image_dim, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, initializer_factor=10.0,
    )).save_pretrained(folder)
    return str(folder)


def parts(folder):
    """The sections that name frozen networks in `folder`, which are made there."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    previewer = calibrated(Previewer(hidden=16), torch.randn(4, 16, 4, 4))
    state_dict.write_file(folder / "previewer.safetensors", previewer.state_dict())
    return {
        "text": {"encoder": clip(folder / "clip")}, "vae": {"path": effnet(folder / "effnet.safetensors")},
        "model": {"stage_c": written(folder / "stage_c.safetensors", StageC, C),
                  "previewer": str(folder / "previewer.safetensors")},
    }


def with_stages(folder):
    """The files of Stage B and A."""
    return [f"model.stage_b={written(folder / 'stage_b.safetensors', StageB, cascade.B)}",
            f"model.stage_a={written(folder / 'stage_a.safetensors', StageA, cascade.A)}"]


def guide_file(path, **more):
    return written(path, Guide, GUIDE, **more)


def settings(path, out, sections, recipe, *words, **more):
    raw = {**tiny_run.SETTINGS, "recipe": recipe, "data": {"path": str(path), **IMAGE}, "out": str(out),
           "precision": "fp32", "batch_size": 4, **sections, **more}
    return check.parse(raw, words)


def case(name):
    """(weights, config, inputs, outputs) of a parity case among the fixtures."""
    tensors = {"weight": {}, "input": {}, "output": {}}
    with safe_open(Path(__file__).parents[1] / "fixtures/parity" / f"{name}.safetensors", framework="pt") as file:
        for key in file.keys():
            kind, _, part = key.partition(".")
            tensors[kind][part] = file.get_tensor(key)
        return tensors["weight"], json.loads(file.metadata()["config"]), tensors["input"], tensors["output"]


def weights(folder, step=6):
    at = folder / "checkpoints" / f"{step:08d}"
    return {f"{file}.{k}": v for file in ("model", "ema", "optimizer")
            for k, v in checkpoints.read_tensors(at / f"{file}.safetensors").items()}


def toml(folder, made):
    """The settings as a file, for the command line."""
    raw = load.as_dict(made)
    lines = [f"{k} = {json.dumps(v)}" for k, v in raw.items() if not isinstance(v, dict)]
    for section, values in raw.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None)]
    (folder / "tiny.toml").write_text("\n".join(lines))
    return str(folder / "tiny.toml")


def recipe_of(made):
    """(the recipe of settings, its batches)"""
    items = build.collection(made)
    return build.recipe(made, items), loader.Batches(items.train, made.data, made.seed, made.batch_size)


def log(folder: Path):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.split("_")[0] not in ("images", "memory")} for line in lines]
