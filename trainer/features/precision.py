"""The types that frozen encoders compute in, and how GPUs multiply float32."""
from __future__ import annotations

import torch

from ..config.schema import Config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def set_float32_matmul(config: Config, device: torch.device):
    """As config.float32_matmul says, for the whole process; only of GPUs, so that those of a CPU stay as they are."""
    if device.type == "cuda":
        chosen = {"fp32": "highest", "bf16": "high"}[config.precision]
        torch.set_float32_matmul_precision(chosen if config.float32_matmul == "auto" else config.float32_matmul)
