"""Checks of what comes in at our nodes: before anything runs, and again when it does, for what other nodes give.

ComfyUI 0.3.75 checks neither the menus of V3 nodes nor the values of links.
"""
from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy
from comfy_api.latest import io, ui
from torch import Tensor

from ..models_impl.parsing import shortened, without_surrogates
from .host.common import files, wrong_file
from .host.common.pictures import check, check_mask
from .host.common.shown import show

MODEL_FILES = Path(__file__).resolve().parents[1] / "web" / "model_files.json"
"""Every file to download; tools/model_files.py says what its rows mean."""


class CheckedNode(io.ComfyNode):
    """A node whose `execute` gets only what its schema and its `validate_inputs` let pass, links included, and whose
    `validate_inputs` gets only values of its widgets' kinds: null, a number in a menu or a list in place of a picture
    end in a sentence. The text of `ui.PreviewText` is drawn below the node."""

    CHECKED: tuple[str, ...] = ()
    """The inputs that `validate_inputs` looks at."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, wrap in (("execute", _executing), ("validate_inputs", _validating)):
            method = cls.__dict__.get(name)
            if isinstance(method, classmethod) and not hasattr(method.__func__, "__wrapped__"):  # ComfyUI makes copies
                setattr(cls, name, classmethod(wrap(method.__func__)))
                if name == "validate_inputs":
                    cls.CHECKED = tuple(inspect.signature(cls.validate_inputs).parameters)


def _executing(execute: Callable) -> Callable:
    @functools.wraps(execute)
    def run(cls, *args, **inputs):
        if inputs and not args:
            check_inputs(cls, inputs)
        try:
            output = execute(cls, *args, **inputs)
        except ValueError as error:
            menus = [one.id for one in cls.define_schema().inputs if one.io_type == "COMBO" and one.id in inputs]
            wrong_file.offer(error, {name: inputs[name] for name in menus})
            raise
        if isinstance(output, io.NodeOutput) and isinstance(output.ui, ui.PreviewText):
            show(output.ui.value)
        return output

    return run


def check_inputs(node: type[CheckedNode], inputs: Mapping):
    """Raise ValueError for values that a node's schema or its `validate_inputs` does not let pass, by their names."""
    schema = {one.id: one for one in node.define_schema().inputs}
    for name, value in inputs.items():
        spec = schema.get(name)
        if spec and not (value is None and spec.optional and spec.io_type not in _WIDGETS):
            refuse(name, value, spec)
    looked_at = {name: inputs[name] for name in node.CHECKED if name in inputs}
    if looked_at and isinstance(answer := node.validate_inputs(**looked_at), str):
        raise ValueError(answer)


def _validating(validate: Callable) -> Callable:
    signature = inspect.signature(validate)

    @functools.wraps(validate)
    def run(cls, *args, **inputs):
        specs = {one.id: one for one in cls.define_schema().inputs}
        kinds = {name: _WIDGETS.get(one.io_type) for name, one in specs.items()}
        for name, value in inputs.items():
            if kinds.get(name) and value is not None and not isinstance(value, kinds[name]):
                return f"{name}={value!r:.100} is not {_NAMES[kinds[name]]}."
            # ComfyUI leaves the bounds of what this function looks at to it.
            if name in specs and value is not None and (problem := _broken(value) or _beyond(value, specs[name])):
                return f"{name} {problem}."
        answer = validate(cls, *args, **inputs)
        return shortened(answer) if isinstance(answer, str) else answer

    run.__signature__ = signature  # ComfyUI gives what the arguments name, and looks without following wrappers
    return run


_WIDGETS = {"COMBO": str, "STRING": str, "INT": Integral, "FLOAT": Real, "BOOLEAN": bool}
_NAMES = {str: "text", Integral: "a whole number", Real: "a number", bool: "true or false"}
_OBJECTS = {"MODEL": ("get_model_object", "model"), "CLIP": ("tokenize", "tokenizer", "cond_stage_model"),
            "VAE": ("decode", "encode", "first_stage_model"), "CONTROL_NET": ("get_control", "copy"),
            "SAMPLER": ("sample",), "GUIDER": ("sample",), "NOISE": ("generate_noise",)}
"""Attributes that core asks of an object of this kind; it has at least one, of whatever pack it is."""
_PLAIN = (str, Real, Sequence, Mapping, Tensor, numpy.ndarray)
"""Plain values, which no such object is; whether an object is the right one, the node itself says."""
_OWN = "PIXSTACK_"


def refuse(name: str, value, spec):
    """Raise ValueError for a value that its input cannot take. spec: the input's schema."""
    kind = spec.io_type
    if kind == "IMAGE" and isinstance(value, Tensor):
        check(value, name)
    elif kind == "MASK" and isinstance(value, Tensor):
        check_mask(value, name)
    elif problem := _problem(kind, value) or _beyond(value, spec):
        wanted = _NAMES.get(_WIDGETS.get(kind), kind) if kind != "COMBO" else "one of its menu's words"
        raise ValueError(f"{name} {problem}, and the node needs {wanted} there. See what is linked to it.")


