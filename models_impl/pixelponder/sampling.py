"""Sampling settings of PixelPonder's release (pipeline.py of chfyfr/PixelPonder@3326c73); the flow itself is FLUX's."""
from __future__ import annotations

from ..flux.sampling import RectifiedFlow

STEPS = 25
GUIDANCE = 4.0  # distilled guidance, in training too
STRENGTH = 0.8  # of the residuals when sampling; training adds them whole
SCHEDULE_TOKENS = 16  # (64 * 64) // 256: the release shifts its schedule as if a 512-pixel picture had 16 tokens


def schedule(steps: int = STEPS, tokens: int = SCHEDULE_TOKENS) -> list[float]:
    """steps + 1 sigmas from 1 to 0, as released; tokens=1024 would be the true length at 512 pixels."""
    return RectifiedFlow().schedule(steps, tokens)
