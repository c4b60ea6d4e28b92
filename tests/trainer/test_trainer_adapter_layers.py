"""Adapters whose layers differ in rank, alpha and dropout, and those that start from a file."""
import pytest
import tiny_pixart
import tiny_run
import torch
from merged_lora import merge
from pixstack.models_impl import lora, state_dict
from pixstack.models_impl.pixart.lora import names
from pixstack.models_impl.pixart.model import PixArt
from pixstack.trainer.config import load, rules
from pixstack.trainer.config.schema import Adapter, AdapterLayers
from pixstack.trainer.recipes import adapters, lora_layer
from pixstack.trainer.recipes.pixart.task import TARGETS
from pixstack.trainer.training.checkpoints import read_tensors


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return tiny_pixart.released(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def attached(released):
    def made(**settings):
        net = PixArt(released[0])
        net.load_state_dict(released[1])
        torch.manual_seed(0)
        return adapters.attach(net, Adapter(**settings), TARGETS, names)
    return made


def filled(net):
    """The same with an adapter none of which is zero."""
    torch.manual_seed(3)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return net


def ranks(net):
    return {layer.key.removesuffix(".weight"): (lora.rank_of(layer.tensors), layer.scale)
            for layer in adapters.layers(net)}


INPUTS = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0]),
          torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))]


def predicted(net):
    with torch.no_grad():
        return net(*INPUTS)


def saved(net, path, format="comfyui"):
    state_dict.write_file(path, adapters.tensors(net, names(adapters.shapes(net)), format))
    return str(path)


@pytest.mark.parametrize("settings", [{}, {"alpha": 2.0}, {"dora": True}, {"dropout": 0.5}], ids=str)
def test_a_lora_computes_and_learns_what_peft_does(attached, settings):
    net = filled(attached(rank=4, **settings))
    learns = [p for p in net.parameters() if p.requires_grad]
    found = []
    for cls in (lora_layer.LoraLinear, lora_layer.Linear):
        for module in adapters.adapted(net).values():
            module.__class__ = cls
        torch.manual_seed(5)  # dropout's inputs depend on it
        y = net(*INPUTS)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), learns)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_every_lora_of_a_linear_layer_is_computed_in_one_step(attached):
    net = attached(rank=4)
    assert {type(module) for module in adapters.adapted(net).values()} == {lora_layer.LoraLinear}
    names = [node.name() for node in nodes_of(filled(net)(*INPUTS))]
    assert names.count("_LoraProductBackward") == len(adapters.adapted(net))


