"""Parity adapters of PixArt's samplers and training formulas. The networks are the toy denoisers of the cases."""
from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from pixstack.models_impl.pixart import sampling

from .registry import TOLERANCE, adapter

RHO = 7.0  # of the curve of Karras et al.


def toy(x, timestep, cond=None):
    if isinstance(timestep, torch.Tensor):
        timestep = timestep.view(-1, 1, 1, 1)
    eps = 0.3 * x * (0.5 + timestep / 1000) + 0.05 * x.roll(1, -1) + 0.1
    return eps if cond is None else eps + 0.2 * cond


def noise_schedule(config) -> sampling.NoiseSchedule:
    kind = config.get("beta_schedule", config.get("schedule", "linear"))
    known = {name: config[name] for name in ("beta_start", "beta_end") if name in config}
    return sampling.NoiseSchedule(kind, config.get("num_timesteps", sampling.TRAIN_TIMESTEPS), **known)


class Recorder:
    """The network of a sampler case, with the times at which it is called and the states that follow."""

    def __init__(self, case):
        self.cond, self.uncond = case.inputs.get("cond"), case.inputs.get("uncond")
        self.cfg = case.config.get("cfg_scale", 1.0)
        self.model_times, self.denoised, self.states = [], [], []

    def predict(self, x, timestep):
        self.model_times.append(timestep)
        eps = toy(x, timestep, self.cond)
        if self.uncond is None:
            return eps
        unguided = toy(x, timestep, self.uncond)
        return unguided + self.cfg * (eps - unguided)

    def predict_with_variance(self, x, timestep):
        return torch.cat([self.predict(x, timestep), 0.4 * torch.tanh(x)], dim=1)

    def callback(self, index, x, denoised):
        assert index == len(self.denoised)
        self.denoised.append(denoised)

    def after_step(self, x, timestep):
        self.states.append(x)
        return x

    @property
    def hooks(self):
        return {"callback": self.callback, "after_step": self.after_step}


@adapter("pixart", "sampler")
def sampler(case):
    c, x = case.config, case.inputs["x"]
    schedule, heard = noise_schedule(c), Recorder(case)
    timesteps, results = SAMPLERS[c["algorithm"]](case, schedule, heard)
    results = {
        "x": heard.states[-1],
        "model_times": torch.tensor(heard.model_times),
        "timesteps": torch.tensor(timesteps[:-1]).round().long(),
        "sigmas": schedule.sigmas(timesteps),
        "denoised": torch.stack(heard.denoised),
        **results,
    }
    if "trajectory" not in results:
        states = [x, *heard.states] if case.outputs["trajectory"].shape[0] > len(heard.states) else heard.states
        results["trajectory"] = torch.stack(states)
    return {name: (value, TOLERANCE * float32_noise(c)) for name, value in results.items()}


def float32_noise(c) -> float:
    """How many times TOLERANCE the reference is from itself in float64, measured with its own code.

    SA-Solver's powers of lambda cancel above order 2, the more the smaller the steps; the times of the other spacings
    come from log SNR and back. Ours is in float64 and meets the reference in float64 to 1e-9.
    """
    if c.get("skip_type") in ("logSNR", "karras"):
        return 10
    order = max(c.get("predictor_order", 2), c.get("corrector_order", 2))
    return max(1, c["steps"] / 10) ** (order - 1) if order > 2 else 1


def only_released(c, **released):
    """Skips what the reference's solvers can do beside, which no release draws with and nothing here does."""
    for name, value in released.items():
        if c.get(name, value) != value:
            pytest.skip(f"no PixArt draws with {name}={c[name]!r}, and so it is not here: only {value!r} is")


def spaced(c, schedule):
    """The timesteps of a case. PixArt draws with those even in time; the reference has others, which a solver must be
    able to walk as well."""
    skip, steps = c.get("skip_type", "time"), c["steps"]
    if skip in ("time", "time_uniform") and c.get("skip_order", 1) == 1:
        return sampling.time_uniform(steps, schedule.steps)
    return {"time_quadratic": quadratic, "logSNR": partial(between, curve=math.log, inverse=math.exp),
            "karras": partial(between, curve=lambda s: min(s, 80.0) ** (1 / RHO), inverse=lambda r: r**RHO),
            }[skip](steps, schedule)


