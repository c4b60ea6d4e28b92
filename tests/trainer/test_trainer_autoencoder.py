"""Training a small autoencoder: the loss, resuming, and the file that core's Load VAE takes."""
import json
from pathlib import Path

import pytest
import tiny_pixart
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl.annotators import hed
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import check
from pixstack.trainer.data import loader, pictures
from pixstack.trainer.export import exporting
from pixstack.trainer.features import taesd, vaes
from pixstack.trainer.training import build, checkpoints

ROOT = Path(__file__).resolve().parents[2]
BASE = {"recipe": {"name": "autoencoder"}, "precision": "fp32", "steps": 6, "batch_size": 4, "save_every": 3,
        "log_every": 1, "device": "cpu", "optimizer": {"learning_rate": 1e-3}, "ema": {"decay": 0.9}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Neither captions nor classes."""
    folder = tiny_run.pictures(tmp_path_factory.mktemp("data") / "set").parent
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "plain.jsonl").write_text("".join(json.dumps({k: one[k] for k in ("file", "split")}) + "\n"
                                                for one in lines))
    return folder / "plain.jsonl"


def settings(path, out, *words, **more):
    return check.parse({**BASE, "data": {"path": str(path), **tiny_run.IMAGE}, "out": str(out), **more}, words)


def recipe_of(made):
    found = build.collection(made)
    return build.recipe(made, found), loader.Batches(found.train, made.data, made.seed, made.batch_size)


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    picture = path.parent / "images/red_card.png"
    tiny_run.train(settings(path, folder, "steps=4", "samples.every=4", f'samples.prompts=["{picture}"]',
                            "model.latent_channels=16", "model.latent_scale=0.3611", "model.latent_shift=0.1159"))
    return folder


def test_training_lowers_the_loss(path, tmp_path):
    tiny_run.train(settings(path, tmp_path / "run", "steps=40", "save_every=40"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run")]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), losses


def test_a_resumed_run_repeats_the_unbroken_run(path, tmp_path):
    import os
    import signal

    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("validation.every=2", "save_every=5", "data.flip=true")
    unbroken, broken = (settings(path, tmp_path / n, *words) for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    for name in ("model", "ema", "optimizer"):
        one, other = (checkpoints.read_tensors(tmp_path / n / f"checkpoints/00000006/{name}.safetensors")
                      for n in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")


def test_micro_batches_give_the_losses_of_the_whole_batch(path, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path))
    whole = recipe(batches(1, range(4)))
    some = torch.cat([recipe(batches(1, range(s, s + 2))) for s in (0, 2)])
    torch.testing.assert_close(some, whole)


def test_the_loss_is_the_error_of_pixels_plus_half_the_square_of_latents(path, tmp_path):
    recipe, batches = recipe_of(settings(path, tmp_path, "recipe.noise=0.0", "recipe.kl=0.5"))
    batch = batches(0, range(4))
    shown = batch.pictures.float() / 127.5 - 1
    latent = recipe.net.encode(shown).latents
    again = recipe.net.decode(latent).sample
    expected = (again - shown).abs().mean((1, 2, 3)) + 0.25 * latent.square().mean((1, 2, 3))
    torch.testing.assert_close(recipe(batch), expected)


def test_hed_features_see_more_difference_the_more_there_is(path, tmp_path):
    torch.manual_seed(0)
    net = hed.HED(hed.HEDConfig((4, 4, 4, 4, 4), (1, 1, 1, 1, 1)))
    write_file(tmp_path / "hed.safetensors", net.state_dict())
    one, other = torch.rand(2, 1, 3, 32, 32)
    far, near, none = (taesd.perceived(net, one, torch.lerp(one, other, share)) for share in (1.0, 0.1, 0.0))
    assert far > near > none == 0
    plain, batches = recipe_of(settings(path, tmp_path))
    judged, _ = recipe_of(settings(path, tmp_path, f"recipe.features={tmp_path / 'hed.safetensors'}"))
    batch = batches(0, range(4))
    assert (judged(batch) > plain(batch)).all()
    assert not any("hed" in name for name in judged.state_dict())


@pytest.mark.parametrize("words, part", [
    (("recipe.noises=1.0",), "recipe.noises is not a setting; did you mean noise"),
    (("recipe.kl=-1.0",), "recipe.kl=-1.0 must not be negative"),
    (("data.resolution=20",), "data.resolution=20 is not a multiple of 8"),
    (("model.latent_scale=0.0",), "model.latent_scale=0.0"),
    (("text.encoder=small",), "reads no captions"),
    (('samples.prompts=["a cat"]',), "samples.prompts are picture files for an autoencoder; not there: a cat"),
    (("recipe.features=/nowhere.pth",), "recipe.features='/nowhere.pth': there is no such file"),
])
def test_a_setting_that_cannot_work_is_refused(path, tmp_path, words, part):
    with pytest.raises(ValueError) as caught:
        settings(path, tmp_path, *words)
    assert part in str(caught.value)


def test_latents_of_an_export_have_unit_variance_where_a_model_sees_them(path, tmp_path):
    made = settings(path, tmp_path / "run", "model.latent_scale=0.3611", "model.latent_shift=0.1159")
    recipe, batches = recipe_of(made)
    batch = batches(0, range(4))
    with torch.no_grad():
        recipe.square.copy_(recipe.net.encode(batch.pictures.float() / 127.5 - 1).latents.square().mean())
    ((tensors, metadata),) = recipe.files().values()
    write_file(tmp_path / "vae.safetensors", tensors, metadata)
    vae = vaes.FrozenVae(str(tmp_path / "vae.safetensors"))
    latent = (vae.encode(batch.pictures, "cpu")["mean"] - 0.1159) * 0.3611
    torch.testing.assert_close(latent.square().mean(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(vae.encode(batch.pictures, "cpu")["mean"]), recipe.again(batch.pictures),
                               rtol=1e-4, atol=1e-5)


def test_an_export_is_where_another_run_may_start(path, trained, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "vae", dtype="fp32")
    made = settings(path, tmp_path / "run", f"init_from={file}", "model.latent_channels=16")
    average = checkpoints.read_tensors(trained / "checkpoints/00000004/ema.safetensors")
    recipe, _ = recipe_of(made)
    assert all(torch.equal(value, average[f"net.{key}"]) for key, value in recipe.net.state_dict().items())
    with pytest.raises(ValueError, match="has 16 latent channels, model.latent_channels=4"):
        settings(path, tmp_path / "run", f"init_from={file}")


def test_samples_show_pictures_beside_what_becomes_of_them(path, trained, tmp_path):
    drawn = Image.open(trained / "samples/00000004/00.png")
    assert drawn.size == (32, 16) and "/" not in drawn.info["title"]  # a file's name without its folder
    original = path.parent / "images/red_card.png"
    cli.main(["sample", str(trained), str(original), "--out", str(tmp_path / "out")])
    sheet = pictures.tensor(Image.open(tmp_path / "out/000000.png"))
    assert torch.equal(sheet[..., :16], pictures.tensor(Image.open(original)))


def test_core_loads_an_export_as_a_vae(path, trained, host):
    from importlib import import_module

    (file,) = exporting.export(trained, Path(host.models), "tiny_autoencoder", dtype="fp32")
    vae = import_module("nodes").VAELoader().load_vae(file.name)[0]
    recipe, _, _ = exporting.open_run(trained)
    shown = pictures.tensor(Image.open(path.parent / "images/red_card.png"))[None]
    latent = vae.encode(shown.movedim(1, -1) / 255)
    assert latent.shape == (1, 16, 2, 2)
    expected = recipe.net.encode(shown / 127.5 - 1).latents / (recipe.square.sqrt() * 0.3611) + 0.1159
    torch.testing.assert_close(latent, expected.detach(), rtol=1e-2, atol=1e-2)  # core may run it in bf16
    again = vae.decode(latent).movedim(-1, 1)
    torch.testing.assert_close(again, (recipe.again(shown) + 1) / 2, rtol=2e-2, atol=2e-2)


def test_a_dry_run_of_the_shipped_recipe_says_what_would_happen(path, tmp_path, capsys):
    cli.main(["train", str(ROOT / "trainer/recipes/autoencoder/autoencoder_emoji.toml"), "--dry-run",
              f"data.path={path}", f"out={tmp_path}/run"])
    output = capsys.readouterr().out
    for part in ("256 latent cells of 4 numbers each", "2,445,063 learn", "memory     about", "square.png: as it is"):
        assert part in output, part
    assert not (tmp_path / "run").exists()
