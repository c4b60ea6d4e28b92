"""python -m trainer import: settings of other trainers become recipes that pass the settings check and keep what they
say, and what has no counterpart is said."""
import json

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
from PIL import Image
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import check
from pixstack.trainer.config.load import from_toml
from pixstack.trainer.config.schema import SamplePrompt
from pixstack.trainer.importing import aitoolkit, kohya, onetrainer, programs, toml_text
from pixstack.trainer.importing.rows import Draft
from pixstack.trainer.recipes import RECIPES

ONETRAINER = {
    "__version": 10, "training_method": "LORA", "model_type": "PIXART_SIGMA", "base_model_name": "BASE",
    "concepts": [{"name": "my cards", "path": "DATA", "enabled": True, "balancing": 2.0,
                  "text": {"prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2,
                           "tag_dropout_enable": True, "tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.2},
                  "image": {"enable_random_flip": True, "enable_random_hue": True, "random_hue_max_strength": 0.2,
                            "enable_fixed_rotate": True}},
                 {"name": "others", "path": "DATA", "loss_weight": 0.5, "text": {"prompt_source": "filename"}}],
    "learning_rate": 0.0002, "learning_rate_scheduler": "COSINE", "learning_rate_warmup_steps": 10, "epochs": 3,
    "batch_size": 2, "gradient_accumulation_steps": 3, "resolution": "64", "lora_rank": 12, "lora_alpha": 6.0,
    "dropout_probability": 0.1, "seed": 77, "ema": "OFF", "train_dtype": "BFLOAT_16", "masked_training": True,
    "unmasked_weight": 0.3, "normalize_masked_area_loss": True, "mse_strength": 0, "huber_strength": 1.0,
    "huber_delta": 0.5, "offset_noise_weight": 0.05, "perturbation_noise_weight": 0.1, "min_noising_strength": 0.1,
    "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, "timestep_shift": 2.0, "save_every": 2,
    "save_every_unit": "EPOCH", "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0, "clip_grad_norm": 1.0,
    "aspect_ratio_bucketing": False,
    "optimizer": {"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01}, "tensorboard": True,
    "samples": [{"enabled": True, "prompt": "a red card", "height": 64, "width": 64, "seed": 5, "diffusion_steps": 7,
                 "cfg_scale": 5.5, "negative_prompt": "blue"}], "sample_after": 100, "sample_after_unit": "STEP",
}
KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "BASE"
[network]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_args = ["algo=lokr", "factor=4", "preset=full"]
[training]
learning_rate = 3e-4
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 20
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.95)"]
max_train_steps = 500
mixed_precision = "fp16"
gradient_accumulation_steps = 2
seed = 42
sample_prompts = "prompts.txt"
sample_every_n_steps = 250
noise_offset = 0.05
multires_noise_iterations = 8
multires_noise_discount = 0.4
ip_noise_gamma = 0.1
min_snr_gamma = 5
debiased_estimation_loss = true
loss_type = "smooth_l1"
huber_schedule = "exponential"
min_timestep = 100
prior_loss_weight = 0.7
save_every_n_epochs = 1
dataset_config = "data.toml"
"""
KOHYA_DATA = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.15
[[datasets]]
resolution = 64
batch_size = 3
enable_bucket = false
[[datasets.subsets]]
image_dir = "DATA"
class_tokens = "a card"
num_repeats = 4
caption_prefix = "art,"
[[datasets.subsets]]
image_dir = "DATA"
class_tokens = "a thing"
is_reg = true
color_aug = true
"""
KOHYA_PROMPTS = "# mine\na red card --w 70 --h 64 --d 9 --s 12 --l 6.5 --n ugly, blurred\na blue square\n"
SIMPLETUNER = {
    "--model_type": "full", "--model_family": "flux", "--pretrained_model_name_or_path": "BASE",
    "--learning_rate": 1e-5, "--lr_scheduler": "constant_with_warmup", "--lr_warmup_steps": 30,
    "--optimizer": "adamw_bf16", "--optimizer_config": "weight_decay=0.02", "--max_train_steps": 900,
    "--num_train_epochs": 0, "--train_batch_size": 2, "--gradient_accumulation_steps": 2, "--mixed_precision": "bf16",
    "--gradient_checkpointing": "true", "--seed": 11, "--data_backend_config": "config/multidatabackend.json",
    "--caption_dropout_probability": 0.2, "--validation_prompt": "a green square", "--validation_steps": 300,
    "--validation_guidance": 3.5, "--validation_num_inference_steps": 9, "--validation_resolution": "32x32",
    "--checkpointing_steps": 200, "--flow_sigmoid_scale": 1.5, "--snr_gamma": 5,
    "--loss_type": "huber", "--huber_c": 0.2, "--huber_schedule": "constant", "--input_perturbation": 0.05,
    "--user_prompt_library": "prompts.json", "--validation_seed": 8, "--validation_negative_prompt": "blurred",
    "--disable_benchmark": True, "--report_to": "none", "--use_ema": False,
}
BACKENDS = [
    {"id": "cards", "type": "local", "instance_data_dir": "DATA", "resolution": 32, "resolution_type": "pixel",
     "crop": True, "crop_aspect": "square", "caption_strategy": "instanceprompt", "instance_prompt": "a card",
     "repeats": 1, "conditioning_data": "where"},
    {"id": "where", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
     "instance_data_dir": "MASKS"},
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
]
AI_TOOLKIT = """
job: extension
config:
  name: my_cards
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: crd
      network: {type: lora, linear: 6, linear_alpha: 3, network_kwargs: {only_if_contains: [to_q]}}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - {folder_path: DATA, caption_ext: txt, caption_dropout_rate: 0.05, resolution: [64],
           default_caption: "[trigger]", shuffle_tokens: true, token_dropout_rate: 0.1, flip_x: true,
           augmentations: [{method: ColorJitter, hue: 0.0, p: 0.5}, {method: Rotate, limit: 10}, {method: Blur}]}
        - {folder_path: DATA, num_repeats: 3, resolution: [64, 96], default_caption: thing, is_reg: true}
      train:
        batch_size: 4
        steps: 700
        lr: 4e-4
        optimizer: adamw
        optimizer_params: {weight_decay: 1.0e-4}
        gradient_checkpointing: true
        noise_scheduler: ddpm
        seed: 3
        noise_offset: 0.04
        loss_type: pseudo_huber
        min_denoising_steps: 100
        reg_weight: 0.5
        skip_first_sample: true
        dtype: bf16
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: BASE, arch: pixart_sigma, quantize: true}
      sample:
        sample_every: 250
        width: 64
        height: 64
        samples:
          - {prompt: "[trigger] on a table"}
          - {prompt: a blue square, neg: blurred, guidance_scale: 2, network_multiplier: 0.5, width: 96, seed: 7}
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: "1.0"}
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders as of pipelines of PixArt and FLUX, with what a settings check reads of them, and pictures."""
    folder = tmp_path_factory.mktemp("there")
    tiny_run.pictures(folder / "data", size=64)
    (folder / "data/masks").mkdir()
    for mask in ("images/red_card-masklabel.png", "masks/red_card.png"):
        Image.new("L", (64, 64), 255).save(folder / "data" / mask)
    for name, latents in (("pixart-sigma", 4), ("flux", 16)):
        for part, said in (("vae", {"_class_name": "AutoencoderKL", "latent_channels": latents}),
                           ("text_encoder", {}), ("text_encoder_2", {})):
            (folder / name / part).mkdir(parents=True)
            (folder / name / part / "config.json").write_text(json.dumps(said))
    tiny_pixart.released(folder / "pixart-sigma/transformer/diffusion_pytorch_model.safetensors")
    tiny_ponder.base(folder / "flux/flux1-dev.safetensors")
    return folder


def filled(value, there, base="pixart-sigma"):
    """A sample's text with the folders in it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("BASE", (there / base).as_posix()).replace("DATA", (there / "data/images").as_posix()) \
        .replace("MASKS", (there / "data/masks").as_posix())


def imported(tmp_path, name, text, capsys=None):
    """(the settings, the report) of a file, as the commands make them."""
    file, out = tmp_path / name, tmp_path / "out.toml"
    file.write_text(text, encoding="utf-8")
    cli.main(["import", str(file), "--out", str(out), "--force"])
    said = capsys.readouterr().out if capsys else ""
    return check.load(out, ["data.caption=a card", "text.max_length=16"]), said


def kept(config):
    o, s = config.optimizer, config.samples
    return (o.learning_rate, o.warm_up, config.steps, config.batch_size, config.micro_batch_size, config.seed,
            config.data.resolution, s.texts)


def test_settings_of_onetrainer_become_a_recipe(there, tmp_path, capsys):
    config, said = imported(tmp_path, "cards.json", filled(ONETRAINER, there), capsys)
    # 12 pictures, twice each in one set and once in the other, in batches of 6, three times
    assert kept(config) == (2e-4, 10, 18, 6, 2, 77, 64, ["a red card"])
    a = config.adapter
    assert (config.recipe.name, config.name, a.rank, a.alpha, a.dropout) == ("pixart_lora", "cards", 12, 6.0, 0.1)
    assert config.optimizer.betas == [0.9, 0.99] and config.optimizer.decay == "cosine"
    n, loss = config.noise, config.loss
    assert (n.timesteps, n.mean, n.deviation, n.shift, n.min_timestep) == ("logit_normal", 0.5, 1.0, 2.0, 100)
    assert (n.offset, n.perturbation, loss.snr_gamma, loss.kind, loss.huber_delta) == (0.05, 0.1, 5, "huber", 0.5)
    assert (config.data.masks, loss.unmasked, loss.normalise_masks) == ("files", 0.3, True)
    assert "min_noising_strength = 0.1 is noise.min_timestep = 100.0: there the distribution is squeezed" in said
    assert "- unmasked_probability = 0.1: masks count at every step" in said
    assert "batch_size = 6 is 2 pictures in a pass times 3" in said and "To fill in:" not in said


def test_data_sets_and_samples_of_onetrainer_keep_their_own_settings(there, tmp_path, capsys):
    config, said = imported(tmp_path, "cards.json", filled(ONETRAINER, there), capsys)
    first, second = config.data.sets
    assert (first.name, first.repeats, first.flip, first.hue, first.shuffle_tags, first.keep_tags, first.tag_dropout) \
        == ("my_cards", 2, True, 0.1, True, 2, 0.2)
    assert (second.name, second.repeats, second.loss_weight, second.name_captions, second.hue, second.flip) \
        == ("others", 1, 0.5, True, 0, False)
    assert config.data.caption_variants == 10 and "Captions change by shuffle_tags, tag_dropout: 10 wordings" in said
    assert (config.cache.folder, config.text.cache) == ("", "cache") and "enable_fixed_rotate = true" in said
    assert (config.save_every, config.save_epochs, config.samples.every) == (0, 2, 100)
    assert config.samples.prompts == [SamplePrompt("a red card", negative="blue")]
    assert (config.samples.steps, config.samples.cfg, config.samples.seed) == (7, 5.5, 5)


def test_settings_of_kohya_become_a_recipe(there, tmp_path, capsys):
    (tmp_path / "data.toml").write_text(filled(KOHYA_DATA, there), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(KOHYA_PROMPTS, encoding="utf-8")
    config, said = imported(tmp_path, "cards.toml", filled(KOHYA, there), capsys)
    assert kept(config) == (3e-4, 20, 500, 6, 3, 42, 64, ["a red card", "a blue square"])
    a = config.adapter
    assert (config.recipe.name, a.kind, a.rank, a.alpha, a.factor) == ("pixart_lora", "lokr", 8, 4.0, 4)
    assert (config.optimizer.decay, config.optimizer.decay_cycles, config.optimizer.betas,
            config.optimizer.weight_decay) == ("cosine_restarts", 3, [0.9, 0.95], 0.1)
    assert "precision = 'bf16': half precision is not trained in here" in said and "num" not in said.split("\n")[0]
    assert "- network_args preset" in said and "To fill in:" not in said
    n, loss = config.noise, config.loss
    assert (n.offset, n.pyramid, n.perturbation, n.min_timestep) == (0.05, 0.4, 0.1, 100)
    assert (loss.kind, loss.huber_delta, loss.huber_schedule, loss.snr_gamma, loss.debiased) \
        == ("pseudo_huber", 0.1, "exponential", 5, False)
    assert "noise.pyramid = 0.4: 6 iterations, not 8; " in said and "- debiased estimation = true: " in said
    assert "loss.debiased" not in said


def test_data_sets_and_samples_of_kohya_keep_their_own_settings(there, tmp_path, capsys):
    (tmp_path / "data.toml").write_text(filled(KOHYA_DATA, there), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(KOHYA_PROMPTS, encoding="utf-8")
    config, said = imported(tmp_path, "cards.toml", filled(KOHYA, there), capsys)
    own, prior = config.data.sets
    assert (own.repeats, own.templates, own.template_share, own.hue, own.prior) == (4, ["art, {}"], 1, 0, False)
    assert (prior.caption, prior.prior, prior.loss_weight, prior.hue, prior.colour_share) \
        == ("a thing", True, 0.7, 0.0444, 0.165)
    assert all(one.shuffle_tags and one.keep_tags == 1 for one in (own, prior)) and config.recipe.dropout == 0.15
    assert (config.save_every, config.save_epochs, config.samples.baseline) == (0, 1, False)
    assert config.samples.prompts == [
        SamplePrompt("a red card", negative="ugly, blurred", width=64, height=64, seed=9, steps=12, cfg=6.5),
        SamplePrompt("a blue square", width=512, height=512, steps=30, cfg=7.5)]
    assert "A sample's width 70 is 64: sides are multiples of 16." in said


def test_folders_of_kohya_that_are_called_repeats_name_become_data_sets(tmp_path):
    for name in ("10_sks dog", "2_a park"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
    (tmp_path / "a.toml").write_text("\n".join([
        'pretrained_model_name_or_path = "flux1-dev.safetensors"', 'network_module = "networks.lora_flux"',
        f'train_data_dir = "{(tmp_path / "pictures").as_posix()}"', "max_train_steps = 9", "min_snr_gamma = 5"]))
    draft, _ = programs.imported([tmp_path / "a.toml"])
    assert [(one["caption"], one["repeats"]) for one in draft.get("data.sets")] == [("sks dog", 10), ("a park", 2)]
    assert draft.settings["noise"] == {"timesteps": "uniform", "shift": 3.0}  # what it means by silence
    assert ("min_snr_gamma", 5, "sd-scripts do not read it with FLUX, and it is left out") in draft.absent


def test_settings_of_simpletuner_become_a_recipe(there, tmp_path, capsys):
    (tmp_path / "multidatabackend.json").write_text(filled(BACKENDS, there), encoding="utf-8")
    (tmp_path / "prompts.json").write_text('{"card": "a red card"}')
    config, said = imported(tmp_path, "config.json", filled(SIMPLETUNER, there, "flux"), capsys)
    assert kept(config) == (1e-5, 30, 900, 4, 2, 11, 32, ["a green square", "a red card"])
    assert (config.recipe.name, config.recipe.dropout, config.data.caption) == ("flux", 0.2, "a card")
    assert config.checkpoint_activations and config.save_every == 200 and config.samples.height == 32
    assert config.text.padded and config.text.clip.endswith("flux/text_encoder")
    assert "optimizer = 'adamw_bf16' is optimizer.name = 'adamw'" in said
    n, loss = config.noise, config.loss
    assert (n.timesteps, n.deviation, n.shift, n.perturbation) == ("logit_normal", 1.5, 3, 0.05)
    assert (loss.kind, loss.huber_delta, config.data.masks) == ("pseudo_huber", 0.2, "files")
    assert "- snr_gamma = 5: SimpleTuner does not read it with FLUX" in said and "To fill in:" not in said
    assert (config.samples.baseline, [one.seed for one in config.samples.prompts]) == (False, [8, 8])
    assert "negative prompt of sample 1" in said


def test_settings_of_ai_toolkit_become_a_recipe(there, tmp_path, capsys):
    config, said = imported(tmp_path, "job.yaml", filled(AI_TOOLKIT, there), capsys)
    assert kept(config) == (4e-4, 0, 700, 4, 4, 3, 96, ["crd on a table", "a blue square"])
    assert (config.recipe.name, config.name, config.adapter.rank, config.adapter.alpha) \
        == ("pixart_lora", "my_cards", 6, 3.0)
    assert config.ema.decay == 0.99 and config.memory.base == "fp8" and config.recipe.dropout == 0.05
    assert config.save_every == 250 and config.keep == 4 and config.samples.steps == 20
    assert "network.network_kwargs.only_if_contains" in said and "trigger_word = 'crd'" in said
    n, loss = config.noise, config.loss
    assert (n.offset, n.max_timestep, loss.kind, loss.huber_delta) == (0.04, 900, "pseudo_huber", 0.01)
    own, prior = config.data.sets
    assert (own.caption, own.shuffle_tags, own.tag_dropout, own.flip, own.hue, own.brightness, own.colour_share,
            own.rotation, own.rotation_share) == ("crd", True, 0.1, True, 0, 0.2, 0.5, 10, 0.5)
    assert (prior.caption, prior.prior, prior.loss_weight, prior.repeats, prior.flip) == ("thing", True, 0.5, 3, False)
    assert config.samples.baseline is False and "augmentations Blur" in said and config.samples.prompts == [
        SamplePrompt("crd on a table", width=64, cfg=4, seed=42),
        SamplePrompt("a blue square", negative="blurred", width=96, cfg=2, seed=7, strength=0.5)]


def test_stable_cascade_becomes_a_lora_of_stage_c(tmp_path, capsys):
    folder = tmp_path / "cascade"
    folder.mkdir()
    for name in ("stage_c", "effnet"):
        (folder / f"{name}.safetensors").touch()
    text = "\n".join([
        f'stage_c_checkpoint_path = "{folder.as_posix()}/stage_c.safetensors"', 'network_module = "networks.lora"',
        f'effnet_checkpoint_path = "{folder.as_posix()}/effnet.safetensors"', "network_dim = 2",
        "network_alpha = 1", "learning_rate = 1e-4", "max_train_steps = 50", 'resolution = "64,64"', "seed = 1",
        f'train_data_dir = "{folder.as_posix()}"'])
    (tmp_path / "cascade.toml").write_text(text, encoding="utf-8")
    draft, program = programs.imported([tmp_path / "cascade.toml"])
    assert draft.settings["recipe"] == {"name": "ultrapixel_lora", "rank": 2, "alpha": 1.0}
    assert draft.settings["model"]["stage_c"].endswith("stage_c.safetensors") and draft.get("steps") == 50
    assert [line for line in draft.missing if line.startswith("text.encoder")]


def test_what_a_program_means_by_silence_is_said_outright(tmp_path):
    short = {"model_type": "PIXART_ALPHA", "training_method": "LORA",
             "base_model_name": "PixArt-alpha/PixArt-XL-2-512x512"}
    (tmp_path / "a.json").write_text(json.dumps(short), encoding="utf-8")
    draft, _ = programs.imported([tmp_path / "a.json"])
    assert draft.settings["adapter"] == {"rank": 16, "alpha": 1.0}
    assert draft.get("optimizer.learning_rate") == 3e-6 and draft.get("optimizer.warm_up") == 200
    assert draft.get("model.variant") == "alpha" and draft.get("text.max_length") == 120
    assert draft.get("init_from") == "models/PixArt-XL-2-512x512/transformer/diffusion_pytorch_model.safetensors"
    told = "\n".join(draft.missing)
    assert "init_from" in told and "data.path" in told and "steps" in told


def test_a_lora_of_flux_becomes_the_nearest_recipe_with_a_warning(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model_type": "lora", "model_family": "flux", "lora_rank": 16}))
    draft, _ = programs.imported([tmp_path / "a.json"])
    if draft.settings["recipe"]["name"] == "flux":
        assert any("no recipe for a LoRA of FLUX" in line for line in draft.changed)
        assert ("lora_rank", 16, "flux has no adapter.rank") in draft.absent


def test_a_file_of_data_sets_may_be_given_beside(there, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/sets.json").write_text(filled(BACKENDS, there), encoding="utf-8")
    (tmp_path / "config.json").write_text(filled(SIMPLETUNER, there, "flux"), encoding="utf-8")
    for order in (1, -1):
        draft, _ = programs.imported([tmp_path / "config.json", tmp_path / "x/sets.json"][::order])
        assert draft.get("data.path") == (there / "data/images").as_posix() and draft.get("data.resolution") == 32


def test_what_saves_memory_where_all_weights_learn_is_kept(there, tmp_path, capsys):
    plain = {key: value for key, value in ONETRAINER.items() if not key.startswith("lora_")}
    full = {**plain, "training_method": "FINE_TUNE", "gradient_accumulation_steps": 1, "transformer": {
        "weight_dtype": "BFLOAT_16"}, "optimizer": {"optimizer": "ADAFACTOR", "fused_back_pass": True}}
    config, said = imported(tmp_path, "full.json", filled(full, there), capsys)
    assert (config.memory.weights, config.memory.fused_backward, config.optimizer.clip) == ("bf16", True, 0)
    assert "clip_grad_norm: with optimizer.fused_back_pass the gradients of each parameter are limited" in said
    _, said = imported(tmp_path, "lora.json", filled({**full, "training_method": "LORA",
                                                      "gradient_accumulation_steps": 2}, there), capsys)
    assert "optimizer.fused_back_pass = true: memory.fused_backward takes one pass a step" in said
    assert "memory.weights" not in said


def test_what_a_recipe_leaves_unread_has_no_counterpart():
    draft = Draft("pixart_lcm")
    draft.apply("noise_offset", 0.1, kohya.ROWS["noise_offset"])
    assert "noise" not in draft.settings and "pixart_lcm does not read noise.offset, as its loss" in draft.absent[0][2]


def test_repeats_that_are_no_whole_numbers_become_weights(there, tmp_path):
    concepts = [{"path": "DATA", "balancing": 0.5}, {"path": "DATA", "balancing": 30, "loss_weight": 2,
                                                     "balancing_strategy": "SAMPLES"}]
    text = filled({**ONETRAINER, "concepts": concepts}, there)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    draft, _ = programs.imported([tmp_path / "a.json"])
    assert [one["weight"] for one in draft.get("data.sets")] == [6.0, 30.0] and draft.get("steps") == 18


def test_every_row_of_the_tables_is_of_a_setting_that_some_recipe_has():
    drafts = [Draft(name) for name in RECIPES]
    tables = [*(program.ROWS for program in programs.PROGRAMS), kohya.SET, aitoolkit.SET, onetrainer.IMAGE]
    names = {name for table in tables for row in table.values() for name in row.settings}
    odd = [name for name in names if not name.startswith("optimizer.arguments.")
           and not any(draft.has(name) for draft in drafts)]
    assert not odd


@pytest.mark.parametrize("name, text, sentence", [
    ("a.json", "{", "a.json is not valid JSON"),
    ("a.json", "[1, 2]", "a.json: these are no settings of OneTrainer, SimpleTuner, ai-toolkit, kohya's sd-scripts"),
    ("a.toml", "x = ", "a.toml is not valid TOML"),
    ("a.toml", '[recipe]\nname = "pixart"\npretrained_model_name_or_path = "a"\nnetwork_dim = 3', "no settings of"),
    ("a.yaml", "a: [", "a.yaml is not valid YAML"),
    ("a.yaml", "config: {process: [1]}", "a.yaml (ai-toolkit): config.process holds no process"),
    ("a.yaml", "config: {process: [{model: {name_or_path: x, arch: wan21}}]}", "model.arch = wan21"),
    ("a.json", json.dumps({**ONETRAINER, "model_type": "STABLE_DIFFUSION_XL_10_BASE"}), "model_type = 'STABLE"),
    ("a.json", json.dumps({**ONETRAINER, "batch_size": "many"}), "(OneTrainer): batch_size: 'many' is no number"),
    ("a.json", json.dumps({**ONETRAINER, "concepts": [{"path": "x", "image": 3}]}), "has another form than that"),
    ("a.json", json.dumps(BACKENDS), "it holds data sets only: give the config.json too"),
    ("a.toml", KOHYA_DATA, "it holds data sets only: give the TOML of the arguments too"),
    ("a.toml", 'pretrained_model_name_or_path = "sdxl"\nnetwork_dim = 3\nlearning_rate = 1e-4', "no FLUX, Stable"),
])  # fmt: skip
def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="utf-8")
    out = tmp_path / "out.toml"
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", str(tmp_path / name), "--out", str(out)])
    said = str(caught.value.code)
    assert sentence in said and said.startswith("error: ") and not out.exists()


@pytest.mark.parametrize("changed, named", [({"noising_bias": [None]}, "noising_bias: '[None]' is no number"),
                                            ({"concepts": [{"path": "a", "balancing": "much"}]},
                                             "concepts.0.balancing: 'much' is no number")])
def test_an_entry_of_another_kind_is_named(tmp_path, capsys, changed, named):
    (tmp_path / "mine.json").write_text(json.dumps({**ONETRAINER, **changed}), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out.toml")])
    assert str(caught.value.code) == f"error: mine.json (OneTrainer): {named}, which that program wants there."


def test_a_recipe_that_is_there_is_replaced_only_by_force(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ONETRAINER), encoding="utf-8")
    (tmp_path / "out.toml").write_text("mine")
    with pytest.raises(SystemExit, match="exists. Name another file to write, or give --force"):
        cli.main(["import", str(tmp_path / "a.json"), "--out", str(tmp_path / "out.toml")])
    assert (tmp_path / "out.toml").read_text() == "mine"


def test_what_is_written_is_read_again_as_it_was():
    table = {"a": 'tab\t "quotes" \\ \x7f 🟫 \n', "b": 1e-7, "c": [1, 2], "d": True, "odd key": "x",
             "s": {"t": {"u": 1}, "rows": [{"p": "\\d+"}, {"p": "x", "q": {"r": 2.5}}]}, "e": []}
    assert from_toml(toml_text.comment(["a\nb\x00", "ü"]) + toml_text.written(table)) == table
