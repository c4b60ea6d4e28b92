"""The trainer's monitor as a process beside ComfyUI. It ends when ComfyUI does, however that ends: its input is a pipe
from this process, and it stops when the pipe is closed."""
from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 120  # seconds until it has said its address
MOST_SAID = 2000  # characters of its complaints


class Monitor:
    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        self.port, self.token, self.about = 0, "", ()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, runs: Path, models: Path):
        """Blocks until it serves `runs`; what it exports goes to `models`. Raises ValueError with its complaint."""
        with self.lock:
            if self.alive and self.about == (runs, models):
                return
            self._stop()
            # By its file: a Python that comes in a folder looks for no modules where it is started.
            command = [sys.executable, str(ROOT / "trainer" / "__main__.py"), "monitor", str(runs), "--port=0",
                       f"--export-to={models}", "--until-input-ends"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                encoding="utf-8", errors="replace", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
            atexit.register(self.stop)
            said, ready = [], threading.Event()
            threading.Thread(target=self._listen, args=(self.process, said, ready), daemon=True).start()
            ready.wait(PATIENCE)
            address = urlsplit(said[-1]) if said and said[-1].startswith("http://127.0.0.1:") else None
            if address is None:
                self._stop()
                raise ValueError("The trainer's monitor did not start. "
                                 + ("".join(said)[-MOST_SAID:].strip() or "It said nothing."))
            self.port, self.token, self.about = address.port, address.path.strip("/"), (runs, models)

    @staticmethod
    def _listen(process: subprocess.Popen, said: list[str], ready: threading.Event):
        """Reads what the process says until its address, and lets go what comes after."""
        for line in process.stdout:
            if not ready.is_set():
                said.append(line.rstrip("\n") if line.startswith("http://") else line)
                if line.startswith("http://"):
                    ready.set()
        ready.set()

    def stop(self):
        with self.lock:
            self._stop()

    def _stop(self):
        if self.process is None:
            return
        atexit.unregister(self.stop)
        try:
            self.process.stdin.close()
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process, self.about = None, ()
