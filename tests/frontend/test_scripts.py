"""What our scripts may do in a page that they share with ComfyUI, other packs and whatever names files have."""

import re

import pytest
from conftest import ROOT

SCRIPTS = [path for folder in ("web", "trainer/monitor/static") for path in sorted((ROOT / folder).glob("**/*.*js"))
           if not path.name.startswith("uPlot")]
MARKUP = re.compile(r"\b(innerHTML|outerHTML|insertAdjacentHTML|srcdoc|document\.write\w*|createContextualFragment"
                    r"|parseFromString|setHTMLUnsafe|eval|new Function)\b")
GLOBALS = re.compile(r"\b(window|globalThis|self|top)\.[\w.]+\s*=[^=]|\b(LiteGraph|LGraph\w*|app|api)(\.\w+)*\."
                     r"prototype[\w.]*\s*=[^=]|localStorage|sessionStorage|document\.cookie")
ELSEWHERE = re.compile(r"""["'`](https?:)?//""")


def code(path) -> list[tuple[int, str]]:
    """Its lines, without whole comments."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [(number, line) for number, line in lines if not re.match(r"\s*(//|/?\*)", line)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("rule", [MARKUP, GLOBALS, ELSEWHERE], ids=["markup", "globals", "elsewhere"])
def test_a_script_makes_no_markup_of_text_and_changes_nothing_that_all_share(path, rule):
    found = [f"{path.name}:{number}: {line.strip()}" for number, line in code(path) if rule.search(line)]
    assert not [line for line in found if "http://www.w3.org/" not in line]


@pytest.mark.parametrize("path", sorted((ROOT / "web").glob("**/*.js")), ids=lambda path: path.name)
def test_extensions_have_our_name(path):
    """The frontend loads every .js, and refuses a name that is there already. Helpers are .mjs."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"registerExtension\(\{\s*name: '([^']+)'", text)
    assert len(names) == text.count("registerExtension(") == 1 and names[0].startswith("PixStack.")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_message_is_believed_only_by_its_source_and_origin(path):
    text = path.read_text(encoding="utf-8")
    for listener in re.findall(r"addEventListener\('message',.*?\n    \}\)", text, re.DOTALL):
        assert "event.source" in listener and "event.origin" in listener
    assert not re.search(r"postMessage\([^)]*['\"]\*['\"]", text)
