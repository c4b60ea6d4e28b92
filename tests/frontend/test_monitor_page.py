"""The trainer's monitor in headless Chromium. A picture of it is left in tests/artifacts/."""
import asyncio
import json
import math
import os
import shutil
import subprocess
import threading

import pytest
from conftest import ARTIFACTS, BROWSERS, ROOT, needed
from filelock import FileLock
from PIL import Image
from pixstack.trainer.monitor import server
from pixstack.trainer.training import control

pytestmark = pytest.mark.frontend


def run_folder(folder, learning_rate):
    """What a run of 400 steps with samples of two prompts leaves behind."""
    for step, colour in ((0, "#888"), (200, "#c66"), (400, "#e22")):
        (folder / f"samples/{step:08d}").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 48), colour).save(folder / f"samples/{step:08d}/{index:02d}.png")
    settings = {"name": folder.name, "steps": 1000, "optimizer": {"learning_rate": learning_rate}, "seed": 0}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = [{"step": step, "loss": 0.2 + math.exp(-step / 80), "learning_rate": learning_rate}
             for step in range(1, 401)]
    lines += [{"step": step, "validation_loss": 0.3, "validation_standard_error": 0.02} for step in (200, 400)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    chromium = needed(next(filter(None, map(shutil.which, BROWSERS)), None), "Chromium is not installed")
    node = needed(shutil.which("node"), "node is not installed")
    modules = ROOT / "tests" / "frontend" / "node_modules" / "playwright-core"
    needed(modules.exists() and str(modules), "playwright-core is not installed (make test installs it)")
    runs, loop, address = tmp_path_factory.mktemp("runs"), asyncio.new_event_loop(), []
    run_folder(runs / "first", 1e-3)
    run_folder(runs / "second", 1e-4)
    ready, serving = threading.Event(), []

    def serve():
        asyncio.set_event_loop(loop)
        serving.append(loop.create_task(server.serve(server.application(runs), 0,
                                                     lambda said: (address.append(said), ready.set()))))
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(serving[0])

    thread = threading.Thread(target=serve)
    thread.start()
    ARTIFACTS.mkdir(exist_ok=True)
    try:
        assert ready.wait(60)
        with FileLock(runs / "first" / control.LOCK):
            done = subprocess.run(
                [node, ROOT / "tests" / "frontend" / "monitor.mjs", address[0], ARTIFACTS / "monitor.png"],
                capture_output=True, text=True, timeout=300, env={**os.environ, "CHROMIUM": chromium},
            )
    finally:
        loop.call_soon_threadsafe(serving[0].cancel)
        thread.join()
    assert done.returncode == 0, done.stderr
    return runs, json.loads(done.stdout)


def test_the_slider_moves_through_the_steps_of_the_samples(opened):
    _, said = opened
    assert said["newest"] == [", step 400"] * 2 and said["before"] == [", step 200"] * 2
    assert said["two"] == [", step before", ", step 200"] * 2


def test_the_page_shows_curves_of_the_run_and_what_differs_between_two(opened):
    _, said = opened
    assert {"loss", "validation_loss", "learning_rate"} <= set(said["curves"])
    assert sorted(row[0] for row in said["differs"]) == ["name", "optimizer.learning_rate"]


def test_the_button_stop_asks_and_writes_the_file(opened):
    runs, said = opened
    assert len(said["asked"]) == 1 and said["disabled"] and (runs / "first/stop").is_file()


def test_nothing_fails_on_the_page(opened):
    assert opened[1]["errors"] == [] and Image.open(ARTIFACTS / "monitor.png").size == (1440, 1400)
