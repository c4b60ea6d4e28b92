"""What is wrong with [noise], [loss] and data.masks, for the recipe that is to read them."""
from __future__ import annotations

import dataclasses

from .problems import Problems
from .schema import Config, Loss, Noise, look_up

TIMESTEPS = 1000
DISTRIBUTIONS = "released", "uniform", "logit_normal"
KINDS = "mse", "mae", "huber", "pseudo_huber"
SCHEDULES = "constant", "exponential", "snr"
MASKS = "", "alpha", "files"


def problems(config: Config) -> list[str]:
    return [*of_timesteps(config.noise), *of_noise(config.noise), *of_loss(config.loss), *of_masks(config),
            *unread(config)]


def of_timesteps(noise: Noise) -> list[str]:
    problems, low, high = Problems(), noise.min_timestep, noise.max_timestep
    problems.one_of("noise.timesteps", noise.timesteps, DISTRIBUTIONS)
    for name in ("mean", "deviation"):
        value = look_up(noise, name)
        problems.need(noise.timesteps == "logit_normal" or value == look_up(Noise(), name),
                      f"noise.{name}={value:g} is read only with noise.timesteps=\"logit_normal\".")
    problems.above_zero("noise.deviation", noise.deviation)
    problems.above_zero("noise.shift", noise.shift)
    good = 0 <= low < high <= TIMESTEPS
    problems.need(good, f"noise.min_timestep={low:g} and noise.max_timestep={high:g} must rise inside 0 to "
                        f"{TIMESTEPS}.")
    weights = noise.quarters
    if weights and (len(weights) != 4 or min(weights) < 0 or not sum(weights) > 0):
        problems.append(f"noise.quarters={weights} must be 4 numbers that are not negative, and not all 0.")
    elif weights and good:
        span = TIMESTEPS / 4
        left = [w for q, w in enumerate(weights) if w and low < (q + 1) * span and high > q * span]
        problems.need(left, f"noise.quarters={weights} leaves nothing to draw from noise.min_timestep={low:g} to "
                            f"noise.max_timestep={high:g}.")
    return problems


def of_noise(noise: Noise) -> list[str]:
    problems = Problems()
    problems.at_least("noise.offset", noise.offset, 0)
    problems.at_least("noise.perturbation", noise.perturbation, 0)
    problems.need(0 <= noise.pyramid < 1, f"noise.pyramid={noise.pyramid} is outside [0, 1).")
    return problems


def of_loss(loss: Loss) -> list[str]:
    problems, plain = Problems(), Loss()
    problems.one_of("loss.kind", loss.kind, KINDS)
    problems.one_of("loss.huber_schedule", loss.huber_schedule, SCHEDULES)
    problems.above_zero("loss.huber_delta", loss.huber_delta)
    problems.at_least("loss.snr_gamma", loss.snr_gamma, 0)
    problems.need(not (loss.snr_gamma and loss.debiased),
                  f"loss.snr_gamma={loss.snr_gamma:g} and loss.debiased=true are two weights of the noise level: leave "
                  "one of them out.")
    for name in ("huber_delta", "huber_schedule"):
        value = look_up(loss, name)
        problems.need("huber" in loss.kind or value == look_up(plain, name),
                      f"loss.{name}={value!r} is read only with loss.kind=\"huber\" or \"pseudo_huber\".")
    problems.need(loss.huber_schedule == "constant" or loss.huber_delta < 1,
                  f"loss.huber_delta={loss.huber_delta:g} must be below 1 with "
                  f"loss.huber_schedule={loss.huber_schedule!r}, which begins at 1 where there is no noise.")
    return problems


def of_masks(config: Config) -> list[str]:
    problems, loss, masks = Problems(), config.loss, config.data.masks
    problems.share("loss.unmasked", loss.unmasked)
    problems.one_of("data.masks", masks, MASKS)
    for name in ("unmasked", "normalise_masks"):
        value = look_up(loss, name)
        problems.need(masks or value == look_up(Loss(), name),
                      f"loss.{name}={str(value).lower()} is read only with data.masks.")
    problems.need(masks != "files" or "mask" not in config.data.conditions,
                  "data.masks=\"files\" takes the pictures that are called mask, and data.conditions names them too: "
                  "give one of them another name.")
    return problems


def unread(config: Config) -> list[str]:
    """What is set and the recipe does not read, with its reason."""
    problems, recipe = [], config.recipe
    plain = {"noise": Noise(), "loss": Loss()}
    changed = [f"{section}.{field.name}" for section, default in plain.items() for field in dataclasses.fields(default)
               if look_up(config, f"{section}.{field.name}") != look_up(default, field.name)]
    for name in [*changed, *(["data.masks"] if config.data.masks else [])]:
        reason = recipe.unread.get(name) or recipe.unread.get(name.partition(".")[0])
        if reason:
            problems.append(f"{name}={look_up(config, name)!r} is not read by recipe.name={recipe.name!r}: {reason}. "
                            "Take it out.")
    return problems
