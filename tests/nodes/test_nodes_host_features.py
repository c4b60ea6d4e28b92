"""What ComfyUI does with a MODEL, CLIP, VAE or CONTROL_NET of ours without asking a node of ours: torch.compile, LoRAs
and ControlNets together, hooks, other devices, several GPUs, prefetch. Under DynamicVRAM most of it makes the network
again from its file: tests/nodes/test_dynamic_vram.py runs these tests so too."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import cascade_weights as cascade
import dynamic_vram
import pytest
import torch
import weights
from pixstack.models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.state_dict import write_file

pytestmark = pytest.mark.long

CLOSE = dict(rtol=1e-4, atol=1e-4)  # of a compiled network, whose operations torch may regroup
FAMILIES = ("pixart", "pixelflow", "pixelponder", "ultrapixel")


@pytest.fixture(scope="module")
def core(host):
    """ComfyUI's modules and nodes, and ours by their short names."""
    package = next(name for name in sys.modules if name.endswith(".nodes.host"))
    core = SimpleNamespace(host=host, nodes=import_module("nodes").NODE_CLASS_MAPPINGS, mm=import_module(
        "comfy.model_management"), **{name: import_module(f"comfy.{name}") for name in (
            "hooks", "sample", "samplers", "sd", "model_patcher", "patcher_extension", "controlnet", "lora")})
    core.ours = SimpleNamespace(**{name: import_module(f"{package}.{file}") for name, file in {
        "pixart": "pixart.load", "pixelflow": "pixelflow.load", "flux": "flux.load",
        "text": "common.text", "patcher": "common.patcher", "prefetch": "common.prefetch",
        "pixart_lora": "pixart.lora", "pixart_control": "pixart.control", "control": "common.control",
        "pixelponder": "pixelponder.load",
        "ultrapixel": "ultrapixel.guide", "ultrapixel_sampling": "ultrapixel.sampling",
        "ultrapixel_stage_a": "ultrapixel.stage_a", "ultrapixel_stage_b": "ultrapixel.stage_b"}.items()})
    return core


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, core):
    """model, and draw(model=..., hooks=..., ) of one family; weight: a large one of the network."""
    return {"pixart": _pixart, "pixelflow": _pixelflow, "pixelponder": _pixelponder, "ultrapixel": _ultrapixel}[
        request.param](core)


def run(core, node: str, **inputs):
    return core.nodes[f"PixStack_{node}"].execute(**inputs).args


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(width, length=6, seed=1, **entries):
    return [[randn(1, length, width, seed=seed), entries]]


def hooked(conditioning, hooks):
    if hooks is None:
        return conditioning
    return [[tokens, {**entries, "hooks": hooks}] for tokens, entries in conditioning]


def sample(core, model, noise, positive, negative, cfg=3.0):
    with torch.inference_mode():
        return core.sample.sample(model, noise, 2, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise),
                                  disable_pbar=True, seed=7)


def _pixart(core):
    models, names = core.host.models, ("host_pixart.pth", "host_pixart_controlnet.pth", "host_pixart_vae.safetensors")
    weights.tiny_pixart(models / "diffusion_models" / names[0])
    weights.tiny_pixart_controlnet(models / "controlnet" / names[1], latent_scale=0.13025)
    weights.tiny_vae(models / "vae" / names[2])
    model = core.ours.pixart.load_pixart(models / "diffusion_models" / names[0], dtype=torch.float32)
    control = core.ours.pixart.load_pixart_controlnet(models / "controlnet" / names[1], torch.float32)

    def draw(model=model, hooks=None, control=None, lengths=(6, 4)):
        positive, negative = (hooked(text(4096, length, seed), hooks) for seed, length in enumerate(lengths, 1))
        if control is not None:
            hint = core.ours.pixart_control.with_hint(control, 1.0, 0.0, 1.0, latent=randn(1, 4, 8, 8, seed=3))
            positive, negative = core.ours.control.apply_control(hint, positive, negative)
        return sample(core, model, randn(1, 4, 8, 8, seed=5), positive, negative)

    return SimpleNamespace(name="pixart", model=model, draw=draw, control=control, weight="blocks.1.attn.qkv.weight",
                           blocks=[f"diffusion_model.blocks.{i}" for i in range(4)])


