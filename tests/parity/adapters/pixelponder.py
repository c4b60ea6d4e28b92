"""PixelPonder's parity adapters, and those of the FLUX that it controls."""
from __future__ import annotations

import torch
from pixstack.kernels.attention import attention
from pixstack.models_impl import state_dict
from pixstack.models_impl.flux import checkpoint as flux_checkpoint
from pixstack.models_impl.flux.model import Flux, rope_table
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.pixelponder import checkpoint
from pixstack.models_impl.pixelponder.model import HintEncoders, PixelPonder
from pixstack.models_impl.pixelponder.patch_select import Conditions, Released, SelectionInputs
from pixstack.models_impl.pixelponder.select_net import AsRun, Picked, SelectNet

from .registry import TOLERANCE, adapter


def controlnet_model(weights, config) -> PixelPonder:
    """The ControlNet with everything that the case has weights of, but no selection network: its scores are inputs."""
    config, weights = checkpoint.read(weights, config=without(config, "cond_order"), unused=True)
    model = PixelPonder(config)
    state_dict.load_into(model, weights, "PixelPonder")
    return model


def flux_model(weights, config) -> Flux:
    config, weights = flux_checkpoint.read(weights, config=config)
    model = Flux(config)
    state_dict.load_into(model, weights, "FLUX")
    return model


def without(entries, *names):
    return {key: value for key, value in entries.items() if key not in names}


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def run_controlnet(net: PixelPonder, case, settings, img):
    i, order = case.inputs, case.config["cond_order"]
    conditions = net.conditions([(kind, i[f"hint.{kind}"]) for kind in order])
    select = as_run(i.get("scores"), settings.get("select_net", {})).begin(conditions)
    return net(img, i["timesteps"], i["txt"], i["y"], i.get("guidance"), select=select, img_ids=i["img_ids"],
               txt_ids=i["txt_ids"])


