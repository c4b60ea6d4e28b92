"""The node search of ComfyUI's frontend (double click on the canvas), as 1.32.9 and 1.49.6 do it: `found`.

A node is a candidate when every word of the query is found in its id, its name or one of its aliases with errors in
three of ten letters at most, early in the text (Fuse: threshold 0.3, distance 100, extended search). Candidates are
ordered by how the query stands in id or name (aliases have no part in it), then by how often the node is used
(`frequencies`), then by place and length, at last by Fuse's score, where aliases count.
Beside fuse.js 7.0.0 with the frontend's settings: the same first two nodes in 157 of 158 searches on two ComfyUIs.
"""
from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

THRESHOLD, DISTANCE = 0.3, 100
LEAST = 0.001  # of a score that is not exact
WORDS = re.compile(r" |\b|(?<=[a-z])(?=[A-Z])|(?=[A-Z][a-z])", re.ASCII)  # as \b is in JavaScript


@cache
def frequencies() -> dict[str, float]:
    """How often nodes are used, of the installed frontend; empty without one."""
    spec = find_spec("comfyui_frontend_package")
    folder = Path(spec.submodule_search_locations[0]) if spec else Path()
    path = folder / "static" / "assets" / "sorted-custom-node-map.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def fuzzy(pattern: str, text: str) -> float | None:
    """Fuse's score of one word in a text, 0 (equal) to 1; None where it is not found."""
    pattern, text = pattern.lower(), text.lower()
    if pattern == text:
        return 0.0
    allowed, start = int(THRESHOLD * len(pattern)), text.find(pattern)
    scores = [start / DISTANCE] if start >= 0 else []
    if sum((Counter(pattern) - Counter(text)).values()) <= allowed and (not scores or scores[0] > 1 / len(pattern)):
        scores += [errors / len(pattern) + where / DISTANCE for errors, where in alike(pattern, text)
                   if errors <= allowed]
    best = min(scores, default=1.0)
    return max(best, LEAST) if best <= THRESHOLD else None


def alike(pattern: str, text: str) -> list[tuple[int, int]]:
    """(errors, start) of the best match of a pattern that ends at each place of a text (Sellers 1980)."""
    row = [(0, start) for start in range(len(text) + 1)]
    for i, letter in enumerate(pattern, 1):
        last, row = row, [(i, 0)]
        for j, other in enumerate(text, 1):
            row.append(min((last[j - 1][0] + (letter != other), last[j - 1][1]), (last[j][0] + 1, last[j][1]),
                           (row[j - 1][0] + 1, row[j - 1][1])))
    return row


def of_text(query: str, text: str) -> float | None:
    """The mean of its words' scores, or None where one of them is missing."""
    scores = [fuzzy(word, text) for word in query.split()]
    return None if not scores or None in scores else sum(scores) / len(scores)


def fuse_score(query: str, keys: list[list[str]]) -> float | None:
    """keys: the texts of each field. Their scores are multiplied, long texts counting less (its field norm)."""
    total, met = 1.0, False
    for texts in keys:
        for text in texts:
            score = of_text(query, text)
            if score is not None:
                met = True
                total *= max(score, 2.2e-16) ** (len(text.split()) ** -0.5 / len(keys))
    return total if met else None


def standing(query: str, text: str, score: float) -> list[float]:
    """How a query stands in an id or a name: lower is better, the first number first."""
    words, parts = [word.lower() for word in WORDS.split(text)], query.split(" ")
    text, length = text.lower(), 0.5 * len(text)
    tier, near, size = 9, 0.0, len(text)
    if text == query:
        tier, size = 0, 0
    elif text.startswith(query):
        tier = 1
    elif query in words:
        tier, near = 2, text.index(query) + length
    elif query in text:
        tier, near = 3, text.index(query) + length
    elif all(part in words for part in parts):
        places = [words.index(part) for part in parts]
        tier, near = 4, max(places) - min(places) + 0.5 * max(places) + length
    elif all(part in text for part in parts):
        first = min(text.index(part) for part in parts)
        last = max(text.index(part) + len(part) for part in parts)
        tier, near = 5, last - first + 0.5 * first + length
    else:
        size = 0
    longer = 0.2 * (1 - min(len(text), len(query)) / max(len(text), len(query)))
    return [tier, near, size, score + longer]


def found(query: str, info: dict, used: dict[str, float] | None = None) -> list[str]:
    """Ids of nodes in the order that the search shows them. info: what GET /object_info answers."""
    query, used, ranked = query.lower(), frequencies() if used is None else used, []
    for name, node in info.items():
        display = node.get("display_name") or name
        score = fuse_score(query, [[name], [display], node.get("search_aliases") or []])
        if score is None:
            continue
        place = min(standing(query, text, score) for text in (name, display))
        if place[0] and any("deprecated" in text.lower() for text in (name, display)):
            place[0] += 5
        ranked.append(([place[0], -used.get(name, 0), *place[1:]], name))
    return [name for _, name in sorted(ranked, key=lambda entry: entry[0])]
