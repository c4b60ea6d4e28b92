"""Training: our recipes against a peer that does the same maths, on the same weights, batches and machine.

    full        all weights of a PixArt; the peer: diffusers' PixArtTransformer2DModel, trained as diffusers' scripts do
    lora        a LoRA of rank 16 on all linear layers of a frozen PixArt; the peer: the same network of diffusers, with
                peft. Ours has q, k, v in one matrix, with one input side of rank 16 where the peer has three
    pixelflow   a PixelFlow of classes, all stages in every batch; the peer: a plain loop of the released algorithm
                (train.py and data_in1k.py of ShoufaChen/PixelFlow; diffusers has none): pictures are shrunk, noised and
                cut one by one, modulations repeated to every token, attention called for each picture. With an EMA
    controlnet  PixArt-delta's ControlNet of half the blocks; the peer: a plain PyTorch loop over diffusers' blocks as
                in its examples/research_projects/pixart, the copies being blocks of diffusers, too

PixArt's captions have 60 tokens, which the peer pads to --padded; the loss is the error of the noise. Both sides train
with AdamW and a limit of the gradients' norm, under autocast where --precision is bf16. The peer's AdamW is torch's
fused one, as ours; with --adamw default it is what training scripts call, torch.optim.AdamW without that argument.

Each side is a process of its own. Both make the first step, whose losses must be equal; then they take rounds of
--steps in turn. Printed are our steps per second, the ratio ours / peer (above 1 = ours is faster) as median (least to
most) over the rounds, and the greatest memory of each process (below 1 = ours needs less), of which "training" is what
it needs beyond its libraries. On a CPU the seconds are the process's own, so that other work counts less.

    python benchmarks/trainer.py [--case full lora pixelflow controlnet] [--size PIXELS] [--depth N] [--batch N]
        [--steps N] [--rounds N] [--threads N]
"""
from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import resource
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

from pixstack.benchmarks.report import GIB, Report, Row, clock, forget_peak, spread, status_bytes  # noqa: E402

WIDTH, LENGTH, LIMIT = 4096, 60, 300  # of T5's tokens; tokens of a caption, and the most that the network reads
WARM_UP = 2  # steps
SHAPE = dict(hidden=1152, heads=16, context_dim=WIDTH, token_limit=LIMIT)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # of the peer: pixart.TARGETS, unfused
RANK = 16
CLASSES, DROPOUT, EMA = 1000, 0.1, 0.9999
RATE, CLIP = 1e-5, 1.0


@dataclass
class Side:
    module: Any
    """Whose parameters learn, those that require gradients."""
    loss: Any
    """(step) -> tensor"""
    after: Any = None
    """(step), when the weights have learned"""


# --- PixArt

