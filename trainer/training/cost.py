"""How long a step takes, said before there are weights. A step of the recipe itself runs on tensors without memory;
every operation takes as long as its products or its reading and writing would on this device, whichever is more
(roofline). Of blocks that are alike one is looked at.
"""
from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..config.schema import Config
from ..data import loader
from ..data.pictures import Picture
from ..features import text_encoders
from ..features.hints import Hints
from .optim import is_matrix

CONTAINERS = nn.ModuleList, nn.ModuleDict, nn.Sequential
MUCH = 4  # times slower in a product; what else a step does is about as fast in both precisions
AT_MOST = 16  # pictures of a pass that are looked at; more are estimated from these
aten = torch.ops.aten
FLOPS = {  # what torch's table leaves out
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_val, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_val, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}


@dataclass
class Rates:
    """What a device does in a second, measured when it is asked for."""

    device: torch.device
    known: dict = field(default_factory=dict)
    side: int = 0
    """Of the matrices in a product; 0 = as many as keep the device busy. Small ones are tried at once, and say less."""

    def best(self, name, call) -> float:
        """Seconds of the fastest of five calls."""
        if name not in self.known:
            def once():
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                begin = time.perf_counter()
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                return time.perf_counter() - begin

            once()
            self.known[name] = min(once() for _ in range(5))
        return self.known[name]

    def flops(self, dtype: torch.dtype) -> float:
        """Operations a second in a product of two matrices."""
        N = self.side or (512 if self.device.type == "cpu" else 4096)
        dtype = dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
        if dtype not in self.known:
            a, b = (torch.ones(N, N, dtype=dtype, device=self.device) for _ in range(2))
            self.best(dtype, lambda: a @ b)
        return 2 * N**3 / self.known[dtype]

    @property
    def bytes(self) -> float:
        """Read and written, a second."""
        N = 2**22 if self.device.type == "cpu" else 2**26
        if "bytes" not in self.known:
            a, b = (torch.ones(N, device=self.device) for _ in range(2))
            self.best("bytes", lambda: torch.add(a, 1, out=b))
        return 8 * N / self.known["bytes"]

    @property
    def call(self) -> float:
        """Seconds that the smallest operation takes, in a forward pass that remembers it."""
        a = torch.ones(8, device=self.device, requires_grad=True)
        return self.best("call", lambda: [a * 2 for _ in range(100)]) / 100


def slow_precision(config: Config, rates: Rates) -> str:
    """A sentence where the run computes in bf16 on a CPU that has no arithmetic for it; else nothing."""
    if config.precision != "bf16" or rates.device.type != "cpu":
        return ""
    times = rates.flops(torch.float32) / rates.flops(torch.bfloat16)
    if times < MUCH:
        return ""
    return (f"precision=bf16 is slow on this CPU, whose products take {float(f'{times:.1g}'):g} times as long as in "
            "float32: precision=fp32 is likely to be much faster.")


@dataclass
class Cost:
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, flops: float, seconds: float):
        self.flops, self.seconds = self.flops + flops, self.seconds + seconds


class Clock(TorchDispatchMode):
    """Inside, adds up what operations cost."""

    def __init__(self, rates: Rates):
        super().__init__()
        self.rates, self.fake, self.cost = rates, FakeTensorMode(allow_non_fake_inputs=True), Cost()
        self.blocks: dict[tuple, BlockCost] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # What was made on the meta device, a schedule's table for instance, is with everything else.
        args, kwargs = tree_map(lambda x: self.imagined(x) if isinstance(x, Tensor) and x.is_meta else x,
                                (args, kwargs or {}))
        out = op(*args, **kwargs)
        if not op.is_view:
            formula = FLOPS.get(op.overloadpacket) or flop_registry.get(op.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
            moved = sum(t.nbytes for t in tensors) / self.rates.bytes
            self.cost.add(flops, max(flops / self.rates.flops(dtype) if flops else 0, moved, self.rates.call))
        return out

    def imagined(self, like: Tensor) -> Tensor:
        with self.fake:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    @contextmanager
    def apart(self):
        """Inside, what operations cost counts only here."""
        before, self.cost = self.cost, Cost()
        try:
            yield self.cost
        finally:
            self.cost = before


@dataclass
class BlockCost:
    """The cost of a block, and its outputs: what they are without their memory, and how they are put together."""

    forward: Cost
    backward: Cost
    outputs: list
    spec: object


class StandIn(torch.autograd.Function):
    """A block that is known already."""

    @staticmethod
    def forward(ctx, clock: Clock, block: BlockCost, anchor: Tensor | None, *given: Tensor):
        """anchor: a weight that learns, if the block has one."""
        ctx.clock, ctx.block = clock, block
        ctx.save_for_backward(anchor, *given)
        clock.cost.add(block.forward.flops, block.forward.seconds)
        return tuple(clock.imagined(one) if isinstance(one, Tensor) else one for one in block.outputs)

    @staticmethod
    def backward(ctx, *_):
        anchor, *given = ctx.saved_tensors  # where activations are checkpointed, this makes them again
        ctx.clock.cost.add(ctx.block.backward.flops, ctx.block.backward.seconds)
        return None, None, None, *(torch.empty_like(one) for one in given)


def shorten(module: nn.Module, clock: Clock):
    """Lets a block stand for all that are like it, and are given as much."""
    whole = module.forward

    def forward(*args, **kwargs):
        leaves, _ = tree_flatten((args, kwargs))
        given, weights = [x for x in leaves if isinstance(x, Tensor)], list(module.parameters())
        key = (type(module), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), *(
                   x for x in leaves if isinstance(x, int)),
               *((tuple(x.shape), x.dtype, x.requires_grad) for x in (*given, *weights)))
        if key not in clock.blocks:
            clock.blocks[key] = look_at(whole, args, kwargs, weights, clock)
        block = clock.blocks[key]
        anchor = next((w for w in weights if w.requires_grad), None)
        return tree_unflatten(StandIn.apply(clock, block, anchor, *given), block.spec)

    module.forward = forward


