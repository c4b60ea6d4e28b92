"""Canny, depth, and the size at which an annotator looks."""

import json
import sys

import cv2
import numpy
import pytest
import torch
from pixstack.models_impl.annotators import canny, depth, resize
from weights import tiny_depth

ROWS, COLUMNS = torch.meshgrid(torch.arange(48.0), torch.arange(80.0), indexing="ij")
DISC = ((ROWS - 24) ** 2 + (COLUMNS - 30) ** 2 < 15**2).float().expand(1, 3, -1, -1)
NOISE = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


# --- Canny

def test_opencv_s_edges_are_those_of_the_reference():
    pixels = (NOISE[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    assert numpy.array_equal(canny.edges(NOISE)[0, 0].numpy() * 255, cv2.Canny(pixels, 100, 200))


def test_every_8_bit_value_survives_on_its_way_to_opencv():
    values = torch.arange(256).float().div(255).view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canny, "_opencv", lambda pixels, low, high: seen.append(pixels) or torch.zeros(1))
        canny.edges(values)
    assert sorted(seen[0][..., 0].ravel().tolist()) == list(range(256))


@pytest.mark.parametrize("limits", [(100, 200), (20, 20), (0, 400)])
def test_kornia_s_edges_are_those_of_its_own_loop(limits):
    from kornia.filters import canny as whole

    scaled = [max(1e-6, value / 2040) for value in limits]
    assert torch.equal(canny.edges(NOISE, *limits, "kornia"), whole(NOISE / 8, *scaled)[1])


@pytest.mark.parametrize("detector", ["opencv", "kornia"])
def test_edges_run_around_a_disc(detector):
    edges = canny.edges(DISC, detector=detector)
    radius = ((ROWS - 24) ** 2 + (COLUMNS - 30) ** 2).sqrt()
    assert edges.unique().tolist() == [0, 1]
    assert (radius[edges[0, 0] > 0] - 15).abs().max() < 2.5 and edges.sum() > 60


@pytest.mark.parametrize("detector", ["opencv", "kornia"])
def test_a_picture_has_the_same_edges_alone_as_in_a_batch(detector):
    batch = canny.edges(NOISE, detector=detector)  # of noise, which has no ties: a batch may be rounded otherwise
    alone = torch.cat([canny.edges(picture[None], detector=detector) for picture in NOISE])
    assert batch.mean() > 0.01 and (batch != alone).float().mean() < 0.001


@pytest.mark.parametrize("low, high", [(200, 100), (-1, 10), (0, 2000)])
def test_thresholds_that_cannot_be_are_refused(low, high):
    with pytest.raises(ValueError, match=f"low={low}.*high={high}"):
        canny.edges(DISC, low, high)


@pytest.mark.parametrize("whole", [True, False])
def test_depth_stays_where_its_picture_is_although_zoedepth_pads(whole):
    from types import SimpleNamespace

    from transformers import ZoeDepthImageProcessor

    class Echo(torch.nn.Module):
        config = SimpleNamespace(model_type="zoedepth", patch_size=16)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixel_values):
            return SimpleNamespace(predicted_depth=pixel_values.mean(1))

    picture = (torch.arange(512) < 128).float().expand(1, 3, 512, 512)
    with torch.no_grad():
        row = depth.depth(Echo(), ZoeDepthImageProcessor(), picture, resize=whole)[0, 0, 256]
    bright = row > (row.max() + row.min()) / 2
    assert abs(int(bright.sum()) - 128) <= 1 and bright[0]


# --- Size

@pytest.mark.parametrize("resolution, inner, padded", [
    (resize.OWN, (48, 80), (48, 80)),
    (resize.RELEASE, (80, 133), (128, 192)),
    (512, (512, 853), (512, 896)),
])  # fmt: skip
def test_the_shorter_side_is_brought_to_the_resolution_and_the_edge_repeated(resolution, inner, padded):
    seen, back = resize.seen(NOISE, resolution)
    assert seen.shape == (2, 3, *padded)
    assert torch.equal(seen[..., inner[0] - 1 : inner[0], :], seen[..., -1:, :])
    assert back(seen[:, :1]).shape == (2, 1, 48, 80)


