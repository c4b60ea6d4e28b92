"""What saves memory leaves what is learned as it was: frozen blocks in few bits, or waiting in host memory."""
from functools import partial
from importlib.util import find_spec

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
import tiny_ultrapixel
import torch
from pixstack.models_impl import lora, state_dict
from pixstack.models_impl.pixart.lora import names
from pixstack.trainer.cli import main as cli
from pixstack.trainer.export.exporting import open_run
from pixstack.trainer.features import text_encoders
from pixstack.trainer.memory import offload, quantization
from pixstack.trainer.training import build, plan
from pixstack.trainer.training.checkpoints import module_tensors, read_tensors
from tiny_pixart import recipe_of
from torch import nn
from weights import tiny_hed

pytestmark = pytest.mark.long
FP8 = pytest.param("fp8")
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes"))
KINDS = [FP8, NF4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    tiny_pixart.released(file)
    return file


@pytest.fixture
def made(path, parts, base, tmp_path):
    def settings(*words, recipe="pixart_lora", **more):
        return tiny_pixart.settings(path, tmp_path / "run", parts, f"init_from={base}", *words, recipe=recipe,
                                    **{"model": {}, **more})
    return settings


@pytest.mark.parametrize("kind, far, bytes", [(*FP8.values, 0.03, 96 * 64 + 4 * 96), ("int8", 0.01, 96 * 64 + 4 * 96),
                                              pytest.param("nf4", 0.12, 96 * 32 + 4 * 96 + 64, marks=NF4.marks)])
def test_a_layer_in_few_bits_says_nearly_the_same_and_lets_its_gradient_through(kind, far, bytes):
    torch.manual_seed(0)
    whole = nn.Linear(64, 96).requires_grad_(False)
    few = quantization.QuantizedLinear(whole, kind)
    assert sum(p.nbytes for n, p in few.named_parameters() if n != "bias") == bytes
    kept, x = [], torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = few(x)
    assert sum(t.nbytes for t in kept) == bytes  # no whole weight waits for the backward pass
    assert (y - whole(x)).norm() / whole(x).norm() < far
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ few.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert few(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_learns_on_blocks_in_few_bits_and_is_exported_as_ever(made, base, tmp_path, kind):
    words = ("steps=60", "optimizer.learning_rate=1e-2", "optimizer.warm_up=0", "save_every=60", "ema.decay=0.0")
    recipe, _ = tiny_run.train(made(*words, f"memory.base={kind}"))
    assert sum(isinstance(m, quantization.QuantizedLinear) for m in recipe.modules()) == 7 * 2  # of each block
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert all("lora_" in name or "y_embedding" in name for name in module_tensors(recipe))
    plain, _ = recipe_of(made())
    tensors, metadata = recipe.files()["loras/{name}.safetensors"]
    expected = plain.files()["loras/{name}.safetensors"][0]
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in expected.items()}
    weights = state_dict.read_file(base)[0]
    assert not lora.read(tensors, names({k: v.shape for k, v in weights.items()}), metadata).unmatched
    again, _, _ = open_run(tmp_path / "run")
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(again.net(x, t, context), recipe.net.eval()(x, t, context))


def test_dora_learns_on_blocks_in_few_bits(made):
    recipe, batches = recipe_of(made("memory.base=fp8", "adapter.dora=true"))
    recipe(batches(0, range(6))).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in recipe.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_counts_what_few_bits_take(made, tmp_path, capsys, kind):
    outputs, weights = [], []
    for number, words in enumerate(((), (f"memory.base={kind}",))):
        (tmp_path / str(number)).mkdir()
        cli.main(["train", str(tiny_pixart.toml(tmp_path / str(number), made(*words))), "--dry-run"])
        outputs.append(capsys.readouterr().out)
        settings = made(*words)
        planned = plan.on_meta(partial(build.recipe, settings, build.collection(settings)))
        weights.append(sum(p.nbytes for p in planned.parameters() if not p.requires_grad))
    lines = [[line for line in one.splitlines() if line.startswith(word)][0] for one in outputs
             for word in ("parameters",)]
    assert lines[0] == lines[1] and weights[1] < 0.6 * weights[0]
    assert "time       about" in outputs[1]


def alike(settings) -> tuple[float, int]:
    """How alike the gradients are with and without fp8 (cosine), and how many layers are in few bits."""
    found, few = [], 0
    for word in ("memory.base=", "memory.base=fp8"):
        recipe, batches = recipe_of(settings(word))
        recipe(batches(0, range(4))).mean().backward()
        found.append(torch.cat([p.grad.flatten().float() for p in recipe.parameters() if p.grad is not None]))
        few = sum(isinstance(m, quantization.QuantizedLinear) for m in recipe.modules())
    return torch.cosine_similarity(*found, dim=0).item(), few


@pytest.mark.parametrize("recipe", [
    {"name": "ultrapixel_lora"}, {"name": "ultrapixel_guide", "low_side": 2},
    {"name": "ultrapixel_controlnet", "blocks": [0, 3], "backbone": "simple"}], ids=lambda r: r["name"])
def test_gradients_of_ultrapixel_on_a_stage_c_in_fp8_are_nearly_the_same(tmp_path_factory, tmp_path, recipe):
    folder = tmp_path_factory.mktemp("networks")
    pictures, parts = tiny_run.pictures(folder / "set", size=128), tiny_ultrapixel.parts(folder / "parts")
    near, few = alike(lambda word: tiny_ultrapixel.settings(pictures, tmp_path / "run", parts, recipe, word))
    assert few and near > 0.9


@pytest.mark.parametrize("recipe", ["pixart_controlnet", "pixart_lora", "pixart_lcm"])
def test_gradients_of_pixart_on_blocks_in_fp8_are_nearly_the_same(made, tmp_path, recipe):
    more = {"pixart_controlnet": ("recipe.blocks=1", f"recipe.annotator={tmp_path / 'hed.pth'}")}.get(recipe, ())
    tiny_hed(tmp_path / "hed.pth")
    near, few = alike(lambda word: made(word, *more, recipe=recipe))
    assert few and near > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_a_controlnet_through_blocks_in_few_bits(tmp_path, kind):
    pictures, parts = tiny_ponder.pictures(tmp_path / "set"), tiny_ponder.parts(tmp_path)
    found = {}
    for base in ("", kind):
        recipe, batches = recipe_of(tiny_ponder.settings(pictures, tmp_path / "run", parts, f"memory.base={base}"))
        recipe(batches(0, range(6))).mean().backward()
        found[base] = torch.cat([p.grad.flatten() for p in recipe.net.parameters() if p.grad is not None])
    assert any(isinstance(m, quantization.QuantizedLinear) for m in recipe.base.modules())
    assert not any(isinstance(m, quantization.QuantizedLinear) for m in recipe.net.modules())
    assert torch.cosine_similarity(found[""], found[kind], dim=0) > 0.9


@pytest.mark.parametrize("words, part", [
    (("recipe.name=pixart", "memory.base=fp8"), "memory.base='fp8': recipe.name='pixart' trains all weights"),
    (("recipe.name=pixart_dreambooth", "recipe.lora=false", "memory.base=fp8"), "recipe.lora=true"),
    (("memory.base=fp4",), "memory.base='fp4' is none of fp8, int8, nf4; did you mean"),
    (("memory.bse=fp8",), "memory.bse is not a setting; did you mean base"),
])
def test_few_bits_that_cannot_work_are_refused(made, words, part):
    with pytest.raises(ValueError) as caught:
        made(*words)
    assert part in str(caught.value)


# --- blocks in host memory


def gradients(recipe, batches):
    losses = recipe(batches(0, range(6)))
    losses.mean().backward()
    return losses, [p.grad for p in recipe.parameters() if p.requires_grad]


@pytest.mark.parametrize("words", [(), ("memory.base=fp8",), ("recipe.name=pixart_lcm",)], ids=["lora", "fp8", "lcm"])
def test_blocks_come_back_for_both_passes(made, words, monkeypatch):
    words = ("checkpoint_activations=true", *words)
    losses, expected = gradients(*recipe_of(made(*words)))
    recipe, batches = recipe_of(made(*words, "memory.swap_blocks=2"))

    def nothing(self, tensor):  # whoever reads a block that is away notices
        away = torch.zeros_like(tensor)
        return away.fill_(float("nan")) if tensor.is_floating_point() and tensor.itemsize > 1 else away

    monkeypatch.setattr(offload.Swap, "rest", nothing)
    offload.place(recipe, made(*words, "memory.swap_blocks=2"), torch.device("cpu"))
    found, got = gradients(recipe, batches)
    assert torch.equal(losses, found)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_one_block_is_on_its_way_while_another_is_at_work(made):
    settings = made("checkpoint_activations=true", "memory.swap_blocks=2")
    recipe, batches = recipe_of(settings)
    held, swapping = [], offload.place(recipe, settings, torch.device("cpu"))
    for i, block in enumerate(recipe.net.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: held.append((i, sorted(swapping.here))))
    recipe(batches(0, range(6))).mean().backward()
    assert held == [(0, [0, 1]), (1, [1]), (1, [0, 1]), (0, [0])]
    assert not swapping.here


def test_a_run_with_blocks_in_host_memory_learns_the_same(made, tmp_path):
    for name, words in (("plain", ()), ("swapped", ("memory.swap_blocks=1",))):
        settings = made("checkpoint_activations=true", "steps=2", "save_every=2", f"out={tmp_path / name}", *words)
        (tmp_path / f"of_{name}").mkdir()
        cli.main(["train", str(tiny_pixart.toml(tmp_path / f"of_{name}", settings))])
    plain, swapped = (read_tensors(tmp_path / name / "checkpoints/00000002/model.safetensors")
                      for name in ("plain", "swapped"))
    assert plain.keys() == swapped.keys() and all(torch.equal(plain[k], swapped[k]) for k in plain)


@pytest.mark.parametrize("words, part", [
    (("memory.swap_blocks=1",), "needs checkpoint_activations=true"),
    (("memory.swap_blocks=1", "checkpoint_activations=true", "compile=true"), "does not go with compile=true"),
    (("recipe.name=pixart", "memory.swap_blocks=1", "checkpoint_activations=true"), "trains all weights here"),
])
def test_swapping_that_cannot_work_is_refused(made, words, part):
    with pytest.raises(ValueError) as caught:
        made(*words)
    assert part in str(caught.value)


def test_more_blocks_than_there_are_are_refused_with_their_number(made):
    settings = made("checkpoint_activations=true", "memory.swap_blocks=9")
    with pytest.raises(ValueError, match="there are 2 blocks that do not learn"):
        offload.place(recipe_of(settings)[0], settings, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_text_encoder_in_few_bits_says_what_its_rounded_weights_say(made, tmp_path, kind):
    captions = ["a red card", "two of them"]
    plain, few = (text_encoders.frozen(made(f"text.precision={p}"), tmp_path) for p in ("bf16", kind))
    for text in (plain, few):
        text.embed(captions, "cpu")
    whole, rounded = (dict(text.encoder[0].named_modules()) for text in (plain, few))
    layers = {n: m for n, m in rounded.items() if isinstance(m, quantization.QuantizedLinear)}
    assert layers and not any(isinstance(m, nn.Linear) for m in rounded.values())
    sizes = [sum(p.nbytes for p in text.encoder[0].parameters()) for text in (few, plain)]
    assert sizes[0] < sizes[1]
    before, said = (text.lookup(captions, "cpu")[0] for text in (plain, few))
    assert few.store.folder != plain.store.folder and not torch.equal(before, said)  # none is taken for the other
    for name, layer in layers.items():
        assert 0 < (layer.weight - whole[name].weight).norm() < 0.12 * whole[name].weight.norm()
        whole[name].weight.copy_(layer.weight)
    plain.embed(captions, "cpu")
    torch.testing.assert_close(said, plain.lookup(captions, "cpu")[0], rtol=0.02, atol=0.02)
