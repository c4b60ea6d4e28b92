"""Annotators, and the data sets that they fill."""
from __future__ import annotations

import json
from importlib import import_module
from math import cos, pi, sin
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...models_impl.annotators import depth, hed, openpose
from ...models_impl.annotators import pose as poses
from ..make_workflow_pictures import WAVING
from . import figure
from .calls import call, edges_of, example, module
from .drawing import BLUES, DIM, GAP, INK, ORANGE, SMALL, Drawing, Photo, gray, pictures, wrapped


@figure
def ExamplePicture():
    names = list(module("ExamplePicture").PICTURES)
    shown = [(pictures(example(name))[0], name) for name in names]
    return Photo(shown[:4], shown[4:])


@figure
def HEDEdges():
    edges = example("mushroom_hed")[..., :1].movedim(-1, 1)
    row = [(pictures(example("mushroom"))[0], "image")]
    for strength in (1.0, 0.5, 2.0):
        scaled = (hed.condition(edges, strength)[:, :1] + 1) / 2
        row.append((gray(scaled[0, 0]), f"strength {strength:g}"))
    return Photo(row)


@figure
def CannyEdges():
    image = example("lion")
    ways = (("opencv", 100.0, 200.0), ("opencv", 50.0, 100.0), ("kornia", 100.0, 200.0))
    return Photo([(pictures(image)[0], "image"), *(
        (pictures(call("CannyEdges", image=image, detector=detector, low=low, high=high, resolution=0)[0])[0],
         f"{detector} {low:g}, {high:g}") for detector, low, high in ways)])


def scene(side: int) -> tuple[Tensor, Tensor]:
    """Three balls on a floor of tiles: (brightness, distance), each (side, side)."""
    y, x = torch.meshgrid(torch.linspace(1, -1, side), torch.linspace(-1, 1, side), indexing="ij")
    ray, far = torch.stack([x, y - 0.25, torch.full_like(x, 1.6)], -1), 14.0
    floor = torch.where(ray[..., 1] < 0, -1.0 / ray[..., 1].clamp(max=-1e-6), torch.tensor(far))
    distance = floor.clamp(max=far)
    tiles = ((ray[..., 0] * distance).floor() + distance.floor()).remainder(2)
    shade = torch.where(distance < far, 0.3 + 0.2 * tiles, torch.tensor(0.14))
    light = torch.nn.functional.normalize(torch.tensor([-0.6, 0.8, -0.5]), dim=0)
    for centre, radius in (((-0.9, -0.45, 3.4), 0.55), ((0.9, -0.3, 5.2), 0.7), ((-0.2, 0.1, 9.5), 1.1)):
        centre = torch.tensor(centre)
        a, b, c = ray.square().sum(-1), (ray * centre).sum(-1), centre.square().sum() - radius**2
        under_root = b.square() - a * c
        t = (b - under_root.clamp(min=0).sqrt()) / a
        hit = (under_root > 0) & (t < distance)
        normal = (ray * t[..., None] - centre) / radius
        distance = torch.where(hit, t, distance)
        shade = torch.where(hit, 0.3 + 0.65 * (normal @ light).clamp(min=0), shade)
    return shade, distance


@figure
def DepthMap():
    """What the node makes of known distances, and what of them as the other kind of numbers."""
    shade, distance = scene(256)
    right, wrong = (depth.normalised(distance[None, None], grows)[0, 0] for grows in (True, False))
    return Photo([(gray(shade), "known distances"), (gray(right), "grow with distance"),
                  (gray(wrong), "the wrong choice")])


