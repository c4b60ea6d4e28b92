"""LoRAs of Stage C: with a guide and a word that is learned, and plain; the loss, runs, and files that loaders take."""
import json
import os
import shutil
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import tiny_ultrapixel
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.ultrapixel import checkpoint, lora
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.trainer import libraries
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader
from pixstack.trainer.export import exporting
from pixstack.trainer.features import text_encoders
from pixstack.trainer.training import samples
from tiny_ultrapixel import recipe_of

PLAIN = {"name": "ultrapixel_lora"}
PERSONAL = {"name": "ultrapixel_lora", "low_side": 2, "word": "[mycat]", "word_base": "^cat</w>", "low_until": 2}
CAPTION = "a red cat [mycat]"


@pytest.fixture(scope="module", autouse=True)
def remembered():
    yield from tiny_ultrapixel.remembered()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_ultrapixel.parts(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def guided(parts, tmp_path_factory):
    guide = tiny_ultrapixel.guide_file(tmp_path_factory.mktemp("guide") / "guide.safetensors")
    return {**parts, "model": {**parts["model"], "guide": guide}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=128)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures without captions."""
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate(tiny_run.COLOURS.values()):
        Image.new("RGB", (128, 128), colour).save(folder / f"{i}.png")
    return {"kind": "folder", "path": str(folder), "caption": CAPTION, **tiny_ultrapixel.IMAGE}


@pytest.fixture
def plain(path, parts, tmp_path):
    def settings(*words, **more):
        return tiny_ultrapixel.settings(path, tmp_path / "run", parts, PLAIN, *words, **more)
    return settings


@pytest.fixture
def personal(photos, guided, tmp_path):
    def settings(*words, **more):
        return tiny_ultrapixel.settings("", tmp_path / "run", guided, PERSONAL, *words, **{"data": photos, **more})
    return settings


def stirred(recipe):
    """With nothing in the LoRA zero."""
    torch.manual_seed(1)
    for p in recipe.layers.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if recipe.change is not None:
        torch.nn.init.normal_(recipe.change)
    return recipe


def merged(recipe, file):
    """Stage C with the LoRA of a file inside, as the inference reads it."""
    found = lora.read(*state_dict.read_file(file))
    shape, tensors = checkpoint.read_stage_c(*state_dict.read_file(recipe.config.model.stage_c))
    net = StageC(shape)
    state_dict.load_into(net, found.merge(tensors), "Stage C")
    return net.eval(), found


# --- The loss


def test_a_lora_begins_as_nothing_and_scales_by_alpha_over_rank(plain):
    recipe, batches = recipe_of(plain("recipe.rank=2", "recipe.alpha=3.0"))
    assert all(not layer.down.any() and layer.up.any() and layer.scale == 1.5 for layer in recipe.layers.values())
    batch, d = batches(0, range(4)), recipe.denoising
    draws, latents = d.draw(0), d.latents(batch, 0).high
    x, timestep = d.noisy(latents.clean, latents.noise, draws.t)
    bare = tiny_ultrapixel.network(StageC, tiny_ultrapixel.C)
    with torch.no_grad():
        torch.testing.assert_close(recipe.net(x, timestep, **d.conditioning(batch, draws)),
                                   bare(x, timestep, **d.conditioning(batch, draws)))


def test_all_attentions_learn_and_nothing_else_does(plain):
    recipe, batches = recipe_of(plain())
    stirred(recipe)(batches(0, range(4))).mean().backward()
    assert set(recipe.keys.values()) == set(lora.attention_keys(tiny_ultrapixel.C))
    learns = {n for n, p in recipe.named_parameters() if p.requires_grad}
    assert learns == {n for n, p in recipe.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[0] for n in learns} == {"layers"}


def test_a_personalisation_learns_at_low_resolution_first_and_in_turns_then(personal):
    recipe, batches = recipe_of(personal("recipe.dropout=0.0", "recipe.weight=none"))
    turns = [recipe.high(step) for step in range(60)]
    assert turns[:2] == [False, False] and 15 < sum(turns[2:]) < 45
    low, high = turns.index(False), turns.index(True)
    d = recipe.denoising
    for step, expected in ((low, lambda latents, *a: d.plain(latents.low, *a)),
                           (high, lambda latents, *a: d.guided(recipe.guide, latents, *a))):
        batch = batches(step, range(4))
        conditioning = d.conditioning(batch, d.draw(step), recipe.change)
        torch.testing.assert_close(recipe(batch), expected(d.latents(batch, 0), d.draw(step).t, conditioning))


def test_the_word_is_learned(personal):
    """The release computes its conditions without gradients, so that its word stays what it began as."""
    recipe, batches = recipe_of(personal())
    stirred(recipe)(batches(0, range(4))).mean().backward()
    assert recipe.change.grad.abs().max() > 1e-6
    encoder = recipe.text.encoder[0]
    assert all(p.grad is None for p in encoder.parameters())
    (layers, word) = recipe.groups(recipe.config)
    assert word.params == [("change", recipe.change)]


def test_a_word_begins_as_the_mean_of_the_words_of_its_pattern(personal):
    recipe, _ = recipe_of(personal("recipe.word_base=^(cat|card)</w>"))
    text = recipe.text
    rows = [text.tokens.convert_tokens_to_ids(w) for w in ("cat</w>", "card</w>")]
    assert text.word_base == sorted(rows) and text.word_row == len(text.tokens) - 1
    one, _ = recipe_of(personal())
    learned, known = one.text.read([CAPTION], "cpu")[0], one.text.read(["a red cat cat"], "cpu")[0]
    torch.testing.assert_close(learned, known)  # of one word it begins as that word
    moved = one.text.read([CAPTION], "cpu", torch.ones(1, text.width))[0]
    assert (moved - learned).abs().max() > 0.01
    untouched = one.text.read(["a red cat"], "cpu", torch.ones(1, text.width))[0]
    assert torch.equal(untouched, one.text.read(["a red cat"], "cpu")[0])


def test_the_tokens_are_those_before_the_last_norm_and_the_end_token_fills_up(parts, tmp_path):
    libraries.hide_broken_torchvision()
    from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast

    folder = parts["text"]["encoder"]
    model, tokens = CLIPTextModelWithProjection.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    row = tokens("a red cat").input_ids
    ids = torch.tensor([row + [tokens.eos_token_id] * (77 - len(row))])
    mask = (torch.arange(77) < len(row)).long()[None]
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    text = text_encoders.FrozenClip(folder, tmp_path)
    said, pooled = text.lookup(["a red cat"], "cpu")
    torch.testing.assert_close(said, found.hidden_states[-1], rtol=1e-2, atol=1e-2)  # kept in bf16
    torch.testing.assert_close(pooled, found.text_embeds, rtol=1e-2, atol=1e-2)


def test_a_word_that_no_caption_has_is_refused(personal):
    with pytest.raises(ValueError, match="No caption has the word .yourcat., so nothing would teach it"):
        recipe_of(personal("recipe.word=[yourcat]", "samples.prompts=[\"a red [yourcat]\"]"))
    with pytest.raises(ValueError, match="knows the word a</w> already"):
        recipe_of(personal("recipe.word=a</w>", "data.caption=a</w>"))


def test_a_word_base_that_is_no_word_is_refused(personal):
    with pytest.raises(ValueError, match="'.dog</w>' is found in none of the text encoder's"):
        recipe_of(personal("recipe.word_base=^dog</w>"))


@pytest.mark.parametrize("words, part", [
    (("recipe.rnak=4",), "recipe.rnak is not a setting; did you mean rank"),
    (("recipe.rank=0",), "recipe.rank=0 must be at least 1"),
    (("recipe.word=[x]",), "recipe.word='[x]' and recipe.word_base='' belong together"),
    (("recipe.word=a dog", "recipe.word_base=dog"), "must be one word"),
    (("recipe.high_share=1.5",), "recipe.high_share=1.5 is outside [0, 1]"),
])
def test_a_setting_that_cannot_work_is_refused(plain, words, part):
    with pytest.raises(ValueError) as caught:
        plain(*words)
    assert part in str(caught.value)


def test_micro_batches_give_the_losses_of_the_whole_batch(personal):
    recipe, batches = recipe_of(personal())
    stirred(recipe)
    for step in (0, next(s for s in range(2, 60) if recipe.high(s))):
        whole = recipe(batches(step, range(4)))
        other = stirred(recipe_of(personal())[0])
        other.weight.means.copy_(torch.ones(300))
        recipe.weight.means.copy_(torch.ones(300))
        some = torch.cat([other(batches(step, range(s, s + 2))) for s in (0, 2)])
        torch.testing.assert_close(some, whole, rtol=1e-3, atol=1e-4)


# --- Runs


def test_a_resumed_run_repeats_the_unbroken_run(photos, guided, tmp_path):
    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    unbroken, broken = (tiny_ultrapixel.settings("", tmp_path / n, guided, PERSONAL, "save_every=5", data=photos)
                        for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    one, other = (tiny_ultrapixel.weights(tmp_path / n) for n in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert one["model.change"].any() and not any(k.startswith(("model.net.", "model.guide.")) for k in one)
    assert tiny_ultrapixel.log(tmp_path / "unbroken") == tiny_ultrapixel.log(tmp_path / "broken")


def test_training_lowers_the_loss(plain):
    settings = plain("steps=40", "optimizer.learning_rate=1e-2", "save_every=40", "ema.decay=0", "recipe.rank=8")
    fresh, batches = recipe_of(settings)
    recipe, _ = tiny_run.train(settings)
    shown = loader.fixed(batches.items, settings.data)
    assert recipe.validate(shown)["loss"] < 0.95 * fresh.validate(shown)["loss"]


def test_validation_measures_both_resolutions(personal):
    recipe, batches = recipe_of(personal())
    found = recipe.validate(loader.fixed(batches.items, batches.settings))
    assert found["loss"] == pytest.approx((found["low"] + found["high"]) / 2)


def test_the_shipped_recipe_passes_a_dry_run_on_tiny_files(photos, guided, tmp_path, capsys):
    words = [f"{section}.{key}={value}" for section, values in guided.items() for key, value in values.items()]
    cli.main(["train", "recipes/ultrapixel/ultrapixel_lora.toml", "--dry-run", *words, f"data.path={photos['path']}",
              "data.caption=a photo of a cat [roubaobao]", "data.resolution=256", "recipe.low_side=2",
              f"out={tmp_path}/run", "device=cpu", "samples.height=256", "samples.width=256"])
    output = capsys.readouterr().out
    for part in ("layers:", "change: 32", "guided by 2x2 cells", "a photo of a cat [roubaobao]", "low resolution"):
        assert part in output, part


# --- What comes out


@pytest.fixture(scope="module")
def trained(photos, guided, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ("steps=6", "samples.every=6", f"samples.prompts=[{json.dumps(CAPTION)}]", "samples.steps=2", "ema.decay=0",
             "optimizer.learning_rate=2e-2", "recipe.low_until=1", "text.learning_rate_multiple=5.0",
             "optimizer.warm_up=0")
    tiny_run.train(tiny_ultrapixel.settings("", folder, guided, PERSONAL, *words, data=photos))
    return folder


def same_prediction(recipe, net, caption, change):
    torch.manual_seed(0)
    x, t = torch.randn(2, 16, 5, 4), torch.tensor([0.3, 0.8])
    conditioning = recipe.denoising.condition([caption] * 2, change=change)
    with torch.no_grad():
        theirs, ours = net(x, t, **conditioning), recipe.net(x, t, **conditioning)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_an_exported_personalisation_does_what_the_trained_one_does(trained, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    assert file.parent.name == "loras"
    recipe, _, _ = exporting.open_run(trained)
    net, found = merged(recipe, file)
    assert (found.token, found.base, found.token_rows) == ("[mycat]", "^cat</w>", [recipe.text.word_row])
    torch.testing.assert_close(found.token_change, recipe.change)
    same_prediction(recipe, net, CAPTION, recipe.change)
    text = recipe.text
    table = text.loaded("cpu").text_model.embeddings.token_embedding.weight
    grown = found.embed(torch.cat([table, table[text.word_base].mean(0, keepdim=True)]))
    torch.testing.assert_close(grown[-1], table[text.word_base].mean(0) + recipe.change[0])


def test_samples_without_the_lora_are_those_from_before_the_training(trained):
    recipe, config, _ = exporting.open_run(trained)
    ((_, without),), ((_, whole),) = samples.draw(recipe, config, base=True), samples.draw(recipe, config)
    before = torch.from_numpy(np.array(Image.open(trained / "samples/00000000/00.png"))).permute(2, 0, 1)
    torch.testing.assert_close((without.clamp(-1, 1) + 1) * 127.5, before.float(), rtol=0, atol=1.01)
    assert not torch.equal(without, whole)


@pytest.mark.parametrize("to", ["original", "kohya", "comfyui"])
def test_convert_takes_the_file_to_every_format_and_back(trained, tmp_path, to):
    (file,) = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    cli.main(["convert", str(file), str(tmp_path / "there.safetensors"), "--to", to])
    base = ["--base", json.loads((trained / "config.json").read_text())["model"]["stage_c"]]
    cli.main(["convert", str(tmp_path / "there.safetensors"), str(tmp_path / "back.safetensors"), *base])
    keys = state_dict.read_file(tmp_path / "there.safetensors")[0]
    mark = {"original": "module.0.lora_down", "kohya": "lora_prior_unet_down_blocks_0_2_attention_attn_to_q.alpha",
            "comfyui": "diffusion_model.down_blocks.0.2.attention.attn.out_proj.lora_up.weight"}[to]
    assert mark in keys
    one, other = (lora.read(*state_dict.read_file(p)) for p in (file, tmp_path / "back.safetensors"))
    assert (one.token, one.base, one.token_rows, one.scale) == (other.token, other.base, other.token_rows, other.scale)
    assert torch.equal(one.token_change, other.token_change) and one.layers.keys() == other.layers.keys()
    for key in one.layers:
        assert all(torch.equal(a, b) for a, b in zip(one.layers[key], other.layers[key], strict=True))


def test_a_run_goes_on_from_an_export(trained, personal, tmp_path):
    (file,) = exporting.export(trained, tmp_path, "tiny", dtype="fp32")
    old, _, _ = exporting.open_run(trained)
    new, _ = recipe_of(personal(f"init_from={file}", "recipe.alpha=2.0"))
    assert torch.equal(new.change, old.change)
    for name in old.layers:
        torch.testing.assert_close(new.scale * new.layers[name].up @ new.layers[name].down,
                                   old.scale * old.layers[name].up @ old.layers[name].down)
    assert old.rank == new.rank == 4
    with pytest.raises(ValueError, match="has rank 4, recipe.rank=8"):
        personal(f"init_from={file}", "recipe.rank=8")


def test_the_released_personalisation_is_a_start(personal, tmp_path):
    recipe, _ = recipe_of(personal())
    released = lora.to_released(stirred(recipe).personalisation())[0]
    torch.save(released, tmp_path / "lora_cat.safetensors")
    new, _ = recipe_of(personal(f"init_from={tmp_path / 'lora_cat.safetensors'}"))
    assert torch.equal(new.change, recipe.change)
    assert all(torch.equal(new.layers[n].down, recipe.layers[n].down) for n in recipe.layers)


def clip_g_for_both(host, folder):
    """One tiny CLIP-G with CLIP's own vocabulary, as core loads it and as transformers does: (file name, folder)."""
    import cascade_weights
    import comfy

    libraries.hide_broken_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    file = host.models / "text_encoders" / "clip_g_of_the_trainer.safetensors"
    cascade_weights.tiny_clip_g(file)
    words = Path(next(iter(comfy.__path__))) / "sd1_tokenizer"
    CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt")).save_pretrained(folder)
    sizes = {k: v for k, v in cascade_weights.CLIP_G.items()}
    model = CLIPTextModelWithProjection(CLIPTextConfig(
        **sizes, projection_dim=cascade_weights.TEXT, vocab_size=49408, hidden_act="gelu", bos_token_id=49406,
        eos_token_id=49407))
    tensors = {k: v.float() for k, v in state_dict.read_file(file)[0].items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    model.save_pretrained(folder)
    return file.name, str(folder)


def test_comfyui_reads_captions_and_the_learned_word_as_the_trainer_does(parts, host, photos, tmp_path):
    name, folder = clip_g_for_both(host, tmp_path / "clip_g")
    sections = {**parts, "text": {"encoder": folder}}
    recipe, _ = recipe_of(tiny_ultrapixel.settings("", tmp_path / "run", sections, {
        **PLAIN, "word": "[mycat]", "word_base": "^cat</w>"}, data=photos))
    stirred(recipe)
    assert recipe.text.word_row == 49408
    tensors, metadata = lora.to_core(recipe.personalisation())
    state_dict.write_file(host.models / "loras" / "word_of_the_trainer.safetensors", tensors, metadata)
    shutil.copy(parts["model"]["stage_c"], host.models / "diffusion_models" / "stage_c_of_the_word.safetensors")
    core = import_module("nodes")
    model = core.UNETLoader().load_unet("stage_c_of_the_word.safetensors", "default")[0]
    clip = core.CLIPLoader().load_clip(name, "stable_cascade")[0]
    node = core.NODE_CLASS_MAPPINGS["PixStack_UltraPixelPersonalise"]
    given = dict(model=model, lora_name="word_of_the_trainer.safetensors", strength=1.0, clip=clip)
    _, learned, token, base = node.execute(**given, token_strength=1.0, token="", base_token="").args
    assert (token, base) == ("[mycat]", "^cat</w>")
    for caption in ("a photo of a cat [mycat] on a red chair", ""):
        ((theirs, more),) = core.CLIPTextEncode().encode(learned, caption)[0]
        with torch.no_grad():
            tokens, pooled = recipe.text.read([caption], "cpu", recipe.change)
        torch.testing.assert_close(theirs.float(), tokens, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(more["pooled_output"].float(), pooled, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        bare = recipe.text.read(["a photo of a cat [mycat] on a red chair"], "cpu")[0]
        changed = recipe.text.read(["a photo of a cat [mycat] on a red chair"], "cpu", recipe.change)[0]
    assert (bare - changed).abs().max() > 0.1


def test_cores_lora_loader_takes_the_file_and_draws_as_the_trainer_does(trained, parts, host):
    shutil.copy(parts["model"]["stage_c"], host.models / "diffusion_models" / "stage_c_of_the_lora.safetensors")
    (file,) = exporting.export(trained, host.models, "cat_of_the_trainer", dtype="fp32")
    core = import_module("nodes")
    model = core.UNETLoader().load_unet("stage_c_of_the_lora.safetensors", "default")[0]
    patched = core.LoraLoaderModelOnly().load_lora_model_only(model, file.name, 1.0)[0]
    recipe, _, _ = exporting.open_run(trained)
    assert len(patched.patches) == 2 * len(recipe.layers)  # out_proj, and in_proj in three parts
    patched.patch_model()
    net = patched.model.diffusion_model.float()

    def theirs(x, t, text, pooled):
        return net(x, t, text, pooled, torch.zeros(2, 1, 768))

    same_prediction(recipe, theirs, CAPTION, recipe.change)
    patched.unpatch_model()
    bare = tiny_ultrapixel.network(StageC, tiny_ultrapixel.C)
    with pytest.raises(AssertionError):  # and that is not what it says without
        same_prediction(recipe, bare, CAPTION, recipe.change)
