"""Tiny random weights of Stable Cascade and UltraPixel. Core's loaders fix the sizes of Stage C, Stage B and CLIP-G,
so the tests' ComfyUI builds shrunk ones (`shrink_core`), for files of which nothing else is known."""

import copy
from functools import partial
from pathlib import Path

import torch
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.ultrapixel import checkpoint
from pixstack.models_impl.ultrapixel.config import (
    ControlNetConfig,
    GuideConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from pixstack.models_impl.ultrapixel.controlnet import ControlNet
from pixstack.models_impl.ultrapixel.effnet import EffnetEncoder
from pixstack.models_impl.ultrapixel.guidance import Guide
from pixstack.models_impl.ultrapixel.lora import attention_keys
from pixstack.models_impl.ultrapixel.model import StageC
from pixstack.models_impl.ultrapixel.stage_a import StageA
from pixstack.models_impl.ultrapixel.stage_b import StageB

TEXT = 32  # width of the text tokens
HIDDEN = 64  # of Stage C
C = StageCConfig(
    hidden=(HIDDEN, HIDDEN), heads=(1, 1), down=("CTA", "CTA" * 2), up=("CTA" * 2, "CTA"), context_dim=32,
    text_dim=TEXT, pooled_dim=TEXT,
)  # fmt: skip
B = StageBConfig(
    hidden=(16, 16, 64, 64), heads=(-1, -1, 1, 1), down=("CT", "CT", "CTA", "CTA"), up=("CTA", "CTA", "CT", "CT"),
    up_repeats=(1, 1, 1, 1), context_dim=32, pooled_dim=TEXT,
)  # fmt: skip
A = StageAConfig(hidden=16, bottleneck_blocks=1)
GUIDE = GuideConfig(
    down=C.hidden, up=C.hidden, width=32, heads=1, feedforward=32, groups=8, layers=(32, 32), frequencies=8,
    timestep_dim=64, scale_dim=64,
)  # fmt: skip
CORE_C = dict(c_cond=32, c_hidden=[HIDDEN] * 2, nhead=[1, 1], blocks=[[1, 2], [2, 1]], c_clip_text=TEXT,
              c_clip_text_pooled=TEXT)
CORE_B = dict(c_cond=32, c_hidden=[16, 16, 64, 64], nhead=[-1, -1, 1, 1], blocks=[[1] * 4] * 2,
              block_repeat=[[1] * 4] * 2, c_clip=TEXT)
CLIP_G = dict(hidden_size=TEXT, intermediate_size=64, num_attention_heads=2, num_hidden_layers=32)


def shrink_core():
    """Have ComfyUI build the small networks where a file does not say otherwise."""
    import comfy.ldm.cascade.controlnet
    import comfy.model_base
    import comfy.sdxl_clip

    compute_noise_levels_once()

    for module, name, sizes in ((comfy.model_base, "StageC", CORE_C), (comfy.model_base, "StageB", CORE_B)):
        network = getattr(module, name)
        setattr(module, name, lambda network=network, sizes=sizes, **given: network(
            **(given if "c_hidden" in given else {**given, **sizes})))
    text = comfy.sdxl_clip.StableCascadeClipG

    def small_text(*given, model_options, **more):
        return text(*given, model_options={**model_options, "clip_g_model_config": CLIP_G}, **more)

    comfy.sdxl_clip.StableCascadeClipG = small_text
    cascade = comfy.ldm.cascade.controlnet
    cascade.ControlNet = partial(cascade.ControlNet, c_proj=HIDDEN)


def compute_noise_levels_once():
    """ComfyUI computes Stable Cascade's 10000 noise levels one by one, on the CPU, for every network that it loads."""
    import comfy.model_sampling

    kind = comfy.model_sampling.StableCascadeSampling
    compute, computed = kind.set_parameters, {}
    numbers = "shift", "cosine_s", "_init_alpha_cumprod", "num_timesteps"

    def set_parameters(self, *given, **named):
        settings = (given, *named.items())
        if settings not in computed:
            compute(self, *given, **named)
            computed[settings] = [getattr(self, name) for name in numbers], self.sigmas.clone()
        values, sigmas = computed[settings]
        for name, value in zip(numbers, values, strict=True):
            setattr(self, name, copy.copy(value))
        self.set_sigmas(sigmas.clone())

    kind.set_parameters = set_parameters


def random_state(net: torch.nn.Module, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: scale * torch.randn(value.shape, generator=generator) for key, value in net.state_dict().items()}


def tiny_stage_c(path: Path):
    write_file(path, checkpoint.released_attention_names(random_state(StageC(C))))


def small_stage_c(path: Path):
    """A Stage C as the trainer exports it."""
    write_file(path, checkpoint.released_attention_names(random_state(StageC(C))), checkpoint.metadata(C))


def tiny_stage_b(path: Path):
    write_file(path, checkpoint.released_attention_names(random_state(StageB(B))))


def tiny_stage_a(path: Path):
    write_file(path, random_state(StageA(A), 0.3))


def tiny_guide(path: Path):
    """A guide as released: a torch file, whatever its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint.released_guide_names(random_state(Guide(GUIDE))), path)


def tiny_clip_g(path: Path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (0.1 * torch.randn(*shape, generator=generator)).half()

    inner = CLIP_G["intermediate_size"]
    shapes = {"text_projection": (TEXT, TEXT), "text_model.embeddings.token_embedding": (49408, TEXT),
              "text_model.embeddings.position_embedding": (77, TEXT)}
    tensors = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    for layer in (f"text_model.encoder.layers.{i}." for i in range(CLIP_G["num_hidden_layers"])):
        for name, shape in (*((f"self_attn.{p}_proj", (TEXT, TEXT)) for p in ("q", "k", "v", "out")),
                            ("mlp.fc1", (inner, TEXT)), ("mlp.fc2", (TEXT, inner))):
            tensors |= {f"{layer}{name}.weight": random(*shape), f"{layer}{name}.bias": random(shape[0])}
    for norm in [key.removesuffix("self_attn.q_proj.weight") + f"layer_norm{i}." for i in (1, 2) for key in tensors
                 if key.endswith("self_attn.q_proj.weight")] + ["text_model.final_layer_norm."]:
        tensors |= {f"{norm}weight": torch.ones(TEXT).half(), f"{norm}bias": random(TEXT)}
    write_file(path, tensors)


def tiny_effnet(path: Path):
    """The semantic encoder at its real size: core takes this network from torchvision."""
    net = EffnetEncoder()
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    write_file(path, tensors)


def tiny_personalisation(path: Path, rank: int = 4):
    """A personalisation as released, a torch file: numbered modules, and the change of the first row not in CLIP."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    shapes = {key: value.shape for key, value in StageC(C).state_dict().items()}
    for number, key in enumerate(attention_keys(C)):
        rows, columns = shapes[key]
        tensors[f"module.{number}.lora_up"] = torch.randn(rows, rank, generator=generator)
        tensors[f"module.{number}.lora_down"] = torch.randn(rank, columns, generator=generator)
    tensors[f"module.{number + 1}.embeddings"] = torch.randn(1, TEXT, generator=generator)
    tensors[f"module.{number + 1}.indices"] = torch.tensor([49408])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)


def tiny_canny(path: Path):
    """A ControlNet with the real backbone, as core's."""
    net = ControlNet(ControlNetConfig(in_channels=1, hidden=HIDDEN))
    write_file(path, {key: value.half() if value.is_floating_point() else value
                      for key, value in net.state_dict().items()})


STAND_INS = (
    ("diffusion_models", "stage_c", tiny_stage_c),
    ("diffusion_models", "stage_b", tiny_stage_b),
    ("text_encoders", "stable_cascade", tiny_clip_g),
    ("vae", "stage_a", tiny_stage_a),
    ("vae", "effnet", tiny_effnet),
    ("controlnet", "stable_cascade_canny", tiny_canny),
    ("loras", "lora_cat", tiny_personalisation),
    ("model_patches", "ultrapixel", tiny_guide),
)
