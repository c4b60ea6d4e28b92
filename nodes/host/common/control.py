"""ControlNets with a network of their own as ComfyUI CONTROL_NETs: copies, several GPUs, and applying."""
from __future__ import annotations

import comfy.conds
import comfy.controlnet

AREA = "pixstack_area"
"""Where get_control finds the area of its conditioning."""


class Area(comfy.conds.CONDRegular):
    """The area (height, width, y, x) of a conditioning in cells, with the (height, width) of the whole latent where it
    is known: a ControlNet is called with the area's part of the latent, and sees only from this which part that is."""

    def __init__(self, whole: tuple[int, int] | None = None, area: tuple[int, ...] | None = None):
        super().__init__(None if area is None else (area, whole))
        self.whole = whole

    def process_cond(self, batch_size, area=None, **kwargs):
        return Area(self.whole, None if area is None else tuple(map(int, area)))

    def can_concat(self, other) -> bool:
        return self.cond == other.cond

    def concat(self, others):
        return self.cond

    def size(self) -> list[int]:
        return [1]


class NetworkControl(comfy.controlnet.ControlBase):
    """A control whose network is in a ModelPatcher. Subclasses have `copy`, which shares it."""

    def __init__(self, net_patcher):
        super().__init__()
        self.net_patcher = net_patcher

    def deepclone_multigpu(self, load_device, autoregister=False):
        """Asked for by ComfyUI after 0.3.75, where a model runs on several GPUs at once: weights of its own there."""
        clone = self.copy()
        clone.net_patcher = self.net_patcher.deepclone_multigpu(load_device)  # loaded afresh from the file
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone

    def get_models(self):
        return [*super().get_models(), self.net_patcher]


def apply_control(control: NetworkControl, *conditionings: list) -> list[list]:
    """The conditionings with `control` on each entry, after the ControlNets that it already has.

    Entries after the same ControlNet share a copy of `control`, so that positive and negative run in one batch.
    """
    successors = {}  # previous ControlNet -> its successor

    def after(previous):
        if previous not in successors:
            successors[previous] = control.copy().set_previous_controlnet(previous)
        return successors[previous]

    def controlled(entries: dict) -> dict:
        conds = {**entries.get("model_conds", {}), AREA: Area()}
        return {**entries, "control": after(entries.get("control")), "control_apply_to_uncond": False,
                "model_conds": conds}

    return [[[tokens, controlled(entries)] for tokens, entries in conditioning] for conditioning in conditionings]
