"""What the browser's size picker draws on a canvas node: the sizes to choose from, the one that the node would take
now, and what that costs. Asked by web/size_picker.js; every number is the node's own."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_base
import comfy.model_management as mm

from ..models_impl.pixart import buckets
from ..models_impl.pixelflow.stages import stage_size
from ..models_impl.ultrapixel.sampling import sizes as stages_of
from . import browser, pixart, pixart_reference, pixelflow, ultrapixel
from .browser import Asked
from .host.pixart import reference, sizes
from .host.pixart.model import ModelConfig as PixArtModelConfig
from .host.pixelflow import sampling as cascade
from .host.pixelflow.model import ModelConfig as PixelFlowModelConfig
from .host.ultrapixel import sizes as ultrapixel_sizes

ROUTE = "/pixstack/canvas"
PICTURES = 2  # of a step for each that is drawn: with the prompt and without, as guidance needs
FITTING = {"width": 1024, "height": 1024}
"""A size that every canvas takes."""
OF_SIZE = ("resolution", "shape", "side", "width", "height")


def answer(body: Mapping) -> dict:
    """What to draw, as JSON: `drawn`, {waits: the input that decides when it runs} or {error: a sentence}, which comes
    with what can be chosen instead where it is about the size. Raises ValueError as `browser.asked`."""
    asked = browser.asked(body, {name: node for name, (node, _) in CANVASES.items()})
    describe = CANVASES[body["node"]][1]
    try:
        asked.check()
        if waits := decided_elsewhere(asked):
            return {"waits": waits}
    except ValueError as error:
        return {"error": str(error)}
    try:
        return describe(asked)
    except ValueError as error:
        try:
            other = describe(replace(asked, values={**asked.values, **FITTING}))
        except ValueError:
            other = {}
        return {**{name: other[name] for name in ("choices", "free", "extent", "trained") if name in other},
                "error": str(error)}


def decided_elsewhere(asked: Asked) -> str:
    """The first input that decides the size and is not known before the graph runs; empty if there is none."""
    values, linked = asked.values, asked.linked
    for spec in asked.node.define_schema().inputs:
        replaced = linked & {*spec.extra_dict.get("pixstack_replaced", ())}
        counts = all(values[menu] in words for menu, words in spec.extra_dict.get("pixstack_counts", {}).items())
        if spec.id in linked and spec.id in OF_SIZE and counts and not replaced:
            return spec.id
        by_image = values["shape"] == pixart_reference.AS_IMAGE or "image" in linked and (
            replaced or values["shape"] == ultrapixel.AS_IMAGE)
        if spec.id == "shape" and asked.image is None and by_image:
            return "image"
    return "ratio" if "ratio" in linked and "image" not in linked else ""


def step_memory(model_config, shape: tuple[int, int, int, int], dtype) -> float:
    """Gigabytes beside the weights that ComfyUI keeps free for a step on latents (B, C, H, W) of this shape."""
    supported = model_config.supported_inference_dtypes
    stored = dtype or mm.unet_dtype(supported_dtypes=supported)
    cast = mm.unet_manual_cast(stored, mm.get_torch_device(), supported)
    model = SimpleNamespace(memory_usage_factor=model_config.memory_usage_factor, memory_usage_factor_conds=(),
                            memory_usage_shape_process={}, manual_cast_dtype=cast, get_dtype=lambda: stored,
                            get_dtype_inference=lambda: cast or stored)  # the last: ComfyUI after 0.3.75
    return comfy.model_base.BaseModel.memory_required(model, list(shape)) / 1e9


# --- Canvases

def drawn(size: tuple[int, int], **more) -> dict:
    """The answer for a (height, width); sizes go out as [width, height]."""
    return {"size": list(size[::-1]), "choices": [], "inner": [], "notes": [], "warnings": [], **more}


def choice(size: tuple[int, int], **values) -> dict:
    """A size to choose, and the widgets to set for it."""
    return {"size": list(size[::-1]), "set": {**values, "width": size[1], "height": size[0]}}


def pixart_canvas(asked: Asked) -> dict:
    values, canvas, config = asked.values, pixart.PixArtCanvas, asked.config("pixart")
    side, shape = pixart.side_of(values["resolution"], config), values["shape"]
    size = canvas.size(side, shape, values["width"], values["height"], asked.image)
    said, warns = sizes.judged(side, *size, config)
    by_shape = {sizes.size(side, down, across): name for name, (across, down) in reversed(pixart.SHAPES.items())}
    table = buckets.TABLES.get(side, {}).values() or by_shape
    # By some labels of the 2880 table its neighbour is nearer: those sizes cannot be asked for by example.
    table = [one for one in table if one in by_shape or sizes.size(side, *one) == one]
    return drawn(
        size, tokens=sizes.tokens(*size), **_pixart_memory(asked, size, values["batch_size"]),
        **{"warnings" if warns else "notes": [said[0].upper() + said[1:]]},
        choices=[choice(one, shape=by_shape.get(one, pixart.NEAREST)) for one in table],
        free=free(sizes.MULTIPLE, 16, 8192) if shape == pixart.EXACT else None, extent=max(2 * side, *size),
        fixed=asked.image is not None,
    )


def pixart_reference_canvas(asked: Asked) -> dict:
    values = asked.values
    side = pixart_reference.PixArtReferenceCanvas.side(values["resolution"], asked.config("pixart"))
    across, down = pixart.SHAPES.get(values["shape"]) or (asked.image[1], asked.image[0])
    size = reference.size(side, down, across)
    halves = {reference.size(side, down, across): name for name, (across, down) in reversed(pixart.SHAPES.items())}
    return drawn(size, tokens=sizes.tokens(*size), **_pixart_memory(asked, size, 1), inner=[[size[1] // 2, size[0]]],
                 choices=[choice(one, shape=name) for one, name in halves.items()], extent=2 * side)


def _pixart_memory(asked: Asked, size: tuple[int, int], batch: int) -> dict:
    cells = [edge // 8 for edge in size]
    return {"memory": [["step", step_memory(PixArtModelConfig, (PICTURES * batch, 4, *cells), asked.dtype)]]}


def pixelflow_canvas(asked: Asked) -> dict:
    values, config, canvas = asked.values, asked.config("pixelflow"), pixelflow.PixelFlowCanvas
    if config is None:
        return {"waits": "model"}
    size = canvas.size(config, values["shape"], values["width"], values["height"])
    shape = (PICTURES * values["batch_size"], config.in_channels, *size)
    stages = [stage_size(*size, stage, config.num_stages)[::-1] for stage in range(config.num_stages)]
    return drawn(
        size, tokens=size[0] * size[1] // config.patch_size**2, inner=stages[:-1],
        memory=[["step", step_memory(PixelFlowModelConfig(config), shape, asked.dtype)]],
        warnings=cascade.about_size(*size, config).split("\n")[1:],
        choices=[choice(canvas.size(config, name, 0, 0), shape=name) for name in pixelflow.SHAPES],
        free=free(config.size_multiple, 16, 8192) if values["shape"] == pixelflow.CUSTOM else None,
        extent=max(1.5 * config.resolution, *size),
    )


def ultrapixel_canvas(asked: Asked) -> dict:
    values, canvas = asked.values, ultrapixel.UltraPixelCanvas
    custom, side = values["shape"] == ultrapixel.CUSTOM, values["side"]
    _, size = canvas.size(values["shape"], side, values["width"], values["height"], asked.image)
    parts = stages_of(*size)
    c, (b, _), (a, _) = ultrapixel_sizes.gigabytes(parts, 1 if "image" in asked.linked else values["batch_size"])
    choices = [choice(canvas.size(name, side, 0, 0)[1], shape=name) for name in ultrapixel.SHAPES]
    return drawn(
        size, tokens=parts.stage_c[0] * parts.stage_c[1], inner=[list(parts.low_pixels[::-1])],
        memory=[["stage_c", c], ["stage_b", b], ["stage_a", a]], warnings=[
            said[0].upper() + said[1:] for said in ultrapixel_sizes.problems(*size)],
        choices=[] if custom else choices, free=free(ultrapixel_sizes.MULTIPLE, 256, 16384) if custom else None,
        extent=max(4608, *(1.2 * edge for edge in size)) if custom else max(
            *size, *(edge for one in choices for edge in one["size"])),
        trained={"areas": [ultrapixel_sizes.SMALLEST_SIDE**2, ultrapixel_sizes.LARGEST_SIDE**2],
                 "ratio": ultrapixel_sizes.WIDEST},
    )


def free(multiple: int, least: int, most: int) -> dict:
    """Any size may be chosen whose edges are multiples, in pixels."""
    return {"multiple": multiple, "least": -(-least // multiple) * multiple, "most": most // multiple * multiple}


CANVASES: dict[str, tuple[type, Callable[[Asked], dict]]] = {
    "PixStack_PixArtCanvas": (pixart.PixArtCanvas, pixart_canvas),
    "PixStack_PixArtReferenceCanvas": (pixart_reference.PixArtReferenceCanvas, pixart_reference_canvas),
    "PixStack_PixelFlowCanvas": (pixelflow.PixelFlowCanvas, pixelflow_canvas),
    "PixStack_UltraPixelCanvas": (ultrapixel.UltraPixelCanvas, ultrapixel_canvas),
}
"""Node -> (its class, what is drawn on it)."""
