"""Settings of the UltraPixel recipes."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    stage_c: str = ""
    """The frozen base: Stage C of Stable Cascade, stage_c_bf16.safetensors. It is kept in bf16 unless precision says
    fp32."""
    guide: str = ""
    """UltraPixel's guide, ultrapixel_t2i.safetensors or one of ours: for sample pictures, and for the recipes that
    train through it. The guide that a run itself trains starts from init_from."""
    image_encoder: str = ""
    """A folder with CLIP-L's image tower (openai/clip-vit-large-patch14), whose embeddings are told beside some
    captions, as the releases were trained. Empty: none ever is."""
    previewer: str = ""
    """previewer.safetensors, for quick sample pictures of 8 pixels a cell."""
    stage_b: str = ""
    """stage_b_bf16.safetensors or the lite one, and ..."""
    stage_a: str = ""
    """... stage_a.safetensors, for sample pictures of full size."""


FILES = ("stage_c", "guide", "previewer", "stage_b", "stage_a")  # of Model
