"""What of each template ComfyUI's App mode shows: what a picture is asked for with, and what comes out.

    python -m pixstack.tools.app_mode

writes `extra.linearData` of every workflow, as frontends from 1.39 read it: fields as [node id, widget name], results
as node ids. Older ones keep it and do nothing with it. Run it again after nodes of a template have changed; a test
compares.
"""
from __future__ import annotations

import copy
import json
import sys
from collections import Counter

from .layout_workflows import group_of
from .workflow import shipped

FIELDS = (  # in the order of the form: prompts, pictures, what steers, size, drawing
    ("PrimitiveStringMultiline", "value"), ("PixStack_PixArtPrompt", "prompt"), ("PixStack_PixArtPrompt", "style"),
    ("CLIPTextEncode", "text"), ("PixStack_PixArtTextEncode", "text"), ("PixStack_PixelFlowClass", "imagenet_class"),
    ("LoadImage", "image"), ("PixStack_ExamplePicture", "picture"), ("PixStack_LoadEntry", "folder"),
    ("PixStack_PixArtLoraLoader", "strength"), ("LoraLoaderModelOnly", "strength_model"),
    ("PixStack_UltraPixelPersonalise", "strength"), ("ControlNetApplyAdvanced", "strength"),
    ("PixStack_PixelPonderApply", "strength"),
    ("PixStack_PixArtCanvas", "resolution"), ("PixStack_PixArtCanvas", "shape"),
    ("PixStack_PixArtReferenceCanvas", "resolution"), ("PixStack_PixelFlowCanvas", "shape"),
    ("PixStack_UltraPixelCanvas", "shape"), ("PixStack_UltraPixelCanvas", "side"),
    ("PixStack_UltraPixelCanvas", "width"), ("PixStack_UltraPixelCanvas", "height"),
    ("PixStack_PixArtSigmas", "steps"), ("BasicScheduler", "steps"), ("PixStack_PixelFlowSigmas", "steps"),
    ("PixStack_PixelFlowSample", "steps"), ("KSampler", "steps"),
    ("SamplerCustom", "cfg"), ("CFGGuider", "cfg"), ("PixStack_PixelFlowSample", "cfg"), ("KSampler", "cfg"),
    ("FluxGuidance", "guidance"), ("KSampler", "denoise"),
    ("PrimitiveInt", "value"), ("RandomNoise", "noise_seed"), ("SamplerCustom", "noise_seed"),
    ("PixStack_PixelFlowSample", "seed"), ("KSampler", "seed"),
)  # fmt: skip
TEXTS, MENUS, REAL = {"value", "text"}, {"image", "picture"}, {"cfg", "strength"}
RESULTS = {"SaveImage", "PixStack_SaveEntry"}
UNUSED = {"CLIPTextEncode": "No negative prompt"}  # class -> title of a node whose text is to stay empty


def app_mode(workflow: dict) -> dict:
    """A copy of `workflow` with `extra.linearData`, and with a label on every field whose name says too little, for App
    mode does not show whose it is."""
    workflow = copy.deepcopy(workflow)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    sources: dict[int, list[int]] = {i: [] for i in nodes}
    for _, origin, _, target, *_ in workflow["links"]:
        sources[target].append(origin)

    def asked(node: dict, widget: str) -> bool:
        """Whether a person sets it: nothing is connected, it counts, and it is not Stage B's, which goes by itself."""
        values = node["widgets_values"]
        free = str(values[0]).startswith("custom") if "UltraPixelCanvas" in node["type"] else False
        return (not any(one["name"] == widget and one.get("link") is not None for one in node["inputs"])
                and UNUSED.get(node["type"], "") != node.get("title")
                and (widget != "denoise" or values[-1] != 1)
                and {"side": not free, "width": free, "height": free}.get(widget, True)
                and group_of(node, nodes, sources) != "Decode")

    fields = [(node, widget) for kind, widget in FIELDS for node in workflow["nodes"]
              if node["type"] == kind and asked(node, widget)]
    often = Counter(widget for _, widget in fields)
    for node, widget in fields:
        if (title := node.get("title")) and (widget in TEXTS or often[widget] > 1):
            label(node, widget, title if widget in TEXTS else f"{widget}: {title}")
    results = [node["id"] for node in workflow["nodes"] if node["type"] in RESULTS]
    workflow["extra"]["linearData"] = {"inputs": [[node["id"], widget] for node, widget in fields], "outputs": results}
    return workflow


def label(node: dict, widget: str, text: str) -> None:
    """What stands for a widget's name where the browser shows it."""
    socket = next((one for one in node["inputs"] if one["name"] == widget), None)
    if socket is None:
        kind = "STRING" if widget in TEXTS else "COMBO" if widget in MENUS else "FLOAT" if widget in REAL else "INT"
        socket = {"name": widget, "type": kind, "widget": {"name": widget}, "link": None}
        node["inputs"].append(socket)
    socket["label"] = text


def main() -> int:
    for path in shipped().values():
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if (made := app_mode(workflow)) != workflow:
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
