"""PixelFlow: our sampling against a plain loop of the released algorithm, same network, weights and machine.

The plain loop does what pipeline_pixelflow.py of ShoufaChen/PixelFlow does: block noise drawn block by block in Python,
the rope table on the host and copied in every attention call, text padded to 512 tokens with an additive mask, both
guidance halves in every stage. First both draw a picture in one step a stage from the same noise, which must be equal.
Then the two alternate in processes of their own; printed are seconds of each (on a CPU the process's own), their ratio
(plain / ours, above 1 = ours is faster) as median (least to most), and each process's peak memory.

    python benchmarks/pixelflow.py [--case c2i t2i] [--preset xl|small] [--steps N] [--repeats N]
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.benchmarks.report import Report, Row, clock, difference, spread  # noqa: E402
from pixstack.kernels.rope import rotate  # noqa: E402
from pixstack.models_impl.pixelflow import model as network_file  # noqa: E402
from pixstack.models_impl.pixelflow import sampling  # noqa: E402
from pixstack.models_impl.pixelflow.config import PRESETS  # noqa: E402
from pixstack.models_impl.pixelflow.model import PixelFlow, rope_table  # noqa: E402
from pixstack.models_impl.pixelflow.schedule import CascadeSchedule, guidance_scales  # noqa: E402
from pixstack.models_impl.pixelflow.stages import Stages, stage_size  # noqa: E402
from torch.nn import functional as F  # noqa: E402

PADDED = 512  # tokens that the reference pads text to
WORDS = 24  # tokens of an ordinary prompt
CASES = {"c2i": ("xl_c2i", 4.0), "t2i": ("xl_t2i", 4.0)}
SMALL = dict(heads=4, depth=4)


def network(case: str, preset: str, device: str, dtype: torch.dtype) -> PixelFlow:
    config = PRESETS[CASES[case][0]]
    if preset == "small":
        config = replace(config, **SMALL)
    torch.manual_seed(0)
    model = PixelFlow(config, dtype=dtype, device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def conditions(model: PixelFlow, batch: int, device: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """(cond, uncond) at their real length."""
    if not model.config.text_conditional:
        labels = torch.arange(batch, device=device)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, model.config.num_classes)}
    tokens = torch.randn(batch, WORDS, model.config.context_dim, device=device, dtype=dtype)
    return {"context": tokens}, {"context": tokens[:, :1]}  # an empty prompt is one token, </s>


def predictor(model, cond, uncond, batch, device, dtype):
    """Guidance as our nodes do it: one pass of both halves, none of the unconditional half where the scale is 1."""
    length = max((c["context"].shape[1] for c in (cond, uncond) if "context" in c), default=0)
    if length:
        pair = [F.pad(c["context"], (0, 0, 0, length - c["context"].shape[1])) for c in (uncond, cond)]
        lengths = torch.tensor([c["context"].shape[1] for c in (uncond, cond)], device=device).repeat_interleave(batch)
        both = {"context": torch.cat(pair), "mask": torch.arange(length, device=device) < lengths[:, None]}
    else:
        both = {"class_labels": torch.cat((uncond["class_labels"], cond["class_labels"]))}

    def predict(x, timestep, stage, cfg):
        if cfg == 1:
            return model(x.to(dtype), torch.full((batch,), timestep, device=device), **cond).float()
        v = model(x.to(dtype).repeat(2, 1, 1, 1), torch.full((2 * batch,), timestep, device=device), **both).float()
        return torch.lerp(v[:batch], v[batch:], cfg)

    return predict


def ours(model, case, size, steps, batch, device, dtype):
    cond, uncond = conditions(model, batch, device, dtype)
    predict = predictor(model, cond, uncond, batch, device, dtype)
    stages = Stages(model.config.num_stages)
    policy = "constant" if model.config.text_conditional else "scaled"
    guidance = guidance_scales(policy, CASES[case][1], stages.num_stages)
    schedule = CascadeSchedule.build(stages, steps, guidance=guidance)
    rng = torch.Generator().manual_seed(0)
    small = stage_size(size, size, 0, stages.num_stages)
    noise = torch.randn(batch, 3, *small, generator=rng).to(device)
    flow = sampling.CascadeFlow(stages)
    return flow.sample(predict, noise, schedule, lambda stage, shape: sampling.block_noise(shape, rng).to(device))


def plain(model, case, size, steps, batch, device, dtype, rng=None):
    """rng: draws the noise as ours does, instead of as the released code."""
    cond, uncond = conditions(model, batch, device, dtype)
    config, stages = model.config, Stages(model.config.num_stages)
    if config.text_conditional:
        rows = [F.pad(c["context"], (0, 0, 0, PADDED - c["context"].shape[1])) for c in (uncond, cond)]
        keep = torch.tensor([c["context"].shape[1] for c in (uncond, cond)], device=device).repeat_interleave(batch)
        bias = torch.where(torch.arange(PADDED, device=device) < keep[:, None], 0.0, -10000.0).to(dtype)[:, None, None]
        given = {"context": torch.cat(rows)}
    else:
        bias, given = None, {"class_labels": torch.cat((uncond["class_labels"], cond["class_labels"]))}

    def attention(q, k, v, mask=None):
        cross = bias is not None and k.shape[2] == PADDED and k.shape[2] != q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if cross else None)

    covariance = (4 / 3 + sampling.NOISE_EPS) * torch.eye(4) - 1 / 3 * torch.ones(4, 4)
    normal = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    small = stage_size(size, size, 0, stages.num_stages)
    x = torch.randn(batch, 3, *small, generator=rng).to(device) if rng else torch.randn(batch, 3, *small, device=device)
    for k in range(stages.num_stages):
        if k:
            B, C, H, W = x.shape
            if rng:
                noise = sampling.block_noise((B, C, 2 * H, 2 * W), rng).to(device)
            else:  # one by one, a block of the doubled size at a time
                blocks = torch.stack([normal.sample() for _ in range(B * C * H * W)])
                noise = blocks.view(B, C, H, W, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(B, C, 2 * H, 2 * W).to(device)
            x = sampling.jump(x, k, noise, stages)
        h, w = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
        rope = rope_table(h, w, config.head_dim)  # stays on the host, as the released code has it
        timesteps, times = stages.times(k, steps)
        scale = CASES[case][1]
        if not config.text_conditional:
            scale = guidance_scales("scaled", scale, stages.num_stages)[k]
        for timestep, dt in zip(timesteps.tolist(), times.diff().tolist(), strict=True):
            both = x.to(dtype).repeat(2, 1, 1, 1)
            v = model(both, torch.full((2 * batch,), timestep, device=device), rope=rope, attention=attention, **given)
            unguided, guided = v.float().chunk(2)
            x = x + dt * (unguided + scale * (guided - unguided))
    return x


@torch.inference_mode()
def worker(pipe, side, case, args):
    """One side in a process of its own: a picture in one step a stage first, then the seconds of each that is asked."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = network(case, args.preset, args.device, dtype)
    run = {"ours": ours, "plain": plain}[side]
    if side == "plain":  # its table is on the host: every attention call gets a copy on the device
        network_file.rotate = lambda x, table: rotate(x, table.to(x.device))
    torch.manual_seed(1)  # the text
    given = {"rng": torch.Generator().manual_seed(0)} if side == "plain" else {}
    picture = run(model, case, args.size[case], 1, args.batch, args.device, dtype, **given)  # and a warm-up
    pipe.send(picture.float().cpu().numpy())
    while pipe.recv():
        start = clock(args.device)
        picture = run(model, case, args.size[case], args.steps, args.batch, args.device, dtype)
        seconds = clock(args.device) - start
        assert picture.shape[-1] == args.size[case] and picture.isfinite().all()
        pipe.send(seconds)
    if args.device == "cuda":
        pipe.send(torch.cuda.max_memory_allocated() / 2**30)
    else:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux


