"""OneTrainer's settings: a JSON of training_presets/ or of its window. (modules/util/config/TrainConfig.py of
Nerogar/OneTrainer)"""
from __future__ import annotations

from pathlib import Path

from . import common, families, often, prompts, sets
from .rows import Draft, Row, chosen, none, number, on, positive, said, to, whole, yes

NAME = "OneTrainer"
FAMILIES = {"PIXART_ALPHA": families.PIXART_ALPHA, "PIXART_SIGMA": families.PIXART_SIGMA,
            "FLUX_DEV_1": families.FLUX, "STABLE_CASCADE_1": families.CASCADE}
METHODS = {"LORA": families.LORA, "FINE_TUNE": families.FULL}
DEFAULTS = {  # what it means by silence, where that is other than ours
    "learning_rate": 3e-6, "batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 100, "resolution": "512",
    "lora_rank": 16, "lora_alpha": 1.0, "learning_rate_warmup_steps": 200, "clip_grad_norm": 1.0,
    "learning_rate_scheduler": "CONSTANT", "aspect_ratio_bucketing": True, "vb_loss_strength": 1.0,
    "transformer.gradient_checkpointing": True,
}
SILENT = ("__version", "workspace_dir", "cache_dir", "debug_", "tensorboard", "continue_last_backup", "cloud.",
          "optimizer_defaults.", "optimizer.__version", "secrets.", "train_device", "temp_device",
          "include_train_config",
          "prevent_overwrites", "sample_image_format", "sample_video_format", "sample_audio_format", "samples_to_",
          "dataloader_threads", "caching_threads", "device_indexes", "output_", "backup_before", "save_filename_prefix",
          "save_skip_first", "validate_after", "quantization.", "embedding.", "only_cache", "gradient_reduce",
          "concept_file_name", "sample_definition_file_name", "model_type", "training_method", "base_model_name",
          "learning_rate_cycles", "learning_rate_min_factor_unit", "save_every_unit", "sample_after_unit", "ema_decay",
          "optimizer.optimizer", "optimizer.beta", "concepts", "samples", "custom_learning_rate_scheduler",
          "unet.", "text_encoder_3", "text_encoder_4", "unconditional_transformer.", "decoder", "embedding_",
          "additional_embeddings", "oft_", "dora_oft", "lokr_", "lora_weight_dtype", "lora_decompose_",
          "bundle_additional_embeddings", "preserve_embedding_norm", "frames", "clear_cache", "image_caching",
          "text_caching", "async_", "fused_gradient", "fallback_train_dtype", "enable_autocast_cache",
          "attention_mechanism", "prefetch_next_batch", "non_ema_sampling", "text_encoder_sequence_length",
          "ema_update_step_interval", "optimizer.stochastic_rounding")
SILENT_ENDS = (".stop_training_after", ".stop_training_after_unit", ".train_embedding", ".guidance_scale", ".include",
               ".offload_fraction", ".activation_offloading", ".attention_mask", ".model_name", ".weight_dtype",
               ".gradient_checkpointing", ".train")
BASES = chosen({"FLOAT_8": "fp8", "INT_8": "int8", "NFLOAT_4": "nf4", "BFLOAT_16": None, "FLOAT_16": None,
                "FLOAT_32": None})
