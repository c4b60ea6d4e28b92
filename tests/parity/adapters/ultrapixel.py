"""UltraPixel's parity adapters."""
from __future__ import annotations

import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators.canny import canny
from pixstack.models_impl.ultrapixel import buckets, checkpoint, lora, sampling
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.guidance import Features, Guide, ScaleNorm
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB
from torch.nn import functional as F

from .registry import TOLERANCE, adapter


def build(network, config, weights, what):
    model = network(config)
    state_dict.load_into(model, weights, what)
    return model.eval()


def stage_c_model(weights, config) -> StageC:
    return build(StageC, *checkpoint.read_stage_c(weights, config=config), "Stage C")


def guide_model(weights, config) -> Guide:
    return build(Guide, *checkpoint.read_guide(weights, config=config), "the guide")


def stage_a_model(case) -> StageA:
    return build(StageA, *checkpoint.read_stage_a(case.weights, config=case.config), "Stage A")


def close(results):
    return {name: (value, TOLERANCE) for name, value in results.items()}


def conditioning(inputs, config):
    scalars = {name: inputs[name] for name in config["t_conds"] if name in inputs}
    return dict(text=inputs["clip_text"], pooled=inputs["clip_text_pooled"], image=inputs["clip_img"],
                conditions=scalars)


