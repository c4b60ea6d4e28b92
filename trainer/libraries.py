"""What is asked of other libraries beyond what they document, in one place: everything else in the trainer keeps to
public interfaces. A test holds both, and names what a new version of a library has taken away.
"""
from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers opens a folder: nothing is downloaded, and no code that lies in it is run, nor asked about."""


class Private(NamedTuple):
    module: str
    name: str
    """An attribute of the module, or a word of its source."""
    why: str


PRIVATE = (
    Private("torch", "_C._current_graph_task_id", "whether a block runs for the backward pass (memory.swap_blocks)"),
    Private("torch.nn.parallel", "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
            "frozen blocks in host memory are not to be broadcast; no argument of DDP says so"),
    Private("torch._subclasses.fake_tensor", "FakeTensorMode", "a step and probes without memory (--dry-run)"),
    Private("torch.utils._python_dispatch", "TorchDispatchMode", "every operation of that step"),
    Private("torch.utils._pytree", "tree_map", "the tensors of an operation"),
    Private("torch.utils._pytree", "tree_leaves", "the same"),
    Private("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu", "torch's table of flops leaves it out"),
    Private("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "the same"),
    Private("peft.tuners.tuners_utils", "BaseTunerLayer._disable_adapters",
            "enable_adapters(False) takes requires_grad from the adapter's weights"),
    Private("bitsandbytes.optim.optimizer", "__bnb_optimizer_quant_state__", "where a state_dict has 8-bit moments"),
    Private("deepspeed.utils.mixed_precision_linkage", "_hp_mapping",
            "which stretch of the flat moments is a parameter's; deepspeed.utils knows the first group only"),
    Private("deepspeed.runtime.zero.stage_1_and_2", "single_partition_of_fp32_groups", "the flat moments of a process"),
    Private("deepspeed.runtime.zero.stage_1_and_2", "bit16_groups", "the parameters that were flattened"),
)

QUANT_STATE = "__bnb_optimizer_quant_state__"


def hide_broken_torchvision():
    """transformers imports torchvision wherever it is installed, and fails with one of another torch. T5 needs none."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None


def probing() -> FakeTensorMode:
    """A context in which networks are made and run with sizes and no numbers: a probe as wide as a released network
    takes a tenth of a second, and no memory."""
    return FakeTensorMode()


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1


def hide_from_ddp(module: nn.Module, names: list[str]):
    """Parameters that DDP neither broadcasts nor checks."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def switch_adapter(layer: nn.Module, on: bool):
    """Switches the adapter of one of peft's layers, whose weights keep requires_grad."""
    layer._disable_adapters = not on


def stretch_of(p: nn.Parameter):
    """Where the moments of a parameter lie in those that DeepSpeed has flattened; None where they are elsewhere."""
    return p._hp_mapping


def flat_moments(optimizer) -> list[tuple[list[nn.Parameter], Tensor]]:
    """What DeepSpeed's optimizer has flattened: (parameters of a group, the tensor whose moments are this process's
    part of them)."""
    return list(zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True))