def person(left: float = 0.0, across: float = 1.0) -> dict:
    """A waving person with hands and a face, in fractions of the picture."""
    body = [(x, y) for x, y in zip(WAVING[::3], WAVING[1::3], strict=True)]
    around = [(0.5 + 0.085 * cos(a), 0.15 + 0.1 * sin(a)) for a in (pi * (0.05 + 0.9 * i / 16) for i in range(17))]
    brows = [(0.5 + side * (0.03 + 0.008 * i), 0.1 - 0.006 * (2 - abs(2 - i))) for side in (-1, 1) for i in range(5)]
    nose = [(0.5, 0.115 + 0.012 * i) for i in range(4)] + [(0.5 + 0.008 * (i - 2), 0.165) for i in range(5)]
    eyes = [(0.5 + side * 0.038 + 0.014 * cos(a), 0.118 + 0.007 * sin(a)) for side in (-1, 1)
            for a in (2 * pi * i / 6 for i in range(6))]
    mouth = [(0.5 + 0.035 * cos(a), 0.2 + 0.014 * sin(a)) for a in (2 * pi * i / 12 for i in range(12))]
    mouth += [(0.5 + 0.022 * cos(a), 0.2 + 0.006 * sin(a)) for a in (2 * pi * i / 8 for i in range(8))]
    pupils = [(0.462, 0.118), (0.538, 0.118)]

    def hand(at, towards):
        x, y = at
        return [at] + [(x + 0.028 * joint * cos(a), y + 0.028 * joint * sin(a)) for finger in range(5)
                       for a in [towards + 0.32 * (finger - 2)] for joint in range(1, 5)]

    def flat(points):
        return [value for x, y in points for value in (left + across * x, y, 1)]

    return {"pose_keypoints_2d": flat(body), "face_keypoints_2d": flat(around + brows + nose + eyes + mouth + pupils),
            "hand_right_keypoints_2d": flat(hand(body[4], pi * 0.65)),
            "hand_left_keypoints_2d": flat(hand(body[7], -pi * 0.4))}


@figure
def DrawPoses():
    pose = json.dumps({"people": [person()]})
    ways = (("body", dict(hands=False, face=False)), ("hands, face", {}), ("stick 8", dict(stick=8.0)))
    usual = dict(body=True, hands=True, face=True, stick=4.0, confidence=0.3, width=384, height=512)
    drawn = (call("DrawPoses", openpose_json=pose, **{**usual, **how})[0] for _, how in ways)
    return Photo([(pictures(picture)[0], name) for picture, (name, _) in zip(drawn, ways, strict=True)])


@figure
def FindPoses():
    """Where people are looked for in a picture of 3:2, by `search`."""
    height, width, drawing = 128, 192, Drawing(212)
    people = {"people": [person(0.02, 0.45), person(0.5, 0.45)]}
    drawn = pictures(openpose.draw(people, 4 * height, 4 * width, stick=4))[0]
    for search in range(3):
        left, top = GAP + 208 * search, 16
        drawing.picture(drawn, left, top, width, height)
        drawing.box(left, top, left + width, top + height, None, DIM, 1)
        boxes = poses.windows(height, width, search)
        boxes = boxes[1:] if search else boxes
        boxes = sorted(boxes.tolist(), key=lambda box: -box[2])
        for i, (x, y, side, _) in enumerate(boxes):
            inset, colour = 2 if search else 0, ORANGE if i + 1 == len(boxes) or search == 0 else BLUES[1]
            drawing.box(max(left, left + x - side / 2) + inset, max(top, top + y - side / 2) + inset,
                        min(left + width, left + x + side / 2) - inset, min(top + height, top + y + side / 2) - inset,
                        None, colour, 1.5)
        count = len(poses.windows(height, width, search))
        drawing.text(left, top + height + 10, f"search {search}", INK, SMALL)
        drawing.text(left, top + height + 36, f"{count} square" + "s" * (count > 1), DIM, 18)
    return drawing


def saved_entry(folder: str) -> Path:
    call("SaveEntry", image=example("rose"), folder=folder, name="rose", text="a red rose",
         canny=edges_of("rose"), hed=example("rose_hed"))
    return Path(import_module("folder_paths").get_output_directory(), folder)


@figure
def LoadEntry():
    saved_entry("loaded")
    image, text, canny, _, _, soft, name, count = call("LoadEntry", folder="loaded", index=0)
    drawing = Drawing(270)
    for i, (part, word) in enumerate(((image, "image"), (canny, "canny"), (soft, "hed"))):
        left = GAP + 170 * i
        drawing.picture(pictures(part)[0], left, GAP, 156, 156)
        drawing.text(left, 176, word, INK, SMALL)
    drawing.text(GAP, 216, f"text:  {text}      name:  {name}      count:  {count}", BLUES[2], SMALL)
    return drawing


@figure
def SaveEntry():
    folder = saved_entry("dataset")
    drawing, files = Drawing(292), sorted(folder.rglob("*.png"))
    drawing.text(GAP, 12, "output/dataset/", DIM, SMALL)
    for i, path in enumerate(files):
        left = GAP + 170 * i
        drawing.picture(Image.open(path), left, 44, 128, 128)
        drawing.text(left, 178, path.relative_to(folder).as_posix(), INK, 18)
    drawing.text(GAP, 212, "data.jsonl", INK, 18)
    (line,) = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    for row, part in enumerate(wrapped(line, 56)):
        drawing.text(GAP, 238 + 22 * row, part, BLUES[2], 18)
    return drawing
