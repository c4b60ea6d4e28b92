"""ai-toolkit's job, a YAML or JSON with config.process. (config/examples and toolkit/config_modules.py of
ostris/ai-toolkit)"""
from __future__ import annotations

from . import common, families, often, prompts, sets
from .rows import Draft, Row, none, number, on, positive, said, to, whole, yes

NAME = "ai-toolkit"
ARCHS = {"flux": families.FLUX, "pixart": families.PIXART_ALPHA, "pixart_sigma": families.PIXART_SIGMA,
         "pixart-sigma": families.PIXART_SIGMA}
DEFAULTS = {"network.linear": 4, "network.linear_alpha": 1.0, "train.batch_size": 1, "train.steps": 1000,
            "train.lr": 1e-6, "train.optimizer": "adamw", "train.lr_scheduler": "constant", "train.max_grad_norm": 1.0}
SILENT = ("type", "training_folder", "device", "performance_log_every", "save.push_to_hub", "save.hf_", "network.type",
          "model.name_or_path", "model.is_", "model.arch", "train.noise_scheduler", "sample.sampler",
          "train.train_unet", "sqlite_db_path", "model.low_vram", "sample.sample_start_step",
          "train.force_first_sample", "save.save_format", "logging.", "datasets")
SILENT_ENDS = ()
ROWS: dict[str, Row] = {
    "network.linear": to("adapter.rank", "recipe.rank", value=whole),
    "network.linear_alpha": to("adapter.alpha", "recipe.alpha", value=number),
    "network.dropout": to("adapter.dropout", value=number),
    "network.lokr_factor": to("adapter.factor", value=whole),
    "network.pretrained_lora_path": to("adapter.start"),
    "network.conv": none("convolutions get no adapter here"), "network.conv_alpha": none("convolutions get no adapter"),
    "network.lokr_full_rank": none("adapter.rank as large as the layer's side is that"),
    "train.lr": to("optimizer.learning_rate", value=number),
    "train.max_grad_norm": to("optimizer.clip", value=number),
    "train.steps": to("steps", value=whole),
    "train.gradient_checkpointing": to("checkpoint_activations", value=yes),
    "train.optimizer_params.weight_decay": to("optimizer.weight_decay", value=number),
    "train.optimizer_params.eps": to("optimizer.eps", value=number),
    "train.optimizer_params.betas": to("optimizer.betas", value=lambda v: [number(one) for one in v]),
    "train.optimizer_params.d_coef": to("optimizer.arguments.d_coef", value=number),
    "train.lr_scheduler_params.warmup_steps": to("optimizer.warm_up", value=whole),
    "train.seed": to("seed", value=whole),
    "train.min_snr_gamma": to("loss.snr_gamma", value=positive),
    "train.snr_gamma": none("loss.snr_gamma is Min-SNR, and this gamma / SNR without an end"),
    "train.noise_offset": to("noise.offset", value=positive),
    "train.dynamic_noise_offset": none("offset noise is as strong for every picture"),
    "train.noise_multiplier": none(usual=(1, 1.0)), "train.random_noise_multiplier": none(),
    "train.content_or_style": none("noise.mean, or noise.quarters, draws more or less noise", usual=("balanced",)),
    "train.prompt_dropout_prob": to("recipe.dropout", value=number),
    "train.train_text_encoder": none("text encoders of these families stay as they are"),
    "train.linear_timesteps": none(),
    "train.cache_text_embeddings": none(usual=(True,)),
    "train.unload_text_encoder": none(usual=(True,)),
    "model.quantize": to("memory.base", value=lambda v: "fp8" if yes(v) else None,
                         changed="the blocks that stay as they are, in 8 bits a weight."),
    "model.quantize_te": to("text.precision", value=lambda v: "fp8" if yes(v) else None),
    "model.assistant_lora_path": none("a distilled FLUX is trained on as it is"),
    "model.vae_path": to("vae.path"),
    "save.save_every": to("save_every", value=whole),
    "save.max_step_saves_to_keep": to("keep", value=whole),
    "save.dtype": none("`python -m trainer export --dtype`"),
    "logging.use_wandb": to("log.wandb", value=lambda v: "online" if yes(v) else None),
}


