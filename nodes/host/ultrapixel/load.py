"""A Stage C or Stage B of any size as core's own MODEL: core knows the widths of the releases only, so the shape comes
from the configuration that the trainer writes into its files.

Their texts are those of a small T5, padded, where the releases read CLIP-G: the pooled vector is the mean of the
tokens (`texts.pooled`).
"""
from __future__ import annotations

from pathlib import Path

import comfy.conds
import comfy.model_base
import comfy.supported_models
import torch

from ....models_impl.guard import reading
from ....models_impl.known_files import WrongFile
from ....models_impl.state_dict import metadata_config, read_file
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import CascadeConfig, StageBConfig, StageCConfig
from ....models_impl.ultrapixel.texts import pooled
from ..common import quantised
from ..common.load import as_model, save_configuration
from ..common.patcher import reloadable
from ..common.previews import colour
from ..common.text import check_padded

READERS = {"stage_c": checkpoint.read_stage_c, "stage_b": checkpoint.read_stage_b}
CHANNELS = {StageCConfig: comfy.supported_models.Stable_Cascade_C.latent_format.latent_channels,
            StageBConfig: comfy.supported_models.Stable_Cascade_B.latent_format.latent_channels}


def load_cascade(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """A Stage C or B that states its configuration, as the trainer's exports do, as core's own model in a ModelPatcher.
    Raises ValueError for another file."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file, quantised.runnable())
        part = checkpoint.kind(tensors)
        if part not in READERS:
            raise WrongFile("This is not a Stage C or a Stage B of Stable Cascade.", tensors)
        if metadata_config(metadata, f"{checkpoint.FAMILY}.{part}") is None:
            raise ValueError("This file of Stable Cascade does not state its configuration, as exports of PixStack's "
                             "trainer do. Load released files with core's 'Load Diffusion Model'.")
        config, tensors = READERS[part](tensors, metadata)
        tensors = checkpoint.core_attention_names(tensors)
        model = as_model(model_config(config), tensors, dtype, f"Stable Cascade ({file.name})", disable_dynamic)
        colour(model, metadata)
    return reloadable(model, load_cascade, path, dtype)


class SmallTexts:
    """What core's models of Stable Cascade read of a prompt, where it is a T5's."""

    def pooled_of(self, cross_attn: torch.Tensor | None, width: int, entries: dict) -> torch.Tensor:
        check_padded(cross_attn, width, entries, "Stable Cascade")
        return pooled(cross_attn)


class SmallStageC(SmallTexts, comfy.model_base.StableCascade_C):
    def extra_conds(self, cross_attn=None, **entries) -> dict:
        net = self.diffusion_model
        vector = self.pooled_of(cross_attn, net.clip_txt_mapper.in_features, entries)
        conds = super().extra_conds(cross_attn=cross_attn, **{**entries, "pooled_output": vector})
        image = net.clip_img_mapper.in_features
        if conds["clip_img"].cond.shape[-1] != image:
            if "unclip_conditioning" in entries:
                raise ValueError("This small Stage C reads no pictures: take unCLIPConditioning away.")
            conds["clip_img"] = comfy.conds.CONDRegular(torch.zeros(1, 1, image))
        return conds


class SmallStageB(SmallTexts, comfy.model_base.StableCascade_B):
    def extra_conds(self, cross_attn=None, **entries) -> dict:
        vector = self.pooled_of(cross_attn, self.diffusion_model.clip_mapper.in_features, entries)
        return super().extra_conds(**{**entries, "pooled_output": vector})


def model_config(config: CascadeConfig):
    """Core's configuration of a Stage C or B, as `as_model` takes it. Raises ValueError for what core cannot build."""
    is_c, known = isinstance(config, StageCConfig), comfy.supported_models
    if {config.in_channels, config.out_channels} != {CHANNELS[type(config)]}:
        raise ValueError(f"This network draws latents of {config.in_channels} channels, and ComfyUI only those of "
                         f"{CHANNELS[type(config)]}.")
    kinds, counts = config.repeated_kinds()
    own = dict(c_clip_text=config.text_dim, c_clip_text_pooled=config.pooled_dim, c_clip_img=config.image_dim,
               switch_level=list(config.switch)) if is_c else dict(
               c_clip=config.pooled_dim, c_effnet=config.semantic_channels, c_pixels=config.pixel_channels)
    core = (known.Stable_Cascade_C if is_c else known.Stable_Cascade_B)(dict(
        stable_cascade_stage="c" if is_c else "b", c_in=config.in_channels, c_out=config.out_channels,
        c_r=config.timestep_dim, patch_size=config.patch_size, c_cond=config.context_dim, c_hidden=list(config.hidden),
        nhead=list(config.heads), blocks=[list(some) for some in counts], level_config=list(kinds),
        block_repeat=[list(config.down_repeats), list(config.up_repeats)], c_clip_seq=config.pooled_tokens,
        kernel_size=config.kernel_size, dropout=[0.0] * len(config.hidden), self_attn=list(config.self_attention),
        t_conds=list(config.conditions), **own,
    ))
    family = f"{checkpoint.FAMILY}.{checkpoint.PARTS[type(config)]}"
    save_configuration(core, family, config.as_dict())
    kind = SmallStageC if is_c else SmallStageB
    core.get_model = lambda state_dict, prefix="", device=None: kind(core, device=device)
    return core
