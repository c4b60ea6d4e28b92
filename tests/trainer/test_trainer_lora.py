"""python -m trainer lora: what it says of files, and that files of another rank and merged ones do what they should."""
import os
import re
import weakref

import pytest
import tiny_pixart
import tiny_ultrapixel
import torch
from merged_lora import merge
from pixstack.models_impl import lora, state_dict, streamed_file
from pixstack.models_impl.pixart import checkpoint
from pixstack.models_impl.pixart.lora import names
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.ultrapixel import checkpoint as ultrapixel_checkpoint
from pixstack.models_impl.ultrapixel import lora as ultrapixel_lora
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.trainer.cli import main as cli

SHAPES = {"attn.qkv": (216, 72), "mlp.fc1": (288, 72), "cross_attn.q_linear": (72, 72)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    return file, *tiny_pixart.released(file)


def random_lora(seed=0, rank=4, alpha=2.0, modules=tuple(SHAPES), dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    layers = [lora.Layer(f"blocks.{i}.{m}.weight", None, "lora",
                         {"lora_up": draw(SHAPES[m][0], rank), "lora_down": draw(rank, SHAPES[m][1])}, alpha / rank)
              for i in range(2) for m in modules]
    return lora.Lora(layers, [], [])


def saved(path, made, base, format="comfyui", metadata=None):
    state_dict.write_file(path, lora.write(made, names({k: v.shape for k, v in base[2].items()}), format), metadata)
    return path


def changes(path, base):
    """Parameter -> what a file changes of it, float64."""
    tensors, metadata = state_dict.read_file(path)
    found = lora.read(tensors, names({k: v.shape for k, v in base[2].items()}), metadata)
    assert not found.unmatched
    total = {}
    for layer in found.layers:
        start, length = layer.rows or (0, base[2][layer.key].shape[0])
        own = total.setdefault(layer.key, torch.zeros(base[2][layer.key].shape, dtype=torch.float64))
        own[start:start + length] += (layer.tensors["lora_up"].double() @ layer.tensors["lora_down"].double()
                                      * layer.scale)
    return total


def same(ours, wanted, **tolerance):
    assert ours.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(ours[key], wanted[key], **{"rtol": 1e-12, "atol": 1e-10, **tolerance})


def run(capsys, *words):
    cli.main(["lora", *map(str, words)])
    return capsys.readouterr().out


def refusal(*words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["lora", *map(str, words)])
    return str(caught.value.code)


# --- inspect


def test_inspect_says_what_a_file_holds(base, tmp_path, capsys):
    file = saved(tmp_path / "a.safetensors", random_lora(rank=4, alpha=2.0), base, "kohya", {"ss_note": "x" * 500})
    said = run(capsys, "inspect", file)
    assert "a LoRA of PixArt, kohya names" in said and "6 lora" in said and "ranks: 4 (6 layers)" in said
    assert "all are finite" in said and re.search(r"ss_note = x{200}\.\.\.$", said, re.M)
    wanted = changes(file, base)["blocks.0.attn.qkv.weight"].norm().item()
    line = next(line for line in said.splitlines() if "blocks_0_attn_qkv" in line)
    module, kind, rank, alpha, scale, size, norm = line.split()
    assert (kind, rank, alpha, scale, size) == ("lora", "4", "2", "0.5", "216x72")
    assert float(norm) == pytest.approx(wanted, rel=1e-3)


def test_inspect_names_what_is_no_number(base, tmp_path, capsys):
    made = random_lora()
    made.layers[2].tensors["lora_up"][0, 0] = float("nan")
    file = saved(tmp_path / "a.safetensors", made, base)
    said = run(capsys, "inspect", file)
    assert "1 tensors hold NaN or infinity: diffusion_model.blocks.0.cross_attn.q_linear.lora_B.weight" in said
    assert "holds values that are no numbers" in refusal("resize", file, tmp_path / "b.safetensors", "--rank", 2)
    assert not (tmp_path / "b.safetensors").exists()


def test_turns_are_inspected_and_go_into_a_model_but_not_beside_loras(base, tmp_path, capsys):
    shapes = {k: v.shape for k, v in base[2].items()}
    turns = lora.Lora([lora.Layer("blocks.0.attn.qkv.weight", None, "oft", {"oft_blocks": torch.randn(54, 4, 4)}, 1.0)],
                      [], [])
    file = saved(tmp_path / "a.safetensors", turns, base)
    said = run(capsys, "inspect", file)
    assert "1 oft" in said and "ranks: none" in said
    run(capsys, "merge", file, "--base", base[0], "--out", tmp_path / "whole.safetensors")
    whole = state_dict.read_file(tmp_path / "whole.safetensors")[0]
    tensors, metadata = state_dict.read_file(file)
    wanted = merge(base[2], lora.read(tensors, names(shapes), metadata))
    torch.testing.assert_close(whole["blocks.0.attn.qkv.weight"].float(), wanted["blocks.0.attn.qkv.weight"].float())
    assert "no layer that has a rank" in refusal("resize", file, tmp_path / "b.safetensors", "--rank", 2)
    other = saved(tmp_path / "c.safetensors", random_lora(), base)
    said = refusal("merge", file, other, "--out", tmp_path / "d.safetensors")
    assert "it turns a weight, so merge it into the model" in said


# --- resize


def test_a_resize_to_the_full_rank_changes_nothing(base, tmp_path, capsys):
    file = saved(tmp_path / "a.safetensors", random_lora(), base)
    said = run(capsys, "resize", file, tmp_path / "b.safetensors", "--rank", 4)
    assert "ranks 4 become 4, which keep 100.0%" in said
    same(changes(tmp_path / "b.safetensors", base), changes(file, base))


@pytest.mark.parametrize("format", ["kohya", "diffusers", "original"])
def test_a_resized_file_keeps_the_names_of_its_program(base, tmp_path, capsys, format):
    file = saved(tmp_path / "a.safetensors", random_lora(), base, format)
    run(capsys, "resize", file, tmp_path / "b.safetensors", "--rank", 9)
    same(changes(tmp_path / "b.safetensors", base), changes(file, base))
    before, after = ({k for k in state_dict.read_file(f)[0] if not k.endswith(".alpha")}
                     for f in (file, tmp_path / "b.safetensors"))
    assert before == after


@pytest.mark.parametrize("option, value, wanted", [
    ("--rank", 2, lambda s: 2),
    ("--sv-ratio", 3, lambda s: int((s > s[0] / 3).sum())),
    ("--sv-fro", 0.9, lambda s: next(n for n in range(1, 9) if (s[:n] ** 2).sum() >= 0.81 * (s ** 2).sum())),
    ("--sv-cumulative", 0.7, lambda s: next(n for n in range(1, 9) if s[:n].sum() >= 0.7 * s.sum())),
])
def test_a_resized_layer_is_the_best_of_its_rank(base, tmp_path, capsys, option, value, wanted):
    file = saved(tmp_path / "a.safetensors", random_lora(rank=8), base)
    run(capsys, "resize", file, tmp_path / "b.safetensors", option, value)
    after = changes(tmp_path / "b.safetensors", base)
    for key, change in changes(file, base).items():
        s = torch.linalg.svdvals(change)[:8]
        rank = wanted(s)
        error = (after[key] - change).norm()
        torch.testing.assert_close(error, s[rank:].norm(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.linalg.svdvals(after[key])[rank:].max(), torch.zeros((), dtype=torch.float64),
                                   rtol=0, atol=1e-9)


def test_a_lokr_becomes_a_lora(base, tmp_path, capsys):
    rng = torch.Generator().manual_seed(0)
    own = {"lokr_w1": torch.randn(6, 2, generator=rng), "lokr_w2": torch.randn(36, 36, generator=rng)}
    layer = lora.Layer("blocks.0.attn.qkv.weight", None, "lokr", own, 1.0)
    file = saved(tmp_path / "a.safetensors", lora.Lora([layer], [], []), base)
    run(capsys, "resize", file, tmp_path / "b.safetensors", "--rank", 72)
    change = changes(tmp_path / "b.safetensors", base)[layer.key]
    torch.testing.assert_close(change.float(), torch.kron(own["lokr_w1"], own["lokr_w2"]), rtol=1e-4, atol=1e-4)


# --- merge


def test_loras_side_by_side_are_their_sum(base, tmp_path, capsys):
    one = saved(tmp_path / "a.safetensors", random_lora(0, rank=4, alpha=2.0), base, "kohya")
    other = saved(tmp_path / "b.safetensors", random_lora(1, rank=3, alpha=6.0, modules=("attn.qkv",)), base, "comfyui")
    said = run(capsys, "merge", f"{one}=0.8", f"{other}=-0.5", "--out", tmp_path / "c.safetensors")
    assert "6 layers of 2 files, ranks 4 to 7" in said
    left, right = changes(one, base), changes(other, base)
    same(changes(tmp_path / "c.safetensors", base),
         {key: 0.8 * left[key] + (-0.5 * right[key] if key in right else 0) for key in left})


def test_loras_of_different_programs_are_merged_under_our_names(base, tmp_path, capsys):
    one = saved(tmp_path / "a.safetensors", random_lora(0), base, "diffusers")
    other = saved(tmp_path / "b.safetensors", random_lora(1), base, "kohya")
    run(capsys, "merge", one, other, "--out", tmp_path / "c.safetensors")
    left, right = changes(one, base), changes(other, base)
    same(changes(tmp_path / "c.safetensors", base), {key: left[key] + right[key] for key in left})


def test_a_merge_to_a_rank_is_the_best_of_that_rank(base, tmp_path, capsys):
    one, other = (saved(tmp_path / f"{i}.safetensors", random_lora(i), base) for i in range(2))
    run(capsys, "merge", one, other, "--out", tmp_path / "c.safetensors", "--rank", 5)
    after, left, right = (changes(f, base) for f in (tmp_path / "c.safetensors", one, other))
    for key in left:
        s = torch.linalg.svdvals(left[key] + right[key])
        torch.testing.assert_close((after[key] - left[key] - right[key]).norm(), s[5:].norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_predicts_as_the_model_with_the_loras(base, tmp_path, capsys, dtype):
    shape, weights = base[1], {key: value.to(dtype) for key, value in base[2].items()}
    model = tmp_path / "model.safetensors"
    state_dict.write_file(model, weights, checkpoint.metadata(shape))
    files = [saved(tmp_path / f"{i}.safetensors", random_lora(i, dtype=torch.float32), base, format)
             for i, format in enumerate(("comfyui", "diffusers"))]
    said = run(capsys, "merge", f"{files[0]}=0.1", f"{files[1]}=0.05", "--base", model, "--out",
               tmp_path / "merged.safetensors")
    assert "6 weights of" in said
    config, after = checkpoint.read(*state_dict.read_file(tmp_path / "merged.safetensors"))
    assert config == shape and {value.dtype for value in after.values()} == {dtype}
    wanted = {key: value.float() for key, value in weights.items()}
    for file, weight in zip(files, (0.1, 0.05), strict=True):
        found = lora.read(state_dict.read_file(file)[0], names({k: v.shape for k, v in weights.items()}))
        wanted = merge(wanted, found, weight)
    nets = [PixArt(shape), PixArt(shape)]
    nets[0].load_state_dict({key: value.float() for key, value in after.items()})
    nets[1].load_state_dict({key: value.to(dtype).float() for key, value in wanted.items()})
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([321.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(nets[0](x, t, context), nets[1](x, t, context), rtol=1e-4, atol=1e-4)


def test_a_personalisation_is_merged_into_stage_c(tmp_path, capsys):
    stage_c = tiny_ultrapixel.written(tmp_path / "stage_c.safetensors", StageC, tiny_ultrapixel.C)
    config, weights = ultrapixel_checkpoint.read_stage_c(*state_dict.read_file(stage_c))
    rng = torch.Generator().manual_seed(0)
    made = ultrapixel_lora.Personalisation(
        {key: (torch.randn(weights[key].shape[0], 2, generator=rng), torch.randn(2, weights[key].shape[1],
                                                                                generator=rng))
         for key in ultrapixel_lora.attention_keys(config)}, 0.5)
    tensors, metadata = ultrapixel_lora.to_core(made)
    state_dict.write_file(tmp_path / "lora.safetensors", tensors, metadata)
    run(capsys, "merge", tmp_path / "lora.safetensors", "--base", stage_c, "--out", tmp_path / "merged.safetensors")
    file, metadata = state_dict.read_file(tmp_path / "merged.safetensors")
    assert file.keys() == state_dict.read_file(stage_c)[0].keys()  # those of the release, which ComfyUI reads
    again, after = ultrapixel_checkpoint.read_stage_c(file, metadata)
    wanted = made.merge(weights)
    assert again == config and after.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(after[key], value)


def test_only_one_changed_tensor_is_in_memory_at_a_time(tmp_path):
    like, alive, most = {f"{i}": torch.zeros(5, 3) for i in range(4)}, [], []

    def made(key):
        value = torch.full((5, 3), float(key))
        alive.append(weakref.ref(value))
        most.append(sum(ref() is not None for ref in alive))
        return value

    streamed_file.write(tmp_path / "a.safetensors", like, made, {"a": "b"})
    tensors, metadata = state_dict.read_file(tmp_path / "a.safetensors")
    assert metadata == {"a": "b"} and all(bool((value == float(key)).all()) for key, value in tensors.items())
    assert max(most) <= 2  # the one that is made, and the one that was written


# --- What is refused, and what stays


def test_a_file_that_is_there_is_replaced_only_by_force(base, tmp_path, capsys):
    file = saved(tmp_path / "a.safetensors", random_lora(), base)
    out = tmp_path / "b.safetensors"
    out.write_bytes(b"mine")
    for words in (("resize", file, out, "--rank", 2), ("merge", file, "--out", out),
                  ("merge", file, "--out", out, "--base", base[0])):
        assert "exists. Name another file to write, or give --force." in refusal(*words)
        assert out.read_bytes() == b"mine"
    assert "is a source itself" in refusal("resize", file, file, "--rank", 2, "--force")
    for words in (("resize", file, out, "--rank", 2), ("merge", file, "--out", out, "--base", base[0])):
        run(capsys, *words, "--force")
        if os.name == "posix":
            mask = os.umask(0)
            os.umask(mask)
            assert out.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("broken", ["cut", "empty", "other", "half", "ranks"])
@pytest.mark.parametrize("way", ["inspect", "resize", "merge", "base"])
def test_a_broken_file_is_one_sentence(base, tmp_path, broken, way):
    file = saved(tmp_path / "a.safetensors", random_lora(), base)
    tensors = state_dict.read_file(file)[0]
    key = "diffusion_model.blocks.0.attn.qkv.lora_B.weight"
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "empty":
        file.write_bytes(b"")
    elif broken == "other":
        state_dict.write_file(file, {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})
    elif broken == "half":
        state_dict.write_file(file, {k: v for k, v in tensors.items() if k != key})
    else:
        state_dict.write_file(file, {**tensors, key: torch.zeros(216, 3)})
    out = tmp_path / "b.safetensors"
    words = {"inspect": ("inspect", file), "resize": ("resize", file, out, "--rank", 2),
             "merge": ("merge", file, file, "--out", out), "base": ("merge", file, "--out", out, "--base", base[0])}
    said = refusal(*words[way])
    assert said.startswith("error: a.safetensors") and "\n" not in said and not out.exists()


@pytest.mark.parametrize("words, sentence", [
    (("--rank", 0), "--rank 0 must be at least 1"), ((), "say how far: --rank"),
    (("--sv-fro", 1.5), "--sv-fro 1.5 is outside"), (("--sv-ratio", 1), "--sv-ratio 1 must be more than 1"),
    (("--sv-fro", 0.5, "--sv-ratio", 2), "one of them decides"),
])
def test_ranks_that_mean_nothing_are_refused(base, tmp_path, words, sentence):
    file = saved(tmp_path / "a.safetensors", random_lora(), base)
    assert sentence in refusal("resize", file, tmp_path / "b.safetensors", *words)


def test_loras_that_do_not_belong_together_are_refused(base, tmp_path):
    file = saved(tmp_path / "a.safetensors", random_lora(), base)
    other = tmp_path / "flow.safetensors"
    state_dict.write_file(other, {f"transformer_blocks.0.attn1.q_proj.lora_{ab}.weight": torch.ones(s)
                                  for ab, s in (("A", (2, 8)), ("B", (8, 2)))})
    out = tmp_path / "b.safetensors"
    assert "different models, PixArt and PixelFlow" in refusal("merge", file, other, "--out", out)
    assert "fits this network" in refusal("merge", other, "--out", out, "--base", base[0])
    assert "'half' is no weight" in refusal("merge", f"{file}=half", "--out", out)
    assert "LoRAs are merged into PixArt" in refusal("merge", file, "--out", out, "--base", file)
