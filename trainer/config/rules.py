"""What settings may be, as far as that shows without looking into a file: nothing heavy is imported here."""
from __future__ import annotations

import os
from importlib.util import find_spec
from math import inf

from ...models_impl.pixart.buckets import TABLES
from . import optimizers
from .problems import Problems, nearest
from .schema import LARGEST_SIDE, Adapter, Config, Data, Optimizer, SamplePrompt, Vae, look_up

MOST_WORKERS, MOST_RATIO = 256, 64
ADAPTERS = "lora", "loha", "lokr", "oft"
BASES = "fp8", "int8", "nf4"
MOST_SEED = 2**40  # times a million, and a step: what a generator of torch takes
DDP, FSDP2, DEEPSPEED = "ddp", "fsdp2", "deepspeed"


def problems(config: Config) -> list[str]:
    """Everything that shows without the recipe's own rules (`Settings.problems`)."""
    problems = [*data(config.data, config.batch_size, config.micro_batch_size), *general(config), *numbers(config),
                *text(config)]
    if config.recipe:
        problems += [*sections(config), *samples(config), *memory(config), *learning(config), *distributed(config)]
    return problems


def webhook(word: str) -> list[str]:
    if word.startswith("$") and word[1:] not in os.environ:
        return [f"log.webhook={word!r}: the environment variable {word[1:]} is not set."]
    address = os.environ[word[1:]] if word.startswith("$") else word
    return [] if not address or address.startswith(("https://", "http://")) else [
        f"log.webhook={word!r} must be an address that begins with https:// or http://."]


def general(config: Config) -> list[str]:
    problems = Problems()
    problems += optimizer(config.optimizer)
    problems += missing_library(config.optimizer.name)
    problems.one_of("log.wandb", config.log.wandb, ("", "offline", "online"))
    problems.need(not config.log.wandb or find_spec("wandb"),
                  f"log.wandb={config.log.wandb!r} needs wandb: pip install wandb.")
    problems.need(not config.log.trackio or find_spec("trackio"),
                  "log.trackio=true needs trackio: pip install trackio.")
    problems += webhook(config.log.webhook)
    problems.one_of("optimizer.learning_rate_scaling", config.optimizer.learning_rate_scaling,
                    ("none", "sqrt", "linear"))
    problems.one_of("text.precision", config.text.precision, ("fp32", "bf16", *BASES))
    problems.need(config.text.precision != "nf4" or find_spec("bitsandbytes"),
                  "text.precision='nf4' needs bitsandbytes: pip install bitsandbytes, or use int8.")
    problems.one_of("vae.precision", config.vae.precision, ("fp32", "bf16"))
    problems.one_of("optimizer.decay", config.optimizer.decay,
                    ("constant", "linear", "cosine", "cosine_restarts", "rex"))
    problems.one_of("precision", config.precision, ("bf16", "fp32"))
    problems.one_of("float32_matmul", config.float32_matmul, ("auto", "highest", "high", "medium"))
    problems.one_of("device", config.device, ("auto", "cpu"))
    problems.one_of("resume", config.resume, ("auto", "changed", "never"))
    for name in ("init_from", "text.tokenizer", "text.clip", "vae.path"):
        problems.exists(name, look_up(config, name))
    if config.text.encoder.endswith(".safetensors"):
        problems.exists("text.encoder", config.text.encoder, "file")
    return problems


def optimizer(settings: Optimizer) -> list[str]:
    """Problems with the name and the arguments of the optimizer."""
    problems, name, chosen = Problems(), settings.name, optimizers.kind(settings.name)
    if name in optimizers.REFUSED:
        return [f"optimizer.name={name!r}: {name} {optimizers.REFUSED[name]}."]
    if chosen is None:
        more = optimizers.classes(optimizers.MORE)
        absent = "" if more else ", which is not installed: pip install pytorch-optimizer"
        known = [*optimizers.NAMED, *optimizers.classes(optimizers.TORCH), *more]
        return [f"optimizer.name={name!r} is none of {', '.join(optimizers.NAMED)}, and no class of torch.optim or "
                f"pytorch_optimizer{absent}{nearest(name, known)}."]
    takes = optimizers.arguments(chosen)
    for argument in settings.arguments:
        full = f"optimizer.arguments.{argument}"
        if argument in optimizers.OURS:
            problems.append(f"{full}: that is decided by {optimizers.OURS[argument]}.")
        elif takes and argument not in takes:
            others = takes.keys() - optimizers.OURS.keys()
            problems.append(f"{full} is no argument of {chosen.cls}{nearest(argument, others)}.")
    for argument in ("betas", "eps", "weight_decay"):
        problems.need(not getattr(settings, argument) or not takes or argument in takes,
                      f"optimizer.{argument}={getattr(settings, argument)}: {chosen.cls} has no such argument.")
    betas, count = settings.betas, len(takes.get("betas") or (0, 0))
    problems.need(betas is None or (len(betas) == count and all(0 <= b < 1 for b in betas)),
                  f"optimizer.betas={betas} must be {({2: 'two', 3: 'three'}).get(count, count)} numbers in [0, 1).")
    problems += learning_rate("optimizer.learning_rate", settings.learning_rate, chosen)
    problems += optimizer_groups(settings, chosen)
    problems.need(not chosen.averages or settings.decay == "constant",
                  f"optimizer.decay={settings.decay!r}: {chosen.cls} averages the weights instead of a decay: use "
                  "constant.")
    return problems


