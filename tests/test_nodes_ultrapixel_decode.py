"""UltraPixel's Stage A and Stage B inside a real ComfyUI: exact decodes, memory, scales, tiles, and what is refused."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.ultrapixel.config import StageAConfig
from pixstack.models_impl.ultrapixel.stage_a import StageA
from torch.profiler import ProfilerActivity, profile

RELEASED = "stage_a_random.safetensors"  # the released shapes: core builds no others
SMALL = "stage_a_small.safetensors"
SMALL_CONFIG = StageAConfig(bottleneck_blocks=3, hidden=16)
GIB = 2**30


def stage_a_file(path, config: StageAConfig):
    net = StageA(config, device="meta")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in net.state_dict().items():
        fan_in = value[0].numel() if value.ndim > 1 else 16
        tensors[key] = torch.randn(value.shape, generator=generator) / fan_in**0.5
        if key.endswith("running_var"):
            tensors[key] = torch.rand(value.shape, generator=generator) + 0.5
        elif key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(7)
    tensors["vquantizer.codebook.weight"] = torch.zeros(8192, 4)  # by which core knows the file
    write_file(path, tensors)


@pytest.fixture(scope="module")
def up(host):
    """Core's modules and nodes, and Stage A by our loader and by core's."""
    stage_a_file(host.models / "vae" / RELEASED, StageAConfig())
    stage_a_file(host.models / "vae" / SMALL, SMALL_CONFIG)
    core = import_module("nodes")
    up = SimpleNamespace(host=host, core=core, nodes=core.NODE_CLASS_MAPPINGS)
    up.mm, up.utils = import_module("comfy.model_management"), import_module("comfy.utils")
    up.vae, up.small = load(up, RELEASED), load(up, SMALL)
    up.stock = core.VAELoader().load_vae(RELEASED)[0]
    up.stage_a = import_module(type(up.vae).__module__)
    return up


def run(up, name: str, **inputs):
    return up.nodes[f"PixStack_UltraPixel{name}"].execute(**inputs).args


def load(up, name: str, dtype="fp32"):
    return run(up, "StageALoader", vae_name=name, dtype=dtype)[0]


def latent_of(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def short_of_memory(monkeypatch, up, gib: float):
    monkeypatch.setattr(up.mm, "get_free_memory", lambda *args, **kwargs: gib * GIB)


def close(ours, wanted, atol=1e-5):
    torch.testing.assert_close(ours, wanted, rtol=0, atol=atol * max(1.0, wanted.abs().max().item()))


# --- Stage A: the same picture as core's


@pytest.mark.parametrize("size", [(17, 23), (32, 8), (1, 1)])
def test_a_decode_equals_that_of_cores_vae(up, size):
    latent = latent_of(2, 4, *size)
    close(up.core.VAEDecode().decode(up.vae, {"samples": latent})[0], up.stock.decode(latent))


def test_cores_tiled_decode_node_gives_the_same_picture(up):
    latent = latent_of(2, 4, 40, 50)
    tiled = up.core.VAEDecodeTiled().decode(up.vae, {"samples": latent}, tile_size=64, overlap=16)[0]
    close(tiled, up.vae.decode(latent))
    assert (up.stock.decode_tiled(latent, 16, 16, 4) - up.stock.decode(latent)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(64, 96), (70, 67)])
def test_an_encode_equals_that_of_cores_vae(up, size):
    pixels = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1))
    ours = up.core.VAEEncode().encode(up.vae, pixels)[0]["samples"]
    assert ours.shape == (2, 4, size[0] // 4, size[1] // 4)
    close(ours, up.stock.encode(pixels))


@torch.no_grad()
def test_a_decode_is_that_of_the_reference_for_what_its_stage_b_returns(up):
    net = StageA(SMALL_CONFIG)
    weights = up.small.first_stage_model.state_dict()
    net.load_state_dict(weights)
    latent = latent_of(1, 4, 9, 7)
    format = import_module("comfy.latent_formats").SC_B()  # what core's samplers put their result through
    close(up.small.decode(format.process_out(latent)), net.eval().decode(latent).movedim(1, -1))


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.1), ("fp16", 0.01)])
def test_half_the_precision_stays_near(up, dtype, tolerance):
    latent = latent_of(1, 4, 20, 24)
    half, full = load(up, SMALL, dtype), up.small
    assert half.vae_dtype != torch.float32
    picture = half.decode(latent)
    assert picture.dtype == torch.float32
    close(picture, full.decode(latent), tolerance)


# --- Stage A: memory


def peak_bytes(work) -> int:
    """The most that torch's allocator held at once while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name, dtype, size", [(RELEASED, "fp32", (130, 140)), (RELEASED, "bf16", (60, 44)),
                                               (SMALL, "fp32", (40, 30)), (SMALL, "fp32", (300, 260))])
