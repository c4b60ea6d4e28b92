"""Text encoders: our own T5, which may learn, and frozen ones of transformers, whose embeddings a `store.Store` keeps.
A frozen one is loaded only while something is to be encoded."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models_impl import state_dict
from ...models_impl.files import write_whole
from ...models_impl.guard import reading
from ...models_impl.text import captions as cleaning
from ...models_impl.text import shapes
from ..config.schema import Config
from ..files import entries
from ..libraries import LOCAL, hide_broken_torchvision
from ..memory import quantization
from . import tokenizer
from .precision import DTYPES
from .store import Store, digest, fingerprint

AT_ONCE = 32  # captions in one pass of the frozen encoder


def make(config: Config, captions: list[str], folder: Path | None, facts: dict | None = None) -> nn.Module | None:
    """The text encoder that the settings ask for. captions: what a new tokenizer is made from; facts: of a run that is
    opened again, whose tokenizer lies in `folder`. A tokenizer in `folder` is taken before one is made: `Run.open` has
    cleared away what is not of the run, and other processes read what the first one made."""
    text = config.text
    if not text.encoder:
        return None
    hide_broken_torchvision()
    from ...models_impl.text.t5 import TextEncoder

    if text.frozen:
        return frozen(config, folder, captions=captions)
    kept = folder / "tokenizer.json" if folder else None
    given = Path(text.tokenizer).expanduser() if text.tokenizer else kept
    if facts and "text" in facts:
        made = shapes.tokenizer_of(kept)
        with reading(folder / "facts.json"):
            encoder = TextEncoder(facts["text"], made)
    elif text.encoder != "small":
        encoder = TextEncoder.read(Path(text.encoder).expanduser())
    else:
        if given and given.exists():
            made = shapes.tokenizer_of(given)
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
    return text.width if isinstance(text, FROZEN) else text.config["d_model"]


def encode(text: nn.Module, captions: list[str], device, padded: bool = False) -> tuple[Tensor, Tensor]:
    """-> context (B, L, C), mask (B, L) with True = keep. The empty caption is only </s>. padded: pad the captions of
    an encoder of ours as `text.padded` does a frozen one's; the mask then keeps everything."""
    if isinstance(text, FrozenT5):
        return text.lookup(captions, device)
    ids, mask = text.tokenize(captions)
    if padded:
        ids = nn.functional.pad(ids, (0, text.max_length - ids.shape[1]))
        mask = torch.ones_like(ids, dtype=torch.bool)
    mask = mask.to(device)
    return text(ids.to(device), mask), mask


def frozen(config: Config, folder: Path | None = None, writer: int = 0,
           captions: Sequence[str] = ()) -> FrozenT5 | FrozenClip:
    """The frozen text encoder of the settings. folder: of the run, where the features lie if no other is named;
    captions: what is trained on, where a word is to be taught."""
    hide_broken_torchvision()
    text = config.text
    root = Path(text.cache or config.cache.folder or (folder or Path()) / "embeddings").expanduser()
    if is_clip(text.encoder):
        return FrozenClip(text.encoder, root, text.tokenizer, text.precision, writer, captions)
    return FrozenT5(text.encoder, text.max_length, root, text.tokenizer, text.clean, text.precision, writer,
                    text.padded, text.clip)


def is_clip(name: str) -> bool:
    """Whether a folder says in its config.json that it holds a CLIP."""
    file = Path(name).expanduser() / "config.json"
    return file.is_file() and str(entries(file).get("model_type")).startswith("clip")


def files(text: nn.Module | None) -> dict[str, tuple[dict, dict]]:
    """What export writes of a text encoder: nothing of one that does not learn, which is a file already."""
    if text is None or isinstance(text, FROZEN) or not any(p.requires_grad for p in text.parameters()):
        return {}
    return {"text_encoders/{name}_t5.safetensors": (text.weights(), text.metadata())}


def read_frozen(kind: type, name: str | Path, precision: str) -> nn.Module:
    """An encoder of transformers, frozen, on the CPU. precision: as `schema.Text` has it."""
    model = kind.from_pretrained(name, **LOCAL, dtype=DTYPES.get(precision, torch.bfloat16))
    model = model.eval().requires_grad_(False)
    return model if precision in DTYPES else quantization.in_few_bits(model, precision)


