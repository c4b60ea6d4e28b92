"""What ComfyUI's server answers for the training tab: it starts the monitor, passes its page on, and says which node
loads an exported file. Off until the user's setting says otherwise."""
from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import folder_paths
from aiohttp import web
from comfy.cli_args import args
from server import PromptServer
from yarl import URL

from .access import refusal
from .loaders import loader_of
from .process import ROOT, Monitor

PREFIX = "/pixstack/training"
ENABLED, RUNS = "PixStack.Training", "PixStack.TrainingRuns"
PASSED_ON = re.compile(r"(?:static/[\w.-]+|api/[a-z]+)?")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Frame-Options": "SAMEORIGIN", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
}
monitor = Monitor()


def register():
    """Add the routes to a server; without one, as in a script, there are none."""
    server = getattr(PromptServer, "instance", None)
    if not isinstance(getattr(server, "routes", None), web.RouteTableDef):
        return
    server.routes.post(f"{PREFIX}/open")(opened)
    server.routes.post(f"{PREFIX}/close")(closed)
    server.routes.get(f"{PREFIX}/loader")(loader)
    server.routes.get(PREFIX + "/page/{token}/{rest:.*}")(page)
    server.routes.post(PREFIX + "/page/{token}/{rest:.*}")(page)


def refused(request: web.Request) -> web.Response | None:
    if why := refusal(request, args.listen, args.multi_user):
        return web.Response(status=403, text=why, headers=HEADERS)
    if not settings(request).get(ENABLED):
        return web.Response(status=403, text="The training tab is switched off: Settings > PixStack > Training.",
                            headers=HEADERS)
    return None


def settings(request: web.Request) -> dict:
    found = PromptServer.instance.user_manager.settings.get_settings(request)
    return found if isinstance(found, dict) else {}


async def opened(request: web.Request) -> web.Response:
    if answer := refused(request):
        return answer
    stated = settings(request).get(RUNS)
    runs = ROOT / Path(stated.strip() if isinstance(stated, str) and stated.strip() else "runs").expanduser()
    try:
        if not runs.is_dir():
            raise ValueError(f"There is no folder {runs}. Train something, or name the folder that holds the runs: "
                             "Settings > PixStack > Training.")
        await asyncio.to_thread(monitor.start, runs, Path(folder_paths.models_dir))
    except (ValueError, OSError) as error:
        return web.Response(status=409, text=str(error), headers=HEADERS)
    return web.json_response({"address": f"{PREFIX}/page/{monitor.token}/"}, headers=HEADERS)


async def closed(request: web.Request) -> web.Response:
    if why := refusal(request, args.listen, args.multi_user):
        return web.Response(status=403, text=why, headers=HEADERS)
    await asyncio.to_thread(monitor.stop)
    return web.json_response({}, headers=HEADERS)


async def page(request: web.Request) -> web.StreamResponse:
    """The monitor's page, which knows its token. No body is passed on: the monitor's questions have none."""
    if answer := refused(request):
        return answer
    token, rest = request.match_info["token"], request.match_info["rest"]
    if not monitor.alive or not PASSED_ON.fullmatch(rest) or not re.fullmatch(r"[\w-]+", token):
        return web.Response(status=404, text="The monitor is not at work, or has no such page.", headers=HEADERS)
    url = URL(f"http://127.0.0.1:{monitor.port}/{token}/{rest}?{request.rel_url.raw_query_string}", encoded=True)
    try:
        async with aiohttp.ClientSession() as session, session.request(request.method, url) as answer:
            kind = answer.headers.get("Content-Type", "text/plain; charset=utf-8")
            response = web.StreamResponse(status=answer.status, headers={**HEADERS, "Content-Type": kind})
            await response.prepare(request)
            async for some in answer.content.iter_chunked(2**16):
                await response.write(some)
            await response.write_eof()
            return response
    except aiohttp.ClientConnectionError:
        return web.Response(status=502, text="The monitor does not answer.", headers=HEADERS)


async def loader(request: web.Request) -> web.Response:
    """{"node": the id of the node that loads a file of a folder below models/}."""
    if answer := refused(request):
        return answer
    folder, name = request.query.get("folder", ""), request.query.get("name", "")
    try:
        return web.json_response(await asyncio.to_thread(loader_of, folder, name), headers=HEADERS)
    except ValueError as error:
        return web.Response(status=409, text=str(error), headers=HEADERS)
