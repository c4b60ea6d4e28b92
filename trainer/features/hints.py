"""What PixelPonder sees in training: hint pictures of several kinds, and which of them in which order."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...models_impl.annotators import hed
from ...models_impl.annotators.canny import edges as canny
from .store import Store, fingerprint

CANNY = 100, 200  # thresholds of the release (util.py:38-95 of chfyfr/PixelPonder@3326c73)
AT_ONCE = 8  # pictures in one pass of HED


class Hints:
    """The hint pictures of one kind: brought by the data, or drawn from each picture itself. An encoder of pictures as
    `cache` has them, so that hints lie beside the latents."""

    def __init__(self, kind: str, made: bool, hed_file: str = "", cache: str = "", writer: int = 0):
        """made: drawn from the picture, by canny or by the HED of hed_file."""
        self.kind, self.name, self.of = kind, f"hint_{kind}", "" if made else kind
        self.made, self.file, self.net = made, Path(hed_file).expanduser(), []
        self.store = None
        if cache and not (kind == "hed" and made and not self.file.is_file()):  # a finished run is opened without it
            how = "as they are" if not made else f"canny {CANNY}" if kind == "canny" else fingerprint(self.file)
            self.store = Store(Path(cache).expanduser(), self.name, {"hints": how, "of": self.of}, writer)

    @torch.no_grad()
    def encode(self, pictures: Tensor, device) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8, of the picture or of the kind itself -> {"pixels": (B, 1 or 3, H, W) uint8}"""
        if not self.made:
            return {"pixels": pictures}
        unit = pictures.to(device).float() / 255
        if self.kind == "canny":
            edges = canny(unit, *CANNY)
        else:
            if not self.net:
                self.net.append(hed.load(self.file).to(device))
            with torch.autocast(torch.device(device).type, enabled=False):
                edges = torch.cat([self.net[0](some)[1] for some in unit.split(AT_ONCE)])
        return {"pixels": (edges * 255).round().to(torch.uint8)}

    def release(self):
        self.net.clear()

    def pictures(self, batch, device) -> Tensor:
        """What the ControlNet sees, (B, 3, H, W) in [-1, 1]: from the features of a batch if the cache gave it some."""
        found = batch.features.get(f"{self.name}.pixels")
        if found is None:
            found = self.encode(batch.conditions[self.of] if self.of else batch.pictures, device)["pixels"]
        return seen(found.to(device))


def seen(hints: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) uint8 -> (B, 3, H, W) in [-1, 1]"""
    return (hints.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def chosen(kinds: int, least: int, most: int, rng: torch.Generator) -> tuple[int, ...]:
    """Which kinds take part, in which order: from `least` to `most` of them, as many as few."""
    number = least + int(torch.randint(most - least + 1, (), generator=rng))
    return tuple(torch.randperm(kinds, generator=rng)[:number].tolist())