class FrozenT5(nn.Module):
    """Embeddings of a T5 encoder that does not learn; with `clip`, of a CLIP's text encoder too."""

    word: None = None
    """No word is taught to it, as to a FrozenClip."""

    def __init__(self, name: str, max_length: int, cache: Path, tokens: str = "", clean: bool = False,
                 precision: str = "fp32", writer: int = 0, padded: bool = False, clip: str = ""):
        """padded, clip: see `schema.Text`."""
        super().__init__()
        hide_broken_torchvision()
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import cached_file

        self.name, self.max_length, self.clean, self.precision = name, max_length, clean, precision
        try:
            self.width = AutoConfig.from_pretrained(name, **LOCAL).d_model
            folder = Path(name).expanduser()
            if not folder.is_dir():
                folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
            # where a pipeline's folder has it
            beside = folder.parent / {"text_encoder_2": "tokenizer_2"}.get(folder.name, "tokenizer")
            tokens = tokens or (str(beside) if beside.is_dir() and not any(folder.glob("*token*")) else name)
            self.tokens = AutoTokenizer.from_pretrained(tokens, **LOCAL)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"text.encoder={name!r} cannot be read as a T5: {state_dict.first_line(error)}. Nothing is downloaded: "
                "name a folder that holds one, or a model that is in Hugging Face's cache."
            ) from error
        self.padded, self.clip = padded, Path(clip).expanduser() if clip else None
        identity = {"encoder": fingerprint(folder), "max_length": max_length, "clean": clean, "precision": precision}
        if padded:
            identity["padded"] = True
        if clip:
            identity["clip"] = fingerprint(self.clip)
        self.store = Store(cache, "text", identity, writer)
        self.encoder: list[nn.Module] = []  # in a list: not a part of what is trained, saved or moved
        self.pooler: list = []

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those that the store does not have yet, none twice; another process may have filled it."""
        self.store.refresh()
        return [*dict.fromkeys(c for c in captions if digest(c) not in self.store)]

    def prepare(self, captions: Iterable[str], device, progress=lambda items: items):
        """Embed what is missing and write it down, then let the encoder go."""
        missing = self.missing(captions)
        try:
            for start in progress(range(0, len(missing), AT_ONCE)):
                self.embed(missing[start:start + AT_ONCE], device)
        finally:
            self.store.write()
        self.release()

    def release(self):
        self.encoder.clear()
        self.pooler.clear()

    @torch.no_grad()
    def pooled(self, captions: list[str], device) -> Tensor:
        """What CLIP says of whole captions, (B, width) float32; captions that are not in the store are embedded."""
        self.look_for(captions, device)
        return torch.stack([self.store.get(digest(c))["pooled"] for c in captions]).to(device, torch.float32)

    def read_pooled(self, captions: list[str], device) -> Tensor:
        """As FLUX's own HFEmbedder does: 77 tokens, no mask, the vector of the last token after the last norm."""
        if not self.pooler:
            from transformers import AutoTokenizer, CLIPTextModel

            beside = self.clip.parent / "tokenizer"
            tokens = self.clip if any(self.clip.glob("*token*")) or not beside.is_dir() else beside
            try:
                self.pooler += [AutoTokenizer.from_pretrained(tokens, **LOCAL),
                                read_frozen(CLIPTextModel, self.clip, self.precision).to(device)]
            except (OSError, ValueError) as error:
                raise ValueError(f"text.clip={str(self.clip)!r} cannot be read as a CLIP: "
                                 f"{state_dict.first_line(error)}.") from error
        tokens, model = self.pooler
        limit = model.config.max_position_embeddings
        ids = tokens(captions, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").input_ids
        return model(input_ids=ids.to(device)).pooler_output.float()

    @torch.no_grad()
    def embed(self, captions: list[str], device):
        if not self.encoder:
            from transformers import T5EncoderModel

            self.encoder.append(read_frozen(T5EncoderModel, self.name, self.precision).to(device))
        texts = [cleaning.clean_caption(c) for c in captions] if self.clean else captions
        read = self.tokens(texts, padding="max_length" if self.padded else True, truncation=True,
                           max_length=self.max_length, return_tensors="pt")
        mask = (torch.ones_like(read.attention_mask) if self.padded else read.attention_mask).to(device)
        with torch.autocast(torch.device(device).type, enabled=False):  # the releases embed in the encoder's own dtype
            rows = self.encoder[0](input_ids=read.input_ids.to(device), attention_mask=mask).last_hidden_state
            pooled = self.read_pooled(texts, device) if self.clip else [None] * len(texts)
        for caption, row, length, vector in zip(captions, rows, mask.sum(1).tolist(), pooled, strict=True):
            self.store.put(digest(caption), {"tokens": row[:length].to(torch.bfloat16),
                                             **({} if vector is None else {"pooled": vector})})

    def look_for(self, captions: list[str], device):
        """Embed those that are not there."""
        missing = [c for c in dict.fromkeys(captions) if digest(c) not in self.store]
        if missing:
            self.embed(missing, device)

    def lookup(self, captions: list[str], device) -> tuple[Tensor, Tensor]:
        self.look_for(captions, device)
        rows = [self.store.get(digest(c))["tokens"] for c in captions]
        lengths = torch.tensor([len(row) for row in rows])
        context = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, torch.float32)
        return context, (torch.arange(context.shape[1]) < lengths[:, None]).to(device)


