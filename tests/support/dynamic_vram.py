"""ComfyUI's DynamicVRAM on a CPU: core's dynamic ModelPatcher, its lazily made layers and its patches at use run as on
an NVIDIA card. Stand-ins are what only a card has: the address space of weights (comfy-aimdo's), pinned memory and the
mapping of files. The device is "cpu:0", which core compares with others like any device, while tensors there say "cpu":
so core moves the weights of a model to it. Mismatches of devices inside one operation do not show.

PIXSTACK_DYNAMIC_VRAM=full|evict|none starts the tests' ComfyUI and their server like this: every weight stays on the
device, or random ones are evicted between uses, or nothing fits and each use fetches it again. Evicted memory is filled
with NaN.
"""
from __future__ import annotations

import os
import random
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

VARIABLE = "PIXSTACK_DYNAMIC_VRAM"
WAYS = ("full", "evict", "none")
DEVICE = torch.device("cpu", 0)
EVICTED = 0.3  # of the uses of a weight find it gone


def wanted() -> str | None:
    """The way that the environment asks for; ValueError for one that is not in WAYS."""
    way = os.environ.get(VARIABLE) or None
    if way not in (None, *WAYS):
        raise ValueError(f"{VARIABLE}={way!r} must be one of {', '.join(WAYS)}.")
    return way


def inapplicable(why: str):
    """Marks a test that does not apply under DynamicVRAM."""
    return pytest.mark.skipif(wanted() is not None, reason=f"under DynamicVRAM {why}")


def stored_dtype(layer: torch.nn.Module) -> torch.dtype:
    """Dtype of a layer's weight on the device; off it, DynamicVRAM leaves it as the file has it."""
    return layer.weight_comfy_model_dtype if wanted() else layer.weight.dtype


def missing() -> str | None:
    """Why the ComfyUI of this process has no DynamicVRAM; None where it has."""
    if not hasattr(import_module("comfy.model_patcher"), "ModelPatcherDynamic") or find_spec("comfy_aimdo") is None:
        return "this ComfyUI has no DynamicVRAM: it came with 0.18"
    return None


def begin(way: str):
    """Switch it on for the ComfyUI of this process, for good. Models that are loaded already stay as they are."""
    if reason := missing():
        raise ValueError(f"{VARIABLE} is set, but {reason}.")
    memory, patcher, ops = (import_module(f"comfy.{name}")
                            for name in ("model_management", "model_patcher", "ops"))
    _stand_in_for_aimdo(Residents(way))
    memory.is_device_cpu = lambda device: getattr(device, "type", None) == "cpu" and device.index is None
    for name in ("get_torch_device", "text_encoder_device", "vae_device"):
        setattr(memory, name, lambda *args, **kwargs: DEVICE)
    memory.text_encoder_initial_device = lambda load, offload, size=0: offload
    memory.reset_cast_buffers = lambda *args, **kwargs: None
    cast = ops.cast_bias_weight

    def on_the_device(layer, input=None, dtype=None, device=None, bias_dtype=None, **more):
        if hasattr(layer, "_v"):  # its dtypes would come with the device from the input
            dtype = dtype or (None if input is None else input.dtype)
            device, bias_dtype = DEVICE, bias_dtype or dtype
        return cast(layer, input, dtype, device, bias_dtype, **more)

    ops.cast_bias_weight = on_the_device
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
    import_module("comfy.memory_management").aimdo_enabled = True


PACK = """import sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("dynamic_vram", {file!r})
sys.modules["dynamic_vram"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["dynamic_vram"])
sys.modules["dynamic_vram"].begin({way!r})
NODE_CLASS_MAPPINGS = {{}}
"""


def begin_in_server(base: Path, way: str):
    """Have a ComfyUI server that will work in `base` switch it on when it starts, by a pack without nodes."""
    pack = base / "custom_nodes" / "dynamic_vram_stand_ins"
    pack.mkdir()
    (pack / "__init__.py").write_text(PACK.format(file=__file__, way=way))


class Residents:
    """The weights that are on the device, as vbar_fault and its like report them."""

    def __init__(self, way: str):
        self.way, self.random = way, random.Random(0)

    def fault(self, place: Place) -> int | None:
        """The signature of the memory of a weight, another one when its contents were lost; None: it does not fit."""
        if self.way == "none":
            return None
        if self.way == "evict" and self.random.random() < EVICTED:
            place[0].evict(place[1])
        place[0].pins[place[1]] = place[0].pins.get(place[1], 0) + 1
        return place[0].generation.get(place[1], 0)

    @staticmethod
    def unpin(place: Place):
        pins = place[0].pins
        assert pins.get(place[1], 0) > 0, "a weight is released more often than it was fetched"
        pins[place[1]] -= 1


