"""Exports that the page asks for: the command of that name in a process of its own, one at a time."""
from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_SAID = 2000  # characters of what a command said last


def command(*words: str) -> list[str]:
    """The trainer's command line. By its file: Pythons that come in a folder, as ComfyUI's for Windows, do not look
    for modules in the folder that they are started from."""
    return [sys.executable, str(ROOT / "trainer" / "__main__.py"), *words]


def name_of(run: str, step: int) -> str:
    """Name of the files of a run's step, the same each time, of characters that every file system and menu takes."""
    plain = re.sub(r"[^\w.-]+", "_", run).strip("._-")[:100]
    if plain != run:  # "a/b" and "a_b" are two runs
        plain = f"{plain or 'run'}_{hashlib.sha256(run.encode()).hexdigest()[:6]}"
    return f"{plain}_step{step}"


class Exports:
    def __init__(self, out: Path | None = None):
        """out: the folder that gets loras/, diffusion_models/ and so on; without it, export/ in each run's folder."""
        self.out = out.expanduser().resolve() if out else None
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task | None = None
        self.state = {"state": "none"}

    def place(self, folder: Path) -> Path:
        return self.out or folder / "export"

    def files(self, folder: Path, run: str, steps: list[int]) -> list[dict]:
        """Exported files of these steps: {"step", "folder", "name", "bytes"}, the newest step first."""
        found = []
        for step in sorted(steps, reverse=True):
            pattern = re.compile(rf"{re.escape(name_of(run, step))}(?!.*_step\d)(_\w+)?\.safetensors")
            found += [{"step": step, "folder": path.parent.name, "name": path.name, "bytes": path.stat().st_size}
                      for path in sorted(self.place(folder).glob("*/*.safetensors")) if pattern.fullmatch(path.name)]
        return found

    async def begin(self, folder: Path, run: str, step: int):
        """Raises ValueError while another export is at work."""
        if self.task and not self.task.done():
            raise ValueError(f"{self.state['run']}, step {self.state['step']}, is being exported: wait for its end.")
        self.state = {"state": "running", "run": run, "step": step}
        self.process = await asyncio.create_subprocess_exec(
            *command("export", str(folder), f"--out={self.place(folder)}", f"--name={name_of(run, step)}",
                     f"--step={step}"),
            cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT)
        self.task = asyncio.create_task(self.wait())

    async def wait(self):
        said, _ = await self.process.communicate()
        good = self.process.returncode == 0
        words = said.decode(errors="replace").strip()[-MOST_SAID:]
        self.state = {**self.state, "state": "done" if good else "failed", "said": "" if good else words}

    async def close(self):
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.task
