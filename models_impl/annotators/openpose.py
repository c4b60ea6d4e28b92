"""People as OpenPose's JSON has them, and the drawing of them that ControlNets know.

Eighteen points of the body, twenty-one of a hand, seventy of a face, each as x, y, confidence. The drawing is that of
PixelPonder's data: sticks four pixels to either side, in colours around the wheel, at 60 % of their brightness below
the joints; hands as thin lines with blue joints; faces as white dots.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import atan2, degrees, hypot, isfinite, nan

import torch
from torch import Tensor

from ..parsing import from_json
from .pose import Person

BODY, HAND, FACE = 18, 21, 70
FROM_BLAZEPOSE = (0, None, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
"""Nose, neck, then shoulder, elbow and wrist, and hip, knee and ankle, the right ones first; eyes, ears likewise."""
NECK, SHOULDERS = 1, (11, 12)
FROM_FACE_MESH = (  # jaw from the right ear, brows, nose, eyes, lips
    127, 234, 93, 132, 172, 136, 150, 176, 152, 400, 379, 365, 397, 361, 323, 454, 356,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,
    168, 197, 195, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,
    78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip
EYES = (range(36, 42), range(42, 48))  # points of the face whose mean stands for the pupil
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
FINGERS = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, HAND))
FARTHEST = 2**20  # pixels from the corner; OpenCV draws shapes up to 2**31 away, and takes seconds for them
AROUND = (-2.0, 3.0)  # fractions of the canvas up to which people may reach; no pose in pixels is so small
PARTS = {"pose_keypoints_2d": BODY, "face_keypoints_2d": FACE, "hand_left_keypoints_2d": HAND,
         "hand_right_keypoints_2d": HAND}


def points_of(person: Person, height: int, width: int) -> dict[str, Tensor]:
    """The parts of PARTS that the person has, as (points, 3) in pixels. Points outside of the picture are 0, 0, 0."""
    body = torch.stack([person.body[i or 0] for i in FROM_BLAZEPOSE])
    shoulders = person.body[list(SHOULDERS)]
    body[NECK] = torch.cat([shoulders[:, :2].mean(0), shoulders[:, 2:].amin(0)])
    parts = {"pose_keypoints_2d": body}
    if person.face is not None:
        face = person.face[list(FROM_FACE_MESH)]
        parts["face_keypoints_2d"] = torch.cat([face, *(face[list(eye)].mean(0, keepdim=True) for eye in EYES)])
    for side in ("left", "right"):
        if (points := getattr(person, side)) is not None:
            parts[f"hand_{side}_keypoints_2d"] = points
    limits = torch.tensor([width, height])
    return {name: p * ((p[:, :2] >= 0) & (p[:, :2] < limits)).all(-1, keepdim=True) for name, p in parts.items()}


def frame(people: Sequence[Person], height: int, width: int) -> dict:
    """One entry of POSE_KEYPOINT: what OpenPose writes as JSON, and the size of the picture."""
    entries = []
    for person in people:
        parts = points_of(person, height, width)
        entries.append({name: [round(v, 3) for v in parts[name].flatten().tolist()] if name in parts else []
                        for name in PARTS})
    return {"version": 1.3, "people": entries, "canvas_height": height, "canvas_width": width}


def read(text: str) -> list[dict]:
    """Frames that can be drawn out of JSON: one frame, or a list of them. Raises ValueError for anything else."""
    return checked(from_json(text, "This pose"))


def checked(frames) -> list[dict]:
    """`plain(frames)`; raises ValueError for bodies that cannot be drawn too."""
    frames = plain(frames)
    for frame in frames:
        for person in frame["people"]:
            if (count := len(person.get("pose_keypoints_2d", ())) // 3) not in (0, BODY):
                raise ValueError(f"pose_keypoints_2d has {count} points. Poses of {BODY} points can be drawn; the 25 "
                                 "of OpenPose's BODY_25 are in another order.")
    return frames


def plain(frames) -> list[dict]:
    """`frames`, or the only one, as a list in plain numbers, every part of every person a whole number of points; what
    is no number is a point that was not seen. Arrays and tensors may stand for lists. Raises ValueError."""
    frames = [frames] if isinstance(frames, Mapping) else _listed(frames)
    if not _is_list(frames) or not all(isinstance(frame, Mapping) for frame in frames):
        raise ValueError("A pose is a frame with a list of people, or a list of such frames.")
    return [_plain(frame) for frame in frames]


def _plain(frame: Mapping) -> dict:
    people = _listed(frame.get("people", ""))
    people = [] if people is None else people
    if not _is_list(people) or not all(person is None or isinstance(person, Mapping) for person in people):
        raise ValueError("This frame of a pose has no list of people.")
    people = [{**person, **{name: _values(name, person[name]) for name in PARTS if name in person}}
              for person in people if person is not None]
    sides = {name: _side(name, frame[name]) for name in ("canvas_height", "canvas_width") if name in frame}
    return {**frame, "people": people, **sides}


def _values(name: str, values) -> list[float]:
    """x, y and confidence of each point of a part, flat; 0 for all three where one is null or not finite."""
    values = [] if values is None else _listed(values)
    if not _is_list(values):
        raise ValueError(f"{name} must be a list with x, y and confidence of each point, and is {str(values)[:40]!r}.")
    values = list(map(_listed, values))
    if all(map(_is_list, values)):
        values = [value for point in values for value in point]  # a list for each point
    try:
        numbers = [nan if value is None else float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold x, y and confidence of each point ({str(error)[:80]}).") from error
    if len(numbers) % 3:
        raise ValueError(f"{name} must hold x, y and confidence of each point, and has {len(numbers)} values.")
    points = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return [value for point in points for value in (point if all(map(isfinite, point)) else (0.0, 0.0, 0.0))]


def _listed(values):
    """Arrays and tensors as lists, everything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_list(values) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def _side(name: str, value) -> int:
    """Pixels of a side of the canvas; 0 where the frame does not say."""
    try:
        side = 0.0 if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}={str(value)[:40]!r} must be a number of pixels.") from error
    return round(side) if isfinite(side) and side >= 1 else 0


