"""Every shipped workflow in the real frontend, in headless Chromium. Pictures of it are left in tests/artifacts/."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import ARTIFACTS, BROWSERS, ROOT, WORKFLOWS, needed
from PIL import Image
from pixstack.tools import workflow as conversion

pytestmark = [pytest.mark.frontend, pytest.mark.long]
QUEUED = "pixelflow_text_to_image"  # runs on the embedded weights; the others are opened and converted


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    chromium = needed(next(filter(None, map(shutil.which, BROWSERS)), None), "Chromium is not installed")
    node = needed(shutil.which("node"), "node is not installed")
    modules = ROOT / "tests" / "frontend" / "node_modules" / "playwright-core"
    needed(modules.exists() and str(modules), "playwright-core is not installed (make test installs it)")
    server = request.getfixturevalue("server")
    ARTIFACTS.mkdir(exist_ok=True)
    jobs = [
        dict(
            name=path.stem,
            workflow=json.loads(path.read_text(encoding="utf-8")),
            queue=path.stem == QUEUED,
            screenshot=str(ARTIFACTS / f"{path.stem}.png"),
        )
        for path in WORKFLOWS
    ]
    file = tmp_path_factory.mktemp("frontend") / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [node, ROOT / "tests" / "frontend" / "run.mjs", server.address, file],
        capture_output=True, text=True, timeout=400, env={**os.environ, "CHROMIUM": chromium},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_browser_converts_a_workflow_as_we_do(workflow, opened, host):
    info = host.object_info()
    ours = conversion.read(workflow, info)
    browsers = opened["workflows"][workflow.stem]["prompt"]

    def known(node):  # the browser gives some nodes a box of its own, as core's Preview Any, and sends that along
        taken = {name for of_kind in info[node["class_type"]]["input"].values() for name in of_kind}
        return {name: value for name, value in node["inputs"].items() if name in taken}

    assert {i: (n["class_type"], known(n)) for i, n in browsers.items()} == {
        i: (n["class_type"], n["inputs"]) for i, n in ours.items()
    }


def test_a_queued_workflow_shows_its_picture_on_the_canvas(opened):
    result = opened["workflows"][QUEUED]
    assert (result["event"], result.get("message")) == ("execution_success", "")
    assert result["images"] and all(width > 0 for width, _ in result["images"])


def test_run_takes_another_seed_each_time(opened):
    result = opened["workflows"][QUEUED]
    seeds = [node["inputs"]["seed"] for prompt in (result["prompt"], result["next"]) for node in prompt.values()
             if "seed" in node["inputs"]]
    assert len(seeds) == 2 and seeds[0] == 1 != seeds[1]


def test_the_size_of_a_picture_is_read_below_its_canvas(opened):
    assert "16x16 → 32x32 → 64x64 pixels" in opened["workflows"][QUEUED]["text"]


def test_a_workflow_opens_without_an_alert(workflow, opened):
    assert opened["workflows"][workflow.stem]["alerts"] == []


def test_a_screenshot_is_kept_of_each_workflow(workflow, opened):
    assert Image.open(ARTIFACTS / f"{workflow.stem}.png").size == (1600, 900)


def test_nothing_of_ours_fails_in_the_browser(opened):
    ours = [e for e in opened["errors"] if e.startswith("page:") or "/extensions/pixstack/" in e]
    assert ours == []
