"""A unigram tokenizer for the small text encoder, made from the captions that are trained on."""
from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in T5


def train(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """Lower-cases, splits on spaces, ends every text with </s>, as ComfyUI's T5 tokenizer will read it. Raises
    ValueError where the captions have no words."""
    captions = sorted(captions)
    if not any(map(str.strip, captions)):
        raise ValueError("there are no captions to make the text encoder's vocabulary from: write captions beside the "
                         "pictures, or let a model write them (`python -m trainer caption`).")
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " "),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    try:
        tokenizer.train_from_iterator(captions, UnigramTrainer(
            vocab_size=vocabulary, special_tokens=[PAD, EOS, UNKNOWN], unk_token=UNKNOWN, show_progress=False,
        ))
    except Exception as error:  # tokenizers has no class of errors of its own
        characters = len(set("".join(map(tokenizer.normalizer.normalize_str, captions))))
        raise ValueError(f"text.vocabulary={vocabulary} is too small for these captions, in which {characters} "
                         f"different characters occur ({error}). Give it some times as many, or take out the captions "
                         "in other scripts.") from error
    tokenizer.model = Unigram(in_order(json.loads(tokenizer.to_str())["model"]["vocab"]), unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return tokenizer


def in_order(pieces: list) -> list[tuple[str, float]]:
    """The trainer walks a hash table, so equal captions give pieces in another order each time: sort them. Letters that
    are no piece of their own it puts just above the least score, in that order too, 1e-4 apart: give them the least."""
    special, rest = pieces[:3], pieces[3:]
    least = min(score for _, score in rest)
    edge = least + 1e-4 * (len(rest) + 1)
    scores = [(piece, round(least if len(piece) == 1 and score < edge else score, 6)) for piece, score in rest]
    return [tuple(p) for p in special] + sorted(scores, key=lambda one: (-one[1], one[0]))
