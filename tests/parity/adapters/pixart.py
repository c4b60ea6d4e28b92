"""PixArt's parity adapters: the network, its ControlNet, and the other names of its weights."""
from __future__ import annotations

import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixart import checkpoint, key_names
from pixstack.models_impl.pixart.config import PixArtConfig
from pixstack.models_impl.pixart.controlnet import PixArtControlNet
from pixstack.models_impl.pixart.model import CaptionEmbedder, HintedControlNet, PixArt, axis_table, position_table

from .registry import TOLERANCE, adapter

SAMPLER_ENTRIES = ("cfg_scale",)  # of a case's config, that are not the network's


def pixart_model(weights, config) -> PixArt:
    entries = {name: value for name, value in config.items() if name not in SAMPLER_ENTRIES}
    config, weights = checkpoint.read(weights, config=entries)
    model = PixArt(config)
    state_dict.load_into(model, weights, "PixArt")
    return model.eval()


def run(model, case, **more):
    i = case.inputs
    size_inputs = i.get("img_hw"), i.get("aspect_ratio")
    return model(i["x"], i["timestep"], i["y"].squeeze(1), i.get("mask"), *size_inputs, **more)


@adapter("pixart", "transformer")
@torch.no_grad()
def transformer(case):
    return {"x": (run(pixart_model(case.weights, case.config), case), TOLERANCE)}


@adapter("pixart", "convert")
@torch.no_grad()
def convert(case):
    original = checkpoint.read(case.weights, config=case.config)[1]
    diffusers = key_names.to_diffusers(original)
    results = {f"diffusers.{key}": (value, 0) for key, value in diffusers.items()}
    assert {f"diffusers.{key}" for key in diffusers} == {name for name in case.outputs if name != "x"}
    return {**results, "x": (run(pixart_model(diffusers, case.config), case), TOLERANCE)}


@adapter("pixart", "controlnet")
@torch.no_grad()
def controlnet(case):
    model = pixart_model(case.weights, case.config)
    config, blocks, weights = checkpoint.read_controlnet(case.weights, config=case.config)
    net = PixArtControlNet(config, blocks)
    state_dict.load_into(net, weights, "PixArt's ControlNet")
    controlled = run(model, case, control=[HintedControlNet(net.eval(), case.inputs["c"])])
    return {"x": (controlled, TOLERANCE), "x_nocontrol": (run(model, case), TOLERANCE)}


@adapter("pixart", "pos_embed")
def pos_embed(case):
    results = {}
    for name, value in case.inputs.items():
        channels, height, width, scale, base_size = value.tolist()
        rows, columns = (axis_table(int(n), int(channels) // 2, base_size / scale) for n in (height, width))
        results[name] = (position_table(rows, columns), TOLERANCE)
    return results


@adapter("pixart", "caption_embedder")
@torch.no_grad()
def caption_embedder(case):
    c, i = case.config, case.inputs
    config = PixArtConfig(hidden=c["hidden_size"], heads=1, context_dim=c["in_channels"], token_limit=c["token_num"],
                          null_caption=True)
    embedder = CaptionEmbedder(config, torch.nn, {})
    state_dict.load_into(embedder, case.weights, "the caption embedder")
    plain = i["y"].squeeze(1)
    results = {"plain": plain, "dropped": embedder.drop(plain, i["force_drop_ids"] == 1)}
    return {name: (embedder(context)[:, None], TOLERANCE) for name, context in results.items()}


@adapter("pixart", "cfg")
@torch.no_grad()
def cfg(case):
    model, i, scale = pixart_model(case.weights, case.config), case.inputs, case.config["cfg_scale"]
    x, cond, null = i["x"].repeat(2, 1, 1, 1), i["y"].squeeze(1), i["null_y"].squeeze(1)
    # Released behaviour: the null caption is read under the mask of the caption.
    mask = i["mask"].repeat(2, 1) if "mask" in i else None

    eps = model(x, i["timestep"], torch.cat((null, cond)), mask)[:, : model.config.in_channels]
    u, c = eps.chunk(2)
    results = {"dpm_eps": eps, "dpm_guided": u + scale * (c - u)}

    both = model(x, i["timestep"], torch.cat((cond, null)), mask)
    c, u = both[:, :3].chunk(2)  # released behaviour of this path: three of the four channels are guided
    results["iddpm_cfg"] = torch.cat(((u + scale * (c - u)).repeat(2, 1, 1, 1), both[:, 3:]), dim=1)
    return {name: (value, TOLERANCE) for name, value in results.items()}
