"""The monitor's server: who is let in, what is read of runs, and orders that a run obeys."""
import asyncio
import json
import os
import re
import subprocess
import sys

import pytest
import tiny_run
from aiohttp.test_utils import TestClient, TestServer
from filelock import FileLock
from PIL import Image
from pixstack.trainer.cli import main
from pixstack.trainer.monitor import curves, exports, folders, server
from pixstack.trainer.training import checkpoints, control

TOKEN = "token"


def write_run(folder, steps=4, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 10, **settings}))
    (folder / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": {i / 10}}}\n' for i in range(1, steps + 1)))
    return folder


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs/one")
    return tmp_path / "runs"


def ask(runs, path, method="GET", **how):
    """(status, body) of one question."""
    async def asked():
        async with TestClient(TestServer(server.application(runs, TOKEN), host=server.HOST)) as client:
            answer = await client.request(method, path, **how)
            return answer.status, (await answer.read()).decode(errors="replace")

    return asyncio.run(asked())


@pytest.mark.parametrize("path, headers", [
    ("/", {}), ("/wrong/", {}), ("/wrong/api/runs", {}), ("/static/monitor.js", {}),
    ("/token/", {"Host": "evil.example"}), ("/token/api/runs", {"Host": "evil.example:80"}), ("/token/", {"Host": ""}),
])
def test_who_has_no_token_or_another_host_is_refused(runs, path, headers):
    assert ask(runs, path, headers=headers)[0] == 403


def test_who_has_the_token_gets_the_page_and_its_files(runs):
    status, page = ask(runs, "/token/")
    assert status == 200
    for name in ("monitor.js", "monitor.css", "uPlot.iife.min.js", "uPlot.min.css"):
        assert f"static/{name}" in page and ask(runs, f"/token/static/{name}")[0] == 200
    assert ask(runs, "/token/", headers={"Host": "localhost:1234"})[0] == 200  # a forwarded port


def test_the_page_loads_nothing_from_elsewhere():
    for file in server.STATIC.glob("*"):
        if not file.name.startswith("uPlot"):
            assert "http" not in file.read_text(encoding="utf-8"), file.name


@pytest.mark.parametrize("path", [
    "/token/static/..%2Fserver.py", "/token/static/%2e%2e/server.py", "/token/api/curves?run=../outside",
    "/token/api/samples?run=..", "/token/api/picture?run=one/..%2F..%2Foutside&step=1", "/token/api/curves?run=/etc",
    "/token/api/settings?run=../outside",
])
def test_no_name_leads_out_of_the_folder(runs, path):
    write_run(runs.parent / "outside")
    assert ask(runs, path)[0] == 404


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_no_link_leads_out_of_the_folder(runs):
    outside = write_run(runs.parent / "outside", secret="secret")
    os.symlink(outside, runs / "linked")
    (runs / "one/samples").mkdir()
    Image.new("RGB", (8, 8)).save(outside / "picture.png")
    os.symlink(outside / "picture.png", runs / "one/samples/00000001.png")
    (runs / "one/config.json").unlink()
    os.symlink(outside / "config.json", runs / "one/config.json")
    assert ask(runs, "/token/api/picture?run=one&step=1")[0] == 404
    assert "secret" not in ask(runs, "/token/api/settings?run=one")[1]
    assert list(folders.RunFolders(runs).folders()) == ["one"]


def test_orders_are_given_by_post_only_and_not_from_other_sites(runs):
    path = "/token/api/order?run=one&order=stop"
    with FileLock(runs / "one" / control.LOCK):
        assert ask(runs, path)[0] == 405
        assert ask(runs, path, "POST", headers={"Origin": "https://evil.example"})[0] == 403
        assert not control.given(runs / "one")
        assert ask(runs, path, "POST")[0] == 200 and control.given(runs / "one") == ["stop"]
        assert ask(runs, "/token/api/order?run=one&order=rm", "POST")[0] == 409
    status, said = ask(runs, path, "POST")
    assert status == 409 and "not running" in said


def test_a_log_is_read_on_from_where_it_ended_without_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n\xff\n{"step": 3, "loss": NaN}\n{"step": 4, "loss"')
    log = curves.RunLog(path)
    log.refresh()
    place = log.place
    assert log.curves(9) == {"loss": {"x": [1, 3], "y": [0.5, None]}}
    with open(path, "ab") as file:
        file.write(b': 0.25}\n')
    log.refresh()
    assert log.place > place and log.curves(9)["loss"]["x"] == [1, 3, 4]
    path.with_name("new").write_text('{"step": 1, "loss": 0.5}\n')
    os.replace(path.with_name("new"), path)  # as a run does that goes on from a checkpoint
    log.refresh()
    assert log.curves(9)["loss"]["x"] == [1]


def test_thousands_of_lines_are_thinned_out_without_losing_a_peak(runs):
    values = [1.0] * 20_000
    values[12_345] = 9.0
    with open(runs / "one/log.jsonl", "w") as file:
        file.writelines(f'{{"step": {i + 1}, "loss": {value}}}\n' for i, value in enumerate(values))
    found = json.loads(ask(runs, "/token/api/curves?run=one&points=100")[1])["loss"]
    assert len(found["x"]) == 100 and found["x"][-1] == 20_000
    assert max(found["high"]) == 9 and min(found["low"]) == 1


def test_a_run_says_its_state(runs):
    write_run(runs / "group/done", steps=10)
    write_run(runs / "held")
    with FileLock(runs / "held" / control.LOCK):
        said = {run["name"]: run["state"] for run in json.loads(ask(runs, "/token/api/runs")[1])}
    assert said == {"one": "stopped", "group/done": "finished", "held": "running"}


def test_settings_show_what_differs(runs):
    write_run(runs / "two", seed=1, optimizer={"learning_rate": 0.1})
    rows = {row["name"]: row for row in json.loads(ask(runs, "/token/api/settings?run=one&run=two")[1])}
    rate = rows["optimizer.learning_rate"]
    assert rate["values"] == [None, 0.1] and rate["differs"] and not rows["steps"]["differs"]


def test_a_run_obeys_the_buttons(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    runs, folder = tmp_path / "runs", tmp_path / "runs/tiny"
    states = []

    def press(one, step):
        if step in (1, 3):
            assert ask(runs, f"/token/api/order?run=tiny&order={'sample' if step == 1 else 'stop'}", "POST")[0] == 200
            states.append(json.loads(ask(runs, "/token/api/runs")[1])[0]["state"])

    tiny_run.train(tiny_run.settings(path, folder, 'samples.prompts=["red card"]', "samples.steps=1"), press)
    assert states == ["running"] * 2
    assert checkpoints.checkpoints(folder)[-1].name == "00000003"
    found = json.loads(ask(runs, "/token/api/samples?run=tiny")[1])
    assert found == {"steps": [{"step": 1, "count": 1}], "titles": ["red card"]}
    assert ask(runs, "/token/api/picture?run=tiny&step=1&index=0")[0] == 200
    check_export(runs, tmp_path / "models")


def check_export(runs, out):
    """The command itself: its weights come out under a name that says which they are."""
    async def exported():
        async with TestClient(TestServer(server.application(runs, TOKEN, out), host=server.HOST)) as client:
            assert (await client.post("/token/api/export?run=tiny&step=7")).status == 409
            assert (await client.post("/token/api/export?run=tiny&step=3")).status == 200
            answer = await client.post("/token/api/export?run=tiny&step=3")
            assert answer.status == 409 and "wait for its end" in await answer.text()
            await client.app[server.EXPORTS].task
            return await (await client.get("/token/api/exports?run=tiny")).json()

    said = asyncio.run(exported())
    assert said["steps"] == [3] and said["last"]["state"] == "done", said
    assert [(file["folder"], file["step"]) for file in said["files"]][0] == ("diffusion_models", 3)
    assert all((out / file["folder"] / file["name"]).is_file() for file in said["files"])


def test_an_export_that_fails_says_why(runs, monkeypatch):
    (runs / "one/checkpoints/00000002").mkdir(parents=True)
    (runs / "one/checkpoints/00000002/model.safetensors").touch()
    monkeypatch.setattr(exports, "command", lambda *words: [sys.executable, "-c", "raise SystemExit('error: no T5')"])

    async def exported():
        async with TestClient(TestServer(server.application(runs, TOKEN), host=server.HOST)) as client:
            assert (await client.post("/token/api/export?run=one&step=2")).status == 200
            await client.app[server.EXPORTS].task
            return await (await client.get("/token/api/exports?run=one")).json()

    assert asyncio.run(exported())["last"] == {"state": "failed", "run": "one", "step": 2, "said": "error: no T5"}


@pytest.mark.parametrize("run", ["one", "group/one", "group_one", "-o", "<img src=x>", "..", "{name}", "a" * 300])
def test_the_name_of_an_export_is_one_that_every_folder_takes(run):
    name = exports.name_of(run, 3)
    assert re.fullmatch(r"[\w][\w.-]{0,130}_step3", name) and name.format(name="") == name
    assert name != exports.name_of(run + "_", 3)


def test_exports_are_asked_for_by_post_only_and_not_from_other_sites(runs):
    path = "/token/api/export?run=one&step=2"
    assert ask(runs, path)[0] == 405
    assert ask(runs, path, "POST", headers={"Origin": "https://evil.example"})[0] == 403
    assert ask(runs, path, "POST")[0] == 409  # there is no such checkpoint


def test_the_command_that_is_begun_is_one_of_the_trainer(tmp_path):
    given = main.parser().parse_args(exports.command("export", "/r", "--out=/m", "--name=-n", "--step=3")[2:])
    assert (str(given.run_folder), str(given.out), given.name, given.step) == ("/r", "/m", "-n", 3)


def test_the_monitor_ends_when_its_input_does(runs):
    process = subprocess.Popen(exports.command("monitor", str(runs), "--port=0", "--until-input-ends"),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.stdin.close()
    assert process.wait(60) == 0
