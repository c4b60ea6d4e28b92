"""UltraPixel's nodes around core's Stage C: the guide, its sampler, and sizes."""
from __future__ import annotations

from comfy_api.latest import io, ui

from .checks import CheckedNode, first_problem, known_file, one_of
from .host.common import files
from .host.common.load import DTYPES
from .host.ultrapixel import guide as ultrapixel
from .host.ultrapixel import sizes as ultrapixel_sizes
from .host.ultrapixel.load import load_cascade
from .host.ultrapixel.sampling import GuidedSampler
from .schema import schema

CATEGORY = "pixstack/ultrapixel"
FOLDER = "model_patches"
GuideType = io.Custom("PIXSTACK_ULTRAPIXEL_GUIDE")
AS_RELEASED = -1.0
CUSTOM, AS_IMAGE = "custom (width, height)", "as the image"
SHAPES = {  # width : height
    "square": (1, 1),
    "landscape 4:3": (4, 3),
    "landscape 3:2": (3, 2),
    "landscape 16:9": (16, 9),
    "landscape 2:1": (2, 1),
    "landscape 21:9": (21, 9),
    "portrait 3:4": (3, 4),
    "portrait 2:3": (2, 3),
    "portrait 9:16": (9, 16),
    "portrait 1:2": (1, 2),
    "portrait 9:21": (9, 21),
}


class CascadeLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_CascadeLoader",
            display_name="Load Small Stable Cascade Model",
            category=CATEGORY,
            search_aliases=["tiny stable cascade", "small stage c", "small stage b", "ultrapixel emoji"],
            description="Loads a Stage C or Stage B of any size that PixStack's trainer made: its file states its "
            "shape. Released files of Stable Cascade load with core's Load Diffusion Model.",
            inputs=[
                io.Combo.Input("model_name", options=files.listed("diffusion_models"),
                               tooltip="A file in models/diffusion_models that the trainer exported."),
                io.Combo.Input("dtype", options=list(DTYPES), default="default",
                               tooltip="How the weights are stored. default: as ComfyUI finds best for this machine."),
            ],
            outputs=[io.Model.Output(tooltip="Core's own Stage C or B: for 'UltraPixel Guide', 'UltraPixel Stage B', "
                                     "LoRA loaders and any sampler. Prompts come from 'Load T5 Text Encoder', type "
                                     "flux.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, dtype=None):
        return first_problem(known_file("diffusion_models", model_name), one_of("dtype", dtype, DTYPES))

    @classmethod
    def execute(cls, model_name, dtype) -> io.NodeOutput:
        path = files.find_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_cascade(path, DTYPES[dtype]))


class UltraPixelGuideLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelGuideLoader",
            display_name="Load UltraPixel Guide",
            category=CATEGORY,
            search_aliases=["ultrapixel checkpoint", "stable cascade guide", "ultrapixel loader"],
            description="Loads UltraPixel's guide, the small network that turns the features of a low-resolution pass "
            "into those of a large picture. Stage C itself, Stage B and Stage A load with core's nodes.",
            inputs=[
                io.Combo.Input("guide_name", options=files.listed(FOLDER),
                               tooltip="ultrapixel_t2i.safetensors, released or converted, in models/model_patches."),
            ],
            outputs=[GuideType.Output("guide", display_name="GUIDE", tooltip="For 'UltraPixel Guide'.")],
        )

    @classmethod
    def validate_inputs(cls, guide_name=None):
        return known_file(FOLDER, guide_name)

    @classmethod
    def execute(cls, guide_name) -> io.NodeOutput:
        return io.NodeOutput(ultrapixel.load_guide(files.find_or_raise(FOLDER, guide_name)))


class UltraPixelGuide(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelGuide",
            display_name="UltraPixel Guide",
            category=CATEGORY,
            search_aliases=["high resolution", "stable cascade upscale", "rescale cfg"],
            advanced=("down", "up", "rescale"),
            description="Puts UltraPixel's guide on core's Stage C (3.6B). The weights stay where they are, LoRAs and "
            "ControlNets before or after it keep working. Sample with 'UltraPixel Sampler'.",
            inputs=[
                io.Model.Input("model", tooltip="Stage C of Stable Cascade, from core's Load Diffusion Model."),
                GuideType.Input("guide", tooltip="From 'Load UltraPixel Guide'."),
                io.Float.Input(
                    "down", default=1.0, min=0.0, max=4.0, step=0.05, round=0.001,
                    tooltip="Strength of the guide on the way down. 1: as trained.",
                ),
                io.Float.Input(
                    "up", default=AS_RELEASED, min=-1.0, max=4.0, step=0.05, round=0.001,
                    tooltip="Strength on the way up. -1: as released, 0.3 for pictures of less than about 3030 x 3030 "
                    "pixels, 0.5 below 4054 x 4054, 0.7 from there on. More follows the low-resolution pass more "
                    "closely.",
                ),
                io.Float.Input(
                    "rescale", default=0.7, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="How far guidance by cfg is brought back to the contrast without guidance, for each "
                    "picture. 0.7: as released. 0: plain cfg.",
                ),
                io.Float.Input(
                    "shift", default=1.0, min=0.01, max=100.0, step=0.1, round=0.001,
                    tooltip="Shift of the noise levels: above 1 more steps near the noise. Releases: 1 for text to "
                    "image, 2 with a ControlNet.",
                ),
            ],
            outputs=[io.Model.Output("guided", display_name="MODEL",
                                     tooltip="For the guider (CFGGuider, cfg 4) and the scheduler ('simple', 20 "
                                     "steps).")],
        )

    @classmethod
    def validate_inputs(cls, up=AS_RELEASED):
        if up is not None and up < 0 and up != AS_RELEASED:
            return f"up={up} means nothing: give 0 or more, or -1 for the released strengths."
        return True

    @classmethod
    def execute(cls, model, guide, down, up, rescale, shift) -> io.NodeOutput:
        strengths = ultrapixel.Strengths(down, None if up == AS_RELEASED else up)
        return io.NodeOutput(ultrapixel.patch(model, guide, strengths, rescale, shift))


