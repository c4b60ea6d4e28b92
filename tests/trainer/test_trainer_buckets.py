"""Batches of one size: no picture is lost, and which come together depends only on (seed, step)."""
from collections import Counter

import pytest
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl.pixart import buckets as pixart
from pixstack.trainer.config import check
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import buckets, loader

SHAPES = [(32, 32)] * 7 + [(64, 32)] * 5 + [(32, 64)] * 3 + [(16, 100)]
AREA = dict(buckets="area", resolution=32, bucket_multiple=8, bucket_ratio=4.0, crop="centre", caption="a wall")


@pytest.fixture
def folder(tmp_path):
    """Pictures in four buckets, of 7, 5, 3 and 1. Each has a colour of its own."""
    for i, (height, width) in enumerate(SHAPES):
        Image.new("RGB", (width, height), (10 * i, 255 - 10 * i, 7)).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def batches(folder, batch_size=4, seed=0, **settings):
    settings = Data(kind="folder", path=str(folder), **{**AREA, **settings})
    return loader.Batches(loader.read(settings, "captions").train, settings, seed, batch_size)


def test_a_batch_has_one_size_and_that_is_the_size_of_its_bucket(folder):
    made = batches(folder)
    assert len(made.buckets) == 4
    for step in range(12):
        batch = made(step, range(4))
        assert batch.size in made.buckets
        assert {made.index(step, p) for p in range(4)} <= set(made.buckets[batch.size])


@pytest.mark.parametrize("batch_size, group", [(4, 0), (4, 2), (4, 1), (6, 3), (16, 0)])
def test_after_every_epoch_each_picture_was_shown_at_least_that_often(folder, batch_size, group):
    made = batches(folder, batch_size, bucket_group=group)
    schedule, shown = made.schedule, Counter()
    numbers = [schedule.begun(epoch) for epoch in range(6)]
    for epoch in range(5):
        for number in range(numbers[epoch], numbers[epoch + 1]):
            step, first = divmod(number, schedule.batch_groups)
            shown.update(made.index(step, first * schedule.group + p) for p in range(schedule.group))
        assert len(shown) == len(SHAPES) and min(shown.values()) >= epoch + 1
        assert max(shown[i] for i in range(7)) <= epoch + 1 + batch_size  # a rest is carried, not shown anew each time


def test_a_bucket_shows_all_its_pictures_before_it_shows_one_again(folder):
    made = batches(folder)
    rows = {size: [] for size in made.buckets}
    for step in range(60):
        rows[made.at(step, 0)[1]] += [made.index(step, p) for p in range(4)]
    for size, row in rows.items():
        own = sorted(made.buckets[size])
        for start in range(0, len(row) - len(own) + 1, len(own)):
            assert sorted(row[start:start + len(own)]) == own


def test_in_the_long_run_every_picture_is_shown_equally_often(folder):
    made = batches(folder, 4)
    steps = made.schedule.begun(4)  # 16 pictures in 4 epochs of groups of 4: whole groups everywhere
    shown = Counter(made.index(step, p) for step in range(steps) for p in range(4))
    assert set(shown.values()) == {4}


def test_a_group_of_one_needs_no_filling(folder):
    made = batches(folder, 4, bucket_group=1)
    epochs = [sorted(made.index(s, p) for s in range(4 * e, 4 * e + 4) for p in range(4)) for e in range(3)]
    assert epochs == [list(range(16))] * 3
    assert len({made.at(0, p)[1] for p in range(4)}) > 1


def test_a_batch_of_buckets_depends_only_on_its_step(folder):
    one, other = batches(folder, crop="random", flip=True), batches(folder, crop="random", flip=True)
    for step in range(20):
        one(step, range(4), following=(step + 1, range(4)))
    a, b = one(20, range(4)), other(20, range(4))
    assert torch.equal(a.pictures, b.pictures) and torch.equal(a.boxes, b.boxes) and a.items == b.items


def test_processes_get_disjoint_parts_of_the_same_size(folder):
    made = batches(folder, 4, bucket_group=4)
    for step in range(8):
        parts = [made(step, range(2)), made(step, range(2, 4))]
        assert parts[0].size == parts[1].size
        assert torch.equal(torch.cat([p.pictures for p in parts]), made(step, range(4)).pictures)


def test_a_pass_that_would_mix_sizes_is_refused(folder):
    with pytest.raises(ValueError, match="bucket_group=1: a pass of 4 pictures has several sizes"):
        made = batches(folder, 4, bucket_group=1)
        [made(step, range(4)) for step in range(4)]


def test_a_picture_goes_to_the_size_that_the_release_gives_it():
    settings = Data(buckets="pixart", resolution=512)
    for height, width in ((700, 1000), (1000, 300), (100, 10_000), (640, 640)):
        assert buckets.nearest(settings, height, width) == pixart.nearest(pixart.TABLES[512], height, width)[1:]
    assert set(buckets.sizes(settings)) == set(pixart.TABLES[512].values())


