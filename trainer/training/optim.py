"""An optimizer of a library (config/optimizers.py), or Muon for hidden matrices and convolutions beside AdamW for the
rest, at learning rates that are functions of the step."""
from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import contextmanager
from importlib import import_module

import torch

from ..config import optimizers, rules
from ..config.schema import Optimizer
from ..distributed import sharded
from ..libraries import QUANT_STATE
from ..memory.rounding import Rounded
from .groups import Group, divided

SCALED_BATCH = 256  # the batch that scaled learning rates are given for
SMALL_8BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller parameters in 32 bits


def learning_rate_share(step: int, steps: int, settings: Optimizer) -> float:
    """The share of the full learning rate at this step: up from zero, and from `decay_from` down to `decay_to`."""
    share = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    start = settings.decay_from * steps
    if settings.decay != "constant" and step >= start:
        height = SHAPES[settings.decay](step - start, max(steps - start, 1), settings.decay_cycles)
        share *= settings.decay_to + (1 - settings.decay_to) * height
    return share


SHAPES = {
    "linear": lambda t, T, _: 1 - t / T,
    "cosine": lambda t, T, _: 0.5 * (1 + math.cos(math.pi * (t / T))),
    # SGDR (arXiv 1608.03983), equation 5 with cycles of equal length.
    "cosine_restarts": lambda t, T, cycles: 0.5 * (1 + math.cos(math.pi * (cycles * t / T % 1))),
    # REX (arXiv 2107.04197), section 3: the learning rate stays high for longer than a line's, and then falls.
    "rex": lambda t, T, _: (1 - t / T) / (0.5 + 0.5 * (1 - t / T)),
}
"""decay -> the height, from 1 down to 0, after t of T steps."""


def scaled_learning_rate(settings: Optimizer, batch_size: int, learning_rate: float | None = None) -> float:
    """optimizer.learning_rate, or another, for this batch (diffusion/utils/optimizer.py of PixArt-sigma@1ce521a,
    auto_scale_lr)."""
    share = batch_size / SCALED_BATCH
    scale = {"none": 1.0, "sqrt": share**0.5, "linear": share}[settings.learning_rate_scaling]
    return (learning_rate or settings.learning_rate) * scale


def names_of(group: dict) -> list[str]:
    return [name for name, _ in group["params"]]


def is_matrix(p: torch.Tensor) -> bool:
    """Or the kernel of a convolution, but not of a depthwise one, whose channels know nothing of each other."""
    return p.ndim == 2 or (p.ndim == 4 and p.shape[1] > 1)


def keywords(settings: Optimizer) -> dict:
    """The arguments of the class beside parameters and learning rate."""
    chosen = optimizers.kind(settings.name)
    given, takes = dict(chosen.defaults), optimizers.arguments(chosen)
    if settings.betas:
        given["betas"] = tuple(settings.betas)
    if settings.eps:
        given["eps"] = settings.eps
    if "weight_decay" in takes:
        given["weight_decay"] = settings.weight_decay
    return given | {name: tuple(value) if isinstance(value, list) else value
                    for name, value in settings.arguments.items()}


class Muon(torch.optim.Muon):
    """torch's, which takes only matrices, for the kernels of convolutions too: each is one of (out, in * h * w), as in
    Muon's own code (KellerJordan/Muon, muon.py)."""

    def __init__(self, groups: list[dict], **settings):
        self.kernels = []  # (the matrix that is trained in its place, kernel)
        super().__init__([{**group, "params": [self._matrix(p) for p in group["params"]]} for group in groups],
                         **settings)

    def _matrix(self, p: torch.Tensor) -> torch.Tensor:
        if p.ndim == 2:
            return p
        matrix = torch.nn.Parameter(p.detach().flatten(1).contiguous())
        self.kernels.append((matrix, p))
        return matrix

    @torch.no_grad()
    def step(self):
        for matrix, p in self.kernels:
            matrix.copy_(p.flatten(1))
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        super().step()
        for matrix, p in self.kernels:
            p.copy_(matrix.view_as(p))

    def zero_grad(self, set_to_none: bool = True):
        super().zero_grad(set_to_none)
        for _, p in self.kernels:
            p.grad = None


def clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """torch's clip_grad_norm_; on a CPU without its product by 1 where the norm is below the limit. For another device
    one would have to wait to know that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type != "cpu" or not norm <= limit:  # not a number is clipped too
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


class Optimizers:
    """One or more torch optimizers behind the few calls that the loop makes."""

    def __init__(self, groups: list[Group], settings: Optimizer, steps: int, batch_size: int = 0, seed: int = 0,
                 in_backward: bool = False):
        """seed: of the run. in_backward: each parameter learns during the backward pass, once its gradient is there
        (`begin`)."""
        self.settings, self.steps, self.batch_size, self.seed = settings, steps, batch_size, seed
        self.kind = optimizers.kind(settings.name)
        self.learning_rate = scaled_learning_rate(settings, batch_size)
        self.clipped = {}
        for group in groups:
            self.clipped.setdefault(group.clipped, []).extend(p for _, p in group.params)
        self.parameters = [p for some in self.clipped.values() for p in some]
        self.in_backward = in_backward
        layout = self.layout = self.laid_out(divided(groups, settings.groups))
        if in_backward or any(p.dtype == torch.bfloat16 for p in self.parameters):
            layout = [[{**g, "params": [one]}] for part in layout for g in part for one in g["params"]]
        self.names = [[names_of(g) for g in part] for part in layout]
        self.former_names = [[names_of(g) for g in part] for part in self.laid_out(groups)]
        self.parts = [self.make(some) for some in layout]
        self.full = [[g["lr"] for g in part.param_groups] for part in self.parts]
        self.initial = [[dict(g) for g in part.param_groups] for part in self.parts]
        self.training = {}
        self.norms, self.at = {}, 0
        if in_backward:
            for i, (group,) in enumerate(layout):
                (_, p), = group["params"]
                p.register_post_accumulate_grad_hook(lambda p, i=i: self.step_one(i, p))

    def laid_out(self, groups: list[Group]) -> list[list[dict]]:
        """What each torch optimizer trains: all that Muon does not train in one, or what has one learning rate where
        that is estimated for all of an optimizer's parameters; and what Muon trains."""
        rest, hidden = [], []
        for group in groups:
            mine = {n for n, p in group.params if self.settings.name == "muon" and n in group.matrices and is_matrix(p)}
            for some, muon in ((rest, False), (hidden, True)):
                if params := [(n, p) for n, p in group.params if (n in mine) == muon]:
                    some.append(self.group(group, params, muon))
        if self.kind.estimates:
            alike = [[g for g in rest if g["lr"] == rate] for rate in dict.fromkeys(g["lr"] for g in rest)]
        else:
            alike = [rest]
        return [some for some in (*alike, hidden) if some]

    def group(self, group: Group, params: list[tuple[str, torch.nn.Parameter]], muon: bool) -> dict:
        """One of a torch optimizer's groups, with names."""
        rate = self.settings.muon_learning_rate if muon else self.learning_rate
        found = {"params": params, "muon": muon, "lr": rate * group.multiple}
        if rule := group.rule:
            found["lr"] = scaled_learning_rate(self.settings, self.batch_size, rule.learning_rate) \
                if rule.learning_rate else found["lr"] * rule.learning_rate_multiple
            if rule.weight_decay is not None:
                found["weight_decay"] = rule.weight_decay
        return found

    def make(self, groups: list[dict]) -> torch.optim.Optimizer | Rounded:
        """The optimizer of groups that `laid_out` gave. Raises ValueError where it refuses its arguments."""
        (name, p), *_ = groups[0]["params"]
        if p.dtype == torch.bfloat16:  # the only one
            return Rounded(p, lambda stand_in: self.make([{**groups[0], "params": [(name, stand_in)]}]))
        muon = groups[0]["muon"]
        groups = [{k: [p for _, p in v] if k == "params" else v for k, v in g.items() if k != "muon"} for g in groups]
        if muon:
            return Muon(groups, momentum=self.settings.muon_momentum, weight_decay=self.settings.weight_decay,
                        adjust_lr_fn="original")
        given = keywords(self.settings)
        if any(sharded.is_part(p) for p in self.parameters):
            given["foreach"] = False  # what is spread over processes and what is not are not taken together
        elif self.can_be_fused(p for g in groups for p in g["params"]):
            given = {"fused": True, **given}
        try:
            cls = getattr(import_module(self.kind.library), self.kind.cls)
            return cls(groups, lr=groups[0]["lr"], **given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer.name={self.settings.name!r} with the arguments {given}: {error}") from error

    def described(self) -> list[str]:
        """What [[optimizer.groups]] make of the parameters, in words."""
        if not self.settings.groups:
            return []
        return [f"{sum(p.numel() for _, p in group['params']):,} at {group['lr']:.3g}, weight decay "
                f"{group.get('weight_decay', self.settings.weight_decay):g}: {names[0]}"
                + (f" and {len(names) - 1} more" if names[1:] else "")
                for part in self.layout for group in part for names in [names_of(group)]]

    def counted(self) -> dict[str, int]:
        """Class -> how many numbers it trains."""
        found = {}
        for part in self.parts:
            name = type(part.inner if isinstance(part, Rounded) else part).__name__
            found[name] = found.get(name, 0) + sum(p.numel() for g in part.param_groups for p in g["params"])
        return found

    def can_be_fused(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Whether torch's fused AdamW can train them. It reads gradients and moments as if they lay in memory as their
        parameters do, which autograd holds for parameters of these formats, and `load` for moments."""
        return (self.kind.library, self.kind.cls) == (optimizers.TORCH, "AdamW") and not rules.asked_for("DEEPSPEED") \
            and all(p.device.type in ("cpu", "cuda") and (p.is_contiguous() or p.is_contiguous(
                memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)) for p in parameters)

    @property
    def estimate(self) -> float:
        """The learning rate that Prodigy estimates, of its first groups; 1 where nothing is estimated."""
        return float(self.parts[0].param_groups[0]["d"]) if self.kind.estimates else 1.0

    def clip(self) -> torch.Tensor:
        """Limits the norm of the gradients, of each network by itself; the largest norm there was."""
        if self.in_backward:  # which are gone
            every = [[self.norms[id(p)] for p in some if id(p) in self.norms] for some in self.clipped.values()]
            return torch.stack([torch.stack(some).norm() for some in every if some]).max()
        limit = self.settings.clip or float("inf")
        one = sharded.clip if any(map(sharded.is_part, self.parameters)) else clip
        return torch.stack([one(some, limit) for some in self.clipped.values()]).max()

    def begin(self, step: int):
        """Before the backward pass of a step."""
        self.at, self.norms = step, {}

    @property
    def midway(self) -> bool:
        """Whether some parameters have learned in this step, and others not yet."""
        return bool(self.norms)

    def step(self, step: int) -> float:
        """The share of the learning rate at this step, at which everything has learned then."""
        if not self.in_backward:
            for i in range(len(self.parts)):
                self.step_part(i, step)
        self.norms = {}
        return learning_rate_share(step, self.steps, self.settings)

    def step_one(self, i: int, p: torch.nn.Parameter):
        self.norms[id(p)] = p.grad.norm(dtype=torch.float32)
        self.step_part(i, self.at)

    def step_part(self, i: int, step: int):
        part, share = self.parts[i], learning_rate_share(step, self.steps, self.settings)
        for group, learning_rate in zip(part.param_groups, self.full[i], strict=True):
            group["lr"] = learning_rate * share
        if isinstance(part, Rounded):
            part.step(((self.seed * 1_000_003 + step) * 65_537 + i) % 2**63)
        else:
            part.step()
        part.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self):
        """Inside, the parameters are what is to be used: with a schedule-free optimizer, the average that it makes of
        them. Afterwards they are to the bit what they were."""
        if not self.kind.averages:
            yield
            return
        with torch.no_grad():
            self.training = {id(p): p.detach().clone() for p in self.parameters}
            for part in self.parts:
                part.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for part in self.parts:
                    part.train()
                for p in self.parameters:  # which rounding has changed
                    p.copy_(self.training[id(p)])
                self.training = {}

    def state_bytes(self, some: set[int] | None = None) -> float:
        """Bytes of the optimizers' state, estimated. some: ids of the only parameters that count.

        A step of a small tensor of as many dimensions shows what is kept of each: sides that are alike grow alike.
        """
        total, kept = 0.0, {}
        for part in self.parts:
            part = part.inner if isinstance(part, Rounded) else part
            for p in (p for g in part.param_groups for p in g["params"] if some is None or id(p) in some):
                if isinstance(part, torch.optim.Muon):
                    total += 4 * p.numel()
                elif self.kind.library == optimizers.BITSANDBYTES and p.numel() >= SMALL_8BIT:
                    total += p.numel() * 2 * (1 + 4 / 256)  # and a scale for each 256
                else:
                    if p.ndim not in kept:
                        kept[p.ndim] = self.probe(p.ndim)
                    sides = dict(zip(SIDES, p.shape, strict=False))
                    total += sum(size * math.prod(sides.get(n, n) for n in shape) for shape, size in kept[p.ndim])
        return total

    def probe(self, ndim: int) -> list[tuple[tuple[int, ...], int]]:
        """(shape, bytes of a number) of every tensor that is kept of a parameter of the shape SIDES[:ndim]."""
        with torch.random.fork_rng(devices=[]):
            p = torch.nn.Parameter(torch.linspace(-1, 1, math.prod(SIDES[:ndim])).reshape(SIDES[:ndim]))
            part = self.make([{"params": [("", p)], "lr": self.learning_rate, "muon": False}])
            p.grad = p.detach().clone()
            part.step()
        tensors = {}
        packed(part.state_dict()["state"], "", tensors)
        return [(tuple(value.shape), value.element_size()) for value in tensors.values() if value.ndim]  # no counts

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the optimizers remember, flat, for safetensors: name of a parameter:name. values holds as JSON
        what is no tensor of a parameter."""
        found, values, groups = {}, {}, []

        def keep(key: str, value):
            if is_plain(value) or (torch.is_tensor(value) and self.kind.library != optimizers.MORE):
                found[key] = sharded.whole(value)
            else:
                values[key] = packed(value, key, found)

        for part, names, initial in zip(self.parts, self.names, self.initial, strict=True):
            flat = [name for some in names for name in some]
            for j, state in part.state_dict()["state"].items():
                for name, value in (state | state.get(QUANT_STATE, {})).items():
                    if name != QUANT_STATE:
                        keep(f"{flat[j]}{OF}{name}", value)
            if self.kind.library == optimizers.MORE:
                for some, group, start in zip(names, part.param_groups, initial, strict=True):
                    kept = {k: packed(v, f"{some[0]}{OF}group{INSIDE}{k}", found) for k, v in group.items()
                            if k not in NOT_KEPT and not same(v, start.get(k))}
                    groups += [{"of": some, "values": kept}] if kept else []
            if self.kind.averages:
                for name, p in zip(flat, (p for group in part.param_groups for p in group["params"]), strict=True):
                    keep(f"{name}{OF}{TRAINING}", self.training.get(id(p), p.detach()))
        if values or groups:
            text = json.dumps({"values": values, "groups": groups}, sort_keys=True).encode()
            found[VALUES] = torch.tensor(list(text), dtype=torch.uint8)
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]):
        """Goes on from what `tensors` gave, in whatever groups that was; with a schedule-free optimizer, the weights
        too are those it trains."""
        remembered, of_groups = former(tensors, self.former_names) if is_former(tensors) else by_name(tensors)
        for part, names in zip(self.parts, self.names, strict=True):
            flat = [name for some in names for name in some]
            own = [p for group in part.param_groups for p in group["params"]]
            state, groups = {}, part.state_dict()["param_groups"]
            for some, group in zip(names, groups, strict=True):
                group |= of_groups.get(some[0], {})
            for j, (key, p) in enumerate(zip(flat, own, strict=True)):
                for name, value in remembered.get(key, {}).items():
                    if name == TRAINING:
                        sharded.local(p).copy_(sharded.local(sharded.part(value, p)))
                        continue
                    if torch.is_tensor(value):
                        value = sharded.part(value, p)
                        like = part.p if isinstance(part, Rounded) else p
                        if self.kind.library == optimizers.TORCH and value.shape == like.shape:
                            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
                        elif p.device.type == "cpu":
                            value = value.clone()  # the file stays open for it else
                    name = came_name(name, p.ndim) if self.kind.cls == "CAME" else name
                    state.setdefault(j, {})[name] = value
            part.load_state_dict({"state": state, "param_groups": groups})
            for j, known in state.items():  # torch gives them the precision of their parameter
                for name, value in known.items():
                    if torch.is_tensor(value) and name in part.state[own[j]] and \
                            part.state[own[j]][name].dtype != value.dtype:
                        part.state[own[j]][name] = value.to(own[j].device)


