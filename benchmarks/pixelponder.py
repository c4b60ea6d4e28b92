"""PixelPonder: one step of the ControlNet with K conditions as the release executes it, as ours, and unselected.

The faithful loop does what SelectNet.py and controlnet.py of chfyfr/PixelPonder@3326c73 do: hints embedded in every
step; per round one full attention block per condition and one for the map so far, text queries included; four single
blocks of which FLUX takes two. `as run` is the same selection with everything kept that a round does not change; both
are first compared feature by feature and must be equal. `released` is the selection's deterministic limit, which asks
no network. All three take turns in one process; printed are seconds (on a CPU its own, so that other work on the
machine counts little), ratios (loop / ours, above 1 = ours is faster) as median (least to most), and the share of the
step that the selection takes, 1 - released / as run.

    python benchmarks/pixelponder.py [--preset full|small] [--conditions 1 2 3 4] [--size PIXELS] [--repeats N]
"""
from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.benchmarks.report import GIB, Report, Row, clock, difference, spread, timed  # noqa: E402
from pixstack.kernels.modulated_norm import modulate  # noqa: E402
from pixstack.kernels.rope import rotate  # noqa: E402
from pixstack.models_impl.flux.model import norm, pack, positions, unpack  # noqa: E402
from pixstack.models_impl.pixelponder.config import PRESETS, TYPES, SelectConfig  # noqa: E402
from pixstack.models_impl.pixelponder.model import PixelPonder  # noqa: E402
from pixstack.models_impl.pixelponder.patch_select import Released, Selection, SelectionInputs  # noqa: E402
from pixstack.models_impl.pixelponder.select_net import AsRun, pick  # noqa: E402

SMALL = dict(hidden=384, heads=3, mlp_hidden=1536)  # heads as wide as the release's
RELEASED_SINGLES = 4  # of which FLUX takes two


def network(args) -> PixelPonder:
    size = SMALL if args.preset == "small" else {}
    trunk = replace(PRESETS["released"].trunk, single_depth=RELEASED_SINGLES, **size)
    config = replace(PRESETS["released"], trunk=trunk, select=SelectConfig(**size))
    torch.manual_seed(0)
    net = PixelPonder(config, dtype=getattr(torch, args.dtype), device=args.device)
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.scale")), std=0.02)
    return net.eval()


def inputs(net: PixelPonder, args, conditions: int) -> tuple[dict, list]:
    torch.manual_seed(1)
    to = dict(dtype=net.dtype, device=args.device)
    cells = args.size // 16
    step = dict(
        img=torch.randn(1, cells * cells, net.trunk.in_channels, **to),
        timestep=torch.full((1,), 0.7, device=args.device),
        context=torch.randn(1, args.text, net.trunk.context_dim, **to),
        pooled=torch.randn(1, net.trunk.pooled_dim, **to),
        guidance=torch.full((1,), 4.0, device=args.device),
        img_ids=positions(cells, cells, args.device),
    )
    hints = [(kind, torch.rand(1, 3, args.size, args.size, **to) * 2 - 1) for kind in TYPES[:conditions]]
    return step, hints


def block_in_full(block, x, guide: SelectionInputs):
    """An attention block of the selection network as released: text enters with queries whose result is dropped."""
    L = guide.txt.shape[1]
    mods, (shift, scale, *_) = block.img_mod(guide.vec), block.txt_mod(guide.vec)
    text = block.txt_attn.split(modulate(norm(guide.txt), shift, scale))
    image = block.img_attn.split(modulate(norm(x), mods[0], mods[1]))
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
    return block.finish(x, guide.attention(rotate(q, guide.rope), rotate(k, guide.rope), v)[:, :, L:], mods)


def released_loop(net, conditions, guide: SelectionInputs, replay=None):
    """The selection as released. Yields (features, pick) of each round, then the Selection. replay: picks to follow."""
    select, (rows, columns) = net.select_net, conditions.grid()
    H, W = conditions.embeds.shape[-2:]
    shown = conditions.embeds.clone()  # (1, K, C, H, W), patches turn to zero as they are taken
    patches = torch.stack([pack(e) for e in conditions.embeds.unbind(1)], dim=2)  # (1, n, K, C*4)
    so_far = torch.zeros_like(conditions.embeds[:, 0])
    free = torch.ones(1, rows * columns, dtype=torch.bool, device=shown.device)
    for index in range(rows):
        features = []
        for k, kind in enumerate(conditions.types):
            x = select.pos_embed_input(pack(shown[:, k]))
            features.append(select._patches(block_in_full(select.attn_block[kind], x, guide)))
        x = select.pos_embed_input(pack(so_far))
        combined = select._patches(block_in_full(select.combine_attn_block[0], x, guide))
        feature = torch.stack([f + combined for f in features], dim=2)
        picked = pick(feature.sum(dim=-1), free, columns) if replay is None else replay[index]
        yield feature, picked
        times = torch.ones_like(picked.winner).scatter(1, picked.top, 2)
        won = patches.gather(2, picked.winner[..., None, None].expand(-1, -1, 1, patches.shape[-1]))[:, :, 0]
        so_far = unpack(won * times[..., None], H, W)
        free = free.scatter(1, picked.top, False)
        taken = torch.zeros_like(free).scatter(1, picked.top, True).view(1, rows, columns)
        cells = taken.repeat_interleave(2, 1).repeat_interleave(2, 2)
        shown = shown.masked_fill(cells[:, None, None], 0)
    yield None, Selection(so_far, torch.zeros(1, conditions.count, rows, columns, device=so_far.device))


