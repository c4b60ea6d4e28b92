"""PixelFlow's nodes: load, condition, choose a size, sample. The VAE is core's `pixel_space`."""
from __future__ import annotations

import math

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui

from ..models_impl.pixelflow.config import PixelFlowConfig
from ..models_impl.pixelflow.schedule import CascadeSchedule
from ..models_impl.pixelflow.stages import Stages
from .checks import CheckedNode, first_problem, known_file, one_of
from .host.common import files
from .host.common.load import DTYPES, FAST, MODEL_DTYPES
from .host.common.shown import kept
from .host.common.text import load_t5
from .host.pixelflow import imagenet
from .host.pixelflow import sampling as cascade
from .host.pixelflow.load import load_pixelflow
from .host.pixelflow.model import CLASS_LABELS
from .host.pixelflow.strip import FilmStrip
from .schema import schema

CATEGORY = "pixstack/pixelflow"
WEIGHTS = ["ema", "model"]
DEVICES = ["default", "cpu"]
STRIPS = 16  # pictures of a batch whose film strips the browser gets
TEXT_TYPES = {"pixelflow, pixart": False, "flux": True}  # whether texts are padded
SOLVERS = ["euler", "dopri5"]
LAST_STAGE = 7  # more stages than any cascade has: 128 times the size of the first
SHAPES = {  # width : height
    "square": (1, 1),
    "landscape 3:2": (3, 2),
    "landscape 16:9": (16, 9),
    "portrait 2:3": (2, 3),
    "portrait 9:16": (9, 16),
}
CUSTOM = "custom (width, height)"
PRESETS = {  # what the release took, and a quick draft
    "demo": dict(steps=10, shift=1.0, cfg=4.0),
    "evaluation": dict(steps=30, shift=1.0, cfg=2.4),
    "draft": dict(steps=4, shift=1.0, cfg=4.0),
}


class PixelFlowLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowLoader",
            display_name="Load PixelFlow Model",
            category=CATEGORY,
            search_aliases=["pixelflow checkpoint", "pixel space model", "class to image", "without vae"],
            advanced=("weights",),
            description="Loads a PixelFlow transformer: a released model.pt, a training checkpoint, or the small emoji "
            "model that comes with PixStack.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.listed("diffusion_models"),
                    tooltip="A file in models/diffusion_models. A config.yaml beside it is read too.",
                ),
                io.Combo.Input(
                    "weights",
                    options=WEIGHTS,
                    default="ema",
                    tooltip="Which weights of a training checkpoint: averaged (ema, better pictures) or raw "
                    "(model). Files with one set of weights ignore this.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(MODEL_DTYPES),
                    default="default",
                    tooltip="How the weights are stored. default: as ComfyUI finds best for this machine. fp8_e4m3fn "
                    "needs a quarter of fp32's memory and computes in bf16 or fp32; fp8_e4m3fn_fast multiplies in fp8 "
                    "as well, faster and a little less exact, on GPUs that can (RTX 40 series and later).",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Goes to LoRA loaders, 'PixelFlow Canvas' and the samplers.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, weights=None, dtype=None):
        return first_problem(
            known_file("diffusion_models", model_name), one_of("weights", weights, WEIGHTS),
            one_of("dtype", dtype, MODEL_DTYPES),
        )

    @classmethod
    def execute(cls, model_name, weights, dtype) -> io.NodeOutput:
        path = files.find_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_pixelflow(path, weights, MODEL_DTYPES[dtype], fast=dtype == FAST))


class PixelFlowTextEncoderLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowTextEncoderLoader",
            display_name="Load T5 Text Encoder",
            category="pixstack/text",
            search_aliases=["flan t5 xl", "load flan-t5", "clip loader", "load clip", "prompt encoder"],
            description="Loads a T5 encoder: flan-t5-xl for the released PixelFlow, the small one of PixStack for the "
            "emoji models of every family. Core's CLIP loader reads flan-t5-xl with another vocabulary.",
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=files.listed("text_encoders"),
                    tooltip="A file in models/text_encoders. A whole T5 may be given, its decoder is left out.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="How the weights are stored. default: as in the file. The encoder computes in fp32 "
                    "whatever is chosen.",
                ),
                io.Combo.Input(
                    "device",
                    options=DEVICES,
                    default="default",
                    tooltip="cpu: keep the encoder off the GPU; slower, and the GPU's memory stays free.",
                ),
                io.Combo.Input(
                    "type", options=list(TEXT_TYPES), default=next(iter(TEXT_TYPES)), optional=True,
                    tooltip="Which models the text is for. flux: for a FLUX or a small Stable Cascade trained with "
                    "this encoder; the text is padded to the encoder's full length, as both attend to all of it.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="Goes to core's CLIP Text Encode, once for each prompt.")],
        )

    @classmethod
    def validate_inputs(cls, encoder_name=None, dtype=None, device=None, type=None):
        return first_problem(
            known_file("text_encoders", encoder_name), one_of("dtype", dtype, DTYPES),
            one_of("device", device, DEVICES), one_of("type", type, TEXT_TYPES),
        )

    @classmethod
    def execute(cls, encoder_name, dtype, device, type="pixelflow, pixart") -> io.NodeOutput:
        path = files.find_or_raise("text_encoders", encoder_name)
        where = torch.device("cpu") if device == "cpu" else None
        return io.NodeOutput(load_t5(path, DTYPES[dtype], where, padded=TEXT_TYPES[type]))