def _pixelflow(core):
    path = core.host.models / "diffusion_models" / "host_pixelflow.safetensors"
    config = PixelFlowConfig(heads=2, head_dim=40, depth=2, num_stages=2, resolution=64, context_dim=32)
    write_file(path, weights.random_state(PixelFlow(config)), pixelflow_checkpoint.metadata(config))
    model = core.ours.pixelflow.load_pixelflow(path, dtype=torch.float32)
    (sampler,) = run(core, "PixelFlowSampler", solver="euler", guidance="auto", custom_guidance="",
                     reference_noise=False, latent="auto")

    def draw(model=model, hooks=None, lengths=(6, 6)):
        (sigmas,) = run(core, "PixelFlowSigmas", model=model, steps="2", shift="1", start_stage=0, end_stage=-1)
        noise = randn(1, 3, 64, 64, seed=5)
        conditions = (hooked(text(32, length, seed), hooks) for seed, length in enumerate(lengths, 1))
        with torch.inference_mode():
            return core.sample.sample_custom(model, noise, 3.0, sampler, sigmas, *conditions, torch.zeros_like(noise),
                                             disable_pbar=True, seed=7)

    return SimpleNamespace(name="pixelflow", model=model, draw=draw, control=None,
                           weight="transformer_blocks.1.mlp.fc1.weight",
                           blocks=[f"diffusion_model.transformer_blocks.{i}" for i in range(2)])


def _pixelponder(core):
    models = core.host.models
    weights.tiny_emoji(models / "diffusion_models" / "flux_host.safetensors")
    weights.tiny_emoji(models / "controlnet" / "pixelponder_host.safetensors")
    model = core.ours.flux.load_flux(models / "diffusion_models" / "flux_host.safetensors", torch.float32)
    path = models / "controlnet" / "pixelponder_host.safetensors"
    control = core.ours.pixelponder.load_pixelponder(path, dtype=torch.float32)

    def draw(model=model, hooks=None, control=control):
        entries = {"pooled_output": randn(1, 8, seed=4), core.ours.text.FILLED: True}
        positive, negative = (hooked(text(192, 32, seed, **entries), hooks) for seed in (1, 2))
        if control is not None:
            (conditions,) = run(core, "PixelPonderCondition", image=torch.rand(
                1, 64, 64, 3, generator=torch.Generator().manual_seed(3)), kind="canny", conditions=(), strength=1.0,
                priority=0, start_percent=0.0, end_percent=1.0)
            positive, negative = run(core, "PixelPonderApply", positive=positive, negative=negative,
                                     control_net=control, conditions=conditions, strength=0.8, start_percent=0.0,
                                     end_percent=1.0, strategy="released", rounds=1)[:2]
        return sample(core, model, randn(1, 16, 8, 8, seed=5), positive, negative)

    return SimpleNamespace(name="pixelponder", model=model, draw=draw, control=control,
                           weight="double_blocks.1.img_attn.qkv.weight",
                           blocks=["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.1"])


