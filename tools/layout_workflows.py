"""Places the nodes of workflows/: in numbered, coloured groups, with room for what the browser draws.

    python -m pixstack.tools.layout_workflows [NAME ...] [--front-end-root DIR ...] [--address URL ...]

measures a node of each kind in headless Chromium, classic and in Nodes 2.0, as it opens and with the picture, preview
and text that a run leaves on it, then writes positions, sizes and groups into the files. Run it after nodes of a
workflow have changed; the graph itself it leaves alone. `--front-end-root` measures in another frontend as well,
`--address` in that of a ComfyUI that runs, instead of one of its own without any model; the largest height counts.

A node belongs to the group that its class is for (GROUPS). To put it elsewhere, give it the property "PixStack group"
with that group's name; "PixStack room" is how many
pixels more than measured one is to have below it. tests/frontend holds that nothing overlaps.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from .comfyui import CACHE, ROOT, find_comfyui, make_base
from .model_files import nodes_of
from .server import served
from .workflow import shipped

RUNNER = ROOT / "tests" / "frontend" / "run.mjs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RENDERERS = ("classic", "nodes2")
VIEW = 1600, 900  # pixels of a common window, into which the browser fits a template
MARGINS = 90, 150, 30, 40  # left, top, right, bottom: under the sidebar, the tabs and the workflow's name

TITLE = 30  # of a node; its position is below it
GAP, BADGE = 16, 18  # between nodes; the classic renderer writes the pack's name above a title
GROUP_TITLE, PADDING = 40, 16
BETWEEN = 44  # groups
NOTE = 40  # around the text of one
NOTES = {"color": "#2f3b40", "bgcolor": "#1c2226"}
"""Colours of notes. On their own brown Nodes 2.0 writes what is in code style in a blue that cannot be read."""
NARROWEST = 40  # a node as saved for measuring: the browser enlarges it to what it needs

GROUPS = {  # name -> (colour, classes), in the order of a graph
    "Model": ("#3f789e", {
        "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "ControlNetLoader", "LoraLoaderModelOnly",
        "ModelSamplingFlux", "T5TokenizerOptions", "PixStack_PixArtLoader", "PixStack_PixArtLoraLoader",
        "PixStack_PixArtControlNetLoader", "PixStack_PixArtSizeCondition", "PixStack_ConsistencyDecoderLoader",
        "PixStack_PixelFlowLoader", "PixStack_PixelFlowTextEncoderLoader", "PixStack_FluxLoader",
        "PixStack_PixelPonderLoader", "PixStack_CascadeLoader", "PixStack_UltraPixelGuideLoader",
        "PixStack_UltraPixelStageALoader", "PixStack_UltraPixelPersonalise"}),
    "Picture": ("#8AA", {
        "LoadImage", "LoadImageMask", "ImageScale", "ImageBatch", "VAEEncode", "StableCascade_StageC_VAEEncode",
        "SetLatentNoiseMask", "SolidMask", "MaskComposite", "InvertMask", "RepeatLatentBatch",
        "PixStack_ExamplePicture", "PixStack_LoadEntry", "PixStack_UltraPixelInpaintHint", "PixStack_PaintConditions"}),
    "Hints": ("#8AA", {
        "Canny", "PixStack_CannyEdges", "PixStack_HEDEdges", "PixStack_DepthMap", "PixStack_FindPoses",
        "PixStack_DrawPoses", "PixStack_UltraPixelCanny"}),
    "Prompt": ("#b58b2a", {
        "CLIPTextEncode", "FluxGuidance", "ConditioningZeroOut", "PixStack_PixArtTextEncode", "PixStack_PixArtPrompt",
        "PixStack_PixArtNullCaption", "PixStack_PixelFlowClass"}),
    "Size": ("#8A8", {
        "EmptySD3LatentImage", "EmptyLatentImage", "PixStack_PixArtCanvas", "PixStack_PixArtReferenceCanvas",
        "PixStack_PixelFlowCanvas", "PixStack_UltraPixelCanvas"}),
    "Conditions": ("#a1309b", {
        "ControlNetApplyAdvanced", "PixStack_PixArtControlNetApply", "PixStack_PixelPonderCondition",
        "PixStack_PixelPonderApply", "PixStack_PixelPonderConditions"}),
    "Draw": ("#A88", {
        "KSampler", "SamplerCustom", "SamplerCustomAdvanced", "KSamplerSelect", "RandomNoise", "DisableNoise",
        "PrimitiveInt", "BasicScheduler", "SplitSigmas", "CFGGuider", "BasicGuider", "PixStack_PixArtSampler",
        "PixStack_PixArtSigmas", "PixStack_PixelFlowSample", "PixStack_PixelFlowSampler", "PixStack_PixelFlowSigmas",
        "PixStack_UltraPixelSampler", "PixStack_UltraPixelGuide"}),
    "Decode": ("#b06634", {
        "StableCascade_StageB_Conditioning", "PixStack_UltraPixelStageB", "PixStack_UltraPixelStageBTiles"}),
    "Result": ("#88A", {
        "SaveImage", "VAEDecode", "VAEDecodeTiled", "ImageScaleBy", "PixStack_PixArtRightHalf", "PixStack_SaveEntry",
        "PixStack_PixelPonderMap", "PixStack_ComparePictures"}),
}  # fmt: skip
OTHERS = "#A88", "#b06634", "#3f789e"  # colours of groups that are none of these
SHOWS = {"PreviewImage", "MaskPreview", "PreviewAny"}
"""Nodes that show what another gives; they lie in its group, or with the results if it draws."""
PREVIEWS = {"KSampler", "SamplerCustom", "SamplerCustomAdvanced", "PixStack_PixelFlowSample",
            "PixStack_PixelPonderApply"}
PICTURES = {"SaveImage", "PreviewImage", "MaskPreview"}
TEXTS = {  # as they come
    "PixStack_PixArtCanvas": "1024 x 1024 pixels, 4096 tokens: a size of the 1024 training, height/width 1",
    "PixStack_PixelFlowCanvas": " \N{RIGHTWARDS ARROW} ".join(("32x32", "64x64", "128x128", "256x256 pixels")),
    "PixStack_UltraPixelCanvas": "4096 x 4096 pixels\nStage C: 96 x 96 = 9216 tokens, guide on the way up 0.7\n"
                                 "Low-resolution pass: 24 x 24 = 576 tokens\nStage B: 1024 x 1024 cells",
    "PixStack_PixArtLoraLoader": "pixart_emoji_fluent.safetensors: 49 layers applied with strength 1",
    "PixStack_LoadEntry": "1 of 12: a_picture", "PixStack_SaveEntry": "a_picture in dataset_annotated",
    "PixStack_FindPoses": "2 people", "PreviewAny": "2048 x 2048 pixels\nStage C: 48 x 48 tokens",
}
WIDTHS = {"SaveImage": 460, "MarkdownNote": 460, "CLIPTextEncode": 360, "PixStack_PixArtTextEncode": 360}
WIDTH = 320
HEIGHTS = {"SaveImage": 520, "PreviewImage": 300, "MaskPreview": 300, "LoadImage": 340,
           "PreviewAny": 140}
"""As saved, of nodes whose picture or text takes what room it gets."""
KEEP_WIDTH = PICTURES | PREVIEWS | {"LoadImage"}  # a picture is as high as its node is wide
MORE = {"CLIPTextEncode": 50, "PixStack_PixArtTextEncode": 40, "PixStack_PixelFlowClass": 0}
"""Pixels beyond the least, for boxes of text."""


@dataclass
class Size:
    saved: float
    """Height for the file, without the title: what the classic renderer needs."""
    room: float
    """Height with the title, of the largest that was measured."""


@dataclass
class Block:
    """A group, or a note outside of any: what is placed as one."""

    title: str
    colour: str
    columns: list[list[dict]]
    widths: list[float] = field(default_factory=list)
    heights: list[float] = field(default_factory=list)

    @property
    def boxed(self) -> bool:
        return bool(self.title)

    @property
    def width(self) -> float:
        return sum(self.widths) + GAP * 2 * (len(self.widths) - 1) + (2 * PADDING if self.boxed else 0)

    @property
    def height(self) -> float:
        return max(self.heights) + (GROUP_TITLE + 2 * PADDING if self.boxed else 0)


def width_of(node: dict) -> float:
    return WIDTHS.get(node["type"], WIDTH)


def group_of(node: dict, nodes: dict[int, dict], sources: dict[int, list[int]]) -> str:
    """The name of a node's group, without its number."""
    if named := node.get("properties", {}).get("PixStack group"):
        return named
    before = [nodes[i] for i in sources[node["id"]]]
    if node["type"] in SHOWS:
        name = group_of(before[0], nodes, sources) if before else "Result"
        return "Result" if name in ("Draw", "Decode") else name
    if node["type"] in GROUPS["Draw"][1] and any(group_of(one, nodes, sources) == "Decode" for one in before):
        return "Decode"
    for name, (_, classes) in GROUPS.items():
        if node["type"] in classes:
            drawn = name == "Picture" and any(group_of(one, nodes, sources) in ("Draw", "Result") for one in before)
            return name if not drawn else "Draw" if node["type"] == "VAEEncode" else "Result"
    raise ValueError(f"node {node['id']} is a {node['type']}, which GROUPS of tools/layout_workflows.py does not have: "
                     'add its class there, or give the node the property "PixStack group"')


