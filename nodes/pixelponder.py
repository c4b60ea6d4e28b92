"""PixelPonder's nodes: load it, collect conditions, apply them to a prompt, see which condition won where. And a loader
for FLUX networks of another shape than the release's, which core's cannot read."""
from __future__ import annotations

from comfy_api.latest import io

from ..models_impl.pixelponder.sampling import STRENGTH
from .checks import CheckedNode, first_problem, known_file, one_of, part_of_sampling
from .host.common import files
from .host.common.control import apply_control
from .host.common.load import DTYPES
from .host.common.pictures import colours
from .host.flux.load import load_flux
from .host.pixelponder import control as pixelponder
from .host.pixelponder.hints import Condition, chain
from .host.pixelponder.load import load_pixelponder
from .host.pixelponder.strategies import STRATEGIES
from .schema import schema

CATEGORY = "pixstack/pixelponder"
KINDS = {"canny": "canny", "depth": "depth", "hed": "hed", "pose": "openpose"}  # menu -> name in the release
SELECTION_NETWORK = ["leave out", "keep"]
Ponder = io.Custom("PIXSTACK_PONDER")


def _part(name: str, default: float, what: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001,
                          tooltip=f"Fraction of the sampling after which {what}.")


class FluxLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_FluxLoader",
            display_name="Load Small FLUX Model",
            category=CATEGORY,
            search_aliases=["tiny flux", "flux emoji", "flux loader", "small flux"],
            description="Loads a FLUX of any size that PixStack's trainer made, such as the embedded emoji model: its "
            "file states its shape. Released FLUX.1 files load with core's Load Diffusion Model.",
            inputs=[
                io.Combo.Input("model_name", options=files.listed("diffusion_models"),
                               tooltip="A file in models/diffusion_models that the trainer exported."),
                io.Combo.Input("dtype", options=list(DTYPES), default="default",
                               tooltip="How the weights are stored. default: as ComfyUI finds best for this machine."),
            ],
            outputs=[io.Model.Output(tooltip="Core's own FLUX model: for LoRA loaders, ModelSamplingFlux and any "
                                     "sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, dtype=None):
        return first_problem(known_file("diffusion_models", model_name), one_of("dtype", dtype, DTYPES))

    @classmethod
    def execute(cls, model_name, dtype) -> io.NodeOutput:
        path = files.find_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_flux(path, DTYPES[dtype]))


class PixelPonderLoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelPonderLoader",
            display_name="Load PixelPonder (ControlNet)",
            category=CATEGORY,
            search_aliases=["flux controlnet", "union controlnet", "pixelponder checkpoint"],
            advanced=("selection_network",),
            description="Loads PixelPonder, one ControlNet for FLUX.1 [dev] that takes several kinds of hints at once: "
            "the released pixelponder-fp32.bin, or one that was trained here, such as the small one for emoji.",
            inputs=[
                io.Combo.Input("control_net_name", options=files.listed("controlnet"),
                               tooltip="A file in models/controlnet."),
                io.Combo.Input(
                    "selection_network", options=SELECTION_NETWORK, default="leave out",
                    tooltip="Only the strategy 'as run' needs it: half of the file. The published training never "
                    "trains it, and its score is zero but for rounding, so what it selects is noise.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default="default",
                               tooltip="How the weights are stored. default: as ComfyUI finds best for this machine."),
            ],
            outputs=[io.ControlNet.Output(tooltip="For 'Apply PixelPonder'.")],
        )

    @classmethod
    def validate_inputs(cls, control_net_name=None, selection_network=None, dtype=None):
        return first_problem(
            known_file("controlnet", control_net_name),
            one_of("selection_network", selection_network, SELECTION_NETWORK),
            one_of("dtype", dtype, DTYPES),
        )

    @classmethod
    def execute(cls, control_net_name, selection_network, dtype) -> io.NodeOutput:
        path = files.find_or_raise("controlnet", control_net_name)
        return io.NodeOutput(load_pixelponder(path, selection_network == "keep", DTYPES[dtype]))


class PixelPonderCondition(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelPonderCondition",
            display_name="PixelPonder Condition",
            category=CATEGORY,
            search_aliases=["controlnet hint", "regional controlnet", "controlnet mask"],
            description="One hint for PixelPonder. Connect as many in a row as wanted; kinds may repeat.",
            inputs=[
                io.Image.Input("image", tooltip="The hint: edges, a depth map or a drawn pose. If its shape is not the "
                               "picture's, its middle is used and ComfyUI's log says so."),
                io.Combo.Input("kind", options=list(KINDS), tooltip="What the hint is; each kind has its own encoder."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.01,
                    tooltip="Times the strength of 'Apply PixelPonder', where this condition wins. With the strategy "
                    "'blend': its weight in the mixture instead.",
                ),
                io.Int.Input("priority", default=0, min=-100, max=100,
                             tooltip="The condition with the highest is the primary one, which with 'released' holds "
                             "everywhere but under the masks of others. Equal: the first in the row."),
                _part("start_percent", 0.0, "this condition begins to take part"),
                _part("end_percent", 1.0, "it no longer takes part"),
                io.Mask.Input("mask", optional=True, tooltip="Painted (1): this condition must win there. With "
                              "'blend': where it counts, and how much."),
                Ponder.Input("conditions", optional=True, tooltip="The conditions before this one."),
            ],
            outputs=[Ponder.Output("chained", display_name="conditions",
                                   tooltip="This condition and those before it: for the next one, or 'Apply "
                                   "PixelPonder'.")],
        )

    @classmethod
    def validate_inputs(cls, kind=None, start_percent=None, end_percent=None):
        return first_problem(one_of("kind", kind, KINDS), part_of_sampling(start_percent, end_percent))

    @classmethod
    def execute(
        cls, image, kind, strength, priority, start_percent, end_percent, mask=None, conditions=()
    ) -> io.NodeOutput:
        condition = Condition(colours(image), KINDS[kind], strength, mask, start_percent, end_percent, priority)
        return io.NodeOutput((*chain(conditions or ()), condition))


