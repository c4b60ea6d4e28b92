"""PixArt as a ComfyUI MODEL: its schedule, its conditioning, and the attention that it calls."""
from __future__ import annotations

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....models_impl.pixart import buckets
from ....models_impl.pixart.checkpoint import FAMILY
from ....models_impl.pixart.config import PixArtConfig
from ....models_impl.pixart.model import PixArt
from ....models_impl.pixart.sampling import PixArtDiffusion
from ....models_impl.state_dict import config_tensor
from ..common.attention import host_attention
from ..common.conds import Exact, PromptCache, PromptKey, TextCond, TextMask, once_per_prompt, one_pass_is_faster
from ..common.control import AREA, Area
from ..common.prefetch import host_prefetch
from ..common.text import check_type

INFERENCE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONTROL = "pixart"  # key of a control dictionary: what our ControlNets hand to the network
LATENT_FORMATS = {"alpha": comfy.latent_formats.SD15, "sigma": comfy.latent_formats.SDXL}


class DiffusionSampling(comfy.model_sampling.ModelSamplingDiscrete):
    """The discrete schedule with fractional timesteps between its entries, as the released samplers ask for.

    Core rounds to whole timesteps. A sigma that the schedule itself holds gives the same timestep in both. What a
    prediction has behind the latent's channels, the logits of its variance, is passed on as it is.
    """

    predicts: type
    """Core's class of what the network predicts, which the subclasses inherit from too."""

    def __init__(self, diffusion: PixArtDiffusion):
        torch.nn.Module.__init__(self)
        self.diffusion, self.schedule = diffusion, diffusion.schedule
        self.sigma_data = 1.0
        self.num_timesteps = self.schedule.steps
        self.set_sigmas(self.schedule.sigma(torch.arange(self.schedule.steps).float()))

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.schedule.timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.schedule.sigma(timestep)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        prediction, variance = model_output.tensor_split([self.diffusion.channels], dim=1)
        x = model_input[:, : self.diffusion.channels]
        denoised = self.predicts.calculate_denoised(self, sigma, prediction, x)
        return torch.cat([denoised, variance], dim=1) if variance.shape[1] else denoised


class EpsSampling(DiffusionSampling, comfy.model_sampling.EPS):
    predicts = comfy.model_sampling.EPS


class VelocitySampling(DiffusionSampling, comfy.model_sampling.V_PREDICTION):
    predicts = comfy.model_sampling.V_PREDICTION


class PixArtNetwork(PixArt):
    """The transformer under the calling convention of ComfyUI's diffusion models."""

    def __init__(self, image_model=None, dtype=None, device=None, operations=None, **config):
        super().__init__(PixArtConfig.from_dict(config), operations=operations, dtype=dtype, device=device)

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, text=None, size=None,
                aspect_ratio=None, **unused):
        """Prediction of the shape of x, (B, C, H, W). Channels of x behind the latent's ask for the variance: they are
        not read, and hold its logits in the result, or NaN where one of core's caches answers for the network."""
        transformer_options = transformer_options or {}
        x, variance = x.tensor_split([self.config.in_channels], dim=1)
        asked = variance.shape[1]
        variance = torch.full_like(variance, torch.nan)

        def predict(*inputs):  # core's caches know predictions of the latent's channels only
            nonlocal variance
            prediction, logits = self._forward(*inputs).tensor_split([self.config.in_channels], dim=1)
            variance = logits[:, :asked]
            return prediction

        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        prediction = WrapperExecutor.new_class_executor(predict, self, wrappers).execute(
            # core's EasyCache looks for the options at the end
            x, timesteps, context, control, text, size, aspect_ratio, transformer_options
        )
        return torch.cat([prediction, variance], dim=1) if asked else prediction

    def _forward(self, x, timesteps, context, control, text, size, aspect_ratio, transformer_options):
        size, aspect_ratio = (entry[0].to(x.device) if entry else None for entry in (size, aspect_ratio))
        return super().forward(
            x, timesteps, context, size=size, aspect_ratio=aspect_ratio,
            attention=host_attention(transformer_options),
            control=(control or {}).get(CONTROL, ()),
            text=text,
            before_block=host_prefetch(self.blocks, x.device, transformer_options.get("prefetch_dynamic_vbars", False)),
        )


class ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    supported_inference_dtypes = INFERENCE_DTYPES
    memory_usage_factor = 0.5  # core's for PixArt

    def __init__(self, config: PixArtConfig):
        super().__init__({"image_model": "pixart", **config.as_dict()})
        self.pixart = config
        self.latent_format = LATENT_FORMATS[config.variant]()
        self.sampling_settings = {  # read by core's ModelSampling nodes
            "beta_schedule": {"linear": "sqrt_linear", "scaled_linear": "linear"}[config.schedule],
            "linear_start": config.beta_start,
            "linear_end": config.beta_end,
            "timesteps": 1000,
            "zsnr": config.zero_terminal_snr,
        }

    def process_unet_state_dict_for_saving(self, state_dict):
        """What core's nodes save, with the configuration."""
        return super().process_unet_state_dict_for_saving(state_dict) | config_tensor(FAMILY, self.pixart.as_dict())

    def get_model(self, state_dict, prefix="", device=None):
        return PixArtModel(self, device=device)