def sides(net: PixelPonder, lean: PixelPonder, step: dict, hints: list) -> dict:
    """name -> a call that computes the residuals of one step."""
    ready = lean.conditions(hints)
    chosen, limit = AsRun(lean.select_net).begin(ready), Released().begin(ready)

    def loop():
        conditions = net.conditions(hints)

        def select(guide):
            if conditions.count == 1:
                return Released().begin(conditions)(guide)
            *_, (_, selection) = released_loop(net, conditions, guide)
            return selection

        return net(**step, select=select)

    return {"loop": loop, "as run": lambda: lean(**step, select=chosen), "released": lambda: lean(**step, select=limit)}


def features_agree(net: PixelPonder, step: dict, hints: list) -> float:
    """Greatest difference between the features of the loop and ours in standard deviations of each round's features,
    over all rounds and free patches."""
    conditions, worst = net.conditions(hints), 0.0

    def select(guide):
        nonlocal worst
        strategy, tokens = AsRun(net.select_net), net.select_net.tokens(conditions)
        picks = list(strategy.rounds(conditions, guide, tokens))
        ours, last = net.select_net.step(tokens, guide), None
        free = torch.ones(1, picks[0].winner.shape[1], dtype=torch.bool, device=picks[0].winner.device)
        for (feature, _), picked in zip(released_loop(net, conditions, guide, picks), picks, strict=False):
            left = free.nonzero()[:, 1].view(1, -1)
            mine = net.select_net.features(ours, left, last)
            worst = max(worst, difference(feature[:, left[0]], mine))
            free, last = free.scatter(1, picked.top, False), picked
        return strategy.result(conditions, picks[-1])

    net(**step, select=select)
    return worst


def compare(report: Report, net, lean, conditions: int, args):
    step, hints = inputs(net, args, conditions)
    what, details = "PixelPonder", f"{args.preset}, {args.size} px, {args.text} text tokens, {args.dtype}"
    axes, worst, equal = {"conditions": conditions}, None, True
    if conditions == 1:
        details += ", nothing to select"  # so that no exponent is fitted through it
    else:
        worst = features_agree(net, step, hints)
        equal = report.equal(f"{what}, {conditions} conditions, {details}", "the released loop", worst, args.dtype)
        print(f"K={conditions}: features of all rounds, greatest difference {worst:.1e} of the standard deviation")
    calls = sides(net, lean, step, hints)
    for call in calls.values():
        call()  # a warm-up
    peaks = {name: timed(call, args.device)[2] / GIB for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = clock(args.device)
            call()
            seconds[name].append(clock(args.device) - start)
    print(f"K={conditions}: " + ", ".join(
        f"{name} {spread(taken)} s, peak {peaks[name]:.3f} GiB" for name, taken in seconds.items()))
    share = 1 - statistics.median(limit / run for limit, run in
                                  zip(seconds["released"], seconds["as run"], strict=True))
    notes = {
        "as run": f"the selection takes {share:.0%} of the step" if conditions > 1 else "one condition: no selection",
        "released": "selects by the deterministic limit of the released rule; not compared",
    }
    for name, note in notes.items():
        compared = (worst, equal) if name == "as run" else (None, True)
        row = Row(f"{what}, {name}", "released loop", seconds[name], seconds["loop"], details, axes,
                  (peaks[name], peaks["loop"]), *compared, note)
        report.row(row, f"  loop / {name} = {spread(row.ratios)} over {args.repeats} turns; {note}")


@torch.inference_mode()
def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("full", "small"), default="full" if cuda else "small",
                        help="full: the released size, random weights; small: 384 wide")
    parser.add_argument("--conditions", type=int, nargs="+", choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--text", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}, {args.preset}, {args.size} px, {args.text} text tokens, {args.dtype}",
          flush=True)
    net = network(args)
    lean = PixelPonder(net.config.without_unused(), dtype=net.dtype, device="meta")
    kept = lean.state_dict().keys()
    lean.load_state_dict({k: v for k, v in net.state_dict().items() if k in kept}, assign=True)
    with Report() as report:
        for conditions in args.conditions:
            compare(report, net, lean.eval(), conditions, args)


if __name__ == "__main__":
    main()
