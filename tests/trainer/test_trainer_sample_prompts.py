"""Sample prompts with settings of their own, the sheets they are drawn on, and what recipes refuse."""
import json

import numpy as np
import pytest
import tiny_pixart
import tiny_recipes
import tiny_run
import torch
from PIL import Image, ImageChops
from pixstack.trainer.cli import main
from pixstack.trainer.config import check
from pixstack.trainer.config.load import stored
from pixstack.trainer.data.sheets import captioned, to_images
from pixstack.trainer.evaluation import sheets
from pixstack.trainer.training import samples
from weights import tiny_hed

TABLES = {"every": 2, "steps": 1, "cfg": 3.0, "prompts": [
    "red card", {"prompt": "blue square", "height": 32, "seed": 7, "steps": 2},
    {"prompt": "blue square", "height": 32, "seed": 7, "steps": 2, "negative": "red card"}]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return tiny_run.train(tiny_run.settings(path, folder, "steps=4", "ema.decay=0", samples=TABLES))[0], folder


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """Settings of a tiny PixArt recipe by its name, changed by others."""
    folder = tmp_path_factory.mktemp("pixart")
    squares = tiny_run.pictures(folder / "squares", size=64)
    parts, base = tiny_pixart.parts(folder), folder / "base.safetensors"
    tiny_pixart.released(base)
    tiny_hed(folder / "hed.pth")
    own = {"pixart_controlnet": {"blocks": 1, "annotator": str(folder / "hed.pth")}}

    def settings(name, **more):
        return check.parse({**tiny_recipes.COMMON, "ema": {"decay": 0.0}, "init_from": str(base), **parts,
                            "data": {"path": str(squares), **tiny_pixart.IMAGE}, "out": str(folder / name),
                            "recipe": {"name": name, **own.get(name, {})}, **more}, ["optimizer.learning_rate=0.3"])

    return settings


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_each_prompt_is_drawn_with_its_own_settings(trained):
    recipe, folder = trained
    at = folder / "samples/00000004"
    assert [Image.open(p).size for p in sorted(at.glob("*.png"))] == [(16, 16), (16, 32), (16, 32)]
    wanted = to_images(recipe.sample(["blue square"], 32, 16, 2, 1.0, 3.0, 7, negative="red card"))[0]
    assert np.array_equal(pixels(at / "02.png"), np.asarray(wanted))
    assert (pixels(at / "01.png") != pixels(at / "02.png")).any()  # the negative prompt counts
    notes = json.loads(Image.open(at / "02.png").info["settings"])
    assert (notes["negative"], notes["seed"], notes["cfg"]) == ("red card", 7, 3.0)


def test_a_run_folder_gives_the_tables_back(trained):
    _, folder = trained
    assert stored(folder).samples.tables[3].negative == "red card"


def test_plain_prompts_are_drawn_at_once_as_ever(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", 'samples.prompts=["red card", "blue square"]')
    assert len(samples.together(samples.wanted(settings))) == 1
    assert [one.seed for one in samples.wanted(settings)] == [0, 1]


def test_samples_are_drawn_before_the_first_step_unless_told_not_to(path, trained, tmp_path):
    assert (trained[1] / "samples/00000000.png").is_file()
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=1", "samples.baseline=false", "samples.every=1",
                                     'samples.prompts=["red card"]', "samples.steps=1"))
    assert [p.name for p in sorted((tmp_path / "run/samples").glob("*.png"))] == ["00000001.png"]


def test_a_long_prompt_is_cut_beneath_its_picture():
    texts = ["a very long prompt that says a great many things " * 4, "日本"]
    page = captioned(texts, [Image.new("RGB", (40, 20))] * 2)
    assert page.width < 250 and page.height < 60
    assert (np.asarray(page)[21:, :96] < 128).any()


def test_a_grid_shows_prompts_in_rows_and_steps_in_columns(trained, tmp_path, capsys):
    main.main(["sheets", str(trained[1]), "--out", str(tmp_path / "grid.png")])
    assert "grid.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "loss.png").width == 640
    whole = Image.open(tmp_path / "grid.png")
    few = sheets.over_steps(trained[1], columns=2, rows=1, side=16)
    assert few.width < whole.width and few.height < whole.height
    assert sheets.evenly(5, 10) == [0, 1, 2, 3, 4] and sheets.evenly(101, 3) == [0, 50, 100]


def test_a_grid_of_a_run_without_samples_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has no samples of single prompts"):
        main.main(["sheets", str(tmp_path)])


