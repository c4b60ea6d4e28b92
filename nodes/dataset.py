"""A data set through the graph queue: an entry in, an entry out."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..models_impl.folders import refuse_unportable
from ..models_impl.pixelponder.entries import CONDITIONS, IMAGE, PICTURES, TEXT
from .checks import CheckedNode
from .host.pixelponder import dataset
from .schema import schema

CATEGORY = "pixstack/data set"
WHAT = {"canny": "Thin edges", "depth": "Depth, near is bright", "openpose": "Drawn poses", "hed": "Soft edges"}


class LoadEntry(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_LoadEntry",
            display_name="Load Data Set Entry",
            category=CATEGORY,
            search_aliases=["dataset loader", "load batch from folder", "jsonl", "load images"],
            description="An entry of a folder with data.jsonl as PixelPonder's release has it: picture, caption and "
            "conditions. With the index on 'increment', queueing N runs goes through N entries.",
            inputs=[
                io.String.Input("folder", default="dataset", tooltip="A folder with data.jsonl in ComfyUI's input "
                                "folder, else in its output folder."),
                io.Int.Input("index", default=0, min=0, max=2**31 - 1, control_after_generate=True,
                             tooltip="Which entry, from 0. Past the last one the run stops with an error."),
            ],
            outputs=[
                io.Image.Output("entry_image", display_name=IMAGE, tooltip="The picture."),
                io.String.Output("entry_text", display_name=TEXT, tooltip="The caption."),
                *(io.Image.Output(f"entry_{key}", display_name=key, tooltip=f"{WHAT[key]}. An entry without it stops "
                                  "the nodes after this output.") for key in CONDITIONS),
                io.String.Output("entry_name", display_name="name", tooltip="File name of the picture without "
                                 "extension, or more of its path where names repeat; for 'Save Data Set Entry'."),
                io.Int.Output("count", display_name="count", tooltip="Entries of the data set."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder=None, index=None):
        try:
            if folder is not None and index is not None:
                dataset.entry(folder, index)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, index):
        return dataset.state(folder, index)

    @classmethod
    def execute(cls, folder, index) -> io.NodeOutput:
        entry, name, count = dataset.entry(folder, index)
        image, *conditions = dataset.pictures(folder, entry)
        return io.NodeOutput(image, entry.get(TEXT, ""), *conditions, name, count,
                             ui=ui.PreviewText(f"{index + 1} of {count}: {name}"))


class SaveEntry(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_SaveEntry",
            display_name="Save Data Set Entry",
            category=CATEGORY,
            search_aliases=["dataset writer", "save conditions", "jsonl"],
            description="Writes a picture, its caption and its conditions into a folder of ComfyUI's output folder and "
            "puts them on its data.jsonl, whole or not at all. An entry of the same name is completed.",
            inputs=[
                io.Image.Input(IMAGE, tooltip="The picture. One, not a batch."),
                io.String.Input("folder", default="dataset", tooltip="In ComfyUI's output folder."),
                io.String.Input("name", default="picture", tooltip="Name of the files, without extension; from "
                                "'Load Data Set Entry'."),
                io.String.Input(TEXT, default="", multiline=True, tooltip="The caption. Empty: an entry keeps "
                                "the one it has."),
                *(io.Image.Input(key, optional=True, tooltip=f"{WHAT[key]}, in the shape of the image.")
                  for key in CONDITIONS),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder=None, name=None):
        try:
            if folder is not None:
                dataset.target(folder)
            if name is not None:
                refuse_unportable(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, image, folder, name, text, **conditions) -> io.NodeOutput:
        given = {IMAGE: image, **{key: conditions.get(key) for key in CONDITIONS}}
        path = dataset.save(folder, name, text, {key: given[key] for key in PICTURES})
        return io.NodeOutput(ui=ui.PreviewText(f"{name} in {path.name}"))


NODES = [LoadEntry, SaveEntry]
