"""What the browser's stage editor draws on PixelFlow's nodes: steps, shift and guidance of every stage, where the steps
fall, and what the node would say. Asked by web/stage_editor.js."""
from __future__ import annotations

from collections.abc import Callable, Mapping

from ..models_impl.pixelflow.config import MOST_STAGES
from ..models_impl.pixelflow.schedule import guidance_scales
from ..models_impl.pixelflow.stages import TRAIN_TIMESTEPS
from . import browser, pixelflow
from .browser import Asked

ROUTE = "/pixstack/stages"
RELEASED_STAGES = 4
SHOWN_CFG = 4.0  # where the guider's is not known
MOST_MARKS = 60  # of a stage's steps
MOST_STEPS = 1000  # of a stage, for its marks
LARGEST = 1e6  # number that is drawn
LEAST = {"steps": 1, "shift": 0.1, "guidance": 0.0}
BY = {"steps": 1, "shift": 0.1, "guidance": 0.1}
DEFAULT = {"steps": 10, "shift": 1.0, "guidance": SHOWN_CFG}


def answer(body: Mapping) -> dict:
    """What to draw, as JSON: {stages, rows, marks, total, presets} and error, a sentence, or null. A row is {name,
    input, values, list, least, by}: list says whether its input takes a number for each stage. Raises ValueError as
    `browser.asked`."""
    asked = browser.asked(body, {name: node for name, (node, _) in NODES.items()})
    return NODES[body["node"]][1](asked)


def sigmas(asked: Asked) -> dict:
    values, known = asked.values, asked.config("pixelflow")
    lists, error = {}, None
    for name, kind in (("steps", int), ("shift", float)):
        try:
            lists[name] = pixelflow.numbers(values[name], name, kind)
        except ValueError:
            lists[name] = [DEFAULT[name]]  # what is wrong, the node says below
    stages = known.num_stages if known else _stages_of(*lists.values())
    # Where lists alone say how many stages there are, they stay lists.
    rows = [{**_row(name, name, lists[name], stages, True), "always_list": known is None and len(lists[name]) > 1}
            for name in lists if name not in asked.linked]
    answered = {"stages": stages, "rows": rows, "presets": [
        {"name": name, "set": {"steps": str(one["steps"]), "shift": str(one["shift"])}}
        for name, one in pixelflow.PRESETS.items()]}
    try:
        asked.check()
        if not asked.linked & {"steps", "shift", "start_stage", "end_stage"}:
            per_stage = [pixelflow.per_stage(values[name], name, stages, kind)
                         for name, kind in (("steps", int), ("shift", float))]
            answered |= _marks(stages, *per_stage, values)
    except ValueError as wrong:
        error = str(wrong)
    return {**answered, "error": error}


def sample(asked: Asked) -> dict:
    values, known, error = asked.values, asked.config("pixelflow"), None
    stages = known.num_stages if known else RELEASED_STAGES
    euler = values["solver"] != "dopri5"
    rows = [_row("steps", "steps", [values["steps"]], stages, False)] if euler and "steps" not in asked.linked else []
    answered = {"stages": stages, "rows": rows, "presets": [
        {"name": name, "set": one if euler else {"cfg": one["cfg"]}} for name, one in pixelflow.PRESETS.items()]}
    try:
        asked.check()
        if not asked.linked & {"steps", "shift", "start_stage", "end_stage"} and euler:
            answered |= _marks(stages, [values["steps"]] * stages, [values["shift"]] * stages, values)
    except ValueError as wrong:
        error = str(wrong)
    return {**answered, "error": error}


def sampler(asked: Asked) -> dict:
    values, error, custom = asked.values, None, asked.values["guidance"] == "custom"
    try:
        scales = pixelflow.numbers(values["custom_guidance"], "custom_guidance")
    except ValueError:
        scales = []
    stages = _stages_of(scales) if custom else RELEASED_STAGES
    if not custom:
        policy = values["guidance"] if values["guidance"] in ("constant", "scaled") else "constant"
        scales = guidance_scales(policy, SHOWN_CFG, stages)
    rows = [{**_row("guidance", "custom_guidance", scales or [SHOWN_CFG], stages, True), "also": {"guidance": "custom"},
             "faint": not custom, "always_list": True}]
    presets = [{"name": name, "set": {"guidance": name}} for name in ("auto", "constant", "scaled")]
    try:
        asked.check()
    except ValueError as wrong:
        error = str(wrong)
    return {"stages": stages, "rows": rows if not asked.linked & {"guidance", "custom_guidance"} else [],
            "presets": presets, "cfg": None if custom else SHOWN_CFG, "error": error}


def _stages_of(*lists: list) -> int:
    """The stages that lists with one number for each have; of the released models where there is no such list."""
    return min(max((len(one) for one in lists if len(one) > 1), default=RELEASED_STAGES), MOST_STAGES)


def _row(name: str, input: str, values: list, stages: int, is_list: bool) -> dict:
    values = [value if -LARGEST < value < LARGEST else DEFAULT[name] for value in values]  # nan is neither
    values = (values * stages if len(values) == 1 else values + [DEFAULT[name]] * stages)[:stages]
    return {"name": name, "input": input, "values": values, "list": is_list, "least": LEAST[name], "by": BY[name]}


def _marks(stages: int, steps: list[int], shift: list[float], values: Mapping) -> dict:
    """Where the steps fall on the way from noise (0) to the picture (1), by stage; none in stages that are left out."""
    if max(steps) > MOST_STEPS:
        return {}
    plans = pixelflow.schedule(stages, steps, shift, values["start_stage"], values["end_stage"]).plans
    marks = [[] for _ in range(stages)]
    for plan in plans:
        stride = -(-len(plan.timesteps) // MOST_MARKS)
        marks[plan.stage] = [timestep / TRAIN_TIMESTEPS for timestep in plan.timesteps[::stride]]
    return {"marks": marks, "total": sum(plan.steps for plan in plans)}


NODES: dict[str, tuple[type, Callable[[Asked], dict]]] = {
    "PixStack_PixelFlowSigmas": (pixelflow.PixelFlowSigmas, sigmas),
    "PixStack_PixelFlowSampler": (pixelflow.PixelFlowSampler, sampler),
    "PixStack_PixelFlowSample": (pixelflow.PixelFlowSample, sample),
}
"""Node -> (its class, what is drawn on it)."""
