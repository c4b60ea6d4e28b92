"""A FLUX of any size as core's own MODEL: core counts 24 heads and the released rope in every FLUX file, so the shape
comes from the configuration that the trainer writes into its files."""
from __future__ import annotations

import math

import comfy.model_base
import comfy.supported_models
from comfy.ldm.flux.model import FluxParams

from ....models_impl.flux.checkpoint import FAMILY
from ....models_impl.flux.config import FluxConfig
from ..common.load import save_configuration
from ..common.text import check_padded

LATENT_CHANNELS = comfy.supported_models.Flux.latent_format.latent_channels


class FluxModel(comfy.model_base.Flux):
    """Core's FLUX, which refuses the texts and latents of other models before the network runs."""

    def extra_conds(self, cross_attn=None, noise=None, **entries) -> dict:
        width = self.diffusion_model.params.context_in_dim
        check_padded(cross_attn, width, entries, "FLUX")
        if noise is not None and noise.shape[1] != LATENT_CHANNELS:
            raise ValueError(f"This latent has {noise.shape[1]} channels, FLUX's have {LATENT_CHANNELS}: take it from "
                             "core's EmptySD3LatentImage, or encode the picture with the VAE of this FLUX.")
        return super().extra_conds(cross_attn=cross_attn, noise=noise, **entries)


def model_config(config: FluxConfig):
    """Core's configuration of a FLUX, as `as_model` takes it. Raises ValueError for latents that are not FLUX's."""
    channels = config.in_channels // 4
    if channels != LATENT_CHANNELS:
        raise ValueError(f"This FLUX draws latents of {channels} channels, and ComfyUI only FLUX's "
                         f"{LATENT_CHANNELS}.")
    known = comfy.supported_models
    # Wanted since ComfyUI 0.4: the axes along which text tokens are numbered. FLUX.1 leaves them all at the origin.
    newer = dict(txt_ids_dims=[]) if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    core = (known.Flux if config.guidance else known.FluxSchnell)(dict(
        image_model="flux", patch_size=2, in_channels=channels, out_channels=channels, vec_in_dim=config.pooled_dim,
        context_in_dim=config.context_dim, hidden_size=config.hidden, num_heads=config.heads,
        mlp_ratio=math.nextafter(config.mlp_hidden / config.hidden, math.inf),  # core cuts what comes of it
        depth=config.depth, depth_single_blocks=config.single_depth, axes_dim=list(config.axes), theta=config.theta,
        qkv_bias=config.qkv_bias, guidance_embed=config.guidance, **newer,
    ))
    kind = comfy.model_base.ModelType.FLUX if config.guidance else comfy.model_base.ModelType.FLOW
    save_configuration(core, FAMILY, config.as_dict())
    core.get_model = lambda state_dict, prefix="", device=None: FluxModel(core, model_type=kind, device=device)
    return core
