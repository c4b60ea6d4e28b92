"""The extension that ComfyUI loads: every node of the files beside this one."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

import nodes  # ComfyUI's

from . import (
    annotators,
    browser,
    compare,
    dataset,
    pixart,
    pixart_control,
    pixart_reference,
    pixart_sampling,
    pixelflow,
    pixelponder,
    pixelponder_regions,
    size_picker,
    stage_editor,
    ultrapixel,
    ultrapixel_control,
    ultrapixel_decode,
    ultrapixel_lora,
)
from .host.common import files
from .host.training import routes


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files.register(nodes.NODE_CLASS_MAPPINGS.get("VAELoader"))
        annotators.register_folder()
        routes.register()
        browser.renew_scripts()
        for widget in (size_picker, stage_editor):
            browser.route(widget.ROUTE, widget.answer)
        modules = (
            pixelflow,
            pixart,
            pixart_sampling,
            pixart_control,
            pixart_reference,
            pixelponder,
            pixelponder_regions,
            ultrapixel,
            ultrapixel_control,
            ultrapixel_lora,
            ultrapixel_decode,
            annotators,
            compare,
            dataset,
        )
        return [node for module in modules for node in module.NODES]
