"""The recipe that is nearest to what another program trains, and the files that it needs."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..recipes import RECIPES
from .rows import Draft

PIXART_ALPHA, PIXART_SIGMA, FLUX, CASCADE = "PixArt-alpha", "PixArt-Sigma", "FLUX", "Stable Cascade"
LORA, FULL = "lora", "full"
ADAPTERS = ("lora", "loha", "lokr")

NEAREST = {  # (family, what learns) -> recipes, the nearest first, with what is other in those that are not the same
    (PIXART_ALPHA, LORA): (("pixart_lora", ""),),
    (PIXART_SIGMA, LORA): (("pixart_lora", ""),),
    (PIXART_ALPHA, FULL): (("pixart", ""),),
    (PIXART_SIGMA, FULL): (("pixart", ""),),
    (FLUX, LORA): (("flux_lora", ""),
                   ("flux", "there is no recipe for a LoRA of FLUX: this one trains all of its weights, which takes "
                            "far more memory and a lower learning rate")),
    (FLUX, FULL): (("flux", ""),),
    (CASCADE, LORA): (("ultrapixel_lora", ""),),
    (CASCADE, FULL): (("ultrapixel_lora", "there is no recipe that trains all of Stage C: this one trains a LoRA of "
                                          "its attentions"),),
}
BASE = {"ema": {"decay": 0}, "cache": {"folder": "cache"}, "data": {"crop": "centre"}, "text": {"precision": "bf16"}}
OWN = {  # family -> settings that belong to it
    PIXART_ALPHA: {"model": {"variant": "alpha"}, "text": {"max_length": 120, "clean": True}},
    PIXART_SIGMA: {"model": {"variant": "sigma"}, "text": {"max_length": 300}},
    FLUX: {"text": {"max_length": 512, "padded": True}},
    CASCADE: {},
}
FILES = {  # setting -> its place in a diffusers folder, and where the shipped recipes look for it
    PIXART_ALPHA: {"init_from": ("transformer/diffusion_pytorch_model.safetensors", "models/pixart.pth"),
                   "text.encoder": ("text_encoder", "models/t5-v1_1-xxl"), "vae.path": ("vae", "models/sd-vae-ft-ema")},
    PIXART_SIGMA: {"init_from": ("transformer/diffusion_pytorch_model.safetensors", "models/pixart.pth"),
                   "text.encoder": ("text_encoder", "models/t5-v1_1-xxl"), "vae.path": ("vae", "models/sdxl-vae")},
    FLUX: {"init_from": ("transformer/diffusion_pytorch_model.safetensors.index.json", "models/flux1-dev.safetensors"),
           "text.encoder": ("text_encoder_2", "models/t5-v1_1-xxl"), "text.clip": ("text_encoder", "models/clip-l"),
           "vae.path": ("vae", "models/ae.safetensors")},
    CASCADE: {"model.stage_c": (None, "models/stage_c_bf16.safetensors"),
              "text.encoder": (None, "models/stable-cascade/text_encoder"),
              "vae.path": (None, "models/effnet_encoder.safetensors")},
}
SINGLE = {FLUX: "flux1-*.safetensors"}
"""The network in one file, in the folder of a pipeline."""
BASE_FILE = {CASCADE: "model.stage_c"}
"""The setting of the network, where it is not init_from."""


@dataclass(frozen=True)
class Trained:
    """What a program's settings train."""

    family: str
    method: str
    """LORA or FULL."""
    base: str = ""
    """The model: a folder of diffusers, its name on the hub, or a file."""


def begun(trained: Trained) -> Draft:
    """The nearest recipe with what belongs to its family."""
    name, other = next((name, other) for name, other in NEAREST[trained.family, trained.method] if name in RECIPES)
    draft = Draft(name)
    for table in (BASE, OWN[trained.family]):
        for section, entries in table.items():
            for key, value in entries.items():
                draft.set(f"{section}.{key}", value)
    if other:
        draft.changed.append(other[0].upper() + other[1:] + ".")
    for setting, (inside, alone) in FILES[trained.family].items():
        if draft.has(setting):
            draft.set(setting, place(trained, setting, inside, alone))
    return draft


def place(trained: Trained, setting: str, inside: str | None, alone: str) -> str:
    """Where a file of a model is, or should be put."""
    base = trained.base.replace("\\", "/").rstrip("/")
    network = setting == BASE_FILE.get(trained.family, "init_from")
    if not base or inside is None and not (network and Path(base).suffix):
        return alone
    if Path(base).suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin"):
        return base if network else alone
    if not Path(base).expanduser().is_dir():
        return f"models/{base.rpartition('/')[2]}/{inside}"
    files = sorted(Path(base).expanduser().glob(SINGLE[trained.family])) if network and trained.family in SINGLE else []
    return f"{base}/{files[0].name if files else inside}"


def files(draft: Draft, trained: Trained) -> list[str]:
    """What is to be put where, or named."""
    found = []
    sets = {f"data.sets.{number}.path": one["path"] for number, one in enumerate(draft.get("data.sets", []), 1)}
    named = {setting: draft.get(setting) for setting in FILES[trained.family]} | (sets or {
        "data.path": draft.get("data.path")})
    for setting, path in named.items():
        if path and not Path(path).expanduser().exists():
            of = f", of {trained.base}" if trained.base and not setting.startswith("data.") else ""
            found.append(f"{setting} = {path!r}: there is no such file or folder{of}. Put it there, or name yours.")
        elif not path and setting == "data.path" and not any(line.startswith(setting) for line in draft.missing):
            found.append("data.path: name the folder of the pictures.")
    return found
