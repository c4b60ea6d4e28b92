"""PixelPonder's list of entries: read, appended to and completed without a half-written file."""

import json
import os

import pytest
from pixstack.models_impl.pixelponder import entries


def listed(folder):
    return [json.loads(line) for line in (folder / entries.LIST).read_text(encoding="utf-8").splitlines()]


def test_an_entry_is_written_with_its_pictures_in_the_release_s_order(tmp_path):
    entries.save(tmp_path, "a", "ein Haus, größer", {"hed": b"h", "image": b"i", "canny": b"c"})
    assert listed(tmp_path) == [
        {"image": "image/a.png", "text": "ein Haus, größer", "canny": "canny/a.png", "hed": "hed/a.png"}
    ]
    assert list(listed(tmp_path)[0]) == ["image", "text", "canny", "hed"]
    assert (tmp_path / "canny" / "a.png").read_bytes() == b"c"
    assert entries.read(tmp_path / entries.LIST) == listed(tmp_path)


def test_a_second_run_completes_an_entry(tmp_path):
    for name in "ab":
        entries.save(tmp_path, name, f"text {name}", {"image": b"i", "canny": b"c"})
    entries.save(tmp_path, "a", "", {"image": b"i", "depth": b"d"})
    assert [entry["text"] for entry in listed(tmp_path)] == ["text a", "text b"]
    assert listed(tmp_path)[0] == {"image": "image/a.png", "text": "text a", "canny": "canny/a.png",
                                   "depth": "depth/a.png"}
    assert "depth" not in listed(tmp_path)[1]


def test_other_keys_of_an_entry_are_kept(tmp_path):
    (tmp_path / entries.LIST).write_text('{"image": "image/a.png", "text": "t", "source": "mine"}\n')
    entries.save(tmp_path, "a", "new", {"canny": b"c"})
    assert listed(tmp_path) == [{"image": "image/a.png", "text": "new", "canny": "canny/a.png", "source": "mine"}]


@pytest.mark.parametrize("rest", [b'{"image": "im', b'{"image": "image/b.png", "text": "\xc3'])
def test_what_a_broken_write_left_is_cut_off_by_the_next(tmp_path, rest):
    entries.save(tmp_path, "a", "t", {"image": b"i"})
    with open(tmp_path / entries.LIST, "ab") as file:
        file.write(rest)
    assert len(entries.read(tmp_path / entries.LIST)) == 1
    entries.save(tmp_path, "b", "t", {"image": b"i"})
    assert [entry["image"] for entry in listed(tmp_path)] == ["image/a.png", "image/b.png"]


def test_a_list_without_its_last_newline_keeps_its_last_entry(tmp_path):
    (tmp_path / entries.LIST).write_text('{"image": "image/a.png", "text": "t"}')
    entries.save(tmp_path, "b", "t", {"image": b"i"})
    assert [entry["image"] for entry in listed(tmp_path)] == ["image/a.png", "image/b.png"]


def test_a_picture_that_cannot_be_written_leaves_no_entry(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        entries.save(tmp_path, "a", "t", {"image": b"i"})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_new_entry_needs_an_image(tmp_path):
    with pytest.raises(ValueError, match="new entry a has no image"):
        entries.save(tmp_path, "a", "t", {"canny": b"c"})


@pytest.mark.parametrize("line, words", [
    (b"{\n{}\n", "line 2 is not valid JSON"),
    (b"[]\n", "line 2: it must be text"),
    (b'{"image": 7}\n', "line 2: image must be text"),
])  # fmt: skip
def test_a_line_that_is_no_entry_is_named(tmp_path, line, words):
    (tmp_path / entries.LIST).write_bytes(b'{"image": "a.png"}\n' + line)
    with pytest.raises(ValueError, match=words):
        entries.read(tmp_path / entries.LIST)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data.jsonl"):
        entries.read(tmp_path / entries.LIST)


@pytest.mark.parametrize("images, names", [
    (["image/a.png", "image/b.png"], ["a", "b"]),
    (["cats/1.png", "dogs/1.png", "dogs/2.png"], ["cats_1", "dogs_1", "2"]),
    (["a.jpg", "a.png", "A.webp"], ["a.jpg", "a.png", "A.webp"]),
    (["cats/1.png", "dogs/1.png", "cats_1.webp"], ["cats_1.png", "dogs_1", "cats_1"]),
    (["a.png", "a.png"], ["a.png_000000", "a.png_000001"]),
    (["/data/cats/1.png", "../dogs/1.png", "C:\\birds\\1.png"], ["data_cats_1", "dogs_1", "C_birds_1"]),
])  # fmt: skip
def test_no_two_entries_have_the_same_name(images, names):
    assert entries.names([{"image": image} for image in images]) == names


def test_an_entry_with_its_image_elsewhere_is_completed_and_keeps_it(tmp_path):
    rows = [{"image": "image/a.jpg", "text": "t"}, {"image": "cats/1.png", "text": "c"},
            {"image": "dogs/1.png", "text": "d"}]
    (tmp_path / entries.LIST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a", "cats_1"):
        entries.save(tmp_path, name, "", {"image": b"i", "canny": b"c"})
    assert listed(tmp_path) == [{**rows[0], "canny": "canny/a.png"}, {**rows[1], "canny": "canny/cats_1.png"}, rows[2]]
    assert not (tmp_path / "image").exists()
    with pytest.raises(ValueError, match="1 could be cats/1.png or dogs/1.png: call the entry cats_1 or dogs_1"):
        entries.save(tmp_path, "1", "", {"image": b"i"})


@pytest.mark.parametrize("name", [
    "", ".", "..", ".hidden", "a/b", "a\\b", "CON", "nul.txt", "com1", "a:b", "a?", "a.", " a", "a\n",
    "\ud83d", "a" * 201,
])  # fmt: skip
def test_a_name_that_some_system_cannot_have_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a file on every system"):
        entries.save(tmp_path, name, "t", {"image": b"i"})
    assert not [*tmp_path.rglob("*.png")]


@pytest.mark.parametrize("listed", ["a?b.png", "nul.png", ".hidden.png", "x" * 300 + ".png", "a\n.png", "\ud83d.png"])
def test_an_entry_of_a_strange_file_can_be_saved_under_the_name_that_it_is_given(tmp_path, listed):
    (name,) = entries.names([{"image": listed}])
    entries.save(tmp_path, name, "t", {"image": b"i"})
    assert len([*tmp_path.rglob("*.png")]) == 1


def test_a_caption_with_half_a_sign_is_written_with_a_mark_in_its_place(tmp_path):
    entries.save(tmp_path, "a", "a \ud83d cat", {"image": b"i"})
    assert entries.read(tmp_path / "data.jsonl")[0]["text"] == "a \ufffd cat"
