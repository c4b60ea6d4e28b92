"""What every benchmark reports: only of sides that compute the same, and in figures that the suite can read."""
import json

import pytest
import torch
from pixstack.benchmarks.report import ROWS, Report, Row, difference, exponent, spread, timed


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.mark.parametrize("dtype, fine, too_much", [("float32", 9e-6, 2e-5), ("bfloat16", 0.02, 0.04)])
def test_unequal_results_fail_the_benchmark(dtype, fine, too_much):
    with Report() as report:
        assert report.equal("a step", "peer", fine, dtype)
    for unequal in (too_much, float("nan")):
        with pytest.raises(SystemExit, match="a step: the results of ours and of peer differ"), Report() as report:
            assert not report.equal("a step", "peer", unequal, dtype)


def test_the_difference_is_in_standard_deviations():
    ours = 5 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert difference(ours + 0.5, ours) == pytest.approx(0.1, rel=0.1)
    assert difference(ours, ours.clone()) == 0
    assert difference(ours * float("nan"), ours) != difference(ours, ours)


def test_a_row_is_added_to_the_file_that_the_environment_names(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(ROWS, str(tmp_path / "rows.jsonl"))
    report = Report()
    for _ in range(2):
        report.row(Row("toy", "peer", [2.0, 1.0, 4.0], [4.0, 3.0, 4.0], memory=(1.0, 2.0)), "a line")
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == second and capsys.readouterr().out == "a line\na line\n"
    assert first["ratio"] == {"median": 2, "least": 1, "most": 3}
    assert first["seconds"] == 2 and first["memory"] == [1, 2]


def test_a_call_is_timed_with_its_result():
    result, seconds, peak = timed(lambda: sum(range(1000)), "cpu")
    assert result == 499500 and seconds >= 0 and peak >= 0


def test_a_spread_keeps_three_digits():
    assert spread([0.01234, 0.01111, 0.01555]) == "0.0123 (0.0111 to 0.0155)" and spread([0.0, 0.0]).startswith("0.00")
