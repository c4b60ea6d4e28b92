"""PixArt nodes around the VAE: a reference picture beside the drawn one, and the consistency decoder."""
from __future__ import annotations

from comfy_api.latest import io

from ..models_impl.pixart.config import PixArtConfig
from .checks import CheckedNode, first_problem, known_file, one_of
from .host.common import files
from .host.pixart import consistency_decoder as consistency
from .host.pixart import reference as pixart_reference
from .host.pixart import sizes as pixart_sizes
from .host.pixart.model import config_of
from .pixart import AUTO, CATEGORY, RESOLUTIONS, SHAPES
from .schema import schema

AS_IMAGE = "as the reference"


class PixArtReferenceCanvas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtReferenceCanvas",
            display_name="PixArt Reference Canvas",
            category=CATEGORY,
            search_aliases=["style transfer", "reference image", "image prompt", "in context", "reference only"],
            advanced=("fit",),
            description="Puts a reference picture on the left half of a canvas and leaves the right half to be drawn, "
            "so that it takes after the reference. Cut the result with 'PixArt Right Half'.",
            inputs=[
                io.Image.Input("image", tooltip="The reference."),
                io.Vae.Input("vae", tooltip="The VAE of the PixArt model."),
                io.Combo.Input("resolution", options=RESOLUTIONS, default=AUTO,
                               tooltip="Size of the whole canvas. auto: what the connected model was trained on, else "
                               "1024."),
                io.Combo.Input("shape", options=[AS_IMAGE, *SHAPES], default=AS_IMAGE,
                               tooltip="Width : height of each half."),
                io.Combo.Input("fit", options=pixart_reference.FITS, default="crop",
                               tooltip="How a reference of another shape is put into its half."),
                io.Model.Input("model", optional=True, tooltip="A PixArt model, for resolution 'auto'."),
            ],
            outputs=[io.Latent.Output(tooltip="For the sampler, with a mask over the right half.")],
        )

    @classmethod
    def validate_inputs(cls, resolution=None, shape=None, fit=None):
        return first_problem(
            one_of("resolution", resolution, RESOLUTIONS), one_of("shape", shape, [AS_IMAGE, *SHAPES]),
            one_of("fit", fit, pixart_reference.FITS),
        )

    @classmethod
    def execute(cls, image, vae, resolution, shape, fit, model=None) -> io.NodeOutput:
        side = cls.side(resolution, None if model is None else config_of(model))
        width, height = SHAPES.get(shape, (image.shape[2], image.shape[1]))
        return io.NodeOutput(pixart_reference.canvas(image, vae, side, height, width, fit))

    @staticmethod
    def side(resolution: str, config: PixArtConfig | None) -> int:
        """The side in pixels of the square whose table the canvas is of. config: of the connected model."""
        return int(resolution) if resolution != AUTO else pixart_sizes.table_side(config)


class PixArtRightHalf(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtRightHalf",
            display_name="PixArt Right Half",
            category=CATEGORY,
            search_aliases=["crop half", "split picture"],
            description="The drawn half of a picture that began on 'PixArt Reference Canvas'.",
            inputs=[io.Image.Input("image", tooltip="The decoded canvas.")],
            outputs=[io.Image.Output("half", display_name="IMAGE", tooltip="Its right half.")],
        )

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        return io.NodeOutput(pixart_reference.right_half(image))


class ConsistencyDecoderLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_ConsistencyDecoderLoader",
            display_name="Load Consistency Decoder (VAE)",
            category=CATEGORY,
            search_aliases=["dalle 3 decoder", "dall-e vae", "decoder vae"],
            description="DALL-E 3's consistency decoder as a VAE, for PixArt-alpha (and Stable Diffusion 1.5): finer "
            "faces and text than the ordinary VAE, at several times its cost. Not for Sigma. Needs diffusers.",
            inputs=[
                io.Combo.Input("vae_name", options=files.listed("vae"),
                               tooltip="diffusion_pytorch_model.safetensors of openai/consistency-decoder, in "
                               "models/vae."),
            ],
            outputs=[io.Vae.Output(tooltip="For VAE Decode. About 16 GB of memory at 1024 x 1024.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return known_file("vae", vae_name)

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(consistency.load(files.find_or_raise("vae", vae_name)))


NODES = [PixArtReferenceCanvas, PixArtRightHalf, ConsistencyDecoderLoader]
