"""One sentence for whatever goes wrong while the contents of a file are looked at."""
from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .parsing import shortened

FAULTS = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, AssertionError,
    EOFError, SafetensorError, re.error, pickle.PickleError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What Python and its libraries raise over contents that nobody expected."""
LONGEST = 500  # characters of a cause
INNER = LookupError, TypeError, AttributeError, ArithmeticError, AssertionError
"""Whose words are about Python and say nothing of the file; the log has them."""


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """A block that reads a file and makes something of its contents: what goes wrong in it is a ValueError whose
    sentence names the file. Errors of the file system, and a device without memory, stay what they are."""
    name = Path(path).name
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        raise ValueError(sentence(name, error)) from error


def sentence(name: str, error: BaseException) -> str:
    """What is wrong with the file of this name, and what to do."""
    said = str(error)
    if isinstance(error, ValueError) and said.endswith((".", "?")):  # ours say everything
        said = shortened(said)
        return said if name in said else f"{name}: {said}"
    if isinstance(error, MemoryError):
        cause = "what it holds needs more memory than there is"
    elif isinstance(error, RecursionError):
        cause = "it is nested too deeply"
    elif isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        cause = f"it has no {error.args[0][:LONGEST]}"
    else:
        lines = [] if isinstance(error, INNER) else said.strip().splitlines()
        words = ": ".join([type(error).__name__, *(line[:LONGEST] for line in lines[:1])])
        cause = f"its contents are not those of such a file ({words})"
    return (f"{name} cannot be read: {cause}. If other files of its kind can, this one is damaged: compare its size "
            "with the original and download it again.")


def shape_of(tensors: Mapping[str, Tensor], key: str, axes: int) -> torch.Size:
    """Shape of a weight. Raises ValueError where it is missing, has another number of axes, or an axis of no length."""
    value = tensors.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"It has no {key}: the file is incomplete, or of another model.")
    if value.ndim != axes or not value.numel():
        raise ValueError(f"{key} is {list(value.shape)}, where {axes} axes with something in them are expected: the "
                         "file is damaged, or of another model.")
    return value.shape
