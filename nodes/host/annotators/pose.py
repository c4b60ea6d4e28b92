"""The files of the networks that find poses, and poses of whole batches."""
from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ....models_impl.annotators import openpose, pose
from ....models_impl.annotators.resize import MOST, OWN, RELEASE, bounded, resized
from ..common.pictures import colours

FOLDER = "annotators"
BODIES = ["full", "lite", "heavy"]
WHEEL = "mediapipe-*.whl"
HOW = (
    "MediaPipe 0.10.21's wheel holds them (36 MB, later ones hold none), and can be put there as it is: pip download "
    "--no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_28_x86_64 mediapipe==0.10.21 -d "
)
OTHER_BODIES = "pose_landmark_lite.tflite and pose_landmark_heavy.tflite are in the npm package @mediapipe/pose."


def wanted(body: str, hands: bool, face: bool) -> dict[str, str]:
    """part -> file in MediaPipe's wheel, of the parts that are asked for."""
    files = {**pose.FILES, "body": pose.FILES["body"].replace("full", body)}
    parts = ["detector", "body", *(["hand_box", "hand"] if hands else []), *(["face_detector", "face"] if face else [])]
    return {part: files[part] for part in parts}


def existing(files: dict[str, str]) -> dict[str, bytes | Path]:
    """part -> the file, or its contents where it is inside a wheel: those of `files` that exist.

    A file of that name anywhere in models/annotators comes first, then a wheel of MediaPipe there, then an installed
    MediaPipe, which is not imported.
    """
    places: dict[str, bytes | Path] = {}
    lying = {Path(name).name: name for name in folder_paths.get_filename_list(FOLDER)}
    for part, file in files.items():
        if name := lying.get(Path(file).name):
            places[part] = Path(folder_paths.get_full_path_or_raise(FOLDER, name))
    for name in lying.values():
        if Path(name).match(WHEEL) and places.keys() != files.keys():
            places = {**_in_wheel(folder_paths.get_full_path_or_raise(FOLDER, name), files), **places}
    installed = find_spec("mediapipe")
    for root in installed.submodule_search_locations or [] if installed else []:
        for part, file in files.items():
            if part not in places and (path := Path(root, "modules", file)).is_file():
                places[part] = path
    return places


def _in_wheel(path: str, files: dict[str, str]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as wheel:
            held = set(wheel.namelist())
            names = {part: f"mediapipe/modules/{file}" for part, file in files.items()}
            return {part: wheel.read(name) for part, name in names.items() if name in held}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{Path(path).name} is not a complete wheel ({error}): download it again.") from error


def problem(body: str, hands: bool, face: bool) -> str | None:
    """A sentence on what is missing to find poses and how to get it; None when nothing is."""
    if find_spec("ai_edge_litert") is None:
        return "Finding poses needs the package ai-edge-litert: pip install ai-edge-litert"
    files = wanted(body, hands, face)
    missing = [Path(file).name for part, file in files.items() if part not in existing(files)]
    if not missing:
        return None
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    text = f"{', '.join(missing)} not found in models/{FOLDER}. {HOW}{folder}"
    return text if body == "full" else f"{text} . {OTHER_BODIES}"


def find(image: Tensor, body: str, hands: bool, face: bool, most: int, confidence: float, search: int,
         resolution: int = OWN) -> list[dict]:
    """image: an IMAGE -> a frame of POSE_KEYPOINT for each, to be drawn at `resolution`."""
    image = colours(image)
    drawn_size(*image.shape[1:3], resolution)  # refused before anybody is looked for
    if reason := problem(body, hands, face):
        raise ValueError(reason)
    places, files = existing(wanted(body, hands, face)), wanted(body, hands, face)
    networks = {part: pose.Graph(where if isinstance(where, bytes) else where.read_bytes(), Path(files[part]).name)
                for part, where in places.items()}
    bar, frames = comfy.utils.ProgressBar(len(image)), []
    for picture in image.movedim(-1, 1):
        mm.throw_exception_if_processing_interrupted()
        people = pose.people(networks, picture, hands=hands, face=face, most=most, confidence=confidence, search=search)
        frames.append(openpose.frame(people, *picture.shape[1:]))
        bar.update(1)
    return frames


def draw(frames: list[dict], height: int = 0, width: int = 0, resolution: int = OWN, **how) -> Tensor:
    """Frames (`openpose.checked`) as one batch (B, height, width, 3) in [0, 1]; 0 stands for the first frame's canvas.

    resolution: pixels of the shorter side at which it is drawn before it is brought to that size, as `seen` has it.
    """
    if not frames:
        raise ValueError("There is no pose to draw: the list of frames is empty.")
    first = frames[0]
    height, width = height or first.get("canvas_height") or 0, width or first.get("canvas_width") or 0
    size = drawn_size(height, width, resolution)
    drawn = torch.stack([openpose.draw(frame, *size, **how) for frame in frames])
    return resized(drawn.movedim(-1, 1), height, width).movedim(1, -1).contiguous().to(mm.intermediate_device())


def drawn_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) in pixels at which poses of a picture are drawn. Raises ValueError where that cannot be."""
    if not height or not width:
        raise ValueError(f"A pose cannot be drawn at {width}x{height} pixels: it does not say the size of its canvas. "
                         "Set width and height.")
    if max(height, width) > MOST:
        raise ValueError(f"A pose on a picture of {width}x{height} pixels cannot be drawn: a side has at most {MOST}. "
                         "Crop it, or make it smaller.")
    side = max(height, width) if resolution == RELEASE else resolution or min(height, width)
    scale = side / min(height, width)
    return bounded(round(height * scale), round(width * scale), (height, width))
