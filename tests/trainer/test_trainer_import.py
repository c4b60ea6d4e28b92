"""python -m trainer import: settings of other trainers become recipes that pass the settings check and keep what they
say, and what has no counterpart is said."""
import json

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import check
from pixstack.trainer.config.load import from_toml
from pixstack.trainer.importing import programs, toml_text
from pixstack.trainer.importing.rows import Draft
from pixstack.trainer.recipes import RECIPES

ONETRAINER = {
    "__version": 10, "training_method": "LORA", "model_type": "PIXART_SIGMA", "base_model_name": "BASE",
    "concepts": [{"name": "cards", "path": "DATA", "enabled": True, "balancing": 2.0,
                  "text": {"prompt_source": "sample"},
                  "image": {"enable_random_flip": True, "enable_random_hue": True}}],
    "learning_rate": 0.0002, "learning_rate_scheduler": "COSINE", "learning_rate_warmup_steps": 10, "epochs": 3,
    "batch_size": 2, "gradient_accumulation_steps": 3, "resolution": "64", "lora_rank": 12, "lora_alpha": 6.0,
    "dropout_probability": 0.1, "seed": 77, "ema": "OFF", "train_dtype": "BFLOAT_16", "masked_training": True,
    "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0, "clip_grad_norm": 1.0,
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
dataset_config = "data.toml"
"""
KOHYA_DATA = """
[general]
shuffle_caption = true
[[datasets]]
resolution = 64
batch_size = 3
enable_bucket = false
[[datasets.subsets]]
image_dir = "DATA"
class_tokens = "a card"
num_repeats = 4
"""
KOHYA_PROMPTS = "# mine\na red card --w 64 --h 64 --d 9 --s 12 --l 6.5\na blue square\n"
SIMPLETUNER = {
    "--model_type": "full", "--model_family": "flux", "--pretrained_model_name_or_path": "BASE",
    "--learning_rate": 1e-5, "--lr_scheduler": "constant_with_warmup", "--lr_warmup_steps": 30,
    "--optimizer": "adamw_bf16", "--optimizer_config": "weight_decay=0.02", "--max_train_steps": 900,
    "--num_train_epochs": 0, "--train_batch_size": 2, "--gradient_accumulation_steps": 2, "--mixed_precision": "bf16",
    "--gradient_checkpointing": "true", "--seed": 11, "--data_backend_config": "config/multidatabackend.json",
    "--caption_dropout_probability": 0.2, "--validation_prompt": "a green square", "--validation_steps": 300,
    "--validation_guidance": 3.5, "--validation_num_inference_steps": 9, "--validation_resolution": "32x32",
    "--checkpointing_steps": 200, "--flow_schedule_shift": 3, "--report_to": "none", "--use_ema": False,
}
BACKENDS = [
    {"id": "cards", "type": "local", "instance_data_dir": "DATA", "resolution": 32, "resolution_type": "pixel",
     "crop": True, "crop_aspect": "square", "caption_strategy": "instanceprompt", "instance_prompt": "a card",
     "repeats": 1},
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
           default_caption: "[trigger]"}
      train:
        batch_size: 4
        steps: 700
        lr: 4e-4
        optimizer: adamw
        optimizer_params: {weight_decay: 1.0e-4}
        gradient_checkpointing: true
        noise_scheduler: ddpm
        seed: 3
        dtype: bf16
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: BASE, arch: pixart_sigma, quantize: true}
      sample:
        sample_every: 250
        width: 64
        height: 64
        prompts: ["[trigger] on a table", "a blue square"]
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
    return text.replace("BASE", (there / base).as_posix()).replace("DATA", (there / "data/images").as_posix())


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
            config.data.resolution, s.prompts)


def test_settings_of_onetrainer_become_a_recipe(there, tmp_path, capsys):
    config, said = imported(tmp_path, "cards.json", filled(ONETRAINER, there), capsys)
    # 12 pictures, twice each, in batches of 6, three times
    assert kept(config) == (2e-4, 10, 12, 6, 2, 77, 64, ["a red card"])
    a = config.adapter
    assert (config.recipe.name, config.name, a.rank, a.alpha, a.dropout) == ("pixart_lora", "cards", 12, 6.0, 0.1)
    assert config.optimizer.betas == [0.9, 0.99] and config.optimizer.decay == "cosine" and config.data.flip
    assert config.recipe.snr_gamma == 5 and config.samples.steps == 7 and config.samples.cfg == 5.5
    assert "- masked_training = true: pictures have no masks" in said and "enable_random_hue = true" in said
    assert "batch_size = 6 is 2 pictures in a pass times 3" in said and 'negative_prompt = "blue"' in said
    assert "To fill in:" not in said


def test_settings_of_kohya_become_a_recipe(there, tmp_path, capsys):
    (tmp_path / "data.toml").write_text(filled(KOHYA_DATA, there), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(KOHYA_PROMPTS, encoding="utf-8")
    config, said = imported(tmp_path, "cards.toml", filled(KOHYA, there), capsys)
    assert kept(config) == (3e-4, 20, 500, 6, 3, 42, 64, ["a red card", "a blue square"])
    a = config.adapter
    assert (config.recipe.name, a.kind, a.rank, a.alpha, a.factor) == ("pixart_lora", "lokr", 8, 4.0, 4)
    assert (config.optimizer.decay, config.optimizer.decay_cycles, config.optimizer.betas,
            config.optimizer.weight_decay) == ("cosine_restarts", 3, [0.9, 0.95], 0.1)
    assert (config.samples.seed, config.samples.steps, config.samples.cfg) == (9, 12, 6.5)
    assert "precision = 'bf16': half precision is not trained in here" in said and "num" not in said.split("\n")[0]
    assert "- network_args preset" in said and "- shuffle_caption = true" in said and "noise_offset = 0.05" in said


def test_settings_of_simpletuner_become_a_recipe(there, tmp_path, capsys):
    (tmp_path / "multidatabackend.json").write_text(filled(BACKENDS, there), encoding="utf-8")
    config, said = imported(tmp_path, "config.json", filled(SIMPLETUNER, there, "flux"), capsys)
    assert kept(config) == (1e-5, 30, 900, 4, 2, 11, 32, ["a green square"])
    assert (config.recipe.name, config.recipe.dropout, config.data.caption) == ("flux", 0.2, "a card")
    assert config.checkpoint_activations and config.save_every == 200 and config.samples.height == 32
    assert config.text.padded and config.text.clip.endswith("flux/text_encoder")
    assert "- flow_schedule_shift = 3: the family's own noise levels are drawn" in said
    assert "optimizer = 'adamw_bf16' is optimizer.name = 'adamw'" in said


def test_settings_of_ai_toolkit_become_a_recipe(there, tmp_path, capsys):
    config, said = imported(tmp_path, "job.yaml", filled(AI_TOOLKIT, there), capsys)
    assert kept(config) == (4e-4, 0, 700, 4, 4, 3, 64, ["crd on a table", "a blue square"])
    assert (config.recipe.name, config.name, config.adapter.rank, config.adapter.alpha) \
        == ("pixart_lora", "my_cards", 6, 3.0)
    assert config.ema.decay == 0.99 and config.memory.base == "fp8" and config.recipe.dropout == 0.05
    assert config.save_every == 250 and config.keep == 4 and config.samples.steps == 20
    assert "network.network_kwargs.only_if_contains" in said and "trigger_word = 'crd'" in said


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


def test_every_row_of_the_tables_is_of_a_setting_that_some_recipe_has(tmp_path):
    coming = {"recipe.offset_noise"}  # named for recipes that have it
    drafts = [Draft(name) for name in RECIPES]
    names = {name for program in programs.PROGRAMS for row in program.ROWS.values() for name in row.settings} - coming
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
    ("a.json", json.dumps({**ONETRAINER, "batch_size": "many"}), "(OneTrainer): 'many' is no number"),
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