def learning_rate(name: str, rate: float, chosen: optimizers.OptimizerKind) -> list[str]:
    problems = Problems()
    if chosen.estimates:
        problems.need(0.1 <= rate <= 10, f"{name}={rate}: {chosen.cls} estimates the learning rate, and this is a "
                                         "factor of it, from 0.1 to 10: 1 as a rule.")
    else:
        problems.need(0 < rate < 1, f"{name}={rate} is outside (0, 1).")
    return problems


def optimizer_groups(settings: Optimizer, chosen: optimizers.OptimizerKind) -> list[str]:
    """Problems with [[optimizer.groups]]."""
    problems, takes = Problems(), optimizers.arguments(chosen)
    problems.patterns("optimizer.groups", settings.groups, "parameters")
    for i, table in enumerate(settings.groups, 1):
        name, rate, decay = f"optimizer.groups.{i}", table.learning_rate, table.weight_decay
        problems.need((rate, table.learning_rate_multiple, decay) != (None, 1.0, None),
                      f"{name} changes nothing: give it learning_rate, learning_rate_multiple or weight_decay.")
        problems.need(rate is None or table.learning_rate_multiple == 1,
                      f"{name} has learning_rate={rate} and learning_rate_multiple={table.learning_rate_multiple}: "
                      "leave one of them out.")
        problems.above_zero(f"{name}.learning_rate_multiple", table.learning_rate_multiple)
        problems.at_least(f"{name}.weight_decay", decay or 0, 0)
        problems.need(not decay or not takes or "weight_decay" in takes,
                      f"{name}.weight_decay={decay}: {chosen.cls} has no such argument.")
        if rate is not None and settings.name == "muon":
            problems.append(f"{name}.learning_rate={rate}: muon has one for matrices and one for the rest. Use "
                            "learning_rate_multiple, which multiplies both.")
        elif rate is not None:
            problems += learning_rate(f"{name}.learning_rate", rate, chosen)
    return problems


def averages(config: Config) -> bool:
    chosen = optimizers.kind(config.optimizer.name)
    return chosen is not None and chosen.averages


def missing_library(name: str) -> list[str]:
    """A problem where the library of an optimizer is not installed."""
    chosen = optimizers.kind(name)
    pip = optimizers.PIP.get(chosen.library) if chosen else None
    if pip is None or find_spec(chosen.library.split(".")[0]):
        return []
    return [f"optimizer.name={name!r} needs {pip}: pip install {pip}, or use adamw."]