def numbered(tensors, name):
    by_number = {int(key.rsplit(".", 1)[1]): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return [by_number.get(i) for i in range(max(by_number) + 1)]


def low_features(inputs) -> Features:
    return Features(numbered(inputs, "enc"), numbered(inputs, "dec"))


def feature_outputs(features: Features):
    return {**{f"enc.{i}": x for i, x in enumerate(features.down)},
            **{f"dec.{i}": x for i, x in enumerate(features.up)}}


# --- Stage C and the guide

@adapter("ultrapixel", "stage_c")
@torch.no_grad()
def stage_c(case):
    i, model = case.inputs, stage_c_model(case.weights, case.config)
    return close({"pred": model(i["x"], i["r"], **conditioning(i, case.config))})


@adapter("ultrapixel", "stage_c_lr")
@torch.no_grad()
def stage_c_lr(case):
    i, model = case.inputs, stage_c_model(case.weights, case.config)
    pred, features = model.features(i["x"], i["r"], **conditioning(i, case.config))
    return close({"pred": pred, **feature_outputs(features)})


@adapter("ultrapixel", "stage_c_guided")
@torch.no_grad()
def stage_c_guided(case):
    i, c = case.inputs, case.config
    model, guide = stage_c_model(case.weights, c), guide_model(case.weights, c["inr"])
    hook = guide.image(low_features(i)).hook(i["r"])
    return close({"pred": model(i["x"], i["r"], **conditioning(i, c), hook=hook)})


@adapter("ultrapixel", "stage_c_control")
@torch.no_grad()
def stage_c_control(case):
    i, c = case.inputs, case.config
    model, guide = stage_c_model(case.weights, c), guide_model(case.weights, c["inr"])
    control, conditions = numbered(i, "cnet"), conditioning(i, c)
    pred, features = model.features(i["x"], i["r"], **conditions, control=control)
    hook = guide.image(features).hook(i["r"])
    return close({
        "pred": pred, **feature_outputs(features),
        "pred_hr_unguided": model(i["x_hr"], i["r"], **conditions, control=control),
        "pred_hr_guided": model(i["x_hr"], i["r"], **conditions, hook=hook),  # the guided pass gets no control
    })


@adapter("ultrapixel", "inr_fuse")
@torch.no_grad()
def inr_fuse(case):
    i = case.inputs
    guide = guide_model({f"agg_net.0.{key}": value for key, value in case.weights.items()}, case.config)
    level, seen = guide.agg_net[0], {}
    level.output_layer.register_forward_hook(lambda module, args, out: seen.update(output_layer=out))
    level.mapp_t.register_forward_hook(lambda module, args, out: seen.update(after_time=out.permute(0, 3, 1, 2)))
    size = i["target"].shape[-2:]
    hyponet = level.implicit(i["dtokens"], *size)
    out = level.fuse(i["target"], level.prepare(i["dtokens"], *size), i["t_emb"])
    return close({"hyponet": hyponet, "out": out, **seen})


@adapter("ultrapixel", "scale_norm")
@torch.no_grad()
def scale_norm(case):
    c = case.config
    norm = ScaleNorm(c["c"], c["scale_c"], c["std_size"], torch.nn, {}, tuple(c["conds"]))
    dead = checkpoint.DEAD["guide"]
    weights = {key: value for key, value in case.weights.items() if not dead.match(f"hr_norm.{key}")}
    state_dict.load_into(norm, weights, "the scale-aware normalisation")
    return close({"out": norm(case.inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)})


@adapter("ultrapixel", "lora")
@torch.no_grad()
def personalisation(case):
    i, c = case.inputs, case.config
    mine = {key: value for key, value in case.weights.items() if key.startswith("module.")}
    config, weights = checkpoint.read_stage_c(case.weights, config=c)
    file = lora.read(mine, config=config, alpha=c["alpha"], modules=c["index_to_module"])
    if c["module_filters"] == [".attn"]:  # what is personalised by default
        assert list(lora.read(mine, config=config).layers) == list(file.layers)
    arguments = i["x"], i["r"]
    return close({
        "pred": build(StageC, config, file.merge(weights), "Stage C")(*arguments, **conditioning(i, c)),
        "pred_without_lora": build(StageC, config, weights, "Stage C")(*arguments, **conditioning(i, c)),
        "embedding_table": file.embed(i["embedding_table"]),
    })


@adapter("ultrapixel", "controlnet")
@torch.no_grad()
def controlnet(case):
    model = build(ControlNet, *checkpoint.read_controlnet(case.weights, config=case.config), "the ControlNet")
    return close({f"proj.{i}": x for i, x in enumerate(model(case.inputs["x"])) if x is not None})


@adapter("ultrapixel", "canny_filter")
def canny_filter(case):
    c = case.config
    return close({"edges": canny(case.inputs["image"], c["low"], c["high"], c["resize"])})


# --- Stage B and Stage A

@adapter("ultrapixel", "stage_b")
@torch.no_grad()
def stage_b(case):
    i, c = case.inputs, case.config
    model = build(StageB, *checkpoint.read_stage_b(case.weights, config=c), "Stage B")
    scalars = {name: i[name] for name in c["t_conds"] if name in i}
    return close({"pred": model(i["x"], i["r"], i["effnet"], i["clip"], i.get("pixels"), scalars)})


@adapter("ultrapixel", "stage_a_decode")
@torch.no_grad()
def stage_a_decode(case):
    return close({"image": stage_a_model(case).decode(case.inputs["z"])})


@adapter("ultrapixel", "stage_a_encode")
@torch.no_grad()
def stage_a_encode(case):
    return close({"latent": stage_a_model(case).encode(case.inputs["image"])})


@adapter("ultrapixel", "stage_a_decode_tiled_ref", unused={
    "image_tiled_reference": "nothing here decodes by the release's windows, which differ from the whole decode"})
@torch.no_grad()
def stage_a_decode_tiled_ref(case):
    c, z, model = case.config, case.inputs["z"], stage_a_model(case)
    return close({"image_untiled": model.decode_tiled(z, tile=c["patch_size"] // 2)})  # repeats the whole decode


# --- Schedule, samplers, sizes

@adapter("ultrapixel", "scheduler")
def scheduler(case):
    c = case.config
    schedule = sampling.CosineDiffusion(c["shift"], c["s"], tuple(c["clamp"]))
    logsnr = schedule.steps(c["steps"], c["t_start"], c["t_end"])
    a, b = (s.flatten() for s in sampling.scales(logsnr, logsnr))
    return close({"logsnr": logsnr, "a": a, "b": b, "noise_cond": schedule.timestep(logsnr)})


class Recorder:
    """The x, x0 and guided prediction of every step, stacked."""

    def __init__(self):
        self.pred, self.x, self.x0 = [], [], []

    def guided(self, predict, c):
        def recorded(x, timestep, *rest):
            cond, uncond = predict(x, timestep, *rest)
            eps = cond if c["cfg"] is None else sampling.guided(cond, uncond, c["cfg"], c["cfg_rho"], whole_batch=True)
            self.pred.append(eps)
            return eps

        return recorded

    def after_step(self, x, logsnr):
        self.x.append(x)
        return x

    @property
    def hooks(self):
        return {"callback": lambda index, x, clean: self.x0.append(clean), "after_step": self.after_step}

    @property
    def outputs(self):
        return {name: torch.stack(getattr(self, name)) for name in ("pred", "x", "x0")}


def trajectory(results):
    """Compared relative to the largest |x|."""
    def tolerance(value):
        return TOLERANCE * max(1.0, value.abs().max().item() / max(1.0, value.std(correction=0).item()))

    return {name: (value, tolerance(value)) for name, value in results.items()}


def toy(x, timestep, text):
    return 0.6 * x + 0.1 * timestep.view(-1, 1, 1, 1) * x.tanh() + 0.2 * text


@adapter("ultrapixel", "sampler")
def sampler(case):
    i, c, seen = case.inputs, case.config, Recorder()
    schedule = sampling.CosineDiffusion(c["shift"])

    def predict(x, timestep):
        return toy(x, timestep, i["c"]), toy(x, timestep, torch.zeros_like(i["c"]))

    schedule.sample(seen.guided(predict, c), i["x_init"], schedule.steps(c["steps"]),
                    lambda step, shape: i["noise"][step], eta=c["eta"], **seen.hooks)
    return trajectory(seen.outputs)


@adapter("ultrapixel", "sampler_dual")
def sampler_dual(case):
    i, c, high = case.inputs, case.config, Recorder()
    schedule = sampling.CosineDiffusion(c["shift"])
    logsnrs = schedule.steps(c["steps"])
    text = i["text"][:, :, None, None]

    def predict(x, timestep, features=None):
        guide = 0
        if features is not None:
            enc, dec = features
            guide = 0.05 * F.interpolate(enc + 2 * dec, x.shape[-2:], mode="nearest")
        return tuple(toy(x, timestep, t) + guide for t in (text, torch.zeros_like(text)))

    def features(x, timestep):
        return x.sin() + text, 0.5 * x

    def noise_low(step, shape):
        return i["noise_lr"][step]

    predict_low = Recorder().guided(predict, c)
    sampling.sample_guided(
        predict_low, features, high.guided(predict, c), i["x_lr_init"], i["x_init"], schedule, logsnrs, noise_low,
        lambda step, shape: i["noise"][step], keep=c["steps"] - 1, guide_steps=c["guide_until_step_index"] + 1,
        **high.hooks,
    )
    x_low, _ = schedule.run(predict_low, i["x_lr_init"], logsnrs, noise_low)
    return trajectory({**high.outputs, "x_lr": x_low})


@adapter("ultrapixel", "pipeline_stage_c")
@torch.no_grad()
def pipeline_stage_c(case):
    i, c, high = case.inputs, case.config, Recorder()
    model, guide = stage_c_model(case.weights, c), guide_model(case.weights, c["inr"])
    schedule = sampling.CosineDiffusion(c["shift"])
    logsnrs = schedule.steps(c["steps"])
    both = {name: torch.cat((i[f"cond.{key}"], i[f"uncond.{key}"])) for name, key in
            (("text", "clip_text"), ("pooled", "clip_text_pooled"), ("image", "clip_img"))}

    def predict(x, timestep, guided=None):
        twice = timestep.repeat(2)
        hook = None if guided is None else guided.hook(twice)
        return model(x.repeat(2, 1, 1, 1), twice, **both, hook=hook).chunk(2)

    def features(x, timestep):
        _, kept = model.features(x.repeat(2, 1, 1, 1), timestep.repeat(2), **both)
        return guide.image(kept.rows(0, x.shape[0]))

    def noise_low(step, shape):
        return i["noise_lr"][step]

    predict_low = Recorder().guided(predict, c)
    final = sampling.sample_guided(
        predict_low, features, high.guided(predict, c), i["x_lr_init"], i["x_init"], schedule, logsnrs, noise_low,
        lambda step, shape: i["noise"][step], keep=c["steps"] - 1, **high.hooks,
    )
    x_low, _ = schedule.run(predict_low, i["x_lr_init"], logsnrs, noise_low)
    return trajectory({"x0": high.outputs["x0"], "x0_final": final, "x_lr_final": x_low})


@adapter("ultrapixel", "latent_sizes")
def latent_sizes(case):
    c = case.config
    rows = [sampling.sizes(height, width, c["compression_c"], c["compression_a"], c["std_size"])
            for height, width in case.inputs["hw"].tolist()]
    names = {"stage_c": "stage_c", "stage_b": "stage_b", "low_pixels": "lr_px", "low": "lr_stage_c"}
    return close({name: torch.tensor([getattr(row, ours) for row in rows]) for ours, name in names.items()})


@adapter("ultrapixel", "bucketeer")
def bucketeer(case):
    c, sizes = case.config, case.inputs["image_hw"].tolist()
    offered = buckets.Buckets(tuple(c["image_size"]), tuple(c["multi_aspect_ratio"]), c["factor"], c["reverse"])
    chosen = [offered.nearest(*size) for size in sizes]
    return close({
        "bucket_hw": torch.tensor(chosen),
        "ratios": torch.tensor(offered.all_ratios),
        "resize": torch.tensor([buckets.shorter_edge(*pair) for pair in zip(sizes, chosen, strict=True)]),
    })


# --- Training

@adapter("ultrapixel", "train_loss")
def train_loss(case):
    i, c = case.inputs, case.config
    model = stage_c_model(case.weights, c).requires_grad_(False)
    guide = guide_model(case.weights, c["inr"])
    schedule, conditions = sampling.CosineDiffusion(), conditioning(i, c)

    logsnr = schedule.logsnr(i["t"])
    logsnr_low = schedule.logsnr(torch.full_like(i["t"], c["lr_t"]))
    timestep, timestep_low = schedule.timestep(logsnr), schedule.timestep(logsnr_low)
    noisy = sampling.add_noise(i["latents"], i["epsilon"], logsnr)
    noisy_low = sampling.add_noise(i["latents_lr"], i["epsilon_lr"], logsnr_low)
    with torch.no_grad():
        _, features = model.features(noisy_low, timestep_low, **conditions)
    pred = model(noisy, timestep, **conditions, hook=guide.image(features).hook(timestep, up=1.0))

    loss = schedule.loss(pred, i["latents"], i["epsilon"], i["t"])
    adaptive, p2 = sampling.AdaptiveLossWeight(len(i["bucket_losses"])), sampling.p2_weight(logsnr)
    adaptive.losses = i["bucket_losses"]
    weight = adaptive.weight(logsnr) if c["loss_weight"] == "AdaptiveLossWeight" else p2
    adjusted = (loss * weight).mean() / c["grad_accum_steps"]
    adjusted.backward()
    adaptive.update(logsnr, loss, c["beta"])

    grads = checkpoint.released_guide_names(
        {key: parameter.grad for key, parameter in guide.named_parameters()}, c["null_models"]
    )
    results = {
        "logsnr": logsnr, "noise_cond": timestep, "noise_cond_lr": timestep_low, "noised": noisy,
        "noised_lr": noisy_low, "pred": pred.detach(), "loss": loss.detach(), "loss_weight": weight, "p2_weight": p2,
        "loss_adjusted": adjusted.detach().view(1), "bucket_losses": adaptive.losses,
    }
    results.update({name: grads[name.removeprefix("grad.")] for name in case.outputs if name.startswith("grad.")})
    return close(results)
