"""What reads captions and pictures for the models: our own T5, which may learn, and frozen encoders of transformers and
diffusers, whose features `cache.Store` keeps. A frozen one is loaded only while something is to be encoded."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...models_impl import state_dict
from ...models_impl.annotators import hed
from ...models_impl.known_files import whose
from ...models_impl.text import captions as cleaning
from ..config import Config
from ..training.noise import batch_noise
from ..training.run import write_whole
from . import taesd, tokenizer
from .cache import Store, digest, fingerprint

AT_ONCE = 32  # captions in one pass of the frozen encoder
PICTURES_AT_ONCE = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VAE_KINDS = ("AutoencoderKL", "AutoencoderTiny")
LAST_OF_ENCODER = "encoder.conv_out.weight"  # mean and deviation, so twice the latent's channels
POSTERIOR = 1  # the kind of `noise.picture_noise` that samples a latent


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
    from ...models_impl.text.t5 import TextEncoder

    if text.frozen:
        return frozen(config, folder, captions=captions)
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
    return text.width if isinstance(text, FROZEN) else text.config["d_model"]


def encode(text: nn.Module, captions: list[str], device, padded: bool = False) -> tuple[Tensor, Tensor]:
    """-> context (B, L, C), mask (B, L) with True = keep. The empty caption is </s> alone. padded: fill an encoder of
    ours up as `text.padded` does a frozen one; the mask then keeps everything."""
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
    return file.is_file() and str(json.loads(file.read_text(encoding="utf-8")).get("model_type")).startswith("clip")


def files(text: nn.Module | None) -> dict[str, tuple[dict, dict]]:
    """What export writes of a text encoder: nothing of one that does not learn, which is a file already."""
    if text is None or isinstance(text, FROZEN) or not any(p.requires_grad for p in text.parameters()):
        return {}
    return {"text_encoders/{name}_t5.safetensors": (text.weights(), text.metadata())}


class FrozenT5(nn.Module):
    """Embeddings of a T5 encoder that does not learn; with `clip`, of a CLIP's text encoder too."""

    def __init__(self, name: str, max_length: int, cache: Path, tokens: str = "", clean: bool = False,
                 precision: str = "fp32", writer: int = 0, padded: bool = False, clip: str = ""):
        """padded, clip: see `config.Text`."""
        super().__init__()
        hide_broken_torchvision()
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import cached_file

        self.name, self.max_length, self.clean, self.dtype = name, max_length, clean, DTYPES[precision]
        try:
            self.width = AutoConfig.from_pretrained(name, local_files_only=True).d_model
            folder = Path(name).expanduser()
            if not folder.is_dir():
                folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
            # where a pipeline's folder has it
            beside = folder.parent / {"text_encoder_2": "tokenizer_2"}.get(folder.name, "tokenizer")
            tokens = tokens or (str(beside) if beside.is_dir() and not any(folder.glob("*token*")) else name)
            self.tokens = AutoTokenizer.from_pretrained(tokens, local_files_only=True)
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

    def prepare(self, captions: list[str], device, progress=lambda items: items):
        """Embed what is missing and write it down, then let the encoder go."""
        self.store.refresh()  # another process may have been first
        missing = [c for c in dict.fromkeys(captions) if digest(c) not in self.store]
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
                model = CLIPTextModel.from_pretrained(self.clip, local_files_only=True, dtype=self.dtype)
                self.pooler += [AutoTokenizer.from_pretrained(tokens, local_files_only=True),
                                model.to(device).eval()]
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

            encoder = T5EncoderModel.from_pretrained(self.name, local_files_only=True, dtype=self.dtype)
            self.encoder.append(encoder.to(device).eval())
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

        self.name, self.dtype, folder = name, DTYPES[precision], Path(name).expanduser()
        try:
            shape = AutoConfig.from_pretrained(folder, local_files_only=True)
            shape = getattr(shape, "text_config", shape)
            beside = folder.parent / "tokenizer"  # where a pipeline's folder has it
            tokens = tokens or str(beside if beside.is_dir() and not any(folder.glob("*token*")) else folder)
            self.tokens = CLIPTokenizerFast.from_pretrained(tokens, local_files_only=True)
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

    def prepare(self, captions: list[str], device, progress=lambda items: items):
        """Embed what is missing and write it down, then let the encoder go. With a word that is taught nothing can be
        prepared: captions are embedded anew at every step."""
        if self.word:
            return
        self.store.refresh()  # another process may have been first
        missing = [c for c in dict.fromkeys(captions) if digest(c) not in self.store]
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

            encoder = CLIPTextModelWithProjection.from_pretrained(self.name, local_files_only=True, dtype=self.dtype)
            self.encoder.append(encoder.to(device).eval().requires_grad_(False))
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


