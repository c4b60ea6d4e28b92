"""Every reference case of a folder must come out of our own loaders and models as the reference computed it.

`pytest tests/parity/test_parity.py --parity-dir DIR` runs the same adapters over any other folder of cases.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from adapters import ADAPTERS, UNUSED
from safetensors import safe_open
from torch import Tensor

PENDING = {}  # family not built yet -> why its cases are skipped


@dataclass
class Case:
    family: str
    component: str
    config: dict
    weights: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path) -> Case:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            case = cls(about["family"], about["component"], json.loads(about["config"]))
            kinds = {"weight": case.weights, "input": case.inputs, "output": case.outputs}
            for key in file.keys():
                kind, name = key.split(".", 1)
                kinds[kind][name] = file.get_tensor(key)
        return case


def test_parity(parity_file):
    case = Case.read(parity_file)
    if (case.family, case.component) not in ADAPTERS:
        if case.family in PENDING:
            pytest.skip(PENDING[case.family])
        pytest.fail(f"no adapter for ({case.family}, {case.component})")
    results = ADAPTERS[case.family, case.component](case)
    used = {name: value for name, value in case.outputs.items() if name not in UNUSED[case.family, case.component]}
    untold = used.keys() - results.keys()
    assert used and not untold, f"the adapter says nothing of {', '.join(sorted(untold))}"
    for name, reference in used.items():
        ours, tolerance = results[name]
        assert ours.shape == reference.shape, f"{name} is {tuple(ours.shape)}, expected {tuple(reference.shape)}"
        if not reference.is_floating_point():
            assert torch.equal(ours.to(reference.dtype), reference), name
            continue
        allowed = tolerance * max(1.0, reference.double().std(correction=0).item())
        error = (ours.double() - reference.double()).abs()
        worst = (error - allowed).argmax()  # a nan too
        error, allowed = error.flatten()[worst], torch.as_tensor(allowed).expand_as(reference).flatten()[worst]
        assert error <= allowed, f"{name} is {error:.2e} from the reference, allowed {allowed:.2e}"


def test_the_parity_folders_are_not_empty(parity_files):
    assert parity_files