def in_order(members: list[dict], sources: dict[int, list[int]]) -> list[dict]:
    """A group's nodes so that links lead downwards, a chain together."""
    inside, placed, order = {n["id"] for n in members}, set(), []

    def ready(node):
        return all(i in placed for i in sources[node["id"]] if i in inside)

    def place(node):
        placed.add(node["id"])
        order.append(node)
        for other in members:
            if other["id"] not in placed and node["id"] in sources[other["id"]] and ready(other):
                place(other)

    while len(order) < len(members):
        place(next((n for n in members if n["id"] not in placed and ready(n)), None)
              or next(n for n in members if n["id"] not in placed))
    return order


def heights_of(column: list[dict], sizes: dict[int, Size]) -> float:
    return sum(sizes[n["id"]].room for n in column) + (len(column) - 1) * (GAP + BADGE) + BADGE


def split(nodes: list[dict], count: int, sizes: dict[int, Size]) -> list[list[dict]]:
    """`nodes` in `count` columns, in their order, the highest as low as can be."""
    if count == 1:
        return [nodes]
    choices = itertools.combinations(range(1, len(nodes)), count - 1)
    cut = [[nodes[a:b] for a, b in itertools.pairwise((0, *at, len(nodes)))] for at in choices]
    return min(cut, key=lambda columns: max(heights_of(column, sizes) for column in columns))


