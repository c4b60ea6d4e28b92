"""A ComfyUI in this process, without a server: `Host` runs graphs in it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from .comfyui import CACHE, enter, find_comfyui, make_base, prepare_torch
from .workflow import nearest


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
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    """Those that a node shows, by its id."""
    events: list[tuple[str, dict]] = field(default_factory=list)
    """Events as a browser would get them: (execution_start, ...), (progress, ...), (executed, ...)."""
    previews: list[tuple[str, object]] = field(default_factory=list)
    """(node id, PIL image) in the order they were sent."""
    errors: list[NodeError] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images(self) -> list[Path]:
        return [image for images in self.pictures.values() for image in images]

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
                           "tools/host.py does not know: add to CacheArgs what main.py gives its PromptExecutor")


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
        import_module("server").PromptServer.instance = self  # to which nodes send texts, as to the true one
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
        run.pictures = {i: [self._path(image) for image in output["images"]]
                        for i, output in run.outputs.items() if "images" in output}
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

    def send_progress_text(self, text: str, node_id: str, sid=None) -> None:
        self.send_sync("progress_text", {"node": node_id, "text": text})

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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
