"""Weights that are not made before a file is loaded, as ComfyUI's are under DynamicVRAM: what our files are checked
against, what the loaders make of it, and adapters that ComfyUI makes again on another device."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import cascade_weights as cascade
import lazy_operations as lazy
import pytest
import torch
import weights
from pixstack.models_impl.annotators.hed import HED, HEDConfig
from pixstack.models_impl.flux.model import Flux
from pixstack.models_impl.pixart.config import KVCompression
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import PixArt
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.state_dict import check_fit, expected_shapes, load_into, write_file
from pixstack.models_impl.ultrapixel.config import ControlNetConfig
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import EffnetEncoder
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.previewer import Previewer
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from torch import nn

NETWORKS = {  # every kind of weight that a network of ours has
    "PixArt": partial(PixArt, weights.tiny_pixart_config(
        micro_conditions=True, qk_norm=True, kv_compression=KVCompression(sampling="conv", factor=2, layers=(1, 2)))),
    "PixArt ControlNet": partial(PixArtControlNet, weights.tiny_pixart_config(), 2),
    "PixelFlow for text": partial(PixelFlow, PixelFlowConfig(heads=2, head_dim=8, depth=2, context_dim=32)),
    "PixelFlow for classes": partial(PixelFlow, PixelFlowConfig(heads=2, head_dim=8, depth=2, num_classes=10)),
    "FLUX": partial(Flux, weights.EMOJI_FLUX),
    "PixelPonder": partial(PixelPonder, PixelPonderConfig(
        replace(weights.EMOJI_FLUX, depth=1, single_depth=1), select=SelectConfig(hidden=64, heads=2, mlp_hidden=128),
        selector=SelectorConfig(32))),
    "HED": partial(HED, HEDConfig((4, 8), (1, 2), True)),
    "Stage A": partial(StageA, cascade.A),
    "Stage B": partial(StageB, cascade.B),
    "Stage C": partial(StageC, cascade.C),
    "guide": partial(Guide, cascade.GUIDE),
    "UltraPixel ControlNet": partial(ControlNet, ControlNetConfig(in_channels=1, hidden=cascade.HIDDEN)),
    "semantic encoder": EffnetEncoder,
    "previewer": partial(Previewer, hidden=16),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def make(request):
    """make(operations=...) -> a network."""
    return request.param


def filled(net: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of its shapes, no two weights the same."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator).to(value.dtype)
            for key, value in net.state_dict().items()}


def test_the_shapes_of_weights_that_are_not_made_yet_are_known(make):
    shapes = {key: value.shape for key, value in make().state_dict().items()}
    unmade = make(operations=lazy.Operations)
    assert len(unmade.state_dict()) < len(shapes), "nothing in this network is made lazily, so nothing was tested"
    assert expected_shapes(unmade) == shapes


def test_a_file_loads_into_weights_that_are_not_made_yet(make):
    net, tensors = make(operations=lazy.Operations), filled(make())
    load_into(net, tensors, "it")
    assert net.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())
    check_fit(net, tensors, "it")  # as it does where they are there


@pytest.mark.parametrize("change, words", [
    (lambda key, value: {}, "1 missing: {}"),
    (lambda key, value: {key: value, "more.weight": value}, "1 unexpected: more.weight"),
    (lambda key, value: {key: value[:-1]}, "1 of another shape: {} is "),
])
def test_a_weight_that_does_not_fit_is_named_before_there_is_any(make, change, words):
    net, tensors = make(operations=lazy.Operations), filled(make())
    key = next(key for key in expected_shapes(net) if key not in net.state_dict())
    tensors |= change(key, tensors.pop(key))
    with pytest.raises(ValueError) as refusal:
        load_into(net, tensors, "it")
    assert words.format(key) in str(refusal.value)


@pytest.mark.parametrize("made", [
    lambda of: of.Linear(3, 5), lambda of: of.Linear(3, 5, bias=False), lambda of: of.Embedding(7, 3),
    lambda of: of.Conv1d(4, 6, 3), lambda of: of.Conv2d(4, 6, (3, 2), groups=2, bias=False),
    lambda of: of.Conv3d(4, 6, 3), lambda of: of.ConvTranspose1d(4, 6, 3),
    lambda of: of.ConvTranspose2d(4, 6, 3, groups=2), lambda of: of.GroupNorm(2, 4),
    lambda of: of.GroupNorm(2, 4, affine=False), lambda of: of.LayerNorm((4, 5)),
    lambda of: of.LayerNorm(4, bias=False),
    lambda of: of.LayerNorm(4, elementwise_affine=False), lambda of: of.RMSNorm(4),
    lambda of: of.RMSNorm(4, elementwise_affine=False),
])
def test_every_kind_of_layer_knows_its_shapes(made):
    assert expected_shapes(made(lazy.Operations)) == {k: v.shape for k, v in made(nn).state_dict().items()}


def test_a_layer_without_the_attribute_weight_is_one_whose_weight_is_not_made_yet():
    class Quantised(nn.Module):  # as ComfyUI's layers for quantised files begin
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 3, 5
            self.bias = nn.Parameter(torch.zeros(5))

    assert expected_shapes(Quantised()) == {"weight": (5, 3), "bias": (5,)}


def test_a_kind_of_layer_that_is_not_known_says_so():
    class Kind(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = None

    with pytest.raises(TypeError, match="layer 1.gate is a Kind whose weight is not made before it is loaded"):
        expected_shapes(nn.Sequential(nn.Linear(1, 1), nn.ModuleDict({"gate": Kind()})))


# --- The loaders


FILES = {  # what is loaded: folder, file, what makes the file
    "pixelflow": ("diffusion_models", "lazy_flow.safetensors", weights.tiny_pixelflow),
    "pixart": ("diffusion_models", "lazy_pixart.safetensors", weights.tiny_pixart),
    "pixart of settings": ("diffusion_models", "lazy_pixart.safetensors", weights.tiny_pixart),
    "flux": ("diffusion_models", "flux_lazy.safetensors", weights.tiny_emoji),
    "small stage c": ("diffusion_models", "lazy_small_c.safetensors", cascade.small_stage_c),
    "pixart controlnet": ("controlnet", "lazy_controlnet.pth", weights.tiny_pixart_controlnet),
    "pixelponder": ("controlnet", "pixelponder_lazy.safetensors", weights.tiny_emoji),
    "guide": ("model_patches", "lazy_guide.safetensors", cascade.tiny_guide),
    "stage a": ("vae", "lazy_stage_a.safetensors", cascade.tiny_stage_a),
    "t5": ("text_encoders", "lazy_t5.safetensors", weights.tiny_t5),
    "consistency decoder": ("vae", "lazy_consistency.safetensors", None),
}


@pytest.fixture(scope="module")
def ours(host) -> SimpleNamespace:
    """Our modules in this ComfyUI, by their short names."""
    package = next(name for name in sys.modules if name.endswith(".nodes.host"))
    return SimpleNamespace(host=host, **{name: import_module(f"{package}.{file}") for name, file in {
        "patcher": "common.patcher", "text": "common.text", "flux": "flux.load", "pixart": "pixart.load",
        "pixart_lora": "pixart.lora", "consistency": "pixart.consistency_decoder", "pixelflow": "pixelflow.load",
        "pixelponder": "pixelponder.load", "ultrapixel": "ultrapixel.guide", "cascade": "ultrapixel.load",
        "ultrapixel_stage_a": "ultrapixel.stage_a"}.items()})


def load(ours, what: str, dtype=torch.float32):
    """What the loader of `what` gives."""
    folder, name, make = FILES[what]
    path = ours.host.models / folder / name
    if not path.exists():
        (make or consistency_decoder)(path)
    return {
        "pixelflow": lambda: ours.pixelflow.load_pixelflow(path, dtype=dtype),
        "pixart": lambda: ours.pixart.load_pixart(path, dtype=dtype),
        "pixart of settings": lambda: ours.pixart.load_pixart(path, dtype=dtype, settings={"position_range": 2.0}),
        "flux": lambda: ours.flux.load_flux(path, dtype),
        "small stage c": lambda: ours.cascade.load_cascade(path, dtype),
        "pixart controlnet": lambda: ours.pixart.load_pixart_controlnet(path, dtype),
        "pixelponder": lambda: ours.pixelponder.load_pixelponder(path, dtype=dtype),
        "guide": lambda: ours.ultrapixel.load_guide(path),
        "stage a": lambda: ours.ultrapixel_stage_a.load(path, dtype),
        "t5": lambda: ours.text.load_t5(path, dtype),
        "consistency decoder": lambda: ours.consistency.load(path),
    }[what]()


def consistency_decoder(path):
    diffusers = pytest.importorskip("diffusers")
    widths = (32, 32, 32, 32)
    net = diffusers.ConsistencyDecoderVAE(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    write_file(path, net.state_dict())


def patcher_of(loaded):
    """The ModelPatcher in a MODEL, CONTROL_NET, VAE or CLIP."""
    return getattr(loaded, "net_patcher", None) or getattr(loaded, "patcher", None) or loaded


@pytest.fixture(params=["stand-in", "ComfyUI's own"])
def made_lazily(request, monkeypatch):
    """made_lazily(bool): whether layers of `comfy.ops` are from here on."""
    memory = import_module("comfy.memory_management") if find_spec("comfy.memory_management") else None
    if request.param == "stand-in":
        if memory is not None:
            monkeypatch.setattr(memory, "aimdo_enabled", False)
        return lambda on: on and lazy.patch_comfyui(monkeypatch, import_module("comfy.ops"))
    if memory is None:
        pytest.skip("this ComfyUI makes all weights at once: lazily came with 0.18")
    return lambda on: monkeypatch.setattr(memory, "aimdo_enabled", on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", FILES)
def test_a_loader_gives_the_same_weights_when_they_are_made_lazily(ours, made_lazily, what, dtype):
    made_lazily(False)
    wanted = patcher_of(load(ours, what, dtype))
    made_lazily(True)
    found = patcher_of(load(ours, what, dtype))
    # Under a dynamic patcher they are as the file has them, and cast when they move.
    same_weights(found.model.state_dict(), wanted.model.state_dict(), not ours.patcher.is_dynamic(found))


def same_weights(found: dict, wanted: dict, same_dtypes: bool = True):
    assert found.keys() == wanted.keys()
    if same_dtypes:
        assert {key: value.dtype for key, value in found.items()} == {k: value.dtype for k, value in wanted.items()}
    for key, value in found.items():
        least = min(value.dtype, wanted[key].dtype, key=lambda dtype: (dtype.is_floating_point, dtype.itemsize))
        assert torch.equal(value.to(least), wanted[key].to(least)), key


@pytest.mark.parametrize("what", FILES)
def test_a_loader_says_how_its_patcher_is_made_again(ours, what):
    patched = patcher_of(load(ours, what))
    make, arguments = patched.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    assert again.model is not patched.model and type(again.model) is type(patched.model)
    assert again.load_device == patched.load_device and not getattr(again, "is_dynamic", bool)()
    same_weights(again.model.state_dict(), patched.model.state_dict(), not ours.patcher.is_dynamic(patched))
    if what == "pixart of settings":
        assert again.model.config.position_range == patched.model.config.position_range == 2.0


@pytest.mark.parametrize("kind", ["eager", "lazy"])
def test_a_dynamic_patcher_gets_the_tensors_of_the_file_themselves(ours, monkeypatch, kind):
    memory = import_module("comfy.model_management")
    monkeypatch.setattr(memory, "archive_model_dtypes", lambda net: None, raising=False)
    net = PixArtControlNet(weights.tiny_pixart_config(), 2, operations=nn if kind == "eager" else lazy.Operations)
    tensors = {key: value.half() for key, value in filled(PixArtControlNet(net.config, 2)).items()}
    ours.patcher.put(lazy.DynamicPatcher, net, tensors)
    found = net.state_dict()
    assert all(lazy.shares_memory(value, found[key]) for key, value in tensors.items())


# --- Adapters


def test_an_adapter_that_comfyui_makes_again_changes_weights_in_the_same_way(ours):
    weights.tiny_pixart_lora(ours.host.models / "loras" / "lazy_lora.safetensors")
    model = load(ours, "pixart")
    patched, _ = ours.pixart_lora.load(model, ours.host.models / "loras" / "lazy_lora.safetensors", 0.7, None)
    key, patches = next(iter(patched.patches.items()))
    adapter = patches[0][1]
    weight = model.model.state_dict()[key].clone()
    again = type(adapter)(adapter.loaded_keys, moved(adapter.weights, lambda tensor: tensor.clone()))
    wanted, found = (changed(one, weight.clone(), key) for one in (adapter, again))
    assert torch.equal(found, wanted) and not torch.equal(found, weight)
    doubled = type(adapter)(adapter.loaded_keys, moved(adapter.weights, lambda tensor: 2 * tensor))
    assert not torch.equal(changed(doubled, weight.clone(), key), wanted), "it reads other tensors than its own"


def changed(adapter, weight, key):
    rows = weight[: adapter.layer.rows[1]] if adapter.layer.rows else weight
    adapter.calculate_weight(rows, key, 1.0, 1.0, None, lambda change: change)
    return weight


def moved(value, change):
    """As `prefetch_prepared_value` of comfy/lora.py goes through the weights of an adapter."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, change) for item in value)
    return value


def test_comfyui_counts_the_memory_of_a_lora_that_it_applies_at_use(ours):
    patcher = import_module("comfy.model_patcher")
    if not hasattr(patcher.LowVramPatch, "memory_required"):
        pytest.skip("this ComfyUI does not count it: that came with 0.21")
    weights.tiny_pixart_lora(ours.host.models / "loras" / "lazy_lora.safetensors")
    patched, _ = ours.pixart_lora.load(load(ours, "pixart"), ours.host.models / "loras" / "lazy_lora.safetensors", 1.0,
                                       None)
    for key, patches in patched.patches.items():
        tensors = [t for patch in patches for t in patch[1].weights if isinstance(t, torch.Tensor)]
        assert patcher.LowVramPatch(key, patched.patches).memory_required() >= sum(t.nbytes for t in tensors)
