"""What a data set of many pictures costs before the first step: seconds and memory of every part, at growing sizes.

Nothing is drawn or decoded. The jsonl names the same few pictures over and over, each time with a caption of its own;
the shards are hard links to a few; the features of captions are of a few numbers. Every part runs in a process of its
own, on one thread. Printed are seconds, the bytes of memory that a part needs at most and those that stay, all of them
for each picture too, and the exponent e of N^e that the last two sizes show: 1 grows as the data do, 0 not at all.

    python benchmarks/data_scale.py [--sizes 1000 10000 100000 1000000] [--parts NAME ...] [--shards 1000]
"""
from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[1] / "package"), *sys.path[1:]]

FILES = 1000  # pictures that a jsonl's entries name in turn
KEYS = 1000  # captions of a shard of embeddings
SIZES = ((512, 512), (480, 544), (544, 480), (384, 672), (672, 384))


def caption(i: int) -> str:
    return f"number {i}, a photograph of a harbour in the evening, with small boats and the lamps of the town around"


# --- What the parts read

def jsonl(folder: Path, count: int) -> Path:
    from PIL import Image

    for i in range(FILES):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    path = folder / "data.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            height, width = SIZES[i % len(SIZES)]
            file.write(json.dumps({"file": f"{i % FILES}.png", "caption": caption(i), "height": height,
                                   "width": width}) + "\n")
    return path