def numbers(config: Config) -> list[str]:
    problems = Problems()
    for name in ("steps", "batch_size", "log_every", "samples.steps", "text.max_length",
                 "text.vocabulary", "text.width", "text.depth", "text.heads", "text.hidden",
                 "optimizer.decay_cycles"):
        problems.at_least(name, look_up(config, name), 1)
    for name in ("micro_batch_size", "threads", "keep", "save_every", "save_minutes", "save_epochs", "samples.every",
                 "validation.every", "optimizer.warm_up", "optimizer.weight_decay", "optimizer.clip",
                 "optimizer.eps", "text.learning_rate_multiple", "validation.items", "data.tag_count"):
        problems.at_least(name, look_up(config, name), 0)
    problems.need(abs(config.seed) <= MOST_SEED, f"seed={config.seed} is outside -{MOST_SEED} to {MOST_SEED}.")
    problems.above_zero("samples.shift", config.samples.shift)
    momentum = config.optimizer.muon_momentum
    problems.need(0 <= momentum < 1, f"optimizer.muon_momentum={momentum} is outside [0, 1).")
    problems.share("optimizer.decay_from", config.optimizer.decay_from)
    problems.share("optimizer.decay_to", config.optimizer.decay_to)
    rate = config.optimizer.muon_learning_rate
    problems.need(0 < rate < 1, f"optimizer.muon_learning_rate={rate} is outside (0, 1).")
    problems.need(config.divergence == 0 or 1 < config.divergence < inf,
                  f"divergence={config.divergence} must be above 1, how many times its past the loss may be, or 0.")
    problems.need(0 <= config.ema.decay < 1, f"ema.decay={config.ema.decay} is outside [0, 1).")
    problems.need(not (averages(config) and config.ema.decay),
                  f"ema.decay={config.ema.decay}: optimizer.name={config.optimizer.name!r} averages the weights "
                  "itself, use ema.decay=0.")
    micro = config.micro_batch_size
    problems.need(micro < 1 or config.batch_size % micro == 0,
                  f"batch_size={config.batch_size} is not a multiple of micro_batch_size={micro}.")
    problems.need(not config.samples.every or config.samples.prompts or config.samples.classes,
                  f"samples.every={config.samples.every} draws pictures, and neither samples.prompts nor "
                  "samples.classes says of what.")
    return problems


def samples(config: Config) -> list[str]:
    """Problems with the tables of [[samples.prompts]], by what the recipe can draw."""
    problems, recipe = Problems(), config.recipe
    if config.samples.tables and recipe.hints:
        problems.append("recipe.hints are for samples.prompts without tables: name the picture of each in its table "
                        "(hint).")
    for i, one in config.samples.tables.items():
        problems += sample_prompt(f"samples.prompts.{i}.", one, config)
    return problems


def sample_prompt(name: str, one: SamplePrompt, config: Config) -> list[str]:
    """name: what stands before the settings of the table."""
    problems, recipe, said = Problems(), config.recipe, f"recipe.name={config.recipe.name!r}"
    if config.needs == "classes":
        problems.need(not one.prompt and one.class_index is not None,
                      f"{name}class_index must say which class is drawn, and {name}prompt is not read: this run has "
                      "classes.")
    else:
        problems.need(one.prompt, f"{name}prompt is empty: say what is drawn.")
        problems.need(one.class_index is None,
                      f"{name}class_index={one.class_index}: this run has no classes, use prompt.")
    cfg = config.samples.cfg if one.cfg is None else one.cfg
    problems.need(not one.negative or recipe.guides(config),
                  f"{name}negative={one.negative!r}: {said} draws without a negative prompt here: take it out.")
    problems.need(not one.negative or cfg != 1 or not recipe.guides(config),
                  f"{name}negative={one.negative!r} counts nothing at cfg 1: take it out, or set {name}cfg.")
    problems.need(one.strength == 1 or recipe.has_strength,
                  f"{name}strength={one.strength:g}: {said} trains no adapter here: take it out.")
    problems.need(one.strength in (0, 1) or not config.adapter.dora,
                  f"{name}strength={one.strength:g}: adapter.dora counts whole (1) or not at all (0).")
    hints, files = recipe.hint_names(config), one.hint.split(",") if one.hint else []
    if files and not hints:
        problems.append(f"{name}hint={one.hint!r}: {said} follows no pictures: take it out.")
    elif files:
        problems.need(len(files) == len(hints), f"{name}hint={one.hint!r} names {len(files)} files, and there are "
                                                f"{len(hints)} hints: {', '.join(n or 'a picture' for n in hints)}.")
        for file in files:
            problems.exists(f"{name}hint", file, "file")
    for side in ("height", "width"):
        size = look_up(one, side)
        problems.need(size is None or 1 <= size <= LARGEST_SIDE,
                      f"{name}{side}={size} must be 1 to {LARGEST_SIDE} pixels.")
    problems.need(one.steps is None or one.steps >= 1, f"{name}steps={one.steps} must be at least 1.")
    return problems


def text(config: Config) -> list[str]:
    problems = Problems()
    problems.need(not config.text.clip or config.text.frozen,
                  "text.clip goes with a frozen T5: name its folder, text.encoder.")
    problems.need(config.text.width % max(config.text.heads, 1) == 0 or config.text.encoder != "small",
                  f"text.width={config.text.width} is not a multiple of text.heads={config.text.heads}.")
    return problems


