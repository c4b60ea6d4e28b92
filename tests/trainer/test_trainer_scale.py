"""Large data sets: what a picture costs before the first step, and listings that are kept."""
import io
import json
import random
import tarfile
import tracemalloc
from dataclasses import replace

import pytest
from PIL import Image
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import layouts, loader, pictures
from pixstack.trainer.data.items import InTar, Item, Items
from pixstack.trainer.features import table

WORDS = "number {}, a photograph of a harbour in the evening, with small boats and the lamps of the town"


def jsonl(folder, count, **more):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"file": f"{i}.png", "caption": WORDS.format(i), "class": f"c{i % 3}",
                                        "split": "held_out" if i % 10 == 9 else "train", **more}) + "\n"
                            for i in range(count)))
    return path


def shard(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            for ending, content in (("png", b"?"), ("txt", WORDS.format(name).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_a_picture_costs_its_words_and_a_few_bytes(tmp_path):
    def kept_by(call):
        tracemalloc.start()
        try:
            made = call()
            return made, tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    sizes = {}
    for count in (1000, 5000):
        path = jsonl(tmp_path, count, height=64, width=64)
        found, listing = kept_by(lambda path=path: layouts.read(path, "jsonl", Data()))
        batches, plan = kept_by(lambda found=found: loader.Batches(found.train, Data(), 0, 10))
        batches.at(0, 0)
        sizes[count] = listing, plan
    listing, plan = ((many - few) / 4000 for few, many in zip(*sizes.values(), strict=True))
    assert listing < 2 * (len(WORDS) + 40)  # a list of Python objects takes 1,350
    assert plan < 16


def test_a_kept_listing_is_what_was_read_and_is_not_read_again(tmp_path, monkeypatch):
    jsonl(tmp_path, 50)
    (tmp_path / "shards").mkdir()
    for i in range(3):
        shard(tmp_path / "shards" / f"{i}.tar", [f"a{i}", f"b{i}"])
    for path, kind in ((tmp_path / "data.jsonl", "jsonl"), (tmp_path / "shards", "webdataset")):
        settings = Data(index=str(tmp_path / "index"))
        plain, first = layouts.read(path, kind, Data()), layouts.read(path, kind, settings)
        monkeypatch.setitem(layouts.READERS, kind, None)
        again = layouts.read(path, kind, settings)
        for found in (first, again):
            assert found.train == plain.train and found.held_out == plain.held_out and found.classes == plain.classes
        assert loader.identity(loader.Collection(again.train, again.held_out, [])) == loader.identity(
            loader.Collection(plain.train, plain.held_out, []))
    assert again.train[3].file == InTar(tmp_path / "shards/1.tar", "b1.png", again.train[3].file.offset, 1)


def test_a_listing_whose_files_have_changed_is_made_anew_in_place_of_the_old(tmp_path):
    settings = Data(index=str(tmp_path / "index"))
    before = layouts.read(jsonl(tmp_path, 20), "jsonl", settings)
    after = layouts.read(jsonl(tmp_path, 30), "jsonl", settings)
    assert (len(before.train), len(after.train)) == (18, 27) and before.train[17].captions == (WORDS.format(18),)
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_a_listing_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    path = jsonl(tmp_path, 5)
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(ValueError, match="line 6"):
        layouts.read(path, "jsonl", Data(index=str(tmp_path / "index")))
    assert not list((tmp_path / "index").iterdir())


def test_what_pictures_measure_is_kept_with_the_listing(tmp_path, monkeypatch):
    path = jsonl(tmp_path, 10)
    for i in range(10):
        Image.new("RGB", (64, 32 if i % 2 else 64)).save(tmp_path / f"{i}.png")
    settings = Data(path=str(path), buckets="area", resolution=64, bucket_multiple=16, index=str(tmp_path / "index"))
    first = loader.Batches(loader.read(settings, "captions").train, settings, 0, 2)
    monkeypatch.setattr(pictures, "measure", None)
    again = loader.Batches(loader.read(settings, "captions").train, settings, 0, 2)
    plain = [first.at(step, 0) for step in range(20)]
    assert [again.at(step, 0) for step in range(20)] == plain and len({size for _, size in plain}) == 2


def test_items_are_what_they_were_made_of_whatever_their_names_hold(tmp_path):
    some = [Item(tmp_path / "a\udc80.png", ("один \ud83d", "zwei"), ("x",), 3, ("long",), {"depth": tmp_path / "d.png"},
                 (3, 4), True, 2), Item(InTar(tmp_path / "0.tar", "b/c.png", 512, 7)), Item(None, ("no file",))]
    items = Items.of(some)
    assert items == some and (items + items)[-3] == some[0] and items[1:] == some[1:]
    assert items.changed(set=1, words=lambda item: ("given",))[1] == replace(some[1], set=1, captions=("given",))
    assert items.only(items.column("prior") > 0) == some[:1] and items.has("depth").tolist() == [True, False, False]


def test_a_table_is_a_dict_whatever_comes_when(monkeypatch):
    monkeypatch.setattr(table, "FEW", 50)
    made, rng, expected = table.KeyTable([("a", "<i8"), ("b", "S5")]), random.Random(0), {}
    for _ in range(2000):
        key, value = f"{rng.randrange(700)}", (rng.randrange(2**40), f"{rng.randrange(99999)}".encode())
        made[key] = expected[key] = value
        other = f"{rng.randrange(900)}"
        assert made.get(other) == expected.get(other) and (other in made) == (other in expected)
    assert len(made) == len(expected)