ROWS: dict[str, Row] = {
    "learning_rate": to("optimizer.learning_rate", value=number),
    "learning_rate_warmup_steps": to("optimizer.warm_up", value=lambda v: round(number(v))),
    "learning_rate_min_factor": to("optimizer.decay_to", value=number),
    "learning_rate_scaler": to("optimizer.learning_rate_scaling", value=chosen({"NONE": "none"})),
    "clip_grad_norm": to("optimizer.clip", value=number),
    "optimizer.weight_decay": to("optimizer.weight_decay", value=number),
    "optimizer.eps": to("optimizer.eps", value=number),
    "optimizer.d_coef": to("optimizer.arguments.d_coef", value=number),
    "lora_rank": to("adapter.rank", "recipe.rank", value=whole),
    "lora_alpha": to("adapter.alpha", "recipe.alpha", value=number),
    "lora_decompose": to("adapter.dora", value=yes),
    "lora_model_name": to("adapter.start", value=lambda v: v or None),
    "dropout_probability": to("adapter.dropout", value=number),
    "lokr_decompose_factor": to("adapter.factor", value=whole),
    "seed": to("seed", value=whole),
    "compile": to("compile", value=yes),
    "gradient_checkpointing": to("checkpoint_activations", value=lambda v: str(v).upper() != "OFF" and v is not False),
    "prior.gradient_checkpointing": to("checkpoint_activations", value=lambda v: str(v).upper() != "OFF"),
    "transformer.gradient_checkpointing": to("checkpoint_activations", value=lambda v: str(v).upper() != "OFF"),
    "text_encoder.dropout_probability": to("recipe.dropout", value=number),
    "text_encoder.weight_dtype": to("text.precision", value=chosen({
        "BFLOAT_16": "bf16", "FLOAT_16": "bf16", "FLOAT_8": "fp8", "INT_8": "int8", "NFLOAT_4": "nf4",
        "FLOAT_32": "fp32"})),
    "text_encoder_2.sequence_length": to("text.max_length", value=whole),
    "text_encoder_2_sequence_length": to("text.max_length", value=whole),
    "vae.weight_dtype": to("vae.precision", value=chosen({"BFLOAT_16": "bf16", "FLOAT_32": "fp32"})),
    "transformer.weight_dtype": to("memory.base", value=BASES),
    "prior.weight_dtype": to("memory.base", value=BASES),
    "transformer.guidance_scale": to("recipe.guidance", value=number),
    "vb_loss_strength": to("recipe.variance", value=number),
    "rescale_noise_scheduler_to_zero_terminal_snr": to("model.zero_terminal_snr", value=yes),
    "rolling_backup_count": to("keep", value=whole),
    "offset_noise_weight": to("noise.offset", value=positive),
    "generalized_offset_noise": none("offset noise is as strong at every noise level"),
    "perturbation_noise_weight": to("noise.perturbation", value=positive,
                                    changed="the network is not to predict it; there it is part of the noise."),
    "timestep_shift": to("noise.shift", value=number, usual=(1, 1.0)),
    "dynamic_timestep_shifting": none("noise.shift is one for pictures of all sizes"),
    "loss_scaler": none(usual=("NONE",)),
    "text_encoder.train": none("text encoders of this family stay as they are"),
    "text_encoder_2.train": none("text encoders of this family stay as they are"),
    "transformer.train": none(usual=(True,)), "unet.train": none(usual=(True,)), "prior.train": none(usual=(True,)),
    "transformer.include": none(usual=(True,)), "prior.include": none(usual=(True,)),
    "vae.include": none(usual=(True,)),
    "text_encoder.include": none(usual=(True,)), "unet.include": none(usual=(True,)),
    "latent_caching": none("`python -m trainer cache` keeps features", usual=(True,)),
    "masked_training": to("data.masks", value=lambda v: "files" if yes(v) else None),
    "masked_prior_preservation_weight": none("what the untrained network predicts outside of masks is no target"),
    "validation": none("validation.every, and a share of the pictures that is held out"),
    "layer_filter_preset": none("name layers in adapter.targets or [[adapter.layers]]", usual=("full",)),
}


def recognises(raw) -> bool:
    return isinstance(raw, dict) and "training_method" in raw and "model_type" in raw


def trained(raw: dict) -> families.Trained:
    model, method = str(raw["model_type"]), str(raw["training_method"])
    if model not in FAMILIES:
        raise ValueError(f"model_type = {model!r}: this trainer has {', '.join(FAMILIES)}.")
    if method not in METHODS:
        raise ValueError(f"training_method = {method!r}: this trainer has {' and '.join(METHODS)}.")
    return families.Trained(FAMILIES[model], METHODS[method], str(raw.get("base_model_name") or ""))