class UltraPixelSampler(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelSampler",
            display_name="UltraPixel Sampler (Stable Cascade)",
            category=CATEGORY,
            search_aliases=["4k sampler", "two pass", "hires fix", "highres"],
            advanced=("reference",),
            description="Draws at low resolution first, keeps the features of its end, and draws the large picture "
            "guided by them. For SamplerCustomAdvanced, with the MODEL of 'UltraPixel Guide' in the guider and the "
            "scheduler.",
            inputs=[
                io.Boolean.Input(
                    "reference", default=False,
                    tooltip="Repeats the original program: one stream of noise for everything, guidance "
                    "rescaled over the whole batch, the guide from the last step, none after step 20.",
                ),
                io.Latent.Input(
                    "low_latent", optional=True,
                    tooltip="'low' of 'UltraPixel Canvas': the size of the low-resolution pass, and for image to image "
                    "what it starts from. Without it the size follows from the picture's.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, reference, low_latent=None) -> io.NodeOutput:
        return io.NodeOutput(GuidedSampler(None if low_latent is None else low_latent["samples"], reference))


class UltraPixelCanvas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelCanvas",
            display_name="UltraPixel Canvas (4K, Stable Cascade)",
            category=CATEGORY,
            search_aliases=["ultrapixel resolution", "ultrapixel aspect ratio", "ultrapixel empty latent", "2k", "8k",
                            "ultra hd"],
            counts={"side": {"shape": [*SHAPES, AS_IMAGE]},
                    **{edge: {"shape": [CUSTOM]} for edge in ("width", "height")}},
            replaced={"batch_size": ["image"]},
            description="The latents of a picture's size: Stage C's, its low-resolution pass's and Stage B's. Empty, "
            "or of a picture to change. Says what the size costs and what is wrong with it.",
            inputs=[
                io.Combo.Input("shape", options=[*SHAPES, CUSTOM, AS_IMAGE], default="square",
                               tooltip="Width : height at the size of 'side', or the width and height below."),
                io.Int.Input("side", default=2048, min=256, max=8192, step=64,
                             tooltip="Pixels: the picture has as many as a square of this side. Not for the shape "
                             "'custom'."),
                io.Int.Input("width", default=2048, min=256, max=16384, step=8,
                             tooltip="Pixels, for the shape 'custom'; the nearest multiple of 8 is taken."),
                io.Int.Input("height", default=2048, min=256, max=16384, step=8,
                             tooltip="Pixels, for the shape 'custom'; the nearest multiple of 8 is taken."),
                io.Int.Input("batch_size", default=1, min=1, max=4096,
                             tooltip="Pictures drawn at once. With an image: as many as there are images."),
                io.Image.Input("image", optional=True, tooltip="A picture to change, cut to the shape."),
                io.Vae.Input("vae", optional=True,
                             tooltip="effnet_encoder.safetensors from core's Load VAE, to encode the image."),
            ],
            outputs=[
                io.Latent.Output("stage_c", display_name="stage_c", tooltip="For SamplerCustomAdvanced."),
                io.Latent.Output("low", display_name="low", tooltip="For 'UltraPixel Sampler'."),
                io.Latent.Output("stage_b", display_name="stage_b", tooltip="For the sampler of Stage B."),
                io.String.Output("report", display_name="report",
                                 tooltip="Size, tokens, memory and warnings in words, as below the node."),
            ],
        )

    @classmethod
    def validate_inputs(cls, shape=None):
        return first_problem(one_of("shape", shape, [*SHAPES, CUSTOM, AS_IMAGE]))

    @classmethod
    def execute(cls, shape, side, width, height, batch_size, image=None, vae=None) -> io.NodeOutput:
        if (image is None) != (vae is None):
            raise ValueError("To change a picture connect both, the image and the VAE (effnet_encoder.safetensors).")
        asked, size = cls.size(shape, side, width, height, None if image is None else image.shape[1:3])
        if image is None:
            latents = ultrapixel_sizes.empty(*size, batch_size)
        else:
            latents, batch_size = ultrapixel_sizes.encoded(image, vae, *size), len(image)
        report = ultrapixel_sizes.report(*size, asked, batch_size)
        return io.NodeOutput(*latents, report, ui=ui.PreviewText(report))

    @staticmethod
    def size(shape: str, side: int, width: int, height: int, seen=None) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in pixels as asked for, and as drawn. seen: height and width of the image."""
        if shape == AS_IMAGE and seen is None:
            raise ValueError(f"The shape {AS_IMAGE!r} needs an image: connect one, or choose another shape.")
        asked = (height, width)
        if shape != CUSTOM:
            across, down = SHAPES.get(shape) or (seen[1], seen[0])
            asked = ultrapixel_sizes.of_shape(down, across, side)
        size = ultrapixel_sizes.snapped(*asked)
        ultrapixel_sizes.check(*size)
        return asked, size


NODES = [CascadeLoader, UltraPixelGuideLoader, UltraPixelGuide, UltraPixelSampler, UltraPixelCanvas]