def _problem(kind: str, value) -> str:
    """What is wrong with a value for an input of this kind; empty when nothing is."""
    if value is None:
        return "is empty (None)"
    if kind in _WIDGETS:
        return _broken(value) if isinstance(value, _WIDGETS[kind]) else f"is {_type(value)}"
    if kind in ("IMAGE", "MASK") or kind == "SIGMAS" and not isinstance(value, Tensor):
        return f"is {_type(value)}"
    if kind == "SIGMAS":
        if value.ndim != 1 or not value.is_floating_point() or not value.isfinite().all():
            return f"is no list of finite numbers ({list(value.shape)}, {str(value.dtype).removeprefix('torch.')})"
    elif kind == "LATENT":
        return _latent_problem(value)
    elif kind == "CONDITIONING":
        if not isinstance(value, Sequence) or isinstance(value, str):
            return f"is {_type(value)}"
        return next(filter(None, map(_prompt_problem, value)), "")
    elif kind in _OBJECTS and (isinstance(value, _PLAIN) or not any(hasattr(value, n) for n in _OBJECTS[kind])):
        return f"is {_type(value)}"
    elif kind.startswith(_OWN) and isinstance(value, (str, Real, Mapping, Tensor, numpy.ndarray)):
        return f"is {_type(value)}"
    return ""


def _broken(value) -> str:
    """What is wrong with a text that UTF-8 cannot hold."""
    if not isinstance(value, str) or value == without_surrogates(value):
        return ""
    half = next(ord(sign) for sign in value if "\ud800" <= sign <= "\udfff")
    return f"holds half of a character (U+{half:X}), as of an emoji cut in two: delete it and type it again"


def _prompt_problem(entry) -> str:
    if not isinstance(entry, Sequence) or len(entry) != 2 or not isinstance(entry[1], Mapping):
        return "holds an entry that is no prompt"
    tensors = [value for value in (entry[0], entry[1].get("pooled_output")) if isinstance(value, Tensor)]
    if any(not one.numel() for one in tensors):
        return f"holds a prompt of no tokens ({list(tensors[0].shape)})"
    if not all(one.isfinite().all() for one in tensors):
        return "holds a prompt with values that are no numbers"
    not_finite = [name for name, one in entry[1].items() if isinstance(one, Real) and not math.isfinite(one)]
    return f"holds a prompt whose {not_finite[0]} is {entry[1][not_finite[0]]}" if not_finite else ""


def _beyond(value, spec) -> str:
    """The same for a number beyond the bounds of its widget, or none at all."""
    if spec.io_type not in ("INT", "FLOAT"):
        return ""
    least, most = getattr(spec, "min", None), getattr(spec, "max", None)
    if value != value or least is not None and value < least or most is not None and value > most:
        return f"is {value}, not in {least} to {most}"
    return ""


def _latent_problem(value) -> str:
    if not isinstance(value, Mapping):
        return f"is {_type(value)}"
    samples = value.get("samples")
    if not isinstance(samples, Tensor):
        return f"holds samples that are {_type(samples)}"
    if samples.ndim < 4 or not samples.numel():
        return f"has samples of the shape {list(samples.shape)}"
    return "" if samples.is_floating_point() and samples.isfinite().all() else "has samples that are no finite numbers"


def _type(value) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def first_problem(*answers: bool | str) -> bool | str:
    """True when every check is, else the sentence of the first that is not."""
    return next((answer for answer in answers if isinstance(answer, str)), True)


def known_file(folder: str, name: str | None) -> bool | str:
    """Whether models/<folder> has the file; None stands for a name that another node will give."""
    if name is None or files.find(folder, name) is not None:
        return True
    rows = json.loads(MODEL_FILES.read_text(encoding="utf-8"))
    url = next((row.get("url") for row in rows if (row["folder"], row["name"]) == (folder, name)), "")
    put = f"Put it there under this name, from {url}" if url else "Put it there"
    return f"{name} is not in models/{folder}. {put}, or choose another file."


def one_of(name: str, value: str | None, options: Iterable[str]) -> bool | str:
    """Whether a menu has the value; None stands for one that another node will give."""
    options = list(options)
    return value is None or value in options or f"{name}={value!r:.100} is not one of {', '.join(options)}."


def part_of_sampling(start_percent: float | None, end_percent: float | None) -> bool | str:
    """Whether there is anything between the two; None stands for a value that another node will give."""
    start, end = 0.0 if start_percent is None else start_percent, 1.0 if end_percent is None else end_percent
    if 0 <= start <= end <= 1:
        return True
    return f"start_percent={start:g} and end_percent={end:g} leave no part of the sampling: 0 <= start <= end <= 1."