def _ultrapixel(core):
    models = core.host.models
    cascade.tiny_stage_c(models / "diffusion_models" / "stage_c_host.safetensors")
    cascade.tiny_guide(models / "model_patches" / "ultrapixel_host.safetensors")
    cascade.tiny_canny(models / "controlnet" / "stage_c_host.safetensors")
    base = import_module("nodes").UNETLoader().load_unet("stage_c_host.safetensors", "default")[0]
    (control,) = import_module("nodes").ControlNetLoader().load_controlnet("stage_c_host.safetensors")
    (guide,) = run(core, "UltraPixelGuideLoader", guide_name="ultrapixel_host.safetensors")
    def put_guide(base):
        return run(core, "UltraPixelGuide", model=base, guide=guide, down=1.0, up=-1.0, rescale=0.7, shift=1.0)[0]

    model = put_guide(base)
    (sampler,) = run(core, "UltraPixelSampler", reference=False, low_latent={"samples": torch.zeros(1, 16, 4, 4)})

    def draw(model=model, hooks=None, control=None, steps=2):
        guider = core.samplers.CFGGuider(model)
        pooled = {"pooled_output": randn(1, cascade.TEXT, seed=4)}
        conditions = [hooked(text(cascade.TEXT, 6, seed, **pooled), hooks) for seed in (1, 2)]
        if control is not None:
            image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
            conditions = core.nodes["ControlNetApplyAdvanced"]().apply_controlnet(
                *conditions, control, image, 1.0, 0.0, 1.0)
        guider.set_conds(*conditions)
        guider.set_cfg(3.0)
        sigmas = core.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        noise = randn(1, 16, 8, 8, seed=5)
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=7, disable_pbar=True)

    return SimpleNamespace(name="ultrapixel", model=model, draw=draw, control=control, base=base, put_guide=put_guide,
                           weight="down_blocks.0.0.channelwise.0.weight",
                           blocks=["diffusion_model.down_blocks.0.2.attention",
                                   "diffusion_model.up_blocks.0.2.attention"])


def lora_of(family, rank=2, scale=0.3) -> dict[str, torch.Tensor]:
    """A LoRA under ComfyUI's own names for one weight of the network."""
    shape = family.model.model.diffusion_model.state_dict()[family.weight].shape
    name = "diffusion_model." + family.weight.removesuffix(".weight")
    return {f"{name}.lora_up.weight": scale * randn(shape[0], rank, seed=8),
            f"{name}.lora_down.weight": scale * randn(rank, shape[1], seed=9)}


def with_lora(core, family, model=None):
    known = core.lora.model_lora_keys_unet(family.model.model, {})
    patched = (model or family.model).clone()
    assert patched.add_patches(core.lora.load_lora(lora_of(family), known), 1.0), "core does not know this name"
    return patched


# --- LoRAs and hooks


def test_a_lora_of_core_changes_the_picture_and_leaves_with_its_clone(core, family):
    plain = family.draw()
    assert not torch.equal(family.draw(with_lora(core, family)), plain)
    assert torch.equal(family.draw(), plain)


def test_a_lora_as_a_hook_draws_what_it_draws_as_a_patch(core, family):
    plain, patched = family.draw(), family.draw(with_lora(core, family))
    hooks = core.hooks.create_hook_lora(lora_of(family), 1.0, 0.0)
    torch.testing.assert_close(family.draw(hooks=hooks), patched, **CLOSE)
    assert torch.equal(family.draw(), plain), "the hook stayed on the model"


def test_a_text_encoder_with_hooks_still_encodes(core):
    path = core.host.models / "text_encoders" / "host_t5.safetensors"
    weights.tiny_t5(path)
    clip = core.ours.text.load_t5(path, torch.float32)
    hooks = core.hooks.create_hook_lora(lora_of_text(), 0.0, 1.0)
    (hooked_clip,) = core.nodes["SetClipHooks"]().apply_hooks(clip, False, True, hooks)
    plain, found = (one.encode_from_tokens_scheduled(one.tokenize("a red apple")) for one in (clip, hooked_clip))
    assert found[0][1]["hooks"] is not None and "hooks" not in plain[0][1]
    if not core.ours.patcher.is_dynamic(clip.patcher):  # there core encodes with the network that has no hooks
        assert not torch.equal(found[0][0], plain[0][0])
    again = clip.encode_from_tokens_scheduled(clip.tokenize("a red apple"))
    assert torch.equal(again[0][0], plain[0][0]), "the hook stayed on the encoder"


def lora_of_text() -> dict[str, torch.Tensor]:
    name = "text_encoders.t5.transformer.encoder.block.0.layer.0.SelfAttention.o"
    return {f"{name}.lora_up.weight": randn(weights.WIDTH, 2), f"{name}.lora_down.weight": randn(2, 32, seed=1)}


