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

FIELDS = (  # (type, class, input), in the order of the form: prompts, pictures, what steers, size, drawing
    ("STRING", "PrimitiveStringMultiline", "value"), ("STRING", "PixStack_PixArtPrompt", "prompt"),
    ("COMBO", "PixStack_PixArtPrompt", "style"), ("STRING", "CLIPTextEncode", "text"),
    ("STRING", "PixStack_PixArtTextEncode", "text"), ("COMBO", "PixStack_PixelFlowClass", "imagenet_class"),
    ("STRING", "PixStack_PixelFlowClass", "classes"), ("COMBO", "LoadImage", "image"),
    ("COMBO", "PixStack_ExamplePicture", "picture"), ("STRING", "PixStack_LoadEntry", "folder"),
    ("FLOAT", "PixStack_PixArtLoraLoader", "strength"), ("FLOAT", "LoraLoaderModelOnly", "strength_model"),
    ("FLOAT", "PixStack_UltraPixelPersonalise", "strength"), ("FLOAT", "ControlNetApplyAdvanced", "strength"),
    ("FLOAT", "PixStack_PixelPonderApply", "strength"),
    ("COMBO", "PixStack_PixArtCanvas", "resolution"), ("COMBO", "PixStack_PixArtCanvas", "shape"),
    ("COMBO", "PixStack_PixArtReferenceCanvas", "resolution"), ("COMBO", "PixStack_PixelFlowCanvas", "shape"),
    ("COMBO", "PixStack_UltraPixelCanvas", "shape"), ("INT", "PixStack_UltraPixelCanvas", "side"),
    ("INT", "PixStack_UltraPixelCanvas", "width"), ("INT", "PixStack_UltraPixelCanvas", "height"),
    ("INT", "PixStack_PixArtSigmas", "steps"), ("INT", "BasicScheduler", "steps"),
    ("STRING", "PixStack_PixelFlowSigmas", "steps"), ("INT", "PixStack_PixelFlowSample", "steps"),
    ("INT", "KSampler", "steps"), ("FLOAT", "SamplerCustom", "cfg"), ("FLOAT", "CFGGuider", "cfg"),
    ("FLOAT", "PixStack_PixelFlowSample", "cfg"), ("FLOAT", "KSampler", "cfg"), ("FLOAT", "FluxGuidance", "guidance"),
    ("FLOAT", "KSampler", "denoise"), ("INT", "PrimitiveInt", "value"), ("INT", "RandomNoise", "noise_seed"),
    ("INT", "SamplerCustom", "noise_seed"), ("INT", "PixStack_PixelFlowSample", "seed"), ("INT", "KSampler", "seed"),
)  # fmt: skip
NAMELESS = {"value", "text"}
"""Inputs that only their node's title says something of."""
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
        values, linked = node["widgets_values"], {one["name"] for one in node["inputs"] if one.get("link") is not None}
        free = node["type"] == "PixStack_UltraPixelCanvas" and values[0].startswith("custom")
        counts = {"side": not free, "width": free, "height": free, "denoise": values[-1] != 1,
                  "imagenet_class": "model" not in linked, "classes": "model" in linked}
        return (widget not in linked and counts.get(widget, True) and group_of(node, nodes, sources) != "Decode"
                and UNUSED.get(node["type"], "") != node.get("title"))

    fields = [(node, widget, kind) for kind, own, widget in FIELDS for node in workflow["nodes"]
              if node["type"] == own and asked(node, widget)]
    fields += [(node, *field) for node in workflow["nodes"] for field in of_subgraph(node)]
    often = Counter(widget for _, widget, _ in fields)
    for node, widget, kind in fields:
        if (title := node.get("title")) and (widget in NAMELESS or often[widget] > 1):
            label(node, widget, kind, title if widget in NAMELESS else f"{widget}: {title}")
    results = [node["id"] for node in workflow["nodes"] if node["type"] in RESULTS]
    form = [[node["id"], widget] for node, widget, _ in fields]
    workflow["extra"]["linearData"] = {"inputs": form, "outputs": results}
    return workflow


def of_subgraph(node: dict) -> list[tuple[str, str]]:
    """(name, type) of what stands on a node of a blueprint, all but files; none of another node."""
    inner = (widget for _, widget in node["properties"].get("proxyWidgets", []))
    own = [one for one in node["inputs"] if one.get("widget")] if "proxyWidgets" in node["properties"] else []
    return [(one["name"], one["type"]) for one, widget in zip(own, inner, strict=False) if "name" not in widget]


def label(node: dict, widget: str, kind: str, text: str) -> None:
    """What stands for a widget's name where the browser shows it. kind: the type of the input."""
    socket = next((one for one in node["inputs"] if one["name"] == widget), None)
    if socket is None:
        socket = {"name": widget, "widget": {"name": widget}, "link": None}
        node["inputs"].append(socket)
    socket |= {"type": kind, "label": text}


def main() -> int:
    for path in shipped().values():
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if (made := app_mode(workflow)) != workflow:
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
