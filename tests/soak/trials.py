"""Trials that must end in time: run in a child process, one after another, by a parent that sees what becomes of it."""
from __future__ import annotations

import json
import logging
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

CLEAN, RECOVERED, WRONG, FROZEN = "failed clean", "recovered", "wrong", "frozen"
OUTCOMES = (CLEAN, RECOVERED, WRONG, FROZEN)
GENERATOR = "generator"
MEMORY = 6 * 2**30  # bytes that the trials may take beyond what the parent has
OURS = (ValueError, OSError, MemoryError)
"""What a person may be shown: with a sentence. Everything else is Python's word for a mistake of ours."""
PYTHONS_WORDS = re.compile(
    r"object has no attribute|NoneType|not subscriptable|not iterable|unexpected keyword|positional argument|"
    r"list index|Traceback|unhashable|not callable|unsupported operand|shapes cannot be multiplied|must match the size|"
    r"Expected .* to be|The size of tensor|invalid for input of size|assert"
)


class Wrong(Exception):
    """What a trial found to be wrong."""


@dataclass(frozen=True)
class Trial:
    kind: str
    """The row of the table that it belongs to."""
    name: str
    """What is tried, enough to do it again."""
    run: Callable[[], str]
    """Returns CLEAN or RECOVERED, raises Wrong; any other exception is judged by `verdict`."""
    limit: float = 30.0
    """Seconds after which it counts as frozen."""


@dataclass
class Table:
    counts: dict[str, Counter] = field(default_factory=dict)
    """Row -> how many trials had each outcome."""
    complaints: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str, outcome: str, why: str = ""):
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome in (WRONG, FROZEN):
            self.complaints.append(f"{outcome}: {kind}: {name}: {why}"[:1200])

    def merge(self, other: Table):
        for kind, counts in other.counts.items():
            self.counts.setdefault(kind, Counter()).update(counts)
        self.complaints += other.complaints

    @property
    def total(self) -> Counter:
        return sum(self.counts.values(), Counter())

    @property
    def good(self) -> bool:
        return bool(self.counts) and not self.total[WRONG] and not self.total[FROZEN]

    def __str__(self) -> str:
        rows = [*sorted(self.counts.items()), ("all", self.total)]
        width = max(len(kind) for kind, _ in rows)
        head = f"{'class':{width}}  {'tried':>6}" + "".join(f"  {outcome:>12}" for outcome in OUTCOMES)
        return "\n".join([head] + [
            f"{kind:{width}}  {counts.total():>6}" + "".join(f"  {counts[outcome]:>12}" for outcome in OUTCOMES)
            for kind, counts in rows])


def is_sentence(text: str) -> bool:
    """Whether an error says something to a person: words with an end, none of them Python's own."""
    text = text.strip()
    ends = text[-1:] in ".?!)" or "\n" in text  # a list of problems ends as its lines do
    return len(text.split()) >= 4 and ends and len(text) < 4000 and not PYTHONS_WORDS.search(text)


def verdict(error: BaseException) -> tuple[str, str]:
    """(outcome, why) of a trial that ended in an exception."""
    if isinstance(error, Wrong):
        return WRONG, str(error)
    if isinstance(error, OURS) and is_sentence(str(error)):
        return CLEAN, str(error)
    where = "".join(f" ({at.filename}:{at.lineno})" for at in traceback.extract_tb(error.__traceback__)[-1:])
    return WRONG, f"{type(error).__name__}: {error}{where}"


def supervised(trials: Callable[[], Iterable[Trial]], until: float = float("inf")) -> Table:
    """The table of the trials, which `trials` must give in the same order whenever it is called. They run in a child
    process; where one is frozen or kills it, the next child goes on behind it. until: time.monotonic() after which no
    further one is begun."""
    table, start = Table(), 0
    while start is not None and time.monotonic() < until:
        start = _one_child(trials, start, until, table)
    return table


def _one_child(trials, start: int, until: float, table: Table) -> int | None:
    """The number of the trial to go on with, None when all are done."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(read_end)
        _child(trials, start, until, os.fdopen(write_end, "w", buffering=1))
    os.close(write_end)
    current = [start, GENERATOR, "before its first trial", 300.0]  # number, kind, name, limit
    for line in _lines(read_end, current):
        if line is None:
            os.kill(child, signal.SIGKILL)
            break
        event, *values = json.loads(line)
        if event == "begin":
            current[:] = values
            logging.getLogger("soak").debug("%s: %s", values[1], values[2])
        elif event == "end":
            table.add(current[1], current[2], *values)
            current[:] = [current[0] + 1, GENERATOR, f"after {current[2]}", 300.0]
        elif event == "done":
            os.waitpid(child, 0)
            return None
    _, status = os.waitpid(child, 0)
    number, kind, name, limit = current
    if line is None:
        table.add(kind, name, FROZEN, f"not done in {limit:.0f} s")
    else:
        table.add(kind, name, WRONG, f"the process ended (status {status})")
    return number + 1 if kind != GENERATOR else None


def _lines(pipe: int, current: list) -> Iterator[str | None]:
    """The lines of a pipe; None where none came in the seconds at the end of `current`."""
    rest = b""
    with os.fdopen(pipe, "rb", buffering=0) as file:
        while True:
            if not select.select([file], [], [], current[-1])[0]:
                yield None
                return
            if not (more := file.read(65536)):
                return
            *whole, rest = (rest + more).split(b"\n")
            yield from (line.decode() for line in whole)


def _child(trials, start: int, until: float, out):
    _bound_memory()
    status = 1
    try:
        for number, trial in enumerate(trials()):
            if number < start:
                continue
            if time.monotonic() > until:
                break
            print(json.dumps(["begin", number, trial.kind, trial.name, trial.limit]), file=out)
            try:
                outcome, why = trial.run(), ""
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - a SystemExit or whatever else is judged like the others
                outcome, why = verdict(error)
            print(json.dumps(["end", outcome, why]), file=out)
        print(json.dumps(["done"]), file=out)
        status = 0
    except BaseException:  # noqa: BLE001 - this process must not go on as if it were its parent
        traceback.print_exc()
    finally:
        out.flush()
        sys.stderr.flush()
        os._exit(status)


def _bound_memory():
    """What a hostile file asks for is refused by the system instead of taking the machine's memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, resource.RLIM_INFINITY))
