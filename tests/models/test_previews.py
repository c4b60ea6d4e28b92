import json

import pytest
import torch
from pixstack.models_impl import previews
from torch.nn import functional as F


def test_colours_of_a_linear_encoder_are_its_inverse():
    torch.manual_seed(0)
    mixed, shift = torch.randn(3, 3), torch.randn(3)
    entry = previews.metadata(lambda shown: torch.einsum(
        "bchw,cd->bdhw", F.avg_pool2d(shown, 8), mixed) + shift[:, None, None], 8)
    factors, bias = previews.read(entry, 3)
    torch.testing.assert_close(factors, mixed.inverse(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias, -shift @ mixed.inverse(), atol=1e-3, rtol=1e-3)


def test_a_file_without_the_entry_has_no_colours():
    assert previews.read({"pixstack.family": "pixart"}, 4) is None


@pytest.mark.parametrize("entry", ["", "[]", "{}", "[" * 100000, json.dumps({"factors": [[1, 2, 3]], "bias": None}),
                                   '{"factors": [[1, 2, NaN]], "bias": [0, 0, 0]}',
                                   '{"factors": [[1, 2, 3]] , "bias": ["0", 0, 0]}',
                                   '{"factors": [[1, 2, 3], [1, 2, 3]], "bias": [0, 0, 0]}'])
def test_an_entry_that_is_no_map_is_named(entry):
    with pytest.raises(ValueError, match="pixstack.preview in this file's metadata"):
        previews.read({previews.KEY: entry}, 1)
