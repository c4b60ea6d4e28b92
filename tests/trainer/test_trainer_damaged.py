"""Damaged caches, checkpoints and run folders: named, and treated as missing."""
import json

import pytest
import tiny_run
import torch
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer.cli.main import main
from pixstack.trainer.features.store import Store
from pixstack.trainer.training import checkpoints


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def checkpoint(folder, step):
    place = folder / "checkpoints" / f"{step:08d}"
    write_file(place / "model.safetensors", {"a": torch.ones(64)})
    (place / "state.json").write_text(json.dumps({"step": step}))
    return place


def test_a_cut_shard_counts_as_missing(tmp_path, capsys):
    store = Store(tmp_path, "vae", {"encoder": "x"})
    for key in ("a", "b"):
        store.put(key, {"latent": torch.ones(8)})
        store.write()
    first, second = sorted(store.folder.glob("*.safetensors"))
    cut(second)
    again = Store(tmp_path, "vae", {"encoder": "x"})
    assert "a" in again and "b" not in again
    assert second.name in capsys.readouterr().err
    again.put("b", {"latent": torch.ones(8)})
    again.write()
    assert "b" in Store(tmp_path, "vae", {"encoder": "x"}) and first.exists()


@pytest.mark.parametrize("damaged", ["model.safetensors", "state.json"])
def test_a_cut_checkpoint_counts_as_missing(tmp_path, capsys, damaged):
    older, newer = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    cut(newer / damaged)
    assert checkpoints.checkpoints(tmp_path) == [older]
    assert str(newer) in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_damaged_run_folder_ends_a_command_in_one_sentence(tmp_path, content):
    checkpoint(tmp_path, 10)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path)])
    assert str(ended.value).startswith("error: ") and "config.json" in str(ended.value)


def test_converting_a_damaged_file_ends_in_one_sentence(tmp_path):
    torch.save({"blocks.0.scale_shift_table": [1.0], "x_embedder.proj.weight": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")])
    assert str(ended.value).startswith("error: a.pth")


def test_a_damaged_log_does_not_stop_a_run_from_going_on(tmp_path):
    path = tiny_run.pictures(tmp_path / "set")
    settings = tiny_run.settings(path, tmp_path / "out", steps=3, save_every=3)
    tiny_run.train(settings)
    log = tmp_path / "out/log.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_bytes(b"\0" * 30 + b"\n" + first.encode() + b"\n[1]\n\xff\n" + "\n".join(rest).encode() + b"\n")
    tiny_run.train(tiny_run.settings(path, tmp_path / "out", steps=4, save_every=3, resume="changed"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