class FrozenVae(nn.Module):
    """Latents of a VAE that does not learn: diffusers' AutoencoderKL or AutoencoderTiny, a folder or one file, or what
    the recipe autoencoder exports.

    Latents are what the VAE says, no scale applied. of: whose pictures it encodes, "" or the name of a condition;
    annotator: a file of HED, whose soft edges of the picture are encoded in its place.
    """

    def __init__(self, path: str, precision: str = "fp32", cache: str = "", name: str = "latent", of: str = "",
                 writer: int = 0, annotator: str = ""):
        super().__init__()
        self.name, self.of, self.path, self.dtype = name, of, Path(path).expanduser(), DTYPES[precision]
        self.annotator, self.edges = Path(annotator).expanduser() if annotator else None, []
        if (self.path / "vae" / "config.json").is_file():  # a whole pipeline
            self.path = self.path / "vae"
        self.store = None
        if cache and self.path.exists():  # a finished run may be opened without it
            identity = {"encoder": fingerprint(self.path), "precision": precision, "of": of,
                        "annotator": fingerprint(self.annotator) if self.annotator else ""}
            self.store = Store(Path(cache).expanduser(), name, identity, writer)
        self.vae: list[nn.Module] = []

    def loaded(self, device) -> nn.Module:
        if not self.vae:
            self.vae.append(read_vae(self.path).to(device, self.dtype).eval().requires_grad_(False))
        return self.vae[0]

    def release(self):
        self.vae.clear()
        self.edges.clear()

    def annotated(self, pictures: Tensor, device) -> Tensor:
        """What is encoded in place of pictures, both (B, 3, H, W) uint8: eight bits, as a file of edges would have."""
        if self.annotator is None:
            return pictures
        if not self.edges:
            self.edges.append(hed.load(self.annotator, device=device))
        with torch.autocast(torch.device(device).type, enabled=False):
            edge = self.edges[0](pictures.to(device).float() / 255)[1]
        return (edge * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    @torch.no_grad()
    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> mean and standard deviation of the latents, (B, C, h, w) float32 each."""
        vae, parts = self.loaded(device), {"mean": [], "std": []}
        with torch.autocast(torch.device(device).type, enabled=False):
            for some in pictures.split(PICTURES_AT_ONCE):
                some = self.annotated(some, device)
                found = vae.encode(some.to(device, self.dtype) / 127.5 - 1)
                latent = getattr(found, "latent_dist", None)
                mean = latent.mean if latent else found.latents
                parts["mean"].append(mean.float())
                parts["std"].append(latent.std.float() if latent else torch.zeros_like(mean, dtype=torch.float32))
        return {name: torch.cat(some) for name, some in parts.items()}

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1], float32."""
        vae = self.loaded(latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            pictures = [vae.decode(some[None].to(self.dtype)).sample.float() for some in latent]
        return torch.cat(pictures).clamp(-1, 1)

    def latents(self, batch, device, seed: int) -> Tensor:
        """One sample of the latents of a batch, (B, C, h, w) float32: from its features if the cache gave it some."""
        found = {part: batch.features[name].to(device) for part in ("mean", "std")
                 if (name := f"{self.name}.{part}") in batch.features}
        if not found:
            found = self.encode(batch.conditions[self.of] if self.of else batch.pictures, device)
        mean, std = found["mean"], found["std"]
        return mean + std * batch_noise(seed, batch.step, batch.positions, mean.shape[1:], device, POSTERIOR)


def vae_problems(path: str, channels: int, reader: str) -> list[str]:
    """What is wrong with a vae.path that is there, for a network that reads latents of so many channels; the weights
    are not loaded. reader: the network, as a person knows it. A torch file is looked at when it is read."""
    place = Path(path).expanduser()
    if not path or not place.exists():
        return []  # said already
    if place.is_dir():
        folder = place / "vae" if (place / "vae" / "config.json").is_file() else place
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("_class_name") not in VAE_KINDS:
            return [f"vae.path={path!r} is not a VAE's folder: its config.json should name one of "
                    f"{', '.join(VAE_KINDS)}."]
        told = found.get("latent_channels", 4)  # diffusers' own default
    else:
        try:
            with safe_open(place, framework="pt") as file:
                names = {plain_vae_name(key): key for key in file.keys()}
                shapes = {name: file.get_slice(names[name]).get_shape() for name in (taesd.MARK, LAST_OF_ENCODER)
                          if name in names}
        except SafetensorError:
            return []
        if not shapes:
            return [not_a_vae(path, names)]
        told = shapes[taesd.MARK][1] if taesd.MARK in shapes else shapes[LAST_OF_ENCODER][0] // 2
    return [] if told == channels else [f"vae.path={path!r} makes latents of {told} channels, and {reader} reads "
                                        f"{channels}: name the VAE that belongs to it."]


def plain_vae_name(key: str) -> str:
    return key.removeprefix("first_stage_model.").removeprefix("vae.")


def not_a_vae(path: str, names) -> str:
    return f"vae.path={path!r} is not a VAE. {whose(names)}"


def read_vae(path: Path) -> nn.Module:
    """A VAE from a folder of diffusers, or from one file under the names of diffusers or of the original LDM, its sizes
    found from the shapes, or of TAESD as core knows it (`autoencoder`). Raises ValueError for anything else."""
    if not path.exists():
        raise ValueError(f"vae.path={str(path)!r}: there is no such file or folder.")
    hide_broken_torchvision()
    try:
        from diffusers import AutoencoderKL, AutoencoderTiny
    except ImportError as error:
        raise ValueError(f"vae.path needs diffusers: pip install diffusers ({error}).") from error
    if path.is_dir():
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() \
            else {}
        kinds = dict(zip(VAE_KINDS, (AutoencoderKL, AutoencoderTiny), strict=True))
        if config.get("_class_name") not in VAE_KINDS:
            raise ValueError(f"vae.path={str(path)!r} is not a VAE's folder: its config.json should name one of "
                             f"{', '.join(VAE_KINDS)}.")
        return kinds[config["_class_name"]].from_pretrained(path, local_files_only=True)
    tensors = state_dict.read_file(path)[0]
    tensors = tensors.get("state_dict", tensors)
    tensors = {plain_vae_name(k): v for k, v in tensors.items()}
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight", "encoder.down.{}.block.0.conv1.weight"
    if taesd.MARK in tensors:
        return taesd.from_core(tensors, f"the VAE of {path.name}")
    there = next((pattern for pattern in first if pattern.format(0) in tensors), None)
    if there is None or LAST_OF_ENCODER not in tensors:
        raise ValueError(not_a_vae(str(path), tensors))
    widths = []
    while (key := there.format(len(widths))) in tensors:
        widths.append(tensors[key].shape[0])
    layers = 0
    while there.format(0).replace(".0.conv1", f".{layers}.conv1") in tensors:
        layers += 1
    quant = "quant_conv.weight" in tensors
    vae = AutoencoderKL(
        block_out_channels=tuple(widths), layers_per_block=layers, norm_num_groups=32 if widths[0] % 32 == 0 else 4,
        latent_channels=tensors[LAST_OF_ENCODER].shape[0] // 2, use_quant_conv=quant,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    if there == first[1]:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = convert_ldm_vae_checkpoint(tensors, vae.config)
    own = vae.state_dict()
    tensors = {k: v.reshape(own[k].shape) if k in own and v.numel() == own[k].numel() else v
               for k, v in tensors.items() if not k.startswith(("loss.", "model_ema."))}
    state_dict.load_into(vae, tensors, f"the VAE of {path.name}")
    return vae
