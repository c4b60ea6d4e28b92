"""UltraPixel's guide on a MODEL of ComfyUI's own Stage C: a small model beside it, called by a network that has all
modules of the base and a hook after some. The base keeps its weights, LoRAs, offloading and storage."""
from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.model_base
import comfy.model_management as mm
import comfy.model_sampling
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.cascade.common import AttnBlock, GlobalResponseNorm
from comfy.ldm.cascade.stage_c import StageC
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch import Tensor, nn

from ....models_impl.guard import reading
from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.blocks import GlobalResponseNorm as ResponseNorm
from ....models_impl.ultrapixel.config import GuideConfig
from ....models_impl.ultrapixel.guidance import Features, FeatureTap, Guide, GuidedImage
from ....models_impl.ultrapixel.sampling import guided
from ..common.patcher import is_dynamic, reloadable, with_weights

KEY = "pixstack_ultrapixel"
HOOK = "pixstack_ultrapixel_hook"  # an argument of GuidedStageC
NETWORK = "diffusion_model"  # of a MODEL
COMPILED, COMPILED_HOW = "torch.compile", "torch_compile_kwargs"  # core's names: TorchCompileModel's wrapper, settings
LITE = 1536  # width of the 1B Stage C
STAGE_C = "stage_c_bf16.safetensors"
FEATURES = 15  # as wide as the network, alive at once in a ResBlock and in the guide: counted 14.8, see the tests
HEADROOM = 1.1


@dataclass(frozen=True)
class Strengths:
    """Weights of the guide on the way down and up; up None: the released step function of the size."""

    down: float = 1.0
    up: float | None = None

    def __bool__(self) -> bool:
        return self.down != 0 or self.up != 0


def load_guide(path: str, disable_dynamic: bool = False):
    """A guide file as a ModelPatcher of its own. Computes in whatever the base's features are in."""
    file = Path(path)
    with reading(file):
        tensors, metadata = read_file(file)
        config, tensors = checkpoint.read_guide(tensors, metadata)
        guide = Guide(config, operations=comfy.ops.manual_cast, dtype=comfy.utils.weight_dtype(tensors),
                      device=mm.unet_offload_device())
        patched = with_weights(guide.eval().requires_grad_(False), tensors, f"UltraPixel's guide ({file.name})",
                               disable_dynamic=disable_dynamic)
    return reloadable(patched, load_guide, path)


def stage_c_of(model) -> comfy.model_base.StableCascade_C:
    """The Stage C inside a MODEL; refuses other networks by name."""
    inner = model.model
    if isinstance(inner, comfy.model_base.StableCascade_B):
        raise ValueError("This MODEL is Stable Cascade's Stage B, but UltraPixel works on Stage C: load "
                         f"{STAGE_C} with 'Load Diffusion Model' and connect that.")
    if not isinstance(inner, comfy.model_base.StableCascade_C):
        raise ValueError(f"This MODEL is a {type(inner).__name__}, but UltraPixel works on Stable Cascade's Stage C: "
                         f"load {STAGE_C} with 'Load Diffusion Model' and connect that.")
    return inner


def guided_blocks(net) -> dict[str, list[AttnBlock]]:
    """Direction -> the first attention block of each level of core's Stage C, in the order the net runs."""
    levels = {"down": net.down_blocks, "up": net.up_blocks}
    return {way: [next(b for b in blocks if isinstance(b, AttnBlock)) for blocks in level_blocks]
            for way, level_blocks in levels.items()}


def check_base(model, config: GuideConfig):
    """Refuse a MODEL that the guide was not made for."""
    net = stage_c_of(model).diffusion_model
    for way, blocks in guided_blocks(net).items():
        widths = tuple(block.norm.normalized_shape[0] for block in blocks)
        if widths != getattr(config, way):
            what = "Stage C 1B ('lite')" if widths[0] == LITE else "Stage C"
            raise ValueError(
                f"This MODEL is a {what} whose levels are {' and '.join(map(str, widths))} channels wide; this guide "
                f"was trained for {' and '.join(map(str, getattr(config, way)))}. The released guide needs the Stage C "
                f"of 3.6B parameters: {STAGE_C}."
            )


