"""Core's Stage B at 4096 pixels: patches of its MODEL for what it takes, what it asks for, its guidance, and tiles.

Core's network and weights stay as they are, and with them LoRAs, offloading and every dtype. Unpatched, each MLP of
the finest level holds three tensors of four times its width at once, and ComfyUI's estimate for the model is its
default: 80 GiB at 4096 x 4096 in bf16, for which it unloads all other models and keeps Stage B itself off the GPU.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import comfy.model_management as mm
import torch
from comfy.ldm.cascade.common import ResBlock
from comfy.model_base import StableCascade_B
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl.ultrapixel.sampling import guided

KEY = "pixstack_stage_b"
STRIP = 2**27  # values of the widest tensor of a strip: 256 MiB in bf16
CELL = 4  # pixels along a side of a latent's cell
ALIGNMENT = 16
"""Cells: a tile begins where the patches and all halvings of Stage B do, as in the whole picture."""
FEATURES = 5  # tensors as wide as the finest level that are held at once, above the strips: see the test
HEADROOM = 1.2  # workspaces of the kernels, fragmentation


def within_bounds(model, rescale: float, strip: int = STRIP):
    """A clone of a Stage B MODEL that computes the same in less memory, and asks for what it needs.

    rescale: of guidance, see `sampling.guided`; the release has 0.7, ComfyUI none. strip: values.
    """
    patched = _patched(model, strip)
    patched.set_model_sampler_cfg_function(
        lambda args: guided(args["cond"], args["uncond"], args["cond_scale"], rescale)
    )
    return patched


def in_tiles(model, tile: int, overlap: int):
    """A clone that runs by tiles of `tile` pixels a side. Approximate: norms and attention see one tile at a time."""
    tile, overlap = (n // CELL // ALIGNMENT * ALIGNMENT for n in (tile, overlap))
    if not 0 < overlap <= tile // 2:
        raise ValueError(f"overlap={overlap * CELL} must be at least {ALIGNMENT * CELL} pixels and at most half of "
                         f"tile_size={tile * CELL}.")
    patched = _patched(model, STRIP, tile)
    _set_wrapper(patched, WrappersMP.APPLY_MODEL, partial(_by_tiles, tile=tile, overlap=overlap))
    return patched


def _patched(model, strip: int, tile: int | None = None):
    inner = getattr(model, "model", model)
    if not isinstance(inner, StableCascade_B):
        raise ValueError(f"This MODEL is a {type(inner).__name__}, not a Stage B of Stable Cascade: load "
                         "stage_b_bf16.safetensors or stage_b_lite_bf16.safetensors with Load Diffusion Model.")
    patched = model.clone()
    _by_strips(patched, strip)
    patched.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, partial(_follow, strip=strip))
    if tile is not None or KEY not in patched.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        _set_wrapper(patched, WrappersMP.OUTER_SAMPLE, partial(_with_estimate, strip=strip, tile=tile))
    return patched


def _by_strips(patched, strip: int):
    for name, module in patched.model.diffusion_model.named_modules():
        if isinstance(module, ResBlock):
            patched.add_object_patch(f"diffusion_model.{name}.forward", partial(res_block, module, strip=strip))
        elif name in ("effnet_mapper", "clf"):
            patched.add_object_patch(f"diffusion_model.{name}.forward", partial(pointwise, module, strip=strip))


def _follow(patched, clone, strip: int):
    """The patches hold the modules of a network, and some clones have another, for another device for example."""
    if clone.model is not patched.model:
        _by_strips(clone, strip)


def _set_wrapper(patched, kind: str, wrapper: Callable):
    patched.remove_wrappers_with_key(kind, KEY)
    patched.add_wrapper_with_key(kind, KEY, wrapper)


# --- Memory

def _with_estimate(executor: Callable, *args, strip: int, tile: int | None, **kwargs):
    """Sampling with our estimate instead of core's. As an object patch it would come after core has asked."""
    inner = executor.class_obj.model_patcher.model
    inner.memory_required = partial(memory_required, inner, strip=strip, tile=tile)
    try:
        return executor(*args, **kwargs)
    finally:
        del inner.memory_required


def memory_required(inner, input_shape: Sequence[int], cond_shapes=None, *, strip: int, tile: int | None) -> float:
    """Bytes over the weights for latents (B, 4, H, W)."""
    patch, finest, _ = inner.diffusion_model.embedding
    B, _, H, W = input_shape
    if tile is not None:
        H, W = (min(side, tile + ALIGNMENT) for side in (H, W))
    features = B * H * W // patch.downscale_factor**2 * finest.out_channels
    return HEADROOM * mm.dtype_size(inner.manual_cast_dtype or inner.get_dtype()) * (
        FEATURES * features + 3 * min(strip, 4 * features)
    )


