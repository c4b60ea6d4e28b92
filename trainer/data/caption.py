"""`python -m trainer caption`: captions by any vision-language model of transformers that lies in a folder.

Beside each picture that has none a .txt is written; or, with --out, a jsonl that is a data set itself, in which
pictures with captions keep them and get the new one as `sharegpt4v` (data.described_share mixes the two). What is
written already is not made again, so a command that was stopped goes on when it is run once more.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ...models_impl import state_dict
from ...models_impl.files import write_whole
from ...models_impl.parsing import from_json
from .layouts import Found, Item, listed
from .pictures import decode

PLACES = {
    "caption": lambda item: item.captions[0] if item.captions else "",
    "tags": lambda item: ", ".join(item.tags),
    "name": lambda item: re.sub(r"[_-]+", " ", item.file.stem),
    "folder": lambda item: re.sub(r"[_-]+", " ", item.file.parent.name),
}
"""What a prompt may speak of, in braces."""


class Captioner:
    """pictures and prompts -> captions, always the likeliest words."""

    def __init__(self, folder: Path, device="cpu", max_tokens: int = 120):
        """Raises ValueError if transformers reads no vision-language model there. Nothing is downloaded."""
        if not Path(folder).is_dir():
            raise ValueError(f"--model {folder}: there is no such folder.")
        from ..libraries import LOCAL, hide_broken_torchvision

        hide_broken_torchvision()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(folder, **LOCAL)
            net = AutoModelForImageTextToText.from_pretrained(folder, **LOCAL, dtype="auto")
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ValueError(f"--model {folder} cannot be read as a vision-language model: "
                             f"{state_dict.first_line(error)}.") from None
        self.net, self.device, self.max_tokens = net.to(device).eval(), device, max_tokens
        self.tokens = getattr(self.processor, "tokenizer", None)
        if self.tokens is None:
            raise ValueError(f"--model {folder} has no tokenizer beside its image processor.")
        self.tokens.padding_side = "left"  # generation goes on from the last token
        self.tokens.pad_token = self.tokens.pad_token or self.tokens.eos_token

    def asked(self, prompt: str) -> str:
        """A prompt in the words of this model: its chat template, or its sign for a picture, or as it is."""
        if getattr(self.processor, "chat_template", None):
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            return self.processor.apply_chat_template(said, add_generation_prompt=True)
        sign = getattr(self.processor, "image_token", None)
        return f"{sign}\n{prompt}" if sign and str(sign) not in prompt else prompt

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], prompts: list[str]) -> list[str]:
        given = {"text": [self.asked(p) for p in prompts]} if any(prompts) else {}
        inputs = self.processor(images=pictures, **given, return_tensors="pt", padding=True)
        inputs = inputs.to(self.device, self.net.dtype)
        asked = inputs.get("input_ids")
        if asked is not None:
            asked = asked.clone()  # BLIP's generate writes its own first token into it
        out = self.net.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        if asked is not None and out.shape[1] >= asked.shape[1] and torch.equal(out[:, :asked.shape[1]], asked):
            out = out[:, asked.shape[1]:]  # decoder-only models repeat the prompt
        return [" ".join(text.split()) for text in self.tokens.batch_decode(out, skip_special_tokens=True)]


def filled(template: str, item: Item) -> str:
    def place(match: re.Match) -> str:
        if match[1] not in PLACES:
            raise ValueError(f"--prompt speaks of {{{match[1]}}}; there are {{{'}, {'.join(PLACES)}}}.")
        return PLACES[match[1]](item)

    return re.sub(r"\{(\w*)\}", place, template)


def caption(found: Found, model: Callable, prompt: str, answer: str = "{}", out: Path | None = None,
            overwrite: bool = False, batch: int = 4, progress=lambda starts: starts) -> int:
    """Writes captions and returns how many. model: (pictures, prompts) -> texts. answer: what is written, the model's
    words in place of {}. Raises ValueError for what could not be captioned, after everything else was."""
    items = found.train + found.held_out
    if "{}" not in answer:
        raise ValueError(f"--answer {answer!r} has no {{}} where the model's words go.")
    if inside := [i.file for i in items if not isinstance(i.file, Path)]:
        raise ValueError(f"{inside[0]} lies in an archive, where no caption can be put beside it: unpack it.")
    done = written(out, overwrite) if out else set()
    open_ones = [(n, i) for n, i in enumerate(items) if not
                 (os.path.normpath(i.file) in done if out else i.texts and not overwrite)]
    problems, made = [], 0
    for start in progress(range(0, len(open_ones), batch)):
        some, pictures = [], []
        for number, item in open_ones[start:start + batch]:
            try:
                pictures.append(decode(item.file, advice=""))
                some.append((number, item))
            except ValueError as error:
                problems.append(str(error))
        if not some:
            continue
        texts = model(pictures, [filled(prompt, item) for _, item in some])
        for (number, item), text in zip(some, texts, strict=True):
            if not text:
                problems.append(f"{item.file}: the model said nothing")
                continue
            text = answer.replace("{}", text)
            if out:
                append(out, entry(item, text, out.parent, found.classes, number >= len(found.train)))
            else:
                write_whole(item.file.with_suffix(".txt"), text + "\n")
            made += 1
    if problems:
        raise ValueError(f"{made:,} captions were written. " + "".join(listed(problems, "pictures have none")))
    return made


def entry(item: Item, text: str, root: Path, classes: list[str], held_out: bool) -> dict:
    """A line of the jsonl, with everything that the data set said before."""
    def place(file: Path) -> str:
        return os.path.relpath(file, root).replace(os.sep, "/")

    line = {"file": place(item.file), "captions": list(item.captions) or [text]}
    if item.captions:
        line["sharegpt4v"] = text
    line |= {name: place(file) for name, file in item.conditions.items()}
    line |= {"tags": list(item.tags)} if item.tags else {}
    line |= {"class": classes[item.label] if classes else item.label} if item.label >= 0 else {}
    line |= dict(zip(("height", "width"), item.size, strict=True)) if item.size else {}
    return line | ({"split": "held_out"} if held_out else {})


def written(out: Path, overwrite: bool) -> set[str]:
    """The pictures that the jsonl has already; a line that was half written is taken away."""
    if not out.is_file() or overwrite:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")
        return set()
    *lines, cut = out.read_text(encoding="utf-8").split("\n")
    if cut:
        write_whole(out, "".join(line + "\n" for line in lines))
    return {os.path.normpath(out.parent / picture_of(out, line)) for line in lines if line.strip()}


def picture_of(out: Path, line: str) -> str:
    """The picture of a line. Raises ValueError for one that no caption command wrote."""
    entry = from_json(line, str(out))
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise ValueError(f"{out} has a line that names no file: {line[:100]}. Take it out, or write the list anew: "
                         "--overwrite.")
    return entry["file"]


def append(out: Path, line: dict):
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
