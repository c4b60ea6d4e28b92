"""The nodes around PixArt's VAE, and the annotators, inside a real ComfyUI."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from pixstack.models_impl.annotators import hed
from pixstack.models_impl.state_dict import write_file
from weights import tiny_hed, tiny_pixart, tiny_vae


@pytest.fixture(scope="module")
def nodes(host):
    tiny_vae(host.models / "vae" / "tiny_vae.safetensors")
    tiny_hed(host.models / "annotators" / "tiny_hed.pth")
    return import_module("nodes")


@pytest.fixture(scope="module")
def vae(nodes):
    return nodes.VAELoader().load_vae("tiny_vae.safetensors")[0]


def run(nodes, name, **inputs):
    return nodes.NODE_CLASS_MAPPINGS[f"PixStack_{name}"].execute(**inputs).args


def photo(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height))


@pytest.fixture
def encoded(vae, monkeypatch):
    """The pictures that the VAE was given."""
    seen, real = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda picture: seen.append(picture) or real(picture))
    return seen


def canvas(nodes, vae, image, shape="1:1", fit="crop"):
    return run(nodes, "PixArtReferenceCanvas", image=image, vae=vae, resolution="256", shape=shape, fit=fit)[0]


@pytest.mark.parametrize("shape, size", [("1:1", (176, 352)), ("3:4", (208, 304)), ("as the reference", (176, 368))])
def test_a_reference_fills_the_left_half_and_the_mask_the_right(nodes, vae, encoded, shape, size):
    latent = canvas(nodes, vae, photo(100, 110), shape)
    height, width = size
    assert latent["samples"].shape == (1, 4, height // 8, width // 8)
    mask = latent["noise_mask"]
    assert mask[..., : width // 16].sum() == 0 and mask[..., width // 16 :].min() == 1
    (picture,) = encoded
    assert picture.shape == (1, height, width, 3)
    assert picture[:, :, : width // 2].std() > 0.1 and (picture[:, :, width // 2 :] == 1).all()


def test_padding_keeps_the_whole_reference(nodes, vae, encoded):
    for fit in ("crop", "pad with white", "stretch"):
        canvas(nodes, vae, torch.zeros(1, 64, 200, 3), fit=fit)
    cropped, padded, stretched = (picture[:, :, : picture.shape[2] // 2] for picture in encoded)
    assert (cropped == 0).all() and (stretched == 0).all()
    assert 0.25 < (padded < 0.5).float().mean() < 0.4  # 200 x 64 in a square


def test_the_right_half_is_what_was_drawn(nodes):
    picture = photo(32, 64)
    (half,) = run(nodes, "PixArtRightHalf", image=picture)
    assert torch.equal(half, picture[:, :, 32:])


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_hed_edges_of_a_batch_are_those_of_its_pictures(nodes, host, size):
    pictures = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1))
    (edges,) = run(nodes, "HEDEdges", image=pictures, hed_name="tiny_hed.pth", strength=1.0)
    assert edges.shape == pictures.shape and torch.equal(edges[..., 0], edges[..., 2])
    _, alone = hed.load(host.models / "annotators" / "tiny_hed.pth")(pictures[1:].movedim(-1, 1))
    away = (edges[1, ..., 0] - alone[0, 0]).abs()  # a batch is convolved in another order, and the sigmoid is steep
    assert away.mean() < 1e-6 and away.max() < 2e-3
    (weak,) = run(nodes, "HEDEdges", image=pictures, hed_name="tiny_hed.pth", strength=0.5)
    assert torch.allclose(weak, edges / 2)


def test_a_file_that_is_no_hed_is_refused(nodes, host):
    tiny_pixart(host.models / "annotators" / "pixart.safetensors")
    with pytest.raises(ValueError, match="pixart.safetensors"):
        run(nodes, "HEDEdges", image=photo(32, 32), hed_name="pixart.safetensors", strength=1.0)


def test_the_consistency_decoder_decodes_as_diffusers_does_and_repeats_itself(nodes, host):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    widths = (32, 32, 32, 32)
    net = diffusers.ConsistencyDecoderVAE(encoder_block_out_channels=widths, decoder_block_out_channels=widths).eval()
    write_file(host.models / "vae" / "consistency.safetensors", net.state_dict())
    (vae,) = run(nodes, "ConsistencyDecoderLoader", vae_name="consistency.safetensors")
    latent = torch.randn(2, 4, 8, 8)
    pictures = vae.decode(latent)
    assert pictures.shape == (2, 64, 64, 3)
    with torch.no_grad():
        reference = net.decode(latent[:1], generator=torch.Generator().manual_seed(0)).sample
    assert torch.allclose(pictures[:1], (reference.clamp(-1, 1) / 2 + 0.5).movedim(1, -1), atol=2e-2)
    assert torch.equal(pictures, vae.decode(latent))
    with pytest.raises(ValueError, match="4 channels of PixArt-alpha.* has 16: decode it with the VAE of its own"):
        vae.decode(torch.zeros(1, 16, 8, 8))
    encoded = vae.encode(pictures)
    with torch.no_grad():
        expected = net.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert torch.allclose(encoded, expected, atol=2e-2)


def test_an_ordinary_vae_is_not_taken_for_a_consistency_decoder(nodes):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="tiny_vae.safetensors is not the consistency decoder"):
        run(nodes, "ConsistencyDecoderLoader", vae_name="tiny_vae.safetensors")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_decoder_as_a_program_is_refused_as_one(nodes, host):
    pytest.importorskip("diffusers")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(host.models / "vae" / "decoder.pt")
    with pytest.raises(ValueError, match=r"decoder.pt is a program \(TorchScript\), not weights"):
        run(nodes, "ConsistencyDecoderLoader", vae_name="decoder.pt")
