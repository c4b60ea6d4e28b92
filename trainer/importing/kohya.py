"""kohya's sd-scripts: a TOML of arguments, and the TOML of data sets that it names or that is given beside it.
(library/train_util.py, flux_train_network.py, config_util.py of kohya-ss/sd-scripts)"""
from __future__ import annotations

import re
from pathlib import Path

from . import common, families, often, prompts, sets
from .rows import Draft, Row, chosen, is_off, none, number, on, positive, share, to, whole, yes

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
    "full_bf16": to("memory.weights", value=lambda v: "bf16" if yes(v) else None,
                    changed="norms and biases stay in float32, and updates are rounded at random."),
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
    "noise_offset": to("noise.offset", value=positive),
    "noise_offset_type": none(usual=("Original", "Multires")),
    "noise_offset_random_strength": none("offset noise is as strong at every step"),
    "adaptive_noise_scale": none("offset noise is as strong for every picture"),
    "ip_noise_gamma": to("noise.perturbation", value=positive),
    "ip_noise_gamma_random_strength": none("input perturbation is as strong at every step"),
    "min_snr_gamma": to("loss.snr_gamma", value=positive),
    "debiased_estimation_loss": to("loss.debiased", value=on, changed="the SNR is not cut off at 1000; for v and flows "
                                                                      "the weight is what corresponds to eps's."),
    "scale_v_pred_loss_like_noise_pred": none("loss.debiased and loss.snr_gamma are weights of the noise level"),
    "v_pred_like_loss": none("loss.debiased and loss.snr_gamma are weights of the noise level"),
    "zero_terminal_snr": to("model.zero_terminal_snr", value=on),
    "v_parameterization": to("model.prediction", value=lambda v: "v" if yes(v) else None),
    "masked_loss": to("data.masks", value=lambda v: None),  # which masks there are, its data sets say
    "guidance_scale": to("recipe.guidance", value=number),
    "model_prediction_type": none(usual=("raw",)),
    "save_every_n_steps": to("save_every", value=whole),
    "save_last_n_steps": none("keep is a number of checkpoints"),
    "sample_every_n_steps": to("samples.every", value=whole),
    "save_last_n_epochs": none("keep is a number of checkpoints"),
    "bucket_reso_steps": to("data.bucket_multiple", value=whole),
    "min_bucket_reso": none("buckets have about the area of data.resolution"),
    "max_bucket_reso": none("buckets have about the area of data.resolution"),
    "bucket_no_upscale": none("pictures are brought to the size of their bucket"),
    "cache_latents": none("`python -m trainer cache` keeps features", usual=(True,)),
    "cache_latents_to_disk": none("`python -m trainer cache` keeps features", usual=(True,)),
    "text_encoder_lr": none("text encoders of these families stay as they are"),
    "log_with": to("log.wandb", value=chosen({"wandb": "online", "all": "online", "tensorboard": None})),
    "wandb_run_name": none("a run has its name"),
}
SET: dict[str, Row] = {  # of a data set, or of all
    "class_tokens": to("data.sets.caption", value=lambda v: str(v) or None),
    "flip_aug": to("data.sets.flip", value=on),
    "color_aug": to("data.sets.hue", value=lambda v: round(HUE, 4) if yes(v) else None,
                    changed="in a sixth of the pictures, whose gamma stays."),
    "random_crop": to("data.sets.crop", value=lambda v: "random" if yes(v) else None),
    "shuffle_caption": to("data.sets.shuffle_tags", value=on),
    "keep_tokens": to("data.sets.keep_tags", value=lambda v: whole(v) or None),
    "caption_tag_dropout_rate": to("data.sets.tag_dropout", value=positive),
    "enable_wildcard": to("data.sets.wildcards", value=on),
    "caption_extension": none("captions are .txt, .caption or .json files", usual=(".txt", ".caption")),
    "caption_separator": none("parts of a caption stand between commas", usual=(",", ", ")),
    "keep_tokens_separator": none("keep_tags is a number"),
    "secondary_separator": none("parts of a caption stand between commas"),
    "caption_dropout_every_n_epochs": none("recipe.dropout is a share of the captions"),
    "token_warmup_min": none(usual=(1,)), "token_warmup_step": none(), "face_crop_aug_range": none(),
    "cache_info": none(usual=(True, False)), "custom_attributes": none(),
}
HUE = 8 / 180  # library/train_util.py, AugHelper: of OpenCV's 180
HUE_SHARE = 0.33 / 2
NAMED = ("image_dir", "metadata_file", "num_repeats", "is_reg", "caption_dropout_rate", "caption_prefix",
         "caption_suffix", "conditioning_data_dir", "alpha_mask")
