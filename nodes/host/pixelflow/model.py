"""PixelFlow as a ComfyUI MODEL: the meaning of its sigmas, its conditioning, and the attention that it calls."""
from __future__ import annotations

from collections.abc import Sequence

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....models_impl.pixelflow import checkpoint
from ....models_impl.pixelflow.config import PixelFlowConfig
from ....models_impl.pixelflow.model import PixelFlow
from ....models_impl.pixelflow.stages import TRAIN_TIMESTEPS, Stages
from ....models_impl.state_dict import metadata_tensor
from ..common.attention import host_attention
from ..common.conds import PromptCache, PromptKey, TextCond, TextMask, once_per_prompt
from ..common.prefetch import host_prefetch
from ..common.text import check_type

CLASS_LABELS = "pixelflow_class_labels"  # where the class node leaves (K,) indices in a conditioning; -1: null class
ACTIVATIONS = 12  # values for each channel of a token that live at once; counted, see the tests


class PixelFormat(comfy.latent_formats.LatentFormat):
    """The latent is the picture, RGB in [-1, 1], so the preview is too."""

    latent_channels = 3
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    spacial_downscale_ratio = 1  # read by ComfyUI after 0.3.75


class CascadeSampling(torch.nn.Module):
    """sigma = 1 - timestep/1000 falls from 1 to 0 over the whole cascade: one sigma names a stage and the t in it."""

    def __init__(self, stages: Stages):
        super().__init__()
        self.stages = stages
        self.register_buffer("sigmas", torch.arange(1, TRAIN_TIMESTEPS + 1) / TRAIN_TIMESTEPS)

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        return (1 - sigma) * TRAIN_TIMESTEPS

    def sigma(self, timestep: Tensor) -> Tensor:
        return 1 - timestep / TRAIN_TIMESTEPS

    def percent_to_sigma(self, percent: float) -> float:
        return min(max(1.0 - percent, 0.0), 1.0)

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x.clone()  # EasyCache writes into what the network is given, and x is needed after it

    def calculate_denoised(self, sigma: Tensor, velocity: Tensor, x: Tensor) -> Tensor:
        stage, t, _ = self.stages.locate(float(sigma.flatten()[0]))
        return self.stages.denoised(x, velocity, stage, t)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        raise ValueError(
            "PixelFlow grows its picture from stage to stage, which this sampler cannot do. Use the node 'PixelFlow "
            "Sample', or 'PixelFlow Sampler' and 'PixelFlow Sigmas' with SamplerCustomAdvanced."
        )

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class PixelFlowNetwork(PixelFlow):
    """The transformer under the calling convention of ComfyUI's diffusion models."""

    def __init__(self, image_model=None, dtype=None, device=None, operations=None, **config):
        super().__init__(PixelFlowConfig.from_dict(config), operations=operations, dtype=dtype, device=device)

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, class_labels=None, text=None,
                rope=None, **unused):
        transformer_options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        return WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(
            x, timesteps, context, class_labels, text, rope, transformer_options
        )

    def _forward(self, x, timesteps, context, class_labels, text, rope, transformer_options):
        dynamic = transformer_options.get("prefetch_dynamic_vbars", False)
        return super().forward(x, timesteps, context, class_labels=class_labels, text=text,
                               rope=rope[0] if rope else None,
                               attention=host_attention(transformer_options),
                               before_block=host_prefetch(self.transformer_blocks, x.device, dynamic))


class ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    latent_format = PixelFormat
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, config: PixelFlowConfig, classes: Sequence[str] = ()):
        super().__init__({"image_model": "pixelflow", **config.as_dict()})
        self.pixelflow, self.class_names = config, tuple(classes)
        # ComfyUI multiplies it by pixels, bytes of a value and 2**20 / 100.
        self.memory_usage_factor = ACTIVATIONS * config.hidden / config.patch_size**2 / (2**20 / 100)

    def process_unet_state_dict_for_saving(self, state_dict):
        """What core's nodes save, with the configuration."""
        own = metadata_tensor(checkpoint.metadata(self.pixelflow, self.class_names))
        return super().process_unet_state_dict_for_saving(state_dict) | own

    def get_model(self, state_dict, prefix="", device=None):
        return PixelFlowModel(self, device=device)


class PixelFlowModel(comfy.model_base.BaseModel):
    def __init__(self, model_config: ModelConfig, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=PixelFlowNetwork)
        self.model_sampling = CascadeSampling(Stages(self.config.num_stages))

    @property
    def config(self) -> PixelFlowConfig:
        return self.diffusion_model.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes it was trained on, by index; none where they are ImageNet's or the file does not say."""
        return self.model_config.class_names

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, *args, prompts=None, mask=None, **kwargs):
        """What does not change from step to step is made here, outside of what torch.compile may have made of the
        network: the table of positions, and keys and values of the prompts."""
        net, p = self.diffusion_model, self.config.patch_size
        kwargs["rope"] = (net.rope(x.shape[-2] // p, x.shape[-1] // p, x.device),)  # in a tuple: else it would be cast
        if c_crossattn is not None:
            kwargs["text"] = once_per_prompt(prompts, len(c_crossattn), x.device, lambda: net.encode_text(
                c_crossattn.to(x.device, self._dtype()), mask and mask[0].to(x.device)))
        return super()._apply_model(x, t, c_concat, c_crossattn, *args, **kwargs)

    def _dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    def extra_conds(self, cross_attn=None, attention_mask=None, device=None, hooks=None, **entries) -> dict:
        """The inputs that the network is conditioned on, from one entry of a conditioning; refuses another model's."""
        labels, conds = entries.get(CLASS_LABELS), {}
        if self.config.text_conditional:
            context = self._text(cross_attn, labels)
            check_type(entries, padded=False, model="PixelFlow")
            mask = torch.ones(context.shape[:2]) if attention_mask is None else attention_mask
            conds["c_crossattn"] = TextCond(context.to(device, self._dtype()))  # else every step would send it
            conds["mask"] = TextMask(mask.to("cpu", torch.long))  # so that asking whether it masks waits for nothing
            if hooks is None:  # hooks may change the weights during the run
                conds["prompts"] = PromptKey(PromptCache())
        if self.config.num_classes:
            conds["class_labels"] = comfy.conds.CONDRegular(self._classes(labels).to(device))
        return conds

    def _text(self, context: Tensor | None, labels: Tensor | None) -> Tensor:
        if labels is not None and not self.config.num_classes:
            raise ValueError("This PixelFlow model draws prompts, but its conditioning holds classes. Use CLIP Text "
                             "Encode with the CLIP of 'Load T5 Text Encoder' instead of 'PixelFlow Class'.")
        width = self.config.context_dim
        if context is None or context.ndim != 3 or context.shape[-1] != width:
            fault = "has no text" if context is None else f"has text tokens {context.shape[-1]} wide"
            encoder = "flan-t5-xl" if width == 2048 else "its own T5 encoder"
            raise ValueError(f"This PixelFlow model reads text tokens {width} wide, but its conditioning {fault}. Load "
                             f"{encoder} with 'Load T5 Text Encoder' and encode the prompt with that CLIP.")
        return context

    def _classes(self, labels: Tensor | None) -> Tensor:
        null = self.config.num_classes
        if labels is None:
            raise ValueError(f"This PixelFlow model draws classes (0 to {null - 1}), but its conditioning names none. "
                             "Use 'PixelFlow Class' for positive and, from its second output, negative.")
        if labels.max() >= null:
            raise ValueError(f"This PixelFlow model has no class {int(labels.max())}: it knows 0 to {null - 1}.")
        return torch.where(labels < 0, null, labels)
