import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import tiny_run
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.trainer.config import check, load, rules
from pixstack.trainer.training import build


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set")


def refusal(path, tmp_path, *words, **sections):
    with pytest.raises(ValueError) as caught:
        tiny_run.settings(path, tmp_path / "run", *words, **sections)
    return str(caught.value)


def test_an_unknown_key_is_refused_with_the_nearest_name(path, tmp_path):
    message = refusal(path, tmp_path, "optimizer.learning_rat=0.1")
    assert "optimizer.learning_rat is not a setting; did you mean learning_rate" in message


def test_a_setting_without_its_section_is_refused_with_the_sections_that_have_it(path, tmp_path):
    message = refusal(path, tmp_path, "path=/nowhere", "stage_weights=[1, 1]", "stepz=3")
    for part in ("path is not a setting; did you mean data.path or vae.path.",
                 "stage_weights is not a setting; did you mean recipe.stage_weights.", "did you mean steps."):
        assert part in message, part


@pytest.mark.parametrize("old, new", load.RENAMED.items())
def test_the_old_name_of_a_setting_is_refused_with_the_new_one(path, tmp_path, old, new):
    section = old.partition(".")[0]
    recipe = "pixelflow" if section != "recipe" else "pixart_dmd" if "follower" in old else "pixelponder"
    now = new if "." in new else f"{section}.{new}"
    assert f"{old} is called {now} now." in refusal(path, tmp_path, f"{old}=1", f"recipe.name={recipe}")


def test_a_run_folder_of_before_the_new_names_is_read(path, tmp_path):
    made = tiny_run.settings(path, tmp_path / "run", "optimizer.muon_learning_rate=0.5")
    raw = load.as_dict(made)
    raw["optimizer"]["rate"] = raw["optimizer"].pop("learning_rate")
    raw["optimizer"]["muon_rate"] = raw["optimizer"].pop("muon_learning_rate")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load.stored(tmp_path) == made
    del raw["loss"]
    raw["recipe"] = {"name": "pixart", "snr_gamma": 5.0}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model": {}}))
    assert load.stored(tmp_path).loss.snr_gamma == 5


def test_an_unknown_recipe_is_refused_with_the_nearest_name(path, tmp_path):
    assert "did you mean pixelflow" in refusal(path, tmp_path, "recipe.name=pixelflw")


def test_everything_wrong_is_reported_at_once(path, tmp_path):
    message = refusal(path, tmp_path, "stepz=3", "batch_size=many", "data.resolution=18",
                      "data.path=/nowhere/all.jsonl", "micro_batch_size=4",
                      "recipe.dropout=2.0", "samples.height=20", "optimizer.betas=[0.9]")
    for part in ("stepz", "batch_size='many' should be a whole number", "resolution=18", "/nowhere/all.jsonl",
                 "recipe.dropout=2.0", "samples.height=20", "optimizer.betas=[0.9]"):
        assert part in message, part


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers(path, tmp_path):
    assert "batch_size=6 is not a multiple of micro_batch_size=4" in refusal(path, tmp_path, "micro_batch_size=4")


def test_a_size_that_the_stages_do_not_allow_is_refused(path, tmp_path):
    message = refusal(path, tmp_path, "data.resolution=20", "model.num_stages=3")
    assert "resolution=20 is not a multiple of 16" in message


@pytest.mark.parametrize("word, part", [
    ("precision=fp8", "none of bf16, fp32"), ("samples.classes=[1]", "use samples.prompts"),
    ("recipe.stage_weights=[1,1,1]", "2 numbers"), ("init_from=gone.safetensors", "gone.safetensors"),
    ("data.kind=folder", "takes a folder: say data.kind=auto"), ("steps", "key=value"),
    ("cat", "a value with spaces is written in quotes"), ("text=small", "is a section"),
    ("data.templates=[\"no place\"]", "needs a {}"), ("model.preset=xl_t2", "did you mean xl_t2i"),
    ("text.padded=true", "recipe.name='pixelflow' masks their padding"),
    ("samples.cfg=nan", "samples.cfg=nan should be a number, and finite"),
    ("save_minutes=inf", "save_minutes=inf should be a number, and finite"),
    ("recipe.stage_weights=[1,nan]", "should be a list of float, finite"),
    ("optimizer.arguments.d_coef=inf", "optimizer.arguments"),
    (f"steps={10**21}", "should be a whole number, finite and below 2**63"),
    (f"optimizer.clip={10**400}", "should be a number, finite"),
    (f"seed={10**13}", "seed=10000000000000 is outside"), ("samples.shift=-1.0", "samples.shift=-1.0 must be more"),
    ("optimizer.muon_momentum=1.0", "optimizer.muon_momentum=1.0 is outside"),
    ("text.learning_rate_multiple=-1.0", "must not be negative"), ("text.hidden=0", "must be at least 1"),
])
def test_a_setting_that_cannot_work_is_refused(path, tmp_path, word, part):
    assert part in refusal(path, tmp_path, word)


