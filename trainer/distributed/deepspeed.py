"""Gradients and moments in parts, one for each process, by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2); or in
host memory, where its settings say so. Weights stay whole, and so does everything that is written.

DeepSpeed flattens the parameters of a group and gives each process a stretch of it. What a parameter has of such a
stretch is in `libraries.stretch_of`; DeepSpeed's own functions that gather it (deepspeed.utils) know the moments of the
first group only after the first step, so it is done here.
"""
from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from .. import libraries
from ..config.schema import Config
from ..training.optim import Optimizers
from .ddp import Whole, finite, mean


def plugin():
    """DeepSpeed settings of accelerate's launcher: its own questions, or a file."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin()


def settings(config: Config, rounds: int, pictures: int, processes: int) -> dict:
    """DeepSpeed's, of the launcher's and the recipe's; what the launcher left to be decided ("auto") is DeepSpeed's
    default."""
    given = decided(plugin().deepspeed_config)
    return {
        **{k: v for k, v in given.items() if k not in ("optimizer", "scheduler", "fp16", "bf16")},
        "train_batch_size": rounds * pictures * processes,
        "train_micro_batch_size_per_gpu": pictures,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,  # torch's
        "zero_force_ds_cpu_optimizer": False,
    }


def decided(given: dict) -> dict:
    return {k: decided(v) if isinstance(v, dict) else v for k, v in given.items() if v not in ("auto", None)}


def engine(recipe: nn.Module, optimizer: Optimizers, config: Config, rounds: int, pictures: int, processes: int):
    """DeepSpeed's, of a recipe and the one torch optimizer in `optimizer`, in whose place it steps from now on."""
    import deepspeed

    part, = optimizer.parts
    parameters = [p for group in part.param_groups for p in group["params"]]
    moments = part.state_dict()["state"]
    part.state.clear()
    for p in parameters:  # DeepSpeed lays them out flat; to `contiguous` 1x1 kernels are that, whatever their strides
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    made, *_ = deepspeed.initialize(model=recipe, optimizer=part,
                                    config=settings(config, rounds, pictures, processes))
    optimizer.parts = [Stretches(made, parameters)]
    optimizer.parts[0].load_state_dict({"state": moments})
    return made


def shares(processes: int) -> tuple[float, float]:
    """(of gradients, of moments) that a process has on its device."""
    given = plugin().deepspeed_config["zero_optimization"]
    outside = (given.get("offload_optimizer") or {}).get("device", "none") != "none"
    return 1 / processes if given.get("stage") == 2 else 1.0, 0.0 if outside else 1 / processes


class Zero(Whole):
    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        self.model = engine(self.recipe, optimizer, self.config, rounds, pictures,
                                      self.accelerator.num_processes)

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        self.model.set_gradient_accumulation_boundary(last)
        loss = mean(self.model(batch), batch) / rounds
        self.model.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        """As `Whole`'s, but the weights have changed when the norm is known: the checkpoints have not."""
        share = optimizer.step(step)  # which clips too
        norm = torch.as_tensor(self.model.get_global_grad_norm())  # before they were clipped
        finite(norm, step, self.config)
        return norm, share


class Stretches:
    """The optimizer of an engine, with whole moments for each parameter going in and out."""

    def __init__(self, engine, parameters: list[nn.Parameter]):
        self.engine, self.zero = engine, engine.optimizer
        self.of = {id(p): flat for group, flat in libraries.flat_moments(self.zero) for p in group}
        self.parameters = parameters

    @property
    def param_groups(self) -> list[dict]:
        return self.zero.param_groups

    def step(self):
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True):
        """DeepSpeed did it."""

    def state_dict(self) -> dict:
        """All processes must ask."""
        return {"state": {i: self.whole(p) for i, p in enumerate(self.parameters)}}

    def whole(self, p: nn.Parameter) -> dict[str, Tensor]:
        found = {}
        for name, value in self.zero.optimizer.state[self.of[id(p)]].items():
            if torch.is_tensor(value) and value.ndim:
                value, own = torch.zeros(p.numel(), device=p.device), value
                if (place := libraries.stretch_of(p)) is not None:
                    stretch(value, place.lp_fragment_address).copy_(stretch(own, place.hp_fragment_address))
                distributed.all_reduce(value)
                value = value.view_as(p)
            # Each parameter has a count of its own in torch's optimizers, which is counted up for each.
            found[name] = value.clone() if torch.is_tensor(value) else value
        return found

    def load_state_dict(self, state: dict):
        own = self.zero.optimizer.state
        for i, known in state["state"].items():
            p = self.parameters[i]
            flat = self.of[id(p)]
            for name, value in known.items():
                if not (torch.is_tensor(value) and value.ndim):
                    own[flat][name] = value
                    continue
                there = own[flat].setdefault(name, torch.zeros_like(flat))
                if (place := libraries.stretch_of(p)) is not None:
                    stretch(there, place.hp_fragment_address).copy_(
                        stretch(value.flatten(), place.lp_fragment_address))


def stretch(flat: Tensor, place) -> Tensor:
    return flat.narrow(0, place.start, place.numel)
