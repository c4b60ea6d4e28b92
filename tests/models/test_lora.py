import json
import math
from importlib.util import find_spec

import pytest
import torch
from conftest import needed
from merged_lora import merge
from pixstack.models_impl import lora
from pixstack.models_impl.pixart import lora as pixart_lora
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt
from torch import nn

WIDTH = 24
CONFIG = PixArtConfig(depth=2, hidden=WIDTH, heads=2, context_dim=16, micro_conditions=True)
SHAPES = {key: tuple(value.shape) for key, value in PixArt(CONFIG, device="meta").state_dict().items()}
NAMES = pixart_lora.names(SHAPES)

# diffusers module -> (our parameter, first row, number of rows): written out here, not taken from the tables under test
SPLIT = {
    "transformer_blocks.1.attn1.to_q": ("blocks.1.attn.qkv", 0, WIDTH),
    "transformer_blocks.1.attn1.to_k": ("blocks.1.attn.qkv", WIDTH, WIDTH),
    "transformer_blocks.1.attn1.to_v": ("blocks.1.attn.qkv", 2 * WIDTH, WIDTH),
    "transformer_blocks.1.attn1.to_out.0": ("blocks.1.attn.proj", 0, WIDTH),
    "transformer_blocks.0.attn2.to_q": ("blocks.0.cross_attn.q_linear", 0, WIDTH),
    "transformer_blocks.0.attn2.to_k": ("blocks.0.cross_attn.kv_linear", 0, WIDTH),
    "transformer_blocks.0.attn2.to_v": ("blocks.0.cross_attn.kv_linear", WIDTH, WIDTH),
    "transformer_blocks.0.ff.net.0.proj": ("blocks.0.mlp.fc1", 0, 4 * WIDTH),
    "transformer_blocks.0.ff.net.2": ("blocks.0.mlp.fc2", 0, WIDTH),
    "pos_embed.proj": ("x_embedder.proj", 0, WIDTH),
    "caption_projection.linear_1": ("y_embedder.y_proj.fc1", 0, WIDTH),
    "adaln_single.emb.timestep_embedder.linear_2": ("t_embedder.mlp.2", 0, WIDTH),
    "adaln_single.emb.resolution_embedder.linear_1": ("csize_embedder.mlp.0", 0, WIDTH // 3),
    "adaln_single.emb.aspect_ratio_embedder.linear_1": ("ar_embedder.mlp.0", 0, WIDTH // 3),
    "adaln_single.linear": ("t_block.1", 0, 6 * WIDTH),
    "proj_out": ("final_layer.linear", 0, 32),
}
FUSED = {key: (key, 0, SHAPES[key + ".weight"][0]) for key, _, _ in SPLIT.values()}
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def flat(module):
    return module.replace(".", "_")


SPELLINGS = {  # format -> (modules, how a module is called there, names of the factors, is alpha in the file)
    "PEFT folder": (SPLIT, lambda m: f"base_model.model.{m}", AB, False),
    "PEFT folder with the adapter's name": (
        SPLIT, lambda m: f"base_model.model.{m}", ("lora_A.default.weight", "lora_B.default.weight"), False),
    "official script through the SD pipeline": (SPLIT, lambda m: f"unet.base_model.model.{m}", AB, False),
    "diffusers": (SPLIT, lambda m: f"transformer.{m}", AB, False),
    "bare diffusers modules": (SPLIT, lambda m: m, AB, False),
    "OneTrainer legacy": (SPLIT, lambda m: f"lora_transformer_{flat(m)}", DOWN_UP, True),
    "OneTrainer original": (FUSED, lambda m: m, AB, True),
    "OneTrainer comfy": (FUSED, lambda m: f"diffusion_model.{m}", AB, True),
    "kohya": (FUSED, lambda m: f"lora_unet_{flat(m)}", DOWN_UP, True),
    "LyCORIS": (SPLIT, lambda m: f"lycoris_{flat(m)}", DOWN_UP, True),
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(shapes=SHAPES):
    return {key: random(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


def factors(modules, rank=3, shapes=SHAPES):
    """module -> (down, up): convolutions get convolutions, as PEFT and kohya make them."""
    made = {}
    for i, (module, (key, _, rows)) in enumerate(modules.items()):
        shape = shapes[key + ".weight"]
        made[module] = random(rank, *shape[1:], seed=2 * i), random(rows, rank, *[1] * (len(shape) - 2), seed=2 * i + 1)
    return made


def expected(modules, made, scale, before):
    after = {key: value.clone() for key, value in before.items()}
    for module, (key, start, rows) in modules.items():
        down, up = made[module]
        part = after[key + ".weight"][start : start + rows]
        part += scale * (up.flatten(1) @ down.flatten(1)).reshape(part.shape)
    return after


def assert_same(got, wanted, tolerance=0.0):
    assert got.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_any_trainer_changes_the_same_weights(spelling):
    modules, called, (a, b), has_alpha = SPELLINGS[spelling]
    made = factors(modules)
    file = {}
    for module, (down, up) in made.items():
        file |= {f"{called(module)}.{a}": down, f"{called(module)}.{b}": up}
        if has_alpha:
            file[f"{called(module)}.alpha"] = torch.tensor(6.0)
    found = lora.read(file, NAMES)
    assert not found.unmatched
    assert len(found.layers) == len(modules)
    scale = 6 / 3 if has_alpha else 8 / 3 if "model." in called("") else 1.0
    before = weights()
    assert_same(merge(before, found), expected(modules, made, scale, before), 1e-4)


def test_every_weight_of_the_network_has_a_name_in_both_spellings():
    keys = {key for key, shape in SHAPES.items() if key.endswith(".weight")}
    for table in NAMES.values():
        assert {target.key for target in table.values()} == keys


def test_flattened_names_lead_to_one_module_each():
    names = [name for table in NAMES.values() for name in table]
    assert len({flat(name) for name in names}) == len(set(names))


@pytest.mark.parametrize("module, key", [
    ("controlnet_blocks.1.transformer_block.attn1.to_v", "1.copied_block.attn.qkv.weight"),
    ("controlnet.controlnet_blocks.0.before_proj", "0.before_proj.weight"),
    ("controlnet.1.after_proj", "1.after_proj.weight"),
    ("lora_unet_controlnet_1_copied_block_cross_attn_proj", "1.copied_block.cross_attn.proj.weight"),
])  # fmt: skip
def test_a_lora_may_change_the_controlnet(module, key):
    shapes = {k: tuple(v.shape) for k, v in PixArtControlNet(CONFIG, 1, device="meta").state_dict().items()}
    shapes |= {k.replace("0.", "1.", 1): v for k, v in shapes.items()}
    down, up = random(2, WIDTH), random(WIDTH, 2)
    (layer,) = lora.read({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
                         pixart_lora.names(shapes)).layers
    assert layer.key == key
    assert layer.rows == ((2 * WIDTH, WIDTH) if "to_v" in module else None)


# The scale

TO_OUT = "transformer_blocks.0.attn1.to_out.0"


def one(prefix="base_model.model.", rank=4, **more):
    parts = {"lora_A.weight": random(rank, WIDTH), "lora_B.weight": random(WIDTH, rank), **more}
    return {f"{prefix}{TO_OUT}.{part}": value for part, value in parts.items()}


def scale_of(file, **arguments):
    found = lora.read(file, NAMES, **arguments)
    return found.layers[0].scale, " ".join(found.notes)


@pytest.mark.parametrize("prefix, scale", [("base_model.model.", 2.0), ("unet.base_model.model.", 2.0),
                                           ("transformer.", 1.0), ("", 1.0), ("diffusion_model.", 1.0)])
def test_without_any_alpha_the_format_decides(prefix, scale):
    found, note = scale_of(one(prefix))
    assert found == scale
    assert ("PEFT's default of 8" in note) == (scale != 1)


def test_the_given_alpha_comes_before_the_default_of_the_format():
    found, note = scale_of(one(), alpha=16)
    assert found == 4
    assert "as given" in note


def test_the_configuration_comes_before_the_given_alpha():
    found, note = scale_of(one(), alpha=16, adapter_config={"r": 4, "lora_alpha": 2})
    assert found == 0.5
    assert "configuration" in note


def test_the_alpha_of_the_file_comes_first():
    found, _ = scale_of(one(alpha=torch.tensor(1.0)), alpha=16, adapter_config={"r": 4, "lora_alpha": 2})
    assert found == 0.25


def test_a_configuration_without_lora_alpha_means_the_default_of_peft():
    assert scale_of(one(), alpha=16, adapter_config={"r": 4})[0] == 2


def test_a_configuration_beside_a_file_that_peft_did_not_write_is_not_its_own():
    assert scale_of(one("transformer."), adapter_config={"r": 4, "lora_alpha": 64})[0] == 1


def test_a_configuration_may_be_in_the_files_metadata():
    stated = {"transformer.r": 4, "transformer.lora_alpha": 12, "text_encoder.lora_alpha": 99}
    assert scale_of(one("transformer."), metadata={"lora_adapter_metadata": json.dumps(stated)})[0] == 3


def test_a_pattern_sets_the_alpha_of_the_modules_it_ends():
    config = {"r": 2, "lora_alpha": 2, "rank_pattern": {"attn1.to_out.0": 4}, "alpha_pattern": {"to_out.0": 20}}
    assert scale_of(one(), adapter_config=config)[0] == 5


def test_the_configuration_of_another_file_is_not_used():
    found, note = scale_of(one(), adapter_config={"r": 16, "lora_alpha": 64})
    assert found == 2
    assert "goes with rank 16" in note and "has rank 4" in note


def test_the_configuration_is_found_beside_the_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6}', encoding="utf-8")
    assert lora.beside(tmp_path / "adapter_model.safetensors")["lora_alpha"] == 6
    assert lora.beside(tmp_path / "elsewhere" / "adapter_model.safetensors") is None


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="adapter_config.json beside a.safetensors"):
        lora.beside(tmp_path / "a.safetensors")


# The other kinds


def dora(weight, change, length, per_output):
    """DoRA (arXiv 2402.09353, equation 5), element by element."""
    whole = (weight + change).double()
    out = torch.empty_like(whole)
    for i in range(whole.shape[0] if per_output else whole.shape[1]):
        at = i if per_output else (slice(None), i)
        out[at] = length[i].double() * whole[at] / whole[at].square().sum().sqrt()
    return out.float()


@pytest.mark.parametrize("module, name, per_output", [
    (TO_OUT, "lora_magnitude_vector", True),
    (TO_OUT, "lora_magnitude_vector.default.weight", True),
    (TO_OUT, "dora_scale", True),
    (TO_OUT, "dora_scale", False),
    ("pos_embed.proj", "lora_magnitude_vector", True),
    ("pos_embed.proj", "dora_scale", False),
    ("transformer_blocks.0.attn1.to_v", "lora_magnitude_vector", True),
    ("transformer_blocks.0.attn1.to_v", "dora_scale", False),
])  # fmt: skip
def test_a_dora_sets_the_lengths_of_the_changed_weight(module, name, per_output):
    target = NAMES["diffusers"][module]
    shape = target.shape
    down, up = random(2, *shape[1:]), random(shape[0], 2, *[1] * (len(shape) - 2))
    length = random(shape[0 if per_output else 1]).abs() + 0.5
    stored = {
        ("lora", 2): length, ("lora", 4): length.reshape(1, -1, 1, 1),
        ("dora", 2): length.reshape((-1, 1) if per_output else (1, -1)), ("dora", 4): length.reshape(1, -1, 1, 1),
    }[name[:4], len(shape)]  # fmt: skip
    file = {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up,
            f"base_model.model.{module}.{name}": stored}
    found = lora.read(file, NAMES, alpha=1)
    assert [layer.kind for layer in found.layers] == ["dora"]
    before = weights()
    start, rows = target.rows or (0, shape[0])
    after = {key: value.clone() for key, value in before.items()}
    part = after[target.key][start : start + rows]
    part[:] = dora(part, 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(shape), length, per_output)
    assert_same(merge(before, found), after, 1e-5)


def test_a_dora_cannot_be_had_without_the_weight():
    (layer,) = lora.read(one(dora_scale=random(WIDTH, 1)), NAMES).layers
    with pytest.raises(ValueError, match="needs the weight"):
        lora.delta(layer, (WIDTH, WIDTH))


def kron(a, b):
    """Kronecker product, from its definition."""
    size = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], *b.shape[2:]
    return torch.einsum("ab,cd...->acbd...", a, b).reshape(size)


LOKR = {  # the 24 x 24 of an attention, and the 24 x 4 x 2 x 2 of the patch embedding
    "two whole factors": (TO_OUT, dict(lokr_w1=(4, 3), lokr_w2=(6, 8)), 1.0),
    "second factor of low rank": (TO_OUT, dict(lokr_w1=(4, 3), lokr_w2_a=(6, 2), lokr_w2_b=(2, 8)), 2.5),
    "both of low rank": (
        TO_OUT, dict(lokr_w1_a=(4, 2), lokr_w1_b=(2, 3), lokr_w2_a=(6, 2), lokr_w2_b=(2, 8)), 2.5),
    "convolution, whole": ("pos_embed.proj", dict(lokr_w1=(4, 2), lokr_w2=(6, 2, 2, 2)), 1.0),
    "convolution, low rank": ("pos_embed.proj", dict(lokr_w1=(4, 2), lokr_w2_a=(6, 2), lokr_w2_b=(2, 8)), 2.5),
    "convolution, Tucker": (
        "pos_embed.proj", dict(lokr_w1=(4, 2), lokr_w2_a=(2, 6), lokr_w2_b=(2, 2), lokr_t2=(2, 2, 2, 2)), 2.5),
}  # fmt: skip


def adapter(module, shapes, spelling="lycoris_{}"):
    name = spelling.format(flat(module) if "_{}" in spelling else module)
    parts = {part: random(*shape, seed=i) for i, (part, shape) in enumerate(shapes.items())}
    return parts, {**{f"{name}.{part}": value for part, value in parts.items()}, f"{name}.alpha": torch.tensor(5.0)}


@pytest.mark.parametrize("case", LOKR)
def test_a_lokr_is_the_kronecker_product_of_its_factors(case):
    module, shapes, scale = LOKR[case]
    t, file = adapter(module, shapes)
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = torch.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    elif "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
        w2 = w2.reshape(6, 2, 2, 2) if module == "pos_embed.proj" else w2
    (layer,) = lora.read(file, NAMES).layers
    shape = NAMES["diffusers"][module].shape
    assert (layer.kind, layer.scale) == ("lokr", scale)
    torch.testing.assert_close(lora.delta(layer, shape), scale * kron(w1, w2), rtol=0, atol=1e-5)


LOHA = {
    "linear": (TO_OUT, dict(hada_w1_a=(24, 2), hada_w1_b=(2, 24), hada_w2_a=(24, 2), hada_w2_b=(2, 24))),
    "convolution": (
        "pos_embed.proj", dict(hada_w1_a=(24, 2), hada_w1_b=(2, 16), hada_w2_a=(24, 2), hada_w2_b=(2, 16))),
    "convolution, Tucker": ("pos_embed.proj", dict(
        hada_w1_a=(2, 24), hada_w1_b=(2, 4), hada_w2_a=(2, 24), hada_w2_b=(2, 4), hada_t1=(2, 2, 2, 2),
        hada_t2=(2, 2, 2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("case", LOHA)
def test_a_loha_is_the_product_of_two_low_rank_matrices_by_elements(case):
    module, shapes = LOHA[case]
    t, file = adapter(module, shapes)
    halves = [torch.einsum("ijkl,ip,jr->prkl", t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"])
              if "hada_t1" in t else t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2)]
    (layer,) = lora.read(file, NAMES).layers
    shape = NAMES["diffusers"][module].shape
    wanted = 2.5 * (halves[0] * halves[1]).reshape(shape)
    torch.testing.assert_close(lora.delta(layer, shape), wanted, rtol=0, atol=1e-5)


def test_a_whole_difference_reaches_the_bias_of_its_rows():
    change = random(WIDTH)
    found = lora.read({"lycoris_transformer_blocks_0_attn1_to_k.diff_b": change}, NAMES)
    before = weights()
    after = {**before, "blocks.0.attn.qkv.bias": before["blocks.0.attn.qkv.bias"].clone()}
    after["blocks.0.attn.qkv.bias"][WIDTH : 2 * WIDTH] += change
    assert_same(merge(before, found), after)


OURS = {TO_OUT: "blocks.0.attn.proj", "pos_embed.proj": "x_embedder.proj"}


@pytest.mark.parametrize("case, module, parts", [
    ("LoRA", "blocks.0.attn.proj", dict(lora_up=(24, 3), lora_down=(3, 24))),
    ("LoCon", "x_embedder.proj", dict(lora_up=(24, 3, 1, 1), lora_down=(3, 4, 1, 1), lora_mid=(3, 3, 2, 2))),
    ("DoRA per input", "blocks.0.mlp.fc1", dict(lora_up=(96, 3), lora_down=(3, 24), dora_scale=(1, 24))),
    ("DoRA per input of a convolution", "x_embedder.proj",
     dict(lora_up=(24, 3, 1, 1), lora_down=(3, 4, 2, 2), dora_scale=(1, 4, 1, 1))),
    # ComfyUI 0.3.75 cannot apply a LoKr in Tucker form: torch.kron fails on what its einsum leaves.
    *[(f"LoKr, {name}", OURS[case[0]], case[1]) for name, case in LOKR.items() if "Tucker" not in name],
    *[(f"LoHa, {name}", OURS[case[0]], case[1]) for name, case in LOHA.items()],
    ("OFT", "blocks.0.attn.proj", dict(oft_blocks=(6, 4, 4))),
    ("OFT of a convolution", "x_embedder.proj", dict(oft_blocks=(3, 8, 8))),
    ("OFT whose turn is not limited by its alpha", "blocks.0.attn.qkv", dict(oft_blocks=(36, 2, 2), alpha=1e3)),
])  # fmt: skip
def test_comfyui_makes_the_same_change(host, case, module, parts):
    import comfy.lora

    file = {}
    for i, (part, shape) in enumerate((part, shape) for part, shape in parts.items() if part != "alpha"):
        suffix = ".weight" if part.startswith("lora_") else ""
        file[f"{module}.{part}{suffix}"] = random(*shape, seed=i)
    file[f"{module}.alpha"] = torch.tensor(parts.get("alpha", 2.0))
    key = f"{module}.weight"
    weight = random(*SHAPES[key], seed=99)
    patches = comfy.lora.load_lora(file, {module: key})
    # ComfyUI multiplies an OFT's change by the strength twice.
    strength = 0.7**0.5 if "oft_blocks" in parts else 0.7
    theirs = comfy.lora.calculate_weight([(strength, patches[key], 1.0, None, None)], weight.clone(), key)
    ours = merge({key: weight}, lora.read(file, NAMES), 0.7)
    torch.testing.assert_close(ours[key], theirs, rtol=0, atol=1e-5)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(4, 8, 2, 2)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 12)])})

    def forward(self, x):
        return self.attn["to_out"][0](self.attn["to_q"](self.proj(x).mean((2, 3))))


@pytest.mark.parametrize("kind, settings", [
    ("LoraConfig", dict(r=4)),
    ("LoraConfig", dict(r=4, lora_alpha=3, lora_bias=True)),
    ("LoraConfig", dict(r=3, lora_alpha=16, use_rslora=True, rank_pattern={"to_q": 2}, alpha_pattern={"to_out.0": 5})),
    ("LoraConfig", dict(r=2, use_dora=True)),
    ("LoHaConfig", dict(r=2, use_effective_conv2d=True)),
    ("LoKrConfig", dict(r=2, alpha=3)),
    ("LoKrConfig", dict(r=1, decompose_both=True, decompose_factor=4)),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else value)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes the biases of lora_bias for shards
def test_a_merge_gives_the_weights_that_peft_merges(tmp_path, kind, settings):
    needed(find_spec("peft") and "peft", "peft is not installed")
    import peft
    from pixstack.models_impl.state_dict import read_file

    toy = Toy()
    names = lora.names_of({key: value.shape for key, value in toy.state_dict().items()})
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    model = peft.get_peft_model(toy, getattr(peft, kind)(target_modules=["proj", "to_q", "to_out.0"], **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, metadata = read_file(file)
    found = lora.read(tensors, names, metadata, lora.beside(file))
    assert not found.unmatched
    assert_same(merge(before, found), dict(model.merge_and_unload().state_dict()), 2e-6)


# What does not fit


def test_keys_without_a_place_are_listed():
    beyond = "base_model.model.transformer_blocks.9.attn1.to_out.0"
    found = lora.read(one() | {f"{beyond}.lora_A.weight": random(4, WIDTH), "odd": random(1)}, NAMES)
    assert len(found.layers) == 1
    assert sorted(found.unmatched) == [f"{beyond}.lora_A.weight", "odd"]
    assert any("2 keys have no place" in note for note in found.notes)


def test_a_layer_of_another_size_is_not_used():
    wide = "base_model.model.transformer_blocks.1.attn1.to_out.0"
    found = lora.read(one() | {f"{wide}.lora_A.weight": random(4, 32), f"{wide}.lora_B.weight": random(32, 4)}, NAMES)
    assert len(found.layers) == 1
    assert "32 x 32" in found.unmatched[0] and "24 x 24 here" in found.unmatched[0]


@pytest.mark.parametrize("key", ["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
                                 "lora_te1_encoder_block_0_layer_0_SelfAttention_q.alpha",
                                 "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
                                 "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"])
def test_keys_of_the_text_encoder_are_counted_apart(key):
    found = lora.read(one() | {key: torch.tensor(1.0)}, NAMES)
    assert found.text_encoder == [key]
    assert not found.unmatched


@pytest.mark.parametrize("module, size, reason", [
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 24, "SDXL"),
    ("lora_unet_double_blocks_0_img_attn_qkv", 24, "FLUX"),
    ("transformer.single_transformer_blocks.0.attn.to_q", 24, "FLUX"),
    ("transformer.transformer_blocks.0.attn.add_k_proj", 24, "MMDiT"),
    ("lora_te1_encoder_block_0_layer_0_SelfAttention_q", 24, "belong to the text encoder"),
    ("transformer.transformer_blocks.0.attn1.to_q", 32, "32 x 32 matrix, and blocks.0.attn.qkv.weight is 24 x 24 here"),
    ("transformer.transformer_blocks.30.attn1.to_q", 24, "unknown here"),
])  # fmt: skip
def test_a_lora_for_something_else_is_refused_with_the_reason(module, size, reason):
    file = {f"{module}.lora_down.weight": random(2, size), f"{module}.lora_up.weight": random(size, 2)}
    with pytest.raises(ValueError, match=reason):
        lora.read(file, NAMES)


@pytest.mark.parametrize("keys, reason", [
    (["transformer_blocks.0.attn1.to_q.oft_R.weight"], "OFT or BOFT"),
    (["blocks.0.scale_shift_table", "blocks.0.attn.qkv.weight"], "no LoRA file. The keys are those of PixArt"),
    (["something.weight"], "no LoRA file. Its first keys are something.weight"),
])  # fmt: skip
def test_a_file_that_is_no_lora_is_refused(keys, reason):
    with pytest.raises(ValueError, match=reason):
        lora.read({key: random(2, 2) for key in keys}, NAMES)


def test_merging_leaves_the_given_weights_alone():
    before = weights()
    kept = {key: value.clone() for key, value in before.items()}
    after = merge(before, lora.read(one(), NAMES), 0.5)
    assert_same(before, kept)
    assert after["t_block.1.weight"] is before["t_block.1.weight"]


def test_a_merge_into_half_precision_rounds_once():
    before = {key: value.bfloat16() for key, value in weights().items()}
    found = lora.read(one(alpha=torch.tensor(0.01)), NAMES)
    key = "blocks.0.attn.proj.weight"
    exact = before[key].float() + lora.delta(found.layers[0], SHAPES[key])
    assert torch.equal(merge(before, found)[key], exact.bfloat16())


def test_a_merge_into_other_weights_names_the_missing_one():
    with pytest.raises(ValueError, match="blocks.0.attn.proj.weight, which these weights do not have"):
        merge({}, lora.read(one(), NAMES))


# Writing


def lora_of(modules, kinds=("lora",), alphas=(6.0, 3.0), shared=False):
    """A file in split or fused names with layers of every kind."""
    file = {}
    for i, (module, (key, _, rows)) in enumerate(modules.items()):
        shape = SHAPES[key + ".weight"]
        kind, columns = kinds[i % len(kinds)], math.prod(shape[1:])
        if kind == "loha":
            file |= {f"{module}.hada_w{j}_{ab}": random(*s, seed=4 * i + j)
                     for j in (1, 2) for ab, s in (("a", (rows, 3)), ("b", (3, columns)))}
        elif kind == "oft":
            file |= {f"{module}.oft_blocks": random(rows // 4, 4, 4, seed=i)}
        elif kind == "lokr":
            file |= {f"{module}.lokr_w1": random(rows // 4, 2, seed=i), f"{module}.lokr_w2": random(4, columns // 2)}
        else:
            down, up = factors({module: modules[module]}, 2 + (0 if shared else i % 2))[module]
            file |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up * (i + 1)}
        if kind == "dora":
            file[f"{module}.dora_scale"] = random(rows, *[1] * (len(shape) - 1), seed=i)
        file[f"{module}.alpha"] = torch.tensor(alphas[i % len(alphas)])
    return lora.read(file, NAMES)


@pytest.mark.parametrize("format", lora.FORMATS)
@pytest.mark.parametrize("modules, kinds", [
    (SPLIT, ("lora",)), (FUSED, ("lora",)), (SPLIT, ("loha",)), (FUSED, ("loha",)),
    (SPLIT, ("dora",)), (FUSED, ("dora",)), (SPLIT, ("oft",)), (FUSED, ("oft",)),
    (FUSED, ("lora", "loha", "dora", "lokr")),
    ({m: v for m, v in SPLIT.items() if "qkv" in v[0] and "to_k" not in m}, ("lora",)),
], ids=["split", "fused", "loha", "fused loha", "dora", "fused dora", "oft", "fused oft", "mixed",
        "only q and v"])  # fmt: skip
def test_a_written_lora_makes_the_same_changes(format, modules, kinds):
    found = lora_of(modules, kinds)
    again = lora.read(lora.write(found, NAMES, format), NAMES)
    assert not again.unmatched
    before = weights()
    assert_same(merge(before, again), merge(before, found), 1e-4)


@pytest.mark.parametrize("there, back", [("diffusers", "original"), ("diffusers", "comfyui"), ("comfyui", "kohya")])
def test_a_fused_lora_comes_back_equal(there, back):
    found = lora_of(FUSED, alphas=(4.0,), shared=True)  # rank 2: the scale is a power of two, so folding it is exact
    first = lora.write(found, NAMES, back)
    other = lora.read(lora.write(found, NAMES, there), NAMES)
    again = lora.read(lora.write(other, NAMES, back), NAMES)
    wanted = lora.read(first, NAMES)
    assert [(a.key, a.rows, a.kind) for a in again.layers] == [(b.key, b.rows, b.kind) for b in wanted.layers]
    for a, b in zip(again.layers, wanted.layers, strict=True):
        assert a.tensors["lora_down"].shape == b.tensors["lora_down"].shape  # the rank did not grow
        shape = SHAPES[a.key]
        assert torch.equal(lora.delta(a, shape), lora.delta(b, shape))


def test_written_names_are_those_that_comfyui_maps(host):
    import comfy.lora

    modules = [key.removesuffix(".weight") for key in SHAPES if key.endswith(".weight")]
    key_map = {f"diffusion_model.{m}": f"diffusion_model.{m}.weight" for m in modules}
    key_map |= {f"lora_unet_{flat(m)}": f"diffusion_model.{m}.weight" for m in modules}  # comfy/lora.py, for all models
    found = lora_of(SPLIT)
    for format in ("comfyui", "kohya"):
        file = lora.write(found, NAMES, format)
        assert len(comfy.lora.load_lora(file, key_map)) == len({layer.key for layer in found.layers})


def test_a_lokr_of_split_modules_is_not_fused():
    with pytest.raises(ValueError, match="blocks.1.attn.qkv.weight: layers of kind lokr cannot be fused"):
        lora.write(lora_of({m: v for m, v in SPLIT.items() if "qkv" in v[0]}, ("lokr",)), NAMES, "comfyui")


def test_a_dora_of_input_lengths_is_not_split():
    parts = {"lora_A.weight": random(2, WIDTH), "lora_B.weight": random(3 * WIDTH, 2), "dora_scale": random(1, WIDTH)}
    file = {f"blocks.0.attn.qkv.{part}": value for part, value in parts.items()}
    with pytest.raises(ValueError, match="spans all rows"):
        lora.write(lora.read(file, NAMES), NAMES, "diffusers")


def test_oft_blocks_that_reach_over_the_end_of_a_module_are_not_split():
    file = {"blocks.0.attn.qkv.oft_blocks": random(1, 3 * WIDTH, 3 * WIDTH)}
    with pytest.raises(ValueError, match="its oft blocks do not end where its modules do"):
        lora.write(lora.read(file, NAMES), NAMES, "diffusers")


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (6, 4, 3)])
def test_blocks_that_are_no_oft_are_refused(shape):
    with pytest.raises(ValueError, match="OFT has square blocks"):
        lora.read({"blocks.0.attn.proj.oft_blocks": random(*shape)}, NAMES)


def test_an_oft_of_another_model_is_refused():
    with pytest.raises(ValueError, match="its sizes do not"):
        lora.read({"blocks.0.attn.proj.oft_blocks": random(5, 4, 4)}, NAMES)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="must be one of diffusers, original, comfyui, kohya"):
        lora.write(lora.read(one(), NAMES), NAMES, "a1111")


def test_the_network_is_guessed_from_the_file():
    found = lora_of(FUSED)
    for format in lora.FORMATS:
        file = lora.write(found, NAMES, format)
        again = lora.read(file, pixart_lora.guessed_names(file))
        assert {(a.key, a.rows) for a in again.layers} == {(b.key, b.rows) for b in lora.read(file, NAMES).layers}


def test_layers_of_different_widths_cannot_be_guessed():
    file = one() | {f"transformer.transformer_blocks.1.attn1.to_q.lora_{ab}.weight": random(*s)
                    for ab, s in (("A", (2, 32)), ("B", (32, 2)))}
    with pytest.raises(ValueError, match=r"different widths: \[24, 32\]"):
        pixart_lora.guessed_names(file)
