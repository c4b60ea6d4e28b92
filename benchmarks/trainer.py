"""PixArt training: our recipes against diffusers and peft doing the same maths, same weights, batches and machine.

The peer is diffusers' PixArtTransformer2DModel with what its users write around it: a full fine-tune with AdamW, and a
peft LoRA on the frozen network, eps loss on cached latents and cached, padded text (--padded), AdamW, gradient
clipping, autocast where --precision is bf16. Both have only the loss of the noise, on the same latents, noise and
timesteps, and at the first step the losses must be equal. Ours is the loop of `python -m trainer` but for files and
logs.

Each side runs in processes of its own, in turn; printed are steps per second of ours, the ratio ours / peer (above 1 =
ours is faster) as median (least to most) over the rounds, and each side's greatest memory and their ratio (below 1 =
ours needs less). On a CPU the seconds are the process's own, so that other work on the machine does not count.

    python benchmarks/trainer.py [--case full lora] [--size PIXELS] [--depth N] [--batch N] [--steps N] [--rounds N]
"""
from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

WIDTH, LENGTH, LIMIT = 4096, 60, 300  # of T5's tokens; tokens of a caption, and the most that the network reads
WARM_UP = 2
SHAPE = dict(hidden=1152, heads=16, context_dim=WIDTH, token_limit=LIMIT)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # of the peer: pixart.TARGETS, unfused
RANK = 16


