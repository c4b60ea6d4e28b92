"""Every layout becomes the same items, and a picture keeps its conditions and captions through it."""
import io
import json
import random
import tarfile
from importlib import import_module

import numpy as np
import pytest
from PIL import Image, features
from pixstack.models_impl import pictures as formats
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import doctor, layouts, loader, pictures, wording


def picture(path, colour=(200, 30, 30), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def read(path, need="captions", **settings):
    return loader.read(Data(path=str(path), **settings), need)


def test_sigmas_labels_have_both_captions_and_the_size(tmp_path):
    picture(tmp_path / "InternImgs/a/0.png")
    (tmp_path / "InternData").mkdir()
    (tmp_path / "InternData/data_info.json").write_text(json.dumps([{
        "path": "a/0.png", "prompt": "a wall", "sharegpt4v": "A red wall, evenly lit.", "height": 16, "width": 20,
        "ratio": 0.8}]))
    for path in (tmp_path, tmp_path / "InternData/data_info.json"):  # auto knows the release's folder
        item, = read(path).train
        assert item.file == tmp_path / "InternImgs/a/0.png" and item.size == (16, 20)
        assert (item.captions, item.described) == (("a wall",), ("A red wall, evenly lit.",))


def test_captions_are_mixed_in_the_share_that_is_asked_for(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "data_info.json").write_text(json.dumps([{"path": "0.png", "prompt": "p", "sharegpt4v": "long"}]))
    for share in (0.0, 0.25, 1.0):
        settings = Data(path=str(tmp_path), described_share=share, resolution=8)
        made = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)
        item = made.items[0]
        captions = [wording.at(item, settings, 0, made.rng(step, 0, "caption")) for step in range(400)]
        assert captions.count("long") / 400 == pytest.approx(share, abs=0.06)


def test_an_item_with_only_a_long_caption_is_captioned(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "data_info.json").write_text(json.dumps([{"path": "0.png", "sharegpt4v": "long"}]))
    settings = Data(path=str(tmp_path), described_share=0.0, resolution=8)
    batch = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))
    assert batch.captions == ["long"]


def test_sam_reads_the_stems_of_its_partitions_and_no_others(tmp_path):
    for stem in ("sa_1", "sa_2", "sa_3"):
        picture(tmp_path / f"images/{stem}.jpg")
        (tmp_path / "captions").mkdir(exist_ok=True)
        (tmp_path / f"captions/{stem}.txt").write_text(f"picture\n{stem}\n")
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition/part0.txt").write_text("sa_1\n")
    (tmp_path / "partition/part1.txt").write_text("sa_3\n")
    assert [i.captions for i in read(tmp_path).train] == [("picture sa_1",), ("picture sa_3",)]


def test_ultrapixels_folders_are_folders_flat_or_one_deep(tmp_path):
    for name in ("b.jpg", "deep/a.jpg"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".json").write_text(json.dumps({"caption": name}))
    assert [i.captions for i in read(tmp_path).train] == [("b.jpg",), ("deep/a.jpg",)]


NAMES = ("canny", "depth", "openpose", "hed")


