"""PixArt's nodes: load, encode, choose a size. Sampling and ControlNets have files of their own; T5-XXL and the VAE are
loaded by core, a small model's T5 by PixelFlow's loader."""
from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui

from ..models_impl.pixart import buckets
from ..models_impl.pixart.config import PixArtConfig
from ..models_impl.pixart.prompts import STYLES, apply_style, parse
from ..models_impl.text.captions import clean_caption, cleaning_needs
from .checks import CheckedNode, first_problem, known_file, one_of
from .host.common import files
from .host.common.load import FAST, MODEL_DTYPES
from .host.pixart import lora as pixart_lora
from .host.pixart import sizes as pixart_sizes
from .host.pixart import text as pixart_text
from .host.pixart.load import load_pixart
from .host.pixart.model import config_of
from .schema import schema

CATEGORY = "pixstack/pixart"
AUTO = "auto"
WEIGHTS = ["ema", "model"]
VARIANTS = [AUTO, "alpha", "sigma"]
PREDICTIONS = {
    AUTO: {},
    "eps": dict(prediction="eps", zero_terminal_snr=False),
    "v": dict(prediction="v", zero_terminal_snr=False),
    "v, zero terminal SNR": dict(prediction="v", zero_terminal_snr=True),
    "v, scaled linear, zero terminal SNR": dict(prediction="v", schedule="scaled_linear", zero_terminal_snr=True),
}
POSITIONS = {AUTO: {}, "16 (alpha 256)": dict(position_range=16.0), "32 (all others)": dict(position_range=32.0)}
LIMITS = {"alpha": 120, "sigma": 300}
SHAPES = {  # width : height
    "1:1": (1, 1), "4:3": (4, 3), "3:2": (3, 2), "16:9": (16, 9), "2:1": (2, 1), "21:9": (21, 9), "4:1": (4, 1),
    "3:4": (3, 4), "2:3": (2, 3), "9:16": (9, 16), "1:2": (1, 2), "9:21": (9, 21), "1:4": (1, 4),
}  # fmt: skip
NEAREST, EXACT = "nearest to width x height", "exactly width x height"
RESOLUTIONS = [AUTO, *map(str, buckets.TABLES)]


class PixArtLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtLoader",
            display_name="Load PixArt Model",
            category=CATEGORY,
            search_aliases=["pixart checkpoint", "pixart alpha", "pixart sigma", "pixart sigma 900m",
                            "pixart dit loader", "unet loader"],
            advanced=("variant", "prediction", "positions", "weights"),
            description="Loads a PixArt-alpha, delta or Sigma transformer of any format: the released .pth, diffusers' "
            "safetensors, the base inside a ControlNet file, trainers' exports. Depth, KV compression and norms follow "
            "the file.",
            inputs=[
                io.Combo.Input(
                    "model_name", options=files.listed("diffusion_models"),
                    tooltip="A file in models/diffusion_models. A diffusers config.json beside it is read too.",
                ),
                io.Combo.Input(
                    "variant", options=VARIANTS, default=AUTO,
                    tooltip="alpha: SD 1.5's VAE and 120 tokens. sigma: SDXL's VAE and 300 tokens. auto: by the "
                    "file; diffusers files of alpha 512 and of Sigma look alike, so choose for those if the log says "
                    "that it guessed.",
                ),
                io.Combo.Input(
                    "prediction", options=list(PREDICTIONS), default=AUTO,
                    tooltip="What the network predicts, of which noise. auto: noise (eps), unless diffusers' "
                    "config.json and scheduler_config.json beside the file say otherwise. Some revisions of the 900M "
                    "model predict v with zero terminal SNR on scaled linear betas.",
                ),
                io.Combo.Input(
                    "positions", options=list(POSITIONS), default=AUTO,
                    tooltip="Range of the position table. auto: read off the file where it stores one, else 32. "
                    "Sources disagree about alpha's 256 model only.",
                ),
                io.Combo.Input(
                    "weights", options=WEIGHTS, default="ema",
                    tooltip="Which weights of a training checkpoint: averaged (ema) or raw (model).",
                ),
                io.Combo.Input(
                    "dtype", options=list(MODEL_DTYPES), default="default",
                    tooltip="How the weights are stored. fp8_e4m3fn needs half of fp16's memory; fp8_e4m3fn_fast "
                    "multiplies in fp8 as well, faster and a little less exact, on GPUs that can (RTX 40 series and "
                    "later).",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Goes to LoRA loaders and to any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, variant=None, prediction=None, positions=None, weights=None, dtype=None):
        return first_problem(
            known_file("diffusion_models", model_name), one_of("variant", variant, VARIANTS),
            one_of("prediction", prediction, PREDICTIONS), one_of("positions", positions, POSITIONS),
            one_of("weights", weights, WEIGHTS), one_of("dtype", dtype, MODEL_DTYPES),
        )

    @classmethod
    def execute(cls, model_name, variant, prediction, positions, weights, dtype) -> io.NodeOutput:
        settings = {**PREDICTIONS[prediction], **POSITIONS[positions]}
        if variant != AUTO:
            settings["variant"] = variant
        path = files.find_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_pixart(path, weights, MODEL_DTYPES[dtype], settings, fast=dtype == FAST))


