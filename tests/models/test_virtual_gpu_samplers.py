"""Every sampler's loop and every formula of training, on a virtual GPU (virtual_gpu.py), without float64."""
from __future__ import annotations

from functools import partial

import pytest
import torch
import virtual_gpu
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.objective.loss import min_snr_weight
from pixstack.models_impl.pixart import sampling as pixart
from pixstack.models_impl.pixelflow import packing
from pixstack.models_impl.pixelflow import sampling as pixelflow
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule
from pixstack.models_impl.pixelflow.stages import Stages
from pixstack.models_impl.ultrapixel import sampling as ultrapixel
from virtual_gpu import GPU, in_steps

SCHEDULE, STAGES, CASCADE = pixart.NoiseSchedule(), Stages(), ultrapixel.CosineDiffusion()
FLOW, FLOW_OF_STAGES = RectifiedFlow(), pixelflow.CascadeFlow(STAGES)


def latent(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def same(x, *_):
    """Stands in for a network."""
    return torch.empty_like(x)


def two(x, *_):
    """Stands in for a network that predicts its variance too."""
    return torch.cat([same(x), same(x)], dim=1)


def from_cpu(index, shape):
    """Noise as the nodes draw it, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))


def from_gpu(index, shape):
    return torch.randn(shape, generator=torch.Generator(GPU).manual_seed(index), device=GPU)


# --- Loops

def pixart_loop(sampler, predict, timesteps, *more, dtype, **named):
    return lambda steps: sampler(predict, latent(2, 4, 128, 128, dtype=dtype), SCHEDULE, timesteps(steps), *more,
                                 **named)


def blended(x, timestep):
    """As the nodes keep the known part of an inpainting."""
    return x if timestep is None else SCHEDULE.add_noise(x, torch.empty_like(x), timestep)


PIXART = {
    "dpm-solver++ of order 2": (pixart.dpm_solver_pp, same, pixart.time_uniform),
    "dpm-solver++ of order 3": (pixart.dpm_solver_pp, same, pixart.time_uniform, 3),
    "dpm-solver of diffusers": (pixart.dpm_diffusers, same, pixart.linspace_timesteps),
    "sa-solver": (pixart.sa_solver, same, pixart.time_uniform, from_cpu),
    "sa-solver of order 3": (pixart.sa_solver, same, pixart.time_uniform, from_cpu, 3, 3),
    "iddpm": (pixart.iddpm, two, pixart.iddpm_timesteps, from_cpu),
    "lcm": (pixart.lcm, same, pixart.lcm_timesteps, from_cpu),
}
SHORT = {"lcm": (4, 8), "dpm-solver of diffusers": (20, 25)}  # steps; the others take 5 and 10


def stage_noise(draw, generator):
    return lambda stage, shape: draw(shape, generator().manual_seed(stage)).to(GPU)


def pixelflow_loop(noise, dtype, side=32, **settings):
    return lambda steps: FLOW_OF_STAGES.sample(same, latent(2, 3, side, side, dtype=dtype),
                                               CascadeSchedule.build(STAGES, steps, **settings), noise)


def of_sigmas(dtype):
    def loop(steps):
        schedule = CascadeSchedule.from_sigmas(STAGES, CascadeSchedule.build(STAGES, steps).sigmas())
        return FLOW_OF_STAGES.sample(same, latent(2, 3, 32, 32, dtype=dtype), schedule,
                                     stage_noise(pixelflow.block_noise, torch.Generator))

    return loop


PIXELFLOW = {
    "euler": partial(pixelflow_loop, stage_noise(pixelflow.block_noise, torch.Generator)),
    "euler, noise of the GPU": partial(pixelflow_loop, stage_noise(
        pixelflow.block_noise, lambda: torch.Generator(GPU))),
    "euler, noise as the reference draws it": partial(pixelflow_loop, stage_noise(
        pixelflow.block_noise_reference, torch.Generator), side=8),
    "euler from sigmas": of_sigmas,
    "dopri5": partial(pixelflow_loop, stage_noise(pixelflow.block_noise, torch.Generator), solver="dopri5"),
    "dopri5 of the reference": partial(pixelflow_loop, stage_noise(pixelflow.block_noise, torch.Generator),
                                       solver="dopri5_reference"),
}


def cascade_loop(noise, dtype):
    return lambda steps: ultrapixel.sample_guided(
        same, lambda x, timestep: None, same, latent(1, 16, 24, 24, dtype=dtype), latent(1, 16, 96, 96, dtype=dtype),
        CASCADE, CASCADE.steps(steps), noise, noise)


def flux_loop(dtype):
    return lambda steps: FLOW.sample(same, latent(1, 16, 128, 128, dtype=dtype), FLOW.schedule(steps, 4096))


def loops(dtype) -> dict:
    return {
        **{f"PixArt {name}": (pixart_loop(*made, dtype=dtype), *SHORT.get(name, (5, 10)))
           for name, made in PIXART.items()},
        "PixArt dmd": (lambda times: [pixart.dmd(same, latent(2, 4, 64, 64, dtype=dtype), SCHEDULE, pixart.one_step())
                                      for _ in range(times)], 1, 2),
        "PixArt with a known part": (pixart_loop(pixart.dpm_solver_pp, same, pixart.time_uniform, dtype=dtype,
                                                 after_step=blended), 5, 10),
        **{f"PixelFlow {name}": (made(dtype), 3, 6) for name, made in PIXELFLOW.items()},
        "UltraPixel": (cascade_loop(from_cpu, dtype), 5, 10),
        "UltraPixel, noise of the GPU": (cascade_loop(from_gpu, dtype), 5, 10),
        "FLUX": (flux_loop(dtype), 5, 10),
    }


# --- Formulas of training, a step each

def often(formula):
    return lambda times: [formula() for _ in range(times)]


def whole(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def pixart_step(snr: bool, on_gpu: bool = False):
    x, timestep = latent(4, 8, 64, 64, dtype=torch.float32), whole(4).to(GPU) if on_gpu else whole(4)
    eps, logits = x.chunk(2, dim=1)
    return pixart.iddpm_loss(eps, logits, eps, eps, timestep, SCHEDULE, snr)


def lcm_step():
    x = latent(4, 4, 64, 64)
    return pixart.lcm_distillation(same, same, same, same, x, x, whole(4), pixart.LcmGrid(SCHEDULE))


def dmd_step():
    x = latent(4, 4, 64, 64)
    return pixart.dmd_loss(x, x, x, x, whole(4), SCHEDULE)


def pixelflow_step():
    packed = packing.pack(
        latent(8, 3, 64, 64, dtype=torch.float32), FLOW_OF_STAGES.draw(8, torch.Generator()),
        lambda k, shape: torch.randn(shape, device=GPU), FLOW_OF_STAGES, 4, [5] * 8)
    return packing.packed_loss(packed.target, packed.target, packed.layout)


def cascade_step():
    x = latent(4, 16, 24, 24, dtype=torch.float32)
    logsnr = CASCADE.logsnr(CASCADE.draw(4, torch.Generator(GPU)))
    return ultrapixel.add_noise(x, x, logsnr), CASCADE.timestep(logsnr), ultrapixel.p2_weight(logsnr)


def flux_step():
    x = latent(2, 16, 64, 64, dtype=torch.float32)
    sigma = latent(2, dtype=torch.float32).sigmoid()
    return FLOW.loss(FLOW.add_noise(x, x, sigma), x, x, sigma)


FORMULAS = {
    "PixArt's loss": partial(pixart_step, False),
    "PixArt's loss, timesteps on the GPU": partial(pixart_step, True, on_gpu=True),
    "PixArt's min-SNR weight": lambda: min_snr_weight(SCHEDULE.snr(whole(4)), 5.0, "v"),
    "PixArt LCM's distillation": lcm_step,
    "PixArt DMD's loss": dmd_step,
    "PixelFlow's packing and loss": pixelflow_step,
    "UltraPixel's noise and weight": cascade_step,
    "FLUX's loss": flux_step,
}
REHEARSALS = {
    **{f"{name}, bf16": partial(in_steps, *loop) for name, loop in loops(torch.bfloat16).items()},
    **{f"{name}, fp16": partial(in_steps, *loop) for name, loop in loops(torch.float16).items()},
    **{f"{name}, training": partial(in_steps, often(formula), 1, 2) for name, formula in FORMULAS.items()},
}


@pytest.mark.parametrize("rehearsal", REHEARSALS)
def test_a_loop_runs_on_a_gpu_without_float64(rehearsal, rehearsed_on_gpu):
    virtual_gpu.check(rehearsal.rpartition(", ")[0], rehearsed_on_gpu[rehearsal])