"""Settings of a data set too, beside what SET has."""
RUN = ("batch_size", "resolution", "enable_bucket", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso",
       "bucket_no_upscale", "network_multiplier")
"""Settings of a data set there, and of the run here."""
UNREAD = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
          "multires_noise_discount", "min_snr_gamma", "debiased_estimation_loss", "min_timestep", "max_timestep",
          "zero_terminal_snr", "v_parameterization", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")
"""What flux_train_network.py does not read."""
SAMPLES = {"width": 512, "height": 512, "steps": 30, "cfg": 7.5}
FLUX_SAMPLES = {**SAMPLES, "steps": 20, "cfg": 3.5}
"""What a prompt means by silence."""
OWN = ("learning_rate", "network_module", "pretrained_model_name_or_path", "max_train_steps", "max_train_epochs",
       "network_dim", "train_batch_size", "optimizer_type", "lr_scheduler")


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
    objective(draft, given)
    folders, run = datasets(draft, given, raw if is_datasets(raw) else read_beside(given.get("dataset_config")) or {})
    size = given.pop("train_batch_size")
    common.batch(draft, run.pop("batch_size", size), given.pop("gradient_accumulation_steps"))
    resolution(draft, run.pop("resolutions"), yes(run.pop("enable_bucket", False)))
    for key in ("resolution", "enable_bucket"):
        given.pop(key, None)
    for key, value in run.items():
        given.setdefault(key, value)
    common.early(draft, "fused_backward_pass", given, "max_grad_norm")
    folders = sets.data(draft, folders)
    if "max_train_epochs" in given:
        often.epochs(draft, "max_train_epochs", given.pop("max_train_epochs"), folders)
        given.pop("max_train_steps", None)
    elif "max_train_steps" not in given:
        given["max_train_steps"] = 1600  # its default
    often.save(draft, "save_every_n_epochs", given.pop("save_every_n_epochs", 0), "EPOCH", folders)
    often.sample(draft, "sample_every_n_epochs", given.pop("sample_every_n_epochs", 0), "EPOCH", folders)
    if sampled(draft, given.pop("sample_prompts", None), read_beside):
        draft.set("samples.baseline", yes(given.pop("sample_at_first", False)))


def resolution(draft: Draft, given: list, buckets: bool):
    """Each one number, or width and height: the side of a square of about that area."""
    sides = []
    for one in given:
        side = common.squared(one)
        if len(set(side)) > 1:
            draft.changed.append(f"resolution = {one!r}: the side of a square of about the area.")
            side = [round((side[0] * side[1]) ** 0.5 / 64) * 64]
        sides += side[:1]
    common.sizes(draft, "resolution", sides, buckets)


def objective(draft: Draft, given: dict):
    """Noise, noise levels and errors."""
    flux = draft.recipe.startswith("flux")
    for key in UNREAD if flux else ():
        if given.get(key):
            draft.absent.append((key, given[key], "sd-scripts do not read it with FLUX, and it is left out"))
        given.pop(key, None)
    if flux:
        levels(draft, given)
    low, high = number(given.pop("min_timestep", 0)), number(given.pop("max_timestep", 1000))
    common.between(draft, ("min_timestep", low, low), ("max_timestep", high, high))
    rounds, discount = whole(given.pop("multires_noise_iterations", 0) or 0), given.pop("multires_noise_discount", 0.3)
    if rounds:
        draft.apply("multires_noise_discount", discount, to("noise.pyramid", value=share, changed=(
            f"6 iterations, not {rounds}; " if rounds != 6 else "") + "brought to a deviation of 1 by each picture."))
    errors(draft, given)


