"""Imports point one way: kernels <- models_impl <- nodes, and kernels <- models_impl <- trainer. And ruff agrees."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pixstack.models_impl.annotators import depth
from pixstack.trainer import libraries

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # our folder -> our folders it may use
    "kernels": {"kernels"},
    "models_impl": {"models_impl", "kernels"},
    "trainer": {"trainer", "models_impl", "kernels"},
    "nodes": {"nodes", "models_impl", "kernels"},
}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"}
COMFYUI |= {"node_helpers", "nodes", "server"}


@cache
def nodes_of(path: str) -> list[ast.AST]:
    """All of a file's syntax tree."""
    return [*ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))]


def violations(source: str, path: str) -> list[str]:
    *package, _ = Path(path).parts
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            for target in {(*above, *(node.module or alias.name).split("."))[0] for alias in node.names}:
                if target not in MAY_IMPORT[package[0]]:
                    found.append(f"line {node.lineno}: {package[0]}/ may not import {target}/")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {name.split(".")[0] for name in names}
            if package[0] != "nodes" and tops & COMFYUI:
                found.append(f"line {node.lineno}: only nodes/ may import ComfyUI")
            elif tops & ({"pixstack", *MAY_IMPORT} - {"nodes"}):
                found.append(f"line {node.lineno}: our own folders are imported relatively")
    return found


def python_files(*folders) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for folder in folders for p in sorted(ROOT.glob(f"{folder}/**/*.py"))]


@pytest.mark.parametrize("path", python_files(*MAY_IMPORT))
def test_a_file_imports_only_what_its_folder_may(path):
    assert not violations((ROOT / path).read_text(encoding="utf-8"), path)


@pytest.mark.parametrize(
    "path, source, expected",
    [
        ("models_impl/toy/model.py", "from ...nodes import x", "models_impl/ may not import nodes/"),
        ("models_impl/toy/model.py", "def f():\n    from ... import trainer", "models_impl/ may not import trainer/"),
        ("kernels/toy.py", "from ..models_impl.layers import x", "kernels/ may not import models_impl/"),
        ("trainer/recipes/toy.py", "from ...nodes.host import x", "trainer/ may not import nodes/"),
        ("nodes/toy.py", "from ..trainer import loop", "nodes/ may not import trainer/"),
        ("nodes/toy.py", "from .. import tools", "nodes/ may not import tools/"),
        ("models_impl/toy/model.py", "import comfy.ops", "only nodes/ may import ComfyUI"),
        ("trainer/toy.py", "from nodes import NODE_CLASS_MAPPINGS", "only nodes/ may import ComfyUI"),
        ("nodes/toy.py", "from models_impl import layers", "imported relatively"),
        ("nodes/toy.py", "import pixstack.models_impl", "imported relatively"),
        ("trainer/toy.py", "import kernels.adaln", "imported relatively"),
    ],
)
def test_the_rule_fires_on_a_planted_violation(path, source, expected):
    (found,) = violations(source, path)
    assert expected in found


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "nodes/toy.py",
            "import nodes\nfrom comfy_api.latest import io\nfrom ..models_impl import toy\nfrom . import host",
        ),
        ("trainer/recipes/toy.py", "import torch\nfrom ...models_impl.toy import model\nfrom ..config import Config"),
        ("models_impl/toy/model.py", "from . import sampling\nfrom ..layers import x\nfrom ...kernels import adaln"),
    ],
)
def test_the_rule_lets_honest_imports_pass(path, source):
    assert not violations(source, path)


def imports_of(folder: str) -> dict[str, set[str]]:
    """Which modules of a folder each of its modules imports, at its top or inside a function."""
    files = python_files(folder)
    paths = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    graph = {}
    for module, path in paths.items():
        package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
        found = set()
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *(node.module.split(".") if node.module else [])])
                found |= {name if (name := f"{base}.{alias.name}") in paths else base for alias in node.names}
        graph[module] = found & paths.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        return found

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(m for m in reach[module] if module in reach[m]) for module in graph}
    return [set(group) for group in groups if group]


def floors(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports."""
    known: dict[str, list[str]] = {}

    def below(module: str) -> list[str]:
        if module not in known:
            known[module] = [module, *max((below(m) for m in graph[module]), key=len, default=[])]
        return known[module]

    return max((below(module) for module in graph), key=len)


def test_circles_and_floors_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [{"b", "c"}]
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tools"])
def test_no_modules_of_a_folder_import_each_other_in_a_circle(folder):
    assert not circles(imports_of(folder))


def test_the_trainer_has_at_most_nine_floors():
    chain = floors(imports_of("trainer"))
    assert len(chain) <= 9, " > ".join(chain)


def test_only_commands_import_what_imports_every_recipe():
    users = {module for module, found in imports_of("trainer").items() if "trainer.config.check" in found}
    assert users and all(module.startswith("trainer.cli.") for module in users), users


@pytest.mark.parametrize("path", python_files(*MAY_IMPORT, "tools"))
def test_no_function_is_longer_than_a_screen(path):
    functions = [node for node in nodes_of(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60]


@pytest.mark.parametrize("path", python_files("models_impl", "nodes", "trainer"))
def test_transformers_opens_folders_without_running_code_of_theirs(path):
    """Every from_pretrained has trust_remote_code=False from LOCAL, but diffusers' for a VAE, which runs none."""
    for call in nodes_of(path):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained":
            given = " ".join(ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None)
            assert given.endswith("LOCAL") or "VAE_KINDS" in ast.unparse(call) or "vae_config" in ast.unparse(call), \
                f"line {call.lineno}: {ast.unparse(call)}"


def test_the_ways_of_opening_folders_download_nothing_and_run_nothing():
    wanted = {"local_files_only": True, "trust_remote_code": False}
    assert libraries.LOCAL == depth.LOCAL == wanted


SHARED_NAMES = {"Recipe", "Model", "ModelConfig"}  # each a contract: of every recipe, of [model], of core's models


def test_a_class_name_has_one_meaning():
    files: dict[str, list[str]] = {}
    for path in python_files(*MAY_IMPORT):
        for node in nodes_of(path):
            if isinstance(node, ast.ClassDef):
                files.setdefault(node.name, []).append(path)
    assert not {name: paths for name, paths in files.items() if len(paths) > 1 and name not in SHARED_NAMES}


def test_the_root_imports_nothing_until_comfyui_asks():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in at_once] == ["import logging"]


def test_models_and_trainer_load_without_comfyui():
    files = [path for path in python_files("models_impl", "trainer") if not path.endswith("__main__.py")]
    names = ["pixstack." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files]
    script = (
        "import importlib, sys\n"
        "importlib.import_module('pixstack.tools.comfyui').prepare_torch()\n"  # transformers looks for torchvision
        f"for name in {names}: importlib.import_module(name)\n"
        f"assert not {COMFYUI} & set(sys.modules), {COMFYUI} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "package")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ruff_finds_nothing():
    check = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
