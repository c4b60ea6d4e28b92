"""python -m trainer doctor: what is planted is found, with file names and a fix; what is well is not complained of."""
import json
import shutil

import numpy as np
import pytest
import tiny_pixart
import tiny_run
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config.schema import Data
from pixstack.trainer.data import doctor, pictures
from pixstack.trainer.data.layouts import Item
from pixstack.trainer.features import tokenizer as tokenizers_


def scene(seed, size=(96, 80)):
    """A smooth picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """A jsonl of ten good pictures with captions and HED maps."""
    lines = []
    for i in range(10):
        for kind in ("images", "hed"):
            (tmp_path / kind).mkdir(exist_ok=True)
            scene(i if kind == "images" else 100 + i).save(tmp_path / f"{kind}/{i}.png")
        lines.append({"image": f"images/{i}.png", "text": f"scene number {i}", "hed": f"hed/{i}.png"})
    write(tmp_path, lines)
    return tmp_path


def write(folder, lines):
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def entries(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def examined(folder, *words, tokens=None):
    settings = doctor.settings_of(folder, ["data.resolution=64", *words])
    return doctor.examine(settings, "", tokens)


def found(report):
    return {f.sentence: (f.error, f.cases) for f in report.findings}


def test_a_good_data_set_has_nothing_to_complain_of(folder):
    assert found(examined(folder)) == {}


@pytest.mark.parametrize("planted, sentence, error, name", [
    (lambda f: (f / "images/3.png").write_bytes(b"no"), "pictures cannot be read", True, "3.png"),
    (lambda f: (f / "images/3.png").unlink(), "pictures are named but not there", True, "3.png"),
    (lambda f: shutil.copy(f / "images/3.png", f / "images/4.png"), "pictures are there twice", False, "4.png"),
    (lambda f: scene(3, (48, 40)).save(f / "images/4.png"), "pictures look almost the same as another", False, "4.png"),
    (lambda f: scene(3).save(f / "images/4.png", "JPEG", quality=60), "pictures look almost the same as another", False,
     "4.png"),
    (lambda f: (f / "hed/3.png").unlink(), "conditions 'hed' are named but not there", True, "3.png"),
    (lambda f: (f / "hed/3.png").write_bytes(b"no"), "conditions cannot be read", True, "3.png"),
    (lambda f: scene(1, (80, 80)).save(f / "hed/3.png"), "conditions have another shape than their picture", True,
     "hed/3.png is 80x80, "),
    (lambda f: scene(1, (48, 40)).save(f / "hed/3.png"), "conditions have another size than their picture, in the same "
     "shape", False, "hed/3.png is 48x40, "),
    (lambda f: Image.new("RGB", (96, 80)).save(f / "hed/3.png"), "conditions show nothing, they are of one colour",
     False, "hed/3.png"),
    (lambda f: scene(3, (45, 40)).save(f / "images/3.png"), "pictures are smaller than what they are shown at "
     "(data.resolution=64) and will be enlarged", False, "3.png is 45x40, shown at 64x64"),
    (lambda f: scene(3, (300, 80)).save(f / "images/3.png"), "pictures lose much to the crop", False, "73% is lost"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_planted_is_found_and_named(folder, planted, sentence, error, name):
    planted(folder)
    findings = found(examined(folder))
    assert findings[sentence][0] is error and len(findings[sentence][1]) == 1 and name in findings[sentence][1][0]


def test_what_entries_lack_is_found(folder):
    lines = entries(folder)
    lines[2].pop("text"), lines[5].pop("hed")
    lines[7].update(text=lines[8]["text"], height=80, width=60)
    write(folder, lines)
    findings = found(examined(folder))
    assert findings["pictures have no caption"] == (True, [f"{folder}/images/2.png"])
    assert findings["pictures have no condition 'hed'"] == (True, [f"{folder}/images/5.png"])
    assert findings["captions name several pictures"] == (False, ["'scene number 8': 2 pictures"])
    assert findings["pictures have another size than the data set says"][1] == [
        f"{folder}/images/7.png is 96x80, not 60x80"]


def test_the_caption_that_settings_give_to_pictures_without_one_is_no_remark(folder):
    lines = entries(folder)
    for line in lines[:3]:
        line.pop("text")
    lines[7]["text"] = lines[8]["text"]
    write(folder, lines)
    findings = found(examined(folder, "data.caption=a scene"))
    assert findings == {"captions name several pictures": (False, ["'scene number 8': 2 pictures"])}


def test_a_picture_that_is_trained_on_and_held_out_is_an_error(folder):
    shutil.copy(folder / "images/3.png", folder / "images/4.png")
    lines = entries(folder)
    lines[4]["split"] = "held_out"
    write(folder, lines)
    assert found(examined(folder))["held-out pictures are trained on as well"][0]


def test_pictures_of_one_drawing_in_other_colours_are_not_alike():
    greys = np.asarray(scene(0).convert("L"), np.float32)[..., None] / 255
    red, blue = (Image.fromarray((greys * colour).astype(np.uint8)) for colour in ((250, 80, 0), (0, 80, 250)))
    looked = [doctor.Looked(digest=bytes([i]), hash=doctor.difference_hash(p), thumbnail=doctor.thumbnail(p))
              for i, p in enumerate((red, blue, red.resize((50, 40))))]
    assert doctor.alike(looked) == [(2, 0)]


def test_a_pair_is_found_wherever_its_three_bits_differ():
    grey = np.zeros((8, 8, 3), np.uint8)
    for bits in ((0, 20, 40), (0, 1, 2), (61, 62, 63), (15, 16, 47)):
        looked = [doctor.Looked(digest=bytes([i]), hash=h, thumbnail=grey)
                  for i, h in enumerate((0x123456789ABCDEF0, 0x123456789ABCDEF0 ^ sum(1 << b for b in bits)))]
        assert doctor.alike(looked) == [(1, 0)]


@pytest.mark.parametrize("limit", doctor.LIMITS)
def test_captions_over_a_limit_are_counted_by_the_tokenizer(folder, limit):
    tokens = doctor.Tokens(lambda caption: len(caption.split()) + 1, True)
    lines = entries(folder)
    lines[0]["text"], lines[1]["text"] = "a " * limit, "a " * (limit - 1)
    write(folder, lines)
    findings = found(examined(folder, tokens=tokens))
    (error, cases), = [findings[s] for s in findings if f"longer than {limit} tokens" in s]
    assert not error and len(cases) == 1 and cases[0].startswith(f"{limit + 1} tokens: 'a a a")


def test_an_estimate_of_tokens_says_that_it_is_one(folder):
    lines = entries(folder)
    lines[0]["text"] = "a very long caption " * 40
    write(folder, lines)
    finding, = [f for f in examined(folder).findings if "longer than 120" in f.sentence]
    assert finding.cases[0].startswith("about 201 tokens") and "--tokenizer" in finding.fix


def test_a_tokenizer_file_counts_whole_captions(tmp_path):
    made = tokenizers_.train(["red square", "blue card"], 40)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    made.no_truncation()
    tokens = doctor.tokens_of(tmp_path / "tokenizer.json")
    assert tokens.exact and tokens.count("red square blue card") == len(made.encode("red square blue card").ids) > 2


def test_the_table_of_sizes_counts_every_picture(folder):
    scene(0, (200, 90)).save(folder / "images/0.png")
    scene(100, (200, 90)).save(folder / "hed/0.png")
    report = examined(folder, "data.buckets=area", "data.bucket_multiple=16", "data.bucket_group=4", "data.crop=centre")
    table, = [line for line in report.summary if line.startswith("sizes")]
    assert table.split()[1::2] == ["80x48:", "64x64:"] and table.split()[2::2] == ["1,", "9"]
    assert found(report)["sizes have fewer pictures than come together in a batch, which repeats them"][1] == [
        "80x48: 1 pictures for 4"]


def test_only_ten_names_are_shown_and_all_are_written(folder, tmp_path, capsys):
    lines = [{"file": f"images/gone{i}.png", "caption": f"{i}", "hed": "hed/0.png"} for i in range(13)]
    write(folder, entries(folder) + lines)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", str(folder), "data.resolution=64", "--report", str(tmp_path / "all.json")])
    output = capsys.readouterr().out
    assert "cannot be trained on before the errors above are mended" in str(stopped.value.code)
    assert "13 pictures are named but not there" in output and "gone9.png" in output and "gone10.png" not in output
    assert "... and 3 more" in output and "fix: bring them back" in output
    written, = [f for f in json.loads((tmp_path / "all.json").read_text())["findings"] if f["error"]]
    assert len(written["cases"]) == 13


def test_a_good_data_set_ends_well(folder, capsys):
    cli.main(["doctor", str(folder), "data.resolution=64"])
    assert "nothing stands in the way of training" in capsys.readouterr().out


def test_a_recipe_says_what_is_needed(tmp_path, capsys):
    path = tiny_run.pictures(tmp_path / "set", size=8)
    images = path.parent / "images"
    (images / "red_card.png").write_bytes(b"nothing")
    shutil.copy(images / "blue_square.png", images / "green_square.png")  # one of them is held out
    recipe = tiny_run.toml(tmp_path, path, tmp_path / "run")
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--recipe", str(recipe), "text.max_length=1"])
    output = capsys.readouterr().out
    for part in ("1 pictures cannot be read", "red_card.png", "1 held-out pictures are trained on as well",
                 "there twice", "(data.resolution=16) and will be enlarged", "longer than 1 tokens and will be cut"):
        assert part in output, part
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_work_are_all_said(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", str(folder), "data.bucketz=area", "resolution=3", "data.crop=middle"])
    message = str(stopped.value.code)
    assert "did you mean buckets" in message and "data.key=value" in message and "data.crop='middle'" in message


def test_a_caption_file_that_is_no_utf8_is_named(tmp_path):
    scene(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Gemälde".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        doctor.examine(Data(path=str(tmp_path)), "")


def test_all_caption_files_that_cannot_be_read_are_named_at_once(tmp_path):
    for name in "abc":
        scene(0).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("Gemälde".encode("latin-1"))
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)2 caption files.*a.txt is not UTF-8.*c.json is not valid JSON"):
        doctor.examine(Data(path=str(tmp_path)), "")


def test_class_folders_need_no_captions(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        scene(i).save(tmp_path / name / "0.png")
    report = doctor.examine(Data(path=str(tmp_path), resolution=64), "")
    assert found(report) == {} and "2 classes" in report.summary[0]


def test_a_picture_is_looked_at_as_it_will_be_trained_on(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(0).save(tmp_path / "a.jpg", exif=exif)
    assert doctor.look(Item(tmp_path / "a.jpg")).size == (96, 80) == pictures.measure(tmp_path / "a.jpg")


def test_a_frozen_encoder_counts_captions_as_it_will_read_them(tmp_path):
    path, counts = tiny_run.pictures(tmp_path / "set"), {}
    encoder = tiny_pixart.t5(tmp_path / "t5")
    reader = tokenizers_.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    for clean, read in (("false", "red card https://example.com/a"), ("true", "red card")):
        settings = tiny_run.settings(path, tmp_path / "run", f"text.clean={clean}", "text.max_length=5",
                                     text={"encoder": str(encoder)})
        tokens = doctor.tokens_of_recipe(settings)
        assert tokens.exact and tokens.limits == (5,)
        counts[clean] = tokens.count("red card https://example.com/a")
        assert counts[clean] == len(reader.encode(read).ids)
    assert counts["false"] > counts["true"]


def test_pictures_that_need_no_caption_are_not_asked_for_one(tmp_path):
    scene(0).save(tmp_path / "a.png")
    assert found(doctor.examine(Data(path=str(tmp_path), resolution=64), "pictures")) == {}


def test_what_a_folder_holds_beside_its_pictures_is_named(tmp_path):
    for name in ("a", "b"):
        scene(ord(name), (80, 80)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"scene {name}")
    assert found(examined(tmp_path)) == {}
    for name in ("c.txt", "d.heic", "d.txt", ".e.txt", "README.md"):
        (tmp_path / name).write_text("x")
    assert found(examined(tmp_path)) == {
        "pictures are of a format that is not read, and are left out": (False, [str(tmp_path / "d.heic")]),
        "captions have no picture of their name": (False, [str(tmp_path / "c.txt")])}