def compare(report: Report, case: str, args):
    details = f"{args.preset}, {args.steps} steps a stage, {args.dtype}"
    what, axes = f"PixelFlow {case}", {"size": args.size[case], "batch": args.batch}
    title = f"{what}, {args.size[case]} px, batch {args.batch}, {details}"
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in ("plain", "ours"):
        pipes[side], other = context.Pipe()
        context.Process(target=worker, args=(other, side, case, args), daemon=True).start()
    pictures = {side: torch.from_numpy(pipe.recv()) for side, pipe in pipes.items()}
    different = difference(pictures["plain"], pictures["ours"])
    equal = report.equal(title, "plain", different, args.dtype)
    seconds = {side: [] for side in pipes}
    for _ in range(args.repeats):
        for side, pipe in pipes.items():
            pipe.send(True)
            seconds[side].append(pipe.recv())
    memory = {}
    for side, pipe in pipes.items():
        pipe.send(False)
        memory[side] = pipe.recv()
    row = Row(what, "plain loop of the release", seconds["ours"], seconds["plain"], details, axes,
              (memory["ours"], memory["plain"]), different, equal)
    report.row(row, f"{title}\n  plain {spread(row.theirs)} s, peak {memory['plain']:.2f} GiB\n  ours  "
                    f"{spread(row.ours)} s, peak {memory['ours']:.2f} GiB\n  plain / ours = {spread(row.ratios)} over "
                    f"{args.repeats} pairs, greatest difference {different:.1e} of the standard deviation")


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--preset", choices=("xl", "small"), default="xl" if cuda else "small",
                        help="xl: the released size, random weights; small: 4 heads, 4 blocks")
    parser.add_argument("--steps", type=int, default=10, help="per stage")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--c2i-size", type=int, default=256)
    parser.add_argument("--t2i-size", type=int, default=1024 if cuda else 128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.size = {"c2i": args.c2i_size, "t2i": args.t2i_size}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}")
    with Report() as report:
        for case in args.case:
            compare(report, case, args)


if __name__ == "__main__":
    main()
