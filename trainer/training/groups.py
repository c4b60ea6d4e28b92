"""Parameters that learn alike."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Group:
    params: list[tuple[str, nn.Parameter]]
    multiple: float = 1.0
    """Multiple of the learning rate."""
    matrices: frozenset[str] = frozenset()
    """Names of those that Muon may train."""
    clipped: str = ""
    """Whose gradients are limited together: the name of a network, where a run trains several."""


def in_block(name: str) -> bool:
    """Whether a parameter is a matrix inside a block."""
    return "block" in name and not any(word in name for word in ("norm", "bias", "embed"))


def groups(modules: Iterable[tuple[nn.Module | None, float]], matrix: Callable[[str], bool] = in_block,
           clipped: str = "") -> list[Group]:
    """A group for each module with parameters that learn. modules: (module, multiple of the learning rate)."""
    found = []
    for module, multiple in modules:
        learns = [(n, p) for n, p in module.named_parameters() if p.requires_grad] if module is not None else []
        if learns:
            found.append(Group(learns, multiple, frozenset(n for n, _ in learns if matrix(n)), clipped))
    return found
