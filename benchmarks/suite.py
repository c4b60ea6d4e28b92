"""The suite: all benchmarks in turn, cheapest first, at small sizes on a CPU or at released sizes on a GPU.

Each case is the command line of one benchmark in a process of its own with a deadline of its own. A case that fails or
runs out of time is recorded with its last lines, and the next one starts. With --minutes, cases that begin after that
are recorded as not reached, and the running one is ended then. The results are written after every case, so a suite
that is ended early keeps what it has.

    python benchmarks/suite.py [--gpu] [--case WORD ...] [--minutes N] [--list] [--dry] [--write] [--json FILE]

`make bench`, `make bench ARGS="--case pixart"` and `make bench GPU=1` call it.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

from pixstack.benchmarks.report import ROWS, exponent, spread  # noqa: E402 - the repository gets its name first

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / ".comfyui" / "bench" / "results.json"
GPU_MINUTES = 9.0
LAST_LINES = 15
GPU_NAME = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Case:
    name: str
    arguments: tuple[str, ...]
    """File and options, after the Python."""
    deadline: float
    """Seconds."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, *self.arguments]

    def __str__(self) -> str:
        return "python " + shlex.join(self.arguments)


@dataclass
class Result:
    name: str
    command: str
    status: str = "not reached"
    """done, failed, out of time, ended early, not reached"""
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)
    """The end of what it printed, where it is not done."""


def case(name: str, deadline: float, command: str) -> Case:
    file, *options = command.split()
    return Case(name, (f"benchmarks/{file}", *options), deadline)


CPU = (
    case("pixelflow", 600, "pixelflow.py --steps 2 --repeats 3 --c2i-size 128 --t2i-size 64"),
    case("ultrapixel stage_b", 600, "ultrapixel.py --case stage_b --stage-b-size 512 --repeats 2"),
    case("ultrapixel stage_a", 600, "ultrapixel.py --case stage_a --size 256 512 --sides untiled ours --repeats 2"),
    case("trainer lora", 900, "trainer.py --case lora --size 128 --steps 1 --rounds 3"),
    case("trainer pixelflow", 900, "trainer.py --case pixelflow --size 64 --steps 1 --rounds 3"),
    case("trainer full", 900, "trainer.py --case full --size 128 --steps 1 --rounds 3"),
    case("trainer controlnet", 900, "trainer.py --case controlnet --size 128 --steps 1 --rounds 3"),
    case("pixart compiled", 900, "pixart.py --size 128 --repeats 3 --compile"),
    case("ultrapixel stage_c", 600, "ultrapixel.py --case stage_c --stage-c-size 512 768 --repeats 2"),
    case("ultrapixel guide", 600, "ultrapixel.py --case guide --guide-size 512 --repeats 2"),
    case("pixelponder", 900, "pixelponder.py --size 256 --text 128 --repeats 2"),
    case("pixart", 900, "pixart.py --size 128 256 512 --repeats 3"),
)
GPU = (
    case("ultrapixel stage_c", 60, "ultrapixel.py --case stage_c"),
    case("ultrapixel stage_b", 60, "ultrapixel.py --case stage_b"),
    case("ultrapixel guide", 60, "ultrapixel.py --case guide"),
    case("pixart", 120, "pixart.py"),
    case("pixart compiled", 150, "pixart.py --size 1024 --batch 1 --compile"),
    case("pixelflow c2i", 120, "pixelflow.py --case c2i"),
    case("pixelponder", 120, "pixelponder.py"),
    case("trainer lora", 90, "trainer.py --case lora"),
    case("trainer full", 90, "trainer.py --case full"),
    case("trainer pixelflow", 90, "trainer.py --case pixelflow"),
    case("trainer controlnet", 90, "trainer.py --case controlnet"),
    case("ultrapixel stage_a", 120, "ultrapixel.py --case stage_a --sides untiled ours"),
    case("pixelflow t2i", 300, "pixelflow.py --case t2i"),
)
"""At the sizes and in the dtype that each file chooses on CUDA."""


# --- Running

