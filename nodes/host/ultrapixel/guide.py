"""UltraPixel's guide on a MODEL of ComfyUI's own Stage C: a small model beside it, called through hooks that exist only
while the network runs. The base keeps its weights, LoRAs, offloading and storage."""
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
from comfy.ldm.cascade.common import AttnBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....models_impl.state_dict import read_file
from ....models_impl.ultrapixel import checkpoint
from ....models_impl.ultrapixel.config import GuideConfig
from ....models_impl.ultrapixel.guidance import Features, FeatureTap, Guide, GuidedImage
from ....models_impl.ultrapixel.sampling import guided
from ..common.patcher import reloadable, with_weights

KEY = "pixstack_ultrapixel"
COMPILED = "torch.compile"  # how core's TorchCompileModel marks its wrapper
LITE = 1536  # width of the 1B Stage C
STAGE_C = "stage_c_bf16.safetensors"
FEATURES = 19  # as wide as the network, alive at once in a ResBlock of core's and in the guide; counted, see the commit
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
    tensors, metadata = read_file(file)
    try:
        config, tensors = checkpoint.read_guide(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
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
    """A clone of a Stage C MODEL with the guide. The model given stays as it was."""
    check_base(model, guide.model.config)
    patched = model.clone()
    patched.set_additional_models(KEY, [guide])  # ComfyUI loads and offloads it together with the base
    patched.set_attachments(KEY, strengths)
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, call), (WrappersMP.OUTER_SAMPLE, _with_estimate)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.set_model_sampler_cfg_function(partial(rescaled, rescale=rescale))
    patched.add_object_patch("model_sampling", sampling_with(shift))
    return patched


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
    dtype = inner.manual_cast_dtype or inner.get_dtype()
    return HEADROOM * mm.dtype_size(dtype) * FEATURES * width * B * H * W


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

    def around(self, net, timestep: Tensor, options: dict):
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
    def around(self, net, timestep, options):
        tap = FeatureTap()
        with hooked(net, tap):
            yield
        rows = len(timestep) // len(options["uuids"])
        for i, prompt in enumerate(options["uuids"]):
            if prompt in self.positive:
                weight = comfy.utils.repeat_to_batch_size(self.positive[prompt], rows).to(timestep)
                self.parts.append((weight, tap.features.rows(i * rows, (i + 1) * rows)))

    def features(self) -> Features:
        """(B, D, h, w) of every level; where several positive prompts are combined their mean by weight, and the plain
        mean where none of them weighs."""
        if not self.parts:
            raise ValueError("No positive prompt is active at the end of the low-resolution pass, from which the guide "
                             "is made: give one an end_percent of 1.")
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

    def around(self, net, timestep, options):
        return hooked(net, self.image.hook(timestep, self.strengths.down, self.strengths.up))


def call(executor, x, sigma, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """The wrapper around core's `apply_model` of a guided MODEL."""
    options, base = transformer_options or {}, executor.class_obj
    run = options.get(KEY)
    if run is None:
        raise ValueError("This MODEL carries UltraPixel's guide, which needs a pass at low resolution first: sample it "
                         "with SamplerCustomAdvanced and 'UltraPixel Sampler', or connect the MODEL as it was before "
                         "'UltraPixel Guide'.")
    if COMPILED in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise ValueError("A compiled network would silently leave the guide out: take TorchCompileModel away from this "
                         "MODEL.")
    if run.size not in (None, tuple(x.shape[-2:])):
        (h, w), (H, W) = x.shape[-2:], run.size
        raise ValueError(f"This MODEL is shown a tile, {w} x {h} of {W} x {H} cells, and UltraPixel's "
                         "guide belongs to the whole picture. Take that node away: Stage C is small at any size. "
                         "'UltraPixel Stage B' and 'Load UltraPixel Stage A' save memory after it.")
    timestep = base.model_sampling.timestep(sigma).float()
    with run.around(base.diffusion_model, timestep, options):
        return executor(x, sigma, c_concat, c_crossattn, control, options, **conds)


@contextmanager
def hooked(net, hook):
    """Have hook(direction, level, x) -> x follow the guided blocks of core's Stage C until the end of the block."""
    handles = []
    try:
        for way, blocks in guided_blocks(net).items():
            for level, block in enumerate(blocks):
                after = partial(_after, hook, way, level)
                handles.append(block.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(hook, way, level, block, args, x):
    return hook(way, level, x)
