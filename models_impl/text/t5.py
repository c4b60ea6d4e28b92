"""T5 encoders (arXiv 1910.10683) with their tokenizer, as the trainer uses them; ComfyUI has its own network for them.

A text encoder is one safetensors file: Hugging Face's key names, and in the metadata its configuration and the whole
tokenizer.json.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ..guard import reading
from ..state_dict import config_metadata, load_into, metadata_config, read_file
from . import MAX_LENGTH, T5_FAMILY, shapes

CONFIG_ENTRIES = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size", "is_gated_act", "dense_act_fn",
                  "relative_attention_num_buckets", "layer_norm_epsilon")


class TextEncoder(nn.Module):
    """Text -> tokens (B, L, d_model) and their mask (B, L), True = a token of the text, its final </s> included.

    config: the entries of CONFIG_ENTRIES, and max_length, the tokens after which a text is cut.
    """

    def __init__(self, config: Mapping, tokenizer: Tokenizer):
        super().__init__()
        self.config = {name: config[name] for name in CONFIG_ENTRIES}
        self.max_length = config.get("max_length", MAX_LENGTH)
        self.tokenizer = tokenizer
        self.tokenizer.enable_truncation(self.max_length)
        act = self.config["dense_act_fn"]
        self.t5 = T5EncoderModel(T5Config(
            **{k: v for k, v in self.config.items() if k not in ("is_gated_act", "dense_act_fn")},
            feed_forward_proj=f"gated-{act}" if self.config["is_gated_act"] else act,
            dropout_rate=0.0,
        ))

    @classmethod
    def read(cls, path) -> TextEncoder:
        """The encoder of one of our files. Raises ValueError for any other file."""
        with reading(path):
            return cls._of_file(path)

    @classmethod
    def _of_file(cls, path) -> TextEncoder:
        tensors, metadata = read_file(path)
        if metadata_config(metadata, T5_FAMILY) is None or "pixstack.tokenizer" not in metadata:
            raise ValueError(f"{path} is not a text encoder with its tokenizer, as the trainer exports it.")
        try:
            encoder = cls(shapes.configuration(tensors, metadata), shapes.tokenizer(metadata["pixstack.tokenizer"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        # transformers shows the one embedding table under two names
        load_into(encoder.t5, {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}, "this T5 encoder")
        return encoder

    def weights(self) -> dict[str, Tensor]:
        """Tensors for a file, each once."""
        return {k: v for k, v in self.t5.state_dict().items() if k != "encoder.embed_tokens.weight"}

    def metadata(self) -> dict[str, str]:
        return {
            **config_metadata(T5_FAMILY, {**self.config, "max_length": self.max_length}),
            "pixstack.tokenizer": self.tokenizer.to_str(),
        }

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(token ids (B, L) int64 padded with 0, mask (B, L)); L is the longest text of these."""
        rows = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.t5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
