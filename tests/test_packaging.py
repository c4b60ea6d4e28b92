"""What the registry, ComfyUI-Manager and pip read about this package."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pixstack.tools.comfyui import find_comfyui

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMES_AS = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python-headless"}  # module -> what pip calls it
STANDARD = set(sys.stdlib_module_names) | {"tomllib"}  # Python 3.10 has none, and files import tomli there
# Used where they are installed.
OPTIONAL = {"triton", "flash_attn", "xformers", "ftfy", "bs4", "h5py", "diffusers", "datasets", "pyarrow",
            "ai_edge_litert", "kornia", "bitsandbytes", "wandb", "trackio", "deepspeed"}


def requirements(lines) -> set[str]:
    """Only the names, as pip compares them."""
    wanted = (line for line in lines if line.strip() and not line.startswith("#"))
    return {re.match(r"[A-Za-z0-9._-]+", line.strip())[0].lower().replace("_", "-") for line in wanted}


def imported(*folders) -> set[str]:
    """Packages that files of `folders` import, by pip's name; our own and Python's left out."""
    tops = set()
    for path in (p for folder in folders for p in ROOT.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                tops.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
    return {COMES_AS.get(top, top).lower().replace("_", "-") for top in tops - OPTIONAL - STANDARD}


def test_manager_and_registry_install_the_same():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == PROJECT["project"]["dependencies"]


def test_the_nodes_need_only_what_comfyui_brings_or_we_declare():
    comfyui = find_comfyui()
    brought = requirements((comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines())
    own_modules = {p.stem.replace("_", "-") for p in comfyui.iterdir()}
    undeclared = imported("nodes", "models_impl", "kernels") - brought - own_modules
    assert undeclared <= requirements(PROJECT["project"]["dependencies"])


def test_every_requirement_has_a_lower_and_an_upper_bound():
    lines = [*PROJECT["project"]["dependencies"], *sum(PROJECT["project"]["optional-dependencies"].values(), [])]
    unbounded = [line for line in lines if not re.fullmatch(r"[\w.-]+>=[\d.]+,<\d+(; .+)?", line)]
    assert unbounded == ["pixstack[optional]"]


def test_the_frontend_test_installs_what_was_checked_and_names_no_place_to_get_it():
    lock = json.loads((ROOT / "tests/frontend/package-lock.json").read_text(encoding="utf-8"))
    wanted = json.loads((ROOT / "tests/frontend/package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = {name.rpartition("node_modules/")[2]: one for name, one in lock["packages"].items() if name}
    assert {name: packages[name]["version"] for name in wanted} == wanted
    assert all(one["integrity"].startswith("sha512-") and "resolved" not in one for one in packages.values())


def test_the_trainer_needs_only_its_extra():
    extra = requirements(PROJECT["project"]["optional-dependencies"]["trainer"])
    assert imported("trainer", "models_impl", "kernels") - extra - {"tomli", "torchvision"} == set()


def test_nothing_that_the_host_owns_is_installed_by_us():
    assert not requirements(PROJECT["project"]["dependencies"]) & {"torch", "torchvision", "numpy", "transformers"}


def test_the_registry_gets_every_field_it_asks_for():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9_-]*", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == "GPL-3.0-or-later"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("GNU GENERAL PUBLIC LICENSE")
    assert project["urls"]["Repository"] == "https://github.com/pixstack/pixstack"
    assert (comfy["PublisherId"], comfy["DisplayName"]) == ("pixstack", "PixStack")
    assert comfy["requires-comfyui"] == ">=0.3.75"


def test_the_icon_lies_where_its_address_says():
    icon = PROJECT["tool"]["comfy"]["Icon"]
    assert (ROOT / icon.partition("/main/")[2]).is_file()


def test_comfyui_reads_our_metadata(host):
    pytest.importorskip("pydantic_settings", reason="ComfyUI reads pyproject.toml only where pydantic-settings is")
    from comfy_config import config_parser

    read = config_parser.extract_node_configuration(str(ROOT))
    assert (read.project.name, read.project.version) == ("pixstack", PROJECT["project"]["version"])
    assert read.project.supported_comfyui_version == ">=0.3.75"
    assert read.tool_comfy.display_name == "PixStack"
    assert not read.tool_comfy.web, "WEB_DIRECTORY names it, so that help pages follow the name of the folder"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def published_files() -> list[str]:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = tuple(line for line in lines if line and not line.startswith("#"))
    return [path for path in tracked() if not path.startswith(ignored)]


def test_published_sources_hold_only_characters_that_a_windows_console_can_print():
    """comfy-test's rule: a traceback or print of another one ends in UnicodeEncodeError in code page 1252."""
    for path in published_files():
        if path.endswith(".py"):
            for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
                assert line.encode("cp1252", errors="ignore").decode("cp1252") == line, f"{path}:{number} {line!a}"


def test_what_is_published_leaves_the_tests_out_and_the_trainer_in():
    files = published_files()
    published = {path.split("/")[0] for path in files}
    page = ("index.html", "uPlot.iife.min.js", "uPlot.LICENSE")
    assert {f"trainer/monitor/static/{name}" for name in page} <= set(files)
    pictures = {path for path in tracked() if path.startswith(("assets/pictures/", "web/docs/"))}
    assert pictures <= set(files), "Example Picture's menu and the help pages' pictures"
    assert {"__init__.py", "assets", "nodes", "models_impl", "trainer", "web", "workflows", "subgraphs",
            "package"} <= published
    assert not published & {"tests", "benchmarks", ".ci", "Makefile"}
