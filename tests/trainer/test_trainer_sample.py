"""python -m trainer sample: a picture depends on its number, whoever makes it and how often it is begun."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data.layouts import Item
from pixstack.trainer.evaluation import sample
from pixstack.trainer.export import exporting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_run.train(tiny_run.settings(tiny_run.pictures(folder / "set"), folder / "run", "steps=3", "samples.steps=1"))
    return folder


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    path = tiny_run.pictures(folder / "set")
    settings = tiny_run.settings(path, folder / "run", "steps=2", "samples.steps=1", "ema.decay=0", text={})
    tiny_run.train(settings)
    return folder


def drawn(trained, out, *words):
    cli.main(["sample", str(trained / "run"), *map(str, words), "--out", str(out), "--device", "cpu"])
    return {p.name: p.read_bytes() for p in out.glob("*.png")}


def test_as_many_pictures_are_drawn_as_asked_for_each_another(trained, tmp_path):
    made = drawn(trained, tmp_path / "s", "red card", "blue card", "--count", 5, "--batch", 2)
    assert sorted(made) == [f"{i:06d}.png" for i in range(5)] and len(set(made.values())) == 5


def test_a_picture_does_not_depend_on_how_many_there_are(trained, tmp_path):
    few = drawn(trained, tmp_path / "few", "red card", "--count", 3, "--batch", 2)
    many = drawn(trained, tmp_path / "many", "red card", "--count", 6, "--batch", 2)
    assert few.items() <= many.items()


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("red card\n\nblue square\ngreen card\n")
    alone, two = ([*map(str, ("sample", trained / "run", "--data", tmp_path / "prompts.txt", "--count", 7, "--batch", 2,
                              "--npz", "--out", tmp_path / name, "--device", "cpu"))] for name in ("alone", "two"))
    (tmp_path / "list.json").write_text(json.dumps({"alone": [alone], "jobs": [
        {"environment": {}, "runs": [two], "output": str(tmp_path / "said")}]}))
    done = subprocess.run([sys.executable, ROOT / "tests/support/two_processes.py", tmp_path / "list.json"], cwd=ROOT,
                          timeout=120, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "package"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")} for name in ("alone", "two"))
    assert one == other and len(one) == 7
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("alone", "two")))


def test_what_was_stopped_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    whole = drawn(trained, tmp_path / "whole", "red card", "--count", 6, "--batch", 2)
    for name in ("000001", "000004", "000005"):
        (tmp_path / f"whole/{name}.png").unlink()
    groups = []
    made = sample.made
    monkeypatch.setattr(sample, "made", lambda *given: groups.append(given[-1]) or made(*given))
    assert drawn(trained, tmp_path / "whole", "red card", "--count", 6, "--batch", 2) == whole and groups == [0, 2]


def test_pictures_made_otherwise_are_not_gone_on_with(trained, tmp_path):
    drawn(trained, tmp_path / "s", "red card", "--count", 2)
    drawn(trained, tmp_path / "s", "red card", "--count", 4, "--batch", 2)  # more of the same is well
    with pytest.raises(SystemExit) as stopped:
        drawn(trained, tmp_path / "s", "blue card", "--count", 4, "--batch", 2, "--seed", 5)
    assert "what was ['red card'], now ['blue card']" in str(stopped.value.code)
    assert "seed was 0, now 5" in str(stopped.value.code)
    (tmp_path / "s/samples.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        drawn(trained, tmp_path / "s", "red card")
    assert "holds other pictures already" in str(stopped.value.code)


def test_the_npz_is_what_adm_reads(of_classes, tmp_path):
    drawn(of_classes, tmp_path / "s", "--all-classes", "--count", 9, "--batch", 4, "--npz")
    with np.load(tmp_path / "s.npz") as archive:
        assert archive.files == ["arr_0"]
        pixels = archive["arr_0"]
    assert pixels.shape == (9, 16, 16, 3) and pixels.dtype == np.uint8
    for i in range(9):
        assert np.array_equal(pixels[i], np.asarray(Image.open(tmp_path / f"s/{i:06d}.png")))
    assert json.loads((tmp_path / "s/samples.json").read_text())["what"] == list(range(6))


def test_a_data_set_gives_its_classes_to_a_run_of_classes(of_classes, tmp_path):
    drawn(of_classes, tmp_path / "s", "--data", of_classes / "set/data.jsonl")
    notes = json.loads((tmp_path / "s/samples.json").read_text())
    assert notes["count"] == 12 and notes["what"][:4] == [0, 0, 1, 1]


def test_a_class_that_a_run_does_not_know_is_named(of_classes, tmp_path):
    with pytest.raises(SystemExit, match="knows the classes 0 to 5, not 9"):
        cli.main(["sample", str(of_classes / "run"), "1", "9", "--out", str(tmp_path / "s"), "--device", "cpu"])


def test_classes_have_their_names(of_classes, tmp_path):
    names = json.loads((of_classes / "run/facts.json").read_text())["classes"]
    assert drawn(of_classes, tmp_path / "names", *names[2:4]) == drawn(of_classes, tmp_path / "indices", 2, 3)


def test_an_export_says_what_its_classes_are_called(of_classes, tmp_path):
    (file,) = exporting.export(of_classes / "run", tmp_path, "tiny_classes")
    tensors, metadata = state_dict.read_file(file)
    config, _ = checkpoint.read(tensors, metadata)
    names = json.loads((of_classes / "run/facts.json").read_text())["classes"]
    assert list(checkpoint.class_names(metadata, config)) == names


def test_a_run_of_classes_refuses_prompts(of_classes, tmp_path):
    names = json.loads((of_classes / "run/facts.json").read_text())["classes"]
    with pytest.raises(SystemExit) as stopped:
        drawn(of_classes, tmp_path / "s", names[0] + "x")
    assert "knows classes, not prompts" in str(stopped.value.code)
    assert f"Near it are {names[0]}" in str(stopped.value.code)


class Echo:
    """A recipe that draws its condition."""

    text = object()

    previews = False

    def sample(self, what, height, width, steps, shift, cfg, seed, conditions):
        assert [tuple(c.shape) for c in conditions.values()] == [(len(what), 3, height, width)] * 2
        return conditions["hed"].float() / 127.5 - 1


def test_conditions_come_with_their_item_and_need_no_picture(tmp_path):
    items = []
    for i in range(3):
        for name in ("hed", "canny"):
            Image.new("RGB", (24, 16), (60 * i, 10, 10)).save(tmp_path / f"{name}{i}.png")
        items.append(Item(tmp_path / "gone.png", ("x",), conditions={n: tmp_path / f"{n}{i}.png" for n in
                                                                     ("hed", "canny")}))
    request = sample.Request("run", 1, "ema", ["x"] * 3, 5, 2, 16, 16, 1, 1.0, 1.0, 0, "data", ["hed", "canny"])
    sample.begin(tmp_path / "out", request)
    sample.draw(Echo(), request, items, tmp_path / "out")
    reds = [Image.open(tmp_path / f"out/{i:06d}.png").getpixel((3, 3))[0] for i in range(5)]
    assert reds == [0, 60, 120, 0, 60]


def test_what_a_data_set_lacks_is_named(trained, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"file": "a.png"}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        drawn(trained, tmp_path / "s", "--data", tmp_path / "data.jsonl")
    assert "1 pictures have no caption" in str(stopped.value.code) and "a.png" in str(stopped.value.code)


def test_nothing_to_draw_is_refused(trained, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        drawn(trained, tmp_path / "s")
    assert "give prompts or class indices, or --data" in str(stopped.value.code)


@pytest.mark.parametrize("word", ["--count", "--height", "--width", "--steps"])
def test_none_is_not_taken_for_unsaid(trained, tmp_path, word):
    with pytest.raises(SystemExit) as stopped:
        drawn(trained, tmp_path / "s", "red card", word, 0)
    assert f"{word}=0 must be at least 1" in str(stopped.value.code)


class Rounding:
    """A recipe that draws multiples of 16."""

    previews = False

    def sample(self, what, height, width, steps, shift, cfg, seed):
        return torch.zeros(len(what), 3, height // 16 * 16, width // 16 * 16)


def test_a_size_that_the_model_does_not_draw_is_refused_and_leaves_nothing_in_the_way(tmp_path):
    wrong, right = (sample.Request("run", 1, "ema", ["x"], 1, 1, side, 32, 1, 1.0, 1.0, 0) for side in (40, 32))
    sample.begin(tmp_path / "out", wrong)
    with pytest.raises(ValueError, match="--height=40 --width=32 is no size of this model, which draws 32 and 32"):
        sample.draw(Rounding(), wrong, [], tmp_path / "out")
    sample.begin(tmp_path / "out", right)
    sample.draw(Rounding(), right, [], tmp_path / "out")
    assert Image.open(tmp_path / "out/000000.png").size == (32, 32)


class Pair:
    """A recipe that draws two pictures side by side, as the autoencoder's."""

    previews = False

    def sample(self, what, height, width, steps, shift, cfg, seed):
        return torch.zeros(len(what), 3, height, 2 * width)


