"""What one step of every network asks of a GPU, counted exactly on a machine without one, in seconds.

Networks of released sizes in bf16 run on the meta device, which has shapes and strides but no data, in torch's own
operations: ours, those of ComfyUI and those of diffusers. A step is what a sampler asks for: both halves of guidance
where the release guides, in the first column's size; a first pass fills what is kept from step to step. Counted are

    launches  kernels: operations that do more than look at a tensor in another way. A norm, an attention, and a product
              with its bias are one each; a norm of tokens that are not contiguous copies them first, as on CUDA.
    GB        10^9 bytes that these read and write, but for matrix products, convolutions and attention
    casts     launches that change a dtype
    waits     copies between CPU and GPU, and numbers read back (where: tests/support/virtual_gpu.md)
    TFLOP     10^12 floating point operations of products, convolutions and attention, two for a multiply-add
    peak GB   10^9 bytes that live at once beside the weights, inputs included, workspaces of libraries not

Not counted: time, what a compiler or comfy-kitchen fuses, and casts and copies that a host makes of weights.
`counts.md` holds the numbers; tests/models/test_counts.py fails where ours grow.

    python benchmarks/count.py [CASE ...] [--ours] [--write] [--operations]
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.models_impl.flux.config import FluxConfig  # noqa: E402
from pixstack.models_impl.flux.model import Flux, positions  # noqa: E402
from pixstack.models_impl.pixart import config as pixart_config  # noqa: E402
from pixstack.models_impl.pixart.config import PixArtConfig  # noqa: E402
from pixstack.models_impl.pixart.controlnet import PixArtControlNet  # noqa: E402
from pixstack.models_impl.pixart.model import HintedControlNet, PixArt  # noqa: E402
from pixstack.models_impl.pixelflow import config as pixelflow_config  # noqa: E402
from pixstack.models_impl.pixelflow.model import PixelFlow  # noqa: E402
from pixstack.models_impl.pixelponder.config import PixelPonderConfig  # noqa: E402
from pixstack.models_impl.pixelponder.model import PixelPonder  # noqa: E402
from pixstack.models_impl.pixelponder.patch_select import Released  # noqa: E402
from pixstack.models_impl.ultrapixel.config import (  # noqa: E402
    STAGE_B_PRESETS,
    STAGE_C_PRESETS,
    GuideConfig,
    StageAConfig,
)
from pixstack.models_impl.ultrapixel.guidance import Guide  # noqa: E402
from pixstack.models_impl.ultrapixel.model import StageC  # noqa: E402
from pixstack.models_impl.ultrapixel.stage_a import StageA  # noqa: E402
from pixstack.models_impl.ultrapixel.stage_b import StageB  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # noqa: E402

TABLE = Path(__file__).with_name("counts.md")
BF16 = dict(dtype=torch.bfloat16, device="meta")
LENGTHS = (17, 3)  # tokens of a prompt and its negative
NO_KERNEL = {"_unsafe_view", "detach", "lift_fresh", "alias", "_reshape_alias", "_local_scalar_dense"}
NORMS = (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
LOOKED_UP = {"embedding", "index_select", "gather", "index"}  # read as much of the first argument as they return


# --- Counting

@dataclass
class Count:
    launches: int = 0
    bytes: int = 0
    casts: int = 0
    waits: int = 0
    flops: int = 0
    peak: int = 0
    operations: Counter = field(default_factory=Counter)
    """Bytes by operation."""
    times: Counter = field(default_factory=Counter)
    """Launches by operation."""

    def row(self) -> tuple[float, ...]:
        """As `counts.md` has it."""
        return (self.launches, round(self.bytes / 1e9, 3), self.casts, self.waits, round(self.flops / 1e12, 3),
                round(self.peak / 1e9, 3))


class Counting(TorchDispatchMode):
    """`with Counting() as counting:` counts what is run on meta tensors, in `counting.count`."""

    def __init__(self, weights: set[int] = frozenset()):
        """weights: addresses of the storages that are no part of the peak."""
        super().__init__()
        self.count, self.whole, self.weights = Count(), _WholeOperations(self), weights
        self.live, self.now = {}, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping Dynamo away takes longer than an operation

    def __enter__(self):
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes here as a copy
        self.whole.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.whole.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lifted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((*args, *kwargs.values()))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name == "_local_scalar_dense" and given[0].is_meta:
            self.count.waits += 1
            return 1
        if name == "_to_copy" and given[0].is_meta and kwargs.get("device", given[0].device).type == "cpu":
            self.count.waits += 1
            return torch.zeros_like(given[0], device="cpu", dtype=kwargs.get("dtype"))
        result = without_data(func, given, args, kwargs)
        made = tensors_in((result,))
        if not any(x.is_meta for x in (*given, *made)):
            return result
        self.keep(given + made)
        moved = any(not x.is_meta for x in given) and name in ("_to_copy", "copy_")
        if moved and not kwargs.get("non_blocking"):
            self.count.waits += 1
        if func.is_view or name in NO_KERNEL or "empty" in name:
            return result
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.add(name, 0, flops(*args, **kwargs, out_val=result))
        elif name in LOOKED_UP:
            self.add(name, sum(map(size, (*given[1:], *made, *made))))
        else:
            self.add(name, sum(map(size, {id(x): x for x in given}.values())) + sum(map(size, made)))
        if name == "_to_copy" and given[0].dtype != made[0].dtype:
            self.count.casts += 1
        return result

    def add(self, name: str, moved: int, flops: int = 0):
        self.count.launches += 1
        self.count.bytes += moved
        self.count.flops += flops
        self.count.operations[name] += moved
        self.count.times[name] += 1

    def keep(self, tensors: list[Tensor]):
        for key in [key for key, (reference, _) in self.live.items() if reference.expired()]:
            self.now -= self.live.pop(key)[1]
        for x in (x for x in tensors if x.is_meta):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.live and key not in self.weights:
                self.live[key] = StorageWeakRef(storage), storage.nbytes()
                self.now += storage.nbytes()
        self.count.peak = max(self.count.peak, self.now)


class _WholeOperations(TorchFunctionMode):
    """Operations that are one kernel on a GPU, and that the meta device would take apart."""

    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        whole = self.attention if func is F.scaled_dot_product_attention else self.norm if func in NORMS else None
        if whole is None or not next(iter((*args, *kwargs.values()))).is_meta:
            return func(*args, **kwargs)
        return whole(*args, **kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes floats of it
            self.counting.add("mask", size(attn_mask) + attn_mask.numel() * query.element_size())
        self.counting.add("attention", 0, sdpa_flop_count(query.shape, key.shape, value.shape))
        B, heads, N, _ = query.shape
        # (B, heads, N, D) where the memory is (B, N, heads, D), as FlashAttention returns it
        return query.new_empty(B, N, heads, value.shape[3]).transpose(1, 2)

    def norm(self, input: Tensor, normalized_shape, weight=None, bias=None, *_, **__) -> Tensor:
        input = input.contiguous()
        result = torch.empty_like(input)
        self.counting.add("norm", size(input) + size(result) + sum(size(p) for p in (weight, bias) if p is not None))
        return result


_seen: dict[tuple, tuple] = {}


def without_data(func, given: list[Tensor], args: tuple, kwargs: dict):
    """What an operation gives. The meta device takes long over it, so only once for arguments of the same form."""
    if func.is_view or func._schema.is_mutable or not given or not all(x.is_meta for x in given):
        return func(*args, **kwargs)
    key = (func, form(args), form((*kwargs.items(),)))
    if key in _seen:
        shape, stride, dtype = _seen[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    result = func(*args, **kwargs)
    own = {x.untyped_storage()._cdata for x in given}
    if isinstance(result, Tensor) and result.is_meta and result.untyped_storage()._cdata not in own:
        _seen[key] = result.shape, result.stride(), result.dtype
    return result


def form(x):
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(form, x)) if isinstance(x, (list, tuple)) else (type(x), x)  # 1 == 1.0 == True


def tensors_in(values) -> list[Tensor]:
    """Those among what an operation is given or gives, lists of them included."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def size(x: Tensor) -> int:
    """Bytes of the elements of x that are different places in memory."""
    elements = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        elements *= n if stride else min(n, 1)
    return elements * x.element_size() if x.is_meta else 0


