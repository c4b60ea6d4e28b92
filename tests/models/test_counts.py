"""What a step of every network of ours asks of a GPU stays within benchmarks/counts.md."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "count.py"
spec = importlib.util.spec_from_file_location("count_of_steps", PATH)
count = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(count)


@pytest.mark.parametrize("case", count.CASES)
def test_a_step_asks_for_no_more_than_its_budget(case):
    budget, now = count.table()[case, "ours"], count.counted(count.CASES[case]["ours"])
    grown = [f"{name} {found:g}, budget {allowed:g}"
             for name, found, allowed in zip(count.COLUMNS, now.row(), budget, strict=True) if found > allowed]
    runs = ", ".join(f"{name} {n / 1e9:.2f} GB in {now.times[name]}" for name, n in now.operations.most_common(12))
    assert not grown, f"{case} grew beyond benchmarks/counts.md: {'; '.join(grown)}. It runs {runs}."


def test_what_a_gpu_would_run_is_counted_once_each():
    x, weight = count.meta(2, 5, 8).transpose(1, 2), count.meta(7, 5)
    with count.Counting() as counting:
        y = F.linear(F.layer_norm(x, (5,)), weight).float()  # copied first, since its tokens are not contiguous
        y = y + count.meta(1, 1, 7).expand(2, 8, 7)
        y.sum().item()
    found = counting.count
    assert found.times == {"clone": 1, "norm": 1, "mm": 1, "_to_copy": 1, "zeros": 1, "add": 1, "sum": 1}
    assert found.operations["clone"] == found.operations["norm"] == 2 * 2 * 80
    assert found.operations["add"] == 4 * 112 + 2 * 7 + 4 * 112  # an expanded tensor is read where it is
    assert (found.casts, found.waits, found.flops) == (1, 1, 2 * 16 * 5 * 7)


def test_the_peak_is_what_lives_at_once():
    with count.Counting() as counting:
        x = torch.ones(1000, device="meta")
        for _ in range(3):
            x = x * 2
        del x
        torch.ones(10, device="meta")
    assert counting.count.peak == 2 * 4000