def errors(draft: Draft, given: dict):
    kind, delta = str(given.pop("loss_type", "l2")), number(given.pop("huber_c", 0.1))
    schedule, scale = str(given.pop("huber_schedule", "snr")), given.pop("huber_scale", 1)
    if kind == "l1":
        common.error(draft, "loss_type", kind, "mae")
    elif kind in ("huber", "smooth_l1"):
        common.error(draft, "loss_type", kind, "pseudo_huber", delta=delta, schedule=schedule, changed=(
            "that has another name here." if kind == "huber" else f"{delta:g} times as large as there."))
        if number(scale) != 1:
            draft.absent.append(("huber_scale", scale, "loss.huber_delta is the number of its schedule"))
    elif kind != "l2":
        draft.absent.append(("loss_type", kind, "no counterpart"))


def levels(draft: Draft, given: dict):
    """FLUX's noise levels. (get_noisy_model_input_and_timesteps in library/flux_train_utils.py)"""
    way = str(given.pop("timestep_sampling", "sigma"))
    scheme = str(given.pop("weighting_scheme", "none"))
    mean, deviation = number(given.pop("logit_mean", 0)), number(given.pop("logit_std", 1))
    scale, shift = number(given.pop("sigmoid_scale", 1)), number(given.pop("discrete_flow_shift", 3))
    given.pop("mode_scale", None)
    if way == "sigma":  # whose schedule goes down, so that its draws are of 1 - t
        kind = {"none": "uniform", "sigma_sqrt": "uniform", "cosmap": "uniform", "logit_normal": "logit_normal"}
        common.timesteps(draft, "weighting_scheme", scheme, kind.get(scheme), -mean, deviation)
        if scheme in ("sigma_sqrt", "cosmap"):
            draft.absent.append(("weighting_scheme", scheme, "noise levels are drawn alike, and have no such weight"))
    else:
        kind = {"uniform": "uniform", "sigmoid": "logit_normal", "shift": "logit_normal"}
        common.timesteps(draft, "timestep_sampling", way, kind.get(way), 0, scale)
    if way in ("sigma", "shift"):
        draft.apply("discrete_flow_shift", shift, to("noise.shift", usual=(1,)))


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


def datasets(draft: Draft, given: dict, tables: dict) -> tuple[list[sets.Folder], dict]:
    """(its data sets, what they say that is of the run here)."""
    arguments_ = {key: given.pop(key) for key in (*SET, *NAMED) if key in given}
    general = dict(tables.get("general") or {})
    run, folders, sizes = {key: given[key] for key in RUN if key in given}, [], []
    weight = given.pop("prior_loss_weight", 1)
    unknown(draft, "general", general)
    for i, one in enumerate(one for one in tables.get("datasets") or [] if isinstance(one, dict)):
        subsets, own_ = one.get("subsets") or [], {key: value for key, value in one.items() if key != "subsets"}
        around = {**arguments_, **general, **own_}
        unknown(draft, f"datasets[{i}]", own_)
        run |= {key: value for key, value in around.items() if key in RUN}
        sizes += [around.get("resolution") or given.get("resolution") or 512] * bool(subsets)
        for j, subset in enumerate(subsets):
            key = f"datasets[{i}].subsets[{j}]"
            unknown(draft, key, subset)
            folders.append(folder(draft, key, {**around, **subset}, weight))
    for key, prior in (("train_data_dir", False), ("reg_data_dir", True)):
        if path := given.pop(key, None):
            metadata = given.pop("in_json", None) if not prior else None
            folders += in_folder(draft, key, str(path), {**arguments_, "metadata_file": metadata, "is_reg": prior},
                                 weight)
    run.pop("resolution", None)
    return folders or [folder(draft, "arguments", arguments_, weight)], {
        **run, "resolutions": sizes or [given.get("resolution") or 512]}


