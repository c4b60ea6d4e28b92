"""A virtual GPU, which shows on a CPU what a GPU would refuse: `with VirtualGPU() as gpu:` and the device
"gpu".

CPU tensors are real. Those on "gpu" are FakeTensors of PyTorch's Python-only backend: device, shape, strides and dtype
without data, so that released sizes take seconds and no memory. Small ones keep their values beside them, so that
schedules, masks and lengths mean something. What a CPU run cannot show is an error here: tensors of two devices in one
operation, dtypes that do not go together (under autocast as on CUDA), a generator of another device, and float64 on a
device without it. What makes Python wait for a GPU is counted with its place (`gpu.waits`): each number read back, each
copy between CPU and GPU that is not non_blocking, each shape that depends on data.

It cannot see wrong numbers (what is read of a large tensor is made up: 0.25, 1, False), kernels (what they refuse,
their memory and time), streams, several devices, compiled code, and branches on `is_cuda`.

PyTorch cannot unregister a device: after the first VirtualGPU of a process torch.accelerator is available there and a
DataLoader with pinned memory fails. So a test file's rehearsals run in a child process (`in_child`), and its tests look
at what came out. A rehearsal is a function without arguments that returns `Waits`; `tests/virtual_gpu.md` holds how
much each may wait.
"""
from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = "gpu", torch.device("cpu")
SMALL = 4096  # elements; tensors of up to so many keep their values
OURS = ("/models_impl/", "/nodes/", "/trainer/")  # whose lines are named, if any is on the way
DOUBLE = (torch.float64, torch.complex128)
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# What CUDA's autocast computes in half precision, in float32, and in the widest dtype that it is given.
HALF = ("linear matmul mm bmm addmm baddbmm mv einsum conv1d conv2d conv3d convolution conv_transpose2d "
        "scaled_dot_product_attention").split()
FLOAT = ("exp log log10 log2 log1p expm1 pow reciprocal rsqrt acos asin tan sum prod cumsum cumprod norm softmax "
         "log_softmax layer_norm group_norm mse_loss l1_loss smooth_l1_loss huber_loss cosine_similarity cdist").split()
WIDEST = "cat stack addcmul addcdiv dot cross index_put scatter_add bilinear".split()


# --- The device

