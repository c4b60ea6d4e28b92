"""Every node with every input at its bounds, beyond them, and of another kind."""
from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import numpy
import soak_graphs
import torch
from soak_loaders import Taken, widgets
from trials import CLEAN, RECOVERED, Trial, Wrong, verdict

LONGEST = 25.0  # seconds after which a run is interrupted, as a person would
PREFIX = "PixStack_"
NAN, INF = float("nan"), float("inf")
TEXTS = ("", " ", "a" * 300, "a " * 20_000, "\ud800", "a\x00b", "../../x", "CON", "nul.txt", "a:b", "a\nb",
         "\u202eabc", "((((a:1.2", "[" * 100_000, "1e309", "-1", "a/../../b", "\\\\host\\x", ".",
         "\U0001f469\u200d\U0001f467" * 40, "{}", None, 5, [], {})
NUMBERS = (0, 1, -1, 2**31, 2**63, 2**64, -2**63, 10**30, 1.5, NAN, INF, -INF, 1e308, 1e-45, "7", "x", "", None, True,
           [], {})


def widget_values(spec: list) -> list:
    """Values at the bounds of a widget, beyond them and of other kinds."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if kind in ("INT", "FLOAT"):
        ends = [options[name] for name in ("min", "max") if options.get(name) is not None]
        step = options.get("step", 1) or 1
        return [*ends, *(end + sign * step for end in ends for sign in (-1, 1)), *NUMBERS]
    if kind == "BOOLEAN":
        return [True, False, None, "no", 2, [], NAN]
    if kind == "STRING":
        return list(TEXTS)
    choices = kind if isinstance(kind, list) else list(options.get("options") or [])
    return [*choices[:12], *choices[-2:], None, "", "unknown", 5, NAN, ["x"], {}, "x" * 5000, "../../x", "\ud800", True]


def pictures(rng: torch.Generator) -> list:
    """What other packs give as IMAGE."""
    def noise(*shape):
        return torch.rand(*shape, generator=rng)

    good = noise(1, 64, 64, 3)
    spoilt = [good.clone() for _ in range(2)]
    spoilt[0][0, 3, 3], spoilt[1][0, 5, 5, 0] = NAN, INF
    return [good[:0], noise(1, 0, 64, 3), noise(1, 64, 0, 3), noise(1, 64, 64, 1), noise(1, 64, 64, 2),
            noise(1, 64, 64, 4), noise(1, 64, 64, 5), noise(64, 64, 3), noise(1, 1, 1, 3), noise(1, 3, 2, 3),
            noise(1, 1, 4000, 3), noise(1, 4000, 1, 3), noise(3, 64, 48, 3), good.half(), good.bfloat16(),
            good.double(),
            (good * 255).byte(), (good * 255).long(), good > 0.5, *spoilt, good * 1e30, good - 5, good.transpose(1, 2),
            good.clone().requires_grad_(), noise(2, 33, 65, 3), noise(1, 64, 64, 3).to_sparse(),
            torch.zeros(1, 64, 64, 3), good.numpy(), None, "x", [], {}, [good], good[0, 0, 0]]


def masks(rng: torch.Generator) -> list:
    good = torch.rand(1, 64, 64, generator=rng)
    spoilt = good.clone()
    spoilt[0, 2, 2] = NAN
    return [good[0], good[:0], good[None], good[..., None], torch.rand(3, 32, 48), torch.rand(1, 1, 1), good[:, :0],
            spoilt, good * 1e30, good > 0.5, good.half(), (good * 255).byte(), torch.zeros(1, 64, 64), None, "x", []]


def latents(rng: torch.Generator) -> list:
    def of(*shape):
        return torch.randn(*shape, generator=rng)

    spoilt = of(1, 4, 8, 8)
    spoilt[0, 0, 0, 0] = NAN
    good = of(1, 4, 8, 8)
    samples = [None, good, of(1, 3, 64, 64), of(1, 16, 8, 8), of(1, 16, 24, 24), of(0, 4, 8, 8), of(1, 4, 0, 8),
               of(1, 4, 2, 8, 8), of(4, 8, 8), spoilt, of(1, 5, 8, 8), of(1, 4, 7, 9), of(1, 4, 1, 1), of(3, 4, 8, 8),
               good.half(), good.double(), good.long(), good * 1e30, [1, 2]]
    return [*({"samples": value} for value in samples), {"samples": good, "noise_mask": torch.ones(1, 1, 3, 3)},
            {"samples": of(2, 4, 8, 8), "batch_index": [7, 7]}, {}, None, "x", [], good]


def conditionings(rng: torch.Generator, good: list | None) -> list:
    def of(*shape):
        return torch.randn(*shape, generator=rng)

    spoilt = of(1, 8, 32)
    spoilt[0, 0, 0] = NAN
    made = [[], [[None, {}]], [[of(1, 0, 32), {}]], [[of(1, 8, 32), {}]], [[of(1, 8, 4096), {}]], [[of(8, 32), {}]],
            [[spoilt, {}]], [[of(1, 8, 32), {"pooled_output": None}]], [[of(1, 8, 32), {"pooled_output": of(1, 7)}]],
            [[of(1, 8, 32), {"attention_mask": torch.zeros(1, 8)}]], [[of(1, 8, 32).half(), {}]],
            [[of(3, 8, 32), {}]], [[of(1, 8, 32), {"area": (0, 0, 0, 0)}]], [[of(1, 8, 32), {"strength": NAN}]],
            None, "x", {}, 5, [5], [[5]]]
    if good:
        tokens, entries = good[0]
        if isinstance(tokens, torch.Tensor):
            bad = tokens.clone().float()
            bad.view(-1)[0] = NAN
            made += [good + good, [[tokens[:, :1], entries]], [[tokens[..., :-1], entries]], [[bad, entries]],
                     [[tokens.repeat(3, 1, 1), entries]], [[tokens, {}]],
                     [[tokens, {**entries, "pooled_output": None}]],
                     [[tokens, {**entries, "area": (4, 4, 0, 0), "strength": 1.0}]],
                     [[tokens, {**entries, "start_percent": 0.9, "end_percent": 0.1}]],
                     [[tokens, {**entries, "mask": torch.ones(1, 64, 64), "mask_strength": 1.0}]]]
    return made


SIGMAS = (torch.zeros(0), torch.zeros(1), torch.ones(1), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 1.0]),
          torch.tensor([1.0, NAN, 0.0]), torch.tensor([INF, 0.0]), torch.linspace(1, 0, 60), torch.tensor([1, 0]),
          torch.ones(2, 2), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([14.6, 7.0, 0.0]),
          torch.tensor([1e9, 1.0, 0.0]), None, "x", [1.0, 0.0], {})
PERSON = {"pose_keypoints_2d": [0.5, 0.5, 1.0] * 18}
POSES = ([], {}, None, "x", 5, [{}], [{"people": []}], [{"people": None}], [{"people": [None]}], [{"people": [{}]}],
         [{"people": [PERSON]}], [{"people": [PERSON], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [PERSON], "canvas_width": "64", "canvas_height": "64"}],
         [{"people": [PERSON], "canvas_width": 10**9, "canvas_height": 10**9}],
         [{"people": [PERSON], "canvas_width": 0, "canvas_height": -5}],
         [{"people": [{"pose_keypoints_2d": [NAN] * 54}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [{"pose_keypoints_2d": [None] * 54}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [{"pose_keypoints_2d": ["a"] * 54}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [{"pose_keypoints_2d": [1e30] * 54}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [{"pose_keypoints_2d": [1.0] * 7}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [{"pose_keypoints_2d": numpy.ones(54)}], "canvas_width": 64, "canvas_height": 64}],
         [{"people": [PERSON] * 500, "canvas_width": 64, "canvas_height": 64}], [[PERSON]], {"people": [PERSON]})
STRANGE = (None, "x", 5, [], {}, torch.zeros(3), object())
"""What stands at an input for a MODEL, CLIP, VAE, CONTROL_NET or an own type."""


class Handed:
    """A node that gives what stands under a name, as a node of another pack would."""

    RETURN_TYPES = ("*",)
    FUNCTION, CATEGORY = "give", "soak"
    values: dict = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {"default": ""})}}

    def give(self, name):
        return (Handed.values[name],)


def register(host):
    soak_graphs.register(host)
    host._nodes.NODE_CLASS_MAPPINGS["Soak_Handed"] = Handed


def socket_values(kind: str, good, others: list) -> list:
    """What may come in at a socket. good: what the workflow gives; others: what sockets of other kinds are given."""
    rng = torch.Generator().manual_seed(0)
    made = {"IMAGE": lambda: pictures(rng), "MASK": lambda: masks(rng), "LATENT": lambda: latents(rng),
            "CONDITIONING": lambda: conditionings(rng, good), "SIGMAS": lambda: list(SIGMAS),
            "POSE_KEYPOINT": lambda: list(POSES)}.get(kind, lambda: list(STRANGE))()
    return made + others


def graphs_by_node(host, workflows: list[tuple[str, dict]], info: dict) -> dict[str, tuple[str, str, dict]]:
    """Our node -> (workflow, id, graph) of the quickest workflow that has it; else a graph of it alone."""
    found = {}
    for name, graph in workflows:
        for number, node in graph.items():
            if node["class_type"].startswith(PREFIX):
                found.setdefault(node["class_type"], (name, number, graph))
    for node in info:
        if node.startswith(PREFIX) and node not in found and not any(
                not isinstance(spec[0], list) and spec[0] not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
                for spec in info[node]["input"].get("required", {}).values()):
            found[node] = ("alone", "1", {"1": {"class_type": node, "inputs": widgets(info, node)}})
    return found


def attempt(host, graph: dict) -> str:
    """Outcome of a graph: that it worked, with finite outputs, or a sentence that says why not. Raises Wrong."""
    Taken.kept.clear()
    timer = threading.Timer(LONGEST, host.interrupt)
    timer.start()
    try:
        run = host.run(graph, fresh=False)
    finally:
        timer.cancel()
    if not run.error:
        if not soak_graphs.outputs_are_finite():
            raise Wrong("the outputs hold values that are no numbers")
        return RECOVERED
    said = run.error.message
    if said == "interrupted":
        return RECOVERED
    if not run.events or all(event != "execution_start" for event, _ in run.events):  # refused before it ran
        if "Exception when validating" in said or "exception" in said.lower().split(":")[0]:
            raise Wrong(said)
        return CLEAN
    kind, _, words = said.partition(": ")
    known = {"ValueError": ValueError, "FileNotFoundError": OSError, "OSError": OSError,
             **dict.fromkeys(("MemoryError", "OutOfMemoryError", "_ArrayMemoryError"), MemoryError)}
    error = known.get(kind.split(".")[-1], AssertionError)(words)
    ours = graph.get(run.error.node, {}).get("class_type", "").startswith(PREFIX)
    outcome, why = verdict(error)
    if outcome == CLEAN or "can't allocate memory" in words:
        return CLEAN
    if not ours and run.error.node in graph:
        return CLEAN  # core's own node said it in its own words
    raise Wrong(f"{run.error}")


def trials(host, workflows: list[tuple[str, dict]], seed: int,
           chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    """Every input of every node of ours."""
    register(host)
    info, rng, number = host.object_info(), random.Random(seed), 0
    for node, (workflow, at, graph) in sorted(graphs_by_node(host, workflows, info).items()):
        part = soak_graphs.kept(graph, at, info)
        described = info[node]["input"]
        specs = {name: spec for kind in ("required", "optional") for name, spec in described.get(kind, {}).items()}
        for name, spec in specs.items():
            is_widget = isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            values = widget_values(spec) if is_widget else _sockets(host, part, at, name, spec[0], rng)
            for place, value in enumerate(values):
                number += 1
                if not chosen(number):
                    continue
                changed = _with(part, at, name, value, is_widget, f"{node}.{name}.{place}")
                what = f"{workflow}: {name}={_short(value)} (value {place})"
                yield Trial(f"nodes: {node.removeprefix(PREFIX)}", what,
                            lambda changed=changed: attempt(host, changed), limit=LONGEST + 20)
        for name in specs:
            number += 1
            if chosen(number) and name in part[at]["inputs"]:
                fewer = {k: v for k, v in part[at]["inputs"].items() if k != name}
                changed = {**part, at: {**part[at], "inputs": fewer}}
                yield Trial(f"nodes: {node.removeprefix(PREFIX)}", f"{workflow}: without {name}",
                            lambda changed=changed: attempt(host, changed), limit=LONGEST + 20)


def _sockets(host, part: dict, at: str, name: str, kind: str, rng: random.Random) -> list:
    good, link = None, part[at]["inputs"].get(name)
    if isinstance(link, list) and kind == "CONDITIONING":
        graph = {**soak_graphs.above(part, link[0]),
                 "end": {"class_type": "Soak_Taken", "inputs": {"value": link, "name": "good"}}}
        Taken.kept.clear()
        host.run(graph, fresh=False)
        good = Taken.kept.get("good")
    links = [[i, 0] for i, node in part.items() if node["class_type"] not in ("Soak_Taken",)]
    return socket_values(kind, good, [Link(link) for link in rng.sample(links, min(3, len(links)))])


class Link(list):
    """A link to an output of another node of the graph, which may be of another type."""


def _with(part: dict, at: str, name: str, value, is_widget: bool, key: str) -> dict:
    changed = {i: {**node, "inputs": dict(node["inputs"])} for i, node in part.items()}
    if is_widget:
        changed[at]["inputs"][name] = value
    elif isinstance(value, Link):
        if value[0] != at:
            changed[at]["inputs"][name] = list(value)
    else:
        Handed.values[key] = value
        changed["handed"] = {"class_type": "Soak_Handed", "inputs": {"name": key}}
        changed[at]["inputs"][name] = ["handed", 0]
    return changed


def _short(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)[:60]
