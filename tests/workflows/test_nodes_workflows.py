"""What every shipped workflow has besides running: a prompt, a picture, notes with titles, canvases, changing seeds."""

import json
import re

import pytest
from conftest import ROOT, SHIPPED
from PIL import Image
from pixstack.models_impl.pixart.buckets import TABLES, nearest
from pixstack.models_impl.pixart.sampling import time_uniform
from pixstack.tools import workflow as conversion
from pixstack.tools.app_mode import app_mode
from pixstack.tools.layout_workflows import NOTES
from pixstack.tools.make_workflow_pictures import CARDS, calls, cascade_calls, competing
from pixstack.tools.show_workflows import without_download

SEEDS = {"PixStack_PixelFlowSample": 1, "RandomNoise": 1, "KSampler": 1, "SamplerCustom": 2,
         "PrimitiveInt": 1}  # place of the control


def nodes(workflow):
    return json.loads(workflow.read_text(encoding="utf-8"))["nodes"]


def test_it_is_the_prompt_it_was_made_from(workflow, info):
    name = json.loads(workflow.read_text(encoding="utf-8"))["extra"]["pixstack"]
    prompt = json.loads((ROOT / f"tests/workflows/prompts/{name}.json").read_text(encoding="utf-8"))
    converted = conversion.read(workflow, info)
    assert {i: (n["class_type"], n["inputs"]) for i, n in converted.items()} == {
        i: (n["class_type"], n["inputs"]) for i, n in prompt.items()}


def test_every_prompt_has_its_workflow():
    assert {p.stem for p in (ROOT / "tests/workflows/prompts").glob("*.json")} == set(SHIPPED)


