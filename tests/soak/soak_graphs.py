"""The shipped workflows as small graphs: few steps, small sizes, and their pictures."""
from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from pixstack.tools import workflow as conversion
from soak_loaders import Taken, register

FEW = {"steps": 2}  # of every sampler and schedule
STEP_TEXTS = {"PixStack_PixelFlowSigmas": "2"}  # whose steps are a list per stage


def short(graph: dict) -> dict:
    """The same with few steps."""
    graph = {i: {**node, "inputs": dict(node["inputs"])} for i, node in graph.items()}
    for node in graph.values():
        for name, few in FEW.items():
            value = node["inputs"].get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                node["inputs"][name] = min(value, few)
            elif isinstance(value, str) and node["class_type"] in STEP_TEXTS:
                node["inputs"][name] = STEP_TEXTS[node["class_type"]]
    return graph


def read(path: Path, info: dict) -> dict:
    return short(conversion.read(path, info))


def above(graph: dict, node: str) -> dict:
    """A node and everything that it needs."""
    found, todo = {}, [node]
    while todo:
        if (name := todo.pop()) not in found:
            found[name] = graph[name]
            todo += [v[0] for v in graph[name]["inputs"].values() if isinstance(v, list) and len(v) == 2
                     and isinstance(v[0], str) and v[0] in graph]
    return found


def kept(graph: dict, node: str, info: dict) -> dict:
    """The part of a graph above a node, whose outputs are kept in Taken."""
    part = above(graph, node)
    described = info[graph[node]["class_type"]]
    for slot, _ in enumerate(described["output"]):
        part[f"end{slot}"] = {"class_type": "Soak_Taken", "inputs": {"value": [node, slot], "name": f"{slot}"}}
    return part


def pictures_of(run) -> Counter:
    """Digests of the pixels of each picture that a run drew, and how often."""
    from PIL import Image

    found = Counter()
    for path in run.images:
        with Image.open(path) as picture:
            found[hashlib.sha256(picture.tobytes()).hexdigest()] += 1
    return found


def by_cost(host, paths: list[Path], longest: float = 8.0) -> list[tuple[str, dict]]:
    """(name, graph) of the workflows that run in that many seconds, the quickest first."""
    register(host)
    info, found = host.object_info(), []
    for path in paths:
        graph = read(path, info)
        timer, started = threading.Timer(longest, host.interrupt), time.perf_counter()
        timer.start()
        run = host.run(graph)
        timer.cancel()
        if run.error and run.error.message != "interrupted":
            raise RuntimeError(f"{path.name}: {run.error}")
        if not run.error:
            found.append((time.perf_counter() - started, path.stem, graph))
    return [(name, graph) for _, name, graph in sorted(found, key=lambda entry: entry[:2])]


def finite(value) -> bool:
    """Whether everything in a node's output that is a tensor of numbers is finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return True


def outputs_are_finite() -> bool:
    return all(map(finite, Taken.kept.values()))
