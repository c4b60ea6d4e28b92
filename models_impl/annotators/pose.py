"""People, their hands and faces, by the small networks of MediaPipe (BlazePose, arXiv 2006.10204), run by LiteRT.

The networks are tflite files of fixed size. This file has what surrounds them: anchors, suppression, the turned square
that is cut out for each network, and the way back to the picture. (mediapipe/modules/{pose_detection, pose_landmark,
holistic_landmark, hand_landmark, face_detection, face_landmark} of google-ai-edge/mediapipe, 0.10.21, static images)

A box is (x, y, side, angle): centre and side in pixels, angle in radians, clockwise. Several are (N, 4).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, pi

import torch
from torch import Tensor
from torch.nn import functional as F

FILES = {  # part -> file in mediapipe's wheel, under mediapipe/modules
    "detector": "pose_detection/pose_detection.tflite",
    "body": "pose_landmark/pose_landmark_full.tflite",
    "hand_box": "holistic_landmark/hand_recrop.tflite",
    "hand": "hand_landmark/hand_landmark_full.tflite",
    "face_detector": "face_detection/face_detection_short_range.tflite",
    "face": "face_landmark/face_landmark.tflite",
}
SIDES = {"detector": 224, "body": 256, "hand_box": 256, "hand": 224, "face_detector": 128, "face": 192}
BODY, HAND, FACE = 33, 21, 468
LEFT_HAND, RIGHT_HAND = (15, 17, 19), (16, 18, 20)  # wrist, little finger, index finger of the body's points
RIGHT_EYE, LEFT_EYE = 5, 2
HEAD = 11  # the first points of the body are those of the head
WRIST_SEEN = 0.1
SAME_HEAD = 0.05  # mean distance of two heads' points in sides of the body's box, below which they are one person's
MOST_WINDOWS = 1000
SQUARE = 4 / 3  # a picture that is less elongated is nearly a square
STAYS = 0.012  # mean distance of a head's points between two looks, in sides of the box: people up to 0.009, ghosts 0.1
REACH = (33, 34)  # of the body network's points: the hips' middle, and how far the body reaches from there
WITHIN, GHOST = 0.5, 0.9  # a body that overlaps another by this much, and is less certain by this much, is a part of it


class Graph:
    """A tflite network. Raises ImportError without LiteRT, ValueError for bytes that are none."""

    def __init__(self, content: bytes, name: str = "the file", threads: int = 2):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError("Finding poses needs the package ai-edge-litert: pip install ai-edge-litert") from error
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is not a tflite network that LiteRT can run ({error}).") from error
        (given,) = self._interpreter.get_input_details()
        self._input, self.side = given["index"], int(given["shape"][1])
        self._outputs = [out["index"] for out in self._interpreter.get_output_details()]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x: (B, side, side, 3). One picture at a time: the graphs were converted for one."""
        outputs = []
        for picture in x.float().split(1):
            self._interpreter.set_tensor(self._input, picture.contiguous().cpu().numpy())
            self._interpreter.invoke()
            outputs.append([torch.from_numpy(self._interpreter.get_tensor(index)) for index in self._outputs])
        return [torch.cat(out) for out in zip(*outputs, strict=True)]


Network = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Person:
    """One person. Points are in pixels of the picture and may lie outside of it."""

    score: float
    """Certainty, in [0, 1]."""
    body: Tensor
    """(33, 3): x, y, and how likely the point is to be seen, in [0, 1]."""
    left: Tensor | None = None
    """(21, 3), the person's left hand: x, y, score of the hand."""
    right: Tensor | None = None
    face: Tensor | None = None
    """(468, 3): x, y, score of the face."""


# --- Boxes

def whole(height: int, width: int) -> Tensor:
    """(1, 4): the box around a picture, which letterboxes it."""
    return torch.tensor([[width / 2, height / 2, max(height, width), 0.0]])


def windows(height: int, width: int, search: int) -> Tensor:
    """(N, 4): where people are looked for. search 0: in the whole picture, as MediaPipe does. 1: in squares of its
    shorter side as well, which overlap by half, 2: also in squares of half of it; where the picture is nearly a square
    itself, in squares of a half and of a third. Raises ValueError for a picture with more than MOST_WINDOWS."""
    boxes, short = [whole(height, width)], min(height, width)
    parts = (1, 2) if max(height, width) > SQUARE * short else (2, 3)
    for side in [short / part for part in parts[:search]]:
        steps = [ceil((length - side) / (side / 2) - 1e-6) for length in (height, width)]  # thirds are not exact
        if (steps[0] + 1) * (steps[1] + 1) > MOST_WINDOWS:
            raise ValueError(f"A picture of {width}x{height} pixels is too thin: people would be looked for in "
                             f"{(steps[0] + 1) * (steps[1] + 1):,} squares. Crop it, or set search to 0.")
        spots = [[side / 2 + (length - side) * i / max(1, n) for i in range(n + 1)]
                 for length, n in zip((height, width), steps, strict=True)]
        boxes.append(torch.tensor([[x, y, side, 0.0] for y in spots[0] for x in spots[1]]))
    return torch.cat(boxes)


