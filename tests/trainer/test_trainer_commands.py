"""python -m trainer: what its commands write and say."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.trainer.cli import main as cli
from pixstack.trainer.export import exporting
from pixstack.trainer.training import checkpoints

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 20 steps."""
    folder = tmp_path_factory.mktemp("trained")
    settings = tiny_run.settings(tiny_run.pictures(folder / "set"), folder / "run", "steps=20", "save_every=20",
                                 "samples.prompts=[\"red card\"]", "samples.steps=2")
    tiny_run.train(settings)
    return folder / "run"


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(w) for w in words])
    return f"{caught.value.code}{capsys.readouterr().err}"


def test_a_dry_run_says_what_would_happen(tmp_path, capsys):
    path = tiny_run.pictures(tmp_path / "set")
    cli.main(["train", str(tiny_run.toml(tmp_path, path, tmp_path / "run")), "--dry-run", "micro_batch_size=3"])
    output = capsys.readouterr().out
    for part in ("8 training pictures, 4 held out", "learn", "stage 0: 3 pictures of 8x8 pixels, 4 tokens each",
                 "stage 1: 3 pictures of 16x16", "6 of 6 pictures = 36 pictures, 4.5 epochs", "2 pass(es) of 3",
                 "memory     about", "first batch", "_card.png"):
        assert part in output, part
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_parameters_that_a_run_has(trained, tmp_path, capsys):
    config = json.loads((trained / "config.json").read_text())
    cli.main(["train", str(tiny_run.toml(tmp_path, config["data"]["path"], tmp_path / "run")), "--dry-run"])
    tensors = checkpoints.read_tensors(trained / "checkpoints/00000020/ema.safetensors")
    assert f"parameters {sum(t.numel() for t in tensors.values()):,} learn" in capsys.readouterr().out


def test_what_was_trained_is_what_is_exported(trained, tmp_path):
    image, text = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    assert (image.name, text.name) == ("tiny_16.safetensors", "tiny_t5.safetensors")
    shape, tensors = checkpoint.read(*state_dict.read_file(image))
    assert (shape.heads, shape.head_dim, shape.num_stages, shape.resolution, shape.context_dim) == (2, 8, 2, 16, 16)
    average = checkpoints.read_tensors(trained / "checkpoints/00000020/ema.safetensors")
    for key, value in tensors.items():
        assert torch.equal(value, average[f"diffusion.{key}"]), key


def test_the_word_table_that_is_exported_is_the_average(trained, tmp_path):
    _, text = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    average = checkpoints.read_tensors(trained / "checkpoints/00000020/ema.safetensors")["text.t5.shared.weight"]
    raw = checkpoints.read_tensors(trained / "checkpoints/00000020/model.safetensors")["text.t5.shared.weight"]
    assert torch.equal(state_dict.read_file(text)[0]["shared.weight"], average) and not torch.equal(raw, average)


def test_an_average_of_another_model_is_refused(trained, tmp_path):
    recipe, _, _ = exporting.open_run(trained)
    checkpoints.write_tensors(tmp_path / "ema.safetensors", {"diffusion.gone": torch.zeros(1)})
    with pytest.raises(ValueError, match="of another model: .*diffusion.gone"):
        exporting.restore_average(recipe, tmp_path / "ema.safetensors")


def test_an_exported_text_encoder_reads_as_the_trained_one(trained, tmp_path):
    from pixstack.models_impl.text.t5 import TextEncoder

    _, text = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    recipe, _, _ = exporting.open_run(trained)
    ids, mask = recipe.text.tokenize(["red card", ""])
    opened = TextEncoder.read(text).eval()
    assert torch.equal(opened.tokenize(["red card", ""])[0], ids)
    with torch.no_grad():
        torch.testing.assert_close(opened(ids, mask), recipe.text(ids, mask))


def test_exported_weights_draw_in_comfyui(trained, host):
    image, text = exporting.export(trained, Path(host.models), "trained")
    graph = json.loads((ROOT / "tests/workflows/prompts/pixelflow_text_to_image.json").read_text())
    wanted = {"model_name": image.name, "encoder_name": text.name, "width": 16, "height": 16, "batch_size": 2,
              "steps": 1}
    for node in graph.values():
        node["inputs"].update({k: v for k, v in wanted.items() if k in node["inputs"]})
    done = host.run(graph)
    assert done.error is None and [Image.open(p).size for p in done.images] == [(64, 64)] * 2


def test_a_run_draws_its_prompts_on_a_sheet(trained, tmp_path):
    cli.main(["sample", str(trained), "red card", "blue square", "--out", str(tmp_path / "s.png"), "--steps", "1"])
    assert Image.open(tmp_path / "s.png").size == (2 * 16 + 2, 16)


def test_a_run_draws_sizes_that_are_not_square(trained, tmp_path):
    cli.main(["sample", str(trained), "red card", "--out", str(tmp_path), "--steps", "1", "--width", "24"])
    assert Image.open(tmp_path / "000000.png").size == (24, 16)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(trained, tmp_path, capsys):
    output = refusal(capsys, "sample", trained, "x", "--out", tmp_path, "--step", 7)
    assert "no checkpoint of step 7; there are: 20" in output


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert "is not a run folder" in refusal(capsys, "export", tmp_path, "--out", tmp_path)