TRAINING = "training"  # name of the weights that a schedule-free optimizer trains; the model's are their average
NOT_KEPT = "params", "lr", "train_mode"
SIDES = 31, 37, 41, 43, 47  # of the tensors that show what an optimizer keeps, all different
CAME_NAMES = {"mean": "exp_avg", "square_row": "exp_avg_sq_row", "square_column": "exp_avg_sq_col",
              "doubt_row": "exp_avg_res_row", "doubt_column": "exp_avg_res_col"}
"""Names in checkpoints of the trainer's own CAME, which had no others -> pytorch_optimizer's."""


def came_name(name: str, ndim: int) -> str:
    return "exp_avg_sq" if name == "square_row" and ndim < 2 else CAME_NAMES.get(name, name)


Remembered = tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]]
"""(name of a parameter -> name -> value; the same of the group that the parameter was in)."""


def by_name(tensors: dict[str, torch.Tensor]) -> Remembered:
    """What `Optimizers.tensors` gave."""
    text = json.loads(bytes(tensors[VALUES].tolist())) if VALUES in tensors else {"values": {}, "groups": []}
    found = {}
    for key, value in {**tensors, **{k: unpacked(v, tensors) for k, v in text["values"].items()}}.items():
        name, of, what = key.partition(OF)
        if of and INSIDE not in what:
            found.setdefault(name, {})[what] = value
    return found, {name: {k: unpacked(v, tensors) for k, v in group["values"].items()}
                   for group in text["groups"] for name in group["of"]}


