"""Benchmarks are run by hand: what they ask of the package must still be there."""
import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def imported(tree: ast.AST) -> tuple[dict[str, ModuleType], list[str]]:
    """Modules of ours by the names that a file gives them, and names that it imports and that are not there."""
    modules, missing = {}, []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pixstack")):
            continue
        if node.module.startswith("pixstack.nodes"):
            continue  # only in a ComfyUI
        for name in node.names:
            try:
                found = import_module(f"{node.module}.{name.name}")
            except ModuleNotFoundError:
                found = getattr(import_module(node.module), name.name, None)
            if found is None:
                missing.append(f"{node.module}.{name.name}")
            elif isinstance(found, ModuleType):
                modules[name.asname or name.name] = found
    return modules, missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_benchmark_asks_of_the_package_is_there(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, missing = imported(tree)
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}  # arguments hide modules of their name
    bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    missing += [f"{node.value.id}.{node.attr}" for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                and node.value.id in modules.keys() - bound and not hasattr(modules[node.value.id], node.attr)]
    assert missing == []
