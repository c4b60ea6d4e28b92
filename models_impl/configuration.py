"""Configurations of networks as entries of files, the same for every family."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


class Configuration:
    """A dataclass of entries that files keep; subclasses say in `entries_of` which names they take."""

    def as_dict(self) -> dict[str, Any]:
        """Entries under our names, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping):
        """The configuration of a complete set of entries under any names that `entries_of` takes."""
        return cls(**cls.entries_of(entries))

    @classmethod
    def entries_of(cls, entries: Mapping) -> dict[str, Any]:
        """Entries under our names or other programs' -> ours."""
        raise NotImplementedError
