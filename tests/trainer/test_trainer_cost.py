"""What --dry-run says a step costs is what a step costs."""
import pytest
import tiny_pixart
import torch
from pixstack.trainer.data import loader
from pixstack.trainer.training import build, cost, loop, plan
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
