"""Prompts as PixArt was trained on them, with the CLIP object that core's CLIPLoader gives for T5 v1.1 XXL, or our
loader for the T5 of a small model."""
from __future__ import annotations

import torch

from ..common.shown import warn

ENCODERS = ("t5xxl", "t5")  # as their tokens are called: core's, ours
END_TOKEN = 1


def encode(clip, text: str, limit: int, entries: dict | None = None) -> list:
    """A conditioning of at most `limit` tokens, </s> included; the rest is left out, with a warning.

    The releases pad to the limit and mask the padding; without padding the same numbers come out.
    """
    tokens = clip.tokenize(text)
    name, *others = tokens
    if others or name not in ENCODERS:
        raise ValueError(f"This CLIP holds {', '.join(tokens)}: PixArt reads only T5 v1.1 XXL. Load it with "
                         "CLIPLoader, type pixart.")
    longest = max(map(len, tokens[name]))
    if longest > limit:
        warn(f"PixArt reads {limit} tokens, this prompt has {longest}. Its end is left out: ...{text[-60:]}")
    tokens[name] = [_cut(row, limit) for row in tokens[name]]
    return clip.encode_from_tokens_scheduled(tokens, add_dict=entries or {})


def _cut(row: list, limit: int) -> list:
    return row if len(row) <= limit else [*row[: limit - 1], (END_TOKEN, 1.0, *row[-1][2:])]


def null_caption(model, positive: list, mask: str) -> list:
    """The caption that the model saw in training where the real one was dropped, for the negative input.

    mask: "positive" keeps as many of its tokens as the positive prompt has, as in training and in the released
    samplers; "all" keeps every token.
    """
    config = model.model.config
    if not config.null_caption:
        raise ValueError("This PixArt file stores no null caption (diffusers files do not). Encode an empty prompt for "
                         "the negative input instead.")
    stored = model.model.diffusion_model.y_embedder.y_embedding.detach().float().cpu()[None]  # (1, L, C)
    if mask == "all":
        return [[stored, {"attention_mask": torch.ones(stored.shape[:2], dtype=torch.long)}]]
    conditioning = []
    for tokens, entries in positive:
        length = tokens.shape[1]
        kept = entries.get("attention_mask")
        kept = torch.ones(1, length, dtype=torch.long) if kept is None else kept.reshape(len(kept), -1).cpu().long()
        length = min(length, stored.shape[1])
        null = stored[:, :length].expand(len(kept), -1, -1)
        others = {k: v for k, v in entries.items() if k in ("width", "height", "aspect_ratio", "area", "strength",
                                                            "mask", "start_percent", "end_percent")}
        conditioning.append([null, {**others, "attention_mask": kept[:, :length]}])
    return conditioning
