"""Fast operations against their formulas in float64, and against the library that implements them elsewhere."""
import pytest
import torch
from pixstack.kernels import modulated_norm as norm_file
from pixstack.kernels import normed_rope as normed_rope_file
from pixstack.kernels import quantized_linear as linear_file
from pixstack.kernels import rope as rope_file
from pixstack.kernels import runtime
from pixstack.kernels.attention import attention
from pixstack.kernels.lora_linear import lora_linear, lora_linear_reference
from pixstack.kernels.modulated_norm import modulated_norm, modulated_norm_reference
from pixstack.kernels.normed_rope import normed_rotate, normed_rotate_reference
from pixstack.kernels.quantized_linear import (
    dequantize,
    dequantize_reference,
    quantize,
    quantized_linear,
    quantized_linear_reference,
)
from pixstack.kernels.rope import rope_matrices, rotate, rotate_reference

HALF = (torch.float16, torch.bfloat16)
SHAPES = [((2, 5, 12), (2, 1, 12)), ((7, 30), (7, 30)), ((1, 3, 4, 8), (8,))]


def close_to_exact(ours, exact, reference):
    """At most twice as far from float64 as the reference is."""
    allowed = 2 * (reference.double() - exact).abs().max() + 1e-6
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape, of_shift", SHAPES)
def test_the_modulated_norm_is_its_formula(shape, of_shift, dtype):
    x, shift, scale = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, of_shift, of_shift))
    wide = x.double()
    exact = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    exact = exact * (1 + scale.double()) + shift.double()
    ours = modulated_norm(x, shift, scale)
    assert ours.dtype == dtype
    close_to_exact(ours, exact, modulated_norm_reference(x, shift, scale))
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol={torch.float32: 1e-5}.get(dtype, 0.1))


def angles(rows: int, pairs: int):
    return torch.rand(rows, pairs, dtype=torch.float64) * 20


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("heads_first", [True, False])
def test_pairs_of_channels_turn_by_their_angles(heads_first, dtype):
    N, H, D = 7, 3, 10
    angle = angles(N, D // 2)
    shape, place = ((2, H, N, D), (1, 1, N)) if heads_first else ((2, N, H, D), (1, N, 1))
    x = torch.randn(shape).to(dtype)
    turned = rotate(x, rope_matrices(angle).view(*place, D // 2, 2, 2))
    exact = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(exact * torch.polar(torch.ones_like(angle), angle).view(*place, D // 2)).flatten(-2)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.double(), exact, rtol=0, atol={torch.float32: 2e-6, torch.float16: 4e-3,
                                                                     torch.bfloat16: 3e-2}[dtype])


def test_gradients_reach_what_is_turned_and_modulated():
    x, shift, scale = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(modulated_norm, (x, shift, scale))
    angle = angles(3, 4)
    table = rope_matrices(angle)
    x = torch.randn(2, 3, 8, requires_grad=True)
    probe = torch.randn(2, 3, 8)
    (rotate(x, table) * probe).sum().backward()  # the transpose of a rotation turns back
    torch.testing.assert_close(x.grad, rotate(probe, rope_matrices(-angle)))


@pytest.fixture
def kitchen():
    """Its operations, to be taken on any device."""
    library = runtime.library("comfy_kitchen")
    if library is None:
        pytest.skip("comfy-kitchen is not installed; ComfyUI 0.3.75 does not bring it")
    return lambda operation, *tensors: getattr(library, operation)


@pytest.mark.parametrize("shape, of_shift", SHAPES)
def test_comfy_kitchen_modulates_as_we_do(kitchen, monkeypatch, shape, of_shift):
    x, shift, scale = (torch.randn(s) for s in (shape, of_shift, of_shift))
    monkeypatch.setattr(norm_file, "kitchen", kitchen)
    torch.testing.assert_close(modulated_norm(x, shift, scale, 1e-3), modulated_norm_reference(x, shift, scale, 1e-3))


@pytest.mark.parametrize("shape, of_table", [((2, 3, 7, 10), (1, 1, 7)), ((2, 7, 3, 10), (1, 7, 1)),
                                             ((2, 3, 7, 10), (2, 1, 7))])
def test_comfy_kitchen_turns_as_we_do(kitchen, monkeypatch, shape, of_table):
    table = rope_matrices(torch.rand(*of_table, 5, dtype=torch.float64) * 20)
    x = torch.randn(shape)
    monkeypatch.setattr(rope_file, "kitchen", kitchen)
    torch.testing.assert_close(rotate(x, table), rotate_reference(x, table))


@pytest.mark.parametrize("of_table", [(1, 1, 7), (2, 1, 7)])
def test_comfy_kitchen_norms_heads_and_turns_them_as_we_do(kitchen, monkeypatch, of_table):
    table, scale = rope_matrices(torch.rand(*of_table, 5, dtype=torch.float64) * 20), torch.randn(10)
    x = torch.randn(2, 3, 7, 10)
    expected = normed_rotate_reference(x, scale, table)
    monkeypatch.setattr(normed_rope_file, "kitchen", kitchen)
    torch.testing.assert_close(normed_rotate(x, scale, table), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_heads_are_normed_before_they_turn(dtype):
    x, scale = torch.randn(2, 3, 7, 10).to(dtype), torch.randn(10).to(dtype)
    table = rope_matrices(angles(7, 5)).view(1, 1, 7, 5, 2, 2)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()
    a, b = exact.unflatten(-1, (-1, 1, 2)).unbind(-1)
    exact = (table[..., 0] * a + table[..., 1] * b).flatten(-2)
    ours = normed_rotate(x, scale, table)
    assert ours.dtype == dtype
    close_to_exact(ours, exact, normed_rotate_reference(x, scale, table))
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol={torch.float32: 1e-5}.get(dtype, 0.1))


SIZES = [(96, 64), (33, 70), (5, 3)]  # of weights; 64 of nf4 share a scale


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", [*SIZES, (48, 32), (16, 96)])  # rows that begin within a block
# Half the widest gap: of 1, of the largest of the row, of the largest.
@pytest.mark.parametrize("kind, step", [("fp8", 2**-4), ("int8", 1 / 254), ("nf4", 0.152)])
def test_a_quantized_weight_is_within_half_a_step_of_the_weight(request, kind, step, size, dtype):
    if kind == "nf4":
        request.getfixturevalue("bitsandbytes")
    weight = torch.randn(size)
    quantized = quantize(weight, kind)
    dequantized = dequantize(quantized, dtype)
    assert torch.equal(dequantized, dequantize_reference(quantized, dtype)) and dequantized.dtype == dtype
    scale = {"fp8": weight.abs(), "int8": weight.abs().amax(1, keepdim=True), "nf4": weight.abs().max()}[kind]
    smallest = quantized.scale.max() * 2**-9  # of the subnormal numbers of float8
    rounding = torch.finfo(dtype).eps * weight.abs()
    assert ((dequantized.float() - weight).abs() <= step * scale * (1 + 2**-6) + rounding + smallest).all()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_the_product_with_a_quantized_weight_is_that_with_the_dequantized_one(request, kind, size, rows):
    if kind == "nf4":
        request.getfixturevalue("bitsandbytes")
    weight, bias = quantize(torch.randn(size), kind), torch.randn(size[0])
    x = torch.randn(2, rows, size[1], requires_grad=True)
    y, expected = quantized_linear(x, weight, bias), torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    assert torch.equal(y, expected)
    probe = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, probe)[0] for out in (y, expected)))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", SIZES)