def own(draft: Draft, given: dict, raw: dict, read_beside):
    """What needs more than a row."""
    common.optimizer(draft, "optimizer.optimizer", given.pop("optimizer.optimizer", "ADAMW"))
    betas = [given.pop(f"optimizer.beta{i}", None) for i in (1, 2)]
    if all(beta is not None for beta in betas) and draft.has("optimizer.betas"):
        draft.set("optimizer.betas", [number(beta) for beta in betas])
    common.decay(draft, "learning_rate_scheduler", given.pop("learning_rate_scheduler"),
                 given.pop("learning_rate_cycles", None))
    common.precision(draft, "train_dtype", given.pop("train_dtype", "BFLOAT_16"))
    common.batch(draft, given.pop("batch_size"), given.pop("gradient_accumulation_steps"))
    common.early(draft, "optimizer.fused_back_pass", given, "clip_grad_norm")
    dtype = next((given[key] for key in ("transformer.weight_dtype", "prior.weight_dtype") if key in given), "")
    if str(dtype).upper() == "BFLOAT_16" and draft.has("memory.weights"):
        draft.apply("weight_dtype", dtype, to("memory.weights", value=lambda _: "bf16", changed="norms and biases stay "
                                              "in float32, and updates are rounded at random in any case."))
    common.sizes(draft, "resolution", common.squared(given.pop("resolution")), given.pop("aspect_ratio_bucketing"))
    common.ema(draft, str(given.pop("ema", "OFF")).upper() != "OFF", given.pop("ema_decay", 0.999))
    if str(given.get("peft_type", "")).upper() == "LOKR":
        given["lora_rank"] = given.get("lokr_dim", 16)
        given["lora_decompose"] = given.get("lokr_weight_decompose", False)
    if "peft_type" in given:
        draft.apply("peft_type", given.pop("peft_type"), common.kinds(draft, "peft_type"))
    errors(draft, given)
    weights(draft, given)
    levels(draft, given, raw)
    masks(draft, given)
    layers(draft, given)
    folders = sets.data(draft, concepts(draft, raw, read_beside))
    often.epochs(draft, "epochs", given.pop("epochs"), folders)
    frequencies(draft, given, folders)
    samples(draft, raw, read_beside)


def layers(draft: Draft, given: dict):
    """Their filter names parts of names, or is one regular expression."""
    text, regex = given.pop("layer_filter", ""), yes(given.pop("layer_filter_regex", False))
    parts = [text] if regex else [part.strip() for part in str(text).split(",")]
    if any(parts):
        draft.absent.append(("layer_filter", text, "the layers have other names here (`attn.qkv` for to_q, to_k and "
                                                   "to_v): name them in adapter.targets or [[adapter.layers]]"))


def errors(draft: Draft, given: dict):
    """The strongest of its errors, which are added up there."""
    usual = {"mse": 1.0, "mae": 0.0, "huber": 0.0, "log_cosh": 0.0}
    strengths = {kind: number(given.pop(f"{kind}_strength", value)) for kind, value in usual.items()}
    delta = given.pop("huber_delta", 1.0)
    kind = max(strengths, key=strengths.get)
    if kind == "log_cosh":
        kind = "mse"
    if kind != "mse":
        common.error(draft, f"{kind}_strength", strengths[kind], kind, delta=delta, changed="twice as large as there."
                     if kind == "huber" else "")
    draft.absent += [(f"{other}_strength", value, f"one kind of error counts, loss.kind = {kind!r}")
                     for other, value in strengths.items() if other != kind and value]
    if strengths[kind] not in (0, 1):
        draft.absent.append((f"{kind}_strength", strengths[kind], "an error counts once"))


def weights(draft: Draft, given: dict):
    """The weight of the noise level."""
    name, strength = given.pop("loss_weight_fn", None), given.pop("loss_weight_strength", 5)
    key = f"loss_weight_fn {name}"
    if name == "MIN_SNR_GAMMA":
        draft.apply(key, strength, to("loss.snr_gamma", value=positive))
    elif name == "DEBIASED_ESTIMATION":
        draft.apply(key, True, to("loss.debiased", changed="the SNR is not cut off at 1000; for v and flows the weight "
                                                           "is what corresponds to that for eps."))
    elif draft.has("recipe.weight") and name in ("P2", "CONSTANT"):
        draft.set("recipe.weight", {"P2": "p2", "CONSTANT": "none"}[name])
    elif name not in (None, "CONSTANT"):
        draft.absent.append(("loss_weight_fn", name, "no counterpart"))


