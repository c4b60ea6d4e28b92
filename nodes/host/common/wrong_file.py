"""What the browser hears when a node refuses a file that another node takes, so that it can offer to change the node.

The event pixstack.wrong_file comes just before execution_error, whose sentence says the same to people:

    prompt_id, node_id    of the node that refused
    input, file           the menu and the file chosen in it
    kind, folder, nodes   what the file is, its folder below models/, ids of the nodes that take it, the likeliest first
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ....models_impl.known_files import WrongFile

EVENT = "pixstack.wrong_file"


def offer(error: BaseException | None, menus: Mapping[str, str]):
    """Tell the browser that queued the graph what `error` says of a file, if it says that. menus: the node's inputs
    with a menu and what is chosen in each. Without a server, as in a script, nobody hears."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    said = str(error)
    while error is not None and not isinstance(error, WrongFile):
        error = error.__cause__
    if server is None or context is None or error is None or error.kind is None or not error.kind.nodes:
        return
    for name, file in menus.items():
        if PurePath(file).suffix and PurePath(file).name in said:
            about = {"kind": error.kind.name, "folder": error.kind.folder, "nodes": list(error.kind.nodes)}
            where = {"prompt_id": context.prompt_id, "node_id": context.node_id}
            server.send_sync(EVENT, {**where, "input": name, "file": file, **about}, server.client_id)
            return