def test_a_string_stands_for_a_list_of_that_one(path, tmp_path):
    made = tiny_run.settings(path, tmp_path / "run", "samples.prompts=red card", "data.templates=a {}")
    assert made.samples.prompts == ["red card"] and made.data.templates == ["a {}"]
    assert "data.resolutions='large' should be a list of int" in refusal(path, tmp_path, "data.resolutions=large")


def test_captions_that_change_are_refused_with_a_frozen_encoder(path, tmp_path):
    message = refusal(path, tmp_path, "data.tag_share=0.5", text={"encoder": "google/flan-t5-xl"})
    assert "data.tag_share=0.5 makes other captions at every step" in message and "set it to 0" in message


def checkpoint_file(folder, **shape):
    shape = PixelFlowConfig(**{"heads": 2, "head_dim": 8, "depth": 1, "num_stages": 2, "resolution": 16, **shape})
    file = folder / "start.safetensors"
    state_dict.write_file(file, PixelFlow(shape).state_dict(), checkpoint.metadata(shape))
    return file


@pytest.mark.parametrize("shape, sections, part", [
    ({"context_dim": 16}, {"text": {}}, "is not class-conditional"),
    ({"num_classes": 3}, {}, "is not text-conditional"),
    ({"context_dim": 24}, {}, "context_dim=24 for 16"),
    ({"context_dim": 16, "depth": 2}, {}, "depth=2 for 1"),
])
def test_everything_that_does_not_fit_a_start_is_reported_at_once(path, tmp_path, shape, sections, part):
    file = checkpoint_file(tmp_path, **shape)
    message = refusal(path, tmp_path, f"init_from={file}", "data.resolution=18", **sections)
    assert part in message and "resolution=18 is not a multiple of 8" in message


@pytest.mark.parametrize("words, part", [
    (["recipe.trunk=true"], "init_from is empty: recipe.trunk=true"),
    (["recipe.trunk=true", "recipe.lora=true"], "recipe.lora and recipe.trunk are both true"),
])
def test_a_trunk_needs_a_file_and_is_no_base_of_an_adapter(path, tmp_path, words, part):
    assert part in refusal(path, tmp_path, *words)


def test_a_start_that_is_no_checkpoint_is_refused(path, tmp_path):
    (tmp_path / "start.pt").write_bytes(b"nothing")
    assert "start.pt is neither" in refusal(path, tmp_path, f"init_from={tmp_path / 'start.pt'}", model={})


