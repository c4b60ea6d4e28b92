"""PixelPonder's conditions by region: masks that are painted over the hints, and several conditions in one node."""
from __future__ import annotations

import re

import torch
from comfy_api.latest import io
from torch import Tensor

from .checks import CheckedNode
from .host.common.pictures import check_mask, colours
from .host.common.shown import behind, previews
from .host.pixelponder import map as patch_map
from .host.pixelponder import strokes as painting
from .host.pixelponder.hints import Condition, chain, fit
from .pixelponder import CATEGORY, KINDS, Ponder
from .schema import schema

SLOTS = 8  # of 'PixelPonder Conditions'
SETTINGS = {"strength": (1.0, 0.0, 10.0), "priority": (0, -100, 100), "start": (0.0, 0.0, 1.0), "end": (1.0, 0.0, 1.0)}
"""What a line of settings may say beside the kind: default, least, most."""
HINTS = [f"hint_{number}" for number in range(1, painting.COLOURS + 1)]
LARGEST = 4096
PREVIEW = 1024  # pixels of the longer side of what is shown of the painting


class PaintConditions(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PaintConditions",
            display_name="Paint Conditions (Masks)",
            category=CATEGORY,
            search_aliases=["brush", "paint mask", "regional prompt", "draw mask", "mask editor", "regions"],
            description="A brush in four colours over the hints: one colour for each condition, one mask for each "
            "colour. What is painted is kept in the workflow.",
            inputs=[
                io.String.Input("strokes", default="", tooltip="The painting, as the brush on this node writes it. "
                                "Without the brush: strokes with semicolons between, each 'colour size x y dx dy ...' "
                                "in whole numbers, see the help page."),
                io.Int.Input("width", default=512, min=1, max=LARGEST,
                             tooltip="Pixels of the masks where no hint is connected."),
                io.Int.Input("height", default=512, min=1, max=LARGEST,
                             tooltip="Pixels of the masks where no hint is connected."),
                *(io.Image.Input(name, optional=True, tooltip=f"Shown while colour {number} is painted. The masks are "
                                 "as large as the first hint that is connected.")
                  for number, name in enumerate(HINTS, 1)),
            ],
            outputs=[io.Mask.Output(f"mask_{number}", display_name=f"mask {number}",
                                    tooltip=f"1 where colour {number} is on top: for the condition of hint {number}.")
                     for number in range(1, painting.COLOURS + 1)],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, strokes=""):
        try:
            painting.read(strokes or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, strokes, width, height, **hints) -> io.NodeOutput:
        hints = {name: colours(hints[name][:1], name) for name in HINTS if hints.get(name) is not None}
        first = next(iter(hints.values()), None)
        height, width = (height, width) if first is None else first.shape[1:3]
        painted = painting.read(strokes)
        masks = painting.masks(painted, height, width)
        about = {"size": [width, height], "hints": {name: behind(hint)[0] for name, hint in hints.items()}}
        smaller = max(1.0, max(height, width) / PREVIEW)
        board = _board(painting.masks(painted, *(max(1, round(side / smaller)) for side in (height, width))), hints)
        return io.NodeOutput(*masks[:, None], ui={"images": previews(board), "pixstack_paint": [about]})


def _board(masks: Tensor, hints: dict[str, Tensor]) -> Tensor:
    """(1, height, width, 3): every colour half over its own hint, and the first hint where nothing is painted."""
    height, width = masks.shape[1:]
    board = torch.full((1, height, width, 3), 0.15)
    pictures = {name: fit(hint.movedim(-1, 1), height, width).movedim(1, -1).cpu() for name, hint in hints.items()}
    under = next(iter(pictures.values()), board)
    picture = under.clone()
    for name, mask, colour in zip(HINTS, masks, patch_map.colours(len(masks)), strict=True):
        where = mask[None, ..., None] > 0
        picture = torch.where(where, 0.5 * pictures.get(name, under) + 0.5 * colour, picture)
    return picture


