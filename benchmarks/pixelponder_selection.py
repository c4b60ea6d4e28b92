"""Does `accumulate` learn to select? Our PixelPonder on a tiny FLUX, a toy task, some minutes on a CPU.

Pictures are smooth random fields. Each of 2 to 4 conditions shows the picture in one region and white noise of the
same variance elsewhere; regions, kinds of hints and their order are redrawn for every batch, so neither position
nor kind says anything. FLUX learns the pictures and is frozen. PixelPonder learns to follow one condition that is true
everywhere, as the released weights do; then a selector is added, trained by itself at first, then with the network, and
only by the ordinary loss of the flow. Printed is the part of the patches in which the condition that shows the picture
was chosen, on pictures that were not trained on; its course and examples of the maps are drawn.

    python benchmarks/pixelponder_selection.py [--steps N] [--jobs N] [--threads N] [--picture FILE.png]
"""
from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from pixstack.models_impl.flux.config import FluxConfig  # noqa: E402
from pixstack.models_impl.flux.model import Flux, pack, positions  # noqa: E402
from pixstack.models_impl.flux.sampling import RectifiedFlow  # noqa: E402
from pixstack.models_impl.pixelponder.accumulate import Accumulate  # noqa: E402
from pixstack.models_impl.pixelponder.config import TYPES, PixelPonderConfig, SelectorConfig  # noqa: E402
from pixstack.models_impl.pixelponder.model import HINT_CELL, PixelPonder  # noqa: E402
from pixstack.models_impl.pixelponder.patch_select import Conditions, Released  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

CELLS = 16  # side of the latent: 8 by 8 patches
# Cells of a field along one side. The likelihoods of a patch's four cells separate it from noise every time; from three
# noises only 74 times of 100 if CELLS were 8, which would then be the most that can be learnt.
POINTS = 5
FLOW = RectifiedFlow()
TEXT = 4  # tokens, always the same: the task has no words
BASE = FluxConfig(hidden=96, heads=3, axes=(8, 12, 12), mlp_hidden=384, depth=2, single_depth=2, pooled_dim=8,
                  context_dim=16)
CONTROL = PixelPonderConfig(BASE, selector=SelectorConfig(96))
RULES = (None, 1, 4)  # the released one, and rounds of `accumulate`
ENOUGH = 0.97


def name_of(rounds: int | None) -> str:
    return "released" if rounds is None else f"accumulate, {rounds} round{'s' if rounds > 1 else ''}"


class Task:
    """Draws pictures, their regions and their conditions. A latent is three colours turned into 16 channels."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        mixing = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        self.mixing = torch.linalg.qr(mixing)[0] * (16 / 3) ** 0.5  # of variance 1

    def colours(self, B: int):
        """(B, 3, cells, cells), smooth, of variance 1."""
        x = torch.randn(B, 3, POINTS, POINTS, generator=self.random)
        x = F.interpolate(x, (CELLS, CELLS), mode="bicubic", align_corners=True)
        return (x - x.mean(dim=(2, 3), keepdim=True)) / x.std(dim=(2, 3), keepdim=True)

    def latent(self, colours):
        return torch.einsum("oc,bchw->bohw", self.mixing, colours)

    def regions(self, B: int, conditions: int):
        """(B, rows, columns): who knows the patch. Nearest of as many random points."""
        side = CELLS // 2
        points = torch.rand(B, conditions, 2, generator=self.random) * side
        row, column = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        places = torch.stack((row, column), dim=-1).view(1, 1, -1, 2)
        return (places - points[:, :, None]).square().sum(dim=-1).argmin(dim=1).view(B, side, side)

    def batch(self, B: int, conditions: int):
        """(latent, owner of each patch, hints): each hint is true in its region and noise elsewhere."""
        colours, owner = self.colours(B), self.regions(B, conditions)
        cells = owner.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        hints = []
        for k in range(conditions):
            shown = torch.where(cells == k, colours, torch.randn(colours.shape, generator=self.random))
            hints.append(F.interpolate(shown / 2, scale_factor=HINT_CELL, mode="nearest"))
        kinds = torch.randint(len(TYPES), (conditions,), generator=self.random).tolist()
        return self.latent(colours), owner, [(TYPES[kind], hint) for kind, hint in zip(kinds, hints, strict=True)]

    def noisy(self, latent):
        """(noise, sigma, inputs of FLUX)"""
        B = len(latent)
        noise = torch.randn(latent.shape, generator=self.random)
        sigma = FLOW.draw(B, self.random)
        x = FLOW.add_noise(latent, noise, sigma)
        given = dict(img=pack(x), timestep=sigma, context=torch.ones(B, TEXT, BASE.context_dim),
                     pooled=torch.ones(B, BASE.pooled_dim), guidance=torch.full((B,), 4.0),
                     img_ids=positions(CELLS // 2, CELLS // 2))  # fmt: skip
        return noise, given


def fit(parameters, steps: int, learning_rate: float, loss_of, every: int, report):
    """AdamW on `loss_of()`, the learning rate falling to 0; report(step, mean loss since the last report)."""
    parameters, losses = list(parameters), []
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        falling.step()
        losses.append(loss.item())
        if step % every == 0:
            report(step, sum(losses) / len(losses))
            losses = []


def train_base(steps: int, batch: int) -> Flux:
    torch.manual_seed(0)
    base, task = Flux(BASE), Task(1)

    def loss():
        latent = task.latent(task.colours(batch))
        noise, given = task.noisy(latent)
        return FLOW.loss(base(**given), pack(latent), pack(noise), given["timestep"]).mean()

    fit(base.parameters(), steps, 1e-3, loss, 50, lambda step, mean: print(f"  FLUX, step {step}: loss {mean:.3f}",
                                                                           flush=True))
    return base.eval().requires_grad_(False)


def loss_with(net: PixelPonder, base: Flux, strategy, task: Task, batch: int, conditions: int):
    """The flow's loss of FLUX under control."""
    latent, _, hints = task.batch(batch, conditions)
    noise, given = task.noisy(latent)
    residuals = net(**given, select=strategy.begin(net.conditions(hints))).residuals()
    prediction = base(**given, residuals=residuals)
    return FLOW.loss(prediction, pack(latent), pack(noise), given["timestep"]).mean()


