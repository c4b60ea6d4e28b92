"""tools/workflow.py on small graphs, then every shipped workflow: converted, validated and run."""

import pytest
from conftest import SHIPPED
from PIL import Image
from pixstack.tools import workflow as conversion

pytestmark = pytest.mark.long
INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "display_name": "Load It"},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "cfg": ["FLOAT", {}],
                "mode": ["COMBO", {"options": ["x", "y"]}],
            },
            "optional": {"text": ["STRING", {}], "strength": ["FLOAT", {"forceInput": True}]},
        }
    },
    "Patch": {"input": {"required": {"clip": ["CLIP"], "model": ["MODEL"]}}},
    "Picture": {
        "input": {"required": {"image": [["a.png"], {"image_upload": True}]}, "optional": {"size": ["INT", {}]}}
    },
}


def node(id, type, values=(), links=(), **more):
    """`links`: (input name, type, link id or None) in the order of the sockets."""
    inputs = [{"name": name, "type": kind, "link": link} for name, kind, link in links]
    return {"id": id, "type": type, "widgets_values": list(values), "inputs": inputs, **more}


def converted(*nodes, links):
    return conversion.to_api({"nodes": list(nodes), "links": links}, INFO)


SAMPLE = [7, "fixed", 2.5, "y", "hello"]
LOAD = node(1, "Load", ["a"], outputs=[{"type": "MODEL"}])


def test_values_get_their_names_and_links_their_source():
    graph = converted(LOAD, node(2, "Sample", SAMPLE, [("model", "MODEL", 9)]), links=[[9, 1, 0, 2, 0, "MODEL"]])
    assert graph["1"] == {"class_type": "Load", "inputs": {"name": "a"}, "_meta": {"title": "Load It"}}
    assert graph["2"]["inputs"] == {"model": ["1", 0], "seed": 7, "cfg": 2.5, "mode": "y", "text": "hello"}


def test_a_link_replaces_the_value_of_its_widget():
    sample = node(2, "Sample", SAMPLE, [("model", "MODEL", 9), ("cfg", "FLOAT", 8)])
    links = [[9, 1, 0, 2, 0, "MODEL"], [8, 1, 0, 2, 1, "FLOAT"]]
    assert converted(LOAD, sample, links=links)["2"]["inputs"]["cfg"] == ["1", 0]


def test_the_button_of_an_upload_takes_a_place_before_the_optional_values():
    graph = converted(node(1, "Picture", ["a.png", "image", 5]), links=[])
    assert graph["1"]["inputs"] == {"image": "a.png", "size": 5}


def test_values_may_be_saved_by_name():
    named = {**node(1, "Load"), "widgets_values": {"name": "b", "videopreview": {}}}
    assert converted(named, links=[])["1"]["inputs"] == {"name": "b"}


def test_a_reroute_a_primitive_and_a_bypassed_node_pass_through():
    reroute = node(3, "Reroute", links=[("", "*", 10)])
    into = [("clip", "CLIP", None), ("model", "MODEL", 11)]
    patch = node(4, "Patch", links=into, outputs=[{"type": "MODEL"}], mode=4)
    primitive = node(5, "PrimitiveNode", [4.5, "fixed"])
    sample = node(2, "Sample", SAMPLE, [("model", "MODEL", 12), ("cfg", "FLOAT", 13)])
    links = [[10, 1, 0, 3, 0, "*"], [11, 3, 0, 4, 1, "MODEL"], [12, 4, 0, 2, 0, "MODEL"], [13, 5, 0, 2, 1, "FLOAT"]]
    graph = converted(LOAD, reroute, patch, primitive, sample, node(6, "Note", ["text"]), links=links)
    assert list(graph) == ["1", "2"]
    assert graph["2"]["inputs"]["model"] == ["1", 0]
    assert graph["2"]["inputs"]["cfg"] == 4.5


def test_nothing_comes_from_a_muted_node():
    sample = node(2, "Sample", SAMPLE, [("model", "MODEL", 9)])
    graph = converted({**LOAD, "mode": 2}, sample, links=[[9, 1, 0, 2, 0, "MODEL"]])
    assert list(graph) == ["2"]
    assert "model" not in graph["2"]["inputs"]


def test_an_unknown_node_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="node 1 is a Sampel, which ComfyUI does not have; did you mean Sample?"):
        converted(node(1, "Sampel"), links=[])


def packed(model=9, mode=0, outer=("model", "seed")):
    """A workflow: Load, then a subgraph (id f00d) of a Patch and a Sample, then a Patch."""
    within = [node(1, "Patch", links=[("clip", "CLIP", None), ("model", "MODEL", 1)], outputs=[{"type": "MODEL"}]),
              node(2, "Sample", SAMPLE, [("model", "MODEL", 2), ("seed", "INT", 3)])]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [(1, -10, 0, 1, 1, "MODEL"), (2, 1, 0, 2, 0, "MODEL"), (3, -10, 1, 2, 1, "INT"), (4, 1, 0, -20, 0, "MODEL")]
    subgraph = {"id": "f00d", "nodes": within, "links": [dict(zip(names, link, strict=True)) for link in links],
                "inputs": [{"name": "model"}, {"name": "seed"}], "outputs": [{"name": "MODEL"}]}
    uses = [use for use in (("model", "MODEL", model), ("seed", "INT", None)) if use[0] in outer]
    nodes = [LOAD, node(5, "f00d", links=uses, outputs=[{"type": "MODEL"}], mode=mode),
             node(6, "Patch", links=[("clip", "CLIP", None), ("model", "MODEL", 8)])]
    return {"nodes": nodes, "links": [[9, 1, 0, 5, 0, "MODEL"], [8, 5, 0, 6, 1, "MODEL"]],
            "definitions": {"subgraphs": [subgraph]}}


