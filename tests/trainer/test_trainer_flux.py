"""Training a small FLUX, and a PixelPonder on what it exports: the loss, resuming, what core's loader makes of it."""
from importlib import import_module
from pathlib import Path

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.flux import checkpoint, sampling
from pixstack.models_impl.flux.model import pack, unpack
from pixstack.trainer.config import check
from pixstack.trainer.data import loader
from pixstack.trainer.export import exporting
from pixstack.trainer.recipes.flux import task
from pixstack.trainer.training import build, checkpoints
from pixstack.trainer.training.noise import batch_noise

MODEL = {"hidden": 128, "heads": 1, "mlp_hidden": 512, "depth": 1, "single_depth": 1, "pooled_dim": 8}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_ponder.pictures(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return str(tiny_pixart.vae(tmp_path_factory.mktemp("vae") / "vae", 16))


def settings(path, out, vae, *words, **more):
    raw = {**tiny_run.SETTINGS, "recipe": {"name": "flux"}, "precision": "fp32", "model": MODEL, "out": str(out),
           "text": {**tiny_run.SETTINGS["text"], "padded": True}, "vae": {"path": vae},
           "data": {"path": str(path), "resolution": 32, "crop": "none"}, **more}
    return check.parse(raw, words)


def recipe_of(made):
    found = build.collection(made)
    recipe = build.recipe(made, found)
    torch.manual_seed(1)
    for p in recipe.net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return recipe, loader.Batches(found.train, made.data, made.seed, made.batch_size)


@pytest.fixture(scope="module")
def trained(path, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_run.train(settings(path, folder, vae, "steps=4", "samples.every=4", "samples.prompts=[\"red card\"]",
                            "samples.steps=2", "model.guidance=true"))
    return folder


def test_the_loss_is_that_of_rectified_flow(path, vae, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, vae, "recipe.dropout=0.0"))
    batch = batches(0, range(6))
    sigma, dropped, _ = recipe.flow.draw(0, 0.0)
    assert not dropped.any()
    latent = (recipe.flow.vae.latents(batch, "cpu", 0) - 0.1159) * 0.3611
    noise = batch_noise(0, 0, range(6), latent.shape[1:], "cpu")
    flow = sampling.RectifiedFlow()
    noisy = flow.add_noise(latent, noise, sigma)
    ids, mask = recipe.text.tokenize(batch.captions)
    whole = torch.zeros(6, 16, dtype=torch.int64)
    whole[:, :ids.shape[1]] = ids
    context = recipe.text(whole, torch.ones(6, 16, dtype=torch.bool))
    prediction = recipe.net(pack(noisy), sigma, context, torch.zeros(6, 8), img_ids=task.ids_of(noisy))
    torch.testing.assert_close(recipe(batch), flow.loss(unpack(prediction, 4, 4), latent, noise, sigma))


def test_a_dropped_caption_is_the_empty_one(path, vae, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, vae))
    batch = batches(0, range(2))
    given = recipe.flow.noising(batch, torch.tensor([0.5, 0.5]), "cpu", 0, torch.tensor([True, False])).condition
    expected = recipe.flow.condition(["", batch.captions[1]], "cpu")
    assert torch.equal(given["context"], expected["context"])