def block_of(title: str, colour: str, nodes: list[dict], count: int, sizes: dict[int, Size]) -> Block:
    columns = split(nodes, count, sizes)
    return Block(title, colour, columns, [max(map(width_of, column)) for column in columns],
                 [heights_of(column, sizes) for column in columns])


def arrange(workflow: dict, sizes: dict[int, Size]) -> dict:
    """A copy of `workflow` with positions, sizes and groups. sizes: by node id."""
    workflow = copy.deepcopy(workflow)
    nodes = {n["id"]: n for n in workflow["nodes"]}
    sources: dict[int, list[int]] = {i: [] for i in nodes}
    for _, origin, _, target, *_ in workflow["links"]:
        sources[target].append(origin)
    notes = [n for n in workflow["nodes"] if n["type"] in ("MarkdownNote", "Note")]
    members: dict[str, list[dict]] = {}
    for node in workflow["nodes"]:
        if node not in notes:
            members.setdefault(group_of(node, nodes, sources), []).append(node)
    order = sorted(members, key=lambda name: list(GROUPS).index(name) if name in GROUPS else len(GROUPS))
    groups = [(f"{i} {name}", GROUPS[name][0] if name in GROUPS else OTHERS[i % len(OTHERS)],
               in_order(members[name], sources)) for i, name in enumerate(order, 1)]
    for note in notes:
        note |= NOTES
    first, more = ("", "", notes[:1]), [("", "", [note]) for note in notes[1:]]
    columns = best([first, *groups, *more], sizes)
    place(workflow, columns, sizes)
    workflow.setdefault("extra", {})["ds"] = view(columns)
    return workflow


def view(columns: list[list[Block]]) -> dict:
    """What of the canvas is seen: all of it in a common window, beside and below what lies over the canvas. Newer
    browsers choose that themselves; Nodes 2.0 of frontend 1.32.9 misplaces nodes if it has to choose."""
    wide, high = extent(columns)
    left, top, right, bottom = MARGINS
    scale = round(min((VIEW[0] - left - right) / wide, (VIEW[1] - top - bottom) / high, 1), 3)
    return {"scale": scale, "offset": [round(left / scale), round(top / scale)]}