def shards(folder: Path, count: int, number: int) -> Path:
    each = max(1, count // number)
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as archive:
        for i in range(each):
            for ending, content in (("jpg", b"?"), ("txt", caption(i).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for i in range(1, count // each):
        os.link(first, folder / f"{i:05d}.tar")
    return folder


def embeddings(folder: Path, count: int) -> Path:
    import torch
    from pixstack.trainer.features.store import Store, digest

    store = Store(folder, "text", {})
    for i in range(count):
        store.put(digest(caption(i)), {"tokens": torch.zeros(1, 1)})
        if i % KEYS == KEYS - 1:
            store.write()
    store.write()
    return folder


def digests(folder: Path, count: int) -> Path:
    with open(folder / "pictures.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps([f"/data/pictures/{i:08d}.jpg", 100_000 + i, 10**18 + i, f"{i:040x}"]) + "\n")
    return folder


# --- Memory

def memory(name: str) -> int:
    """Bytes: VmRSS, those of now, or VmHWM, the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads /proc/self/status, which only Linux has")


class Measured:
    """Block whose seconds and memory are kept."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
        self.before, self.begin = memory("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.process_time() - self.begin
        self.most, self.stays = memory("VmHWM") - self.before, memory("VmRSS") - self.before


# --- The parts: (folder, count, arguments) -> Measured

def settings(path: Path, **more):
    from pixstack.trainer.config.schema import Data

    return Data(path=str(path), resolution=512, **more)


def part_jsonl(folder: Path, count: int, args) -> Measured:
    from pixstack.trainer.data import loader

    path = jsonl(folder, count)
    with Measured() as measured:
        found = loader.read(settings(path), "captions")
    assert len(found.train) == count
    return measured


def part_shards(folder: Path, count: int, args) -> Measured:
    from pixstack.trainer.data import loader

    shards(folder, count, args.shards)
    with Measured() as measured:
        found = loader.read(settings(folder), "captions")
    assert len(found.train) == count
    return measured


def part_kept(folder: Path, count: int, args) -> Measured:
    """The listing of the shards when it is there already (data.index)."""
    from pixstack.trainer.data import loader

    (folder / "shards").mkdir()
    made = settings(shards(folder / "shards", count, args.shards), index=str(folder / "index"))
    loader.read(made, "captions")
    with Measured() as measured:
        found = loader.read(made, "captions")
    assert len(found.train) == count
    return measured


def read_of(folder: Path, count: int):
    from pixstack.trainer.data import loader

    made = settings(jsonl(folder, count), buckets="area")
    return made, loader.read(made, "captions", strict=False)


def part_identity(folder: Path, count: int, args) -> Measured:
    from pixstack.trainer.data import loader

    _, found = read_of(folder, count)
    with Measured() as measured:
        loader.identity(found)
    return measured


def part_summary(folder: Path, count: int, args) -> Measured:
    from pixstack.trainer.data import loader

    _, found = read_of(folder, count)
    with Measured() as measured:
        loader.summary(found)
    return measured


def part_buckets(folder: Path, count: int, args) -> Measured:
    from pixstack.trainer.data import loader

    made, found = read_of(folder, count)
    with Measured() as measured:
        batches = loader.Batches(found.train, made, 0, 64)
        batches.at(0, 0)
    return measured


def part_shuffled(folder: Path, count: int, args) -> Measured:
    """The order of an epoch that goes through the data shard by shard (data.shards_at_once)."""
    from pixstack.trainer.data import loader

    made, found = read_of(folder, count)
    made = replace(made, shards_at_once=16, streams=8)
    with Measured() as measured:
        loader.Batches(found.train, made, 0, 64).at(0, 0)
    return measured


def part_resume(folder: Path, count: int, args) -> Measured:
    """The place of a step in the third epoch, of batches that are there."""
    from pixstack.trainer.data import loader

    made, found = read_of(folder, count)
    batches = loader.Batches(found.train, made, 0, 64)
    with Measured() as measured:
        batches.at(5 * count // (2 * 64), 0)
    return measured


def part_captions(folder: Path, count: int, args) -> Measured:
    """All captions, as they are asked of a frozen encoder."""
    from pixstack.trainer.data import wording

    made, found = read_of(folder, count)
    with Measured() as measured:
        for _ in wording.every(found.train, found.held_out, made, 0):
            pass
    return measured


def part_embeddings(folder: Path, count: int, args) -> Measured:
    """The index of the embeddings that are kept."""
    from pixstack.trainer.features.store import Store, digest

    embeddings(folder, count)
    with Measured() as measured:
        store = Store(folder, "text", {})
        assert digest(caption(count - 1)) in store
    return measured


def part_digests(folder: Path, count: int, args) -> Measured:
    """What the cache knows of picture files."""
    from pixstack.trainer.features.store import Digests

    digests(folder, count)
    with Measured() as measured:
        Digests(folder)
    return measured


PARTS = {name.removeprefix("part_"): part for name, part in list(globals().items()) if name.startswith("part_")}


def measure(name: str, count: int, args) -> tuple[float, int, int]:
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        found = PARTS[name](folder, count, args)
    finally:
        shutil.rmtree(folder)
    return found.seconds, max(found.most, 0), max(found.stays, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shards", type=int, default=1000, help="fewer where there are fewer pictures")
    parser.add_argument("--folder", type=Path, help="where temporary files go: some hundred bytes a picture")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'part':12}{'pictures':>12}{'seconds':>10}{'us each':>9}{'most MiB':>10}{'stays MiB':>10}{'bytes each':>11}"
          f"{'e seconds':>11}{'e memory':>10}")
    for name in args.parts:
        before = None
        for count in sorted(args.sizes):
            with context.Pool(1) as pool:
                seconds, most, stays = pool.apply(measure, (name, count, args))
            exponents = ["", ""]
            if before:
                exponents = [f"{math.log(max(now, 1e-4) / max(then, 1e-4)) / math.log(count / before[0]):.2f}"
                             for now, then in ((seconds, before[1]), (most / 2**20, before[2] / 2**20))]
            print(f"{name:12}{count:12,}{seconds:10.2f}{seconds / count * 1e6:9.2f}{most / 2**20:10.1f}"
                  f"{stays / 2**20:10.1f}{most / count:11.0f}{exponents[0]:>11}{exponents[1]:>10}", flush=True)
            before = count, seconds, most
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