class PixelPonderApply(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelPonderApply",
            display_name="Apply PixelPonder (Multi ControlNet)",
            category=CATEGORY,
            search_aliases=["multi controlnet", "combine controlnets", "several controlnets", "union controlnet",
                            "regional controlnet"],
            advanced=("rounds",),
            description="Puts PixelPonder with its conditions on the prompts. Works with FLUX.1 of any loader, LoRAs "
            "and core's samplers. The release was trained with 512 text tokens, guidance 4 and pictures of 512 pixels.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; not used at cfg 1, FLUX's usual."),
                io.ControlNet.Input("control_net", tooltip="From 'Load PixelPonder'."),
                Ponder.Input("conditions", tooltip="The hints, from 'PixelPonder Condition'."),
                io.Float.Input("strength", default=STRENGTH, min=0.0, max=10.0, step=0.01,
                               tooltip="Strength of what PixelPonder adds. 0.8: as in the release."),
                _part("start_percent", 0.0, "PixelPonder begins"),
                _part("end_percent", 1.0, "it ends"),
                io.Combo.Input(
                    "strategy", options=list(STRATEGIES),
                    tooltip="Which condition is selected per patch. released: the primary one everywhere, which is "
                    "what the release comes to. as run: its selection network, noise included. accumulate: a trained "
                    "selector, round by round. blend: a weighted mixture.",
                ),
                io.Int.Input("rounds", default=1, min=1, max=64,
                             tooltip="Rounds of 'accumulate': each decides the most certain of the patches left."),
            ],
            outputs=[
                io.Conditioning.Output("controlled_positive", display_name="positive",
                                       tooltip="For the sampler and 'PixelPonder Map'."),
                io.Conditioning.Output("controlled_negative", display_name="negative", tooltip="For the sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, strategy=None, start_percent=None, end_percent=None):
        return first_problem(
            one_of("strategy", strategy, STRATEGIES), part_of_sampling(start_percent, end_percent)
        )

    @classmethod
    def execute(
        cls, positive, negative, control_net, conditions, strength, start_percent, end_percent, strategy, rounds
    ) -> io.NodeOutput:
        if not isinstance(control_net, pixelponder.PixelPonderControl):
            raise ValueError("This CONTROL_NET is not one of 'Load PixelPonder': load it there, or use core's Apply "
                             "ControlNet.")
        pixelponder.warn_of_length(positive, control_net)
        node_id = None if cls.hidden is None else cls.hidden.unique_id
        ready = pixelponder.with_conditions(
            control_net, chain(conditions), strength, start_percent, end_percent, strategy, rounds, node_id
        )
        return io.NodeOutput(*apply_control(ready, positive, negative))


class PixelPonderMap(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixelPonderMap",
            display_name="PixelPonder Map",
            category=CATEGORY,
            search_aliases=["patch map", "condition map", "which controlnet"],
            description="Shows which condition won which patch. Connect the sampler's LATENT to see what was sampled; "
            "with 'released' and 'blend' an empty latent shows it before.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="From 'Apply PixelPonder'."),
                io.Latent.Input("latent", tooltip="From the sampler: the map of the last step with PixelPonder. Or an "
                                "empty one, for its size."),
                io.Float.Input("overlay", default=0.5, min=0.0, max=1.0, step=0.05,
                               tooltip="0: each patch shows its condition's hint; 1: only its colour."),
            ],
            outputs=[
                io.Image.Output("map", display_name="IMAGE", tooltip="The map over the hints, with a legend below."),
                io.Mask.Output("masks", display_name="MASK", is_output_list=True,
                               tooltip="One for each condition, in the order of the legend: 1 where it won; with "
                               "'blend' its share."),
            ],
        )

    @classmethod
    def execute(cls, positive, latent, overlay) -> io.NodeOutput:
        control, size = pixelponder.find(positive), tuple(latent["samples"].shape[-2:])
        picture = pixelponder.picture_of(control, size, overlay)
        return io.NodeOutput(*picture, ui={"pixstack_map": [pixelponder.steps_of(control, size)]})


NODES = [FluxLoader, PixelPonderLoader, PixelPonderCondition, PixelPonderApply, PixelPonderMap]