def nodes_of(y):
    """Everything that autograd goes through."""
    seen, open_ = set(), [y.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [after for after, _ in node.next_functions]
    return seen


def test_the_first_pattern_that_is_found_in_a_layer_s_name_sets_its_rank_and_scale(attached):
    found = ranks(attached(rank=4, alpha=2.0, layers=[
        AdapterLayers(r"blocks\.0\.attn", rank=2), AdapterLayers(r"\.attn\.qkv$", rank=8, alpha=4.0),
        AdapterLayers("mlp", rank=0), AdapterLayers("final_layer.linear")]))
    assert found["blocks.0.attn.qkv"] == (2, 1.0) and found["blocks.1.attn.qkv"] == (8, 0.5)
    assert found["blocks.1.attn.proj"] == (4, 0.5) and found["final_layer.linear"] == (4, 0.5)
    assert not [name for name in found if "mlp" in name]


def test_a_last_table_of_rank_0_leaves_only_the_layers_before_it(attached):
    found = ranks(attached(layers=[AdapterLayers(r"\.0\.attn\.qkv"), AdapterLayers(".", rank=0)]))
    assert found == {"blocks.0.attn.qkv": (16, 1.0)}


def test_layers_of_different_ranks_are_exported_as_they_are(attached, released):
    net = filled(attached(rank=4, alpha=3.0, layers=[AdapterLayers("qkv", rank=2, alpha=5.0)]))
    file = adapters.tensors(net, names(adapters.shapes(net)))
    found = lora.read(file, names({k: v.shape for k, v in released[1].items()}))
    merged = PixArt(released[0])
    merged.load_state_dict(merge(released[1], found))
    torch.testing.assert_close(predicted(merged), predicted(net), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers, sentence", [
    ([AdapterLayers("to_q")], r"adapter.layers.1.pattern='to_q' is found in no layer's name. There are, .*attn.qkv"),
    ([AdapterLayers("attn"), AdapterLayers("attn.qkv")], r"adapter.layers.2.pattern='attn.qkv' counts for no layer"),
    ([AdapterLayers(".", rank=0)], "no layer is left"),
])
def test_a_pattern_without_a_layer_is_named(attached, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        attached(layers=layers)


@pytest.mark.parametrize("table, sentence", [
    ({"pattern": "("}, "adapter.layers.1.pattern='(' is not a regular expression"),
    ({"pattern": "(a+)+$"}, "adapter.layers.1.pattern='(a+)+$' is not run"),
    ({}, "adapter.layers.1.pattern is empty"),
    ({"pattern": "a", "rank": -1}, "adapter.layers.1.rank=-1 must not be negative"),
    ({"pattern": "a", "dropout": 1.0}, "adapter.layers.1.dropout=1.0 is outside [0, 1)"),
    ({"pattern": "a", "rnk": 1}, "adapter.layers.1.rnk is not a setting; did you mean rank"),
])
def test_a_table_that_cannot_work_is_refused(table, sentence):
    config, problems = load.read({"recipe": {"name": "pixart_lora"}, "adapter": {"layers": [table]}})
    assert any(sentence in problem for problem in problems + rules.adapter(config.adapter))


def test_tables_survive_the_run_folder_s_settings():
    raw = {"recipe": {"name": "pixart_lora"}, "adapter": {"layers": [{"pattern": "attn", "rank": 2}]}}
    config, problems = load.read(raw)
    again, more = load.read(load.as_dict(config))
    assert not problems + more and again == config and config.adapter.layers == [AdapterLayers("attn", rank=2)]


# --- Dropout


def test_dropout_takes_the_same_inputs_from_all_pictures_of_a_step(attached):
    net = filled(attached(rank=4, dropout=0.5))

    def step(number, part=slice(None)):
        torch.manual_seed(number)
        return net(*(value[part] for value in INPUTS)).detach()

    whole = step(7)
    torch.testing.assert_close(step(7), whole, rtol=0, atol=0)
    torch.testing.assert_close(step(7, slice(1, 2)), whole[1:], rtol=1e-4, atol=1e-4)
    assert (step(8) - whole).abs().max() > 1e-3
    with torch.no_grad():  # what is drawn and validated has all inputs
        torch.testing.assert_close(net(*INPUTS), predicted(filled(attached(rank=4))), rtol=0, atol=0)


def test_dropout_of_a_layer_is_its_own(attached):
    net = attached(layers=[AdapterLayers("qkv", dropout=0.25)])
    shares = {name: m.share for name, m in net.named_modules() if isinstance(m, adapters.InputDropout)}
    assert set(shares.values()) == {0.25} and all("qkv" in name for name in shares)


def test_dropout_is_only_for_lora():
    assert "adapter.dropout is for adapter.kind='lora', not 'loha'." in rules.adapter(Adapter(kind="loha", dropout=0.1))


# --- OFT


def test_a_turn_keeps_the_lengths_and_angles_of_what_a_layer_knows(attached, released):
    """What it knows are its columns: what each input adds to the outputs."""
    net = filled(attached(kind="oft", rank=5))
    found = adapters.layers(net)
    assert {layer.tensors["oft_blocks"].shape[1] for layer in found if "qkv" in layer.key} == {4}  # 5 do not divide 216
    merged = merge(released[1], lora.Lora(found, [], []))
    for layer in found:
        before, after = released[1][layer.key].double(), merged[layer.key].double()
        assert (after - before).norm() > 0.1 * before.norm()
        torch.testing.assert_close(after.T @ after, before.T @ before, rtol=1e-4, atol=1e-4)


def test_half_a_turn_s_strength_is_half_of_its_change(attached):
    net = filled(attached(kind="oft", rank=4, targets=["final_layer.linear"]))
    with adapters.without(net):
        plain = predicted(net)
    whole = predicted(net) - plain
    with adapters.at_strength(net, 0.5):
        torch.testing.assert_close(predicted(net) - plain, 0.5 * whole, rtol=1e-4, atol=1e-5)
    assert whole.abs().max() > 0.01


def test_turns_go_on_from_a_resumed_run_to_the_bit(path, parts, tmp_path):
    base = tmp_path / "base.safetensors"
    tiny_pixart.released(base)
    made = [tiny_pixart.settings(path, tmp_path / name, parts, f"init_from={base}", "adapter.kind=oft", "steps=4",
                                 "save_every=2", "validation.every=2", "adapter.rank=4", recipe="pixart_lora", model={})
            for name in ("unbroken", "broken")]
    tiny_run.train(made[0])
    tiny_run.train(made[1], lambda run, step: setattr(run, "stop", step == 2))
    assert not (tmp_path / "broken/checkpoints/00000004").exists()
    recipe, _ = tiny_run.train(made[1])
    assert all(".oft_blocks." in name for name, p in recipe.named_parameters() if p.requires_grad)
    for file in ("model", "ema", "optimizer"):
        a, b = (read_tensors(tmp_path / name / f"checkpoints/00000004/{file}.safetensors")
                for name in ("unbroken", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- Starting from a file


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffusers", "original"])
def test_an_adapter_starts_as_a_file_of_any_program_has_it(attached, tmp_path, format):
    net = filled(attached(rank=4, alpha=2.0, targets=["attn.qkv", "mlp.fc1"]))
    again = attached(start=saved(net, tmp_path / "lora.safetensors", format))
    torch.testing.assert_close(predicted(again), predicted(net), rtol=1e-4, atol=1e-4)
    assert (predicted(again) - predicted(attached(rank=4))).abs().max() > 0.01
    assert {name.rsplit(".", 1)[1] for name in ranks(again)} == {"qkv", "fc1"}


@pytest.mark.parametrize("settings", [
    {"dora": True}, {"kind": "loha"}, {"kind": "lokr", "factor": 4}, {"rslora": True}, {"alpha": 7.0},
    {"layers": [AdapterLayers("qkv", rank=2)]}, {"kind": "oft", "layers": [AdapterLayers("qkv", rank=2)]},
], ids=["dora", "loha", "lokr", "rslora", "another-alpha", "ranks", "oft"])
def test_every_kind_of_adapter_starts_from_its_file(attached, tmp_path, settings):
    net = filled(attached(rank=4, **{"alpha": 2.0, **settings}))
    again = {k: v for k, v in settings.items() if k != "layers"}
    if "alpha" in again:  # the scale is folded in
        again["alpha"] = 3.0
    again = attached(start=saved(net, tmp_path / "lora.safetensors"), **again)
    torch.testing.assert_close(predicted(again), predicted(net), rtol=1e-3, atol=1e-3)


def test_a_dry_run_looks_into_the_start(attached, released, tmp_path):
    start = saved(attached(rank=4, alpha=2.0), tmp_path / "lora.safetensors")
    with torch.device("meta"):
        net = adapters.attach(PixArt(released[0]), Adapter(start=start), TARGETS, names)
    assert {layer.scale for layer in adapters.layers(net)} == {0.5}
    assert all(p.is_meta for p in net.parameters())


@pytest.mark.parametrize("settings, sentence", [
    ({"rank": 8}, "has rank 4 in blocks.0.attn.qkv, and the settings say 8"),
    ({"dora": True}, "is a lora there, and the settings train a dora"),
    ({"kind": "lokr"}, "is a lora there, and the settings train a lokr"),
    ({"kind": "oft"}, "is a lora there, and the settings train a oft"),
    ({"targets": ["mlp.fc1"]}, "layers that would get no adapter, such as blocks.0.attn.qkv"),
])
def test_a_start_that_does_not_fit_the_settings_is_named(attached, tmp_path, settings, sentence):
    start = saved(attached(rank=4, targets=["attn.qkv"]), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=sentence):
        attached(start=start, **settings)


def test_a_start_of_another_network_is_named(attached, tmp_path):
    file = {f"blocks.0.attn.qkv.lora_{ab}.weight": torch.zeros(s) for ab, s in (("A", (4, 80)), ("B", (240, 4)))}
    state_dict.write_file(tmp_path / "wide.safetensors", file)
    with pytest.raises(ValueError, match="wide.safetensors.*240 x 80 matrix, and blocks.0.attn.qkv.weight is 216 x 72"):
        attached(start=str(tmp_path / "wide.safetensors"))
    assert "there is no such file" in rules.adapter(Adapter(start=str(tmp_path / "absent.safetensors")))[0]
