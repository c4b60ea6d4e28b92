"""Texts below nodes in the browser.

`ui.PreviewText` reaches whoever reads a run's results; no frontend draws it on nodes that are not ComfyUI's own. Texts
of progress are drawn on any node, by classic frontends and by Nodes 2.0, and stay there when the node is done.
"""
from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer


def show(text: str) -> None:
    """Draw `text` below the node that is at work. Without a server, as in a script, nothing is drawn."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)


def warn(text: str) -> None:
    """Say `text` in ComfyUI's log and below the node that is at work."""
    logging.warning("PixStack: %s", text)
    show(f"\N{WARNING SIGN} {text}")
