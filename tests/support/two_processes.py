"""Runs of tiny_run.py by two processes that talk by gloo: `two_processes.py LIST.json`, {alone, jobs}. `alone` are runs
that this process does; each of the jobs {environment, runs, output} is done by two processes of their own, one after
the other. They are forks of this one, which has imported everything by then and has encoded the pictures: that takes
longer than the runs. tests/trainer/test_trainer_commands.py launches processes as a user does."""
import json
import os
import socket
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import tiny_pixart
import tiny_run
import tiny_ultrapixel
from accelerate.state import AcceleratorState


def main(alone: list[dict], jobs: list[dict]) -> int:
    with contextmanager(tiny_pixart.remembered)(), contextmanager(tiny_ultrapixel.remembered)():
        tiny_run.every(alone)
        AcceleratorState._reset_state(reset_partial_state=True)  # a fork is configured by its own environment
        return max(together(job) for job in jobs)


def together(job: dict) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [forked({**job["environment"], **told, "RANK": str(rank), "LOCAL_RANK": str(rank)}, job)
                for rank in (0, 1)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def forked(environment: dict[str, str], job: dict) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ.update(environment)
        sys.stdout = open(job["output"] if environment["RANK"] == "0" else os.devnull, "w", encoding="utf-8")
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed.ops  # its own way to add tensors up is compiled at its first use, which takes a minute

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        tiny_run.every(job["runs"])
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