def test_bitsandbytes_multiplies_as_we_do(bitsandbytes, monkeypatch, size, rows, learns):
    monkeypatch.setattr(linear_file, "bitsandbytes", lambda x: bitsandbytes)
    weight, bias = quantize(torch.randn(size), "nf4"), torch.randn(size[0])
    x = torch.randn(rows, size[1], requires_grad=learns)
    y, expected = (product(x, weight, bias) for product in (quantized_linear, quantized_linear_reference))
    torch.testing.assert_close(y, expected)
    if learns:
        probe = torch.randn_like(y)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, probe)[0] for out in (y, expected)))


def test_a_library_that_cannot_be_loaded_is_as_if_it_were_not_there(tmp_path, monkeypatch):
    (tmp_path / "broken_build.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert runtime.library("broken_build") is None
    assert runtime.library("no_such_library") is None


def lora_tensors(dtype, learns=True):
    """x, weight, bias, a, b of a layer; x and those that learn with gradients."""
    sizes = (2, 5, 12), (9, 12), (9,), (3, 12), (9, 3)
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64).to(dtype) for s in sizes)
    return x.requires_grad_(), weight, bias, a.requires_grad_(learns), b.requires_grad_(learns)


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_with_a_lora_has_the_gradients_of_its_formula(biased):
    x, weight, bias, a, b = lora_tensors(torch.float64)
    bias = bias if biased else None
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 0.7),
                               lora_linear_reference(x, weight, bias, a, b, 0.7))
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_linear_layer_with_a_lora_is_as_near_to_its_formula_as_the_separate_products(dtype):
    given = lora_tensors(dtype)
    exact = lora_linear_reference(*(t.double() for t in given), 0.7)
    close_to_exact(lora_linear(*given, 0.7), exact, lora_linear_reference(*given, 0.7))


def test_under_autocast_a_lora_learns_in_float32_from_products_in_bfloat16():
    x, weight, bias, a, b = lora_tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight.bfloat16(), bias.bfloat16(), a, b, 0.7)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}


def test_a_frozen_input_of_a_lora_gets_no_gradient():
    x, weight, bias, a, b = lora_tensors(torch.float32)
    lora_linear(x.detach(), weight, bias, a, b, 0.7).sum().backward()
    assert a.grad.abs().sum() and b.grad.abs().sum()


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_gradients_is_its_formula(dtype, masked):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64).to(dtype).requires_grad_() for n in (6, 5, 5))
    keep = torch.tensor([True, True, False, True, True]).expand(2, 1, 1, 5)
    added = torch.zeros(2, 1, 1, 5, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    y = attention(q, k, v, mask={None: None, "bool": keep, "added": added}[masked])
    scores = q.double() @ k.double().transpose(-1, -2) * 8**-0.5
    scores = scores if masked is None else scores.masked_fill(~keep, float("-inf"))
    exact = scores.softmax(-1) @ v.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    for ours, wanted in zip(torch.autograd.grad(y.float().sum(), (q, k, v)),
                            torch.autograd.grad(exact.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=0, atol=10 * tolerance)