def test_the_estimate_is_what_a_decode_takes(up, name, dtype, size):
    vae, latent = load(up, name, dtype), latent_of(1, 4, *size)
    taken = peak_bytes(lambda: vae.decode(latent)) - 4 * 3 * 16 * size[0] * size[1]  # the picture that is handed out
    estimate = vae.memory_used_decode(latent.shape, vae.vae_dtype)
    assert 0.95 * taken <= estimate <= 1.6 * taken, (taken, estimate)


@pytest.mark.parametrize("size", [(160, 120), (560, 600)])
def test_the_estimate_is_what_an_encode_takes(up, size):
    pixels = torch.rand(1, *size, 3)
    with torch.no_grad():
        taken = peak_bytes(lambda: up.vae.encode(pixels))
    estimate = up.vae.memory_used_encode((1, 3, *size), torch.float32)
    assert 0.95 * taken <= estimate <= 1.6 * taken, (taken, estimate)


def test_strips_take_less_than_a_third_of_the_memory_of_core(up):
    latent = latent_of(1, 4, 128, 256)
    with torch.no_grad():
        ours, stock = (peak_bytes(lambda vae=vae: vae.first_stage_model.decode(latent)) for vae in (up.vae, up.stock))
    assert ours < 0.4 * stock


def test_a_4k_decode_asks_for_no_more_than_a_gigabyte_and_a_half(up, monkeypatch):
    asked = []

    def note(models, memory_required=0, **more):
        asked.append(memory_required)
        raise NotImplementedError

    monkeypatch.setattr(up.mm, "load_models_gpu", note)
    for vae in (up.vae, up.stock):
        with pytest.raises(NotImplementedError):
            vae.decode(torch.empty(1, 4, 1024, 1024, device="meta"))
    assert asked[0] < 1.5 * GIB
    assert asked[1] > 100 * GIB  # which is why core unloads everything


@pytest.mark.parametrize("gib, tile", [(24, None), (8, None), (4, 768), (1, 256), (0.8, 192), (0.01, 64)])
def test_the_largest_tiles_that_fit_the_free_memory_are_taken(up, monkeypatch, gib, tile):
    short_of_memory(monkeypatch, up, gib)
    assert up.vae.tile(1024, 1024) == tile


def test_a_small_picture_is_never_cut_without_need(up, monkeypatch):
    short_of_memory(monkeypatch, up, 0.5)
    assert up.vae.tile(64, 64) is None


def test_short_of_memory_the_picture_is_the_same(up, monkeypatch):
    latent = latent_of(1, 4, 70, 90)
    whole = up.small.decode(latent)
    short_of_memory(monkeypatch, up, 0.0001)
    assert up.small.tile(70, 90) == 64
    close(up.small.decode(latent), whole)


