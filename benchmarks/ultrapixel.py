"""UltraPixel: Stage A's decode against the other ways to do it, the guide with and without its cache, Stages B and C.

Random weights of the released shapes. Stage A, one process each, taking turns: ComfyUI's decode of the whole picture
("untiled"), our VAE ("ours"), ComfyUI's tiled decode (512 pixels, overlap 64), and the reference's windows (256 cells,
stride 24, averaged). Printed: seconds (on a CPU: of the processor) and seconds / untiled as median (least to most),
peak memory over the weights and its part of untiled's, and the greatest difference from untiled, beside the standard
deviation of the picture. Where the untiled decode does not fit, ours takes its place in all ratios.

Guide: one guided step of Stage C of `--depth` eighths of its blocks with cfg, with what the steps have in common kept,
and computed in every step for both halves of cfg, as the reference does. Stage B: one step with cfg through ComfyUI's
network, as it is and with our patches, of `--depth` eighths of its blocks. Stage C: the same through our network, which
trains, and ComfyUI's, which draws. What is to be equal is compared first.

    python benchmarks/ultrapixel.py [--case stage_a guide stage_b stage_c] [--size 1024 4096] [--repeats N] [--depth N]
"""
from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from functools import cache, partial
from importlib import import_module
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.benchmarks.report import GIB, Report, Row, clock, difference, spread, timed  # noqa: E402
from pixstack.models_impl.state_dict import write_file  # noqa: E402
from pixstack.models_impl.ultrapixel.checkpoint import core_attention_names  # noqa: E402
from pixstack.models_impl.ultrapixel.config import GuideConfig, StageAConfig, StageCConfig  # noqa: E402
from pixstack.models_impl.ultrapixel.guidance import Features, Guide, GuidedImage  # noqa: E402
from pixstack.models_impl.ultrapixel.model import StageC  # noqa: E402
from pixstack.models_impl.ultrapixel.sampling import sizes  # noqa: E402
from pixstack.models_impl.ultrapixel.stage_a import StageA  # noqa: E402
from pixstack.tools.host import Host  # noqa: E402
from torch.nn import functional as F  # noqa: E402

CASES = ("stage_a", "guide", "stage_b", "stage_c")
SIDES = ("untiled", "ours", "ComfyUI tiled", "reference windows")
UNTILED = 8448 * 1.15  # values a cell, see `stage_a.decode_bytes`; with what else a process needs
INEXACT = {"ComfyUI tiled": "tiles of 512 px with seams", "reference windows": "averages windows with wrong borders"}
NODE = "PixStack_UltraPixelStageALoader"
STAGE_B = dict(c_hidden=[320, 576, 1152, 1152], nhead=[-1, 9, 18, 18], block_repeat=[[1, 1, 1, 1], [2, 2, 2, 2]],
               dropout=[0.0] * 4)  # fmt: skip