SET: dict[str, Row] = {  # of a data set
    "flip_x": to("data.sets.flip", value=on),
    "flip_y": none("pictures are mirrored from left to right"),
    "random_crop": to("data.sets.crop", value=lambda v: "random" if yes(v) else None),
    "random_scale": none(), "scale": none(usual=(1, 1.0)),
    "shuffle_tokens": to("data.sets.shuffle_tags", value=on),
    "keep_tokens": to("data.sets.keep_tags", value=lambda v: whole(v) or None),
    "token_dropout_rate": to("data.sets.tag_dropout", value=positive),
    "loss_multiplier": to("data.sets.loss_weight", value=sets.loss_weight),
    "invert_mask": none("white is where the loss counts"),
    "caption_ext": none("captions are .txt, .caption or .json files", usual=("txt", ".txt", "caption", ".caption")),
    "network_weight": none(usual=(1, 1.0)), "control_path": none("see the recipes of ControlNets"),
    "random_triggers": none("data.templates are frames of captions"), "replacements": none(), "poi": none(),
    "prior_reg": none("regularisation pictures are learned themselves"), "augments": none("data.brightness and others"),
}
AUGMENTATIONS = {  # of albumentations -> (argument, our setting, theirs when silent, theirs over ours)
    "ColorJitter": (("brightness", "brightness", 0.2, 1), ("contrast", "contrast", 0.2, 1),
                    ("saturation", "saturation", 0.2, 1), ("hue", "hue", 0.2, 1)),
    "RandomBrightnessContrast": (("brightness_limit", "brightness", 0.2, 1), ("contrast_limit", "contrast", 0.2, 1)),
    "HueSaturationValue": (("hue_shift_limit", "hue", 20, 180), ("sat_shift_limit", "saturation", 30, 255),
                           ("val_shift_limit", "brightness", 20, 255)),
    "Rotate": (("limit", "rotation", 90, 1),),
}
SAMPLES = {"width": 512, "height": 512, "sample_steps": 20, "guidance_scale": 7, "seed": 0, "walk_seed": False}
"""What its samples mean by silence."""
HUBER = 0.01
OPTIONS = {**prompts.OPTIONS, "m": "strength", "seed": "seed", "cfg": "cfg", "steps": "steps",
           "network_multiplier": "strength"}


def recognises(raw) -> bool:
    config = raw.get("config") if isinstance(raw, dict) else None
    return isinstance(config, dict) and isinstance(config.get("process"), list)


def process(raw: dict) -> dict:
    first = next((one for one in raw["config"]["process"] if isinstance(one, dict)), None)
    if first is None:
        raise ValueError("config.process holds no process.")
    return first


def trained(raw: dict) -> families.Trained:
    one = process(raw)
    model = one.get("model") if isinstance(one.get("model"), dict) else {}
    base, arch = str(model.get("name_or_path") or ""), str(model.get("arch") or "").lower()
    flags = [name.removeprefix("is_") for name, value in model.items() if str(name).startswith("is_") and value is True]
    arch = arch or next((flag for flag in flags if flag in ARCHS), "")
    if arch == "pixart" and "sigma" in base.lower():
        arch = "pixart_sigma"
    if arch not in ARCHS:
        raise ValueError(f"model.arch = {arch or ', '.join(flags) or 'nothing'}: this trainer has {', '.join(ARCHS)}.")
    return families.Trained(ARCHS[arch], families.LORA if isinstance(one.get("network"), dict) else families.FULL, base)


def own(draft: Draft, given: dict, raw: dict, read_beside):
    """What needs more than a row."""
    one = process(raw)
    if name := raw["config"].get("name"):
        draft.set("name", str(name))
    common.optimizer(draft, "train.optimizer", given.pop("train.optimizer"))
    common.decay(draft, "train.lr_scheduler", given.pop("train.lr_scheduler"))
    common.precision(draft, "train.dtype", given.pop("train.dtype", "bf16"))
    rounds = given.pop("train.gradient_accumulation_steps", None) or given.pop("train.gradient_accumulation", None)
    given.pop("train.gradient_accumulation", None)
    common.batch(draft, given.pop("train.batch_size"), rounds)
    common.ema(draft, yes(given.pop("train.ema_config.use_ema", False)), given.pop("train.ema_config.ema_decay", None))
    if isinstance(one.get("network"), dict):
        draft.apply("network.type", one["network"].get("type", "lora"), common.kinds(draft, "network.type"))
    for key in [key for key in given if key.startswith("network.network_kwargs.")]:
        draft.absent.append((key, given.pop(key), "the layers have other names here: name them in adapter.targets or "
                                                  "[[adapter.layers]]"))
    word = given.pop("trigger_word", None)
    objective(draft, given)
    common.sizes(draft, "resolution", resolutions(one))
    weight = given.pop("train.reg_weight", 1)
    folders = sets.data(draft, [folder(draft, f"datasets[{i}]", said(each), word, weight)
                                for i, each in enumerate(one.get("datasets") or []) if isinstance(each, dict)])
    if not folders:
        draft.missing.append("data.path: name the folder of the pictures.")
    often.sample(draft, "sample.sample_every", given.pop("sample.sample_every", 0), "STEP", folders)
    samples(draft, given, word)
    if word:
        draft.changed.append(f"trigger_word = {word!r}: it is in the sample prompts; write it into the captions, which "
                             "are read as they are.")