def extent(columns: list[list[Block]]) -> tuple[float, float]:
    return (sum(max(b.width for b in column) for column in columns) + BETWEEN * (len(columns) - 1),
            max(sum(b.height for b in column) + BETWEEN * (len(column) - 1) for column in columns))


def best(items: list[tuple[str, str, list[dict]]], sizes: dict[int, Size]) -> list[list[Block]]:
    """Columns of blocks that the browser shows largest when it fits them into a window."""
    found, least = None, float("inf")
    for limit in range(500, 2400, 50):
        blocks = []
        for title, colour, nodes in items:
            tries = (block_of(title, colour, nodes, count, sizes) for count in range(1, min(len(nodes), 6) + 1))
            blocks.append(next((one for one in tries if one.height <= limit), None)
                          or block_of(title, colour, nodes, min(len(nodes), 6), sizes))
        columns: list[list[Block]] = []
        for block in blocks:
            if columns and sum(b.height + BETWEEN for b in columns[-1]) + block.height <= limit:
                columns[-1].append(block)
            else:
                columns.append([block])
        width, height = extent(columns)
        smaller = max(width / VIEW[0], height / VIEW[1])
        if smaller < least:
            found, least = columns, smaller
    return found


def place(workflow: dict, columns: list[list[Block]], sizes: dict[int, Size]) -> None:
    left, groups = 0.0, []
    for column in columns:
        top, width = 0.0, max(b.width for b in column)
        for block in column:
            spare = width - block.width  # columns of one width look calm
            block.widths[-1] += spare
            x, y = left, top
            if block.boxed:
                groups.append({"id": len(groups) + 1, "title": block.title, "color": block.colour, "font_size": 24,
                               "bounding": [round(v) for v in (left, top, width, block.height)], "flags": {}})
                x, y = left + PADDING, top + GROUP_TITLE + PADDING
            for nodes, wide in zip(block.columns, block.widths, strict=True):
                down = y
                for node in nodes:
                    down += BADGE if block.boxed else 0
                    size = sizes[node["id"]]
                    across = width_of(node) if node["type"] in KEEP_WIDTH else wide
                    node["pos"], node["size"] = [round(x), round(down + TITLE)], [round(across), round(size.saved)]
                    down += size.room + GAP
                x += wide + 2 * GAP
            top += block.height + BETWEEN
        left += width + BETWEEN
    workflow["groups"] = groups


def shown_by(node: dict) -> dict | None:
    """What a run leaves on a node, for canvas.mjs."""
    kind, shown = node["type"], {}
    picture = {"filename": "example.png", "subfolder": "", "type": "input"}
    if kind in PICTURES:
        shown["pictures"] = [picture]
    if kind == "PixStack_PixelFlowSample":
        shown["output"] = {"pixstack_stages": [{"strips": [picture], "sizes": [[16, 16], [32, 32], [64, 64]]}]}
    if kind in PREVIEWS:
        shown["preview"] = 256
    if kind == "PreviewAny":
        shown["texts"] = [TEXTS[kind]]
    elif kind in TEXTS:
        shown["text"] = TEXTS[kind]
    return {"node": str(node["id"]), **shown} if shown else None


def results_of(workflow: dict) -> list[dict]:
    return [shown for node in workflow["nodes"] if (shown := shown_by(node))]


def kind_of(node: dict) -> str:
    """What a node's height depends on: its class, whether files of it may be missing, and a note's text."""
    files = " with files" if node.get("properties", {}).get("models") else ""
    if node["type"] == "MarkdownNote":
        return json.dumps([node["type"], node["widgets_values"]])
    return node["type"] + files