def train_control(base: Flux, steps: int, batch: int) -> PixelPonder:
    """A PixelPonder that follows a single hint."""
    torch.manual_seed(0)
    net, task = PixelPonder(CONTROL).initialise(base.state_dict()), Task(2)
    encoders = nn.ModuleList((net.input_hint_block_list_moe, net.input_hint_block_share[:-1]))
    for layer in encoders.modules():  # pass hints on from the first step: there are minutes, not days
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    fit(net.parameters(), steps, 3e-3, lambda: loss_with(net, base, Released(), task, batch, 1), 25,
        lambda step, mean: print(f"  PixelPonder with one condition, step {step}: loss {mean:.3f}", flush=True))
    return net.eval().requires_grad_(False)


def train_selector(base: Flux, control: PixelPonder, rounds: int, args) -> tuple[PixelPonder, list]:
    """(network with a selector, [(step, part of the patches chosen rightly)])"""
    net, task, started = copy.deepcopy(control), Task(7), time.perf_counter()
    course = [(0, right_on_average(net, rounds))]

    def loss():
        conditions = int(torch.randint(2, 5, (1,), generator=task.random))
        return loss_with(net, base, strategy_of(net, rounds), task, args.batch, conditions)

    def report(step, mean, before=0):
        course.append((before + step, right_on_average(net, rounds)))
        print(f"  {name_of(rounds)}, step {before + step}: loss {mean:.3f}, right {course[-1][1]:.1%}, "
              f"{time.perf_counter() - started:.0f} s", flush=True)

    net.selector.requires_grad_(True)
    fit(net.selector.parameters(), args.settle, 1e-3, loss, 20, report)
    net.requires_grad_(True)  # hints have never been noise before, so their encoders did not learn to show it
    fit(net.parameters(), args.steps, 1e-3, loss, 20, partial(report, before=args.settle))
    return net, course


def strategy_of(net: PixelPonder, rounds: int | None):
    return Released() if rounds is None else Accumulate(net.selector, rounds)


def right_on_average(net: PixelPonder, rounds: int | None) -> float:
    return sum(choose(net, rounds, conditions, 32)[0] for conditions in (2, 3, 4)) / 3


@torch.no_grad()
def choose(net: PixelPonder, rounds: int | None, conditions: int, pictures: int, seed: int = 3):
    """(part of the patches whose condition knows the picture, owners, winners) on pictures of their own."""
    task = Task(seed)
    latent, owner, hints = task.batch(pictures, conditions)
    _, given = task.noisy(latent)
    selection = net(**given, select=strategy_of(net, rounds).begin(net.conditions(hints))).selection
    winner = selection.winner.expand_as(owner)
    return float((winner == owner).float().mean()), owner, winner