def weights(args):
    """A network none of whose weights is zero, in our names."""
    import torch
    from pixstack.models_impl.pixart.config import PixArtConfig
    from pixstack.models_impl.pixart.model import PixArt

    config = PixArtConfig(depth=args.depth, sample_size=args.size // 8, **SHAPE)
    torch.manual_seed(0)
    net = PixArt(config).initialise()
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return config, net


def batch_of(args, step: int):
    """(latent, noise, timestep, text, length): what both sides learn from."""
    import torch

    rng = torch.Generator().manual_seed(step)
    shape = (args.batch, 4, args.size // 8, args.size // 8)
    latent, noise = (torch.randn(shape, generator=rng) for _ in range(2))
    timestep = torch.randint(1000, (args.batch,), generator=rng)
    return latent, noise, timestep, torch.randn(args.batch, LENGTH, WIDTH, generator=rng)


def ours(args, case: str):
    """(parameters that learn, loss(step) -> tensor)"""
    import torch
    from pixstack.models_impl.pixart.sampling import PixArtDiffusion
    from pixstack.trainer.config.schema import Adapter
    from pixstack.trainer.recipes import adapters
    from pixstack.trainer.recipes.pixart import task

    config, net = weights(args)
    if case == "lora":
        net.requires_grad_(False)
        if args.precision == "bf16":
            net.to(torch.bfloat16)  # as recipes/pixart/start.frozen
        net = adapters.attach(net, Adapter(rank=RANK), task.TARGETS)
    net.gradient_checkpointing = args.checkpoint
    net.to(args.device)
    diffusion = PixArtDiffusion.of(config)

    def loss(step):
        latent, noise, timestep, text = (t.to(args.device) for t in batch_of(args, step))
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=args.device)
        with torch.autocast(args.device, torch.bfloat16, args.precision == "bf16"):
            prediction = net(diffusion.add_noise(latent, noise, timestep), timestep, context=text, mask=mask)
            return diffusion.losses(prediction, latent, noise, timestep, variance=0.0).mse.mean()

    return net, loss


def peer(args, case: str):
    import torch
    from pixstack.models_impl.pixart.key_names import to_diffusers
    from pixstack.trainer.libraries import hide_broken_torchvision

    hide_broken_torchvision()
    from diffusers import DDPMScheduler, PixArtTransformer2DModel
    from torch.nn import functional as F

    config, net = weights(args)
    other = PixArtTransformer2DModel(
        num_layers=args.depth, sample_size=config.sample_size, interpolation_scale=config.sample_size / 2 / 32,
        use_additional_conditions=False, caption_channels=WIDTH)
    other.load_state_dict(to_diffusers(net.state_dict()))
    del net
    if case == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        other.requires_grad_(False)
        if args.precision == "bf16":
            other.to(torch.bfloat16)
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
        latent, noise, timestep, text = (t.to(args.device) for t in batch_of(args, step))
        text = F.pad(text, (0, 0, 0, args.padded - LENGTH))
        mask = (torch.arange(args.padded, device=args.device) < LENGTH).expand(len(text), -1)
        noisy = schedule.add_noise(latent, noise, timestep)
        with torch.autocast(args.device, torch.bfloat16, args.precision == "bf16"):
            prediction = other(noisy, text, timestep, {"resolution": None, "aspect_ratio": None},
                               encoder_attention_mask=mask).sample
        return F.mse_loss(prediction.chunk(2, 1)[0].float(), noise)

    return other, loss


def run(args, side: str, case: str, results):
    """One round of one side, in a process of its own."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    module, loss = {"ours": ours, "peer": peer}[side](args, case)
    learns = [p for p in module.parameters() if p.requires_grad]
    if side == "ours":
        from pixstack.trainer.config.schema import Optimizer
        from pixstack.trainer.training.groups import Group
        from pixstack.trainer.training.optim import Optimizers

        named = [Group([(str(i), p) for i, p in enumerate(learns)])]
        optimizer = Optimizers(named, Optimizer(learning_rate=1e-5, clip=1.0), 1000)

        def update(step):
            optimizer.clip()
            optimizer.step(step)
    else:
        adamw = torch.optim.AdamW(learns, lr=1e-5)

        def update(step):
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)

    clock = time.process_time if args.device == "cpu" else time.perf_counter
    losses, begin = [], None
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            if args.device == "cuda":
                torch.cuda.synchronize()
            begin = clock()
        value = loss(step)
        value.backward()
        update(step)
        losses.append(value.item())
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - begin
    memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put(json.dumps({"rate": args.steps / seconds, "memory": memory, "losses": losses,
                            "learns": sum(p.numel() for p in learns)}))


def measured(args, side: str, case: str) -> dict:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=run, args=(args, side, case, results))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{side}, {case}: ended with {process.exitcode}")
    return json.loads(results.get())


def compare(args, case: str):
    rounds = [{side: measured(args, side, case) for side in ("ours", "peer")} for _ in range(args.rounds)]
    first, other = (rounds[0][side]["losses"][0] for side in ("ours", "peer"))
    if abs(first - other) > (1e-3 if args.precision == "fp32" else 3e-2) * abs(other):
        sys.exit(f"{case}: the sides do not do the same maths: the first loss is {first} and {other}")
    speed = [r["ours"]["rate"] / r["peer"]["rate"] for r in rounds]
    memory = [r["ours"]["memory"] / r["peer"]["memory"] for r in rounds]
    learns = [rounds[0][side]["learns"] for side in ("ours", "peer")]
    print(f"{case}, {args.size} px, batch {args.batch}, depth {args.depth}, {args.precision}, {args.device}"
          f"{', checkpointed' if args.checkpoint else ''}: first loss {first:.5f} and {other:.5f}; "
          f"{learns[0]:,} and {learns[1]:,} parameters learn")
    print(f"  ours {spread([r['ours']['rate'] for r in rounds])} steps/s, ours / peer = {spread(speed)}")
    print(f"  memory: ours {spread([r['ours']['memory'] / 2**30 for r in rounds])} GiB, "
          f"ours / peer = {spread(memory)}", flush=True)


def spread(values) -> str:
    digits = max(2, 2 - math.floor(math.log10(max(values))))
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--size", type=int, default=1024 if cuda else 256)
    parser.add_argument("--depth", type=int, default=28 if cuda else 2, help="28: the released network")
    parser.add_argument("--batch", type=int, default=4 if cuda else 2)
    parser.add_argument("--steps", type=int, default=20 if cuda else 6)
    parser.add_argument("--rounds", type=int, default=5 if cuda else 3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--padded", type=int, default=LIMIT,
                        help=f"tokens that the peer pads captions to, as its users do; {LENGTH}: equal work on both "
                        "sides")
    parser.add_argument("--checkpoint", action="store_true", help="checkpointed activations on both sides")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    args = parser.parse_args()
    for case in args.case:
        compare(args, case)


if __name__ == "__main__":
    main()
