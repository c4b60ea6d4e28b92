"""Blueprints of ComfyUI's node menu (subgraphs/), each made of a template in workflows/.

    python -m pixstack.tools.make_blueprints

A blueprint is the template in one node: the picture that goes in is its input, the one that comes out its output, and
what people change most stands on it. ComfyUI, 0.3.75 and newer, offers what lies in subgraphs/ among its nodes
(app/subgraph_manager.py). Templates that use such a node hold a copy of it, which is renewed too. Run it again after a
template of BLUEPRINTS has changed; a test compares.
"""
from __future__ import annotations

import copy
import json
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from .workflow import ENTERING, LEAVING, LINK, shipped

FOLDER = Path(__file__).resolve().parents[1] / "subgraphs"
LEFT_OUT = {"MarkdownNote", "SaveImage", "PreviewImage", "LoadImage"}
EDGE, ROW, TITLE = 120, 20, 30  # pixels: of the boxes for what enters and leaves, of a slot in them, of a node's title


@dataclass(frozen=True)
class Blueprint:
    template: str
    about: str
    shown: tuple[tuple[str, int, str], ...]
    """(its name on the node, inner node, widget) of what people change."""


BLUEPRINTS = {
    "PixArt text to image": Blueprint(
        "pixart_sigma_1024", "Draws a prompt with PixArt-Sigma at about 1024 pixels.",
        (("prompt", 4, "text"), ("negative prompt", 5, "text"), ("shape", 6, "shape"), ("batch_size", 6, "batch_size"),
         ("steps", 8, "steps"), ("cfg", 9, "cfg"), ("seed", 9, "noise_seed"), ("model", 1, "model_name"),
         ("text encoder", 2, "clip_name"), ("vae", 3, "vae_name"))),
    "PixelFlow text to image": Blueprint(
        "pixelflow_text_to_image_1024", "Draws a prompt with PixelFlow at 1024 pixels, without a VAE.",
        (("prompt", 3, "text"), ("negative prompt", 4, "text"), ("batch_size", 5, "batch_size"), ("steps", 6, "steps"),
         ("cfg", 6, "cfg"), ("seed", 6, "seed"), ("end_stage", 6, "end_stage"), ("model", 1, "model_name"),
         ("text encoder", 2, "encoder_name"))),
    "PixelPonder": Blueprint(
        "pixelponder_one_condition", "Draws a prompt with FLUX.1 [dev] along a picture's soft edges, at 512 pixels.",
        (("prompt", 6, "text"), ("strength", 16, "strength"), ("end_percent", 16, "end_percent"),
         ("steps", 17, "steps"), ("seed", 17, "seed"), ("model", 1, "unet_name"),
         ("PixelPonder", 9, "control_net_name"), ("CLIP-L", 3, "clip_name1"),
         ("T5-XXL", 3, "clip_name2"), ("vae", 5, "vae_name"))),
    "UltraPixel 4K": Blueprint(
        "ultrapixel_4096", "Draws a prompt with Stable Cascade and UltraPixel's guide at 4096 x 4096 pixels.",
        (("prompt", 4, "text"), ("negative prompt", 5, "text"), ("width", 6, "width"), ("height", 6, "height"),
         ("steps", 10, "steps"), ("cfg", 9, "cfg"), ("seed", 12, "noise_seed"), ("Stage C", 1, "unet_name"),
         ("guide", 2, "guide_name"), ("CLIP-G", 3, "clip_name"), ("Stage B", 14, "unet_name"),
         ("Stage A", 17, "vae_name"))),
}  # fmt: skip
CHANGING = {"seed", "noise_seed"}  # widgets that the browser gives a companion: what it does after each run


