"""PixelFlow's parity adapters."""
from __future__ import annotations

import math

import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint, packing, sampling
from pixstack.models_impl.pixelflow.model import PackedLayout, PixelFlow, rope_table
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule, guidance_scales
from pixstack.models_impl.pixelflow.stages import Stages

from .registry import TOLERANCE, adapter

DOPRI5_TOLERANCE = 2e-2  # adaptive steps: the reference's notes ask for this


def pixelflow_model(weights, config) -> PixelFlow:
    config, weights = checkpoint.read(weights, config=config)
    model = PixelFlow(config)
    state_dict.load_into(model, weights, "PixelFlow")
    return model.eval()


def cascade(config) -> Stages:
    known = {name: config[name] for name in ("gamma", "num_train_timesteps") if name in config}
    return Stages(config["num_stages"], **known)


def cos_and_sin(*grid, **theta):
    """(N, D, 2), every angle twice: as the reference keeps its table."""
    return rope_table(*grid, **theta)[:, 0, :, :, 0].repeat_interleave(2, dim=1)


@adapter("pixelflow", "rope")
def rope(case):
    results = {}
    for name in case.outputs:
        head_dim, height, width = (int(part.lstrip("hdw")) for part in name.split("_"))
        results[name] = (cos_and_sin(height, width, head_dim, theta=case.config["theta"]), TOLERANCE)
    return results


@adapter("pixelflow", "scheduler")
def scheduler(case):
    results = {}
    for name in case.outputs:
        parts = name.removesuffix("_f64").split(".")
        num_stages = int(parts[0].removeprefix("stages"))
        stages = Stages(num_stages, case.config["gamma"], case.config["num_train_timesteps"])
        if parts[1] == "table":
            value = torch.tensor([
                (stages.origin[k], stages.start[k], stages.end[k], *stages.jump(k), stages.first_timestep[k],
                 stages.last_timestep[k], len(stages.train_timesteps(k)))
                for k in range(num_stages)
            ], dtype=torch.float64)
        elif parts[1] == "Timesteps_full":
            value = stages.train_timesteps(int(parts[2]))
        else:
            *shift, steps, stage, which = parts[1:]
            value = stages.times(
                int(stage.removeprefix("stage")), int(steps.removeprefix("steps")),
                float(".".join(shift).removeprefix("shift")),
            )[("T", "t").index(which)]
        results[name] = (value, 1e-9)
    return results


@adapter("pixelflow", "cfg_scale")
def cfg_scale(case):
    num_stages = case.outputs["scale"].shape[1]
    scale = [guidance_scales("scaled", g, num_stages) for g in case.inputs["guidance"].tolist()]
    return {"scale": (torch.tensor(scale), 1e-6)}


@adapter("pixelflow", "block_noise")
def block_noise(case):
    """The covariance is nearly singular (condition number 1.4e6), and the last pivot of its factor, 1.9e-3, is the root
    of the 3.8e-6 that four subtractions leave of 1. Their roundings, n + 1 of them, each up to eps/2 in ours and eps/2
    in the reference's, are 1.5e-4 in that pivot; the reference's own is 3.1e-5 from float64. The noise is allowed that
    much times the draw which the pivot scales, and no more than TOLERANCE anywhere else. What the factor is for, its
    covariance, does not suffer: the reference's is 4e-8 from what it should be.
    """
    c, z = case.config, case.inputs["z"]
    shape = c["b"], c["c"], c["h"], c["w"]
    covariance = sampling.block_covariance(c["gamma"], c["eps"])
    factor = torch.linalg.cholesky(covariance)
    rounding = (len(factor) + 1) * torch.finfo(factor.dtype).eps
    assert (factor.double() @ factor.double().T - covariance.double()).abs().max() <= rounding
    last = torch.linalg.cholesky(covariance.double())[-1, -1].item()

    def unscaled(blocks):
        return sampling.correlate(blocks, shape, torch.eye(4))

    pivot = torch.zeros_like(factor)
    pivot[-1, -1] = rounding / (2 * last)  # d sqrt(x) = dx / (2 sqrt(x))
    return {
        "cov": (covariance, TOLERANCE),
        "cholesky": (factor, TOLERANCE + pivot),
        "noise": (sampling.correlate(z, shape, covariance), TOLERANCE + unscaled(z.abs() @ pivot.T)),
    }


