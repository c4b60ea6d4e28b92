"""Tiny random weights under the names that the shipped workflows use, so that each of them can run anywhere."""

from pathlib import Path

import torch
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.text.t5 import TextEncoder
from pixstack.trainer import tokenizer

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 32  # of the text tokens
EMBEDDED = (("diffusion_models", "pixelflow_emoji_64.safetensors"), ("text_encoders", "pixelflow_emoji_t5.safetensors"))


def tiny_pixelflow(
    path: Path, text: bool = True, num_stages: int = 4, resolution: int = 64, num_classes: int = 1000
) -> PixelFlowConfig:
    condition = dict(context_dim=WIDTH) if text else dict(num_classes=num_classes)
    config = PixelFlowConfig(
        heads=2, head_dim=8, depth=1, num_stages=num_stages, resolution=resolution, **condition
    )
    torch.manual_seed(0)
    weights = {k: 0.1 * torch.randn_like(v) for k, v in PixelFlow(config).state_dict().items()}
    write_file(path, weights, checkpoint.metadata(config))
    return config


def tiny_t5(path: Path) -> TextEncoder:
    torch.manual_seed(0)
    words = tokenizer.train(["a red apple", "the blue car", "a cat"], 40)
    encoder = TextEncoder(
        dict(
            d_model=WIDTH, d_ff=64, d_kv=16, num_heads=2, num_layers=1, vocab_size=words.get_vocab_size(),
            is_gated_act=True, dense_act_fn="gelu_new", relative_attention_num_buckets=32, layer_norm_epsilon=1e-6,
            max_length=64,
        ),
        words,
    )  # fmt: skip
    write_file(path, encoder.weights(), encoder.metadata())
    return encoder


def place(models: Path, workflow: dict) -> None:
    """Every file that `workflow` names in its loaders' `properties.models`, and the embedded ones if not shipped."""
    wanted = {(m["directory"], m["name"]) for n in workflow["nodes"] for m in n["properties"].get("models", [])}
    wanted |= {(folder, name) for folder, name in EMBEDDED if not (ROOT / "assets" / folder / name).exists()}
    for folder, name in wanted:
        path = models / folder / name
        if path.exists():
            continue
        if folder == "text_encoders":
            tiny_t5(path)
        else:
            tiny_pixelflow(path, text="c2i" not in name, num_stages=3 if "emoji" in name else 4)