def made(name: str, blueprint: Blueprint, template: dict) -> dict:
    """The file of a blueprint. template: the workflow that it packs."""
    template = copy.deepcopy(template)
    names = {node["id"]: node for node in template["nodes"]}
    for node in template["nodes"]:  # fields that App mode names: what stands on the blueprint is connected below
        node["inputs"] = [one for one in node["inputs"] if not one.get("widget") or one["link"] is not None]
    inside = [node for node in template["nodes"] if node["type"] not in LEFT_OUT]
    links, inputs, outputs = [], [], []
    for one in (dict(zip(LINK, link, strict=True)) for link in template["links"]):
        origin, target = names[one["origin_id"]]["type"], names[one["target_id"]]["type"]
        if origin == "LoadImage":
            inputs = inputs or [slot_of(name, "image", "IMAGE")]
            one.update(origin_id=ENTERING, origin_slot=0)
            inputs[0]["linkIds"].append(one["id"])
        elif target == "SaveImage":
            outputs = [slot_of(name, "IMAGE", "IMAGE")]
            one.update(target_id=LEAVING, target_slot=0)
            outputs[0]["linkIds"].append(one["id"])
        elif target in LEFT_OUT:
            output = names[one["origin_id"]]["outputs"][one["origin_slot"]]
            output["links"] = [link for link in output["links"] if link != one["id"]]
            continue
        links.append(one)
    sockets, last = [], template["last_link_id"]
    for label, i, widget in blueprint.shown:
        last += 1
        kind = kind_of(widget)
        slot = slot_of(name, label, kind)
        slot["linkIds"].append(last)
        taken = names[i]["inputs"]
        links.append(dict(zip(LINK, (last, ENTERING, len(inputs), i, len(taken), kind), strict=True)))
        taken.append({"name": widget, "type": kind, "widget": {"name": widget}, "link": last})
        inputs.append(slot)
        sockets.append({"name": label, "type": kind, "widget": {"name": label}, "link": None})
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"pixstack {name}"))
    left, top, right = bounds(inside)
    groups = [group for group in template["groups"] if any(is_in(node, group) for node in inside)]
    subgraph = {
        "id": own, "version": 1, "revision": 0, "config": {}, "name": name, "description": blueprint.about,
        "category": "pixstack", "widgets": [],
        "state": {"lastGroupId": len(groups), "lastNodeId": template["last_node_id"], "lastLinkId": last,
                  "lastRerouteId": 0},
        "inputNode": {"id": ENTERING, "bounding": [left - 2 * EDGE, top, EDGE, 2 * ROW + ROW * len(inputs)]},
        "outputNode": {"id": LEAVING, "bounding": [right + EDGE, top, EDGE, 3 * ROW]},
        "inputs": [{**slot, "pos": [left - EDGE - ROW, top + ROW * (i + 1)]} for i, slot in enumerate(inputs)],
        "outputs": [{**slot, "pos": [right + EDGE + ROW, top + ROW]} for slot in outputs],
        "nodes": inside, "groups": groups, "links": links, "extra": {},
    }  # fmt: skip
    proxies = [[str(i), widget] for _, i, widget in blueprint.shown]
    proxies += [[str(i), "control_after_generate"] for _, i, widget in blueprint.shown if widget in CHANGING]
    node = {
        "id": template["last_node_id"] + 1, "type": own, "pos": [0, 0], "size": [400, 120 + 26 * len(inputs)],
        "flags": {}, "order": 0, "mode": 0, "title": name, "properties": {"proxyWidgets": proxies},
        "widgets_values": [],
        "inputs": [{"name": "image", "type": "IMAGE", "link": None}] * (len(inputs) - len(sockets)) + sockets,
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}],
    }  # fmt: skip
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"pixstack blueprint {name}")), "revision": 0,
            "last_node_id": node["id"], "last_link_id": last, "nodes": [node], "links": [], "groups": [],
            "version": 0.4, "definitions": {"subgraphs": [subgraph]}, "config": {}, "extra": {}}


def slot_of(blueprint: str, name: str, kind: str) -> dict:
    known = str(uuid.uuid5(uuid.NAMESPACE_URL, f"pixstack {blueprint} {name}"))
    return {"id": known, "name": name, "type": kind, "linkIds": []}


def kind_of(widget: str) -> str:
    return {"text": "STRING", "cfg": "FLOAT", "strength": "FLOAT", "end_percent": "FLOAT", "shape": "COMBO"}.get(
        widget, "COMBO" if "name" in widget else "INT")


def bounds(nodes: list[dict]) -> tuple[float, float, float]:
    """Left, top, right."""
    return (min(n["pos"][0] for n in nodes), min(n["pos"][1] for n in nodes) - TITLE,
            max(n["pos"][0] + n["size"][0] for n in nodes))


def is_in(node: dict, group: dict) -> bool:
    x, y, wide, high = group["bounding"]
    return x <= node["pos"][0] <= x + wide and y <= node["pos"][1] <= y + high


def renewed(workflow: dict, blueprints: list[dict]) -> dict:
    """A copy of a workflow whose nodes of blueprints are those of today, connected as before."""
    workflow, current = copy.deepcopy(workflow), {file["nodes"][0]["title"]: file for file in blueprints}
    for i, subgraph in enumerate(workflow["definitions"]["subgraphs"]):
        file = copy.deepcopy(current[subgraph["name"]])
        fresh, = file["nodes"]
        workflow["definitions"]["subgraphs"][i], = file["definitions"]["subgraphs"]
        for node in (node for node in workflow["nodes"] if node["type"] == subgraph["id"]):
            links = {one["name"]: one["link"] for one in node["inputs"]}
            node["inputs"] = [{**one, "link": links.get(one["name"])} for one in fresh["inputs"]]
            node["properties"] |= fresh["properties"]
            node["type"] = fresh["type"]
    return workflow


def written() -> dict[Path, str]:
    """file -> what it should hold."""
    paths = shipped()
    templates = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    files = {FOLDER / f"{name}.json": made(name, one, templates[one.template]) for name, one in BLUEPRINTS.items()}
    made_of = {paths[name]: renewed(workflow, list(files.values())) for name, workflow in templates.items()
               if workflow.get("definitions", {}).get("subgraphs")}
    return {path: json.dumps(file, indent=1, ensure_ascii=False) + "\n" for path, file in {**files, **made_of}.items()}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for path, text in written().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
