"""Who may use the training tab: a browser on this machine, on a ComfyUI that serves only this machine.

The monitor shows and stops runs and writes files, so a ComfyUI that other machines can reach does not pass it on,
whoever asks. A page of another site, which a browser on this machine may have open, is refused by what browsers say of
it; a name that leads here (DNS rebinding) by the Host; what a tunnel or proxy passes on by its headers, if it has some.
"""
from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via", "CF-Connecting-IP")


def is_own(host: str | None) -> bool:
    """Whether a host is this machine by a name that no other site can have."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def refusal(request: web.Request, listen: str, multi_user: bool) -> str:
    """Why a request is refused; nothing where it is not. listen: ComfyUI's argument, addresses with commas."""
    if not all(is_own(one.strip()) for one in listen.split(",")):
        return (f"This ComfyUI listens on {listen}, so other machines can reach it, and the training tab shows and "
                "stops runs. Start ComfyUI without --listen for it, or run `python -m trainer monitor RUNS` by itself.")
    if multi_user:
        return "The training tab does not work with --multi-user: runs belong to no user of ComfyUI."
    if not is_own(request.remote) or any(name in request.headers for name in FORWARDED):
        return "The training tab is for a browser on the machine that ComfyUI runs on."
    host = request.headers.get("Host", "")
    if not is_own(_part(f"//{host}", "hostname")):
        return "The training tab is for a browser on the machine that ComfyUI runs on: open it as 127.0.0.1."
    origin = request.headers.get("Origin")
    if origin is None and request.method != "GET" or origin is not None and _part(origin, "netloc") != host:
        return "Another site asked for this."
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return "Another site asked for this."
    return ""


def _part(address: str, name: str) -> str | None:
    try:
        return getattr(urlsplit(address), name)
    except ValueError:
        return None
