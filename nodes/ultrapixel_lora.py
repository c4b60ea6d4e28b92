"""UltraPixel's personalisation."""
from __future__ import annotations

from comfy_api.latest import io

from .checks import CheckedNode, known_file
from .host.common import files
from .host.ultrapixel import personalise as ultrapixel_lora
from .schema import schema

CATEGORY = "pixstack/ultrapixel"


class UltraPixelPersonalise(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixStack_UltraPixelPersonalise",
            display_name="UltraPixel Personalise (LoRA)",
            category=CATEGORY,
            search_aliases=["stable cascade lora", "textual inversion", "dreambooth", "learned word"],
            advanced=("token_strength",),
            description="A personalisation of UltraPixel on Stage C and its text encoder: what a thing looks like, and "
            "the word it is called by. Write that word in the prompt.",
            inputs=[
                io.Model.Input("model", tooltip="Stage C, before or after 'UltraPixel Guide'."),
                io.Clip.Input("clip", tooltip="CLIP-G, from core's Load CLIP, type stable_cascade."),
                io.Combo.Input("lora_name", options=files.listed("loras"),
                               tooltip="lora_cat.safetensors of the release, or one of PixStack's trainer, in "
                               "models/loras."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                               tooltip="Strength of the changes of Stage C. 1: as trained. They act in both passes."),
                io.Float.Input("token_strength", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                               tooltip="Strength of what the word learned beyond the words it began as. 0: just them."),
                io.String.Input("token", default="",
                                tooltip="The learned word as it is written in prompts. Empty: as the file says. The "
                                "released file does not say: its word is [roubaobao]."),
                io.String.Input("base_token", default="",
                                tooltip="What the word began as: a regular expression over CLIP's vocabulary, as in "
                                "training. Empty: as the file says. For the released file: ^cat</w>"),
            ],
            outputs=[
                io.Model.Output("personal", display_name="MODEL", tooltip="For 'UltraPixel Guide', or the guider."),
                io.Clip.Output("learned", display_name="CLIP", tooltip="For CLIP Text Encode. A prompt without the "
                               "word is warned about in the log."),
                io.String.Output("word", display_name="token", tooltip="What to write in the prompt."),
                io.String.Output("began_as", display_name="base_token", tooltip="What the word began as."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return known_file("loras", lora_name)

    @classmethod
    def execute(cls, model, clip, lora_name, strength, token_strength, token, base_token) -> io.NodeOutput:
        personal = ultrapixel_lora.read(files.find_or_raise("loras", lora_name), model)
        token, base = token.strip() or personal.token or "", base_token.strip() or personal.base or ""
        try:
            if personal.token_rows:
                clip = ultrapixel_lora.learn(clip, personal, token_strength, token, base)
            model = ultrapixel_lora.patch(model, personal, strength)
        except ValueError as error:
            raise ValueError(f"{lora_name}: {error}") from error
        return io.NodeOutput(model, clip, token, base)


NODES = [UltraPixelPersonalise]