def random_weights(net: torch.nn.Module, gain: float = 1.0) -> dict:
    """Random weights, scaled to keep activations at about the same size from layer to layer."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, value in net.state_dict().items():
        scale = gain / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1
        weights[key] = scale * torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            weights[key] = torch.ones(value.shape)
    return weights


def filled(net: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return net.to(device=device, dtype=dtype).eval()


# --- Stage A

def decode_windows(net, latent, window: int = 256, stride: int = 24):
    """UltraPixel's own tiled decode: a mean of overlapping windows of a latent reflected by 2*stride on every side.

    Windows whose own borders are wrong are averaged in, so it differs from `decode`, and at 4096x4096 pixels it
    computes 85 times as many.
    """
    scale, margin = net.config.compression, 2 * stride
    padded = F.pad(latent, (margin,) * 4, mode="reflect")
    H, W = padded.shape[-2:]
    total = padded.new_zeros(latent.shape[0], 3, H * scale, W * scale)
    count = padded.new_zeros(1, 1, H * scale, W * scale)
    for top in range(0, H - window + 1, stride):
        for left in range(0, W - window + 1, stride):
            rows, columns = (slice(n * scale, (n + window) * scale) for n in (top, left))
            total[:, :, rows, columns] += net.decode(padded[:, :, top : top + window, left : left + window])
            count[:, :, rows, columns] += 1
    inside = slice(margin * scale, -margin * scale)
    return (total / count)[:, :, inside, inside]


@torch.inference_mode()
def decoder(pipe, side: str, weights: str, args):
    """One side in a process of its own: decodes latents of the size it is sent."""
    torch.set_num_threads(args.threads)
    Host().start()
    dtype = getattr(torch, args.dtype)
    loader = import_module(import_module("nodes").NODE_CLASS_MAPPINGS[NODE].__module__).ultrapixel_stage_a
    if side in ("untiled", "ComfyUI tiled"):
        tensors = import_module("comfy.utils").load_torch_file(weights)
        vae = import_module("comfy.sd").VAE(sd=tensors, dtype=dtype)
    else:
        vae = loader.load(weights, dtype)
    import_module("comfy.model_management").load_models_gpu([vae.patcher])

    def run(latent):
        if side == "ComfyUI tiled":
            return vae.decode_tiled(latent, 128, 128, 16)
        if side == "reference windows":
            latent = latent.to(vae.device, vae.vae_dtype)
            return decode_windows(vae.first_stage_model, latent).float().cpu().movedim(1, -1)
        if side == "ours":
            return vae.decode(latent)
        # not vae.decode, which would fall back to tiles where memory is short
        return vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype)).float().cpu().movedim(1, -1)

    run(torch.zeros(1, 4, 160, 160) if side == "reference windows" else torch.zeros(1, 4, 32, 32))  # one window
    while cells := pipe.recv():
        latent = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(1))
        picture, seconds, peak = timed(lambda latent=latent: run(latent), args.device)
        torch.save(picture, pipe.recv())
        pipe.send((seconds, peak, vae.tile(cells, cells) if side == "ours" else None))


def fits(cells: int, args) -> bool:
    """Whether the untiled decode of cells x cells does."""
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else _available()
    return UNTILED * cells**2 * getattr(torch, args.dtype).itemsize < 0.9 * free


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def stage_a(report: Report, args):
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "stage_a.safetensors"
        codebook = {"vquantizer.codebook.weight": torch.zeros(8192, 4)}  # by which ComfyUI knows the file
        write_file(weights, random_weights(StageA(StageAConfig())) | codebook)
        pipes = {}
        for side in args.sides:
            pipes[side], other = context.Pipe()
            context.Process(target=decoder, args=(other, side, str(weights), args), daemon=True).start()
        for size in args.size:
            compare(report, size, pipes, Path(folder), args)
        for pipe in pipes.values():
            pipe.send(0)


def compare(report: Report, size: int, pipes: dict, folder: Path, args):
    cells = size // 4
    sides = [s for s in pipes if s != "untiled" or fits(cells, args)]
    base = "untiled" if "untiled" in sides else "ours"
    measured = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side in sides:
            if side == "reference windows" and repeat >= args.window_repeats:
                continue
            pipes[side].send(cells)
            pipes[side].send(str(folder / f"{side}.pt"))
            measured[side].append(pipes[side].recv())
    pictures = {side: torch.load(folder / f"{side}.pt") for side in sides if measured[side]}
    print(f"Stage A, {size} px, {args.dtype}, standard deviation of the picture {pictures[base].std():.3f}"
          + ("" if base == "untiled" else "; untiled does not fit here"))
    ours = pictures.get("ours")
    for side, picture in pictures.items():
        seconds, peak = [m[0] for m in measured[side]], max(m[1] for m in measured[side])
        ratios = [a / b[0] for a, b in zip(seconds, measured[base], strict=False)]
        share, tile = peak / max(m[1] for m in measured[base]), measured[side][0][2]
        tiles = f", tiles of {4 * tile} px" if tile else ""
        error = (picture - pictures[base]).abs().max()
        print(f"  {side:18}{spread(seconds)} s, / {base} = {spread(ratios)}, peak {peak / GIB:.2f} GiB "
              f"({share:.2f}), greatest difference {error:.1e}{tiles}", flush=True)
        if side == "ours" or ours is None:
            continue
        different, note = difference(picture, ours), INEXACT.get(side, "")
        equal = bool(note) or report.equal(f"Stage A, {size} px", side, different, args.dtype)
        same_rounds = [m[0] for m in measured["ours"][: len(seconds)]]
        memory = max(m[1] for m in measured["ours"]) / GIB, peak / GIB
        report.row(Row("UltraPixel, Stage A's decode", f"ComfyUI, {side}" if side == "untiled" else side, same_rounds,
                       seconds, args.dtype, {"size": size}, memory, different, equal, note))


# --- The guide

@torch.inference_mode()
def guide(report: Report, args):
    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    n = args.depth
    with torch.device("meta"):
        base = StageC(StageCConfig(down=("CTA" * n, "CTA" * 3 * n), up=("CTA" * 3 * n, "CTA" * n)))
        net = Guide(GuideConfig())
    base, net = (filled(m.to_empty(device=args.device), **to) for m in (base, net))
    for size in args.guide_size:
        compare_guide(report, base, net, size, args)


def compare_guide(report: Report, base: StageC, net: Guide, size: int, args):
    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    n, rng = args.depth, torch.Generator().manual_seed(0)
    latent_sizes = sizes(size, size)

    def random(*shape):
        return torch.randn(shape, generator=rng).to(**to)

    context = dict(text=random(2, 77, 1280), pooled=random(2, 1, 1280))
    timestep = torch.full((2,), 0.5, device=args.device)
    _, features = base.features(random(2, 16, *latent_sizes.low), timestep, **context)
    x = random(2, 16, *latent_sizes.stage_c)
    image, seconds = GuidedImage(net, features.rows(0, 1)), {"with": [], "without": [], "plain": []}
    both = Features(*([half[:1].repeat(2, 1, 1, 1) for half in way] for way in (features.down, features.up)))
    details = f"{n}/8 of Stage C, {args.dtype}"

    def step(name):
        guided = {"with": image, "without": GuidedImage(net, both), "plain": None}[name]
        return base(x, timestep, **context, hook=guided and guided.hook(timestep))

    outputs = {name: step(name) for name in seconds}  # and a warm-up
    different = difference(outputs["without"], outputs["with"])
    equal = report.equal(f"Guide, {size} px, {details}", "the guide computed anew", different, args.dtype)
    peaks = {name: timed(partial(step, name), args.device)[2] / GIB for name in ("with", "without")}
    for _ in range(args.repeats):
        for name in seconds:
            start = clock(args.device)
            step(name)
            seconds[name].append(clock(args.device) - start)
    kept = sum(t.numel() * t.element_size() for t in image._prepared.values())
    cost = {name: [a - b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            for name in ("with", "without")}
    ratios = [a / b for a, b in zip(cost["without"], cost["with"], strict=True)]
    report.row(Row("UltraPixel, guided step of Stage C", "the guide computed anew", seconds["with"],
                   seconds["without"], details, {"size": size}, (peaks["with"], peaks["without"]), different, equal))
    print(f"Guide, {size} px, {args.dtype}: a step of {n}/8 of Stage C with cfg takes {spread(seconds['plain'])} "
          f"s without the guide, {spread(seconds['with'])} s with it kept, {spread(seconds['without'])} s computed "
          f"anew\n  only the guide: {spread(cost['with'])} s kept, {spread(cost['without'])} s anew, ratio "
          f"{spread(ratios)}; {kept / 2**20:.0f} MiB kept, greatest difference {different:.1e} of the standard "
          "deviation", flush=True)


# --- Stages B and C

@cache
def start_host():
    Host().start("--use-pytorch-cross-attention")  # as our Stage C, and as ComfyUI does by itself on NVIDIA


@torch.inference_mode()
def stage_b(report: Report, args):
    start_host()
    core, ops = import_module("comfy.ldm.cascade.stage_b"), import_module("comfy.ops")
    host = import_module(import_module("nodes").NODE_CLASS_MAPPINGS[NODE].__module__).ultrapixel_stage_b
    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    depths = [max(1, d * args.depth // 8) for d in (2, 4, 14, 4)]
    with torch.device("meta"):
        net = core.StageB(**STAGE_B, blocks=[depths, depths[::-1]], operations=ops.disable_weight_init)
    net = filled(net.to_empty(device=args.device), **to)
    patched = {}
    for name, module in net.named_modules():
        if isinstance(module, host.ResBlock):
            patched[module] = partial(host.res_block, module)
        elif name in ("effnet_mapper", "clf"):
            patched[module] = partial(host.pointwise, module)
    for size in args.stage_b_size:
        rng, latent_sizes = torch.Generator().manual_seed(0), sizes(size, size)
        given = [torch.randn(shape, generator=rng).to(**to) for shape in (
            (2, 4, *latent_sizes.stage_b), (2,), (2, 16, *latent_sizes.stage_c), (2, 1, 1280))]
        given[1] = torch.full((2,), 0.5, device=args.device)

        def step(side, given=given):
            for module, forward in patched.items():
                if side == "ours":
                    module.forward = forward
                else:
                    vars(module).pop("forward", None)
            return net(*given)

        against_comfyui(report, "Stage B", size, f"blocks {depths}, {args.dtype}", step, args)


def against_comfyui(report: Report, stage: str, size: int, details: str, step, args):
    """step(side): a prediction of ComfyUI or of ours."""
    outputs = {side: step(side) for side in ("ComfyUI", "ours")}  # and a warm-up
    different = difference(outputs["ComfyUI"], outputs["ours"])
    equal = report.equal(f"{stage}, {size} px, {details}", "ComfyUI", different, args.dtype)
    seconds, peaks = {side: [] for side in outputs}, dict.fromkeys(outputs, 0)
    for _ in range(args.repeats):
        for side in seconds:
            _, taken, peak = timed(partial(step, side), args.device)
            seconds[side].append(taken)
            peaks[side] = max(peak / GIB, peaks[side])
    row = Row(f"UltraPixel, {stage}", "ComfyUI", seconds["ours"], seconds["ComfyUI"], details, {"size": size},
              (peaks["ours"], peaks["ComfyUI"]), different, equal)
    share = f", memory {peaks['ours'] / peaks['ComfyUI']:.2f}" if peaks["ComfyUI"] else ""
    report.row(row, f"{stage}, {size} px, {details}: ComfyUI {spread(seconds['ComfyUI'])} s, peak "
                    f"{peaks['ComfyUI']:.2f} GiB; ours {spread(seconds['ours'])} s, peak {peaks['ours']:.2f} GiB\n"
                    f"  ComfyUI / ours: time {spread(row.ratios)}; ours / ComfyUI{share}; greatest difference "
                    f"{different:.1e} of the standard deviation")


@torch.inference_mode()
def stage_c(report: Report, args):
    start_host()
    core, ops = import_module("comfy.ldm.cascade.stage_c"), import_module("comfy.ops")
    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    n = args.depth
    with torch.device("meta"):
        ours = StageC(StageCConfig(down=("CTA" * n, "CTA" * 3 * n), up=("CTA" * 3 * n, "CTA" * n)))
        stock = core.StageC(blocks=[[n, 3 * n], [3 * n, n]], operations=ops.disable_weight_init)
    ours = filled(ours.to_empty(device=args.device), **to)
    stock.load_state_dict(core_attention_names(ours.state_dict()), assign=True)
    nets = {"ours": ours, "ComfyUI": stock.eval()}
    for size in args.stage_c_size:
        rng = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=rng).to(**to) for shape in (
            (2, 16, *sizes(size, size).stage_c), (2,), (2, 77, 1280), (2, 1, 1280), (2, 1, 768))]
        given[1] = torch.full((2,), 0.5, device=args.device)
        against_comfyui(report, "Stage C", size, f"{n}/8 of the blocks, {args.dtype}",
                        lambda side, given=given: nets[side](*given), args)


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 4096] if cuda else [1024], help="of Stage A's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="of Stage A's")
    parser.add_argument("--guide-size", type=int, nargs="+", default=[2048, 4096] if cuda else [1536])
    parser.add_argument("--stage-b-size", type=int, nargs="+", default=[2048, 4096] if cuda else [1024])
    parser.add_argument("--stage-c-size", type=int, nargs="+", default=[2048, 4096] if cuda else [1024])
    parser.add_argument("--depth", type=int, default=8 if cuda else 1, help="eighths of the blocks of Stage C and B")
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    parser.add_argument("--window-repeats", type=int, default=1, help="of the reference's windows, which take long")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads, processor seconds"
    print(f"torch {torch.__version__}, {where}")
    with Report() as report:
        for case in args.case:
            {"stage_a": stage_a, "guide": guide, "stage_b": stage_b, "stage_c": stage_c}[case](report, args)


if __name__ == "__main__":
    main()
