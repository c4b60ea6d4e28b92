"""Blocks spread over two processes (FSDP2 on gloo) learn, save and resume what one process does."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pixart
import tiny_run
import torch
from pixstack.trainer import optim, plan
from pixstack.trainer.run import read_tensors

ROOT = Path(__file__).resolve().parents[1]
TWO = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_pixart.parts(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=64)


def launched(folder, made, *words, launcher=TWO):
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-m", *launcher, "trainer", "train", str(tiny_pixart.toml(folder, made)),
                           *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]


@pytest.mark.parametrize("recipe, words", [
    ("pixart", ("checkpoint_activations=true", "validation.every=2")), ("pixart_lora", ("adapter.rank=4",)),
    ("pixelflow", ("init_from=", "micro_batch_size=1")),
], ids=["pixart", "lora", "pixelflow-accumulated"])
def test_two_processes_with_parts_learn_what_one_learns(path, parts, tmp_path, recipe, words):
    base = tmp_path / "base.safetensors"
    tiny_pixart.released(base)
    more, sections = {"model": {}}, parts
    if recipe == "pixelflow":
        more, sections = {"model": tiny_run.SETTINGS["model"]}, {"text": tiny_run.SETTINGS["text"]}

    def made(name, *extra):
        return tiny_pixart.settings(path, tmp_path / name, sections, f"init_from={base}", "steps=4", "save_every=2",
                                    "threads=1", "optimizer.clip=0.01", *words, *extra, recipe=recipe, **more)

    tiny_run.train(made("one"))
    launched(tmp_path / "of_two", made("two", "memory.shard=true"), "steps=4")
    for name in ("model", "ema", "optimizer"):
        one, two = (read_tensors(tmp_path / run / f"checkpoints/00000004/{name}.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert one[key].shape == two[key].shape, key
            if name != "optimizer":
                torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"images_per_second"}:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-6), key


def test_a_run_with_parts_goes_on_to_the_bit(path, parts, tmp_path):
    def made(name):
        return tiny_pixart.settings(path, tmp_path / name, parts, "threads=1", "steps=4", "save_every=2", "keep=0",
                                    "memory.shard=true", recipe="pixart")

    launched(tmp_path / "of_whole", made("whole"))
    from shutil import copytree, rmtree

    copytree(tmp_path / "whole", tmp_path / "broken")
    rmtree(tmp_path / "broken/checkpoints/00000004")
    settings = json.loads((tmp_path / "broken/config.json").read_text())
    (tmp_path / "broken/config.json").write_text(json.dumps({**settings, "out": str(tmp_path / "broken")}))
    launched(tmp_path / "of_broken", made("broken"))
    for name in ("model", "ema", "optimizer"):
        one, two = (read_tensors(tmp_path / run / f"checkpoints/00000004/{name}.safetensors")
                    for run in ("whole", "broken"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


def test_a_dry_run_counts_a_part_of_the_blocks(path, parts, tmp_path):
    made = tiny_pixart.settings(path, tmp_path / "run", parts, "memory.shard=true")
    recipe, _ = tiny_pixart.recipe_of(made)
    optimizers = optim.Optimizers(recipe.groups(made), made.optimizer, made.steps)
    one, four = (plan.memory(made, recipe, optimizers, 6, processes, cpu=True) for processes in (1, 4))
    block = sum(p.numel() for p in recipe.net.blocks.parameters())
    for name, size in (("weights", 4), ("gradients", 4), ("optimizer", 8), ("average", 4), ("activations", 0)):
        assert one[name] - four[name] == pytest.approx(0.75 * size * block), name


@pytest.mark.parametrize("words, part", [
    (("recipe.name=pixart_dmd",), "memory.shard=true is for recipe.name = pixart"),
    (("optimizer.name=came",), "goes with optimizer.name='adamw', not 'came'"),
    (("compile=true",), "does not go with compile=True"),
])
def test_what_does_not_go_with_parts_is_refused(path, parts, tmp_path, words, part):
    with pytest.raises(ValueError) as caught:
        tiny_pixart.settings(path, tmp_path / "run", parts, "memory.shard=true", *words)
    assert part in str(caught.value)
