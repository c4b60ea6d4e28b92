"""Files that steer a run (sample, pause, stop), and checkpoints by the clock and by epochs."""
import threading
import time

import pytest
import tiny_run
import torch
from pixstack.trainer.training import checkpoints, control, validation
from pixstack.trainer.training.run import Run
from test_trainer_run import log, weights

WORDS = ("samples.prompts=[\"red card\"]", "samples.steps=1", "validation.every=2")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def unbroken(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    tiny_run.train(tiny_run.settings(path, folder, *WORDS))
    return folder


def ordering(name, at):
    def interrupt(one, step):
        if step == at:
            (one.folder / name).touch()

    return interrupt


def same(a, b):
    expected, found = weights(a), weights(b)
    return expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_the_file_sample_draws_pictures_after_the_step_and_changes_nothing(path, unbroken, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *WORDS), ordering("sample", 2))
    assert (tmp_path / "run/samples/00000002.png").is_file() and not (tmp_path / "run/sample").exists()
    assert same(unbroken, tmp_path / "run") and log(unbroken) == log(tmp_path / "run")


def test_the_file_stop_saves_and_the_run_goes_on_to_the_bit(path, unbroken, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", *WORDS)
    _, run = tiny_run.train(settings, ordering("stop", 4))
    assert run.ended_by_file and run.stopped_by is None and not (tmp_path / "run/stop").exists()
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "00000004"
    tiny_run.train(settings)
    assert same(unbroken, tmp_path / "run") and log(unbroken) == log(tmp_path / "run")


def test_a_run_waits_for_as_long_as_the_file_pause_is_there(path, unbroken, tmp_path, monkeypatch, capsys):
    looks = []

    def removed(seconds):
        looks.append(control.is_running(tmp_path / "run"))
        if len(looks) == 3:
            (tmp_path / "run/pause").unlink()

    monkeypatch.setattr(time, "sleep", removed)
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *WORDS), ordering("pause", 3))
    assert looks == [True] * 3 and same(unbroken, tmp_path / "run")
    said = capsys.readouterr().out
    assert "Paused after step 3" in said and "Going on" in said


def test_orders_that_were_left_from_before_the_start_are_removed(path, tmp_path, capsys):
    settings = tiny_run.settings(path, tmp_path / "run", "steps=2")
    (tmp_path / "run").mkdir()
    for name in control.ORDERS:
        (tmp_path / "run" / name).touch()
    tiny_run.train(settings)
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "00000002"
    assert not control.given(tmp_path / "run") and capsys.readouterr().err.count("removed, not obeyed") == 3


def test_samples_that_cannot_be_drawn_do_not_end_the_run(path, tmp_path, capsys):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2"), ordering("sample", 1))
    assert "No samples were drawn: samples.prompts" in capsys.readouterr().out
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "00000002"


def test_checkpoints_come_by_epochs(path, tmp_path):  # 8 training pictures in batches of 6
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=0", "save_epochs=1.5", "keep=0"))
    assert [int(p.name) for p in checkpoints.checkpoints(tmp_path / "run")] == [2, 4, 6]


def test_checkpoints_come_by_the_clock(path, tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 20))  # 20 seconds between any two looks
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=0", "save_minutes=1", "keep=0"))
    saved = [int(p.name) for p in checkpoints.checkpoints(tmp_path / "run")]
    assert len(saved) > 1 and saved[-1] == 6


@pytest.mark.parametrize("main", [True, False])
def test_processes_do_together_what_the_main_one_finds_in_the_folder(path, tmp_path, main):
    class OneOfTwo:
        num_processes, is_main_process, device = 2, main, torch.device("cpu")

        def reduce(self, flags, how):
            assert how == "sum" and (main or not flags.any())  # the other one looks into no files
            return flags if main else flags + torch.tensor([float(name == "pause") for name in control.Orders._fields])

    run = Run(tiny_run.settings(path, tmp_path), OneOfTwo())
    (tmp_path / "pause").touch()
    assert run.orders() == control.Orders(pause=True)


def test_a_lock_that_a_killed_process_left_is_held_by_nobody(path, tmp_path):
    (tmp_path / "in_use.lock").touch()
    assert not control.is_running(tmp_path) and not control.is_running(tmp_path / "elsewhere")


def test_a_run_starts_while_others_look_whether_it_is_running(path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/in_use.lock").touch()
    done = threading.Event()

    def look():
        while not done.wait(0.001):
            control.is_running(tmp_path / "run")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=1"))
    finally:
        done.set()
        thread.join()


def test_a_validation_says_how_certain_its_mean_is(unbroken):
    lines = [line for line in log(unbroken) if "validation_loss" in line]
    assert all(0 < line["validation_standard_error"] < line["validation_loss"] for line in lines)
    loss = torch.arange(9.0)
    assert validation.certainty(loss)["standard_error"] == pytest.approx(loss.std().item() / 3)
    assert validation.in_words({"loss": 0.5, "standard_error": 0.01}, 9) == \
        "validation loss 0.5000 ± 0.0196 (95 %), 9 held-out pictures"
    assert validation.certainty(loss[:1]) == {} and "±" not in validation.in_words({"loss": 0.5}, 1)
