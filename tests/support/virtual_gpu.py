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
at what came out. A rehearsal is a function without arguments that returns `Waits`; how much each may wait is in
virtual_gpu.md beside this file.
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
GPU, CPU = "gpu", torch.device("cpu")
SMALL = 4096  # elements; tensors of up to so many keep their values
OURS = ("/models_impl/", "/nodes/", "/trainer/")  # whose lines are named, if any is on the way
DOUBLE = (torch.float64, torch.complex128)
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
MATRICES = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot"}
RESHAPED = {"resize_", "resize_as_", "set_"}  # change the shape of what they are given
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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping Dynamo away takes longer than a small operation

    def __enter__(self):
        if not self.depth:  # it is entered again inside, for operations that are made of others
            self.outside = torch.Generator, nn.Module._apply, torch._C._only_lift_cpu_tensors()
            torch.Generator, nn.Module._apply = _Generator, _apply
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes here as a copy
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            torch.Generator, nn.Module._apply, lifted = self.outside
            torch._C._set_only_lift_cpu_tensors(lifted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device") or next((x for x in args if type(x) is torch.device), None)
        if kwargs.get("generator") is not None:
            check_generator(kwargs["generator"], device, args)
        if FakeTensor not in types and (device is None or device.type != GPU):
            return func(*args, **kwargs)
        op = about(func)
        if op.composite:
            with self:  # in inference mode they arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name, tensors = op.name, [x for x in leaves((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
        unblocked = bool(kwargs.get("non_blocking")) or name == "copy_" and len(args) > 2 and args[2]
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.wait("number")
            return func(*(self.read(x) for x in args))
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.download(name, args[0].dtype, unblocked)
            return args[0].copy_(self.read(args[1]))
        if name == "_to_copy" and device is not None and device.type != GPU:
            self.download(name, kwargs.get("dtype"), unblocked)
            return func(self.read(args[0]), **kwargs)
        if name in ("_to_copy", "copy_") and not all(isinstance(x, FakeTensor) for x in tensors):
            self.wait("upload", unblocked)
        values = self.values(func, op, tensors, args, kwargs)
        if name in DATA_DEPENDENT:
            self.wait("shape")
        args = (args[0], self.indices(name, args[1]), *args[2:]) if name in INDEXED else args
        if values is not None and (name in DATA_DEPENDENT or name == "index"):
            return mapped(lambda x: on_gpu(x, GPU, x), values)
        if name == "nonzero":  # as if nothing were zero
            return on_gpu(torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64))
        some = self.some(tensors)
        result = without_data(func, op, tensors, args, kwargs)
        self.keep(op, args, result, values, some)
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

    def values(self, func, op: _Operation, tensors, args, kwargs):
        """The result of an operation on small tensors whose values are known, or None."""
        if op.random or any(x.numel() > SMALL or isinstance(x, FakeTensor) and getattr(x, "value", None) is None
                            for x in tensors):
            return None
        if not tensors and any((prod(x) if isinstance(x, (list, tuple)) else x) > SMALL for x in args
                               if isinstance(x, (int, list, tuple))):
            return None

        def known(x):
            return x.value if isinstance(x, FakeTensor) else CPU if isinstance(x, torch.device) else x

        try:
            result = func(*mapped(known, args), **{key: mapped(known, x) for key, x in kwargs.items()})
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

    def keep(self, op: _Operation, args, result, values, some=None):
        for x in (args[i] for i in op.written if values is None and i < len(args)):
            for changed in (y for y in leaves((x,)) if isinstance(y, FakeTensor)):
                changed.value = None
        made = [*leaves((result,))]
        for x, value in zip(made, [None] * len(made) if values is None else leaves((values,)), strict=True):
            if isinstance(x, FakeTensor) and x.fake_device.type == GPU:
                x.made_by, x.some = op.name, some if x.dtype != torch.bool or op.name == "any" else None
                if value is not None and value.numel() <= SMALL:
                    x.value = value
                if x.dtype in DOUBLE:
                    self.refuse_double(op.name, x.dtype)

    def indices(self, name: str, indices: list) -> list:
        """Indices of bool as if all were true."""
        whole = []
        for i in indices:
            chosen = i is not None and i.dtype in (torch.bool, torch.uint8)
            if i is not None and i.ndim and not isinstance(i, FakeTensor):
                self.wait("upload (index)")
            if chosen and name == "index":
                self.wait("shape")
            whole += [on_gpu(torch.empty(i.numel(), dtype=torch.int64)) for _ in range(i.ndim)] if chosen else [i]
        return whole