def test_the_npz_has_the_size_of_its_pictures(tmp_path):
    request = sample.Request("run", 1, "ema", ["x"], 2, 1, 16, 16, 1, 1.0, 1.0, 0)
    sample.begin(tmp_path / "out", request)
    sample.draw(Pair(), request, [], tmp_path / "out")
    with np.load(sample.pack(tmp_path / "out", request)) as archive:
        assert archive["arr_0"].shape == (2, 16, 32, 3)


def test_a_sheet_shows_all_of_many_groups(trained, tmp_path):
    cli.main(["sample", str(trained / "run"), "red card", "--count", "5", "--batch", "2", "--out",
              str(tmp_path / "s.png"), "--device", "cpu"])
    assert Image.open(tmp_path / "s.png").size == (3 * 18 - 2, 2 * 18 - 2) and not (tmp_path / "s").exists()


def test_pictures_of_several_sizes_are_not_compared(tmp_path):
    for i, size in enumerate(((8, 8), (8, 9))):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    files, notes = sample.opened(tmp_path)
    assert notes == {}
    with pytest.raises(ValueError, match="1.png is 8x9, and .*0.png is 8x8"):
        list(sample.tensors(files, 2))


def test_an_npz_and_its_folder_are_the_same_pictures(tmp_path):
    pixels = torch.randint(0, 256, (3, 6, 5, 3), dtype=torch.uint8)
    (tmp_path / "s").mkdir()
    for i, one in enumerate(pixels):
        Image.fromarray(one.numpy()).save(tmp_path / f"s/{i:06d}.png")
    request = sample.Request("run", 1, "ema", ["x"], 3, 1, 6, 5, 1, 1.0, 1.0, 0)
    packed = sample.pack(tmp_path / "s", request)
    for where in (tmp_path / "s", packed):
        assert torch.equal(torch.cat(list(sample.tensors(sample.opened(where)[0], 2))), pixels.permute(0, 3, 1, 2))
