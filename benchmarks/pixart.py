"""PixArt-Sigma: one guided step of our network against ComfyUI's own PixArtMS and diffusers' PixArtTransformer2DModel.

The same random weights in all three, in one ComfyUI process, prompts of 17 and 3 tokens. Ours keeps the text's keys and
values, calls ComfyUI's attention, and runs both prompts in one masked pass where our nodes do, else in two; core runs
one pass for each, as its sampler does with prompts of unequal length; diffusers runs one pass padded to 300 tokens, as
its pipeline does; and ours runs the other way too, to check the choice. All use PyTorch's attention and
take turns; printed are the greatest difference of their predictions, and peer / ours (above 1 =
ours is faster) as median (least to most). Core divides by zero at 256 px and is left out there; between trained sizes
it places tokens elsewhere, so that its predictions differ.

    python benchmarks/pixart.py [--size 512 1024] [--batch 1 4] [--depth N] [--repeats N]
"""
from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.benchmarks.report import GIB, Report, Row, clock, difference, spread, timed  # noqa: E402
from pixstack.models_impl.pixart.config import PixArtConfig  # noqa: E402
from pixstack.models_impl.pixart.key_names import to_diffusers  # noqa: E402
from pixstack.models_impl.pixart.model import PixArt  # noqa: E402
from pixstack.tools.host import Host  # noqa: E402
from torch.nn import functional as F  # noqa: E402

LENGTHS = (17, 3)
PADDED = 300  # tokens that diffusers' Sigma pipeline pads to
TRAINED = (512, 1024, 2048)  # pixels at which ComfyUI's positions are the released ones


def networks(args, size: int, batch: int) -> dict:
    """Three networks of a depth, as sides with fn(x, timestep, texts) -> (cond, uncond) eps."""
    core, ops = import_module("comfy.ldm.pixart.pixartms"), import_module("comfy.ops")
    optimized = import_module("comfy.ldm.modules.attention").optimized_attention
    from diffusers import PixArtTransformer2DModel

    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    config = PixArtConfig(depth=args.depth, sample_size=size // 8)
    torch.manual_seed(0)
    net = PixArt(config, operations=ops.disable_weight_init, **to).eval()
    weights = {k: 0.02 * torch.randn(v.shape) for k, v in net.state_dict().items()}
    net.load_state_dict(weights)
    scale = size // 8 / 64
    stock = core.PixArtMS(depth=args.depth, micro_condition=False, pe_interpolation=scale, model_max_length=PADDED,
                          operations=ops.disable_weight_init, **to).eval()
    stock.load_state_dict(weights, strict=False)
    peer = PixArtTransformer2DModel(
        num_layers=args.depth, sample_size=size // 8, interpolation_scale=scale, use_additional_conditions=False,
        caption_channels=4096,
    ).eval()
    peer.load_state_dict(to_diffusers(weights))
    peer.to(**to)

    def attention(q, k, v, mask=None):  # the mask is what is added to the scores
        return optimized(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)

    kept = {}
    run, encode = torch.compile(net) if args.compile else net, net.encode_text

    def one_pass(x, t, texts, net=run):
        B = len(x)
        if "both" not in kept:
            rows = [F.pad(text, (0, 0, 0, max(LENGTHS) - text.shape[1])).expand(B, -1, -1) for text in texts]
            keep = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).repeat_interleave(B)[:, None]
            kept["both"] = encode(torch.cat(rows), keep.to(x.device))
        return net(x.repeat(2, 1, 1, 1), t.repeat(2), text=kept["both"], attention=attention)[:, :4].chunk(2)

    def two_passes(x, t, texts, net=run):
        if "each" not in kept:
            kept["each"] = [encode(text.expand(len(x), -1, -1)) for text in texts]
        return [net(x, t, text=text, attention=attention)[:, :4] for text in kept["each"]]

    def comfyui(x, t, texts):
        return [stock(x, t, text.expand(len(x), -1, -1)) for text in texts]

    def diffusers(x, t, texts):
        rows = torch.cat([F.pad(text, (0, 0, 0, PADDED - text.shape[1])).expand(len(x), -1, -1) for text in texts])
        keep = torch.arange(PADDED) < torch.tensor(LENGTHS).repeat_interleave(len(x))[:, None]
        return peer(x.repeat(2, 1, 1, 1), rows, t.repeat(2), encoder_attention_mask=keep.to(x),
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample[:, :4].chunk(2)

    one_is_faster = import_module("pixstack.nodes.host.common.conds").one_pass_is_faster
    ways = {"ours in one pass": one_pass, "ours in two passes": two_passes}
    chosen = "ours in one pass" if one_is_faster(batch * (size // 16) ** 2, torch.device(args.device)) else \
        "ours in two passes"
    named = {"ours": ways.pop(chosen)}
    if args.compile:
        ways = {"ours, not compiled": partial(named["ours"], net=net)}
    return {**named, **ways, "ComfyUI": comfyui, "diffusers": diffusers}


@torch.inference_mode()
def compare(report: Report, args, size: int, batch: int):
    to = dict(device=args.device, dtype=getattr(torch, args.dtype))
    what = "PixArt, compiled" if args.compile else "PixArt"
    details = f"depth {args.depth}, {args.dtype}"
    title = f"{what}, {size} px, batch {batch}, {details}"
    sides = networks(args, size, batch)
    x = torch.randn(batch, 4, size // 8, size // 8).to(**to)
    t, texts = torch.full((batch,), 500.0, device=args.device), [torch.randn(1, n, 4096).to(**to) for n in LENGTHS]
    predictions, differences, peaks, equal, notes = {}, {}, {}, {}, {}
    for name, side in list(sides.items()):
        try:
            predictions[name] = torch.cat(list(side(x, t, texts))).float()  # and a warm-up
        except ZeroDivisionError:
            print(f"{title}: {name} divides by zero")
            del sides[name]
            continue
        differences[name] = difference(predictions[name], predictions["ours"])
        if name == "ComfyUI" and size not in TRAINED:
            notes[name] = "ComfyUI places tokens elsewhere between trained sizes"
        else:
            equal[name] = report.equal(title, name, differences[name], args.dtype)
        peaks[name] = timed(partial(side, x, t, texts), args.device)[2] / GIB
    seconds = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            start = clock(args.device)
            side(x, t, texts)
            seconds[name].append(clock(args.device) - start)
    print(f"{title}: ours {spread(seconds['ours'])} s a step, peak {peaks['ours']:.3f} GiB over the weights")
    for name in [name for name in sides if name != "ours"]:
        row = Row(what, name, seconds["ours"], seconds[name], details, {"size": size, "batch": batch},
                  (peaks["ours"], peaks[name]), differences[name], equal.get(name, True), notes.get(name, ""))
        report.row(row, f"  {name} / ours = {spread(row.ratios)} over {args.repeats} rounds, peak {peaks[name]:.3f} "
                        f"GiB, greatest difference {row.difference:.1e} of the standard deviation")


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024, 2048] if cuda else [512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4] if cuda else [1])
    parser.add_argument("--depth", type=int, default=28 if cuda else 2, help="28: the released network")
    parser.add_argument("--repeats", type=int, default=10 if cuda else 5)
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    args = parser.parse_args()
    Host().start("--use-pytorch-cross-attention")  # as diffusers, and as ComfyUI does by itself on NVIDIA
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    with Report() as report:
        for size in args.size:
            for batch in args.batch:
                compare(report, args, size, batch)


if __name__ == "__main__":
    main()
