import json
import os
import signal
from importlib.util import find_spec

import pytest
import tiny_run
import torch
from pixstack.trainer.export import exporting
from pixstack.trainer.features import tokenizer
from pixstack.trainer.training import checkpoints
from pixstack.trainer.training.ema import EmaWeights


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set")


def weights(folder, step=6):
    at = folder / "checkpoints" / f"{step:08d}"
    return {f"{file}.{k}": v for file in ("model", "ema", "optimizer")
            for k, v in checkpoints.read_tensors(at / f"{file}.safetensors").items()}


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.split("_")[0] not in ("images", "memory")} for line in lines]


def interrupt(one, step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("words", [
    ("precision=bf16",), ("optimizer.name=muon", "micro_batch_size=3", "recipe.packing=packed"),
    ("optimizer.name=adamw8bit", "text.hidden=300"),  # with matrices large enough for 8 bits
], ids=["adamw-bf16", "muon-accumulated-packed", "adamw8bit"])
def test_a_resumed_run_repeats_the_unbroken_run(path, tmp_path, words):
    words = (*words, "data.tag_share=0.5", "validation.every=2", "save_every=5")
    unbroken = tiny_run.settings(path, tmp_path / "unbroken", *words)
    tiny_run.train(unbroken)
    broken = tiny_run.settings(path, tmp_path / "broken", *words)
    tiny_run.train(broken, interrupt)
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "broken")] == ["00000004"]  # Ctrl-C saved where it was
    tiny_run.train(broken)
    expected, found = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert log(tmp_path / "unbroken") == log(tmp_path / "broken")


def test_micro_batches_do_not_change_the_training(path, tmp_path):
    for name, micro in (("whole", 6), ("parts", 2)):
        tiny_run.train(tiny_run.settings(path, tmp_path / name, "precision=fp32", f"micro_batch_size={micro}"))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=1e-3, atol=1e-4)


def test_a_line_that_was_half_written_is_forgotten(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run")
    tiny_run.train(settings, interrupt)
    with open(tmp_path / "run/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    tiny_run.train(settings)
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_training_lowers_the_loss(path, tmp_path):
    words = "steps=80", "optimizer.learning_rate=1e-2", "save_every=80"
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", *words))
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(path, tmp_path, monkeypatch):
    settings = tiny_run.settings(path, tmp_path / "run")
    replace = os.replace

    def die(source, target):
        if "00000006" in str(target):
            raise SystemExit("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(SystemExit):
        tiny_run.train(settings)
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["00000003"]
    monkeypatch.undo()
    tiny_run.train(settings)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"00000003", "00000006"}


def test_a_run_with_other_settings_is_refused_with_what_differs(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2"))
    with pytest.raises(ValueError, match="batch_size was 6, now 4\n.*optimizer.learning_rate was 0.001, now 0.5"):
        words = "steps=2", "batch_size=4", "optimizer.learning_rate=0.5"
        tiny_run.train(tiny_run.settings(path, tmp_path / "run", *words))


def test_a_run_resumes_with_other_settings_when_asked_to(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2"))
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=4", "resume=changed"))
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "00000004"


def test_settings_that_only_watch_may_change(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2"))
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2", "samples.every=1",
                                     'samples.prompts=["red card"]', "keep=1"))


def test_a_setting_that_an_older_trainer_did_not_know_is_no_difference(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", "steps=2")
    tiny_run.train(settings)
    file = tmp_path / "run/config.json"
    old = json.loads(file.read_text())
    del old["text"]["learn"], old["recipe"]["packing"]
    file.write_text(json.dumps(old))
    tiny_run.train(settings)


def test_a_folder_that_holds_a_run_is_refused_by_resume_never(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2"))
    with pytest.raises(ValueError, match="holds a run already"):
        tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=2", "resume=never"))


def test_only_the_newest_checkpoints_are_kept(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=1", "keep=2"))
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["00000005", "00000006"]


def test_keep_0_keeps_every_checkpoint(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "save_every=2", "keep=0"))
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["00000002", "00000004", "00000006"]


def test_a_run_folder_holds_what_its_page_says(path, tmp_path):
    words = ("samples.every=3", "samples.prompts=[\"red card\", \"blue square\"]", "samples.steps=1")
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "validation.every=3", *words))
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "facts.json", "tokenizer.json", "log.jsonl", "status.json", "tensorboard", "samples",
        "checkpoints"}
    assert {p.name for p in (folder / "samples").iterdir()} == {
        f"{step:08d}{ending}" for step in (0, 3, 6) for ending in ("", ".png")}
    assert [line["step"] for line in log(folder) if "validation_loss" in line] == [3, 6]
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_a_gradient_that_is_not_finite_stops_the_run_with_advice(path, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: the gradient norm is nan. Lower optimizer.learning_rate="):
        def spoil(one, step):
            for p in one.accelerator._models[0].parameters():
                p.data.fill_(float("nan"))
        tiny_run.train(tiny_run.settings(path, tmp_path / "run"), spoil)


def test_the_average_is_the_papers_formula():
    module = torch.nn.Linear(2, 2)
    ema = EmaWeights(module, 0.9)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    ema.update(0)
    torch.testing.assert_close(ema.weights["weight"], 0.9 * start + 0.1 * (start + 1))


def test_the_average_is_worn_only_inside():
    module = torch.nn.Linear(2, 2)
    ema = EmaWeights(module, 0.9)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    live = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, start)
    assert torch.equal(module.weight, live)


def test_the_tokenizer_of_an_attempt_that_learned_nothing_is_made_anew(path, tmp_path):
    (tmp_path / "run").mkdir()
    tokenizer.train(["some other words"], 20).save(str(tmp_path / "run/tokenizer.json"))
    recipe, _ = tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=1"))
    assert 2 not in recipe.text.tokenizer.encode("red card").ids


def test_validation_takes_the_micro_batches_of_the_run(path, tmp_path):
    _, one = tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=1", "validation.every=1",
                                              "micro_batch_size=3"))
    assert [len(b.positions) for b in one.held_out] == [3, 1]


