"""The stages of a small Stable Cascade: training them, and their files in the nodes' loaders."""
import json
from pathlib import Path

import pytest
import tiny_run
import tiny_ultrapixel
import torch
import weights
from cascade_weights import A
from pixstack.models_impl.state_dict import read_file, write_file
from pixstack.models_impl.ultrapixel import checkpoint
from pixstack.models_impl.ultrapixel.config import StageAConfig, StageCConfig
from pixstack.models_impl.ultrapixel.effnet import EffnetEncoder
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from pixstack.models_impl.ultrapixel.texts import pooled
from pixstack.trainer.config import check
from pixstack.trainer.data import loader
from pixstack.trainer.export import exporting
from pixstack.trainer.features import text_encoders
from pixstack.trainer.training import build

BASE = {"precision": "fp32", "steps": 3, "batch_size": 4, "save_every": 3, "log_every": 1, "device": "cpu",
        "optimizer": {"learning_rate": 3e-3}, "ema": {"decay": 0}}
STAGE_A = {"recipe": {"name": "ultrapixel_stage_a"}, "model": {"hidden": 8, "bottleneck_blocks": 1}}
LEARNING = ("steps=16", "save_every=16", "recipe.weight=none", "model.hidden=[32,32]", "model.depth=[1,1]",
            "noise.min_timestep=800")  # where there is little but noise, soonest learned
SHAPE = {"hidden": [16, 16], "heads": [2, 2], "depth": [1, 2], "context_dim": 16}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=32)


