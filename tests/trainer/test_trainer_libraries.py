"""What the trainer asks of other libraries beyond what they document is listed in one file, and there."""
import ast
import inspect
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from pixstack.trainer.libraries import PRIVATE

TRAINER = Path(__file__).resolve().parents[2] / "trainer"
LISTED = {one.module for one in PRIVATE} | {one.name.split(".")[-1] for one in PRIVATE}


@pytest.mark.parametrize("module, name, why", PRIVATE, ids=[one.name for one in PRIVATE])
def test_what_is_asked_of_a_library_is_still_there(module, name, why):
    if not find_spec(module.split(".")[0]):
        pytest.skip(f"{module} is not installed")
    library = import_module(module)
    try:
        reduce(getattr, name.split("."), library)
    except AttributeError:
        assert name in inspect.getsource(library), f"{module} has no {name} any more, which was asked for {why}"


def private_uses(source: str) -> set[str]:
    """Attributes and modules of others whose name begins with one underscore."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
            if any(part.startswith("_") for part in node.module.split(".")):
                found.add(node.module)
    return found


def test_private_names_are_used_where_they_are_listed():
    used = {path.relative_to(TRAINER).as_posix(): private_uses(path.read_text(encoding="utf-8"))
            for path in sorted(TRAINER.rglob("*.py"))}
    asked = set().union(*used.values()) - {"_C"}
    assert asked <= LISTED, asked - LISTED
    elsewhere = {path for path, names in used.items() if names} - {"libraries.py"}
    assert elsewhere == {"training/cost.py"}, elsewhere  # whose modes are classes to inherit from
