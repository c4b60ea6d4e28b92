"""Texts and pictures on nodes in the browser.

`ui.PreviewText` reaches whoever reads a run's results; no frontend draws it on nodes that are not ComfyUI's own. Texts
of progress are drawn on any node, by classic frontends and by Nodes 2.0, and stay there when the node is done.
"""
from __future__ import annotations

import logging

from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor
from torch.nn import functional as F

SIDE = 768  # pixels of the longer side of pictures that only stand behind something


def show(text: str) -> None:
    """Draw `text` below the node that is at work. Without a server, as in a script, nothing is drawn."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)


def warn(text: str) -> None:
    """Say `text` in ComfyUI's log and below the node that is at work."""
    logging.warning("PixStack: %s", text)
    show(f"\N{WARNING SIGN} {text}")


def previews(images: Tensor) -> list[dict]:
    """Where the browser finds each of (B, H, W, C) in [0, 1], kept as core keeps previews: in ComfyUI's temp folder."""
    return list(ui.PreviewImage(images).as_dict()["images"])


def kept(images: Tensor) -> list[list[str]]:
    """The same for a widget of ours, each as [file name, sub-folder]: core lists only what is in its own words among a
    run's results."""
    return [[one["filename"], one["subfolder"]] for one in previews(images)]


def behind(images: Tensor, most: int = 1) -> list[list[str]]:
    """The first `most` of (B, H, W, C), with the longer side at most SIDE: pictures that stand behind something."""
    images, (H, W) = images[:most], images.shape[1:3]
    if max(H, W) > SIDE:
        size = [max(1, round(side * SIDE / max(H, W))) for side in (H, W)]
        images = F.interpolate(images.movedim(-1, 1).float(), size, mode="area").movedim(1, -1)
    return kept(images)


def tell(event: str, data: dict) -> None:
    """Send the widgets of whoever runs this graph an event of ours. Without a server, as in a script, nobody hears."""
    if (server := getattr(PromptServer, "instance", None)) is not None:
        server.send_sync(f"pixstack.{event}", data, server.client_id)
