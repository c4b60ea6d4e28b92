"""What ComfyUI's server answers at our addresses to somebody who sends something else than our scripts do."""
import asyncio
import json
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

BODIES = {
    "nothing": b"", "no JSON": b"{", "null": b"null", "a list": b"[]", "a number": b"1e999", "no UTF-8": b"\xff\xfe{",
    "nested too deeply": b"[" * 200_000, "a huge number": b'{"image": [' + b"9" * 5000 + b", 1]}",
    "other kinds": json.dumps({"node": [], "values": 7, "linked": 3, "model": "x", "image": "ab"}).encode(),
    "endless": b'{"node": "PixStack_PixArtCanvas", "values": {"width": Infinity}, "image": [Infinity, 1]}',
}


@pytest.fixture(scope="module")
def ours(host):
    """Our routes, as they are added to a server. The tab of the training answers nobody here: its setting is off."""
    from pixstack import nodes
    from server import PromptServer

    table, before = web.RouteTableDef(), PromptServer.instance
    settings = SimpleNamespace(get_settings=lambda request: {})
    PromptServer.instance = SimpleNamespace(routes=table, user_manager=SimpleNamespace(settings=settings))
    try:
        asyncio.run(nodes.Extension().get_node_list())
        yield table
    finally:
        PromptServer.instance = before


def test_our_routes_have_our_name(ours):
    assert {route.path.split("/")[1] for route in ours} == {"pixstack"}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_nonsense_is_a_bad_request_and_no_error_of_the_server(ours, body):
    async def statuses():
        app = web.Application(client_max_size=2**20)
        app.add_routes(ours)
        async with TestClient(TestServer(app)) as client:
            return {route.path: (await client.request(route.method, route.path, data=body)).status for route in ours}

    assert {path: status for path, status in asyncio.run(statuses()).items() if not 400 <= status < 500} == {}
