"""UltraPixel's way from the latent to pixels: Stage B within bounds of memory, and Stage A exact at every size."""
from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from .checks import first_problem, known_file, one_of
from .host import ultrapixel_stage_a
from .host.load import DTYPES

CATEGORY = "pixstack/ultrapixel"
DECODER_DTYPES = {name: DTYPES[name] for name in ("default", "bf16", "fp32", "fp16")}


class UltraPixelStageALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PixStack_UltraPixelStageALoader",
            display_name="Load UltraPixel Stage A",
            category=CATEGORY,
            description="Stable Cascade's Stage A as a VAE that decodes 4096 x 4096 pixels exactly: whole in a seventh "
            "of the usual memory, below that by tiles without seams. Works with VAE Decode, VAE Decode (Tiled) and VAE "
            "Encode.",
            inputs=[
                io.Combo.Input("vae_name", options=folder_paths.get_filename_list("vae"),
                               tooltip="stage_a.safetensors, in models/vae."),
                io.Combo.Input("dtype", options=list(DECODER_DTYPES), default="default",
                               tooltip="What it computes in. default: ComfyUI's choice, bf16 where the GPU has it. "
                               "fp32 takes twice the memory."),
            ],
            outputs=[io.Vae.Output(tooltip="Decodes latents of Stage B.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None, dtype=None):
        return first_problem(known_file("vae", vae_name), one_of("dtype", dtype, DECODER_DTYPES))

    @classmethod
    def execute(cls, vae_name, dtype) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("vae", vae_name)
        return io.NodeOutput(ultrapixel_stage_a.load(path, DECODER_DTYPES[dtype]))


NODES = [UltraPixelStageALoader]
