"""PixArt's ControlNets: load them, and apply them where core's node has no input for it."""
from __future__ import annotations

from comfy_api.latest import io

from .checks import CheckedNode, first_problem, known_file, one_of, part_of_sampling
from .host.common import files
from .host.common.control import apply_control
from .host.common.load import DTYPES
from .host.common.pictures import colours
from .host.pixart import control as pixart_control
from .host.pixart.load import load_pixart_controlnet
from .schema import schema

CATEGORY = "pixstack/pixart"


class PixArtControlNetLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtControlNetLoader",
            display_name="Load PixArt ControlNet",
            category=CATEGORY,
            search_aliases=["pixart controlnet loader", "hed controlnet", "soft edge controlnet"],
            advanced=("dtype",),
            description="Loads a ControlNet for PixArt: the release's HED ControlNets (512 and 1024), diffusers' and "
            "SimpleTuner's. The base model inside the release's files is left out here; 'Load PixArt Model' reads it "
            "from the same file.",
            inputs=[
                io.Combo.Input(
                    "control_net_name", options=files.listed("controlnet"),
                    tooltip="A file in models/controlnet.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default="default",
                               tooltip="How the weights are stored. default: as ComfyUI finds best for this machine."),
            ],
            outputs=[io.ControlNet.Output(tooltip="For core's Apply ControlNet (with the VAE), or 'Apply PixArt "
                                          "ControlNet'.")],
        )

    @classmethod
    def validate_inputs(cls, control_net_name=None, dtype=None):
        return first_problem(known_file("controlnet", control_net_name), one_of("dtype", dtype, DTYPES))

    @classmethod
    def execute(cls, control_net_name, dtype) -> io.NodeOutput:
        path = files.find_or_raise("controlnet", control_net_name)
        return io.NodeOutput(load_pixart_controlnet(path, DTYPES[dtype]))


class PixArtControlNetApply(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtControlNetApply",
            display_name="Apply PixArt ControlNet",
            category=CATEGORY,
            search_aliases=["pixart controlnet", "controlnet mask", "controlnet strength"],
            description="Core's Apply ControlNet works with PixArt's. This one also takes the hint as a latent, and a "
            "mask of where it counts.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.ControlNet.Input("control_net", tooltip="From 'Load PixArt ControlNet'."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Strength of what the ControlNet adds. 1: as trained."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                               tooltip="Fraction of the sampling after which it begins."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                               tooltip="Fraction of the sampling after which it ends."),
                io.Image.Input("image", optional=True, tooltip="The hint, for example of 'HED Edges'."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the PixArt model, to encode the image."),
                io.Latent.Input("latent", optional=True, tooltip="The hint as a latent, instead of an image."),
                io.Mask.Input("mask", optional=True, tooltip="1 where the ControlNet counts, 0 where it does not."),
            ],
            outputs=[
                io.Conditioning.Output("controlled_positive", display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output("controlled_negative", display_name="negative", tooltip="For the sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None):
        return part_of_sampling(start_percent, end_percent)

    @classmethod
    def execute(
        cls, positive, negative, control_net, strength, start_percent, end_percent, image=None, vae=None, latent=None,
        mask=None,
    ) -> io.NodeOutput:
        if not isinstance(control_net, pixart_control.PixArtControl):
            raise ValueError("This CONTROL_NET is not one of 'Load PixArt ControlNet': load it there, or use core's "
                             "Apply ControlNet.")
        hinted = pixart_control.with_hint(
            control_net, strength, start_percent, end_percent, image=None if image is None else colours(image), vae=vae,
            mask=mask,
            latent=None if latent is None else latent["samples"],
        )
        return io.NodeOutput(*apply_control(hinted, positive, negative))


NODES = [PixArtControlNetLoader, PixArtControlNetApply]