class PixelPonderConditions(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelPonderConditions",
            display_name="PixelPonder Conditions (Several Hints)",
            category=CATEGORY,
            search_aliases=["multi controlnet", "several hints", "condition stack", "controlnet stack"],
            description="Several hints for PixelPonder in one node, instead of a row of 'PixelPonder Condition'.",
            inputs=[
                *_slots(required=True),
                io.String.Input(
                    "settings", default="\n".join(KINDS), multiline=True,
                    tooltip="A line for each hint: its kind (canny, depth, hed, pose), then what is not usual, as in "
                    "'depth strength=0.5 priority=1 start=0 end=0.4'.",
                ),
                Ponder.Input("conditions", optional=True, tooltip="The conditions before these."),
                *_slots(required=False),
            ],
            outputs=[Ponder.Output("chained", display_name="conditions", tooltip="These conditions and those before "
                                   "them: for 'Apply PixelPonder', or the next node.")],
        )

    @classmethod
    def validate_inputs(cls, settings=None, hints=None, masks=None):  # growing slots are given to it unasked
        try:
            if settings is not None:
                read_settings(settings)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, settings, conditions=(), **slots) -> io.NodeOutput:
        hints, masks = _in_slots(slots, "hint"), _in_slots(slots, "mask")
        lines = read_settings(settings)
        row = list(chain(conditions or ()))
        for number in sorted(set(masks) - set(hints)):
            raise ValueError(f"mask_{number} has no hint: connect hint_{number}, or take the mask away.")
        for number, image in sorted(hints.items()):
            if number > len(lines) or lines[number - 1] is None:
                raise ValueError(f"hint_{number} has no line in settings: write its kind into line {number}, one of "
                                 f"{', '.join(KINDS)}.")
            kind, values = lines[number - 1]
            check_mask(masks.get(number), f"mask_{number}")
            row.append(Condition(colours(image, f"hint_{number}"), KINDS[kind], values["strength"], masks.get(number),
                                 values["start"], values["end"], values["priority"]))
        if not row:
            raise ValueError("No hint is connected: connect edges, a depth map or a pose to hint_1.")
        return io.NodeOutput(tuple(row))


def _slots(required: bool) -> list[io.Input]:
    """Slots for hints and masks: growing ones where ComfyUI has them, else SLOTS of each, under the names that growing
    ones have, so that a saved graph runs on both. required: those of the first hint, or the others."""
    def hint(name, **entries):
        return io.Image.Input(name, tooltip="A hint: edges, a depth map or a drawn pose.", **entries)

    def mask(name, **entries):
        return io.Mask.Input(name, tooltip="Painted (1): the hint of this number must win there. With 'blend': where "
                             "it counts, and how much.", **entries)

    if hasattr(io, "Autogrow"):
        names = {what: [f"{what}_{number}" for number in range(1, SLOTS + 1)] for what in ("hint", "mask")}
        grow = io.Autogrow.TemplateNames
        if required:
            return [io.Autogrow.Input("hints", template=grow(hint("hint"), names=names["hint"], min=1),
                                      tooltip="The hints, as many as there are.")]
        return [io.Autogrow.Input("masks", template=grow(mask("mask", optional=True), names=names["mask"], min=0),
                                  tooltip="Where the hints of the same numbers must win.")]
    if required:
        return [hint("hints.hint_1", display_name="hint_1")]
    numbers = range(1, SLOTS + 1)
    both = ((hint(f"hints.hint_{n}", display_name=f"hint_{n}", optional=True),
             mask(f"masks.mask_{n}", display_name=f"mask_{n}", optional=True)) for n in numbers)
    return [one for pair in both for one in pair][1:]


def _in_slots(slots: dict, what: str) -> dict[int, Tensor]:
    """What is connected, by number: from the dictionary that growing slots give, or from fixed ones."""
    of_group = {**(slots.get(f"{what}s") or {}), **slots}
    names = {re.fullmatch(rf"(?:{what}s\.)?{what}_(\d+)", name): value for name, value in of_group.items()}
    return {int(found[1]): value for found, value in names.items() if found and value is not None}


def read_settings(text: str) -> list[tuple[str, dict] | None]:
    """(kind, values) of every line, None for an empty one. Raises ValueError with the line and what is wrong in it."""
    return [_line(line, number) if line.strip() else None for number, line in enumerate(text.splitlines(), 1)]


def _line(line: str, number: int) -> tuple[str, dict]:
    where = f"Line {number} of settings, {line.strip()[:60]!r},"
    kind, *words = line.split()
    if kind not in KINDS:
        raise ValueError(f"{where} begins with {kind[:40]!r}, which is no kind of hint: {', '.join(KINDS)}.")
    values = {name: default for name, (default, *_) in SETTINGS.items()}
    for word in words:
        name, _, value = word.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"{where} has {word[:40]!r}. After the kind it may have {', '.join(SETTINGS)}, each as in "
                             "strength=0.5.")
        default, least, most = SETTINGS[name]
        try:
            values[name] = type(default)(value)
        except ValueError:
            raise ValueError(f"{where} has {name}={value[:40]!r}, which is no "
                             f"{'whole ' if isinstance(default, int) else ''}number.") from None
        if not least <= values[name] <= most:
            raise ValueError(f"{where} has {name}={value[:40]}, not in {least:g} to {most:g}.")
    if values["start"] > values["end"]:
        raise ValueError(f"{where} starts at {values['start']:g} and ends at {values['end']:g}, which leaves no part "
                         "of the sampling: start <= end.")
    return kind, values


NODES = [PaintConditions, PixelPonderConditions]