# --- ControlNets


def test_a_controlnet_changes_the_picture_and_leaves_with_its_conditioning(family):
    if family.control is None:
        pytest.skip(f"there is no ControlNet for {family.name}")
    plain = family.draw(control=None)
    assert not torch.equal(family.draw(control=family.control), plain)
    assert torch.equal(family.draw(control=None), plain)


# --- torch.compile


def compiled(core, model, **how):
    """As TorchCompileModel does it, with a backend that needs no compiler."""
    torch_compile = import_module("comfy_extras.nodes_torch_compile")
    if how:
        model = model.clone(**{"disable_dynamic": True} if hasattr(model, "is_dynamic") else {})
        torch_compile.set_torch_compile_wrapper(model=model, backend="eager", **how)
        return model
    made = torch_compile.TorchCompileModel.execute(model, "eager")
    return made.args[0]


@pytest.fixture
def counted(core, monkeypatch):
    """The graphs that torch.compile's backend was given."""
    # Core's attention for a CPU asks the system for free memory, where every graph would end.
    ours = next(module for name, module in sys.modules.items() if name.endswith(".nodes.host.common.attention"))
    for module in (*map(import_module, ("comfy.ldm.cascade.common", "comfy.ldm.flux.math")), ours):
        monkeypatch.setattr(module, "optimized_attention",
                            import_module("comfy.ldm.modules.attention").attention_pytorch)
    graphs, dynamo = [], import_module("torch._dynamo.backends.debugging")
    import_module("torch._dynamo").reset()
    real = dynamo.eager

    def eager(graph, inputs, **options):
        graphs.append(graph)
        return real(graph, inputs)

    registry = import_module("torch._dynamo.backends.registry")
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", eager)
    yield graphs
    import_module("torch._dynamo").reset()


def test_a_compiled_model_draws_the_same_picture_with_its_lora_and_controlnet(core, family, counted):
    model, control = with_lora(core, family), {} if family.control is None else {"control": family.control}
    plain = family.draw(model, **control)
    assert not torch.equal(plain, family.draw(**control))
    assert not control or not torch.equal(plain, family.draw(model, control=None))
    torch.testing.assert_close(family.draw(compiled(core, model), **control), plain, **CLOSE)
    assert counted, "nothing was compiled"


def test_a_compiled_pixart_predicts_its_variance_too(core, counted):
    family = _pixart(core)
    (sampler,) = run(core, "PixArtSampler", algorithm="iddpm", order=2, eta=1.0, inpaint="core")
    (sigmas,) = run(core, "PixArtSigmas", model=family.model, schedule="iddpm (respaced)", steps=4, denoise=1.0,
                    timestep=400)

    def draw(model):
        noise = randn(1, 4, 8, 8, seed=5)
        with torch.inference_mode():
            return core.sample.sample_custom(model, noise, 3.0, sampler, sigmas, text(4096), text(4096, 6, 2),
                                             torch.zeros_like(noise), disable_pbar=True, seed=7)

    plain, model = draw(family.model), compiled(core, family.model)
    torch.testing.assert_close(draw(model), plain, **CLOSE)
    graphs = len(counted)
    draw(model)
    assert 0 < graphs == len(counted), "every run was compiled anew"


@pytest.mark.parametrize("make", [_pixart, _pixelflow])
def test_prompts_of_any_length_share_the_graphs_of_the_first_few(core, make, counted):
    family = make(core)
    model, graphs = compiled(core, family.model), []
    for length in (6, 9, 17, 5, 40):
        lengths = length, 4
        torch.testing.assert_close(family.draw(model, lengths=lengths), family.draw(lengths=lengths), **CLOSE)
        graphs.append(len(counted))
    assert 0 < graphs[2] == graphs[-1], f"graphs after each prompt: {graphs}"


def test_blocks_may_be_compiled_one_by_one(core, family, counted):
    plain = family.draw()
    torch.testing.assert_close(family.draw(compiled(core, family.model, keys=family.blocks)), plain, **CLOSE)
    assert counted, "nothing was compiled"


