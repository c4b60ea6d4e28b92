"""Large data sets: what a picture costs before the first step, and listings that are kept."""
import io
import json
import random
import tarfile
import tracemalloc
from dataclasses import replace

import pytest
import tiny_pixart
import tiny_run
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import layouts, loader, pictures
from pixstack.trainer.data.items import InTar, Item, Items
from pixstack.trainer.features import cache, table
from pixstack.trainer.recipes import find
from pixstack.trainer.training import build

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
    for count in (500, 2500):
        path = jsonl(tmp_path, count, height=64, width=64)
        found, listing = kept_by(lambda path=path: layouts.read(path, "jsonl", Data()))
        batches, plan = kept_by(lambda found=found: loader.Batches(found.train, Data(), 0, 10))
        batches.at(0, 0)
        sizes[count] = listing, plan
    listing, plan = ((many - few) / 2000 for few, many in zip(*sizes.values(), strict=True))
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


@pytest.fixture
def shards(tmp_path):
    """Twelve shards of five pictures."""
    (tmp_path / "shards").mkdir()
    for i in range(12):
        shard(tmp_path / "shards" / f"{i:02d}.tar", [f"{i:02d}_{n}" for n in range(5)])
    return Data(path=str(tmp_path / "shards"), resolution=8, shards_at_once=2, streams=2)


def shown(batches, steps, positions):
    return [batches.items[batches.index(step, p)].file for step in steps for p in positions]


@pytest.mark.parametrize("batch_size, streams, at_once", [(6, 2, 2), (7, 3, 1), (4, 4, 5), (8, 1, 2)])
def test_shard_by_shard_each_picture_is_shown_once_an_epoch(shards, batch_size, streams, at_once):
    settings = replace(shards, shards_at_once=at_once, streams=streams)
    batches = loader.Batches(loader.read(settings, "captions").train, settings, 3, batch_size)
    row = [batches.index(place // batch_size, place % batch_size) for place in range(240)]
    epochs = [row[start:start + 60] for start in range(0, 240, 60)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs) and epochs[0] != epochs[1]


def test_each_process_reads_few_shards_at_a_time_and_of_its_own(shards):
    batches = loader.Batches(loader.read(shards, "captions").train, shards, 0, 4)
    for steps in (range(0, 5), range(5, 10), range(10, 15)):  # two shards of each process
        one, other = ({file.tar for file in shown(batches, steps, part)} for part in (range(2), range(2, 4)))
        assert len(one) == len(other) == 2 and not one & other
    first, second = ([file.tar.name for file in shown(batches, range(15), part)] for part in (range(2), range(2, 4)))
    assert len({*first, *second}) == 12 and first != sorted(first)


def test_a_run_that_resumes_within_a_shard_shows_what_the_unbroken_one_would(shards):
    whole, later = (loader.Batches(loader.read(shards, "captions").train, shards, 0, 4) for _ in range(2))
    unbroken = shown(whole, range(40), range(4))
    assert shown(later, range(23, 40), range(4)) == unbroken[23 * 4:]


def test_pictures_of_all_sizes_come_from_the_same_shards(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"file": f"{i}.png", "caption": "x", "height": 64, "width": (32, 64, 96)[i % 3]})
                            + "\n" for i in range(12_000)))
    settings = Data(path=str(path), buckets="area", resolution=64, bucket_multiple=16, shards_at_once=1)
    batches = loader.Batches(loader.read(settings, "captions", strict=False).train, settings, 0, 8)
    thousands = {batches.index(step, 0) // 1000 for step in range(50)}  # 400 pictures of three sizes
    assert len(batches.buckets) == 3 and len(thousands) <= 2


def test_streams_without_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.streams=2 are for pictures that are read shard by shard"):
        tiny_run.settings(tiny_run.pictures(tmp_path / "set"), tmp_path / "run", "data.streams=2")


def test_captions_may_be_embedded_when_they_are_first_shown(tmp_path, capsys):
    path = tiny_run.pictures(tmp_path / "set", size=64)
    made = tiny_pixart.settings(path, tmp_path / "run", tiny_pixart.parts(tmp_path), "text.ahead=false", "steps=1",
                                "batch_size=2", "validation.every=0")
    cli.main(["train", tiny_pixart.toml(tmp_path, made), "--dry-run"])
    assert "each is embedded when it is first shown" in capsys.readouterr().out
    cli.main(["train", tiny_pixart.toml(tmp_path, made)])
    found = loader.read(made.data, "captions")
    known = build.recipe(made, found, made.folder).text.missing(c for item in found.train for c in item.texts)
    every = {c for item in found.train for c in item.texts}
    assert 1 <= len(every) - len(known) <= 2 < len(every)


def test_a_large_cache_is_looked_into_at_few_places(tmp_path, monkeypatch):
    path = tiny_run.pictures(tmp_path / "set", size=64)
    made = tiny_pixart.settings(path, tmp_path / "run", tiny_pixart.parts(tmp_path),
                                f"cache.folder={tmp_path / 'cache'}")
    cli.main(["cache", tiny_pixart.toml(tmp_path, made)])
    found, said, looked = loader.read(made.data, "captions"), [], []
    monkeypatch.setattr(cache, "LOOKED_FOR", 3)
    monkeypatch.setattr(cache, "key_of", lambda item, *rest, plain=cache.key_of: looked.append(item) or plain(
        item, *rest))
    encoders = find(made.recipe.name).make_encoders(made)
    load = cache.loader(made, encoders, found.train, made.data, said.append)
    assert not said and len(looked) <= 3 < len(found.train)
    assert loader.Batches(found.train, made.data, 0, 8, load)(0, range(8)).features
