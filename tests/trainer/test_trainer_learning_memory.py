"""What saves memory where all weights learn: bf16 weights whose updates are rounded at random, and weights that learn
during the backward pass."""
import dataclasses
import json

import pytest
import tiny_pixart
import tiny_recipes
import tiny_run
import torch
from pixstack.trainer.config import check, load, rules, schema
from pixstack.trainer.memory.rounding import rounded
from pixstack.trainer.training import footprint, optim
from pixstack.trainer.training.checkpoints import read_tensors
from pixstack.trainer.training.groups import Group

pytestmark = pytest.mark.long
BF16, EARLY = {"weights": "bf16"}, {"fused_backward": True}


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    return tiny_recipes.every(folder / "files", folder / "runs")


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set")


def changed(settings: schema.Config, out, memory: dict, **more) -> schema.Config:
    """The settings of a run of two steps, each in one pass and without a limit of the gradients."""
    raw = load.as_dict(settings)
    raw |= {"out": str(out), "precision": "bf16", "steps": 2, "save_every": 2, "micro_batch_size": 0, **more}
    raw["memory"] |= memory
    raw["optimizer"]["clip"] = 0.0
    return check.parse(raw)


def written(folder, step=2) -> dict[str, torch.Tensor]:
    at = folder / f"checkpoints/{step:08d}"
    return {f"{file.stem}/{k}": v for file in at.glob("*.safetensors") for k, v in read_tensors(file).items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- bf16


def test_a_number_is_rounded_to_one_of_its_neighbours_and_to_itself_on_average():
    x = torch.tensor([1.0, 1.001, -1.001, 3e-5, -7.77, 1e30])
    rng = torch.Generator().manual_seed(0)
    many = rounded(x.expand(20_000, -1).contiguous(), rng).double()
    step = 2.0 ** (x.double().abs().log2().floor() - 7)  # between bf16 numbers of that size
    assert ((many - x).abs() < step).all()
    # The mean of 20,000 draws that are one step apart has a deviation of at most 0.0036 steps: 7 of them.
    assert ((many.mean(0) - x).abs() <= 0.025 * step).all()
    assert (many[:, 0] == 1).all()


def test_updates_below_the_steps_of_bf16_add_up():
    def learn(cast):
        p = torch.nn.Parameter(cast(torch.ones(2000)))
        optimizer = optim.Optimizers([Group([("p", p)])], schema.Optimizer(name="SGD", learning_rate=1e-5), 1000)
        for step in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step(step)
        return p.detach().float().mean()

    assert learn(lambda x: x) == pytest.approx(1 - 1e-3, abs=1e-5)
    assert learn(lambda x: x.bfloat16()) == pytest.approx(1 - 1e-3, abs=3e-4)  # one step below 1 is 0.0039
    plain = torch.ones(4, dtype=torch.bfloat16)
    assert (plain - 1e-5 == 1).all()


@pytest.mark.parametrize("name", ["adamw", "muon", "came", "adafactor", "lion", "stable_adamw", "Adagrad"])
def test_an_optimizer_learns_and_goes_on_to_the_bit_with_bf16_weights(name):
    def made():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 4))
        for module in (net[0], net[2]):
            module.weight.data = module.weight.data.bfloat16().to(
                memory_format=torch.channels_last if module.weight.ndim == 4 else torch.contiguous_format)
        rate = {"lion": 3e-3, "adafactor": 1e-2}.get(name, 1e-2)
        params = list(net.named_parameters())
        matrices = frozenset({"0.weight", "2.weight"})
        settings = schema.Optimizer(name=name, learning_rate=rate)
        return net, optim.Optimizers([Group(params, matrices=matrices)], settings, 1000, seed=3)

    def train(net, optimizer, steps):
        losses = []
        x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        y = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
        for step in steps:
            with torch.autocast("cpu", torch.bfloat16):
                loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.clip()
            optimizer.step(step)
            losses.append(loss.item())
        return losses

    unbroken, resumed = made(), made()
    losses = train(*unbroken, range(40))
    assert min(losses[-5:]) < 0.8 * losses[0]
    first = made()
    train(*first, range(20))
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[1].load({k: v.clone() for k, v in first[1].tensors().items()})
    train(*resumed, range(20, 40))
    assert equal(unbroken[0].state_dict(), resumed[0].state_dict())
    assert equal(unbroken[1].tensors(), resumed[1].tensors())


WHOLE = [name for name in tiny_recipes.NAMES
         if "lora" not in name and name not in ("pixart_dreambooth", "pixelponder")]  # ponder has one with choices


@pytest.mark.parametrize("name", WHOLE)
def test_a_recipe_learns_in_bf16_weights_and_averages_them_in_float32(every, tmp_path, name):
    recipe, _ = tiny_run.train(changed(every[name], tmp_path / "run", {**BF16, **EARLY}))
    found = written(tmp_path / "run")
    learning = [k.removeprefix("ema/") for k in found if k.startswith("ema/")]
    few = [k for k in learning if found[f"model/{k}"].dtype == torch.bfloat16]
    assert few and all(found[f"ema/{k}"].dtype == torch.float32 for k in learning)
    moved = [k for k in few if not torch.equal(found[f"ema/{k}"], found[f"ema/{k}"].bfloat16().float())]
    assert moved and all(p.isfinite().all() for p in recipe.parameters())