def is_former(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether they are of a checkpoint that knows parameters by their places."""
    return any(OF not in key and key != VALUES for key in tensors)


def former(tensors: dict[str, torch.Tensor], names: list[list[list[str]]]) -> Remembered:
    """As `by_name`, of a checkpoint whose keys are part.parameter.name or part.groupN.name, and part.values. names: of
    the parameters, by part and group."""
    found, of_groups = {}, {}
    for i, groups in enumerate(names):
        flat = [name for some in groups for name in some]
        text = tensors.get(f"{i}.{VALUES}")
        values = json.loads(bytes(text.tolist())) if text is not None else {}
        for key, value in {**tensors, **{k: unpacked(v, tensors) for k, v in values.items()}}.items():
            which, _, rest = key.partition(".")
            if which != str(i) or "." not in rest or INSIDE in rest:
                continue
            where, what = rest.split(".", 1)
            if where.startswith("group"):
                for name in groups[int(where.removeprefix("group"))]:
                    of_groups.setdefault(name, {})[what] = value
            else:
                found.setdefault(flat[int(where)], {})[what] = value
    return found, of_groups


OF, VALUES = ":", "values"
INSIDE = "/"  # in the names of tensors that values refers to


def packed(value, name: str, tensors: dict[str, torch.Tensor]):
    """A JSON value of `value`, whose tensors are put into `tensors` under names that begin with `name`."""
    if torch.is_tensor(value):
        name, value = name + INSIDE, sharded.whole(value)
        tensors[name] = value
        return {"tensor": [name, value.stride()]}
    if isinstance(value, dict):
        return {"dict": [[k, packed(v, f"{name}{INSIDE}{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [packed(v, f"{name}{INSIDE}{k}", tensors) for k, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"An optimizer keeps a {type(value).__name__} in its state ({name}), which cannot be saved.")


def unpacked(value, tensors: dict[str, torch.Tensor]):
    if not isinstance(value, dict):
        return value
    (form, inner), = value.items()
    if form == "tensor":
        name, stride = inner
        return torch.empty_strided(tensors[name].shape, stride, dtype=tensors[name].dtype).copy_(tensors[name])
    if form == "dict":
        return {k: unpacked(v, tensors) for k, v in inner}
    return (tuple if form == "tuple" else list)(unpacked(v, tensors) for v in inner)


def is_plain(value) -> bool:
    """Whether a tensor lies in memory row by row; decompositions give others, whose products are rounded otherwise."""
    return torch.is_tensor(value) and value.is_contiguous()


def same(a, b) -> bool:
    return not torch.is_tensor(a) and not torch.is_tensor(b) and a == b
