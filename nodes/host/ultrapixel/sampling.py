"""UltraPixel's two passes as one ComfyUI SAMPLER: low resolution first, its features kept, then the guided pass."""
from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as mm
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import create_model_options_clone
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ....models_impl.ultrapixel import sampling
from ....models_impl.ultrapixel.guidance import GuidedImage
from ....models_impl.ultrapixel.sampling import COMPRESSION_C, CosineDiffusion
from ..common import step_cache
from ..common.attention import host_attention
from . import guide as ultrapixel
from .guide import Guided, Kept, Plain
from .sizes import MOST_CELLS

REFERENCE_GUIDED_STEPS = 20  # the reference leaves the steps after these unguided
CHANNELS = 16


@dataclass(frozen=True, eq=False)
class GuidedSampler(comfy.samplers.Sampler):
    low_latent: Tensor | None = None
    """(1 or B, 16, h, w): the size of the low-resolution pass, and what it starts from where it is not empty."""
    reference: bool = False
    """The numbers of the original program: one stream of noise, the features of the last step whatever its noise level,
    20 guided steps at most, the rescaling over the whole batch."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        guide, strengths = ultrapixel.guide_of(model_wrap.model_patcher)
        _check(model_wrap, sigmas, noise)
        sigmas = sigmas.float()
        logsnrs, diffusion = -2 * sigmas.cpu().log(), CosineDiffusion()
        steps = len(sigmas) - 1
        keep = steps - 1 if self.reference else sampling.kept_step(diffusion, logsnrs)
        low = self._low(latent_image, noise, sigmas, model_wrap)
        if strengths:
            _check_tokens(low, guide.config.max_tokens)
        source = ReferencePassNoise if self.reference else SeededNoise
        draw = source(noise, extra_args.get("seed") or 0, low.shape)
        total = steps + (keep + 1 if strengths else 0)

        with _two_passes(model_wrap) as conditions, tqdm(total=total, disable=disable_pbar) as bar:
            report = PassProgress(callback, bar, total)
            image = None
            if strengths:
                mask = None if denoise_mask is None else F.interpolate(denoise_mask, low.shape[-2:], mode="area")
                conditions.low(low.shape[-2:])
                model = GuiderPrediction(model_wrap, sigmas, extra_args, draw.low_start, low, mask, report,
                                         self.reference)
                kept = Kept(conditions.positive(), self.reference)

                def features(x, timestep):
                    step_cache.restart(extra_args["model_options"])  # a skipped step has no features
                    model(x, timestep, kept)
                    return kept.features()

                image = GuidedImage(guide, sampling.sample_features(
                    model, features, model.start(), diffusion, logsnrs, draw.low, keep
                ), host_attention(extra_args["model_options"].get("transformer_options", {})))
                conditions.high()
            draw.end_low(keep if strengths else 0, steps)
            step_cache.restart(extra_args["model_options"])
            model = GuiderPrediction(model_wrap, sigmas, extra_args, draw.high_start, latent_image, denoise_mask,
                                     report, self.reference)

            def predict(x, timestep):
                ends = self.reference and model.step >= REFERENCE_GUIDED_STEPS
                return model(x, timestep, None if image is None or ends else Guided(image, strengths, self.reference))

            return diffusion.sample(predict, model.start(), logsnrs, draw.high)

    def _low(self, latent: Tensor, noise: Tensor, sigmas: Tensor, guider) -> Tensor:
        """Clean latent that the low-resolution pass starts from: (B, 16, h, w), zeros for a picture from nothing."""
        B, C, H, W = noise.shape
        low = self.low_latent
        if low is not None:
            _check_low(low, noise)
            if low.any():
                low = guider.inner_model.process_latent_in(low)
            low = comfy.utils.repeat_to_batch_size(low, B).to(noise)
        if low is not None and low.any() or latent is None or not latent.any():
            size = sampling.sizes(H * COMPRESSION_C, W * COMPRESSION_C).low
            return noise.new_zeros(B, C, *size) if low is None else low
        if not noise.any() and sigmas[0] > 0:
            raise ValueError("Sampling continues from a noisy latent here, from which the low-resolution pass cannot "
                             "start. Give the whole schedule to one sampler; to change a picture, connect RandomNoise "
                             "and take the latents from 'UltraPixel Canvas' with the picture.")
        size = sampling.sizes(H * COMPRESSION_C, W * COMPRESSION_C).low if low is None else low.shape[-2:]
        return F.interpolate(latent, size, mode="area")


def _check(guider, sigmas: Tensor, noise: Tensor):
    if not isinstance(guider.inner_model.model_sampling, comfy.model_sampling.StableCascadeSampling):
        raise ValueError("A ModelSampling node has replaced Stable Cascade's noise levels: take it away, and set the "
                         "shift in 'UltraPixel Guide'.")
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise ValueError("UltraPixel Sampler needs a schedule that ends without noise: the guide is made from the end "
                         "of the low-resolution pass. Do not split the sigmas.")
    height, width = noise.shape[-2:]
    if height * width > MOST_CELLS:
        raise ValueError(f"This latent has {width} x {height} cells, which in Stage C is a picture of "
                         f"{round(width * COMPRESSION_C)} x {round(height * COMPRESSION_C)} pixels. Connect the output "
                         "'stage_c' of 'UltraPixel Canvas', not the one of Stage B or an ordinary empty latent.")


def _check_low(low: Tensor, noise: Tensor):
    if low.shape[1] != CHANNELS:
        raise ValueError(f"low_latent has {low.shape[1]} channels, Stage C's latents have {CHANNELS}: connect the "
                         "output 'low' of 'UltraPixel Canvas'.")
    if len(low) not in (1, len(noise)) and low.any():
        raise ValueError(f"low_latent has {len(low)} pictures, the latent {len(noise)}: put the same 'Latent From "
                         "Batch' after both outputs of 'UltraPixel Canvas'.")
    (h, w), (H, W) = low.shape[-2:], noise.shape[-2:]
    if not 0.75 < (w / h) / (W / H) < 1.33:
        raise ValueError(f"low_latent has {w} x {h} cells, the picture {W} x {H}: they are of different shapes. Take "
                         "both from the same 'UltraPixel Canvas'.")


def _check_tokens(low: Tensor, most: int):
    h, w = low.shape[-2:]
    if h * w > most:
        raise ValueError(f"The low-resolution pass has {w} x {h} = {h * w} cells, the guide was trained with at most "
                         f"{most}: connect the output 'low' of 'UltraPixel Canvas' to low_latent, not 'stage_c'.")


class GuiderPrediction:
    """A guider as `sampling` wants it: the noise in a variance-preserving x, one level after the other."""

    def __init__(self, guider, sigmas: Tensor, extra_args: dict, noise: Tensor, latent: Tensor, mask: Tensor | None,
                 report: PassProgress, whole_batch: bool):
        self.guider, self.sigmas, self.extra_args, self.report = guider, sigmas, extra_args, report
        self.noise, self.latent, self.mask, self.whole_batch = noise, latent, mask, whole_batch
        self.step = 0
        self.masked = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
        self.masked.noise, self.masked.latent_image = noise, latent

    def start(self) -> Tensor:
        levels = self.guider.inner_model.model_sampling
        full = comfy.samplers.Sampler().max_denoise(self.guider, self.sigmas)
        noisy = levels.noise_scaling(self.sigmas[0], self.noise, self.latent, full)
        return noisy / (1 + self.sigmas[0] ** 2).sqrt()

    def __call__(self, x: Tensor, timestep: Tensor, run: Plain | None = None) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        options = create_model_options_clone(self.extra_args["model_options"])
        run = run or Plain(self.whole_batch)
        run.size = tuple(x.shape[-2:])
        options.setdefault("transformer_options", {})[ultrapixel.KEY] = run
        sigma, self.step = self.sigmas[self.step], self.step + 1
        noisy = x * (1 + sigma**2).sqrt()
        step_cache.at_sigma(options, noisy, sigma)
        denoised = self.masked(noisy, sigma.expand(len(x)), self.mask, options, self.extra_args.get("seed"))
        self.report(noisy, denoised)
        return (noisy - denoised) / sigma


class PassProgress:
    """Steps and previews of both passes in one count."""

    def __init__(self, callback, bar, total: int):
        self.callback, self.bar, self.total, self.done = callback, bar, total, 0

    def __call__(self, x: Tensor, denoised: Tensor):
        if self.callback is not None:
            self.callback(self.done, denoised, x, self.total)
        self.done += 1
        self.bar.update(1)


class SeededNoise:
    """Noise from a stream of its own for every picture and pass, so that neither the low-resolution pass nor the other
    pictures of a batch change a picture's noise. The streams follow from the picture's own first noise: it comes out
    the same without its batch. All from the CPU, so that a seed means the same on every device."""

    def __init__(self, noise: Tensor, seed: int, low: torch.Size):
        marks = [hashlib.sha256(row.float().cpu().numpy().tobytes()).digest() for row in noise]
        self.streams = {}
        for name in ("low", "high"):  # the same noise twice, for example none: the second is the seed's second picture
            seeds = [hashlib.sha256(f"{name} {seed} {marks[:i].count(mark)} ".encode() + mark).digest()
                     for i, mark in enumerate(marks)]
            self.streams[name] = [torch.Generator().manual_seed(int.from_bytes(s[:8], "big")) for s in seeds]
        self.high_start = noise
        self.low_start = self.low(0, low).to(noise)

    def low(self, step: int, shape: torch.Size) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=stream) for stream in self.streams["low"]])

    def high(self, step: int, shape: torch.Size) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=stream) for stream in self.streams["high"]])

    def end_low(self, drawn: int, steps: int):
        pass


class ReferencePassNoise:
    """One global stream: the noise of the picture and of the low-resolution pass from the CPU, then that of every step
    from the device. So the picture's noise moves with the number of steps and the size of the low-resolution pass."""

    def __init__(self, noise: Tensor, seed: int, low: torch.Size):
        host = torch.Generator().manual_seed(seed % 2**63)
        on_cpu = noise.device.type == "cpu"
        self.device, self.low_shape = noise.device, low
        self.stream = host if on_cpu else torch.Generator(noise.device).manual_seed(seed % 2**63)
        start = torch.randn(noise.shape, generator=host).to(noise)
        self.high_start = start if noise.any() else noise  # what DisableNoise asks for is none
        self.low_start = torch.randn(low, generator=host).to(noise)

    def low(self, step: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.stream, device=self.device)

    high = low

    def end_low(self, drawn: int, steps: int):
        """The reference runs the low-resolution pass to its end."""
        for step in range(drawn, steps):
            self.low(step, self.low_shape)


