"""Text for the models: our own T5, which may learn, or a frozen one of transformers, its embeddings kept on disk."""
from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import tokenizer
from .config import Config
from .run import write_whole

SHARD = 1024  # captions in one file of the cache
AT_ONCE = 32  # captions in one pass of the frozen encoder


def hide_broken_torchvision():
    """transformers imports torchvision wherever it is installed, and fails with one of another torch. T5 needs none."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None


def make(config: Config, captions: list[str], folder: Path | None, facts: dict | None = None) -> nn.Module | None:
    """The text encoder that the settings ask for. captions: what a new tokenizer is made from; facts: of a run that is
    opened again, whose tokenizer lies in `folder`. A tokenizer in `folder` is taken before one is made: `Run.open` has
    cleared away what is not of the run, and other processes read what the first one made."""
    text = config.text
    if not text.encoder:
        return None
    hide_broken_torchvision()
    from ..models_impl.text.t5 import TextEncoder

    if text.frozen:
        return FrozenT5(text.encoder, text.max_length, Path(text.cache or (folder or Path()) / "embeddings"))
    kept = folder / "tokenizer.json" if folder else None
    given = Path(text.tokenizer).expanduser() if text.tokenizer else kept
    if facts and "text" in facts:
        encoder = TextEncoder(facts["text"], Tokenizer.from_file(str(kept)))
    elif text.encoder != "small":
        encoder = TextEncoder.read(Path(text.encoder).expanduser())
    else:
        if given and given.exists():
            made = Tokenizer.from_file(str(given))
        else:
            made = tokenizer.train(captions, text.vocabulary)
            if kept:  # before another process looks for it
                write_whole(kept, made.to_str(pretty=True))
        encoder = TextEncoder(dict(
            d_model=text.width, d_ff=text.hidden, d_kv=text.width // text.heads, num_heads=text.heads,
            num_layers=text.depth, vocab_size=made.get_vocab_size(), is_gated_act=True, dense_act_fn="gelu_new",
            relative_attention_num_buckets=32, layer_norm_epsilon=1e-6, max_length=text.max_length,
        ), made)
    return encoder.requires_grad_(text.learn)


def width(text: nn.Module) -> int:
    return text.width if isinstance(text, FrozenT5) else text.config["d_model"]


def encode(text: nn.Module, captions: list[str], device) -> tuple[Tensor, Tensor]:
    """-> context (B, L, C), mask (B, L) with True = keep. The empty caption is </s> alone."""
    if isinstance(text, FrozenT5):
        return text.lookup(captions, device)
    ids, mask = text.tokenize(captions)
    mask = mask.to(device)
    return text(ids.to(device), mask), mask


class FrozenT5(nn.Module):
    """Embeddings of a T5 encoder that does not learn. It is loaded only while a caption is missing from the cache."""

    def __init__(self, name: str, max_length: int, cache: Path):
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer

        self.name, self.max_length = name, max_length
        try:
            self.width = AutoConfig.from_pretrained(name, local_files_only=True).d_model
            self.tokens = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"text.encoder={name!r} cannot be read as a T5: {str(error).splitlines()[0]} Nothing is "
                "downloaded: name a folder that holds one, or a model that is in Hugging Face's cache."
            ) from error
        self.folder = cache / hashlib.sha256(f"{name} {max_length}".encode()).hexdigest()[:16]
        self.encoder: list[nn.Module] = []  # in a list: not a part of what is trained, saved or moved
        self.places: dict[str, Path] = {}
        self.open: dict[Path, object] = {}
        self.new: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self):
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.open:
                self.index(shard)

    def index(self, shard: Path):
        self.open[shard] = safe_open(shard, framework="pt")
        self.places.update({key: shard for key in self.open[shard].keys()})

    @staticmethod
    def key(caption: str) -> str:
        return hashlib.sha256(caption.encode()).hexdigest()[:40]

    def prepare(self, captions: list[str], device, progress=lambda items: items):
        """Embed what is missing and write it down, then let the encoder go."""
        self.refresh()  # another process may have been first
        missing = [c for c in dict.fromkeys(captions) if self.key(c) not in self.places]
        for start in progress(range(0, len(missing), AT_ONCE)):
            self.embed(missing[start:start + AT_ONCE], device)
            if len(self.new) >= SHARD:
                self.write()
        self.write()
        self.encoder.clear()

    @torch.no_grad()
    def embed(self, captions: list[str], device):
        if not self.encoder:
            from transformers import T5EncoderModel

            encoder = T5EncoderModel.from_pretrained(self.name, local_files_only=True, torch_dtype=torch.float32)
            self.encoder.append(encoder.to(device).eval())
        read = self.tokens(captions, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        mask = read.attention_mask.to(device)
        with torch.autocast(torch.device(device).type, enabled=False):  # the release embeds in float32
            rows = self.encoder[0](input_ids=read.input_ids.to(device), attention_mask=mask).last_hidden_state
        for caption, row, length in zip(captions, rows, mask.sum(1).tolist(), strict=True):
            self.new[self.key(caption)] = row[:length].to("cpu", torch.bfloat16).clone()

    def write(self):
        if self.new:
            self.folder.mkdir(parents=True, exist_ok=True)
            shard = self.folder / f"{len(self.open):06d}.safetensors"
            unfinished = shard.with_suffix(".unfinished")
            save_file(self.new, unfinished, metadata={"encoder": json.dumps([self.name, self.max_length])})
            unfinished.replace(shard)
            self.new = {}
            self.index(shard)

    def lookup(self, captions: list[str], device) -> tuple[Tensor, Tensor]:
        keys = [self.key(c) for c in captions]
        missing = {k: c for k, c in zip(keys, captions, strict=True) if k not in self.places and k not in self.new}
        if missing:
            self.embed(list(missing.values()), device)
        rows = [self.new[k] if k in self.new else self.open[self.places[k]].get_tensor(k) for k in keys]
        lengths = torch.tensor([len(row) for row in rows])
        context = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, torch.float32)
        return context, (torch.arange(context.shape[1]) < lengths[:, None]).to(device)