@adapter("pixelflow", "transformer")
@torch.no_grad()
def transformer(case):
    i = case.inputs
    model = pixelflow_model(case.weights, case.config)
    velocity = model(
        i["x"], i["timestep"], i.get("context"), i.get("context_mask"), i.get("class_labels"), i["latent_size"].float()
    )
    return {"velocity": (velocity, TOLERANCE)}


@adapter("pixelflow", "packed_train")
def packed_train(case):
    i = case.inputs
    model = pixelflow_model(case.weights, case.config)
    sides = i["latent_size"].tolist()
    layout = PackedLayout(
        tuple((length // side, side) for length, side in zip(i["seqlen_q"].tolist(), sides, strict=True)),
        tuple(i["seqlen_k"].tolist()) if "seqlen_k" in i else None,
    )
    velocity = model.forward_packed(i["x"], i["timestep"], layout, i.get("context"), i.get("class_labels"))
    items = packing.packed_loss(velocity, i["target"], layout)
    items.mean().backward()
    results = {"velocity": velocity.detach(), "loss_items": items.detach(), "loss": items.mean().detach().view(1)}
    weights = dict(model.named_parameters())
    for name in case.outputs:
        if name.startswith("grad."):
            results[name] = weights[name.removeprefix("grad.")].grad
    return {name: (value, TOLERANCE) for name, value in results.items()}


@adapter("pixelflow", "collate")
def collate(case):
    i, c = case.inputs, case.config
    flow = sampling.CascadeFlow(cascade(c))
    times = sampling.StageTime(i["stage_indices"], i["t_index"] / flow.stages.num_train_timesteps)
    batch = packing.pack(i["images"], times, lambda k, shape: i[f"noise_stage{k}"], flow, c["patch_size"])
    lengths = torch.tensor(batch.layout.lengths)
    ropes = torch.cat([cos_and_sin(*grid, c["head_dim"]) for grid in batch.layout.grids])
    exact = {
        "labels": i["labels"][batch.order],
        "seqlen_q": lengths,
        "cu_seqlens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        "latent_size": torch.tensor([int(math.sqrt(h * w)) for h, w in batch.layout.grids]),
    }
    close = {"x": batch.x, "target": batch.target, "timestep": batch.timestep, "rope": ropes}
    return {name: (value, TOLERANCE) for name, value in {**exact, **close}.items()}


@adapter("pixelflow", "sampler")
@torch.no_grad()
def sampler(case):
    i, c = case.inputs, case.config
    model = pixelflow_model(case.weights, c["model"])
    config, B, num_stages = model.config, i["noise0"].shape[0], c["num_stages"]
    stages = cascade(c)
    flow = sampling.CascadeFlow(stages)
    policy = "constant" if config.text_conditional else "scaled"
    guidance = guidance_scales(policy, c["guidance"], num_stages)
    solver = {"dopri5": "dopri5_reference"}.get(c["solver"], c["solver"])
    schedule = CascadeSchedule.build(stages, c["steps"], c["shift"], guidance, solver)
    if config.text_conditional:  # rows are [uncond, cond]
        uncond, cond = ({"context": x, "mask": m} for x, m in zip(i["context"].chunk(2), i["context_mask"].chunk(2),
                                                                  strict=True))
    else:
        cond = {"class_labels": i["class_labels"]}
        uncond = {"class_labels": torch.full_like(i["class_labels"], config.num_classes)}

    def predict(x, timestep, stage, cfg):
        # dopri5 carries the batch twice; the second half, with noise of its own, only takes part in the step size
        copies = x.shape[0] // B
        x, timestep = x[:B], torch.full((B,), timestep)
        v = model(x, timestep, **cond)
        if cfg != 1:
            unguided = model(x, timestep, **uncond)
            v = unguided + cfg * (v - unguided)
        return v.repeat(copies, 1, 1, 1)

    def noise(stage, shape):
        return i[f"noise{stage}"]

    results = {}
    start = i["noise0"]
    if num_stages > 1:
        start = start.repeat(i["noise1"].shape[0] // B, 1, 1, 1)
    x = start
    for k, plan in enumerate(schedule.plans):
        if k:
            x = sampling.jump(x, k, noise(k, None), stages)
        x = flow.sample(predict, x, CascadeSchedule(stages, (plan,), solver), noise)
        results[f"latent_stage{k}"] = x[:B]
    whole = flow.sample(predict, start, schedule, noise)
    assert torch.equal(whole, x), "the stages one by one do not repeat the whole cascade"
    results["image"] = (whole[:B] / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    tolerance = DOPRI5_TOLERANCE if c["solver"] == "dopri5" else TOLERANCE
    return {name: (value, tolerance) for name, value in results.items()}
