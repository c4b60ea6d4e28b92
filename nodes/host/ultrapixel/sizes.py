"""The latents of a picture's size, what they cost, and what is wrong with a size."""
from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ....models_impl.ultrapixel.guidance import up_weight
from ....models_impl.ultrapixel.sampling import COMPRESSION_C, Sizes, sizes
from ..common.pictures import colours

MULTIPLE = 8
"""Stage B folds its latent, of 4 pixels to a cell, in two."""
SMALLEST_SIDE, LARGEST_SIDE = 1024, 6144  # of squares with as many pixels as the guide saw in training
WIDEST = 6.0  # the largest ratio of the sides in training
MOST_CELLS = 216 * 216  # of a latent that is still taken for Stage C's: a picture of 9216 x 9216 pixels
ENCODER_CELL = 32  # pixels to a cell where a picture is encoded, as the networks were trained
CHANNELS_C, CHANNELS_B = 16, 4
WEIGHTS_C, WEIGHTS_B = 7.3, 1.4  # GB in bf16: Stage C of 3.6B with the guide, Stage B of 700M
# Activations in bf16, KB a cell of one picture with a negative prompt: the peak of what is alive at once in core's
# networks, counted over all tensors that a pass makes. Stage B and A: with our nodes in strips, and core's way at once.
CELL_C, CELL_B, CELL_A = 151, (2.4, 5.7), (2.4, 14.8)


def snapped(height: int, width: int) -> tuple[int, int]:
    """The nearest multiples of 8."""
    return tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width))


def of_shape(down: float, across: float, side: int) -> tuple[int, int]:
    """(height, width) of about side*side pixels in the ratio down : across."""
    ratio = (across / down) ** 0.5
    return snapped(side / ratio, side * ratio)


def check(height: int, width: int):
    """Refuse a size that 'UltraPixel Sampler' would not take for one of Stage C."""
    (h, w), most = sizes(height, width).stage_c, int(MOST_CELLS**0.5 * COMPRESSION_C)
    if h * w > MOST_CELLS:
        raise ValueError(f"A picture of {width} x {height} pixels is {w * h} cells in Stage C, more than the "
                         f"{MOST_CELLS} that UltraPixel draws: choose a size of at most as many pixels as {most} x "
                         f"{most}, and enlarge the picture afterwards.")


def empty(height: int, width: int, batch: int) -> tuple[dict, dict, dict]:
    """LATENTs of Stage C, of its low-resolution pass and of Stage B."""
    size, device = sizes(height, width), mm.intermediate_device()

    def latent(channels, cells):
        return {"samples": torch.zeros(batch, channels, *cells, device=device)}

    return latent(CHANNELS_C, size.stage_c), latent(CHANNELS_C, size.low), latent(CHANNELS_B, size.stage_b)


def encoded(image: Tensor, vae, height: int, width: int) -> tuple[dict, dict, dict]:
    """LATENTs as `empty` gives, of pictures (B, H, W, 3) in [0, 1] cut to the shape; Stage B's is empty.

    vae: the semantic encoder.
    """
    image = colours(image)
    _, _, stage_b = empty(height, width, len(image))
    size = sizes(height, width)
    pixels = image.movedim(-1, 1)

    def latent(cells):
        h, w = (n * ENCODER_CELL for n in cells)
        small = comfy.utils.common_upscale(pixels, w, h, "bicubic", "center").clamp(0, 1)
        encoded = vae.encode(small.movedim(1, -1))
        if encoded.shape[1] != CHANNELS_C or encoded.shape[-2:] != cells:
            raise ValueError(f"This VAE makes latents of {tuple(encoded.shape[1:])} of a picture of {w} x {h}, Stage C "
                             f"needs ({CHANNELS_C}, {cells[0]}, {cells[1]}): load effnet_encoder.safetensors with "
                             "'Load VAE'.")
        return {"samples": encoded}

    return latent(size.stage_c), latent(size.low), stage_b


def report(height: int, width: int, asked: tuple[int, int], batch: int = 1) -> str:
    """Report on a size, in words. asked: the size before snapping."""
    size = sizes(height, width)
    (hc, wc), (hl, wl), (hb, wb) = size.stage_c, size.low, size.stage_b
    lines = [
        f"{width} x {height} pixels" + (f" (instead of {asked[1]} x {asked[0]}: multiples of {MULTIPLE})"
                                        if asked != (height, width) else ""),
        f"Stage C: {wc} x {hc} = {wc * hc} tokens, guide on the way up at {up_weight(hc, wc)}",
        f"its low-resolution pass: {wl} x {hl} = {wl * hl} tokens, of {size.low_pixels[1]} x {size.low_pixels[0]} "
        "pixels",
        f"Stage B: {wb} x {hb} cells",
        *memory(size, batch),
        *(f"Mind: {problem}" for problem in problems(height, width)),
    ]
    return "\n".join(lines)


def memory(size: Sizes, batch: int) -> list[str]:
    c, (b, core_b), (a, core_a) = gigabytes(size, batch)
    return [
        "memory in bf16, about: "
        f"Stage C {c:.1f} GB ({WEIGHTS_C} of them weights), "
        f"Stage B 700M {b:.1f} GB ({WEIGHTS_B} of them weights), Stage A {a:.1f} GB, the last two with our nodes for "
        f"them; {core_b:.1f} and {core_a:.1f} GB with only core's. One follows the other; ComfyUI can keep part of "
        "the weights in main memory.",
    ]


def gigabytes(size: Sizes, batch: int) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Memory in bf16 of Stage C with its guide, of Stage B and of Stage A, the last two with our nodes and core's."""
    cells_c, cells_b = (h * w * 1e-6 for h, w in (size.stage_c, size.stage_b))
    b = tuple(WEIGHTS_B + cell * cells_b * batch for cell in CELL_B)
    a = tuple(max(cell * cells_b, 0.1) for cell in CELL_A)  # pictures are decoded one by one
    return WEIGHTS_C + CELL_C * cells_c * batch, b, a


def problems(height: int, width: int) -> list[str]:
    warnings, area = [], height * width
    if area < SMALLEST_SIDE**2:
        warnings.append(f"fewer pixels than {SMALLEST_SIDE} x {SMALLEST_SIDE}. The low-resolution pass is that large "
                        "already, so the guide has nothing to add: draw with Stable Cascade without it.")
    if area > LARGEST_SIDE**2:
        warnings.append(f"more pixels than {LARGEST_SIDE} x {LARGEST_SIDE}, the most that the guide was trained on.")
    if max(height, width) > WIDEST * min(height, width):
        warnings.append(f"sides of {max(height, width) / min(height, width):.1f} : 1; the training saw up to "
                        f"{WIDEST:.0f} : 1.")
    return warnings