def look_at(whole, args, kwargs, weights: list[Tensor], clock: Clock) -> BlockCost:
    args, kwargs = tree_map(lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x,
                            (args, kwargs))
    inputs = [x for x in (*tree_leaves((args, kwargs)), *weights) if isinstance(x, Tensor) and x.requires_grad]
    with clock.apart() as forward, torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        outputs, spec = tree_flatten(whole(*args, **kwargs))  # tensors, and None among those of transformers 5
    with clock.apart() as backward:
        if learns := [one for one in outputs if isinstance(one, Tensor) and one.requires_grad]:
            torch.autograd.grad(learns, inputs, [torch.empty_like(one) for one in learns], retain_graph=True,
                                allow_unused=True)
    return BlockCost(forward, backward, [one.detach() if isinstance(one, Tensor) else one for one in outputs], spec)


class Blank:
    """Takes the place of `pictures.Pictures`: no picture is opened."""

    def __init__(self, items, settings, clock: Clock):
        self.names, self.clock = settings.conditions, clock

    def submit(self, index: int, size: loader.Size, rng) -> Future:
        def picture():
            return self.clock.imagined(torch.empty(3, *size, dtype=torch.uint8, device="meta"))

        found = Future()
        found.set_result(Picture(picture(), {name: picture() for name in self.names}, size, (0.0, 0.0, *size), size))
        return found


def of_a_step(config: Config, collection: loader.Collection, recipe: nn.Module, parts: list[range],
              rates: Rates, cached: bool) -> Cost:
    """With the encoding of its pictures unless they are cached. recipe: with its weights on the meta
    device; it cannot be used afterwards."""
    clock = Clock(rates)
    batches = loader.Batches(collection.train, config.data, config.seed, config.batch_size,
                           lambda items, settings: Blank(items, settings, clock))
    for net in (recipe, *recipe.teacher):
        imagine(net, clock)
    for reader in recipe.encoders:
        reader.encode = encoding(reader, clock, counted=not cached)
    if isinstance(recipe.text, text_encoders.FROZEN):
        imagine_text(recipe, clock)
    part = parts[0][:AT_MOST]
    with clock:
        recipe(batches(0, part)).mean().backward()
    share = len(parts) * len(parts[0]) / len(part)
    optimizer = of_the_optimizer(recipe, config, rates)
    return Cost(share * clock.cost.flops + optimizer.flops, share * clock.cost.seconds + optimizer.seconds)


def of_the_optimizer(recipe: nn.Module, config: Config, rates: Rates) -> Cost:
    """The optimizer's step, with gradient clipping and EMA."""
    found = Cost()
    for group in recipe.groups(config):
        for name, p in group.params:
            numbers = 12  # read and written: weight, gradient, two moments, EMA, and for the norm
            found.add(0, p.numel() * 4 * numbers / rates.bytes)
            if config.optimizer.name == "muon" and name in group.matrices and is_matrix(p):
                small, large = sorted(p.flatten(1).shape)
                flops = 5 * (4 * small**2 * large + 2 * small**3)  # five rounds of Newton and Schulz
                found.add(flops, flops / rates.flops(torch.bfloat16))
    return found


def imagine(net: nn.Module, clock: Clock):
    """Gives weights a device, still without memory."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(clock.imagined(p), p.requires_grad))
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, clock.imagined(value))
    compound = [m for m in net.modules() if any(True for _ in m.children()) and not isinstance(m, CONTAINERS)]
    for block in compound:
        if sum(type(m) is type(block) for m in compound) > 2:
            shorten(block, clock)


def encoding(reader, clock: Clock, counted: bool):
    plain = reader.encode

    def encode(pictures: Tensor, device) -> dict[str, Tensor]:
        if isinstance(reader, Hints):  # what draws edges looks at them, and there is nothing to see
            return {"pixels": pictures}
        with nullcontext() if counted else clock.apart():
            return plain(pictures, device)
    return encode


def imagine_text(recipe: nn.Module, clock: Clock):
    """A frozen encoder without its weights: captions were embedded before training, and are as long as they may be."""
    text = recipe.text

    def empty(*shape, dtype=torch.float32):
        return clock.imagined(torch.empty(*shape, dtype=dtype, device="meta"))

    def lookup(captions, device, *change):
        B = len(captions)
        if isinstance(text, text_encoders.FrozenClip):
            return empty(B, text.places, text.width), empty(B, text.pooled_width)
        return empty(B, text.max_length, text.width), empty(B, text.max_length, dtype=torch.bool)

    text.lookup = text.read = lookup
    if isinstance(text, text_encoders.FrozenT5) and text.clip:
        text.pooled = lambda captions, device: empty(len(captions), recipe.flow.shape.pooled_dim)