def counted(build: Callable[[], tuple]) -> Count:
    """build() makes (networks, a function that runs a step); the second step is counted."""
    with torch.no_grad():
        nets, step = build()
        for net in nets:
            net.eval()
        weights = {x.untyped_storage()._cdata for net in nets for x in (*net.parameters(), *net.buffers())}
        for _ in range(2):
            with Counting(weights) as counting:
                step()
    return counting.count


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


# --- PixArt: both prompts of a guided step

def pixart_inputs(config: PixArtConfig, rows: int) -> tuple[Tensor, Tensor]:
    return meta(rows, 4, config.sample_size, config.sample_size), meta(rows, dtype=torch.float32)


def pixart(name: str, controls: int = 0):
    """As the nodes run it on a GPU: one pass with a mask, the text's keys and values kept."""
    config = pixart_config.PRESETS[name]
    net = PixArt(config, **BF16)
    nets = [PixArtControlNet(config, 13, **BF16) for _ in range(controls)]
    inputs = pixart_inputs(config, 2)
    text = net.encode_text(meta(2, max(LENGTHS), config.context_dim), meta(2, max(LENGTHS), dtype=torch.int64))
    sizes = dict(size=meta(1, 2, dtype=torch.float32), aspect_ratio=meta(1, 1, dtype=torch.float32))
    hint = meta(1, 4, config.sample_size, config.sample_size)
    return [net, *nets], lambda: net(*inputs, text=text, **sizes if config.micro_conditions else {},
                                     control=[HintedControlNet(control, hint) for control in nets])