def crop(picture: Tensor, boxes: Tensor, side: int, outside: str = "border") -> Tensor:
    """picture: (3, H, W), boxes: (N, 4) -> (N, side, side, 3). outside: border repeats the edge, zeros is black.

    Pixel (i, j) of a crop lies at (i / side, j / side) of its box, as OpenCV's warp has it, not half a pixel further.
    """
    along = torch.arange(side) / side
    points = torch.stack(torch.meshgrid(along, along, indexing="xy"), -1).view(1, -1, 2)
    places = project(points.expand(len(boxes), -1, -1), boxes).view(len(boxes), side, side, 2)
    last = torch.tensor([picture.shape[2] - 1, picture.shape[1] - 1]).clamp(min=1)
    pixels = F.grid_sample(picture.expand(len(boxes), -1, -1, -1), (places / last * 2 - 1).to(picture), mode="bilinear",
                           padding_mode=outside, align_corners=True)
    return pixels.permute(0, 2, 3, 1)


def project(points: Tensor, boxes: Tensor) -> Tensor:
    """points: (N, P, 2) in [0, 1] of their box -> pixels of the picture."""
    x, y = (points - 0.5).unbind(-1)
    centre, side, angle = boxes[:, None, :2], boxes[:, 2:3], boxes[:, 3:4]
    turned = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    return centre + turned * side[..., None]


def towards(start: Tensor, end: Tensor, target: float) -> Tensor:
    """The angle (N,) by which a box is turned for the way from start to end, each (N, 2), to point to `target`."""
    x, y = (end - start).unbind(-1)
    return torch.remainder(target - torch.atan2(-y, x) + pi, 2 * pi) - pi


def grown(boxes: Tensor, scale: float, down: float = 0.0) -> Tensor:
    """Boxes moved by `down` of their side along their own vertical, then scaled."""
    x, y, side, angle = boxes.unbind(-1)
    return torch.stack([x - down * side * angle.sin(), y + down * side * angle.cos(), scale * side, angle], -1)


def pointed(centre: Tensor, end: Tensor, target: float) -> Tensor:
    """The boxes (N, 4) around `centre` that reach as far as `end`, each (N, 2)."""
    side = 2 * (end - centre).norm(dim=-1, keepdim=True)
    return torch.cat([centre, side, towards(centre, end, target)[:, None]], -1)


def around(points: Tensor, start: Tensor, end: Tensor, target: float) -> Tensor:
    """The squares (N, 4) around points (N, P, 2), as wide as the longer side of their bounds."""
    low, high = points.amin(1), points.amax(1)
    side = (high - low).amax(-1, keepdim=True)
    return torch.cat([(low + high) / 2, side, towards(start, end, target)[:, None]], -1)


# --- Detectors

