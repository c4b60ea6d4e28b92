"""Training UltraPixel's guide, and what its recipes share: the loss, its weight, the features, what comes out."""
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
import tiny_ultrapixel
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.ultrapixel import checkpoint, sampling
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import load, schema
from pixstack.trainer.data import loader as data
from pixstack.trainer.export import exporting
from pixstack.trainer.recipes.ultrapixel import task
from pixstack.trainer.training import build, optim
from pixstack.trainer.training.noise import batch_noise
from tiny_ultrapixel import GUIDED, recipe_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_ultrapixel.parts(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=128)


@pytest.fixture(scope="module", autouse=True)
def remembered():
    yield from tiny_ultrapixel.remembered()


@pytest.fixture
def made(path, parts, tmp_path):
    def settings(*words, recipe=GUIDED, **more):
        return tiny_ultrapixel.settings(path, tmp_path / "run", parts, recipe, *words, **more)
    return settings


def refusal(made, *words, **more):
    with pytest.raises(ValueError) as caught:
        made(*words, **more)
    return str(caught.value)


# --- The loss


def test_the_loss_of_the_parity_case_is_the_references_gradients_included(made, tmp_path):
    weights, c, i, outputs = tiny_ultrapixel.case("ultrapixel_train_loss_a")
    for name, reader, entries in (("stage_c", checkpoint.read_stage_c, c), ("guide", checkpoint.read_guide, c["inr"])):
        shape, tensors = reader(weights, config=entries)
        state_dict.write_file(tmp_path / f"{name}.safetensors", tensors, checkpoint.metadata(shape))
    clip = tiny_ultrapixel.clip(tmp_path / "clip", c["c_clip_text"], c["c_clip_text_pooled"])
    recipe, _ = recipe_of(made(f"model.stage_c={tmp_path / 'stage_c.safetensors'}", f"text.encoder={clip}",
                               f"init_from={tmp_path / 'guide.safetensors'}", "batch_size=3"))
    d, condition = recipe.denoising, {"text": i["clip_text"], "pooled": i["clip_text_pooled"], "image": i["clip_img"]}
    latents = task.BothLatents(task.Latents(i["latents"], i["epsilon"], i["epsilon"]),
                               task.Latents(i["latents_lr"], i["epsilon_lr"], i["epsilon_lr"]))
    loss, logsnr = d.guided(recipe.guide, latents, i["t"], condition), d.diffusion.logsnr(i["t"])
    torch.testing.assert_close(loss, outputs["loss"], rtol=1e-4, atol=1e-4)

    recipe.weight.means.copy_(i["bucket_losses"])
    batch = data.Batch(None, [], None, range(3), 0, [], {}, None, None, None, (64, 64))
    adjusted = recipe.weight(logsnr, loss, batch).mean() / c["grad_accum_steps"]
    torch.testing.assert_close(adjusted, outputs["loss_adjusted"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recipe.weight.means, outputs["bucket_losses"])
    adjusted.backward()
    found = checkpoint.released_guide_names({n: p.grad for n, p in recipe.guide.named_parameters()}, c["null_models"])
    checked = [n for n in outputs if n.startswith("grad.")]
    assert len(checked) == 20
    for name in checked:
        torch.testing.assert_close(found[name.removeprefix("grad.")], outputs[name], rtol=1e-4, atol=1e-4)


def test_a_batch_is_noised_as_the_release_does_and_its_pictures_made_small_by_the_nearest_pixel(made):
    recipe, batches = recipe_of(made("recipe.weight=none", "recipe.dropout=0.0"))
    batch, d = batches(0, range(4)), recipe.denoising
    image = batch.pictures.float() / 255
    net = d.readers[0].loaded("cpu")
    with torch.no_grad():
        high, low = net(image), net(torch.nn.functional.interpolate(image, (64, 64), mode="nearest"))
    t = d.draw(0).t
    eps, eps_low = (batch_noise(0, 0, range(4), x.shape[1:], "cpu", kind) for x, kind in ((high, 0), (low, 2)))
    text, pooled = recipe.text.lookup(batch.captions, "cpu")
    conditioning = {"text": text, "pooled": pooled}
    diffusion = sampling.CosineDiffusion()
    logsnr, kept = diffusion.logsnr(t), diffusion.logsnr(torch.full_like(t, 0.05))
    with torch.no_grad():
        _, features = recipe.net.features(sampling.add_noise(low, eps_low, kept), diffusion.timestep(kept),
                                          **conditioning)
    timestep = diffusion.timestep(logsnr)
    prediction = recipe.net(sampling.add_noise(high, eps, logsnr), timestep, **conditioning,
                            hook=recipe.guide.image(features).hook(timestep, up=1.0))
    torch.testing.assert_close(recipe(batch), (prediction - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_micro_batches_change_neither_losses_nor_the_weights_of_the_next_step(made):
    one, batches = recipe_of(made())
    other, _ = recipe_of(made())
    for step in range(2):
        whole = one(batches(step, range(4)))
        some = torch.cat([other(batches(step, range(s, s + 2))) for s in (0, 2)])
        torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.weight.means, other.weight.means)
    assert 2 <= (one.weight.means != 1).sum() <= 8


def test_only_the_guide_learns_and_all_of_it(made):
    recipe, batches = recipe_of(made())
    recipe(batches(0, range(4))).mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in recipe.net.parameters())
    assert all(p.grad is not None and p.grad.any() for p in recipe.guide.parameters())
    (group,) = recipe.groups(recipe.config)
    assert {id(p) for _, p in group.params} == {id(p) for p in recipe.guide.parameters()}


def test_the_frozen_net_is_in_bf16_and_the_guide_that_learns_in_float32(made):
    recipe, batches = recipe_of(made("precision=bf16"))
    full, _ = recipe_of(made())
    assert {p.dtype for p in recipe.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in recipe.guide.parameters()} == {torch.float32}
    batch = batches(0, range(4))
    loss = recipe(batch)
    torch.testing.assert_close(loss, full(batch), rtol=0.05, atol=0.05)
    loss.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in recipe.guide.parameters())


