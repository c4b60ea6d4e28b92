"""PixelFlow's cascade as a ComfyUI SAMPLER: it grows the picture from stage to stage, while guiders, wrappers,
previews, progress and interrupts stay core's."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ....models_impl.pixelflow.config import PixelFlowConfig
from ....models_impl.pixelflow.sampling import (
    CascadeFlow,
    StageTime,
    block_noise,
    block_noise_reference,
    shrink,
)
from ....models_impl.pixelflow.schedule import GUIDANCE, CascadeSchedule, guidance_scales
from ....models_impl.pixelflow.stages import Stages, stage_size
from ..common import step_cache
from .model import CascadeSampling, PixelFlowModel

POLICIES = ("auto", *GUIDANCE)
LATENTS = ("auto", "picture", "state")


def config_of(model) -> PixelFlowConfig:
    """The configuration behind a MODEL; refuses other families."""
    inner = getattr(model, "model", model)
    if not isinstance(inner, PixelFlowModel):
        raise ValueError(f"This MODEL is a {type(inner).__name__}, not a PixelFlow model: load one with 'Load "
                         "PixelFlow Model'.")
    return inner.config


def check_size(height: int, width: int, multiple: int):
    """Refuse pixels that the first stage cannot cut into whole tokens, and name sizes that work."""
    if height % multiple or width % multiple:
        near = [f"{w}x{h}" for h in _near(height, multiple) for w in _near(width, multiple)]
        raise ValueError(f"{width}x{height} pixels do not fit this PixelFlow model: width and height must be multiples "
                         f"of {multiple}. Near it are {', '.join(near)}.")


def about_size(height: int, width: int, config: PixelFlowConfig) -> str:
    """The pixels of every stage in words, with a warning where the model was trained on far fewer."""
    sizes = [stage_size(height, width, stage, config.num_stages) for stage in range(config.num_stages)]
    stages = [f"{w}x{h}" for h, w in sizes]
    text, times = " \N{RIGHTWARDS ARROW} ".join(stages) + " pixels", height * width / config.resolution**2
    if times > 2:
        text += (f"\n{times:.3g} times the {config.resolution}x{config.resolution} pixels of its training: things may "
                 "repeat or fall apart.")
    return text


def _near(value: int, multiple: int) -> list[int]:
    below = value // multiple * multiple
    return [value] if below == value else [v for v in (below, below + multiple) if v]


@dataclass(frozen=True)
class CascadeSampler(comfy.samplers.Sampler):
    solver: str = "euler"
    guidance: str = "auto"
    """Policy that turns the guider's cfg into a scale per stage, see `guidance_scales`; auto: that of the release."""
    custom_guidance: Sequence[float] = ()
    reference_noise: bool = False
    """Draw all noise number for number as the reference does; slow."""
    latent: str = "auto"
    """Meaning of the latent when sampling starts after the first step: a "picture" to add noise to, or the "state" that
    an earlier sampler handed over. auto: a state in the middle of a stage or without noise, else a picture."""
    watch: Callable[[Tensor], None] | None = None
    """Is given the clean estimate (B, 3, H, W) of every step."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        config, cascade = config_of(model_wrap.inner_model), model_wrap.inner_model.model_sampling
        if not isinstance(cascade, CascadeSampling):
            raise ValueError("A ModelSampling node has replaced PixelFlow's stages: take it away, and set the shift in "
                             "'PixelFlow Sigmas' or 'PixelFlow Sample'.")
        if denoise_mask is not None:
            raise ValueError("PixelFlow cannot inpaint: take the noise mask off the latent.")
        stages = cascade.stages
        schedule = CascadeSchedule.from_sigmas(stages, sigmas.cpu(), self._scales(model_wrap, config), self.solver)
        first = schedule.plans[0]
        is_state = self._is_state(first, noise)
        full = _full_size(latent_image if is_state else noise, first.stage if is_state else None, config)
        seed = extra_args.get("seed") or 0
        draw = ReferenceStageNoise(seed, full, stages, noise.device) if self.reference_noise else StageNoise(seed)
        x = latent_image if is_state else self._noisy(noise, latent_image, first, draw, stages)
        options = extra_args.get("model_options", {})

        with _stage_by_stage(model_wrap) as enter, tqdm(total=schedule.steps, disable=disable_pbar) as bar:
            def predict(x, timestep, stage, cfg):
                mm.throw_exception_if_processing_interrupted()
                if enter(x, cfg):
                    step_cache.restart(options)
                sigma = torch.full((len(x),), stages.sigma(timestep))
                _, t, _ = stages.locate(float(sigma[0]))
                step_cache.before_prediction(options, x, partial(stages.velocity, stage=stage, t=t),
                                             partial(stages.denoised, stage=stage, t=t))
                denoised = model_wrap(x, sigma.to(x), **extra_args)
                return stages.velocity(x, denoised, stage, t)

            def report(step: int, x: Tensor, denoised: Tensor):
                if self.watch is not None:
                    self.watch(denoised)
                if callback is not None:
                    callback(step, denoised, x, schedule.steps)
                bar.update(step + 1 - bar.n)

            return CascadeFlow(stages).sample(predict, x.float(), schedule, draw, report)

    def _scales(self, guider, config: PixelFlowConfig) -> list[float]:
        policy = self.guidance
        if policy == "auto":
            policy = "scaled" if config.num_classes else "constant"
        scales = guidance_scales(policy, getattr(guider, "cfg", 1.0), config.num_stages, self.custom_guidance)
        return scales if "negative" in guider.conds else [1.0] * config.num_stages  # nothing to guide away from

    def _is_state(self, first, noise: Tensor) -> bool:
        if first.stage == 0 and first.times[0] == 0:
            return False
        return self.latent == "state" or self.latent == "auto" and (first.times[0] > 0 or not noise.any())

    def _noisy(self, noise: Tensor, picture: Tensor, first, draw, stages: Stages) -> Tensor:
        """The state at the first step of the schedule, from white noise and, if it is not the very first, a picture."""
        height, width = stage_size(*noise.shape[-2:], first.stage, stages.num_stages)
        noise = noise[..., :height, :width]  # a part of white noise is white
        if first.stage == 0 and first.times[0] == 0:
            return draw.initial(noise)
        if not picture.any():
            raise ValueError(f"Sampling starts in stage {first.stage} from a picture, but the latent is an empty "
                             "canvas: start in stage 0, or encode a picture with the VAE 'pixel_space'.")
        small = shrink(picture, first.stage, stages.num_stages)
        t = noise.new_full((len(noise),), first.times[0])
        return CascadeFlow(stages).add_noise(small, noise, StageTime(first.stage, t))


def _full_size(tensor: Tensor, stage: int | None, config: PixelFlowConfig) -> torch.Size:
    """(B, 3, H, W) at the end of the cascade, for a tensor of that size (stage None) or of a stage's."""
    B, C, H, W = tensor.shape
    if C != config.in_channels:
        raise ValueError(f"This latent has {C} channels, PixelFlow's are the {config.in_channels} colours of the "
                         "picture: take it from 'PixelFlow Canvas', or encode it with the VAE 'pixel_space'.")
    factor = 1 if stage is None else 2 ** (config.num_stages - 1 - stage)
    check_size(H * factor, W * factor, config.size_multiple)
    return torch.Size((B, C, H * factor, W * factor))


