"""Optimizers by name: they learn, go on to the bit, and are refused where they cannot work."""
import json
import os
import signal
import subprocess
import sys

import pytest
import tiny_run
import torch
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import load, optimizers, rules, schema
from pixstack.trainer.training import checkpoints, optim
from pixstack.trainer.training.groups import Group

OWN = {"prodigy": {"learning_rate": 1.0}, "lion": {"learning_rate": 3e-3}, "adafactor": {"learning_rate": 1e-2}}
NAMES = [name for name in optimizers.NAMED if name not in ("adamw8bit", "muon")]
CLASSES = sorted({name for library in (optimizers.TORCH, optimizers.MORE) for name in optimizers.classes(library)})


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set")


def settings(name: str, **more) -> schema.Optimizer:
    estimates = optimizers.kind(name).estimates
    return schema.Optimizer(**{"name": name, "learning_rate": 1.0 if estimates else 1e-2, **OWN.get(name, {}), **more})


class Toy:
    """A network with a kernel, matrices and vectors, that learns one batch."""

    def __init__(self, name: str, layout=torch.contiguous_format, **more):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 8), torch.nn.LayerNorm(8),
            torch.nn.SiLU(), torch.nn.Linear(8, 4)).to(memory_format=layout)
        self.x, self.y = torch.randn(16, 3, 4, 4), torch.randn(16, 4)
        params = list(self.net.named_parameters())
        self.optimizer = optim.Optimizers([Group(params[:2], 0.5), Group(params[2:])], settings(name, **more), 1000)

    def train(self, steps, start=0) -> list[float]:
        losses = []
        for step in range(start, start + steps):
            torch.manual_seed(step)
            loss = (self.net(self.x) - self.y).square().mean()
            loss.backward()
            self.optimizer.step(step)
            losses.append(loss.item())
        return losses

    def written(self, folder) -> dict[str, torch.Tensor]:
        """As a run writes it."""
        with self.optimizer.averaged():
            checkpoints.write_tensors(folder / "model.safetensors", self.net.state_dict())
            checkpoints.write_tensors(folder / "optimizer.safetensors", self.optimizer.tensors())
        return {f"{file}.{k}": v for file in ("model", "optimizer")
                for k, v in checkpoints.read_tensors(folder / f"{file}.safetensors").items()}

    def restore(self, folder):
        self.net.load_state_dict(checkpoints.read_tensors(folder / "model.safetensors"))
        self.optimizer.load(checkpoints.read_tensors(folder / "optimizer.safetensors"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_every_named_optimizer_learns(name):
    losses = Toy(name).train(120)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", [*NAMES, *CLASSES])
def test_an_optimizer_goes_on_to_the_bit_from_what_it_saved(name, tmp_path):
    unbroken, broken = Toy(name), Toy(name)
    unbroken.train(3)
    broken.train(3)
    broken.written(tmp_path)
    resumed = Toy(name)
    resumed.restore(tmp_path)
    unbroken.train(9, 3)
    resumed.train(9, 3)
    assert equal(unbroken.written(tmp_path), resumed.written(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_as_large_as_estimated(name):
    toy = Toy(name)
    estimate = toy.optimizer.state_bytes()
    toy.train(1)
    tensors = {}
    for part in toy.optimizer.parts:
        for i, state in part.state_dict()["state"].items():
            optim.packed(state, f"{id(part)}.{i}", tensors)
    assert estimate == pytest.approx(sum(t.nbytes for t in tensors.values() if t.ndim))


def by_places(saved: dict[str, torch.Tensor], parts: list[list[list[str]]]) -> dict[str, torch.Tensor]:
    """What a checkpoint had that knew parameters by their places. parts: names of the parameters, by group."""
    more = json.loads(bytes(saved["values"].tolist())) if "values" in saved else {"values": {}, "groups": []}
    old = {key: value for key, value in saved.items() if "/" in key}  # what values refer to
    for i, groups in enumerate(parts):
        places = {name: j for j, name in enumerate(name for some in groups for name in some)}

        def renamed(some, i=i, places=places):
            return {f"{i}.{places[name]}.{what}": value for key, value in some.items()
                    for name, of, what in [key.partition(":")] if of and name in places and "/" not in what}

        values = renamed(more["values"]) | {f"{i}.group{groups.index(one['of'])}.{k}": v for one in more["groups"]
                                            if one["of"] in groups for k, v in one["values"].items()}
        old |= renamed(saved) | {f"{i}.values": torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}
    return old


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free_adamw", "SOAP"])
def test_a_checkpoint_that_knows_parameters_by_their_places_goes_on_to_the_bit(name, tmp_path):
    toy, other = Toy(name), Toy(name)
    toy.train(3)
    toy.written(tmp_path)
    saved = checkpoints.read_tensors(tmp_path / "optimizer.safetensors")
    names = [name for name, _ in toy.net.named_parameters()]
    groups = [names[:2], names[2:]]
    old = by_places(saved, [[some] for some in groups] if toy.optimizer.kind.estimates else [groups])
    assert not old.keys() & {key for key in saved if "/" not in key}
    other.net.load_state_dict(checkpoints.read_tensors(tmp_path / "model.safetensors"))
    other.optimizer.load(old)
    toy.train(5, 3)
    other.train(5, 3)
    assert equal(toy.written(tmp_path), other.written(tmp_path))


def test_came_goes_on_from_the_moments_of_the_trainers_own(tmp_path):
    toy, other = Toy("came"), Toy("came")
    toy.train(3)
    toy.written(tmp_path)
    saved = checkpoints.read_tensors(tmp_path / "optimizer.safetensors")
    former = {new: old for old, new in optim.CAME_NAMES.items()} | {"exp_avg_sq": "square_row"}
    own = {f"{name}:{former[what]}": value for key, value in saved.items()
           for name, _, what in [key.partition(":")] if what in former}
    other.net.load_state_dict(toy.net.state_dict())
    other.optimizer.load(by_places(own, [[[name for name, _ in toy.net.named_parameters()]]]))
    toy.train(3, 3)
    other.train(3, 3)
    assert equal(toy.net.state_dict(), other.net.state_dict())


def test_betas_of_came_are_three_and_of_others_two():
    for name, betas, fits in (("came", [0.9, 0.99, 0.999], True), ("came", [0.9, 0.99], False),
                              ("lion", [0.9, 0.99], True), ("lion", [0.9], False), ("SGD", [0.9, 0.99], False)):
        problems = rules.optimizer(schema.Optimizer(name=name, betas=betas))
        assert (not problems) is fits, problems


# --- Fused


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("then", [True, False])
def test_fused_adamw_learns_the_same_and_goes_on_from_checkpoints_of_the_other(tmp_path, layout, then):
    toys = [Toy("adamw", arguments={"fused": fused}, layout=layout) for fused in (False, not then, then)]
    plain, first, other = toys
    plain.train(6)
    first.train(3)
    first.written(tmp_path)
    other.restore(tmp_path)
    other.train(3, 3)
    for a, b in zip(plain.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_adamw_is_fused_where_nothing_says_otherwise(tmp_path):
    toys = [Toy("adamw", **more) for more in ({}, {"arguments": {"fused": True}}, {"arguments": {"fused": False}})]
    for toy in toys:
        toy.train(20)
    assert equal(toys[0].net.state_dict(), toys[1].net.state_dict())
    assert [toy.optimizer.parts[0].param_groups[0]["fused"] for toy in toys] == [True, True, False]


# --- Groups


def rules_of(*tables) -> list[schema.OptimizerGroup]:
    return [schema.OptimizerGroup(**table) for table in tables]


def test_the_first_table_found_in_a_parameter_s_name_sets_its_learning_rate_and_decay():
    toy = Toy("SGD", weight_decay=0.5, groups=rules_of(
        {"pattern": r"^2\.", "learning_rate": 0.1}, {"pattern": "bias$", "learning_rate_multiple": 3.0},
        {"pattern": "^3", "weight_decay": 0.0}))
    before = {name: p.detach().clone() for name, p in toy.net.named_parameters()}
    for p in toy.net.parameters():
        p.grad = torch.ones_like(p)
    toy.optimizer.step(0)
    expected = {"0.weight": (0.005, 0.5), "0.bias": (0.015, 0.5), "2.weight": (0.1, 0.5), "2.bias": (0.1, 0.5),
                "3.weight": (0.01, 0.0), "3.bias": (0.03, 0.5), "5.weight": (0.01, 0.5), "5.bias": (0.03, 0.5)}
    for name, p in toy.net.named_parameters():
        rate, decay = expected[name]
        torch.testing.assert_close(p.detach(), before[name] - rate * (1 + decay * before[name]))


@pytest.mark.parametrize("name", ["adamw", "muon", "prodigy"])
def test_moments_stay_with_their_parameters_when_the_groups_change(name, tmp_path):
    toy = Toy(name, groups=rules_of({"pattern": r"^3|5\.bias", "learning_rate_multiple": 2.0}))
    toy.train(3)
    toy.written(tmp_path)
    other = Toy(name, groups=rules_of({"pattern": "bias", "weight_decay": 0.1}))
    other.restore(tmp_path)
    states = [{n: one.optimizer.tensors()[f"{n}:exp_avg"] for n, _ in one.net.named_parameters()}
              for one in (toy, other)]
    assert equal(*states)
    other.train(1, 3)


def test_muon_s_matrices_and_the_rest_learn_at_a_multiple():
    net = torch.nn.Linear(4, 4)
    params = list(net.named_parameters())
    made = settings("muon", groups=rules_of({"pattern": ".", "learning_rate_multiple": 0.5}))
    optimizer = optim.Optimizers([Group(params, matrices=frozenset({"weight"}))], made, 10)
    assert [[g["lr"] for g in part.param_groups] for part in optimizer.parts] == [[0.005], [0.005]]


@pytest.mark.parametrize("tables, sentence", [
    ([{"pattern": "to_q", "weight_decay": 0.1}], "optimizer.groups.1.pattern='to_q' is found in no parameter's name. "
                                                 "There are, for instance, diffusion."),
    ([{"pattern": "text", "weight_decay": 0.1}, {"pattern": "text.t5", "learning_rate": 1e-5}],
     "optimizer.groups.2.pattern='text.t5' counts for no parameter"),
])
def test_a_group_without_a_parameter_is_named_before_anything_is_trained(path, tmp_path, tables, sentence):
    file = tiny_run.toml(tmp_path, path, tmp_path / "run")
    words = [f"optimizer.groups.{i}.{k}={v}" for i, table in enumerate(tables, 1) for k, v in table.items()]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(file), *words, "--dry-run"])
    assert sentence in str(caught.value)


def test_a_dry_run_says_what_the_groups_are(path, tmp_path, capsys):
    file = tiny_run.toml(tmp_path, path, tmp_path / "run")
    cli.main(["train", str(file), "--dry-run", "optimizer.groups.1.pattern=^text",
              "optimizer.groups.1.weight_decay=0.5", "optimizer.groups.1.learning_rate=2e-5"])
    output = capsys.readouterr().out
    assert "at 2e-05, weight decay 0.5: text." in output and "at 0.001, weight decay 0: diffusion." in output


@pytest.mark.parametrize("table, sentence", [
    ({"pattern": "(", "weight_decay": 0.1}, "optimizer.groups.1.pattern='(' is not a regular expression"),
    ({"pattern": "(a+)+$", "weight_decay": 0.1}, "optimizer.groups.1.pattern='(a+)+$' is not run"),
    ({"weight_decay": 0.1}, "optimizer.groups.1.pattern is empty"),
    ({"pattern": "a"}, "optimizer.groups.1 changes nothing"),
    ({"pattern": "a", "learning_rate": 2.0}, "optimizer.groups.1.learning_rate=2.0 is outside (0, 1)"),
    ({"pattern": "a", "learning_rate_multiple": 0.0}, "optimizer.groups.1.learning_rate_multiple=0.0 must be more"),
    ({"pattern": "a", "learning_rate": 0.1, "learning_rate_multiple": 2.0}, "leave one of them out"),
    ({"pattern": "a", "weight_decay": -1.0}, "optimizer.groups.1.weight_decay=-1.0 must not be negative"),
    ({"pattern": "a", "rate": 1.0}, "optimizer.groups.1.rate is not a setting; did you mean pattern"),
])
def test_a_group_that_cannot_work_is_refused(table, sentence):
    config, problems = load.read({"recipe": {"name": "pixelflow"}, "optimizer": {"groups": [table]}})
    assert any(sentence in problem for problem in problems + rules.optimizer(config.optimizer))


def test_one_learning_rate_of_muon_s_two_is_refused():
    made = settings("muon", groups=rules_of({"pattern": "a", "learning_rate": 0.1}))
    assert any("Use learning_rate_multiple" in problem for problem in rules.optimizer(made))


# --- Schedule-free


def test_the_average_of_a_schedule_free_optimizer_is_what_is_saved(tmp_path):
    toy = Toy("schedule_free_adamw")
    toy.train(20)
    trained = {k: v.clone() for k, v in toy.net.state_dict().items()}
    saved = toy.written(tmp_path)
    state = toy.optimizer.parts[0].state
    for name, p in toy.net.named_parameters():
        # y = (1 - beta) z + beta x (arXiv 2405.15682, equation 3), where y is trained and x is the average
        x = (trained[name] - 0.1 * state[p]["z"]) / 0.9
        torch.testing.assert_close(saved[f"model.{name}"], x)
        assert torch.equal(p.detach(), trained[name])
        assert not torch.equal(saved[f"model.{name}"], trained[name])


def test_looking_at_the_average_changes_nothing(tmp_path):
    plain, looked_at = Toy("schedule_free_adamw"), Toy("schedule_free_adamw")
    losses = plain.train(6)
    for step in range(6):
        assert looked_at.train(1, step) == losses[step:step + 1]
        with looked_at.optimizer.averaged():
            pass
    assert equal(plain.written(tmp_path), looked_at.written(tmp_path))


# --- Runs


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.split("_")[0] not in ("images", "memory")} for line in lines]


@pytest.mark.parametrize("name, words", [
    ("prodigy", ()), ("schedule_free_adamw", ("ema.decay=0",)), ("adafactor", ()),
    ("adamw", ("optimizer.groups.1.pattern=^text", "optimizer.groups.1.learning_rate_multiple=3")),
])
def test_a_resumed_run_repeats_the_unbroken_run(path, tmp_path, name, words):
    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def weights(folder):
        at = folder / "checkpoints/00000006"
        return {f"{file.stem}.{k}": v for file in at.glob("*.safetensors")
                for k, v in checkpoints.read_tensors(file).items()}

    rate = OWN.get(name, {}).get("learning_rate", 1e-3)
    words = (f"optimizer.name={name}", f"optimizer.learning_rate={rate}", "optimizer.decay=constant",
             "validation.every=2", "save_every=5", *words)
    unbroken, broken = (tiny_run.settings(path, tmp_path / n, *words) for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    assert equal(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))
    assert log(tmp_path / "unbroken") == log(tmp_path / "broken")


def test_prodigy_lowers_the_loss_without_a_learning_rate(path, tmp_path):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "optimizer.name=prodigy", "optimizer.learning_rate=1",
                                     "steps=120", "save_every=120"))
    lines = log(tmp_path / "run")
    losses = [line["loss"] for line in lines]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    assert max(line["learning_rate"] for line in lines) > 100 * lines[0]["learning_rate"]  # what it has estimated