class Ended(BaseException):
    """The suite was asked to end by a signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


@contextmanager
def signals_raise() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Ended`. Inside, a second one is ignored while the first is answered."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def answer(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    before = {number: signal.signal(number, answer) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(cases: Sequence[Case], seconds: float | None, environment: dict, save: Callable[[list[Result]], None]) -> int:
    """Runs the cases in their order, and saves after each. seconds: those of the whole suite, None: no limit.
    -> exit code: 0, 1 where a case is not done, 128 + the signal that ended the suite"""
    results = [Result(one.name, str(one)) for one in cases]
    end = None if seconds is None else time.monotonic() + seconds
    with signals_raise():
        try:
            save(results)
            for one, result in zip(cases, results, strict=True):
                left = one.deadline if end is None else min(one.deadline, end - time.monotonic())
                if left > 0:
                    print(f"\n== {one.name}: {one} (at most {left:.0f} s)", flush=True)
                    run_case(one, left, environment, result)
                    save(results)
                print(f"-- {one.name}: {result.status}" + (f" in {result.seconds:.0f} s" if result.seconds else ""))
                for line in fitted(result.rows):
                    print(f"   {line}", flush=True)
        except Ended as ended:
            save(results)
            print(f"\nEnded by {signal.Signals(ended.args[0]).name}; what was measured is kept.", flush=True)
            return ended.code
    return int(any(result.status != "done" for result in results))


def run_case(one: Case, seconds: float, environment: dict, result: Result):
    """Runs one case and fills its result, also where it is ended early."""
    lines: deque[str] = deque(maxlen=LAST_LINES)
    result.status, start = "ended early", time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        process = None
        try:
            process = subprocess.Popen(
                one.command, cwd=ROOT, env={**environment, ROWS: str(rows)}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
                start_new_session=os.name == "posix")
            reader = threading.Thread(target=echo, args=(process.stdout, lines), daemon=True)
            reader.start()
            try:
                code = process.wait(timeout=seconds)
                result.status = "done" if code == 0 else "failed"
                reader.join(timeout=5)
                if code:
                    lines.append(f"exit code {code}")
            except subprocess.TimeoutExpired:
                result.status = "out of time"
        finally:
            if process is not None:
                end_process(process)
            result.seconds = round(time.monotonic() - start, 1)
            result.rows = read_rows(rows)
            result.last_lines = [] if result.status == "done" else list(lines)


def echo(stream, lines: deque[str]):
    for line in stream:
        lines.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def end_process(process: subprocess.Popen):
    """Ends the process with all that it started."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its session, which start_new_session made
        except (ProcessLookupError, PermissionError):  # nothing is left of it
            pass
    elif process.poll() is None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    process.wait()


def read_rows(path: Path) -> list[dict]:
    """Rows of a case; the last line may have been cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# --- Results

def machine(gpu: bool) -> dict:
    """What the figures belong to, without the name of the machine."""
    names = [line.partition(":")[2].strip() for line in cpu_information() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "gpu": gpu_name() if gpu else "",
        "torch": version("torch"),
    }


def cpu_information() -> list[str]:
    path = Path("/proc/cpuinfo")  # only on Linux
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def gpu_name() -> str:
    """Empty where no CUDA is. Asked in another process, for CUDA takes memory of each process that uses it."""
    done = subprocess.run([sys.executable, "-c", GPU_NAME], capture_output=True, text=True)
    return done.stdout.strip().rpartition("\n")[2] if done.returncode == 0 else ""


def write_whole(path: Path, text: str):
    """Replaces the file at once, so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def fitted(rows: Sequence[dict]) -> list[str]:
    """Sentences on how the cost grows with an axis, from rows of one case that differ in nothing else."""
    groups: dict[tuple, dict[float, dict]] = {}
    for row in rows:
        for axis, value in row["axes"].items():
            others = tuple(sorted((name, n) for name, n in row["axes"].items() if name != axis))
            groups.setdefault((row["what"], row["details"], row["peer"], axis, others), {})[value] = row
    sentences = []
    for (what, _, peer, axis, others), found in groups.items():
        if len(found) < 2:
            continue
        sizes = sorted(found)
        ours, theirs = ([statistics.median(found[size][side]) for size in sizes] for side in ("ours", "theirs"))
        at = "".join(f", {name} {value:g}" for name, value in others)
        sentences.append(f"{what}, {axis} {', '.join(f'{size:g}' for size in sizes)}{at}: time ~ {axis}^n, "
                         f"n = {exponent(sizes, ours):.2f} of ours, {exponent(sizes, theirs):.2f} of {peer}")
    return sentences


def described(row: dict) -> str:
    return ", ".join([row["what"], *(f"{axis} {n:g}" for axis, n in row["axes"].items()), row["details"]]).strip(", ")