@contextmanager
def _two_passes(guider):
    """A context manager that sets a guider to the current pass, and resets it in the end."""
    conds = guider.conds
    if any("area" in c for entries in conds.values() for c in entries):
        raise ValueError("UltraPixel draws at two sizes, so conditioning areas cannot be followed. Use masks: "
                         "Conditioning (Set Mask) with set_cond_area 'default'.")
    try:
        yield PassConditions(guider, conds)
    finally:
        guider.conds = conds


class PassConditions:
    def __init__(self, guider, conds: dict):
        self.guider, self.conds = guider, conds

    def positive(self) -> dict[object, Tensor]:
        """id -> weight (n, 1, h or 1, w or 1) at the size of the current pass."""
        return {c["uuid"]: _weight(c) for c in self.guider.conds["positive"]}

    def low(self, size: torch.Size):
        self.guider.conds = {kind: [_at_size(c, size) for c in entries] for kind, entries in self.conds.items()}

    def high(self):
        """ControlNets act only on the low-resolution pass, as in the release."""
        self.guider.conds = {kind: [{k: v for k, v in c.items() if k != "control"} for c in entries]
                             for kind, entries in self.conds.items()}


def _at_size(cond: dict, size: torch.Size) -> dict:
    mask = cond.get("mask")  # (B, H, W)
    return cond if mask is None else {**cond, "mask": F.interpolate(mask[:, None], size, mode="area")[:, 0]}


def _weight(cond: dict) -> Tensor:
    """Weights by which core multiplies the prediction before it takes the mean."""
    mask = cond["mask"][:, None] * cond.get("mask_strength", 1.0) if "mask" in cond else torch.ones(1, 1, 1, 1)
    return mask * cond.get("strength", 1.0)
