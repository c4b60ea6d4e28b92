"""Captions that change from step to step: tags, alternatives, names of files, and wordings for a frozen encoder."""
import random
from dataclasses import replace

import pytest
import tiny_pixart
import tiny_run
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import loader, wording
from pixstack.trainer.data.layouts import InTar, Item

TAGS = "sks dog, sitting, grass, sunny, close-up"


def drawn(caption, count=300, **settings):
    item = Item(None, (caption,))
    return [wording.drawn(item, Data(**settings).each[0], random.Random(i)) for i in range(count)]


def test_shuffled_tags_keep_the_first_ones():
    found = drawn(TAGS, shuffle_tags=True, keep_tags=2)
    assert {tuple(text.split(", ")[:2]) for text in found} == {("sks dog", "sitting")}
    assert {tuple(sorted(text.split(", "))) for text in found} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(found)) == 6  # every order of the other three


def test_tags_are_left_out_in_their_share_and_kept_ones_never():
    found = drawn(TAGS, 1000, tag_dropout=0.25, keep_tags=1)
    assert all(text.startswith("sks dog") for text in found)
    for tag in TAGS.split(", ")[1:]:
        assert abs(sum(tag in text for text in found) / 1000 - 0.75) < 0.05
    assert all(drawn("a, b", tag_dropout=1.0))  # something is always said
    assert TAGS.split(", ") == max(found, key=len).split(", ")  # in their order


def test_every_alternative_is_drawn_also_one_within_another():
    found = drawn("a {red|{dark|light} blue} car {, parked|}", wildcards=True)
    assert {" ".join(text.split()) for text in found} == {
        f"a {colour} car{more}" for colour in ("red", "dark blue", "light blue") for more in ("", " , parked")}


def test_alternatives_stay_as_they_are_unless_asked_for():
    assert set(drawn("a {red|blue} car")) == {"a {red|blue} car"}
    assert set(drawn("{a} {} b|c", wildcards=True)) == {"{a} {} b|c"}


def test_a_template_may_have_alternatives():
    found = drawn("a car", wildcards=True, templates=["a {photo|picture} of {}"], template_share=1.0)
    assert set(found) == {"a photo of a car", "a picture of a car"}


@pytest.mark.parametrize("name, caption", [
    ("sks_dog_01.png", "sks dog"), ("0001.png", ""), ("red t-shirt (2).jpg", "red t-shirt"), ("003_old house.png",
    "old house"), ("3d_render.png", "3d render"), ("a.b-12.webp", "a.b"), ("2024-05-03 beach.png", "beach"),
])
def test_a_caption_is_read_from_the_name_of_its_file(tmp_path, name, caption):
    assert wording.of_name(tmp_path / name) == caption
    assert wording.of_name(InTar(tmp_path / "x.tar", f"deep/{name}", 0, 0)) == caption


def test_names_are_captions_only_of_pictures_that_have_none(tmp_path):
    for name in ("sks_dog_01", "sks_dog_02", "07"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "sks_dog_02.txt").write_text("written")
    found = loader.read(Data(kind="folder", path=str(tmp_path), name_captions=True, caption="else"), "captions").train
    assert [i.captions for i in found] == [("else",), ("sks dog",), ("written",)]


def test_with_a_bounded_number_of_wordings_no_other_ever_occurs(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    settings = Data(path=str(path), resolution=8, tag_share=0.5, shuffle_tags=True, templates=["a {} of {now|then}"],
                    template_share=0.5, wildcards=True, caption_variants=3)
    found = loader.read(settings, "captions")
    known = [*wording.every(found.train, [], settings, seed=5)]
    assert len(known) <= 3 * len(found.train)
    made = loader.Batches(found.train, settings, 5, 8)
    asked = {text for step in range(40) for text in made(step, range(8)).captions}
    assert asked == set(known)
    assert set(known) != set(wording.every(found.train, [], settings, seed=6))


def test_a_resumed_run_words_captions_as_the_unbroken_one(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    settings = Data(path=str(path), resolution=8, shuffle_tags=True, tag_dropout=0.3, caption_variants=4)
    for one in (settings, replace(settings, caption_variants=0)):
        whole, later = (loader.Batches(loader.read(one, "captions").train, one, 0, 4) for _ in range(2))
        unbroken = [whole(step, range(4)).captions for step in range(8)]
        assert [later(step, range(4)).captions for step in range(5, 8)] == unbroken[5:]


def test_validation_asks_for_the_first_alternative(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    settings = Data(kind="folder", path=str(tmp_path), caption="a {red|blue} car", wildcards=True, resolution=8,
                    shuffle_tags=True)
    (batch,) = loader.fixed(loader.read(settings, "captions").train, settings)
    assert batch.captions == ["a red car"]


def test_a_vocabulary_has_all_alternatives_and_none_of_their_signs():
    settings = Data(path="x", wildcards=True, templates=["a {photo|picture} of {}"])
    (caption, template) = wording.corpus([Item(None, ("a {red|blue} car",))], settings)
    assert caption.split() == ["a", "red", "blue", "car"] and template.split() == ["a", "photo", "picture", "of"]


def test_a_frozen_encoder_embeds_the_wordings_before_the_first_step(tmp_path, capsys):
    path = tiny_run.pictures(tmp_path / "set", size=64)
    words = ["data.shuffle_tags=true", "data.caption_variants=2", "steps=2", "batch_size=2"]
    made = tiny_pixart.settings(path, tmp_path / "run", tiny_pixart.parts(tmp_path), *words)
    found = loader.read(made.data, "captions")
    captions = wording.every(found.train, found.held_out, made.data, 0)
    said = f"{len(set(captions))} captions of 8 pictures can occur (data.caption_variants=2)"
    cli.main(["train", tiny_pixart.toml(tmp_path, made), "--dry-run"])
    assert f"captions   {said}; 0 are embedded already" in capsys.readouterr().out
    cli.main(["train", tiny_pixart.toml(tmp_path, made)])
    assert f"{said}: they are embedded first." in capsys.readouterr().out
    with pytest.raises(ValueError, match="set data.caption_variants=10"):
        tiny_pixart.settings(path, tmp_path / "run", {"text": {"encoder": made.text.encoder}},
                             "data.shuffle_tags=true")


@pytest.mark.parametrize("word, part", [
    ("data.tag_dropout=1.5", "data.tag_dropout=1.5 is outside [0, 1]"),
    ("data.keep_tags=-1", "data.keep_tags=-1 must not be negative"),
    ("data.caption_variants=-1", "data.caption_variants=-1 must not be negative"),
])
def test_a_setting_of_captions_that_cannot_work_is_refused(tmp_path, word, part):
    with pytest.raises(ValueError) as caught:
        tiny_run.settings(tiny_run.pictures(tmp_path / "set"), tmp_path / "run", word)
    assert part in str(caught.value)
