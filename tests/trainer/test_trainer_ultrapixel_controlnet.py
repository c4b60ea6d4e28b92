"""A ControlNet of Stage C: its hints, the loss, runs, and the file that core's loader takes."""
import json
import os
import shutil
import signal
from dataclasses import replace
from importlib import import_module

import pytest
import tiny_run
import tiny_ultrapixel
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators.canny import canny
from pixstack.models_impl.ultrapixel import checkpoint
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import EffnetConfig
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader
from pixstack.trainer.export import exporting
from pixstack.trainer.features import cache
from tiny_ultrapixel import recipe_of

pytestmark = pytest.mark.long
EIGHT = list(range(8))  # as many as core's loader looks for
SHAPE = replace(tiny_ultrapixel.C, down=("CTA", "CTA" * 3), up=("CTA" * 3, "CTA"))  # 8 ResBlocks
SIMPLE = {"name": "ultrapixel_controlnet", "blocks": [0, 3, 7], "backbone": "simple"}
REAL = {"name": "ultrapixel_controlnet", "blocks": EIGHT}


@pytest.fixture(scope="module", autouse=True)
def remembered():
    yield from tiny_ultrapixel.remembered()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    found = tiny_ultrapixel.parts(folder)
    found["vae"]["path"] = tiny_ultrapixel.effnet(folder / "whole.safetensors", EffnetConfig())  # as the backbone is
    found["model"]["stage_c"] = tiny_ultrapixel.written(folder / "eight.safetensors", StageC, SHAPE)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=128)


@pytest.fixture
def made(path, parts, tmp_path):
    def settings(*words, recipe=SIMPLE, **more):
        return tiny_ultrapixel.settings(path, tmp_path / "run", parts, recipe, *words, **more)
    return settings


def stirred(recipe, std=0.2):
    """With residuals that are not zero."""
    torch.manual_seed(1)
    for projection in recipe.controlnet.projections:
        torch.nn.init.normal_(projection[-1].weight, std=std)
    return recipe


