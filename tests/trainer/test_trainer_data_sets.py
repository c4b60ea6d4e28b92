"""Several data sets in one run: how often each is shown, what each says for itself, and what is wrong with them."""
import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from PIL import Image
from pixstack.trainer.config import check
from pixstack.trainer.config.schema import Cache, Config, Data, DataSet
from pixstack.trainer.data import doctor, loader, sets
from pixstack.trainer.features import cache
from pixstack.trainer.features.store import Store
from pixstack.trainer.training import build
from pixstack.trainer.training.run import Run


def folder(root, name, count, size=(20, 16), caption=""):
    """Pictures NAME/0.png ... of one colour each, with a caption where there is one."""
    (root / name).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (20 * i, 9, 9)).save(root / name / f"{i}.png")
        if caption:
            (root / name / f"{i}.txt").write_text(caption)
    return str(root / name)


@pytest.fixture
def two(tmp_path):
    """A set of five pictures and one of two."""
    return [folder(tmp_path, "many", 5, caption="one of many"), folder(tmp_path, "few", 2, caption="one of few")]


def data(paths, *of_each, **settings):
    """Settings of folders; of_each: what each says for itself."""
    of_each = of_each or [{}] * len(paths)
    shared = {"kind": "folder", "crop": "centre", **{k: v for k, v in settings.items() if k in ("crop", "flip")}}
    own = [DataSet(**{**shared, "path": p, **more}) for p, more in zip(paths, of_each, strict=True)]
    return Data(**{"resolution": 8, **settings}, sets=own)


def batches(settings, batch_size=4, seed=0, need="captions"):
    return loader.Batches(loader.read(settings, need).train, settings, seed, batch_size)


def shown(made, steps, size=4):
    return [made.items[made.index(step, p)] for step in range(steps) for p in range(size)]


def test_a_picture_occurs_as_often_in_an_epoch_as_its_set_repeats(two):
    made = batches(data(two, {}, {"repeats": 3}), 11)
    for epoch in range(3):
        counts = Counter(made.index(epoch, p) for p in range(11))
        assert [counts[i] for i in range(7)] == [1] * 5 + [3] * 2
    assert made.an_epoch == 11


def test_weights_give_each_set_its_share_whatever_its_size(two):
    made = batches(data(two, {"weight": 1.0}, {"weight": 3.0}), 7)
    found = Counter(item.set for item in shown(made, 40, 7))
    assert found[0] == 70 and found[1] == 210
    each = Counter(item.file for item in shown(made, 40, 7))
    assert set(each.values()) == {14, 105}  # in its set every picture is shown equally often


def test_weights_hold_in_buckets_too(tmp_path):
    wide, tall = folder(tmp_path, "a", 7, (64, 32), "a"), folder(tmp_path, "b", 3, (32, 64), "b")
    settings = data([wide, tall], {"weight": 0.7}, {"weight": 0.3}, buckets="area", resolution=32, bucket_multiple=8)
    found = Counter(item.set for item in shown(batches(settings, 4), 100))
    assert abs(found[0] / 400 - 0.7) < 0.03


@pytest.mark.parametrize("how", [({}, {"repeats": 3}), ({"weight": 0.35}, {"weight": 1.0})])
def test_a_run_that_resumes_gets_the_pictures_of_the_unbroken_one(two, how):
    whole, later = (batches(data(two, *how)) for _ in range(2))
    unbroken = [[whole.index(step, p) for p in range(4)] for step in range(60)]
    assert [[later.index(step, p) for p in range(4)] for step in range(37, 60)] == unbroken[37:]


def test_one_set_among_several_is_what_it_would_be_by_itself(two):
    alone = Data(kind="folder", path=two[0], crop="centre", resolution=8)
    one, other = batches(alone), batches(data(two[:1]))
    for step in range(5):
        a, b = one(step, range(4)), other(step, range(4))
        assert torch.equal(a.pictures, b.pictures) and a.captions == b.captions


def test_each_set_has_its_own_crop_and_mirroring(tmp_path):
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (8, 0, 16, 16))
    for name in ("still", "mirrored"):
        (tmp_path / name).mkdir()
        half.save(tmp_path / name / "0.png")
    settings = data([str(tmp_path / "still"), str(tmp_path / "mirrored")], {"caption": "still"},
                    {"caption": "mirrored", "flip": True, "crop": "none"}, resolution=16)
    left = {"still": set(), "mirrored": set()}
    made = batches(settings, 2)
    for step in range(12):
        batch = made(step, range(2))
        for caption, picture in zip(batch.captions, batch.pictures, strict=True):
            left[caption].add(int(picture[0, 0, 0]))
    assert left == {"still": {0}, "mirrored": {0, 255}}