def pixart_core(name: str):
    """As ComfyUI runs it: a pass for each prompt, since they are of two lengths."""
    config = pixart_config.PRESETS[name]
    net = import_module("comfy.ldm.pixart.pixartms").PixArtMS(
        depth=config.depth, micro_condition=config.micro_conditions, pe_interpolation=config.sample_size / 64,
        operations=import_module("comfy.ops").disable_weight_init, **BF16)
    sizes = dict(c_size=meta(1, 2), c_ar=meta(1, 1)) if config.micro_conditions else {}
    inputs, texts = pixart_inputs(config, 1), [meta(1, n, config.context_dim) for n in LENGTHS]
    return [net], lambda: [net(*inputs, text, **sizes) for text in texts]


def pixart_diffusers(name: str):
    """As diffusers' pipeline runs it: one pass, padded."""
    from diffusers import PixArtTransformer2DModel

    config = pixart_config.PRESETS[name]
    with torch.device("meta"):
        net = PixArtTransformer2DModel(
            num_layers=config.depth, sample_size=config.sample_size, interpolation_scale=config.sample_size / 64,
            use_additional_conditions=config.micro_conditions, caption_channels=config.context_dim).to(**BF16)
    padded = config.token_limit
    (x, t), text, mask = pixart_inputs(config, 2), meta(2, padded, config.context_dim), meta(2, padded)
    sizes = {name: meta(2, n) if config.micro_conditions else None
             for name, n in (("resolution", 2), ("aspect_ratio", 1))}
    return [net], lambda: net(x, text, t, encoder_attention_mask=mask, added_cond_kwargs=sizes).sample


# --- PixelFlow: both halves of a guided step in its last stage

def pixelflow(name: str):
    config = pixelflow_config.PRESETS[name]
    net = PixelFlow(config, **BF16)
    inputs = {"class_labels": meta(2, dtype=torch.int64)} if config.num_classes else {
        "text": net.encode_text(meta(2, max(LENGTHS), config.context_dim), meta(2, max(LENGTHS), dtype=torch.int64))}
    x, t = meta(2, 3, config.resolution, config.resolution), meta(2, dtype=torch.float32)
    return [net], lambda: net(x, t, **inputs)


# --- FLUX and PixelPonder at 1024 pixels, 512 text tokens

def flux_inputs(config: FluxConfig) -> dict:
    return dict(img=meta(1, 4096, config.in_channels), timestep=meta(1, dtype=torch.float32),
                context=meta(1, 512, config.context_dim), pooled=meta(1, config.pooled_dim),
                guidance=meta(1, dtype=torch.float32), img_ids=positions(64, 64, torch.device("meta")))


def flux():
    net = Flux(FluxConfig(), **BF16)
    inputs = flux_inputs(net.config)
    return [net], lambda: net(**inputs)