def patch(model, guide, strengths: Strengths, rescale: float, shift: float):
    """A clone of a Stage C MODEL with the guide. The model given stays as it was. Raises ValueError for a guide that is
    none."""
    if not hasattr(getattr(getattr(guide, "model", None), "config", None), "max_tokens"):
        raise ValueError(f"guide is of type {type(guide).__name__}, not what 'Load UltraPixel Guide' gives.")
    check_base(model, guide.model.config)
    patched = model.clone()
    patched.set_attachments(KEY, strengths)
    _guide_network(patched, [guide])
    patched.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _follow)
    compiled_how = patched.model_options.get(COMPILED_HOW)
    if compiled_how and COMPILED in patched.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        set_torch_compile_wrapper(patched, **compiled_how)  # the network compiled so far has no place for a guide
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, call), (WrappersMP.OUTER_SAMPLE, _with_estimate)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.set_model_sampler_cfg_function(partial(rescaled, rescale=rescale))
    patched.add_object_patch("model_sampling", sampling_with(shift))
    return patched


def _follow(patched, clone):
    """Some clones have a network of their own, for torch.compile or another device for example."""
    if clone.model is not patched.model:
        _guide_network(clone, patched.get_additional_models_with_key(KEY))


def _guide_network(patched, guides: list):
    """Put the network that calls the guide into a MODEL, and the guide beside it, so that ComfyUI loads and offloads
    both together. Where it does not move the weights of one when they are used, those of the other neither:
    torch.compile traces both as one."""
    patched.add_object_patch(NETWORK, guided_network(patched.model.diffusion_model))
    patched.set_additional_models(KEY, [
        guide.get_non_dynamic_delegate() if is_dynamic(guide) and not is_dynamic(patched) else guide.clone()
        for guide in guides])


