"""Workflows as the browser saves them, turned into the API format that ComfyUI executes.

Widgets, muted and bypassed nodes, reroutes, primitives, notes and subgraphs, whose nodes take the subgraph's place.
`info` is what GET /object_info answers. The frontend test holds this to the browser's own conversion.
"""

from __future__ import annotations

import difflib
import json
import uuid
from pathlib import Path

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # of a list; subgraphs have them by name
ENTERING, LEAVING = -10, -20  # ids that stand for a subgraph's own inputs and outputs
CHANGES, UPLOAD = " changes", " upload"  # no input has such a name
UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload")


def shipped() -> dict[str, Path]:
    """Short name -> file of every template, in the order of the gallery. Files are renamed when templates come in
    between; the short name stays, and stands in `extra`."""
    paths = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.json"))
    return {json.loads(path.read_text(encoding="utf-8"))["extra"]["pixstack"]: path for path in paths}


def named(name: str) -> Path:
    """The file of a template by its number, its short name or its whole name; else `name` is a path itself."""
    found = (path for short, path in shipped().items() if name in (path.stem.partition(" ")[0], path.stem, short))
    return next(found, Path(name))


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
    nodes, links = unpacked(workflow)
    graph = {}
    for i, node in nodes.items():
        kind = node["type"]
        if kind in NOTES | {"Reroute", "PrimitiveNode"} or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind not in info:
            raise ValueError(f"node {i} is a {kind}, which ComfyUI does not have{nearest(kind, info)}")
        inputs = widget_values(node, info[kind])
        for socket in node.get("inputs", []):
            if socket["link"] is None:
                continue
            source = _follow(socket["link"], nodes, links)
            if source is None:
                inputs.pop(socket["name"], None)  # its source is muted
            else:
                inputs[socket["name"]] = source
        title = node.get("title") or info[kind].get("display_name") or kind
        graph[i] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return graph


def unpacked(workflow: dict) -> tuple[dict[str, dict], dict]:
    """(nodes by id, links) of a workflow with what its subgraphs hold in their place: node 3 of the subgraph that is
    node 7 gets the id 7:3, as in the browser. Links: name -> (node id, output slot); nodes' inputs hold these names."""
    subgraphs = {s["id"]: s for s in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes, links = {}, {}

    def unpack(graph: dict, prefix: str, outer: dict) -> dict:
        """Adds a graph's nodes and links. outer: name of each of a subgraph's inputs -> the link that comes into it.
        The result: output slot of the subgraph -> the link that goes into it."""
        within, leaving = {}, {}
        for link in graph["links"]:
            one = link if isinstance(link, dict) else dict(zip(LINK, link, strict=False))
            if one["target_id"] == LEAVING:
                leaving[one["target_slot"]] = one["id"]
            within[one["id"]] = one
        inner = {}  # slots of the subgraphs in this graph
        names = {}

        def name_of(link: int | None):
            """A link's name; that of the link outside where it only comes in or out of a subgraph."""
            if link is None:
                return None
            if link not in names:
                origin, slot = within[link]["origin_id"], within[link]["origin_slot"]
                if origin == ENTERING:
                    names[link] = outer.get(graph["inputs"][slot]["name"])
                elif origin in packed:
                    names[link] = open_(packed[origin]).get(slot)
                else:
                    names[link] = f"{prefix}{link}"
                    links[names[link]] = f"{prefix}{origin}", slot
            return names[link]

        def open_(node: dict) -> dict:
            if node["id"] not in inner:
                comes = {i["name"]: name_of(i.get("link")) for i in node.get("inputs", [])}
                inner[node["id"]] = unpack(subgraphs[node["type"]], f"{prefix}{node['id']}:", comes)
            return inner[node["id"]]

        packed = {n["id"]: n for n in graph["nodes"]
                  if n["type"] in subgraphs and n.get("mode") not in (MUTED, BYPASSED)}
        for node in graph["nodes"]:
            if node["id"] in packed:
                open_(node)
            else:
                sockets = [{**i, "link": name_of(i.get("link"))} for i in node.get("inputs", [])]
                nodes[f"{prefix}{node['id']}"] = {**node, "inputs": sockets}
        return {slot: name_of(link) for slot, link in leaving.items()}

    unpack(workflow, "", {})
    return nodes, links


def to_workflow(graph: dict, info: dict) -> dict:
    """The other way: a workflow of an API-format graph, with seeds that change after each run, all at one place."""
    ids = {name: i for i, name in enumerate(graph, 1)} | {name: int(name) for name in graph if name.isdigit()}
    nodes, links = [], []
    for order, (name, given) in enumerate(graph.items()):
        described, values, sockets = info[given["class_type"]], given["inputs"], []
        for kind in ("required", "optional"):
            for one, spec in described["input"].get(kind, {}).items():
                socket = {"name": one, "type": spec[0] if isinstance(spec[0], str) else "COMBO", "link": None}
                if kind == "optional":
                    socket["shape"] = 7  # drawn as a ring
                if isinstance(values.get(one), list):
                    origin, slot = values[one]
                    socket["link"] = len(links) + 1
                    links.append([socket["link"], ids[origin], slot, ids[name], len(sockets), socket["type"]])
                if not _is_widget(spec):
                    sockets.append(socket)
                elif socket["link"]:
                    sockets.append({**socket, "widget": {"name": one}})
        outputs = [{"name": label, "type": kind, "links": None}
                   for label, kind in zip(described["output_name"], described["output"], strict=True)]
        nodes.append({
            "id": ids[name], "type": given["class_type"], "pos": [0, 0], "size": [300, 100], "flags": {},
            "order": order, "mode": 0, "inputs": sockets, "outputs": outputs,
            "properties": {"Node name for S&R": given["class_type"]},
            "widgets_values": _saved_values(values, described),
        })  # fmt: skip
        title = given.get("_meta", {}).get("title")
        if title and title != described.get("display_name"):
            nodes[-1]["title"] = title
    by_id = {node["id"]: node for node in nodes}
    for link, origin, slot, *_ in links:
        output = by_id[origin]["outputs"][slot]
        output["links"] = [*(output["links"] or []), link]
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(graph))), "revision": 0, "last_node_id": max(by_id),
            "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {},
            "version": 0.4}


