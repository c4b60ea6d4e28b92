"""Training a PixelPonder on a frozen FLUX: the loss, what is learned, which hints are seen, what comes out."""
import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
import torch
from PIL import Image
from pixstack.models_impl import state_dict
from pixstack.models_impl.annotators import hed
from pixstack.models_impl.annotators.canny import edges as canny
from pixstack.models_impl.flux import checkpoint as flux_checkpoint
from pixstack.models_impl.flux.config import FluxConfig
from pixstack.models_impl.flux.model import Flux, pack, unpack
from pixstack.models_impl.flux.sampling import RectifiedFlow
from pixstack.models_impl.pixelponder import checkpoint
from pixstack.models_impl.pixelponder.accumulate import Accumulate
from pixstack.models_impl.pixelponder.config import PixelPonderConfig, SelectorConfig
from pixstack.models_impl.pixelponder.model import PixelPonder
from pixstack.models_impl.pixelponder.select_net import AsRun
from pixstack.trainer import libraries
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader
from pixstack.trainer.export import cards, exporting
from pixstack.trainer.features import cache, text_encoders
from pixstack.trainer.features.hints import chosen
from pixstack.trainer.recipes.flux import task
from pixstack.trainer.recipes.pixelponder import recipe as recipes
from pixstack.trainer.training import build, checkpoints
from pixstack.trainer.training.noise import batch_noise
from safetensors import safe_open

