"""The samplers of the PixArt releases as ComfyUI SAMPLERs, where core has none of its own or computes something else.

They work on latents of variance one (alpha * latent + std * noise), core on latent + sigma * noise: the two differ by
the factor alpha of the timestep.
"""
from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management as mm
import comfy.samplers
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from tqdm.auto import tqdm

from ....models_impl.pixart import sampling
from .model import DiffusionSampling, config_of


def diffusion_of(model) -> sampling.PixArtDiffusion:
    """The noise of a MODEL or of a guider's model; refuses those that are not of the discrete kind."""
    inner = getattr(model, "model", model)
    patched = model.get_model_object("model_sampling") if hasattr(model, "get_model_object") else inner.model_sampling
    if not isinstance(patched, DiffusionSampling):
        raise ValueError(f"This MODEL samples with {type(patched).__name__}, not with PixArt's schedule: load it with "
                         "'Load PixArt Model' and take ModelSampling nodes away.")
    return patched.diffusion


@dataclass(frozen=True)
class ReferenceSampler(comfy.samplers.Sampler):
    algorithm: str = "dpm-solver++"
    """Name in `sampling.ALGORITHMS`."""
    order: int = 2
    eta: float = 1.0
    inpaint: str = "core"
    """core: the mask is blended before and after each call of the network, as with every core sampler. reference:
    after each step, with the picture noised to the next timestep and the mask cut hard (pipeline_pixart_inpaint.py)."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        diffusion, algorithm = diffusion_of(model_wrap.inner_model), sampling.ALGORITHMS[self.algorithm]
        schedule = diffusion.schedule
        timesteps = schedule.timesteps(sigmas)
        steps = len(timesteps) - 1
        if algorithm.one_step and steps != 1:
            raise ValueError(f"{self.algorithm} draws in one step, but these SIGMAS have {steps}. Take them from "
                             "'PixArt Sigmas' with schedule 'dmd (one step)', or another algorithm.")
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        x = self._start(model_wrap, sigmas, timesteps[0], diffusion, noise, latent)
        extra_args = dict(extra_args)
        network, after_step = model_wrap, None
        if denoise_mask is not None and self.inpaint == "reference":
            after_step = _blend(diffusion, noise, latent, (denoise_mask > 0.5).to(noise))
        elif denoise_mask is not None:
            network = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
            network.noise, network.latent_image = noise, latent
            extra_args["denoise_mask"] = denoise_mask
        variance = None
        if algorithm.learned_variance:
            variance = LearnedVariance(model_wrap)
            extra_args["model_options"] = variance.asked(extra_args["model_options"], algorithm.guided_channels)

        def predict(x, timestep):
            mm.throw_exception_if_processing_interrupted()
            sigma, exploding = schedule.sigma(timestep), x / schedule.alpha(timestep)
            denoised = network(exploding, x.new_full((len(x),), sigma), **extra_args)
            eps = (exploding - denoised) / sigma
            return eps if variance is None else torch.cat([eps, variance.logits], dim=1)

        with tqdm(total=steps, disable=disable_pbar) as bar:
            def report(index, x, denoised):
                if callback is not None:
                    callback(index, denoised, x, steps)
                bar.update(index + 1 - bar.n)

            x = diffusion.sample(
                predict, x.float(), timesteps, _noise(extra_args.get("seed"), timesteps, noise), report, self.algorithm,
                self.order, self.eta, after_step,
            )
        if timesteps[-1] <= 0 and denoise_mask is not None and after_step is None:
            x = denoise_mask * x + (1 - denoise_mask) * latent  # the released schedules end with a rest of noise
        if timesteps[-1] > 0:  # a part of a schedule: handed on as core's samplers do
            x = x / schedule.alpha(timesteps[-1])
        return x

    def _start(self, model_wrap, sigmas, timestep, diffusion, noise, latent):
        if sampling.ALGORITHMS[self.algorithm].one_step or self.max_denoise(model_wrap, sigmas):
            return noise  # pure noise, also where the schedule does not quite reach it
        return diffusion.add_noise(latent, noise, timestep)


def _noise(seed: int | None, timesteps: list[float], like: Tensor):
    """fn(index, shape): from the CPU, so that a seed means the same on every device, and from a stream of the step's
    own timestep, so that the second part of a split schedule draws what the whole would have drawn."""

    def draw(index: int, shape) -> Tensor:
        generator = torch.Generator().manual_seed(((seed or 0) * 1_000_003 + round(timesteps[index] * 1000)) % 2**63)
        return torch.randn(shape, generator=generator).to(like)

    return draw


def _blend(diffusion, noise: Tensor, latent: Tensor, mask: Tensor):
    def after_step(x: Tensor, timestep: float | None) -> Tensor:
        kept = latent
        if timestep is not None:
            kept = diffusion.add_noise(latent, noise, timestep)
        return (1 - mask) * kept + mask * x

    return after_step


class LearnedVariance:
    """A wrapper of core's calc_cond_batch that asks a network for its variance beside the noise.

    The network finds room for it behind the latent's channels, so that core does with the variance what it does with a
    prediction: masks, areas, hooks, the split of a batch. Guidance sees the latent's channels only.
    """

    def __init__(self, guider):
        config = config_of(guider.inner_model)
        if config.out_channels == config.in_channels:
            raise ValueError("IDDPM needs the variance that PixArt predicts beside the noise, and this model predicts "
                             "none: use another sampler.")
        self.guider = guider
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Those of the positive prompt, (B, C, H, W): the last that the network gave."""
        if self._logits is None:
            raise ValueError("IDDPM needs the variance that PixArt predicts beside the noise, and this guider asks for "
                             "none: use CFGGuider, or another sampler.")
        return self._logits

    def asked(self, model_options: dict, guided_channels: int) -> dict:
        """Options of a run that asks for it, in which guidance moves these channels unless a node has set its own."""
        options = create_model_options_clone(model_options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "pixart_variance", self, options, is_model_options=True)
        options.setdefault("sampler_cfg_function", lambda args: sampling.guided(
            args["cond"], args["uncond"], args["cond_scale"], guided_channels))
        return options

    def __call__(self, executor, model, conds, x: Tensor, timestep, model_options):
        answers = executor(model, conds, torch.cat([x, torch.zeros_like(x)], dim=1), timestep, model_options)
        positive = self.guider.conds.get("positive")
        place = next((i for i, cond in enumerate(conds) if cond is positive), 0)
        predictions, logits = zip(*(answer.chunk(2, dim=1) for answer in answers), strict=True)
        known, new = self._logits, logits[place]
        self._logits = new if known is None else torch.where(new.isnan(), known, new)  # a cache answered: the last ones
        return [prediction.contiguous() for prediction in predictions]


def sigmas(schedule: sampling.NoiseSchedule, name: str, steps: int, denoise: float = 1.0) -> Tensor:
    """(steps + 1,) sigmas, high to low. denoise below 1: the last `steps` of a schedule of steps / denoise."""
    total = max(steps, round(steps / denoise))
    try:
        timesteps = sampling.SCHEDULES[name](total, schedule.steps)
    except ValueError as error:
        raise ValueError(f"The schedule {name!r} cannot have {steps} steps at denoise {denoise:g}, which are the last "
                         f"of {total}: {error}") from error
    return schedule.sigmas(timesteps[-(steps + 1):])


def one_step_sigmas(schedule: sampling.NoiseSchedule, timestep: float) -> Tensor:
    return schedule.sigmas(sampling.one_step(timestep))