def quadratic(steps, schedule):
    """Even in the square root of time."""
    roots = [1 + (schedule.steps**-0.5 - 1) * i / steps for i in range(steps)]
    return [root**2 * schedule.steps - 1 for root in roots] + [0.0]


def between(steps, schedule, curve, inverse):
    """Even in a curve of sigma: its logarithm, or its root (arXiv 2206.00364, eq. 5)."""
    first, last = curve(schedule.sigma(schedule.steps - 1)), curve(schedule.sigma(0))
    return [schedule.timestep(inverse(first + (last - first) * i / steps)) for i in range(steps)] + [0.0]


def leading(steps, train_steps):
    """diffusers' "leading", which no PixArt pipeline uses: whole multiples of the same stride, then clean."""
    return [*(float(i * (train_steps // (steps + 1))) for i in range(steps, 0, -1)), sampling.CLEAN]


def dpm_solver_pp(case, schedule, heard):
    c = case.config
    assert c.get("method", "multistep") == "multistep", f"there is no {c['method']} DPM-Solver++ here"
    only_released(c, solver_type="dpmsolver", lower_order_final=True)
    timesteps = spaced(c, schedule)
    sampling.dpm_solver_pp(heard.predict, case.inputs["x"], schedule, timesteps, c["order"], **heard.hooks)
    return timesteps, {}


def dpm_diffusers(case, schedule, heard):
    c = case.config
    spacing = {"linspace": sampling.linspace_timesteps, "leading": leading,
               "trailing": sampling.trailing_timesteps}[c.get("timestep_spacing", "linspace")]
    timesteps = spacing(c["steps"], schedule.steps)
    if c.get("final_sigmas_type", "zero") == "sigma_min":
        timesteps[-1] = 0.0
    sampling.dpm_diffusers(
        heard.predict, case.inputs["x"], schedule, timesteps, c.get("solver_order", 2), **heard.hooks
    )
    return timesteps, {}


def sa_solver(case, schedule, heard):
    c, timesteps = case.config, spaced(case.config, schedule)
    only_released(c, pc_mode="PEC", mode="few_steps")
    sampling.sa_solver(
        heard.predict, case.inputs["x"], schedule, timesteps,
        lambda index, shape: case.inputs["noise"][index + 1],  # the reference throws its first draw away
        c["predictor_order"], c["corrector_order"], c["eta"], **heard.hooks,
    )
    return timesteps, {}


def iddpm(case, schedule, heard):
    timesteps = sampling.iddpm_timesteps(case.config["steps"], schedule.steps)
    noise = case.inputs["noise"]
    sampling.iddpm(
        heard.predict_with_variance, case.inputs["x"], schedule, timesteps, lambda index, shape: noise[index],
        **heard.hooks,
    )
    return timesteps, {}


def lcm(case, schedule, heard):
    timesteps = sampling.lcm_timesteps(case.config["steps"], schedule.steps, case.config["lcm_origin_steps"])
    noise = case.inputs.get("noise")
    sampling.lcm(
        heard.predict, case.inputs["x"], schedule, timesteps, lambda index, shape: noise[index], **heard.hooks
    )
    if len(timesteps) > 2:  # the reference noises the last estimate once more, to the timestep it was made at
        heard.states[-1] = schedule.add_noise(heard.states[-1], noise[len(timesteps) - 2], timesteps[-2])
    return timesteps, {}


SAMPLERS = {
    "dpmsolver++": dpm_solver_pp,
    "diffusers.DPMSolverMultistepScheduler": dpm_diffusers,
    "sa_solver": sa_solver,
    "iddpm": iddpm,
    "lcm": lcm,
}


@adapter("pixart", "iddpm_loss")
def iddpm_loss(case):
    i, c = case.inputs, case.config
    schedule = noise_schedule(c)
    learned = c.get("learn_sigma", True) and c.get("pred_sigma", True)
    eps, logits = i["model_output"].chunk(2, dim=1) if learned else (i["model_output"], None)
    noisy = schedule.add_noise(i["x_start"], i["noise"], i["timestep"])
    loss = sampling.iddpm_loss(eps, logits, i["x_start"], i["noise"], i["timestep"], schedule, c.get("snr", False))
    results = {
        "x_t": noisy,
        "pred_xstart": schedule.denoised(noisy, eps, i["timestep"]),
        "mse": loss.mse,
        "vb": loss.vb,
        "loss": loss.total,
        "model_time": i["timestep"],
    }
    return {name: (value, TOLERANCE) for name, value in results.items()}


@adapter("pixart", "lcm", unused={"w_embedding": "sines of up to 14,000 radians, for students that are conditioned on "
                                  "their guidance; PixArt-delta is not"})
def lcm_distillation(case):
    i, c = case.inputs, case.config
    schedule = sampling.NoiseSchedule(steps=c.get("train_sampling_steps", sampling.TRAIN_TIMESTEPS))
    grid = sampling.LcmGrid(schedule, c["num_ddim_timesteps"])
    step = sampling.lcm_distillation(
        lambda x, t: toy(x, t, i["y"]),
        lambda x, t: 0.9 * toy(x, t, i["y"]),
        lambda x, t: 0.9 * toy(x, t, i["null_y"]),
        lambda x, t: 1.05 * toy(x, t, i["y"]),
        i["latents"], i["noise"], i["index"], grid, c["cfg_scale"], c["loss_type"], c.get("huber_c", sampling.HUBER_C),
    )
    start, end = grid.pair(i["index"])
    c_skip_start, c_out_start = sampling.consistency_weights(start)
    c_skip, c_out = sampling.consistency_weights(end)
    results = {
        "start_timesteps": start, "timesteps": end,
        "c_skip_start": c_skip_start, "c_out_start": c_out_start, "c_skip": c_skip, "c_out": c_out,
        "ddim_alpha_cumprods": grid.alphas_cumprod, "ddim_alpha_cumprods_prev": grid.alphas_cumprod_before,
        "noisy_model_input": step.noisy, "pred_x0_student": step.student_denoised, "model_pred": step.prediction,
        "pred_x0_teacher": step.teacher_denoised, "pred_noise_teacher": step.teacher_eps, "x_prev": step.before,
        "target": step.target, "loss": step.loss.view(1),
    }
    return {name: (value, TOLERANCE) for name, value in results.items()}


@adapter("pixart", "dmd")
def dmd(case):
    i, c, schedule = case.inputs, case.config, sampling.NoiseSchedule()
    generated = sampling.dmd(lambda x, t: toy(x, t, i["y"]), i["z"], schedule, sampling.one_step(c["one_step_maxt"]))
    noisy = schedule.add_noise(generated, i["noise"], i["timestep"])
    uncond, cond = (0.9 * toy(noisy, i["timestep"], y) for y in (i["null_y"], i["y"]))
    fake = 1.1 * toy(noisy, i["timestep"], i["y"])
    loss = sampling.dmd_loss(generated, noisy, uncond + c["cfg"] * (cond - uncond), fake, i["timestep"], schedule)
    results = {
        "generated": generated, "noisy": noisy, "coeff": loss.direction, "weight": loss.weight,
        "pred_x0_real": loss.real_denoised, "dm_loss": loss.loss.view(1),
        "fake_loss": sampling.eps_loss(fake, i["noise"]).mean().view(1),
    }
    # The reference's scheduler is in float32, where 1 - alphas_cumprod of timestep 1 is off by up to 5e-4 of itself,
    # and the weight, the inverse of an error in proportion to its root, by half of that.
    weight = case.outputs["weight"]
    tolerance = 3e-4 * weight.max().item() / max(1.0, weight.std(correction=0).item())
    return {name: (value, tolerance if name == "weight" else TOLERANCE) for name, value in results.items()}