def data(settings: Data, batch_size: int, micro: int) -> list[str]:
    """Problems with [data], but for its data sets (`data_sets.problems`). micro: micro_batch_size."""
    problems = Problems()
    problems.one_of("data.buckets", settings.buckets, ("", "pixart", "ultrapixel", "area"))
    problems.need(1 <= settings.workers <= MOST_WORKERS,
                  f"data.workers={settings.workers} must be 1 to {MOST_WORKERS}: threads that decode pictures.")
    problems.at_least("data.shards_at_once", settings.shards_at_once, 0)
    problems.at_least("data.streams", settings.streams, 1)
    problems.need(settings.streams == 1 or settings.shards_at_once,
                  f"data.streams={settings.streams} are for pictures that are read shard by shard: say of how many "
                  "shards are mixed, data.shards_at_once=16.")
    size = settings.bucket_group or batch_size
    problems.need(settings.streams <= size, f"data.streams={settings.streams} are more than the {size} pictures of one "
                                            "size in a row of a batch.")
    name = "resolutions" if settings.resolutions else "resolution"
    problems.need(1 <= min(settings.sides) <= max(settings.sides) <= LARGEST_SIDE,
                  f"data.{name}={look_up(settings, name)} must be 1 to {LARGEST_SIDE} pixels.")
    return problems + of_buckets(settings, batch_size, micro)


def of_buckets(settings: Data, batch_size: int, micro: int) -> list[str]:
    problems, sides, group = Problems(), settings.sides, settings.bucket_group
    if settings.buckets == "pixart":
        problems.need(set(sides) <= set(TABLES), f"data.buckets='pixart' has tables for {', '.join(map(str, TABLES))}, "
                                                 f"not for data.resolution={', '.join(map(str, sides))}.")
    if settings.buckets == "area":
        problems.need(1 <= settings.bucket_multiple <= min(sides),
                      f"data.bucket_multiple={settings.bucket_multiple} is "
                      f"not in 1 to {min(sides)}, the resolution.")
        problems.need(1 <= settings.bucket_ratio <= MOST_RATIO,
                      f"data.bucket_ratio={settings.bucket_ratio} must be 1 to {MOST_RATIO}.")
    problems.at_least("data.bucket_group", group, 0)
    problems.need(group < 1 or batch_size % group == 0,
                  f"batch_size={batch_size} is not a multiple of data.bucket_group={group}.")
    problems.need(group < 1 or micro < 1 or group % micro == 0,
                  f"data.bucket_group={group} is not a multiple of micro_batch_size={micro}, whose pictures have one "
                  "size.")
    if settings.has_prior:
        group, share = group or batch_size, settings.prior_share
        problems.need(0 < share < 1, f"data.prior_share={share} is outside (0, 1).")
        problems.need(1 <= group * share < group,
                      f"data.prior_share={share} of {group} pictures of one size is no whole prior picture, or "
                      "leaves no other: use a larger batch_size.")
    return problems


def sections(config: Config) -> list[str]:
    """What stands in sections that the recipe does not read."""
    problems, recipe = Problems(), config.recipe
    for section, plain in (("vae", Vae()), ("adapter", Adapter())):
        problems.need(section in recipe.sections or look_up(config, section) == plain,
                      f"[{section}] is not read by recipe.name={recipe.name!r}: take it out.")
    problems.need(not config.text.padded or "text.padded" in recipe.sections,
                  f"text.padded=true is for networks that read captions as FLUX does, and recipe.name={recipe.name!r} "
                  "masks their padding: take it out.")
    return problems


def memory(config: Config) -> list[str]:
    problems, recipe, kind, count = Problems(), config.recipe, config.memory.base, config.memory.swap_blocks
    if kind:
        problems.one_of("memory.base", kind, BASES)
        problems.need(recipe.has_frozen_network,
                      f"memory.base={kind!r}: recipe.name={recipe.name!r} trains all weights here, and those that "
                      "learn cannot be kept in few bits. Take it out"
                      + ("." if recipe.lora is None else ", or train an adapter: recipe.lora=true."))
        problems.need(kind != "nf4" or find_spec("bitsandbytes"),
                      "memory.base='nf4' needs bitsandbytes: pip install bitsandbytes, or use int8.")
    problems.one_of("memory.gather", config.memory.gather, ("fp32", "bf16"))
    if config.memory.gather == "bf16":
        problems.need(config.precision == "bf16", f"memory.gather='bf16' is for precision=bf16, and precision="
                                                  f"{config.precision}: leave it out.")
        problems.need(way(config) == FSDP2, "memory.gather='bf16' says how FSDP2 gathers blocks: it needs "
                                            "memory.shard=true.")
    problems.at_least("memory.swap_blocks", count, 0)
    if count > 0:
        problems.need(recipe.has_frozen_network,
                      f"memory.swap_blocks={count}: recipe.name={recipe.name!r} trains all weights here, and only "
                      "blocks that do not learn are kept in host memory. Take it out.")
        problems.need(config.checkpoint_activations, f"memory.swap_blocks={count} needs checkpoint_activations=true, "
                                                     "which brings a block back for its backward pass.")
        problems.need(not config.compile, f"memory.swap_blocks={count} does not go with compile=true: a compiled block "
                                          "keeps its weights.")
    return problems


