"""Core's EasyCache and LazyCache, which skip steps, on our models (comfy_extras/nodes_easycache.py).

Both keep the difference between what goes into a call and what comes out, and add it to the input of a step that they
skip. Core's holder of it needs two things of ours. It starts anew where the size of the picture changes, but with an
estimated change of 0, so that it would skip from there on. And LazyCache's difference is that of a whole prediction,
the denoised picture less the noisy one, which falls with the noise level: kept as a rate (a noise prediction or a
velocity) it stays right from step to step.
"""
from __future__ import annotations

from collections.abc import Callable

from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP
from torch import Tensor

KEY = "pixstack_step_cache"
HOLDER = "easycache"  # in transformer_options, for both of core's nodes


def holder_of(model_options: dict):
    """Core's holder of this run, or None."""
    return model_options.get("transformer_options", {}).get(HOLDER)


def restart(model_options: dict):
    """Forget all differences: the next call is not skipped. For a change of size, and for a call that must be made."""
    holder = holder_of(model_options)
    if holder is None or not hasattr(holder, "reset"):
        return
    skipped = getattr(holder, "total_steps_skipped", 0)
    holder.reset()
    holder.relative_transformation_rate, holder.total_steps_skipped = None, skipped


def before_prediction(model_options: dict, x: Tensor, rate: Callable[[Tensor, Tensor], Tensor],
                      denoised: Callable[[Tensor, Tensor], Tensor], scale: float | Tensor = 1.0):
    """Have LazyCache keep rate(x, denoised) of this step, and skip to denoised(x, rate), at its own noise level.

    x: what is predicted from, (B, C, H, W); LazyCache measures its change from step to step, times `scale`.
    """
    holder = holder_of(model_options)
    if holder is None or not hasattr(holder, "reset"):
        return
    if "reset" not in vars(holder):
        reset = holder.reset

        def reset_without_estimate():
            reset()
            holder.relative_transformation_rate = None
            return holder

        holder.reset = reset_without_estimate
    if not hasattr(holder, "cache_diff"):  # EasyCache keeps the network's output, which is a rate
        return
    subsample, start = type(holder).subsample, x.data_ptr()

    def scaled(value: Tensor, clone: bool = True) -> Tensor:
        part = subsample(holder, value, clone)
        return part * scale if value.data_ptr() == start else part

    def update(output: Tensor, x: Tensor):
        holder.cache_diff = rate(x, output)

    def apply(x: Tensor) -> Tensor:
        holder.total_steps_skipped += 1
        return denoised(x, holder.cache_diff.to(x.device))

    holder.subsample, holder.update_cache_diff, holder.apply_cache_diff = scaled, update, apply


def at_sigma(model_options: dict, x: Tensor, sigma: Tensor, exploding: bool = True):
    """`before_prediction` where denoised = x - sigma * rate. exploding: x is a sample + sigma * noise, whose size falls
    with sigma, so its change is measured at variance one; else a mean of both, as in rectified flow."""
    sigma = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
    before_prediction(model_options, x, lambda x, denoised: (x - denoised) / sigma, lambda x, rate: x - sigma * rate,
                      (1 + sigma**2).rsqrt() if exploding else 1.0)


def attach(patched):
    """The ModelPatcher of a model with sigmas, prepared before core's wrappers can be added."""
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    return patched


def _predict_noise(executor, x, timestep, model_options=None, seed=None):
    exploding = not isinstance(executor.class_obj.inner_model.model_sampling, CONST)
    at_sigma(model_options or {}, x, timestep, exploding)
    return executor(x, timestep, model_options, seed)


def on_a_copy(patched):
    """The ModelPatcher of a model whose network gets the sampler's own x: EasyCache writes into what it is given."""
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _copied)
    return patched


def _copied(executor, x, *args, **kwargs):
    return executor(x.clone(), *args, **kwargs)