# --- What is refused


@pytest.mark.parametrize("words, part", [
    (("optimizer.name=prodgy",), "and no class of torch.optim or pytorch_optimizer; did you mean prodigy."),
    (("optimizer.name=prodigy",), "Prodigy estimates the learning rate, and this is a factor of it"),
    (("optimizer.name=prodigy", "optimizer.learning_rate=1", "optimizer.arguments.d_coeff=2"),
     "optimizer.arguments.d_coeff is no argument of Prodigy; did you mean d_coef."),
    (("optimizer.arguments={betas=[0.9, 0.99]}",), "that is decided by optimizer.betas"),
    (("optimizer.arguments=3",), "optimizer.arguments=3 should be a table"),
    (("optimizer.name=came", "optimizer.eps=1e-8"), "optimizer.eps=1e-08: CAME has no such argument"),
    (("optimizer.name=AdaHessian",), "AdaHessian asks for second derivatives"),
    (("optimizer.name=schedule_free_adamw", "optimizer.decay=constant"), "use ema.decay=0"),
    (("optimizer.name=schedule_free_adamw", "ema.decay=0"), "averages the weights instead of a decay"),
    (("optimizer.name=prodigy", "memory.shard=true"), "'schedule_free_adamw', not 'prodigy', which looks at whole"),
    (("optimizer.decay_cycles=0",), "optimizer.decay_cycles=0 must be at least 1"),
], ids=" ".join)
def test_settings_that_cannot_work_are_refused_without_torch(path, tmp_path, words, part):
    file = tiny_run.toml(tmp_path, path, tmp_path / "run")
    script = ("import sys; sys.argv[0] = 'trainer'; from pixstack.trainer.cli import main\n"
              "try: main.main()\n"
              "finally: print('heavy:', sorted({'torch', 'numpy', 'pytorch_optimizer'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script, "train", str(file), *words], text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(load.TRAINER.parent / "package")})
    assert part in done.stdout + done.stderr and "heavy: []" in done.stdout


def test_a_class_takes_arguments_from_a_table(path, tmp_path):
    made = tiny_run.settings(path, tmp_path / "run", "optimizer.name=Adan", "optimizer.betas=[0.9,0.9,0.99]",
                             "optimizer.arguments.max_grad_norm=0.5")
    assert made.optimizer.arguments == {"max_grad_norm": 0.5}
    assert load.read(json.loads(json.dumps(load.as_dict(made))))[0] == made


def test_an_argument_of_a_wrong_kind_is_named():
    made = schema.Optimizer(name="Adan", arguments={"max_grad_norm": "much"})
    with pytest.raises(ValueError, match="optimizer.name='Adan' with the arguments .*max_grad_norm"):
        optim.Optimizers([Group([("p", torch.nn.Parameter(torch.zeros(2)))])], made, 10)


def test_the_classes_are_those_of_the_libraries():
    import pytorch_optimizer.optimizer

    for library, module in ((optimizers.TORCH, torch.optim), (optimizers.MORE, pytorch_optimizer.optimizer)):
        for name in optimizers.classes(library):
            assert issubclass(getattr(module, name), torch.optim.Optimizer)
            assert optimizers.arguments(optimizers.OptimizerKind(library, name)), name
    assert all(hasattr(torch.optim, n) or hasattr(pytorch_optimizer.optimizer, n) for n in optimizers.REFUSED)


@pytest.mark.parametrize("limit", [0.5, 50.0, float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(limit):
    def gradients():
        torch.manual_seed(0)
        some = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        for p in some[:2]:  # one has none
            p.grad = torch.randn(4, 3)
        return some

    ours, theirs = gradients(), gradients()
    assert optim.clip(ours, limit) == torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))


def test_a_gradient_that_is_not_finite_is_told_by_the_norm():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([float("nan"), 1.0])
    assert optim.clip([p], 1.0).isnan()
