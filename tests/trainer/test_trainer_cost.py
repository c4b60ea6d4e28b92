"""What --dry-run says a step costs is what a step costs."""
import json

import pytest
import tiny_pixart
import tiny_run
import torch
from pixstack.trainer.data import loader
from pixstack.trainer.features import precision
from pixstack.trainer.memory import measured
from pixstack.trainer.training import build, cost, footprint, loop, optim, plan
from torch.utils.flop_counter import FlopCounterMode


def counted(settings):
    """Flops of the passes of a real step, its captions embedded before."""
    found = build.collection(settings)
    recipe = build.recipe(settings, found)
    batches = loader.Batches(found.train, settings.data, settings.seed, settings.batch_size)
    recipe.text.prepare(["", *(c for i in found.train for c in i.texts)], "cpu")
    counter = FlopCounterMode(display=False)
    with counter:
        for part in loop.parts_of(settings, 0, 1):
            recipe(batches(0, part)).mean().backward()
    return counter.get_total_flops()


def estimated(settings):
    found = build.collection(settings)
    recipe = plan.on_meta(lambda: build.recipe(settings, found))
    rates = cost.Rates(torch.device("cpu"))
    return cost.of_a_step(settings, found, recipe, loop.parts_of(settings, 0, 1), rates, cached=False)


@pytest.mark.parametrize("words", [
    ("recipe.name=pixart",), ("recipe.name=pixart", "checkpoint_activations=true", "micro_batch_size=3"),
    ("recipe.name=pixart_lora", "adapter.rank=4", "precision=bf16"),
    ("recipe.name=pixart_lcm", "adapter.rank=4", "checkpoint_activations=true"),
], ids=lambda words: words[0])
def test_the_flops_of_a_step_are_those_of_a_real_one(path, parts, tmp_path, words):
    tiny_pixart.released(tmp_path / "base.safetensors", depth=5)
    # Real captions here have 4 tokens and more, and are estimated to be as long as they may be.
    made = tiny_pixart.settings(path, tmp_path / "run", parts, f"init_from={tmp_path / 'base.safetensors'}",
                                "text.max_length=5", f"text.cache={tmp_path}", *words, model={})
    real, ours = counted(made), estimated(made).flops
    assert 0.97 * real < ours < 1.05 * real


@pytest.mark.parametrize("precision, seconds, said", [
    ("bf16", 0.3, "take 30 times as long as in float32: precision=fp32"), ("bf16", 0.02, ""), ("fp32", 0.3, "")])
def test_a_processor_that_is_slow_in_bf16_is_told_of(path, parts, tmp_path, precision, seconds, said):
    made = tiny_pixart.settings(path, tmp_path / "run", parts, f"precision={precision}")
    sentence = cost.slow_precision(made, cost.Rates(torch.device("cpu"),
                                                    {torch.float32: 0.01, torch.bfloat16: seconds}))
    assert said in sentence and bool(said) == bool(sentence)


def test_a_faster_device_takes_less_time(path, parts, tmp_path):
    made = tiny_pixart.settings(path, tmp_path / "run", parts)
    found = build.collection(made)

    def seconds(faster):
        rates = cost.Rates(torch.device("cpu"), {torch.float32: 1e-3 / faster, "bytes": 1e-3 / faster,
                                                 "call": 1e-3 / faster})
        recipe = plan.on_meta(lambda: build.recipe(made, found))
        return cost.of_a_step(made, found, recipe, loop.parts_of(made, 0, 1), rates, cached=False).seconds

    assert seconds(1) == pytest.approx(4 * seconds(4))


@pytest.mark.parametrize("taken, said", [
    (9.5, ""), (13.0, ""), (13.1, "takes 13.10 GiB, more than --dry-run's 10.00"),
    (7.0, "takes 7.00 GiB, less than --dry-run's 10.00")])
def test_a_run_says_where_its_memory_is_not_what_the_dry_run_estimates(monkeypatch, taken, said):
    now = 2**30
    monkeypatch.setattr(measured, "at_most", lambda device: now)
    looks = measured.Footprint(torch.device("cpu"))
    looks.before = 2**28
    looks.begin(7, 10 * 2**30)
    now = round(taken * 2**30) + looks.before
    assert not looks.complaint(8) and not looks.complaint(11)
    complaint = looks.complaint(10)
    assert said in complaint if said else not complaint


def test_a_process_that_was_as_large_before_says_nothing_of_its_memory(monkeypatch):
    monkeypatch.setattr(measured, "at_most", lambda device: 50 * 2**30)
    looks = measured.Footprint(torch.device("cpu"))
    looks.begin(0, 2**30)
    assert looks.of_steps() is None and not looks.complaint(3) and looks.peak() == 50 * 2**30


def test_the_log_has_the_memory_of_a_run_beside_what_its_dry_run_says(tmp_path):
    made = tiny_run.settings(tiny_run.pictures(tmp_path / "set"), tmp_path / "run", "steps=2", "log_every=1")
    tiny_run.train(made)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = build.collection(made)
    recipe = plan.on_meta(lambda: build.recipe(made, found))
    optimizers = optim.Optimizers(recipe.groups(made), made.optimizer, made.steps, made.batch_size)
    sizes = footprint.estimate(made, recipe, optimizers, made.micro_batch_size or made.batch_size, 1, cpu=True)
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 2 and all(line["memory_estimated"] == round(sum(sizes.values())) for line in losses)
    if most := measured.at_most(torch.device("cpu")):
        assert all(0 < line["memory"] <= most for line in losses)


@pytest.mark.parametrize("words, device, chosen", [
    (["precision=bf16"], "cuda", "high"), (["precision=fp32"], "cuda", "highest"),
    (["precision=bf16"], "cpu", "highest"), (["precision=fp32", "float32_matmul=high"], "cuda", "high"),
    (["float32_matmul=highest"], "cuda", "highest")])
def test_gpus_multiply_float32_as_the_settings_say(tmp_path, words, device, chosen):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        made = tiny_run.settings(tiny_run.pictures(tmp_path / "set"), tmp_path / "run", *words)
        precision.set_float32_matmul(made, torch.device(device))
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