def one_of_each(workflows: list[dict]) -> tuple[dict, dict[str, str]]:
    """(a workflow of a node of each kind, far apart and as low as the browser lets them, kind -> id in it)."""
    nodes, ids, across = [], {}, 12
    for node in (node for workflow in workflows for node in nodes_of(workflow)):
        if kind_of(node) in ids:
            continue
        i = len(nodes) + 1
        ids[kind_of(node)] = str(i)
        nodes.append({
            **copy.deepcopy(node), "id": i, "pos": [i % across * 700, i // across * 1400], "mode": 0,
            "size": [width_of(node), HEIGHTS.get(node["type"], NARROWEST)],
            "inputs": [{**socket, "link": None} for socket in node.get("inputs", [])],
            "outputs": [{**socket, "links": None} for socket in node.get("outputs", [])],
        })  # fmt: skip
    inner = (one for workflow in workflows for one in workflow.get("definitions", {}).get("subgraphs", []))
    subgraphs = {one["id"]: one for one in inner}
    return dict(id=str(uuid.uuid4()), nodes=nodes, links=[], groups=[], last_node_id=len(nodes), last_link_id=0,
                config={}, extra={}, version=0.4, definitions={"subgraphs": [*subgraphs.values()]}), ids


def browse(address: str, jobs: list[dict], timeout: float = 900) -> dict:
    """The answer of tests/frontend/run.mjs."""
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None or shutil.which("node") is None:
        raise ValueError("Chromium and node are needed to measure nodes; one of them is not installed")
    if not (RUNNER.parent / "node_modules" / "playwright-core").is_dir():
        raise ValueError("playwright-core is needed to measure nodes: run npm ci --prefix tests/frontend")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "jobs.json")
        file.write_text(json.dumps(jobs))
        done = subprocess.run(["node", RUNNER, address, file], capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "CHROMIUM": chromium})
    if done.returncode:
        raise RuntimeError(f"{RUNNER.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def bare_server(frontend: str | None = None):
    """A ComfyUI without any downloaded model, as a newcomer has it: its nodes say so, and are higher for it."""
    with tempfile.TemporaryDirectory(dir=_made(CACHE)) as folder:
        base = make_base(Path(folder))
        shutil.copy(find_comfyui() / "input" / "example.png", base / "input")
        arguments = ["--front-end-root", frontend] if frontend else []
        with served(base, base / "server.log", arguments) as address:
            yield address


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def measured(workflows: list[dict], servers: list) -> dict[str, Size]:
    """The size of every kind of node. servers: context managers of addresses."""
    sheet, ids = one_of_each(workflows)
    jobs = [dict(name="", renderer=renderer, workflow=sheet, shown=results_of(sheet)) for renderer in RENDERERS]
    rooms: dict[str, float] = {}
    saved, texts = {}, {}
    for server in servers:
        with server as address:
            answer = browse(address, jobs)
        print(f"measured in frontend {answer['frontend']}", file=sys.stderr)
        for job in answer["jobs"]:
            # Nodes 2.0 of some frontends enlarges a whole workflow, and with it the room that a node has.
            scale = min(job["nodes"][str(node["id"])][2] / node["size"][0] for node in sheet["nodes"])
            for i, box in [*job["nodes"].items(), *job["after"].items()]:
                rooms[i] = max(rooms.get(i, 0), box[3] / max(scale, 1))
            for i, height in job["texts"].items():
                texts[i] = max(texts.get(i, 0), height)  # in pixels of text, which are not enlarged
            if job["renderer"] == "classic":
                for i, box in job["nodes"].items():
                    saved[i] = max(saved.get(i, 0), box[3] - TITLE)
    sizes = {}
    for node in sheet["nodes"]:
        i = str(node["id"])
        more = MORE.get(node["type"], 0)
        sizes[kind_of(node)] = (Size(texts[i] + NOTE, texts[i] + NOTE + TITLE) if node["type"] == "MarkdownNote" else
                                Size(saved[i] + more, rooms[i] + more))
    return sizes


def own_size(node: dict, size: Size) -> Size:
    """With the room that a node is to have beyond what was measured, where a run leaves more on it than on others."""
    return replace(size, room=size.room + node.get("properties", {}).get("PixStack room", 0))


def main() -> int:
    parser = argparse.ArgumentParser(prog="layout_workflows", description=__doc__.split("\n\n")[0])
    parser.add_argument("--front-end-root", action="append", default=[], metavar="DIR", help="another frontend too")
    parser.add_argument("--address", action="append", default=[], metavar="URL", help="a ComfyUI that runs already")
    parser.add_argument("names", nargs="*", metavar="NAME", help="short names; all when none is given")
    args = parser.parse_args()
    paths = [path for name, path in shipped().items() if not args.names or name in args.names]
    workflows = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    roots = args.front_end_root if args.address else [None, *args.front_end_root]
    servers = [*map(contextlib.nullcontext, args.address), *map(bare_server, roots)]
    sizes = measured([json.loads(path.read_text(encoding="utf-8")) for path in shipped().values()], servers)
    for path, workflow in workflows.items():
        made = arrange(workflow, {node["id"]: own_size(node, sizes[kind_of(node)]) for node in workflow["nodes"]})
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
