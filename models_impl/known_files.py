"""What a file is, by its keys, and what loads it in ComfyUI: the second half of every message that refuses a file."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .state_dict import BESIDE_A_MODEL, PREFIXES

PERSONALISATION = "a personalisation of UltraPixel"
LORA = "a LoRA"
DIFFUSION_MODEL = "core's 'Load Diffusion Model'"
CASCADE = f"{DIFFUSION_MODEL}, or 'Load Small Stable Cascade Model' if PixStack's trainer made it"
UNET, CONTROLNET, VAE = ("UNETLoader",), ("ControlNetLoader",), ("VAELoader",)
CASCADES = (*UNET, "PixStack_CascadeLoader")


@dataclass(frozen=True)
class Kind:
    name: str
    """Name in messages."""
    keys: tuple[str, ...]
    """Keys of which one identifies the kind, any prefix removed; *.x is a key that ends in .x."""
    loader: str | None
    """The node that takes it, as ComfyUI shows its name; None where no node does."""
    folder: str = ""
    """Below models/."""
    nodes: tuple[str, ...] = ()
    """Ids of the nodes among `loader` to which a wrong loader can be changed."""


KINDS = (  # the first that fits
    Kind(PERSONALISATION, ("0.lora_up", "retoken.embeddings"), "'UltraPixel Personalise'", "loras",
         ("PixStack_UltraPixelPersonalise",)),
    Kind(LORA, ("*.lora_A.weight", "*.lora_down.weight", "*.lora_A.default.weight", "*.lokr_w1", "*.hada_w1_a"),
         "'Load PixArt LoRA' if it is PixArt's, else core's 'Load LoRA'", "loras",
         ("PixStack_PixArtLoraLoader", "LoraLoader")),
    Kind("a PixArt ControlNet", (
        "controlnet.0.copied_block.scale_shift_table", "0.copied_block.scale_shift_table",
        "controlnet_blocks.0.transformer_block.scale_shift_table",
        "controlnet.controlnet_blocks.0.transformer_block.scale_shift_table",
    ), "'Load PixArt ControlNet'", "controlnet", ("PixStack_PixArtControlNetLoader",)),
    Kind("LTX-Video", ("patchify_proj.weight",), DIFFUSION_MODEL, "diffusion_models", UNET),  # has PixArt's adaLN too
    Kind("Sana", ("blocks.0.mlp.inverted_conv.conv.weight",), None),  # and this one's keys
    Kind("PixArt", ("blocks.0.scale_shift_table", "adaln_single.emb.timestep_embedder.linear_1.weight"),
         "'Load PixArt Model'", "diffusion_models", ("PixStack_PixArtLoader",)),
    Kind("PixelFlow", ("latent_size_embedder.linear_1.weight",), "'Load PixelFlow Model'", "diffusion_models",
         ("PixStack_PixelFlowLoader",)),
    Kind("PixelPonder", ("input_hint_block_list_moe.0.0.weight", "select_net.attn_block.0.img_attn.qkv.weight"),
         "'Load PixelPonder'", "controlnet", ("PixStack_PixelPonderLoader",)),
    Kind("a ControlNet for FLUX with joined blocks", ("controlnet_double_blocks.0.weight",), None),
    Kind("a ControlNet for FLUX or Qwen-Image in diffusers' format", ("controlnet_x_embedder.weight",),
         "core's 'Load ControlNet Model'", "controlnet", CONTROLNET),
    Kind("a ControlNet for Stable Diffusion 3", ("pos_embed_input.proj.weight",), "core's 'Load ControlNet Model'",
         "controlnet", CONTROLNET),
    Kind("an XLabs ControlNet for FLUX", ("controlnet_blocks.0.weight", "pos_embed_input.weight"),
         "core's 'Load ControlNet Model'", "controlnet", CONTROLNET),
    Kind("FLUX", ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.proj_mlp.weight"),
         f"{DIFFUSION_MODEL}, or 'Load Small FLUX Model' if PixStack's trainer made it", "diffusion_models",
         (*UNET, "PixStack_FluxLoader")),
    Kind("Stable Cascade's Stage C", ("clip_txt_mapper.weight",), CASCADE, "diffusion_models", CASCADES),
    Kind("Stable Cascade's Stage B", ("effnet_mapper.0.weight",), CASCADE, "diffusion_models", CASCADES),
    Kind("Stable Cascade's Stage A", ("in_block.1.weight",), "'Load UltraPixel Stage A'", "vae",
         ("PixStack_UltraPixelStageALoader",)),
    Kind("a ControlNet of Stable Cascade", ("projections.0.0.weight",), "core's 'Load ControlNet Model'", "controlnet",
         CONTROLNET),
    Kind("Stable Cascade's semantic encoder", ("mapper.1.running_mean", "encoder.mapper.1.running_mean"),
         "core's 'Load VAE'", "vae", VAE),
    Kind("Stable Cascade's previewer", ("blocks.11.running_mean",), "core's 'Load VAE'", "vae", VAE),
    Kind("the guide of UltraPixel", ("*.wtokens",), "'Load UltraPixel Guide'", "model_patches",
         ("PixStack_UltraPixelGuideLoader",)),
    Kind("a ControlNet for Stable Diffusion", ("controlnet_down_blocks.0.weight", "zero_convs.0.0.weight",
                                               "control_model.zero_convs.0.0.weight"),
         "core's 'Load ControlNet Model'", "controlnet", CONTROLNET),
    Kind("Stable Diffusion", ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"), DIFFUSION_MODEL,
         "diffusion_models", UNET),
    Kind("Stable Diffusion 3", ("joint_blocks.0.context_block.attn.qkv.weight",), DIFFUSION_MODEL, "diffusion_models",
         UNET),
    Kind("DiT", ("blocks.0.adaLN_modulation.1.weight",), None),
    Kind("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",),
         "'Load T5 Text Encoder'; T5-XXL also with core's 'Load CLIP' and 'DualCLIPLoader' (Load CLIP (Dual))",
         "text_encoders", ("PixStack_PixelFlowTextEncoderLoader", "CLIPLoader")),
    Kind("a CLIP text encoder", ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
         "core's 'Load CLIP' or, for FLUX, 'DualCLIPLoader' (Load CLIP (Dual))", "text_encoders", ("CLIPLoader",)),
    Kind("a consistency decoder", ("decoder_unet.conv_in.weight",), "'Load Consistency Decoder'", "vae",
         ("PixStack_ConsistencyDecoderLoader",)),
    Kind("a VAE", ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight", "taesd_decoder.1.weight"),
         "core's 'Load VAE'", "vae", VAE),
    Kind("one half of a TAESD", ("3.conv.0.weight", "1.conv.0.weight"), "core's 'Load VAE', its other half beside it",
         "vae_approx"),
    Kind("HED", ("block1.convs.0.weight",), "'HED Edges'", "annotators", ("PixStack_HEDEdges",)),
    Kind("Depth Anything", ("neck.reassemble_stage.layers.0.projection.weight",),
         "'Depth Map', its config.json beside it", "annotators", ("PixStack_DepthMap",)),
)


def names(tensors: Mapping) -> list[str]:
    """The names of the weights of a file, out of the tables that training files wrap them in."""
    inner = [key for value in tensors.values() if isinstance(value, Mapping) for key in value]
    return [str(key) for key in inner or tensors]


def family_of(keys: Iterable[str]) -> str | None:
    """The `name` of the kind of file that has such keys; None when none of KINDS has."""
    kind = _marked(list(keys))
    return kind and kind.name


def whose(tensors: Mapping) -> str:
    """A sentence on what the file is and how and from where ComfyUI loads it; its first keys if that is not known."""
    keys = names(tensors)
    kind = kind_of(keys)
    if kind is None:
        return f"Its first keys are {', '.join(keys[:3])}." if keys else "It holds no weights."
    description = f"The keys are those of {kind.name}."
    if kind.loader is None:
        return description
    return f"{description} In ComfyUI it goes into models/{kind.folder} and is loaded with {kind.loader}."


class WrongFile(ValueError):
    """A file that came to the wrong loader. words: what it is not, which `whose` completes."""

    def __init__(self, words: str, tensors: Mapping):
        super().__init__(f"{words} {whose(tensors)}")
        self.kind = kind_of(names(tensors))
        """What it is; None where that is not known."""


def kind_of(keys: list[str]) -> Kind | None:
    """The kind, with the folder and the loader of a checkpoint where other models lie beside the weights."""
    kind = _marked(keys)
    if kind and (kind.loader or "").startswith(DIFFUSION_MODEL) and any(key.startswith(BESIDE_A_MODEL) for key in keys):
        return replace(kind, loader="core's 'Load Checkpoint'", folder="checkpoints", nodes=("CheckpointLoaderSimple",))
    return kind


def _marked(keys: list[str]) -> Kind | None:
    known = {key[len(prefix):] for prefix in ("", *PREFIXES) for key in keys if key.startswith(prefix)}
    for kind in KINDS:
        for mark in kind.keys:
            if mark in known or (mark.startswith("*") and any(key.endswith(mark[1:]) for key in keys)):
                return kind
    return None
