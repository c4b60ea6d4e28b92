"""A ComfyUI that serves: in this process, or in another beside it."""

from __future__ import annotations

import contextlib
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from .comfyui import enter, find_comfyui, make_base, prepare_torch


def serve(base: Path, arguments: list[str]) -> None:
    comfyui = find_comfyui()
    enter(comfyui)
    sys.argv = ["main.py", "--base-directory", str(make_base(base)), "--disable-auto-launch", "--disable-api-nodes"]
    sys.argv += ["--database-url", "sqlite:///:memory:", "--preview-method", "auto", *prepare_torch(), *arguments]
    print("If ComfyUI misses its workflow templates below: nothing here needs them.", file=sys.stderr)
    runpy.run_path(str(comfyui / "main.py"), run_name="__main__")


@contextlib.contextmanager
def served(base: Path, log: Path, arguments: Sequence[str] = (), timeout: float = 180) -> Iterator[str]:
    """The address of a server that runs until the block ends. What it prints goes into `log`; arguments are its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("comfy_host.py")
    command = [sys.executable, str(script), "serve", "--base", str(base), "--port", str(port), *arguments]
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