class PixArtModel(comfy.model_base.PixArt):
    """PixArt with its own network and conditioning, a subclass of core's so that core's LoRA loaders know its names."""

    def __init__(self, model_config: ModelConfig, device=None):
        config = model_config.pixart
        velocity = config.prediction == "v"
        kind = comfy.model_base.ModelType.V_PREDICTION if velocity else comfy.model_base.ModelType.EPS
        comfy.model_base.BaseModel.__init__(self, model_config, kind, device=device, unet_model=PixArtNetwork)
        self.model_sampling = (VelocitySampling if velocity else EpsSampling)(PixArtDiffusion.of(config))

    @property
    def config(self) -> PixArtConfig:
        return self.diffusion_model.config

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, *args, prompts=None, mask=None, **kwargs):
        """Keys and values of the prompts depend on neither the picture nor the timestep: they are made once in a
        sampling run, and outside of what torch.compile may have made of the network."""
        if c_crossattn is not None:
            net = self.diffusion_model
            kwargs["text"] = once_per_prompt(prompts, len(c_crossattn), x.device, lambda: net.encode_text(
                c_crossattn.to(x.device, self._dtype()), mask and mask[0].to(x.device)))
        return super()._apply_model(x, t, c_concat, c_crossattn, *args, **kwargs)

    def _dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    def extra_conds(self, cross_attn=None, attention_mask=None, noise=None, hooks=None, device=None, **entries) -> dict:
        """The inputs that the network is conditioned on, from one entry of a conditioning; refuses another model's."""
        self._check_latent(noise)
        check_type(entries, padded=False, model="PixArt")
        context, mask = self._trim(self._context(cross_attn), attention_mask)
        fill = noise is None or one_pass_is_faster(self._patches(noise), noise.device)
        # On the device, else every step would send it; but a mask is asked whether it masks, which waits for a device.
        conds = {"c_crossattn": TextCond(context.to(device, self._dtype()), fill), "mask": TextMask(mask.cpu(), fill)}
        if hooks is None:  # hooks may change the weights during the run
            conds["prompts"] = PromptKey(PromptCache())
        if "control" in entries and noise is not None:
            conds[AREA] = Area(tuple(noise.shape[-2:]))
        if self.config.micro_conditions:
            height, width = entries["height"], entries["width"]
            ratio = entries.get("aspect_ratio") or _ratio(height, width)
            conds["size"] = Exact(torch.tensor([[height, width]], dtype=torch.float32, device=device))
            conds["aspect_ratio"] = Exact(torch.tensor([[ratio]], dtype=torch.float32, device=device))
        return conds

    def _patches(self, noise: Tensor) -> int:
        return noise[:, 0].numel() // self.config.patch_size**2

    def _check_latent(self, noise: Tensor | None):
        if noise is None:
            return
        _, C, H, W = noise.shape
        if C != self.config.in_channels:
            raise ValueError(f"This latent has {C} channels, PixArt's have {self.config.in_channels}: take it from "
                             "'PixArt Canvas', or encode the picture with the VAE of this PixArt model.")
        patch, multiple = self.config.patch_size, self.config.size_multiple
        if H % patch or W % patch:
            raise ValueError(f"{W * 8}x{H * 8} pixels do not fit PixArt: width and height must be multiples of "
                             f"{multiple}. 'PixArt Canvas' gives the sizes it was trained on.")

    def _context(self, context: Tensor | None) -> Tensor:
        width = self.config.context_dim
        if context is None or context.ndim != 3 or context.shape[-1] != width:
            fault = "has no text" if context is None else f"has text tokens {context.shape[-1]} wide"
            encoder = "T5 v1.1 XXL with CLIPLoader (type pixart)" if width == PixArtConfig.context_dim else \
                "the encoder that it was trained with by 'Load T5 Text Encoder' (type pixelflow, pixart)"
            raise ValueError(f"This PixArt model reads text tokens {width} wide, but its conditioning {fault}. Load "
                             f"{encoder} and encode the prompt with that CLIP.")
        return context

    @staticmethod
    def _trim(context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without the tokens after the last one that any row keeps: the network never sees them."""
        if mask is None:
            return context, torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        mask = mask.reshape(len(mask), -1).to(context.device, torch.long)  # ComfyUI would make a bool one floats
        used = mask.any(dim=0).nonzero()
        if not len(used):
            raise ValueError("The attention mask of this conditioning keeps no token at all. Encode the prompt again, "
                             "an empty one if nothing is wanted.")
        length = int(used.max()) + 1
        return context[:, :length], mask[:, :length]


def _ratio(height: int, width: int) -> float:
    """Height / width as in training: the label of the bucket if there is one of this size."""
    for table in buckets.TABLES.values():
        label, *size = buckets.nearest(table, height, width)
        if size == [height, width]:
            return label
    return height / width


def config_of(model) -> PixArtConfig:
    """The configuration behind a MODEL; refuses other families and PixArt models of other loaders."""
    inner = getattr(model, "model", model)
    if not isinstance(inner, PixArtModel):
        raise ValueError(f"This MODEL is a {type(inner).__name__}, not one of 'Load PixArt Model': load it there.")
    return inner.config
