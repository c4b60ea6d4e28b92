"""SimpleTuner's config.json, and the multidatabackend.json that it names or that is given beside it.
(documentation/OPTIONS.md and DATALOADER.md of bghira/SimpleTuner)"""
from __future__ import annotations

import re

from . import common, families, often, prompts, sets
from .rows import Draft, Row, chosen, none, number, positive, said, to, whole, yes

NAME = "SimpleTuner"
FAMILIES = {"pixart_sigma": families.PIXART_SIGMA, "pixart": families.PIXART_SIGMA, "flux": families.FLUX,
            "cascade": families.CASCADE, "stable_cascade": families.CASCADE}
METHODS = {"lora": families.LORA, "full": families.FULL}
BASES = {"pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "flux": "black-forest-labs/FLUX.1-dev"}
DEFAULTS = {"lora_rank": 16, "learning_rate": 4e-7, "train_batch_size": 4, "gradient_accumulation_steps": 1,
            "lr_scheduler": "sine", "optimizer": "adamw_bf16", "resolution": 1.0, "resolution_type": "pixel_area",
            "max_grad_norm": 2.0, "lr_warmup_steps": 500, "flow_schedule_shift": 3.0}
SILENT = ("output_dir_", "hub_model_id", "push_", "report_to", "model_family", "model_type", "model_flavour",
          "pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path", "data_backend_config",
          "disable_bucket_pruning", "quantize_via", "vae_batch_size", "write_batch_size", "read_batch_size",
          "image_processing_batch_size", "num_eval_images", "logging_dir", "resume_from_checkpoint", "max_workers",
          "aws_", "webhook_", "user_prompt_library", "validation_torch_compile", "validation_disable_unconditional",
          "ignore_", "offload_", "cache_dir", "debug_", "attention_mechanism", "inference_scheduler_", "override_",
          "minimum_image_size", "metadata_", "resolution_type", "configure_", "vae_cache_", "lycoris_config",
          "num_train_epochs", "disable_benchmark", "validation_on_startup", "fuse_qkv_projections",
          "preserve_data_backend_cache", "keep_vae_loaded", "set_")
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
        "no_change": None, "fp8-torchao": "fp8", "fp8-quanto": "fp8", "int8-quanto": "int8", "int8-torchao": "int8",
        "nf4-bnb": "nf4", "int4-quanto": "nf4"}), changed="the blocks that stay as they are, in as many bits."),
    "base_model_default_dtype": none(usual=("bf16",)),
    "snr_gamma": to("loss.snr_gamma", value=positive),
    "use_soft_min_snr": none("loss.snr_gamma is Min-SNR"), "soft_min_snr_sigma_data": none("loss.snr_gamma is Min-SNR"),
    "input_perturbation": to("noise.perturbation", value=positive),
    "input_perturbation_steps": none("input perturbation is as strong at every step"),
    "masked_loss_probability": none("masks count at every step", usual=(1, 1.0)),
    "timestep_bias_strategy": none("noise.quarters draws each quarter as often as it says", usual=("none",)),
    "flow_schedule_auto_shift": none("noise.shift is one for pictures of all sizes"),
    "flow_use_beta_schedule": none("noise.timesteps has uniform and logit_normal"),
    "flux_fast_schedule": none("noise.timesteps has uniform and logit_normal"),
    "flux_guidance_value": to("recipe.guidance", value=number),
    "prediction_type": to("model.prediction", value=chosen({"epsilon": "eps", "v_prediction": "v"})),
    "rescale_betas_zero_snr": to("model.zero_terminal_snr", value=yes),
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
    objective(draft, given)
    folders = sets.data(draft, backends(draft, given, read_beside))
    rounds = given.pop("num_train_epochs", 0)
    if not whole(given.get("max_train_steps") or 0):
        often.epochs(draft, "num_train_epochs", rounds or 1, folders)
    often.save(draft, "checkpoint_epoch_interval", given.pop("checkpoint_epoch_interval", 0), "EPOCH", folders)
    often.sample(draft, "validation_epoch_interval", given.pop("validation_epoch_interval", 0), "EPOCH", folders)
    samples(draft, given, read_beside)