def test_it_has_a_square_picture_that_is_calm_where_the_browser_writes_over_it(workflow):
    with Image.open(workflow.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.size == (512, 512)
        assert all(high - low < 24 for low, high in picture.convert("RGB").crop((0, 0, 190, 50)).getextrema())


def notes(workflow):
    return [n for n in nodes(workflow) if n["type"] == "MarkdownNote"]


def test_the_first_note_says_what_is_drawn_what_it_needs_and_three_things_to_try(workflow):
    first, *_ = notes(workflow)
    drawn, needed, *_, tries = first["widgets_values"][0].split("\n\n")
    assert 40 < len(drawn) < 450
    assert needed.startswith("**Download first") != without_download(json.loads(workflow.read_text(encoding="utf-8")))
    assert needed.startswith(("**Download first", "**No download"))
    assert "**Three things to try**" in first["widgets_values"][0] and tries.count("\n- ") + tries.startswith("- ") == 3


def test_notes_have_a_ground_on_which_code_can_be_read(workflow):
    assert all(note.items() >= NOTES.items() for note in notes(workflow))


def test_the_first_note_lies_at_the_top_left(workflow):
    (x, y), *_ = [n["pos"] for n in notes(workflow)]
    assert all(x <= n["pos"][0] and y <= n["pos"][1] for n in nodes(workflow))


def test_a_note_names_nodes_by_what_stands_above_them(workflow, info):
    """In bold, where something of the node is said: **KSampler** `cfg`."""
    titles = [n.get("title") or info[n["type"]].get("display_name") or n["type"] for n in nodes(workflow)]
    text = "\n".join(n["widgets_values"][0] for n in notes(workflow)[:1])
    named = re.findall(r"\*\*([^*]+)\*\* `", text)
    assert [name for name in named if not any(title.startswith(name.removesuffix(" ...")) for title in titles)] == []


def test_app_mode_asks_for_what_the_nodes_have(workflow, info):
    saved = json.loads(workflow.read_text(encoding="utf-8"))
    assert app_mode(saved) == saved, "run `python -m pixstack.tools.app_mode`"
    prompt, form = conversion.read(workflow, info), saved["extra"]["linearData"]
    whole = {n["id"]: {one["name"] for one in n["inputs"] if one.get("widget") and one["link"] is None}
             for n in saved["nodes"] if "proxyWidgets" in n["properties"]}  # blueprints
    assert all(name in whole[i] if i in whole else not isinstance(prompt[str(i)]["inputs"][name], list)
               for i, name in form["inputs"])
    for node in saved["nodes"]:
        given = info[node["type"]]["input"] if node["type"] in info else {}
        kinds = {name: spec[0] for part in given.values() for name, spec in part.items()}
        named = {one["name"]: one["type"] for one in node["inputs"] if "label" in one and "widget" in one}
        assert named == {name: "COMBO" if isinstance(kinds[name], list) else kinds[name] for name in named}
    assert all(info[prompt[str(i)]["class_type"]]["output_node"] for i in form["outputs"])


def test_groups_are_numbered_and_coloured(workflow):
    groups = json.loads(workflow.read_text(encoding="utf-8"))["groups"]
    assert [g["title"].partition(" ")[0] for g in groups] == [str(i) for i in range(1, len(groups) + 1)]
    assert len(groups) > 1 and all(g["color"] for g in groups)


def test_a_template_is_named_so_that_windows_addresses_and_a_reader_can_take_it(workflow):
    """The route takes what a browser makes of the name, which leaves these signs as they are; the gallery shows it."""
    number, _, words = workflow.stem.partition(" ")
    assert re.fullmatch(r"[A-Za-z0-9 ().,-]+[a-zA-Z0-9)]", workflow.stem) and len(workflow.stem) < 70
    assert re.fullmatch(r"\d\d", number) and [p.stem[:2] for p in SHIPPED.values()].count(number) == 1
    without = without_download(json.loads(workflow.read_text(encoding="utf-8")))
    assert without == (int(number) < 20) == words.endswith("(no download)")


def test_a_second_run_draws_something_new(workflow):
    """The first run draws with the seed of the file, as on the card; the browser then chooses another."""
    adds_noise = [n for n in nodes(workflow) if n["type"] in SEEDS and n["widgets_values"][0] is not False]
    own = [n for n in adds_noise if "seed" not in {i["name"] for i in n.get("inputs", []) if i.get("link")}]
    assert {n["widgets_values"][SEEDS[n["type"]]] for n in own} <= {"randomize"}
    assert own or not adds_noise


def test_strengths_of_a_lora_are_compared_with_one_seed(info):
    graph = conversion.read(SHIPPED["pixart_emoji_lora"], info)
    seeds = [n["inputs"]["seed"] for n in graph.values() if n["class_type"] == "KSampler"]
    assert len(seeds) == 3 and len({tuple(seed) for seed in seeds}) == 1


def test_notes_and_boxes_of_text_say_what_they_are_for(workflow):
    for node in nodes(workflow):
        linked = {i["name"] for i in node.get("inputs", []) if i.get("link")}
        assert node["type"] != "MarkdownNote" or node.get("title"), "a note without a title"
        assert "text" not in linked or node.get("title") not in ("Prompt", "Negative prompt"), "text by a link"


def test_numbers_below_the_menus_of_a_canvas_are_the_size_that_it_gives(workflow, info):
    """A menu that is on and a width that is not: people change the one that does nothing."""
    graph = conversion.read(workflow, info)
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "PixStack_PixArtCanvas" and inputs["resolution"] != "auto" and "image" not in inputs:
            across, down = map(int, inputs["shape"].split(":"))
            _, height, width = nearest(TABLES[int(inputs["resolution"])], down, across)
            assert (inputs["width"], inputs["height"]) == (width, height)
        if node["class_type"] == "PixStack_UltraPixelCanvas" and inputs["shape"].startswith("custom"):
            assert inputs["side"] == pytest.approx((inputs["width"] * inputs["height"]) ** 0.5, abs=32)


def test_every_node_that_has_a_seed_is_known(workflow, info):
    seeded = {n["type"] for n in nodes(workflow) for name in ("seed", "noise_seed")
              if name in info.get(n["type"], {}).get("input", {}).get("required", {})}
    assert seeded <= set(SEEDS)


def test_nothing_lies_on_top_of_something_else(workflow):
    boxes = [(n["id"], *n["pos"], n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in nodes(workflow)]
    title = 30
    overlapping = [
        (a[0], b[0]) for a in boxes for b in boxes
        if a[0] < b[0] and a[1] < b[3] and b[1] < a[3] and a[2] - title < b[4] and b[2] - title < a[4]
    ]
    assert not overlapping


@pytest.mark.parametrize("name", CARDS)
def test_a_workflow_that_cannot_be_drawn_here_has_its_card_described(name):
    assert name in SHIPPED


@pytest.mark.parametrize(("name", "timesteps", "cfg"), [
    ("pixart_lcm", [999, 759, 519, 279], 1.0),
    ("pixart_dmd", [400], 1.0),
    ("pixart_sigma_1024", [999 * (1 - i / 20) for i in range(20)], 4.5),
    ("pixart_image_to_image", [999 * i / 33 for i in range(20, 0, -1)], 4.5),
])  # fmt: skip
def test_a_card_shows_when_its_workflow_calls_the_network(name, timesteps, cfg):
    graph = json.loads((ROOT / "tests/workflows/prompts" / f"{name}.json").read_text(encoding="utf-8"))
    assert calls(graph) == (pytest.approx(timesteps), cfg)


@pytest.mark.parametrize(("name", "timesteps", "cfg"), [
    ("ultrapixel_4096", [0.99358, *(1 - i / 20 for i in range(1, 20))], 4.0),
    ("ultrapixel_image_to_image", [1 - i / 28 for i in range(8, 28)], 4.0),
    ("ultrapixel_controlnet", [0.9936, 0.9750, 0.9497], 1.0),  # shifted by 2
])  # fmt: skip
def test_a_card_of_two_passes_shows_when_each_calls_stage_c(name, timesteps, cfg):
    graph = json.loads((ROOT / "tests/workflows/prompts" / f"{name}.json").read_text(encoding="utf-8"))
    found, guidance = cascade_calls(graph)
    assert len(found) == 20 and guidance == cfg
    assert found[: len(timesteps)] == pytest.approx(timesteps, abs=1e-4)


def test_a_card_shows_which_condition_counts_where_by_priority():
    graph = json.loads((ROOT / "tests/workflows/prompts/pixelponder_regional_masks.json").read_text(encoding="utf-8"))
    assert competing(graph) == ([("canny", False), ("hed", True)], False)
    next(n for n in graph.values() if n["inputs"].get("kind") == "hed")["inputs"]["priority"] = 2
    assert competing(graph)[0] == [("hed", True), ("canny", False)]


def test_the_two_stages_of_the_900m_meet_where_the_training_of_the_second_begins():
    graph = json.loads((ROOT / "tests/workflows/prompts/pixart_sigma_900m.json").read_text(encoding="utf-8"))
    split = next(n["inputs"] for n in graph.values() if n["class_type"] == "SplitSigmas")
    steps = graph[split["sigmas"][0]]["inputs"]["steps"]
    assert time_uniform(steps)[split["step"]] == pytest.approx(400, abs=1)