def as_run(scores, settings) -> AsRun | Released:
    if scores is None:  # with a single condition nothing is selected
        return Released()
    rounds, _, patches, _ = scores.shape
    return AsRun(scores=scores, patch_size=settings.get("patch_size", 2), select_num=patches // rounds)


def conditions_of(case) -> Conditions:
    types, order = case.config["type2id"], case.config["cond_order"]
    embeds = torch.stack([case.inputs[f"cond.{kind}"] for kind in order], dim=1)
    return Conditions(embeds, tuple(types[kind] for kind in order))


def as_the_reference_folds(picture, settings):
    """The reference builds its result with input_shape's second number as the rows."""
    columns, rows = settings["input_shape"]
    if tuple(picture.shape[-2:]) == (rows, columns):
        return picture
    p = settings["patch_size"]
    patches = torch.nn.functional.pixel_unshuffle(picture, p).flatten(2).unflatten(2, (rows // p, columns // p))
    return torch.nn.functional.pixel_shuffle(patches, p)


@adapter("pixelponder", "schedule")
def schedule(case):
    results = {}
    for name in case.outputs:
        steps, tokens = (int(word.strip("stepqu")) for word in name.removesuffix("_f64").split("_"))
        sigmas = RectifiedFlow(case.config["base_shift"], case.config["max_shift"]).schedule(steps, tokens)
        results[name] = (torch.tensor(sigmas, dtype=torch.float64), 1e-6)
    return results


@adapter("pixelponder", "hint_encoder")
@torch.no_grad()
def hint_encoder(case):
    types, weights = checkpoint.read_hint_encoders(case.weights, case.config["type2id"])
    net = HintEncoders(types)
    state_dict.load_into(net, weights, "PixelPonder's hint encoders")
    kinds = (name.removeprefix("embed.") for name in case.outputs)
    return {f"embed.{kind}": (net.encode_hint(case.inputs[f"hint.{kind}"], types.index(kind)), TOLERANCE)
            for kind in kinds}


@adapter("pixelponder", "patch_select_forced")
def patch_select_forced(case):
    strategy, conditions = as_run(case.inputs["scores"], case.config), conditions_of(case)
    rounds = list(strategy.rounds(conditions))
    final = strategy.begin(conditions)(None).map
    return {
        "type": (torch.stack([r.winner for r in rounds]), 0),
        "top": (torch.stack([r.top for r in rounds]), 0),
        "final": (as_the_reference_folds(final, case.config), TOLERANCE),
    }


@adapter("pixelponder", "patch_select")
@torch.no_grad()
def patch_select(case):
    """The score is rounding noise, so the reference's picks are replayed (see the cases' README)."""
    i, c, recorded = case.inputs, case.config, case.outputs
    config, weights = checkpoint.read_select_net(case.weights, without(c, "cond_order"))
    net = SelectNet(config)
    state_dict.load_into(net, weights, "the selection network")
    conditions = conditions_of(case)
    ids = torch.cat((i["txt_ids"], i["img_ids"]), dim=1)
    guide = SelectionInputs(i["txt"], i["vec"], rope_table(ids, c["axes_dim"], c.get("theta", 10000)), attention)
    everywhere = torch.arange(recorded["type"].shape[-1]).expand(i["vec"].shape[0], -1)
    features = net.features(net.step(net.tokens(conditions), guide), everywhere, None)
    last = Picked(recorded["type"][-1], recorded["top"][-1])
    final = AsRun(net).result(conditions, last).map
    return {
        "embed_iter0": (features, TOLERANCE),
        "final": (as_the_reference_folds(final, c), TOLERANCE),
        **{name: (recorded[name], 0) for name in ("score", "type", "top")},
    }


@adapter("pixelponder", "controlnet")
@torch.no_grad()
def controlnet(case):
    control = run_controlnet(controlnet_model(case.weights, case.config), case, case.config, case.inputs["img"])
    return {f"residual{k}": (value, TOLERANCE) for k, value in enumerate((*control.double, *control.single))}


@adapter("pixelponder", "flux_step")
@torch.no_grad()
def flux_step(case):
    i, c = case.inputs, case.config
    base = flux_model(part(case.weights, "dit."), c["flux"])
    control = run_controlnet(controlnet_model(part(case.weights, "controlnet."), c["controlnet"]), case,
                             c["controlnet"], i["img"])

    def predict(residuals=None):
        return base(i["img"], i["timesteps"], i["txt"], i["y"], i.get("guidance"), img_ids=i["img_ids"],
                    txt_ids=i["txt_ids"], residuals=residuals)

    velocity = predict(control.residuals(c["residual_scale"]))
    results = {f"residual{k}": value for k, value in enumerate((*control.double, *control.single))}
    results |= {
        "pred": velocity,
        "pred_without_control": predict(),
        "next_img": RectifiedFlow().sample(lambda x, timestep: velocity, i["img"], (c["t_curr"], c["t_prev"])),
    }
    return {name: (value, TOLERANCE) for name, value in results.items()}


@adapter("pixelponder", "train_step")
def train_step(case):
    i, c = case.inputs, case.config
    base = flux_model(part(case.weights, "dit."), c["flux"]).requires_grad_(False)
    net = controlnet_model(part(case.weights, "controlnet."), c["controlnet"])
    noisy = RectifiedFlow().add_noise(i["x1"], i["x0"], i["timesteps"])
    control = run_controlnet(net, case, c["controlnet"], noisy)
    velocity = base(noisy, i["timesteps"], i["txt"], i["y"], i.get("guidance"), img_ids=i["img_ids"],
                    txt_ids=i["txt_ids"], residuals=control.residuals(c["residual_scale"]))
    loss = RectifiedFlow().loss(velocity, i["x1"], i["x0"], i["timesteps"]).mean()
    loss.backward()
    weights = dict(net.named_parameters())
    results = {"pred": velocity.detach(), "loss": loss.detach().view(1)}
    for name in case.outputs:
        if name.startswith("grad."):
            results[name] = weights[name.removeprefix("grad.")].grad
    return {name: (value, TOLERANCE) for name, value in results.items()}
