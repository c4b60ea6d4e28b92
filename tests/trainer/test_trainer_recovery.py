"""What happens to a run that something goes wrong with: damaged checkpoints, errors between steps, two processes in one
folder, signals."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_recipes
import tiny_run
import torch
from accelerate import Accelerator
from PIL import Image
from pixstack.models_impl import files, state_dict
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader
from pixstack.trainer.recipes.pixelflow import recipe as pixelflow
from pixstack.trainer.training import checkpoints
from pixstack.trainer.training.divergence import Divergence
from pixstack.trainer.training.run import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set")


def weights(folder: Path, step: int) -> dict:
    read = checkpoints.read_tensors(folder / f"checkpoints/{step:08d}/model.safetensors")
    return {key: value.clone() for key, value in read.items()}  # what is read stays the file's


def steps(folder: Path) -> list[int]:
    return [int(one.name) for one in checkpoints.checkpoints(folder)]


def spoil(file: Path):
    """Other values, in a file that can be read as before."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)


def test_a_checkpoint_with_other_bytes_is_named_and_the_one_before_it_taken(path, tmp_path, capsys):
    settings = tiny_run.settings(path, tmp_path / "run", "save_every=2", steps=6)
    tiny_run.train(settings)
    right = weights(tmp_path / "run", 6)
    spoil(tmp_path / "run/checkpoints/00000006/model.safetensors")
    assert steps(tmp_path / "run") == [2, 4, 6]  # by its header it is whole
    tiny_run.train(settings)
    assert "00000006 is damaged (model.safetensors has other bytes than were written)" in capsys.readouterr().err
    again = weights(tmp_path / "run", 6)
    assert all(torch.equal(again[key], value) for key, value in right.items())


