"""LoRA files looked at, brought to another rank, and put together, whatever network they are for."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...models_impl import lora, state_dict
from ...models_impl.guard import reading
from ...models_impl.lora import arithmetic
from ...models_impl.pixart import lora as pixart_lora
from ...models_impl.ultrapixel import lora as ultrapixel_lora
from .exporting import DTYPES, written_as
from .places import refuse_dest, said

LONGEST = 200  # characters of an entry of the metadata
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class File:
    path: Path
    layers: dict[str, list[lora.Layer]]
    """By the names of their modules in the file."""
    rest: dict[str, Tensor]
    """What belongs to no layer."""
    spellings: list[str]
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def kohya(self) -> bool:
        """Whether its matrices are called lora_up and lora_down."""
        return any(".lora_up." in key for key in lora.spelled(self.tensors))

    @property
    def family(self) -> str | None:
        """Whose layers it changes, in words."""
        stated = self.metadata.get("pixstack.family", "").partition(".")[0].removesuffix("_lora")
        known = {"pixart": "PixArt", "pixelflow": "PixelFlow", "ultrapixel": "Stable Cascade", "flux": "FLUX"}
        if ultrapixel_lora.is_personalisation(self.tensors):
            return "Stable Cascade"
        return known.get(stated) or lora.family_of(self.layers)


def opened(path: Path, whole: bool = True) -> File:
    """A LoRA file. whole: with numbers in all its tensors, else ValueError."""
    with reading(path):
        tensors, metadata = state_dict.read_file(path)
        if any(ultrapixel_lora.NUMBERED.match(key) for key in tensors):
            raise ValueError("It numbers its layers, as UltraPixel's release does: name them first, by `python -m "
                             "trainer convert FILE DEST --to comfyui`.")
        layers, rest, spellings = lora.own_layers(tensors, metadata, lora.beside(path))
        if whole:
            state_dict.check_values({k: v for k, v in tensors.items() if v.ndim and k not in rest}, "this LoRA")
    return File(path, layers, rest, spellings, metadata, tensors)


# --- inspect


def inspected(path: Path) -> list[str]:
    """Lines on a file: family, spelling, kinds, ranks and scales, whether all is finite, metadata; a line a layer."""
    file = opened(path, whole=False)
    layers = [layer for own in file.layers.values() for layer in own]
    kinds = Counter(kind_of(layer) for layer in layers)
    ranks = Counter(rank for layer in layers if (rank := lora.rank_of(layer.tensors)))
    dtypes = Counter(DTYPE_NAMES.get(t.dtype, state_dict.dtype_name(t)) for t in file.tensors.values() if t.ndim)
    odd = [key for key, value in file.tensors.items()
           if value.is_floating_point() and not state_dict.all_finite(value)]
    lines = [f"{path}: a LoRA of {file.family or 'a model that is not known here'}, "
             f"{' and '.join(s for s in file.spellings)} names, {path.stat().st_size / 1e6:.1f} MB",
             f"  {counted(kinds)}; {counted(dtypes)} tensors",
             f"  ranks: {', '.join(f'{rank} ({n} layers)' for rank, n in sorted(ranks.items())) or 'none'}",
             f"  values: {'all are finite' if not odd else f'{len(odd)} tensors hold NaN or infinity: ' + some(odd)}"]
    if file.rest:
        lines.append(f"  {len(file.rest)} keys belong to no layer: {some(list(file.rest))}")
    lines += [f"  metadata: {name} = {value[:LONGEST]}{'...' if len(value) > LONGEST else ''}"
              for name, value in sorted(file.metadata.items())]
    return [*lines, *table(file, set(odd))]


def table(file: File, odd: set[str]) -> list[str]:
    width = max(map(len, file.layers))
    lines = [f"  {'layer':<{width}}  kind  rank     alpha     scale        size      norm"]
    for module, own in file.layers.items():
        for layer in own:
            rank = lora.rank_of(layer.tensors)
            shape = layer.tensors["diff"].shape if layer.kind == "diff" else arithmetic.shape_of(layer)
            size = "x".join(map(str, shape))
            finite = all(state_dict.all_finite(t) for t in layer.tensors.values()) if odd else True
            norm = f"{arithmetic.norm(layer):9.4g}" if finite else "      nan"
            alpha = f"{layer.scale * rank:9.4g}" if rank else "         "
            lines.append(f"  {module:<{width}}  {kind_of(layer):<4}  {rank or '':>4} {alpha} {layer.scale:9.4g} "
                         f"{size:>11} {norm}")
    return lines


def kind_of(layer: lora.Layer) -> str:
    return "bias" if layer.key.endswith(".bias") else layer.kind


def counted(numbers: Counter) -> str:
    return ", ".join(f"{n} {what}" for what, n in numbers.most_common())


def some(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"


# --- resize


def resize(source: Path, dest: Path, choose: arithmetic.Choose, largest: int | None, dtype: str = "keep",
           force: bool = False) -> list[str]:
    """Writes `dest`, the LoRA with the ranks that are chosen for each layer. Returns what was done."""
    refuse_dest(dest, [source], force)
    file = opened(source)
    with reading(source):
        layers, kept, before, after = {}, [], [], []
        for module, own in file.layers.items():
            layers[module] = []
            for layer in own:
                small, share = arithmetic.resized(layer, choose, largest)
                layers[module].append(small)
                if layer.kind not in ("diff", "oft"):
                    kept.append(share)
                    before.append(lora.rank_of(layer.tensors) or min(lora.size_of(layer)))
                    after.append(lora.rank_of(small.tensors))
    if not kept:
        raise ValueError(f"{source.name} holds no layer that has a rank, only whole differences or turns (OFT).")
    write(dest, layers, file.rest, file.kohya, file.metadata, dtype, {"resized": file.path.name})
    return [f"{source}: ranks {span(before)} become {span(after)}, which keep {100 * min(kept):.1f}% of the Frobenius "
            f"norm of the layer that loses most, {100 * sum(kept) / len(kept):.1f}% in the mean", said(dest)]


def span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def write(dest: Path, layers: dict, rest: dict, kohya: bool, metadata: dict, dtype: str, origin: dict):
    tensors = {**lora.write_own(layers, kohya), **rest}
    if dtype != "keep":
        tensors = {key: written_as(key, value, dtype) if key not in rest else value for key, value in tensors.items()}
    # Ranks and alphas of before; ours are in the file itself.
    kept = {k: v for k, v in metadata.items() if k not in (lora.METADATA_KEY, "ss_network_dim", "ss_network_alpha")}
    state_dict.write_file(dest, tensors, {**kept, "format": "pt", "pixstack.lora": json.dumps(origin)})


# --- merge


def merge(sources: Sequence[tuple[Path, float]], dest: Path, choose: arithmetic.Choose | None = None,
          largest: int | None = None, dtype: str = "keep", force: bool = False) -> list[str]:
    """Writes `dest`, one LoRA that changes what several do, each times its weight: exactly, with the sum of their
    ranks; with `choose` or `largest`, brought to lower ranks by SVD."""
    refuse_dest(dest, [path for path, _ in sources], force)
    files = [opened(path) for path, _ in sources]
    families = sorted({file.family for file in files if file.family})
    if len(families) > 1:
        raise ValueError(f"these LoRAs are for different models, {' and '.join(families)}.")
    if all(file.family == "PixArt" for file in files) and len({style for f in files for style in f.spellings}) > 1:
        files = [in_our_names(file) for file in files]
    kohya = files[0].kohya
    gathered, names, rest = {}, {}, {}
    for file, (_, weight) in zip(files, sources, strict=True):
        if twice := next((key for key in file.rest if key in rest), None):
            raise ValueError(f"{file.path.name} holds {twice}, as another of these files does: of such a thing a file "
                             "has one.")
        rest |= file.rest
        for module, own in file.layers.items():
            for layer in own:
                key = lora.bare(module), layer.key.rpartition(".")[2]
                names.setdefault(key, module)
                gathered.setdefault(key, []).append((layer, weight))
    layers = {}
    for key, parts in gathered.items():
        one = arithmetic.total([layer for layer, _ in parts], [weight for _, weight in parts])
        if choose or largest:
            one, _ = arithmetic.resized(one, choose or len, largest)
        layers.setdefault(names[key], []).append(one)
    told = [{"file": path.name, "weight": weight} for path, weight in sources]
    write(dest, layers, rest, kohya, {"pixstack.family": files[0].metadata.get("pixstack.family", "")} if
          "pixstack.family" in files[0].metadata else {}, dtype, {"merged": told})
    ranks = [rank for own in layers.values() for layer in own if (rank := lora.rank_of(layer.tensors))]
    return [f"{len(layers)} layers of {len(sources)} files, ranks {span(ranks) if ranks else 'none'}", said(dest)]


def in_our_names(file: File) -> File:
    """A LoRA of PixArt under the names of our network, what it changes of the text encoder beside it."""
    with reading(file.path):
        names = pixart_lora.guessed_names(file.tensors)
        read = lora.read(file.tensors, names, file.metadata, lora.beside(file.path))
        if read.unmatched:
            raise ValueError(f"{len(read.unmatched)} of its keys have no place in a PixArt, such as "
                             f"{read.unmatched[0]}.")
        tensors = {**lora.write(read, names, "comfyui"), **{key: file.tensors[key] for key in read.text_encoder}}
        layers, rest, spellings = lora.own_layers(tensors)
    return File(file.path, layers, rest, spellings, file.metadata, tensors)
