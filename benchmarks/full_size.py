"""Released sizes through the real loaders: load time, and memory beyond the mapped file.

For each row a file of random weights is written in the layout of the release, loaded by our node's loader in a
process of its own, and deleted. Printed are the size of the file, the seconds that loading took, the memory of the
process outside mapped files, its peak while loading and after it (Linux counts it as RssAnon), and both divided by what
the weights take in the dtype that they are kept in: a second copy of all on the way would make the first ratio 2.
After some of them one step follows: PixArt at 512 pixels, a prompt through T5.

    python benchmarks/full_size.py [ROW ...] [--folder FOLDER] [--spare GB]
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

import torch  # noqa: E402 - the repository gets its name first
from pixstack.models_impl.state_dict import write_file  # noqa: E402
from pixstack.tools.host import Host  # noqa: E402

GB = 1e9
T5_XXL = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128)


def shapes(row: str) -> dict[str, tuple]:
    """Names and shapes of the weights in the release."""
    if row == "t5_xxl_scaled_fp8":
        return _t5()
    from pixstack.models_impl.pixart.config import PRESETS as ART
    from pixstack.models_impl.pixart.model import PixArt
    from pixstack.models_impl.pixelflow.config import PRESETS as FLOW
    from pixstack.models_impl.pixelflow.model import PixelFlow
    from pixstack.models_impl.pixelponder.config import PRESETS as PONDER
    from pixstack.models_impl.pixelponder.model import PixelPonder
    from pixstack.models_impl.ultrapixel.config import GuideConfig
    from pixstack.models_impl.ultrapixel.guidance import Guide

    net = {
        "pixart_sigma": lambda: PixArt(ART["sigma_1024"], device="meta"),
        "pixelflow_t2i": lambda: PixelFlow(FLOW["xl_t2i"], device="meta"),
        "ultrapixel_guide": lambda: Guide(GuideConfig(), device="meta"),
        "pixelponder": lambda: PixelPonder(PONDER["released"].without_unused(), device="meta"),
    }[row]()
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


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


ROWS = {  # name -> folder, file, dtype of the release
    "pixart_sigma": ("diffusion_models", "full_size_pixart.pth", torch.float32),
    "pixelflow_t2i": ("diffusion_models", "full_size_pixelflow.safetensors", torch.float32),
    "ultrapixel_guide": ("model_patches", "full_size_guide.safetensors", torch.float32),
    "t5_xxl_scaled_fp8": ("text_encoders", "full_size_t5.safetensors", torch.float16),
    "pixelponder": ("controlnet", "full_size_ponder.safetensors", torch.bfloat16),
}


def write(row: str, path: Path):
    dtype, noise = ROWS[row][2], torch.randn(1 << 20) * 0.02
    tensors = {}
    for key, shape in shapes(row).items():
        count = torch.Size(shape).numel()
        value = noise.repeat(-(-count // len(noise)))[:count]
        value = value.reshape(shape).clone()  # torch.save writes all of what a view is of
        if row == "t5_xxl_scaled_fp8" and ("SelfAttention" in key or "DenseReluDense" in key) and "bias" not in key:
            tensors[key] = (value * 4000).to(torch.float8_e4m3fn)
            tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(1 / 4000)
        else:
            tensors[key] = value.to(dtype)
    if row == "t5_xxl_scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        write_file(path, tensors)


def load(row: str, path: Path):
    """(network, one step of it or None)."""
    parts = {"pixart": "pixart.load", "pixelflow": "pixelflow.load", "pixelponder": "pixelponder.load",
             "text": "common.text", "ultrapixel": "ultrapixel.guide"}
    host = {name: import_module(f"pixstack.nodes.host.{file}") for name, file in parts.items()}
    if row == "pixart_sigma":
        model = host["pixart"].load_pixart(str(path), settings={"variant": "sigma"})
        net = model.model.diffusion_model
        return net, lambda: net(torch.randn(1, 4, 64, 64, dtype=net.dtype), torch.tensor([500.0]),
                                torch.randn(1, 300, 4096, dtype=net.dtype))
    if row == "pixelflow_t2i":
        return host["pixelflow"].load_pixelflow(str(path)).model.diffusion_model, None
    if row == "ultrapixel_guide":
        return host["ultrapixel"].load_guide(str(path)).model, None
    if row == "pixelponder":
        return host["pixelponder"].load_pixelponder(str(path)).net_patcher.model, None
    clip = host["text"].load_t5(str(path))

    def encode():
        clip.encode_from_tokens_scheduled(clip.tokenize("a red apple on a blue car"))

    return clip.cond_stage_model, encode


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
def measure(row: str, path: Path) -> dict:
    Host().start("--cpu")
    before, began = anonymous(), time.perf_counter()
    with Highest() as highest:
        net, step = load(row, path)
    figures = {"seconds": time.perf_counter() - began, "peak": highest.bytes - before, "after": anonymous() - before,
               "file": path.stat().st_size, "kept": sum(_bytes(p) for p in net.parameters())}
    if step is not None:
        began = time.perf_counter()
        step()
        figures["step"] = time.perf_counter() - began
    return figures


def _bytes(weight: torch.Tensor) -> int:
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
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("RESULT", json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}.")
    print(f"{'':20}{'file GB':>9}{'load s':>8}{'peak GB':>9}{'after GB':>10}{'peak/kept':>11}{'after/kept':>12}"
          f"{'step s':>8}")
    for row in args.rows or ROWS:
        weights = sum(torch.Size(shape).numel() for shape in shapes(row).values())
        kept = 1 if row == "t5_xxl_scaled_fp8" else 4  # bytes; a CPU computes in float32, and keeps models in it
        needed = kept * weights + args.spare * GB
        args.folder.mkdir(parents=True, exist_ok=True)
        if needed > available() or needed > shutil.disk_usage(args.folder).free:
            print(f"{row:20}left out: it needs {needed / GB:.1f} GB of memory and disk")
            continue
        path = (args.folder / ROWS[row][1]).resolve()
        try:
            write(row, path)
            done = subprocess.run([sys.executable, __file__, "--measure", row, str(path)], env=os.environ,
                                  capture_output=True, text=True)
        finally:
            path.unlink(missing_ok=True)
        result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if result is None:
            print(f"{row:20}failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        figures = json.loads(result.removeprefix("RESULT "))
        print(f"{row:20}{figures['file'] / GB:9.2f}{figures['seconds']:8.1f}{figures['peak'] / GB:9.2f}"
              f"{figures['after'] / GB:10.2f}{figures['peak'] / figures['kept']:11.2f}"
              f"{figures['after'] / figures['kept']:12.2f}{figures.get('step', float('nan')):8.1f}", flush=True)


if __name__ == "__main__":
    main()
