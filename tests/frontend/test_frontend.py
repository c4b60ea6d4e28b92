"""Every shipped workflow in the real frontend, in headless Chromium, on LiteGraph's canvas and in Nodes 2.0. Pictures
of them are made by `python -m pixstack.tools.show_workflows`."""

import json
import os
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
from conftest import BROWSERS, ROOT, SHIPPED, needed
from pixstack.tools import layout_workflows
from pixstack.tools import workflow as conversion
from test_blueprints import FILES as BLUEPRINTS
from test_blueprints import in_use

pytestmark = [pytest.mark.frontend, pytest.mark.long]
QUEUED = "pixelflow_text_to_image"
RUN = (QUEUED, "pixart_emoji", "pixelponder_emoji")  # on the embedded weights
SHOWN = ("pixart_controlnet", "pixelflow_per_stage", "pixelponder_four_conditions", "ultrapixel_controlnet",
         "annotators")
"""Shown what a run would leave on their nodes; a template of each family, the fullest."""
RENDERERS = layout_workflows.RENDERERS
CHIP = 250, 110  # pixels of the window's top left corner, under the tabs and the workflow's name


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory) -> dict:
    """What the browser said of what the selected tests look at: (name, renderer) -> its answer, None -> errors."""
    chromium = needed(next(filter(None, map(shutil.which, BROWSERS)), None), "Chromium is not installed")
    node = needed(shutil.which("node"), "node is not installed")
    modules = ROOT / "tests" / "frontend" / "node_modules" / "playwright-core"
    needed(modules.exists() and str(modules), "playwright-core is not installed (make test installs it)")
    server = request.getfixturevalue("server")
    graphs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in SHIPPED.items()}
    graphs |= {path.stem: in_use(path) for path in BLUEPRINTS}
    selected = {QUEUED}
    for item in request.session.items:
        given = item.callspec.params if item.path == Path(__file__) and hasattr(item, "callspec") else {}
        selected |= {given.get("name"), *(name_of(given[one]) for one in ("workflow", "path") if one in given)}
    jobs = [
        dict(name=name, renderer=renderer, workflow=graph, queue=name in RUN,
             shown=layout_workflows.results_of(graph) if name in SHOWN else None)
        for renderer in RENDERERS for name, graph in graphs.items() if name in selected
    ]
    file = tmp_path_factory.mktemp("frontend") / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [node, ROOT / "tests" / "frontend" / "run.mjs", server.address, file],
        capture_output=True, text=True, timeout=600, env={**os.environ, "CHROMIUM": chromium},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return {None: answer["errors"], **{(job["name"], job["renderer"]): job for job in answer["jobs"]}}


def name_of(path: Path) -> str:
    """A template's short name; a blueprint's only one."""
    return next((name for name, shipped in SHIPPED.items() if shipped == path), path.stem)


def as_the_browser(opened, name: str, workflow: dict, info: dict):
    ours = conversion.to_api(workflow, info)

    def known(node):  # the browser gives some nodes a box of its own, as core's Preview Any, and sends that along
        taken = {name for of_kind in info[node["class_type"]]["input"].values() for name in of_kind}
        return {name: value for name, value in node["inputs"].items() if name in taken}

    assert {i: (n["class_type"], known(n)) for i, n in opened[name, "classic"]["prompt"].items()} == {
        i: (n["class_type"], n["inputs"]) for i, n in ours.items()
    }


def test_the_browser_converts_a_workflow_as_we_do(workflow, opened, info):
    as_the_browser(opened, name_of(workflow), json.loads(workflow.read_text(encoding="utf-8")), info)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_the_browser_converts_a_blueprint_as_we_do(path, opened, info):
    as_the_browser(opened, path.stem, in_use(path), info)


def over(boxes: dict) -> list[tuple[str, str]]:
    """Pairs of boxes [left, top, width, height] that lie over one another by more than a pixel."""
    return [(i, j) for (i, a), (j, b) in combinations(boxes.items(), 2)
            if a[0] + 1 < b[0] + b[2] and b[0] + 1 < a[0] + a[2] and a[1] + 1 < b[1] + b[3] and b[1] + 1 < a[1] + a[3]]


def outside(boxes: dict, groups: dict) -> list[str]:
    """Boxes that lie in no group, or only in part."""
    return [i for i, (x, y, w, h) in boxes.items() if not any(
        left <= x and top <= y and x + w <= left + wide + 1 and y + h <= top + high + 1
        for left, top, wide, high in groups.values())]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_no_node_lies_over_another_as_it_opens(workflow, renderer, opened):
    answer, graph = opened[name_of(workflow), renderer], json.loads(workflow.read_text(encoding="utf-8"))
    assert len(answer["nodes"]) == len(graph["nodes"]) and over(answer["nodes"]) == []


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", [*RUN, *SHOWN])
def test_no_node_lies_over_another_after_a_run(name, renderer, opened):
    assert any(one["after"][i][3] > box[3] for one in (opened[name, r] for r in RENDERERS)  # a saved size may be enough
               for i, box in one["nodes"].items()), "nothing was shown"
    assert over(opened[name, renderer]["after"]) == []


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_node_stays_within_its_group_and_groups_apart(workflow, renderer, opened):
    answer = opened[name_of(workflow), renderer]
    nodes = answer.get("after", answer["nodes"])
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    notes = {str(n["id"]) for n in graph["nodes"] if n["type"] == "MarkdownNote"}
    assert outside({i: box for i, box in nodes.items() if i not in notes}, answer["groups"]) == []
    assert over({**answer["groups"], **{i: nodes[i] for i in notes}}) == []


@pytest.mark.parametrize("renderer", RENDERERS)
def test_nothing_opens_under_the_name_of_the_workflow(workflow, renderer, opened):
    left, top = opened[name_of(workflow), renderer]["corner"]
    assert left > CHIP[0] or top > CHIP[1]


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", RUN)
def test_a_queued_workflow_shows_its_picture_on_the_canvas(name, renderer, opened):
    result = opened[name, renderer]
    assert (result["event"], result.get("message")) == ("execution_success", "")
    assert result["images"] and all(width > 0 for width, _ in result["images"])


def test_run_takes_another_seed_each_time(opened):
    result = opened[QUEUED, "classic"]
    seeds = [node["inputs"]["seed"] for prompt in (result["prompt"], result["next"]) for node in prompt.values()
             if "seed" in node["inputs"]]
    assert len(seeds) == 2 and seeds[0] == 1 != seeds[1]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_size_of_a_picture_is_read_below_its_canvas(renderer, opened):
    assert "16x16 → 32x32 → 64x64 pixels" in opened[QUEUED, renderer]["text"]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_workflow_opens_without_an_alert(workflow, renderer, opened):
    assert opened[name_of(workflow), renderer]["alerts"] == []


def test_nothing_of_ours_fails_in_the_browser(opened):
    ours = ("page:", "/extensions/pixstack/", "ubgraph", "lueprint")
    errors = [error for error in opened[None] if "/userdata" not in error]  # files of the user that are not there
    assert [error for error in errors if any(word in error for word in ours)] == []
