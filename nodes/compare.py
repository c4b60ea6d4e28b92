"""Pictures side by side: two of them under one slider."""
from __future__ import annotations

from comfy_api.latest import io

from .checks import CheckedNode
from .host.common.pictures import colours
from .host.common.shown import previews
from .schema import schema

CATEGORY = "pixstack/pictures"


class ComparePictures(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_ComparePictures",
            display_name="Compare Pictures (A/B Slider)",
            category=CATEGORY,
            search_aliases=["before after", "image comparer", "compare images", "split view", "difference"],
            description="Two pictures, or two batches, under one slider: what is left of it is A, right of it B.",
            inputs=[
                io.Image.Input("image_a", tooltip="A, left of the slider: before, or one setting."),
                io.Image.Input("image_b", tooltip="B, right of the slider: after, or the other setting. Of another "
                               "size it is drawn as large as A."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a, image_b) -> io.NodeOutput:
        a, b = (previews(colours(image, name)) for image, name in ((image_a, "image_a"), (image_b, "image_b")))
        return io.NodeOutput(ui={"images": [*a, *b], "pixstack_compare": [len(a), len(b)]})


NODES = [ComparePictures]