def sampling_with(shift: float):
    """Stable Cascade's noise levels; core's own are shifted by 2, UltraPixel's text to image by 1."""

    class ModelSampling(comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
        # Tables as plain attributes that nobody overwrites. DynamicVRAM keeps a model's buffers under their names and
        # gives them back to whichever object has the name by then: the base would go on with this one's levels.

        def set_sigmas(self, sigmas):
            self.__dict__.update(sigmas=sigmas.float(), log_sigmas=sigmas.log().float())

        def register_buffer(self, name, tensor, persistent=True):
            pass

    return ModelSampling(SimpleNamespace(sampling_settings={"shift": shift}))


def _with_estimate(executor, *args, **kwargs):
    """Sampling with our estimate of its memory instead of core's, which leaves out half of it on a GPU with memory
    saving attention and asks for four times as much on another."""
    inner = executor.class_obj.model_patcher.model
    inner.memory_required = partial(memory_required, inner)
    try:
        return executor(*args, **kwargs)
    finally:
        del inner.memory_required


def memory_required(inner, input_shape, cond_shapes=None) -> float:
    """Bytes over the weights for latents (B, 16, H, W)."""
    B, _, H, W = input_shape
    width = max(block.norm.normalized_shape[0] for block in inner.diffusion_model.down_blocks[0]
                if isinstance(block, AttnBlock))
    return HEADROOM * mm.dtype_size(compute_dtype(inner)) * FEATURES * width * B * H * W


def compute_dtype(inner) -> torch.dtype:
    return inner.manual_cast_dtype or inner.get_dtype()


def guide_of(model) -> tuple[Guide, Strengths]:
    """The guide and its strengths that 'UltraPixel Guide' put on a MODEL."""
    guides = model.get_additional_models_with_key(KEY)
    if not guides:
        raise ValueError("This MODEL has no guide: put 'UltraPixel Guide' between the Stage C loader and the guider.")
    return guides[0].model, model.get_attachment(KEY)


def rescaled(args: dict, rescale: float) -> Tensor:
    """Guidance on the predicted noise, brought back to the deviation of the positive prompt's."""
    cond, cfg = args["cond"], args["cond_scale"]
    if cfg == 1:
        return cond
    sigma = args["sigma"].view(-1, *[1] * (cond.ndim - 1))
    run = args["model_options"].get("transformer_options", {}).get(KEY)
    whole_batch = run is not None and run.whole_batch
    return guided(cond / sigma, args["uncond"] / sigma, cfg, rescale, whole_batch) * sigma


# --- What a call of the network belongs to: the sampler puts one of these into transformer_options[KEY]

class Plain:
    """A step without guide."""

    size: tuple[int, int] | None = None
    """(height, width) of the latent of the pass, in cells."""

    def __init__(self, whole_batch: bool = False):
        self.whole_batch = whole_batch

    def hook(self, timestep: Tensor, options: dict, sizes: list[tuple[int, int]], dtype: torch.dtype):
        """A context manager around a call, which gives its hook(direction, level, features) -> features or None.

        sizes: of the features of each level, on the way down; dtype: theirs.
        """
        return nullcontext()


class Kept(Plain):
    """The call of the low-resolution pass whose features are kept, of the rows with a positive prompt.

    positive: id of each conditioning -> its weight (n, 1, h or 1, w or 1), as core weighs predictions. ComfyUI may
    spread the rows of one step over several calls.
    """

    def __init__(self, positive: dict[object, Tensor], whole_batch: bool = False):
        super().__init__(whole_batch)
        self.positive = positive
        self.parts: list[tuple[Tensor, Features]] = []

    @contextmanager
    def hook(self, timestep, options, sizes, dtype):
        tap = FeatureTap()
        yield tap
        rows = len(timestep) // len(options["uuids"])
        for i, prompt in enumerate(options["uuids"]):
            if prompt in self.positive:
                device = self.parts[0][0].device if self.parts else timestep.device  # one, of several GPUs
                weight = comfy.utils.repeat_to_batch_size(self.positive[prompt], rows).to(device, timestep.dtype)
                # A copy: what a CUDA graph returns lies where its next run writes.
                features = tap.features.rows(i * rows, (i + 1) * rows).to(device, copy=True)
                self.parts.append((weight, features))

    def features(self) -> Features:
        """(B, D, h, w) of every level; where several positive prompts are combined their mean by weight, and the plain
        mean where none of them weighs."""
        if not self.parts:
            raise ValueError("No positive prompt is active at the end of the low-resolution pass, from whose features "
                             "the guide is made: give one an end_percent of 1, and take away a pack that repeats a "
                             "network's outputs (TeaCache and the like): it may not skip that step.")
        weights, features = zip(*self.parts, strict=True)
        total = sum(weights)
        shares = [torch.where(total > 0, weight / total, 1 / len(weights)) for weight in weights]

        def mean(levels):
            return sum(share.to(x) * x for share, x in zip(shares, levels, strict=True))

        return Features(*([mean(levels) for levels in zip(*parts, strict=True)]
                          for parts in ([part.down for part in features], [part.up for part in features])))


class Guided(Plain):
    """A step of the guided pass."""

    def __init__(self, image: GuidedImage, strengths: Strengths, whole_batch: bool = False):
        super().__init__(whole_batch)
        self.image, self.strengths = image, strengths

    def hook(self, timestep, options, sizes, dtype):
        return nullcontext(self.image.step(timestep, {"down": sizes, "up": sizes[::-1]}, dtype, self.strengths.down,
                                           self.strengths.up))


def call(executor, x, sigma, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """The wrapper around core's `apply_model` of a guided MODEL."""
    options, base = transformer_options or {}, executor.class_obj
    run = options.get(KEY)
    if run is None:
        raise ValueError("This MODEL carries UltraPixel's guide, which needs a pass at low resolution first: sample it "
                         "with SamplerCustomAdvanced and 'UltraPixel Sampler', or connect the MODEL as it was before "
                         "'UltraPixel Guide'.")
    if run.size not in (None, tuple(x.shape[-2:])):
        (h, w), (H, W) = x.shape[-2:], run.size
        raise ValueError(f"This MODEL is shown a tile, {w} x {h} of {W} x {H} cells, and UltraPixel's "
                         "guide belongs to the whole picture. Take that node away: Stage C is small at any size. "
                         "'UltraPixel Stage B' and 'Load UltraPixel Stage A' save memory after it.")
    net = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)  # without torch.compile's wrapper
    if not isinstance(net, GuidedStageC):
        raise ValueError(f"Another node has put a {type(net).__name__} in the place of the network that UltraPixel's "
                         "guide works on: put 'UltraPixel Guide' after that node.")
    timestep = base.model_sampling.timestep(sigma).float()
    with run.hook(timestep, options, level_sizes(net, *x.shape[-2:]), compute_dtype(base)) as hook:
        if hook is not None:
            conds[HOOK] = hook
        return executor(x, sigma, c_concat, c_crossattn, control, options, **conds)


# --- The network

class GuidedStageC(StageC):
    """Core's Stage C with one more argument HOOK, a hook(direction, level, features) -> features that it calls after
    the first attention block of each level. It is an argument and no attribute so that torch.compile, which takes
    attributes and hooks of modules for constants, gives each kind of hook a program of its own."""

    def forward(self, *args, transformer_options, **given):
        options = {**transformer_options, HOOK: given.pop(HOOK, None)}
        return super().forward(*args, transformer_options=options, **given)


class GuidedBlock(AttnBlock):
    """Core's attention block, with a hook after it at `direction` and `level`."""

    def forward(self, x, kv, transformer_options):
        x = super().forward(x, kv, transformer_options=transformer_options)
        hook = transformer_options[HOOK]
        return x if hook is None else hook(self.direction, self.level, x)


class GuidedResponseNorm(GlobalResponseNorm):
    """Core's norm in three passes over its input in place of nine."""

    forward = ResponseNorm.forward


def guided_network(net: StageC) -> GuidedStageC:
    """A network with the modules of another, which stays as it is."""
    places = {block: dict(direction=direction, level=level) for direction, blocks in guided_blocks(net).items()
              for level, block in enumerate(blocks)}

    def with_norms(module: nn.Module) -> nn.Module:
        """Another module of the same class in which our norms stand for core's; the same one if it has none."""
        if isinstance(module, GlobalResponseNorm):
            return made_of(module, GuidedResponseNorm)
        inner = {name: with_norms(child) for name, child in module._modules.items() if child is not None}
        if all(child is module._modules[name] for name, child in inner.items()):
            return module
        return made_of(module, type(module), _modules={**module._modules, **inner})

    def with_hooks(levels: nn.ModuleList) -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleList(
            made_of(block, GuidedBlock, **places[block]) if block in places else with_norms(block) for block in level
        ) for level in levels)

    return made_of(net, GuidedStageC, _modules={**net._modules, "down_blocks": with_hooks(net.down_blocks),
                                                "up_blocks": with_hooks(net.up_blocks)})


def made_of(module: nn.Module, kind: type[nn.Module], **attributes) -> nn.Module:
    """A module of another class with everything that is in a module, save for `attributes`."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__, **attributes)
    return other


def level_sizes(net: StageC, height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of the features of each level, from a latent's, in the order of the way down."""
    patch = net.embedding[0].downscale_factor
    sizes = [(height // patch, width // patch)]
    for scaler in net.down_downscalers[1:]:
        halved = 2 if any(isinstance(layer, nn.Upsample) for layer in scaler.modules()) else 1
        sizes.append(tuple(side // halved for side in sizes[-1]))
    return sizes