def draw(frame: Mapping, height: int, width: int, *, body: bool = True, hands: bool = True, face: bool = True,
         stick: float = 4.0, confidence: float = 0.3) -> Tensor:
    """A frame as (height, width, 3) in [0, 1], on black.

    Points are stretched from the frame's canvas to this size; see `_in_fractions` for those that are fractions of it.
    stick: half the width of a limb in pixels, and the radius of a joint. confidence: points below are left out.
    """
    import cv2
    import numpy

    canvas = numpy.zeros((height, width, 3), numpy.uint8)
    (frame,) = checked(frame)
    down, across = extent(frame, height, width)
    people = [{name: {i: (x * width / across, y * height / down) for i, (x, y, c) in enumerate(points)
                      if c > 0 and c >= confidence and max(abs(x * width / across), abs(y * height / down)) < FARTHEST}
               for name, points in person.items()} for person in _people(frame)]
    radius = max(1, round(stick))
    if body:
        for index, limb in enumerate(LIMBS):
            for points in (p["pose_keypoints_2d"] for p in people):
                if all(joint in points for joint in limb):
                    (x, y), (x2, y2) = (points[joint] for joint in limb)
                    centre, half = (round((x + x2) / 2), round((y + y2) / 2)), round(hypot(x2 - x, y2 - y) / 2)
                    cv2.ellipse(canvas, centre, (half, radius), degrees(atan2(y2 - y, x2 - x)), 0, 360,
                                colour(index / BODY), -1)
        numpy.multiply(canvas, 0.6, out=canvas, casting="unsafe")  # a copy in float64 takes 6 GiB at 16384 pixels
        for points in (p["pose_keypoints_2d"] for p in people):
            for index, (x, y) in points.items():
                cv2.circle(canvas, (round(x), round(y)), radius, colour(index / BODY), -1)
    if hands:
        for points in (p[f"hand_{side}_keypoints_2d"] for p in people for side in ("left", "right")):
            for index, (start, end) in enumerate(FINGERS):
                if start in points and end in points:
                    ends = [tuple(round(v) for v in points[joint]) for joint in (start, end)]
                    cv2.line(canvas, *ends, colour(index / len(FINGERS)), max(1, round(stick / 2)))
            for x, y in points.values():
                cv2.circle(canvas, (round(x), round(y)), radius, (0, 0, 255), -1)
    if face:
        for points in (p["face_keypoints_2d"] for p in people):
            for x, y in points.values():
                cv2.circle(canvas, (round(x), round(y)), max(1, round(stick * 3 / 4)), (255, 255, 255), -1)
    return torch.from_numpy(canvas).float().div_(255)


def colour(turn: float) -> tuple[int, int, int]:
    """RGB of a full colour, `turn` of the way around the wheel from red: index / 18 gives OpenPose's colours."""
    return tuple(round(255 * min(1, max(0, abs((6 * turn + shift) % 6 - 3) - 1))) for shift in (0, 4, 2))


def extent(frame: Mapping, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the canvas in the unit of a plain frame's points: 1, 1 where they are fractions of it;
    `height` and `width` where it does not say. See `_in_fractions`."""
    if _in_fractions(_people(frame)):
        return 1, 1
    return frame.get("canvas_height") or height, frame.get("canvas_width") or width


def _people(frame: Mapping) -> list[dict[str, list[tuple[float, float, float]]]]:
    """Each person's parts as points of x, y and confidence."""
    parts = [{name: person.get(name, ()) for name in PARTS} for person in frame["people"]]
    return [{name: list(zip(values[::3], values[1::3], values[2::3], strict=True)) for name, values in person.items()}
            for person in parts]


def _in_fractions(people: Sequence[Mapping[str, Sequence[tuple]]]) -> bool:
    """Whether the points of a frame are fractions of its canvas and not pixels.

    Parts of a person may lie beside the picture, so fractions reach past 0 and 1: at most AROUND, and then they are
    not all whole numbers as pixels are. One answer for the whole frame: no part of a person has units of its own.
    """
    seen = [value for person in people for points in person.values() for x, y, c in points if c > 0 for value in (x, y)]
    low, high = AROUND
    if not seen or not all(low <= value <= high for value in seen):
        return False
    return all(0 <= value <= 1 for value in seen) or any(value != round(value) for value in seen)
