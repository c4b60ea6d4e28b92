"""`python -m trainer monitor`."""
from __future__ import annotations

from pathlib import Path


def add_arguments(one):
    one.add_argument("runs", type=Path, help="the folder that holds the runs, or one run")
    one.add_argument("--port", type=int, default=8210, help="0 takes a free one")


def run(args):
    """Show runs in a browser on this machine: curves, samples over steps, settings; sample, pause or stop them."""
    import asyncio

    from ..monitor import server

    def ready(address: str):
        print(f"{address}\nWhoever has this address can watch and stop the runs in {args.runs}. Ctrl-C ends the "
              "monitor, not the runs.", flush=True)

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port={args.port} must be 0 to 65535.")
    try:
        asyncio.run(server.serve(server.application(args.runs), args.port, ready))
    except KeyboardInterrupt:
        print()