def test_a_run_opens_without_its_data(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", "steps=2")
    recipe, _ = tiny_run.train(settings)
    path.rename(path.with_name("gone"))
    opened, _, step = exporting.open_run(tmp_path / "run", weights="model")
    assert step == 2
    for key, value in recipe.state_dict().items():
        assert torch.equal(value, opened.state_dict()[key]), key


def test_moments_in_8_bits_take_a_quarter_and_learn_like_the_whole_ones(path, tmp_path):
    sizes, losses = [], []
    for name in ("adamw", "adamw8bit"):
        settings = tiny_run.settings(path, tmp_path / name, f"optimizer.name={name}", "text.hidden=300", "steps=12",
                                     "save_every=12", "ema.decay=0.0")
        recipe, _ = tiny_run.train(settings)
        saved = checkpoints.read_tensors(tmp_path / name / "checkpoints/00000012/optimizer.safetensors")
        large = [name for g in recipe.groups(settings) for name, p in g.params if p.numel() >= 4096]
        moments = ("exp_avg", "exp_avg_sq", "state1", "state2")
        sizes.append(sum(saved[f"{n}:{m}"].nbytes for n in large for m in moments if f"{n}:{m}" in saved))
        losses.append(log(tmp_path / name)[-1]["loss"])
    assert large and sizes[0] == 4 * sizes[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_a_resumed_run_goes_on_in_weights_and_biases(path, tmp_path, monkeypatch):
    import wandb

    logged = []
    log = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, step: (logged.append((step, self.id, *values)),
                                                                      log(self, values, step=step)))
    settings = tiny_run.settings(path, tmp_path / "run", "log.wandb=offline", "samples.every=3",
                                 samples={"prompts": ["red card"], "steps": 1})
    tiny_run.train(settings, interrupt)
    tiny_run.train(settings)
    assert [(step, what[0]) for step, _, *what in logged] == [
        (0, "samples"), (1, "loss"), (2, "loss"), (3, "loss"), (3, "samples"), (4, "loss"), (5, "loss"), (6, "loss"),
        (6, "samples")]
    assert len({name for _, name, *_ in logged}) == 1
    runs = [p.name for p in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(logged[0][1]) for name in runs)