def levels(draft: Draft, given: dict, raw: dict):
    """Which noise levels are drawn."""
    key = "timestep_distribution"
    name = str(given.pop(key, "UNIFORM"))
    weight, bias = (number(given.pop(f"noising_{part}", 0)) for part in ("weight", "bias"))
    common.timesteps(draft, key, name, {"UNIFORM": "uniform", "LOGIT_NORMAL": "logit_normal"}.get(name), bias,
                     weight + 1, said=key in raw)
    draft.apply("timestep_shift", given.pop("timestep_shift", 1), ROWS["timestep_shift"])
    low, high = (number(given.pop(f"{end}_noising_strength", value)) for end, value in (("min", 0), ("max", 1)))
    common.between(draft, ("min_noising_strength", low, 1000 * low), ("max_noising_strength", high, 1000 * high),
                   squeezed=True)


def masks(draft: Draft, given: dict):
    """What belongs to masks, where there are some."""
    weight, share = given.pop("unmasked_weight", 0.1), number(given.pop("unmasked_probability", 0.1))
    normalised = given.pop("normalize_masked_area_loss", False)
    if not yes(given.get("masked_training", False)):
        return
    draft.apply("unmasked_weight", weight, to("loss.unmasked", value=number))
    draft.apply("normalize_masked_area_loss", normalised, to("loss.normalise_masks", value=on))
    if share:
        draft.absent.append(("unmasked_probability", share, "masks count at every step"))


IMAGE: dict[str, Row] = {
    "enable_random_flip": to("data.sets.flip", value=on),
    "enable_random_rotate": to("data.sets.rotation", value=positive),
    "enable_random_brightness": to("data.sets.brightness", value=lambda v: min(positive(v) or 0, 1) or None),
    "enable_random_contrast": to("data.sets.contrast", value=lambda v: min(positive(v) or 0, 1) or None),
    "enable_random_saturation": to("data.sets.saturation", value=lambda v: min(positive(v) or 0, 1) or None),
    "enable_random_hue": to("data.sets.hue", value=lambda v: min((positive(v) or 0) / 2, 0.5) or None),
    "enable_crop_jitter": to("data.sets.crop", value=lambda v: "random" if yes(v) else None),
    **{f"enable_fixed_{name}": none("pictures change at random, not all of them alike") for name in (
        "flip", "rotate", "brightness", "contrast", "saturation", "hue")},
    "enable_resolution_override": none("sizes are the run's: data.resolutions"),
    "enable_random_circular_mask_shrink": none(), "enable_random_mask_rotate_crop": none(),
}
STRENGTHS = {f"enable_random_{name}": f"random_{name}_max_strength" for name in ("brightness", "contrast",
                                                                              "saturation", "hue")}
STRENGTHS["enable_random_rotate"] = "random_rotate_max_angle"
"""Where the strength of a change stands."""


def concepts(draft: Draft, raw: dict, read_beside) -> list[sets.Folder]:
    listed = raw.get("concepts") or read_beside(raw.get("concept_file_name")) or []
    folders = []
    for number_, one in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(one, dict) or not one.get("enabled", True):
            continue
        one = said(one)
        key, path, kind = f"concepts[{number_}]", str(one.get("path") or ""), str(one.get("type", "STANDARD"))
        if one.get("validation_concept") or kind == "VALIDATION":
            draft.absent.append((key, path, "pictures for validation are data.held_out_path, or a set's"))
            continue
        repeats = number(one.get("balancing", one.get("repeats", 1)))
        folder = sets.Folder(path, key, repeats, name=str(one.get("name") or ""))
        if one.get("balancing_strategy") == "SAMPLES":
            folder.shown = repeats
        if kind == "PRIOR_PREDICTION":
            folder.prior = True
            draft.changed.append(f"{key} has prior = true: there the target is what the untrained network predicts, "
                                 "here it is the pictures themselves.")
        draft.apply(f"{key}.loss_weight", one.get("loss_weight", 1), LOSS_WEIGHT, into=folder.own)
        kept = yes(raw.get("latent_caching", True)) and whole(one.get("image_variations") or 1) < 2
        image(draft, folder, {**said(one.get("image", {})), **({"enable_crop_jitter": False} if kept else {})})
        text(draft, folder, said(one.get("text", {})))
        folders.append(folder)
    if not folders:
        draft.missing.append("data.path: the concepts are in another file of OneTrainer (concept_file_name); name the "
                             "folder of the pictures.")
    return folders


