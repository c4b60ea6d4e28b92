"""`make soak`: thousands of broken files, wrong inputs and faults, and a table of what became of them.

    python tests/soak/soak.py [--minutes 40] [--part NAME[=SHARE] ...] [--share 1.0] [--seed 0]

Rows: what was tried. failed clean: refused in a sentence; recovered: it worked, or the next one did; wrong: a wrong
result, Python's words, or a process that died; frozen: not done in its time. Exits with 1 where one of the last two
columns is not zero. For Linux: every trial runs in a child of this process, within bounds of time and memory.
"""
from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("files", "data", "nodes", "faults", "server", "kills")
AT_ONCE = 2


def prepare_path():
    sys.path[:0] = [str(ROOT / name) for name in ("package", "tests", "tests/support", "tests/soak", "tests/parity")]


@cache
def started_host(folder: Path, stand_ins: Path):
    """A ComfyUI with small files behind every workflow, as the tests have it."""
    import bases
    import cascade_weights
    import conftest
    import dynamic_vram
    from pixstack.tools.host import Host

    host = Host(bases.filled(folder / "comfyui", stand_ins)).start()
    if way := dynamic_vram.wanted():
        dynamic_vram.begin(way)
    conftest.take_stand_ins()
    cascade_weights.shrink_core()
    return host


def sampled(share: float, seed: int):
    """chosen(number): whether a trial belongs to that share of all."""
    import random

    return lambda number: share >= 1 or random.Random(f"{seed} {number}").random() < share


def run_part(part: str, folder: Path, stand_ins: Path, share: float, seed: int, until: float):
    import conftest
    import soak_faults
    import soak_graphs
    import soak_kills
    import soak_loaders
    import soak_nodes
    import soak_runs
    import soak_server
    from trials import Table, supervised

    chosen = sampled(share, seed)
    if part == "server":
        return soak_server.trials(seed, max(16, int(200 * share)), until)
    if part == "kills":
        return supervised(lambda: soak_kills.trials(folder, seed, 100, chosen), until)
    host, table = started_host(folder, stand_ins), Table()
    if part == "files":
        table.merge(supervised(lambda: soak_loaders.of_nodes(host, seed, chosen), until))
        table.merge(supervised(lambda: soak_loaders.of_poses(host, folder, seed, 12 if share >= 1 else 3), until))
    elif part == "data":
        count = max(2, int(120 * share))
        table.merge(supervised(lambda: soak_loaders.of_lists(folder, seed, count), until))
        table.merge(supervised(lambda: soak_loaders.of_pictures(host, folder, seed, count), until))
        table.merge(supervised(lambda: soak_loaders.of_imports(folder, seed, count), until))
        table.merge(supervised(lambda: soak_runs.trials(folder, seed, max(2, count // 6), chosen), until))
        table.merge(supervised(lambda: soak_loaders.of_converted(folder, seed, chosen), until))
        table.merge(supervised(lambda: soak_loaders.of_lora_commands(folder, seed, chosen), until))
    else:
        workflows = soak_graphs.by_cost(host, conftest.WORKFLOWS if share >= 1 else [
            conftest.SHIPPED[name] for name in soak_server.NAMES])
        if part == "nodes":
            table.merge(supervised(lambda: soak_nodes.trials(host, workflows, seed, chosen), until))
        else:
            table.merge(supervised(lambda: soak_faults.trials(host, workflows, seed, 3, chosen), until))
    return table


def in_this_process(args) -> int:
    """Some parts, one after the other; the table goes to the parent as JSON."""
    import json

    from trials import Table

    faulthandler.enable()
    logging.getLogger().setLevel(logging.CRITICAL + 1)
    if args.verbose:
        logger = logging.getLogger("soak")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(logging.StreamHandler())
    warnings.simplefilter("ignore")
    until, table = time.monotonic() + 60 * args.minutes, Table()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        stand_ins = Path(args.stand_ins or folder)
        for part, share in args.part:
            table.merge(run_part(part, Path(folder), stand_ins, args.share if share is None else share, args.seed,
                                 until))
    print(f"\n{table}", flush=True)
    print("\n".join(table.complaints), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"counts": table.counts, "complaints": table.complaints}))
    return 0 if table.good else 1


def part_and_share(word: str) -> tuple[str, float | None]:
    name, _, share = word.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return name, float(share) if share else None


def all_parts(args) -> int:
    """Every part in a process of its own, two at a time."""
    import json

    prepare_path()
    from trials import Table

    table, waiting, running = Table(), list(PARTS), {}
    started = time.monotonic()
    until = started + 60 * args.minutes
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "package")}
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                part = waiting.pop(0)
                minutes = max(0.1, (until - time.monotonic()) / 60)
                running[part] = subprocess.Popen(
                    [sys.executable, __file__, "--part", part, "--minutes", str(minutes), "--share", str(args.share),
                     "--seed", str(args.seed), "--out", f"{folder}/{part}.json", "--stand-ins", folder,
                     *(["--verbose"] if args.verbose else [])],
                    env=environment, stdout=subprocess.DEVNULL, stderr=None if args.verbose else subprocess.DEVNULL)
            for part, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[part]
                result = Path(folder) / f"{part}.json"
                if result.exists():
                    found = json.loads(result.read_text())
                    more = Table(complaints=found["complaints"])
                    for kind, counts in found["counts"].items():
                        more.counts[kind] = Counter(counts)
                    table.merge(more)
                else:
                    table.add(part, "the whole part", "wrong", f"its process ended with {process.returncode}")
            time.sleep(0.2)
    print("\n".join([str(table), f"in {(time.monotonic() - started) / 60:.1f} minutes", *table.complaints]))
    return 0 if table.good else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="no trial is begun later; default 40")
    parser.add_argument("--part", nargs="+", type=part_and_share, metavar="NAME[=SHARE]",
                        help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--stand-ins", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="name every trial on stderr")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the threads of a parent are not there in its children, which wait for them
    if not hasattr(os, "fork"):
        print("The soak needs os.fork, which this system does not have: run it on Linux.")
        return 1
    prepare_path()
    return in_this_process(args) if args.part else all_parts(args)


if __name__ == "__main__":
    sys.exit(main())
