"""The training tab of ComfyUI's sidebar: who is let in, when the monitor runs, which node loads a file."""
import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from pixstack.models_impl.state_dict import write_file

OWN = {"Host": "127.0.0.1:8188"}
POSTED = {**OWN, "Origin": "http://127.0.0.1:8188"}


def refusal(method="GET", headers=OWN, listen="127.0.0.1", multi_user=False, remote="127.0.0.1"):
    from pixstack.nodes.host.training import access

    transport = SimpleNamespace(get_extra_info=lambda name, default=None: {"peername": (remote, 1)}.get(name, default))
    return access.refusal(make_mocked_request(method, "/", headers=headers, transport=transport), listen, multi_user)


@pytest.mark.parametrize("how", [
    {}, {"method": "POST", "headers": POSTED}, {"listen": "127.0.0.1,::1"}, {"listen": "localhost"},
    {"headers": {"Host": "[::1]:8188"}, "remote": "::1"}, {"remote": "::ffff:127.0.0.1"},
    {"headers": {"Host": "localhost", "Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}},
])  # fmt: skip
def test_a_browser_on_this_machine_is_let_in(host, how):
    assert refusal(**how) == ""


@pytest.mark.parametrize("how, why", [
    ({"listen": "0.0.0.0"}, "other machines can reach it"),
    ({"listen": "127.0.0.1,192.168.1.2"}, "other machines can reach it"),
    ({"listen": "0.0.0.0,::"}, "other machines can reach it"), ({"listen": "machine"}, "other machines can reach it"),
    ({"listen": "127.0.0.1,"}, "other machines can reach it"), ({"multi_user": True}, "--multi-user"),
    ({"remote": "192.168.1.7"}, "on the machine"), ({"remote": None}, "on the machine"),
    ({"headers": {"Host": "evil.example:8188"}}, "on the machine"), ({"headers": {}}, "on the machine"),
    ({"headers": {"Host": "127.0.0.1.evil.example"}}, "on the machine"),
    ({"headers": {"Host": "[::"}}, "on the machine"), ({"headers": {**OWN, "Origin": "http://[::"}}, "Another site"),
    ({"headers": {**OWN, "X-Forwarded-For": "203.0.113.9"}}, "on the machine"),
    ({"headers": {**OWN, "Origin": "https://evil.example"}}, "Another site"),
    ({"headers": {**OWN, "Origin": "null"}}, "Another site"),
    ({"headers": {**OWN, "Origin": "http://127.0.0.1:9000"}}, "Another site"),
    ({"headers": {**OWN, "Sec-Fetch-Site": "cross-site"}}, "Another site"),
    ({"headers": {**OWN, "Sec-Fetch-Site": "same-site"}}, "Another site"),
    ({"method": "POST"}, "Another site"),  # a browser says where it comes from
])  # fmt: skip
def test_everybody_else_is_refused(host, how, why):
    assert why in refusal(**how)


@pytest.fixture
def tab(host, monkeypatch, tmp_path):
    """Asks the routes: tab(path, ...) -> (status, text); its settings and its monitor."""
    from pixstack.nodes.host.training import routes

    settings, table = {}, web.RouteTableDef()
    user_manager = SimpleNamespace(settings=SimpleNamespace(get_settings=lambda request: settings))
    monkeypatch.setattr(routes.PromptServer, "instance", SimpleNamespace(routes=table, user_manager=user_manager))
    monkeypatch.setattr(routes, "monitor", routes.Monitor())
    routes.register()

    async def ask(*questions):
        app = web.Application()
        app.add_routes(table)
        answers = []
        async with TestClient(TestServer(app, host="127.0.0.1")) as client:
            origin = str(client.make_url("")).rstrip("/")
            for method, path in questions:
                path = path(answers) if callable(path) else path
                answer = await client.request(method, path, headers={"Origin": origin})
                answers.append((answer.status, await answer.text(), answer.headers))
        return answers

    run = tmp_path / "runs" / "<b>one"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 4}')
    yield SimpleNamespace(ask=lambda *questions: asyncio.run(ask(*questions)), settings=settings, routes=routes,
                          runs=tmp_path / "runs")
    routes.monitor.stop()


OPEN, CLOSE = ("POST", "/pixstack/training/open"), ("POST", "/pixstack/training/close")


def test_nothing_is_started_until_the_setting_is_on(tab):
    (status, said, _), (of_loader, _, _), (of_page, _, _) = tab.ask(
        OPEN, ("GET", "/pixstack/training/loader?folder=loras&name=a"), ("GET", "/pixstack/training/page/token/"))
    assert (status, of_loader, of_page) == (403, 403, 403) and "switched off" in said
    assert tab.routes.monitor.process is None


def test_the_monitor_is_passed_on_while_it_is_wanted(tab):
    tab.settings.update({"PixStack.Training": True, "PixStack.TrainingRuns": str(tab.runs)})
    page = lambda rest: lambda answers: json.loads(answers[0][1])["address"] + rest  # noqa: E731
    opened, index, script, runs, outside, unknown, wrong, order = tab.ask(
        OPEN, ("GET", page("")), ("GET", page("static/monitor.js")), ("GET", page("api/runs")),
        ("GET", page("static/..%2f..%2fserver.py")), ("GET", page("api/runs/../../../")),
        ("GET", "/pixstack/training/page/wrong/api/runs"), ("POST", page("api/order?run=%3Cb%3Eone&order=stop")))
    assert opened[0] == index[0] == script[0] == 200 and "PixStack monitor" in index[1]
    assert [run["name"] for run in json.loads(runs[1])] == ["<b>one"]
    assert outside[0] == unknown[0] == 404 and wrong[0] == 403
    assert order[0] == 409 and "not running" in order[1]
    assert index[2]["X-Frame-Options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in index[2]["Content-Security-Policy"]
    process = tab.routes.monitor.process
    assert process.poll() is None
    tab.ask(CLOSE)
    assert process.poll() is not None and tab.routes.monitor.process is None


@pytest.mark.parametrize("runs, why", [("nowhere", "no folder"), (__file__, "no folder"), (7, "no folder")])
def test_a_folder_that_is_none_is_named(tab, monkeypatch, runs, why):
    tab.settings.update({"PixStack.Training": True, "PixStack.TrainingRuns": runs})
    monkeypatch.setattr(tab.routes, "ROOT", Path(__file__).parent)  # where there is no folder runs
    ((status, said, _),) = tab.ask(OPEN)
    assert status == 409 and why in said and tab.routes.monitor.process is None


@pytest.mark.parametrize("folder, keys, metadata, node", [
    ("loras", ["diffusion_model.blocks.0.attn.qkv.lora_A.weight"], {"pixstack.family": "pixart_lora"},
     "PixStack_PixArtLoraLoader"),
    ("loras", ["diffusion_model.transformer_blocks.0.attn1.q_proj.lora_A.weight"], {}, "LoraLoaderModelOnly"),
    ("diffusion_models", ["latent_size_embedder.linear_1.weight"], {}, "PixStack_PixelFlowLoader"),
    ("diffusion_models", ["double_blocks.0.img_attn.qkv.weight"], {}, "PixStack_FluxLoader"),
    ("vae", ["decoder.conv_in.weight"], {}, "VAELoader"),
])  # fmt: skip
def test_the_loader_of_an_exported_file_is_known(host, folder, keys, metadata, node):
    from pixstack.nodes.host.training.loaders import loader_of

    file = host.models / folder / "exported_step4.safetensors"
    write_file(file, {key: torch.zeros(1) for key in keys}, metadata)
    try:
        assert loader_of(folder, file.name) == {"node": node}
    finally:
        file.unlink()


@pytest.mark.parametrize("folder, name", [("loras", "gone.safetensors"), ("loras", "../vae/a.safetensors"),
                                          ("..", "a.safetensors"), ("", "")])
def test_a_file_that_comfyui_does_not_list_is_not_opened_and_it_is_said_what_to_do(host, folder, name):
    from pixstack.nodes.host.training.loaders import loader_of

    with pytest.raises(ValueError, match="does not list .* copy it into a folder"):
        loader_of(folder, name)


def test_the_monitor_ends_with_the_process_that_started_it(tmp_path):
    """Which is killed, and so says nothing."""
    import signal
    import subprocess
    import sys
    import time

    if not hasattr(signal, "SIGKILL"):
        pytest.skip("there is no SIGKILL here")
    root = Path(__file__).resolve().parents[2]
    script = ("import importlib.util, pathlib, sys, time\n"
              "spec = importlib.util.spec_from_file_location('process', sys.argv[1])\n"
              "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
              "monitor = module.Monitor(); monitor.start(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[2]))\n"
              "print(monitor.process.pid, flush=True); time.sleep(600)")
    starter = subprocess.Popen([sys.executable, "-c", script, root / "nodes/host/training/process.py", tmp_path],
                               stdout=subprocess.PIPE, text=True)
    monitor = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    for _ in range(600):
        if not is_alive(monitor):
            return
        time.sleep(0.1)
    os.kill(monitor, signal.SIGKILL)
    raise AssertionError("the monitor goes on")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # who has ended and was not asked about is a zombie
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
