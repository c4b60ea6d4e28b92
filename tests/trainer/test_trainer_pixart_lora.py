"""LoRA, DoRA and DreamBooth on PixArt: what learns, what is exported, and that ComfyUI applies it at the same scale."""
from importlib import import_module
from pathlib import Path

import pytest
import tiny_pixart
import tiny_run
import torch
from merged_lora import merge
from PIL import Image
from pixstack.models_impl import lora, state_dict
from pixstack.models_impl.pixart.lora import names
from pixstack.trainer.cli import main as cli
from pixstack.trainer.data import loader as data
from pixstack.trainer.export import exporting
from pixstack.trainer.recipes import adapters
from tiny_pixart import recipe_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    tiny_pixart.released(file)
    return file


@pytest.fixture
def made(path, parts, base, tmp_path):
    def settings(*words, recipe="pixart_lora", **more):
        return tiny_pixart.settings(path, tmp_path / "run", parts, f"init_from={base}", *words, recipe=recipe,
                                    **{"model": {}, **more})
    return settings


def test_only_the_adapter_learns_and_is_saved(made, tmp_path):
    recipe, _ = tiny_run.train(made("steps=2", "adapter.rank=4"))
    learns = {n for n, p in recipe.named_parameters() if p.requires_grad}
    assert learns and all(".lora_A." in n or ".lora_B." in n for n in learns)
    from pixstack.trainer.training.checkpoints import read_tensors

    saved = read_tensors(tmp_path / "run/checkpoints/00000002/model.safetensors")
    assert saved.keys() == learns | {"net.y_embedder.y_embedding"}


def test_it_begins_as_the_base_was(made, base):
    recipe, _ = recipe_of(made())
    torch.manual_seed(0)
    for name, p in recipe.net.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(p)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        ours = recipe.net(x, t, context)
        with adapters.without(recipe.net):
            assert torch.equal(ours, recipe.net(x, t, context))


@pytest.mark.parametrize("words", [
    (), ("adapter.dora=true",), ("adapter.rslora=true", "adapter.alpha=3"), ("adapter.kind=loha", "adapter.alpha=3"),
    ("adapter.kind=lokr", "adapter.alpha=3"), ("adapter.kind=lokr", "adapter.factor=3", "adapter.alpha=3"),
    ("adapter.kind=lokr", "adapter.rank=64", "adapter.alpha=3"), ("adapter.kind=oft",),
    ("adapter.kind=oft", "adapter.rank=7", 'adapter.targets=["qkv", "x_embedder.proj"]'),
], ids=["lora", "dora", "rslora", "loha", "lokr", "lokr-factor", "lokr-whole", "oft", "oft-kernel"])
def test_what_is_exported_makes_of_the_base_what_the_trainer_had(made, base, words):
    recipe, _ = recipe_of(made("adapter.rank=4", *words))
    for name, p in recipe.net.named_parameters():
        if "magnitude" in name:
            p.data *= 1.2
        if "lokr_" in name or "hada_" in name:
            p.data *= 4
        if "oft_" in name:
            torch.nn.init.normal_(p, std=0.3)
    tensors, metadata = recipe.files()["loras/{name}.safetensors"]
    weights = state_dict.read_file(base)[0]
    found = lora.read(tensors, names({k: v.shape for k, v in weights.items()}), metadata)
    assert not found.unmatched
    from pixstack.models_impl.pixart.model import PixArt

    merged = PixArt(recipe.net.config)
    merged.load_state_dict(merge(weights, found))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 16)
    with torch.no_grad():
        ours, theirs = recipe.net(x, t, context), merged(x, t, context)
        with adapters.without(recipe.net):
            plain = recipe.net(x, t, context)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.01


@pytest.fixture(scope="module")
def trained(path, parts, base, tmp_path_factory):
    """A run of a kind of adapter, trained long enough that its change shows."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("trained") / "run"
            settings = tiny_pixart.settings(path, made[kind], parts, f"init_from={base}", "steps=8", "save_every=8",
                                            "optimizer.learning_rate=3e-2", "optimizer.warm_up=0", "ema.decay=0.0",
                                            "adapter.rank=4", f"adapter.alpha={0 if kind == 'oft' else 2}",
                                            f"adapter.kind={kind}",
                                            recipe="pixart_lora", model={})
            tiny_run.train(settings)
        return made[kind]

    return of


def predicted(model):
    """What a MODEL of ComfyUI predicts, its patches applied."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    model.patch_model()
    try:
        with torch.no_grad():
            return model.model.diffusion_model(x, torch.tensor([321.0]), context)
    finally:
        model.unpatch_model()


def trainers(recipe):
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        return recipe.net(x, torch.tensor([321.0]), context)[:, :4]


@pytest.mark.parametrize("kind, loader, to", [
    ("lora", "ours", ""), ("lora", "ours", "kohya"), ("lora", "ours", "diffusers"), ("lora", "core", ""),
    ("loha", "ours", ""), ("loha", "core", ""), ("lokr", "ours", ""), ("lokr", "core", ""), ("lokr", "core", "kohya"),
    ("oft", "ours", ""), ("oft", "core", ""), ("oft", "core", "kohya"), ("oft", "ours", "diffusers"),
])
def test_comfyui_applies_an_export_at_the_scale_it_was_trained_with(trained, base, host, tmp_path, kind, loader, to):
    models, trained = Path(host.models), trained(kind)
    (file,) = exporting.export(trained, models, "tiny_trained", dtype="fp32")
    if to:
        cli.main(["convert", str(file), str(models / "loras/tiny_converted.safetensors"), "--to", to, "--overwrite",
                  "--base", str(base)])
        file = models / "loras/tiny_converted.safetensors"
    (models / "diffusion_models/tiny_lora_base.safetensors").write_bytes(base.read_bytes())
    nodes = import_module("nodes").NODE_CLASS_MAPPINGS
    model = nodes["PixStack_PixArtLoader"].execute(
        model_name="tiny_lora_base.safetensors", variant="auto", prediction="auto", positions="auto", weights="ema",
        dtype="fp32").args[0]
    if loader == "ours":
        applied = nodes["PixStack_PixArtLoraLoader"].execute(model=model, lora_name=file.name, strength=1.0,
                                                             alpha=0.0).args[0]
    else:
        applied = nodes["LoraLoaderModelOnly"]().load_lora_model_only(model, file.name, 1.0)[0]
    recipe, _, _ = exporting.open_run(trained)
    wanted = trainers(recipe)
    torch.testing.assert_close(predicted(applied), wanted, rtol=1e-3, atol=1e-4)
    assert (predicted(model) - wanted).abs().max() > 0.02


