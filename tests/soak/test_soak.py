"""A small part of `make soak`, by the command itself; and the soak's own judgement."""
import os
import subprocess
import sys
from pathlib import Path

import bases
import pytest
import torch
import trials

SOAK = Path(__file__).with_name("soak.py")
pytestmark = pytest.mark.long
# What needs the same ComfyUI in one process.
PARTS = (("files=0.01", "data=0.008", "nodes=0.01", "faults=0.04"), ("server=0.04", "kills=0.012"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the soak bounds its processes as Linux can")
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_nothing_is_wrong_or_frozen_in_a_part_of_the_soak(parts, tmp_path_factory):
    command = [sys.executable, str(SOAK), "--part", *parts, "--minutes", "4",
               "--stand-ins", str(bases.shared_folder(tmp_path_factory.getbasetemp()))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " wrong " in done.stdout and "\nall " in done.stdout


def test_a_trial_that_hangs_dies_or_speaks_python_is_told_from_the_others():
    def every():
        yield trials.Trial("a", "refused", lambda: _raise(ValueError("a.pth is damaged: download it again.")))
        yield trials.Trial("a", "works", lambda: trials.RECOVERED)
        yield trials.Trial("a", "Python's words", lambda: _raise(KeyError("weight")))
        yield trials.Trial("a", "no sentence", lambda: _raise(ValueError("bad")))
        yield trials.Trial("a", "hangs", lambda: _hang(), limit=0.5)
        yield trials.Trial("b", "dies", lambda: os._exit(9))
        yield trials.Trial("b", "takes all memory", lambda: _fill())
        yield trials.Trial("b", "works", lambda: trials.RECOVERED)

    table = trials.supervised(every)
    assert {kind: dict(counts) for kind, counts in table.counts.items()} == {
        "a": {trials.CLEAN: 1, trials.RECOVERED: 1, trials.WRONG: 2, trials.FROZEN: 1},
        "b": {trials.WRONG: 2, trials.RECOVERED: 1}}
    assert not table.good and len(table.complaints) == 5


def _raise(error):
    raise error


def _hang():
    while True:
        pass


def _fill():
    torch.ones(2**40)
