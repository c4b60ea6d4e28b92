"""tools/demo.py: prompts into a contact sheet."""

from pathlib import Path

import pytest
from PIL import Image
from pixstack.tools import demo


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two steps a stage instead of ten."""
    read = demo.read

    def shortened(*args):
        graph = read(*args)
        for node in graph.values():
            if node["class_type"] == "PixStack_PixelFlowSample":
                node["inputs"]["steps"] = 2
        return graph

    monkeypatch.setattr(demo, "read", shortened)


def test_the_demo_ends_with_the_path_of_a_sheet_that_has_every_prompt(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "Host", lambda **_: host)
    monkeypatch.setattr(host, "start", lambda: host)
    prompts = ["red apple", "blue car", "a cat", "sun", "tree"]
    assert demo.main(["--output", str(tmp_path), *prompts]) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    assert [line.split(" s  ")[1] for line in lines[:5]] == prompts
    assert Path(path) == tmp_path / "contact_sheet.png"
    assert Image.open(path).size == (4 * demo.TILE, 2 * (demo.TILE + demo.CAPTION))  # five pictures take two rows


def test_a_prompt_changes_the_picture_while_the_seed_repeats_it(host, monkeypatch, tmp_path):
    graph = demo.read(demo.WORKFLOW, host.object_info())

    def draw(prompt, seed):
        run = host.run(demo.with_prompt(graph, prompt, seed))
        assert run.error is None
        (image,) = run.images
        return Image.open(image).tobytes()

    apple = draw("red apple", 1)
    assert draw("red apple", 1) == apple
    assert draw("blue car", 1) != apple
    assert draw("red apple", 2) != apple
