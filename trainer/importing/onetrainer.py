"""OneTrainer's settings: a JSON of training_presets/ or of its window. (modules/util/config/TrainConfig.py of
Nerogar/OneTrainer)"""
from __future__ import annotations

from pathlib import Path

from . import common, families
from .rows import Draft, Row, chosen, none, number, to, whole, yes

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
          "dataloader_threads", "caching_threads", "device_indexes", "output_", "backup_", "save_filename_prefix",
          "save_skip_first", "validate_after", "quantization.", "embedding.", "only_cache", "gradient_reduce",
          "concept_file_name", "sample_definition_file_name", "model_type", "training_method", "base_model_name",
          "learning_rate_cycles", "learning_rate_min_factor_unit", "save_every_unit", "sample_after_unit", "ema_decay",
          "optimizer.optimizer", "optimizer.beta", "concepts", "samples", "custom_learning_rate_scheduler",
          "unet.", "text_encoder_3", "text_encoder_4", "unconditional_transformer.", "decoder", "embedding_",
          "additional_embeddings", "oft_", "dora_oft", "lokr_", "lora_weight_dtype", "lora_decompose_",
          "bundle_additional_embeddings", "preserve_embedding_norm", "frames", "clear_cache", "image_caching",
          "text_caching", "async_", "fused_gradient", "fallback_train_dtype", "enable_autocast_cache",
          "attention_mechanism", "prefetch_next_batch", "huber_delta", "unmasked_", "non_ema_sampling",
          "sample_skip_first", "text_encoder_sequence_length", "ema_update_step_interval",
          "optimizer.stochastic_rounding")
SILENT_ENDS = (".stop_training_after", ".stop_training_after_unit", ".train_embedding", ".guidance_scale", ".include",
               ".offload_fraction", ".activation_offloading", ".attention_mask", ".model_name", ".weight_dtype",
               ".gradient_checkpointing", ".train")
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
    "text_encoder.weight_dtype": to("text.precision", value=chosen({"BFLOAT_16": "bf16", "FLOAT_16": "bf16",
                                                                    "FLOAT_32": "fp32"})),
    "text_encoder_2.sequence_length": to("text.max_length", value=whole),
    "text_encoder_2_sequence_length": to("text.max_length", value=whole),
    "vae.weight_dtype": to("vae.precision", value=chosen({"BFLOAT_16": "bf16", "FLOAT_32": "fp32"})),
    "transformer.weight_dtype": to("memory.base", value=chosen({"FLOAT_8": "fp8", "NFLOAT_4": "nf4", "BFLOAT_16": None,
                                                                "FLOAT_16": None, "FLOAT_32": None})),
    "prior.weight_dtype": to("memory.base", value=chosen({"FLOAT_8": "fp8", "NFLOAT_4": "nf4", "BFLOAT_16": None,
                                                          "FLOAT_16": None, "FLOAT_32": None})),
    "transformer.guidance_scale": to("recipe.guidance", value=number),
    "vb_loss_strength": to("recipe.variance", value=number),
    "rescale_noise_scheduler_to_zero_terminal_snr": to("model.zero_terminal_snr", value=yes),
    "rolling_backup_count": to("keep", value=whole),
    "offset_noise_weight": to("recipe.offset_noise", value=number),
    "mse_strength": none(usual=(1, 1.0)), "max_noising_strength": none(usual=(1, 1.0)),
    "timestep_distribution": none("the family's own noise levels are drawn"),
    "timestep_shift": none(usual=(1, 1.0)),
    "loss_scaler": none(usual=("NONE",)),
    "text_encoder.train": none("text encoders of this family stay as they are"),
    "text_encoder_2.train": none("text encoders of this family stay as they are"),
    "transformer.train": none(usual=(True,)), "unet.train": none(usual=(True,)), "prior.train": none(usual=(True,)),
    "transformer.include": none(usual=(True,)), "prior.include": none(usual=(True,)),
    "vae.include": none(usual=(True,)),
    "text_encoder.include": none(usual=(True,)), "unet.include": none(usual=(True,)),
    "latent_caching": none("`python -m trainer cache` keeps features", usual=(True,)),
    "masked_training": none("pictures have no masks"),
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
    common.sizes(draft, "resolution", common.squared(given.pop("resolution")), given.pop("aspect_ratio_bucketing"))
    common.ema(draft, str(given.pop("ema", "OFF")).upper() != "OFF", given.pop("ema_decay", 0.999))
    if str(given.get("peft_type", "")).upper() == "LOKR":
        given["lora_rank"] = given.get("lokr_dim", 16)
        given["lora_decompose"] = given.get("lokr_weight_decompose", False)
    if "peft_type" in given:
        draft.apply("peft_type", given.pop("peft_type"), common.kinds(draft, "peft_type"))
    if given.pop("loss_weight_fn", "CONSTANT") == "MIN_SNR_GAMMA":
        draft.apply("loss_weight_fn MIN_SNR_GAMMA", given.pop("loss_weight_strength", 5),
                    to("recipe.snr_gamma", value=number))
    elif raw.get("loss_weight_fn", "CONSTANT") == "P2" and draft.has("recipe.weight"):
        draft.set("recipe.weight", "p2")
    elif raw.get("loss_weight_fn", "CONSTANT") != "CONSTANT":
        draft.absent.append(("loss_weight_fn", raw["loss_weight_fn"], "no counterpart"))
    given.pop("loss_weight_strength", None)
    if given.get("timestep_distribution") == ("LOGIT_NORMAL" if draft.recipe.startswith("flux") else "UNIFORM"):
        given.pop("timestep_distribution")
    layers(draft, given)
    folders = concepts(draft, raw, read_beside)
    common.data(draft, folders)
    common.epochs(draft, "epochs", given.pop("epochs"), folders)
    often(draft, given)
    samples(draft, raw, read_beside)


