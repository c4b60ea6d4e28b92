"""tools/demo.py: what every family draws, on a page and a picture of it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pixstack.tools import demo, demo_page
from pixstack.tools.workflow import shipped


@pytest.fixture(autouse=True)
def quick(monkeypatch, host):
    """Two steps instead of ten or twenty, in the ComfyUI of the other tests."""
    read = demo.read

    def shortened(*args):
        graph = read(*args)
        for node in graph.values():
            if "steps" in node["inputs"]:
                node["inputs"]["steps"] = 2
        return graph

    monkeypatch.setattr(demo, "read", shortened)
    monkeypatch.setattr(demo, "Host", lambda **_: host)
    monkeypatch.setattr(host, "start", lambda: host)


@pytest.fixture
def brief(monkeypatch):
    """A drawing of each kind in a section: those that differ in their prompt only are one."""
    monkeypatch.setattr(demo, "SECTIONS", tuple(
        replace(one, drawings=tuple({d.settings: d for d in reversed(one.drawings)}.values()))
        for one in demo.SECTIONS))


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_a_family_draws_all_its_sections_and_ends_with_two_paths(brief, family, tmp_path, capsys):
    sections = [section for section in demo.SECTIONS if section.family == family]
    assert demo.main(["--output", str(tmp_path), "--family", family]) == 0
    *lines, html, png = capsys.readouterr().out.splitlines()
    assert [line.split(" s  ")[1] for line in lines[:-1]] == [
        f"{section.headline}: {drawing.prompt}" for section in sections for drawing in section.drawings]
    text = Path(html).read_text(encoding="utf-8")
    assert [Path(html).parent, Path(png).parent] == [tmp_path] * 2
    for section in sections:
        assert section.headline in text and f"Template {shipped()[section.template].stem}<" in text
    captions = sum(len(view.captions) for section in sections for d in section.drawings for view in d.views)
    assert text.count("<figure>") == captions and "seed 1, " in text
    assert Image.open(png).width == demo_page.WIDTH and Image.open(png).height > 200 * len(sections)


def test_prompts_are_drawn_by_the_first_section_of_a_family(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path), "--family", "pixart", "--seed", "7", "blue <car>", "sun & moon"]) == 0
    *lines, html, _ = capsys.readouterr().out.splitlines()
    headline = next(section.headline for section in demo.SECTIONS if section.family == "pixart")
    assert [line.split(" s  ")[1] for line in lines[:-1]] == [f"{headline}: blue <car>", f"{headline}: sun & moon"]
    text = Path(html).read_text(encoding="utf-8")
    assert text.count("<figure>") == 2 and text.count("seed 7, ") > 1
    assert "<b>blue &lt;car&gt;</b>" in text and "<b>sun &amp; moon</b>" in text


def test_prompts_without_a_family_are_drawn_by_all():
    sections = demo.chosen(None, ["tree"])
    assert [section.family for section in sections] == list(demo.FAMILIES)
    assert {drawing.prompt for section in sections for drawing in section.drawings} == {"tree"}


def test_an_unknown_family_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as refused:
        demo.main(["--family", "sdxl"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "sdxl" in message and all(family in message for family in demo.FAMILIES)


def test_a_drawing_that_fails_is_named_and_the_others_stay(host, tmp_path, monkeypatch, capsys):
    section = demo.SECTIONS[0]
    wrong = replace(section.drawings[0], prompt="a wrong one", settings=("PixStack_PixelFlowSample.start_stage=7",))
    monkeypatch.setattr(demo, "SECTIONS", (replace(section, drawings=(wrong, section.drawings[1])),))
    assert demo.main(["--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "a wrong one" in err and "stage" in err
    *_, html, png = out.splitlines()
    text = Path(html).read_text(encoding="utf-8")
    assert text.count("<figure>") == 1 and "a wrong one was not drawn: " in text
    assert Path(png).is_file()


def test_the_page_needs_nothing_but_itself():
    tile = demo_page.Tile(Image.new("RGB", (8, 8)), ("one", "two"))
    text = demo_page.page("A title", "about", [demo_page.Chapter("headline", "sentence", "source", [tile])])
    assert "<script" not in text and "http:" not in text and "https:" not in text and "url(" not in text
    assert re.findall(r'src="(.{15})', text) == ["data:image/png;"] and "prefers-color-scheme: dark" in text


def test_tiles_fill_a_row_before_the_next():
    usual, strip = (demo_page.Tile(Image.new("RGB", size), ("a",)) for size in ((64, 64), (776, 256)))
    rows = demo_page.rows([usual] * (demo_page.ACROSS + 1) + [strip] * 3)
    assert [len(row) for row in rows] == [demo_page.ACROSS, 2, 2]


def test_every_section_draws_with_a_template_that_needs_no_download():
    for section in demo.SECTIONS:
        assert shipped()[section.template].stem.endswith("(no download)")


def test_a_prompt_changes_the_picture_while_the_seed_repeats_it(host):
    info = host.object_info()
    graph = demo.read(shipped()["pixelflow_text_to_image"], info)

    def draw(prompt, seed):
        run = host.run(demo.asked(graph, demo.Drawing(prompt), seed, info)[0])
        assert run.error is None
        (image,) = run.images
        return Image.open(image).tobytes()

    apple = draw("red apple", 1)
    assert draw("red apple", 1) == apple
    assert draw("blue car", 1) != apple
    assert draw("red apple", 2) != apple


@pytest.mark.parametrize("name, kind, place", [
    ("pixart_emoji", "KSampler", "seed"), ("pixart_emoji_inpaint", "SamplerCustom", "noise_seed"),
    ("pixart_emoji_lora", "PrimitiveInt", "value"),  # of all three samplers
])
def test_a_seed_is_set_where_it_comes_from(host, name, kind, place):
    info = host.object_info()
    graph, _ = demo.asked(demo.read(shipped()[name], info), demo.Drawing("sun"), 5, info)
    assert [node["inputs"][place] for node in graph.values() if node["class_type"] == kind] == [5]