@pytest.mark.parametrize("words", [
    ("memory.weights=bf16",), ("memory.weights=bf16", "memory.fused_backward=true", "optimizer.clip=0",
                               "optimizer.name=adafactor"),
], ids=["bf16", "bf16 early"])
def test_a_resumed_run_repeats_the_unbroken_run(path, tmp_path, words):
    def stop(run, step):
        run.stop = step == 4

    unbroken, broken = (tiny_run.settings(path, tmp_path / name, *words, "save_every=5")
                        for name in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, stop)
    assert not (tmp_path / "broken/checkpoints/00000006").exists()
    tiny_run.train(broken)
    assert equal(written(tmp_path / "unbroken", 6), written(tmp_path / "broken", 6))
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")


# --- During the backward pass


@pytest.mark.parametrize("name", ["pixelflow", "pixart", "pixart_lora", "pixart_dmd", "pixelponder choices",
                                  "autoencoder"])
def test_what_learns_in_the_backward_pass_learns_the_same(every, tmp_path, name):
    for folder, memory in (("after", {}), ("during", EARLY)):
        tiny_run.train(changed(every[name], tmp_path / folder, memory))
    assert equal(written(tmp_path / "after"), written(tmp_path / "during"))
    for after, during in zip(*(tiny_pixart.log(tmp_path / folder) for folder in ("after", "during")), strict=True):
        assert after == pytest.approx(during, rel=1e-5)


def test_no_gradient_waits_for_the_end_of_the_backward_pass():
    net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    params, waiting = list(net.named_parameters()), []
    for _, p in params:  # before the optimizer's own
        p.register_post_accumulate_grad_hook(lambda _: waiting.append(sum(q.grad is not None for _, q in params)))
    optimizer = optim.Optimizers([Group(params)], schema.Optimizer(), 10, in_backward=True)
    optimizer.begin(0)
    net(torch.randn(2, 8)).square().mean().backward()
    assert waiting == [1] * 8 and not any(p.grad is not None for p in net.parameters())
    assert optimizer.clip() > 0


def test_a_step_that_fails_half_way_is_not_saved(path, tmp_path, monkeypatch):
    monkeypatch.setattr(optim.Optimizers, "clip", lambda self: torch.tensor(float("nan" if self.at == 4 else 1)))
    for name, saved in (("after", "00000004"), ("during", "00000003")):
        made = tiny_run.settings(path, tmp_path / name, "optimizer.clip=0", "save_every=3",
                                 f"memory.fused_backward={json.dumps(name == 'during')}")
        with pytest.raises(FloatingPointError, match="step 4: the gradient norm is nan"):
            tiny_run.train(made)
        assert max(p.name for p in (tmp_path / name / "checkpoints").iterdir()) == saved


# --- The plan, and what is refused


def test_a_dry_run_counts_what_they_take(every, tmp_path):
    def sizes(memory):
        made = changed(every["pixart"], tmp_path / "run", memory)
        recipe, _ = tiny_pixart.recipe_of(made)
        optimizers = optim.Optimizers(recipe.groups(made), made.optimizer, made.steps,
                                      in_backward=made.memory.fused_backward)
        return recipe, footprint.estimate(made, recipe, optimizers, 4, 1, cpu=True)

    recipe, plain = sizes({})
    few = [p.numel() for m in recipe.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for p in [m.weight]]
    rest = sum(p.numel() for p in recipe.parameters()) - sum(few)
    assert plain["gradients"] == 4 * (rest + sum(few))
    lowered = sizes(BF16)[1]
    assert lowered["gradients"] == 4 * rest + 2 * sum(few)
    assert plain["weights"] - lowered["weights"] == 2 * sum(few)
    assert lowered["optimizer"] - plain["optimizer"] == 8 * max(few) and lowered["ema"] == plain["ema"]
    assert sizes(EARLY)[1]["gradients"] == 4 * max(few)


@pytest.mark.parametrize("words, part", [
    (("memory.weights=fp8",), "memory.weights='fp8' is none of bf16"),
    (("memory.weights=bf16", "precision=fp32"), "memory.weights='bf16' needs precision='bf16'"),
    (("memory.weights=bf16", "optimizer.name=prodigy", "optimizer.learning_rate=1"), "looks at all of them together"),
    (("memory.weights=bf16", "memory.shard=true"), "memory.weights='bf16' does not go with FSDP2"),
    (("memory.fused_backward=true",), "optimizer.clip=1.0: use clip=0"),
    (("memory.fused_backward=true", "optimizer.clip=0", "micro_batch_size=3"), "gathered from passes of micro_batch"),
])
def test_what_cannot_work_is_refused(path, tmp_path, words, part):
    with pytest.raises(ValueError) as caught:
        tiny_run.settings(path, tmp_path / "run", *words)
    assert part in str(caught.value)


def test_several_processes_and_adapters_are_refused(every, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lora = dataclasses.replace(every["pixart_lora"], precision="bf16", memory=schema.Memory(**BF16, **EARLY))
    found = " ".join(rules.learning(lora))
    assert "is for one process" in found and "trains an adapter here, which takes little" in found
