"""The package in a real server: over HTTP and the websocket, as the browser talks to it."""

import asyncio
import io
import json
import uuid

import aiohttp
import dynamic_vram
import pytest
from conftest import ROOT, SHIPPED, WORKFLOWS
from PIL import Image
from pixstack.tools import workflow as conversion

pytestmark = pytest.mark.server
TEXT_TO_IMAGE = SHIPPED["pixelflow_text_to_image"]


def get(server, path, **params):
    async def answer():
        async with aiohttp.ClientSession(server.address) as session, session.get(path, params=params) as response:
            return response.status, await response.read()

    return asyncio.run(answer())


@pytest.fixture(scope="session")
def info(server):
    status, body = get(server, "/object_info")
    assert status == 200
    return json.loads(body)


@pytest.fixture
def graph(info):
    return conversion.set_inputs(conversion.read(TEXT_TO_IMAGE, info), ["PixStack_PixelFlowSample.steps=2"], info)


def queue(server, graph):
    """(status, answer, events as (name, data) or (number, bytes)) until the graph is done."""

    async def talk():
        client, events = uuid.uuid4().hex, []
        async with (
            aiohttp.ClientSession(server.address) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as response:
                status, answer = response.status, await response.json()
            while status == 200:
                message = await socket.receive(timeout=120)
                if message.type == aiohttp.WSMsgType.BINARY:
                    events.append((int.from_bytes(message.data[:4], "big"), message.data[4:]))
                    continue
                event = json.loads(message.data)
                events.append((event["type"], event["data"]))
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        return status, answer, events

    return asyncio.run(talk())


def test_a_prompt_comes_back_as_a_picture(server, graph):
    status, _, events = queue(server, graph)
    assert status == 200
    names = [name for name, _ in events]
    assert names[-1] == "execution_success", events[-1]
    saved = next(i for i, (name, data) in enumerate(events) if name == "executed" and "images" in data["output"])
    assert names.index("execution_start") < names.index("executing") < names.index("progress") < saved
    image = events[saved][1]["output"]["images"][0]
    status, picture = get(server, "/view", **image)
    assert status == 200
    assert Image.open(io.BytesIO(picture)).format == "PNG"


def test_the_server_has_dynamic_vram_where_the_tests_do(server, graph):
    assert queue(server, graph)[2][-1][0] == "execution_success"
    prepared = "prepared for dynamic VRAM loading" in (server.base / "server.log").read_text(errors="replace")
    assert prepared == (dynamic_vram.wanted() is not None)


def test_a_graph_that_runs_sends_previews(server, graph):
    sample = next(i for i, node in graph.items() if node["class_type"] == "PixStack_PixelFlowSample")
    graph[sample]["inputs"]["seed"] += 1  # else the server answers from its cache
    _, _, events = queue(server, graph)
    previews = [data for name, data in events if name == 1]  # 4 bytes of format, then the file
    steps = max(data["max"] for name, data in events if name == "progress")
    assert len(previews) == steps
    assert {Image.open(io.BytesIO(data[4:])).format for data in previews} == {"JPEG"}


def test_a_bad_input_is_answered_with_400_and_the_error_of_its_node(server, graph):
    sample = next(i for i, node in graph.items() if node["class_type"] == "PixStack_PixelFlowSample")
    graph[sample]["inputs"]["steps"] = 0
    status, answer, _ = queue(server, graph)
    assert status == 400
    assert list(answer["node_errors"]) == [sample]
    (error,) = answer["node_errors"][sample]["errors"]
    assert (error["message"], error["details"]) == ("Value 0 smaller than min of 1", "steps")


def test_every_node_of_ours_has_a_help_page(server, info):
    ours = [name for name in info if name.startswith("PixStack_")]
    assert ours
    assert [name for name in ours if get(server, f"/extensions/pixstack/docs/{name}.md")[0] != 200] == []
    pictures = [path.name for path in (ROOT / "web/docs").iterdir() if path.suffix in (".jpg", ".png")]
    assert pictures and [name for name in pictures if get(server, f"/extensions/pixstack/docs/{name}")[0] != 200] == []


def test_an_update_of_the_scripts_reaches_the_browser(server):
    """ComfyUI says so of .js, and Chromium would keep .mjs for a part of its age."""
    async def kept(path):
        async with aiohttp.ClientSession(server.address) as session, session.get(path) as response:
            return response.status, response.headers.get("Cache-Control")

    scripts = [path.name for path in (ROOT / "web").glob("*.*js")]
    assert scripts
    for name in scripts:
        status, how = asyncio.run(kept(f"/extensions/pixstack/{name}"))
        assert status == 200 and how in ("no-cache", "no-store")  # asked for anew; the second is ComfyUI 0.33's way


def test_the_browser_is_told_what_a_canvas_would_be(server):
    async def ask(body):
        async with (aiohttp.ClientSession(server.address) as session,
                    session.post("/api/pixstack/canvas", data=body) as response):
            return response.status, await response.json()

    values = {"resolution": "1024", "shape": "16:9", "width": 16, "height": 16, "batch_size": 1}
    status, said = asyncio.run(ask(json.dumps({"node": "PixStack_PixArtCanvas", "values": values})))
    assert (status, said["size"]) == (200, [1344, 768])
    for bad in ("{", "7", json.dumps({"node": "PixStack_PixArtCanvas", "values": {}})):
        status, said = asyncio.run(ask(bad))
        assert status == 400 and said["error"]


def test_the_workflows_are_offered_as_templates_with_their_pictures(server):
    _, body = get(server, "/api/workflow_templates")
    assert sorted(json.loads(body)["pixstack"]) == [path.stem for path in WORKFLOWS]
    pictures = [f"/api/workflow_templates/pixstack/{path.stem}.jpg" for path in WORKFLOWS]
    assert [path for path in pictures if get(server, path)[0] != 200] == []


def test_the_in_process_description_of_nodes_is_the_servers(server, info, host):
    def slots(described):
        kinds = ("required", "optional")
        return [list(described["input"].get(kind, {})) for kind in kinds] + [described["output"]]

    ours = host.object_info()
    assert ours.keys() == info.keys()
    assert [name for name in info if slots(ours[name]) != slots(info[name])] == []
