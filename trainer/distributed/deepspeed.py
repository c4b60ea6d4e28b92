"""Gradients and moments in parts, one for each process, by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2); or in
host memory, where its settings say so. Weights stay whole, and so does everything that is written.

DeepSpeed flattens the parameters of a group and gives each process a stretch of it. What a parameter has of such a
stretch is in its `_hp_mapping`; DeepSpeed's own functions that gather it (deepspeed.utils) know the moments of the
first group alone after the first step, so it is done here.
"""
from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from ..config import Config
from ..training.optim import Optimizers


def plugin():
    """What accelerate's launcher was told of DeepSpeed: its own questions, or a file."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin()


def problems(config: Config) -> list[str]:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return ["accelerate was told to use DeepSpeed, which is not installed: pip install deepspeed, or launch "
                "without it."]
    found, told = [], plugin().deepspeed_config
    stage = told["zero_optimization"].get("stage")
    if stage not in (1, 2):
        instead = "memory.shard=true spreads the weights too (FSDP2)" if stage == 3 else "a launch without DeepSpeed " \
            "joins whole gradients"
        found.append(f"DeepSpeed was told zero_stage {stage}, and this trainer uses 1 and 2; {instead}.")
    if config.optimizer.name != "adamw":
        found.append(f"DeepSpeed goes with optimizer.name='adamw', not {config.optimizer.name!r}, which looks at whole "
                     "matrices.")
    if config.recipe.name == "pixart_dmd":
        found.append("DeepSpeed clips all gradients as one, and recipe.name='pixart_dmd' those of two networks apart: "
                     "launch without it, or with memory.shard=true.")
    for name in ("optimizer", "scheduler"):
        if name in told:
            found.append(f"DeepSpeed's file names its own {name}: take it out, the recipe's [optimizer] decides.")
    for name in ("fp16", "bf16"):
        if (told.get(name) or {}).get("enabled") is True:
            found.append(f"DeepSpeed's file turns {name} on: take it out, the recipe's precision decides.")
    return found


def settings(config: Config, rounds: int, pictures: int, processes: int) -> dict:
    """DeepSpeed's, of the launcher's and the recipe's; what the launcher left to be decided ("auto") is DeepSpeed's
    default."""
    told = decided(plugin().deepspeed_config)
    return {
        **{k: v for k, v in told.items() if k not in ("optimizer", "scheduler", "fp16", "bf16")},
        "train_batch_size": rounds * pictures * processes,
        "train_micro_batch_size_per_gpu": pictures,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,  # torch's
        "zero_force_ds_cpu_optimizer": False,
    }


def decided(told: dict) -> dict:
    return {k: decided(v) if isinstance(v, dict) else v for k, v in told.items() if v not in ("auto", None)}


def engine(recipe: nn.Module, optimizer: Optimizers, config: Config, rounds: int, pictures: int, processes: int):
    """DeepSpeed's, of a recipe and the one torch optimizer in `optimizer`, in whose place it steps from now on."""
    import deepspeed

    part, = optimizer.parts
    parameters = [p for group in part.param_groups for p in group["params"]]
    moments = part.state_dict()["state"]
    part.state.clear()
    for p in parameters:  # DeepSpeed lays them out flat
        p.data = p.data.contiguous()
    made, *_ = deepspeed.initialize(model=recipe, optimizer=part,
                                    config=settings(config, rounds, pictures, processes))
    optimizer.parts = [Stretches(made, parameters)]
    optimizer.parts[0].load_state_dict({"state": moments})
    return made


def shares(processes: int) -> tuple[float, float]:
    """(of gradients, of moments) that a process has on its device."""
    told = plugin().deepspeed_config["zero_optimization"]
    outside = (told.get("offload_optimizer") or {}).get("device", "none") != "none"
    return 1 / processes if told.get("stage") == 2 else 1.0, 0.0 if outside else 1 / processes


def norm(engine) -> Tensor:
    """Of all gradients, before they were clipped in the last step."""
    return torch.as_tensor(engine.get_global_grad_norm())


class Stretches:
    """The optimizer of an engine, with whole moments for each parameter going in and out."""

    def __init__(self, engine, parameters: list[nn.Parameter]):
        self.engine, self.zero = engine, engine.optimizer
        self.of = {id(p): flat for some, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups,
                                                     strict=True) for p in some}
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
                if (place := p._hp_mapping) is not None:
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
                if (place := p._hp_mapping) is not None:
                    stretch(there, place.hp_fragment_address).copy_(
                        stretch(value.flatten(), place.lp_fragment_address))


def stretch(flat: Tensor, place) -> Tensor:
    return flat.narrow(0, place.start, place.numel)