def test_the_curve_of_the_losses_leaves_out_what_has_no_place_on_its_scale():
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 50)] + [{"step": 50, "validation_loss": 0.1}]
    drawn = sheets.loss_curve(lines)
    other = sheets.loss_curve([*lines, {"step": 50, "loss": float("nan")}, {"step": 50, "loss": 0.0}])
    assert ImageChops.difference(drawn, other).getbbox() is None
    colours = {colour for _, colour in drawn.getcolors(maxcolors=4096)}
    assert (0xBB,) * 3 in colours and (0, 0, 0) in colours
    with pytest.raises(ValueError, match="no losses yet"):
        sheets.loss_curve([{"step": 3, "images_s": 1.0}])


@pytest.mark.parametrize("table, said", [
    ({"promt": "x"}, r"samples.prompts.1.promt is not a setting; did you mean prompt"),
    ({"prompt": 3}, r"samples.prompts.1.prompt=3 should be a string"),
    ({"height": 16}, r"samples.prompts.1.prompt is empty"),
    ({"prompt": "x", "height": 20}, r"samples.prompts.1.height=20 is not a multiple of 8"),
    ({"prompt": "x", "steps": 0}, r"samples.prompts.1.steps=0 must be at least 1"),
    ({"prompt": "x", "negative": "y", "cfg": 1.0}, "counts nothing at cfg 1"),
    ({"prompt": "x", "strength": 0.5}, "trains no adapter here"),
    ({"prompt": "x", "hint": "y.png"}, "follows no pictures"),
    ({"prompt": "x", "class_index": 1}, "this run has no classes"),
    (7, "samples.prompts is a list of strings and tables, not "),
])
def test_what_a_table_cannot_say_is_named(path, tmp_path, table, said):
    with pytest.raises(ValueError, match=said):
        tiny_run.settings(path, tmp_path / "run", samples={"prompts": [table]})


@pytest.mark.parametrize("name, table, said", [
    ("pixart_dmd", {"prompt": "x", "negative": "y"}, "draws without a negative prompt here"),
    ("pixart_controlnet", {"prompt": "x", "hint": "a.png,b.png"}, "names 2 files, and there are 1 hints"),
    ("pixart_controlnet", {"prompt": "x", "hint": "a.png"}, "'a.png': there is no such file"),
])
def test_a_recipe_refuses_what_it_cannot_draw(pixart, name, table, said):
    with pytest.raises(ValueError, match=said):
        pixart(name, samples={"prompts": [table]})


def test_a_class_model_draws_tables_of_classes(path, tmp_path):
    table = {"class_index": 2, "height": 32}
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "steps=1", text={}, samples={
        "every": 1, "steps": 1, "prompts": [table]}))
    assert Image.open(tmp_path / "run/samples/00000001/00.png").info["title"] == "class 2"
    with pytest.raises(ValueError, match="draws without a negative prompt here"):
        tiny_run.settings(path, tmp_path / "run", text={}, samples={"prompts": [{**table, "negative": "x"}]})


def test_an_adapter_counts_as_often_as_its_strength_says(pixart):
    prompts = [{"prompt": "red card", "strength": s, "seed": 3} for s in (0.0, 0.5, 1.0)]
    config = pixart("pixart_lora", adapter={"rank": 4}, samples={
        "every": 3, "steps": 1, "cfg": 1.0, "prompts": prompts})
    recipe, run = tiny_run.train(config)
    before, after = ([pixels(run.folder / f"samples/{step:08d}/{i:02d}.png") for i in range(3)] for step in (0, 3))
    assert all((one == before[0]).all() for one in before)  # the network without its adapter
    assert (after[0] == before[0]).all()
    assert abs(after[2] - after[0]).max() > abs(after[1] - after[0]).max() > 0
    first = [picture for _, picture in samples.draw(recipe, config)]
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, samples.draw(recipe, config), strict=True))


def test_a_controlnet_follows_the_picture_of_a_table(pixart, tmp_path):
    Image.fromarray(np.kron(np.eye(4), np.full((16, 16), 255)).astype(np.uint8)).save(tmp_path / "hint.png")
    plain = {"prompt": "red card", "seed": 3}
    config = pixart("pixart_controlnet", samples={"every": 3, "steps": 1, "cfg": 1.0, "prompts": [
        plain, {**plain, "hint": str(tmp_path / "hint.png")}]})
    _, run = tiny_run.train(config)
    free, led = (pixels(run.folder / f"samples/00000003/{i:02d}.png") for i in range(2))
    assert (free != led).any()
