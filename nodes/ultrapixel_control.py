"""Hints for the ControlNets of Stable Cascade under UltraPixel. Core's nodes load and apply them."""
from __future__ import annotations

from comfy_api.latest import io

from .checks import CheckedNode, one_of
from .host.ultrapixel import control_hints as ultrapixel_control
from .host.ultrapixel.control_hints import FILTERS
from .schema import schema

CATEGORY = "pixstack/ultrapixel"


class UltraPixelCanny(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelCanny",
            display_name="UltraPixel Canny",
            category=CATEGORY,
            search_aliases=["stable cascade canny", "edge hint", "canny controlnet"],
            description="Edges as Stable Cascade's canny ControlNet was trained on them: detected in a small square "
            "and stretched back. For core's Apply ControlNet.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to draw the edges of, of any size."),
                io.Combo.Input(
                    "filter", options=list(FILTERS), default="reference",
                    tooltip="reference: at 224 x 224 whatever the shape, broad soft lines, as trained. fine: at 768 "
                    "pixels, thin lines, which the ControlNet has not seen.",
                ),
                io.Int.Input("low", default=100, min=0, max=1000,
                             tooltip="An edge continues while its gradient is above this. Release: 100."),
                io.Int.Input("high", default=200, min=0, max=1000,
                             tooltip="An edge starts where its gradient is above this. Release: 200."),
            ],
            outputs=[io.Image.Output("edges", display_name="IMAGE", tooltip="White edges on black, 768 pixels on the "
                                     "shorter side.")],
        )

    @classmethod
    def validate_inputs(cls, filter=None):
        return one_of("filter", filter, FILTERS)

    @classmethod
    def execute(cls, image, filter, low, high) -> io.NodeOutput:
        return io.NodeOutput(ultrapixel_control.canny_hint(image, filter, low, high))


class UltraPixelInpaintHint(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelInpaintHint",
            display_name="UltraPixel Inpaint Hint",
            category=CATEGORY,
            search_aliases=["stable cascade inpainting", "inpaint controlnet"],
            description="A picture and where to paint, as Stable Cascade's inpainting ControlNet takes them: four "
            "channels, white under the mask. For core's Apply ControlNet.",
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Mask.Input("mask", tooltip="1 where to paint."),
            ],
            outputs=[io.Image.Output("hint", display_name="IMAGE", tooltip="Picture and mask in four channels.")],
        )

    @classmethod
    def execute(cls, image, mask) -> io.NodeOutput:
        return io.NodeOutput(ultrapixel_control.inpaint_hint(image, mask))


NODES = [UltraPixelCanny, UltraPixelInpaintHint]
