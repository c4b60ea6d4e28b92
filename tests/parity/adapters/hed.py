"""Parity adapter of the HED annotator."""
from __future__ import annotations

import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators import hed

from .registry import TOLERANCE, adapter


@adapter("pixart", "hed")
@torch.no_grad()
def annotator(case):
    config, weights = hed.read(case.weights)
    model = hed.HED(config)
    state_dict.load_into(model, weights, "HED")
    sides, edge = model(case.inputs["image"])
    results = {f"proj{n}": side for n, side in enumerate(sides, start=1)}
    results.update(edge=edge, vae_input=hed.condition(edge))
    return {name: (value, TOLERANCE) for name, value in results.items()}