FLOW = RectifiedFlow()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_ponder.parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_ponder.pictures(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def made(path, parts, tmp_path):
    def settings(*words, **more):
        return tiny_ponder.settings(path, tmp_path / "run", parts, *words, **more)
    return settings


def recipe_of(made):
    """(the recipe of settings, its batches); hints do not begin at zero, so that they show in the loss."""
    found = build.collection(made)
    recipe = build.recipe(made, found)
    torch.manual_seed(1)
    for p in recipe.net.input_hint_block_share[-1].parameters():
        torch.nn.init.normal_(p, std=0.5)
    return recipe, loader.Batches(found.train, made.data, made.seed, made.batch_size)


# --- The loss


def test_the_loss_is_the_flows_through_the_base_with_residuals_added_whole(made):
    recipe, batches = recipe_of(made("recipe.min_conditions=2"))
    batch = batches(0, range(6))
    sigma, sets = recipe.draw(0)
    assert len(set(sets)) == 1 and sorted(sets[0]) == [0, 1]
    latent = (recipe.flow.vae.latents(batch, "cpu", 0) - 0.1159) * 0.3611
    noise = torch.stack([batch_noise(0, 0, range(i, i + 1), latent.shape[1:], "cpu")[0] for i in range(6)])
    noisy = FLOW.add_noise(latent, noise, sigma)
    context, mask = recipe.text.lookup(batch.captions, "cpu")
    assert mask.all() and context.shape == (6, 12, 16)
    given = (sigma, context, recipe.text.pooled(batch.captions, "cpu"), torch.full((6,), 4.0))
    kinds = [("canny", "depth")[i] for i in sets[0]]
    hints = [(kind, batch.conditions[kind].float() / 127.5 - 1) for kind in kinds]
    ids = task.ids_of(noisy)
    control = recipe.net(pack(noisy), *given, img_ids=ids,
                         select=Accumulate(recipe.net.selector).begin(recipe.net.conditions(hints)))
    prediction = recipe.base(pack(noisy), *given, img_ids=ids, residuals=control.residuals(1.0))
    expected = FLOW.loss(unpack(prediction, *noisy.shape[-2:]), latent, noise, sigma)
    torch.testing.assert_close(recipe(batch), expected)


def test_the_loss_of_the_parity_case_is_the_references(made):
    """The recipe's own way through its networks, with the case's in their place."""
    found = {"input": {}, "output": {}, "weight": {}}
    file = next((ROOT / "tests/fixtures/parity").glob("pixelponder_train_step*"))
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():
            kind, _, part = key.partition(".")
            found[kind][part] = opened.get_tensor(key)
        about = json.loads(opened.metadata()["config"])
    weights, i = found["weight"], found["input"]

    def part(prefix):
        return {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}

    recipe, _ = recipe_of(made())
    recipe.base = Flux(FluxConfig.from_dict(about["flux"]))
    recipe.base.load_state_dict(part("dit."))
    recipe.base.requires_grad_(False)
    shape, tensors = checkpoint.read(part("controlnet."), config=about["controlnet"])
    recipe.net = PixelPonder(shape)
    recipe.net.load_state_dict(tensors)
    x1, x0 = (unpack(i[name], 8, 4) for name in ("x1", "x0"))
    noisy = FLOW.add_noise(x1, x0, i["timesteps"])
    condition = {"context": i["txt"], "pooled": i["y"], "guidance": i["guidance"]}
    conditions = recipe.net.conditions([(kind, i[f"hint.{kind}"]) for kind in about["cond_order"]])
    selection = about["controlnet"]["select_net"]
    select = AsRun(scores=i["scores"], patch_size=selection["patch_size"], select_num=selection["select_num"])
    prediction, _ = recipe.predict(noisy, i["timesteps"], condition, select.begin(conditions))
    loss = FLOW.loss(prediction, x1, x0, i["timesteps"]).mean()
    torch.testing.assert_close(loss.view(1), found["output"]["loss"], rtol=1e-4, atol=1e-5)
    loss.backward()
    grads = dict(recipe.net.named_parameters())
    for name, value in found["output"].items():
        if name.startswith("grad."):
            torch.testing.assert_close(grads[name[5:]].grad, value, rtol=1e-3, atol=1e-5)


def test_the_selection_receives_a_gradient(made):
    recipe, batches = recipe_of(made("recipe.min_conditions=2"))
    recipe(batches(0, range(6))).mean().backward()
    assert recipe.net.selector.score.weight.grad.abs().max() > 0
    assert recipe.net.selector.type_embedding.weight.grad.abs().max() > 0


def test_every_parameter_has_a_gradient_whatever_hints_are_seen(made):
    for words in ((), ("recipe.selection=released",)):
        recipe, batches = recipe_of(made("recipe.max_conditions=1", *words))
        recipe(batches(0, range(6))).mean().backward()
        assert [n for n, p in recipe.named_parameters() if p.requires_grad and p.grad is None] == []


def test_released_uses_only_the_first_of_the_shuffled_conditions(made):
    recipe, batches = recipe_of(made("recipe.selection=released", "recipe.min_conditions=2"))
    alone, _ = recipe_of(made("recipe.selection=released", "recipe.max_conditions=1"))
    batch = batches(0, range(6))
    sigma, sets = recipe.draw(0)
    step = recipe.flow.noising(batch, sigma, "cpu", 0)
    torch.testing.assert_close(recipe.losses(batch, step, sets), alone.losses(batch, step, [s[:1] for s in sets]))


@pytest.mark.parametrize("words", [(), ("recipe.choices=3",)], ids=["one choice", "three choices"])
def test_micro_batches_give_the_losses_of_the_whole_batch(made, words):
    recipe, batches = recipe_of(made(*words))
    whole = recipe(batches(2, range(6)))
    some = torch.cat([recipe(batches(2, range(s, s + 2))) for s in (0, 2, 4)])
    torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_leaves_gradients_as_they_are(made):
    gradients = []
    for word in ("checkpoint_activations=false", "checkpoint_activations=true"):
        recipe, batches = recipe_of(made(word))
        recipe(batches(0, range(6))).mean().backward()
        gradients.append([p.grad for p in recipe.net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_gives_nearly_the_loss_of_fp32(made):
    (exact, batches), (rough, _) = (recipe_of(made(f"precision={p}")) for p in ("fp32", "bf16"))
    assert rough.base.img_in.weight.dtype == torch.bfloat16 and rough.net.img_in.weight.dtype == torch.float32
    batch = batches(0, range(6))
    torch.testing.assert_close(rough(batch), exact(batch), rtol=0.05, atol=0.05)


def test_validation_says_the_same_twice_and_in_small_batches(made):
    recipe, batches = recipe_of(made())
    whole = recipe.validate(loader.fixed(batches.items, batches.settings))
    assert recipe.validate(loader.fixed(batches.items, batches.settings)) == whole
    assert recipe.validate(loader.fixed(batches.items, batches.settings, 3)) == pytest.approx(whole, rel=1e-4)
    assert whole["share_canny"] + whole["share_depth"] == pytest.approx(1)


# --- Which hints are seen


def test_conditions_are_dropped_and_shuffled():
    rng = torch.Generator().manual_seed(0)
    seen = {chosen(3, 1, 3, rng) for _ in range(400)}
    assert len(seen) == 3 + 6 + 6
    assert {len(chosen(4, 3, 3, rng)) for _ in range(20)} == {3}


def test_a_picture_is_shown_with_other_hints_in_other_steps(made):
    recipe, _ = recipe_of(made())
    assert len({tuple(recipe.draw(step)[1]) for step in range(20)}) > 2


def test_hints_are_made_of_pictures(path, parts, tmp_path, made):
    torch.manual_seed(0)
    net = hed.HED(hed.HEDConfig((4, 4, 4, 4, 4), (1, 1, 1, 1, 1)))
    state_dict.write_file(tmp_path / "hed.safetensors", net.state_dict())
    one = {**parts["recipe"], "name": "pixelponder", "annotators": ["hed", "canny"],
           "hed": str(tmp_path / "hed.safetensors")}
    settings = made("data.conditions=[]", recipe=one)
    recipe, batches = recipe_of(settings)
    batch = batches(0, range(6))
    unit = batch.pictures.float() / 255
    edges, lines = net(unit)[1], canny(unit, 100, 200)
    for hints, expected in zip(recipe.hints, (edges, lines), strict=True):
        shown = hints.pictures(batch, "cpu")
        assert shown.shape == (6, 3, 32, 32)
        torch.testing.assert_close(shown, (2 * expected - 1).expand(-1, 3, -1, -1).detach(), rtol=0, atol=0.005)
    assert recipe(batch).isfinite().all()


def test_any_aspect_bucket_is_trained_on(made, path, parts, tmp_path):
    folder, lines = path.parent, path.read_text().splitlines()
    for name in ("images/wide.png", "wide_canny.png", "wide_depth.png"):
        Image.new("RGB", (64, 16), "red").save(folder / name)
    wide = {"file": "images/wide.png", "captions": ["red card"], "canny": "wide_canny.png", "depth": "wide_depth.png"}
    (folder / "mixed.jsonl").write_text("\n".join([*lines, *[json.dumps(wide)] * 6]))
    recipe, batches = recipe_of(tiny_ponder.settings(
        folder / "mixed.jsonl", tmp_path / "run", parts, "data.buckets=area", "data.bucket_multiple=16",
        "data.bucket_ratio=4.0", "data.crop=centre"))
    sizes = set()
    for step in range(4):
        batch = batches(step, range(6))
        sizes.add(batch.size)
        assert recipe(batch).isfinite().all()
    assert sizes == {(32, 32), (16, 64)}


def test_cached_features_give_the_loss_of_the_pictures_themselves(made, tmp_path):
    settings = made(f"cache.folder={tmp_path / 'cache'}")
    recipe, batches = recipe_of(settings)
    plain = recipe(batches(0, range(6)))
    cache.fill(batches.items, settings.data, recipe.encoders, tmp_path / "cache", "cpu")
    messages = []
    load = cache.loader(settings, recipe.encoders, batches.items, settings.data, messages.append)
    batch = loader.Batches(batches.items, settings.data, 0, 6, load)(0, range(6))
    assert not messages and batch.pictures is None
    torch.testing.assert_close(recipe(batch), plain)


def test_a_caption_is_read_as_flux_reads_it(parts, tmp_path):
    libraries.hide_broken_torchvision()
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    t5, clip = parts["text"]["encoder"], parts["text"]["clip"]
    text = text_encoders.FrozenT5(t5, 12, tmp_path, padded=True, clip=clip)
    context, mask = text.lookup(["a red card"], "cpu")
    ids = AutoTokenizer.from_pretrained(t5)(["a red card"], padding="max_length", max_length=12,
                                            return_tensors="pt").input_ids
    expected = T5EncoderModel.from_pretrained(t5)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(context, expected.detach(), rtol=1e-2, atol=1e-2)  # kept in bfloat16
    assert mask.all() and ids[0, -1] == 0
    ids = AutoTokenizer.from_pretrained(clip)(["a red card"], padding="max_length", max_length=16,
                                              return_tensors="pt").input_ids
    pooled = CLIPTextModel.from_pretrained(clip)(input_ids=ids).pooler_output
    torch.testing.assert_close(text.pooled(["a red card"], "cpu"), pooled.detach(), rtol=1e-4, atol=1e-5)


# --- Where it may start


def test_a_run_starts_from_a_released_file_and_adds_a_selector(made, tmp_path):
    trunk = FluxConfig(**{**tiny_ponder.FLUX.as_dict(), "depth": 1, "single_depth": 2})
    shape = PixelPonderConfig(trunk, ("depth", "canny", "hed", "openpose"))
    torch.manual_seed(3)
    weights = {k: torch.randn_like(v) for k, v in PixelPonder(shape).state_dict().items()}
    state_dict.write_file(tmp_path / "start.safetensors", weights, checkpoint.metadata(shape))
    found = build.collection(settings := made(f"init_from={tmp_path / 'start.safetensors'}"))
    net = build.recipe(settings, found).net
    assert net.config.selector == SelectorConfig(128) and net.config.types == shape.types
    assert net.config.trunk.single_depth == 1  # the rest never reaches FLUX
    for key, value in net.state_dict().items():
        assert key.startswith("selector.") or torch.equal(value, weights[key]), key


def test_a_run_starts_from_the_blocks_of_its_base(made):
    recipe = build.recipe(settings := made(), build.collection(settings))
    for key, value in recipe.base.state_dict().items():
        if key in (own := recipe.net.state_dict()):
            assert torch.equal(own[key], value), key
    assert not recipe.net.input_hint_block_share[-1].weight.any()


@pytest.mark.parametrize("words, part", [
    (("recipe.selections=x",), "recipe.selections is not a setting; did you mean selection"),
    (("recipe.selection=paper",), "recipe.selection='paper' is none of accumulate, released"),
    (("recipe.base=",), "recipe.base is empty"),
    (("recipe.min_conditions=3",), "recipe.min_conditions=3, recipe.max_conditions=0: there are 2 kinds of hints"),
    (("recipe.annotators=[\"depth\"]",), "only canny, hed are drawn from pictures"),
    (("recipe.annotators=[\"canny\"]",), "name a kind twice"),
    (("data.conditions=[]",), "there are no hints"),
    (("recipe.annotators=[\"hed\"]",), "recipe.annotators has \"hed\": name the file"),
    (("recipe.annotators=[\"hed\"]", "recipe.hed=/nowhere"), "recipe.hed='/nowhere': there is no such file"),
    (("model.types=[\"canny\"]",), "there is no stem for depth"),
    (("model.selector_width=100",), "width=100 is not a multiple of the head size 128"),
    (("text.padded=false",), "text.padded=false"),
    (("data.resolution=40",), "data.resolution=40 is not a multiple of 16"),
    (("data.buckets=area", "data.bucket_multiple=8", "data.crop=centre"), "has sizes such as"),
    (("samples.prompts=[\"a\"]", "recipe.hints=[\"x.png\"]"), "names 1 files for the kinds canny, depth"),
    (("text.clip=/nowhere",), "text.clip='/nowhere': there is no such file or folder"),
])
def test_a_setting_that_cannot_work_is_refused(made, words, part):
    with pytest.raises(ValueError) as caught:
        made(*words)
    assert part in str(caught.value)


# --- Runs


def test_training_lowers_the_loss(made, tmp_path):
    tiny_run.train(made("steps=40", "optimizer.learning_rate=1e-3", "optimizer.warm_up=0", "save_every=40"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run") if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses


@pytest.fixture(scope="module")
def telling(parts, path, tmp_path_factory):
    """(data, sections, init_from) of a run in which the choice of a hint decides the loss.

    One kind, depth, is the picture itself, the other is blank. Latents vary as much as the noise. The blocks of the
    base are zero, and its velocity is minus what the ControlNet adds to its tokens. The ControlNet adds the
    mean latent and about half of what is the picture's own when it sees depth, and next to nothing when it sees the
    blank. Its selector scores all conditions alike, so that the first one wins.
    """
    folder, shape, width = tmp_path_factory.mktemp("telling"), tiny_ponder.FLUX, tiny_ponder.FLUX.in_channels
    Image.new("RGB", (32, 32), "black").save(path.parent / "blank.png")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (path.parent / "told.jsonl").write_text("".join(
        json.dumps({**line, "canny": "blank.png", "depth": line["file"]}) + "\n" for line in lines))
    sections = {**parts, "vae": {"path": str(shutil.copytree(parts["vae"]["path"], folder / "vae"))},
                "recipe": {"base": str(folder / "flux.safetensors")}}
    weights, metadata = state_dict.read_file(file := folder / "vae/diffusion_pytorch_model.safetensors")
    mean = torch.ones(32).index_fill(0, torch.arange(16), 30.0)  # the other half are variances
    scaled = {k: mean.view(-1, *[1] * (v.ndim - 1)) * v for k, v in weights.items() if k.startswith("quant_conv.")}
    state_dict.write_file(file, {**weights, **scaled}, metadata)

    # Half of the hidden channels are the velocity; the others are constant and so large that the norm is too.
    base = {k: v if k.endswith("norm.scale") else torch.zeros_like(v) for k, v in Flux(shape).state_dict().items()}
    base["img_in.bias"][width:] = torch.tensor([10.0, -10.0]).repeat((shape.hidden - width) // 2)
    spread = 3 * base["img_in.bias"].square().mean().sqrt()  # of the base and behind each of its two blocks
    base["final_layer.linear.weight"][:, :width] = -spread / 2 * torch.eye(width)
    state_dict.write_file(sections["recipe"]["base"], base, flux_checkpoint.metadata(shape))

    settings = tiny_ponder.settings(path.parent / "told.jsonl", folder / "run", sections)
    (batch,) = loader.fixed(build.collection(settings).train, settings.data)
    latent = (task.frozen_vae(settings).encode(batch.pictures, "cpu")["mean"] - 0.1159) * 0.3611
    torch.manual_seed(0)
    net = PixelPonder(PixelPonderConfig(replace(shape, depth=1, single_depth=1), tuple(tiny_ponder.MODEL["types"]),
                                        selector=SelectorConfig(128))).initialise(base)
    for layer in (*net.input_hint_block_list_moe.modules(), *net.input_hint_block_share.modules()):
        if isinstance(layer, torch.nn.Conv2d):  # hints shrink to nothing on their way through torch's own weights
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.nn.init.normal_(net.selector.type_embedding.weight)
    with torch.no_grad():
        net.selector.score.weight.zero_()
        hints = torch.cat([pack(net.encode_hint(batch.conditions[kind] / 127.5 - 1, net.config.type_index(kind)))
                           for kind in ("depth", "canny")]).flatten(0, 1)
        hints = torch.nn.functional.pad(hints, (0, 1), value=1.0)
        half = latent.mean(0) + 0.5 * (latent - latent.mean(0))
        added = pack(torch.cat([half, torch.zeros_like(half)])).flatten(0, 1)
        ridge = 0.1 * torch.eye(width + 1)  # an exact fit would not stand a step of training
        fitted = torch.linalg.solve(hints.T @ hints + ridge, hints.T @ added)
        net.pos_embed_input.weight.zero_()[:width] = fitted[:-1].T
        net.pos_embed_input.bias.zero_()[:width] = fitted[-1]
    state_dict.write_file(folder / "start.safetensors", net.state_dict(), checkpoint.metadata(net.config))
    return path.parent / "told.jsonl", sections, folder / "start.safetensors"


@pytest.mark.parametrize("seed", range(3))
def test_the_selection_learns_which_condition_shows_the_picture(telling, tmp_path, seed):
    """The order is shuffled while training, so a condition's place says nothing."""
    data_list, sections, start = telling
    settings = tiny_ponder.settings(
        data_list, tmp_path / "run", sections, f"init_from={start}", f"seed={seed}", "steps=24", "save_every=24",
        "optimizer.learning_rate=5e-4", "optimizer.warm_up=0", "recipe.min_conditions=2", "validation.every=24",
        "ema.decay=0")
    found = build.collection(settings)
    fresh = build.recipe(settings, found).validate(loader.fixed(found.held_out, settings.data))
    assert fresh["share_depth"] == 0
    tiny_run.train(settings)
    last = [line for line in tiny_pixart.log(tmp_path / "run") if "validation_share_depth" in line][-1]
    assert last["validation_share_depth"] > 0.9, last


def test_a_resumed_run_repeats_the_unbroken_run(path, parts, tmp_path):
    import os
    import signal

    def interrupt(one, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("validation.every=2", "save_every=5", "recipe.choices=2")
    unbroken, broken = (tiny_ponder.settings(path, tmp_path / n, parts, *words) for n in ("unbroken", "broken"))
    tiny_run.train(unbroken)
    tiny_run.train(broken, interrupt)
    tiny_run.train(broken)
    for name in ("model", "ema", "optimizer"):
        one, other = (checkpoints.read_tensors(tmp_path / n / f"checkpoints/00000006/{name}.safetensors")
                      for n in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not any(key.startswith("base.") for key in one)
    assert tiny_pixart.log(tmp_path / "unbroken") == tiny_pixart.log(tmp_path / "broken")


@pytest.fixture(scope="module")
def trained(path, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    hints = ",".join(str(path.parent / f"{kind}_red_card.png") for kind in ("canny", "depth"))
    tiny_run.train(tiny_ponder.settings(
        path, folder, parts, "steps=8", "optimizer.learning_rate=1e-2", "ema.decay=0", "samples.every=8",
        "save_every=8", "samples.prompts=[\"red card\"]", f"recipe.hints=[\"{hints}\"]", "samples.steps=2"))
    return folder


def test_samples_follow_the_hints_that_are_named(trained, path):
    assert Image.open(trained / "samples/00000008/00.png").size == (32, 32)
    recipe, _, _ = exporting.open_run(trained)
    named = recipe.sample(["red card"], 32, 32, 2, 1.0, 4.0, 0)
    free = recipe.sample(["red card"] * 2, 32, 32, 2, 1.0, 4.0, 0)[:1]  # not as many as recipe.hints
    conditions = {kind: torch.stack([recipes.pictures.shown(path.parent / f"{kind}_red_card.png", 32, 32)])
                  for kind in ("canny", "depth")}
    torch.testing.assert_close(recipe.sample(["red card"], 32, 32, 2, 1.0, 4.0, 0, conditions=conditions), named)
    assert (named - free).abs().max() > 1e-3


def test_a_finished_run_is_opened_without_the_files_of_its_base(made, parts, tmp_path):
    shutil.copy(parts["recipe"]["base"], tmp_path / "flux.safetensors")
    torch.manual_seed(0)
    net = hed.HED(hed.HEDConfig((4, 4, 4, 4, 4), (1, 1, 1, 1, 1)))
    state_dict.write_file(tmp_path / "hed.safetensors", net.state_dict())
    tiny_run.train(made(f"recipe.base={tmp_path}/flux.safetensors", 'recipe.annotators=["hed"]', "steps=1",
                        f"recipe.hed={tmp_path}/hed.safetensors", f"cache.folder={tmp_path}/cache"))
    for name in ("flux", "hed"):
        (tmp_path / f"{name}.safetensors").unlink()
    (file,) = exporting.export(tmp_path / "run", tmp_path / "out", "tiny")
    assert checkpoint.read(*state_dict.read_file(file))[0].selector


def test_sample_draws_after_the_conditions_of_a_data_set(trained, path, tmp_path):
    cli.main(["sample", str(trained), "--data", str(path), "--count", "2", "--batch", "2", "--steps", "1",
              "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/000001.png").size == (32, 32)


def test_a_dry_run_says_what_would_happen(path, parts, tmp_path, capsys):
    raw = {"recipe": {"name": "pixelponder", **parts["recipe"]}, "model": tiny_ponder.MODEL, "text": parts["text"],
           "vae": parts["vae"], "data": {"path": str(path), **tiny_ponder.IMAGE}}
    lines = ["steps = 6", "batch_size = 6", 'device = "cpu"', f'out = "{tmp_path}/run"']
    for section, values in raw.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    (tmp_path / "tiny.toml").write_text("\n".join(lines))
    cli.main(["train", str(tmp_path / "tiny.toml"), "--dry-run", "micro_batch_size=3"])
    output = capsys.readouterr().out
    frozen = sum(v.numel() for v in Flux(tiny_ponder.FLUX).state_dict().values())
    for part in ("6 pictures of 32x32 pixels, 4 tokens each, and 12 of text", f"learn, {frozen:,} frozen", "sigma ",
                 "memory     about"):
        assert part in output, part
    assert not (tmp_path / "run").exists()


# --- In ComfyUI


def test_comfyui_makes_of_an_export_what_the_trainer_makes(trained, host, path):
    """Core's FLUX under our node with the trained file, along core's sampler: the same latents, the same map."""
    import test_nodes_pixelponder as node

    core, comfy = import_module("nodes"), import_module("comfy")
    for name in ("sample", "samplers", "model_detection", "ldm.flux.model"):
        import_module(f"comfy.{name}")
    (file,) = exporting.export(trained, Path(host.models), "tiny_trained_ponder", dtype="fp32")
    recipe, config, _ = exporting.open_run(trained)
    recipe.load_base()
    state_dict.write_file(Path(host.models) / "diffusion_models/tiny_trained_flux.safetensors",
                          recipe.base.state_dict())
    there = node.SimpleNamespace(host=host, core=core, comfy=comfy, nodes=core.NODE_CLASS_MAPPINGS)
    there.model = core.UNETLoader().load_unet("tiny_trained_flux.safetensors", "default")[0]
    there.control = node.load(there, file.name, selection_network="leave out")
    hints = {kind: recipes.pictures.shown(path.parent / f"{kind}_red_card.png", 32, 32)[None]
             for kind in ("canny", "depth")}
    row = ()
    for kind, hint in hints.items():
        row = node.condition(there, kind, before=row, image=hint.movedim(1, -1).float() / 255)
    condition = recipe.flow.condition(["red card"], "cpu")
    text = [[condition["context"], {"pooled_output": condition["pooled"], "guidance": 4.0}]]
    positive, _ = node.apply(there, row, text, text, strength=1.0, strategy="accumulate", rounds=1)
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    theirs = node.draw(there, positive, text, noise=noise)
    select, shares = recipe.select([(kind, hint / 127.5 - 1) for kind, hint in hints.items()]), []

    @torch.no_grad()
    def predict(x, sigma):
        prediction, control = recipe.predict(x, sigma, condition, select)
        shares.append(control.selection.share)
        return prediction

    ours = FLOW.sample(predict, noise, node.sigmas(there))
    node.close(theirs, ours)
    shown = next(e["control"] for _, e in positive).shown.share
    assert torch.equal(shown, shares[-1])
    alone = FLOW.sample(lambda x, t: recipe.predict(x, t, condition, None)[0].detach(), noise, node.sigmas(there))
    node.differ(theirs, alone)


def test_a_card_names_the_base_and_the_nodes_of_its_family(trained, tmp_path):
    cards.write_card(trained, tmp_path, exporting.export(trained, tmp_path, "tiny"))
    card = (tmp_path / "tiny.md").read_text()
    assert "It stands on `flux.safetensors`, whose licence applies." in card
    assert "Load it with 'Load PixelPonder'" in card and "PixArt" not in card
    assert "| model.selector_width | 128 |" in card and "| text.max_length | 12 |" in card
