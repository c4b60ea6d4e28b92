"""Tables as TOML, which Python's library only reads."""
from __future__ import annotations

import json
import re

BARE = re.compile(r"[A-Za-z0-9_-]+")


def written(table: dict, prefix: str = "") -> str:
    """A table and those in it: plain entries first, as TOML wants them."""
    lines = [f"{key_of(k)} = {value_of(v)}" for k, v in table.items() if not is_table(v)]
    for key, value in table.items():
        name = f"{prefix}{key_of(key)}"
        for one in (value if isinstance(value, list) else [value]) if is_table(value) else ():
            lines += ["", f"[[{name}]]" if isinstance(value, list) else f"[{name}]",
                      written(one, f"{name}.").rstrip("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def is_table(value) -> bool:
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(isinstance(row, dict) for row in rows)


def key_of(key: str) -> str:
    return key if BARE.fullmatch(key) else text_of(key)


def value_of(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_of, value))}]"
    return text_of(value)


def text_of(value: str) -> str:
    """As JSON has it; TOML wants U+007F escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def comment(lines: list[str]) -> str:
    """Lines as a comment, in which TOML allows no control characters."""
    plain = (re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", " ", line) for line in lines)
    return "".join(f"# {line}".rstrip() + "\n" for line in plain)
