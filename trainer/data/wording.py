"""What a picture is called at a step: its caption with the tags, templates and alternatives that its data set asks for.

A wording is drawn by a generator that depends on the seed and the step only. Where a frozen encoder embeds all of them
beforehand, it is one of `data.caption_variants` that depend on the seed and the picture only.
"""
from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..config.schema import Data, SetSettings
from .items import InRow, Item, Items, spread

VOCABULARY_OF = 10**6
ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # the innermost
SIGNS = re.compile(r"[{|}]")
NUMBERS = re.compile(r"^\(?\d+\)?([\s_.-]+|$)|[\s_.-]+\(?\d+\)?$|\(\d+\)$|[\s_.-]+$")  # at the ends of a name


def of_name(file) -> str:
    """The caption in the name of a file, without the numbers at its ends: sks_dog_01.png is "sks dog"."""
    stem = "" if isinstance(file, InRow) else Path(file.name).stem
    while (shorter := NUMBERS.sub("", stem)) != stem:
        stem = shorter
    return " ".join(stem.replace("_", " ").split())


def named(items: Items, one: SetSettings) -> Items:
    """With a caption for pictures that have none, where the settings give one."""
    if not (one.caption or one.name_captions):
        return items

    def words(item: Item) -> tuple[str, ...]:
        return tuple(filter(None, ((of_name(item.file) if one.name_captions else "") or one.caption,)))

    return items.changed(words=words)


def drawn(item: Item, one: SetSettings, rng: random.Random) -> str:
    own = item.captions
    if item.described and (not own or rng.random() < one.described_share):
        own = item.described
    if not own:
        return ""
    text = rng.choice(own)
    if one.wildcards:
        text = chosen(text, rng)
    if one.shuffle_tags or one.tag_dropout:
        text = rearranged(text, one, rng)
    if item.tags and rng.random() < one.tag_share:
        return ", ".join([text, *rng.sample(item.tags, min(one.tag_count, len(item.tags)))])
    if one.templates and rng.random() < one.template_share:
        template = rng.choice(one.templates)
        return (chosen(template, rng) if one.wildcards else template).replace("{}", text)
    return text


def plain(item: Item, one: SetSettings) -> str:
    """The first caption, with the first of its alternatives: what validation asks for."""
    text = (item.texts or ("",))[0]
    return chosen(text, None) if one.wildcards else text


def chosen(text: str, rng: random.Random | None) -> str:
    """One of each "{a|b}", which may stand within another; without rng the first."""
    while found := ALTERNATIVES.search(text):
        some = found.group(1).split("|")
        text = text[:found.start()] + (rng.choice(some) if rng else some[0]) + text[found.end():]
    return text


def rearranged(text: str, one: SetSettings, rng: random.Random) -> str:
    """A list with commas, its parts after the first `keep_tags` in another order or left out. One is always left."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    kept, others = parts[:one.keep_tags], parts[one.keep_tags:]
    if one.shuffle_tags:
        rng.shuffle(others)
    if one.tag_dropout:
        some = [part for part in others if rng.random() >= one.tag_dropout]
        others = some or ([] if kept else others[:1])
    return ", ".join(kept + others)


def at(item: Item, settings: Data, seed: int, rng: random.Random) -> str:
    """The wording of a step. rng: the step's."""
    one = settings.each[item.set]
    if settings.caption_variants and one.rewords:
        return variant(item, one, seed, rng.randrange(settings.caption_variants))
    return drawn(item, one, rng)


def different(captions: Iterable[str]) -> int:
    """How many there are, each counted once."""
    return len(np.unique(np.fromiter(map(hash, captions), np.int64)))


def counted(captions: int, train: Sequence[Item], settings: Data) -> str:
    """How many captions there are to embed, in words."""
    return (f"{captions:,} captions of {len(train):,} pictures can occur "
            f"(data.caption_variants={settings.caption_variants})")


def variant(item: Item, one: SetSettings, seed: int, number: int) -> str:
    return drawn(item, one, random.Random(f"{seed} {item.set} {item.file.name} variant {number}"))


def corpus(items: Sequence[Item], settings: Data) -> list[str]:
    """What a vocabulary is made of: captions, tags and templates of at most VOCABULARY_OF items, evenly spread, without
    the signs of alternatives."""
    found = []
    for item in spread(items, VOCABULARY_OF):
        bare = settings.each[item.set].wildcards
        found += (SIGNS.sub(" ", text) if bare else text for text in (*item.texts, *item.tags))
    return found + [SIGNS.sub(" ", template) if one.wildcards else template.replace("{}", "")
                    for one in settings.sets or [settings] for template in one.templates]


def every(train: Iterable[Item], held_out: Iterable[Item], settings: Data, seed: int) -> Iterator[str]:
    """Every caption that a run asks a frozen encoder for, as often as it occurs."""
    for item in train:
        one = settings.each[item.set]
        if settings.caption_variants and one.rewords:
            yield from (variant(item, one, seed, n) for n in range(settings.caption_variants))
        else:
            yield from item.texts
    for item in held_out:
        yield from (*item.texts, plain(item, settings.each[item.set]))
