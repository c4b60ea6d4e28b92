"""Masks beside pictures: where they are found, how they are cut, and that nothing outside of them is learned."""
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_pixart
import tiny_run
import torch
from PIL import Image
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import doctor, loader
from pixstack.trainer.data.pictures import Pictures
from pixstack.trainer.features import cache
from pixstack.trainer.training import build, objective
from tiny_pixart import recipe_of

SIZE = (48, 32)  # height, width of the pictures


def mask_image(mode: str = "L") -> Image.Image:
    """White in its left quarter, black elsewhere."""
    mask = np.zeros(SIZE, np.uint8)
    mask[:, : SIZE[1] // 4] = 255
    return Image.fromarray(mask).convert(mode)


def picture(file: Path, alpha: Image.Image | None = None, mask: Path | None = None):
    """A picture that is white where its mask is, so that both can be compared."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = mask_image("RGB")
    if alpha:
        shown.putalpha(alpha)
    shown.save(file)
    if mask:
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask_image("RGB").save(mask)


def onetrainer(folder: Path) -> Path:
    picture(folder / "a.png", mask=folder / "a-masklabel.png")
    picture(folder / "b.png")
    return folder


def kohya(folder: Path) -> Path:
    picture(folder / "images/deep/a.png", mask=folder / "masks/deep/a.webp")
    picture(folder / "images/b.png")
    return folder / "images"


def listed(folder: Path) -> Path:
    picture(folder / "a.png", mask=folder / "elsewhere/m.png")
    picture(folder / "b.png")
    entries = [{"file": "a.png", "caption": "a", "mask": "elsewhere/m.png"}, {"file": "b.png", "caption": "b"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder / "data.jsonl"


def transparent(folder: Path) -> Path:
    picture(folder / "a.png", alpha=mask_image())
    picture(folder / "b.png")
    return folder


LAYOUTS = {"OneTrainer": onetrainer, "kohya": kohya, "jsonl": listed, "alpha": transparent}


def read(path: Path, **more) -> tuple[list, Data]:
    settings = Data(**{"path": str(path), "masks": "alpha" if path.name == "alpha" else "files", "caption": "x",
                       "resolution": 32, "workers": 1, **more})
    items = sorted(loader.read(settings, "captions").train, key=lambda item: item.file.name)
    return items, settings


def load(items, settings, index=0, seed=0, size=(32, 32)):
    return Pictures(items, settings).submit(index, size, random.Random(seed)).result()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_found_and_cropped_and_mirrored_like_its_picture(layout, tmp_path):
    items, settings = read(LAYOUTS[layout](tmp_path / layout), crop="random", flip=True)
    assert [i.file.name for i in items] == ["a.png", "b.png"]  # a mask is no picture
    sides = set()
    for seed in range(12):
        found = load(items, settings, seed=seed)
        where = found.mask[0].float() / 255
        shown = found.pixels.float().mean(0) / 255
        if layout == "alpha":  # what is transparent is white
            assert found.pixels.min() == 255 and 0 < where.mean() < 0.5
        else:
            assert (where - shown).abs().mean() < 0.02  # edges are resized by other filters
        sides.add(bool(where[:, 0].mean() < where[:, -1].mean()))
    assert sides == {True, False}
    assert load(items, settings, index=1).mask is None


def test_a_batch_counts_a_picture_without_a_mask_as_a_whole(tmp_path):
    items, settings = read(onetrainer(tmp_path / "set"), crop="centre")
    batch = loader.Batches(items, settings, 0, 2)(0, range(2))
    of_a = [i.file.name for i in batch.items].index("a.png")
    assert batch.mask.shape == (2, 1, 32, 32) and batch.mask.dtype == torch.uint8
    assert batch.mask[1 - of_a].min() == 255 and batch.mask[of_a].float().mean() < 100
    plain = loader.Batches(items, replace(settings, masks=""), 0, 2)(0, range(2))
    assert plain.mask is None and torch.equal(plain.pictures, batch.pictures)


def test_a_resized_mask_has_no_traces_outside_of_it(tmp_path):
    items, settings = read(onetrainer(tmp_path / "set"), crop="random", resolution=24)
    mask = load(items, settings, size=(24, 24)).mask
    assert mask.flatten(1).max() == 255 and not mask[..., 12:].any()


def test_data_without_any_mask_are_refused(tmp_path):
    picture(tmp_path / "set/a.png")
    with pytest.raises(ValueError, match="no picture has a mask: put a-masklabel.png beside each a.png"):
        read(tmp_path / "set")
    with pytest.raises(ValueError, match="no picture has transparency: save them with an alpha channel"):
        read(tmp_path / "set", masks="alpha")


def test_a_mask_of_another_shape_is_named(tmp_path):
    items, settings = read(onetrainer(tmp_path / "set"))
    Image.new("L", (64, 16)).save(tmp_path / "set/a-masklabel.png")
    with pytest.raises(ValueError, match="a-masklabel.png: it is 64x16, which is not the shape of its picture, 32x48"):
        load(items, settings)


def test_the_doctor_looks_at_masks_and_does_not_call_them_left_out(tmp_path):
    folder = onetrainer(tmp_path / "set")
    (folder / "a-masklabel.png").write_bytes(b"nothing")
    (folder / "b-condlabel.png").write_bytes((folder / "b.png").read_bytes())
    settings = Data(path=str(folder), masks="files", caption="x", resolution=32)
    report = doctor.examine(settings, "captions")
    assert [f.sentence for f in report.findings for case in f.cases if "a-masklabel.png" in case] == [
        "conditions cannot be read"]
    assert any("b-condlabel.png" in case and "left out" in f.sentence for f in report.findings for case in f.cases)


# --- Training


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Tiny pictures whose right half is masked out, captioned."""
    folder = tmp_path_factory.mktemp("masked")
    path = tiny_run.pictures(folder / "set", size=64)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "set/left.png")
    path.write_text("".join(json.dumps({**entry, "mask": "left.png"}) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_pixart.parts(tmp_path_factory.mktemp("parts"))


def made(masked, parts, tmp_path, *words):
    return tiny_pixart.settings(masked, tmp_path / "run", parts, "data.masks=files", "data.resolution=64", *words)


def test_outside_of_the_mask_a_recipe_learns_nothing(masked, parts, tmp_path):
    config = made(masked, parts, tmp_path)
    recipe, batches = recipe_of(config)
    batch, d = batches(0, range(4)), recipe.denoising
    step = d.noising(batch, d.drawn(batch, 0)[0], None, 0)
    prediction = torch.randn(4, 8, *step.latent.shape[-2:], requires_grad=True)
    sum(d.losses(lambda x, t, **_: prediction, step, **recipe.loss_settings())).sum().backward()
    left, right = prediction.grad.chunk(2, dim=-1)
    assert not right.any() and left.count_nonzero() == left.numel()
    counted = made(masked, parts, tmp_path, "loss.unmasked=0.25")
    weight = objective.cells(counted.loss, batch, (8, 8), "cpu")
    assert weight[..., :4].min() == 1 and weight[..., 4:].unique().tolist() == [0.25]


def test_a_run_that_finds_its_features_in_the_cache_loads_the_masks_beside(masked, parts, tmp_path):
    config = made(masked, parts, tmp_path, f"cache.folder={tmp_path / 'cache'}", "data.crop=centre", "data.flip=true")
    items = build.collection(config).train
    plain, _ = recipe_of(config)
    assert cache.fill(items, config.data, plain.encoders, tmp_path / "cache", "cpu") > 0
    load = cache.loader(config, plain.encoders, items, config.data, lambda words: pytest.fail(words))
    cached = loader.Batches(items, config.data, 0, 6, load)(0, range(6))
    shown = loader.Batches(items, config.data, 0, 6)(0, range(6))
    assert cached.pictures is None and torch.equal(cached.mask, shown.mask)
    assert 0 < (cached.mask[..., 0] == 255).float().mean() < 1  # some are mirrored
    torch.testing.assert_close(plain(cached), plain(shown), rtol=1e-4, atol=1e-5)
    without = replace(cached, mask=None)
    assert (plain(without) - plain(cached)).abs().min() > 1e-3


@pytest.mark.parametrize("packing", ["dense", "packed"])
def test_masks_reach_every_stage_of_pixelflow(masked, tmp_path, packing):
    config = tiny_run.settings(masked, tmp_path / "run", "data.masks=files", "data.resolution=16", "data.crop=centre",
                               f"recipe.packing={packing}", "precision=fp32")
    recipe, batches = recipe_of(config)
    batch = batches(0, range(6))
    whole, half_of_it = recipe(replace(batch, mask=None)), recipe(batch)
    assert half_of_it.shape == (6,) and (half_of_it < whole).all()
    right = replace(batch, mask=255 - batch.mask)
    torch.testing.assert_close(half_of_it + recipe(right), whole, rtol=1e-4, atol=1e-5)


def test_settings_of_masks_that_do_nothing_are_refused(masked, parts, tmp_path):
    for words, sentence in ((("data.masks=", "loss.unmasked=0.5"), "loss.unmasked=0.5 is read only with data.masks."),
                            (("data.masks=file",), "data.masks='file' is none of alpha, files; did you mean files."),
                            (("loss.unmasked=1.5",), "loss.unmasked=1.5 is outside [0, 1]."),
                            (("recipe.name=pixart_dmd",), "data.masks='files' is not read by recipe.name='pixart_dmd'"),
                            (("data.conditions=[\"mask\"]",), "give one of them another name.")):
        with pytest.raises(ValueError) as caught:
            made(masked, parts, tmp_path, *words)
        assert sentence in str(caught.value)