class PixelFlowClass(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowClass",
            display_name="PixelFlow Class (ImageNet)",
            category=CATEGORY,
            search_aliases=["imagenet label", "class label", "class conditioning", "category"],
            description="What a class-conditional PixelFlow draws: one of ImageNet's 1000 classes, or several; with a "
            "model of other pictures connected, classes of those.",
            inputs=[
                io.Combo.Input(
                    "imagenet_class",
                    options=imagenet.options(),
                    default=imagenet.options()[207],
                    tooltip="Open the menu and type a part of the name to find a class.",
                ),
                io.String.Input(
                    "classes",
                    default="",
                    placeholder="207, otter, 417",
                    tooltip="Several classes, as indices or names with commas between, one for each picture of the "
                    "batch in turn. Empty: the class of the menu above. Indices past 999 are for models trained on "
                    "other pictures.",
                ),
                io.Model.Input("model", optional=True, tooltip="Only for a model trained on classes of its own, as the "
                               "small one of emoji: `classes` then takes their names."),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING",
                                       tooltip="For the sampler's positive input."),
                io.Conditioning.Output(
                    "null_conditioning", display_name="null conditioning",
                    tooltip="The null class, for the sampler's negative input.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, classes="", model=None, input_types=None):
        kind = (input_types or {}).get("model")
        if kind not in (None, "*", "MODEL"):  # ComfyUI leaves links to a node that asks for `input_types`
            return f"model takes a MODEL, and {kind} is connected."
        if kind or model is not None:
            return True  # whose names count is known when it runs
        try:
            imagenet.parse_classes(classes or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, imagenet_class, classes, model=None) -> io.NodeOutput:
        own = class_names(model) if model is not None else ()
        labels = imagenet.parse_classes(classes, own)
        if own and not labels:
            raise ValueError("This model was trained on classes of its own, not on ImageNet's. Write one or more of "
                             f"them into `classes`: {', '.join(own)}.")
        labels = labels or imagenet.parse_classes(imagenet_class)
        return io.NodeOutput(class_conditioning(labels), class_conditioning([-1]))


def class_names(model) -> tuple[str, ...]:
    """Names that a PixelFlow has for its classes; none where they are ImageNet's."""
    cascade.config_of(model)  # refuses other families
    return model.model.class_names


def class_conditioning(labels: list[int]) -> list:
    """A conditioning without text tokens; -1 becomes the null class of the model that reads it."""
    return [[torch.zeros(1, 1, 1), {CLASS_LABELS: torch.tensor(labels)}]]


class PixelFlowCanvas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowCanvas",
            display_name="PixelFlow Canvas (Empty Latent)",
            category=CATEGORY,
            search_aliases=["pixelflow resolution", "pixelflow aspect ratio", "width and height", "image size"],
            counts={side: {"shape": [CUSTOM]} for side in ("width", "height")},
            description="An empty picture of a size that every stage of the model can be cut into tokens at.",
            inputs=[
                io.Model.Input("model", tooltip="The PixelFlow model: its stages decide which sizes are allowed."),
                io.Combo.Input(
                    "shape",
                    options=[*SHAPES, CUSTOM],
                    default="square",
                    tooltip="A shape with about as many pixels as the model was trained on (released models saw "
                    "squares only), or the width and height below.",
                ),
                io.Int.Input(
                    "width", default=256, min=16, max=8192, step=16,
                    tooltip="Pixels, for the shape 'custom': a multiple of 32 with the released models, of 16 with the "
                    "emoji model.",
                ),
                io.Int.Input(
                    "height", default=256, min=16, max=8192, step=16,
                    tooltip="Pixels, for the shape 'custom': a multiple of 32 with the released models, of 16 with the "
                    "emoji model.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures drawn at once."),
            ],
            outputs=[io.Latent.Output(tooltip="Goes to the sampler. PixelFlow's latent is the picture itself.")],
        )

    @classmethod
    def validate_inputs(cls, shape=None):
        return one_of("shape", shape, (*SHAPES, CUSTOM))

    @classmethod
    def execute(cls, model, shape, width, height, batch_size) -> io.NodeOutput:
        config = cascade.config_of(model)
        height, width = cls.size(config, shape, width, height)
        picture = torch.zeros(batch_size, config.in_channels, height, width, device=mm.intermediate_device())
        return io.NodeOutput({"samples": picture}, ui=ui.PreviewText(cascade.about_size(height, width, config)))

    @staticmethod
    def size(config: PixelFlowConfig, shape: str, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        if shape == CUSTOM:
            cascade.check_size(height, width, config.size_multiple)
            return height, width
        return size_of_shape(*SHAPES[shape], config.resolution, config.size_multiple)[::-1]


def size_of_shape(across: int, down: int, resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height) of about resolution**2 pixels in the ratio across : down."""
    ratio = (across / down) ** 0.5
    return tuple(max(1, round(side / multiple)) * multiple for side in (resolution * ratio, resolution / ratio))


def stage_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "start_stage", default=0, min=0, max=LAST_STAGE,
            tooltip="Stage to begin with, 0 = from pure noise. Later ones begin with the picture in the latent: image "
            "to image, the later the closer to it. The emoji model has stages 0 to 2, the released models 0 to 3.",
        ),
        io.Int.Input(
            "end_stage", default=-1, min=-1, max=LAST_STAGE,
            tooltip="Stage to end with, -1 = the last. An earlier one gives a small draft quickly: each stage left out "
            "halves width and height.",
        ),
    ]


def solver_input() -> io.Input:
    return io.Combo.Input(
        "solver", options=SOLVERS, default="euler",
        tooltip="euler: the given number of steps. dopri5: adaptive, takes as many as its tolerance of 0.001 needs and "
        "ignores steps and shift.",
    )


def numbers(text: str, name: str, kind: type = float) -> list:
    """'10' or '10, 10, 20' -> a list of numbers."""
    try:
        values = [kind(entry) for entry in text.split(",") if entry.strip()]
    except ValueError as error:
        raise ValueError(f"{name}={text!r:.100} is not a number, or numbers with commas between.") from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name}={text!r:.100} holds a number that is not finite.")
    if not values:
        raise ValueError(f"{name} is empty: give one number, or one for each stage with commas between.")
    return values


def per_stage(text: str, name: str, num_stages: int, kind: type = float) -> list:
    values = numbers(text, name, kind)
    if len(values) not in (1, num_stages):
        raise ValueError(f"{name}={text!r} has {len(values)} numbers, this model has {num_stages} stages: give one "
                         "number, or one for each stage.")
    return values if len(values) > 1 else values * num_stages


def schedule(
    num_stages: int, steps: list[int], shift: list[float], start_stage: int, end_stage: int
) -> CascadeSchedule:
    stages = Stages(num_stages)
    last = stages.num_stages - 1
    end_stage = last if end_stage < 0 else end_stage
    if not start_stage <= end_stage <= last:
        raise ValueError(f"start_stage {start_stage} and end_stage {end_stage} do not go together: this model has the "
                         f"stages 0 to {last}, and ends with the one it starts with or a later one.")
    return CascadeSchedule.build(stages, steps, shift, start_stage=start_stage, end_stage=end_stage)


class PixelFlowSigmas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowSigmas",
            display_name="PixelFlow Sigmas (Scheduler)",
            category=CATEGORY,
            search_aliases=["pixelflow steps", "per stage steps", "cascade schedule"],
            description="The steps of all stages in one schedule, for SamplerCustomAdvanced with 'PixelFlow Sampler'. "
            "Its sigmas fall from 1 to 0 over the whole cascade and can be split anywhere.",
            inputs=[
                io.Model.Input("model", tooltip="The PixelFlow model: it knows how many stages there are."),
                io.String.Input(
                    "steps", default="10",
                    tooltip="Steps in each stage, at least 1: one number for all, or one for each, as '20, 10, 10'.",
                ),
                io.String.Input(
                    "shift", default="1.0",
                    tooltip="Above 1: more of each stage's steps near its noisy start; 1 spaces them evenly. Above 0, "
                    "one number for all, or one for each stage. The released demo offers 1 to 100.",
                ),
                *stage_inputs(),
            ],
            outputs=[io.Sigmas.Output(tooltip="Steps of all stages, high to low.")],
        )

    @classmethod
    def validate_inputs(cls, steps="10", shift="1"):
        try:
            for name, values in (("steps", numbers(steps, "steps", int)), ("shift", numbers(shift, "shift"))):
                if min(values) <= 0:
                    return f"{name} must be above 0, got {min(values)}."
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, steps, shift, start_stage, end_stage) -> io.NodeOutput:
        num_stages = cascade.config_of(model).num_stages
        steps, shift = per_stage(steps, "steps", num_stages, int), per_stage(shift, "shift", num_stages)
        return io.NodeOutput(schedule(num_stages, steps, shift, start_stage, end_stage).sigmas())


class PixelFlowSampler(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowSampler",
            display_name="PixelFlow Sampler",
            category=CATEGORY,
            counts={"custom_guidance": {"guidance": ["custom"]}},
            search_aliases=["per stage guidance", "dopri5", "ode solver", "cascade sampler"],
            description="Grows the picture from stage to stage. For SamplerCustomAdvanced or SamplerCustom, with the "
            "sigmas of 'PixelFlow Sigmas'. The guider's cfg is the strength of guidance.",
            inputs=[
                solver_input(),
                io.Combo.Input(
                    "guidance", options=list(cascade.POLICIES), default="auto",
                    tooltip="How the guider's cfg is spread over the stages. constant: the same in all (text models). "
                    "scaled: none in the first stage, growing to cfg in the last of four (class models). auto: what "
                    "fits the model. custom: the numbers below, instead of the guider's cfg.",
                ),
                io.String.Input(
                    "custom_guidance", default="", placeholder="1, 2, 3, 4",
                    tooltip="For guidance 'custom': a cfg for each stage, with commas between; 1 means no guidance and "
                    "halves the cost of that stage.",
                ),
                io.Boolean.Input(
                    "reference_noise", default=False,
                    tooltip="Draw all noise number for number as the original program does with the same seed and "
                    "batch. Slow: it is drawn block after block.",
                ),
                io.Combo.Input(
                    "latent", options=list(cascade.LATENTS), default="auto",
                    tooltip="What the latent holds when the sigmas start below 1. picture: one to add noise to. state: "
                    "what another sampler left off with. auto: a state in the middle of a stage or when noise is "
                    "disabled, otherwise a picture.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def validate_inputs(cls, solver=None, guidance=None, custom_guidance="", latent=None):
        try:
            if guidance == "custom":
                numbers(custom_guidance, "custom_guidance")
        except ValueError as error:
            return str(error)
        return first_problem(
            one_of("solver", solver, SOLVERS), one_of("guidance", guidance, cascade.POLICIES),
            one_of("latent", latent, cascade.LATENTS),
        )

    @classmethod
    def execute(cls, solver, guidance, custom_guidance, reference_noise, latent) -> io.NodeOutput:
        scales = numbers(custom_guidance, "custom_guidance") if guidance == "custom" else []
        return io.NodeOutput(cascade.CascadeSampler(solver, guidance, scales, reference_noise, latent))


class PixelFlowSample(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelFlowSample",
            display_name="PixelFlow Sample (KSampler)",
            category=CATEGORY,
            counts={name: {"solver": ["euler"]} for name in ("steps", "shift")},
            search_aliases=["pixelflow ksampler", "pixelflow generate", "txt2img pixels", "cascade"],
            essentials_category="Image Generation",
            description="Draws with PixelFlow: the whole cascade in one node. For settings that differ between stages "
            "use 'PixelFlow Sampler' and 'PixelFlow Sigmas'.",
            inputs=[
                io.Model.Input("model", tooltip="A PixelFlow model."),
                io.Conditioning.Input("positive", tooltip="The prompt, or the class, to draw."),
                io.Conditioning.Input(
                    "negative", tooltip="The prompt to lead away from (usually empty), or the null class."
                ),
                io.Latent.Input(
                    "latent", tooltip="From 'PixelFlow Canvas'; or a picture encoded with the VAE 'pixel_space', to "
                    "begin with at a later stage.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The same seed with the same settings gives the same picture.",
                ),
                io.Int.Input(
                    "steps", default=10, min=1, max=1000,
                    tooltip="Steps in each stage. 10 is the released demo's, 30 the paper's evaluation.",
                ),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Strength of guidance. 1: none, and half the cost. 4 is the released demo's, 2.4 the "
                    "evaluation's for classes.",
                ),
                io.Float.Input(
                    "shift", default=1.0, min=0.01, max=100.0, step=0.1, round=0.01,
                    tooltip="Above 1: more of each stage's steps near its noisy start. 1 spaces them evenly.",
                ),
                solver_input(),
                *stage_inputs(),
            ],
            outputs=[
                io.Latent.Output("picture", display_name="LATENT",
                                 tooltip="The picture: decode it with the VAE 'pixel_space'."),
                io.Image.Output("strip", display_name="film strip",
                                tooltip="The picture after each stage, side by side, 256 pixels high."),
            ],
        )

    @classmethod
    def validate_inputs(cls, solver=None):
        return one_of("solver", solver, SOLVERS)

    @classmethod
    def execute(
        cls, model, positive, negative, latent, seed, steps, cfg, shift, solver, start_stage, end_stage
    ) -> io.NodeOutput:
        num_stages = cascade.config_of(model).num_stages
        sigmas = schedule(num_stages, [steps] * num_stages, [shift] * num_stages, start_stage, end_stage).sigmas()
        film = FilmStrip()
        sampler = cascade.CascadeSampler(solver, latent="picture", watch=film)
        picture = cascade.run(model, positive, negative, latent, seed, cfg, sampler, sigmas)
        strip = film.strip()
        shown = {"strips": kept(strip[:STRIPS]), "sizes": film.sizes}
        return io.NodeOutput(picture, strip, ui={"pixstack_stages": [shown]})


NODES = [
    PixelFlowLoader,
    PixelFlowTextEncoderLoader,
    PixelFlowClass,
    PixelFlowCanvas,
    PixelFlowSigmas,
    PixelFlowSampler,
    PixelFlowSample,
]
