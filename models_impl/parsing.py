"""Texts of files from elsewhere as plain values: one sentence for whatever is wrong with them, in bounded time."""
from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100
"""Levels that a configuration may be nested; those of the releases have five."""
LONGEST = 2**17
"""Characters of a YAML file: its parser, in Python, reads 100,000 a second."""
TOO_DEEP = "it is nested too deeply"


def from_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text, which may begin with the mark of Windows' editors. what: the file as errors call it.

    Raises ValueError, also for one that is nested too deeply for Python.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: {TOO_DEEP}.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and a number of more digits than Python reads
        raise ValueError(f"{what} is not valid JSON: {error}.") from error


def from_yaml(text: str | bytes, what: str) -> Any:
    """The value of a YAML text without anchors, which would repeat parts. Raises ValueError."""
    import yaml  # comes with ComfyUI and with transformers; nothing else here needs it

    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {error}.") from error

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("anchors (&, *) are not read here")
            return super().compose_node(parent, index)

    if len(text) > LONGEST:
        raise ValueError(f"{what} has {len(text):,} characters; a configuration has a few thousand.")
    if is_deep(text) or is_deeply_indented(text):
        raise ValueError(f"{what} is not valid YAML: {TOO_DEEP}.")
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{what} is not valid YAML: {TOO_DEEP}.") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
        said, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
        said = said.replace("unhashable key", "a key that is a list or a table")
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{what} is not valid YAML: {place}{said}.") from error


LONGEST_WORD = 300  # of a key or value that a sentence names
LONG = re.compile(rf"\S{{{LONGEST_WORD},}}")


def shortened(said: str) -> str:
    """A sentence with the keys and names in it cut to a length that a person may read."""
    return LONG.sub(lambda word: f"{word[0][:LONGEST_WORD // 2]}...", said)


def without_surrogates(text: str) -> str:
    """A text that UTF-8 can hold: the two halves of a sign beyond 16 bits as that sign, a lone half as U+FFFD.

    JSON may hold lone halves, as of an emoji that was cut in two, and names of files in other encodings become some.
    """
    if text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_deep(text: str) -> bool:
    """Whether more brackets are open at once than DEEPEST, those in its strings included."""
    depth = 0
    for bracket in re.findall(r"[][{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST:
            return True
    return False


def is_deeply_indented(text: str) -> bool:
    """The same for what YAML nests without brackets: by the beginnings of lines, and by several signs in one line."""
    levels = []
    for line in filter(str.strip, text.splitlines()):
        rest = line.lstrip()
        indent = len(line) - len(rest)
        while levels and levels[-1] >= indent:
            levels.pop()
        levels.append(indent)
        if len(levels) > DEEPEST or len(re.match(r"(?:[-?]\s+)*", rest)[0]) > 2 * DEEPEST:
            return True
    return False