def objective(draft: Draft, given: dict):
    """Noise, noise levels and errors. (simpletuner/helpers/models/common.py)"""
    flux = draft.recipe.startswith("flux")
    offset, strength = yes(given.pop("offset_noise", False)), given.pop("noise_offset", 0.1)
    share = number(given.pop("noise_offset_probability", 0.25))
    for key, value in (("snr_gamma", given.get("snr_gamma")), ("noise_offset", strength if offset else 0)):
        if flux and value:
            draft.absent.append((key, value, "SimpleTuner does not read it with FLUX, and it is left out"))
            given.pop(key, None)
    if offset and not flux:
        draft.apply("noise_offset", strength, to("noise.offset", value=positive, changed=(
            f"at every step, not in {share:g} of them." if share < 1 else "")))
    kind, delta = str(given.pop("loss_type", "l2")), given.pop("huber_c", 0.1)
    schedule = str(given.pop("huber_schedule", "snr"))
    if kind in ("huber", "smooth_l1"):
        common.error(draft, "loss_type", kind, "pseudo_huber", delta=delta, schedule=schedule, changed=(
            "that has another name here." if kind == "huber" else f"{number(delta):g} times as large as there."))
        if flux and schedule == "snr":
            draft.changed.append("huber_schedule = 'snr': the noise over the signal is 1 / sqrt(SNR) here, and there "
                                 "the root of (1 - sigma) / sigma.")
    scale, uniform = number(given.pop("flow_sigmoid_scale", 1)), yes(given.pop("flow_use_uniform_schedule", False))
    shift, alone = given.pop("flow_schedule_shift"), ("flow_use_beta_schedule", "flux_fast_schedule")
    if flux and not any(yes(given.get(key, False)) for key in alone):
        common.timesteps(draft, "flow_use_uniform_schedule" if uniform else "flow_sigmoid_scale", uniform or scale,
                         "uniform" if uniform else "logit_normal", 0, scale)
        if not yes(given.get("flow_schedule_auto_shift", False)):
            draft.apply("flow_schedule_shift", shift, to("noise.shift", value=positive, usual=(1, 1.0)))


def samples(draft: Draft, given: dict, read_beside):
    """The prompt and those of the library, each at all sizes and with the one seed."""
    library = next((given[key] for key in ("user_prompt_library", "validation_prompt_library")
                    if str(given.get(key)).endswith(".json")), None)
    if library == given.get("validation_prompt_library"):
        given.pop("validation_prompt_library", None)
    content = read_beside(library) if library else {}
    if not isinstance(content, dict):
        draft.missing.append(f"samples.prompts: they are in {library!r}, which is not here.")
        content = {}
    listed = [given.pop("validation_prompt", "") or "", *(
        one.get("prompt", "") if isinstance(one, dict) else one for one in content.values())]
    sizes = [common.squared(one) for one in re.split(r"[,|]", str(given.pop("validation_resolution", "") or ""))]
    around = {"negative": given.pop("validation_negative_prompt", None), "seed": given.pop("validation_seed", None)}
    prompts.take(draft, [{"prompt": prompt, **around, **({"width": size[0], "height": size[-1]} if size else {})}
                         for prompt in listed for size in sizes])
    draft.set("samples.baseline", not yes(given.pop("disable_benchmark", False)))


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


