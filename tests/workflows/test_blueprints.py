"""Blueprints in subgraphs/: what they were made of, and that they run. tests/frontend opens them in the browser."""

import json

import pytest
from conftest import ROOT, SHIPPED
from PIL import Image
from pixstack.tools import make_blueprints
from pixstack.tools import workflow as conversion
from test_server import get
from test_workflow import shrunk

pytestmark = pytest.mark.long
FILES = sorted((ROOT / "subgraphs").glob("*.json"))


def in_use(path) -> dict:
    """A workflow of a blueprint between Load Image, if it takes a picture, and Save Image."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    node, = workflow["nodes"]
    picture, saved, into = node["id"] + 1, node["id"] + 2, workflow["last_link_id"] + 1
    out, places = into + 1, {name: [600 * i, 40] for i, name in enumerate(("load", "blueprint", "save"))}
    node["pos"] = places["blueprint"]
    node["outputs"][0]["links"] = [out]
    plain = {"size": [300, 320], "flags": {}, "order": 0, "mode": 0, "properties": {}}
    workflow["nodes"].append({
        "id": saved, "type": "SaveImage", "pos": places["save"], "outputs": [], **plain,
        "widgets_values": ["blueprint"], "inputs": [{"name": "images", "type": "IMAGE", "link": out}]})
    workflow["links"] = [[out, node["id"], 0, saved, 0, "IMAGE"]]
    if node["inputs"][0]["name"] == "image":
        node["inputs"][0]["link"] = into
        outputs = [{"name": "IMAGE", "type": "IMAGE", "links": [into]}, {"name": "MASK", "type": "MASK", "links": None}]
        workflow["nodes"].append({
            "id": picture, "type": "LoadImage", "pos": places["load"], "inputs": [], "outputs": outputs, **plain,
            "widgets_values": ["example.png", "image"]})
        workflow["links"].append([into, picture, 0, node["id"], 0, "IMAGE"])
    return {**workflow, "last_node_id": saved, "last_link_id": out}


def test_blueprints_are_those_of_their_templates_today():
    wanted = make_blueprints.written()
    assert FILES == sorted(path for path in wanted if path.parent == make_blueprints.FOLDER)
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python -m pixstack.tools.make_blueprints`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_blueprint_computes_what_its_template_does(path, info):
    template = conversion.read(SHIPPED[make_blueprints.BLUEPRINTS[path.stem].template], info)
    graph = conversion.to_api(json.loads(path.read_text(encoding="utf-8")), info)
    prefix = next(iter(graph)).partition(":")[0] + ":"

    def outside(value):  # a link in the template's numbers; what comes from Load Image comes from outside
        return [value[0].removeprefix(prefix), value[1]] if isinstance(value, list) else value

    taken = {i: n for i, n in template.items() if n["class_type"] not in make_blueprints.LEFT_OUT}
    assert {i.removeprefix(prefix): {name: outside(value) for name, value in n["inputs"].items()}
            for i, n in graph.items()} == {
        i: {name: value for name, value in n["inputs"].items() if not isinstance(value, list) or value[0] in taken}
        for i, n in taken.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_blueprint_runs(path, host, info):
    run = host.run(shrunk(conversion.to_api(in_use(path), info)))
    assert run.error is None
    with Image.open(*run.images) as picture:
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 8


def test_comfyui_offers_the_blueprints(server):
    offered = {one["name"]: i for i, one in json.loads(get(server, "/api/global_subgraphs")[1]).items()
               if one["info"]["node_pack"] == "custom_nodes.pixstack"}
    assert set(offered) == {path.stem for path in FILES}
    for path in FILES:
        one = json.loads(get(server, f"/api/global_subgraphs/{offered[path.stem]}")[1])
        assert json.loads(one["data"]) == json.loads(path.read_text(encoding="utf-8"))