def anchors(side: int, strides: tuple[int, ...]) -> Tensor:
    """(A, 2): centres of the anchors in [0, 1]; two for each stride that is named, stride by stride."""
    anchors = []
    for stride in dict.fromkeys(strides):
        along = (torch.arange(side // stride) + 0.5) / (side // stride)
        centres = torch.stack(torch.meshgrid(along, along, indexing="xy"), -1).view(-1, 1, 2)
        anchors.append(centres.expand(-1, 2 * strides.count(stride), -1).reshape(-1, 2))
    return torch.cat(anchors)


POSE_STRIDES, FACE_STRIDES = (8, 16, 32, 32, 32), (8, 16, 16, 16)


def decode(raw: Tensor, logits: Tensor, side: int, strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """raw: (B, A, 4 + 2K), logits: (B, A, 1) -> points (B, A, 2 + K, 2) in [0, 1] of the crop, and scores (B, A).

    The first two points are the corners of the box, the others the key points.
    """
    pairs = raw.unflatten(-1, (-1, 2)) / side
    centre = pairs[:, :, :1] + anchors(side, strides)[:, None]
    corners = torch.cat([centre - pairs[:, :, 1:2] / 2, centre + pairs[:, :, 1:2] / 2], 2)
    points = torch.cat([corners, pairs[:, :, 2:] + anchors(side, strides)[:, None]], 2)
    return points, logits[..., 0].clamp(-100, 100).sigmoid()


def suppressed(points: Tensor, scores: Tensor, overlap: float = 0.3) -> tuple[Tensor, Tensor]:
    """Weighted suppression of points (A, 2 + K, 2) by their boxes: each is the mean, by score, of those it
    overlaps. Best first; a box keeps the score of its best."""
    order = scores.argsort(descending=True)
    points, scores, kept = points[order], scores[order], []
    while len(scores):
        same = overlaps(points[:1, :2], points[:, :2]) > overlap
        same[0] = True
        weights = scores[same, None, None]
        kept.append(((points[same] * weights).sum(0) / weights.sum(), scores[0]))
        points, scores = points[~same], scores[~same]
    if not kept:
        return points, scores
    return torch.stack([p for p, _ in kept]), torch.stack([s for _, s in kept])


def overlaps(one: Tensor, many: Tensor) -> Tensor:
    """Intersection over union of corners (1, 2, 2) with corners (N, 2, 2)."""
    inner = (torch.minimum(one[:, 1], many[:, 1]) - torch.maximum(one[:, 0], many[:, 0])).clamp(min=0).prod(-1)
    areas = [(corners[:, 1] - corners[:, 0]).clamp(min=0).prod(-1) for corners in (one, many)]
    return inner / (areas[0] + areas[1] - inner).clamp(min=1e-12)


def detect(network: Network, picture: Tensor, boxes: Tensor, side: int, strides: tuple[int, ...],
           confidence: float) -> tuple[Tensor, Tensor]:
    """Findings of a detector within boxes of a picture (3, H, W): points (N, 2 + K, 2) in pixels and scores (N,)."""
    raw, logits = network(crop(picture, boxes, side, "zeros") * 2 - 1)
    points, scores = decode(raw, logits, side, strides)
    candidates = project(points.flatten(1, 2), boxes).view_as(points)[scores >= confidence]
    return suppressed(candidates, scores[scores >= confidence])


# --- Landmarks

def looked_at(network: Network, picture: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bodies within boxes (N, 4): points (N, 33, 3) in pixels with their visibility, the score (N,) of a body being
    there, and the boxes (N, 4) that the network itself would put around it."""
    raw, presence, _, heatmap, _ = network(crop(picture, boxes, SIDES["body"]))
    local, visible = body_points(raw, heatmap)
    ends = project(raw.view(len(raw), -1, 5)[:, list(REACH), :2] / SIDES["body"], boxes)
    return (torch.cat([project(local, boxes), visible[..., None]], -1), presence[:, 0],
            grown(pointed(ends[:, 0], ends[:, 1], pi / 2), 1.25))


def stays(network: Network, picture: Tensor, body: Tensor, side: Tensor, box: Tensor) -> bool:
    """Whether a body (33, 3) found in a box of this side has its head in the same place when the network looks into
    `box` (4,), as MediaPipe follows people in films. A pattern that looks like a body in one cut moves in the next."""
    (again,), *_ = looked_at(network, picture, box[None])
    return bool((again - body)[:HEAD, :2].norm(dim=-1).mean() < STAYS * side)


def body_points(raw: Tensor, heatmap: Tensor) -> tuple[Tensor, Tensor]:
    """raw: (N, 195), heatmap: (N, 64, 64, 39) -> points (N, 33, 2) in [0, 1] of the crop, and visibility (N, 33)."""
    values = raw.view(len(raw), -1, 5)[:, :BODY]
    points = values[..., :2] / SIDES["body"]
    return refined(points, heatmap[..., :BODY]), values[..., 3].sigmoid()


def refined(points: Tensor, heatmap: Tensor, kernel: int = 7, confidence: float = 0.5) -> Tensor:
    """Points (N, P, 2) in [0, 1] moved to the mass of the heatmap (N, h, w, P) around them, where it is certain."""
    height, width = heatmap.shape[1:3]
    x, y = (points[..., 0] * width).int(), (points[..., 1] * height).int()  # (N, P)
    reach = (kernel - 1) // 2
    near_y = (torch.arange(height)[:, None, None] - y[:, None, None]).abs() <= reach  # (N, h, 1, P)
    near_x = (torch.arange(width)[:, None] - x[:, None, None]).abs() <= reach  # (N, 1, w, P)
    mass = heatmap.sigmoid() * (near_y & near_x)
    total = mass.sum((1, 2))
    moved = torch.stack([(mass * torch.arange(width)[:, None] / width).sum((1, 2)),
                         (mass * torch.arange(height)[:, None, None] / height).sum((1, 2))], -1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    sure = inside & (mass.amax((1, 2)) >= confidence) & (total > 0)
    return torch.where(sure[..., None], moved / total.clamp(min=1e-12)[..., None], points)


def people(networks: dict[str, Network], picture: Tensor, *, hands: bool = True, face: bool = True, most: int = 10,
           confidence: float = 0.5, search: int = 1) -> list[Person]:
    """The people in a picture (3, H, W) in [0, 1], the most certain first, at most `most` of them. The certainty is the
    detector's score times the mean visibility of the body.

    networks: the parts of FILES, of which hands and faces need theirs. confidence: the least score of a person.
    search: see `windows`.
    """
    picture = picture.float().cpu()
    points, scores = detect(networks["detector"], picture, windows(*picture.shape[1:], search), SIDES["detector"],
                            POSE_STRIDES, confidence)
    if not len(points):
        return []
    boxes = grown(pointed(points[:, 2], points[:, 3], pi / 2), 1.25)  # the hips' middle, and the reach of the body
    bodies, presence, own_boxes = looked_at(networks["body"], picture, boxes)
    sure = scores * bodies[..., 2].mean(1)
    people: list[Person] = []
    for index in sure.argsort(descending=True).tolist():
        body, side = bodies[index], boxes[index, 2]
        if presence[index] <= 0.5 or any(_same(other, body, sure[index], side) for other in people):
            continue
        if search and not stays(networks["body"], picture, body, side, own_boxes[index]):
            continue  # the more places are looked at, the more that look like people
        people.append(Person(
            float(sure[index]), body,
            left=hand(networks, picture, body[list(LEFT_HAND)]) if hands else None,
            right=hand(networks, picture, body[list(RIGHT_HAND)]) if hands else None,
            face=face_points(networks, picture, body[:HEAD]) if face else None,
        ))
        if len(people) == most:
            break
    return people


def _same(known: Person, body: Tensor, sure: Tensor, side: Tensor) -> bool:
    """Whether a body found in a box of this side belongs to a person already found with more certainty."""
    if (known.body - body)[:HEAD, :2].norm(dim=-1).mean() < SAME_HEAD * side:
        return True
    corners = [torch.stack([points[:, :2].amin(0), points[:, :2].amax(0)]) for points in (known.body, body)]
    shared = (torch.minimum(corners[0][1], corners[1][1]) - torch.maximum(corners[0][0], corners[1][0])).clamp(min=0)
    smaller = min((low_high[1] - low_high[0]).prod() for low_high in corners)
    return bool(shared.prod() > WITHIN * smaller and sure < GHOST * known.score)


def hand(networks: dict[str, Network], picture: Tensor, points: Tensor) -> Tensor | None:
    """The hand (21, 3) at the body's wrist, little finger and index finger, (3, 3); None where none is seen."""
    if points[0, 2] <= WRIST_SEEN:
        return None
    wrist, little, index = points[:, None, :2]  # (1, 2) each
    middle = (2 * index + little) / 3
    box = grown(pointed(middle, 2 * middle - wrist, pi / 2), 2.7)
    (raw,) = networks["hand_box"](crop(picture, box, SIDES["hand_box"]))
    centre, end = project(raw.view(1, 2, 2) / SIDES["hand_box"], box).unbind(1)
    box = grown(pointed(centre, end, -pi / 2), 1.0, down=-0.1)
    raw, presence, *_ = networks["hand"](crop(picture, box, SIDES["hand"]))
    return _scored(raw, presence[0, 0], SIDES["hand"], box)


def face_points(networks: dict[str, Network], picture: Tensor, head: Tensor) -> Tensor | None:
    """The face (468, 3) within the body's points of the head, (11, 3); None where none is seen."""
    head = head[None, :, :2]
    box = grown(around(head, head[:, RIGHT_EYE], head[:, LEFT_EYE], 0.0), 3.0)
    points, _ = detect(networks["face_detector"], picture, box, SIDES["face_detector"], FACE_STRIDES, 0.5)
    if not len(points):
        return None
    keys = points[:1, 2:]  # eyes, nose, mouth and ears of the most certain face
    box = grown(around(keys, keys[:, 0], keys[:, 1], 0.0), 2.0, down=-0.1)
    raw, presence = networks["face"](crop(picture, box, SIDES["face"]))
    return _scored(raw, presence.flatten()[0].sigmoid(), SIDES["face"], box)


def _scored(raw: Tensor, score: Tensor, side: int, box: Tensor) -> Tensor | None:
    if score <= 0.5:
        return None
    (points,) = project(raw.view(1, -1, 3)[..., :2] / side, box)
    return torch.cat([points, score.expand(len(points), 1)], -1)
