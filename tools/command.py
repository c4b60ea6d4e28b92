"""A ComfyUI for the demo and the tests: found or fetched, given a base folder that holds this package, then used."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path

from .comfyui import CACHE, find_comfyui, requirements
from .host import Host
from .server import serve
from .workflow import named, read, set_inputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="comfy_host.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--base", type=Path, default=CACHE / "base", help="holds models/, input/, output/ (%(default)s)")
    commands.add_parser("serve", parents=[both], help="serve at 127.0.0.1:8188; other arguments go to ComfyUI")
    runner = commands.add_parser("run", parents=[both], help="run a workflow or an API-format graph in this process")
    runner.add_argument("graph", type=named, metavar="GRAPH", help="a file, or a template's number, such as 01")
    runner.add_argument("--set", action="append", default=[], metavar="NODE.input=value", dest="values")
    runner.add_argument("--input", type=Path, action="append", default=[], metavar="FILE", help="copy it into input/")
    runner.add_argument("--output", type=Path, metavar="DIR", help="where images are written (BASE/output)")
    commands.add_parser("object-info", parents=[both], help="print what every node takes and gives, as JSON")
    commands.add_parser("requirements", help="print the ComfyUI's requirements, without torch's packages")
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "serve":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    run = {"serve": _serve, "run": _run, "object-info": _object_info, "requirements": _requirements}[args.command]
    try:
        return run(args, rest) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(args, rest):
    serve(args.base, rest)


def _object_info(args, _):
    with contextlib.redirect_stdout(sys.stderr):
        info = Host(args.base).start().object_info()
    json.dump(info, sys.stdout)


def _requirements(args, _):
    print("\n".join(requirements(find_comfyui())))


def _run(args, _):
    host = Host(args.base, args.output)
    for file in args.input:
        shutil.copy(file, host.input)
    with contextlib.redirect_stdout(sys.stderr):
        host.start()
        info = host.object_info()
        graph = set_inputs(read(args.graph, info), args.values, info)
        run = host.run(graph, on_event=Progress(graph))
    for error in run.errors:
        print(f"error: {error}", file=sys.stderr)
    for image in run.images:
        print(image)
    return 1 if run.errors else 0


class Progress:
    """One line per node that runs, and one that fills while a node counts its steps."""

    def __init__(self, graph: dict):
        self.graph, self.node, self.open = graph, None, False

    def __call__(self, event: str, data: dict) -> None:
        if event == "executing" and data["node"]:
            self._end_line()
            self.node = f"node {data['node']} {self.graph.get(data['node'], {}).get('class_type', '')}"
            print(self.node, end="", file=sys.stderr, flush=True)
            self.open = True
        elif event == "progress" and sys.stderr.isatty():
            print(f"\r{self.node} {data['value']}/{data['max']}", end="", file=sys.stderr, flush=True)
        elif event.startswith("execution_") and self.open:
            self._end_line()

    def _end_line(self):
        if self.open:
            print(file=sys.stderr)
        self.open = False