def res_block(block: ResBlock, x: Tensor, x_skip: Tensor | None = None, *, strip: int = STRIP) -> Tensor:
    """core's ResBlock.forward, strip after strip.

    Its norm needs one statistic of the whole picture. It is gathered first; where there is more than one strip the
    first half of the MLP is then computed again, which is a third of the MLP and little of the network.
    """
    widen, gelu, norm, dropout, narrow = block.channelwise
    h = block.depthwise(x)
    B, _, H, W = h.shape
    rows = max(1, strip // (B * W * norm.gamma.shape[-1]))
    strips = [slice(top, top + rows) for top in range(0, H, rows)]

    def wide(rows: slice) -> Tensor:
        part = block.norm(h[:, :, rows])
        if x_skip is not None:
            part = torch.cat((part, x_skip[:, :, rows]), dim=1)
        return gelu(widen(part.permute(0, 2, 3, 1)))

    squares = 0
    for piece in strips:
        kept = wide(piece)
        squares = squares + torch.linalg.vector_norm(kept, dim=(1, 2), keepdim=True, dtype=torch.float32).square()
    size = squares.sqrt()
    gamma, beta = (p.to(kept) for p in (norm.gamma, norm.beta))
    factor = 1 + gamma * (size / (size.mean(dim=-1, keepdim=True) + 1e-6)).to(kept.dtype)
    for piece in strips:
        if len(strips) > 1:
            kept = None  # before the next one is made
            kept = wide(piece)
        kept = dropout(torch.addcmul(beta, kept, factor))
        h[:, :, piece] = x[:, :, piece] + narrow(kept).permute(0, 3, 1, 2)  # the strip has read its part of h
    return h


def pointwise(layers: nn.Sequential, x: Tensor, *, strip: int = STRIP) -> Tensor:
    """layers(x) for layers that keep every position to itself, strip after strip."""
    widest = max(m.out_channels for m in layers if isinstance(m, nn.Conv2d))
    rows = max(1, strip // (x.shape[0] * x.shape[3] * max(widest, x.shape[1])))
    out = None
    for top in range(0, x.shape[2], rows):
        part = x[:, :, top : top + rows]
        for layer in layers:
            part = layer(part)
        if rows >= x.shape[2]:
            return part
        scale = part.shape[3] // x.shape[3]
        if out is None:
            out = part.new_empty(*part.shape[:2], scale * x.shape[2], part.shape[3])
        out[:, :, scale * top : scale * (top + rows)] = part
    return out


# --- Tiles

def _by_tiles(executor: Callable, x: Tensor, t: Tensor, *args, tile: int, overlap: int, **kwargs) -> Tensor:
    """x: (B, 4, H, W) -> its denoised, a blend of tiles, each with its part of the latent of Stage C."""
    H, W = x.shape[-2:]
    if max(H, W) <= tile:
        return executor(x, t, *args, **kwargs)
    # At the finest level's size, where Stage B would bring it itself, the latent of Stage C can be cut without a
    # remainder: what a tile sees of it is what the whole picture sees there.
    semantic = F.interpolate(kwargs.pop("effnet").float(), size=(H // 2, W // 2), mode="bilinear", align_corners=True)
    total, weight = torch.zeros_like(x), x.new_zeros(1, 1, H, W)
    for top, bottom, fade_rows in spans(H, tile, overlap):
        for left, right, fade_columns in spans(W, tile, overlap):
            mm.throw_exception_if_processing_interrupted()
            part = executor(x[:, :, top:bottom, left:right], t, *args, **kwargs,
                            effnet=semantic[:, :, top // 2 : bottom // 2, left // 2 : right // 2])
            fade = (fade_rows[:, None] * fade_columns).to(x)
            total[:, :, top:bottom, left:right] += part * fade
            weight[:, :, top:bottom, left:right] += fade
    return total / weight


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int, Tensor]]:
    """(start, end, weights (end - start,)) of tiles along a side: evenly spread, fading where they overlap."""
    if size <= tile:
        return [(0, size, torch.ones(size))]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [(size - tile) * i // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    ends = [*(start + tile for start in starts[:-1]), size]
    tiles = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        at, weights = torch.arange(start, end) + 0.5, torch.ones(end - start)
        if i:
            weights = torch.minimum(weights, (at - start) / (ends[i - 1] - start))
        if i < count - 1:
            weights = torch.minimum(weights, (end - at) / (end - starts[i + 1]))
        tiles.append((start, end, weights))
    return tiles
