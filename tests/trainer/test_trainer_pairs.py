"""DMD's regression: pairs that the teacher makes, a decoder and LPIPS that compare them, and the term in the loss."""
import json
import os
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_pixart
import tiny_run
import torch
from accelerate import Accelerator
from pixstack.models_impl.annotators import hed
from pixstack.models_impl.pixart import sampling
from pixstack.models_impl.state_dict import read_file, write_file
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import layouts
from pixstack.trainer.features import taesd
from pixstack.trainer.memory import activations
from pixstack.trainer.recipes.pixart import pairs, perceptual
from pixstack.trainer.recipes.pixart import settings as recipe_settings
from pixstack.trainer.training import build, checkpoints
from safetensors.torch import load_file, save_file
from tiny_pixart import recipe_of
from torch.nn import functional as F

LATENT_SCALE = 0.18215


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_pixart.parts(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The network to start from, an AutoencoderTiny, and a small HED, of weights none of which is zero."""
    folder = tmp_path_factory.mktemp("files")
    tiny_pixart.released(folder / "base.safetensors")
    torch.manual_seed(0)
    net = taesd.Taesd().net
    save_file(net.state_dict(), folder / "taesd.safetensors")
    torch.save(hed.HED(hed.HEDConfig((8, 8, 8, 8, 8), (1, 1, 1, 1, 1))).state_dict(), folder / "hed.pth")
    return folder


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """(torchvision's vgg16, the heads of the package lpips), of random weights, under the names they have there."""
    folder, rng = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    numbers, widths = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, *[256] * 3, *[512] * 6)
    vgg = {"classifier.0.weight": torch.zeros(4, 4)}
    for n, before, width in zip(numbers, (3, *widths), widths, strict=False):
        vgg[f"features.{n}.weight"] = torch.randn(width, before, 3, 3, generator=rng) * (2 / 9 / before) ** 0.5
        vgg[f"features.{n}.bias"] = 0.1 * torch.randn(width, generator=rng)
    heads = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=rng)
             for k, width in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


@pytest.fixture
def made(path, parts, files, tmp_path):
    def settings(*words, folder="run", **more):
        return tiny_pixart.settings(path, tmp_path / folder, parts, f"init_from={files / 'base.safetensors'}", *words,
                                    recipe="pixart_dmd", model={}, **more)
    return settings


def by_heart(settings, files, pairs_in, *words, weight=0.25, **more):
    """Settings with the regression, after its pairs were made in `pairs_in`."""
    plain = settings(*[word for word in words if word.startswith("data.")], **more)
    pairs.make(plain, build.collection(plain).train, pairs_in, 2, 4.5, 3, Accelerator(cpu=True))
    return settings(f"recipe.regression={weight}", f"recipe.pairs={pairs_in}", f"recipe.hed={files / 'hed.pth'}",
                    f"recipe.taesd={files / 'taesd.safetensors'}", *words, **more)


# --- What compares


def lpips_by_hand(vgg, heads, one, other):
    """arXiv 1801.03924, eq. 1, written from torchvision's list of a vgg16's layers."""
    layers = "0 2 tap pool 5 7 tap pool 10 12 14 tap pool 17 19 21 tap pool 24 26 28 tap".split()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    a, b, taps, total = (one - mean) / std, (other - mean) / std, 0, 0.0
    for layer in layers:
        if layer == "tap":
            unit = [x / x.pow(2).sum(1, keepdim=True).sqrt() for x in (a, b)]
            weight = heads[f"lin{taps}.model.1.weight"].view(-1, 1, 1)
            total, taps = total + ((unit[0] - unit[1]) ** 2 * weight).sum(1).mean((1, 2)), taps + 1
        elif layer == "pool":
            a, b = (F.max_pool2d(x, 2) for x in (a, b))
        else:
            a, b = (F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1).relu()
                    for x in (a, b))
    return total


def test_lpips_is_the_formula_of_the_paper(lpips_files):
    vgg, heads = (torch.load(file, weights_only=True) for file in lpips_files)
    one, other = torch.rand(2, 2, 3, 32, 16) * 2 - 1
    found = perceptual.read_lpips(*lpips_files)(one, other)
    torch.testing.assert_close(found, lpips_by_hand(vgg, heads, one, other), rtol=1e-4, atol=1e-6)


