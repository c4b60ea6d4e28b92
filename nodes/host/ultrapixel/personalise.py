"""UltraPixel's personalisation: its low-rank changes as ComfyUI patches of Stage C, its learned word in a CLIP."""
from __future__ import annotations

import copy
import logging
from pathlib import Path

import comfy.lora
import comfy.sdxl_clip
import comfy.utils
import torch
from comfy.ldm.cascade.common import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock
from torch import Tensor

from ....models_impl import patterns
from ....models_impl.guard import reading
from ....models_impl.known_files import PERSONALISATION, WrongFile, family_of, names
from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import lora
from ....models_impl.ultrapixel.config import StageCConfig
from ....models_impl.ultrapixel.lora import Personalisation
from ..common.shown import warn
from .guide import stage_c_of

KINDS = {ResBlock: "C", TimestepBlock: "T", AttnBlock: "A", FeedForwardBlock: "F"}


def kind_of(block) -> str:
    return next(kind for block_class, kind in KINDS.items() if isinstance(block, block_class))


def layout_of(net) -> StageCConfig:
    """The levels of core's Stage C, by which the released files number what they change."""
    down, up = (tuple("".join(map(kind_of, blocks)) for blocks in levels)
                for levels in (net.down_blocks, net.up_blocks))
    first = [next(b for b in blocks if isinstance(b, AttnBlock)) for blocks in net.down_blocks]
    count = len(first)
    return StageCConfig(
        hidden=tuple(block.norm.normalized_shape[0] for block in first),
        heads=tuple(block.attention.attn.heads for block in first), down=down, up=up, down_repeats=(1,) * count,
        up_repeats=(1,) * count, dropout=(0.0,) * count, self_attention=(True,) * count, switch=(False,) * (count - 1),
    )


def read(path: str, model) -> Personalisation:
    file = Path(path)
    layout = layout_of(stage_c_of(model).diffusion_model)
    with reading(file):
        tensors, metadata = read_file(file)
        try:
            return lora.read(tensors, metadata, layout)
        except ValueError as error:
            if family_of(names(tensors)) in (None, PERSONALISATION):
                raise
            raise WrongFile(str(error), tensors) from error


def patch(model, personal: Personalisation, strength: float):
    """A clone of a Stage C MODEL with the changes, which ComfyUI merges into the weights when it loads them."""
    tensors, _ = lora.to_core(personal)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    for name in [key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")]:
        weight = comfy.utils.get_attr(model.model, known[name]).shape if name in known else None
        change = torch.Size((tensors[f"{name}.lora_up.weight"].shape[0], tensors[f"{name}.lora_down.weight"].shape[1]))
        if weight != change:
            there = "is missing" if weight is None else f"is {list(weight)}"
            raise ValueError(f"This personalisation changes {name}, {list(change)}; in this MODEL it {there}. They "
                             "belong to different models.")
    layers = {key: value for key, value in tensors.items() if not key.startswith(lora.TOKEN)}
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(layers, known), strength)
    return patched


def learn(clip, personal: Personalisation, strength: float, token: str, base: str):
    """A clone of the CLIP that knows the learned word. The weights of CLIP stay as they are."""
    if not isinstance(clip.tokenizer, comfy.sdxl_clip.StableCascadeTokenizer):
        raise ValueError(f"This CLIP is a {type(clip.cond_stage_model).__name__}; Stage C reads only CLIP-G: load it "
                         "with Load CLIP, type stable_cascade.")
    encoder = clip.cond_stage_model.clip_g
    table = encoder.transformer.get_input_embeddings().weight
    learned, change = clip.clone(), personal.token_change.float().cpu()
    if change.shape[1] != table.shape[1]:
        raise ValueError(f"The learned word is {change.shape[1]} wide, this text encoder {table.shape[1]}: it belongs "
                         "to another one.")
    tokenizer = LearnedTokenizer(clip.tokenizer)
    words = tokenizer.clip_g.tokenizer
    for row, delta in zip(personal.token_rows, change, strict=True):
        if row < len(table):  # a word that CLIP knows was changed
            begun, row_id = table[row].float().cpu(), row
        elif tokenizer.token is not None:
            raise ValueError("This personalisation learned several new words; UltraPixel's files hold one.")
        else:
            if not token or not base:
                raise ValueError("The file does not say how its learned word is written and what it began as: give "
                                 "token and base_token. For the released lora_cat they are [roubaobao] and ^cat</w>.")
            begun, row_id = _mean(table, words.get_vocab(), base), tokenizer.add(token)
        tokenizer.vectors[row_id] = begun + strength * delta
    learned.tokenizer = tokenizer
    return learned


def _mean(table: Tensor, vocabulary: dict[str, int], base: str) -> Tensor:
    found_in = patterns.compiled(base, "base_token").search
    rows = [row for word, row in vocabulary.items() if row < len(table) and found_in(word[:lora.LONGEST_WORD])]
    if not rows:
        raise ValueError(f"base_token={base!r} matches no word of CLIP's vocabulary. For the word cat it is "
                         "'^cat</w>'.")
    if len(rows) > 1:
        logging.info("UltraPixel: the learned word began as the mean of %d words, %r.", len(rows), base)
    return table[torch.tensor(rows, device=table.device)].float().cpu().mean(dim=0)


class LearnedTokenizer(comfy.sdxl_clip.StableCascadeTokenizer):
    """Core's tokenizer, with vectors in place of the ids of learned words, as core itself does for embeddings."""

    def __init__(self, tokenizer):
        self.__dict__.update(tokenizer.__dict__)
        self.clip_g = copy.copy(tokenizer.clip_g)
        self.clip_g.tokenizer = copy.deepcopy(tokenizer.clip_g.tokenizer)
        self.clip_g.inv_vocab = dict(tokenizer.clip_g.inv_vocab)
        self.vectors: dict[int, Tensor] = dict(getattr(tokenizer, "vectors", {}))
        self.tokens: tuple[str, ...] = getattr(tokenizer, "tokens", ())
        self.token: str | None = None

    def add(self, token: str) -> int:
        words = self.clip_g.tokenizer
        if set(token) & set("()\\"):
            raise ValueError(f"token={token!r} holds a bracket ( ) or a backslash. ComfyUI reads these in a prompt as "
                             "signs of weights, so the word would never be found: choose a name without them.")
        if not words.add_tokens([token]):
            raise ValueError(f"token={token!r} is a word that this CLIP knows already: choose another name for it.")
        row = words.convert_tokens_to_ids(token)
        self.clip_g.inv_vocab[row] = token
        self.token, self.tokens = token, (*self.tokens, token)
        return row

    def tokenize_with_weights(self, text: str, return_word_ids=False, **more):
        if text.strip() and self.tokens and not any(token in text for token in self.tokens):
            warn(f"The prompt {text[:80]!r} does not hold the learned word {' or '.join(self.tokens)}, so it is drawn "
                 "without it. (In a negative prompt that is as it should be.)")
        batches = super().tokenize_with_weights(text, return_word_ids, **more)
        return {name: [[(self._vector(entry[0]), *entry[1:]) for entry in batch] for batch in rows]
                for name, rows in batches.items()}

    def _vector(self, token):
        return self.vectors.get(token, token) if isinstance(token, int) else token
