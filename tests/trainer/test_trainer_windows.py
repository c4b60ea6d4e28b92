"""The trainer where Windows' rules for files hold (tests/support/windows.py)."""
import json
import sys

import pytest
import tiny_run
import torch
import transformers
import windows
from pixstack.models_impl import files, state_dict
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import doctor
from pixstack.trainer.export import exporting
from pixstack.trainer.training import checkpoints, loop

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it imitates Windows as Linux can")
NAME = "Pr\u00fcfung \u4e94 \U0001f600"  # in no single code page


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe file whose data set and captions have names in several scripts."""
    folder = tmp_path / NAME
    folder.mkdir()
    path = tiny_run.pictures(folder / "set")
    path.write_text(path.read_text(encoding="utf-8").replace("red square", f"red square {NAME}"), encoding="utf-8")
    assert [transformers.T5EncoderModel, exporting, doctor, loop]  # libraries ask for much when they are imported
    windows.pretend(monkeypatch)
    return tiny_run.toml(folder, path, folder / "run")


WORDS = ("save_every=2", "keep=1", "log_every=1", "validation.every=2", "samples.every=2", "samples.prompts=['red']")


def test_a_run_trains_goes_on_and_forgets_old_checkpoints(recipe):
    run = recipe.parent / "run"
    for steps in (4, 6):
        cli.main(["train", str(recipe), *WORDS, f"steps={steps}", "resume=changed"])
        assert [int(one.name) for one in checkpoints.checkpoints(run)] == [steps]
    cli.main(["train", str(recipe), *WORDS, "keep=2", "steps=8", "resume=changed"])
    cli.main(["train", str(recipe), *WORDS, "keep=2", "steps=8", "resume=changed", "resume_from=6"])
    assert [entry["step"] for entry in checkpoints.read_log(run) if "loss" in entry] == [*range(1, 9)]
    cli.main(["export", str(run), "--card"])
    assert [*(run / "export/diffusion_models").glob("*.safetensors")]
    cli.main(["doctor", str(recipe.parent / "set/data.jsonl")])


def test_no_checkpoint_stays_open_after_a_run_went_on_from_it(recipe):
    run = recipe.parent / "run"
    for steps in (2, 4):
        cli.main(["train", str(recipe), *WORDS, f"steps={steps}", "resume=changed"])
    assert not [one for one in windows.in_use() if "checkpoints" in one and str(run) in one]


def test_a_file_that_another_program_reads_for_a_moment_is_replaced_when_it_is_free(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    files.write_whole(file, "{}")
    windows.pretend(monkeypatch)
    reader, waits = open(file, encoding="utf-8"), []

    def wait(seconds):
        waits.append(seconds)
        reader.close()

    monkeypatch.setattr("time.sleep", wait)
    files.write_whole(file, json.dumps({"a": 1}))
    assert waits and json.loads(file.read_text()) == {"a": 1}


def test_a_file_that_stays_in_use_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    files.write_whole(file, "{}")
    windows.pretend(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with open(file, encoding="utf-8"), pytest.raises(OSError, match="model.safetensors is in use by another program"):
        files.write_whole(file, "[]")
    assert file.read_text() == "{}" and [*tmp_path.iterdir()] == [file]


def test_weights_that_were_read_can_be_written_again_under_their_name(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    state_dict.write_file(file, {"a": torch.ones(3)})
    windows.pretend(monkeypatch)
    tensors, _ = state_dict.read_file(file)
    doubled = {name: value * 2 for name, value in tensors.items()}
    del tensors
    state_dict.write_file(file, doubled)
    assert state_dict.read_file(file)[0]["a"].tolist() == [2, 2, 2]
