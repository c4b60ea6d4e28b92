"""Our widgets in headless Chromium, on LiteGraph's canvas and in Nodes 2.0. Every async function that a file of
widgets/ exports is a check; widgets.mjs says what it gets. Pictures are left in tests/artifacts/."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ARTIFACTS, BROWSERS, needed

pytestmark = pytest.mark.frontend
HERE = Path(__file__).parent
CHECKS = [(script.stem, check, renderer) for renderer in ("classic", "nodes2")
          for script in sorted(HERE.glob("widgets/*.mjs"))
          for check in re.findall(r"^export async function (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.fixture(scope="module")
def checked(request, tmp_path_factory) -> dict:
    """What came of the checks that this run of the tests selected: two Chromiums do them all."""
    chromium = needed(next(filter(None, map(shutil.which, BROWSERS)), None), "Chromium is not installed")
    node = needed(shutil.which("node"), "node is not installed")
    modules = HERE / "node_modules" / "playwright-core"
    needed(modules.exists() and str(modules), "playwright-core is not installed (make test installs it)")
    selected = [item.callspec.params["check"] for item in request.session.items
                if item.path == Path(__file__) and hasattr(item, "callspec")]
    server = request.getfixturevalue("server")
    ARTIFACTS.mkdir(exist_ok=True)
    file = tmp_path_factory.mktemp("widgets") / "jobs.json"
    file.write_text(json.dumps({"artifacts": str(ARTIFACTS), "checks": selected}))
    done = subprocess.run([node, HERE / "widgets.mjs", server.address, file], capture_output=True, text=True,
                          timeout=1800, env={**os.environ, "CHROMIUM": chromium})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS, ids=["-".join(check) for check in CHECKS])
def test_a_widget(check, checked):
    problem = checked["results"][" ".join(check)]
    if isinstance(problem, dict):
        pytest.skip(problem["skipped"])
    assert not problem, problem


def test_no_script_of_ours_fails(checked):
    """The frontend asks for a help page in its own language before the English one."""
    ours = [error for error in checked["errors"] if "/extensions/pixstack/" in error]
    assert [error for error in ours if not error.endswith("/en.md)")] == []
