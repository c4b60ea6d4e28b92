"""The extension that ComfyUI loads: every node of the files beside this one."""
from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import (
    annotators,
    dataset,
    pixart,
    pixart_control,
    pixart_reference,
    pixart_sampling,
    pixelflow,
    pixelponder,
    ultrapixel,
    ultrapixel_control,
    ultrapixel_decode,
    ultrapixel_lora,
)

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED_KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet")


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        for folder in EMBEDDED_KINDS:  # the embedded checkpoints appear in the ordinary lists
            folder_paths.add_model_folder_path(folder, str(ASSETS / folder))
        annotators.register_folder()
        modules = (
            pixelflow,
            pixart,
            pixart_sampling,
            pixart_control,
            pixart_reference,
            pixelponder,
            ultrapixel,
            ultrapixel_control,
            ultrapixel_lora,
            ultrapixel_decode,
            annotators,
            dataset,
        )
        return [node for module in modules for node in module.NODES]
