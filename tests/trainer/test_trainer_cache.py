"""Features on disk: made once, found by content, never half-written, never taken for what they are not."""
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import accelerate
import numpy as np
import pytest
import tiny_pixart
import tiny_run
import torch
from PIL import Image
from pixstack.trainer import recipes
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader
from pixstack.trainer.data.layouts import Item
from pixstack.trainer.data.pictures import Picture
from pixstack.trainer.features import cache, released, text_encoders, vaes
from pixstack.trainer.features import store as stores
from pixstack.trainer.training import build

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set", size=64)


@pytest.fixture
def made(path, parts, tmp_path):
    def settings(*words, **more):
        return tiny_pixart.settings(path, tmp_path / "run", parts, f"cache.folder={tmp_path / 'cache'}", *words, **more)
    return settings


def filled(settings, tmp_path):
    cli.main(["cache", tiny_pixart.toml(tmp_path, settings)])


def loaded(settings):
    """(the loader for training pictures, what was said about it)"""
    messages, found = [], build.collection(settings)
    recipe = build.recipe(settings, found)
    return cache.loader(settings, recipe.encoders, found.train, settings.data, messages.append), messages, recipe, found


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    store = stores.Store(tmp_path, "latent", {"encoder": "a"})
    store.put("one", {"mean": torch.ones(3)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
    with pytest.raises(SystemExit):
        store.write()
    monkeypatch.undo()
    assert "one" not in stores.Store(tmp_path, "latent", {"encoder": "a"})
    again = stores.Store(tmp_path, "latent", {"encoder": "a"})
    again.put("one", {"mean": torch.ones(3), "std": torch.zeros(2)})
    again.write()
    found = stores.Store(tmp_path, "latent", {"encoder": "a"}).get("one")
    assert found.keys() == {"mean", "std"} and torch.equal(found["mean"], torch.ones(3))


def test_two_writers_do_not_overwrite_each_other(tmp_path):
    for writer in (0, 1, 0):
        store = stores.Store(tmp_path, "text", {}, writer)
        store.put(f"{writer} {len(store)}", {"tokens": torch.ones(1)})
        store.write()
    assert len(stores.Store(tmp_path, "text", {})) == 3


def test_many_shards_are_read_with_few_of_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SHARD_BYTES", 1)
    monkeypatch.setattr(stores, "OPEN_SHARDS", 2)
    store = stores.Store(tmp_path, "text", {})
    for i in range(5):
        store.put(str(i), {"tokens": torch.tensor([i])})
    assert [store.get(str(i))["tokens"].item() for i in range(5)] == list(range(5)) and len(store.handles) == 2


def test_another_encoder_is_another_store_that_says_what_differs(tmp_path):
    old = stores.Store(tmp_path, "latent", {"encoder": "a", "precision": "fp32"})
    old.put("one", {"mean": torch.ones(1)})
    old.write()
    new = stores.Store(tmp_path, "latent", {"encoder": "b", "precision": "fp32"})
    assert "one" not in new
    assert new.others() == [f"{old.folder}: encoder was 'a', now 'b'"]


def test_an_encoder_is_known_by_its_bytes_and_not_by_its_place(tmp_path):
    for name, byte in (("here", b"a"), ("there", b"a"), ("other", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(byte * 10)
    here, there, other = (stores.fingerprint(tmp_path / n) for n in ("here", "there", "other"))
    assert here == there != other


def test_values_in_the_cache_that_are_no_numbers_are_named_with_their_picture(tmp_path):
    item = Item(tmp_path / "a.png", ("a",))
    spoilt = Picture(None, {}, (8, 8), (0, 0, 8, 8), (8, 8), {"vae.mean": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match=r"a.png: what the cache holds of it \(vae.mean\) has values that"):
        loader.collate([item], [spoilt], ["a"], range(1), 0)


def test_training_from_the_cache_is_training_from_the_pictures(made, tmp_path):
    settings = made("data.flip=true")
    plain = tiny_pixart.recipe_of(settings)
    expected = plain[0](plain[1](3, range(6)))
    filled(settings, tmp_path)
    load, messages, recipe, found = loaded(settings)
    assert messages == []
    recipe.load_state_dict(plain[0].state_dict())
    batch = loader.Batches(found.train, settings.data, settings.seed, settings.batch_size, load)(3, range(6))
    assert batch.pictures is None and set(batch.features) == {"latent.mean", "latent.std"}
    torch.testing.assert_close(recipe(batch), expected, rtol=1e-5, atol=1e-6)
    assert not recipe.denoising.vae.vae  # the VAE was never loaded


def test_a_batch_of_features_knows_what_was_cut_out_of_what(made, tmp_path):
    settings = made("data.resolution=64", "data.crop=centre")
    filled(settings, tmp_path)
    load, _, _, found = loaded(settings)
    cached, plain = (loader.Batches(found.train, settings.data, 0, 6, some)(0, range(6))
                     for some in (load, loader.Pictures))
    assert torch.equal(cached.sizes, plain.sizes) and torch.equal(cached.boxes, plain.boxes)


def test_every_size_of_a_bucketed_set_is_cached(made, path, tmp_path):
    for i, file in enumerate(sorted((path.parent / "images").iterdir())):
        Image.new("RGB", ((96, 64), (64, 96))[i % 2], (i, 9, 9)).save(file)
    settings = made("data.buckets=area", "data.bucket_multiple=16", "data.crop=centre", "data.bucket_group=2")
    filled(settings, tmp_path)
    load, messages, recipe, found = loaded(settings)
    assert messages == []
    batches = loader.Batches(found.train, settings.data, 0, settings.batch_size, load)
    shapes = {tuple(batches(step, range(2)).features["latent.mean"].shape[2:]) for step in range(8)}
    assert len(shapes) == 2
    assert recipe(batches(0, range(2))).isfinite().all()


def test_a_picture_that_changed_is_named_and_encoded_anew(made, path, tmp_path):
    settings = made()
    filled(settings, tmp_path)
    file = path.parent / "images/red_card.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(file)
    _, (message,), _, _ = loaded(settings)
    assert "1 pictures are not in cache.folder" in message and "1 of them have changed since" in message
    assert "red_card.png" in message and "python -m trainer cache" in message
    filled(settings, tmp_path)
    assert loaded(settings)[1] == []


def test_a_cache_of_another_vae_is_named(made, tmp_path):
    filled(made(), tmp_path)
    other = tiny_pixart.vae(tmp_path / "other", latent_channels=4)
    weights = next(other.glob("*.safetensors"))
    from pixstack.models_impl.state_dict import read_file, write_file

    write_file(weights, {k: v + 1 for k, v in read_file(weights)[0].items()})
    _, (message,), _, _ = loaded(made(vae={"path": str(other)}))
    assert "8 pictures are not in cache.folder" in message and "caches there are of other encoders" in message


def test_nothing_is_made_twice(made, tmp_path, monkeypatch):
    settings = made()
    filled(settings, tmp_path)
    monkeypatch.setattr(vaes.FrozenVae, "encode", None)
    monkeypatch.setattr(text_encoders.FrozenT5, "embed", None)
    filled(settings, tmp_path)


def test_a_cache_that_was_killed_goes_on_where_it_was(made, tmp_path, monkeypatch):
    settings = made()
    monkeypatch.setattr(cache, "AT_ONCE", 2)
    monkeypatch.setattr(stores, "SHARD_BYTES", 1)
    encode, seen = vaes.FrozenVae.encode, []

    def count(self, pictures, device):
        if len(seen) == 2:
            raise SystemExit("killed")
        seen.append(len(pictures))
        return encode(self, pictures, device)

    monkeypatch.setattr(vaes.FrozenVae, "encode", count)
    with pytest.raises(SystemExit):
        filled(settings, tmp_path)
    seen.append(0)  # from here on nobody kills it
    filled(settings, tmp_path)
    assert sum(seen) == 12 and loaded(settings)[1] == []  # each of the 8 + 4 pictures once


def test_what_was_made_before_a_picture_that_cannot_be_read_is_kept(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "AT_ONCE", 2)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (64, 64), (9, ord(name), 9)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a card")
    (folder / "d.png").write_text("no picture")
    settings = tiny_pixart.settings(folder, tmp_path / "run", parts, f"cache.folder={tmp_path / 'cache'}")
    with pytest.raises(SystemExit, match="d.png cannot be read"):
        filled(settings, tmp_path)
    assert [len(e.store) for e in recipes.find("pixart").make_encoders(settings)] == [2]


def test_captions_that_were_embedded_before_a_stop_are_kept(path, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "AT_ONCE", 4)
    embed, seen = text_encoders.FrozenT5.embed, []

    def stopped(self, captions, device):
        seen.append(len(captions))
        if len(seen) == 3:
            raise KeyboardInterrupt
        embed(self, captions, device)

    monkeypatch.setattr(text_encoders.FrozenT5, "embed", stopped)
    settings = tiny_pixart.settings(path, tmp_path / "run", parts, f"cache.folder={tmp_path / 'cache'}")
    with pytest.raises(SystemExit):
        filled(settings, tmp_path)
    assert len(text_encoders.frozen(settings).store) == 8


def test_signals_that_come_again_do_not_interrupt_the_writing_of_what_was_made(path, parts, tmp_path, monkeypatch):
    """As a launcher sends them, to itself and to its processes."""
    monkeypatch.setattr(text_encoders, "AT_ONCE", 4)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    embed, write = text_encoders.FrozenT5.embed, stores.Store.write

    def stopped(self, captions, device):
        embed(self, captions, device)
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        write(self)

    monkeypatch.setattr(text_encoders.FrozenT5, "embed", stopped)
    monkeypatch.setattr(stores.Store, "write", interrupted)
    settings = tiny_pixart.settings(path, tmp_path / "run", parts, f"cache.folder={tmp_path / 'cache'}")
    try:
        with pytest.raises(SystemExit):
            filled(settings, tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    monkeypatch.undo()
    assert len(text_encoders.frozen(settings).store) == 4


def test_a_random_crop_is_not_taken_from_the_cache(made, tmp_path):
    settings = made("data.crop=random")
    load, (message,), _, _ = loaded(settings)
    assert load is loader.Pictures and "makes another picture every time" in message


def test_a_cache_without_a_folder_is_refused(path, parts, tmp_path, capsys):
    settings = tiny_pixart.settings(path, tmp_path / "run", parts)
    with pytest.raises(SystemExit, match="cache.folder is empty"):
        filled(settings, tmp_path)


def test_a_run_trains_from_the_cache_what_it_trains_from_pictures(made, path, parts, tmp_path):
    words = ("steps=2", "save_every=2", "validation.every=2")
    results = []
    for name, more in (("plain", ()), ("cached", (f"cache.folder={tmp_path / 'cache'}",))):
        settings = tiny_pixart.settings(path, tmp_path / name, parts, *words, *more)
        if more:
            filled(settings, tmp_path)
        cli.main(["train", tiny_pixart.toml(tmp_path, settings)])
        results.append(tiny_pixart.log(tmp_path / name))
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_dry_run_says_what_is_cached_and_reads_no_picture_for_it(made, path, tmp_path, capsys, monkeypatch):
    def said():
        capsys.readouterr()
        cli.main(["train", str(tiny_pixart.toml(tmp_path, made())), "--dry-run"])
        return capsys.readouterr().out

    before = said()
    assert "pictures are encoded at every step, for 0 of 8 are cached" in before
    assert "captions   24 captions; 0 are embedded already" in before
    filled(made(), tmp_path)
    assert "all pictures are cached" in said()
    assert "captions   24 captions; 24 are embedded already" in said()
    picture = next((path.parent / "images").glob("red*.png"))
    Image.new("RGB", (64, 64), (7, 7, 7)).save(picture)
    assert "for 7 of 8 are cached" in said()


# To import everything takes longer than to cache: one process does, and forks for every line that it reads. It writes
# the fork's number, and its exit status when it has ended.
ATTEMPTS = """
import os, sys
sys.path[:0] = ["package"]
from pixstack.trainer import libraries
libraries.hide_broken_torchvision()
from diffusers import AutoencoderKL
from pixstack.trainer.cli import main
from pixstack.trainer.features import cache, store
from transformers import AutoTokenizer, T5EncoderModel
cache.AT_ONCE = store.SHARD_BYTES = 1
for _ in sys.stdin:
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        main.main(["cache", sys.argv[1]])
        os._exit(0)
"""


def test_a_cache_killed_by_the_system_leaves_only_whole_shards(made, tmp_path):
    """kill -9 while it writes, and again, until it is done; every shard in between can be read."""
    def shards():
        return [*(tmp_path / "cache").rglob("latent-*/*.safetensors")]

    file = tiny_pixart.toml(tmp_path, made())
    statuses = []
    with subprocess.Popen([sys.executable, "-c", ATTEMPTS, file], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as attempts:
        while len(statuses) < 4 and statuses[-1:] != [0]:
            print(file=attempts.stdin, flush=True)
            there, child = len(shards()), int(attempts.stdout.readline())
            with suppress(ProcessLookupError):
                while True:
                    os.kill(child, signal.SIGKILL if len(shards()) > there + 5 else 0)
                    time.sleep(0.01)
            statuses.append(int(attempts.stdout.readline()))
            for shard in (tmp_path / "cache").rglob("*.safetensors"):
                with stores.safe_open(shard, framework="pt") as opened:
                    assert all(opened.get_tensor(key).isfinite().all() for key in opened.keys())
    assert statuses[0] == -signal.SIGKILL and statuses[-1] == 0 and loaded(made())[1] == []


# --- The releases' own files


def test_feature_files_of_a_release_are_read_and_written(made, path, tmp_path):
    settings = made()
    filled(settings, tmp_path)
    file = tiny_pixart.toml(tmp_path, settings)
    captions, latents = tmp_path / "caption_feature_wmask", tmp_path / "img_vae_feature"
    cli.main(["cache", file, "--write", "--captions", str(captions), "--latents", str(latents)])
    found = np.load(captions / "red_card.npz")
    assert found["caption_feature"].shape == (1, 16, 16) and found["attention_mask"].shape == (1, 16)
    assert np.load(latents / "red_card.npy").shape == (8, 8, 8)
    other = made(f"cache.folder={tmp_path / 'taken over'}")
    file = tiny_pixart.toml(tmp_path, other)
    cli.main(["cache", file, "--read", "--captions", str(captions), "--latents", str(latents)])
    load, messages, recipe, items = loaded(other)
    assert messages == []
    theirs, ours = (loader.Batches(items.train, settings.data, 0, 6, some)(0, range(6)).features
                    for some in (load, loaded(settings)[0]))
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    first = items.train[0].texts[0]
    taken, own = (build.recipe(s, items).text.store.get(stores.digest(first))["tokens"] for s in (other, settings))
    torch.testing.assert_close(taken.float(), own.float(), rtol=1e-2, atol=1e-3)  # the release keeps float16


def test_a_feature_file_of_another_size_is_named(made, tmp_path, capsys):
    settings = made()
    latents = tmp_path / "latents"
    latents.mkdir()
    np.save(latents / "red_card.npy", np.zeros((8, 4, 4), np.float32))
    cli.main(["cache", tiny_pixart.toml(tmp_path, settings), "--read", "--latents", str(latents)])
    output = capsys.readouterr().out
    assert "1 latents are of another size" in output and "red_card.npy: 32x32, shown at 64x64" in output
    assert "7 feature files are not there" in output


def test_the_name_of_a_nested_file_is_the_releases(tmp_path):
    item = loader.Item(tmp_path / "a/b/c.png")
    assert released.file_names(item, tmp_path) == ("a/b_c", "c")


# --- The VAE


@pytest.mark.parametrize("names", ["diffusers", "ldm"])
def test_a_vae_of_one_file_says_what_its_folder_says(tmp_path, parts, names):
    from pixstack.models_impl.state_dict import write_file

    folder = vaes.read_vae(Path(parts["vae"]["path"]))
    tensors = folder.state_dict()
    if names == "ldm":
        tensors = {f"first_stage_model.{k}": v for k, v in to_ldm(tensors).items()}
    write_file(tmp_path / "vae.safetensors", tensors)
    picture = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = (vaes.FrozenVae(str(p)).encode(picture, "cpu") for p in
                  (tmp_path / "vae.safetensors", parts["vae"]["path"]))
    torch.testing.assert_close(one, other)


def to_ldm(tensors):
    """As Stable Diffusion's files have it: another order of blocks in the decoder, attention as 1x1 convolutions."""
    import re

    found = {}
    for key, value in tensors.items():
        key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", key)
        key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
        key = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}",
                     key)
        key = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1")
            for theirs, ours in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                                 ("to_out.0", "proj_out")):
                key = key.replace(f".{theirs}.", f".{ours}.")
            value = value[..., None, None] if value.ndim == 2 else value
        found[key] = value
    return found


def test_a_file_that_is_no_vae_is_refused_by_name(tmp_path):
    tiny_pixart.released(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="net.safetensors' is not a VAE. The keys are those of PixArt"):
        vaes.read_vae(tmp_path / "net.safetensors")


def test_the_random_choice_to_mirror_is_the_same_with_and_without_the_cache(made, tmp_path):
    settings = made("data.flip=true")
    filled(settings, tmp_path)
    load, _, _, found = loaded(settings)
    cached, plain = load(found.train, settings.data), loader.Pictures(found.train, settings.data)
    vae = vaes.FrozenVae(settings.vae.path)
    for seed in range(6):
        ours = cached.load(0, (64, 64), random.Random(seed)).features["latent.mean"]
        theirs = vae.encode(plain.load(0, (64, 64), random.Random(seed)).pixels[None], "cpu")["mean"][0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", ["train", "cache"])
@pytest.mark.parametrize(("device", "on_cpu"), [("auto", False), ("cpu", True)])
def test_the_cache_is_filled_on_the_device_that_training_takes(command, device, on_cpu, path, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def accelerator(cpu):
        raise Stop(cpu)

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    recipe = tiny_run.toml(tmp_path, path, tmp_path / "run")
    with pytest.raises(Stop) as stopped:
        cli.main([command, str(recipe), f"cache.folder={tmp_path / 'cache'}", f"device={device}"])
    assert stopped.value.args == (on_cpu,)