def flux_core():
    """Whose picture is cut into tokens inside."""
    c = FluxConfig()
    net = import_module("comfy.ldm.flux.model").Flux(
        in_channels=16, out_channels=16, vec_in_dim=c.pooled_dim, context_in_dim=c.context_dim, hidden_size=c.hidden,
        mlp_ratio=4.0, num_heads=c.heads, depth=c.depth, depth_single_blocks=c.single_depth, axes_dim=list(c.axes),
        theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
        operations=import_module("comfy.ops").disable_weight_init, **BF16)
    x, t, inputs = meta(1, 16, 128, 128), meta(1, dtype=torch.float32), flux_inputs(c)
    return [net], lambda: net(x, t, inputs["context"], inputs["pooled"], inputs["guidance"])


def flux_diffusers():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True).to(**BF16)
    inputs = flux_inputs(FluxConfig())
    ids = meta(4096, 3), meta(512, 3)
    return [net], lambda: net(inputs["img"], inputs["context"], inputs["pooled"], inputs["timestep"], *ids,
                              inputs["guidance"]).sample


def pixelponder():
    """The ControlNet with four conditions."""
    net = PixelPonder(PixelPonderConfig(), **BF16)
    hints = net.conditions([(kind, meta(1, 3, 1024, 1024)) for kind in net.config.types[:4]])
    choose, inputs = Released().begin(hints), flux_inputs(net.trunk)
    return [net], lambda: net(**inputs, select=choose).residuals(0.8, torch.bfloat16)


# --- Stable Cascade and UltraPixel

def stage_c(cells: int, guided: bool = False):
    net = StageC(STAGE_C_PRESETS["3.6b"], **BF16)
    x, t, text, pooled = stage_c_inputs(cells)
    if not guided:
        return [net], lambda: net(x, t, text, pooled)
    guide = Guide(GuideConfig(), **BF16)
    image = guide.image(net.features(meta(1, 16, 24, 24), t, text, pooled)[1])
    return [net, guide], lambda: net(x, t, text, pooled, hook=image.hook(t))


def stage_c_inputs(cells: int) -> tuple[Tensor, ...]:
    return meta(1, 16, cells, cells), meta(1, dtype=torch.float32), meta(1, 77, 1280), meta(1, 1, 1280)


def stage_c_core(cells: int):
    net = import_module("comfy.ldm.cascade.stage_c").StageC(
        operations=import_module("comfy.ops").disable_weight_init, **BF16)
    inputs, image = stage_c_inputs(cells), meta(1, 1, 768)
    return [net], lambda: net(*inputs, image)


def stage_c_diffusers(cells: int):
    from diffusers import StableCascadeUNet

    with torch.device("meta"):
        net = StableCascadeUNet(clip_text_in_channels=1280, clip_image_in_channels=768,
                                switch_level=[False]).to(**BF16)
    x, t, text, pooled = stage_c_inputs(cells)
    image = meta(1, 1, 768)
    return [net], lambda: net(x, t.to(x), pooled, text, image)


def stage_b_inputs(cells: int) -> tuple[Tensor, ...]:
    return meta(1, 4, cells, cells), meta(1, dtype=torch.float32), meta(1, 16, 24, 24), meta(1, 1, 1280)


def stage_b(cells: int):
    net, inputs = StageB(STAGE_B_PRESETS["3b"], **BF16), stage_b_inputs(cells)
    return [net], lambda: net(*inputs)


def stage_b_core(cells: int):
    net = import_module("comfy.ldm.cascade.stage_b").StageB(
        operations=import_module("comfy.ops").disable_weight_init, **BF16)
    inputs = stage_b_inputs(cells)
    return [net], lambda: net(*inputs)


