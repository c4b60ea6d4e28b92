"""kohya's sd-scripts: a TOML of arguments, and the TOML of data sets that it names or that is given beside it.
(library/train_util.py, flux_train_network.py, config_util.py of kohya-ss/sd-scripts)"""
from __future__ import annotations

from . import common, families
from .rows import Draft, Row, chosen, none, number, to, whole, yes

NAME = "kohya's sd-scripts"
DEFAULTS = {"network_dim": 4, "network_alpha": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
            "learning_rate": 2e-6, "lr_scheduler": "constant", "optimizer_type": "AdamW", "max_grad_norm": 1.0}
SILENT = ("output_name", "logging_dir", "log_prefix", "log_tracker_", "save_model_as", "save_precision", "no_metadata",
          "xformers", "sdpa", "mem_eff_attn", "max_data_loader_n_workers", "persistent_data_loader_workers",
          "huggingface_", "pretrained_model_name_or_path", "network_module", "dataset_config", "highvram", "lowvram",
          "skip_cache_check", "training_comment", "metadata_", "dynamo_backend", "cache_info", "console_log",
          "stage_c_checkpoint_path", "cache_text_encoder_outputs", "vae_batch_size", "no_half_vae", "datasets",
          "general.", "network_train_unet_only", "save_last_n_steps_state", "save_state")
SILENT_ENDS = ()
ROWS: dict[str, Row] = {
    "learning_rate": to("optimizer.learning_rate", value=number),
    "unet_lr": to("optimizer.learning_rate", value=number),
    "lr_warmup_steps": to("optimizer.warm_up", value=lambda v: round(number(v))),
    "lr_scheduler_min_lr_ratio": to("optimizer.decay_to", value=number),
    "max_grad_norm": to("optimizer.clip", value=number),
    "network_dim": to("adapter.rank", "recipe.rank", value=whole),
    "network_alpha": to("adapter.alpha", "recipe.alpha", value=number),
    "network_dropout": to("adapter.dropout", value=number),
    "network_weights": to("adapter.start", "init_from"),
    "dim_from_weights": none(usual=(True, False)),
    "max_train_steps": to("steps", value=whole),
    "seed": to("seed", value=whole),
    "gradient_checkpointing": to("checkpoint_activations", value=yes),
    "torch_compile": to("compile", value=yes),
    "full_bf16": none("weights that learn stay in float32"),
    "full_fp16": none("weights that learn stay in float32"),
    "fp8_base": to("memory.base", value=lambda v: "fp8" if yes(v) else None),
    "blocks_to_swap": to("memory.swap_blocks", value=whole),
    "output_dir": to("out", value=lambda v: f"{v}/{{name}}"),
    "ae": to("vae.path"), "vae": to("vae.path"), "effnet_checkpoint_path": to("vae.path"),
    "previewer_checkpoint_path": to("model.previewer"),
    "t5xxl": none("text.encoder is a folder as transformers saves it, not one file"),
    "clip_l": none("text.clip is a folder as transformers saves it, not one file"),
    "text_model_checkpoint_path": none("text.encoder is a folder as transformers saves it, not one file"),
    "t5xxl_max_token_length": to("text.max_length", value=whole),
    "caption_dropout_rate": to("recipe.dropout", value=number),
    "min_snr_gamma": to("recipe.snr_gamma", value=number),
    "noise_offset": to("recipe.offset_noise", value=number),
    "guidance_scale": to("recipe.guidance", value=number),
    "loss_type": none(usual=("l2",)),
    "timestep_sampling": none("the family's own noise levels are drawn", usual=("sigmoid",)),
    "model_prediction_type": none(usual=("raw",)),
    "weighting_scheme": none(usual=("none",)),
    "discrete_flow_shift": none(usual=(1, 1.0)),
    "save_every_n_steps": to("save_every", value=whole),
    "save_last_n_steps": none("keep is a number of checkpoints"),
    "sample_every_n_steps": to("samples.every", value=whole),
    "save_every_n_epochs": none("save_every is in steps"), "sample_every_n_epochs": none("samples.every is in steps"),
    "flip_aug": to("data.flip", value=yes),
    "color_aug": none("pictures keep their colours"), "random_crop": to("data.crop", value=lambda v: "random" if yes(v)
                                                                        else None),
    "shuffle_caption": none("captions are read as they are"), "keep_tokens": none("captions are read as they are"),
    "caption_extension": none("captions are .txt, .caption or .json files", usual=(".txt", ".caption")),
    "bucket_reso_steps": to("data.bucket_multiple", value=whole),
    "min_bucket_reso": none("buckets have about the area of data.resolution"),
    "max_bucket_reso": none("buckets have about the area of data.resolution"),
    "bucket_no_upscale": none("pictures are brought to the size of their bucket"),
    "cache_latents": none("`python -m trainer cache` keeps features", usual=(True,)),
    "cache_latents_to_disk": none("`python -m trainer cache` keeps features", usual=(True,)),
    "text_encoder_lr": none("text encoders of these families stay as they are"),
    "prior_loss_weight": to("recipe.prior_weight", value=number, usual=(1, 1.0)),
    "log_with": to("log.wandb", value=chosen({"wandb": "online", "all": "online", "tensorboard": None})),
    "wandb_run_name": none("a run has its name"),
}
OWN = ("learning_rate", "network_module", "pretrained_model_name_or_path", "max_train_steps", "max_train_epochs",
       "network_dim", "train_batch_size", "optimizer_type", "lr_scheduler")