class StageNoise:
    """Noise of the jumps. From the CPU, so that a seed means the same on every device; each stage has a stream of its
    own, so the second part of a split schedule draws what the whole would have drawn."""

    def __init__(self, seed: int):
        self.seed = seed

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def __call__(self, stage: int, shape: torch.Size) -> Tensor:
        return block_noise(shape, torch.Generator().manual_seed((self.seed * 1000 + stage) % 2**63))


class ReferenceStageNoise:
    """The global streams of the reference: white noise from the device for stage 0, then from the CPU block after block
    for every jump."""

    def __init__(self, seed: int, full: torch.Size, stages: Stages, device: torch.device):
        self.full, self.stages, self.drawn = full, stages, 0
        self.blocks = torch.Generator().manual_seed(seed % 2**63)
        self.white = self.blocks if device.type == "cpu" else torch.Generator(device).manual_seed(seed % 2**63)

    def initial(self, noise: Tensor) -> Tensor:
        return self(0, noise.shape).to(noise)

    def __call__(self, stage: int, shape: torch.Size) -> Tensor:
        while True:  # a schedule that starts later must first draw what was drawn before it
            height, width = stage_size(*self.full[-2:], self.drawn, self.stages.num_stages)
            shape = (*self.full[:2], height, width)
            if self.drawn == 0:
                noise = torch.randn(shape, generator=self.white, device=self.white.device)
            else:
                noise = block_noise_reference(shape, self.blocks)
            self.drawn += 1
            if self.drawn > stage:
                return noise


@contextmanager
def _stage_by_stage(guider):
    """A context manager that gives `enter(x, cfg)`, which sets a guider to the stage of x and returns whether that is
    another one than before. Restores the guider in the end."""
    conds, cfg, size = guider.conds, getattr(guider, "cfg", None), None
    if any("area" in c for entries in conds.values() for c in entries):
        raise ValueError("PixelFlow's picture grows while it is sampled, so conditioning areas cannot be followed. Use "
                         "masks: Conditioning (Set Mask) with set_cond_area 'default'.")

    def enter(x: Tensor, scale: float) -> bool:
        nonlocal size
        before, size = size, x.shape[-2:]
        if cfg is not None:
            guider.cfg = scale
        guider.conds = {kind: [_at_size(c, size) for c in entries] for kind, entries in conds.items()}
        return before != size

    try:
        yield enter
    finally:
        guider.conds = conds
        if cfg is not None:
            guider.cfg = cfg


def _at_size(cond: dict, size: torch.Size) -> dict:
    mask = cond.get("mask")  # (B, H, W)
    if mask is None or mask.shape[-2:] == size:
        return cond
    return {**cond, "mask": F.interpolate(mask[:, None], size, mode="area")[:, 0]}


def run(model, positive, negative, latent: dict, seed: int, cfg: float, sampler, sigmas: Tensor) -> dict:
    """Sampling as in core's SamplerCustom, for the node that has every setting on it."""
    # Newer empty latents say what they are made for, and core fits those to any model.
    ratios = {name: latent[name] for name in ("downscale_ratio_spacial", "downscale_ratio_temporal") if name in latent}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    samples = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, samples,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**{name: value for name, value in latent.items() if name not in ratios}, "samples": samples}