def weights(args):
    """A network none of whose weights is zero, in our names."""
    import torch
    from pixstack.models_impl.pixart.config import PixArtConfig
    from pixstack.models_impl.pixart.model import PixArt

    config = PixArtConfig(depth=args.depth, sample_size=args.size // 8, **SHAPE)
    torch.manual_seed(0)
    return config, without_zeros(PixArt(config).initialise())


def without_zeros(net):
    import torch

    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return net


def batch_of(args, step: int):
    """(latent, noise, timestep, text, hint): what both sides learn from."""
    import torch

    rng = torch.Generator().manual_seed(step)
    shape = (args.batch, 4, args.size // 8, args.size // 8)
    latent, noise, hint = (torch.randn(shape, generator=rng) for _ in range(3))
    timestep = torch.randint(1000, (args.batch,), generator=rng)
    text = torch.randn(args.batch, LENGTH, WIDTH, generator=rng)
    return [t.to(args.device) for t in (latent, noise, timestep, text, hint)]


def control_of(args, config, net):
    import torch
    from pixstack.models_impl.pixart.controlnet import PixArtControlNet

    torch.manual_seed(1)
    return without_zeros(PixArtControlNet(config, max(1, args.depth // 2)).initialise(net))


def autocast(args):
    import torch

    return torch.autocast(args.device, torch.bfloat16, args.precision == "bf16")


def ours_pixart(args, case: str) -> Side:
    import torch
    from pixstack.models_impl.pixart.model import HintedControlNet
    from pixstack.models_impl.pixart.sampling import PixArtDiffusion
    from pixstack.trainer.config.schema import Adapter
    from pixstack.trainer.recipes import adapters
    from pixstack.trainer.recipes.pixart import task

    config, net = weights(args)
    learns, control = net, None
    if case == "controlnet":
        learns = control = control_of(args, config, net).to(args.device)
    if case != "full":
        net.requires_grad_(False)
        if args.precision == "bf16":
            net.to(torch.bfloat16)  # as recipes/pixart/start.frozen
    if case == "lora":
        adapters.attach(net, Adapter(rank=RANK), task.TARGETS)
    net.gradient_checkpointing = args.checkpoint
    net.to(args.device)
    diffusion = PixArtDiffusion.of(config)

    def loss(step):
        latent, noise, timestep, text, hint = batch_of(args, step)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=args.device)
        given = {"control": [HintedControlNet(control, hint)]} if control is not None else {}
        with autocast(args):
            noisy = diffusion.add_noise(latent, noise, timestep)
            prediction = net(noisy, timestep, context=text, mask=mask, **given)
            return diffusion.losses(prediction, latent, noise, timestep, variance=0.0).mse.mean()

    return Side(learns, loss)


def of_diffusers(config, state: dict, depth: int):
    from diffusers import PixArtTransformer2DModel
    from pixstack.models_impl.pixart.key_names import to_diffusers

    made = PixArtTransformer2DModel(
        num_layers=depth, sample_size=config.sample_size, interpolation_scale=config.sample_size / 2 / 32,
        use_additional_conditions=False, caption_channels=WIDTH)
    made.load_state_dict(to_diffusers(state))
    return made


def peer_pixart(args, case: str) -> Side:
    import torch
    from diffusers import DDPMScheduler
    from torch.nn import functional as F

    config, net = weights(args)
    other = of_diffusers(config, net.state_dict(), args.depth)
    learns, predict = other, partial(plain_prediction, other)
    if case == "controlnet":
        learns = plain_control(config, net.state_dict(), control_of(args, config, net)).to(args.device)
        predict = partial(controlled_prediction, args, other, learns)
    del net
    if case != "full":
        other.requires_grad_(False)
        if args.precision == "bf16":
            other.to(torch.bfloat16)
    if case == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(  # diffusers' PixArt has no add_adapter of its own
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS), other)
        for p in other.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    if args.checkpoint:
        other.enable_gradient_checkpointing()
    other.to(args.device).train()
    schedule = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)

    def loss(step):
        latent, noise, timestep, text, hint = batch_of(args, step)
        text = F.pad(text, (0, 0, 0, args.padded - LENGTH))
        mask = (torch.arange(args.padded, device=args.device) < LENGTH).expand(len(text), -1)
        noisy = schedule.add_noise(latent, noise, timestep)
        with autocast(args):
            prediction = predict(noisy, timestep, text, mask, hint)
        return F.mse_loss(prediction.chunk(2, 1)[0].float(), noise)

    return Side(learns, loss)


def plain_prediction(net, noisy, timestep, text, mask, hint):
    return net(noisy, text, timestep, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask).sample


def plain_control(config, state: dict, control):
    """The ControlNet as blocks of diffusers, with projections of torch's."""
    from torch import nn

    copies = {k: v for k, v in state.items() if not k.startswith("blocks.")}
    for i, block in enumerate(control):
        copies |= {f"blocks.{i}.{k}": v for k, v in block.copied_block.state_dict().items()}
    blocks = of_diffusers(config, copies, len(control)).transformer_blocks
    before, after = control[0].before_proj, nn.ModuleList(block.after_proj for block in control)
    return nn.ModuleDict({"before": before, "blocks": blocks, "after": after})


def controlled_prediction(args, net, control, noisy, timestep, text, mask, hint):
    """The forward pass of PixArtControlNetTransformerModel of examples/research_projects/pixart, in a few lines."""
    from torch.utils.checkpoint import checkpoint

    B, height, width = len(noisy), noisy.shape[-2] // 2, noisy.shape[-1] // 2
    bias = ((1 - mask.to(noisy.dtype)) * -10000.0)[:, None]
    x, c = net.pos_embed(noisy), net.pos_embed(hint)
    t, embedded = net.adaln_single(timestep, {"resolution": None, "aspect_ratio": None}, batch_size=B,
                                   hidden_dtype=x.dtype)
    text = net.caption_projection(text).view(B, -1, x.shape[-1])

    def run(block, x):
        given = dict(encoder_hidden_states=text, encoder_attention_mask=bias, timestep=t)
        return checkpoint(block, x, use_reentrant=False, **given) if args.checkpoint else block(x, **given)

    for i, block in enumerate(net.transformer_blocks):
        if 0 < i <= len(control["blocks"]):
            if i == 1:
                c = x + control["before"](c)
            c = run(control["blocks"][i - 1], c)
            x = x + control["after"][i - 1](c)
        x = run(block, x)
    shift, scale = (net.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    x = net.proj_out(net.norm_out(x) * (1 + scale) + shift)
    x = x.reshape(B, height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, 2 * height, 2 * width)


# --- PixelFlow

def flow_recipe(args):
    """Our recipe with a network none of whose weights is zero."""
    import torch
    from pixstack.trainer.config import schema
    from pixstack.trainer.recipes.pixelflow import recipe, settings

    torch.manual_seed(0)
    chosen = settings.PixelFlowSettings(packing=args.packing, dropout=DROPOUT)
    shape = settings.Model(heads=args.heads, head_dim=72, depth=args.depth)
    config = schema.Config(recipe=chosen, model=shape, data=schema.Data(resolution=args.size), batch_size=args.batch,
                           precision=args.precision, checkpoint_activations=args.checkpoint)
    made = recipe.Recipe(config, None, CLASSES)
    without_zeros(made.diffusion)
    return made


def flow_batch(args, step: int):
    """Pictures (B, 3, H, W) uint8 and their classes."""
    import torch

    rng = torch.Generator().manual_seed(step)
    shape = (args.batch, 3, args.size, args.size)
    return (torch.randint(256, shape, generator=rng, dtype=torch.uint8),
            torch.randint(CLASSES, (args.batch,), generator=rng))


def ours_pixelflow(args, case: str) -> Side:
    import torch
    from pixstack.trainer.data.loader import Batch
    from pixstack.trainer.training.ema import EmaWeights

    recipe = flow_recipe(args).to(args.device)
    ema = EmaWeights(recipe, EMA)

    def loss(step):
        pictures, labels = flow_batch(args, step)
        none = torch.zeros(0)
        batch = Batch(pictures, [], labels, range(args.batch), step, [], {}, none, none, none, (args.size, args.size))
        return recipe(batch).mean()

    return Side(recipe, loss, ema.update)


def peer_pixelflow(args, case: str) -> Side:
    import torch
    from pixstack.models_impl.pixelflow.stages import Stages
    from pixstack.trainer.training.noise import picture_noise
    from torch import nn

    recipe = flow_recipe(args)
    drawn, config = recipe.draw, recipe.diffusion.config  # as our side draws
    net = nn.Module()
    for name, value in recipe.diffusion.state_dict().items():
        net.register_parameter(name.replace(".", "/"), nn.Parameter(value.clone()))
    del recipe.diffusion
    net.to(args.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    stages = Stages(config.num_stages)

    def loss(step):
        pictures, labels = flow_batch(args, step)
        times, dropped = drawn(step)
        labels = torch.where(dropped, CLASSES, labels)
        noise = [picture_noise(0, step, i, (3, *[args.size // 2 ** (config.num_stages - 1 - k)] * 2), args.device)
                 for i, k in enumerate(times.stage.tolist())]
        rows, given = collated(pictures.to(args.device) / 127.5 - 1, times, labels, noise, stages, config)
        with autocast(args):
            velocity = packed_forward(net, config, rows["x"], **given)
        errors = (velocity.float() - rows["target"].float()) ** 2
        return torch.stack([part.mean() for part in errors.split(given["lengths"])]).mean()

    @torch.no_grad()
    def update(step):
        live = dict(net.named_parameters())
        for name, p in ema.named_parameters():
            p.mul_(EMA).add_(live[name].data, alpha=1 - EMA)

    return Side(net, loss, update)


def collated(images, times, labels, noise, stages, config):
    """A packed batch, picture by picture, the highest resolution first. -> (x and target, what else the network
    reads)"""
    import torch
    from pixstack.models_impl.pixelflow.model import rope_table
    from torch.nn import functional as F

    p, found = config.patch_size, {}
    for i in sorted(range(len(images)), key=lambda i: -int(times.stage[i])):
        k, t = int(times.stage[i]), float(times.t[i])
        end = images[i:i + 1]
        for _ in range(stages.num_stages - 1 - k):
            end = F.interpolate(end, scale_factor=0.5, mode="bilinear")
        start = F.interpolate(F.interpolate(end, scale_factor=0.5, mode="bilinear"), scale_factor=2, mode="nearest")
        end = stages.end[k] * end + (1 - stages.end[k]) * noise[i]
        start = stages.start[k] * start + (1 - stages.start[k]) * noise[i]
        side = end.shape[-1] // p
        one = {"x": t * end + (1 - t) * start, "target": end - start}
        one = {name: value.reshape(3, side, p, side, p).permute(1, 3, 0, 2, 4).reshape(side * side, -1)
               for name, value in one.items()}
        timestep = stages.train_timesteps(k)[round(t * stages.num_train_timesteps)]
        one |= {"lengths": side * side, "timestep": timestep, "sizes": float(side), "labels": labels[i],
                "rope": rope_table(side, side, config.head_dim)}
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    given = {"lengths": found["lengths"], "timestep": torch.stack(found["timestep"]).float(),
             "sizes": torch.tensor(found["sizes"]), "labels": torch.stack(found["labels"]),
             "rope": torch.cat(found["rope"])}
    rows = {name: torch.cat(found[name]) for name in ("x", "target")}
    return rows, {name: v.to(images.device) if torch.is_tensor(v) else v for name, v in given.items()}


def packed_forward(net, config, x, lengths, timestep, sizes, labels, rope):
    """The released network over the tokens of all pictures, (N, C p p), end to end."""
    import torch
    from diffusers.models.embeddings import Timesteps
    from torch.nn import functional as F

    w, D, repeats = dict(net.named_parameters()), config.hidden, torch.tensor(lengths, device=x.device)
    sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)

    def linear(name, x):
        return F.linear(x, w[f"{name}/weight"], w[f"{name}/bias"])

    def embedded(name, value):
        return linear(f"{name}/linear_2", F.silu(linear(f"{name}/linear_1", sinusoid(value).to(x.dtype))))

    def repeated(name, condition, chunks):
        each = linear(name, F.silu(condition)).chunk(chunks, dim=-1)
        return [torch.repeat_interleave(m, repeats, dim=0) for m in each]  # (N, D)

    def rms(name, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w[f"{name}/weight"]

    def turned(x):  # (N, H, d)
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        (cos, minus), (sin, _) = (row.unbind(-1) for row in rope.unbind(-2))
        return torch.stack((a * cos + b * minus, a * sin + b * cos), dim=-1).flatten(-2)

    h = F.linear(x, w["patch_embed/proj/weight"].flatten(1), w["patch_embed/proj/bias"])
    condition = embedded("timestep_embedder", timestep) + w["class_embedder/embedding_table/weight"][labels]
    condition = condition + embedded("latent_size_embedder", sizes)
    for i in range(config.depth):
        name = f"transformer_blocks/{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = repeated(f"{name}/norm1/linear", condition, 6)
        y = F.layer_norm(h.float(), (D,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (linear(f"{name}/attn1/{part}_proj", y) for part in "qkv")
        q, k = rms(f"{name}/attn1/q_norm", q), rms(f"{name}/attn1/k_norm", k)
        q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
        q, k = turned(q).to(v.dtype), turned(k).to(v.dtype)
        out = []
        for one in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):  # flash_attn_varlen's work
            one = [t.transpose(0, 1)[None] for t in one]
            out.append(F.scaled_dot_product_attention(*one)[0].transpose(0, 1))
        h = h + gate1 * linear(f"{name}/attn1/o_proj", torch.cat(out).flatten(-2))
        y = rms(f"{name}/norm3", h) * (1 + scale2) + shift2
        y = linear(f"{name}/mlp/fc2", F.gelu(linear(f"{name}/mlp/fc1", y), approximate="tanh"))
        h = h + gate2 * y
    shift, scale = repeated("proj_out_1", condition, 2)
    h = linear("proj_out_2", F.layer_norm(h.float(), (D,), eps=1e-6) * (1 + scale) + shift)
    return h.unflatten(-1, (-1, config.out_channels)).transpose(-1, -2).flatten(-2)  # (p q c) -> (c p q)


# --- Both

SIDES = {
    "full": (ours_pixart, peer_pixart),
    "lora": (ours_pixart, peer_pixart),
    "pixelflow": (ours_pixelflow, peer_pixelflow),
    "controlnet": (ours_pixart, peer_pixart),
}
"""case -> (ours, peer)"""
PEERS = {"full": "diffusers", "lora": "diffusers with peft", "pixelflow": "plain loop of the release",
         "controlnet": "plain loop over diffusers' blocks"}
DEFAULTS = {  # case -> (size, depth, batch) on a CPU, on a GPU
    "full": ((256, 2, 2), (1024, 28, 4)),
    "lora": ((256, 2, 2), (1024, 28, 4)),
    "pixelflow": ((128, 4, 4), (256, 28, 16)),
    "controlnet": ((256, 4, 2), (1024, 28, 4)),
}


def worker(pipe, side: str, case: str, args):
    """One side in a process of its own: takes as many steps as it is asked to, and says how long they took."""
    import torch
    from pixstack.trainer.libraries import hide_broken_torchvision

    hide_broken_torchvision()
    if args.threads:
        torch.set_num_threads(args.threads)
    made = SIDES[case][side == "peer"](args, case)
    learns = [p for p in made.module.parameters() if p.requires_grad]
    update = updates(side, args, learns)
    libraries = peak_from_here() - weight_bytes(made)
    step = 0
    while steps := pipe.recv():
        begin, losses = clock(args.device), []
        for _ in range(steps):
            loss = made.loss(step)
            loss.backward()
            update(step)
            if made.after:
                made.after(step)
            losses.append(loss.item())
            step += 1
        pipe.send({"seconds": clock(args.device) - begin, "losses": losses})
    memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak()
    pipe.send({"memory": memory, "training": memory if args.device == "cuda" else memory - libraries,
               "learns": sum(p.numel() for p in learns)})


def updates(side: str, args, learns):
    """(step): gradients become weights."""
    import torch

    if side == "ours":
        from pixstack.trainer.config.schema import Optimizer
        from pixstack.trainer.training.groups import Group
        from pixstack.trainer.training.optim import Optimizers

        named = [Group([(str(i), p) for i, p in enumerate(learns)])]
        optimizer = Optimizers(named, Optimizer(learning_rate=RATE, clip=CLIP), 1000)

        def update(step):
            optimizer.clip()
            optimizer.step(step)
    else:
        adamw = torch.optim.AdamW(learns, lr=RATE, **({"fused": True} if args.adamw == "fused" else {}))

        def update(step):
            torch.nn.utils.clip_grad_norm_(learns, CLIP)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
    return update


def weight_bytes(side: Side) -> int:
    """Bytes of all parameters that the side holds: of what learns, and of what its loss reads."""
    import torch

    held = [side.module, *(c.cell_contents for f in (side.loss, side.after) if f and hasattr(f, "__closure__")
                           for c in f.__closure__ or ())]
    held += [a for one in held if isinstance(one, partial) for a in one.args]
    some = {p.data_ptr(): p.nbytes for one in held if isinstance(one, torch.nn.Module) for p in one.parameters()}
    return sum(some.values())


def peak_from_here() -> int:
    """Forgets the greatest memory until now, in which the weights were made. -> bytes that are in use"""
    gc.collect()
    forget_peak()
    return peak()


def peak() -> int:
    """The greatest memory of this process, in bytes."""
    return status_bytes("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(report: Report, case: str, args):
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for side in ("ours", "peer"):
        pipes[side], other = context.Pipe()
        processes[side] = context.Process(target=worker, args=(other, side, case, args), daemon=True)
        processes[side].start()
        other.close()  # so that a side that ends is noticed

    def ask(side, steps):
        try:
            pipes[side].send(steps)
            return pipes[side].recv()
        except (EOFError, ConnectionError):
            sys.exit(f"{side}, {case}: ended before it was asked to")

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.precision]
    what = f"trainer, {case}"
    details = (f"depth {args.depth}, {args.precision}{', checkpointed' if args.checkpoint else ''}, the peer's AdamW: "
               f"{args.adamw}")
    first, other = (ask(side, 1)["losses"][0] for side in pipes)
    different = abs(first - other) / abs(other)
    equal = report.equal(f"{what}, {args.size} px, the first loss", PEERS[case], different, dtype)
    for side in pipes:
        ask(side, WARM_UP - 1)
    rounds = []
    for i in range(args.rounds):
        turns = list(pipes) if i % 2 == 0 else list(pipes)[::-1]
        rounds.append({side: ask(side, args.steps)["seconds"] / args.steps for side in turns})
    end = {side: ask(side, 0) for side in pipes}
    for process in processes.values():
        process.join()

    memory = {kind: [end[side][kind] / GIB for side in ("ours", "peer")] for kind in ("memory", "training")}
    ours, peers = memory["training"]
    note = f"the difference is the relative one of the first losses; training by itself: {ours:.2f} / {peers:.2f} GiB"
    row = Row(what, PEERS[case], [r["ours"] for r in rounds], [r["peer"] for r in rounds], details,
              {"size": args.size, "batch": args.batch}, tuple(memory["memory"]), different, equal, note)
    print(f"{case}, {args.size} px, batch {args.batch}, {args.device}, {details}; first loss {first:.5f} and "
          f"{other:.5f}; {end['ours']['learns']:,} and {end['peer']['learns']:,} parameters learn")
    report.row(row, f"  ours {spread([1 / s for s in row.ours])} steps/s, ours / peer = {spread(row.ratios)} over "
                    f"{args.rounds} rounds of {args.steps}")
    for kind, (ours, peers) in memory.items():
        print(f"  {kind}: ours {ours:.3f} GiB, ours / peer = {ours / peers:.3f}", flush=True)


def main():
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--size", type=int, help="pixels along a side")
    parser.add_argument("--depth", type=int, help="blocks; 28: the released networks")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--heads", type=int, default=16 if cuda else 8, help="of PixelFlow; 16: the released network")
    parser.add_argument("--packing", choices=["auto", "packed", "dense"], default="packed",
                        help="recipe.packing of our PixelFlow; auto: dense on a CPU, a pass for each stage")
    parser.add_argument("--steps", type=int, default=20 if cuda else 3, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--padded", type=int, default=LENGTH,
                        help=f"tokens that PixArt's peer pads captions to; {LIMIT}: as its users do")
    parser.add_argument("--adamw", choices=["fused", "default"], default="fused", help="the peer's")
    parser.add_argument("--checkpoint", action="store_true", help="checkpointed activations on both sides of PixArt")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    given = parser.parse_args()
    if given.checkpoint and "pixelflow" in given.case:
        parser.error("--checkpoint: the released loop of PixelFlow has no checkpointed activations")
    with Report() as report:
        for case in given.case:
            args = argparse.Namespace(**vars(given))
            for name, value in zip(("size", "depth", "batch"), DEFAULTS[case][args.device == "cuda"], strict=True):
                setattr(args, name, getattr(args, name) or value)
            compare(report, case, args)


if __name__ == "__main__":
    main()