SPECIAL = {"enable_bucket", "resolution"}


def recognises(raw) -> bool:
    if not isinstance(raw, dict):
        return False
    keys = flattened(raw).keys()
    return is_datasets(raw) or ("pretrained_model_name_or_path" in keys or "stage_c_checkpoint_path" in keys) \
        and len(keys & set(OWN)) >= 2 and "recipe" not in raw


def is_datasets(raw: dict) -> bool:
    """Whether it is a file of data sets alone."""
    listed = raw.get("datasets")
    return isinstance(listed, list) and any(isinstance(one, dict) and "subsets" in one for one in listed)


def flattened(raw: dict) -> dict:
    """Its arguments; sections mean nothing to it."""
    found = {}
    for key, value in raw.items():
        found |= value if isinstance(value, dict) and key != "general" else {key: value}
    return found


def trained(raw: dict) -> families.Trained:
    raw = flattened(raw)
    base, module = str(raw.get("pretrained_model_name_or_path") or ""), str(raw.get("network_module") or "")
    method = families.LORA if module or "network_dim" in raw else families.FULL
    if "stage_c_checkpoint_path" in raw or "effnet_checkpoint_path" in raw:
        return families.Trained(families.CASCADE, method, str(raw.get("stage_c_checkpoint_path") or base))
    if "flux" in module or "ae" in raw or "t5xxl" in raw or "flux" in base.lower():
        return families.Trained(families.FLUX, method, base)
    if "pixart" in base.lower():
        return families.Trained(families.PIXART_ALPHA if "alpha" in base.lower().rpartition("/")[2] or "-xl-2-" in
                                base.lower() and "sigma" not in base.lower() else families.PIXART_SIGMA, method, base)
    if is_datasets(raw):
        raise ValueError("it holds data sets only: give the TOML of the arguments too, which says what is trained.")
    raise ValueError(f"pretrained_model_name_or_path = {base!r}: that is no FLUX, Stable Cascade or PixArt, as far as "
                     "names show, and this trainer has no other.")