def learning(config: Config) -> list[str]:
    """Problems with how memory is saved on what learns."""
    problems, recipe, kind = Problems(), config.recipe, config.memory.weights
    problems.one_of("memory.weights", kind, ("", "bf16"))
    asked = [f"memory.{name}={look_up(config.memory, name)!r}" for name in ("weights", "fused_backward")
             if look_up(config.memory, name)]
    if not asked:
        return problems
    said, chosen = " and ".join(asked), optimizers.kind(config.optimizer.name)
    problems.need(chosen is None or chosen.by_parameter,
                  f"{said}: each parameter learns by itself, and optimizer.name={config.optimizer.name!r} looks at all "
                  "of them together: use adamw, adafactor, came, lion, muon or stable_adamw.")
    problems.need(way(config) == DDP, f"{said} does not go with FSDP2 and DeepSpeed: leave one of them out.")
    problems.need(not kind or config.precision == "bf16",
                  f"memory.weights={kind!r} needs precision='bf16', which lets matrices of bf16 meet other numbers.")
    problems.need(not kind or not recipe.has_strength,
                  f"memory.weights={kind!r} is for networks that learn, and recipe.name={recipe.name!r} trains an "
                  "adapter here, which takes little: take it out.")
    if config.memory.fused_backward:
        name, micro = "memory.fused_backward=true", config.micro_batch_size
        problems.need(config.optimizer.clip == 0,
                      f"{name} cannot limit the norm of all gradients, which are never there together, and "
                      f"optimizer.clip={config.optimizer.clip}: use clip=0; stable_adamw limits each by itself.")
        problems.need(micro in (0, config.batch_size),
                      f"{name} takes one pass a step, and batch_size={config.batch_size} is gathered from passes of "
                      f"micro_batch_size={micro}: make them equal.")
        problems.need(int(os.environ.get("WORLD_SIZE", "1")) == 1,
                      f"{name} is for one process: the gradients of several are joined after the backward pass.")
    return problems


def adapter(settings: Adapter) -> list[str]:
    """Problems with [adapter], where the recipe trains one."""
    problems = Problems()
    problems.at_least("adapter.rank", 1 if settings.rank is None else settings.rank, 1)
    problems.need(settings.alpha >= 0, f"adapter.alpha={settings.alpha} must not be negative; 0 = the rank.")
    problems.need(0 <= settings.dropout < 1, f"adapter.dropout={settings.dropout} is outside [0, 1).")
    problems.exists("adapter.start", settings.start, "file")
    problems += of_layers(settings)
    problems.one_of("adapter.kind", settings.kind, ADAPTERS)
    alphas = [settings.alpha, *(table.alpha for table in settings.layers)]
    problems.need(settings.kind != "oft" or not any(alphas),
                  "adapter.alpha does not count with adapter.kind='oft', which turns a layer's outputs: take it out.")
    own = [name for name in ("dora", "rslora") if look_up(settings, name)]
    problems.need(not own or settings.kind == "lora",
                  f"adapter.{own and own[0]}=true is for adapter.kind='lora', not {settings.kind!r}.")
    problems.need(settings.factor == -1 or (settings.kind == "lokr" and settings.factor >= 1),
                  f"adapter.factor={settings.factor} is a number of rows, at least 1 (or -1), and is for "
                  "adapter.kind='lokr'.")
    problems.need(find_spec("peft"), "a LoRA needs peft: pip install peft.")
    return problems