def test_a_checkpoint_of_other_sizes_is_named_by_the_first_of_them():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"of another model: weight is \[2, 4\] in it, and \[2, 3\] by the run's"):
        checkpoints.restore_module(module, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


@pytest.mark.parametrize("state", ["{}", '{"step": 4}', '{"step": 6, "sha256": 5}', "null"])
def test_a_checkpoint_whose_state_is_not_its_own_counts_as_missing(path, tmp_path, capsys, state):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=3", steps=6))
    checkpoints.is_whole.cache_clear()
    (tmp_path / "run/checkpoints/00000006/state.json").write_text(state)
    assert steps(tmp_path / "run") == [3]
    assert "00000006 is not complete" in capsys.readouterr().err


@pytest.mark.parametrize("file, content", [("tokenizer.json", "{"), ("tokenizer.json", ""), ("facts.json", "{}"),
                                           ("facts.json", "null")])
def test_a_broken_file_of_a_run_is_named_by_the_commands_that_read_it(path, tmp_path, file, content):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=2", steps=2))
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    said = str(caught.value.code)
    assert said.startswith("error: ") and file in said and said.endswith(".") and not (tmp_path / "out").exists()


def test_a_run_goes_on_from_the_step_that_is_asked_for(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", "save_every=2")
    tiny_run.train(settings)
    right = weights(tmp_path / "run", 6)
    seen = []
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=2", "resume_from=2"),
                   lambda run, step: seen.append(step))
    assert seen == [3, 4, 5, 6] and steps(tmp_path / "run") == [2, 4, 6]
    kept = sorted(one.name for one in (tmp_path / "run/checkpoints").glob("*.before"))
    assert kept == ["00000004.before", "00000006.before"]
    assert all(torch.equal(weights(tmp_path / "run", 6)[key], value) for key, value in right.items())


@pytest.mark.parametrize("wanted, words", [
    (3, "no whole checkpoint of that step. There are: 2, 4, 6"), (4, "is damaged"),
])
def test_a_step_that_cannot_be_gone_on_from_is_refused(path, tmp_path, wanted, words):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=2"))
    spoil(tmp_path / "run/checkpoints/00000004/model.safetensors")
    with pytest.raises(ValueError, match=words):
        tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=2", f"resume_from={wanted}"))
    assert steps(tmp_path / "run") == [2, 4, 6]


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_is_taken(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", steps=3)
    tiny_run.train(settings)
    state = tmp_path / "run/checkpoints/00000003/state.json"
    state.write_text(json.dumps({"step": json.loads(state.read_text())["step"]}))
    seen = []
    longer = tiny_run.settings(path, tmp_path / "run", steps=4, resume="changed")
    tiny_run.train(longer, lambda run, step: seen.append(step))
    assert seen == [4]


class Failing:
    """Batches of which one cannot be loaded."""

    def __init__(self, batches, at: int, error: Exception):
        self.batches, self.items, self.at, self.error = batches, batches.items, at, error

    def __call__(self, step, *given, **more):
        if step == self.at:
            raise self.error
        return self.batches(step, *given, **more)


@pytest.mark.parametrize("error", [ValueError("a.png is broken."), OSError(28, "No space left on device")])
def test_a_run_that_ends_by_an_error_saves_its_step_first(path, tmp_path, monkeypatch, error, capsys):
    tiny_run.train(tiny_run.settings(path, tmp_path / "unbroken"))
    made = loader.Batches
    with monkeypatch.context() as patched:
        patched.setattr(loader, "Batches", lambda *given: Failing(made(*given), 4, error))
        with pytest.raises(type(error), match="broken|No space"):
            tiny_run.train(tiny_run.settings(path, tmp_path / "run"))
    assert steps(tmp_path / "run") == [3, 4] and "Step 4 was saved before the run ends" in capsys.readouterr().err
    tiny_run.train(tiny_run.settings(path, tmp_path / "run"))
    right, found = weights(tmp_path / "unbroken", 6), weights(tmp_path / "run", 6)
    assert all(torch.equal(found[key], value) for key, value in right.items())


def test_a_run_whose_gradients_are_no_numbers_keeps_its_last_good_step(path, tmp_path):
    def spoil_weights(run, step):
        if step == 4:
            next(p for p in spoilt[0].parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))

    spoilt = []
    build = tiny_run.build.recipe
    settings = tiny_run.settings(path, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_run.build, "recipe", lambda *given: spoilt.append(build(*given)) or spoilt[0])
        with pytest.raises(FloatingPointError, match="gradient norm is nan"):
            tiny_run.train(settings, spoil_weights)
    assert steps(tmp_path / "run") == [3, 4]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run", 4).values())


def test_a_second_process_in_a_run_folder_is_refused(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run")
    with closing(Run(settings, Accelerator(cpu=True))) as first:
        first.open()
        for _ in range(2):  # the first that is refused leaves the lock where it is
            with pytest.raises(ValueError, match="Another process trains in .*run"):
                tiny_run.train(settings)
    tiny_run.train(settings)
    assert not [*(tmp_path / "run").glob("*.lock")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_its_number_and_the_same_command_goes_on(path, tmp_path, number):
    recipe = tiny_run.toml(tmp_path, path, tmp_path / "run", text={})  # transformers takes long to import
    command = [sys.executable, "-m", "trainer", "train", str(recipe), "steps=4000", "save_every=4000"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/log.jsonl").exists():
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    started.send_signal(number)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 128 + number, said
    assert "stopped; the same command goes on from there." in said
    (stopped,) = steps(tmp_path / "run")
    cli.main([*command[3:-2], f"steps={stopped + 1}", "save_every=4000", "resume=changed"])
    assert steps(tmp_path / "run") == [stopped, stopped + 1]


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(path, tmp_path):
    """SIGKILL while it trains and saves at every step; the newest checkpoint is whole, and leads to the same end."""
    words = ("steps=80", "save_every=1", "ema.decay=0.95")
    tiny_run.train(tiny_run.settings(path, tmp_path / "unbroken", *words, text={}))
    recipe = tiny_run.toml(tmp_path, path, tmp_path / "broken", text={})
    command = [sys.executable, "-m", "trainer", "train", str(recipe), *words]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(steps(tmp_path / "broken")) < 2:
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert 2 <= steps(tmp_path / "broken")[-1] < 80
    tiny_run.train(tiny_run.settings(path, tmp_path / "broken", *words, text={}))
    for file in ("model", "ema", "optimizer"):
        one, other = (checkpoints.read_tensors(tmp_path / name / f"checkpoints/00000080/{file}.safetensors")
                      for name in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_is_flushed_may_be_written_as_windows_wants_it(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    seen = []
    mode = lambda number: fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE  # noqa: E731
    monkeypatch.setattr(files.os, "fsync", lambda number: seen.append(mode(number)))
    (tmp_path / "a").write_text("a")
    files.flush(tmp_path / "a")
    assert seen == [os.O_RDWR] and (tmp_path / "a").read_text() == "a"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Settings of a LoRA over a base, which stands in a file."""
    folder = tmp_path_factory.mktemp("lora")
    made = tiny_recipes.every(folder / "files", folder / "runs")["pixart_lora"]
    return lambda out: replace(made, out=str(out))


def test_a_lora_does_not_go_on_over_another_base(tmp_path, lora):
    settings = replace(lora(tmp_path / "out"), save_every=1)
    tiny_run.train(settings)
    base = Path(settings.init_from)
    moved = base.rename(tmp_path / "moved.safetensors")
    tiny_run.train(replace(settings, init_from=str(moved)))  # the same weights, elsewhere
    tensors, metadata = state_dict.read_file(moved)
    tensors = {key: value.clone() for key, value in tensors.items()}
    next(value for key, value in sorted(tensors.items()) if value.ndim == 2).view(-1)[:100] += 1
    state_dict.write_file(base, tensors, metadata)
    with pytest.raises(ValueError, match="a run over other weights than those of init_from.*resume=changed"):
        tiny_run.train(settings)
    tiny_run.train(replace(settings, resume="changed"))


def test_changed_pixels_under_the_same_names_are_noticed(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    settings = tiny_run.settings(path, tmp_path / "run")
    _, run = tiny_run.train(settings)
    items = tiny_run.build.collection(settings)
    assert tiny_run.build.other_data(run.folder, items) == ""
    first = items.train[0].file
    Image.new("RGB", Image.open(first).size, "pink").save(first)
    assert "other captions or pixels" in tiny_run.build.other_data(run.folder, items)


@pytest.mark.parametrize("words", [(), ("data.buckets=area", "data.bucket_multiple=8", "data.crop=centre")])
def test_a_broken_picture_is_left_out_where_that_is_allowed(tmp_path, capsys, words):
    path = tiny_run.pictures(tmp_path / "set")
    words = (*words, "validation.every=2", "save_every=3")
    first = tiny_run.build.collection(tiny_run.settings(path, tmp_path / "run", *words)).train[0].file
    first.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=first.name):
        tiny_run.train(tiny_run.settings(path, tmp_path / "strict", *words, "steps=30"))
    allowed = (*words, "data.skip_broken=true")
    tiny_run.train(tiny_run.settings(path, tmp_path / "unbroken", *allowed))
    said = capsys.readouterr().err
    assert first.name in said and "left out" in said
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *allowed), lambda run, step: step == 4 and os.kill(
        os.getpid(), signal.SIGINT))
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *allowed))
    right, found = weights(tmp_path / "unbroken", 6), weights(tmp_path / "run", 6)
    assert all(torch.equal(found[key], value) for key, value in right.items())


def test_a_data_set_of_broken_pictures_is_refused(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    for file in (tmp_path / "set/images").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="None of the .* pictures .*can be read"):
        tiny_run.train(tiny_run.settings(path, tmp_path / "run", "data.skip_broken=true"))


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_from_before(path, tmp_path, monkeypatch):
    words = ("save_every=5", "keep=1", "log_every=1", "validation.every=0", "samples.every=0", "steps=60")
    settings, forward = tiny_run.settings(path, tmp_path / "run", *words), pixelflow.Recipe.forward
    with monkeypatch.context() as patched:
        patched.setattr(pixelflow.Recipe, "forward", lambda self, batch: forward(self, batch) * (
            1e4 if batch.step >= 24 else 1))
        with pytest.raises(FloatingPointError) as raised:
            tiny_run.train(settings)
    for part in ("step 29: the loss is", "since step 24 the run diverges", "resume_from=20 resume=changed"):
        assert part in str(raised.value)
    assert steps(tmp_path / "run") == [20, 25]
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *words[:-1], "steps=30", "resume=changed",
                                     "resume_from=20"))
    assert steps(tmp_path / "run") == [30]


def test_a_loss_diverges_by_several_lines_above_its_own_past():
    def stopped_at(values, factor=5.0):
        past = Divergence(factor)
        return next((i for i, value in enumerate(values) if past.see(i, value, 1.0)), None)

    noisy = [0.1, 0.3, 0.2, 0.05] * 30
    assert stopped_at(noisy) is None
    assert stopped_at([*noisy, 3.0, 3.0, 3.0, 3.0, *noisy]) is None  # four hard batches
    assert stopped_at([*noisy, *[3.0] * 5]) == len(noisy) + 4
    assert stopped_at([*noisy, *[float("nan")] * 5]) == len(noisy) + 4
    assert stopped_at([*noisy, *[3.0] * 5], factor=0) is None
    assert stopped_at([0.1] * 10 + [9.0] * 9) is None  # too little of a past
    assert stopped_at([100.0 * 0.99**i for i in range(600)]) is None
