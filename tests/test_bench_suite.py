"""The suite of benchmarks: what it records of cases that end well, badly, late or not at all."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pixstack.benchmarks import suite
from pixstack.benchmarks.report import Row

ROOT = Path(__file__).resolve().parents[1]
ROW = """
import os
from pixstack.benchmarks.report import Report, Row
with Report() as report:
    for size in (1, 2, 4):
        ours = [float(size ** 2)] * 3
        report.row(Row("toy", "peer", ours, [2 * s for s in ours], "float32", {"size": size}), "a line")
"""
FAKES = {
    "good": ROW,
    "bad": "print('first'); raise SystemExit('no such thing')",
    "slow": ROW + "import time; print('still here'); time.sleep(60)",
}


@pytest.fixture
def fake(tmp_path):
    def made(*names: str, deadline: float = 60) -> list[suite.Case]:
        cases = []
        for name in names:
            file = tmp_path / f"{name}.py"
            file.write_text(FAKES[name], encoding="utf-8")
            cases.append(suite.Case(name, (str(file),), 8 if name == "slow" else deadline))
        return cases

    return made


@pytest.fixture
def environment():
    path = os.pathsep.join(filter(None, (str(ROOT / "package"), os.environ.get("PYTHONPATH", ""))))
    return dict(os.environ, PYTHONPATH=path, PYTHONUNBUFFERED="1")


def run(cases, environment, seconds=None) -> tuple[int, list[suite.Result]]:
    saved = []
    code = suite.run(cases, seconds, environment, lambda results: saved.append(list(results)))
    return code, saved[-1]


def test_cases_run_in_their_order_while_some_fail_or_run_out_of_time(fake, environment, capsys):
    code, results = run(fake("bad", "slow", "good"), environment)
    assert code == 1
    assert [(r.name, r.status) for r in results] == [("bad", "failed"), ("slow", "out of time"), ("good", "done")]
    assert results[0].last_lines == ["first", "no such thing", "exit code 1"]
    assert results[1].last_lines[-1] == "still here" and results[1].seconds < 50
    assert [row["axes"]["size"] for row in results[1].rows] == [1, 2, 4]
    assert results[2].last_lines == [] and "a line" in capsys.readouterr().out


def test_cases_after_the_budget_are_not_reached(fake, environment):
    code, results = run(fake("slow", "good"), environment, seconds=1)
    assert (code, [r.status for r in results]) == (1, ["out of time", "not reached"])


def test_a_table_of_good_cases_ends_with_0(fake, environment):
    assert run(fake("good"), environment)[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="Windows sends no SIGTERM to a process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_results_and_ends_the_running_case(tmp_path, environment, number):
    started = tmp_path / "started"
    hanging = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    (tmp_path / "good.py").write_text(ROW, encoding="utf-8")
    (tmp_path / "hanging.py").write_text(hanging, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from pixstack.benchmarks import suite
cases = [suite.Case(name, ({str(tmp_path)!r} + f"/{{name}}.py",), 60) for name in ("good", "hanging", "after")]
sys.exit(suite.main(["--json", {str(tmp_path / "results.json")!r}], cpu=cases))
""", encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [case["status"] for case in found["cases"]] == ["done", "ended early", "not reached"]
    assert len(found["cases"][0]["rows"]) == 3 and found["machine"]["torch"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_the_gpu_suite_refuses_where_there_is_no_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "gpu_name", lambda: "")
    said = suite.main(["--gpu", "--json", str(tmp_path / "results.json")])
    assert "needs a GPU" in said and not any(tmp_path.iterdir())


def test_a_word_that_names_no_case_is_refused():
    assert "pixart" in suite.main(["--case", "nothing", "--list"])


@pytest.mark.parametrize("kind", [[], ["--gpu"]])
def test_every_case_names_a_benchmark_and_options_that_it_has(kind, capsys):
    assert suite.main([*kind, "--dry"]) == 0
    for line in capsys.readouterr().out.splitlines():
        _, file, *options = line.split()
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in options if option.startswith("--")), line


def test_the_table_of_a_run_is_put_between_the_markers(fake, environment):
    _, results = run(fake("good", "bad"), environment)
    plain = [vars(result) for result in results]
    where = {"cpu": "A CPU", "threads": 2, "gpu": "", "torch": "9.9"}
    text = suite.table(plain, where, "2020-01-02")
    assert "2020-01-02 on A CPU, 2 threads; torch 9.9" in text
    assert "| toy, size 1, float32 | peer | 2.00 (2.00 to 2.00) | 1 |" in text
    assert "n = 2.00 of ours, 2.00 of peer" in text and "| bad | `python " in text and "| failed" in text
    unequal = {**plain[0], "rows": [{**plain[0]["rows"][0], "equal": False}]}
    assert "**not equal**" in suite.table([unequal], where, "2020-01-02") and "not equal" not in text
    page = suite.put_in("a\n<!-- suite cpu: begin -->\nold\n<!-- suite cpu: end -->\nb\n", "cpu", text)
    assert page.startswith("a\n<!-- suite cpu: begin -->\nOne run") and page.endswith("<!-- suite cpu: end -->\nb\n")
    assert suite.put_in(page, "cpu", text) == page and "old" not in page


def test_a_run_writes_its_table_once_it_has_a_row(fake, environment, monkeypatch, tmp_path):
    page, options = tmp_path / "README.md", ["--write", "--json", str(tmp_path / "results.json")]
    monkeypatch.setattr(suite, "README", page)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    page.write_text("no marker", encoding="utf-8")
    assert "suite cpu: begin" in suite.main(options, cpu=fake("good"))
    old = "<!-- suite cpu: begin -->\nold\n<!-- suite cpu: end -->"
    page.write_text(old, encoding="utf-8")
    assert suite.main(options, cpu=fake("bad")) == 1 and page.read_text(encoding="utf-8") == old
    assert suite.main(options, cpu=fake("good")) == 0 and "| toy, size 4, float32 |" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_readme_has_the_markers_of_the_table(kind):
    assert suite.put_in(suite.README.read_text(encoding="utf-8"), kind, "a new table").count("a new table") == 1


def test_costs_are_fitted_over_one_axis_at_a_time():
    rows = [Row("toy", "peer", [size * batch**0.5], [size**2], axes={"size": size, "batch": batch}).as_json()
            for size in (1, 2) for batch in (1, 4)]
    found = suite.fitted(rows)
    assert len(found) == 4
    assert "size 1, 2, batch 1: time ~ size^n, n = 1.00 of ours, 2.00 of peer" in found[0]
    assert "batch 1, 4, size 1: time ~ batch^n, n = 0.50 of ours, 0.00 of peer" in "".join(found)