def settings(path, out, raw, *words):
    return check.parse({**BASE, "data": {"path": str(path), "resolution": 32, "crop": "none"}, "out": str(out), **raw},
                       words)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Settings of a small T5."""
    file = tmp_path_factory.mktemp("text") / "t5.safetensors"
    weights.tiny_t5(file)
    return {"encoder": str(file), "padded": True, "learn": False}


@pytest.fixture(scope="module")
def stage_b(text, tmp_path_factory):
    """Settings of a tiny Stage B."""
    file = tmp_path_factory.mktemp("stage_a") / "a.safetensors"
    tiny_ultrapixel.written(file, StageA, A)
    return {"recipe": {"name": "ultrapixel_stage_b"}, "model": {**SHAPE, "heads": [-1, 2]}, "text": text,
            "vae": {"path": str(file)}}


@pytest.fixture(scope="module")
def stage_c(text, tmp_path_factory):
    """Settings of a tiny Stage C."""
    return {"recipe": {"name": "ultrapixel_stage_c"}, "model": SHAPE, "text": text,
            "vae": {"path": tiny_ultrapixel.effnet(tmp_path_factory.mktemp("effnet") / "effnet.safetensors")}}


def recipe_of(made):
    found = build.collection(made)
    return build.recipe(made, found), loader.Batches(found.train, made.data, made.seed, made.batch_size)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


# --- Stage A

def test_training_stage_a_lowers_the_loss(path, tmp_path):
    tiny_run.train(settings(path, tmp_path / "run", STAGE_A, "steps=30", "save_every=30"))
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.8 * sum(found[:5]), found


def test_an_export_of_stage_a_reconstructs_as_in_training_from_latents_of_unit_variance(path, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, STAGE_A))
    pictures = batches(0, range(4)).pictures.float() / 255
    with torch.no_grad():
        recipe.square.copy_(recipe.net.encode(pictures).square().mean())
        ((tensors, metadata),) = recipe.files().values()
        write_file(tmp_path / "a.safetensors", tensors, metadata)
        config, tensors = checkpoint.read_stage_a(*read_file(tmp_path / "a.safetensors"))
        net = StageA(config)
        net.load_state_dict(tensors)
        latent = net.eval().encode(pictures)
        torch.testing.assert_close(latent.square().mean(), torch.ones(()), rtol=1e-4, atol=0)
        torch.testing.assert_close(net.decode(latent), recipe.net.decode(recipe.net.encode(pictures)))


def test_stage_a_goes_on_from_a_file_whatever_its_norm(path, tmp_path):
    torch.manual_seed(0)
    net = StageA(StageAConfig(hidden=8, bottleneck_blocks=1)).eval()
    norm = net.down_blocks[-1][1]
    for one in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(one)
    norm.running_var.uniform_(0.1, 3.0)
    write_file(tmp_path / "a.safetensors", net.state_dict(), checkpoint.metadata(net.config))
    recipe, batches = recipe_of(settings(path, tmp_path, STAGE_A, f"init_from={tmp_path / 'a.safetensors'}"))
    pictures = batches(0, range(4)).pictures.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(recipe.net.encode(pictures), net.encode(pictures))
    assert not any(p.requires_grad for p in recipe.net.down_blocks[-1][1].parameters())


@pytest.mark.parametrize("words, part", [
    (("model.hidden=7",), "hidden=7 cannot be halved"),
    (("data.resolution=30",), "data.resolution=30 is not a multiple of 4"),
    (("text.encoder=small",), "reads no captions"),
])
def test_settings_of_stage_a_that_cannot_work_are_refused(path, tmp_path, words, part):
    with pytest.raises(ValueError) as caught:
        settings(path, tmp_path, STAGE_A, *words)
    assert part in str(caught.value)


# --- Stage B

def test_training_stage_b_teaches_it_and_its_encoder(path, stage_b, tmp_path):
    made = settings(path, tmp_path / "run", stage_b, *LEARNING)
    (untaught, batches), (recipe, _) = recipe_of(made), tiny_run.train(made)
    first, last = (one(batches(0, range(4))).mean().item() for one in (untaught, recipe))
    assert last < 0.9 * first, (first, last)
    assert all((a - b).abs().max() > 0
               for a, b in zip(recipe.encoder.parameters(), untaught.encoder.parameters(), strict=True))


@torch.no_grad()
def test_an_export_of_stage_b_and_its_encoder_predicts_as_in_training(path, stage_b, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, stage_b))
    batch, rng = batches(0, range(4)), torch.Generator().manual_seed(0)
    image = recipe.small(batch.pictures.float() / 255)
    recipe.square.copy_(recipe.encoder(image).square().mean())
    torch.nn.init.normal_(recipe.net.clf[1].weight)  # which begins as zeros
    b, encoder = (write_file(tmp_path / f"{i}.safetensors", *file) or tmp_path / f"{i}.safetensors"
                  for i, file in enumerate(recipe.files().values()))
    config, tensors = checkpoint.read_stage_b(*read_file(b))
    net = StageB(config)
    net.load_state_dict(tensors)
    config, tensors = checkpoint.read_effnet(read_file(encoder)[0])
    effnet = EffnetEncoder(config).eval()
    effnet.load_state_dict(tensors)
    semantic = effnet(image)
    torch.testing.assert_close(semantic.square().mean(), torch.ones(()), rtol=1e-3, atol=0)
    given = torch.randn(4, 4, 8, 8, generator=rng), torch.rand(4, generator=rng)
    vector = torch.randn(4, weights.WIDTH, generator=rng)
    torch.testing.assert_close(net(*given, semantic, vector), recipe.net(*given, recipe.encoder(image), vector),
                               rtol=1e-3, atol=1e-4)


def test_micro_batches_give_the_losses_of_the_whole_batch(path, stage_b, stage_c, tmp_path):
    for raw, side in ((stage_b, 32), (stage_c, 64)):
        recipe, batches = recipe_of(settings(path, tmp_path, raw, f"data.resolution={side}"))
        whole = recipe(batches(0, range(4)))
        recipe, batches = recipe_of(settings(path, tmp_path, raw, f"data.resolution={side}"))
        some = torch.cat([recipe(batches(0, range(s, s + 2))) for s in (0, 2)])
        torch.testing.assert_close(some, whole)


def test_a_frozen_encoder_stays_as_it_is_and_is_not_exported(path, stage_b, stage_c, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, stage_b, f"model.encoder={stage_c['vae']['path']}"))
    recipe(batches(0, range(4))).sum().backward()
    assert list(recipe.files()) == ["diffusion_models/{name}.safetensors"]
    assert all(p.grad is None for net in recipe.teacher for p in net.parameters())
    assert not any(name.startswith("encoder.") for name in recipe.state_dict())


def test_stage_b_draws_a_picture_again_by_its_semantic_latent(path, stage_b, tmp_path):
    recipe, _ = recipe_of(settings(path, tmp_path, stage_b))
    with torch.no_grad():
        torch.nn.init.normal_(recipe.net.clf[1].weight)
    pictures = torch.randint(256, (2, 1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    one, other = (recipe.sample(["red"], 32, 32, 2, 1.0, 1.1, 0, conditions={"": p}) for p in pictures)
    assert one.shape == (1, 3, 32, 32) and (one - other).abs().max() > 1e-3


def test_a_finished_stage_b_is_exported_where_stage_a_is_gone(path, stage_b, tmp_path):
    raw = {**stage_b, "vae": {"path": str(tmp_path / "a.safetensors")}}
    (tmp_path / "a.safetensors").write_bytes(Path(stage_b["vae"]["path"]).read_bytes())
    tiny_run.train(settings(path, tmp_path / "run", raw, "steps=1"))
    (tmp_path / "a.safetensors").unlink()
    files = exporting.export(tmp_path / "run", tmp_path / "out", "small")
    assert {str(file.relative_to(tmp_path / "out")) for file in files} >= {
        "diffusion_models/small.safetensors", "vae/small_encoder.safetensors"}
    with pytest.raises(ValueError, match="vae.path=.*a.safetensors"):
        exporting.open_run(tmp_path / "run")[0].sample(["red"], 32, 32, 1, 1.0, 1.1, 0, conditions={
            "": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)})


# --- Stage C

def test_training_stage_c_lowers_the_loss(path, stage_c, tmp_path):
    made = settings(path, tmp_path / "run", stage_c, "data.resolution=64", *LEARNING)
    (untaught, batches), (recipe, _) = recipe_of(made), tiny_run.train(made)
    first, last = (one(batches(0, range(4))).mean().item() for one in (untaught, recipe))
    assert last < 0.9 * first, (first, last)


@torch.no_grad()
def test_stage_c_reads_the_padded_tokens_of_a_small_t5_and_their_mean(path, stage_c, tmp_path):
    recipe, _ = recipe_of(settings(path, tmp_path, stage_c, "data.resolution=64"))
    found = recipe.denoising.condition(["red square", "a"])
    tokens, mask = text_encoders.encode(recipe.text, ["red square", "a"], "cpu", padded=True)
    assert tokens.shape[1] == recipe.text.max_length and mask.all()
    torch.testing.assert_close(found["text"], tokens)
    torch.testing.assert_close(found["pooled"][:, 0], pooled(tokens))


@torch.no_grad()
def test_an_export_of_stage_c_is_the_network(path, stage_c, tmp_path):
    recipe, _ = recipe_of(settings(path, tmp_path, stage_c, "data.resolution=64"))
    write_file(tmp_path / "c.safetensors", *recipe.files()["diffusion_models/{name}.safetensors"])
    config, tensors = checkpoint.read_stage_c(*read_file(tmp_path / "c.safetensors"))
    assert config == recipe.net.config
    net = StageC(config)
    net.load_state_dict(tensors)
    again, _ = recipe_of(settings(path, tmp_path, stage_c, "data.resolution=64",
                                  f"init_from={tmp_path / 'c.safetensors'}"))
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), net.parameters(), strict=True))


def test_a_guide_learns_over_a_small_stage_c_that_reads_a_t5(path, stage_c, tmp_path):
    shape = StageCConfig(hidden=(16, 16), heads=(2, 2), down=("CTA",) * 2, up=("CTA",) * 2, context_dim=16,
                         text_dim=weights.WIDTH, pooled_dim=weights.WIDTH, image_dim=1)
    raw = {**stage_c, "recipe": {"name": "ultrapixel_guide", "low_side": 1, **tiny_ultrapixel.FRESH},
           "model": {"stage_c": tiny_ultrapixel.written(tmp_path / "c.safetensors", StageC, shape)}}
    recipe, _ = tiny_run.train(settings(path, tmp_path / "run", raw, "data.resolution=64"))
    assert all(p.grad is None for p in recipe.net.parameters())
    untaught, _ = recipe_of(settings(path, tmp_path, raw, "data.resolution=64"))
    assert any((a - b).abs().max() > 0
               for a, b in zip(recipe.guide.parameters(), untaught.guide.parameters(), strict=True))


@pytest.mark.parametrize("name", ["a", "b", "c", "guide"])
def test_a_shipped_recipe_of_a_small_ultrapixel_can_be_trained(path, stage_b, stage_c, tmp_path, name):
    shape = StageCConfig(hidden=(16, 16), heads=(2, 2), down=("CTA",) * 2, up=("CTA",) * 2, context_dim=16,
                         text_dim=192, pooled_dim=192, image_dim=1)
    words = ["batch_size=1", "device=cpu", "precision=fp32", f"data.path={path}", f"out={tmp_path}/run"]
    if name == "b":
        words += [f"vae.path={stage_b['vae']['path']}", "data.resolution=64"]
    if name in ("c", "guide"):
        words += [f"vae.path={stage_c['vae']['path']}", "model.stage_b=", "model.stage_a=", "samples.every=0",
                  f"cache.folder={tmp_path}", "data.resolution=64"]
    if name == "guide":
        base = tiny_ultrapixel.written(tmp_path / "c.safetensors", StageC, shape)
        words += [f"model.stage_c={base}", "recipe.low_side=1"]
    recipe, batches = recipe_of(check.load(f"recipes/ultrapixel/ultrapixel_emoji_{name}.toml", words))
    recipe(batches(0, range(1))).sum().backward()
    assert all(p.grad is not None for group in recipe.groups(recipe.config) for _, p in group.params)


@pytest.mark.parametrize("stage, words, part", [
    ("b", ("model.encoder_blocks=[1,1]",), "model.encoder_blocks=[1, 1] must be 6 numbers from 1 on"),
    ("b", ("model.hidden=[16,16,16]",), "heads has 2 levels, hidden has 3"),
    ("b", ("text.learn=true",), "text.learn=true: recipe.name='ultrapixel_stage_b' takes the text encoder as it is"),
    ("b", ("text.encoder=small",), "text.encoder='small': Stage C reads CLIP-G"),
    ("b", ("data.resolution=36",), "data.resolution=36 is not a multiple of 8"),
    ("b", ("samples.every=1", 'samples.prompts=["a"]'), "recipe.sample_hints names none"),
    ("b", ("vae.path=",), "vae.path is empty: Stage B draws latents of Stage A"),
    ("c", ("text.padded=false",), "Set text.padded=true"),
    ("c", ("model.depth=[1]",), "down has 1 levels, hidden has 2"),
    ("c", ("model.heads=[3,3]",), "Level 0 is 16 wide, which 3 heads do not divide"),
    ("c", ("vae.path=",), "vae.path is empty: Stage C draws"),
])
def test_settings_of_a_stage_that_cannot_work_are_refused(path, stage_b, stage_c, tmp_path, stage, words, part):
    raw = stage_b if stage == "b" else stage_c
    with pytest.raises(ValueError) as caught:
        settings(path, tmp_path, raw, *(() if "resolution" in str(words) or stage == "b" else ("data.resolution=64",)),
                 *words)
    assert part in str(caught.value)
