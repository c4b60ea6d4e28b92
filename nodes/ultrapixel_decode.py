"""UltraPixel's way from the latent to pixels: Stage B within bounds of memory, and Stage A exact at every size."""
from __future__ import annotations

from comfy_api.latest import io

from .checks import CheckedNode, first_problem, known_file, one_of
from .host.common import files
from .host.common.load import DTYPES
from .host.ultrapixel import stage_a as ultrapixel_stage_a
from .host.ultrapixel import stage_b as ultrapixel_stage_b
from .schema import schema

CATEGORY = "pixstack/ultrapixel"
DECODER_DTYPES = {name: DTYPES[name] for name in ("default", "bf16", "fp32", "fp16")}


class UltraPixelStageALoader(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelStageALoader",
            display_name="Load UltraPixel Stage A (VAE)",
            category=CATEGORY,
            search_aliases=["stable cascade vae", "stage a", "4k vae decode"],
            advanced=("dtype",),
            description="Stable Cascade's Stage A as a VAE that decodes 4096 x 4096 pixels exactly: whole in a seventh "
            "of the usual memory, below that by tiles without seams. Works with VAE Decode, VAE Decode (Tiled) and VAE "
            "Encode.",
            inputs=[
                io.Combo.Input("vae_name", options=files.listed("vae"),
                               tooltip="stage_a.safetensors, in models/vae."),
                io.Combo.Input("dtype", options=list(DECODER_DTYPES), default="default",
                               tooltip="Compute dtype. default: ComfyUI's choice, bf16 where the GPU has it. "
                               "fp32 takes twice the memory."),
            ],
            outputs=[io.Vae.Output(tooltip="Decodes latents of Stage B.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None, dtype=None):
        return first_problem(known_file("vae", vae_name), one_of("dtype", dtype, DECODER_DTYPES))

    @classmethod
    def execute(cls, vae_name, dtype) -> io.NodeOutput:
        path = files.find_or_raise("vae", vae_name)
        return io.NodeOutput(ultrapixel_stage_a.load(path, DECODER_DTYPES[dtype]))


class UltraPixelStageB(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelStageB",
            display_name="UltraPixel Stage B",
            category=CATEGORY,
            search_aliases=["stable cascade stage b", "low memory"],
            advanced=("rescale",),
            description="Makes Stage B ready for 4096 x 4096 pixels: the same numbers in half the memory, an estimate "
            "that does not push other models out, and the release's guidance. For core's KSampler: ddpm, simple, 10 "
            "steps, cfg 1.1.",
            inputs=[
                io.Model.Input("model", tooltip="Stage B, small or large, from Load Diffusion Model. LoRAs before or "
                               "after."),
                io.Float.Input("rescale", default=0.7, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="How far guidance is brought back to the contrast of the positive prompt. 0.7: "
                               "the release. 0: ComfyUI's guidance."),
            ],
            outputs=[io.Model.Output("patched", display_name="MODEL", tooltip="For the sampler, or Stage B Tiles.")],
        )

    @classmethod
    def execute(cls, model, rescale) -> io.NodeOutput:
        return io.NodeOutput(ultrapixel_stage_b.within_bounds(model, rescale))


class UltraPixelStageBTiles(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelStageBTiles",
            display_name="UltraPixel Stage B Tiles (approximate)",
            category=CATEGORY,
            search_aliases=["tiled stage b", "tiled diffusion", "low vram"],
            description="Runs Stage B tile by tile, each with its part of Stage C's latent. An approximation: its "
            "norms and its attention span the whole picture, and in tiles see one tile each. For cards on which the "
            "whole does not fit.",
            inputs=[
                io.Model.Input("model", tooltip="Stage B, preferably after 'UltraPixel Stage B'."),
                io.Int.Input("tile_size", default=2048, min=512, max=8192, step=64,
                             tooltip="Pixels along a side. Larger is nearer to the whole picture, which a smaller one "
                             "is left as."),
                io.Int.Input("overlap", default=256, min=64, max=2048, step=64,
                             tooltip="Pixels over which neighbours are blended, at most half of tile_size."),
            ],
            outputs=[io.Model.Output("patched", display_name="MODEL", tooltip="For the sampler.")],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None, overlap=None):
        if tile_size is not None and overlap is not None and overlap > tile_size // 2:
            return f"overlap={overlap} must be at most half of tile_size={tile_size}."
        return True

    @classmethod
    def execute(cls, model, tile_size, overlap) -> io.NodeOutput:
        return io.NodeOutput(ultrapixel_stage_b.in_tiles(model, tile_size, overlap))


NODES = [UltraPixelStageALoader, UltraPixelStageB, UltraPixelStageBTiles]