def test_the_heads_of_the_installed_package_are_found():
    file = recipe_settings.installed_heads()
    if file is None:
        pytest.skip("the package lpips is not installed")
    assert sorted(read_file(file)[0]) == [f"lin{n}.model.1.weight" for n in range(5)]


def test_a_file_that_is_no_vgg16_is_refused(lpips_files, files):
    with pytest.raises(ValueError, match="do not fit LPIPS of torchvision's vgg16 .hed.pth.*missing: features.0."):
        perceptual.read_lpips(files / "hed.pth", lpips_files[1])


@pytest.mark.parametrize("kind", ["diffusers", "core", "decoder alone"])
def test_a_decoder_draws_scaled_latents_as_diffusers_does(files, tmp_path, kind):
    from diffusers import AutoencoderTiny

    net = AutoencoderTiny()
    net.load_state_dict(load_file(files / "taesd.safetensors"))
    file = files / "taesd.safetensors"
    if kind == "core":
        write_file(file := tmp_path / "core.safetensors", taesd.to_core(net, LATENT_SCALE, 0.0))
    elif kind == "decoder alone":
        plain = {k.removeprefix("taesd_decoder."): v for k, v in taesd.to_core(net, 1.0, 0.0).items()
                 if k.startswith("taesd_decoder.")}
        torch.save(plain, file := tmp_path / "taesd_decoder.pth")
    latent = torch.randn(2, 4, 4, 3)
    judge = perceptual.Judge(taesd.read_decoder(file, LATENT_SCALE), perceptual.Lpips(), LATENT_SCALE)
    torch.testing.assert_close(judge.pictures(latent), net.decode(latent).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


# --- The pairs


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(tmp_path, settings, *words):
    cli.main(["pairs", tiny_pixart.toml(tmp_path, settings), "--steps=2", "--batch=3", *words])


def test_a_pair_is_what_the_guided_teacher_makes_of_its_noise(made, tmp_path):
    settings = made()
    command(tmp_path, settings, f"--out={tmp_path / 'pairs'}", "--cfg=2.5")
    recipe, batches = recipe_of(settings)
    d, (teacher,) = recipe.denoising, recipe.teacher
    found = pairs.Pairs(tmp_path / "pairs", batches.items, settings.data, 4)
    for item in batches.items[:4]:
        noise, latent = found.of(item, (64, 64))
        cond, uncond = (d.condition([caption], None, (64, 64)) for caption in (item.texts[0], ""))

        def eps(x, t, cond=cond, uncond=uncond):
            t = torch.full((1,), float(t))
            return d.eps(teacher, x, t, uncond) + 2.5 * (d.eps(teacher, x, t, cond) - d.eps(teacher, x, t, uncond))

        with torch.no_grad():
            expected = sampling.dpm_diffusers(eps, noise[None], d.schedule, sampling.linspace_timesteps(2))[0]
        torch.testing.assert_close(latent, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
        assert 0.8 < noise.std() < 1.2


def test_an_interrupted_command_makes_what_is_missing_to_the_bit(made, tmp_path, monkeypatch):
    settings, out = made(), tmp_path / "pairs"
    command(tmp_path, settings, f"--out={out}")
    whole = bytes_of(out)
    assert len(whole) == 2 * 8 + 1
    for number, file in enumerate(sorted(out.rglob("*.npy"))):
        if number % 3 == 0:
            file.unlink()
    command(tmp_path, settings, f"--out={out}")
    assert bytes_of(out) == whole
    monkeypatch.setattr(pairs, "draw", lambda *_: pytest.fail("everything is there"))
    command(tmp_path, settings, f"--out={out}")


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda file, value: (file.write(b"half"), (_ for _ in ()).throw(OSError(28))))
    with pytest.raises(OSError):
        pairs.write(tmp_path / "a.npy", torch.zeros(1))
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize("words, part", [
    (("--cfg=3",), "cfg was 4.5, now 3.0"),
    (("seed=5",), "seed was 0, now 5"),
    (("--steps=0",), "--steps=0 must be at least 1"),
])
def test_pairs_that_would_be_made_otherwise_are_refused(made, tmp_path, words, part):
    settings, out = made(), tmp_path / "pairs"
    command(tmp_path, settings, f"--out={out}")
    with pytest.raises(SystemExit) as caught:
        command(tmp_path, settings, f"--out={out}", *words)
    assert part in str(caught.value)


def test_pairs_of_another_program_are_not_added_to(made, tmp_path):
    (tmp_path / "pairs/InternImgs_DMD_noises").mkdir(parents=True)
    np.save(tmp_path / "pairs/InternImgs_DMD_noises/a.npy", np.zeros(1))
    with pytest.raises(SystemExit, match="holds pairs without pairs.json, so another program made them"):
        command(tmp_path, made(), f"--out={tmp_path / 'pairs'}")


def test_only_dmd_has_pairs(path, parts, files, tmp_path):
    other = tiny_pixart.settings(path, tmp_path / "run", parts, f"init_from={files / 'base.safetensors'}", model={})
    with pytest.raises(SystemExit, match="is of recipe.name='pixart': pairs are what pixart_dmd learns from"):
        command(tmp_path, other, f"--out={tmp_path / 'pairs'}")


def release(folder, names, shape=(4, 8, 8)):
    """The release's layout, without a note of how it was made."""
    for kind in pairs.PAIRS:
        (folder / kind).mkdir(parents=True)
        for name in names:
            np.save(folder / kind / f"{name}.npy", np.random.default_rng(0).normal(size=shape).astype(np.float16))
    entries = [{"path": f"{name}.png", "prompt": f"a {name}", "height": 64, "width": 64, "ratio": 1.0}
               for name in names]
    (folder / "data_info.json").write_text(json.dumps(entries))
    return [*layouts.read(folder / "data_info.json", "auto", IMAGE).train]


IMAGE = Data(path="", resolution=64)


def test_the_releases_layout_is_read(tmp_path):
    items = release(tmp_path, ["cat", "dog"])
    noise, latent = pairs.Pairs(tmp_path, items, replace(IMAGE, path=str(tmp_path)), 4).of(items[1], (64, 64))
    assert noise.dtype == latent.dtype == torch.float32 and noise.shape == (4, 8, 8)
    assert np.array_equal(latent.numpy(), np.load(tmp_path / "InternImgs_DMD_latents/dog.npy").astype(np.float32))


def missing(folder, items):
    (folder / "InternImgs_DMD_latents/dog.npy").unlink()


def cut(folder, items):
    file = folder / "InternImgs_DMD_latents/cat.npy"
    file.write_bytes(file.read_bytes()[:-9])


def large(folder, items):
    np.save(folder / "InternImgs_DMD_noises/cat.npy", np.zeros((4, 16, 16), np.float16))


def broken(folder, items):
    np.save(folder / "InternImgs_DMD_latents/cat.npy", np.full((4, 8, 8), np.nan, np.float16))


def shared(folder, items):
    items.append(replace(items[0], file=folder / "more/cat.png"))


def renamed(folder, items):
    (folder / "pairs.json").write_text(json.dumps({"how": {}, "captions": {"cat": "a tiger", "dog": "a dog"}}))


@pytest.mark.parametrize("change, part", [
    (missing, "1 files are not there:\n    {}/InternImgs_DMD_latents/dog.npy\n    `python -m trainer pairs` makes"),
    (cut, "InternImgs_DMD_latents/cat.npy cannot be read as .npy"),
    (large, "InternImgs_DMD_noises/cat.npy holds float16 of [4, 16, 16], and the pictures that are trained on are "
            "floats of [4, 8, 8]"),
    (broken, "InternImgs_DMD_latents/cat.npy has numbers that are not finite"),
    (shared, "InternImgs_DMD_noises/cat.npy is that of"),
    (renamed, "1 pairs were made of another caption:\n    cat: 'a tiger', now 'a cat'"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_pairs_that_cannot_be_used_are_refused_with_the_name_of_the_file(tmp_path, change, part):
    items = release(tmp_path, ["cat", "dog"])
    change(tmp_path, items)
    with pytest.raises(ValueError) as caught:
        pairs.Pairs(tmp_path, items, replace(IMAGE, path=str(tmp_path)), 4)
    assert part.format(tmp_path) in str(caught.value)


# --- The term


def test_the_term_is_lpips_of_what_the_student_and_the_pair_draw(made, files, lpips_files, tmp_path):
    """Only of every other picture, from the noise and the first caption of its pair, and weighed as their mean."""
    from diffusers import AutoencoderTiny

    settings = by_heart(made, files, tmp_path / "pairs", "recipe.hed=", f"recipe.vgg={lpips_files[0]}",
                        f"recipe.heads={lpips_files[1]}")
    recipe, batches = recipe_of(settings)
    batch, d = batches(0, range(6)), recipe.denoising
    losses = []
    for weight in (0.25, 0.75):
        recipe.settings = replace(recipe.settings, regression=weight)
        losses.append(recipe(batch))
    net, weights = AutoencoderTiny(), [torch.load(file, weights_only=True) for file in lpips_files]
    net.load_state_dict(load_file(files / "taesd.safetensors"))
    rows = [0, 2, 4]
    names = [Path(batch.items[row].file).stem for row in rows]
    noise, latent = (torch.stack([torch.from_numpy(np.load(tmp_path / "pairs" / kind / f"{name}.npy")).float()
                                  for name in names]) for kind in pairs.PAIRS)
    context = d.condition([batch.items[row].captions[0] for row in rows])
    with torch.no_grad():
        alpha = d.schedule.alpha(400)
        eps = recipe.net(noise, torch.full((3,), 400), **context)[:, :4]
        x = (noise - (1 - alpha**2) ** 0.5 * eps) / alpha
        one, other = (net.decode(z).sample.clamp(-1, 1) for z in (x, latent))
        seen = lpips_by_hand(*weights, one, other)
    expected = torch.zeros(6)
    expected[rows] = 0.5 * 2 * seen  # half of the batch has a pair, so that the mean of the batch is that of the pairs
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=2e-3, atol=1e-4)


def test_the_gradient_of_the_term_reaches_only_the_student(made, files, tmp_path):
    recipe, batches = recipe_of(by_heart(made, files, tmp_path / "pairs"))
    batch, gradients = batches(0, range(6)), []
    for weight in (0.25, 2.25):
        recipe.settings = replace(recipe.settings, regression=weight)
        recipe.zero_grad()
        recipe(batch).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in recipe.named_parameters() if p.grad is not None})
    one, other = gradients
    differs = {n.split(".")[0] for n in one if not torch.equal(one[n], other[n])}
    assert differs == {"net"}
    assert not any(p.requires_grad for frozen in recipe.teacher for p in frozen.parameters())
    assert not any("decoder" in n or "eye" in n for n in recipe.state_dict())


def test_without_its_weight_nothing_is_read_and_nothing_changes(made, files, tmp_path):
    on = by_heart(made, files, tmp_path / "pairs")
    off = made("recipe.pairs=/nowhere", "recipe.taesd=/nowhere", "recipe.vgg=/nowhere", "recipe.regression=0")
    (plain, batches), (without, _), (judged, _) = (recipe_of(settings) for settings in (made(), off, on))
    batch = batches(0, range(6))
    assert torch.equal(plain(batch), without(batch)) and len(without.teacher) == 1
    assert (judged(batch)[1::2] != plain(batch)[1::2]).any()  # the match is a mean over the batch
    validated = (recipe.validate([batch]) for recipe in (plain, judged))
    assert next(validated) == next(validated)


def test_passes_of_odd_size_add_up_to_the_whole_batch(made, files, tmp_path):
    recipe, batches = recipe_of(by_heart(made, files, tmp_path / "pairs", "data.resolution=32", weight=100.0))
    whole = recipe(batches(0, range(6))).mean()
    for size in (1, 3):
        passes = [recipe(batches(0, range(start, start + size))).mean() for start in range(0, 6, size)]
        torch.testing.assert_close(torch.stack(passes).mean(), whole, rtol=1e-4, atol=1e-5)


def test_training_draws_the_student_to_its_pairs(made, files, tmp_path):
    settings = by_heart(made, files, tmp_path / "pairs", "steps=60", "optimizer.learning_rate=2e-3",
                        "optimizer.warm_up=0", "save_every=60", "ema.decay=0.0", "data.resolution=32", weight=50.0)
    recipe, batches = recipe_of(settings)
    batch = batches(0, range(6))

    def apart(one):
        one.pairs = recipe.pairs
        found = [recipe.pairs.of(item, batch.size) for item in batch.items]
        with torch.no_grad():
            made = one.matched(batch, torch.full((6,), 500), 0, list(range(6)), [noise for noise, _ in found])[1]
            return recipe.apart(made, torch.stack([latent for _, latent in found])).mean().item()

    before = apart(build.recipe(settings, build.collection(settings)))
    trained, _ = tiny_run.train(settings)
    assert apart(trained) < 0.8 * before


def test_a_resumed_run_with_pairs_repeats_the_unbroken_run(made, files, tmp_path):
    def interrupt(one, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("steps=3", "save_every=3", "validation.every=2", "ema.decay=0.95", "data.resolution=32")
    unbroken, broken = (by_heart(made, files, tmp_path / "pairs", *words, folder=name)
                        for name in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = ({f"{file}.{k}": v for file in ("model", "ema", "optimizer")
                   for k, v in checkpoints.read_tensors(
                       tmp_path / n / "checkpoints/00000003" / f"{file}.safetensors").items()}
                  for n in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("words, part", [
    (("recipe.pairs=",), "recipe.regression=0.25 needs recipe.pairs: the folder that `python -m trainer pairs` makes"),
    (("recipe.pairs=/nowhere",), "recipe.pairs='/nowhere' has no folder InternImgs_DMD_noises. `python -m"),
    (("recipe.taesd=",), "recipe.regression=0.25 needs recipe.taesd"),
    (("recipe.taesd=/nowhere",), "recipe.taesd='/nowhere': there is no such file"),
    (("recipe.hed=",), "needs one of recipe.vgg, the vgg16 of torchvision for LPIPS, and recipe.hed"),
    (("recipe.hed=", "recipe.vgg=/nowhere"), "recipe.vgg='/nowhere': there is no such file"),
    (("recipe.heads=/nowhere",), "recipe.heads are read only with recipe.vgg"),
    (("recipe.regression=-1",), "recipe.regression=-1.0 must not be negative"),
])
def test_a_regression_that_lacks_something_is_refused(made, files, tmp_path, words, part):
    for kind in pairs.PAIRS:
        (tmp_path / "pairs" / kind).mkdir(parents=True)
    whole = ("recipe.regression=0.25", f"recipe.pairs={tmp_path / 'pairs'}", f"recipe.hed={files / 'hed.pth'}",
             f"recipe.taesd={files / 'taesd.safetensors'}")
    with pytest.raises(ValueError) as caught:
        made(*whole, *words)
    assert part in str(caught.value)


def test_a_vgg_without_heads_asks_for_the_package(made, files, lpips_files, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_settings, "installed_heads", lambda: None)
    with pytest.raises(ValueError, match="package lpips, which has them, is not installed: pip install lpips, or name"):
        made("recipe.regression=0.25", f"recipe.vgg={lpips_files[0]}")


def test_a_decoder_of_another_family_is_refused(made, files, tmp_path):
    torch.save(taesd.Taesd(16).net.state_dict(), tmp_path / "taef1.pth")
    settings = by_heart(made, files, tmp_path / "pairs")
    with pytest.raises(ValueError, match="taef1.pth' draws latents of 16 channels, and this PixArt makes 4"):
        recipe_of(replace(settings, recipe=replace(settings.recipe, taesd=str(tmp_path / "taef1.pth"))))


def test_a_dry_run_counts_the_pairs_decoder_and_judge(made, files, tmp_path, capsys):
    settings = by_heart(made, files, tmp_path / "pairs")
    lines = []
    for weight in (0.0, 0.25):
        cli.main(["train", tiny_pixart.toml(tmp_path, settings), "--dry-run", f"recipe.regression={weight}"])
        lines.append(capsys.readouterr().out)
    assert "as the pair of its first caption, judged at" in lines[1] and "as the pair" not in lines[0]
    assert all("TFLOP a step" in line for line in lines)
    recipe, _ = recipe_of(settings)
    judge, latent = deepcopy(recipe.teacher[1]), torch.randn(3, 4, 8, 8, requires_grad=True)
    kept = activations.kept_bytes(judge, lambda: judge(latent, torch.randn(3, 4, 8, 8)), bf16=False)
    more = recipe.activation_bytes(6, True)
    recipe.pairs = None
    assert more - recipe.activation_bytes(6, True) == pytest.approx(kept, rel=0.05)