def test_a_prior_set_has_its_own_crop_and_its_share_of_a_batch(tmp_path):
    subject, square = folder(tmp_path, "subject", 3, (40, 20)), folder(tmp_path, "class", 2, (24, 24))
    settings = data([subject, square], {"caption": "sks"}, {"caption": "a dog", "crop": "none", "prior": True,
                                                            "loss_weight": 0.25}, prior_share=0.5)
    batch = batches(settings)(0, range(4))
    assert batch.captions == ["sks", "a dog"] * 2 and batch.prior.tolist() == [False, True] * 2
    assert batch.weights.tolist() == [1, 0.25, 1, 0.25]
    assert batch.boxes[0].tolist() == [0, 10, 20, 30] and batch.boxes[1].tolist() == [0, 0, 24, 24]


def test_the_loss_of_a_set_counts_as_its_weight_says(two, tmp_path):
    from pixstack.trainer.distributed.ddp import mean

    batch = batches(data(two, {}, {"loss_weight": 3.0}), 7)(0, range(7))
    losses = torch.arange(7.0)
    expected = sum(n * (3 if caption == "one of few" else 1) for n, caption in enumerate(batch.captions)) / 7
    assert mean(losses, batch) == pytest.approx(expected)
    assert mean(losses, batches(data(two))(0, range(7))) == losses.mean()


def class_folders(root, **counts):
    for name, count in counts.items():
        folder(root, name, count)
    return str(root)


def test_balanced_classes_are_shown_equally_often(tmp_path):
    settings = Data(path=class_folders(tmp_path, ant=1, bee=4, cat=7), crop="centre", resolution=8,
                    balance_classes=True)
    made = batches(settings, 4, need="classes")
    found = Counter(item.label for item in shown(made, 300))
    assert all(abs(count - 400) <= 4 for count in found.values()) and len(found) == 3


def test_sets_of_one_class_name_have_one_class(tmp_path):
    paths = [class_folders(tmp_path / "a", ant=1, bee=2), class_folders(tmp_path / "b", bee=1, cat=1)]
    found = loader.read(data(paths, {"kind": "classes"}, {"kind": "classes"}), "classes")
    assert found.classes == ["ant", "bee", "cat"] and [i.label for i in found.train] == [0, 1, 1, 1, 2]


def test_every_problem_of_every_set_is_named_at_once(tmp_path):
    paths = [folder(tmp_path, "a", 2), folder(tmp_path, "b", 1, (16, 16)), str(tmp_path / "empty"),
             class_folders(tmp_path / "d", ant=1)]
    (tmp_path / "empty").mkdir()
    settings = data(paths, {"crop": "none"}, {}, {}, {"kind": "classes"})
    with pytest.raises(ValueError) as caught:
        loader.read(settings, "classes")
    said = str(caught.value)
    assert "data.sets.1: 2 pictures have no class" in said and "data.sets.2: 1 pictures have no class" in said
    assert "data.sets.1: 2 pictures are not square" in said and "data.sets.4" not in said
    assert f"data.sets.3: {tmp_path / 'empty'} holds no training pictures" in said


def test_all_wrong_lines_of_a_list_are_named_at_once(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    path.write_text(path.read_text() + '{oops\n{"caption": "no file"}\n{"file": "a.png", "split": "some"}\n')
    with pytest.raises(ValueError) as caught:
        loader.read(Data(path=str(path)), "captions")
    assert "3 entries are wrong" in str(caught.value)
    assert all(f"line {n}: " in str(caught.value) for n in (13, 14, 15))


def settings_of(two, tmp_path, *words, **more):
    raw = {**tiny_run.SETTINGS, "out": str(tmp_path / "run"),
           "data": {"kind": "folder", "resolution": 16, "crop": "centre", "sets": [{"path": p} for p in two]}, **more}
    return check.parse(raw, words)


def test_the_command_line_changes_a_setting_of_one_set(two, tmp_path):
    made = settings_of(two, tmp_path, "data.sets.2.repeats=3", "data.sets.2.crop=random", "data.flip=true").data
    assert [(s.repeats, s.crop, s.flip) for s in made.sets] == [(1, "centre", True), (3, "random", True)]
    sets_of_words = [f"data.sets.{n}.path={json.dumps(path)}" for n, path in enumerate(two, 1)]
    raw = {**tiny_run.SETTINGS, "data": {"resolution": 16}}
    assert [s.path for s in check.parse(raw, sets_of_words).data.sets] == two


@pytest.mark.parametrize("word, part", [
    ("data.sets.2.path=nowhere", "data.sets.2.path='nowhere': there is no such file or folder"),
    ("data.sets.2.crop=middle", "data.sets.2.crop='middle' is none of"),
    ("data.sets.2.repeat=3", "data.sets.2.repeat is not a setting; did you mean repeats"),
    ("data.sets.2.repeats=0", "data.sets.2.repeats=0 must be at least 1"),
    ("data.sets.2.weight=2.0", "data.sets.1.weight: there is none, and others have a weight"),
    ("data.sets.4.path=x", "there is no data.sets.4, the array has 2"),
    ("data.path=x", "data.path='x' is for a single set, and data.sets are several"),
    ("data.sets.1=x", "data.sets.1 is a section"), ("data.sets.first=x", "data.sets is an array"),
    ("data.sets.1.name=a/b", "data.sets.1.name='a/b' has other signs"),
    ("data.sets.1.prior_count=3", "data.sets.1.prior_count=3 is for a set of class pictures"),
])
def test_a_setting_of_a_set_that_cannot_work_is_refused(two, tmp_path, word, part):
    with pytest.raises(ValueError) as caught:
        settings_of(two, tmp_path, word)
    assert part in str(caught.value)


def test_sets_that_are_all_prior_are_refused(two, tmp_path):
    with pytest.raises(ValueError, match="none has pictures to learn"):
        settings_of(two, tmp_path, "data.sets.1.prior=true", "data.sets.2.prior=true")


def test_a_run_trains_on_several_sets_and_goes_on_to_the_bit(two, tmp_path):
    words = ["steps=4", "batch_size=2", "data.sets.2.repeats=2", "data.sets.2.loss_weight=0.5"]
    whole, _ = tiny_run.train(settings_of(two, tmp_path / "whole", *words))
    broken = settings_of(two, tmp_path / "broken", *words)
    tiny_run.train(broken, lambda run, step: setattr(run, "stop", step == 2))
    later, _ = tiny_run.train(broken)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), later.parameters(), strict=True))
    with pytest.raises(ValueError, match="data.sets.2.repeats was 2, now 3"):
        tiny_run.train(settings_of(two, tmp_path / "broken", *words, "data.sets.2.repeats=3"))
    moved = tmp_path / "elsewhere"
    (tmp_path / "few").rename(moved)
    tiny_run.train(settings_of([two[0], str(moved)], tmp_path / "broken", *words))


