"""What ComfyUI 0.3.75's own PixArt gets wrong, and that ours gets it right. Ours is held to the reference by parity."""
from __future__ import annotations

from importlib import import_module

import pytest
import torch
from pixstack.models_impl.pixart import checkpoint
from pixstack.models_impl.pixart.config import PRESETS, KVCompression
from pixstack.models_impl.pixart.model import PixArt
from weights import ALPHA, random_state, tiny_pixart, tiny_pixart_config, tiny_pixart_lora


@pytest.fixture(scope="module")
def core(host):
    for name in ("ops", "model_detection", "ldm.pixart.pixartms", "supported_models"):
        import_module(f"comfy.{name}")
    return import_module("comfy")


def ours(**entries) -> PixArt:
    net = PixArt(tiny_pixart_config(**entries))
    net.load_state_dict(random_state(net))
    return net.eval()


def theirs(core, net: PixArt, **settings):
    """Core's network with the same weights, as its detection would build it."""
    c = net.config
    stock = core.ldm.pixart.pixartms.PixArtMS(
        hidden_size=c.hidden, depth=c.depth, num_heads=c.heads, model_max_length=c.token_limit,
        micro_condition=c.micro_conditions, dtype=torch.float32, operations=core.ops.disable_weight_init, **settings,
    )  # fmt: skip
    missing, unexpected = stock.load_state_dict(net.state_dict(), strict=False)
    assert not [key for key in missing if "pos_embed" not in key]
    return stock.eval(), unexpected


@torch.no_grad()
def difference(core, net: PixArt, height: int, width: int, **settings) -> float:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, height, width, generator=generator), torch.randn(1, 7, 4096, generator=generator)
    t = torch.tensor([400.0])
    stock, _ = theirs(core, net, **settings)
    return (stock(x, t, text) - net(x, t, text)[:, :4]).abs().max().item()


def test_both_agree_where_core_is_right(core):
    assert difference(core, ours(), 128, 128, pe_interpolation=2) < 1e-3


def test_alpha_512_has_the_latents_of_its_own_vae(core):
    tensors = {key: value.to("meta") for key, value in PixArt(PRESETS["alpha_512"], device="meta").state_dict().items()}
    tensors["y_embedder.y_embedding"] = torch.empty(120, 4096, device="meta")
    stock = core.model_detection.model_config_from_unet(tensors, "")
    assert stock.latent_format.scale_factor == pytest.approx(0.13025)  # SDXL's: wrong
    assert checkpoint.read(tensors)[0].latent_scale == pytest.approx(0.18215)


def test_256_pixels_do_not_end_in_a_division_by_zero(core):
    net = ours(**ALPHA, sample_size=32)
    with pytest.raises(ZeroDivisionError):
        difference(core, net, 32, 32)
    with torch.no_grad():
        assert net(torch.randn(1, 4, 32, 32), torch.tensor([400.0]), torch.randn(1, 7, 4096)).isfinite().all()


def test_the_1024_model_at_512_pixels_keeps_its_positions(core):
    """Core's table runs to 16 there; the release's always runs to 32."""
    net = ours()
    assert difference(core, net, 64, 64, pe_interpolation=2) > 1e-2
    axis = net._axis(32, "cpu", torch.float64)
    assert torch.allclose(axis[1, 0], torch.tensor(32 / 32, dtype=torch.float64).sin())


def test_the_2k_model_keeps_its_positions_at_extreme_ratios(core):
    net = ours(depth=1, sample_size=256)
    assert difference(core, net, 64, 256, pe_interpolation=4) > 1e-2


def test_kv_compression_is_not_ignored(core):
    net = ours(kv_compression=KVCompression("conv", 2, (2, 3)))
    _, unexpected = theirs(core, net, pe_interpolation=2)
    assert any(".attn.sr." in key for key in unexpected)  # core leaves these weights out
    config, weights = checkpoint.read({key: value for key, value in net.state_dict().items()})
    assert config.kv_compression == net.config.kv_compression
    assert weights.keys() == net.state_dict().keys()


def test_a_peft_lora_is_not_applied_at_several_times_its_strength(core, host):
    """The official scripts train with alpha 8 and store none; at rank 16 the scale is 0.5, and core's 1."""
    for name in ("sd", "lora", "utils"):
        import_module(f"comfy.{name}")
    tiny_pixart(host.models / "diffusion_models" / "stock_lora.pth", **ALPHA, sample_size=64)
    path = host.models / "loras" / "stock_rank_16.safetensors"
    tiny_pixart_lora(path, rank=16)
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    model = nodes["PixStack_PixArtLoader"].execute("stock_lora.pth", "auto", "auto", "auto", "ema", "fp32").args[0]
    stock, _ = core.sd.load_lora_for_models(model, None, core.utils.load_torch_file(str(path)), 1.0, 0.0)
    fixed = nodes["PixStack_PixArtLoraLoader"].execute(model, path.name, 1.0, 0.0).args[0]
    key = "diffusion_model.blocks.0.attn.proj.weight"
    before = model.model.state_dict()[key]
    theirs, right = (core.lora.calculate_weight(m.patches[key], before.clone(), key) - before for m in (stock, fixed))
    assert right.abs().max() > 1e-3
    assert torch.allclose(theirs, 2 * right, atol=1e-5)