def table(results: Sequence[dict], where: dict, date: str) -> str:
    """The generated section of README.md."""
    processor = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    lines = [
        f"One run of {date} on {processor}; torch {where['torch']}. Speed is the time of the peer / ours (above 1 = "
        "ours is faster), median (least to most) of the rounds; memory is the peak of ours / of the peer; difference "
        "is the greatest one between the results, in standard deviations."
        + ("" if where["gpu"] else " Time is that of the processor, all threads together, not of the clock."),
        "",
        "| what | against | speed | seconds of ours | memory, GiB | difference | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            memory = " / ".join(f"{n:.3f}" for n in row["memory"]) if row["memory"] else ""
            different = "" if row["difference"] is None else f"{row['difference']:.1e}"
            note = "; ".join(filter(None, ("" if row["equal"] else "**not equal**", row["note"])))
            cells = (described(row), row["peer"], spread(row["ratios"]), f"{row['seconds']:.3g}", memory, different,
                     note)
            lines.append("| " + " | ".join(cells) + " |")
    growth = [f"- {result['name']}: {line}." for result in results for line in fitted(result["rows"])]
    if growth:
        lines += ["", *growth]
    lines += ["", "| case | command | state |", "|---|---|---|"]
    for result in results:
        state = result["status"] + (f", {result['seconds']:.0f} s" if result["seconds"] else "")
        lines.append(f"| {result['name']} | `{result['command']}` | {state} |")
    return "\n".join(lines)


def put_in(page: str, kind: str, text: str) -> str:
    """The page with the text between the markers of a kind, cpu or gpu. Raises ValueError where they are not there."""
    begin, end = f"<!-- suite {kind}: begin -->", f"<!-- suite {kind}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"benchmarks/README.md needs the lines {begin} and {end} once each, in this order.")
    before, after = page.partition(begin)[0], page.partition(end)[2]
    return f"{before}{begin}\n{text}\n{end}{after}"


# --- The command

def chosen(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Cases whose name contains one of the words; all without words. Raises ValueError for a word that names none."""
    for word in words:
        if not any(word in one.name for one in cases):
            raise ValueError(f"--case {word}: there is none, only {', '.join(one.name for one in cases)}.")
    return [one for one in cases if not words or any(word in one.name for word in words)]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="released sizes in bfloat16 on CUDA (make bench GPU=1)")
    parser.add_argument("--case", nargs="+", default=[], metavar="WORD", help="only cases whose name contains a word")
    parser.add_argument("--minutes", type=float, help=f"of the whole suite; {GPU_MINUTES:g} with --gpu, else no limit")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and their deadlines")
    parser.add_argument("--dry", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--write", action="store_true", help="put the table of this run into benchmarks/README.md")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="of the results")
    args = parser.parse_args(given)
    if args.gpu and args.minutes is None:
        args.minutes = GPU_MINUTES
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: it must be above 0")
    return args


def main(given: Sequence[str] | None = None, cpu: Sequence[Case] = CPU, gpu: Sequence[Case] = GPU) -> int | str:
    """-> exit code, or a sentence that says why nothing was run"""
    args = arguments(given)
    kind = "gpu" if args.gpu else "cpu"
    try:
        cases = chosen(gpu if args.gpu else cpu, args.case)
        if args.write:
            put_in(README.read_text(encoding="utf-8"), kind, "")  # refused now, not when all has run
    except ValueError as error:
        return str(error)
    if args.list or args.dry:
        for one in cases:
            print(one if args.dry else f"{one.name} (at most {one.deadline:g} s)")
        return 0
    where, date = machine(args.gpu), datetime.now(timezone.utc).strftime("%Y-%m-%d")
    if args.gpu and not where["gpu"]:
        return ("GPU=1 needs a GPU that torch can use through CUDA, and torch finds none here. "
                "Without GPU=1 the suite runs at small sizes on the CPU.")
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if not args.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU, the benchmarks would choose it

    def save(results: list[Result]):
        plain = [asdict(result) for result in results]
        write_whole(args.json, json.dumps({"date": date, "machine": where, "cases": plain}, indent=1))
        if args.write and any(result.rows for result in results):  # until then the last run's table stays
            page = put_in(README.read_text(encoding="utf-8"), kind, table(plain, where, date))
            write_whole(README, page)

    code = run(cases, None if args.minutes is None else 60 * args.minutes, environment, save)
    print(f"results: {args.json}")
    return code


if __name__ == "__main__":
    sys.exit(main())