def test_micro_batches_give_the_losses_of_the_whole_batch(path, vae, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, vae))
    whole = recipe(batches(2, range(6)))
    some = torch.cat([recipe(batches(2, range(s, s + 2))) for s in (0, 2, 4)])
    torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss(path, vae, tmp_path):
    tiny_run.train(settings(path, tmp_path / "run", vae, "steps=40", "optimizer.learning_rate=2e-3", "save_every=40",
                            "optimizer.name=muon"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run") if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses


def test_a_resumed_run_repeats_the_unbroken_run(path, vae, tmp_path):
    import os
    import signal

    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("validation.every=2", "save_every=5")
    unbroken, broken = (settings(path, tmp_path / n, vae, *words) for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    for name in ("model", "ema", "optimizer"):
        one, other = (checkpoints.read_tensors(tmp_path / n / f"checkpoints/00000006/{name}.safetensors")
                      for n in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")


@pytest.mark.parametrize("words, part", [
    (("model.width=3",), "model.width is not a setting"),
    (("model.heads=3",), "hidden=128 is not a multiple of heads=3"),
    (("recipe.dropout=1.5",), "recipe.dropout=1.5 is outside [0, 1)"),
    (("text.padded=false",), "text.padded=false"),
    (("vae.path=",), "vae.path is empty"),
])
def test_a_setting_that_cannot_work_is_refused(path, vae, tmp_path, words, part):
    with pytest.raises(ValueError) as caught:
        settings(path, tmp_path, vae, *words)
    assert part in str(caught.value)


def test_a_vae_of_other_latents_is_refused(path, vae, tmp_path):
    with pytest.raises(ValueError, match="makes latents of 4 channels, and this FLUX reads 16"):
        settings(path, tmp_path, str(tiny_pixart.vae(tmp_path / "vae")))


def test_a_sample_without_distillation_is_guided_by_the_empty_caption(path, vae, tmp_path):
    recipe, _ = recipe_of(settings(path, tmp_path, vae))
    recipe.requires_grad_(False)
    plain, guided = (recipe.sample(["red card"], 32, 32, 2, 1.0, cfg, 0) for cfg in (1.0, 3.0))
    assert (plain - guided).abs().max() > 1e-4


def test_an_export_is_where_a_run_may_start_and_what_a_pixelponder_is_trained_on(path, vae, trained, tmp_path):
    net, text = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    shape, tensors = checkpoint.read(*state_dict.read_file(net))
    average = checkpoints.read_tensors(trained / "checkpoints/00000004/ema.safetensors")
    assert all(torch.equal(value, average[f"net.{key}"]) for key, value in tensors.items())
    recipe = build.recipe(made := settings(path, tmp_path / "a", vae, f"init_from={net}"), build.collection(made))
    assert all(torch.equal(value, tensors[key]) for key, value in recipe.net.state_dict().items())
    raw = {**tiny_run.SETTINGS, "precision": "fp32", "model": {"depth": 1, "selector_width": 128}, "vae": {"path": vae},
           "recipe": {"name": "pixelponder", "base": str(net)}, "out": str(tmp_path / "run"),
           "text": {"encoder": str(text), "learn": False, "padded": True, "max_length": 16},
           "data": {"path": str(path), **tiny_ponder.IMAGE}}
    ponder, _ = tiny_run.train(check.parse(raw))
    assert ponder.net.config.trunk.context_dim == shape.context_dim == 16
    assert ponder.flow.condition(["red card"], "cpu")["context"].shape == (1, 16, 16)


def test_core_flux_predicts_with_an_export_what_the_trainer_predicts(trained, host):
    import test_nodes_pixelponder as node

    core, comfy = import_module("nodes"), import_module("comfy")
    for name in ("sample", "samplers", "model_detection", "ldm.flux.model"):
        import_module(f"comfy.{name}")
    file, _ = exporting.export(trained, Path(host.models), "tiny_flux_trained", dtype="fp32")
    recipe, _, _ = exporting.open_run(trained)
    there = node.SimpleNamespace(comfy=comfy)
    there.model = core.UNETLoader().load_unet(file.name, "default")[0]
    recipe.requires_grad_(False)
    condition = recipe.flow.condition(["red card"], "cpu", 3.5)
    text = [[condition["context"], {"pooled_output": condition["pooled"], "guidance": 3.5}]]
    noise = torch.randn(1, 16, 4, 4)
    theirs = node.draw(there, text, text, noise=noise)
    ours = sampling.RectifiedFlow().sample(lambda x, t: recipe.predict(x, t, condition), noise, node.sigmas(there))
    node.close(theirs, ours)
