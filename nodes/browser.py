"""What our widgets in the browser ask about a node as it stands there: over HTTP, before the graph runs."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aiohttp import web
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..models_impl.guard import reading
from ..models_impl.pixart import checkpoint as pixart_checkpoint
from ..models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from ..models_impl.state_dict import read_file
from . import pixart, pixelflow
from .checks import check_inputs
from .host.common import files
from .host.common.load import MODEL_DTYPES


@dataclass(frozen=True)
class Asked:
    """A node as it stands in the browser."""

    node: type[io.ComfyNode]
    values: dict
    """Values of all of its widgets, by name."""
    linked: frozenset[str]
    """Its inputs that another node gives."""
    loader: str
    """The type of the node that loads its model; empty where that is not known."""
    set_to: dict
    """The values of that loader's widgets."""
    image: tuple[int, int] | None
    """Height and width of the linked picture, where the browser has it."""

    def config(self, family: str):
        """The configuration of its model; None where it is not known before it is loaded, or of another family."""
        return configuration(self.loader, self.set_to) if LOADERS.get(self.loader, [None])[0] == family else None

    @property
    def dtype(self):
        """The storage that the model's loader is set to; None: ComfyUI's choice."""
        return MODEL_DTYPES.get(self.set_to.get("dtype"))

    def check(self):
        """Raise ValueError, as running the node would, for a value that it does not take."""
        check_inputs(self.node, {name: value for name, value in self.values.items() if name not in self.linked})


def asked(body: Mapping, nodes: Mapping[str, type[io.ComfyNode]]) -> Asked:
    """What came over HTTP: {node, values, linked, model: {node, values} or null, image: [width, height] or null}.
    Raises ValueError for what no widget of ours sends."""
    try:
        node, values, linked = nodes[body["node"]], dict(body["values"]), frozenset(body.get("linked") or ())
        model, image = body.get("model") or {"node": "", "values": {}}, body.get("image")
        image = tuple(int(edge) for edge in reversed(image)) if image else None
        if image and not (len(image) == 2 and min(image) > 0):
            raise ValueError(f"a picture of {image}")
        widgets = {spec.id for spec in node.define_schema().inputs if isinstance(spec, io.WidgetInput)
                   and not getattr(spec, "force_input", None)}
        if missing := widgets - {*values}:
            raise ValueError(f"no value of {', '.join(sorted(missing))}")
        return Asked(node, values, linked, str(model["node"]), dict(model["values"]), image)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"This is no state of a node ({type(error).__name__}: {error}).") from error


def route(path: str, answer: Callable[[dict], dict]) -> None:
    """Answer the browser at a path, where there is a server. What `answer` refuses is a bad request."""
    routes = getattr(getattr(PromptServer, "instance", None), "routes", None)
    if routes is None:
        return

    @routes.post(path)
    async def respond(request: web.Request) -> web.Response:
        try:
            return web.json_response(await asyncio.to_thread(answer, await request.json()))
        except (ValueError, RecursionError) as error:  # JSON that is none, or nested too deeply, is one too
            return web.json_response({"error": str(error)}, status=400)


def renew_scripts() -> None:
    """Have browsers ask again for our .mjs, as ComfyUI does for .js: else an update would run with old helpers."""
    app, ours = getattr(getattr(PromptServer, "instance", None), "app", None), Path(__file__).parents[1].name
    if app is None:
        return

    async def ask_again(request: web.Request, response: web.StreamResponse) -> None:
        if request.path.startswith(f"/extensions/{ours}/") and request.path.endswith(".mjs"):
            response.headers["Cache-Control"] = "no-cache"

    app.on_response_prepare.append(ask_again)


# --- Models that are not loaded yet

def configuration(loader: str, values: dict):
    """The configuration of the file that a loader node is set to; None where it does not say or cannot be read."""
    _, class_, settings = LOADERS[loader]
    name = values.get("model_name")
    path = files.find("diffusion_models", name) if isinstance(name, str) else None
    try:
        check_inputs(class_, values)
        chosen = settings(values)
        if path is not None:
            return _of_file(loader, path, Path(path).stat().st_mtime_ns, values["weights"], chosen)
    except (ValueError, LookupError, OSError) as error:  # the loader itself says it when it runs
        logging.debug("PixStack: the browser's widgets cannot read %s: %s", name, error)
    return None


@lru_cache(maxsize=32)
def _of_file(loader: str, path: str, changed: int, weights: str, settings: tuple):
    family, beside = {"pixart": (pixart_checkpoint, pixart_checkpoint.beside),
                      "pixelflow": (pixelflow_checkpoint, pixelflow_checkpoint.config_beside)}[LOADERS[loader][0]]
    with reading(path):
        tensors, metadata = read_file(path)
        return family.read(_shapes(tensors), metadata, weights=weights, config=dict(settings), beside=beside(path))[0]


def _shapes(tensors: Mapping) -> dict:
    """The same without the values, so that nothing of a large file is read, but for tables of positions."""
    return {key: _shapes(value) if isinstance(value, Mapping) else
            value.to("meta") if isinstance(value, Tensor) and not key.endswith("pos_embed") else value
            for key, value in tensors.items()}


def _pixart_settings(values: dict) -> tuple:
    settings = {**pixart.PREDICTIONS[values["prediction"]], **pixart.POSITIONS[values["positions"]]}
    return tuple((settings | ({} if values["variant"] == pixart.AUTO else {"variant": values["variant"]})).items())


LOADERS: dict[str, tuple[str, type[io.ComfyNode], Callable[[dict], tuple]]] = {
    "PixStack_PixArtLoader": ("pixart", pixart.PixArtLoader, _pixart_settings),
    "PixStack_PixelFlowLoader": ("pixelflow", pixelflow.PixelFlowLoader, lambda values: ()),
}
"""Loader -> (family, node, entries of the configuration that its widgets decide)."""
