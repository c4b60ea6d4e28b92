"""The configuration of a T5 encoder's file, from its shapes and what our exports say beside them."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from ..guard import reading
from ..parsing import from_json
from ..state_dict import count, metadata_config
from . import MAX_LENGTH, T5_FAMILY

LONGEST = 2**15  # tokens; T5's were trained with 512, and our small ones with less
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")
GUESSED = ("dense_act_fn",)  # entries that the shapes do not decide


def from_shapes(tensors: Mapping[str, Tensor]) -> dict:
    """The entries that keys and shapes give, under Hugging Face's names. Raises ValueError for an incomplete file."""
    first = "encoder.block.0.layer."
    gated = f"{first}1.DenseReluDense.wi_0.weight" in tensors
    up = f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    query, bias = f"{first}0.SelfAttention.q.weight", f"{first}0.SelfAttention.relative_attention_bias.weight"
    if missing := [key for key in ("shared.weight", query, bias, up) if key not in tensors]:
        raise ValueError(f"This T5 encoder is incomplete: it has no {', '.join(missing)}.")
    if odd := next((key for key in ("shared.weight", query, bias, up) if tensors[key].ndim != 2), None):
        raise ValueError(f"{odd} of this T5 encoder has the shape {list(tensors[odd].shape)}, and is a matrix.")
    vocab_size, width = tensors["shared.weight"].shape
    heads, inner = tensors[bias].shape[1], tensors[query].shape[0]
    if not heads or inner % heads:
        raise ValueError(f"This T5 encoder is {inner} wide inside, which {heads} heads do not divide.")
    return dict(
        d_model=width, d_ff=tensors[up].shape[0], d_kv=inner // heads, num_heads=heads,
        num_layers=count(tensors, "encoder.block"), vocab_size=vocab_size, is_gated_act=gated,
        dense_act_fn="gelu_new" if gated else "relu",
    )


def configuration(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict:
    """The entries of a file, completed by those of our exports. Raises ValueError where these contradict the shapes, or
    cannot be."""
    shapes, stated = from_shapes(tensors), metadata_config(metadata, T5_FAMILY) or {}
    for name in (shapes.keys() & stated.keys()) - set(GUESSED):
        if stated[name] != shapes[name]:
            raise ValueError(f"The file's configuration says {name}={str(stated[name])[:40]}, its weights say "
                             f"{shapes[name]}.")
    config = {"max_length": MAX_LENGTH, **shapes, **stated}
    length = config["max_length"]
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= LONGEST:
        raise ValueError(f"The file's configuration says max_length={str(length)[:40]}; it reads 1 to {LONGEST:,} "
                         "tokens.")
    if config["dense_act_fn"] not in ACTIVATIONS:
        raise ValueError(f"The file's configuration says dense_act_fn={str(config['dense_act_fn'])[:40]!r}; known are "
                         f"{', '.join(ACTIVATIONS)}.")
    return config


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises ValueError where it is none, with its name."""
    with reading(path):
        return tokenizer(path.read_text(encoding="utf-8"), ends=False)


def tokenizer(text: str, ends: bool = True) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text. Raises ValueError for a text that is none, and with `ends` for one that
    appends no end token."""
    from_json(text, "The tokenizer in this file")  # its own errors do not say where
    try:
        made = Tokenizer.from_str(text)
        end = made.encode("").ids
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"The tokenizer in this file cannot be read: {str(error)[:200]}.") from error
    if ends and not end:
        raise ValueError("The tokenizer in this file appends no end token to a text (post_processor), as T5's does: "
                         "the file is incomplete.")
    return made