def unknown(draft: Draft, key: str, table: dict):
    draft.absent += [(f"{key}.{name}", value, "no counterpart") for name, value in table.items()
                     if name not in (*SET, *NAMED, *RUN) and not is_off(value)]


def folder(draft: Draft, key: str, said: dict, prior_weight) -> sets.Folder:
    """A data set, of all that is said of it and around it."""
    metadata, place = str(said.get("metadata_file") or ""), str(said.get("image_dir") or "")
    one = sets.Folder(metadata or place, key, number(said.get("num_repeats", 1)), yes(said.get("is_reg", False)),
                      counted=place)
    if metadata:
        one.own["kind"] = "data_info"
    if "caption_dropout_rate" in said:
        one.dropout = number(said["caption_dropout_rate"])
    for name, row in SET.items():
        if name in said:
            draft.apply(f"{key}.{name}", said[name], row, into=one.own)
    if "hue" in one.own:
        one.own["colour_share"] = HUE_SHARE
    sets.framed(one, str(said.get("caption_prefix") or ""), str(said.get("caption_suffix") or ""))
    if yes(said.get("alpha_mask", False)):
        sets.masked(draft, f"{key}.alpha_mask", True, "alpha")
    if masks := said.get("conditioning_data_dir"):
        sets.masked_by(draft, one, f"{key}.conditioning_data_dir", str(masks))
    if one.prior:
        draft.apply("prior_loss_weight", prior_weight, to("data.sets.loss_weight", value=sets.loss_weight),
                    into=one.own)
    return one


def in_folder(draft: Draft, key: str, path: str, said: dict, prior_weight) -> list[sets.Folder]:
    """The data sets of a folder whose folders are called REPEATS_NAME."""
    inside = sorted(Path(path).expanduser().glob("*_*")) if not said["metadata_file"] else []
    named = [(re.fullmatch(r"(\d+)_(.+)", one.name), one) for one in inside if one.is_dir()]
    found = [folder(draft, f"{key}/{one.name}", {**said, "image_dir": f"{path}/{one.name}", "class_tokens": match[2],
                                                 "num_repeats": match[1]}, prior_weight)
             for match, one in named if match]
    if found:
        return found
    if not said["metadata_file"]:
        draft.changed.append(f"{key} = {path!r}: there are no folders REPEATS_NAME, and it is read as a plain folder, "
                             "each picture once; captions are files beside the pictures.")
    return [folder(draft, key, {**said, "image_dir": path}, prior_weight)]


def sampled(draft: Draft, file, read_beside) -> bool:
    """Its file of prompts: one a line, with options such as --w 1024; or the same as JSON or TOML."""
    if not file:
        return False
    content = read_beside(file)
    flux = draft.recipe.startswith("flux")
    options = {**prompts.OPTIONS, **({"g": "cfg", "l": ""} if flux else {})}
    if isinstance(content, str):
        rows = [prompts.line(text, options) for text in content.splitlines()
                if text.strip() and not text.startswith("#")]
    elif isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        around = {key: value for key, value in content["prompt"].items() if key != "subset"}
        rows = [renamed({**around, **one}, flux) for one in content["prompt"].get("subset") or [{}]]
    elif isinstance(content, list):
        rows = [renamed(one, flux) for one in content]
    else:
        draft.missing.append(f"samples.prompts: they are in {file!r}, which is not here.")
        return False
    prompts.take(draft, [{**(FLUX_SAMPLES if flux else SAMPLES), **row} for row in rows])
    return True


def renamed(one: dict, flux: bool) -> dict:
    names = {"prompt": "prompt", "negative_prompt": "negative", "width": "width", "height": "height", "seed": "seed",
             "sample_steps": "steps", "guidance_scale" if flux else "scale": "cfg"}
    return {ours: one[theirs] for theirs, ours in names.items() if theirs in one}
