"""ai-toolkit's job, a YAML or JSON with config.process. (config/examples and toolkit/config_modules.py of
ostris/ai-toolkit)"""
from __future__ import annotations

from . import common, families
from .rows import Draft, Row, chosen, none, number, to, whole, yes

NAME = "ai-toolkit"
ARCHS = {"flux": families.FLUX, "pixart": families.PIXART_ALPHA, "pixart_sigma": families.PIXART_SIGMA,
         "pixart-sigma": families.PIXART_SIGMA}
DEFAULTS = {"network.linear": 4, "network.linear_alpha": 1.0, "train.batch_size": 1, "train.steps": 1000,
            "train.lr": 1e-6, "train.optimizer": "adamw", "train.lr_scheduler": "constant", "train.max_grad_norm": 1.0}
SILENT = ("type", "training_folder", "device", "performance_log_every", "save.push_to_hub", "save.hf_", "network.type",
          "model.name_or_path", "model.is_", "model.arch", "train.noise_scheduler", "sample.sampler",
          "train.train_unet",
          "train.skip_first_sample", "train.disable_sampling", "sample.neg", "sqlite_db_path", "model.low_vram",
          "sample.sample_start_step", "train.force_first_sample", "save.save_format", "logging.", "datasets")
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
    "train.min_snr_gamma": to("recipe.snr_gamma", value=number),
    "train.noise_offset": to("recipe.offset_noise", value=number),
    "train.loss_type": none(usual=("mse",)),
    "train.timestep_type": none(usual=("sigmoid",)),
    "train.content_or_style": none(usual=("balanced",)),
    "train.train_text_encoder": none("text encoders of these families stay as they are"),
    "train.linear_timesteps": none(),
    "train.cache_text_embeddings": none(usual=(True,)),
    "train.unload_text_encoder": none(usual=(True,)),
    "model.quantize": to("memory.base", value=lambda v: "fp8" if yes(v) else None,
                         changed="the blocks that stay as they are, in 8 bits a weight."),
    "model.quantize_te": none("text.precision has bf16"),
    "model.assistant_lora_path": none("a distilled FLUX is trained on as it is"),
    "model.vae_path": to("vae.path"),
    "save.save_every": to("save_every", value=whole),
    "save.max_step_saves_to_keep": to("keep", value=whole),
    "save.dtype": none("`python -m trainer export --dtype`"),
    "sample.sample_every": to("samples.every", value=whole),
    "sample.width": to("samples.width", value=whole),
    "sample.height": to("samples.height", value=whole),
    "sample.seed": to("samples.seed", value=whole),
    "sample.walk_seed": none("each sample has the next seed", usual=(True,)),
    "sample.guidance_scale": to("samples.cfg", value=number),
    "sample.sample_steps": to("samples.steps", value=whole),
    "logging.use_wandb": to("log.wandb", value=lambda v: "online" if yes(v) else None),
}


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
    common.data(draft, datasets(draft, one, word))
    prompts = given.pop("sample.prompts", None) or [s.get("prompt", "") for s in given.pop("sample.samples", None) or []
                                                    if isinstance(s, dict)]
    common.prompts(draft, [str(prompt).replace("[trigger]", word or "[trigger]") for prompt in prompts])
    if word:
        draft.changed.append(f"trigger_word = {word!r}: it is in the sample prompts; write it into the captions, which "
                             "are read as they are.")
    if neg := (one.get("sample") or {}).get("neg"):
        draft.absent.append(("sample.neg", neg, "samples are drawn without"))


def datasets(draft: Draft, one: dict, word) -> list[common.Folder]:
    folders, sizes = [], []
    for i, each in enumerate(one.get("datasets") or []):
        if not isinstance(each, dict):
            continue
        key = f"datasets[{i}]"
        caption = str(each.get("default_caption") or "").replace("[trigger]", word or "[trigger]")
        folders.append(common.Folder(str(each.get("folder_path") or ""), key, caption, each.get("num_repeats", 1),
                                     bool(each.get("is_reg"))))
        sizes = sizes or common.squared(each.get("resolution", 512))
        for name, row in {
            "caption_dropout_rate": to("recipe.dropout", value=number), "flip_x": to("data.flip", value=yes),
            "caption_ext": none("captions are .txt, .caption or .json files", usual=("txt", ".txt", "caption")),
            "shuffle_tokens": none("captions are read as they are"), "mask_path": none("pictures have no masks"),
            "network_weight": none(usual=(1, 1.0)), "random_crop": to("data.crop", value=chosen({"true": "random"})),
            "random_scale": none(), "control_path": none("see the recipes of ControlNets"),
        }.items():
            if name in each:
                draft.apply(f"{key}.{name}", each[name], row)
    common.sizes(draft, "resolution", sizes or [512])
    if not folders:
        draft.missing.append("data.path: name the folder of the pictures.")
    return folders
