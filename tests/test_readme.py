"""What the pages for people say is so: links lead somewhere, sizes are the table's, workflows and recipes are there."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from pixstack.tools import model_files
from pixstack.tools.workflow import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / folder / "README.md" for folder in ("assets", "benchmarks", "trainer"))]
FILES = {file.url: file for file in model_files.read() if file.url}


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_between_pages_leads_to_a_file_and_a_heading_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page if not path else (page.parent / unquote(path)).resolve()
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_gives_each_file_its_size_and_its_folder_from_the_table():
    cells = [cell for line in README.splitlines() if line.startswith("|") for cell in line.split("|")]
    listed = 0
    for part in (part for cell in cells for part in cell.split(";")):
        links = re.findall(r"\[[^]]+\]\((https://huggingface[^)]+)\) ([\d.]+ [GM]B)", part)
        folders = re.findall(r"in `(\w+)`", part)
        for url, size in links:
            assert (FILES[url].size, FILES[url].folder) == (size, folders[0]), url
            listed += 1
    assert listed > 15


TEMPLATES = {path.stem for path in (ROOT / "workflows").glob("*.json")}
NAMING = [*PAGES, *(ROOT / "web/docs").rglob("*.md"), *(ROOT / "workflows").glob("*.json")]


def test_the_readme_names_only_recipes_that_are_there():
    named = set(re.findall(r"`((?:pixart|pixelflow|pixelponder|ultrapixel)_\w+)`", README))
    assert named and named <= {path.stem for path in (ROOT / "trainer/recipes").rglob("*.*")}


@pytest.mark.parametrize("page", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_names_only_templates_that_are_there(page):
    """By their whole name between stars, or by their number, in a list too: templates 21, 22 and 23. Short names are
    for tests: nobody finds them in the gallery."""
    text = page.read_text(encoding="utf-8")
    assert not set(re.findall(r"\*(\w+)\*", text)) & set(shipped())
    assert {name.strip() for name in re.findall(r"\*(\d\d [A-Z][^*\n]+ - [^*\n]+)\*", text)} <= TEMPLATES
    lists = re.findall(r"\b[Tt]emplates? ((?:\d\d(?:, | and | or )?)+)", text)
    assert set(re.findall(r"\d\d", " ".join(lists))) <= {name[:2] for name in TEMPLATES}


def test_the_readme_names_templates_of_every_released_family():
    rows = [re.findall(r"\d\d", line.split("|")[2]) for line in README.splitlines() if 'src="workflows' in line]
    assert len(rows) == 5 and all(rows) and set(sum(rows, [])) <= {name[:2] for name in TEMPLATES}


def test_the_readme_comes_to_questions_before_900_words_and_its_pictures_are_small():
    assert len(README.partition("## Questions")[0].split()) < 900
    assert sum(path.stat().st_size for path in (ROOT / "assets/readme").iterdir()) < 300_000


def test_the_changes_and_the_citation_are_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_node_has_its_row_in_the_list_of_nodes():
    text = (ROOT / "NODES.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "web/docs").glob("*.md")}
    assert set(re.findall(r"\(web/docs/(\w+\.md)\)", text)) == pages