def test_a_lora_trains_on_a_base_in_half_precision(made):
    recipe, batches = recipe_of(made("precision=bf16"))
    assert {p.dtype for p in recipe.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in recipe.parameters() if p.requires_grad} == {torch.float32}
    recipe(batches(0, range(6))).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in recipe.parameters() if p.requires_grad)


@pytest.mark.parametrize("words, part", [
    (("adapter.rank=0",), "adapter.rank=0 must be at least 1"),
    (("adapter.kind=lokr", "adapter.dora=true"), "adapter.dora=true is for adapter.kind='lora'"),
    (("adapter.kind=loca",), "adapter.kind='loca' is none of lora, loha, lokr, oft; did you mean"),
    (("adapter.kind=oft", "adapter.alpha=3"), "adapter.alpha does not count with adapter.kind='oft'"),
    (("adapter.kind=oft", "adapter.dropout=0.1"), "adapter.dropout is for adapter.kind='lora'"),
    (("adapter.factor=4",), "is for adapter.kind='lokr'"),
    (("adapter.rnk=4",), "adapter.rnk is not a setting; did you mean rank"),
    (("init_from=",), "init_from is empty"),
    (("recipe.name=pixart", "adapter.rank=4"), "[adapter] is not read by recipe.name='pixart'"),
])
def test_a_setting_that_cannot_work_is_refused(made, words, part):
    with pytest.raises(ValueError) as caught:
        made(*words)
    assert part in str(caught.value)


def test_a_target_that_is_no_layer_is_refused_with_those_that_are(made):
    with pytest.raises(ValueError, match=r"no layer's name ends with to_q. There are, for instance, .*attn.qkv"):
        recipe_of(made('adapter.targets=["to_q"]'))


def test_training_lowers_the_loss(made, tmp_path):
    tiny_run.train(made("steps=60", "optimizer.learning_rate=1e-2", "optimizer.warm_up=0", "save_every=60"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


# --- DreamBooth


@pytest.fixture
def subject(made, tmp_path):
    """Settings for three pictures of a subject and two of its class."""
    for name, number in (("subject", 3), ("class", 2)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new("RGB", (64, 64), (50 * i, 90, 20 if name == "class" else 200)).save(tmp_path / name / f"{i}.png")

    def settings(*words):
        sections = {"data": {"kind": "folder", "path": str(tmp_path / "subject"), "caption": "a photo of sks dog",
                             "prior_path": str(tmp_path / "class"), "prior_caption": "a photo of a dog",
                             "prior_share": 0.5, **tiny_pixart.IMAGE}}
        return made("batch_size=4", *words, recipe="pixart_dreambooth", **sections)
    return settings


def test_prior_pictures_count_as_their_weight_says(subject):
    recipe, batches = recipe_of(subject("recipe.prior_weight=0.25"))
    batch = batches(0, range(4))
    assert batch.prior.tolist().count(True) == 2
    plain = sum(recipe.losses(batch, *recipe.denoising.drawn(batch, 0.0), 0))
    expected = plain[~batch.prior].mean() + 0.25 * plain[batch.prior].mean()
    torch.testing.assert_close(recipe(batch).mean(), expected)
    assert {"a photo of sks dog", "a photo of a dog"} == set(batch.captions)


@pytest.mark.parametrize("whole", [False, True])
def test_a_subject_is_learned_by_a_lora_or_by_all_weights(subject, whole, tmp_path):
    recipe, _ = tiny_run.train(subject(f"recipe.lora={str(not whole).lower()}", "steps=2"))
    learns = [n for n, p in recipe.named_parameters() if p.requires_grad]
    assert all(".lora_" in n for n in learns) != whole
    (file,) = exporting.export(tmp_path / "run", tmp_path / "out", "dog")
    assert file.parent.name == ("diffusion_models" if whole else "loras")


def test_training_on_a_subject_lowers_the_loss(subject, tmp_path):
    tiny_run.train(subject("steps=60", "optimizer.learning_rate=1e-2", "optimizer.warm_up=0", "save_every=60"))
    losses = [line["loss"] for line in tiny_pixart.log(tmp_path / "run")]
    assert sum(losses[-15:]) < 0.95 * sum(losses[:15])


def test_the_class_pictures_are_cached_with_the_others(subject, tmp_path):
    from pixstack.trainer.features import cache
    from pixstack.trainer.training import build

    settings = subject(f"cache.folder={tmp_path / 'cache'}")
    found = build.collection(settings)
    recipe = build.recipe(settings, found)
    cache.fill(found.train, settings.data, recipe.encoders, tmp_path / "cache", "cpu")
    messages = []
    load = cache.loader(settings, recipe.encoders, found.train, settings.data, messages.append)
    assert messages == []
    batch = data.Batches(found.train, settings.data, 0, 4, load)(0, range(4))
    assert recipe(batch).isfinite().all()