# --- Operations without data

@dataclass(frozen=True)
class _Operation:
    """What an operation does with the tensors that it is given."""

    name: str
    composite: bool
    """It is made of others, on any device."""
    random: bool
    written: tuple[int, ...]
    """Which of its arguments it changes."""
    result: str | None
    """ "new" tensors, the "first" argument, a "view" of it, or None: something else, or by their data."""


@cache
def about(func) -> _Operation:
    schema, name = func._schema, func.overloadpacket._qualified_op_name.removeprefix("aten::")
    composite = func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd")
    aliases = [i for i, x in enumerate(schema.arguments) if x.alias_info is not None]
    written = tuple(i for i in aliases if schema.arguments[i].alias_info.is_write)
    by_data = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
    result = None
    if func.namespace != "aten" or by_data and name != "index" or name in RESHAPED or (
            torch.Tag.inplace_view in func.tags):
        pass
    elif func.is_view:
        result = "view"
    elif not aliases:
        result = "new"
    elif aliases == [0] and written == (0,) and name.endswith("_"):
        result = "first"
    return _Operation(name, composite, torch.Tag.nondeterministic_seeded in func.tags, written, result)


_seen: dict[tuple, object] = {}


def without_data(func, op: _Operation, tensors, args, kwargs):
    """The result of an operation, as far as it is known without data. PyTorch's FakeTensorMode says it, or what is
    wrong; as it takes long, once for arguments of these shapes, strides, dtypes and devices."""
    if op.result == "view" and len(tensors) == 1 and type(tensors[0]) is FakeTensor:
        with in_kernel_invocation_manager(fake()):
            made = func(*args, **kwargs)
        return mapped(lambda x: FakeTensor(fake(), x, tensors[0].fake_device), made)
    key = None
    if op.result in ("new", "first") and all(getattr(x, "constant", None) is None for x in tensors):
        key = (func, torch.get_default_dtype(), *map(described, args), *map(described, kwargs.items()))
        if (seen := _seen.get(key)) is not None:
            return args[0] if op.result == "first" else mapped(lambda x: x() if isinstance(x, partial) else x, seen)
    if op.name in MATRICES and len(dtypes := {x.dtype for x in tensors}) > 1:  # FakeTensorMode would promote them
        raise RuntimeError(f"{op.name} is given {' and '.join(sorted(map(str, dtypes)))}, expected one dtype")
    args, kwargs = mapped(own_device, args), {name: mapped(own_device, x) for name, x in kwargs.items()}
    with fake():
        result = func(*args, **kwargs)
    made = [*leaves((result,))]
    expected = made[0] is args[0] if op.result == "first" else not any(x is y for x in made for y in tensors)
    if key is not None and expected and all(type(x) is FakeTensor and x.constant is None for x in made):
        _seen[key] = mapped(lambda x: partial(empty, x.shape, x.stride(), x.dtype, x.fake_device), result)
    return result


def described(x):
    """What the shape of a result can depend on."""
    if isinstance(x, FakeTensor):
        return x.shape, x.stride(), x.dtype, x.fake_device
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, (list, tuple)):
        return tuple(map(described, x))
    if isinstance(x, torch._C.Generator):
        return torch._C.Generator
    return (type(x), x) if isinstance(x, (bool, int, float)) else x  # 1 == 1.0 == True