def objective(draft: Draft, given: dict):
    """Errors and noise levels. (extensions_built_in/sd_trainer/SDTrainer.py, jobs/process/BaseSDTrainProcess.py)"""
    kind = str(given.pop("train.loss_type", "mse"))
    if kind == "pseudo_huber":
        common.error(draft, "train.loss_type", kind, kind, delta=HUBER, changed=f"{2 * HUBER:g} times as large as "
                                                                               "there.")
    elif kind == "mae":
        common.error(draft, "train.loss_type", kind, kind)
    elif kind != "mse":
        draft.absent.append(("train.loss_type", kind, "no counterpart"))
    way = str(given.pop("train.timestep_type", "sigmoid"))
    if yes(given.get("train.linear_timesteps", False)):
        way = "linear"
    if draft.recipe.startswith("flux"):
        common.timesteps(draft, "train.timestep_type", way, {"sigmoid": "logit_normal", "linear": "uniform"}.get(way))
    low, high = "train.min_denoising_steps", "train.max_denoising_steps"  # whose first has the most noise
    first, last = number(given.pop(low, 0)), number(given.pop(high, 1000))
    common.between(draft, (high, last, 0 if last >= 999 else 1000 - last), (low, first, 1000 - first), squeezed=True)


def resolutions(one: dict) -> list[int]:
    found = []
    for each in one.get("datasets") or []:
        found += common.squared(each.get("resolution", 512)) if isinstance(each, dict) else []
    return found or [512]


def folder(draft: Draft, key: str, each: dict, word, prior_weight) -> sets.Folder:
    caption = str(each.get("default_caption") or "").replace("[trigger]", word or "[trigger]")
    found = sets.Folder(str(each.get("folder_path") or each.get("dataset_path") or ""), key,
                        number(each.get("num_repeats", 1)), yes(each.get("is_reg", False)))
    if caption:
        found.own["caption"] = caption
    if "caption_dropout_rate" in each:
        found.dropout = number(each["caption_dropout_rate"])
    for name, row in SET.items():
        if name in each:
            draft.apply(f"{key}.{name}", each[name], row, into=found.own)
    alpha, masks = yes(each.get("alpha_mask", False)), each.get("mask_path")
    if alpha:
        sets.masked(draft, f"{key}.alpha_mask", True, "alpha")
    if masks:
        sets.masked_by(draft, found, f"{key}.mask_path", str(masks))
    if alpha or masks:
        draft.apply(f"{key}.mask_min_value", each.get("mask_min_value", 0), to("loss.unmasked", value=positive))
    if found.prior:
        draft.apply("train.reg_weight", prior_weight, SET["loss_multiplier"], into=found.own)
    for one in each.get("augmentations") or []:
        augmented(draft, found, one)
    return found


def augmented(draft: Draft, found: sets.Folder, one):
    """One of albumentations' changes, with its arguments."""
    method = str(one.get("method")) if isinstance(one, dict) else str(one)
    given = {key: value for key, value in one.items() if key != "method"} if isinstance(one, dict) else {}
    if method == "HorizontalFlip":
        found.own["flip"] = True
        return
    rows, share = AUGMENTATIONS.get(method), number(given.pop("p", 1 if method == "ColorJitter" else 0.5))
    key = f"{found.key}.augmentations {method}"
    if rows is None or any(isinstance(value, (list, dict)) for value in given.values()):
        draft.absent.append((key, given, "brightness, contrast, saturation, hue and rotation change, each by at most "
                                         "as much to both sides"))
        return
    turned = method == "Rotate"
    for name, ours, usual, most in rows:
        if value := number(given.get(name, usual)) / most:
            found.own[ours] = value if turned else min(value, 0.5 if ours == "hue" else 1.0)
    found.own["rotation_share" if turned else "colour_share"] = share


def samples(draft: Draft, given: dict, word):
    """Its prompts, which may have options, or its samples with settings of their own."""
    around = {key: given.pop(f"sample.{key}", value) for key, value in SAMPLES.items()}
    negative, strength = given.pop("sample.neg", None), given.pop("sample.network_multiplier", None)
    listed = given.pop("sample.samples", None) or [{"prompt": text} for text in given.pop("sample.prompts", None) or []]
    names = {"width": "width", "height": "height", "neg": "negative", "seed": "seed", "guidance_scale": "cfg",
             "sample_steps": "steps", "network_multiplier": "strength"}
    rows = []
    for place, each in enumerate(each for each in listed if isinstance(each, dict)):
        row = {"width": around["width"], "height": around["height"], "steps": around["sample_steps"],
               "cfg": around["guidance_scale"], "negative": negative or None, "strength": strength,
               "seed": whole(around["seed"]) + place * yes(around["walk_seed"])}
        row |= {ours: each[theirs] for theirs, ours in names.items() if each.get(theirs) not in (None, False)}
        rows.append({**row, **prompts.line(str(each.get("prompt") or "").replace("[trigger]", word or "[trigger]"),
                                           OPTIONS)})
    prompts.take(draft, rows)
    if yes(given.pop("train.skip_first_sample", False)):
        draft.set("samples.baseline", False)
    if yes(given.pop("train.disable_sampling", False)):
        draft.set("samples.every", 0)