def stage_b_diffusers(cells: int):
    from diffusers import StableCascadeUNet

    kinds = ("SDCascadeResBlock", "SDCascadeTimestepBlock"), (
        "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    with torch.device("meta"):
        net = StableCascadeUNet(
            in_channels=4, out_channels=4, patch_size=2, conditioning_dim=1280,
            block_out_channels=(320, 640, 1280, 1280), num_attention_heads=(-1, -1, 20, 20),
            down_num_layers_per_block=(2, 6, 28, 6), up_num_layers_per_block=(6, 28, 6, 2),
            down_blocks_repeat_mappers=(1, 1, 1, 1), up_blocks_repeat_mappers=(3, 3, 2, 2),
            block_types_per_layer=(kinds[0], kinds[0], kinds[1], kinds[1]), effnet_in_channels=16,
            pixel_mapper_in_channels=3, dropout=(0, 0, 0.1, 0.1), timestep_conditioning_type=("sca",),
        ).to(**BF16)
    x, t, effnet, pooled = stage_b_inputs(cells)
    return [net], lambda: net(x, t.to(x), pooled, effnet=effnet)


def stage_a():
    net, latent = StageA(StageAConfig(), **BF16), meta(1, 4, 256, 256)
    return [net], lambda: net.decode(latent)


def stage_a_core():
    with torch.device("meta"):
        net = import_module("comfy.ldm.cascade.stage_a").StageA().to(**BF16)
    latent = meta(1, 4, 256, 256)
    return [net], lambda: net.decode(latent)


def against(ours: Callable, core: Callable | None = None, diffusers: Callable | None = None, *args) -> dict:
    """Which network -> what builds it."""
    sides = {"ours": ours, "ComfyUI": core, "diffusers": diffusers}
    return {name: partial(side, *args) for name, side in sides.items() if side}


CASES: dict[str, dict[str, Callable]] = {
    **{f"PixArt {name}": against(pixart, pixart_core, pixart_diffusers, name)
       for name in ("alpha_1024", "sigma_1024", "sigma_2k")},
    "PixArt alpha_1024, ControlNet": against(partial(pixart, "alpha_1024", 1)),
    **{f"PixelFlow {name}": against(partial(pixelflow, name)) for name in ("xl_c2i", "xl_t2i")},
    "FLUX dev": against(flux, flux_core, flux_diffusers),
    "PixelPonder, four conditions": against(pixelponder),
    "Stage C, 96x96": against(stage_c, stage_c_core, stage_c_diffusers, 96),
    "Stage C, 96x96, guided": against(partial(stage_c, 96, guided=True)),
    "Stage B, 256x256": against(stage_b, stage_b_core, stage_b_diffusers, 256),
    "Stage A, decode 256x256": against(stage_a, stage_a_core),
}


# --- The table

COLUMNS = ("launches", "GB", "casts", "waits", "TFLOP", "peak GB")
ROW = re.compile(r"^\| (.+?) +\| (ours|ComfyUI|diffusers) +\| (.+) \|$", re.MULTILINE)


def table() -> dict[tuple[str, str], tuple[float, ...]]:
    """`counts.md`: (case, whose) -> the numbers of COLUMNS."""
    rows = ROW.findall(TABLE.read_text(encoding="utf-8"))
    return {(case, whose): tuple(map(float, numbers.split("|"))) for case, whose, numbers in rows}


def written(rows: dict[tuple[str, str], tuple[float, ...]]) -> str:
    lines = [("step", "whose", *COLUMNS), *((*key, *(f"{n:g}" for n in row)) for key, row in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "".join("| " + " | ".join(f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(
        zip(line, widths, strict=True))) + " |\n" for line in (lines[0], rule, *lines[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", metavar="CASE", help="part of the names to count; all without")
    parser.add_argument("--ours", action="store_true", help="without the networks of others, and without ComfyUI")
    parser.add_argument("--write", action="store_true", help="put the numbers into counts.md")
    parser.add_argument("--operations", action="store_true", help="and where the bytes and launches are")
    args = parser.parse_args()
    if not args.ours:
        from pixstack.tools.host import Host

        Host().start("--use-pytorch-cross-attention")  # the others' attention, as ours
    rows = {}
    for case, sides in CASES.items():
        for whose, build in sides.items():
            if (args.ours and whose != "ours") or (args.case and not any(part in case for part in args.case)):
                continue
            count = counted(build)
            rows[case, whose] = count.row()
            if args.operations:
                print(f"{case}, {whose}: " + ", ".join(
                    f"{name} {n / 1e9:.2f} GB in {count.times[name]}" for name, n in count.operations.most_common()))
    if args.write:
        head = TABLE.read_text(encoding="utf-8").partition("| step")[0]
        known = table()
        TABLE.write_text(head + written({**known, **rows}), encoding="utf-8")
    print(written(rows), end="")


if __name__ == "__main__":
    main()