def layers(draft: Draft, given: dict):
    """Their filter names parts of names, or is one regular expression."""
    text, regex = given.pop("layer_filter", ""), yes(given.pop("layer_filter_regex", False))
    parts = [text] if regex else [part.strip() for part in str(text).split(",")]
    if any(parts):
        draft.absent.append(("layer_filter", text, "the layers have other names here (`attn.qkv` for to_q, to_k and "
                                                   "to_v): name them in adapter.targets or [[adapter.layers]]"))


def concepts(draft: Draft, raw: dict, read_beside) -> list[common.Folder]:
    listed = raw.get("concepts") or read_beside(raw.get("concept_file_name")) or []
    folders = []
    for number_, one in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(one, dict) or not one.get("enabled", True) or one.get("validation_concept"):
            continue
        key = f"concepts[{number_}]"
        text, image = one.get("text") or {}, one.get("image") or {}
        prompt = str(text.get("prompt_path") or "") if text.get("prompt_source") == "concept" else ""
        lines = Path(prompt).read_text(encoding="utf-8").splitlines() if prompt and Path(prompt).is_file() else []
        if prompt and not lines:
            draft.absent.append((f"{key}.text.prompt_path", prompt, "name the one caption in data.caption"))
        folders.append(common.Folder(str(one.get("path") or ""), key, lines[0] if lines else "",
                                     one.get("balancing", one.get("repeats", 1))))
        if image.get("enable_random_flip"):
            draft.set("data.flip", True)
        draft.absent += [(f"{key}.{part}.{name}", value, "no counterpart") for part, table in (("image", image),
                                                                                               ("text", text))
                         for name, value in table.items()
                         if name.startswith("enable_") and value is True
                         and name not in ("enable_random_flip", "enable_crop_jitter")]
    if not folders:
        draft.missing.append("data.path: the concepts are in another file of OneTrainer (concept_file_name); name the "
                             "folder of the pictures.")
    return folders


def often(draft: Draft, given: dict):
    for key, unit, setting in (("save_every", "save_every_unit", "save_every"),
                               ("sample_after", "sample_after_unit", "samples.every")):
        if key in given:
            common.every(draft, key, setting, given.pop(key), given.pop(unit, "NEVER"), "")


def samples(draft: Draft, raw: dict, read_beside):
    listed = raw.get("samples") or read_beside(raw.get("sample_definition_file_name")) or []
    on = [one for one in listed if isinstance(one, dict) and one.get("enabled", True)]
    common.prompts(draft, [one.get("prompt", "") for one in on])
    if on:
        for theirs, setting, value in (("height", "height", whole), ("width", "width", whole), ("seed", "seed", whole),
                                       ("diffusion_steps", "steps", whole), ("cfg_scale", "cfg", number)):
            if theirs in on[0]:
                draft.set(f"samples.{setting}", value(on[0][theirs]))
        draft.absent += [(f"samples[{i}].negative_prompt", one["negative_prompt"], "samples are drawn without")
                         for i, one in enumerate(on) if one.get("negative_prompt")]
