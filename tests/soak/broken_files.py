"""Files as they should not be: what a download, a disk, another program or an enemy makes of a good one."""
from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pixstack.models_impl import state_dict
from safetensors.torch import save as save_safetensors

REFUSED, SAME, EITHER = "refused", "same", "either"
"""What a loader must make of a file: an error, the weights of the good file, or one of both."""
NESTED = 100_000
HTML = b"<!DOCTYPE html><html><head><title>Access to this model is restricted</title></head></html>"
VALUES = (None, "", "x", -1, 0, 1, 2**31, 10**12, 1e308, float("nan"), float("inf"), True, [], {}, [1], {"a": 1},
          "x" * 10_000, "\ud800", "../../x", [[[[]]]], "None", 0.5, [None], ["x", 1])
"""What stands in a configuration for an entry."""


def damaged(good: bytes, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """(name, what must become of it, bytes): what happens to any file on its way."""
    yield "empty", REFUSED, b""
    yield "a web page", REFUSED, HTML
    yield "zeros", REFUSED, bytes(len(good) if len(good) < 10**6 else 10**6)
    yield "GGUF", REFUSED, b"GGUF" + good[4:1000]
    for share in (0.001, 0.3, 0.9, 0.999):
        yield f"cut at {share}", REFUSED, good[:int(share * len(good))]
    yield "one byte short", REFUSED, good[:-1]
    yield "bytes behind it", EITHER, good + b"\0" * 100
    for _ in range(6):
        at, wide = rng.randrange(min(len(good), 4096)), rng.choice((1, 4, 64))
        yield f"{wide} bytes at {at}", EITHER, good[:at] + rng.randbytes(wide) + good[at + wide:]
    at = rng.randrange(len(good) // 2)
    yield f"a hole at {at}", EITHER, good[:at] + good[at + 512:]


def headers(good: bytes, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """The same for what a safetensors file says of itself, which is no longer what it holds."""
    length = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8:8 + length]), good[8 + length:]
    keys = [key for key in header if key != "__metadata__"]

    def packed(changed) -> bytes:
        text = json.dumps(changed).encode() if not isinstance(changed, bytes) else changed
        return struct.pack("<Q", len(text)) + text + body

    for number in (0, 2**63 - 1, 10**8, length + 7):
        yield f"header of {number} bytes", REFUSED, struct.pack("<Q", number) + good[8:]
    yield "nested header", REFUSED, packed(b'{"a":' + b"[" * NESTED)
    yield "header that is a list", REFUSED, packed([header])
    yield "header in UTF-16", REFUSED, packed(json.dumps(header).encode("utf-16"))
    entry = header[key := rng.choice(keys)]
    for name, change in {
        "negative shape": {"shape": [-1, *entry["shape"][1:]]}, "huge shape": {"shape": [2**40, 2**40]},
        "shape of text": {"shape": "all"}, "no shape": {"shape": None}, "another dtype": {"dtype": "F64"},
        "unknown dtype": {"dtype": "F7"}, "offsets behind the end": {"data_offsets": [0, 10**12]},
        "offsets turned round": {"data_offsets": entry["data_offsets"][::-1]}, "offsets as text": {"data_offsets": "0"},
    }.items():
        yield f"{name} of {key}", REFUSED if entry["shape"] else EITHER, packed({**header, key: {**entry, **change}})
    yield "metadata that is a list", REFUSED, packed({**header, "__metadata__": ["a"]})
    yield "metadata of numbers", REFUSED, packed({**header, "__metadata__": {"a": 1}})
    many = {f"k{i}": "v" for i in range(10**5)}
    yield "a hundred thousand metadata", EITHER, packed({**header, "__metadata__": many})


def weights(tensors: dict, metadata: dict, rng: random.Random) -> Iterator[tuple[str, str, dict, dict]]:
    """(name, what must become of it, tensors, metadata): weights that another program changed."""
    keys = sorted(tensors)
    floating = [key for key in keys if tensors[key].is_floating_point() and tensors[key].numel()]

    def having(key, value):
        return {**tensors, key: value}

    for _ in range(3):
        key = rng.choice(floating)
        value = tensors[key]
        yield f"{key} is missing", EITHER, {k: v for k, v in tensors.items() if k != key}, metadata
        renamed = {(f"{k}x" if k == key else k): v for k, v in tensors.items()}
        yield f"{key} under another name", EITHER, renamed, metadata
        for name, number in (("NaN", float("nan")), ("infinity", float("inf"))):
            spoilt = value.clone().float()
            spoilt.view(-1)[rng.randrange(value.numel())] = number
            yield f"{name} in {key}", EITHER, having(key, spoilt.to(value.dtype)), metadata
        yield f"{key} of one axis more", EITHER, having(key, value[None].contiguous()), metadata
        yield f"{key} without values", EITHER, having(key, value[:0].contiguous() if value.ndim else value), metadata
        yield f"{key} twice as long", EITHER, having(key, torch.cat([value, value]) if value.ndim else value), metadata
        yield f"{key} turned", EITHER, having(key, value.flatten().contiguous()), metadata
        yield f"{key} a number", EITHER, having(key, value.flatten()[0].clone()), metadata
        for dtype in (torch.int8, torch.bool, torch.int64, torch.uint8):
            yield f"{key} in {state_dict.dtype_name(torch.empty(0, dtype=dtype))}", EITHER, \
                having(key, value.float().nan_to_num().to(dtype)), metadata
        number = "".join(c if not c.isdigit() else "9" for c in key) if any(c.isdigit() for c in key) else f"{key}.9"
        yield f"{number} besides", EITHER, having(number, value.clone()), metadata
        huge = key.replace(".0.", f".{10**15}.", 1)
        yield f"{huge} besides", EITHER, having(huge, value.clone()), metadata
    for prefix in ("module.", "_orig_mod.", "x.y."):
        yield f"{prefix} before every key", SAME if prefix != "x.y." else EITHER, \
            {prefix + key: value for key, value in tensors.items()}, metadata
    yield "float64", SAME, {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}, metadata
    yield "keys in another order", SAME, {key: tensors[key] for key in reversed(keys)}, metadata
    yield "metadata of others", SAME, tensors, {**metadata, "format": "pt", "modelspec.title": "a" * 1000}
    yield "nothing in it", REFUSED, {}, metadata
    yield "one tensor of nobody", REFUSED, {"a": torch.zeros(3)}, {}
    yield "names only", REFUSED, {key: torch.zeros(0) for key in keys}, metadata
    half = rng.sample(keys, len(keys) // 2)
    yield "half of the keys", EITHER, {key: tensors[key] for key in half}, metadata
    yield "a key of 10,000 characters", EITHER, having("x." * 5000 + "weight", torch.zeros(3)), metadata


def configurations(tensors: dict, metadata: dict, rng: random.Random) -> Iterator[tuple[str, str, dict, dict]]:
    """The same for the texts in the metadata of a file."""
    for name, text in metadata.items():
        for what, changed in {"empty": "", "cut": text[: len(text) // 2], "no JSON": "a: b", "nested": "[" * NESTED,
                              "null": "null", "a list": "[]", "NaN": "NaN", "long": "9" * 5000}.items():
            yield f"{name} is {what}", EITHER, tensors, {**metadata, name: changed}
        yield f"{name} is missing", EITHER, tensors, {k: v for k, v in metadata.items() if k != name}
        try:
            entries = json.loads(text)
        except ValueError:
            continue
        if not isinstance(entries, dict):
            continue
        for entry in entries:
            for value in rng.sample(VALUES, 3):
                changed = json.dumps({**entries, entry: value})
                yield f"{name} says {entry}={value!r:.40}", EITHER, tensors, {**metadata, name: changed}
            fewer = {k: v for k, v in entries.items() if k != entry}
            yield f"{name} without {entry}", EITHER, tensors, {**metadata, name: json.dumps(fewer)}
        more = {**entries, "unknown": 1}
        yield f"{name} with an unknown entry", EITHER, tensors, {**metadata, name: json.dumps(more)}


def torch_files(tensors: dict, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """What torch.save writes besides tables of weights, and what is put in place of it."""
    key = rng.choice(sorted(tensors))
    value = tensors[key]

    def saved(holding) -> bytes:
        torch.save(holding, buffer := io.BytesIO())
        return buffer.getvalue()

    for name in ("state_dict", "module", "model"):
        yield f"under {name}", EITHER, saved({name: tensors})
    for name, other in {"a list": [1.0], "a number": 1.0, "None": None, "text": "x", "a table": {"a": value},
                        "bytes": b"x"}.items():
        yield f"{key} is {name}", EITHER, saved({**tensors, key: other})
    yield "a list of weights", REFUSED, saved(list(tensors.values()))
    yield "one tensor", REFUSED, saved(value)
    yield "text", REFUSED, saved("weights")
    yield "numbers as keys", REFUSED, saved({i: v for i, v in enumerate(tensors.values())})
    yield f"{key} sparse", EITHER, saved({**tensors, key: torch.eye(3).to_sparse()})
    yield f"{key} on meta", REFUSED, saved({**tensors, key: value.to("meta")})
    yield f"{key} complex", EITHER, saved({**tensors, key: value.to(torch.complex64)})
    yield f"{key} repeated", REFUSED, saved({**tensors, key: torch.zeros(1).expand(10**5, 10**5)})
    yield "a class", REFUSED, saved({**tensors, "a.weight": Path("x")})
    yield "code", REFUSED, saved({**tensors, "a.weight": Code()})
    plain = saved({"state_dict": tensors})
    yield "old format", EITHER, _old(tensors)
    yield "compressed", SAME, _zipped(plain, zipfile.ZIP_DEFLATED)
    yield "without its values", REFUSED, _zipped(plain, zipfile.ZIP_STORED, lambda name: "/data/" not in name)
    yield "without its table", REFUSED, _zipped(plain, zipfile.ZIP_STORED, lambda name: "data.pkl" not in name)


class Code:
    def __reduce__(self):
        return print, ("this line must not appear: a pickle was run",)


def _old(tensors) -> bytes:
    torch.save(tensors, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _zipped(archive: bytes, compression: int, kept: Callable[[str], bool] = lambda name: True) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.infolist():
            if kept(entry.filename):
                new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def every(path: Path, rng: random.Random) -> Iterator[tuple[str, str, str, Callable[[], bytes]]]:
    """(kind, name, what must become of it, makes the bytes) of every way to break a good file of weights."""
    good = path.read_bytes()
    tensors, metadata = contents(path)
    for name, must, content in damaged(good, rng):
        yield "damaged", name, must, lambda content=content: content
    if path.suffix == ".safetensors":
        for name, must, content in headers(good, rng):
            yield "header", name, must, lambda content=content: content
        for name, must, changed, texts in (*weights(tensors, metadata, rng), *configurations(tensors, metadata, rng)):
            yield "weights", name, must, lambda changed=changed, texts=texts: save_safetensors(
                {k: v.contiguous() for k, v in changed.items()}, metadata=texts)
    else:
        for name, must, changed, _ in weights(tensors, {}, rng):
            yield "weights", name, must, lambda changed=changed: _torch_bytes(changed)
        for name, must, content in torch_files(tensors, rng):
            yield "torch file", name, must, lambda content=content: content


def _torch_bytes(tensors) -> bytes:
    torch.save({"state_dict": tensors}, buffer := io.BytesIO())
    return buffer.getvalue()


def contents(path: Path) -> tuple[dict, dict]:
    """Tensors and metadata of a good file, without the table around them."""
    tensors, metadata = state_dict._read(path)
    inner = tensors.get("state_dict")
    return dict(inner if isinstance(inner, dict) else tensors), metadata