def _saved_values(values: dict, described: dict) -> list:
    """Values by position, as `widget_values` reads them; of what is linked, the default."""
    def value(name, spec):
        options = spec[1] if len(spec) > 1 else {}
        menu = spec[0] if isinstance(spec[0], list) else options.get("options", [])
        least = {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get("" if isinstance(spec[0], list) else spec[0], "")
        default = options.get("default", menu[0] if menu else least)
        return default if isinstance(values.get(name), list) else values.get(name, default)

    companions = {CHANGES: "randomize", UPLOAD: "image"}
    specs = _specs(described)
    return [companions.get(name) or value(name, specs[name]) for name in _places(described)]


def widget_values(node: dict, described: dict) -> dict:
    """Names for the values that the browser saves by position, companions of a seed or an upload left out."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if name in _specs(described)}
    return {name: value for name, value in zip(_places(described), values, strict=False)
            if name not in (CHANGES, UPLOAD)}


def _places(described: dict) -> list[str]:
    """What the browser saves of a node, by position: names of widgets, and the companions that it adds itself."""
    names, uploads = [], False
    for kind in ("required", "optional"):
        for name, spec in described["input"].get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            uploads |= any(options.get(flag) for flag in UPLOADS)
            if _is_widget(spec):
                names.append(name)
                if options.get("control_after_generate", spec[0] == "INT" and name in ("seed", "noise_seed")):
                    names.append(CHANGES)
        if uploads and kind == "required":
            names.append(UPLOAD)  # the button, which the browser adds after the required inputs
    return names


def _is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput")


def _follow(link: str, nodes: dict, links: dict):
    """The source of a link, through reroutes and bypassed nodes: [node, slot], a primitive's value, or None."""
    origin, slot = links[link]
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
        return [origin, slot]
    return None if through is None or through["link"] is None else _follow(through["link"], nodes, links)


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
        node = graph[node_named(name, graph, f"--set {assignment}")]
        specs = _specs(info.get(node["class_type"], {"input": {}}))
        if key not in specs:
            raise ValueError(f"--set {assignment}: {node['class_type']} has no input {key}{nearest(key, specs)}")
        if not _is_widget(specs[key]):
            raise ValueError(f"--set {assignment}: {key} is linked from another node, only values can be set")
        node["inputs"][key] = _parse(text, specs[key], assignment)
    return graph


def node_named(name: str, graph: dict, why: str) -> str:
    """The id of a node by its id, its title or its class, if only one node has that. why: begins an error."""
    if name in graph:
        return name
    names = {}
    for i, node in graph.items():
        for alias in {node["class_type"], node.get("_meta", {}).get("title", node["class_type"])}:
            names.setdefault(alias, []).append(i)
    if name not in names:
        raise ValueError(f"{why}: no node {name}{nearest(name, [*graph, *names])}")
    if len(names[name]) > 1:
        raise ValueError(f"{why}: nodes {', '.join(names[name])} are all {name}; use the number")
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
