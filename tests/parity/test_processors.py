"""What every processor must compute alike, under the instructions of other processors than this one's.

They are chosen before torch is imported, so each setting is a pytest of its own process. Any other part of the tests
runs under them in the same way: CONTRIBUTING, "Running the tests".
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # torch's name of the instructions -> the variables by which torch, oneDNN and MKL keep to them
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
PART = ("tests/parity/test_parity.py", "--parity-dir", "tests/fixtures/parity",
        "tests/models/test_annotators.py::test_depth_has_the_picture_s_size_alone_and_in_a_batch")
CHILD = """
import sys
import pytest, torch
capability = torch.backends.cpu.get_cpu_capability()
assert capability == sys.argv[1], f"torch works with {capability} here, not with {sys.argv[1]}"
sys.exit(pytest.main(sys.argv[2:]))
"""


def can_have(instructions: str) -> bool:
    """Whether this machine can run them. torch does not ask when it is given them, and the process would end there."""
    return instructions == "DEFAULT" or getattr(torch.cpu, "_is_avx2_supported", lambda: False)()


@pytest.mark.parametrize("instructions", SETTINGS)
def test_the_parity_cases_hold_with_the_instructions_of(instructions, tmp_path):
    if not can_have(instructions):
        pytest.skip(f"this processor has no {instructions}")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "ATEN_CPU_"))}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, instructions, "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider",
         "--basetemp", str(tmp_path / "child"), *PART],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1", **SETTINGS[instructions]}, text=True, capture_output=True,
    )
    if child.returncode:
        variables = " ".join(f"{name}={value}" for name, value in SETTINGS[instructions].items())
        output = f"{child.stdout}\n{child.stderr}".strip()
        pytest.fail(f"with {variables} OMP_NUM_THREADS=1:\n{output}", pytrace=False)