class PixArtTextEncode(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtTextEncode",
            display_name="PixArt Text Encode",
            category=CATEGORY,
            search_aliases=["pixart clip text encode", "pixart t5", "clean caption", "positive prompt"],
            advanced=("tokens", "clean_caption"),
            description="Encodes a prompt at the length PixArt was trained with. CLIP Text Encode works too, but does "
            "not cut what is too long, and cannot clean captions.",
            inputs=[
                io.Clip.Input("clip", tooltip="T5 v1.1 XXL from CLIPLoader, type pixart; for the embedded "
                              "emoji model its own from 'Load T5 Text Encoder'."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                io.Combo.Input(
                    "tokens", options=[AUTO, *map(str, LIMITS.values())], default=AUTO,
                    tooltip="Longest prompt. auto: the model's own when one is connected, else Sigma's 300; alpha was "
                    "trained with 120.",
                ),
                io.Boolean.Input(
                    "clean_caption", default=False,
                    tooltip="Clean the text as alpha's training did: lower case, no links, no markup. Sigma was "
                    "trained on raw captions. Needs the packages ftfy and beautifulsoup4.",
                ),
                io.Model.Input("model", optional=True, tooltip="The PixArt model, to take the prompt length from."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For a sampler's positive or negative input.")],
        )

    @classmethod
    def validate_inputs(cls, tokens=None):
        return one_of("tokens", tokens, [AUTO, *map(str, LIMITS.values())])

    @classmethod
    def execute(cls, clip, text, tokens, clean_caption, model=None) -> io.NodeOutput:
        limit = LIMITS["sigma"] if tokens == AUTO else int(tokens)
        if tokens == AUTO and model is not None:
            limit = config_of(model).token_limit
        return io.NodeOutput(pixart_text.encode(clip, cleaned(text) if clean_caption else text, limit))


def cleaned(text: str) -> str:
    missing = cleaning_needs()
    if missing:
        raise ValueError(f"To clean captions as PixArt-alpha's training did, install {' and '.join(missing)} in "
                         "ComfyUI's Python, or turn clean_caption off.")
    return clean_caption(text)


class PixArtNullCaption(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtNullCaption",
            display_name="PixArt Null Caption",
            category=CATEGORY,
            search_aliases=["unconditional", "empty prompt", "pixart negative prompt", "null embedding"],
            advanced=("mask",),
            description="The unconditional caption that the model was trained with, as it is stored in the released "
            "files, for the negative input. An encoded empty or negative prompt works as well.",
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model whose file stores its null caption (released .pth)."),
                io.Conditioning.Input("positive", tooltip="The prompt that it opposes: it gets the same length."),
                io.Combo.Input(
                    "mask", options=["positive", "all"], default="positive",
                    tooltip="positive: as many tokens as the prompt has, as in training. all: every stored token.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the sampler's negative input.")],
        )

    @classmethod
    def validate_inputs(cls, mask=None):
        return one_of("mask", mask, ["positive", "all"])

    @classmethod
    def execute(cls, model, positive, mask) -> io.NodeOutput:
        config_of(model)
        return io.NodeOutput(pixart_text.null_caption(model, positive, mask))


class PixArtSizeCondition(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtSizeCondition",
            display_name="PixArt Size Condition",
            category=CATEGORY,
            search_aliases=["micro conditioning", "pixart resolution conditioning", "original size"],
            description="Conditions alpha's 1024 model on another size or aspect ratio than the picture's. "
            "Without this node it is given the picture's own. Models without size conditions ignore it.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="An encoded prompt."),
                io.Int.Input("width", default=1024, min=16, max=16384, tooltip="Pixels of the original picture."),
                io.Int.Input("height", default=1024, min=16, max=16384, tooltip="Pixels of the original picture."),
                io.Float.Input(
                    "aspect_ratio", default=0.0, min=0.0, max=10.0, step=0.01, round=0.001,
                    tooltip="Height divided by width. 0: that of the bucket nearest to width and height.",
                ),
            ],
            outputs=[io.Conditioning.Output("sized", display_name="CONDITIONING", tooltip="The same prompt.")],
        )

    @classmethod
    def execute(cls, conditioning, width, height, aspect_ratio) -> io.NodeOutput:
        entries = {"width": width, "height": height}
        entries["aspect_ratio"] = aspect_ratio or buckets.nearest(buckets.TABLES[1024], height, width)[0]
        return io.NodeOutput([[tokens, {**known, **entries}] for tokens, known in conditioning])


class PixArtPrompt(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtPrompt",
            display_name="PixArt Prompt (Styles, --ar)",
            category=CATEGORY,
            search_aliases=["style presets", "sdxl styles", "prompt styler", "negative prompt"],
            description="Reads '--ar 3:4' (or --aspect_ratio), and '--hw 768:1024' for the finished picture, off a "
            "prompt and puts a style around the rest. Height comes first in both.",
            inputs=[
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="As in 'a lighthouse --ar "
                                "3:4', which is wide: height:width, in that order."),
                io.Combo.Input("style", options=list(STYLES), default=next(iter(STYLES)), tooltip="Words around the "
                               "prompt, and a negative prompt that goes with them."),
                io.String.Input("negative_prompt", default="", multiline=True, tooltip="What not to draw."),
            ],
            outputs=[
                io.String.Output("positive", display_name="positive", tooltip="For PixArt Text Encode."),
                io.String.Output("negative", display_name="negative", tooltip="For PixArt Text Encode."),
                io.Float.Output("ratio", display_name="ratio", tooltip="Height divided by width, for 'PixArt Canvas'. "
                                "0 if the prompt names none."),
                io.Int.Output("final_width", display_name="final width", tooltip="Pixels of --hw, for Upscale Image "
                              "with crop 'center'; 0, which leaves a picture as it is, if the prompt names none."),
                io.Int.Output("final_height", display_name="final height", tooltip="As final_width."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt=None, style=None):
        try:
            parse(prompt or "")
        except ValueError as error:
            return str(error)
        return one_of("style", style, STYLES)

    @classmethod
    def execute(cls, prompt, style, negative_prompt) -> io.NodeOutput:
        parsed = parse(prompt)
        positive, negative = apply_style(style, parsed.text, negative_prompt)
        final_height, final_width = parsed.size or (0, 0)
        return io.NodeOutput(positive, negative, parsed.ratio or 0.0, final_width, final_height)


class PixArtCanvas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtCanvas",
            display_name="PixArt Canvas (Aspect Ratio)",
            category=CATEGORY,
            search_aliases=["pixart empty latent", "pixart resolution", "buckets", "image size", "width and height",
                            "size picker"],
            counts={side: {"shape": [NEAREST, EXACT]} for side in ("width", "height")},
            replaced={name: ["image"] for name in ("shape", "width", "height")},
            description="An empty latent of a size that PixArt was trained on, and that size as numbers. Says what "
            "other sizes cost, and which shapes the connected model never saw.",
            inputs=[
                io.Combo.Input(
                    "resolution", options=RESOLUTIONS, default=AUTO,
                    tooltip="About as many pixels as a square of this side. auto: what the connected model was trained "
                    "on, else 1024.",
                ),
                io.Combo.Input(
                    "shape", options=[*SHAPES, NEAREST, EXACT], default="1:1",
                    tooltip="Width : height, or the size below. A connected image or ratio overrides it.",
                ),
                io.Int.Input("width", default=1024, min=16, max=8192, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input("height", default=1024, min=16, max=8192, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures drawn at once."),
                io.Model.Input("model", optional=True, tooltip="A PixArt model, for resolution 'auto', and to say "
                               "which shapes it was trained on."),
                io.Image.Input("image", optional=True, tooltip="Takes the bucket nearest to this picture's shape."),
                io.Float.Input(
                    "ratio", optional=True, default=0.0, min=0.0, max=10.0, step=0.01, force_input=True,
                    tooltip="Height divided by width, from 'PixArt Prompt'; 0 is ignored.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="For the sampler."),
                io.Int.Output("canvas_width", display_name="width", tooltip="Pixels; for Upscale Image before VAE "
                              "Encode."),
                io.Int.Output("canvas_height", display_name="height", tooltip="Pixels."),
                io.String.Output("about", display_name="about", tooltip="What kind of size this is, in words."),
            ],
        )

    @classmethod
    def validate_inputs(cls, resolution=None, shape=None):
        return first_problem(one_of("resolution", resolution, RESOLUTIONS),
                             one_of("shape", shape, [*SHAPES, NEAREST, EXACT]))

    @classmethod
    def execute(cls, resolution, shape, width, height, batch_size, model=None, image=None, ratio=0.0) -> io.NodeOutput:
        config = None if model is None else config_of(model)
        side = side_of(resolution, config)
        seen = (ratio, 1.0) if image is None and ratio else None if image is None else image.shape[1:3]
        height, width = cls.size(side, shape, width, height, seen)
        about = pixart_sizes.about(side, height, width, config)
        latent = torch.zeros(batch_size, 4, height // 8, width // 8, device=mm.intermediate_device())
        return io.NodeOutput({"samples": latent}, width, height, about, ui=ui.PreviewText(about))

    @staticmethod
    def size(side: int, shape: str, width: int, height: int, seen=None) -> tuple[int, int]:
        """(height, width) in pixels. seen: height and width, in any unit, of what overrides the shape."""
        if seen is None and shape == EXACT:
            pixart_sizes.check(height, width)
            return height, width
        across, down = SHAPES.get(shape, (width, height))
        return pixart_sizes.size(side, *(seen or (down, across)))


def side_of(resolution: str, config: PixArtConfig | None) -> int:
    """The side in pixels of the square that a choice of the menu stands for. config: of the connected model."""
    return int(resolution) if resolution != AUTO else (
        pixart_sizes.small_side(config) or pixart_sizes.table_side(config))


class PixArtLoraLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtLoraLoader",
            display_name="Load PixArt LoRA",
            category=CATEGORY,
            search_aliases=["pixart lora loader", "peft lora", "lcm lora", "dora", "loha", "lokr"],
            advanced=("alpha",),
            description="A LoRA, DoRA, LoHa or LoKr of any trainer on a PixArt model, at the scale it was trained "
            "with. Core's loader takes PEFT files at two to four times their strength and skips other formats.",
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model of 'Load PixArt Model'."),
                io.Combo.Input(
                    "lora_name", options=files.listed("loras"),
                    tooltip="A file in models/loras. PEFT's adapter_config.json beside it is read too.",
                ),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                               tooltip="1: as trained."),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=4096.0, step=1.0,
                    tooltip="Alpha of a file that does not say its own. 0: the default of its format; PEFT's is 8, "
                    "with which the official scripts trained.",
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="MODEL", tooltip="The model with the LoRA."),
                io.String.Output("report", display_name="report", tooltip="What matched, and the scale used."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return known_file("loras", lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength, alpha) -> io.NodeOutput:
        path = files.find_or_raise("loras", lora_name)
        patched, report = pixart_lora.load(model, path, strength, alpha or None)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))


NODES = [
    PixArtLoader,
    PixArtTextEncode,
    PixArtNullCaption,
    PixArtSizeCondition,
    PixArtPrompt,
    PixArtCanvas,
    PixArtLoraLoader,
]
