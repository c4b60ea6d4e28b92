"""ControlNets with a network of their own as ComfyUI CONTROL_NETs: copies, several GPUs, and applying."""
from __future__ import annotations

import comfy.controlnet


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

    return [[[tokens, {**entries, "control": after(entries.get("control")), "control_apply_to_uncond": False}]
             for tokens, entries in conditioning] for conditioning in conditionings]