def ponder(tmp_path, size=(64, 48)):
    """A jsonl of PixelPonder: the picture is a ramp in both directions, and so is every condition, its own way up."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    (tmp_path / "set").mkdir()
    for i, name in enumerate(("image", *NAMES)):
        pixels = np.stack([x * 3, y * 3, x * 0 + 40 * i], -1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/{name}.png")
    entry = {"image": "set/image.png", "text": "a ramp", **{n: f"set/{n}.png" for n in NAMES}}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("crop, buckets", [("random", ""), ("centre", ""), ("random", "area"), ("centre", "area")])
def test_a_condition_is_cut_and_mirrored_as_its_picture(tmp_path, crop, buckets):
    settings = Data(path=str(ponder(tmp_path)), conditions=list(NAMES), resolution=32, crop=crop, flip=True,
                    buckets=buckets, bucket_multiple=8)
    made = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)
    mirrored = set()
    for step in range(8):
        batch = made(step, range(1))
        assert list(batch.conditions) == list(NAMES) and batch.captions == ["a ramp"]
        for i, name in enumerate(NAMES, 1):
            assert (batch.conditions[name][:, :2] == batch.pictures[:, :2]).all()
            assert (batch.conditions[name][:, 2] == 40 * i).all()
        mirrored.add(bool(batch.pictures[0, 0, 0, 0] > batch.pictures[0, 0, 0, -1]))
    assert mirrored == {True, False}


def test_a_condition_of_another_size_is_cut_in_proportion(tmp_path):
    path = ponder(tmp_path)
    for size in ((32, 24), (128, 96)):
        with Image.open(tmp_path / "set/image.png") as whole:
            whole.resize(size, Image.BICUBIC).save(tmp_path / "set/hed.png")
        settings = Data(path=str(path), conditions=["hed"], resolution=32, crop="random")
        batch = loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))
        difference = batch.conditions["hed"].float() - batch.pictures.float()
        assert difference[:, :, 2:-2, 2:-2].abs().max() <= 4


def test_a_condition_of_another_shape_is_named_with_both_sizes(tmp_path):
    path = ponder(tmp_path)
    picture(tmp_path / "set/depth.png", size=(48, 48))
    settings = Data(path=str(path), conditions=["depth"], resolution=32)
    with pytest.raises(ValueError, match=r"depth\.png: it is 48x48.*its picture, 64x48"):
        loader.Batches(loader.read(settings, "captions").train, settings, 0, 1)(0, range(1))


def test_a_condition_that_is_missing_is_named(tmp_path):
    path = ponder(tmp_path)
    (tmp_path / "set/hed.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 pictures have no condition 'pose'.*'hed' are named but not there"):
        read(path, conditions=["pose", "hed"])


def test_conditions_lie_in_folders_beside_the_pictures(tmp_path):
    for name in ("images/a.png", "images/sub/b.png", "hed/a.jpg", "hed/sub/b.png"):
        picture(tmp_path / name)
    found = read(tmp_path / "images", caption="x", conditions=["hed"]).train
    assert [i.conditions["hed"] for i in found] == [tmp_path / "hed/a.jpg", tmp_path / "hed/sub/b.png"]


def test_a_depth_map_of_16_bits_keeps_its_greys(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "d.png")
    assert np.array(pictures.decode(tmp_path / "d.png"))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(colour, size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_are_read_at_their_places(tmp_path):
    for shard, keys in (("0.tar", ("a", "b")), ("1.tar", ("c",))):
        with tarfile.open(tmp_path / shard, "w") as archive:
            for key in keys:
                add(archive, f"x/{key}.hed.png", png((9, 9, 9)))
                add(archive, f"x/{key}.png", png((ord(key), 0, 0)))
                add(archive, f"x/{key}.txt", f"picture {key}".encode())
    settings = Data(path=str(tmp_path), resolution=8, conditions=["hed"])
    found = loader.read(settings, "captions").train
    assert [i.captions for i in found] == [("picture a",), ("picture b",), ("picture c",)]
    batch = loader.Batches(found, settings, 0, 3)(0, range(3))
    for caption, shown, hed in zip(batch.captions, batch.pictures, batch.conditions["hed"], strict=True):
        assert shown[0].float().mean() == ord(caption[-1]) and (hed == 9).all()
    assert batch.sizes.tolist() == [[16, 20]] * 3


def test_shards_may_have_json_and_classes(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.jpg", png((1, 2, 3)))
        add(archive, "a.json", json.dumps({"caption": "short", "sharegpt4v": "long"}).encode())
        add(archive, "a.cls", b"7")
    item, = read(tmp_path / "0.tar").train
    assert (item.captions, item.described, item.label) == (("short",), ("long",), 7)


def test_a_compressed_shard_is_refused_with_the_reason(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as archive:
        add(archive, "a.png", png((1, 2, 3)))
    with pytest.raises(ValueError, match="0.tar cannot be read as a plain tar.*Unpack it"):
        read(tmp_path)


@pytest.fixture
def rows():
    import datasets

    pixels = [Image.new("RGB", (20, 16), (10 * i, 0, 0)) for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "hed": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["ant", "bee"])})
    return datasets.Dataset.from_dict({"image": pixels, "text": [f"number {i}" for i in range(4)], "hed": pixels,
                                       "label": [0, 1, 0, 1]}, features=features)


def test_a_hugging_face_data_set_is_read_from_its_folder(rows, tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "set")
    settings = Data(path=str(tmp_path / "set"), resolution=8, conditions=["hed"])
    found = loader.read(settings, "captions")
    assert (len(found.train), len(found.held_out), found.classes) == (4, 1, ["ant", "bee"])
    assert [i.label for i in found.train] == [0, 1, 0, 1]
    batch = loader.Batches(found.train, settings, 0, 4)(0, range(4))
    for caption, shown, hed in zip(batch.captions, batch.pictures, batch.conditions["hed"], strict=True):
        assert shown[0].float().mean() == 10 * int(caption[-1]) and (hed == shown).all()


def test_parquet_files_are_read_with_their_splits(rows, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    rows.select([1]).to_parquet(tmp_path / "set/validation-00000-of-00001.parquet")
    found = read(tmp_path / "set", resolution=8)
    assert [i.captions[0] for i in found.train] == [f"number {i}" for i in range(4)]
    assert [i.captions[0] for i in found.held_out] == ["number 1"]
    assert pictures.decode(found.train[3].file).getpixel((0, 0)) == (30, 0, 0)


def test_columns_that_are_not_there_are_named(rows, tmp_path):
    rows.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="columns image, text, hed, label; wanted are a picture, depth"):
        read(tmp_path / "set", conditions=["depth"])


def test_the_layout_of_a_folder_is_recognised(tmp_path):
    picture(tmp_path / "classes/ant/0.png"), picture(tmp_path / "flat/0.png"), picture(tmp_path / "deep/a/0.png")
    (tmp_path / "deep/a/0.txt").write_text("x")
    kinds = {name: layouts.recognised(tmp_path / name)[0] for name in ("classes", "flat", "deep")}
    assert kinds == {"classes": "classes", "flat": "folder", "deep": "folder"}


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("")
    with pytest.raises(ValueError, match="data.csv is of no known kind"):
        read(tmp_path / "data.csv")


def test_pictures_without_captions_take_the_one_for_all(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("its own")
    found = read(tmp_path, caption="a photo of sks dog").train
    assert [i.captions for i in found] == [("a photo of sks dog",), ("its own",)]


def test_an_exif_turned_picture_measures_as_it_stands(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert pictures.measure(tmp_path / "a.jpg") == (40, 20) == pictures.decode(tmp_path / "a.jpg").size[::-1]


def test_the_mark_that_windows_editors_put_first_is_no_part_of_a_caption(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa card")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"caption": "a cup"}).encode())
    assert [i.captions for i in read(tmp_path).train] == [("a card",), ("a cup",)]
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"file": "a.png", "caption": "a hat"}).encode())
    assert read(tmp_path / "set.jsonl").train[0].captions == ("a hat",)


def test_a_caption_inside_a_tar_that_is_no_utf8_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.png", png((1, 2, 3)))
        add(archive, "a.txt", "Gemälde".encode("latin-1"))
    with pytest.raises(ValueError, match="0.tar: the .txt, .json or .cls of a.png cannot be read"):
        read(tmp_path / "0.tar")


def test_a_line_separator_in_a_caption_is_no_end_of_its_entry(tmp_path):
    entries = [{"file": "a.png", "caption": f"one{sign}two"} for sign in ("\u2028", "\x85", "\x0c")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), "utf-8")
    found = layouts.read(tmp_path / "data.jsonl", "jsonl", Data()).train
    assert [i.captions for i in found] == [(e["caption"],) for e in entries]


def test_tags_in_one_string_are_split_at_its_commas(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"file": "a.png", "caption": "x", "tags": "red, a card,"}\n')
    assert layouts.read(tmp_path / "data.jsonl", "jsonl", Data()).train[0].tags == ("red", "a card")


@pytest.mark.parametrize("caption", ["5", "[5]", "true"])
def test_a_caption_that_is_no_text_is_named_with_its_line(tmp_path, caption):
    (tmp_path / "data.jsonl").write_text(f'{{"file": "a.png", "caption": {caption}}}\n')
    with pytest.raises(ValueError, match="line 1: .*(5|True) is no caption"):
        layouts.read(tmp_path / "data.jsonl", "jsonl", Data())
    picture(tmp_path / "set/a.png")
    (tmp_path / "set/a.json").write_text(caption)
    with pytest.raises(ValueError, match="set/a.json: (5|True) is no caption"):
        layouts.read(tmp_path / "set", "folder", Data())


# --- What other programs keep

def captioned(tmp_path):
    return {i.file.relative_to(tmp_path).as_posix(): i.captions for i in read(tmp_path, need="").train}


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.png.txt", "a.png.caption", "a.Caption"])
def test_a_caption_beside_a_picture_may_have_any_of_the_names_in_use(tmp_path, name):
    picture(tmp_path / "deep/a.png")
    (tmp_path / "deep" / name).write_text("\ufeffa red wall\n", "utf-8")
    assert captioned(tmp_path) == {"deep/a.png": ("a red wall",)}


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.png.json"])
def test_a_json_beside_a_picture_brings_its_caption_with_tags(tmp_path, name):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text('{"caption": "a wall", "tags": "red, flat"}')
    (item,) = read(tmp_path).train
    assert (item.captions, item.tags) == (("a wall",), ("red", "flat"))


def test_the_first_of_several_captions_that_says_something_counts(tmp_path):
    picture(tmp_path / "a.png")
    for name, words in (("a.txt", " \n"), ("a.caption", "second"), ("a.json", '{"caption": "third"}')):
        (tmp_path / name).write_text(words)
    assert captioned(tmp_path) == {"a.png": ("second",)}


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JPG", "a.apng"])
def test_a_picture_may_have_any_ending_of_its_format(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG" if name == "a.apng" else "JPEG")
    (tmp_path / "a.txt").write_text("x")
    assert captioned(tmp_path) == {name: ("x",)}
    assert pictures.decode(tmp_path / name).size == (8, 8)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_reads_it(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "a.avif", quality=100)
    (tmp_path / "a.txt").write_text("x")
    assert captioned(tmp_path) == {"a.avif": ("x",)}
    assert abs(np.asarray(pictures.decode(tmp_path / "a.avif")).astype(int) - (200, 30, 30)).max() < 8


@pytest.mark.parametrize("name, words", [
    ("a.jxl", "Install pillow-jxl-plugin"), ("a.heic", "Install pillow-heif"), ("a.PSD", "Save it as PNG"),
])  # fmt: skip
def test_a_picture_of_another_format_is_named_with_what_to_do(tmp_path, name, words, caplog, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    formats.readable.cache_clear()
    picture(tmp_path / "b.png")
    (tmp_path / name).write_bytes(b"\xff\x0a")
    read(tmp_path, need="")
    assert "1 pictures are of formats that are not read here" in caplog.text and f"{name}: {words}" in caplog.text
    (tmp_path / "data.jsonl").write_text(json.dumps({"file": name, "caption": "x"}))
    with pytest.raises(ValueError, match=f"{name} cannot be read as a picture: .* {words}.*trainer doctor"):
        pictures.Pictures(read(tmp_path / "data.jsonl").train, Data(resolution=8)).load(0, (8, 8), random.Random(0))
    formats.readable.cache_clear()


def test_a_plugin_of_pillow_s_that_is_installed_is_used(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: module if module == "pillow_jxl" else None)
    monkeypatch.setattr(formats, "import_module", lambda name: Image.register_extension("JXL", ".jxl"))
    formats.readable.cache_clear()
    assert ".jxl" in formats.readable() and ".heic" not in formats.readable() and formats.remedy(".jxl") == ""
    formats.readable.cache_clear()
    Image.EXTENSION.pop(".jxl")


def test_masks_and_conditions_of_onetrainer_are_not_trained_on(tmp_path):
    for name in ("a.png", "a-masklabel.png", "a-condlabel.png", "a-MaskLabel.JPG", "b-mask.png"):
        picture(tmp_path / name)
    assert list(captioned(tmp_path)) == ["a.png", "b-mask.png"]
    report = doctor.examine(Data(path=str(tmp_path), caption="x", resolution=8), "captions")
    (named,) = [f for f in report.findings if "masks or conditions of another program" in f.sentence]
    assert len(named.cases) == 3
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("a.png", "a-masklabel.png"):
            archive.add(tmp_path / name, name)
    assert [i.file.name for i in layouts.read(tmp_path / "0.tar", "auto", Data()).train] == ["a.png"]


def test_linked_folders_are_followed_and_a_circle_of_links_ends(tmp_path):
    picture(tmp_path / "elsewhere/one/b.png"), picture(tmp_path / "set/a.png"), picture(tmp_path / "set/z/c.png")
    (tmp_path / "elsewhere/one/b.txt").write_text("b")
    links = {"set/linked": "elsewhere", "elsewhere/back": "set", "set/self": "set", "set/y": "set/z"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "set/broken").symlink_to(tmp_path / "nowhere")
    assert captioned(tmp_path / "set") == {"a.png": (), "linked/one/b.png": ("b",), "z/c.png": ()}


def test_a_class_may_be_a_linked_folder_and_an_archive_lie_behind_a_link(tmp_path):
    picture(tmp_path / "elsewhere/deep/0.png"), picture(tmp_path / "set/ant/0.png")
    (tmp_path / "set/bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = layouts.read(tmp_path / "set", "classes", Data())
    assert found.classes == ["ant", "bee"] and len(found.train) == 2
    with tarfile.open(tmp_path / "elsewhere/0.tar", "w") as archive:
        archive.add(tmp_path / "set/ant/0.png", "0.png")
    assert layouts.recognised(tmp_path / "set")[0] == "webdataset"


CSV = ('file_name,text,tags,height,width,canny_file_name\r\n'
       'a.png,"a red wall, flat",,16,20,a.png\r\n'
       'b/c.png,"two\nlines",one,,,\r\n')


@pytest.mark.parametrize("named", [True, False])
def test_the_metadata_csv_of_a_hugging_face_folder_is_read(tmp_path, named):
    picture(tmp_path / "a.png"), picture(tmp_path / "b/c.png")
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    a, c = read(tmp_path / "metadata.csv" if named else tmp_path).train
    assert (a.file, a.captions, a.size) == (tmp_path / "a.png", ("a red wall, flat",), (16, 20))
    assert (c.captions, c.tags, c.size) == (("two\nlines",), ("one",), None)
    given = layouts.read(tmp_path / "metadata.csv", "csv", Data(conditions=["canny"])).train
    assert given[0].conditions == {"canny": tmp_path / "a.png"} and given[1].conditions == {}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_the_splits_of_a_hugging_face_folder_are_read_with_their_lists(tmp_path, name):
    for split, words in (("train", "a wall"), ("validation", "a door"), ("test", "never seen")):
        picture(tmp_path / split / "0.png")
        if name.endswith("jsonl"):
            (tmp_path / split / name).write_text(json.dumps({"file_name": "0.png", "text": words}))
        elif name.endswith("csv"):
            (tmp_path / split / name).write_text(f"file_name,text\n0.png,{words}\n")
        else:
            table = pytest.importorskip("pyarrow").table({"file_name": ["0.png"], "text": [words]})
            import_module("pyarrow.parquet").write_table(table, tmp_path / split / name)
    found = read(tmp_path)
    assert [i.captions for i in found.train] == [("a wall",)]
    assert [i.captions for i in found.held_out] == [("a door",)]


def test_splits_of_classes_keep_their_numbers(tmp_path):
    picture(tmp_path / "train/ant/0.png"), picture(tmp_path / "train/bee/0.png"), picture(tmp_path / "test/bee/1.png")
    found = read(tmp_path, need="classes")
    assert found.classes == ["ant", "bee"] and [i.label for i in found.held_out] == [1]


@pytest.mark.parametrize("text, words", [
    ('file_name,text\n"a.png,x', "not valid CSV"), ("name,text\na,b\n", "none of its columns is file, file_name"),
    ("file_name,class\na.png,\n,2\n", "row 2: not an object"), ("file_name,height,width\na.png,x,2\n", "row 1"),
    ("file_name,height,width\na.png,999999999,2\n", "row 1: .* of no picture"),
])  # fmt: skip
def test_a_csv_that_is_none_is_refused_with_its_row(tmp_path, text, words):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=f"metadata.csv.*{words}"):
        read(tmp_path / "metadata.csv", need="")


@pytest.mark.parametrize("key", ["a", "deep/a", "deep/a.png", "{}/deep/a.png", "{}/deep/a"])
def test_kohya_s_metadata_are_read_by_name_or_by_path(tmp_path, key):
    picture(tmp_path / "deep/a.png")
    facts = {"caption": "a wall", "tags": "red, flat", "train_resolution": [512, 512]}
    (tmp_path / "meta_lat.json").write_text(json.dumps({key.format(tmp_path): facts}))
    for path in (tmp_path, tmp_path / "meta_lat.json"):
        (item,) = read(path).train
        assert (item.file, item.captions, item.tags) == (tmp_path / "deep/a.png", ("a wall",), ("red", "flat"))


def test_kohya_s_tags_are_the_caption_where_there_is_no_other(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "meta_cap.json").write_text('{"a": {"tags": "red, flat"}}')
    (item,) = read(tmp_path).train
    assert (item.captions, item.tags) == (("red, flat",), ())


def test_a_name_of_several_pictures_in_kohya_s_metadata_is_refused(tmp_path):
    picture(tmp_path / "a/0.png"), picture(tmp_path / "b/0.png")
    (tmp_path / "meta_cap.json").write_text('{"0": {"caption": "x"}}')
    with pytest.raises(ValueError, match="1 names are those of several pictures"):
        read(tmp_path)


@pytest.mark.parametrize("text", [
    '{"a": 5}', '{"a": {"caption": 5}}', '{"a": {"tags": {"red": 1}}}', "[" * 100_000, "7",
], ids=range(5))  # fmt: skip
def test_metadata_that_are_none_are_refused_with_their_file(tmp_path, text):
    picture(tmp_path / "a.png")
    (tmp_path / "meta_cap.json").write_text(text)
    with pytest.raises(ValueError, match="meta_cap.json"):
        read(tmp_path)


def test_half_a_sign_in_a_caption_does_not_stop_a_run(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text('{"file": "a.png", "text": "a cat \\ud83d", "tags": ["\\udc80"]}')
    (item,) = read(tmp_path).train
    assert (item.captions, item.tags) == (("a cat \ufffd",), ("\ufffd",))


def test_lists_in_a_folder_of_pictures_are_named_by_the_doctor(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("a,b")
    report = doctor.examine(Data(path=str(tmp_path), caption="x", resolution=8), "captions")
    assert [str(tmp_path / "captions.csv")] in [f.cases for f in report.findings if "lists in the folder" in f.sentence]
