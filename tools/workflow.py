"""Workflows as the browser saves them, turned into the API format that ComfyUI executes.

For plain graphs: widgets, muted and bypassed nodes, reroutes, primitives and notes. Subgraphs are refused by name.
`info` is what GET /object_info answers. The frontend test holds this to the browser's own conversion.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload")


def read(path: Path, info: dict) -> dict:
    """The API-format graph of a file in either format."""
    try:
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        return to_api(graph, info)
    if isinstance(graph, dict) and graph and all(isinstance(n, dict) and "class_type" in n for n in graph.values()):
        return graph
    raise ValueError(f"{path} is neither a workflow (no list of nodes) nor an API-format graph (no class_type in each)")


def to_api(workflow: dict, info: dict) -> dict:
    nodes = {n["id"]: n for n in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}  # id -> (node, output slot)
    subgraphs = {s["id"] for s in workflow.get("definitions", {}).get("subgraphs", [])}
    graph = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES | {"Reroute", "PrimitiveNode"} or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind in subgraphs:
            raise ValueError(f"node {node['id']} is a subgraph: unpack it first, or save the API format")
        if kind not in info:
            raise ValueError(f"node {node['id']} is a {kind}, which ComfyUI does not have{nearest(kind, info)}")
        inputs = widget_values(node, info[kind])
        for socket in node.get("inputs", []):
            if socket.get("link") is None:
                continue
            source = _follow(*links[socket["link"]], nodes, links)
            if source is None:
                inputs.pop(socket["name"], None)  # its source is muted
            else:
                inputs[socket["name"]] = source
        title = node.get("title") or info[kind].get("display_name") or kind
        graph[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return graph


def widget_values(node: dict, described: dict) -> dict:
    """Names for the values that the browser saves by position, companions of a seed or an upload left out."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if name in _specs(described)}
    names, uploads = [], False
    for kind in ("required", "optional"):
        for name, spec in described["input"].get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            uploads |= any(options.get(flag) for flag in UPLOADS)
            if _is_widget(spec):
                names.append(name)
                if options.get("control_after_generate", spec[0] == "INT" and name in ("seed", "noise_seed")):
                    names.append(None)
        if uploads and kind == "required":
            names.append(None)  # the button, which the browser adds after the required inputs
    return {name: value for name, value in zip(names, values, strict=False) if name is not None}


def _is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput")


def _follow(origin: int, slot: int, nodes: dict, links: dict):
    """The source of a link, through reroutes and bypassed nodes: [node, slot], a primitive's value, or None."""
    node = nodes[origin]
    if node.get("mode") == MUTED:
        return None
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node["type"] == "Reroute":
        through = node["inputs"][0]
    elif node.get("mode") == BYPASSED:
        through = _bypass(node, slot)
    else:
        return [str(origin), slot]
    return None if through is None or through.get("link") is None else _follow(*links[through["link"]], nodes, links)


def _bypass(node: dict, slot: int) -> dict | None:
    """The input that stands in for an output of a bypassed node: the same slot if its type fits, else the first one."""
    inputs, kind = node.get("inputs", []), node["outputs"][slot]["type"]
    here = inputs[slot : slot + 1]
    return next((i for i in here + inputs if i["type"] == kind), None)


def set_inputs(graph: dict, assignments: list[str], info: dict) -> dict:
    """A copy of `graph` with each NODE.input=value done. NODE is an id, a title or a type that only one node has."""
    graph = {i: {**node, "inputs": dict(node["inputs"])} for i, node in graph.items()}
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, key = target.rpartition(".")
        if not equals or not dot:
            raise ValueError(f"--set {assignment}: write it as NODE.input=value")
        node = graph[_find(name, graph, assignment)]
        specs = _specs(info.get(node["class_type"], {"input": {}}))
        if key not in specs:
            raise ValueError(f"--set {assignment}: {node['class_type']} has no input {key}{nearest(key, specs)}")
        if not _is_widget(specs[key]):
            raise ValueError(f"--set {assignment}: {key} is linked from another node, only values can be set")
        node["inputs"][key] = _parse(text, specs[key], assignment)
    return graph


def _find(name: str, graph: dict, assignment: str) -> str:
    if name in graph:
        return name
    names = {}
    for i, node in graph.items():
        for alias in {node["class_type"], node.get("_meta", {}).get("title", node["class_type"])}:
            names.setdefault(alias, []).append(i)
    if name not in names:
        raise ValueError(f"--set {assignment}: no node {name}{nearest(name, [*graph, *names])}")
    if len(names[name]) > 1:
        raise ValueError(f"--set {assignment}: nodes {', '.join(names[name])} are all {name}; use the number")
    return names[name][0]


def _parse(text: str, spec: list, assignment: str):
    if spec[0] == "BOOLEAN":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {assignment}: true or false, not {text}")
        return text.lower() == "true"
    convert = {"INT": int, "FLOAT": float}.get(spec[0] if isinstance(spec[0], str) else "", str)
    try:
        return convert(text)
    except ValueError:
        wanted = "a whole number" if convert is int else "a number"
        raise ValueError(f"--set {assignment}: {wanted} is wanted, not {text!r}") from None


def _specs(described: dict) -> dict:
    return {name: spec for kind in ("required", "optional") for name, spec in described["input"].get(kind, {}).items()}


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""
