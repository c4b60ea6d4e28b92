"""`python -m trainer monitor`."""
from __future__ import annotations

from pathlib import Path


def add_arguments(one):
    one.add_argument("runs", type=Path, help="the folder that holds the runs, or one run")
    one.add_argument("--port", type=int, default=8210, help="0 takes a free one")
    one.add_argument("--export-to", type=Path, metavar="MODELS", help="gets what the page exports, as of export --out "
                     "(default: export/ in the run folder)")
    one.add_argument("--until-input-ends", action="store_true", help="end when standard input is closed: for a program "
                     "that starts the monitor, whose end closes it")


def run(args):
    """Show runs in a browser on this machine: curves, samples over steps, settings; sample, pause, stop, export."""
    import asyncio

    from ..monitor import server

    def ready(address: str):
        print(f"{address}\nWhoever has this address can watch, stop and export the runs in {args.runs}. Ctrl-C ends "
              "the monitor, not the runs.", flush=True)

    async def serve():
        if args.until_input_ends:
            server.cancel_when_input_ends()
        await server.serve(server.application(args.runs, out=args.export_to), args.port, ready)

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port={args.port} must be 0 to 65535.")
    try:
        asyncio.run(serve())
    except asyncio.CancelledError:  # who started it is gone
        pass
    except KeyboardInterrupt:
        print()