@pytest.fixture(scope="module")
def guided(core):
    return _ultrapixel(core)


def test_each_kind_of_step_of_a_compiled_guided_stage_c_is_one_graph_for_all_its_steps(core, guided, counted):
    model = compiled(core, guided.model, keys=["diffusion_model"], fullgraph=True)
    for steps in (3, 5):
        torch.testing.assert_close(guided.draw(model, steps=steps), guided.draw(steps=steps), **CLOSE)
        assert len(counted) == 3  # without guide, with the features kept, guided


def test_a_stage_c_that_is_compiled_before_it_gets_its_guide_is_guided(core, guided, counted):
    before = compiled(core, guided.base)
    torch.testing.assert_close(guided.draw(guided.put_guide(before)), guided.draw(), **CLOSE)
    assert counted, "nothing was compiled"


def test_a_compiled_stage_c_without_guide_stays_without_when_another_is_guided(core, guided, counted):
    def unguided(model):
        pooled = {"pooled_output": randn(1, cascade.TEXT, seed=4)}
        return sample(core, model, randn(1, 16, 8, 8, seed=5), text(cascade.TEXT, 6, 1, **pooled),
                      text(cascade.TEXT, 6, 2, **pooled))

    plain, model = unguided(guided.base), compiled(core, guided.base)
    torch.testing.assert_close(unguided(model), plain, **CLOSE)
    torch.testing.assert_close(guided.draw(compiled(core, guided.model)), guided.draw(), **CLOSE)
    torch.testing.assert_close(unguided(model), plain, **CLOSE)


# --- Other devices


def device_node(core, name: str):
    if name not in core.nodes:
        pytest.skip(f"this ComfyUI has no {name}: it came with 0.23")
    return core.nodes[name]


def test_a_model_that_is_sent_to_the_cpu_draws_the_same_picture(core, family):
    (model,) = device_node(core, "SelectModelDevice").execute(family.model, "cpu").args
    assert model.load_device == torch.device("cpu") and not model.is_dynamic()
    torch.testing.assert_close(family.draw(model), family.draw(), **CLOSE)


def second(core, patched):
    if not hasattr(patched, "deepclone_multigpu"):
        pytest.skip("this ComfyUI works with one GPU: several came with 0.23")
    return patched.deepclone_multigpu(torch.device("cpu", 1))


def test_a_model_on_a_second_device_has_weights_of_its_own_and_draws_the_same(core, family):
    plain, other = family.draw(), second(core, family.model)
    assert other.model is not family.model.model and other.load_device == torch.device("cpu", 1)
    assert torch.equal(family.draw(other), plain)


def test_a_text_encoder_and_a_vae_go_to_another_device(core):
    device_node(core, "SelectVAEDevice")
    models = core.host.models
    weights.tiny_t5(models / "text_encoders" / "host_t5.safetensors")
    cascade.tiny_stage_a(models / "vae" / "host_stage_a.safetensors")
    clip = core.ours.text.load_t5(models / "text_encoders" / "host_t5.safetensors", torch.float32)
    (moved,) = device_node(core, "SelectCLIPDevice").execute(clip, "cpu").args
    tokens = clip.tokenize("a red apple")
    assert torch.equal(moved.encode_from_tokens(tokens), clip.encode_from_tokens(tokens))
    vae = core.ours.ultrapixel_stage_a.load(models / "vae" / "host_stage_a.safetensors", torch.float32)
    latent = randn(1, 4, 6, 6)
    plain, patcher = vae.decode(latent), second(core, vae.patcher)
    vae.patcher, vae.first_stage_model = patcher, patcher.model  # as SelectVAEDevice does
    assert torch.equal(vae.decode(latent), plain)


