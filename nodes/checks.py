"""Checks of `validate_inputs` before anything runs: ComfyUI 0.3.75 does not check the menus of V3 nodes itself."""
from __future__ import annotations

from collections.abc import Iterable

import folder_paths


def first_problem(*answers: bool | str) -> bool | str:
    """True when every check is, else the sentence of the first that is not."""
    return next((answer for answer in answers if answer is not True), True)


def known_file(folder: str, name: str | None) -> bool | str:
    """Whether models/<folder> has the file; None stands for a name that another node will give."""
    if name is None or folder_paths.get_full_path(folder, name) is not None:
        return True
    return f"{name} is not in models/{folder}. Put it there, or choose another file."


def one_of(name: str, value: str | None, options: Iterable[str]) -> bool | str:
    """Whether a menu has the value; None stands for one that another node will give."""
    options = list(options)
    return value is None or value in options or f"{name}={value!r} is not one of {', '.join(options)}."


def part_of_sampling(start_percent: float | None, end_percent: float | None) -> bool | str:
    """Whether there is anything between the two; None stands for a value that another node will give."""
    start, end = 0.0 if start_percent is None else start_percent, 1.0 if end_percent is None else end_percent
    if 0 <= start <= end <= 1:
        return True
    return f"start_percent={start:g} and end_percent={end:g} leave no part of the sampling: 0 <= start <= end <= 1."
