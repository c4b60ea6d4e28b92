"""Distillation of PixArt and its ControlNet: the losses of the releases, what learns, and what ComfyUI makes of it."""
import os
import signal
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import pytest
import tiny_pixart
import tiny_run
import torch
from adapters.pixart_sampling import toy
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixart import checkpoint, sampling
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader, sheets
from pixstack.trainer.data.pictures import shown, tensor
from pixstack.trainer.export import exporting
from pixstack.trainer.features import cache
from pixstack.trainer.training import build, checkpoints, optim
from pixstack.trainer.training.ema import EmaWeights
from tiny_pixart import recipe_of
from weights import tiny_hed

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    tiny_pixart.released(file)
    return file


@pytest.fixture
def remembered():
    yield from tiny_pixart.remembered()


@pytest.fixture
def made(path, parts, base, tmp_path):
    def settings(recipe, *words, **more):
        return tiny_pixart.settings(path, tmp_path / "run", parts, f"init_from={base}", *words, recipe=recipe,
                                    **{"model": {}, **more})
    return settings


# --- LCM


def test_the_lcm_loss_of_a_parity_case_is_the_references(made, monkeypatch):
    """The recipe's own arithmetic on a batch whose latents and noise are the case's and whose networks are its toys."""
    config, i, outputs = tiny_pixart.case("pixart_lcm_distill")
    recipe, batches = recipe_of(made("pixart_lcm", f"recipe.distance={config['loss_type']}",
                                     f"recipe.guidance={config['cfg_scale']}", "recipe.huber_c=0.001"))
    module = import_module(type(recipe).__module__)
    monkeypatch.setattr(recipe.denoising, "latents", lambda batch, seed: i["latents"])
    monkeypatch.setattr(module, "batch_noise", lambda *_, **__: i["noise"])
    monkeypatch.setattr(recipe.denoising, "condition", lambda captions, dropped, *_: {"y": i["y"] if dropped is None
                                                                                      else i["null_y"]})
    monkeypatch.setattr(recipe.denoising, "eps", lambda net, x, t, condition: toy(x, t, condition["y"]))
    monkeypatch.setattr(recipe, "taught", lambda x, t, condition: 0.9 * toy(x, t, condition["y"]))
    monkeypatch.setattr(recipe, "target", lambda x, t, condition: 1.05 * toy(x, t, condition["y"]))
    recipe.grid = sampling.LcmGrid(sampling.NoiseSchedule(steps=config.get("train_sampling_steps", 1000)),
                                   config["num_ddim_timesteps"])
    step = recipe.distilled(batches(0, range(len(i["index"]))), i["index"], 0)
    torch.testing.assert_close(step.loss.view(1), outputs["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.target, outputs["target"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_target_is_the_ema(made, precision):
    recipe, batches = recipe_of(made("pixart_lcm", "recipe.lora=false", "ema.decay=0.95", f"precision={precision}"))
    recipe.ema = EmaWeights(recipe, 0.95)
    other = deepcopy(recipe.net)
    with torch.no_grad():
        for name, p in recipe.net.named_parameters():
            recipe.ema.weights[f"net.{name}"] = p + 0.05 * torch.randn_like(p)
    other.load_state_dict({**recipe.net.state_dict(),
                           **{k.removeprefix("net."): v for k, v in recipe.ema.weights.items()}})
    d, batch = recipe.denoising, batches(0, range(2))
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([99, 499]), recipe.denoising.condition(batch.captions)
    with d.autocast():
        d.eps(recipe.net, x, t, condition)  # what autocast has cast of the student must not be used for the average
        with torch.no_grad():
            target = recipe.target(x, t, condition)
    with d.autocast(), torch.no_grad():
        expected = d.eps(other, x, t, condition)
    assert torch.equal(target, expected)


def test_the_teacher_of_an_lcm_lora_is_the_network_without_it(made, base):
    recipe, batches = recipe_of(made("pixart_lcm"))
    plain, _ = recipe_of(made("pixart"))
    plain.net.load_state_dict(state_dict.read_file(base)[0])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([99, 499])
    condition = recipe.denoising.condition(["red card", "blue square"])
    with torch.no_grad():
        assert torch.equal(recipe.taught(x, t, condition), plain.denoising.eps(plain.net, x, t, condition))
        assert not torch.equal(recipe.taught(x, t, condition), recipe.target(x, t, condition))


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("lora", ["true", "false"])
def test_distillation_lowers_its_loss(made, tmp_path, lora):
    tiny_run.train(made("pixart_lcm", f"recipe.lora={lora}", "steps=60", "optimizer.learning_rate=1e-2",
                        "optimizer.warm_up=0", "ema.decay=0.95", "save_every=60", "validation.every=60"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run") if "loss" in line]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


def test_an_lcm_needs_an_ema(made):
    with pytest.raises(ValueError, match="ema.decay=0, and the EMA is the target"):
        made("pixart_lcm", "recipe.lora=false", "ema.decay=0.0")


# --- DMD


def test_the_dmd_losses_of_a_parity_case_are_the_references(made, monkeypatch):
    config, i, outputs = tiny_pixart.case("pixart_dmd")
    recipe, batches = recipe_of(made("pixart_dmd", f"recipe.timestep={config['one_step_maxt']}",
                                     f"recipe.guidance={config['cfg']}"))
    module, d, B = import_module(type(recipe).__module__), recipe.denoising, len(i["z"])
    noises = {module.START: i["z"], module.RENOISE: i["noise"], module.FOLLOW: i["noise"]}
    monkeypatch.setattr(module, "batch_noise", lambda seed, step, positions, shape, device, kind: noises[kind])
    monkeypatch.setattr(d, "condition", lambda captions, *_: {"y": i["null_y"] if captions == [""] * B else i["y"]})
    factors = {id(recipe.net): 1.0, id(recipe.teacher[0]): 0.9, id(recipe.follower): 1.1}
    monkeypatch.setattr(d, "eps", lambda net, x, t, condition: factors[id(net)] * toy(x, t, condition["y"]))
    monkeypatch.setattr(recipe, "draw", lambda step: (i["timestep"], i["timestep"]))
    batch = batches(0, range(B))
    found, generated, _ = recipe.matched(batch, i["timestep"], 0)
    torch.testing.assert_close(generated, outputs["generated"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss.view(1), outputs["dm_loss"], rtol=1e-3, atol=1e-5)
    follower = (recipe(batch) - found.loss).mean().view(1)
    torch.testing.assert_close(follower, outputs["fake_loss"], rtol=1e-3, atol=1e-4)


def test_student_and_follower_learn_each_from_its_own_loss(made):
    recipe, batches = recipe_of(made("pixart_dmd"))
    batch = batches(0, range(6))
    judged, _ = recipe.draw(0)
    recipe.matched(batch, judged, 0)[0].loss.backward()
    assert recipe.net.final_layer.linear.weight.grad.any() and recipe.follower.final_layer.linear.weight.grad is None
    alone = recipe.net.final_layer.linear.weight.grad.clone()
    recipe.zero_grad()
    recipe(batch).mean().backward()
    torch.testing.assert_close(recipe.net.final_layer.linear.weight.grad, alone)
    assert recipe.follower.final_layer.linear.weight.grad.any()


def test_gradients_of_student_and_follower_are_clipped_apart(made):
    settings = made("pixart_dmd", "optimizer.clip=1.0")
    recipe, _ = recipe_of(settings)
    optimizer = optim.Optimizers(recipe.groups(settings), settings.optimizer, 10)
    for factor, net in ((0.0001, recipe.net), (100.0, recipe.follower)):
        for p in net.parameters():
            p.grad = torch.full_like(p, factor)
    norm = optimizer.clip()
    assert norm > 1000 and (recipe.net.t_block[1].weight.grad == 0.0001).all()


@pytest.mark.usefixtures("remembered")
def test_the_follower_comes_to_know_the_student(made, tmp_path):
    tiny_run.train(made("pixart_dmd", "steps=60", "optimizer.learning_rate=3e-3", "optimizer.warm_up=0",
                        "save_every=60", "recipe.follower_learning_rate_multiple=3.0", "validation.every=60"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run") if "loss" in line]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


# --- ControlNet


@pytest.fixture(scope="module")
def annotator(tmp_path_factory):
    file = tmp_path_factory.mktemp("annotator") / "ControlNetHED.pth"
    tiny_hed(file)
    return file


@pytest.fixture
def controlled(made, annotator):
    def settings(*words):
        return made("pixart_controlnet", "recipe.blocks=1", f"recipe.annotator={annotator}", *words)
    return settings


@pytest.mark.usefixtures("remembered")
def test_training_a_controlnet_lowers_the_loss(controlled, tmp_path):
    tiny_run.train(controlled("steps=60", "optimizer.learning_rate=1e-2", "optimizer.warm_up=0", "save_every=60"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run")]
    assert sum(losses[-15:]) < 0.95 * sum(losses[:15])


def test_a_controlnet_begins_by_changing_nothing(controlled):
    from pixstack.trainer.training import build

    settings = controlled()
    recipe = build.recipe(settings, build.collection(settings))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(recipe.controlled(torch.randn(1, 4, 8, 8))(x, t, context=context), recipe.net(x, t, context))
    learns = {n.split(".")[0] for n, p in recipe.named_parameters() if p.requires_grad}
    assert learns == {"control"}


def test_the_hint_is_the_latent_of_the_edges(controlled, annotator):
    from pixstack.models_impl.annotators import hed

    recipe, batches = recipe_of(controlled())
    batch = batches(0, range(2))
    edge = hed.load(annotator)(batch.pictures.float() / 255)[1]
    rounded = ((edge * 255).round() / 255)
    latent = recipe.denoising.vae.loaded("cpu").encode(hed.condition(rounded)).latent_dist.mean
    torch.testing.assert_close(recipe.hint.encode(batch.pictures, "cpu")["mean"], latent, rtol=1e-3, atol=1e-4)


def test_hints_come_from_the_conditions_of_the_data(made, tmp_path):
    for folder, colour in (("images", (9, 80, 200)), ("hed", (255, 255, 255))):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "set" / folder / "a.png")
    (tmp_path / "set/images/a.txt").write_text("a picture")
    settings = made("pixart_controlnet", "recipe.blocks=1", "batch_size=1", data={
        "kind": "folder", "path": str(tmp_path / "set/images"), "conditions": ["hed"], **tiny_pixart.IMAGE})
    recipe, batches = recipe_of(settings)
    batch = batches(0, range(1))
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.equal(batch.conditions["hed"], white) and recipe(batch).isfinite().all()


def test_a_controlnet_trains_from_the_cache_what_it_trains_from_pictures(controlled, tmp_path):
    settings = controlled(f"cache.folder={tmp_path / 'cache'}")
    recipe, batches = recipe_of(settings)
    expected = recipe(batches(0, range(6)))
    cache.fill(batches.items, settings.data, recipe.encoders, tmp_path / "cache", "cpu")
    load = cache.loader(settings, recipe.encoders, batches.items, settings.data, pytest.fail)
    batch = loader.Batches(batches.items, settings.data, 0, 6, load)(0, range(6))
    assert set(batch.features) == {"latent.mean", "latent.std", "hint.mean", "hint.std"}
    torch.testing.assert_close(recipe(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words, part", [
    (("recipe.annotator=",), "name the one condition that is the hint"),
    (("recipe.annotator=/nowhere",), "recipe.annotator='/nowhere': there is no such file"),
    (("recipe.block=3",), "recipe.block is not a setting; did you mean blocks"),
    (('recipe.hints=["/nowhere"]',), "recipe.hints: '/nowhere': there is no such file"),
])
def test_a_setting_that_cannot_work_is_refused(controlled, words, part):
    with pytest.raises(ValueError) as caught:
        controlled(*words)
    assert part in str(caught.value)


@pytest.fixture(scope="module")
def trained(path, parts, base, annotator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    Image.new("RGB", (80, 64), (200, 30, 30)).save(folder / "hint.png")
    settings = tiny_pixart.settings(
        path, folder / "run", parts, f"init_from={base}", "recipe.blocks=1", f"recipe.annotator={annotator}", "steps=8",
        "save_every=8", "optimizer.learning_rate=3e-2", "optimizer.warm_up=0", "ema.decay=0.0", "samples.every=8",
        "samples.steps=2", 'samples.prompts=["red card"]', f'recipe.hints=["{folder / "hint.png"}"]', model={},
        recipe="pixart_controlnet")
    tiny_run.train(settings)
    return folder / "run"


def test_a_controlnet_run_draws_after_its_hint(trained):
    recipe, _, _ = exporting.open_run(trained)
    with_hint = recipe.sample(["red card"], 64, 64, 2, 1.0, 4.5, 0)
    without = recipe.sample(["red card", "red card"], 64, 64, 2, 1.0, 4.5, 0)[:1]
    assert (with_hint - without).abs().max() > 1e-3 and (trained / "samples/00000008.png").exists()


def test_sample_draws_after_the_edges_of_a_data_sets_pictures(trained, path, tmp_path):
    cli.main(["sample", str(trained), "--data", str(path), "--count", "3", "--out", str(tmp_path / "out"), "--device",
              "cpu"])
    recipe, config, _ = exporting.open_run(trained)
    items = build.collection(config).train[:3]
    pictures = torch.stack([shown(i.file, 64, 64) for i in items])
    given = [i.texts[0] for i in items], 64, 64, config.samples.steps, config.samples.shift, config.samples.cfg, 0
    wanted, free = recipe.sample(*given, conditions={"": pictures}), recipe.sample(*given)
    drawn = [tensor(Image.open(tmp_path / f"out/{i:06d}.png")) for i in range(3)]
    assert all(torch.equal(d, tensor(w)) for d, w in zip(drawn, sheets.to_images(wanted), strict=True))
    assert not torch.equal(wanted, free)


def test_an_exported_controlnet_is_read_as_it_was_trained(trained, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "edges", dtype="fp32")
    config, blocks, tensors = checkpoint.read_controlnet(*state_dict.read_file(file))
    saved = checkpoints.read_tensors(trained / "checkpoints/00000008/model.safetensors")
    assert blocks == 1 and config.hidden == 72
    for key, value in tensors.items():
        assert torch.equal(value, saved[f"control.{key}"]), key


def test_comfyui_draws_with_an_exported_controlnet_what_the_trainer_draws(trained, base, host):
    models = Path(host.models)
    (file,) = exporting.export(trained, models, "tiny_trained_edges", dtype="fp32")
    (models / "diffusion_models/tiny_control_base.safetensors").write_bytes(base.read_bytes())
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS

    def node(name, **inputs):
        return nodes[f"PixStack_PixArt{name}"].execute(**inputs).args

    model = node("Loader", model_name="tiny_control_base.safetensors", variant="auto", prediction="auto",
                 positions="auto", weights="ema", dtype="fp32")[0]
    net = node("ControlNetLoader", control_net_name=file.name, dtype="fp32")[0]
    rng = torch.Generator().manual_seed(0)
    hint, noise, text = (torch.randn(*size, generator=rng) for size in ((1, 4, 8, 8), (1, 4, 8, 8), (1, 5, 16)))
    both = node("ControlNetApply", positive=[[text, {}]], negative=[[text, {}]], control_net=net, strength=1.0,
                start_percent=0.0, end_percent=1.0, latent={"samples": hint})
    sampler = node("Sampler", algorithm="dpm-solver++", order=2, eta=1.0, inpaint="core")[0]
    sigmas = node("Sigmas", model=model, schedule="reference (time-uniform)", steps=3, denoise=1.0, timestep=400)[0]
    drawn = [import_module("comfy.sample").sample_custom(model, noise, 1.0, sampler, sigmas, *conditioning,
                                                         torch.zeros_like(noise), seed=7)
             for conditioning in (both[:2], [[[text, {}]]] * 2)]

    recipe, _, _ = exporting.open_run(trained)
    d = recipe.denoising
    scale = d.shape.latent_scale
    predict = recipe.controlled(scale * hint)
    with torch.no_grad():
        latent = d.diffusion.sample(lambda x, t: d.eps(predict, x, torch.full((1,), t), {"context": text}), noise,
                                    recipe.timesteps(3), algorithm=recipe.algorithm)
    torch.testing.assert_close(drawn[0], latent / scale, rtol=1e-3, atol=1e-3 * latent.abs().max().item() / scale)
    assert (drawn[0] - drawn[1]).abs().max() > 0.01 * drawn[1].abs().max()


# --- All of them


RECIPES = {
    "pixart_lcm": (), "pixart_dmd": (), "pixart_controlnet": ("recipe.blocks=1",), "pixart_lora": (),
    "pixart_dreambooth": (),
}


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_repeats_the_unbroken_run(path, parts, base, annotator, tmp_path, name):
    def interrupt(one, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    words = (f"init_from={base}", *RECIPES[name], "steps=3", "save_every=3", "validation.every=2", "ema.decay=0.95")
    if name == "pixart_controlnet":
        words += (f"recipe.annotator={annotator}",)
    unbroken, broken = (tiny_pixart.settings(path, tmp_path / n, parts, *words, recipe=name, model={})
                        for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = ({f"{file}.{k}": v for file in ("model", "ema", "optimizer")
                   for k, v in checkpoints.read_tensors(
                       tmp_path / n / "checkpoints/00000003" / f"{file}.safetensors").items()}
                  for n in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")
