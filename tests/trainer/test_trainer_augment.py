"""Pictures that are turned and recoloured at random."""
import random

import numpy as np
import pytest
import tiny_pixart
import tiny_run
import torch
from PIL import Image
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import augment, loader, pictures


def picture(folder, colour=(100, 140, 60), size=(48, 32)):
    Image.new("RGB", size, colour).save(folder / "a.png")
    return str(folder)


def seen(folder, count=40, **settings):
    """The first pixel and its place of one picture, shown so many times."""
    made = Data(kind="folder", path=str(folder), caption="a", crop="centre", resolution=16, **settings)
    batches = loader.Batches(loader.read(made, "captions").train, made, 0, 1)
    return torch.stack([batches(step, range(1)).pictures[0] for step in range(count)])


def test_brightness_stays_within_its_bounds_and_reaches_both_sides(tmp_path):
    found = seen(picture(tmp_path), brightness=0.2)[:, :, 0, 0].float() / torch.tensor([100.0, 140, 60])
    assert 0.79 <= found.min() < 0.9 and 1.1 < found.max() <= 1.21


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_so_many_pictures_change_as_the_share_says(tmp_path, name):
    half = Image.new("RGB", (32, 32), (200, 40, 40))
    half.paste((40, 60, 180), (0, 0, 32, 16))
    half.save(tmp_path / "a.png")
    plain = seen(tmp_path, 1)[0]
    found = seen(tmp_path, 200, **{name: 0.4}, colour_share=0.5)
    changed = sum(not torch.equal(one, plain) for one in found)
    assert 70 <= changed <= 130


def test_colours_turn_round_their_circle():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert augment.hued(red, 1 / 3).getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=6)
    assert augment.hued(red, -1 / 3).getpixel((0, 0)) == pytest.approx((0, 0, 255), abs=6)


@pytest.mark.parametrize("degrees", [-180, -90, -45, -7.5, 0.5, 3, 20, 60, 135])
@pytest.mark.parametrize("size", [(64, 64), (90, 41), (33, 120)])
def test_a_turned_picture_has_no_empty_corners_and_keeps_its_shape(degrees, size):
    found = augment.turned(Image.new("RGB", size, "white"), degrees)
    assert np.asarray(found).min() >= 250
    assert (found.height, found.width) == augment.inner(size[::-1], degrees)
    assert abs(found.width / found.height - size[0] / size[1]) < 0.12 * size[0] / size[1]


def test_a_condition_is_turned_with_its_picture(tmp_path):
    ramp = Image.fromarray(np.add.outer(np.arange(48), 4 * np.arange(48)).astype(np.uint8)).convert("RGB")
    for name in ("images", "hint"):
        (tmp_path / name).mkdir()
        ramp.save(tmp_path / name / "a.png")
    made = Data(kind="folder", path=str(tmp_path / "images"), caption="a", crop="centre", resolution=16, rotation=30.0,
                conditions=["hint"])
    batches = loader.Batches(loader.read(made, "captions").train, made, 0, 1)
    shown = [batches(step, range(1)) for step in range(6)]
    assert all(torch.equal(one.pictures, one.conditions["hint"]) for one in shown)
    assert len({one.pictures.sum().item() for one in shown}) > 3


def test_what_was_cut_is_told_in_the_pixels_before_the_turn():
    cut = pictures.plan((100, 100), (50, 50), "centre", random.Random(0), angle=45.0)
    top, left, bottom, right = cut.box()
    assert top == left == pytest.approx(100 - bottom) == pytest.approx(100 - right)
    assert bottom - top == pytest.approx(100 / 2**0.5, abs=2)


def test_a_step_changes_its_pictures_as_the_unbroken_run_did(tmp_path):
    how = dict(rotation=20.0, brightness=0.3, hue=0.2, rotation_share=0.5, flip=True)
    folder = picture(tmp_path)
    assert torch.equal(seen(folder, 8, **how)[5:], seen(folder, 8, **how)[5:])


def test_validation_changes_nothing(tmp_path):
    made = Data(kind="folder", path=picture(tmp_path), caption="a", resolution=16, rotation=20.0, brightness=0.5)
    (batch,) = loader.fixed(loader.read(made, "captions").train, made)
    assert {tuple(pixel) for pixel in batch.pictures[0].flatten(1).T.tolist()} == {(100, 140, 60)}


@pytest.mark.parametrize("word", ["data.rotation=5.0", "data.hue=0.1"])
def test_changed_pictures_do_not_go_with_cached_features(tmp_path, word):
    path, parts = tiny_run.pictures(tmp_path / "set", size=64), tiny_pixart.parts(tmp_path)
    tiny_pixart.settings(path, tmp_path / "run", parts, word)
    with pytest.raises(ValueError, match=f"{word} makes another picture every time, and cache.folder='cache'"):
        tiny_pixart.settings(path, tmp_path / "run", parts, word, "cache.folder=cache")


@pytest.mark.parametrize("word, part", [
    ("data.hue=0.6", "data.hue=0.6 must be 0 to 0.5"), ("data.rotation=200.0", "must be 0 to 180 degrees"),
    ("data.brightness=2.0", "data.brightness=2.0 is outside [0, 1]"),
    ("data.rotation_share=-1.0", "data.rotation_share=-1.0 is outside [0, 1]"),
])
def test_a_change_that_cannot_work_is_refused(tmp_path, word, part):
    with pytest.raises(ValueError) as caught:
        tiny_run.settings(tiny_run.pictures(tmp_path / "set"), tmp_path / "run", word)
    assert part in str(caught.value)
