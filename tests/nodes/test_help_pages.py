"""The help pages of nodes: what each one names is there, in every language that has them."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from pixstack.tools.make_help_pictures import FIGURES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
SECTIONS = {  # language -> headings of what goes in, comes out, is to be tried and goes wrong
    "en": ("What goes in", "What comes out", "Three things to try", "Common faults"),
    "zh": ("输入", "输出", "试试看", "常见问题"),
}
PICTURE = re.compile(r"!\[([^]]+)\]\(([^)]+)\)")
LINK = re.compile(r"\]\(([^)]+)\)")
ITALIC = re.compile(r"(?<!\*)\*([^*\n]+(?:\n[^*\n]+)?)\*(?!\*)")  # also across the end of a line
ERROR = re.compile(r"^- \*([^*]+)\*", re.MULTILINE)  # at the beginning of an entry, words of a message of ours
WORKFLOW = re.compile(r"[0-9]{2} .+")
FAMILIES = ("PixArt ", "PixelFlow ", "PixelPonder ", "UltraPixel ")


@pytest.fixture(scope="module")
def ours(host):
    """Schemas of our nodes by id."""
    known = import_module("nodes").NODE_CLASS_MAPPINGS
    return {name: node.define_schema() for name, node in known.items() if name.startswith("PixStack_")}


@pytest.fixture(params=sorted(SECTIONS))
def language(request) -> str:
    return request.param


def path_of(name: str, language: str) -> Path:
    """Where both frontends look for a node's page: first for that of their language, then for the English one."""
    return DOCS / f"{name}.md" if language == "en" else DOCS / name / f"{language}.md"


@pytest.fixture
def pages(ours, language) -> dict[str, str]:
    missing = [str(path_of(name, language)) for name in ours if not path_of(name, language).is_file()]
    assert not missing
    return {name: path_of(name, language).read_text(encoding="utf-8") for name in ours}


def inputs_of(schema) -> set[str]:
    """Slots that grow where ComfyUI can go by their common name."""
    return {part.id.partition(".")[0] for part in schema.inputs}


@pytest.fixture
def names(ours, language) -> dict[str, dict]:
    """node -> its title, {input: what it is called}, {output: what it is called}, in the language."""
    if language == "en":
        return {name: dict(title=schema.display_name, inputs={part: "" for part in inputs_of(schema)},
                           outputs={part.display_name or part.get_io_type(): "" for part in schema.outputs})
                for name, schema in ours.items()}
    translated = json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))
    return {name: dict(title=translated[name]["display_name"],
                       inputs={part: translated[name]["inputs"][part].get("name", "") for part in inputs_of(schema)},
                       outputs={part.display_name or part.get_io_type(): translated[name]["outputs"][str(i)]["name"]
                                for i, part in enumerate(schema.outputs)})
            for name, schema in ours.items()}


def section(page: str, heading: str) -> str:
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def listed(text: str, language: str) -> list[tuple[str, str]]:
    """(name, what it is called in the language) of what stands before the colon of each entry of a list."""
    heads = re.findall(r"^- ((?:`[^`]+`(?:（[^）]+）)?(?:, |、)?)+)(?:, [^:]*)?[:：]", text, re.MULTILINE)
    return [pair for head in heads for pair in re.findall(r"`([^`]+)`(?:（([^）]+)）)?", head)]


def test_a_page_begins_with_the_name_of_its_node(pages, names):
    for name, page in pages.items():
        assert page.split("\n", 1)[0] == "# " + re.sub(r" ?[（(].*", "", names[name]["title"]), name


def test_a_page_has_its_four_sections_in_order(pages, language):
    for name, page in pages.items():
        found = [heading for heading in re.findall(r"^## (.+)$", page, re.MULTILINE) if heading in SECTIONS[language]]
        assert found == list(SECTIONS[language]), name