class AddressSpace:
    """The weights of one model on one device. A weight's place is (space, offset, bytes)."""

    def __init__(self, size: int, device):
        self.size, self.end = size, 0
        self.memory: dict[int, torch.Tensor] = {}
        self.generation: dict[int, int] = {}
        self.pins: dict[int, int] = {}

    def prioritize(self, *args):
        pass

    def alloc(self, size: int) -> Place:
        start, self.end = self.end, self.end + size
        assert self.end <= self.size, "a model asks for more memory than it announced"
        return self, start, size

    def loaded_size(self) -> int:
        return sum(memory.numel() for memory in self.memory.values())

    def evict(self, offset: int) -> int:
        if self.pins.get(offset) or offset not in self.memory:
            return 0
        self.generation[offset] = self.generation.get(offset, 0) + 1
        return self.memory.pop(offset).fill_(255).numel()  # NaN in every dtype of weights

    def free_memory(self, size: float) -> int:
        return sum(self.evict(offset) for offset in list(self.memory))

    def __deepcopy__(self, memo):
        raise ValueError("an address space cannot be copied: it holds pointers")


Place = tuple[AddressSpace, int, int]


class HostBuffer:
    """Pinned memory that is never used: `get_pin` finds nothing."""

    def __init__(self, *args):
        self.size = 0

    def extend(self, size: int, register: bool = False):
        self.size += size

    def truncate(self, offset: int, do_unregister: bool = True):
        self.size = offset


def _on_device(place: Place, device) -> torch.Tensor:
    space, offset, size = place
    if offset not in space.memory:
        with torch.inference_mode(False):  # it is written to in both modes
            space.memory[offset] = torch.full((size,), 255, dtype=torch.uint8)
    return space.memory[offset]


def _read_file(path: str) -> tuple[dict, dict]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def _stand_in_for_aimdo(residents: Residents):
    def nothing(*args, **kwargs):
        return None

    stand_ins = {
        "comfy_aimdo.host_buffer": {"HostBuffer": HostBuffer},
        "comfy_aimdo.model_vbar": {
            "ModelVBAR": AddressSpace, "vbar_fault": residents.fault, "vbar_unpin": residents.unpin,
            "vbar_signature_compare": lambda a, b: a is not None and a == b, "vbars_analyze": lambda *args: 0,
            "vbars_reset_watermark_limits": nothing,
        },
        "comfy_aimdo.control": {"analyze": nothing},
        "comfy_aimdo.torch": {"aimdo_to_tensor": _on_device},
        "comfy.pinned_memory": {"get_pin": nothing, "pin_memory": nothing},
        "comfy.utils": {"load_safetensors": _read_file},
    }
    for module, parts in stand_ins.items():
        for name, part in parts.items():
            setattr(import_module(module), name, part)


def main(base: str, *workflows: str):
    """Run shipped workflows, with stand-ins for what is not embedded, and print their pictures' checksums as JSON."""
    import hashlib
    import json

    import cascade_weights
    import conftest
    import weights
    from PIL import Image
    from pixstack.tools.comfyui import make_base
    from pixstack.tools.host import Host
    from pixstack.tools.workflow import read

    folder = make_base(Path(base))
    paths = {name: conftest.SHIPPED[name] for name in workflows}
    for path in paths.values():
        weights.place(folder / "models", json.loads(path.read_text(encoding="utf-8")))
    host = Host(folder).start()
    if way := wanted():
        begin(way)
    conftest.take_stand_ins()
    cascade_weights.shrink_core()
    info, checksums = host.object_info(), {}
    for name, path in paths.items():
        graph = read(path, info)
        # A patched weight that is stored in half the precision or less is rounded at random when it is merged, but not
        # in the step in which DynamicVRAM patches it: with LoRAs only whole precision can be equal.
        for node in graph.values() if name.endswith("_lora") else ():
            if node["class_type"] in ("PixStack_PixArtLoader", "PixStack_FluxLoader"):
                node["inputs"]["dtype"] = "fp32"
        done = host.run(graph)
        checksums[name] = str(done.error) if done.error else sorted(  # nodes may run in another order
            hashlib.sha256(Image.open(picture).convert("RGB").tobytes()).hexdigest() for picture in done.images)
    memory = import_module("comfy.model_management")
    print(json.dumps({"pictures": checksums,
                      "patchers": sorted({type(loaded.model).__name__ for loaded in memory.current_loaded_models})}))


if __name__ == "__main__":
    main(*sys.argv[1:])