def test_a_path_that_is_not_there_is_named_with_the_folder_it_was_looked_for_in(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(path, tmp_path, "init_from=absent.safetensors", f"vae.path={tmp_path}/absent",
                      text={"encoder": "away.safetensors"})
    for part in (f"init_from='absent.safetensors': there is no such file or folder in {tmp_path}.",
                 f"vae.path='{tmp_path}/absent': there is no such file or folder.",
                 f"text.encoder='away.safetensors': there is no such file in {tmp_path}."):
        assert part in message


def test_files_are_looked_into_when_all_that_costs_nothing_is_right(path, tmp_path):
    (tmp_path / "start.pt").write_bytes(b"nothing")
    message = refusal(path, tmp_path, f"init_from={tmp_path / 'start.pt'}", "recipe.dropout=2.0", "stepz=3")
    assert "recipe.dropout=2.0" in message and "stepz" in message and "neither" not in message


@pytest.mark.parametrize("words, part", [
    (("train", "FILE", "optimizer.learning_rat=1", "recipe.dropout=2"), "did you mean learning_rate"),
    (("train", "recipes/pixart/pixart_emoji_lora.toml", "adapter.rank=0"), "adapter.rank=0 must be at least 1"),
    (("cache", "recipes/ultrapixel/ultrapixel_guide.toml"), "there is no such file or folder"),
    (("train", "recipes/gone.toml"), "there is no such recipe file"),
    (("settings",), "batch_size = 64"), (("--help",), "doctor"), (("train", "--help"), "key=value"),
], ids=" ".join)
def test_help_and_settings_that_cannot_work_are_reported_without_torch(path, tmp_path, words, part):
    file = tiny_run.toml(tmp_path, path, tmp_path / "run")
    script = ("import sys; sys.argv[0] = 'trainer'; from pixstack.trainer.cli import main\n"
              "try: main.main()\n"
              "finally: print('heavy:', sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script, *[str(file) if w == "FILE" else w for w in words]], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(load.TRAINER.parent / "package")})
    assert part in done.stdout + done.stderr and "heavy: []" in done.stdout


def test_a_start_gives_the_sizes_that_model_leaves_out(path, tmp_path):
    file = checkpoint_file(tmp_path, context_dim=16)
    tiny_run.settings(path, tmp_path / "run", f"init_from={file}", "model.num_stages=3", model={})


def test_a_word_changes_one_setting_of_a_section(path, tmp_path):
    changed = tiny_run.settings(path, tmp_path / "run", "optimizer.learning_rate=0.25")
    assert dataclasses.replace(changed, optimizer=dataclasses.replace(changed.optimizer, learning_rate=1e-3)) \
        == tiny_run.settings(path, tmp_path / "run")


def test_a_whole_number_serves_as_a_number(path, tmp_path):
    assert tiny_run.settings(path, tmp_path / "run", "samples.cfg=4").samples.cfg == 4.0


def test_settings_survive_the_way_through_the_run_folder(path, tmp_path):
    made = tiny_run.settings(path, tmp_path / "run", "recipe.stage_weights=[2,1]")
    assert check.parse(load.as_dict(made)) == made


@pytest.mark.parametrize("path", sorted(load.TRAINER.glob("recipes/*/*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_lacks_nothing_but_files(path):
    with pytest.raises(ValueError) as caught:
        check.load(path, ["data.path=/nowhere"])
    problems = str(caught.value).splitlines()[1:]
    assert problems[0] == "  data.path='/nowhere': there is no such file or folder."
    assert all(re.search("there is no (such )?file", p) for p in problems), problems


def test_a_recipe_file_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="recipes/pixelflow/pixelflow_emoji.toml"):
        check.load("recipes/gone.toml")


def test_a_recipe_file_that_was_moved_is_named_where_it_is_now():
    with pytest.raises(ValueError, match="It is trainer/recipes/pixart/pixart_sigma.toml now"):
        check.load("trainer/recipes/pixart_sigma.toml")


def test_a_package_that_is_missing_is_named(path, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    message = refusal(path, tmp_path, "optimizer.name=adamw8bit", "log.wandb=offline")
    assert "pip install bitsandbytes" in message and "pip install wandb" in message


def test_samples_of_nothing_are_refused(path, tmp_path):
    assert "samples.every=3 draws pictures, and neither" in refusal(path, tmp_path, "samples.every=3")


def test_sample_classes_that_the_data_do_not_have_are_refused_before_training(path, tmp_path):
    made = tiny_run.settings(path, tmp_path / "run", "samples.every=3", "samples.classes=[1, 207]", text={})
    with pytest.raises(ValueError, match="samples.classes names 207, and the data have the classes 0 to 5"):
        build.recipe(made, build.collection(made))


N = 100_000
DEEP = {"lists": "x = " + "[" * N + "]" * N, "tables": "x = " + "{a = " * N + "1" + "}" * N,
        "a dotted key": ".".join("a" * N) + " = 1", "a dotted section": "[" + ".".join("a" * N) + "]"}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_a_recipe_file_that_is_nested_too_deeply_is_refused_before_it_is_parsed(tmp_path, text, monkeypatch):
    monkeypatch.setattr(load.tomllib, "loads", lambda text: pytest.fail("parsed"))
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(ValueError, match="deep.toml is not valid TOML: it is nested too deeply.$"):
        load.read_toml(tmp_path / "deep.toml")


def test_a_number_of_more_digits_than_python_reads_is_no_toml(tmp_path):
    (tmp_path / "long.toml").write_text("steps = " + "9" * 5000)
    with pytest.raises(ValueError, match="long.toml is not valid TOML: .*digits"):
        load.read_toml(tmp_path / "long.toml")


@pytest.mark.parametrize("text", ["[" * N, "7", "{"])
def test_a_run_folder_whose_settings_are_none_is_refused_with_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not valid JSON|holds a \w+, not a table of entries)"):
        load.stored(tmp_path)


@pytest.mark.parametrize("words, sentence", [
    (("data.resolution=1000000000", "data.buckets=area", "data.bucket_multiple=1"), "resolution=1000000000 must be"),
    (("data.resolutions=[64, 99999]",), "data.resolutions=[64, 99999] must be 1 to 16384 pixels"),
    (("data.workers=1000000",), "data.workers=1000000 must be 1 to 256"),
    (("data.buckets=area", "data.bucket_multiple=8", "data.bucket_ratio=99"), "bucket_ratio=99.0 must be 1 to 64"),
    (("data.buckets=area", "data.bucket_multiple=8", "data.bucket_ratio=nan"), "bucket_ratio=nan should be a number"),
])  # fmt: skip
def test_sizes_beyond_any_picture_are_refused_before_they_are_listed(path, tmp_path, words, sentence):
    assert sentence in refusal(path, tmp_path, *words)