def test_of_several_resolutions_the_nearest_area_is_taken():
    for rule in ("", "ultrapixel", "area", "pixart"):
        settings = Data(buckets=rule, resolutions=[512, 1024])
        small, large = buckets.nearest(settings, 500, 500), buckets.nearest(settings, 2000, 2000)
        assert small == (512, 512) and large == (1024, 1024)
        assert {small, large} <= set(buckets.sizes(settings))


def test_every_nearest_size_is_one_of_the_sizes():
    for rule in ("area", "ultrapixel", "pixart"):
        settings = Data(buckets=rule, resolution=512)
        known = set(buckets.sizes(settings))
        assert all(buckets.nearest(settings, h, w) in known for h in range(100, 2000, 97) for w in range(90, 2000, 89))


def test_area_sizes_are_multiples_that_never_pass_the_area():
    found = buckets.area_sizes(1024, 64, 2.0)
    assert (1024, 1024) in found and (832, 1216) in found and (1344, 768) in found
    for height, width in found:
        assert height % 64 == width % 64 == 0 and 0.85 * 1024**2 < height * width <= 1024**2
        assert max(height, width) <= 2 * min(height, width)


def test_a_batch_says_what_was_cut_out_of_which_size(tmp_path):
    ramp = torch.arange(100, dtype=torch.uint8).repeat(50, 1)  # 50 high, 100 wide; grey = column
    Image.fromarray(ramp.numpy()).convert("RGB").save(tmp_path / "a.png")
    batch = batches(tmp_path, 1, buckets="", resolution=50, crop="centre")(0, range(1))
    assert batch.sizes.tolist() == [[50, 100]] and batch.boxes.tolist() == [[0, 25, 50, 75]]
    assert batch.pictures[0, 0, 0, 0] == 25 and batch.pictures[0, 0, 0, -1] == 74


def test_fixed_batches_hold_every_picture_once_in_batches_of_one_size(folder):
    settings = Data(kind="folder", path=str(folder), **AREA)
    found = loader.fixed(loader.read(settings, "captions").train, settings, 4)
    assert sorted(i.file.name for b in found for i in b.items) == [f"{i:02d}.png" for i in range(16)]
    assert [len(b.positions) for b in found] == [len(b.pictures) for b in found]
    assert [b.positions.start for b in found][1:] == [b.positions.stop for b in found][:-1]


def test_prior_pictures_are_their_share_of_every_pass(folder, tmp_path_factory):
    prior = tmp_path_factory.mktemp("prior")
    for i in range(3):
        Image.new("RGB", (40, 40), (0, 0, 200 + i)).save(prior / f"{i}.png")
    made = batches(folder, 4, prior_path=str(prior), prior_caption="a thing", prior_share=0.5, bucket_group=2)
    seen = Counter()
    for step in range(12):
        for part in (range(2), range(2, 4)):
            batch = made(step, part)
            assert batch.prior.sum() == 1
            seen.update(i.file for i in batch.items)
            assert {c for c, p in zip(batch.captions, batch.prior, strict=True) if p} == {"a thing"}
    assert len(seen) == len(SHAPES) + 3
    assert [n for file, n in seen.items() if file.parent == prior] == [8, 8, 8]


@pytest.mark.parametrize("word, part", [
    ("data.buckets=pixert", "did you mean pixart"), ("data.bucket_group=4", "not a multiple of data.bucket_group=4"),
    ("data.resolution=16 data.buckets=pixart", "has tables for 256, 512"), ("data.buckets=area", "data.crop='none'"),
    ("data.buckets=area data.crop=centre data.bucket_multiple=99", "not in 1 to 16"),
    ("data.bucket_group=3 micro_batch_size=2", "bucket_group=3 is not a multiple of micro_batch_size=2"),
    ("data.resolution=20 data.buckets=area data.crop=centre data.bucket_multiple=10", "such as 20x20"),
    ("data.prior_path=. data.prior_share=0.1", "no whole prior picture"),
])
def test_a_setting_of_buckets_that_cannot_work_is_refused(tmp_path, word, part):
    path = tiny_run.pictures(tmp_path / "set")
    with pytest.raises(ValueError, match=part):
        tiny_run.settings(path, tmp_path / "run", *word.split())


def test_pixelflow_trains_on_shapes_of_every_kind(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    raw = {**tiny_run.SETTINGS, "batch_size": 4, "steps": 4, "out": str(out), "validation": {"every": 4},
           "data": {"path": str(folder), "held_out_path": str(folder), **AREA, "bucket_group": 2}}
    tiny_run.train(check.parse(raw, ["micro_batch_size=2"]))
    assert (out / "checkpoints/00000004/model.safetensors").exists()
