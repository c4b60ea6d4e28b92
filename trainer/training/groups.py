"""Parameters that learn alike: as a recipe groups them, and as [[optimizer.groups]] divides these."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..config.schema import OptimizerGroup
from ..config.tables import ruled


@dataclass(frozen=True)
class Group:
    params: list[tuple[str, nn.Parameter]]
    """By the names that checkpoints have."""
    multiple: float = 1.0
    """Multiple of the learning rate."""
    matrices: frozenset[str] = frozenset()
    """Names of those that Muon may train."""
    clipped: str = ""
    """Whose gradients are limited together: the name of a network, where a run trains several."""
    rule: OptimizerGroup | None = None
    """The table that is about them."""


def in_block(name: str) -> bool:
    """Whether a parameter is a matrix inside a block."""
    return "block" in name and not any(word in name for word in ("norm", "bias", "embed"))


def groups(recipe: nn.Module, modules: Mapping[str, float], matrix: Callable[[str], bool] = in_block,
           clipped: str = "") -> list[Group]:
    """A group for each module with parameters that learn. modules: name in the recipe, where it may be None -> multiple
    of the learning rate."""
    found = []
    for name, multiple in modules.items():
        module = getattr(recipe, name)
        learns = [] if module is None else [(n, p) for n, p in module.named_parameters(name) if p.requires_grad]
        if learns:
            found.append(Group(learns, multiple, frozenset(n for n, _ in learns if matrix(n)), clipped))
    return found


def divided(some: list[Group], tables: Sequence[OptimizerGroup]) -> list[Group]:
    """The groups, each divided by the first table whose pattern is found in the parameters' names. Raises ValueError
    for a table that counts for none."""
    if not tables:
        return some
    rules = ruled([n for group in some for n, _ in group.params], tables, "optimizer.groups", "parameter")
    divided = [replace(group, params=[(n, p) for n, p in group.params if rules.get(n) is rule], rule=rule)
               for group in some for rule in (None, *tables)]
    return [group for group in divided if group.params]