LOSS_WEIGHT = to("data.sets.loss_weight", value=sets.loss_weight)


def image(draft: Draft, folder: sets.Folder, given: dict):
    """How a concept's pictures change."""
    for name, row in IMAGE.items():
        if yes(given.get(name, False)):
            value = given.get(STRENGTHS[name], 0) if name in STRENGTHS else True
            draft.apply(f"{folder.key}.image.{name}", value, row, into=folder.own)


def text(draft: Draft, folder: sets.Folder, given: dict):
    """A concept's captions."""
    source, key = given.get("prompt_source", "sample"), f"{folder.key}.text"
    if source == "filename":
        folder.own["name_captions"] = True
    path = str(given.get("prompt_path") or "") if source == "concept" else ""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).is_file() else []
    if lines:
        folder.own["caption"] = lines[0]
    elif path:
        draft.absent.append((f"{key}.prompt_path", path, "name the one caption in data.caption"))
    drops, rate = yes(given.get("tag_dropout_enable", False)), number(given.get("tag_dropout_probability", 0))
    if yes(given.get("enable_tag_shuffling", False)):
        folder.own["shuffle_tags"] = True
    if drops and rate:
        mode = str(given.get("tag_dropout_mode", "FULL"))
        draft.apply(f"{key}.tag_dropout_probability", rate, to("data.sets.tag_dropout") if mode.startswith("RANDOM")
                    else none("parts are left out one by one (recipe.dropout: all of a caption)"), into=folder.own)
        if mode == "RANDOM WEIGHTED":
            draft.absent.append((f"{key}.tag_dropout_mode", mode, "every part is left out as often"))
        if str(given.get("tag_dropout_special_tags_mode", "NONE")) != "NONE":
            draft.absent.append((f"{key}.tag_dropout_special_tags", given.get("tag_dropout_special_tags"),
                                 "every part is left out as often"))
    if folder.own.get("shuffle_tags") or folder.own.get("tag_dropout"):
        folder.own["keep_tags"] = whole(given.get("keep_tags_count", 1))
        if str(given.get("tag_delimiter", ",")).strip() != ",":
            draft.absent.append((f"{key}.tag_delimiter", given["tag_delimiter"], "parts stand between commas"))
    if yes(given.get("caps_randomize_enable", False)):
        draft.absent.append((f"{key}.caps_randomize_enable", True, "no counterpart"))


def frequencies(draft: Draft, given: dict, folders: list[sets.Folder]):
    """Its backups are what a run goes on from, as checkpoints are; saves come in their place."""
    backup = "backup_after", given.pop("backup_after", 0), given.pop("backup_after_unit", "MINUTE"), folders
    often.save(draft, *backup)
    unit = given.pop("save_every_unit", "NEVER")
    if not often.is_never(count := given.pop("save_every", 0), str(unit)):
        for name in ("save_every", "save_epochs", "save_minutes"):
            draft.settings.pop(name, None)
        often.save(draft, "save_every", count, unit, folders)
    often.sample(draft, "sample_after", given.pop("sample_after", 0), given.pop("sample_after_unit", "MINUTE"), folders)
    if whole(given.pop("sample_skip_first", 0) or 0):
        draft.set("samples.baseline", False)


def samples(draft: Draft, raw: dict, read_beside):
    listed = raw.get("samples") or read_beside(raw.get("sample_definition_file_name")) or []
    names = {"prompt": "prompt", "negative_prompt": "negative", "height": "height", "width": "width", "seed": "seed",
             "diffusion_steps": "steps", "cfg_scale": "cfg"}
    prompts.take(draft, [{ours: one.get(theirs) for theirs, ours in names.items()
                          if theirs != "seed" or not one.get("random_seed")}
                         for one in listed if isinstance(one, dict) and one.get("enabled", True)])
