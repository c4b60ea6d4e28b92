"""The runs under one folder: which there are, what they are doing, their settings and samples. Nothing outside of that
folder is opened, whatever a name or a link says.
"""
from __future__ import annotations

import os
import time
from pathlib import Path

from PIL import Image

from ..files import entries
from ..training import control
from .curves import RunLog

DEEPEST = 3  # folders below the one that is watched
FRESH = 2.0  # seconds that a list of runs is believed


class RunFolders:
    def __init__(self, root: Path):
        self.root = root.expanduser().resolve()
        if not self.root.is_dir():
            raise ValueError(f"{root} is no folder: name the one that holds the runs, such as runs.")
        self.known: dict[str, Path] = {}
        self.known_at, self.logs = 0.0, {}

    def folders(self) -> dict[str, Path]:
        """Name -> run folder; linked folders are passed over."""
        if not self.known or time.monotonic() > self.known_at + FRESH:
            self.known, self.known_at = dict(sorted(self.search(self.root, 0))), time.monotonic()
        return self.known

    def search(self, folder: Path, depth: int):
        if (folder / "config.json").is_file():
            yield (folder.relative_to(self.root).as_posix() if depth else folder.name), folder
        elif depth < DEEPEST:
            try:
                inside = [one.name for one in os.scandir(folder) if one.is_dir(follow_symlinks=False)]
            except OSError:
                return
            for name in inside:
                yield from self.search(folder / name, depth + 1)

    def folder(self, name: str) -> Path:
        """Raises KeyError where there is no such run: only names of the list are known."""
        return self.folders()[name]

    def file(self, run: str, *parts: str) -> Path | None:
        """A file of a run, or None where it is not there or lies elsewhere behind a link."""
        path = self.folder(run).joinpath(*parts)
        try:
            real = path.resolve(strict=True)
        except OSError:
            return None
        return real if real.is_file() and real.is_relative_to(self.root) else None

    def table(self, run: str, name: str) -> dict:
        """The entries of a JSON file, none where it is absent or damaged."""
        path = self.file(run, name)
        try:
            return entries(path) if path else {}
        except (OSError, ValueError):
            return {}

    def log(self, run: str) -> RunLog:
        """What a run has logged until now."""
        path = self.file(run, "log.jsonl") or self.folder(run) / "no log.jsonl"
        log = self.logs.setdefault((run, path), RunLog(path))
        log.refresh()
        return log

    def about(self, run: str) -> dict:
        """A run in a few words."""
        settings, status, log = self.table(run, "config.json"), self.table(run, control.STATUS), self.log(run)
        running = self.file(run, control.LOCK) is not None and control.is_running(self.folder(run))
        step, steps = max(log.step(), status.get("step") or 0), settings.get("steps") or 0
        if running:
            state = "paused" if status.get("state") == "paused" else "running"
        else:
            state = "finished" if steps and step >= steps else "stopped" if step else "empty"
        return {"name": run, "state": state, "step": step, "steps": steps, "last": log.last(),
                "recipe": (settings.get("recipe") or {}).get("name"), "orders": control.given(self.folder(run)),
                "memory": status.get("memory"), "seconds_left": status.get("seconds_left") if running else None}

    def samples(self, run: str) -> dict:
        """{"steps": [{"step", "count"}], "titles": those of the newest}. A count of 0: a sheet only."""
        place, counts = self.folder(run) / "samples", {}
        if not place.resolve().is_relative_to(self.root):
            return {"steps": [], "titles": []}
        for one in place.glob("*"):
            stem = one.name.removesuffix(".png")
            if stem.isdigit():
                inside = sum(p.stem.isdigit() for p in one.glob("*.png")) if one.is_dir() else 0
                counts[int(stem)] = max(inside, counts.get(int(stem), 0))
        steps = [{"step": step, "count": count} for step, count in sorted(counts.items())]
        return {"steps": steps, "titles": self.titles(run, steps[-1]) if steps else []}

    def titles(self, run: str, newest: dict) -> list[str]:
        found = []
        for index in range(newest["count"]):
            path = self.picture(run, newest["step"], index)
            try:
                with Image.open(path) as image:
                    found.append(str(image.info.get("title", "")))
            except (OSError, AttributeError, ValueError):
                found.append("")
        return found

    def picture(self, run: str, step: int, index: int | None) -> Path | None:
        """One picture of a step; without an index, the sheet of all."""
        if index is None:
            return self.file(run, "samples", f"{step:08d}.png")
        return self.file(run, "samples", f"{step:08d}", f"{index:02d}.png")

    def steps(self, run: str) -> list[int]:
        """Steps of the checkpoints that lie in the folder itself, oldest first."""
        inside = self.folder(run) / "checkpoints"
        found = [int(p.name) for p in inside.glob("*") if p.name.isdecimal() and len(p.name) < 16]
        return sorted(step for step in found if self.file(run, "checkpoints", f"{step:08d}", "model.safetensors"))

    def settings(self, runs: list[str]) -> list[dict]:
        """The settings of runs beside each other: {"name", "values", "differs"}."""
        flat = [flattened(self.table(run, "config.json")) for run in runs]
        names = sorted({name for one in flat for name in one}, key=lambda name: (name.count(".") > 0, name))
        rows = [(name, [one.get(name) for one in flat]) for name in names]
        return [{"name": name, "values": values, "differs": any(value != values[0] for value in values)}
                for name, values in rows]

    def order(self, run: str, order: str):
        """Writes or removes the file that a run obeys. Raises ValueError where nobody would."""
        folder = self.folder(run)
        if self.file(run, control.LOCK) is None or not control.is_running(folder):
            raise ValueError(f"{run} is not running: there is nobody who would obey.")
        if order == "resume":
            return control.take(folder, control.PAUSE)
        if order not in control.ORDERS:
            raise ValueError(f"{order!r} is none of {', '.join(control.ORDERS)} and resume.")
        try:
            open(folder / order, "x").close()  # never follows a link
        except FileExistsError:
            pass  # ordered already


def flattened(table: dict, prefix: str = "") -> dict[str, object]:
    """"section.key" -> value."""
    found = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
