"""Shipped workflows draw the same pictures under ComfyUI's DynamicVRAM, whatever of the weights is on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dynamic_vram
import pytest
from conftest import ROOT, SHIPPED
from pixstack.tools.show_workflows import without_download

STOOD_IN = ("ultrapixel_2048", "ultrapixel_personalised", "pixelponder_lora")
"""What no workflow with embedded files has: the guide on core's Stage C, Stage A and B, core's own LoRAs on FLUX."""


DRAWN = (*(name for name, path in SHIPPED.items() if "annotators" not in name
           and without_download(json.loads(path.read_text(encoding="utf-8")))), *STOOD_IN)


@pytest.fixture(scope="module")
def drawn(host, tmp_path_factory):
    """drawn(way) -> what a ComfyUI of its own process, with DynamicVRAM or None, says about the workflows DRAWN."""
    if reason := dynamic_vram.missing():
        pytest.skip(reason)
    known = {}

    def run(way: str | None) -> dict:
        if way not in known:
            base = tmp_path_factory.mktemp(f"dynamic_{way}")
            done = python(way, dynamic_vram.__file__, base, *DRAWN)
            assert done.returncode == 0, done.stderr[-2000:]
            known[way] = json.loads(done.stdout.splitlines()[-1])
        return known[way]

    return run


def python(way: str | None, *arguments) -> subprocess.CompletedProcess:
    """A Python of its own, whose ComfyUI has DynamicVRAM in this way."""
    path = os.pathsep.join(filter(None, (str(ROOT / "package"), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, dynamic_vram.VARIABLE: way or "", "PYTHONPATH": path})


@pytest.mark.parametrize("way", dynamic_vram.WAYS)
def test_pictures_under_dynamic_vram_equal_those_without_it(drawn, way):
    plain, dynamic = drawn(None), drawn(way)
    assert plain["patchers"] == ["ModelPatcher"] and dynamic["patchers"] == ["ModelPatcherDynamic"]
    assert all(isinstance(pictures, list) and pictures for pictures in plain["pictures"].values()), plain
    assert dynamic["pictures"] == plain["pictures"]


@pytest.mark.parametrize("name", ["test_nodes_host_features.py", "test_lazy_weights.py"])
def test_what_comfyui_does_with_our_models_works_under_dynamic_vram(host, name):
    if reason := dynamic_vram.missing():
        pytest.skip(reason)
    done = python("evict", "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests/nodes" / name)
    assert done.returncode == 0, done.stdout[-3000:]