def test_the_nodes_of_a_subgraph_take_its_place():
    graph = conversion.to_api(packed(), INFO)
    assert list(graph) == ["1", "5:1", "5:2", "6"]
    assert graph["5:1"]["inputs"] == {"model": ["1", 0]}
    assert graph["5:2"]["inputs"]["model"] == graph["6"]["inputs"]["model"] == ["5:1", 0]


@pytest.mark.parametrize("outer", [("model", "seed"), ("model",)])
def test_a_subgraphs_input_that_nothing_comes_into_keeps_the_value_inside(outer):
    assert conversion.to_api(packed(outer=outer), INFO)["5:2"]["inputs"]["seed"] == 7
    assert "model" not in conversion.to_api(packed(model=None), INFO)["5:1"]["inputs"]


def test_a_bypassed_subgraph_lets_pass_what_comes_in_and_a_muted_one_nothing():
    assert conversion.to_api(packed(mode=4), INFO)["6"]["inputs"] == {"model": ["1", 0]}
    assert conversion.to_api(packed(mode=2), INFO)["6"]["inputs"] == {}


def test_a_subgraph_may_hold_another():
    workflow = packed()
    outer = {"id": "cafe", "nodes": [node(3, "f00d", links=[("model", "MODEL", 1)])], "inputs": [{"name": "m"}],
             "links": [dict(id=1, origin_id=-10, origin_slot=0, target_id=3, target_slot=0)]}
    workflow["definitions"]["subgraphs"].append(outer)
    workflow["nodes"].append(node(7, "cafe", links=[("m", "MODEL", 10)]))
    workflow["links"].append([10, 1, 0, 7, 0, "MODEL"])
    assert conversion.to_api(workflow, INFO)["7:3:1"]["inputs"] == {"model": ["1", 0]}


@pytest.mark.parametrize("content", ["[1]", "{}", '{"1": {"inputs": {}}}', "{"])
def test_a_file_that_holds_no_graph_is_refused(content, tmp_path):
    (tmp_path / "graph.json").write_text(content)
    with pytest.raises(ValueError, match=r"graph.json is (neither|not JSON)"):
        conversion.read(tmp_path / "graph.json", INFO)


def test_values_are_set_by_number_title_or_type():
    graph = {
        "1": {"class_type": "Load", "inputs": {"name": "a"}, "_meta": {"title": "First"}},
        "2": {"class_type": "Sample", "inputs": {"seed": 1}},
    }
    changed = conversion.set_inputs(graph, ["First.name=b", "2.seed=-5", "Sample.cfg=1", "Sample.text=a=b.c"], INFO)
    assert changed["1"]["inputs"] == {"name": "b"}
    assert changed["2"]["inputs"] == {"seed": -5, "cfg": 1.0, "text": "a=b.c"}
    assert graph["2"]["inputs"] == {"seed": 1}


def test_a_name_that_several_nodes_have_needs_the_number():
    graph = {i: {"class_type": "Load", "inputs": {}} for i in "12"}
    with pytest.raises(ValueError, match="nodes 1, 2 are all Load; use the number"):
        conversion.set_inputs(graph, ["Load.name=b"], INFO)


def test_a_shipped_workflow_validates(workflow, host, info):
    assert host.check(conversion.read(workflow, info)) == []


def pixels(menu: str) -> int:
    """Options of a menu of resolutions, whose 'auto' is the model's own size."""
    return int(menu) if menu.isdigit() else 0


SMALL = {  # input -> (what two CPU cores manage, how to compare it)
    "resolution": ("256", pixels), "steps": (2, int), **dict.fromkeys(("width", "height", "side"), (256, int)),
}  # fmt: skip


def shrunk(graph):
    """`graph` with every menu of resolutions, every size and every whole number of steps no higher than SMALL. Where a
    canvas has none of them it follows the tiny models' size."""
    small = {i: {**node, "inputs": dict(node["inputs"])} for i, node in graph.items()}
    for node in small.values():
        for name, (value, order) in SMALL.items():
            given = node["inputs"].get(name)
            if name == "steps" and isinstance(given, str):  # of every stage
                node["inputs"][name] = ", ".join(str(min(int(n), value)) for n in given.split(","))
            elif type(given) is type(value) and order(given) > order(value):
                node["inputs"][name] = value
    return small


def test_a_shipped_workflow_runs(workflow, host, info, caplog):
    graph = conversion.read(workflow, info)
    small = shrunk(graph)
    menus = {i: node["inputs"].get("resolution") for i, node in graph.items()}
    resolutions = [i for i, menu in menus.items() if isinstance(menu, str) and pixels(menu) > 256]
    assert all(small[i] != graph[i] for i in resolutions)
    run = host.run(small)
    assert run.error is None
    assert "tokens, this prompt has" not in caplog.text, "the text is not as long as in PixelPonder's training"
    assert run.images
    for path in run.images:
        with Image.open(path) as picture:
            assert max(picture.size) <= 512
            extrema = picture.convert("RGB").getextrema()
            assert max(high - low for low, high in extrema) > 8, f"{path.name} is of one colour all over"


def test_a_template_is_found_by_its_number_its_short_name_or_its_whole_name():
    path = SHIPPED["pixart_emoji"]
    assert {conversion.named(name) for name in (path.stem[:2], "pixart_emoji", path.stem, str(path))} == {path}
    assert conversion.named("mine.json").name == "mine.json"


def test_a_prompt_becomes_a_workflow_that_converts_back(workflow, info):
    graph = conversion.read(workflow, info)
    if any(":" in number for number in graph):
        pytest.skip("its nodes are inside of another; a prompt does not say which")
    assert conversion.to_api(conversion.to_workflow(graph, info), info) == graph
