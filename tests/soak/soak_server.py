"""A real server with several people at it: valid and invalid prompts, interrupts, prompts taken back."""
from __future__ import annotations

import hashlib
import io
import json
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from pixstack.tools import workflow as conversion
from pixstack.tools.comfyui import make_base
from pixstack.tools.server import served
from soak_graphs import short
from trials import CLEAN, FROZEN, RECOVERED, WRONG, Table

NAMES = ("pixelflow_text_to_image", "pixart_emoji", "pixelponder_emoji")  # whose models are embedded
CLIENTS = 8
PATIENCE = 300.0  # seconds until a prompt in the queue counts as frozen


class Client:
    def __init__(self, address: str):
        self.address = address

    def ask(self, path: str, **content) -> tuple[int, bytes]:
        data = json.dumps(content).encode() if content else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def outcome(self, number: str) -> dict | None:
        """What the history says of a prompt that has ended."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = json.loads(self.ask(f"/history/{number}")[1]).get(number)
            if found and found.get("status", {}).get("status_str"):
                return found
            queue = json.loads(self.ask("/queue")[1])
            waiting = [entry[1] for kind in queue.values() for entry in kind]
            if number not in waiting:
                found = json.loads(self.ask(f"/history/{number}")[1]).get(number)
                return found or {"status": {"status_str": "taken back"}, "outputs": {}}
            time.sleep(0.1)
        return None

    def pictures(self, outputs: dict) -> dict[str, str]:
        """Digests of what each node shows. A node whose pictures come from the cache is not told of again."""
        found = {}
        for node, output in outputs.items():
            digests = []
            for image in output.get("images", []):
                words = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
                status, body = self.ask(f"/view?{words}")
                if status != 200:
                    raise ValueError(f"the picture {image} is answered with {status}")
                digests.append(hashlib.sha256(Image.open(io.BytesIO(body)).convert("RGB").tobytes()).hexdigest()[:16])
            found[node] = " ".join(digests)
        return found


def trials(seed: int, count: int, until: float) -> Table:
    """A table of `count` prompts, less what is not begun until then."""
    table, lock, known = Table(), threading.Lock(), {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "server")
        with served(base, base / "server.log") as address:
            first = Client(address)
            info = json.loads(first.ask("/object_info")[1])
            graphs = {name: short(conversion.read(conversion.shipped()[name], info)) for name in NAMES}

            def one(number: int):
                if time.monotonic() > until:
                    return
                rng = random.Random(f"{seed} {number}")
                found = _prompt(Client(address), graphs, rng, known, lock)
                with lock:
                    table.add(*found)

            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(one, range(count)))
            status, _ = first.ask("/system_stats")
            table.add("server", "is there at the end", RECOVERED if status == 200 else WRONG, f"answers {status}")
    return table


def _prompt(client: Client, graphs: dict, rng: random.Random, known: dict, lock) -> tuple[str, str, str, str]:
    """(row, name, outcome, why) of one prompt."""
    name, draw = rng.choice(sorted(graphs)), rng.randrange(3)
    graph = {i: {**node, "inputs": dict(node["inputs"])} for i, node in graphs[name].items()}
    for node in graph.values():
        for key in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(key), int):
                node["inputs"][key] = draw
    act = rng.choices(("draw", "bad", "interrupt", "take back"), (7, 2, 1, 1))[0]
    what = f"{name}, seed {draw}, {act}"
    if act == "bad":
        node = rng.choice([n for n in graph.values() if n["class_type"].startswith("PixStack_") and n["inputs"]])
        key = rng.choice(sorted(node["inputs"]))
        node["inputs"][key] = rng.choice((None, "unknown", float("nan"), -1, [], ["nobody", 0], 10**30))
        what += f" {node['class_type']}.{key}={node['inputs'][key]!r}"
    status, body = client.ask("/prompt", prompt=graph)
    if status == 400 and act == "bad":
        return "server: 8 clients", what, CLEAN, ""
    if status != 200:
        return "server: 8 clients", what, WRONG, f"answered with {status}: {body[:500]!r}"
    number = json.loads(body)["prompt_id"]
    if act == "interrupt":
        time.sleep(rng.random())
        client.ask("/interrupt", prompt_id=number)
    if act == "take back":
        client.ask("/queue", delete=[number])
    found = client.outcome(number)
    if found is None:
        return "server: 8 clients", what, FROZEN, f"no end in {PATIENCE:.0f} s"
    said = found["status"]["status_str"]
    if said == "success" and act != "bad":
        other = []
        for node, digest in client.pictures(found["outputs"]).items():
            with lock:
                if (right := known.setdefault((name, draw, node), digest)) != digest:
                    other.append(f"node {node} shows {digest} and not {right}")
        return "server: 8 clients", what, WRONG if other else RECOVERED, "; ".join(other)
    if act == "draw" and said == "error":
        messages = dict(entry for entry in found["status"]["messages"] if entry[0] in (
            "execution_error", "execution_interrupted"))
        if "execution_interrupted" in messages:
            return "server: 8 clients", what, CLEAN, ""  # by another client
        return "server: 8 clients", what, WRONG, str(messages)[:600]
    return "server: 8 clients", what, CLEAN, ""