class FrozenClip(nn.Module):
    """What a CLIP text encoder says that does not learn: its tokens before the last norm, and the projected vector.

    As Stable Cascade reads CLIP-G: all places are filled, with the end token, which a mask keeps from the encoder and
    not from the network that reads its tokens. It may be taught one word, by a change of a row of its table (`teach`).
    """

    def __init__(self, name: str, cache: Path, tokens: str = "", precision: str = "fp32", writer: int = 0,
                 captions: Sequence[str] = ()):
        """captions: what is trained on, if known; a word that is taught must be in some."""
        super().__init__()
        from transformers import AutoConfig, CLIPTokenizerFast

        self.name, self.precision, folder = name, precision, Path(name).expanduser()
        try:
            shape = AutoConfig.from_pretrained(folder, **LOCAL)
            shape = getattr(shape, "text_config", shape)
            beside = folder.parent / "tokenizer"  # where a pipeline's folder has it
            tokens = tokens or str(beside if beside.is_dir() and not any(folder.glob("*token*")) else folder)
            self.tokens = CLIPTokenizerFast.from_pretrained(tokens, **LOCAL)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"text.encoder={name!r} cannot be read as a CLIP text encoder: "
                             f"{state_dict.first_line(error)}. Its tokenizer belongs beside it.") from error
        self.width, self.pooled_width, self.places = shape.hidden_size, shape.projection_dim, \
            shape.max_position_embeddings
        self.store = Store(cache, "clip", {"encoder": fingerprint(folder), "precision": precision}, writer)
        self.encoder: list[nn.Module] = []  # in a list: not a part of what is trained, saved or moved
        self.captions = captions
        self.word: str | None = None
        self.word_row, self.word_base = 0, []

    def teach(self, word: str, base: list[int]):
        """Add a word whose row in the table begins as the mean of the rows `base`. Raises ValueError where no caption
        would teach it."""
        from transformers import AddedToken

        if self.captions and not any(word in c for c in self.captions):
            raise ValueError(f"No caption has the word {word}, so nothing would teach it. Write it into the captions, "
                             f"or give pictures without one: data.caption=\"a photo of a cat {word}\".")
        if word in self.tokens.get_vocab():
            raise ValueError(f"The text encoder knows the word {word} already: choose another, such as [{word}].")
        self.word, self.word_base = word, base
        self.word_row = len(self.tokens)
        self.tokens.add_tokens([AddedToken(word, normalized=False)])

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those that the store does not have yet, none twice; another process may have filled it."""
        self.store.refresh()
        return [*dict.fromkeys(c for c in captions if digest(c) not in self.store)]

    def prepare(self, captions: Iterable[str], device, progress=lambda items: items):
        """Embed what is missing and write it down, then let the encoder go. With a word that is taught nothing can be
        prepared: captions are embedded anew at every step."""
        if self.word:
            return
        missing = self.missing(captions)
        try:
            for start in progress(range(0, len(missing), AT_ONCE)):
                self.embed(missing[start:start + AT_ONCE], device)
        finally:
            self.store.write()
        self.release()

    def release(self):
        self.encoder.clear()

    def loaded(self, device) -> nn.Module:
        if not self.encoder:
            from transformers import CLIPTextModelWithProjection

            self.encoder.append(read_frozen(CLIPTextModelWithProjection, self.name, self.precision).to(device))
        return self.encoder[0]

    @torch.no_grad()
    def embed(self, captions: list[str], device):
        for caption, tokens, pooled in zip(captions, *self.read(captions, device), strict=True):
            self.store.put(digest(caption), {"tokens": tokens.to(torch.bfloat16), "pooled": pooled.to(torch.bfloat16)})

    def read(self, captions: list[str], device, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, places, width) and vectors (B, pooled_width), float32. change: (1, width) of the word's row, which
        gradients go to."""
        encoder = self.loaded(device)
        read = self.tokens(captions, padding=False, truncation=True, max_length=self.places)["input_ids"]
        lengths = torch.tensor([len(row) for row in read])
        end = self.tokens.eos_token_id
        ids = torch.tensor([row + [end] * (self.places - len(row)) for row in read], device=device)
        mask = (torch.arange(self.places) < lengths[:, None]).to(ids)
        handles = []
        if self.word:
            # The word borrows a known row's number, for the table has none for it, and where the caption ends is
            # sought by numbers in some configurations.
            here, table = ids == self.word_row, encoder.text_model.embeddings.token_embedding
            ids = ids.masked_fill(here, self.word_base[0])
            row = table.weight[self.word_base].float().mean(0) + (0 if change is None else change[0].to(device))

            def replaced(module, args, found):
                return torch.where(here[..., None], row.to(found), found)

            handles.append(table.register_forward_hook(replaced))
        try:
            with torch.autocast(torch.device(device).type, enabled=False):
                found = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        finally:
            for handle in handles:
                handle.remove()
        return found.hidden_states[-1].float(), found.text_embeds.float()

    def lookup(self, captions: list[str], device) -> tuple[Tensor, Tensor]:
        """`read` from what is kept, without gradients."""
        missing = [c for c in dict.fromkeys(captions) if digest(c) not in self.store]
        if missing:
            self.embed(missing, device)
        rows = [self.store.get(digest(c)) for c in captions]
        return tuple(torch.stack([row[part] for row in rows]).to(device, torch.float32)
                     for part in ("tokens", "pooled"))


FROZEN = (FrozenT5, FrozenClip)
