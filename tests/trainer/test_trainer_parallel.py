"""Two processes on gloo, each with a whole network (DDP), parts of its blocks (FSDP2), or parts of gradients and
moments (DeepSpeed), learn, save and resume what one process does."""
import dataclasses
import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_pixart
import tiny_recipes
import tiny_run
import torch
from pixstack.trainer.config import check, load, rules
from pixstack.trainer.config.schema import Config
from pixstack.trainer.distributed import fsdp2
from pixstack.trainer.recipes import RECIPES
from pixstack.trainer.training import footprint, optim
from pixstack.trainer.training.checkpoints import read_tensors

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
TOLD = {  # the variables by which `accelerate launch` configures a process
    rules.DDP: {},
    rules.FSDP2: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    rules.DEEPSPEED: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
WAYS = [pytest.param(way, marks=pytest.mark.skipif(way == rules.DEEPSPEED and find_spec("deepspeed") is None,
                                                   reason="DeepSpeed is not installed")) for way in TOLD]


REFUSED = {
    (rules.DEEPSPEED, "pixart_dmd"): "DeepSpeed clips all gradients as one",
    (rules.DEEPSPEED, "pixelponder choices"): "DeepSpeed needs recipe.choices=1",
    (rules.FSDP2, "pixelponder choices"): "accelerate's FSDP needs recipe.choices=1",
}


# --- Every recipe


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Settings of a run of every recipe by one process, which `shared` does."""
    folder = tmp_path_factory.mktemp("every")
    found = tiny_recipes.every(folder / "files", folder / "one")
    assert {name.split()[0] for name in found} == RECIPES.keys()
    return found


def longer(path, parts, folder) -> Config:
    """A run of two checkpoints."""
    return tiny_pixart.settings(path, folder, parts, "threads=1", "steps=4", "save_every=2", "keep=0",
                                "validation.every=2", "optimizer.eps=1e-3", recipe="pixart")


@pytest.fixture(scope="module")
def shared(one, path, parts, tmp_path_factory) -> dict[str, tuple[dict[str, Config], Path]]:
    """The runs of `one`, the same by two processes, and one that goes on: way of sharing -> (settings of the runs by
    two processes, folder of the one that goes on)."""
    found, jobs = {}, []
    for way in (way.values[0] for way in WAYS if not any(mark.args[0] for mark in way.marks)):
        folder = tmp_path_factory.mktemp("two")
        every = {name: dataclasses.replace(settings, out=str(folder / name)) for name, settings in one.items()
                 if (way, name) not in REFUSED}
        whole, broken = (load.as_dict(longer(path, parts, folder / name)) for name in ("whole", "broken"))
        runs = [*map(load.as_dict, every.values()), whole, {**broken, "goes on from": whole["out"]}]
        jobs.append({"environment": TOLD[way], "runs": runs, "output": str(folder / "said")})
        found[way] = every, folder
    file = tmp_path_factory.mktemp("jobs") / "list.json"
    alone = [load.as_dict(settings) for settings in one.values()]
    file.write_text(json.dumps({"alone": alone, "jobs": jobs}), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "package"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "tests/support/two_processes.py", file], cwd=ROOT,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "Error" in line or "/trainer/" in line)
    for (way, (_, folder)), job in zip(found.items(), jobs, strict=True):
        assert (folder / "said").read_text(encoding="utf-8").count(f"{way} of 2 processes") == len(job["runs"])
    return found


@pytest.fixture(scope="module", params=WAYS)
def two(shared, request):
    return request.param, *shared[request.param]


@pytest.mark.parametrize("name", tiny_recipes.NAMES)
def test_two_processes_learn_what_one_learns(one, two, name, monkeypatch):
    """Weights, averages, moments, loss and gradient norm."""
    way, found, _ = two
    if (way, name) in REFUSED:
        monkeypatch.setattr(os, "environ", {**os.environ, **TOLD[way]})
        with pytest.raises(ValueError, match=REFUSED[way, name]):
            check.parse(load.as_dict(one[name]))
        return
    folders = one[name].folder, found[name].folder
    for file in ("model", "ema", "optimizer"):
        whole, some = (read_tensors(folder / f"checkpoints/00000003/{file}.safetensors") for folder in folders)
        assert whole.keys() == some.keys()
        for key in whole:
            torch.testing.assert_close(some[key], whole[key], rtol=1e-3, atol=2e-5,
                                       msg=lambda m, k=key: f"{k}: {m}")
    for whole, some in zip(*map(tiny_pixart.log, folders), strict=True):
        assert whole == pytest.approx(some, rel=1e-3, abs=1e-6)


# --- A run


def test_a_run_of_two_processes_goes_on_to_the_bit_and_in_one_process(two, path, parts, tmp_path):
    _, _, folder = two
    tiny_run.cut(folder / "whole", tmp_path / "alone", 4)
    assert tiny_pixart.log(folder / "broken") == tiny_pixart.log(folder / "whole")
    tiny_run.train(longer(path, parts, tmp_path / "alone"))
    for file in ("model", "ema", "optimizer"):
        whole, broken, alone = (read_tensors(out / f"checkpoints/00000004/{file}.safetensors")
                                for out in (folder / "whole", folder / "broken", tmp_path / "alone"))
        assert whole.keys() == broken.keys() == alone.keys()
        for key, value in whole.items():
            assert torch.equal(value, broken[key]), (file, key)
            torch.testing.assert_close(alone[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_dry_run_counts_the_parts(path, parts, tmp_path, monkeypatch, way):
    for name, value in TOLD[way].items():
        monkeypatch.setenv(name, value)
    made = tiny_pixart.settings(path, tmp_path / "run", parts)
    recipe, _ = tiny_pixart.recipe_of(made)
    optimizers = optim.Optimizers(recipe.groups(made), made.optimizer, made.steps)
    one, four = (footprint.estimate(made, recipe, optimizers, 6, processes, cpu=True) for processes in (1, 4))
    every, block = (sum(p.numel() for p in module.parameters()) for module in (recipe.net, recipe.net.blocks))
    fewer = {"weights": 4 * block, "gradients": 4 * block, "optimizer": 8 * block, "ema": 4 * block}
    if way == rules.DEEPSPEED:  # and its own copy of the weights
        fewer = {"weights": 0, "gradients": 4 * every, "optimizer": 12 * every, "ema": 0}
    assert one["optimizer"] >= fewer["optimizer"]
    for name, size in {**fewer, "activations": 0}.items():
        assert one[name] - four[name] == pytest.approx(0.75 * size), name


@pytest.fixture
def group():
    """A group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield types.SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    torch.distributed.destroy_process_group()


def test_blocks_may_be_gathered_in_bf16_while_all_else_is_float32(path, parts, tmp_path, group):
    made = tiny_pixart.settings(path, tmp_path / "run", parts, "precision=bf16", recipe="pixart")
    plain, batches = tiny_pixart.recipe_of(made)
    recipe, _ = tiny_pixart.recipe_of(made)
    seen = []
    fsdp2.spread(recipe, group, torch.bfloat16)
    block = fsdp2.blocks(recipe)[0]
    next(m for m in block.modules() if isinstance(m, torch.nn.Linear)).register_forward_pre_hook(
        lambda layer, given: seen.append(layer.weight.dtype))
    block.register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype), prepend=True)
    entered = []
    plain.net.blocks[0].register_forward_pre_hook(lambda block, given: entered.append(given[0].dtype))
    losses = [one(batches(0, range(6))) for one in (recipe, plain)]
    assert set(seen) == {torch.bfloat16, *entered}
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    losses[0].mean().backward()
    learns = [p for p in recipe.parameters() if p.requires_grad]
    assert {p.dtype for p in learns} == {p.grad.dtype for p in learns if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("told, words, part", [
    ({}, ["memory.shard=true", "optimizer.name=came"], "memory.shard=true goes with optimizer.name='adamw'"),
    ({}, ["memory.shard=true", "compile=true"], "memory.shard=true does not go with compile=True"),
    ({}, ["memory.gather=bf16"], "it needs memory.shard=true"),
    ({}, ["memory.shard=true", "memory.gather=bf16"], "is for precision=bf16"),
    ({"ACCELERATE_USE_FSDP": "true"}, [], "accelerate was asked to use FSDP 1"),
    (TOLD[rules.FSDP2], ["optimizer.name=muon"], "accelerate's FSDP goes with optimizer.name='adamw'"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "Megatron-LM"),
])
def test_what_does_not_go_with_parts_is_refused(path, parts, tmp_path, monkeypatch, told, words, part):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        tiny_pixart.settings(path, tmp_path / "run", parts, *words)
    assert part in str(caught.value)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("file, words, part", [
    ({"zero_optimization": {"stage": 3}}, [], "zero_stage 3, and this trainer uses 1 and 2; memory.shard=true"),
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, [], "the recipe's precision decides"),
    ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, [], "names its own optimizer: take it out"),
    ({"zero_optimization": {"stage": 2}}, ["optimizer.name=came"], "DeepSpeed goes with optimizer.name='adamw'"),
    ({"zero_optimization": {"stage": 2}}, ["memory.shard=true"], "memory.shard=true is FSDP2"),
])
def test_what_does_not_go_with_deepspeed_is_refused(path, parts, tmp_path, monkeypatch, file, words, part):
    (tmp_path / "deepspeed.json").write_text(json.dumps(file))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    with pytest.raises(ValueError) as caught:
        tiny_pixart.settings(path, tmp_path / "run", parts, *words)
    assert part in str(caught.value)


def test_deepspeed_that_is_missing_is_named(path, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="not installed: pip install deepspeed"):
        tiny_pixart.settings(path, tmp_path / "run", parts)
