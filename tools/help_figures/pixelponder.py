"""PixelPonder, and the small FLUX under it."""
from __future__ import annotations

import torch
from PIL import Image

from . import figure
from .calls import PROMPTS, call, edges_of, example, flux, prompt
from .drawing import Photo, gray, pictures


@figure
def FluxLoader():
    return Photo([(flux(prompt(text, "flux"), prompt("", "flux"), 4.0)[0], short) for text, short in PROMPTS.items()])


def ponder(text: str, strategy: str, *conditions: dict) -> tuple[Image.Image, list, dict]:
    """(the picture, its positive conditioning, its latent)"""
    net, = call("PixelPonderLoader", control_net_name="pixelponder_emoji.safetensors", selection_network="leave out",
                dtype="default")
    chain = None
    for condition in conditions:
        settings = {"strength": 1.0, "priority": 0, "start_percent": 0.0, "end_percent": 1.0, **condition}
        chain, = call("PixelPonderCondition", **settings, **({} if chain is None else {"conditions": chain}))
    positive, negative = call("PixelPonderApply", positive=prompt(text, "flux"), negative=prompt("", "flux"),
                              control_net=net, conditions=chain, strength=1.0, start_percent=0.0, end_percent=1.0,
                              strategy=strategy, rounds=1)
    picture, latent = flux(positive, negative, 1.5)
    return picture, positive, latent


def two(name: str) -> tuple[dict, dict]:
    """Both hints of an example picture."""
    return dict(image=edges_of(name), kind="canny"), dict(image=example(f"{name}_hed"), kind="hed")


@figure
def PixelPonderLoader():
    row = []
    for text, name in (("cat face", "cat_face"), ("mushroom", "mushroom")):
        canny, soft = two(name)
        row += [(pictures(canny["image"])[0], "canny"), (ponder(text, "accumulate", canny, soft)[0], text)]
    return Photo(row)


@figure
def PixelPonderCondition():
    canny, soft = two("cat_face")
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    soft["mask"] = ((rows - 64) ** 2 + (columns - 64) ** 2 < 36**2).float()[None]
    _, positive, latent = ponder("cat face", "released", canny, soft)
    shown, _ = call("PixelPonderMap", positive=positive, latent=latent, overlay=0.5)
    picture = pictures(shown)[0]
    return Photo([(pictures(canny["image"])[0], "canny"), (pictures(soft["image"])[0], "hed"),
                  (gray(soft["mask"][0]), "mask of hed"), (picture.crop((0, 0, picture.width, picture.width)), "map")])


@figure
def PixelPonderApply():
    canny, soft = two("cat_face")
    return Photo([(pictures(canny["image"])[0], "canny"), *(
        (ponder("cat face", strategy, canny, soft)[0], strategy) for strategy in ("released", "accumulate", "blend"))])


@figure
def PixelPonderMap():
    _, positive, latent = ponder("cat face", "accumulate", *two("cat_face"))
    return Photo([(pictures(call("PixelPonderMap", positive=positive, latent=latent, overlay=overlay)[0])[0],
                   f"overlay {overlay:g}") for overlay in (0.0, 0.5, 1.0)])
