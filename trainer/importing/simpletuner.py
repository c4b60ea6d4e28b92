"""SimpleTuner's config.json, and the multidatabackend.json that it names or that is given beside it.
(documentation/OPTIONS.md and DATALOADER.md of bghira/SimpleTuner)"""
from __future__ import annotations

from . import common, families
from .rows import Draft, Row, chosen, none, number, to, whole, yes

NAME = "SimpleTuner"
FAMILIES = {"pixart_sigma": families.PIXART_SIGMA, "pixart": families.PIXART_SIGMA, "flux": families.FLUX,
            "cascade": families.CASCADE, "stable_cascade": families.CASCADE}
METHODS = {"lora": families.LORA, "full": families.FULL}
BASES = {"pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "flux": "black-forest-labs/FLUX.1-dev"}
DEFAULTS = {"lora_rank": 16, "learning_rate": 4e-7, "train_batch_size": 4, "gradient_accumulation_steps": 1,
            "lr_scheduler": "sine", "optimizer": "adamw_bf16", "resolution": 1.0, "resolution_type": "pixel_area",
            "max_grad_norm": 2.0, "lr_warmup_steps": 500}
SILENT = ("output_dir_", "hub_model_id", "push_", "report_to", "model_family", "model_type", "model_flavour",
          "pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path", "data_backend_config",
          "disable_bucket_pruning", "quantize_via", "vae_batch_size", "write_batch_size", "read_batch_size",
          "image_processing_batch_size", "num_eval_images", "logging_dir", "resume_from_checkpoint", "max_workers",
          "aws_", "webhook_", "user_prompt_library", "validation_torch_compile", "validation_disable_unconditional",
          "ignore_", "offload_", "cache_dir", "debug_", "attention_mechanism", "inference_scheduler_", "override_",
          "minimum_image_size", "metadata_", "resolution_type", "configure_", "vae_cache_", "lycoris_config",
          "num_train_epochs", "fuse_qkv_projections", "preserve_data_backend_cache", "keep_vae_loaded", "set_")
SILENT_ENDS = ()
ROWS: dict[str, Row] = {
    "learning_rate": to("optimizer.learning_rate", value=number),
    "lr_warmup_steps": to("optimizer.warm_up", value=lambda v: round(number(v))),
    "lr_end": none("optimizer.decay_to is a share of the learning rate"),
    "max_grad_norm": to("optimizer.clip", value=number),
    "grad_clip_method": none("the norm of the gradient is clipped", usual=("norm",)),
    "adam_weight_decay": to("optimizer.weight_decay", value=number),
    "lora_rank": to("adapter.rank", "recipe.rank", value=whole),
    "lora_alpha": to("adapter.alpha", "recipe.alpha", value=number),
    "lora_dropout": to("adapter.dropout", value=number),
    "use_dora": to("adapter.dora", value=yes),
    "init_lora": to("adapter.start", "init_from"),
    "flux_lora_target": none("name layers in adapter.targets or [[adapter.layers]]"),
    "max_train_steps": to("steps", value=lambda v: whole(v) or None),
    "seed": to("seed", value=whole),
    "gradient_checkpointing": to("checkpoint_activations", value=yes),
    "base_model_precision": to("memory.base", value=chosen({
        "no_change": None, "fp8-torchao": "fp8", "fp8-quanto": "fp8", "int8-quanto": "fp8", "int8-torchao": "fp8",
        "nf4-bnb": "nf4", "int4-quanto": "nf4"}), changed="the blocks that stay as they are, in as many bits."),
    "base_model_default_dtype": none(usual=("bf16",)),
    "caption_dropout_probability": to("recipe.dropout", value=number),
    "snr_gamma": to("recipe.snr_gamma", value=number),
    "noise_offset": to("recipe.offset_noise", value=number),
    "flux_guidance_value": to("recipe.guidance", value=number),
    "flow_schedule_shift": none("the family's own noise levels are drawn"),
    "prediction_type": to("model.prediction", value=chosen({"epsilon": "eps", "v_prediction": "v"})),
    "rescale_betas_zero_snr": to("model.zero_terminal_snr", value=yes),
    "loss_type": none(usual=("l2",)),
    "tokenizer_max_length": to("text.max_length", value=whole),
    "output_dir": to("out", value=lambda v: f"{v}/{{name}}"),
    "tracker_run_name": to("name"),
    "tracker_project_name": to("log.project"),
    "checkpointing_steps": to("save_every", value=whole),
    "checkpoint_step_interval": to("save_every", value=whole),
    "checkpoints_total_limit": to("keep", value=whole),
    "validation_steps": to("samples.every", value=whole),
    "validation_step_interval": to("samples.every", value=whole),
    "validation_guidance": to("samples.cfg", value=number),
    "validation_num_inference_steps": to("samples.steps", value=whole),
    "validation_seed": to("samples.seed", value=whole),
    "validation_negative_prompt": none("samples are drawn without"),
    "validation_guidance_rescale": none(),
    "validation_prompt_library": none("name prompts in samples.prompts"),
    "aspect_bucket_rounding": none("buckets are multiples of data.bucket_multiple pixels"),
}


def bare(raw: dict) -> dict:
    """Its options, which are written with and without dashes."""
    return {str(key).removeprefix("--"): value for key, value in raw.items()}


def recognises(raw) -> bool:
    return is_backends(raw) or isinstance(raw, dict) and {"model_family", "model_type"} <= bare(raw).keys()


def is_backends(raw) -> bool:
    """Whether it is a file of data sets alone."""
    return isinstance(raw, list) and any(isinstance(one, dict) and "dataset_type" in one or isinstance(one, dict) and
                                         "instance_data_dir" in one for one in raw)


def trained(raw) -> families.Trained:
    if is_backends(raw):
        raise ValueError("it holds data sets only: give the config.json too, which says what is trained.")
    raw = bare(raw)
    family, method = str(raw["model_family"]), str(raw["model_type"])
    if family not in FAMILIES:
        raise ValueError(f"model_family = {family!r}: this trainer has {', '.join(FAMILIES)}.")
    if method not in METHODS:
        raise ValueError(f"model_type = {method!r}: this trainer has {' and '.join(METHODS)}.")
    if yes(raw.get("controlnet", False)):
        raise ValueError("controlnet = true: settings of ControlNets are not imported; begin with one of the recipes "
                         "*_controlnet.toml.")
    base = raw.get("pretrained_transformer_model_name_or_path") or raw.get("pretrained_model_name_or_path")
    return families.Trained(FAMILIES[family], METHODS[method], str(base or BASES.get(family, "")))


def own(draft: Draft, given: dict, raw: dict, read_beside):
    """What needs more than a row."""
    common.optimizer(draft, "optimizer", given.pop("optimizer"))
    for word in str(given.pop("optimizer_config", "") or "").split(","):
        name, _, text = word.partition("=")
        draft.apply(f"optimizer_config {name}", text, {"weight_decay": to("optimizer.weight_decay", value=number),
                                                       "eps": to("optimizer.eps", value=number),
                                                       "d_coef": to("optimizer.arguments.d_coef", value=number),
                                                       }.get(name))
    common.decay(draft, "lr_scheduler", given.pop("lr_scheduler"), given.pop("lr_num_cycles", None))
    common.precision(draft, "mixed_precision", given.pop("mixed_precision", "bf16"))
    common.batch(draft, given.pop("train_batch_size"), given.pop("gradient_accumulation_steps"))
    common.ema(draft, yes(given.pop("use_ema", False)), given.pop("ema_decay", None))
    if str(given.pop("lora_type", "standard")) == "lycoris":
        lycoris(draft, read_beside(given.get("lycoris_config")))
    if given.get("lora_alpha") in (None, ""):  # its silence is the rank
        given.pop("lora_alpha", None)
        draft.apply("lora_alpha", given["lora_rank"], ROWS["lora_alpha"])
    folders = backends(draft, given, read_beside)
    common.data(draft, folders)
    rounds = given.pop("num_train_epochs", 0)
    if not whole(given.get("max_train_steps") or 0):
        common.epochs(draft, "num_train_epochs", rounds or 1, folders)
    common.prompts(draft, [given.pop("validation_prompt", "") or ""])
    size = common.squared(str(given.pop("validation_resolution", "") or "").split("|")[0]) or []
    if size:
        draft.set("samples.width", size[0])
        draft.set("samples.height", size[-1])


def lycoris(draft: Draft, config):
    if not isinstance(config, dict):
        if draft.has("adapter.kind"):
            draft.set("adapter.kind", "lokr")
            draft.missing.append("adapter.kind: it is in the file of lycoris_config, which is not here; lokr is taken.")
        return
    draft.apply("lycoris_config algo", config.get("algo", "lokr"), common.kinds(draft, "algo"))
    for key, row in {"linear_dim": ROWS["lora_rank"], "linear_alpha": ROWS["lora_alpha"],
                     "factor": to("adapter.factor", value=whole)}.items():
        if key in config:
            draft.apply(f"lycoris_config {key}", config[key], row)
    if config.get("apply_preset"):
        draft.absent.append(("lycoris_config apply_preset", config["apply_preset"],
                             "name layers in adapter.targets or [[adapter.layers]]"))


def backends(draft: Draft, given: dict, read_beside) -> list[common.Folder]:
    """The data sets; the size of the first is the run's."""
    listed = read_beside(given.get("data_backend_config")) or []
    kind, size = given.get("resolution_type"), given.pop("resolution")
    folders, crop = [], None
    for i, one in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(one, dict) or one.get("dataset_type", "image") != "image" or one.get("disabled"):
            continue
        key, path = f"data backend {one.get('id', i)}", one.get("instance_data_dir") or ""
        if one.get("type", "local") != "local":
            name = one.get("dataset_name") or one.get("type")
            draft.absent.append((key, name, "data lie in a folder: download them"))
        caption = str(one.get("instance_prompt") or "") if one.get("caption_strategy") == "instanceprompt" else ""
        folders.append(common.Folder(str(path), key, caption, 1 + number(one.get("repeats") or 0)))
        if len(folders) == 1:
            kind, size = one.get("resolution_type", kind), one.get("resolution", size)
            crop = one.get("crop") and one.get("crop_aspect", "square") == "square"
        if one.get("caption_strategy") in ("filename", "parquet"):
            draft.absent.append((f"{key} caption_strategy", one["caption_strategy"],
                                 "captions are files beside the pictures, or a list (data.kind)"))
    side = number(size)
    if kind == "area":  # megapixels
        side = round((side * 1_000_000) ** 0.5 / 64) * 64
    elif side < 16:  # pixel_area of megapixels, as older files have it
        side = round((side * 1_048_576) ** 0.5)
    common.sizes(draft, "resolution", [round(side)], not crop)
    if not folders:
        draft.missing.append("data.path: the data sets are in the file of data_backend_config, which is not here; name "
                             "the folder of the pictures.")
    return [folder for folder in folders if folder.path]
