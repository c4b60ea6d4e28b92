"""The table of files to download, and that workflows, help pages and READMEs say what it says."""

import json
import re

import pytest
from conftest import ROOT
from pixstack.tools import model_files
from pixstack.tools.model_files import HUB, LOADERS, named, nodes_of
from weights import EMBEDDED, OWN

FILES = model_files.read()
AT_HAND = {*EMBEDDED, *OWN, ("vae", "pixel_space")}
LINK = re.compile(r"https://huggingface\.co/[^\s\"'`)\]>|]+")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "web/docs").rglob("*.md"),
         *(ROOT / "trainer/recipes").rglob("*.toml")]


def graph(workflow) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def test_every_file_that_the_table_is_written_into_says_what_the_table_says():
    stale = [str(path.relative_to(ROOT)) for path, (now, should) in model_files.written(FILES).items() if now != should]
    assert not stale, f"run `python -m pixstack.tools.model_files` and look at what it changes in {', '.join(stale)}"


def test_every_file_that_a_workflow_names_is_in_the_table_or_at_hand(workflow):
    wanted = {(folder, name) for node in nodes_of(graph(workflow)) for folder, name in named(node)} - AT_HAND
    known = {(f.folder, f.name) for f in FILES} | {(f.folder, f.name.split("/")[0]) for f in FILES}
    assert wanted <= known


def test_a_note_has_the_list_of_what_is_to_be_downloaded(workflow):
    shown = graph(workflow)
    wanted = [f for node in nodes_of(shown) for f in model_files.wanted(node, FILES)]
    notes = [n["widgets_values"][0] for n in shown["nodes"] if n["type"] == "MarkdownNote"]
    lists = [text for text in notes if model_files.DOWNLOAD.search(text)]
    assert len(lists) == bool(wanted)
    assert all(f.url in lists[0] for f in wanted)


def test_every_loader_is_known_whose_menu_is_a_folder_of_models(workflow, host):
    """Else its files would be linked nowhere."""
    info, files = host.object_info(), {name for _, name in AT_HAND} | {f.name for f in FILES}
    for node in nodes_of(graph(workflow)):
        if node["type"] in info and node["type"] not in LOADERS:
            assert not {str(value) for value in node.get("widgets_values") or []} & files, node["type"]


def test_no_workflow_needs_a_login(workflow):
    gated = {f.url for f in FILES if f.gated}
    assert gated and not set(LINK.findall(workflow.read_text(encoding="utf-8"))) & gated


def test_a_workflow_names_safetensors_where_they_are_published(workflow):
    published = {(f.folder, f.name): f.instead_of for f in FILES if f.instead_of.endswith(".safetensors")}
    used = {file for node in nodes_of(graph(workflow)) for file in named(node)}
    assert not {(folder, name) for folder, name in used if not name.endswith(".safetensors")} & set(published)


@pytest.mark.parametrize("path", [path for path in PAGES if LINK.search(path.read_text(encoding="utf-8"))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_links_only_what_is_in_the_table(path):
    links = {link.rstrip(".,;:") for link in LINK.findall(path.read_text(encoding="utf-8"))}
    assert links <= {f.url for f in FILES} | {HUB + f.repository for f in FILES if f.url}


def test_a_loader_with_files_to_download_has_them_in_its_help_page():
    for loader in (loader for f in FILES for loader in f.loaders if loader.startswith("PixStack_")):
        text = (ROOT / f"web/docs/{loader}.md").read_text(encoding="utf-8")
        assert all((f.url or f.command) in text for f in FILES if loader in f.loaders), loader


def test_what_stands_in_for_a_file_names_one_that_is_there():
    names = {f.name for f in FILES if f.instead_of != f.name}
    assert {f.instead_of for f in FILES if f.instead_of} <= names


def test_a_file_has_one_row_in_its_folder():
    rows = [(f.folder, f.name) for f in FILES if f.instead_of != f.name]
    assert len(rows) == len(set(rows))
    direct = [f.url for f in FILES if not f.page and f.url]
    assert len(direct) == len(set(direct))


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(url="https://example.org/a.safetensors"), "wants an address under"),
    (dict(url=HUB + "someone/something"), "is not a file"),
    (dict(page=True), "is a file, not a page"),
    (dict(family="sd"), "sd is not one of pixart"),
    (dict(bytes=2), "2 bytes are too few"),
])  # fmt: skip
def test_a_row_that_cannot_be_right_is_refused(change, sentence):
    row = dict(family="pixart", name="a.safetensors", folder="vae", loaders=("VAELoader",), about="", zh="", seen="",
               url=HUB + "someone/something/resolve/main/a.safetensors")
    with pytest.raises(ValueError, match=sentence):
        model_files.ModelFile(**{**row, **change})


def test_what_the_user_supplies_stays_in_the_list_when_it_is_written_anew():
    before = f"**Download first**\n\n1. [old]({HUB}gone)\n2. your LoRA into `models/loras`\n\nMore."
    node = dict(type="VAELoader", widgets_values=["ae.safetensors"], properties={})
    note = dict(type="MarkdownNote", widgets_values=[before])
    made = model_files.in_workflow(dict(nodes=[node, note]), FILES)["nodes"]
    text = made[1]["widgets_values"][0]
    assert "gone" not in text and "2. your LoRA into `models/loras`\n\nMore." in text
    assert made[0]["properties"]["models"][0]["directory"] == "vae"
