"""Training all weights of a PixArt: the loss, where a run may start, what comes out."""
import json
import shutil
from pathlib import Path

import pytest
import tiny_pixart
import tiny_run
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixart import checkpoint, sampling
from pixstack.trainer.config import schema
from pixstack.trainer.export import cards, exporting
from pixstack.trainer.features import taesd
from pixstack.trainer.recipes.noised import NoisedBatch
from pixstack.trainer.training import checkpoints, optim
from pixstack.trainer.training.groups import Group
from pixstack.trainer.training.noise import batch_noise
from tiny_pixart import recipe_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(path, parts, tmp_path):
    def settings(*words, **more):
        return tiny_pixart.settings(path, tmp_path / "run", parts, *words, **more)
    return settings


def refusal(made, *words, **more):
    with pytest.raises(ValueError) as caught:
        made(*words, **more)
    return str(caught.value)


# --- The loss


def expected(recipe, batch, **more):
    """The loss from `sampling.iddpm_loss`, which the parity cases hold to the release, on what the recipe is to see."""
    d = recipe.denoising
    timestep, _ = d.drawn(batch, 0)
    latent = d.shape.latent_scale * d.vae.latents(batch, "cpu", 0)
    noise = batch_noise(0, batch.step, batch.positions, latent.shape[1:], "cpu")
    noisy = d.schedule.add_noise(latent, noise, timestep)
    context, mask = recipe.text.lookup(batch.captions, "cpu")
    prediction = recipe.net(noisy, timestep, context, mask)
    eps, logits = prediction[:, :4], prediction[:, 4:]
    return prediction, sampling.iddpm_loss(eps, logits, latent, noise, timestep, d.schedule, **more)


@pytest.mark.parametrize("words, more", [((), {}), (("recipe.snr_switch=true",), {"snr": True})], ids=["plain", "snr"])
def test_the_loss_is_the_releases(made, words, more):
    recipe, batches = recipe_of(made("recipe.dropout=0.0", *words))
    batch = batches(0, range(6))
    torch.testing.assert_close(recipe(batch), expected(recipe, batch, **more)[1].total)


@pytest.mark.parametrize("name", ["pixart_iddpm_loss", "pixart_iddpm_loss_snr"])
def test_the_loss_of_a_parity_case_is_the_references(made, name):
    """The recipe's own arithmetic: its network is replaced by the case's answer."""
    recipe, _ = recipe_of(made())
    config, i, outputs = tiny_pixart.case(name)
    d = recipe.denoising
    noisy = d.schedule.add_noise(i["x_start"], i["noise"], i["timestep"])
    step = NoisedBatch(i["x_start"], i["noise"], noisy, i["timestep"], {})
    loss = sum(d.losses(lambda x, t: i["model_output"], step, snr_switch=config.get("snr", False)))
    torch.testing.assert_close(loss, outputs["loss"], rtol=1e-4, atol=1e-4)


def test_a_variance_of_weight_zero_is_left_alone(made):
    recipe, batches = recipe_of(made("recipe.variance=0.0"))
    recipe(batches(0, range(6))).mean().backward()
    rows = recipe.net.final_layer.linear.weight.grad.unflatten(0, (4, 8))  # patch, channel
    assert not rows[:, 4:].any() and rows[:, :4].any()


def test_min_snr_weighs_the_error_by_the_timestep(made):
    plain, batches = recipe_of(made("recipe.variance=0.0"))
    weighed, _ = recipe_of(made("recipe.variance=0.0", "loss.snr_gamma=5.0"))
    batch = batches(0, range(6))
    timestep, _ = plain.denoising.drawn(batch, 0.1)
    snr = plain.denoising.schedule.sigma(timestep) ** -2
    weight = snr.clamp(max=5) / snr  # arXiv 2303.09556, of eps
    torch.testing.assert_close(weighed(batch), plain(batch) * weight)
    assert weight.min() < 0.5 < weight.max()


def test_a_v_prediction_network_learns_the_velocity(made):
    recipe, batches = recipe_of(made("recipe.dropout=0.0", "recipe.variance=0.0", "model.prediction=v",
                                     "model.zero_terminal_snr=true"))
    batch = batches(0, range(6))
    d = recipe.denoising
    step = d.noising(batch, d.drawn(batch, 0)[0], None, 0)
    perfect = d.schedule.velocity(step.latent, step.noise, step.time)
    error, bound = d.losses(lambda x, t, **_: torch.cat([perfect, perfect], 1), step, variance=0.0)
    assert error.abs().max() < 1e-9 and not bound.any()
    assert recipe(batch).isfinite().all()