def test_wrong_settings_end_the_command_with_all_of_them(tmp_path, capsys):
    file = tiny_run.toml(tmp_path, tiny_run.pictures(tmp_path / "set"), tmp_path / "run")
    output = refusal(capsys, "train", file, "stepz=1", "optimizer.learning_rate=7")
    assert "did you mean steps" in output and "optimizer.learning_rate=7" in output


def test_a_word_that_is_no_setting_is_refused(capsys):
    assert "not understood: --fast" in refusal(capsys, "train", "recipes/pixelflow/pixelflow_emoji.toml", "--fast")


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path, capsys):
    path = tiny_run.pictures(tmp_path / "set")
    words = ["train", str(tiny_run.toml(tmp_path, path, tmp_path / "run")), "steps=2"]
    cli.main(words)
    cli.main([*words, "steps=3", "resume=changed"])
    assert "the data are not those" not in capsys.readouterr().out
    entries = path.read_text().splitlines()
    path.write_text("\n".join(entries[1:]))
    cli.main([*words, "steps=4", "resume=changed"])
    assert "8 training pictures then, 7 now" in capsys.readouterr().out


def test_what_the_system_refuses_is_said_in_a_sentence(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    output = refusal(capsys, "export", trained, "--out", tmp_path / "file")
    assert output.startswith("error: ") and str(tmp_path / "file") in output


def test_a_name_of_any_length_is_not_repeated_whole(trained, tmp_path, capsys):
    assert len(refusal(capsys, "export", trained, "--out", tmp_path / ("x" * 6000))) < 600


def test_a_file_that_the_disk_has_no_room_for_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere/model.safetensors cannot be written"):
        checkpoints.write_tensors(tmp_path / "nowhere/model.safetensors", {"x": torch.zeros(1)})


def test_a_command_that_is_interrupted_ends_without_a_trace(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["settings"], "run", interrupted)
    output = refusal(capsys, "settings")
    assert output.startswith("130") and "stopped" in output and "Traceback" not in output


def test_a_reader_that_has_had_enough_is_no_error():
    command = subprocess.Popen([sys.executable, "-m", "trainer", "settings"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b""
    command.wait()


def test_an_error_while_training_has_a_line_of_its_own(tmp_path, capsys):
    path = tiny_run.toml(tmp_path, tiny_run.pictures(tmp_path / "set"), tmp_path / "run")
    for file in (tmp_path / "set").rglob("*.png"):
        file.write_bytes(b"")
    output = refusal(capsys, "train", path)
    shown = output.split("\n", 1)
    assert "cannot be read as a picture" in shown[0] and output.endswith("\n")


def test_every_setting_is_listed_with_its_default(capsys):
    cli.main(["settings"])
    output = capsys.readouterr().out
    for part in ("batch_size = 64\n    Samples per optimizer step", "[optimizer]\nname = \"adamw\"", "[model]\npreset",
                 "stage_weights = (none)\n    Share of the pictures"):
        assert part in output, part


def test_an_evaluation_says_how_much_chance_would_give(trained, tmp_path, capsys):
    cli.main(["evaluate", str(trained), "--out", str(tmp_path / "card"), "--steps", "1", "--seen", "5"])
    results = json.loads((tmp_path / "card/evaluation.json").read_text())["results"]
    assert (results["train"]["prompts"], results["held_out"]["prompts"]) == (5, 4)
    assert results["held_out"]["chance"]["top1"] == pytest.approx(1 / 12)
    assert {p.name for p in (tmp_path / "card").iterdir()} == {
        "evaluation.json", "train.png", "held_out.png", "prompts.png", "loss.png"}


def launched(tmp_path, *launcher):
    """The weights of two steps in one process, and of the same as the launcher starts it."""
    path = tiny_run.pictures(tmp_path / "set")
    words = ["precision=fp32", "steps=2", "device=auto"]
    tiny_run.train(tiny_run.settings(path, tmp_path / "one", *words, text={}))  # transformers takes long to import
    file = tiny_run.toml(tmp_path, path, tmp_path / "two", text={})
    command = [sys.executable, "-m", *launcher, "-m", "trainer", "train", str(file), *words]
    done = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 2 of 2") == 1, done.stdout  # one run, whatever the number of processes
    return [checkpoints.read_tensors(tmp_path / name / "checkpoints/00000002/model.safetensors")
            for name in ("one", "two")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares processes on the CPU")
@pytest.mark.parametrize("launcher", [
    ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # accelerate starts several processes on GPUs only; this shows that it finds its way into the trainer
    ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
     "--dynamo_backend=no"],
], ids=["two-processes-of-torchrun", "accelerate"])
def test_a_launched_run_trains_what_a_plain_one_trains(tmp_path, launcher):
    plain, other = launched(tmp_path, *launcher)
    for key in plain:
        torch.testing.assert_close(plain[key], other[key], rtol=1e-4, atol=1e-5)