def test_the_loss_is_that_of_stage_c_with_the_residuals_of_the_edges(made):
    recipe, batches = recipe_of(made("recipe.weight=none", "recipe.dropout=0.0"))
    stirred(recipe)
    batch, d = batches(0, range(4)), recipe.denoising
    edges = (255 * canny(batch.pictures.float() / 255)).round() / 255
    assert 0 < edges.mean() < 0.5
    draws, latents = d.draw(0), d.latents(batch, 0).high
    x, timestep = d.noisy(latents.clean, latents.noise, draws.t)
    eps = recipe.net(x, timestep, **d.conditioning(batch, draws), control=recipe.controlnet(edges))
    torch.testing.assert_close(recipe(batch), (eps - latents.noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    bare = recipe.net(x, timestep, **d.conditioning(batch, draws))
    assert (eps - bare).abs().max() > 0.01


def test_a_fresh_controlnet_changes_nothing_and_has_the_encoders_backbone(made, parts):
    recipe, batches = recipe_of(made("recipe.weight=none", "recipe.dropout=0.0", recipe=REAL))
    batch, d = batches(0, range(2)), recipe.denoising
    latents, draws = d.latents(batch, 0), d.draw(0).part(range(2))
    expected = d.plain(latents.high, draws.t, d.conditioning(batch, draws))
    torch.testing.assert_close(recipe(batch), expected)
    known = state_dict.read_file(parts["vae"]["path"])[0]
    own = recipe.controlnet.backbone.state_dict()
    assert torch.equal(own["0.0.weight"], known["backbone.0.0.weight"][:, :1])
    assert torch.equal(own["3.0.block.0.0.weight"], known["backbone.3.0.block.0.0.weight"])


def test_the_norms_of_the_backbone_keep_their_means(made):
    recipe, batches = recipe_of(made(recipe=REAL))
    before = {n: b.clone() for n, b in recipe.controlnet.named_buffers()}
    recipe(batches(0, range(2))).mean().backward()
    assert before and all(torch.equal(b, before[n]) for n, b in recipe.controlnet.named_buffers())


def test_only_the_controlnet_learns(made):
    recipe, batches = recipe_of(made())
    stirred(recipe)(batches(0, range(4))).mean().backward()
    assert all(p.grad is not None for p in recipe.controlnet.parameters())
    assert all(p.grad is None for p in recipe.net.parameters())


def test_another_condition_is_read_beside_the_pictures(path, made, tmp_path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["hed"] = str(tmp_path / f"{i}.png")
        line["file"] = str(path.parent / line["file"])
        Image.new("RGB", (128, 128), (30, 60, 90 + i)).save(line["hed"])
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("recipe.hint=hed", "data.conditions=[\"hed\"]", f"data.path={tmp_path / 'data.jsonl'}")
    one, batches = recipe_of(made(*words))
    three, _ = recipe_of(made(*words, "recipe.channels=3"))
    batch = batches(0, range(2))
    grey, colour = (r.denoising.features(batch, "hint.image") for r in (one, three))
    assert torch.equal(colour, batch.conditions["hed"].float())
    torch.testing.assert_close(grey, colour.mean(1, keepdim=True).round(), rtol=0, atol=1)


def test_hints_and_latents_come_from_the_cache_where_it_has_them(made, tmp_path):
    settings = made(f"cache.folder={tmp_path / 'cache'}", "recipe.dropout=0.0")
    cli.main(["cache", tiny_ultrapixel.toml(tmp_path, settings)])
    recipe, batches = recipe_of(settings)
    messages = []
    load = cache.loader(settings, recipe.encoders, batches.items, settings.data, messages.append)
    cached = loader.Batches(batches.items, settings.data, settings.seed, settings.batch_size, load)(0, range(4))
    assert not messages and cached.pictures is None
    assert set(cached.features) == {"effnet.high", "hint.image"}
    torch.testing.assert_close(recipe.losses(cached, recipe.denoising.draw(0), 0),
                               recipe.losses(batches(0, range(4)), recipe.denoising.draw(0), 0))


@pytest.mark.parametrize("words, part", [
    (("recipe.hnit=canny",), "recipe.hnit is not a setting; did you mean hint"),
    (("recipe.hint=cany",), "recipe.hint='cany' is none of canny; did you mean canny"),
    (("recipe.channels=2",), "recipe.channels=2 must be 1 or 3"),
    (("recipe.blocks=[0, 8]",), "for ResBlock 8, 64 wide, does not fit a Stage C of 8 ResBlocks"),
    (("recipe.backbone=big",), "backbone='big' must be 'effnet', 'large' or 'simple'"),
    (("samples.every=1",), "recipe.sample_hints names none"),
])
def test_a_setting_that_cannot_work_is_refused(made, words, part):
    with pytest.raises(ValueError) as caught:
        made(*words)
    assert part in str(caught.value)


def test_a_resumed_run_repeats_the_unbroken_run(path, parts, tmp_path):
    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    unbroken, broken = (tiny_ultrapixel.settings(path, tmp_path / n, parts, SIMPLE, "save_every=5", "precision=bf16",
                                                 "optimizer.warm_up=0") for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = (tiny_ultrapixel.weights(tmp_path / n) for n in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert one["model.controlnet.projections.0.2.weight"].any()


def test_training_lowers_the_loss(made):
    settings = made("steps=40", "optimizer.learning_rate=3e-2", "save_every=40", "ema.decay=0")
    fresh, batches = recipe_of(settings)
    recipe, _ = tiny_run.train(settings)
    shown = loader.fixed(batches.items, settings.data)
    assert recipe.validate(shown)["loss"] < 0.95 * fresh.validate(shown)["loss"]


@pytest.fixture(scope="module")
def trained(path, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    Image.effect_noise((200, 160), 60).save(folder / "hint.png")
    words = ("steps=3", "samples.every=3", "samples.prompts=[\"red card\"]", "samples.steps=2", "samples.shift=2.0",
             "samples.cfg=1.0", f"recipe.sample_hints=[\"{folder / 'hint.png'}\"]", "ema.decay=0",
             "optimizer.learning_rate=1e-3")
    tiny_run.train(tiny_ultrapixel.settings(path, folder / "run", parts, REAL, *words))
    return folder / "run"


class Bare:
    """In place of a decoder: the latents themselves."""

    def check(self):
        pass

    def __call__(self, latent, *others):
        return latent


def test_a_run_writes_sample_pictures(trained):
    assert Image.open(trained / "samples/00000003/00.png").size == (24, 24)


def test_samples_follow_their_hints(made):
    recipe, _ = recipe_of(made(recipe=REAL))
    stirred(recipe, 0.01).denoising.decoder = Bare()
    given = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    given[1, :, 40:80, 40:80] = 255
    # canny looks at the pictures that stand for hints
    one, other = recipe.sample(["red card"] * 2, 128, 128, 2, 2.0, 1.0, 0, conditions={"canny": given})
    alone = recipe.sample(["red card"], 128, 128, 2, 2.0, 1.0, 0, conditions={"canny": given[1:]})[0]
    first = recipe.sample(["red card"], 128, 128, 2, 2.0, 1.0, 0, conditions={"canny": given[:1]})[0]
    torch.testing.assert_close(one, first, rtol=1e-3, atol=1e-3)
    assert (alone - first).abs().max() > 1e-3 and (other - one).abs().max() > 1e-3


def test_core_loads_an_exported_controlnet_and_says_what_the_trained_one_says(trained, host):
    (file,) = exporting.export(trained, host.models, "controlnet_of_the_trainer", dtype="fp32")
    assert file.parent.name == "controlnet"
    shape, tensors = checkpoint.read_controlnet(*state_dict.read_file(file))
    assert (shape.in_channels, shape.blocks, shape.hidden) == (1, tuple(EIGHT), 64)
    recipe, _, _ = exporting.open_run(trained)
    own = ControlNet(shape).eval()
    state_dict.load_into(own, tensors, "the ControlNet")
    core = import_module("nodes").ControlNetLoader().load_controlnet(file.name)[0]
    hint = torch.rand(1, 1, 96, 64)
    with torch.no_grad():
        ours, read = ([r for r in net(hint) if r is not None] for net in (recipe.controlnet, own))
        theirs = [r for r in core.t2i_model(hint)["input"][::-1] if r is not None]
    assert len(ours) == len(theirs) == 8
    for one, two, three in zip(ours, read, theirs, strict=True):
        assert torch.equal(one, two) and one.any()
        torch.testing.assert_close(three.float(), one, rtol=1e-3, atol=1e-4)


def test_the_shipped_recipe_passes_a_dry_run_on_tiny_files(path, parts, trained, tmp_path, capsys):
    words = [f"{section}.{key}={value}" for section, values in parts.items() for key, value in values.items()]
    shutil.copytree(trained, tmp_path / "done")
    (file,) = exporting.export(tmp_path / "done", tmp_path / "out", "tiny")
    Image.new("RGB", (64, 64)).save(tmp_path / "hint.png")
    cli.main(["train", "recipes/ultrapixel/ultrapixel_controlnet.toml", "--dry-run", *words, f"init_from={file}",
              "data.kind=jsonl", f"data.path={path}", f"cache.folder={tmp_path / 'cache'}", f"out={tmp_path}/run",
              f"recipe.sample_hints=['{tmp_path / 'hint.png'}']", "device=cpu"])
    output = capsys.readouterr().out
    for part in ("controlnet:", "12 pictures of 768x768 pixels, 576 cells each", "6 pass(es) of 2", "memory     about"):
        assert part in output, part