def backends(draft: Draft, given: dict, read_beside) -> list[sets.Folder]:
    """The data sets; sizes are all of theirs, and buckets those of the first."""
    listed = read_beside(given.get("data_backend_config")) or []
    listed = [said(one) for one in (listed if isinstance(listed, list) else []) if isinstance(one, dict)
              and not one.get("disabled") and not one.get("disable")]
    masks = {one.get("id"): str(one.get("instance_data_dir") or "") for one in listed
             if one.get("dataset_type") == "conditioning" and one.get("conditioning_type") in ("mask", "segmentation")}
    dropped, kind, size = given.pop("caption_dropout_probability", None), given.get("resolution_type"), \
        given.pop("resolution")
    folders, crops, sides = [], [], []
    for i, one in enumerate(listed):
        if one.get("dataset_type", "image") != "image":
            continue
        key, path = f"data backend {one.get('id', i)}", one.get("instance_data_dir") or ""
        if one.get("type", "local") != "local":
            name = one.get("dataset_name") or one.get("type")
            draft.absent.append((key, name, "data lie in a folder: download them"))
        folder = sets.Folder(str(path), key, 1 + number(one.get("repeats") or 0), name=str(one.get("id") or ""))
        folder.dropout = number(one["caption_dropout_probability"]) if "caption_dropout_probability" in one else None
        if folder.dropout is None and dropped is not None:
            folder.dropout = number(dropped)
        captions(draft, folder, one)
        cut(draft, folder, one)
        if regularisation(one):
            folder.prior = True
            draft.changed.append(f"{key} has prior = true: there the target is what the untrained network predicts, "
                                 "here it is the pictures themselves.")
        for mask in one.get("conditioning_data") if isinstance(one.get("conditioning_data"), list) else \
                [one.get("conditioning_data")]:
            if mask in masks:
                sets.masked_by(draft, folder, f"{key}.conditioning_data", masks[mask])
        folders += [folder] if folder.path else []
        sides.append(side(one.get("resolution_type", kind), one.get("resolution", size)))
        crops.append(one.get("crop") and one.get("crop_aspect", "square") == "square")
    common.sizes(draft, "resolution", sides or [side(kind, size)], not (crops and crops[0]))
    if not folders:
        draft.missing.append("data.path: the data sets are in the file of data_backend_config, which is not here; name "
                             "the folder of the pictures.")
        draft.apply("caption_dropout_probability", dropped, to("recipe.dropout", value=number))
    return folders


def side(kind, size) -> int:
    """Pixels along a square."""
    found = number(size)
    if kind == "area":  # megapixels
        return round((found * 1_000_000) ** 0.5 / 64) * 64
    return round((found * 1_048_576) ** 0.5) if found < 16 else round(found)  # as older files have it


def regularisation(one: dict) -> bool:
    return yes(one.get("is_regularisation_data", False)) or yes(one.get("is_regularization_data", False))


def captions(draft: Draft, folder: sets.Folder, one: dict):
    """What a data set's pictures are called."""
    way, word = one.get("caption_strategy", "textfile"), str(one.get("instance_prompt") or "")
    if way == "filename":
        folder.own["name_captions"] = True
    elif way == "parquet":
        draft.absent.append((f"{folder.key} caption_strategy", way, "captions are files beside the pictures, or a list "
                                                                    "(data.kind)"))
    if word and (way == "instanceprompt" or yes(one.get("only_instance_prompt", False))):
        folder.own["caption"] = word
        if way != "instanceprompt":
            draft.changed.append(f"{folder.key} only_instance_prompt: it is the caption of pictures that have none; "
                                 "take files of captions away.")
    elif word and yes(one.get("prepend_instance_prompt", False)):
        sets.framed(folder, word)
    shuffled = one.get("caption_shuffle") if isinstance(one.get("caption_shuffle"), dict) else {}
    if yes(shuffled.get("enable", False)):
        draft.apply(f"{folder.key} caption_shuffle", True, to("data.sets.shuffle_tags"), into=folder.own)
        draft.apply(f"{folder.key} position_start", whole(shuffled.get("position_start", 0)), to(
            "data.sets.keep_tags", value=lambda v: v or None), into=folder.own)
        if shuffled.get("split_on", "comma") != "comma":
            draft.absent.append((f"{folder.key} split_on", shuffled["split_on"], "parts of a caption stand between "
                                                                                 "commas"))


def cut(draft: Draft, folder: sets.Folder, one: dict):
    """Where a data set's pictures are cropped, and when it is shown."""
    if yes(one.get("crop", False)):
        draft.apply(f"{folder.key} crop_style", one.get("crop_style", "random"), to("data.sets.crop", value=chosen({
            "random": "random", "center": None, "centre": None})), into=folder.own)
    draft.absent += [(f"{folder.key} {name}", one[name], "a data set is shown from the first step to the last")
                     for name in ("start_epoch", "start_step", "end_epoch", "end_step") if one.get(name, 0) not in (
                         0, 1, None)]
    if one.get("timestep_sampling_offset"):
        draft.absent.append((f"{folder.key} timestep_sampling_offset", one["timestep_sampling_offset"],
                             "noise levels are drawn alike for all data sets"))
