"""The monitor's server: one page on this machine only, for whoever has the address that was printed.

The token is the first part of every path, so that the page's own addresses have it too. A page of another site that a
browser was led to by a changed name (DNS rebinding) has another Host, and is refused as one without the token is.
"""
from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import threading
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from .exports import Exports
from .folders import RunFolders

HOST, POINTS, MOST_POINTS, MOST_RUNS = "127.0.0.1", 800, 5000, 8
OWN_NAMES = "127.0.0.1", "localhost", "::1"  # the port may be another where it is forwarded
STATIC = Path(__file__).with_name("static")
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".png": "image/png",
         ".css": "text/css; charset=utf-8"}  # a Windows registry may say otherwise
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FOLDERS, TOKEN = web.AppKey("folders", RunFolders), web.AppKey("token", str)
EXPORTS = web.AppKey("exports", Exports)


def own_name(address: str) -> bool:
    """Whether "host:port" is this machine's own."""
    try:
        return urlsplit(f"//{address}").hostname in OWN_NAMES
    except ValueError:
        return False


def refusal(request: web.Request) -> str:
    """Why a request is refused; nothing where it is not."""
    if not own_name(request.headers.get("Host", "")):
        return "This page is for this machine only."
    given = request.path.split("/")[1]
    if not hmac.compare_digest(given.encode(), request.app[TOKEN].encode()):
        return "The token is missing or wrong: open the address that the monitor has printed."
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin is not None and not own_name(origin.partition("//")[2]):
        return "Another site asked for this."
    return ""


@web.middleware
async def guard(request: web.Request, handler) -> web.StreamResponse:
    if why := refusal(request):
        return web.Response(status=403, text=why, headers=HEADERS)
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = web.Response(status=error.status, text=error.reason)
    except KeyError as error:
        response = web.Response(status=404, text=f"There is no run {error}.")
    except ValueError as error:
        response = web.Response(status=409 if request.method == "POST" else 400, text=str(error))
    response.headers.update(HEADERS)
    return response


def asked(request: web.Request, name: str) -> str:
    if name not in request.query:
        raise ValueError(f"The question lacks {name}=.")
    return request.query[name]


def sent(path: Path) -> web.FileResponse:
    return web.FileResponse(path, headers={"Content-Type": TYPES.get(path.suffix, "text/plain; charset=utf-8")})


async def page(request: web.Request) -> web.StreamResponse:
    return sent(STATIC / "index.html")


async def static(request: web.Request) -> web.StreamResponse:
    files = {path.name: path for path in STATIC.iterdir()}  # names that are there, so no way out of the folder
    if (path := files.get(request.match_info["file"])) is None:
        raise web.HTTPNotFound
    return sent(path)


async def runs(request: web.Request) -> web.Response:
    folders = request.app[FOLDERS]
    return web.json_response(await asyncio.to_thread(lambda: [folders.about(name) for name in folders.folders()]))


async def curves(request: web.Request) -> web.Response:
    name, points = asked(request, "run"), int(request.query.get("points", POINTS))
    if not 2 <= points <= MOST_POINTS:
        raise ValueError(f"points={points} must be 2 to {MOST_POINTS}.")
    return web.json_response(await asyncio.to_thread(lambda: request.app[FOLDERS].log(name).curves(points)))


async def samples(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(request.app[FOLDERS].samples, asked(request, "run")))


async def picture(request: web.Request) -> web.StreamResponse:
    index = request.query.get("index")
    path = request.app[FOLDERS].picture(asked(request, "run"), int(asked(request, "step")),
                                        None if index is None else int(index))
    if path is None:
        raise web.HTTPNotFound
    return sent(path)


async def settings(request: web.Request) -> web.Response:
    return web.json_response(request.app[FOLDERS].settings(request.query.getall("run")[:MOST_RUNS]))


async def order(request: web.Request) -> web.Response:
    request.app[FOLDERS].order(asked(request, "run"), asked(request, "order"))
    return web.json_response({})


async def exports(request: web.Request) -> web.Response:
    run = asked(request, "run")
    steps, made = request.app[FOLDERS].steps(run), request.app[EXPORTS]
    files = await asyncio.to_thread(made.files, request.app[FOLDERS].folder(run), run, steps)
    return web.json_response({"steps": steps, "files": files, "last": made.state})


async def export(request: web.Request) -> web.Response:
    run, step, folders = asked(request, "run"), int(asked(request, "step")), request.app[FOLDERS]
    if step not in folders.steps(run):
        raise ValueError(f"{run} has no checkpoint of step {step}.")
    await request.app[EXPORTS].begin(folders.folder(run), run, step)
    return web.json_response({})


def application(root: Path, token: str = "", out: Path | None = None) -> web.Application:
    """token: what addresses begin with; a random one without it. out: the folder for exports."""
    app = web.Application(middlewares=[guard])
    app[FOLDERS], app[TOKEN], app[EXPORTS] = RunFolders(root), token or secrets.token_urlsafe(24), Exports(out)
    app.on_cleanup.append(lambda app: app[EXPORTS].close())
    app.add_routes([
        web.get("/{token}/", page), web.get("/{token}/static/{file}", static), web.get("/{token}/api/runs", runs),
        web.get("/{token}/api/curves", curves), web.get("/{token}/api/samples", samples),
        web.get("/{token}/api/picture", picture), web.get("/{token}/api/settings", settings),
        web.get("/{token}/api/exports", exports), web.post("/{token}/api/export", export),
        web.post("/{token}/api/order", order)])
    return app


def cancel_when_input_ends():
    """Cancel the current task when standard input is closed, as it is when the program at its other end is no more."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def wait():
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=wait, daemon=True).start()


async def serve(app: web.Application, port: int, ready=print):
    """Until it is cancelled. port: 0 takes a free one. ready: is called with the address."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        await site.start()
        ready(f"http://{HOST}:{runner.addresses[0][1]}/{app[TOKEN]}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