def test_a_controlnet_of_several_gpus_is_loaded_afresh_and_registered(core, family):
    if not hasattr(family.control, "net_patcher"):
        pytest.skip(f"{family.name} has no ControlNet of ours")
    if not hasattr(family.control, "multigpu_clones"):
        pytest.skip("this ComfyUI works with one GPU: several came with 0.23")
    there, control = torch.device("cpu", 1), family.control.copy()
    made = control.deepclone_multigpu(there, autoregister=True)
    assert control.multigpu_clones == {there: made} and control.get_instance_for_device(there) is made
    assert made.net_patcher.model is not control.net_patcher.model and made.net_patcher.load_device == there
    assert {id(one.model) for one in control.get_models()} == {id(made.net_patcher.model),
                                                               id(control.net_patcher.model)}
    assert torch.equal(family.draw(control=made), family.draw(control=control))
    alone = control.copy().deepclone_multigpu(there)
    assert not alone.multigpu_clones and alone.net_patcher.model is not made.net_patcher.model


def test_stage_b_s_patches_follow_to_a_copy_of_the_network(core):
    cascade.tiny_stage_b(core.host.models / "diffusion_models" / "stage_b_host.safetensors")
    base = import_module("nodes").UNETLoader().load_unet("stage_b_host.safetensors", "default")[0]
    (patched,) = run(core, "UltraPixelStageB", model=base, rescale=0.7)
    if hasattr(patched, "deepclone_multigpu"):
        other = second(core, patched)
    else:
        network = import_module("nodes").UNETLoader().load_unet("stage_b_host.safetensors", "default")[0].model
        other = patched.clone()
        core.ours.ultrapixel_stage_b._follow(SimpleNamespace(model=network), other, 1)  # as ON_CLONE would call it
    modules = set(other.model.diffusion_model.modules())
    held = [patch.args[0] for patch in other.object_patches.values() if getattr(patch, "args", None)]
    assert held and all(module in modules for module in held)


# --- Prefetch


def test_blocks_are_fetched_in_the_order_in_which_they_run(core, family, monkeypatch):
    if family.name == "ultrapixel":
        pytest.skip("Stage C is core's network")
    log, fetched = [], []
    monkeypatch.setattr(core.ours.prefetch, "model_prefetch", SimpleNamespace(
        make_prefetch_queue=lambda blocks, device, options: fetched.append(list(blocks)) or fetched[-1],
        prefetch_queue_pop=lambda queue, device, block: log.append((id(queue), block))))
    network = (family.control.net_patcher if family.name == "pixelponder" else family.model).model
    network = getattr(network, "diffusion_model", network)
    monkeypatch.setattr(type(network), "forward", asked_to_fetch(core, type(network).forward))
    family.draw()
    assert fetched
    for blocks in fetched:
        assert [block for queue, block in log if queue == id(blocks)] == [*blocks, None]


def asked_to_fetch(core, forward):
    """As core asks a network of a dynamic MODEL; PixelPonder's control asks its own patcher."""
    def asking(self, *args, transformer_options=None, **kwargs):
        if transformer_options is None:
            blocks = (*self.double_blocks, *self.single_blocks)
            kwargs["before_block"] = core.ours.prefetch.host_prefetch(blocks, torch.device("cpu"), True)
        else:
            kwargs["transformer_options"] = {**transformer_options, "prefetch_dynamic_vbars": True}
        return forward(self, *args, **kwargs)

    return asking


def test_pictures_with_blocks_fetched_ahead_equal_those_without(core, family, monkeypatch):
    if not dynamic_vram.wanted():
        pytest.skip("weights are fetched ahead under DynamicVRAM alone: PIXSTACK_DYNAMIC_VRAM is not set")
    plain, prefetch = family.draw(), import_module("comfy.model_prefetch")
    queues = []

    def make(blocks, device, options):  # core makes none for a CPU
        queues.append([None, *blocks, None])
        return queues[-1]

    monkeypatch.setattr(prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(core.mm, "ensure_pin_registerable", lambda size: None)
    assert torch.equal(family.draw(), plain)
    assert queues or family.name == "ultrapixel"
    assert all(queue == [None] for queue in queues), "a queue was left before its end"