def test_activation_checkpointing_leaves_gradients_as_they_are(made):
    gradients = []
    for word in ("checkpoint_activations=false", "checkpoint_activations=true"):
        recipe, batches = recipe_of(made(word))
        recipe(batches(0, range(4))).mean().backward()
        gradients.append([p.grad for p in recipe.guide.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_captions_are_dropped_and_images_given_as_often_as_the_settings_say(made, parts, tmp_path):
    vision = tiny_ultrapixel.vision(tmp_path / "vision")
    recipe, batches = recipe_of(made(f"model.image_encoder={vision}", "batch_size=500", "recipe.dropout=0.2",
                                     "recipe.image_share=0.4"))
    d = recipe.denoising
    draws = d.draw(3)
    assert 0.1 < draws.dropped.float().mean() < 0.3 and 0.3 < draws.shown.float().mean() < 0.5
    assert torch.equal(d.draw(3).t, draws.t) and not torch.equal(d.draw(4).t, draws.t)
    batch = batches(3, range(8))
    draws = replace(draws, dropped=torch.arange(500) == 0, shown=torch.arange(500) == 1).part(range(8))
    conditioning = d.conditioning(batch, draws)
    empty = recipe.text.lookup([""], "cpu")[0]
    assert torch.equal(conditioning["text"][0], empty[0]) and not torch.equal(conditioning["text"][1], empty[0])
    assert conditioning["image"][1].any() and not conditioning["image"][0].any()
    assert not recipe_of(made("recipe.image_share=1.0"))[0].denoising.draw(0).shown.any()  # nothing makes embeddings


def test_an_antialiased_low_resolution_is_another_picture(made):
    nearest, batches = recipe_of(made())
    smooth, _ = recipe_of(made("recipe.low_filter=antialias"))
    torch.manual_seed(0)
    batch = replace(batches(0, range(2)), pictures=torch.randint(0, 256, (2, 3, 128, 192), dtype=torch.uint8))
    a, b = (r.denoising.latents(batch, 0) for r in (nearest, smooth))
    assert torch.equal(a.high.clean, b.high.clean) and a.low.clean.shape == b.low.clean.shape == (2, 16, 1, 2)
    assert (a.low.clean - b.low.clean).abs().mean() > 0.05 * a.low.clean.std()


def test_validation_says_the_same_twice_and_in_small_batches_and_moves_no_weight(made):
    recipe, batches = recipe_of(made())
    whole = recipe.validate(data.fixed(batches.items, batches.settings))
    assert recipe.validate(data.fixed(batches.items, batches.settings)) == whole
    assert recipe.validate(data.fixed(batches.items, batches.settings, 3)) == pytest.approx(whole, rel=1e-4)
    assert set(whole) == {"loss", "standard_error", "quarter0", "quarter1", "quarter2", "quarter3"}
    assert torch.equal(recipe.weight.means, torch.ones(300))


def test_a_known_noise_level_weighs_by_p2_where_that_is_asked_for(made):
    recipe, batches = recipe_of(made("recipe.weight=p2"))
    plain, _ = recipe_of(made("recipe.weight=none"))
    batch = batches(0, range(4))
    logsnr = recipe.denoising.diffusion.logsnr(recipe.denoising.draw(0).t)
    torch.testing.assert_close(recipe(batch), plain(batch) * sampling.p2_weight(logsnr))


# --- Where it may start


def test_a_run_starts_from_the_released_pickle(made, tmp_path):
    weights = tiny_ultrapixel.network(Guide, tiny_ultrapixel.GUIDE).state_dict()
    released = checkpoint.released_guide_names(weights, number=6)
    torch.save(released, tmp_path / "ultrapixel_t2i.safetensors")
    recipe, _ = recipe_of(made(f"init_from={tmp_path / 'ultrapixel_t2i.safetensors'}"))
    assert all(torch.equal(v, weights[k]) for k, v in recipe.guide.state_dict().items())


def test_a_fresh_guide_has_the_sizes_that_the_settings_say(made):
    shape = recipe_of(made())[0].guide.config
    assert shape == replace(tiny_ultrapixel.GUIDE, frequencies=64)


@pytest.mark.parametrize("words, part", [
    (("recipe.droput=0.1",), "recipe.droput is not a setting; did you mean dropout"),
    (("model.stage_d=x",), "model.stage_d is not a setting; did you mean stage_"),
    (("recipe.weight=adaptiv",), "did you mean adaptive"),
    (("recipe.low_filter=nearst",), "did you mean nearest"),
    (("recipe.dropout=2.0",), "recipe.dropout=2.0 is outside [0, 1]"),
    (("recipe.low_side=4",), "data.resolution=128 is not larger than the low resolution, 128 pixels"),
    (("recipe.low_side=3", "recipe.max_tokens=4"), "makes 9 cells, the guide takes 4"),
    (("data.resolution=100",), "no multiples of 32"),
    (("model.stage_c=/nowhere",), "model.stage_c='/nowhere': there is no such file"),
    (("samples.every=1", "model.previewer="), "nothing here makes pictures of latents"),
    (("text.encoder=small",), "Stage C reads CLIP-G"),
    (("vae.path=",), "vae.path is empty"),
])
def test_a_setting_that_cannot_work_is_refused(made, words, part):
    assert part in refusal(made, *words)


def test_files_of_other_networks_are_refused_by_name(made, parts, tmp_path):
    guide = tiny_ultrapixel.guide_file(tmp_path / "guide.safetensors")
    assert "stage_c.safetensors: This is not a guide of UltraPixel" in refusal(
        made, f"init_from={parts['model']['stage_c']}")
    assert "guide.safetensors: This is not a Stage C" in refusal(made, f"model.stage_c={guide}")
    lite = replace(tiny_ultrapixel.C, hidden=(32, 32))
    tiny_ultrapixel.written(tmp_path / "lite.safetensors", StageC, lite)
    assert "levels of (64, 64) and (64, 64) channels, model.stage_c has (32, 32)" in refusal(
        made, f"model.stage_c={tmp_path / 'lite.safetensors'}", f"init_from={guide}")


def test_a_text_encoder_of_another_width_is_refused(made, tmp_path):
    clip = tiny_ultrapixel.clip(tmp_path / "clip", 16, 12)
    with pytest.raises(ValueError, match="tokens of width 16 and vectors of 12, this Stage C reads 32 and 32"):
        recipe_of(made(f"text.encoder={clip}"))


# --- Runs


def test_a_resumed_run_repeats_the_unbroken_run(path, parts, tmp_path):
    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("validation.every=2", "save_every=5", "micro_batch_size=2", "precision=bf16")
    unbroken, broken = (tiny_ultrapixel.settings(path, tmp_path / n, parts, GUIDED, *words)
                        for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = (tiny_ultrapixel.weights(tmp_path / n) for n in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert "model.weight.means" in one and (one["model.weight.means"] != 1).any()
    assert not any(k.startswith("model.net.") for k in one)  # the frozen net stays where it came from
    assert tiny_ultrapixel.log(tmp_path / "unbroken") == tiny_ultrapixel.log(tmp_path / "broken")


def test_training_lowers_the_loss_on_pictures_that_it_has_not_seen(made):
    settings = made("steps=40", "optimizer.learning_rate=1e-2", "optimizer.warm_up=0", "save_every=40", "ema.decay=0")
    fresh, _ = recipe_of(settings)
    recipe, run = tiny_run.train(settings)
    held_out = data.fixed(build.collection(settings).held_out, settings.data)
    assert recipe.validate(held_out)["loss"] < 0.8 * fresh.validate(held_out)["loss"]


@pytest.fixture(scope="module")
def trained(path, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ("steps=4", "samples.every=4", "samples.prompts=[\"red card\"]", "samples.steps=2", "ema.decay=0",
             "optimizer.learning_rate=1e-2")
    tiny_run.train(tiny_ultrapixel.settings(path, folder, parts, GUIDED, *words))
    return folder


def test_a_run_writes_sample_pictures_by_the_previewer(trained):
    from PIL import Image

    assert Image.open(trained / "samples/00000004/00.png").size == (24, 24)  # 8 pixels to each of 3 cells


def test_sample_writes_the_previewers_pictures_in_their_own_size(trained, tmp_path):
    cli.main(["sample", str(trained), "red card", "--out", str(tmp_path / "out"), "--npz", "--device", "cpu"])
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["arr_0"].shape == (1, 24, 24, 3)


def test_a_sample_in_two_passes_is_decoded_by_stages_b_and_a_where_they_are_named(made, tmp_path):
    recipe, _ = recipe_of(made(*tiny_ultrapixel.with_stages(tmp_path)))
    both = recipe.sample(["red card", "blue square"], 128, 64, 2, 1.0, 4.0, 3)
    assert both.shape == (2, 3, 128, 64) and both.abs().max() <= 1 and both.std() > 0.01
    second = recipe.sample(["blue square"], 128, 64, 2, 1.0, 4.0, 4)
    torch.testing.assert_close(both[1:], second, rtol=1e-3, atol=1e-3)


def test_without_anything_that_makes_pictures_a_sample_says_what_to_name(made):
    recipe, _ = recipe_of(made("model.previewer="))
    with pytest.raises(ValueError, match="name model.previewer, or model.stage_b and model.stage_a"):
        recipe.sample(["red card"], 128, 128, 2, 1.0, 4.0, 0)


def test_an_exported_guide_does_what_the_trained_one_does(trained, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    assert file.parent.name == "model_patches"
    shape, tensors = checkpoint.read_guide(*state_dict.read_file(file))
    guide = Guide(shape)
    state_dict.load_into(guide, tensors, "the guide")
    recipe, _, _ = exporting.open_run(trained)
    torch.manual_seed(0)
    x, t, conds = torch.randn(2, 16, 5, 4), torch.tensor([0.3, 0.8]), recipe.denoising.condition(["red card", "a cat"])
    with torch.no_grad():
        _, features = recipe.net.features(torch.randn(2, 16, 2, 2), torch.full((2,), 0.05), **conds)
        plain = recipe.net(x, t, **conds)
        ours, theirs = (recipe.net(x, t, **conds, hook=g.image(features).hook(t)) for g in (recipe.guide, guide))
    torch.testing.assert_close(theirs, ours)
    assert (ours - plain).abs().max() > 1e-2


def test_comfyui_predicts_with_an_exported_guide_what_the_trainer_predicts(trained, parts, host):
    import shutil
    import sys
    from importlib import import_module

    shutil.copy(parts["model"]["stage_c"], host.models / "diffusion_models" / "stage_c_of_the_trainer.safetensors")
    (file,) = exporting.export(trained, host.models, "guide_of_the_trainer", dtype="fp32")
    core = import_module("nodes")
    net = core.UNETLoader().load_unet("stage_c_of_the_trainer.safetensors", "default")[0].model.diffusion_model.float()
    loader = core.NODE_CLASS_MAPPINGS["PixStack_UltraPixelGuideLoader"]
    guide = loader.execute(guide_name=file.name).args[0].model
    nodes = sys.modules[sys.modules[loader.__module__].ultrapixel.__name__]
    recipe, _, _ = exporting.open_run(trained)
    torch.manual_seed(0)
    x, t, conds = torch.randn(2, 16, 5, 4), torch.tensor([0.3, 0.8]), recipe.denoising.condition(["red card", "a cat"])
    low, kept, no_image = torch.randn(2, 16, 2, 2), torch.full((2,), 0.05), torch.zeros(2, 1, 768)
    with torch.no_grad():
        tap = nodes.FeatureTap()
        network = nodes.guided_network(net)
        network(low, kept, conds["text"], conds["pooled"], no_image, transformer_options={}, **{nodes.HOOK: tap})
        step = guide.image(tap.features).step(t, {way: [x.shape[-2:]] * 2 for way in ("down", "up")}, x.dtype, up=1.0)
        theirs = network(x, t, conds["text"], conds["pooled"], no_image, transformer_options={}, **{nodes.HOOK: step})
        _, features = recipe.net.features(low, kept, **conds)
        ours = recipe.net(x, t, **conds, hook=recipe.guide.image(features).hook(t, up=1.0))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_finished_run_is_exported_where_stage_c_is_not(trained, tmp_path):
    import json
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    raw = json.loads((tmp_path / "run/config.json").read_text())
    raw["model"]["stage_c"] = "/nowhere/stage_c.safetensors"
    (tmp_path / "run/config.json").write_text(json.dumps(raw))
    assert exporting.export(tmp_path / "run", tmp_path / "out", "tiny")[0].is_file()
    recipe, _, _ = exporting.open_run(tmp_path / "run")
    with pytest.raises(ValueError, match="model.stage_c='/nowhere"):
        recipe.sample(["red card"], 128, 128, 2, 1.0, 4.0, 0)


def test_the_shipped_recipe_passes_a_dry_run_on_tiny_files(path, parts, tmp_path, capsys):
    words = [f"{section}.{key}={value}" for section, values in parts.items() for key, value in values.items()]
    guide = tiny_ultrapixel.guide_file(tmp_path / "guide.safetensors")
    cli.main(["train", "recipes/ultrapixel/ultrapixel_guide.toml", "--dry-run", *words, f"init_from={guide}",
              "data.kind=jsonl", f"data.path={path}", "data.resolution=256", "recipe.low_side=2",
              f"cache.folder={tmp_path / 'cache'}", f"out={tmp_path}/run", "device=cpu", "samples.height=256",
              "samples.width=256"])
    output = capsys.readouterr().out
    for part in ("learn", "guide:", "4 pictures of 256x256 pixels, 64 cells each, guided by 2x2 cells",
                 "4 pass(es) of 1", "memory     about", "t 0."):
        assert part in output, part
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_shows_the_releases_sizes():
    raw = load.read_toml("recipes/ultrapixel/ultrapixel_guide.toml")
    assert raw["data"]["buckets"] == "ultrapixel" and raw["recipe"]["low_side"] == 24
    assert optim.Optimizers([], schema.Optimizer(**raw["optimizer"]), 10, 4).learning_rate == 1e-4


def test_pictures_of_several_sizes_train_together(path, parts, tmp_path):
    words = ("steps=2", "data.crop=centre", "data.buckets=ultrapixel", "data.resolution=256", "batch_size=2")
    recipe, _ = tiny_run.train(tiny_ultrapixel.settings(path, tmp_path / "run", parts, GUIDED, *words))
    assert all(p.isfinite().all() for p in recipe.guide.parameters())


def test_a_collection_without_captions_is_refused(made, tmp_path):
    from PIL import Image

    (tmp_path / "plain").mkdir()
    Image.new("RGB", (128, 128)).save(tmp_path / "plain/a.png")
    with pytest.raises(ValueError, match="1 pictures have no caption"):
        build.collection(made(data={"kind": "folder", "path": str(tmp_path / "plain"), **tiny_ultrapixel.IMAGE}))
