"""The embedded family in miniature: every file that its recipes export, made by their own export, with random weights,
and the recipes that made them. Text comes from the embedded T5."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import tiny_pixart
import tiny_run
import torch
import weights
from pixstack.models_impl import state_dict
from pixstack.trainer.config import check

T5 = weights.ROOT / "assets/text_encoders/pixelflow_emoji_t5.safetensors"
TEXT = {"encoder": str(T5), "learn": False, "max_length": 32}
PIXART = {"depth": 3, "hidden": 64, "heads": 4, "variant": "alpha", "token_limit": 32, "prediction": "v",
          "variance": False}
FLUX = {"hidden": 64, "heads": 2, "axes": [8, 12, 12], "mlp_hidden": 200, "depth": 2, "single_depth": 3,
        "pooled_dim": 8}
SIDE = 64  # pixels
HINTED = "images/red_card.png"


def make(models: Path, folder: Path) -> SimpleNamespace:
    """Recipes by name, each with `file`, the name of what it exported into `models`. folder: for everything else."""
    data = tiny_run.pictures(folder / "set", size=SIDE)
    weights.tiny_hed(folder / "hed.pth")
    family = {}

    def export(name: str, kind: str, **sections):
        raw = {**{k: v for k, v in tiny_run.SETTINGS.items() if k not in ("model", "text")}, "precision": "fp32",
               "data": {"path": str(data), "resolution": SIDE, "crop": "none"}, "out": str(folder / name), **sections}
        raw["recipe"] = {"name": kind, **sections.get("recipe", {})}
        recipe, _ = tiny_pixart.recipe_of(check.parse(raw))
        for pattern, (tensors, metadata) in recipe.files().items():
            path = models / pattern.format(name=f"tiny_family_{name}")
            state_dict.write_file(path, {k: v.detach().clone() for k, v in tensors.items()}, metadata)
            family[name] = SimpleNamespace(recipe=recipe.eval(), file=path.name, path=str(path))

    for name, channels, scale, shift in (("vae", 4, 0.18215, 0.0), ("flux_vae", 16, 0.3611, 0.1159)):
        model = {"latent_channels": channels, "latent_scale": scale, "latent_shift": shift}
        torch.manual_seed(channels)
        export(name, "autoencoder", model=model)
    vae, flux_vae = ({"path": family[name].path} for name in ("vae", "flux_vae"))
    padded = {**TEXT, "padded": True}
    export("pixart", "pixart", model=PIXART, text=TEXT, vae=vae)
    export("lora", "pixart_lora", text=TEXT, vae=vae, init_from=family["pixart"].path, adapter={"rank": 4})
    export("edges", "pixart_controlnet", text=TEXT, vae=vae, init_from=family["pixart"].path,
           recipe={"blocks": 2, "annotator": str(folder / "hed.pth"), "hints": [str(data.parent / HINTED)]},
           samples={"prompts": ["one"]})
    export("flux", "flux", model=FLUX, text=padded, vae=flux_vae)
    export("ponder", "pixelponder", model={"depth": 1, "selector_width": 32}, text=padded, vae=flux_vae,
           recipe={"base": family["flux"].path, "annotators": ["canny", "hed"], "hed": str(folder / "hed.pth")})
    return SimpleNamespace(**family, picture=data.parent / HINTED)
