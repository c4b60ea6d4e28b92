"""PixelPonder, and the small FLUX under it."""
from __future__ import annotations

import torch
from PIL import Image

from . import figure
from .calls import PROMPTS, call, edges_of, example, flux, module, prompt
from .drawing import Photo, gray, pictures


@figure
def FluxLoader():
    return Photo([(flux(prompt(text, "flux"), prompt("", "flux"), 4.0)[0], short) for text, short in PROMPTS.items()])


def ponder(text: str, strategy: str, *conditions: dict, chain=None) -> tuple[Image.Image, list, dict]:
    """(the picture, its positive conditioning, its latent); chain: conditions before these."""
    net, = call("PixelPonderLoader", control_net_name="pixelponder_emoji.safetensors", selection_network="leave out",
                dtype="default")
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
def PaintConditions():
    edges, soft = (hint["image"] for hint in two("cat_face"))
    strokes = "1 500 2048 1000; 2 330 1400 2900 1296 0"  # ears and eyes by the edges, the mouth by the soft ones
    painted = call("PaintConditions", strokes=strokes, width=128, height=128, hint_1=edges, hint_2=soft)
    board, = module("PaintConditions")._board(torch.stack([mask[0] for mask in painted]),
                                              {"hint_1": edges, "hint_2": soft})
    return Photo([(pictures(edges)[0], "hint 1"), (pictures(soft)[0], "hint 2"), (pictures(board)[0], "painted"),
                  *((gray(mask[0]), f"mask {number}") for number, mask in enumerate(painted[:2], 1))])


@figure
def PixelPonderConditions():
    canny, soft = two("mushroom")
    row = [(pictures(canny["image"])[0], "hint 1"), (pictures(soft["image"])[0], "hint 2")]
    for settings, words in (("canny\nhed", "canny, hed"), ("canny\nhed strength=0.3", "hed 0.3")):
        chain, = call("PixelPonderConditions", settings=settings,
                      **{"hints.hint_1": canny["image"], "hints.hint_2": soft["image"]})
        row.append((ponder("mushroom", "accumulate", chain=chain)[0], words))
    return Photo(row)


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
