"""An optimizer of a library (config/optimizers.py), or Muon for hidden matrices and convolutions beside AdamW for the
rest, at learning rates that are functions of the step."""
from __future__ import annotations

import json
import math
from contextlib import contextmanager
from importlib import import_module

import torch

from ..config import optimizers
from ..config.schema import Optimizer
from ..distributed import sharded
from ..libraries import QUANT_STATE
from .groups import Group

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


def scaled_learning_rate(settings: Optimizer, batch_size: int) -> float:
    """The full learning rate for this batch (diffusion/utils/optimizer.py of PixArt-sigma@1ce521a, auto_scale_lr)."""
    share = batch_size / SCALED_BATCH
    return settings.learning_rate * {"none": 1.0, "sqrt": share**0.5, "linear": share}[settings.learning_rate_scaling]


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


class Optimizers:
    """One or more torch optimizers behind the few calls that the loop makes."""

    def __init__(self, groups: list[Group], settings: Optimizer, steps: int, batch_size: int = 0):
        self.settings, self.steps, self.kind = settings, steps, optimizers.kind(settings.name)
        self.learning_rate = scaled_learning_rate(settings, batch_size)
        rest, muon, self.clipped = [], [], {}
        for group in groups:
            self.clipped.setdefault(group.clipped, []).extend(p for _, p in group.params)
            hidden = [p for n, p in group.params if n in group.matrices and is_matrix(p)]
            hidden = hidden if settings.name == "muon" else []
            ids = {id(p) for p in hidden}
            others = [p for _, p in group.params if id(p) not in ids]
            if hidden:
                muon.append({"params": hidden, "lr": settings.muon_learning_rate * group.multiple})
            if others:
                rest.append({"params": others, "lr": self.learning_rate * group.multiple})
        self.parameters = [p for some in self.clipped.values() for p in some]
        self.parts = [self.make(some) for some in self.together(rest)]
        if muon:
            self.parts.append(Muon(
                muon, momentum=settings.muon_momentum, weight_decay=settings.weight_decay, adjust_lr_fn="original"))
        self.full = [[g["lr"] for g in part.param_groups] for part in self.parts]
        self.initial = [[dict(g) for g in part.param_groups] for part in self.parts]
        self.training = {}

    def together(self, groups: list[dict]) -> list[list[dict]]:
        """Groups that one optimizer takes: all, or those of one learning rate where it is estimated for all of them."""
        if not self.kind.estimates:
            return [groups] if groups else []
        return [[g for g in groups if g["lr"] == rate] for rate in dict.fromkeys(g["lr"] for g in groups)]

    def make(self, groups: list[dict]) -> torch.optim.Optimizer:
        """The optimizer of the settings. Raises ValueError where it refuses its arguments."""
        given = keywords(self.settings)
        if any(sharded.is_part(p) for p in self.parameters):
            given["foreach"] = False  # what is spread over processes and what is not are not taken together
        try:
            cls = getattr(import_module(self.kind.library), self.kind.cls)
            return cls(groups, lr=groups[0]["lr"], **given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer.name={self.settings.name!r} with the arguments {given}: {error}") from error

    @property
    def estimate(self) -> float:
        """The learning rate that Prodigy estimates, of its first groups; 1 where nothing is estimated."""
        return float(self.parts[0].param_groups[0]["d"]) if self.kind.estimates else 1.0

    def clip(self) -> torch.Tensor:
        """Limits the norm of the gradients, of each network by itself; the largest norm there was."""
        limit = self.settings.clip or float("inf")
        one = sharded.clip if any(map(sharded.is_part, self.parameters)) else torch.nn.utils.clip_grad_norm_
        return torch.stack([one(some, limit) for some in self.clipped.values()]).max()

    def step(self, step: int):
        share = learning_rate_share(step, self.steps, self.settings)
        for part, learning_rates in zip(self.parts, self.full, strict=True):
            for group, learning_rate in zip(part.param_groups, learning_rates, strict=True):
                group["lr"] = learning_rate * share
            part.step()
            part.zero_grad(set_to_none=True)
        return share

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
        total = 0.0
        for part in self.parts:
            kept = {}
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
            part = self.make([{"params": [p], "lr": self.learning_rate}])
            p.grad = p.detach().clone()
            part.step()
        tensors = {}
        packed(part.state_dict()["state"], "", tensors)
        return [(tuple(value.shape), value.element_size()) for value in tensors.values() if value.ndim]  # no counts

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the optimizers remember, flat, for safetensors: part.parameter.name, and part.groupN.name of what
        belongs to a group; part.values holds as JSON what is no tensor."""
        found = {}
        for i, part in enumerate(self.parts):
            values = {}

            def keep(key: str, value, values=values):
                if is_plain(value) or (torch.is_tensor(value) and self.kind.library != optimizers.MORE):
                    found[key] = sharded.whole(value)
                else:
                    values[key] = packed(value, key, found)

            for j, state in part.state_dict()["state"].items():
                for name, value in (state | state.get(QUANT_STATE, {})).items():
                    if name != QUANT_STATE:
                        keep(f"{i}.{j}.{name}", value)
            for g, group in enumerate(part.param_groups if self.kind.library == optimizers.MORE else ()):
                for name, value in group.items():
                    if name not in NOT_KEPT and not same(value, self.initial[i][g].get(name)):
                        keep(f"{i}.group{g}.{name}", value)
            if self.kind.averages:
                for j, p in enumerate(p for group in part.param_groups for p in group["params"]):
                    keep(f"{i}.{j}.{TRAINING}", self.training.get(id(p), p.detach()))
            if values:
                text = json.dumps(values, sort_keys=True).encode()
                found[f"{i}.values"] = torch.tensor(list(text), dtype=torch.uint8)
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]):
        """Goes on from what `tensors` gave; with a schedule-free optimizer, the weights too are those it trains."""
        for i, part in enumerate(self.parts):
            own = [p for group in part.param_groups for p in group["params"]]
            state, groups = {}, part.state_dict()["param_groups"]
            for (where, name), value in remembered(i, tensors).items():
                if where.startswith("group"):
                    groups[int(where.removeprefix("group"))][name] = value
                elif name == TRAINING:
                    sharded.local(own[int(where)]).copy_(sharded.local(sharded.part(value, own[int(where)])))
                else:
                    p = own[int(where)]
                    if torch.is_tensor(value):
                        value = sharded.part(value, p)
                        value = value.clone() if p.device.type == "cpu" else value  # the file stays open for it else
                    state.setdefault(int(where), {})[came_name(name, p.ndim) if self.kind.cls == "CAME" else name] = \
                        value
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


def remembered(i: int, tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str], object]:
    """(parameter or group, name) -> value, of part i in what `Optimizers.tensors` gave."""
    text = tensors.get(f"{i}.values")
    values = json.loads(bytes(text.tolist())) if text is not None else {}
    found = {}
    for key, value in {**tensors, **{k: unpacked(v, tensors) for k, v in values.items()}}.items():
        which, _, rest = key.partition(".")
        if which == str(i) and "." in rest and INSIDE not in rest:
            found[tuple(rest.split(".", 1))] = value
    return found


INSIDE = "/"  # in the names of tensors that part.values refers to


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