def test_out_of_memory_is_answered_by_smaller_tiles(up, monkeypatch, caplog):
    latent = latent_of(1, 4, 100, 110)
    whole, decode = up.small.decode(latent), StageA.decode
    seen = []

    def picky(latent, strip=None, callback=None):
        seen.append(latent.shape[-2:])
        if latent.shape[-1] > 95:
            raise up.mm.OOM_EXCEPTION("no room")
        return decode(up.small.first_stage_model, latent)

    monkeypatch.setattr(up.small.first_stage_model, "decode", picky)
    close(up.small.decode(latent), whole)
    assert seen[0] == (100, 110) and max(w for _, w in seen[-4:]) <= 64 + 26
    assert "by tiles of 256 pixels" in caplog.text


def test_without_any_memory_the_error_is_the_devices(up, monkeypatch):
    def never(*args, **kwargs):
        raise up.mm.OOM_EXCEPTION("no room")

    monkeypatch.setattr(up.small.first_stage_model, "decode", never)
    with pytest.raises(up.mm.OOM_EXCEPTION, match="no room"):
        up.small.decode(latent_of(1, 4, 8, 8))


# --- Stage A: progress


@pytest.mark.parametrize("tile", [None, 64])
def test_progress_runs_to_its_end(up, monkeypatch, tile):
    seen = []
    monkeypatch.setattr(up.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: seen.append(
        (value, total)))
    latent = latent_of(2, 4, 70, 40)
    up.small.decode_tiled(latent, tile, tile) if tile else up.small.decode(latent)
    steps, total = [value for value, _ in seen], seen[-1][1]
    assert steps == list(range(1, total + 1)) and total >= 4


@pytest.mark.parametrize("tiled", [True, False])
def test_a_decode_can_be_interrupted(up, tiled):
    latent, calls = latent_of(1, 4, 40, 40), []

    def stop(value, total, preview, node_id=None):
        calls.append(value)
        up.mm.interrupt_current_processing()

    up.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(up.mm.InterruptProcessingException):
            up.small.decode_tiled(latent, 16, 16) if tiled else up.small.decode(latent)
    finally:
        up.utils.set_progress_bar_global_hook(None)
        up.mm.interrupt_current_processing(False)
    assert len(calls) == 1


# --- Stage A: refusals


WRONG = {
    "stage_b.safetensors": ({"effnet_mapper.0.weight": (8, 16, 1, 1), "clip_mapper.weight": (8, 8)},
                            "Stable Cascade's Stage B"),
    "sd_vae.safetensors": ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "a VAE"),
    "effnet.safetensors": ({"mapper.1.running_mean": (16,), "backbone.0.0.weight": (8, 3, 3, 3)},
                           "Stable Cascade's semantic encoder"),
    "odd.safetensors": ({"something.weight": (2,)}, "something.weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_file_is_refused_by_name(up, name):
    shapes, found = WRONG[name]
    write_file(up.host.models / "vae" / name, {key: torch.zeros(shape) for key, shape in shapes.items()})
    with pytest.raises(ValueError, match="not a Stage A of Stable Cascade") as caught:
        load(up, name)
    assert str(caught.value).startswith(name) and found in str(caught.value)


def test_a_file_with_a_layer_missing_is_refused_by_its_key(up):
    path = up.host.models / "vae" / "cut.safetensors"
    weights = {k: v.clone() for k, v in up.small.first_stage_model.state_dict().items()}
    del weights["up_blocks.2.channelwise.0.weight"]
    write_file(path, weights)
    with pytest.raises(ValueError, match="1 missing: up_blocks.2.channelwise.0.weight"):
        load(up, path.name)


def test_a_latent_of_stage_c_is_refused_in_words(up):
    with pytest.raises(ValueError, match="Sixteen are Stage C's"):
        up.small.decode(torch.zeros(1, 16, 24, 24))


def test_a_name_that_is_not_there_is_refused_before_anything_runs(up):
    node = up.nodes["PixStack_UltraPixelStageALoader"]
    assert "not in models/vae" in node.validate_inputs(vae_name="none.safetensors")
    assert "fp8" in node.validate_inputs(vae_name=SMALL, dtype="fp8")
    assert node.validate_inputs(vae_name=SMALL, dtype="bf16") is True