def test_micro_batches_give_the_losses_of_the_whole_batch(made):
    recipe, batches = recipe_of(made())
    whole = recipe(batches(2, range(6)))
    some = torch.cat([recipe(batches(2, range(s, s + 2))) for s in (0, 2, 4)])
    torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)


def test_dropped_captions_are_the_null_caption_of_the_weights_under_the_captions_mask(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors")
    recipe, _ = recipe_of(made(f"init_from={tmp_path / 'start.safetensors'}", model={}))
    dropped = torch.tensor([True, False])
    found = recipe.denoising.condition(["red card", "blue square"], dropped)
    context, mask = recipe.text.lookup(["red card", "blue square"], "cpu")
    L = context.shape[1]
    assert torch.equal(found["context"][0], recipe.net.y_embedder.y_embedding[:L])
    assert torch.equal(found["context"][1], context[1]) and torch.equal(found["mask"], mask)


def test_without_a_null_caption_a_dropped_caption_is_the_empty_one(made):
    recipe, _ = recipe_of(made())
    found = recipe.denoising.condition(["red card", "blue square"], torch.tensor([True, False]))
    context, mask = recipe.text.lookup(["", "blue square"], "cpu")
    assert torch.equal(found["context"], context) and torch.equal(found["mask"], mask)


def test_a_micro_conditioned_network_is_conditioned_on_the_size_of_its_picture(made):
    recipe, batches = recipe_of(made("model.micro_conditions=true"))
    batch = batches(0, range(2))
    d = recipe.denoising
    step = d.noising(batch, d.drawn(batch, 0)[0], None, 0)
    assert step.condition["size"].tolist() == [[64, 64]] * 2 and step.condition["aspect_ratio"].tolist() == [[1.0]] * 2


def test_activation_checkpointing_leaves_gradients_as_they_are(made):
    gradients = []
    for word in ("checkpoint_activations=false", "checkpoint_activations=true"):
        recipe, batches = recipe_of(made(word))
        recipe(batches(0, range(6))).mean().backward()
        gradients.append([p.grad for p in recipe.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_validation_says_the_same_twice_and_in_small_batches(made):
    from pixstack.trainer.data import loader

    recipe, batches = recipe_of(made())
    whole = recipe.validate(loader.fixed(batches.items, batches.settings))
    assert recipe.validate(loader.fixed(batches.items, batches.settings)) == whole
    assert recipe.validate(loader.fixed(batches.items, batches.settings, 3)) == pytest.approx(whole, rel=1e-4)
    assert set(whole) == {"loss", "standard_error", "variance", "quarter0", "quarter1", "quarter2", "quarter3"}


# --- Where it may start


def test_a_run_starts_from_a_checkpoint_of_another_resolution(made, tmp_path):
    _, weights = tiny_pixart.released(tmp_path / "start.safetensors", sample_size=4)
    recipe, _ = recipe_of(made(f"init_from={tmp_path / 'start.safetensors'}", model={}))
    assert recipe.net.config.sample_size == 8
    for key, value in weights.items():
        assert torch.equal(recipe.net.state_dict()[key], value), key


def test_compressed_keys_and_values_begin_as_a_mean(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors")
    recipe, batches = recipe_of(made(f"init_from={tmp_path / 'start.safetensors'}", model={"kv_factor": 2}))
    attn = recipe.net.blocks[1].attn
    assert recipe.net.blocks[0].attn.compression is None
    assert torch.equal(attn.sr.weight, torch.full_like(attn.sr.weight, 0.25))
    assert recipe(batches(0, range(6))).isfinite().all()


def test_a_start_without_sizes_gets_embedders_for_them(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors")
    recipe, _ = recipe_of(made(f"init_from={tmp_path / 'start.safetensors'}", model={"micro_conditions": True}))
    assert recipe.net.csize_embedder.mlp[0].weight.any()


@pytest.mark.parametrize("words, part", [
    (("model.preset=sigma_51",), "did you mean sigma_512"),
    (("text.max_length=400",), "text.max_length=400 is more than the 300 tokens"),
    (("data.resolution=72",), "data.resolution=72 is not a multiple of 16"),
    (("recipe.dropout=2.0",), "recipe.dropout=2.0"),
    (("recipe.variants=1.0",), "recipe.variants is not a setting; did you mean variance"),
    (("vae.path=/nowhere",), "vae.path='/nowhere': there is no such file"),
])
def test_a_setting_that_cannot_work_is_refused(made, words, part):
    assert part in refusal(made, *words)


def test_a_vae_of_other_latents_is_refused_before_anything_is_read(made, tmp_path):
    folder = tiny_pixart.vae(tmp_path / "vae", 16)
    words = "makes latents of 16 channels, and this PixArt reads 4: name the VAE that belongs to it"
    assert words in refusal(made, f"vae.path={folder}")
    file = folder / "diffusion_pytorch_model.safetensors"
    assert words in refusal(made, f"vae.path={file}")
    tensors = taesd.to_core(taesd.Taesd(16).net, 1.0, 0.0)
    state_dict.write_file(tmp_path / "taesd.safetensors", tensors)
    assert words in refusal(made, f"vae.path={tmp_path / 'taesd.safetensors'}")


def test_what_is_no_vae_is_refused_before_anything_is_read(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors")
    assert "is not a VAE. The keys are those of PixArt." in refusal(made, f"vae.path={tmp_path / 'start.safetensors'}")
    assert "is not a VAE's folder: its config.json should name one of" in refusal(made, f"vae.path={tmp_path}")


def test_a_start_that_does_not_fit_is_refused_with_both_values(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors")
    assert "depth=3, the weights say 2" in refusal(made, f"init_from={tmp_path / 'start.safetensors'}",
                                                  model={"depth": 3})


def test_a_text_encoder_of_another_width_is_refused(made, tmp_path):
    tiny_pixart.released(tmp_path / "start.safetensors", context_dim=24)
    with pytest.raises(ValueError, match="makes tokens of width 16, and this PixArt reads 24"):
        recipe_of(made(f"init_from={tmp_path / 'start.safetensors'}", model={}))


# --- The optimiser


def came_step(p, grad, state, lr, b1, b2, b3):
    """CAME as its paper's algorithm 2 and came-pytorch 0.1.3 write it, for a matrix."""
    def root(name, value, beta):
        row, column = state[name]
        row = beta * row + (1 - beta) * value.mean(1)
        column = beta * column + (1 - beta) * value.mean(0)
        state[name] = row, column
        return ((row[:, None] * column[None]) / row.mean()) ** -0.5

    update = grad * root("square", grad**2 + 1e-30, b2)
    update = update / max(1.0, (update**2).mean().sqrt().item())
    state["mean"] = b1 * state["mean"] + (1 - b1) * update
    return p - lr * state["mean"] * root("doubt", (update - state["mean"]) ** 2 + 1e-16, b3)


def test_came_takes_the_steps_of_its_paper():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    ours = optim.Optimizers([Group([("p", p)])], schema.Optimizer(name="came", learning_rate=0.01), 10)
    reference = p.detach().clone()
    state = {"mean": torch.zeros(3, 5, dtype=torch.float64),
             **{n: (torch.zeros(3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
                for n in ("square", "doubt")}}
    for _ in range(4):
        grad = torch.randn(3, 5).double()
        p.grad = grad.clone()
        ours.step(0)
        reference = came_step(reference, grad, state, 0.01, 0.9, 0.999, 0.9999)
    torch.testing.assert_close(p.detach(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule, rate", [("none", 1e-3), ("sqrt", 0.5e-3), ("linear", 0.25e-3)])
def test_the_rate_follows_the_batch(made, rule, rate):
    settings = made(f"optimizer.learning_rate_scaling={rule}")
    assert optim.Optimizers([], settings.optimizer, 10, 64).learning_rate == pytest.approx(rate)


# --- Runs


def weights(folder, step=6):
    at = folder / "checkpoints" / f"{step:08d}"
    return {f"{file}.{k}": v for file in ("model", "ema", "optimizer")
            for k, v in checkpoints.read_tensors(at / f"{file}.safetensors").items()}


def test_a_resumed_run_repeats_the_unbroken_run(path, parts, tmp_path):
    import os
    import signal

    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("optimizer.name=came", "validation.every=2", "save_every=5")
    unbroken, broken = (tiny_pixart.settings(path, tmp_path / n, parts, *words) for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")


def test_training_lowers_the_loss(made, tmp_path):
    tiny_run.train(made("steps=40", "optimizer.learning_rate=3e-3", "optimizer.warm_up=0", "save_every=40",
                        "validation.every=40", "recipe.variance=0.0"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run") if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.fixture(scope="module")
def trained(path, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ("steps=4", "samples.every=4", "samples.prompts=[\"red card\"]", "samples.steps=2")
    tiny_run.train(tiny_pixart.settings(path, folder, parts, *words))
    return folder


def test_a_run_writes_sample_pictures(trained):
    from PIL import Image

    assert Image.open(trained / "samples/00000004/00.png").size == (64, 64)


def test_what_was_trained_is_what_is_exported(trained, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    shape, tensors = checkpoint.read(*state_dict.read_file(file))
    assert (shape.depth, shape.hidden, shape.heads, shape.sample_size, shape.context_dim) == (2, 72, 2, 8, 16)
    average = checkpoints.read_tensors(trained / "checkpoints/00000004/ema.safetensors")
    for key, value in tensors.items():
        assert torch.equal(value, average[f"net.{key}"]), key


def test_an_export_in_fp8_rounds_only_the_matrices_of_blocks(trained, tmp_path, host):
    from importlib import import_module

    (whole,) = exporting.export(trained, tmp_path, "whole", dtype="fp32")
    (file,) = exporting.export(trained, Path(host.models), "tiny_pixart_fp8", dtype="fp8")
    full, small = (state_dict.read_file(one)[0] for one in (whole, file))
    rounded = {k for k, v in small.items() if v.dtype == torch.float8_e4m3fn}
    assert rounded == {k for k, v in full.items() if v.ndim > 1 and "block" in k}
    assert {v.dtype for k, v in small.items() if k not in rounded} == {torch.bfloat16}
    for key, value in full.items():
        torch.testing.assert_close(small[key].float(), value, rtol=2**-4, atol=2**-10)
    model = import_module("nodes").NODE_CLASS_MAPPINGS["PixStack_PixArtLoader"].execute(
        model_name=file.name, variant="auto", prediction="auto", positions="auto", weights="ema", dtype="default")
    weight = model.args[0].model.diffusion_model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(weight.float(), small["blocks.0.attn.qkv.weight"].float(), rtol=0, atol=0)


def test_what_fp8_cannot_hold_is_not_made_nan():
    assert exporting.written_as("blocks.0.x", torch.tensor([[1e4, -1e4]]), "fp8").float().tolist() == [[448.0, -448.0]]


def test_a_model_card_says_how_it_was_made_and_names_no_folder(trained, parts, tmp_path):
    from pixstack.trainer.cli import main as cli

    cli.main(["export", str(trained), "--out", str(tmp_path / "out"), "--name", "tiny", "--card"])
    card = (tmp_path / "out/tiny.md").read_text()
    for part in ("recipe `pixart`, step 4 of 4", "`diffusion_models/tiny.safetensors`", "Load PixArt Model",
                 "1. red card", "| data | `data.jsonl` |", "| dropout | 0.1 |"):
        assert part in card, part
    assert (tmp_path / "out/tiny.png").read_bytes() == (trained / "samples/00000004.png").read_bytes()
    assert str(trained.parent) not in card and parts["vae"]["path"] not in card


def test_a_run_too_short_for_a_log_has_its_card(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "log.jsonl").unlink(missing_ok=True)
    files = exporting.export(folder, tmp_path / "out", "tiny")
    assert [f.name for f in cards.write_card(folder, tmp_path / "out", files)] == ["tiny.md", "tiny.png"]


def test_comfyui_predicts_with_an_export_what_the_trainer_predicts(trained, host):
    from importlib import import_module

    (file,) = exporting.export(trained, Path(host.models), "tiny_pixart_full", dtype="fp32")
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    model = nodes["PixStack_PixArtLoader"].execute(
        model_name=file.name, variant="auto", prediction="auto", positions="auto", weights="ema", dtype="fp32").args[0]
    recipe, _, _ = exporting.open_run(trained)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([321.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        theirs = model.model.diffusion_model(x, t, context)
        ours = recipe.net(x, t, context)[:, :4]  # no sampler reads the variance there
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_noise_of_a_sample_does_not_depend_on_the_pictures_beside_it(trained):
    recipe, _, _ = exporting.open_run(trained)
    both = recipe.sample(["red card", "blue square"], 64, 64, 2, 1.0, 4.5, 3)
    second = recipe.sample(["blue square"], 64, 64, 2, 1.0, 4.5, 4)
    torch.testing.assert_close(both[1:], second, rtol=1e-3, atol=1e-3)


def test_a_dry_run_says_what_would_happen(path, parts, tmp_path, capsys):
    from pixstack.trainer.cli import main as cli

    raw = {"recipe": {"name": "pixart"}, "data": {"path": str(path), **tiny_pixart.IMAGE}, **parts,
           "model": {"depth": 2, "hidden": 72, "heads": 2}}
    lines = ["steps = 6", "batch_size = 6", 'device = "cpu"', f'out = "{tmp_path}/run"']
    for section, values in raw.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    (tmp_path / "tiny.toml").write_text("\n".join(lines))
    cli.main(["train", str(tmp_path / "tiny.toml"), "--dry-run", "micro_batch_size=3"])
    output = capsys.readouterr().out
    for part in ("6 pictures of 64x64 pixels, 16 tokens each", "2 pass(es) of 3", "memory     about", "timestep "):
        assert part in output, part
    assert not (tmp_path / "run").exists()