def own(draft: Draft, given: dict, raw: dict, read_beside):
    """What needs more than a row."""
    common.optimizer(draft, "optimizer_type", given.pop("optimizer_type"))
    arguments(draft, given.pop("optimizer_args", None) or [])
    common.decay(draft, "lr_scheduler", given.pop("lr_scheduler"), given.pop("lr_scheduler_num_cycles", None))
    common.precision(draft, "mixed_precision", given.pop("mixed_precision", "bf16"))
    network(draft, given)
    sets = raw if is_datasets(raw) else read_beside(given.get("dataset_config")) or {}
    folders, subset, general = datasets(draft, given, sets)
    common.batch(draft, given.pop("train_batch_size") if "batch_size" not in general else general.pop("batch_size"),
                 given.pop("gradient_accumulation_steps"))
    size = general.pop("resolution", None) or given.get("resolution") or 512
    buckets = general.pop("enable_bucket", given.get("enable_bucket", False))
    given.pop("resolution", None), given.pop("enable_bucket", None), given.pop("train_batch_size", None)
    sides = common.squared(size)
    if len(set(sides)) > 1:  # width and height: a square of about the area
        draft.changed.append(f"resolution = {size!r}: the side of a square of about the area.")
        sides = [round((sides[0] * sides[1]) ** 0.5 / 64) * 64]
    common.sizes(draft, "resolution", sides, yes(buckets))
    for key, value in general.items():
        given.setdefault(key, value)
    common.data(draft, folders)
    if "max_train_epochs" in given:
        common.epochs(draft, "max_train_epochs", given.pop("max_train_epochs"), folders)
        given.pop("max_train_steps", None)
    elif "max_train_steps" not in given:
        given["max_train_steps"] = 1600  # its default
    prompts(draft, given.pop("sample_prompts", None), read_beside)


def arguments(draft: Draft, words):
    for word in words if isinstance(words, list) else str(words).split():
        name, _, text = str(word).partition("=")
        if name in ("weight_decay", "eps") and draft.has(f"optimizer.{name}"):
            draft.set(f"optimizer.{name}", number(text))
        elif name == "betas" and draft.has("optimizer.betas"):
            draft.set("optimizer.betas", [number(part) for part in text.strip("()[] ").split(",") if part.strip()])
        elif name == "d_coef":
            draft.set("optimizer.arguments.d_coef", number(text))
        else:
            draft.absent.append((f"optimizer_args {name}", text, "optimizer.arguments has what the class takes"))


def network(draft: Draft, given: dict):
    """network_args, of which LyCORIS' algo is the kind."""
    words = given.pop("network_args", None) or []
    for word in words if isinstance(words, list) else str(words).split():
        name, _, text = str(word).partition("=")
        if name == "algo":
            draft.apply("network_args algo", text, common.kinds(draft, "algo"))
        elif name == "factor":
            draft.apply("network_args factor", text, to("adapter.factor", value=whole))
        elif name in ("dora_wd", "dora"):
            draft.apply(f"network_args {name}", text, to("adapter.dora", value=yes))
        else:
            draft.absent.append((f"network_args {name}", text, "no counterpart"))


def datasets(draft: Draft, given: dict, sets: dict) -> tuple[list[common.Folder], dict, dict]:
    """(folders, what the first subset says, what all of them say)."""
    general, folders = dict(sets.get("general") or {}), []
    for i, one in enumerate(sets.get("datasets") or []):
        general = {**general, **{k: v for k, v in one.items() if k != "subsets"}}
        for j, subset in enumerate(one.get("subsets") or []):
            folders.append(common.Folder(str(subset.get("image_dir") or ""), f"datasets[{i}].subsets[{j}]",
                                         str(subset.get("class_tokens") or ""), subset.get("num_repeats", 1),
                                         bool(subset.get("is_reg"))))
            known = ("image_dir", "class_tokens", "num_repeats", "is_reg")
            general |= {k: v for k, v in subset.items() if k not in known}
    for key, prior in (("train_data_dir", False), ("reg_data_dir", True)):
        if path := given.pop(key, None):
            folders.append(common.Folder(str(path), key, prior=prior))
            draft.changed.append(f"{key} = {path!r}: kohya's folders REPEATS_NAME in it are read as plain folders, "
                                 "each picture once; captions are files beside the pictures.")
    return folders, {}, general


def prompts(draft: Draft, file, read_beside):
    """Its file of prompts: one a line, with options such as --w 1024."""
    if not file:
        return
    text = read_beside(file)
    if not isinstance(text, str):
        draft.missing.append(f"samples.prompts: they are in {file!r}, which is not here.")
        return
    lines = [line.split(" --") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    common.prompts(draft, [line[0] for line in lines])
    options = dict(option.strip().split(" ", 1) for option in lines[0][1:] if " " in option.strip()) if lines else {}
    for letter, setting, value in (("w", "width", whole), ("h", "height", whole), ("d", "seed", whole),
                                   ("s", "steps", whole), ("l", "cfg", number)):
        if letter in options:
            draft.set(f"samples.{setting}", value(options[letter]))
