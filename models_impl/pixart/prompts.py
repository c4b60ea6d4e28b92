"""Flags that PixArt's demos accept in a prompt, and the styles that they offer.

A prompt is parsed first, then styled, then cleaned (text/captions.py): each step would spoil what the one before reads.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

FLAG = re.compile(r"--(aspect_ratio|ar|hw)(?:\s+(\d+):(\d+)(?![.:]?\d))?")
NO_STYLE = "(No style)"


@dataclass(frozen=True)
class Prompt:
    text: str
    """The text that the network reads: everything before the first flag, stripped."""
    ratio: float | None = None
    """height / width; where it is None the release takes 1. The picture is made in the nearest bucket."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels that the finished picture is resized and cropped to; it does not choose the bucket."""


def parse(prompt: str) -> Prompt:
    """`a cat --ar 3:4`: --ar or --aspect_ratio with height:width, and --hw with HEIGHT:WIDTH in pixels.

    As PixArt-alpha's prepare_prompt_ar (diffusion/model/utils.py): the first flag ends the text, of two alike the first
    counts, and --aspect_ratio counts before --ar. ValueError for a flag whose value the release would silently ignore.
    """
    values: dict[str, tuple[int, int]] = {}
    for flag in FLAG.finditer(prompt):
        name, height, width = flag.groups()
        if height is None or not int(height) or not int(width):
            example = "--hw 768:1024 (height:width in pixels)" if name == "hw" else f"--{name} 3:4 (height:width)"
            excerpt = prompt[flag.start() : flag.start() + 24]
            raise ValueError(
                f"The prompt has {excerpt!r}, but --{name} needs two whole numbers above 0. "
                f"Write {example} at the end of the prompt, or leave --{name} out."
            )
        values.setdefault(name, (int(height), int(width)))
    height, width = values.get("aspect_ratio") or values.get("ar") or (None, None)
    return Prompt(
        text=re.split("--(?:aspect_ratio|ar|hw)", prompt, maxsplit=1)[0].strip(),
        ratio=height / width if height else None,
        size=values.get("hw"),
    )


@dataclass(frozen=True)
class Style:
    prompt: str = "{prompt}"
    """{prompt} is where the user's prompt goes."""
    negative: str = ""


# The release's names (app/app.py); the words are ours.
STYLES = {
    NO_STYLE: Style(),
    "Cinematic": Style(
        "film still of {prompt}, widescreen, shallow depth of field, soft film grain, dramatic mood",
        "cartoon, drawing, text, distorted anatomy",
    ),
    "Photographic": Style(
        "photograph of {prompt}, 50mm lens, natural light, sharp focus, fine detail",
        "illustration, painting, out of focus, distorted anatomy",
    ),
    "Anime": Style(
        "anime illustration of {prompt}, clean lines, cel shading, bright colors",
        "photograph, realistic, monochrome, distorted anatomy",
    ),
    "Manga": Style(
        "manga drawing of {prompt}, ink lines, screentone, dynamic composition",
        "photograph, realistic, 3d render, blurry",
    ),
    "Digital Art": Style(
        "digital painting of {prompt}, visible brushwork, rich colors, concept art",
        "photograph, realistic",
    ),
    "Pixel art": Style(
        "pixel art of {prompt}, 16-bit game sprite, limited palette, crisp square pixels",
        "photograph, smooth gradients, blurry, fine texture",
    ),
    "Fantasy art": Style(
        "fantasy painting of {prompt}, glowing magical light, mythical, grand scenery",
        "photograph, modern objects, text, frame, distorted anatomy",
    ),
    "Neonpunk": Style(
        "neon cyberpunk scene of {prompt}, magenta and violet glow, deep shadows, futuristic",
        "watercolor, pencil sketch, daylight, distorted anatomy",
    ),
    "3D Model": Style(
        "3d render of {prompt}, physically based materials, studio lighting, global illumination",
        "flat drawing, few polygons, noise, blurry",
    ),
}


def apply_style(name: str, positive: str, negative: str) -> tuple[str, str]:
    """(positive, negative) with the style's words around the one and before the other. ValueError: no such style."""
    if name not in STYLES:
        raise ValueError(f"There is no style {name!r}. Choose one of {', '.join(STYLES)}.")
    style = STYLES[name]
    # replaced, not formatted: a prompt may hold braces of its own
    return style.prompt.replace("{prompt}", positive), ", ".join(filter(None, (style.negative, negative)))
