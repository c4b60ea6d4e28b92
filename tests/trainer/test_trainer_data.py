import json
import random
import struct

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import doctor, emoji, layouts, loader, pictures
from pixstack.trainer.features import tokenizer as tokenizers_


def items(tmp_path):
    return loader.read(Data(path=str(tiny_run.pictures(tmp_path / "set"))), "captions")


def folder_of(tmp_path, size=(20, 16), names=("a", "b")):
    for name in names:
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_jsonl_knows_its_split(tmp_path):
    found = items(tmp_path)
    assert len(found.train) == 8 and len(found.held_out) == 4
    assert {i.label for i in found.held_out} & {i.label for i in found.train} == set()


def test_a_folder_reads_captions_beside_its_pictures(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "a.txt").write_text("a grey wall\nconcrete\n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "another wall"}))
    found = loader.read(Data(kind="folder", path=str(tmp_path)), "captions")
    assert [i.captions for i in found.train] == [("a grey wall", "concrete"), ("another wall",)]


def test_pictures_without_captions_are_listed(tmp_path):
    with pytest.raises(ValueError, match=r"2 pictures have no caption:\n.*a\.png\n.*b\.png"):
        loader.read(Data(kind="folder", path=str(folder_of(tmp_path))), "captions")


def test_class_folders_number_their_classes_in_order(tmp_path):
    for name in ("n02", "n01"):
        (tmp_path / name).mkdir()
        folder_of(tmp_path / name, names=(name,))
    found = loader.read(Data(kind="classes", path=str(tmp_path)), "classes")
    assert found.classes == ["n01", "n02"] and [i.label for i in found.train] == [0, 1]


def class_folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        folder_of(root / name, names=("a",))
    return str(root)


def test_held_out_folders_have_the_numbers_of_the_training_classes(tmp_path):
    train, held_out = class_folders(tmp_path / "train", "ant", "bee", "cat"), class_folders(tmp_path / "held", "cat")
    found = loader.read(Data(kind="classes", path=train, held_out_path=held_out), "classes")
    assert [i.label for i in found.held_out] == [2] and found.classes == ["ant", "bee", "cat"]


def test_a_held_out_folder_of_no_class_is_named(tmp_path):
    train, held_out = class_folders(tmp_path / "train", "ant"), class_folders(tmp_path / "held", "ant", "dog")
    with pytest.raises(ValueError, match=r"no class that is trained on:\n    dog"):
        loader.read(Data(kind="classes", path=train, held_out_path=held_out), "classes")


def test_hidden_or_empty_folders_are_no_classes(tmp_path):
    train = class_folders(tmp_path, "ant", ".thumbnails", "bee")
    (tmp_path / "april").mkdir()
    assert loader.read(Data(kind="classes", path=train), "classes").classes == ["ant", "bee"]


def test_a_picture_stands_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert pictures.decode(tmp_path / "a.jpg").size == (2, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_stands_on_white(tmp_path, mode):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode).save(tmp_path / "a.png")
    assert pictures.decode(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_that_is_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is too large"):
        pictures.decode(tmp_path / "a.png")


def test_an_unreadable_picture_is_named(tmp_path):
    found = items(tmp_path)
    found.train[0].file.write_bytes(b"not a picture")
    batches = loader.Batches(found.train, Data(resolution=16, crop="none"), 0, 8)
    with pytest.raises(ValueError, match=found.train[0].file.name):
        batches(0, range(8))


def test_a_broken_line_of_a_jsonl_is_named(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(ValueError, match="line 13"):
        loader.read(Data(path=str(path)), "captions")


def test_an_epoch_shows_every_picture_once(tmp_path):
    batches = loader.Batches(items(tmp_path).train, Data(), seed=3, batch_size=4)
    shown = [batches.index(step, p) for step in range(4) for p in range(4)]
    assert sorted(shown[:8]) == sorted(shown[8:]) == list(range(8)) and shown[:8] != shown[8:]


def test_a_batch_depends_only_on_its_step(tmp_path):
    found = items(tmp_path)
    settings = Data(resolution=8, crop="random", flip=True, tag_share=0.5, templates=["a {}"], template_share=0.5)
    one, other = (loader.Batches(found.train, settings, 0, 6) for _ in range(2))
    for step in range(3):
        one(step, range(6), following=(step + 1, range(6)))
    a, b = one(3, range(6)), other(3, range(6))
    assert torch.equal(a.pictures, b.pictures) and a.captions == b.captions


def test_parts_of_a_batch_are_the_batch(tmp_path):
    batches = loader.Batches(items(tmp_path).train, Data(resolution=8, tag_share=0.5), 0, 6)
    whole, parts = batches(1, range(6)), [batches(1, range(3)), batches(1, range(3, 6))]
    assert torch.equal(whole.pictures, torch.cat([p.pictures for p in parts]))
    assert whole.captions == parts[0].captions + parts[1].captions


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_a_crop_has_the_asked_size(crop):
    import random

    picture = Image.new("RGB", (90, 37))
    for size in ((16, 16), (24, 8), (40, 50)):
        cut = pictures.plan((37, 90), size, crop, random.Random(0))
        assert cut.apply(picture).size == size[::-1]


def test_the_random_crop_is_the_papers():
    """Short side to round(1.125 x size): 18 for 16, so a square leaves 3 x 3 places."""
    import random

    ramp = Image.fromarray(np.add.outer(np.arange(18) * 10, np.arange(18)).astype(np.uint8)).convert("RGB")
    cuts = [pictures.plan((18, 18), (16, 16), "random", random.Random(i), pictures.MARGIN) for i in range(60)]
    corners = {np.array(cut.apply(ramp))[0, 0, 0] for cut in cuts}
    assert corners == {r * 10 + c for r in range(3) for c in range(3)}


def test_a_tokenizer_ends_every_text(tmp_path):
    made = tokenizers_.train(["red square", "blue card", "red card"], 40)
    assert made.encode("").ids == [1]
    assert made.encode("Red  SQUARE").ids == made.encode("red square").ids
    assert made.encode("red card").ids[-1] == 1 and 2 not in made.encode("red card").ids


def test_equal_captions_give_equal_tokenizers():
    words = [f"a {c} {s}" for c in tiny_run.COLOURS for s in ("square", "card", "quick fox")]
    assert tokenizers_.train(words, 60).to_str() == tokenizers_.train(words[::-1], 60).to_str()


@pytest.fixture
def packages(tmp_path):
    """Two emoji in the layout of the npm packages; one has a skin tone."""
    google, base = tmp_path / "npm/emoji-datasource-google", tmp_path / "npm/emojibase-data"
    (google / "img/google/64").mkdir(parents=True)
    (base / "en").mkdir(parents=True)
    for folder in (google, base):
        (folder / "LICENSE").write_text("MIT")
    for name in ("1f697.png", "1f44b.png", "1f44b-1f3fb.png"):
        Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(google / "img/google/64" / name)
    common = {"has_img_google": True, "category": "C", "subcategory": "s"}
    (google / "emoji.json").write_text(json.dumps([
        {"unified": "1F697", "image": "1f697.png", "name": "AUTOMOBILE", "short_names": ["car", "red_car"], **common},
        {"unified": "1F44B", "image": "1f44b.png", "name": "WAVING HAND SIGN", "short_names": ["wave"], **common,
         "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB", "image": "1f44b-1f3fb.png"}}},
    ]))
    (base / "en/data.json").write_text(json.dumps([
        {"label": "automobile", "hexcode": "1F697", "tags": ["vehicle"]},
        {"label": "waving hand", "hexcode": "1F44B", "tags": ["hi"],
         "skins": [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"}]},
    ]))
    return tmp_path / "npm"


def test_the_emoji_set_reads_like_people_speak(packages, tmp_path):
    path = emoji.build(tmp_path / "emoji", packages)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["captions"] for e in entries] == [
        ["automobile", "car", "red car"], ["waving hand", "waving hand sign", "wave"]]


def test_an_emoji_is_of_the_class_of_its_subcategory(packages, tmp_path):
    settings = Data(kind="jsonl", path=str(emoji.build(tmp_path / "emoji", packages)))
    found = loader.read(settings, "classes")
    assert found.classes == ["s"] and {i.label for i in (*found.train, *found.held_out)} == {0}


def test_the_emoji_set_stands_on_white(packages, tmp_path):
    path = emoji.build(tmp_path / "emoji", packages)
    assert Image.open(path.parent / "images/noto/1f697.png").getpixel((5, 5)) == (255, 127, 127)


@pytest.fixture
def fluent(packages):
    """The second style: no waving hand, a car that is not square, under a name with a variation selector."""
    folder = packages / "@lobehub/fluent-emoji-3d"
    (folder / "assets").mkdir(parents=True)
    (folder / "README.md").write_text("MIT")
    Image.new("RGBA", (64, 32), (0, 0, 255, 255)).save(folder / "assets/1f697-fe0f.webp", lossless=True)
    return packages


def test_a_second_style_has_the_same_words_and_the_same_emoji_held_out(fluent, tmp_path):
    path = emoji.build(tmp_path / "emoji", fluent, styles=("noto", "fluent-3d"))
    noto, _, fluent = map(json.loads, path.read_text().splitlines())
    assert [noto.pop("style"), fluent.pop("style")] == ["noto", "fluent-3d"]
    assert [noto.pop("file"), fluent.pop("file")] == ["images/noto/1f697.png", "images/fluent-3d/1f697.png"]
    assert noto == fluent
    assert "Microsoft" in (path.parent / "NOTICE").read_text() and (path.parent / "README-fluent-emoji-3d.md").is_file()


def test_an_emoji_that_is_not_square_stands_in_the_middle_of_a_square(fluent, tmp_path):
    path = emoji.build(tmp_path / "emoji", fluent, styles=("fluent-3d",))
    picture = Image.open(path.parent / "images/fluent-3d/1f697.png")
    assert picture.size == (64, 64)
    assert [picture.getpixel((32, y)) for y in (15, 16, 47, 48)] == [(255, 255, 255), *[(0, 0, 255)] * 2, (255,) * 3]


def test_a_style_whose_package_is_not_there_is_refused_by_its_name(packages, tmp_path):
    with pytest.raises(ValueError, match="@lobehub/fluent-emoji-3d"):
        emoji.build(tmp_path / "emoji", packages, styles=("fluent-3d",))


def test_the_emoji_set_keeps_its_licences_beside_it(packages, tmp_path):
    folder = emoji.build(tmp_path / "emoji", packages).parent
    assert {p.name for p in folder.glob("LICENSE-*")} == {"LICENSE-emoji-datasource-google", "LICENSE-emojibase-data"}
    assert "Apache License 2.0" in (folder / "NOTICE").read_text()


def test_skin_tones_are_held_out_with_their_emoji(packages, tmp_path):
    path = emoji.build(tmp_path / "emoji", packages, skin_tones=True)
    splits = {e["code_point"]: e["split"] for e in map(json.loads, path.read_text().splitlines())}
    assert len(splits) == 3 and splits["1F44B"] == splits["1F44B-1F3FB"]


def test_about_one_emoji_in_twenty_is_held_out():
    held = sum(emoji.is_held_out(f"{n:X}") for n in range(0x1F300, 0x1F300 + 4000))
    assert 150 < held < 250


def test_a_folder_without_the_packages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="emoji-datasource-google"):
        emoji.build(tmp_path / "out", tmp_path)


# --- Pictures of more than 8 bits, and those that cannot be read

def gray_of(tmp_path, values, name="a.tiff"):
    Image.fromarray(np.asarray(values)).save(tmp_path / name)
    return np.asarray(pictures.decode(tmp_path / name))[..., 0].ravel().tolist()


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("values", [
    (RAMP / 255).astype(np.float32), RAMP.astype(np.int32), (RAMP * 257).astype(np.int32),
    (RAMP * 257).astype(np.uint16),
], ids=["float", "32 bits of 255", "32 bits of 65535", "16 bits"])  # fmt: skip
def test_a_gray_ramp_of_any_depth_is_the_same_ramp(tmp_path, values):
    assert gray_of(tmp_path, values) == list(range(256))


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    assert max(gray_of(tmp_path, RAMP.astype(np.uint16), "a.png")) == 1
    assert max(gray_of(tmp_path, np.full((2, 2), 2570, np.int32))) == 10


@pytest.mark.parametrize("values, words", [
    (np.float32([[0, 80]]), "its values are 0 to 80, and floats are read from 0 .black. to 1"),
    (np.float32([[-0.5, 1]]), "its values are -0.5 to 1, and floats"),
    (np.float32([[0, np.nan]]), "it holds values that are no numbers"),
    (np.int32([[0, 70_000]]), "its values are 0 to 70000, and whole numbers are read from 0 .black. to 65535"),
    (np.int32([[-1, 0]]), "its values are -1 to 0, and whole numbers"),
])  # fmt: skip
def test_values_beyond_black_or_white_are_refused_with_the_file(tmp_path, values, words):
    with pytest.raises(ValueError, match=f"a.tiff cannot be read as a picture: {words}"):
        gray_of(tmp_path, values)


def broken(tmp_path, kind):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")).save(whole)
    file = tmp_path / "a.png"
    if kind == "a folder":
        file.mkdir()
    elif kind != "missing":
        content = {"cut": whole.read_bytes()[:2000], "empty": b"", "text": b"hello", "zeros": bytes(1000),
                   "header": whole.read_bytes()[:30], "flipped": whole.read_bytes()[:60] + bytes(500)}[kind]
        file.write_bytes(content)
    return file


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "zeros", "header", "flipped", "missing", "a folder"])
def test_a_picture_that_cannot_be_read_is_named_wherever_it_is_met_with_the_doctor(tmp_path, kind):
    file = broken(tmp_path, kind)
    item = layouts.Item(file, ("x",))
    settings = Data(resolution=8, crop="centre")
    met = [lambda: pictures.decode(file), lambda: pictures.Pictures([item], settings).load(0, (8, 8), None)]
    if kind not in ("cut", "flipped"):  # whose header is whole
        met += [lambda: pictures.measure(file), lambda: pictures.measured([item], 1)]
    for meet in met:
        with pytest.raises(ValueError, match=f"{file} cannot be read as a picture: .*`python -m trainer doctor`"):
            meet()
    with pytest.raises(ValueError, match=f"{file} cannot be read as a picture: [^`]*$"):
        pictures.shown(file, 8, 8)
    assert "doctor" not in doctor.look(item).why and str(file) in doctor.look(item).why


def test_whatever_pillow_raises_the_file_is_named(tmp_path, monkeypatch):
    def load(*_):
        raise struct.error("unpack requires a buffer")

    folder_of(tmp_path)
    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", load)
    with pytest.raises(ValueError, match="a.png cannot be read as a picture: unpack requires a buffer"):
        pictures.decode(tmp_path / "a.png")


def test_a_thread_of_a_picture_is_refused_before_it_is_enlarged(tmp_path, monkeypatch):
    Image.new("RGB", (30_000, 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures.Cut, "apply", lambda *_: pytest.fail("resized"))
    loaded = pictures.Pictures([layouts.Item(tmp_path / "a.png")], Data(resolution=512, crop="centre"))
    with pytest.raises(ValueError, match="a.png: it is 30000x1 and would be brought to 15360000x512 .*trainer doctor"):
        loaded.load(0, (512, 512), random.Random(0))