def test_what_is_seen_comes_back_to_its_place():
    seen, back = resize.seen(DISC, 96)
    assert (back(seen) - DISC).abs().mean() < 0.02
    seen, back = resize.seen(DISC, 24)
    assert (back(seen) - DISC).abs().mean() < 0.05


def test_a_smaller_picture_is_the_mean_of_its_pixels():
    seen, _ = resize.seen(NOISE, 24)
    assert torch.allclose(seen[..., :24, :40], torch.nn.functional.avg_pool2d(NOISE, 2), atol=1e-6)


@pytest.mark.parametrize("height, width, resolution", [
    (1, 30_000, 512), (30_000, 1, -1), (2, 30_000, 16384), (1, 17_000, 16384),
])  # fmt: skip
def test_a_thread_of_a_picture_is_not_enlarged_to_gigabytes(height, width, resolution, monkeypatch):
    monkeypatch.setattr(resize, "resized", lambda *_, **__: pytest.fail("resized"))
    with pytest.raises(ValueError, match=f"A picture of {width}x{height} pixels would be brought to .*Crop it"):
        resize.seen(torch.zeros(1, 3, height, width), resolution)


def test_a_resolution_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="-2 is outside of 1 to 16384"):
        resize.seen(NOISE, -2)


# --- Depth

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("depth") / "depth-anything"
    tiny_depth(path / "model.safetensors")
    return path


@pytest.mark.parametrize("resize", [True, False])
def test_depth_has_the_picture_s_size_alone_and_in_a_batch(folder, resize):
    model = depth.load(folder)
    with torch.no_grad():
        found = model(NOISE, resize)
        assert found.shape == (2, 1, 48, 80) and found.isfinite().all()
        # In float32 a batch may be added up in another order than one picture. Either is up to 1.6e-6 of the largest
        # depth from float64, on processors with SSE4.1, AVX2 or AVX-512; in float64 there is nothing to excuse.
        exact = model.double()(NOISE, resize)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * exact.max().item())
    with torch.no_grad():
        alone = model(NOISE[1:], resize)
    torch.testing.assert_close(alone, exact[1:], rtol=0, atol=1e-6 * exact.max().item())


def test_the_nearest_is_white_and_the_farthest_black():
    inverse = torch.linspace(1, 5, 12).view(1, 1, 3, 4)
    for found, distance in ((inverse, False), (1 / inverse, True)):
        bright = depth.normalised(found, distance)
        assert torch.allclose(bright, (inverse - 1) / 4, atol=1e-5)


def test_each_picture_has_its_own_range_and_a_flat_one_is_black():
    found = torch.stack([torch.linspace(0, 1, 4), torch.linspace(5, 9, 4), torch.full((4,), 3.0)]).view(3, 1, 2, 2)
    bright = depth.normalised(found, False)
    assert torch.allclose(bright[0], bright[1]) and bright[2].eq(0).all()


def test_the_kind_of_model_decides_what_its_numbers_mean(folder, tmp_path):
    assert not depth.grows_with_distance(depth.load(folder).config)
    tiny_depth(tmp_path / "metric" / "model.safetensors", depth_estimation_type="metric", max_depth=20)
    assert depth.grows_with_distance(depth.load(tmp_path / "metric").config)


@pytest.mark.parametrize("config, words", [
    (None, "no config.json"),
    ({"model_type": "bert"}, r"model type bert.*cannot be read as a depth model"),
])  # fmt: skip
def test_a_folder_without_a_depth_model_is_refused(tmp_path, config, words):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        depth.load(tmp_path)


def test_without_kornia_the_other_detector_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(ImportError, match="opencv does not need it"):
        canny.edges(DISC, detector="kornia")