def of_layers(settings: Adapter) -> list[str]:
    """Problems with [[adapter.layers]] and the dropout."""
    problems = Problems()
    problems.patterns("adapter.layers", settings.layers, "layers")
    for i, table in enumerate(settings.layers, 1):
        name = f"adapter.layers.{i}"
        problems.at_least(f"{name}.rank", table.rank or 0, 0)
        problems.need(table.alpha is None or table.alpha > 0, f"{name}.alpha={table.alpha} must be more than 0.")
        problems.need(0 <= (table.dropout or 0) < 1, f"{name}.dropout={table.dropout} is outside [0, 1).")
    drops = settings.dropout or any(table.dropout for table in settings.layers)
    problems.need(not drops or settings.kind == "lora",
                  f"adapter.dropout is for adapter.kind='lora', not {settings.kind!r}.")
    return problems


# --- Several processes

def asked_for(name: str) -> bool:
    """Whether accelerate's launcher was asked for FSDP, DEEPSPEED or MEGATRON_LM."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


def way(config: Config) -> str:
    """How several processes train together: DDP, FSDP2 or DEEPSPEED."""
    if asked_for("DEEPSPEED"):
        return DEEPSPEED
    return FSDP2 if config.memory.shard or asked_for("FSDP") else DDP


def distributed(config: Config) -> list[str]:
    problems, chosen = Problems(), way(config)
    problems.need(not asked_for("MEGATRON_LM"),
                  "accelerate was asked to use Megatron-LM, which is for language models: launch without it.")
    if chosen == DDP:
        return problems
    said = {DEEPSPEED: "DeepSpeed", FSDP2: "memory.shard=true" if config.memory.shard else "accelerate's FSDP"}[chosen]
    problems += in_parts(config.optimizer.name, said, chosen)
    if chosen == DEEPSPEED:
        problems.need(not config.memory.shard, "memory.shard=true is FSDP2, and accelerate was asked to use DeepSpeed: "
                                               "leave one of them out.")
        problems += deepspeed(config)
    else:
        problems.need(not asked_for("FSDP") or os.environ.get("FSDP_VERSION", "1") == "2",
                      "accelerate was asked to use FSDP 1, and this trainer shards by FSDP2: launch with "
                      "--fsdp_version 2 (fsdp_version: 2 in accelerate's file).")
    problems += [f"{said} does not go with {name}={value!r}: leave one of them out."
                 for name, value in (("compile", config.compile), ("memory.base", config.memory.base),
                                     ("memory.swap_blocks", config.memory.swap_blocks)) if value]
    problems.need(config.recipe.choices == 1,
                  f"{said} needs recipe.choices=1: all processes must go the same way through the network.")
    return problems


def in_parts(name: str, said: str, chosen: str) -> list[str]:
    """A problem where processes cannot have parts of an optimizer's work. said: what spreads it, in words."""
    kind = optimizers.kind(name)
    if kind is None or name == "adamw" or (chosen == FSDP2 and kind.by_number and name != "muon"):
        return []
    others = ", 'lion' or 'schedule_free_adamw'" if chosen == FSDP2 else ""
    reason = "steps more than single parameters" if kind.by_number and name != "muon" else "looks at whole tensors"
    return [f"{said} goes with optimizer.name='adamw'{others}, not {name!r}, which {reason}."]


def deepspeed(config: Config) -> list[str]:
    """Problems with the DeepSpeed settings of accelerate's launcher."""
    if not find_spec("deepspeed"):
        return ["accelerate was asked to use DeepSpeed, which is not installed: pip install deepspeed, or launch "
                "without it."]
    from accelerate.utils import DeepSpeedPlugin

    problems, settings = Problems(), DeepSpeedPlugin().deepspeed_config
    stage = settings["zero_optimization"].get("stage")
    instead = "memory.shard=true spreads the weights too (FSDP2)" if stage == 3 else "a launch without DeepSpeed " \
        "joins whole gradients"
    problems.need(stage in (1, 2), f"DeepSpeed was given zero_stage {stage}, and this trainer uses 1 and 2; {instead}.")
    problems.need(config.recipe.name != "pixart_dmd",
                  "DeepSpeed clips all gradients as one, and recipe.name='pixart_dmd' those of two networks apart: "
                  "launch without it, or with memory.shard=true.")
    for name in ("optimizer", "scheduler"):
        problems.need(name not in settings, f"DeepSpeed's file names its own {name}: take it out, the recipe's "
                                            "[optimizer] decides.")
    for name in ("fp16", "bf16"):
        problems.need((settings.get(name) or {}).get("enabled") is not True,
                      f"DeepSpeed's file turns {name} on: take it out, the recipe's precision decides.")
    return problems
