"""The extension that ComfyUI loads: every node of the files beside this one."""
from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import pixelflow

ASSETS = Path(__file__).resolve().parents[1] / "assets"


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        for folder in ("diffusion_models", "text_encoders"):  # the embedded checkpoint shows in the ordinary lists
            folder_paths.add_model_folder_path(folder, str(ASSETS / folder))
        return pixelflow.NODES