def empty(shape, stride, dtype: torch.dtype, device: torch.device) -> FakeTensor:
    return FakeTensor(fake(), torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def on_gpu(like, device=GPU, value=None):
    """A tensor without data like this one. What is no tensor, or has no data already, stays as it is."""
    if not isinstance(like, torch.Tensor) or isinstance(like, FakeTensor):
        return like
    made = empty(like.shape, like.stride(), like.dtype, torch.device(device))
    made.value = value
    return made


def own_device(x):
    return on_gpu(x, x.device) if isinstance(x, torch.Tensor) else x


@cache
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def leaves(x: tuple | list) -> Iterator:
    """As tree_leaves, for lists and tuples; there are no others in what an operation takes and gives."""
    for each in x:
        if isinstance(each, (list, tuple)):
            yield from leaves(each)
        else:
            yield each


def mapped(change: Callable, x):
    """As tree_map, for lists and tuples."""
    return type(x)(mapped(change, each) for each in x) if type(x) in (list, tuple) else change(x)


# --- Random numbers, modules and places

class _Generator(torch.Generator):
    """A torch.Generator that may be of the device "gpu" too."""

    device, real, known = property(lambda self: torch.device(GPU)), torch.Generator, WeakValueDictionary()

    def __new__(cls, device="cpu"):
        if torch.device(device).type != GPU:
            return cls.real(device)
        made = super().__new__(cls)
        cls.known[made._cdata] = made  # operations get it in a new Python object
        return made


def check_generator(generator, device: torch.device | None, args):
    """A generator must be of the device that the numbers are drawn on."""
    own = (x.device for x in leaves(args) if isinstance(x, torch.Tensor))
    wanted, given = (device or next(own, CPU)).type, GPU if generator._cdata in _Generator.known else "cpu"
    if given != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{given}'")


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
    theirs = "?"
    for frame, line in frames or traceback.walk_stack(None):
        ours, file = named(frame.f_code.co_filename)
        ours = ours and (theirs == "?" or frame.f_code.co_varnames[:1] != ("executor",))  # a wrapper passes calls on
        if file and (ours or theirs == "?"):
            found = f"{file}:{line} ({frame.f_code.co_name})"
            if ours:
                return found
            theirs = found
    return theirs


@cache
def named(file: str) -> tuple[bool, str | None]:
    """(whether a file is ours, its path below the repository or ComfyUI), of another file None."""
    for folder in (*OURS, "/comfy/"):
        if folder in file and "site-packages" not in file:
            return folder in OURS, file[file.rindex(folder) + 1:]
    return False, None


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
        return isinstance(x, FakeTensor) and x.fake_device.type == GPU and x.is_floating_point() and (
            x.dtype not in DOUBLE)

    dtype = torch.get_autocast_dtype(GPU) if to == "half" else torch.float32
    same = to == "widest" and not any(affected(x) and x.dtype == dtype for x in leaves((*args, *kwargs.values())))

    def cast(x):
        return x.to(dtype) if affected(x) and not same else x

    with torch._C._ExcludeDispatchKeyGuard(without):
        return op(*mapped(cast, args), **{name: mapped(cast, x) for name, x in kwargs.items()})


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
    from conftest import rest_from_collecting  # and with it torch is prepared

    rehearsals = importlib.import_module(module).REHEARSALS
    rest_from_collecting()
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
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # the child runs in it
    module = request.module.__name__.rpartition(".")[2]
    out = shared / f"{module}.jsonl"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            unfinished = out.with_suffix(".unfinished")
            code = "import sys, virtual_gpu; virtual_gpu.main(*sys.argv[1:])"
            ours = [entry for entry in sys.path if entry.startswith(str(ROOT))]
            path = os.pathsep.join((*ours, os.environ.get("PYTHONPATH", "")))
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
    rows = re.findall(r"^\| (.+?) +\| +([\d.]+) +\| +([\d.]+|-) +\|", (ROOT / "tests/support/virtual_gpu.md").read_text(
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
            f"tests/support/virtual_gpu.md allows {allowed:g}:\n{places}")
