"""PixArt's samplers and schedules for core's SamplerCustom and SamplerCustomAdvanced."""
from __future__ import annotations

from comfy_api.latest import io

from ..models_impl.pixart.sampling import ALGORITHMS, SCHEDULES
from .checks import CheckedNode, first_problem, one_of
from .host.pixart import sampling as pixart_sampling
from .host.pixart.sampling import ReferenceSampler
from .schema import schema

CATEGORY = "pixstack/pixart"
INPAINT = ["core", "reference"]
ONE_STEP = "dmd (one step)"


class PixArtSampler(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtSampler",
            display_name="PixArt Sampler (LCM, DMD, SA-Solver)",
            category=CATEGORY,
            search_aliases=["dpm-solver", "iddpm", "one step", "few steps"],
            advanced=("order", "eta"),
            description="The samplers that the PixArt releases draw with, for SamplerCustom or SamplerCustomAdvanced "
            "with the sigmas of 'PixArt Sigmas'. Core's samplers work with PixArt too.",
            inputs=[
                io.Combo.Input(
                    "algorithm", options=list(ALGORITHMS), default="dpm-solver++",
                    tooltip="dpm-solver++: the demo's (14 to 20 steps, cfg 4.5). sa-solver: 25 steps, cfg 3 to 4.5. "
                    "iddpm: 100 steps with the learned variance. lcm: 4 steps, cfg 1, with LCM weights. dmd: one step, "
                    "cfg 1, with DMD weights.",
                ),
                io.Int.Input("order", default=2, min=1, max=3,
                             tooltip="Order of dpm-solver++ and sa-solver. The releases use 2."),
                io.Float.Input(
                    "eta", default=1.0, min=0.0, max=2.0, step=0.05, round=0.01,
                    tooltip="Noise that sa-solver adds in the middle of sampling. 1: as released. 0: none.",
                ),
                io.Combo.Input(
                    "inpaint", options=INPAINT, default="core",
                    tooltip="How a noise mask is followed. core: softly, around each call of the network. reference: "
                    "after each step, with a hard edge.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, algorithm=None, inpaint=None):
        return first_problem(one_of("algorithm", algorithm, ALGORITHMS), one_of("inpaint", inpaint, INPAINT))

    @classmethod
    def execute(cls, algorithm, order, eta, inpaint) -> io.NodeOutput:
        return io.NodeOutput(ReferenceSampler(algorithm, order, eta, inpaint))


class PixArtSigmas(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_PixArtSigmas",
            display_name="PixArt Sigmas (Scheduler)",
            category=CATEGORY,
            search_aliases=["pixart steps", "pixart schedule", "time uniform", "dmd timestep"],
            advanced=("timestep",),
            description="The steps of a PixArt release's sampler, in whole or fractional timesteps as it takes them.",
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model: its noise schedule is used."),
                io.Combo.Input(
                    "schedule", options=[*SCHEDULES, ONE_STEP], default=next(iter(SCHEDULES)),
                    tooltip="reference: for dpm-solver++ and sa-solver. diffusers: for dpm-solver++ (diffusers). "
                    "iddpm, lcm and dmd: for the sampler of that name.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Calls of the network. dmd has one."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="Below 1: only the last part of the schedule, to change a picture instead of drawing a new "
                    "one.",
                ),
                io.Int.Input(
                    "timestep", default=400, min=1, max=999,
                    tooltip="The timestep at which dmd's single step starts. 400 for PixArt's DMD; some other one-step "
                    "weights were trained with 599 or 999.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="High to low.")],
        )

    @classmethod
    def validate_inputs(cls, schedule=None):
        return one_of("schedule", schedule, [*SCHEDULES, ONE_STEP])

    @classmethod
    def execute(cls, model, schedule, steps, denoise, timestep) -> io.NodeOutput:
        noise = pixart_sampling.diffusion_of(model).schedule
        if schedule == ONE_STEP:
            return io.NodeOutput(pixart_sampling.one_step_sigmas(noise, timestep))
        return io.NodeOutput(pixart_sampling.sigmas(noise, schedule, steps, denoise))


NODES = [PixArtSampler, PixArtSigmas]
