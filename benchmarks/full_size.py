"""Released sizes through the real loaders: load time, and memory beyond the mapped file.

For each row files of random weights are written in the layout of the release, loaded by our node's loader in a process
of its own, and deleted. Printed are the size of the files, the seconds that loading took, the memory of the process
outside mapped files, its peak while loading and after it (Linux counts it as RssAnon), and both divided by what the
weights take in the dtype that they are kept in: a second copy of all on the way would make the first ratio 2. Then
comes one step at a size that a CPU manages, in seconds: PixArt at 512 pixels, PixelFlow's first stage of 64, a prompt
through T5, both passes of the guided Stage C, PixelPonder at 128.

    python benchmarks/full_size.py [ROW ...] [--folder FOLDER] [--spare GB]
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.tools.host import Host  # noqa: E402
from torch import Tensor  # noqa: E402

GB = 1e9
T5_XXL = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128)
NOISE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class File:
    """A file of random weights: a torch file, or a safetensors file in which some weights may be in fp8."""

    name: str
    shapes: Callable[[], dict[str, tuple]]
    dtype: torch.dtype
    is_torch: bool = False
    under: str | None = None
    """Entry of a torch file that holds the weights; None: they are at its top."""
    fp8_scale: float | None = None
    """Scale of the weights in fp8; None: there are none."""

    def entries(self) -> dict[str, tuple[tuple, Tensor]]:
        """key -> its shape, and values that are repeated until they fill it."""
        entries, noise = {}, NOISE.to(self.dtype)
        for key, shape in self.shapes().items():
            if self.fp8_scale and ("SelfAttention" in key or "DenseReluDense" in key) and "bias" not in key:
                entries[key] = shape, (NOISE / self.fp8_scale).to(torch.float8_e4m3fn)
                entries[key.removesuffix("weight") + "scale_weight"] = (), torch.tensor([self.fp8_scale])
            else:
                entries[key] = shape, noise
        if self.fp8_scale:
            entries["scaled_fp8"] = (2,), torch.zeros(2, dtype=torch.float8_e4m3fn)
        return entries

    def size(self) -> int:
        return sum(_bytes_of(*entry) for entry in self.entries().values())

    def write(self, path: Path):
        """A piece at a time: some files are larger than the memory of the machine."""
        if self.is_torch:
            self._write_torch(path)
        else:
            self._write_safetensors(path)

    def _write_torch(self, path: Path):
        entries, noise = self.entries(), path.with_name(path.name + ".noise")
        try:
            with noise.open("wb") as file:
                _fill(file, NOISE.to(self.dtype), max(_bytes_of(*entry) for entry in entries.values()))
            mapped = {key: torch.from_file(str(noise), size=math.prod(shape), dtype=self.dtype).view(shape)
                      for key, (shape, _) in entries.items()}
            torch.save({self.under: mapped} if self.under else mapped, path)
        finally:
            noise.unlink(missing_ok=True)

    def _write_safetensors(self, path: Path):
        entries, header, end = self.entries(), {}, 0
        for key, (shape, values) in entries.items():
            start, end = end, end + _bytes_of(shape, values)
            header[key] = {"dtype": SAFETENSORS_NAMES[values.dtype], "shape": shape, "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for shape, values in entries.values():
                _fill(file, values, _bytes_of(shape, values))


def _bytes_of(shape: tuple, values: Tensor) -> int:
    return math.prod(shape) * values.element_size()


def _fill(file, values: Tensor, size: int):
    piece = values.view(torch.uint8).numpy()
    while size:
        size -= file.write(piece[:size])


def _pixart():
    from pixstack.models_impl.pixart.config import PRESETS
    from pixstack.models_impl.pixart.model import PixArt

    return _shapes(PixArt(PRESETS["sigma_1024"], device="meta").state_dict())


def _pixelflow():
    from pixstack.models_impl.pixelflow.config import PRESETS
    from pixstack.models_impl.pixelflow.model import PixelFlow

    return _shapes(PixelFlow(PRESETS["xl_t2i"], device="meta").state_dict())


def _pixelponder():
    from pixstack.models_impl.pixelponder.config import PRESETS, SelectConfig
    from pixstack.models_impl.pixelponder.model import PixelPonder

    trunk = replace(PRESETS["released"].trunk, single_depth=4)  # as released, with blocks that nothing uses
    config = replace(PRESETS["released"], trunk=trunk, select=SelectConfig())
    return _shapes(PixelPonder(config, device="meta").state_dict())


def _guide():
    from pixstack.models_impl.ultrapixel.checkpoint import released_guide_names
    from pixstack.models_impl.ultrapixel.config import GuideConfig
    from pixstack.models_impl.ultrapixel.guidance import Guide

    return _shapes(released_guide_names(Guide(GuideConfig(), device="meta").state_dict()))


def _stage_c():
    from pixstack.models_impl.ultrapixel.checkpoint import released_attention_names
    from pixstack.models_impl.ultrapixel.config import STAGE_C_PRESETS
    from pixstack.models_impl.ultrapixel.model import StageC

    return _shapes(released_attention_names(StageC(STAGE_C_PRESETS["3.6b"], device="meta").state_dict()))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _t5() -> dict[str, tuple]:
    width, wide, inner = T5_XXL["d_model"], T5_XXL["d_ff"], T5_XXL["d_kv"] * T5_XXL["num_heads"]
    shapes = {"shared.weight": (T5_XXL["vocab_size"], width), "encoder.final_layer_norm.weight": (width,),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, T5_XXL["num_heads"])}
    for i in range(T5_XXL["num_layers"]):
        block = f"encoder.block.{i}.layer."
        shapes |= {f"{block}{j}.layer_norm.weight": (width,) for j in (0, 1)}
        shapes |= {f"{block}0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{block}0.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{block}1.DenseReluDense.wi_{j}.weight": (wide, width) for j in (0, 1)}
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (width, wide)
    return shapes


# --- The rows: load(paths) -> (networks, one step)

def load_pixart(path: Path):
    host = import_module("pixstack.nodes.host.pixart.load")
    net = host.load_pixart(str(path), settings={"variant": "sigma"}).model.diffusion_model
    return [net], lambda: net(torch.randn(1, 4, 64, 64), torch.tensor([500.0]), torch.randn(1, 300, 4096))


def load_pixelflow(path: Path):
    net = import_module("pixstack.nodes.host.pixelflow.load").load_pixelflow(str(path)).model.diffusion_model
    return [net], lambda: net(torch.randn(1, 3, 64, 64), torch.tensor([500.0]), torch.randn(1, 16, 2048),
                              mask=torch.ones(1, 16, dtype=torch.long))


def load_t5(path: Path):
    clip = import_module("pixstack.nodes.host.common.text").load_t5(str(path))
    return [clip.cond_stage_model], lambda: clip.encode_from_tokens_scheduled(
        clip.tokenize("a red apple on a blue car"))


def load_guided_stage_c(stage_c: Path, guide: Path):
    """In bf16, as on a GPU; a CPU would keep it in float32."""
    host = {name: import_module(f"pixstack.nodes.host.ultrapixel.{name}") for name in ("guide", "sampling")}
    samplers, sd = import_module("comfy.samplers"), import_module("comfy.sd")
    base = sd.load_diffusion_model(str(stage_c), model_options={"dtype": torch.bfloat16})
    patched = host["guide"].load_guide(str(guide))
    model = host["guide"].patch(base, patched, host["guide"].Strengths(), rescale=0.7, shift=1.0)

    def step():
        guider = samplers.CFGGuider(model)
        text = [[torch.randn(1, 8, 1280), {"pooled_output": torch.randn(1, 1280)}]]
        guider.set_conds(text, text)
        guider.set_cfg(1.0)
        noise, low = torch.randn(1, 16, 8, 8), torch.zeros(1, 16, 4, 4)
        sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 1)
        guider.sample(noise, torch.zeros_like(noise), host["sampling"].GuidedSampler(low), sigmas, disable_pbar=True)

    return [base.model.diffusion_model, patched.model], step


def load_pixelponder(path: Path):
    """In bf16, as on a GPU; a CPU would keep it in float32. With its selection network, half of the file."""
    from pixstack.models_impl.flux.model import positions
    from pixstack.models_impl.pixelponder.patch_select import Released

    host = import_module("pixstack.nodes.host.pixelponder.load")
    net = host.load_pixelponder(str(path), select_net=True, dtype=torch.bfloat16).net_patcher.model

    def step():
        to, cells = dict(dtype=torch.bfloat16), 8
        hints = [(kind, torch.rand(1, 3, 16 * cells, 16 * cells, **to)) for kind in net.config.types[:2]]
        net(img=torch.randn(1, cells * cells, net.trunk.in_channels, **to), timestep=torch.full((1,), 0.7),
            context=torch.randn(1, 64, net.trunk.context_dim, **to), pooled=torch.randn(1, net.trunk.pooled_dim, **to),
            guidance=torch.full((1,), 4.0), img_ids=positions(cells, cells),
            select=Released().begin(net.conditions(hints)))

    return [net], step


ROWS: dict[str, tuple[Callable, tuple[File, ...], int]] = {
    # name -> how it is loaded, its files, and the bytes of a weight in memory: a CPU computes in float32
    "pixart_sigma": (load_pixart, (File("pixart.pth", _pixart, torch.float32, True, "state_dict"),), 4),
    "pixelflow_t2i": (load_pixelflow, (File("pixelflow.pt", _pixelflow, torch.float32, True),), 4),
    "ultrapixel_stage_c": (load_guided_stage_c, (File("stage_c.safetensors", _stage_c, torch.bfloat16),
                                                 File("guide.safetensors", _guide, torch.float32, True)), 2),
    "t5_xxl_scaled_fp8": (load_t5, (File("t5.safetensors", _t5, torch.float16, fp8_scale=1 / 4000),), 1),
    "pixelponder": (load_pixelponder, (File("pixelponder-fp32.bin", _pixelponder, torch.float32, True),), 2),
}


# --- Measuring

def anonymous() -> int:
    """Bytes of this process outside mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("This benchmark reads /proc/self/status, which only Linux has.")


