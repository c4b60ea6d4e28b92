import random
from dataclasses import replace

import pytest
import tiny_run
import torch
from pixstack.models_impl import state_dict
from pixstack.models_impl.pixelflow import checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.trainer.config import schema
from pixstack.trainer.data import loader
from pixstack.trainer.recipes import adapters
from pixstack.trainer.training import build, optim
from pixstack.trainer.training.groups import Group
from torch._dynamo.testing import CompileCounter


@pytest.fixture
def path(tmp_path):
    return tiny_run.pictures(tmp_path / "set")


def recipe_of(path, tmp_path, *words, **sections):
    """A recipe whose zero-initialised parts are filled, so that every part of the network shows in its loss."""
    settings = tiny_run.settings(path, tmp_path / "run", "precision=fp32", *words, **sections)
    found = build.collection(settings)
    recipe = build.recipe(settings, found)
    torch.manual_seed(1)
    for p in recipe.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return recipe, loader.Batches(found.train, settings.data, settings.seed, settings.batch_size)


CLASSES = {"text": {}, "samples": {"classes": [0, 3]}}


@pytest.mark.parametrize("sections", [{}, CLASSES], ids=["text", "class"])
def test_packed_stages_give_the_losses_of_stages_one_by_one(path, tmp_path, sections):
    losses = []
    for packing in ("dense", "packed"):
        words = (f"recipe.packing={packing}", "model.num_stages=3", "batch_size=7")
        recipe, batches = recipe_of(path, tmp_path, *words, **sections)
        losses.append(recipe(batches(0, range(7))))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_micro_batches_give_the_losses_of_the_whole_batch(path, tmp_path):
    recipe, batches = recipe_of(path, tmp_path)
    whole = recipe(batches(2, range(6)))
    parts = torch.cat([recipe(batches(2, range(s, s + 2))) for s in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_papers(path, tmp_path):
    """At the start the network says zero, so a picture's loss is the mean square of end - start."""
    settings = tiny_run.settings(path, tmp_path / "run", "precision=fp32", "model.num_stages=1")
    recipe = build.recipe(settings, build.collection(settings))
    batch = loader.Batches(build.collection(settings).train, settings.data, 0, 6)(0, range(6))
    from pixstack.trainer.recipes.pixelflow.recipe import picture_noise
    noise = torch.stack([picture_noise(0, 0, p, (3, 16, 16), "cpu") for p in range(6)])
    expected = (batch.pictures / 127.5 - 1 - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(recipe(batch), expected)


def test_stage_weights_move_pictures_to_the_low_stages(path, tmp_path):
    recipe, _ = recipe_of(path, tmp_path, "recipe.stage_weights=[5,1]")
    assert sum(int((recipe.draw(step)[0].stage == 0).sum()) for step in range(50)) == pytest.approx(250, abs=15)


def test_dropout_takes_its_share_of_the_captions(path, tmp_path):
    recipe, _ = recipe_of(path, tmp_path, "recipe.dropout=0.25")
    assert sum(int(recipe.draw(step)[1].sum()) for step in range(200)) == pytest.approx(300, abs=50)


def test_a_dropped_class_is_the_null_class(path, tmp_path):
    recipe, _ = recipe_of(path, tmp_path, **CLASSES)
    labels = recipe.condition([], torch.tensor([0, 1]), [True, False])["class_labels"]
    assert labels.tolist() == [recipe.diffusion.config.num_classes, 1]


def test_activation_checkpointing_leaves_gradients_as_they_are(path, tmp_path):
    gradients = []
    for word in ("checkpoint_activations=false", "checkpoint_activations=true"):
        recipe, batches = recipe_of(path, tmp_path, word)
        recipe(batches(0, range(6))).mean().backward()
        gradients.append([p.grad for p in recipe.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_validation_says_the_same_twice(path, tmp_path):
    recipe, batches = recipe_of(path, tmp_path)
    fixed = loader.fixed(batches.items, batches.settings)
    first = recipe.validate(fixed)
    assert recipe.validate(fixed) == first and set(first) == {"loss", "standard_error", "stage0", "stage1"}


def test_validation_in_small_batches_says_the_same(path, tmp_path):
    recipe, batches = recipe_of(path, tmp_path)
    whole, parts = (recipe.validate(loader.fixed(batches.items, batches.settings, n)) for n in (64, 3))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_training_starts_from_a_released_checkpoint(path, tmp_path):
    shape = PixelFlowConfig(heads=1, head_dim=72, depth=1, num_classes=len(tiny_run.COLOURS))
    released = PixelFlow(shape).initialise().state_dict()
    torch.save(released, tmp_path / "model.pt")
    recipe, _ = recipe_of(path, tmp_path, f"init_from={tmp_path / 'model.pt'}", "data.resolution=32",
                          **{**CLASSES, "model": {}})
    own = recipe.diffusion.state_dict()
    for key in ("patch_embed.proj.weight", "transformer_blocks.0.mlp.fc1.weight",
                "class_embedder.embedding_table.weight"):
        assert torch.equal(own[key], released[key]), key


def test_other_classes_than_the_checkpoints_get_a_new_table(path, tmp_path):
    shape = PixelFlowConfig(heads=1, head_dim=72, depth=1, num_classes=4)
    torch.save(PixelFlow(shape).initialise().state_dict(), tmp_path / "model.pt")
    recipe, _ = recipe_of(path, tmp_path, f"init_from={tmp_path / 'model.pt'}", "data.resolution=32",
                          **{**CLASSES, "model": {}})
    assert recipe.diffusion.class_embedder.embedding_table.weight.shape[0] == len(tiny_run.COLOURS) + 1


def test_training_starts_from_our_own_export(path, tmp_path):
    shape = PixelFlowConfig(heads=2, head_dim=8, depth=1, context_dim=16, num_stages=2, resolution=32)
    weights = PixelFlow(shape).initialise().state_dict()
    state_dict.write_file(tmp_path / "own.safetensors", weights, checkpoint.metadata(shape))
    recipe, _ = recipe_of(path, tmp_path, f"init_from={tmp_path / 'own.safetensors'}", model={})
    assert recipe.diffusion.config.num_stages == 2 and recipe.diffusion.config.resolution == 16
    assert torch.equal(recipe.diffusion.state_dict()["patch_embed.proj.weight"], weights["patch_embed.proj.weight"])


@pytest.mark.parametrize("given, sections, now", [
    ({"context_dim": 24}, {**CLASSES, "model": {}}, (len(tiny_run.COLOURS), None)),
    ({"num_classes": 7}, {"model": {}}, (0, 16)),
])
def test_a_trunk_is_taken_from_a_network_with_another_condition(path, tmp_path, given, sections, now):
    shape = PixelFlowConfig(heads=2, head_dim=8, depth=1, num_stages=2, resolution=32, **given)
    weights = PixelFlow(shape).initialise().state_dict()
    state_dict.write_file(tmp_path / "trunk.safetensors", weights, checkpoint.metadata(shape))
    recipe, batches = recipe_of(path, tmp_path, f"init_from={tmp_path / 'trunk.safetensors'}", "recipe.trunk=true",
                                **sections)
    own = recipe.diffusion.state_dict()
    for key in ("patch_embed.proj.weight", "timestep_embedder.linear_1.weight",
                "transformer_blocks.0.attn1.q_proj.weight", "transformer_blocks.0.mlp.fc1.weight"):
        assert torch.equal(own[key], weights[key]), key
    assert (recipe.diffusion.config.num_classes, recipe.diffusion.config.context_dim) == now
    assert torch.isfinite(recipe(batches(0, range(6)))).all()


def test_a_trunk_that_lacks_a_weight_is_refused(path, tmp_path):
    shape = PixelFlowConfig(heads=2, head_dim=8, depth=1, num_stages=2, resolution=32, context_dim=24)
    weights = PixelFlow(shape).initialise().state_dict()
    del weights["proj_out_1.bias"]
    state_dict.write_file(tmp_path / "trunk.safetensors", weights, checkpoint.metadata(shape))
    with pytest.raises(ValueError, match="1 missing: proj_out_1.bias"):
        recipe_of(path, tmp_path, f"init_from={tmp_path / 'trunk.safetensors'}", "recipe.trunk=true",
                  **{**CLASSES, "model": {}})


def test_muon_takes_the_matrices_of_the_blocks_only(path, tmp_path):
    settings = tiny_run.settings(path, tmp_path / "run", "optimizer.name=muon")
    recipe = build.recipe(settings, build.collection(settings))
    adamw, muon = optim.Optimizers(recipe.groups(settings), settings.optimizer, 10).parts
    names = {id(p): n for n, p in recipe.named_parameters()}
    chosen = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert "diffusion.transformer_blocks.0.attn1.q_proj.weight" in chosen
    assert "text.t5.encoder.block.0.layer.0.SelfAttention.q.weight" in chosen
    assert not any(w in n for n in chosen for w in ("embed", "proj_out", "bias", "norm", "shared"))
    assert len(chosen) + sum(len(g["params"]) for g in adamw.param_groups) == len(list(recipe.parameters()))


def test_muon_trains_a_kernel_as_the_matrix_of_what_each_output_channel_reads():
    settings = schema.Optimizer(name="muon", muon_learning_rate=0.1)
    kernel = torch.nn.Parameter(torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    ours = optim.Optimizers([Group([("k", kernel)], matrices={"k"})], settings, 10)
    torchs = torch.optim.Muon([matrix], lr=0.1, momentum=settings.muon_momentum, weight_decay=settings.weight_decay,
                              adjust_lr_fn="original")
    for _ in range(2):
        kernel.grad = torch.randn(6, 3, 3, 3)
        matrix.grad = kernel.grad.flatten(1)
        ours.step(9999)
        assert kernel.grad is None
        torchs.step()
        assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_muon_leaves_depthwise_kernels_to_adamw():
    kernel = torch.nn.Parameter(torch.randn(6, 1, 2, 2))
    group = Group([("k", kernel)], matrices={"k"})
    parts = optim.Optimizers([group], schema.Optimizer(name="muon"), 10).parts
    assert [type(part) for part in parts] == [torch.optim.AdamW]


@pytest.mark.parametrize("decay, at_half, at_end", [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0),
                                                    ("rex", 2 / 3, 0)])
def test_the_rate_warms_up_then_decays(decay, at_half, at_end):
    settings = schema.Optimizer(warm_up=10, decay=decay)
    assert optim.learning_rate_share(4, 1000, settings) == pytest.approx(0.5, abs=0.01)
    assert optim.learning_rate_share(500, 1000, settings) == pytest.approx(at_half)
    assert optim.learning_rate_share(1000, 1000, settings) == pytest.approx(at_end)


def test_restarts_are_those_of_torch():
    settings = schema.Optimizer(decay="cosine_restarts", decay_cycles=3, decay_to=0.1)
    torchs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(torchs, T_0=100, eta_min=0.1)
    for step in range(300):
        assert optim.learning_rate_share(step, 300, settings) == pytest.approx(schedule.get_last_lr()[0]), step
        torchs.step()
        schedule.step()


def test_rex_is_that_of_pytorch_optimizer():
    from pytorch_optimizer import REXScheduler

    settings = schema.Optimizer(decay="rex", decay_to=0.1)
    schedule = REXScheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 50, max_lr=1.0, min_lr=0.1)
    for step in range(1, 50):  # the library took step 0 as it was made
        assert optim.learning_rate_share(step, 50, settings) == pytest.approx(schedule.step())


@pytest.mark.parametrize("decay", ["linear", "cosine", "rex"])
def test_a_decay_starts_and_ends_where_the_settings_say(decay):
    settings = schema.Optimizer(decay=decay, decay_from=0.8, decay_to=0.25)
    shares = [optim.learning_rate_share(step, 100, settings) for step in (0, 79, 80, 100)]
    assert shares == pytest.approx([1, 1, 1, 0.25])


def test_a_vocabulary_smaller_than_the_captions_signs_is_refused():
    from pixstack.trainer.features import tokenizer

    with pytest.raises(ValueError, match="text.vocabulary=8 is too small for these captions, in which 27 different"):
        tokenizer.train(["the quick brown fox", "jumps over a lazy dog"], 8)


@pytest.fixture(scope="module")
def outside_t5(tmp_path_factory):
    """A T5 as transformers saves one."""
    from pixstack.trainer import libraries
    from pixstack.trainer.features import tokenizer

    libraries.hide_broken_torchvision()
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    made = tokenizer.train([f"a {c} {s}" for c in tiny_run.COLOURS for s in ("square", "card")], 60)
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(shape).save_pretrained(folder)
    return folder


def test_a_frozen_encoder_embeds_every_caption_once(path, tmp_path, outside_t5):
    recipe, batches = recipe_of(path, tmp_path, text={"encoder": str(outside_t5), "cache": str(tmp_path / "cache")})
    assert not list(recipe.text.parameters()) and recipe.diffusion.config.context_dim == 16
    before = recipe.text.lookup(["a red square", ""], "cpu")
    recipe.text.prepare(["", *(c for i in batches.items for c in i.captions)], "cpu")
    assert recipe.text.encoder == [] and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    again, _ = recipe_of(path, tmp_path, text={"encoder": str(outside_t5), "cache": str(tmp_path / "cache")})
    again.text.embed = None  # nothing is left to embed
    for a, b in zip(before, again.text.lookup(["a red square", ""], "cpu"), strict=True):
        assert torch.equal(a, b)
    assert again(batches(0, range(6))).isfinite().all()


def lora_settings(path, tmp_path, *words):
    """A PixelFlow LoRA on a file of ours, none of whose weights is zero."""
    shape = PixelFlowConfig(heads=2, head_dim=8, depth=1, context_dim=16, num_stages=2, resolution=16)
    torch.manual_seed(0)
    weights = {k: 0.1 * torch.randn_like(v) for k, v in PixelFlow(shape).state_dict().items()}
    state_dict.write_file(tmp_path / "base.safetensors", weights, checkpoint.metadata(shape))
    return tiny_run.settings(path, tmp_path / "run", f"init_from={tmp_path / 'base.safetensors'}", "recipe.lora=true",
                             "adapter.rank=4", "text.learn=false", "precision=fp32", "optimizer.learning_rate=3e-2",
                             "ema.decay=0.0", *words, model={}), weights


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_a_pixelflow_lora_does_in_comfyui_what_it_does_in_the_trainer(path, tmp_path, host, kind):
    from importlib import import_module
    from pathlib import Path

    from pixstack.trainer.export import exporting

    settings, weights = lora_settings(path, tmp_path, f"adapter.kind={kind}")
    tiny_run.train(settings)
    models = Path(host.models)
    (models / "diffusion_models/tiny_flow_base.safetensors").write_bytes((tmp_path / "base.safetensors").read_bytes())
    (file,) = [f for f in exporting.export(tmp_path / "run", models, "tiny_flow", dtype="fp32") if "loras" in str(f)]
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    model = nodes["PixStack_PixelFlowLoader"].execute("tiny_flow_base.safetensors", "ema", "default").args[0]
    model = nodes["LoraLoaderModelOnly"]().load_lora_model_only(model, file.name, 1.0)[0]
    model.patch_model()
    patched = model.model.diffusion_model.state_dict()
    recipe, _, _ = exporting.open_run(tmp_path / "run")
    rng = torch.Generator().manual_seed(0)
    for name, layer in adapters.adapted(recipe.diffusion).items():
        x = torch.randn(3, layer.base_layer.in_features, generator=rng)
        own = {part: patched.get(f"{name}.{part}") for part in ("weight", "bias")}
        theirs = torch.nn.functional.linear(x, **{part: v if v is None else v.float() for part, v in own.items()})
        torch.testing.assert_close(theirs, layer(x).detach(), rtol=1e-3, atol=2e-3)
        assert (patched[f"{name}.weight"] - weights[f"{name}.weight"]).abs().max() > 0.01
    model.unpatch_model()


def test_only_the_adapter_of_a_pixelflow_lora_learns(path, tmp_path):
    settings, _ = lora_settings(path, tmp_path)
    recipe = build.recipe(settings, build.collection(settings))
    learns = [n for group in recipe.groups(settings) for n, _ in group.params]
    assert learns and all(".lora_" in n for n in learns)


def test_a_pixelflow_lora_needs_a_base(path, tmp_path):
    with pytest.raises(ValueError, match="init_from is empty: recipe.lora=true"):
        tiny_run.settings(path, tmp_path / "run", "recipe.lora=true")


def test_an_encoder_that_is_none_is_refused_by_name(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="text.encoder="):
        recipe_of(path, tmp_path, text={"encoder": str(tmp_path / "empty")})


def test_a_compiled_pixelflow_has_the_same_graphs_whatever_the_lengths_of_captions(path, tmp_path):
    recipe, batches = recipe_of(path, tmp_path, "recipe.packing=packed", "batch_size=4")
    counter, rng = CompileCounter(), random.Random(0)

    def losses():
        for step in range(3):
            captions = [" ".join(["red card"] * rng.randint(1, 9)) for _ in range(4)]
            yield recipe(replace(batches(step, range(4)), captions=captions)).detach()

    plain = list(losses())
    recipe.compile_blocks(backend=counter)
    rng = random.Random(0)
    counts, compiled = zip(*((counter.frame_count, loss) for loss in losses()), strict=True)
    assert len(set(counts)) == 1 and counts[0] > 0
    torch.testing.assert_close(list(compiled), plain)