class VirtualGPU(TorchDispatchMode):
    def __init__(self, double: bool = False):
        """double: whether the device has float64: CUDA does; MPS, DirectML and some XPUs do not."""
        super().__init__()
        register()
        self.double, self.depth = double, 0
        self.waits: Counter[str] = Counter()
        """ "what at place" -> how often."""
        self.fake, self.generators = FakeTensorMode(allow_non_fake_inputs=True), _GeneratorsOfTheirDevice()

    def __enter__(self):
        if not self.depth:  # it is entered again inside, for operations that are made of others
            self.outside = torch.Generator, nn.Module._apply, torch._C._only_lift_cpu_tensors()
            torch.Generator, nn.Module._apply = _Generator, _apply
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes here as a copy
            self.generators.__enter__()
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            self.generators.__exit__(*error)
            torch.Generator, nn.Module._apply, lifted = self.outside
            torch._C._set_only_lift_cpu_tensors(lifted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors, devices = ([x for x in leaves if isinstance(x, kind)] for kind in (torch.Tensor, torch.device))
        if not any(isinstance(x, FakeTensor) for x in tensors) and all(device.type != GPU for device in devices):
            return func(*args, **kwargs)
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode they arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        unblocked = bool(kwargs.get("non_blocking")) or name == "copy_" and len(args) > 2 and args[2]
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.wait("number")
            return func(*(self.read(x) for x in args))
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.download(name, args[0].dtype, unblocked)
            return args[0].copy_(self.read(args[1]))
        if name == "_to_copy" and devices and devices[0].type != GPU:
            self.download(name, kwargs.get("dtype"), unblocked)
            return func(self.read(args[0]), **kwargs)
        if name in ("_to_copy", "copy_") and not all(isinstance(x, FakeTensor) for x in tensors):
            self.wait("upload", unblocked)
        values = self.values(func, tensors, args, kwargs)
        if name in DATA_DEPENDENT:
            self.wait("shape")
        args = (args[0], self.indices(name, args[1]), *args[2:]) if name in INDEXED else args
        if values is not None and (name in DATA_DEPENDENT or name == "index"):
            return tree_map(lambda x: self.on_gpu(x, GPU, x), values)
        if name == "nonzero":  # as if nothing were zero
            return self.on_gpu(torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64))
        some = self.some(tensors)
        args, kwargs = tree_map(lambda x: self.on_gpu(x, getattr(x, "device", None)), (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        self.keep(func, name, args, result, values, some)
        return result

    def wait(self, what: str, unblocked: bool = False):
        if not unblocked:
            self.waits[f"{what} at {place()}"] += 1

    def download(self, name: str, dtype: torch.dtype | None, unblocked: bool):
        """A copy casts where it comes from, on CUDA and on MPS."""
        self.wait("download", unblocked)
        if dtype in DOUBLE:
            self.refuse_double(name, dtype)

    def refuse_double(self, name: str, dtype: torch.dtype):
        if not self.double:
            raise TypeError(f"{name} makes {dtype} on a device without it")

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The values of a tensor, as the CPU reads them."""
        if (known := getattr(x, "value", None if isinstance(x, FakeTensor) else x)) is not None:
            return known.clone()
        made_by = getattr(x, "made_by", "")
        if made_by == "any" and getattr(x, "some", None) is not None:
            return torch.full(x.shape, x.some)
        number = x.dtype != torch.bool or made_by == "mul"  # isfinite is made of two comparisons
        return torch.full(x.shape, 0.25 if x.is_floating_point() else number, dtype=x.dtype)

    def values(self, func, tensors, args, kwargs):
        """The result of an operation on small tensors whose values are known, or None."""
        large = any(isinstance(x, int) and x > SMALL for x in tree_leaves(args)) and not tensors
        if large or torch.Tag.nondeterministic_seeded in func.tags or any(
                x.numel() > SMALL or isinstance(x, FakeTensor) and getattr(x, "value", None) is None for x in tensors):
            return None
        args, kwargs = tree_map(lambda x: x.value if isinstance(x, FakeTensor) else
                                CPU if isinstance(x, torch.device) else x, (args, kwargs))
        try:
            result = func(*args, **kwargs)
            return result.zero_() if "empty" in func.name() else result
        except RuntimeError:  # a CPU has no kernel for it, or it is wrong, which is said in a moment
            return None

    @staticmethod
    def some(tensors: list) -> bool | None:
        """Whether anything in the only tensor of an operation is not zero, as far as that is known: nodes recognise an
        empty latent by it."""
        if len(tensors) != 1:
            return None
        if isinstance(tensors[0], FakeTensor):
            return getattr(tensors[0], "some", None)
        return bool(tensors[0].any())

    def keep(self, func, name, args, result, values, some=None):
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if values is None and argument.alias_info is not None and argument.alias_info.is_write:
                for changed in (y for y in tree_leaves(x) if isinstance(y, FakeTensor)):
                    changed.value = None
        leaves = tree_leaves(result)
        for x, value in zip(leaves, [None] * len(leaves) if values is None else tree_leaves(values), strict=True):
            if isinstance(x, FakeTensor) and x.device.type == GPU:
                x.made_by, x.some = name, some if x.dtype != torch.bool or name == "any" else None
                if value is not None and value.numel() <= SMALL:
                    x.value = value
                if x.dtype in DOUBLE:
                    self.refuse_double(name, x.dtype)

    def on_gpu(self, like, device=GPU, value=None):
        """A tensor without data like this one. What is no tensor, or has no data already, stays as it is."""
        if not isinstance(like, torch.Tensor) or isinstance(like, FakeTensor):
            return like
        with self.fake:
            fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        fake.value = value
        return fake

    def indices(self, name: str, indices: list) -> list:
        """Indices of bool as if all were true."""
        whole = []
        for i in indices:
            chosen = i is not None and i.dtype in (torch.bool, torch.uint8)
            if i is not None and i.ndim and not isinstance(i, FakeTensor):
                self.wait("upload (index)")
            if chosen and name == "index":
                self.wait("shape")
            whole += [self.on_gpu(torch.empty(i.numel(), dtype=torch.int64)) for _ in range(i.ndim)] if chosen else [i]
        return whole


class _Generator(torch.Generator):
    """A torch.Generator that may be of the device "gpu" too."""

    device, real = property(lambda self: torch.device(GPU)), torch.Generator

    def __new__(cls, device="cpu"):
        return super().__new__(cls) if torch.device(device).type == GPU else cls.real(device)


class _GeneratorsOfTheirDevice(TorchFunctionMode):
    """A generator must be of the device that the numbers are drawn on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and kwargs.get("generator") is not None:
            own = (x.device for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            device, given = torch.device(kwargs.get("device") or next(own, CPU)).type, kwargs["generator"].device.type
            if given != device:
                raise RuntimeError(f"Expected a '{device}' device type for generator but found '{given}'")
        return func(*args, **(kwargs or {}))


def _apply(self, fn, recurse=True):
    """nn.Module._apply where a parameter that is moved stays the same object, as on a real device, if that can be."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, old in [(name, p) for name, p in self._parameters.items() if p is not None]:
        with torch.no_grad():
            new = fn(old)
        if new is not old:
            new, grad, old.grad = nn.Parameter(new, old.requires_grad), old.grad, None
            try:
                torch.utils.swap_tensors(old, new)
            except RuntimeError:  # something holds on to it
                old = self._parameters[name] = new
            old.grad = None if grad is None else fn(grad)
    for name, value in self._buffers.items():
        self._buffers[name] = None if value is None else fn(value)
    return self


def place(frames=None) -> str:
    """The innermost of our lines among the frames, by default of what is being run; else of ComfyUI's."""
    lines = [(frame.f_code.co_filename, line, frame.f_code.co_name)
             for frame, line in frames or traceback.walk_stack(None)]
    for folders in (OURS, ("/comfy/",)):
        for file, line, function in lines:
            folder = next((folder for folder in folders if folder in file), None)
            if folder and "site-packages" not in file:
                return f"{file[file.rindex(folder) + 1:]}:{line} ({function})"
    return "?"


_libraries = []  # what they register is there as long as they are


def register():
    """The device, and autocast for it. Once a process, and for good."""
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(GPU)
    if not hasattr(torch, GPU):
        torch._register_device_module(GPU, ModuleType(GPU))
    getattr(torch, GPU).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    key, library, every = "AutocastPrivateUse1", *(torch.library.Library(n, "IMPL") for n in ("aten", "_"))
    _libraries.extend((library, every))
    every.fallback(torch.library.fallthrough_kernel, key)
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    for names, to in ((HALF, "half"), (FLOAT, "float"), (WIDEST, "widest")):
        for packet in (getattr(torch.ops.aten, name) for name in names):
            for overload in (getattr(packet, o) for o in packet.overloads() if not o.endswith("out")):
                library.impl(overload, partial(_autocast, overload, to, without), key)


def _autocast(op, to, without, *args, **kwargs):
    def affected(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == GPU and x.dtype not in DOUBLE

    dtype = torch.get_autocast_dtype(GPU) if to == "half" else torch.float32
    same = to == "widest" and not any(affected(x) and x.dtype == dtype for x in tree_leaves((args, kwargs)))

    def cast(x):
        return x.to(dtype) if affected(x) and not same else x

    with torch._C._ExcludeDispatchKeyGuard(without):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


# --- What runs on it

def accelerator() -> SimpleNamespace:
    """An Accelerator as far as the trainer uses it, for one process there; `offload.place` puts the recipe there."""
    return SimpleNamespace(
        device=torch.device(GPU), num_processes=1, process_index=0, is_main_process=True, print=lambda *_: None,
        main_process_first=nullcontext, no_sync=lambda model: nullcontext(), prepare=lambda model, **_: model,
        backward=lambda loss: loss.backward(), wait_for_everyone=lambda: None)


def be_gpu_of_comfyui(half: torch.dtype, memory: int = 24 * 2**30):
    """Give a ComfyUI that was imported on a CPU a card of `memory` bytes that computes in `half`."""
    import comfy.model_management as mm

    register()
    device = torch.device(GPU, 0)
    mm.cpu_state, mm.vram_state, mm.get_torch_device = mm.CPUState.GPU, mm.VRAMState.NORMAL_VRAM, lambda: device
    mm.get_free_memory = mm.get_total_memory = lambda dev=None, both=False, **named: (
        (memory, memory) if both or any(named.values()) else memory)
    mm.is_device_mps = lambda dev: dev.type == GPU  # by this its FLUX knows a device without float64,
    mm.device_supports_non_blocking = lambda dev: True  # of which it takes to wait for all copies
    mm.should_use_fp16 = lambda *_, **__: half == torch.float16
    mm.should_use_bf16 = lambda *_, **__: half == torch.bfloat16


# --- Rehearsals

@dataclass
class Waits:
    """Waits: "what at place" -> how often."""

    step: dict[str, float]
    once: dict[str, float] | None = None
    """Beside the steps; None where nobody counts it."""


def one_pass(run: Callable[[], object], dtype: torch.dtype, count: bool = True) -> Waits:
    """The waits of a network that computes in dtype and must return it, in its second pass: the first may fill caches.
    Without `count` there is only one pass, and no waits."""
    with VirtualGPU() as gpu, torch.no_grad():
        for x in (x for x in tree_leaves(run()) if isinstance(x, torch.Tensor)):
            if x.device.type != GPU or x.dtype != dtype:
                raise AssertionError(f"the result is {x.dtype} on {x.device}, expected {dtype} on {GPU}")
        if not count:
            return Waits({})
        first = Counter(gpu.waits)
        gpu.waits.clear()
        run()
        return Waits(dict(gpu.waits), dict(first - gpu.waits))


def in_steps(run: Callable[[int], object], few: int, many: int) -> Waits:
    """The waits of a loop `run(steps)` per step: those of a longer run that a shorter one does not have."""
    seen = []
    for steps in (few, many):
        with VirtualGPU() as gpu, torch.no_grad():
            run(steps)
        seen.append(gpu.waits)
    step = {key: (seen[1][key] - seen[0][key]) / (many - few) for key in seen[1] if seen[1][key] != seen[0][key]}
    return Waits(step, {key: n - many * step.get(key, 0) for key, n in seen[1].items() if n != many * step.get(key, 0)})


def rehearse(run: Callable[[], Waits]) -> dict:
    try:
        waits = run()
    except Exception as error:
        where = place([*traceback.walk_tb(error.__traceback__)][::-1])
        return {"error": f"{type(error).__name__} at {where}: {error}"}
    return {"step": waits.step, "once": waits.once}


def main(module: str, out: str, *names: str):
    """Run the module's REHEARSALS in the child process and print a line of JSON for each."""
    from pixstack.tools.comfy_host import prepare_torch

    prepare_torch()
    rehearsals = importlib.import_module(module).REHEARSALS
    with open(out, "w", encoding="utf-8") as file:
        for name in names:
            file.write(json.dumps([name, rehearse(rehearsals[name])]) + "\n")
            file.flush()


def in_child(request, folder: Path) -> dict[str, dict]:
    """The results of the rehearsals that the tests of this file ask for, by name. One child for all of them, and all
    workers of pytest-xdist."""
    from filelock import FileLock  # a requirement of torch

    names = dict.fromkeys(item.callspec.params["rehearsal"] for item in request.session.items
                          if item.module is request.module and hasattr(item, "callspec"))
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    module = request.module.__name__.rpartition(".")[2]
    out = shared / f"{module}.jsonl"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            unfinished = out.with_suffix(".unfinished")
            code = "import sys, virtual_gpu; virtual_gpu.main(*sys.argv[1:])"
            path = os.pathsep.join((str(ROOT / "package"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
            child = subprocess.run(
                [sys.executable, "-c", code, module, str(unfinished), *names], capture_output=True, text=True,
                cwd=shared, env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}, check=False)
            if child.returncode:
                raise RuntimeError(f"the rehearsals of {module} broke off:\n{child.stdout[-2000:]}"
                                   f"{child.stderr[-4000:]}")
            unfinished.rename(out)
    return dict(json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())


@cache
def budget() -> dict[str, tuple[float, float | None]]:
    """The tables of virtual_gpu.md: rehearsal -> (waits per step, waits beside the steps or None)."""
    rows = re.findall(r"^\| (.+?) +\| +([\d.]+) +\| +([\d.]+|-) +\|", (ROOT / "tests" / "virtual_gpu.md").read_text(
        encoding="utf-8"), re.MULTILINE)
    return {name: (float(step), None if once == "-" else float(once)) for name, step, once in rows}


def check(name: str, result: dict):
    """Fails if the rehearsal failed, or waited more often than it may."""
    assert "error" not in result, result["error"]
    for what, allowed in zip(("step", "once"), budget()[name], strict=True):
        waits = result[what] or {}
        total = round(sum(waits.values()), 2)
        places = "\n".join(f"  {n:g} x {place}" for place, n in sorted(waits.items(), key=lambda x: -x[1]))
        assert allowed is None or total <= allowed, (
            f"{name} waits for the GPU {total:g} times {'a step' if what == 'step' else 'beside its steps'}, "
            f"tests/virtual_gpu.md allows {allowed:g}:\n{places}")