class Highest:
    """The most anonymous memory since it was begun."""

    def __enter__(self):
        self.bytes, self.ended = anonymous(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.ended.wait(0.01):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()


@torch.inference_mode()
def measure(row: str, paths: list[Path]) -> dict:
    Host().start("--cpu")
    import_module("pixstack.nodes")  # so that no loading is part of a figure but that of the weights
    load, before, began = ROWS[row][0], anonymous(), time.perf_counter()
    with Highest() as highest:
        networks, step = load(*paths)
    seconds, after = time.perf_counter() - began, anonymous()
    began = time.perf_counter()
    step()
    return {"seconds": seconds, "peak": highest.bytes - before, "after": after - before,
            "step": time.perf_counter() - began, "file": sum(path.stat().st_size for path in paths),
            "kept": sum(_bytes(p) for net in networks for p in net.parameters())}


def _bytes(weight: Tensor) -> int:
    packed = getattr(weight, "_qdata", weight)
    return packed.numel() * packed.element_size()


def available() -> int:
    line = next(one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--folder", type=Path, default=Path(".comfyui/full_size"), help="where the files are written")
    parser.add_argument("--spare", type=float, default=8.0, help="GB of memory and disk to leave free")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("RESULT", json.dumps(measure(args.measure[0], list(map(Path, args.measure[1:])))))
        return
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}.")
    print(f"{'':20}{'file GB':>9}{'load s':>8}{'peak GB':>9}{'after GB':>10}{'peak/kept':>11}{'after/kept':>12}"
          f"{'step s':>8}")
    for row in args.rows or ROWS:
        _, files, kept = ROWS[row]
        weights = sum(math.prod(shape) for file in files for shape in file.shapes().values())
        memory, disk, spare = kept * weights, sum(file.size() for file in files), args.spare * GB
        args.folder.mkdir(parents=True, exist_ok=True)
        if memory + spare > available() or disk + spare > shutil.disk_usage(args.folder).free:
            print(f"{row:20}left out: it needs {memory / GB:.1f} GB of memory and {disk / GB:.1f} GB of disk")
            continue
        paths = [(args.folder / file.name).resolve() for file in files]
        try:
            for file, path in zip(files, paths, strict=True):
                file.write(path)
            done = subprocess.run([sys.executable, __file__, "--measure", row, *map(str, paths)], env=os.environ,
                                  capture_output=True, text=True)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if result is None:
            print(f"{row:20}failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        figures = json.loads(result.removeprefix("RESULT "))
        print(f"{row:20}{figures['file'] / GB:9.2f}{figures['seconds']:8.1f}{figures['peak'] / GB:9.2f}"
              f"{figures['after'] / GB:10.2f}{figures['peak'] / figures['kept']:11.2f}"
              f"{figures['after'] / figures['kept']:12.2f}{figures['step']:8.1f}", flush=True)


if __name__ == "__main__":
    main()
