"""DreamBooth's class pictures, drawn by the run that needs them."""
import pytest
import tiny_pixart
import tiny_run
from accelerate import Accelerator
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.training import build, class_pictures


@pytest.fixture
def made(tmp_path):
    """Settings of a run on three pictures of a subject, whose class pictures are to be drawn."""
    (tmp_path / "subject").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (50 * i, 90, 200)).save(tmp_path / "subject" / f"{i}.png")
    tiny_pixart.released(tmp_path / "base.safetensors")
    parts = tiny_pixart.parts(tmp_path)

    def settings(*words, recipe="pixart_dreambooth", **more):
        own = {"kind": "folder", "path": str(tmp_path / "subject"), "caption": "a photo of sks dog",
               "prior_path": str(tmp_path / "class"), "prior_caption": "a photo of a dog", "prior_count": 5,
               "resolution": 16, "crop": "none", **more}
        return tiny_pixart.settings(tmp_path, tmp_path / "run", parts, f"init_from={tmp_path / 'base.safetensors'}",
                                    "samples.steps=1", "steps=1", "batch_size=2", "seed=3", *words, recipe=recipe,
                                    data=own)
    return settings


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def drawn(count):
    return [f"drawn_{number:05d}.png" for number in range(count)]


def test_a_run_draws_its_class_pictures_before_the_first_step(made, tmp_path, capsys):
    file = tiny_pixart.toml(tmp_path, made())
    cli.main(["train", file, "--dry-run"])
    assert "5 of 5 class pictures are to be drawn from 'a photo of a dog'" in capsys.readouterr().out
    assert not (tmp_path / "class").exists()
    cli.main(["train", file])
    assert names(tmp_path / "class") == drawn(5)
    assert Image.open(tmp_path / "class" / "drawn_00000.png").size == (16, 16)
    said = capsys.readouterr().out
    assert "class pictures are to be drawn" in said and "5 prior pictures" in said


def test_what_an_interrupted_command_left_is_drawn_by_the_next_one_as_it_would_have_been(made, tmp_path):
    settings = made()
    class_pictures.draw_missing(settings, Accelerator(cpu=True))
    folder = tmp_path / "class"
    whole = {name: (folder / name).read_bytes() for name in names(folder)}
    for number in (1, 2, 4):
        (folder / f"drawn_{number:05d}.png").unlink()
    (folder / "drawn_00001.png.unfinished").write_bytes(b"half")
    class_pictures.draw_missing(settings, Accelerator(cpu=True))
    assert {name: (folder / name).read_bytes() for name in names(folder)} == whole
    before = {name: (folder / name).stat().st_mtime_ns for name in whole}
    class_pictures.draw_missing(settings, Accelerator(cpu=True))  # there are enough
    assert {name: (folder / name).stat().st_mtime_ns for name in whole} == before


def test_pictures_of_ones_own_count(made, tmp_path):
    (tmp_path / "class").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / "class" / f"mine{i}.png")
    class_pictures.draw_missing(made(), Accelerator(cpu=True))
    assert names(tmp_path / "class") == [*drawn(2), "mine0.png", "mine1.png", "mine2.png"]
    assert sum(item.prior for item in build.collection(made()).train) == 5


def test_a_picture_that_could_not_be_written_leaves_nothing_half_written(made, tmp_path, monkeypatch):
    def full(self, place, **how):
        with open(place, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        class_pictures.draw_missing(made(), Accelerator(cpu=True))
    assert names(tmp_path / "class") == []


def test_a_set_of_class_pictures_is_drawn_among_several_sets(made, tmp_path):
    own, of_class = str(tmp_path / "subject"), str(tmp_path / "class")
    settings = made(path="", prior_path="", prior_count=0, sets=[
        {"path": own}, {"path": of_class, "caption": "a dog", "prior": True, "prior_count": 2}])
    class_pictures.draw_missing(settings, Accelerator(cpu=True))
    assert names(tmp_path / "class") == drawn(2)
    tiny_run.train(settings)


@pytest.mark.parametrize("words, more, part", [
    (["data.prior_count=-1"], {}, "data.prior_count=-1 must not be negative"),
    (["data.prior_caption="], {}, "data.prior_caption is empty: say what the class pictures show"),
    ([], {"recipe": "pixart"}, "recipe.name='pixart' cannot draw class pictures before it has learned"),
    (["data.prior_count=0"], {}, "there is no such file or folder"),
])
def test_class_pictures_that_cannot_be_drawn_are_refused(made, words, more, part):
    with pytest.raises(ValueError) as caught:
        made(*words, **more)
    assert part in str(caught.value)
