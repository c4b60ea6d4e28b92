"""A run of every recipe, so small that all of them take seconds."""
from pathlib import Path

import tiny_pixart
import tiny_ponder
import tiny_run
import tiny_ultrapixel
from PIL import Image
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.trainer.config import check, schema
from weights import tiny_hed, tiny_t5

COMMON = {"precision": "fp32", "steps": 3, "batch_size": 4, "save_every": 3, "log_every": 1, "device": "cpu",
          "threads": 1,
          # with the usual eps the size of gradients does not matter, and one near zero moves as far as any
          "optimizer": {"learning_rate": 1e-2, "eps": 1e-3, "clip": 0.3}, "ema": {"decay": 0.9, "warm_up": False}}
LORA = {"rank": 4}
NAMES = ("pixelflow", "pixart", "pixart_lora", "pixart_dreambooth", "pixart_controlnet", "pixart_lcm",
         "pixart_lcm lora", "pixart_dmd", "ultrapixel_guide", "ultrapixel_lora", "ultrapixel_lora personal",
         "ultrapixel_controlnet", "ultrapixel_stage_a", "ultrapixel_stage_b", "ultrapixel_stage_c", "pixelponder",
         "pixelponder choices", "flux", "autoencoder")


def every(folder: Path, out: Path) -> dict[str, schema.Config]:
    """Settings by a name that begins with the recipe's; the runs go to `out`, what they need is made in `folder`."""
    folder.mkdir()
    squares = tiny_run.pictures(folder / "squares", size=64)
    large = tiny_run.pictures(folder / "large", size=128)
    hinted = tiny_ponder.pictures(folder / "hinted")
    photos = folder / "photos"
    photos.mkdir()
    for i, colour in enumerate(tiny_run.COLOURS.values()):
        Image.new("RGB", (128, 128), colour).save(photos / f"{i}.png")
    small = tiny_pixart.parts(folder)
    base = folder / "base.safetensors"
    tiny_pixart.released(base)
    tiny_hed(folder / "hed.pth")
    tiny_t5(folder / "small_t5.safetensors")
    ponder = tiny_ponder.parts(folder / "ponder")
    cascade = tiny_ultrapixel.parts(folder / "cascade")
    guide = tiny_ultrapixel.guide_file(folder / "guide.safetensors")
    stage_a = tiny_ultrapixel.written(folder / "a.safetensors", StageA, tiny_ultrapixel.cascade.A)
    guided = {**cascade, "model": {**cascade["model"], "guide": guide}}

    def pictures(path, image, **more):
        return {"path": str(path), **image, **more}

    of_squares = {"data": pictures(squares, tiny_pixart.IMAGE), "init_from": str(base), **small}
    of_large = {"data": pictures(large, tiny_ultrapixel.IMAGE), **cascade}
    own_text = tiny_run.SETTINGS["text"]
    raw = {
        "pixelflow": {"model": tiny_run.SETTINGS["model"], "text": own_text, "micro_batch_size": 1,
                      "data": pictures(squares, tiny_run.IMAGE)},
        "pixart": {**of_squares, "checkpoint_activations": True},
        "pixart_lora": {**of_squares, "adapter": LORA},
        "pixart_dreambooth": {**of_squares, "data": {
            "kind": "folder", "caption": "a photo of sks dog", "prior_path": str(photos),
            "prior_caption": "a photo of a dog", "prior_share": 0.5, **pictures(photos, tiny_pixart.IMAGE)}},
        "pixart_controlnet": {**of_squares, "recipe": {"blocks": 1, "annotator": str(folder / "hed.pth")}},
        "pixart_lcm": {**of_squares, "recipe": {"lora": False}},
        "pixart_lcm lora": {**of_squares, "recipe": {"lora": True}, "adapter": LORA},
        "pixart_dmd": of_squares,
        "ultrapixel_guide": {**of_large, "recipe": tiny_ultrapixel.GUIDED},
        "ultrapixel_lora": of_large,
        "ultrapixel_lora personal": {
            **guided, "recipe": {"low_side": 2, "word": "[mycat]", "word_base": "^cat</w>", "low_until": 0,
                                 "high_share": 1.0},
            "data": {"kind": "folder", "caption": "a red cat [mycat]", **pictures(photos, tiny_ultrapixel.IMAGE)}},
        "ultrapixel_controlnet": {**of_large, "recipe": {"blocks": [0, 3], "backbone": "simple"}},
        "ultrapixel_stage_a": {"model": {"hidden": 8, "bottleneck_blocks": 1},
                               "data": pictures(squares, tiny_run.IMAGE)},
        "ultrapixel_stage_b": {"model": {"hidden": [8, 16], "heads": [-1, 2], "depth": [1, 1], "context_dim": 16},
                               "text": {"encoder": str(folder / "small_t5.safetensors"), "padded": True,
                                        "learn": False}, "vae": {"path": stage_a},
                               "data": pictures(squares, tiny_pixart.IMAGE)},
        "ultrapixel_stage_c": {"model": {"hidden": [16, 16], "heads": [2, 2], "depth": [1, 1], "context_dim": 16},
                               "text": {**own_text, "padded": True}, "vae": cascade["vae"],
                               "data": pictures(large, tiny_ultrapixel.IMAGE)},
        "pixelponder": {"model": tiny_ponder.MODEL, **ponder, "data": pictures(hinted, tiny_ponder.IMAGE)},
        "flux": {"model": {"hidden": 128, "heads": 1, "mlp_hidden": 512, "depth": 1, "single_depth": 1,
                           "pooled_dim": 8},
                 "text": {**own_text, "padded": True}, "vae": ponder["vae"],
                 "data": pictures(squares, {"resolution": 32, "crop": "none"})},
        "autoencoder": {"data": pictures(squares, tiny_run.IMAGE)},
        # Each process of two sees other hints, and some stems none.
        "pixelponder choices": {"model": tiny_ponder.MODEL, **ponder, "recipe": {"choices": 2, **ponder["recipe"]},
                                "data": pictures(hinted, tiny_ponder.IMAGE)},
    }
    return {name: check.parse({**COMMON, **more, "out": str(out / name),
                                "recipe": {**more.get("recipe", {}), "name": name.split()[0]}})
            for name in NAMES for more in [raw.pop(name)]}
