"""Previews of latents in the colours of the VAE that a model was trained with."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from ....models_impl import previews


def colour(model, metadata: Mapping[str, str]):
    """Give a MODEL's latent format the colours that its file's metadata state; without them core's stay."""
    latent_format = model.model.latent_format
    channels = latent_format.latent_channels
    if (found := previews.read(metadata, channels)) is None:
        return model
    factors, bias = found
    one = torch.cat([torch.zeros(1, channels), torch.eye(channels)])[:, :, None, None]
    start, *each = latent_format.process_out(one)[:, :, 0, 0]  # ours are of the VAE's latents, core's of the model's
    scale = torch.stack(each) - start
    latent_format.latent_rgb_factors = (scale @ factors).tolist()
    latent_format.latent_rgb_factors_bias = (start @ factors + bias).tolist()
    return model