@pytest.mark.parametrize("side", ("inputs", "outputs"))
def test_a_page_lists_every_input_and_output_and_no_other(pages, names, language, side):
    heading = SECTIONS[language][("inputs", "outputs").index(side)]
    for name, page in pages.items():
        found = listed(section(page, heading), language)
        assert sorted(found) == sorted(names[name][side].items()), f"{name}: {heading}"


def test_there_are_three_things_to_try(pages, language):
    for name, page in pages.items():
        assert re.findall(r"^(\d)\. ", section(page, SECTIONS[language][2]), re.MULTILINE) == ["1", "2", "3"], name


def test_a_page_says_what_goes_wrong(pages, language):
    for name, page in pages.items():
        faults = [line for line in section(page, SECTIONS[language][3]).split("\n") if line.startswith("- ")]
        assert len(faults) > 1 and all(line.startswith(("- *", "- **")) for line in faults), name


def test_an_error_that_a_page_quotes_is_one_that_we_raise(pages, language):
    said = "\n".join(node.value for folder in ("nodes", "models_impl") for path in (ROOT / folder).rglob("*.py")
                     for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))
    gone = [(name, quote) for name, page in pages.items()
            for quote in ERROR.findall(section(page, SECTIONS[language][3]))
            if quote not in said and not re.fullmatch(r"is not in models/\w+", quote)]  # with the folder in the end
    assert not gone


def test_what_a_page_calls_a_workflow_or_a_node_of_ours_is_one(pages, names):
    workflows = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    titles = {re.sub(r" ?[（(].*", "", about["title"]) for about in names.values()}
    gone = [(name, word) for name, page in pages.items()
            for word in (" ".join(found.split()) for found in ITALIC.findall(ERROR.sub("", page)))
            if WORKFLOW.fullmatch(word) and word not in workflows or word.startswith(FAMILIES) and word not in titles]
    assert not gone


def test_a_page_shows_one_picture_which_is_made_here(pages):
    for name, page in pages.items():
        ((alt, file),) = PICTURE.findall(page)
        assert alt and Path(file).stem == name.removeprefix("PixStack_"), name
        assert page.split("\n")[2].startswith("!["), f"{name}: the picture stands below the title"
    shown = {Path(file).stem for page in pages.values() for _, file in PICTURE.findall(page)}
    assert shown == set(FIGURES)
    assert {path.name for path in DOCS.iterdir() if path.suffix in (".jpg", ".png")} == {
        file for page in pages.values() for _, file in PICTURE.findall(page)}


def test_a_page_fits_its_narrow_panel(pages):
    """Lists, for a table of two columns is cut off there."""
    assert not [name for name, page in pages.items() if re.search(r"^\s*\|", page, re.MULTILINE)]


def test_emphasis_ends_where_it_should(pages):
    """After a bracket it goes on to the next star unless a space or a stop follows."""
    assert not [(name, found) for name, page in pages.items() for found in re.findall(r".{9}[）)”]\*[^\W_]", page)]


def test_no_line_of_a_page_begins_a_list_by_chance(pages):
    """As one that begins with 1024. does inside of an entry."""
    numbers = [(name, line) for name, page in pages.items() for line in page.split("\n")
               if re.match(r" *[0-9]+[.)]( |$)", line) and not re.match(r"[1-9]\. ", line)]
    assert not numbers


def test_a_link_of_a_page_leads_somewhere(pages):
    dead = [(name, target) for name, page in pages.items() for target in LINK.findall(page)
            if not target.startswith("https://") and not (DOCS / target).is_file()]
    assert not dead


def test_the_pictures_are_small():
    sizes = [path.stat().st_size for path in DOCS.iterdir() if path.suffix in (".jpg", ".png")]
    assert max(sizes) < 35_000 and sum(sizes) < 1_000_000


def test_no_help_page_is_left_of_a_node_that_is_gone(ours):
    assert {path.stem for path in DOCS.glob("*.md")} == set(ours)
    assert {path.name for path in DOCS.iterdir() if path.is_dir()} <= set(ours)