@torch.no_grad()
def same_in_any_order(net: PixelPonder, rounds: int, conditions: int = 4) -> bool:
    """Whether the map is the same when the conditions are given the other way round."""
    task = Task(4)
    latent, _, hints = task.batch(8, conditions)
    _, given = task.noisy(latent)
    ready = net.conditions(hints)
    turned = Conditions(ready.embeds.flip(1), ready.types[::-1])
    maps = [net(**given, select=strategy_of(net, rounds).begin(c)).selection.winner for c in (ready, turned)]
    return torch.equal(maps[0], conditions - 1 - maps[1])


# --- The picture

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167))
PAPER, INK, FAINT = "white", (40, 40, 40), (205, 205, 205)
TILE = 88


def draw(results: dict, path: Path):
    font = ImageFont.load_default(15)
    width, top, graph = 820, 40, 250
    image = Image.new("RGB", (width, top + graph + 60 + (1 + len(results)) * (TILE + 12) + 20), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((20, 12), "Patches given to the condition that knows the picture, while training", font=font, fill=INK)
    left, right = 60, width - 190
    last = max(step for course, _ in results.values() for step, _ in course)
    for percent in (0, 25, 50, 75, 100):
        y = top + graph - graph * percent / 100
        pen.line((left, y, right, y), fill=FAINT)
        pen.text((left - 8, y), f"{percent} %", font=font, fill=INK, anchor="rm")
    ends = []
    for (name, (course, _)), colour in zip(results.items(), ((120, 120, 120), COLOURS[0], (0, 114, 178)), strict=True):
        points = [(left + (right - left) * step / last, top + graph * (1 - part)) for step, part in course]
        pen.line(points, fill=colour, width=3)
        y = points[-1][1]
        while any(abs(y - other) < 18 for other in ends):
            y += 18
        ends.append(y)
        pen.text((right + 8, y), name, font=font, fill=colour, anchor="lm")
    below = f"training steps with a selector (0 to {last})"
    pen.text(((left + right) / 2, top + graph + 16), below, font=font, fill=INK, anchor="mm")
    maps = {"who knows": next(iter(results.values()))[1][0], **{name: maps[1] for name, (_, maps) in results.items()}}
    for row, (name, pictures) in enumerate(maps.items()):
        y = top + graph + 50 + row * (TILE + 12)
        pen.text((20, y + TILE / 2), name, font=font, fill=INK, anchor="lm")
        for column, picture in enumerate(pictures[:6]):
            pixels = torch.tensor(COLOURS, dtype=torch.uint8)[picture].numpy()
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            image.paste(tile, (190 + column * (TILE + 14), int(y)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def run(weights: tuple[dict, dict], args, rounds: int | None) -> tuple[str, list, tuple]:
    """(name, course, (owners, winners) of some pictures) of one rule, in a process of its own."""
    torch.set_num_threads(args.threads)
    base, net = Flux(BASE).eval(), PixelPonder(CONTROL).eval()
    for module, tensors in zip((base, net), weights, strict=True):
        module.load_state_dict(tensors)
        module.requires_grad_(False)
    if rounds is None:  # it has nothing to train
        course = [(step, right_on_average(net, None)) for step in (0, args.settle + args.steps)]
    else:
        net, course = train_selector(base, net, rounds, args)
    name, parts = name_of(rounds), {K: choose(net, rounds, K, 512, seed=5)[0] for K in (2, 3, 4)}
    with torch.no_grad():
        loss = sum(loss_with(net, base, strategy_of(net, rounds), Task(8 + K), 256, K) for K in parts) / 3
    print(f"{name}: right in " + ", ".join(f"{part:.1%} of {K}" for K, part in parts.items())
          + f" conditions (at random 50.0%, 33.3%, 25.0%), loss {loss:.3f}", flush=True)
    if rounds is not None:
        print(f"  the same in any order: {same_in_any_order(net, rounds)}; at least {ENOUGH:.0%}: "
              f"{all(part >= ENOUGH for part in parts.values())}", flush=True)
    return name, course, choose(net, rounds, 4, 6, seed=6)[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=250, help="training of FLUX")
    parser.add_argument("--control-steps", type=int, default=250, help="steps of PixelPonder with one condition")
    parser.add_argument("--settle", type=int, default=100, help="steps of only the selector")
    parser.add_argument("--steps", type=int, default=500, help="steps of both together")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=len(RULES), help="rules at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--picture", type=Path, default=Path("pixelponder_selection.png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = train_base(args.base_steps, 2 * args.batch)
    control = train_control(base, args.control_steps, args.batch)
    weights = base.state_dict(), control.state_dict()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        results = {name: result for name, *result in pool.map(partial(run, weights, args), RULES)}
    draw(results, args.picture)
    print(f"drawn: {args.picture}")


if __name__ == "__main__":
    main()