def test_validation_says_the_loss_of_each_set(two, tmp_path):
    words = [f"data.sets.{n}.held_out_path={json.dumps(path)}" for n, path in enumerate(two, 1)]
    made = settings_of(two, tmp_path, *words, "data.sets.2.name=rare", "steps=2", "validation.every=2",
                       "validation.items=4", "batch_size=2")
    _, run = tiny_run.train(made)
    last = json.loads((made.folder / "log.jsonl").read_text().splitlines()[-1])
    each = [last["validation_loss_set1"], last["validation_loss_rare"]]
    assert last["validation_loss"] == pytest.approx(sum(each) / 2, rel=1e-4)  # two pictures of each
    positions = [p for batch in run.held_out for p in batch.positions]
    assert positions == [0, 1, 2, 3] and sum(len(b.items) for b in run.held_out_sets["rare"]) == 2


def test_validation_of_one_set_takes_its_first_pictures(two):
    found = loader.read(Data(kind="folder", path=two[0], held_out_path=two[0]), "captions")
    assert sets.taken(found.held_out, 3) == found.held_out[:3]


def test_the_counts_of_each_set_are_said(two, tmp_path):
    made = data(two, {"name": "dogs"}, {"repeats": 5, "prior": False})
    lines = doctor.examine(made, "captions").lines()
    assert "data.sets.1 dogs: 5 pictures; 33% of what is shown" in lines
    assert "data.sets.2: 2 pictures, 5 times an epoch; 67% of what is shown" in lines


def test_a_run_of_one_set_validates_under_the_names_it_had(two, tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    made = tiny_run.settings(path, tmp_path / "run", "validation.every=6")
    run = Run(made, Accelerator(cpu=True), build.collection(made).held_out)
    assert list(run.held_out_sets) == ["set1"] and [len(b.items) for b in run.held_out] == [4]


class Colours:
    """An encoder of pictures that says their pixels."""

    name, of = "colours", ""

    def __init__(self, root):
        self.store = Store(root, "colours", {"version": 1})

    def encode(self, pixels, device):
        return {"pixels": pixels.float()}


def test_the_cache_has_each_set_by_its_own_crop_and_mirroring(tmp_path):
    half = Image.new("RGB", (24, 16))
    half.paste((255, 255, 255), (9, 0, 24, 16))
    for name, picture in (("wide", half), ("square", half.crop((4, 0, 20, 16)))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
    settings = data([str(tmp_path / "wide"), str(tmp_path / "square")], {"flip": True}, {"crop": "none"},
                    caption="a", resolution=16)
    settings = replace(settings, sets=[replace(one, caption="a") for one in settings.sets])
    found, encoder, said = loader.read(settings, "captions").train, Colours(tmp_path / "cache"), []
    config = Config(data=settings, cache=Cache(folder=str(tmp_path / "cache")))
    assert cache.fill(found, settings, [encoder], tmp_path / "cache", "cpu") == 3  # one of them mirrored too
    load = cache.loader(config, [encoder], found, settings, said.append)
    assert not said
    plain, cached = loader.Batches(found, settings, 0, 2), loader.Batches(found, settings, 0, 2, load)
    for step in range(6):
        assert torch.equal(cached(step, range(2)).features["colours.pixels"], plain(step, range(2)).pictures.float())
