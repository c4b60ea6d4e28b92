"""Weights in and out of files, with errors that say what was wrong with which file."""
from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import quantised_files, typed
from .files import put
from .guard import reading
from .parsing import from_json

EXPONENTS = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The bits that are all set in what is no number."""
MOST_UNPACKED = 100  # times the size of a compressed archive
MOST_REPEATED = 2**28  # bytes that a tensor of a torch file may seem to have beyond those of the file
PREFIXES = ("module.", "model.diffusion_model.", "_orig_mod.", "diffusion_model.", "transformer.", "model_ema.",
            "model.")
OF_A_MODEL = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""The prefixes of which one is enough: other models may lie beside its weights in a file for several."""
BESIDE_A_MODEL = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoder.", "text_encoders.",
                  "clip_vision.", "model_ema.")
SIGNS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys of tensors by which ComfyUI says what a model predicts."""
CONFIG_KEY = "pixstack.config"
"""A tensor whose bytes are our metadata, in files of a program that writes only tensors."""
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
MOST_SHARDS = 200
INDEX = ".index.json"


def read_file(path: str | os.PathLike, runnable: Collection[str] = ()) -> tuple[dict, dict[str, str]]:
    """Tensors (nested as the file has them) and text metadata of a safetensors or torch file, or of all parts of one
    (model-00001-of-00002.safetensors), of which `path` is any, or their index (model.safetensors.index.json).

    The weights of a quantised file are `quantised_files.Quantised`, dequantised where they are used; runnable:
    formats that the caller takes as they are (`quantised_files.gathered`). Nothing in the file is executed: torch files
    are read with `weights_only=True`. Raises FileNotFoundError, or ValueError for a file that is truncated, is no
    checkpoint, holds pickled code, is a GGUF, or is quantised in a way that cannot be read here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: the download did not finish. Delete it and download it again.")
    if _starts(path) == b"GGUF":
        raise ValueError(
            f"{path.name} is a GGUF file, which is not read here. A T5 text encoder in GGUF goes into "
            "models/text_encoders and is loaded with 'CLIPLoader (GGUF)' of the pack ComfyUI-GGUF, whose CLIP works "
            "with PixArt. For every other model, and for training, get the safetensors file."
        )
    with reading(path):
        tensors, metadata = _read_shards(_first_of_index(path) if path.name.endswith(INDEX) else path)
        _refuse_unreal(tensors)
        if isinstance(stored := tensors.pop(CONFIG_KEY, None), Tensor):
            metadata = {**from_json(bytes(stored.flatten().tolist()), CONFIG_KEY), **metadata}
        tensors, metadata = quantised_files.gathered(tensors, metadata, runnable)
    for name, count in quantised_files.formats(tensors).items():
        logging.getLogger(__name__).info("%s: %d weights are quantised (%s).", path.name, count, name)
    return tensors, metadata


def _refuse_unreal(tensors: Mapping):
    """Raise ValueError for a matrix without values, whose other side may be of any size, and for a tensor that repeats
    the values of its file into gigabytes: what is made of such shapes would fill the memory."""
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            _refuse_unreal(value)
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            if value.ndim > 1 and not value.numel():
                raise ValueError(f"{key} has the shape {list(value.shape)} and no values: the file is damaged, or no "
                                 "file of weights.")
            held = value.untyped_storage().nbytes()
            if value.nbytes > max(MOST_REPEATED, held):
                raise ValueError(f"{key} has the shape {list(value.shape)}, {value.nbytes:,} bytes, of which the file "
                                 f"holds {held:,}: it is damaged, or made to fill the memory.")


def _first_of_index(path: Path) -> Path:
    """One of the parts that an index of transformers or diffusers lists, beside it."""
    entries = from_json(path.read_bytes(), path.name)
    listed = entries.get("weight_map") if isinstance(entries, dict) else None
    name = next(iter(listed.values()), None) if isinstance(listed, dict) else None
    if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX):
        raise ValueError(f"{path.name} is no index of a model's parts: it has no weight_map of file names.")
    if not path.with_name(name).is_file():
        raise ValueError(f"{path.name} lists {name[:200]}, which is not beside it: put all parts into one folder.")
    return path.with_name(name)


def _read_shards(path: Path) -> tuple[dict, dict[str, str]]:
    """A file, with the other parts where it is one of several."""
    match = SHARD.fullmatch(path.name)
    if not match or not 1 < int(match[3]) <= MOST_SHARDS:
        return _read(path)
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}{match[4]}") for i in range(1, int(match[3]) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{path.name} is part {int(match[2])} of {len(parts)} of a model, and {missing[0]} is not "
                         "beside it: put all parts into one folder.")
    tensors, metadata = {}, {}
    for part in parts:
        more, more_metadata = _read(part)
        if twice := next((key for key in more if key in tensors), None):
            raise ValueError(f"{part.name} holds {twice}, which another part has too: they belong to different models.")
        tensors, metadata = {**tensors, **more}, {**metadata, **more_metadata}
    return tensors, metadata


def _read(path: Path) -> tuple[dict, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        if path.suffix == ".safetensors" and not _is_torch_file(path):
            raise ValueError(
                f"{path.name} is not a complete safetensors file ({error}): {path.stat().st_size:,} bytes are there. "
                "Compare its size with the original and download it again."
            ) from error
    return _read_torch_file(path), {}


def _starts(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _is_torch_file(path: Path) -> bool:
    return _starts(path)[:2] in (b"PK", b"\x80\x02", b"\x80\x04")


def _read_torch_file(path: Path) -> dict:
    if not _is_torch_file(path):
        raise ValueError(f"{path.name} is neither a safetensors nor a torch file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training files keep their arguments in one
            with open(path, "rb") as file:  # by name, torch.load would believe the suffix .safetensors
                named = path.suffix == ".safetensors"
                tensors = torch.load(file if named else path, map_location="cpu", weights_only=True,
                                     mmap=not named and _is_zip(path) and not _is_compressed(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise ValueError(_cut(path, error)) from error
        raise ValueError(
            f"{path.name} holds more than weights ({_found_in(error)}), so it is not opened: unpickling it could run "
            "code. Get a safetensors file, or convert it where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{path.name} is a program (TorchScript), not weights, and is not run. Get its weights as "
                             "safetensors.") from error
        raise ValueError(_cut(path, error)) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path.name} holds a {type(tensors).__name__}, not a table of weights.")
    for table in (tensors, *(value for value in tensors.values() if isinstance(value, Mapping))):
        _check_table(table, path)
    return dict(tensors)


def _check_table(table: Mapping, path: Path):
    """Raises ValueError that names what lies among the weights of a torch file and is none. Settings are no weights:
    their names have no dot, or nothing beside them is a tensor."""
    if not any(isinstance(value, Tensor) for value in table.values()):
        return
    size, largest = 0, (-1, "")
    for key, value in table.items():
        if not isinstance(key, str):
            raise ValueError(f"{path.name} holds a weight under {key!r:.50}, which is no name: it is not a model.")
        if not isinstance(value, Tensor):
            if "." in key:
                kind = "nothing" if value is None else f"a {type(value).__name__}"
                raise ValueError(f"{path.name}: {key[:200]} is {kind}, where a weight belongs.")
        elif value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"{path.name}: {key[:200]} holds no plain values ({value.layout}, {dtype_name(value)}, "
                             f"{value.device}). Get the model as safetensors.")
        else:
            size += value.nbytes
            largest = max(largest, (value.nbytes, key))
    if size > MOST_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path.name}: {largest[1][:200]} has the shape {list(table[largest[1]].shape)}, "
                         f"{largest[0]:,} bytes. All weights would take {size:,}, and the file has "
                         f"{path.stat().st_size:,}: they repeat few values. Get the original file.")


def _cut(path: Path, error: BaseException) -> str:
    return (f"{path.name} is not a complete torch file ({first_line(error).partition('. ')[0]}): "
            f"{path.stat().st_size:,} bytes are there. Compare its size with the original and download it again.")


def _is_compressed(path: Path) -> bool:
    """Whether the archive of a torch file was packed again by another program: its bytes are then not the weights'.
    Raises ValueError for one that would unpack to far more than weights ever do."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        return False  # torch says what is wrong with it
    packed, unpacked = (sum(size) for size in zip(*((e.compress_size, e.file_size) for e in entries), strict=True))
    if unpacked > MOST_UNPACKED * max(packed, 1):
        raise ValueError(f"{path.name} would unpack to {unpacked:,} bytes, {unpacked // max(packed, 1)} times its "
                         "size: weights cannot be packed like that. Get the original file.")
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)


def _is_zip(path: Path) -> bool:
    return _starts(path)[:2] == b"PK"


def _found_in(error: BaseException) -> str:
    """The object in the file that torch refused, without its advice on how to load the file anyway."""
    match = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error: (.+)", str(error))
    return match[1] if match else first_line(error)


def first_line(error: BaseException) -> str:
    """The part of another library's message that fits into a sentence, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def save(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None):
    """safetensors' save_file, whose own error names no file. Raises OSError, for a full disk among others."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_file(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Write safetensors under `path` at once or not at all. One tensor under several names is written under each."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    seen, whole = set(), {}
    for key, value in tensors.items():
        value = value.detach().contiguous()
        whole[key] = value.clone() if value.data_ptr() in seen else value  # safetensors refuses shared memory
        seen.add(value.data_ptr())
    try:
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)  # the umask's; safetensors writes for the owner only
        save(whole, unfinished, metadata)
        os.chmod(unfinished, mode)
        put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def without_prefix(tensors: Mapping) -> dict:
    """Remove the prefixes that other programs put before every key, and what lies beside a model in one file."""
    tensors = {key: value for key, value in tensors.items() if key not in SIGNS}
    for prefix in OF_A_MODEL:
        own = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        if own and all(key in own or key.startswith(BESIDE_A_MODEL) for key in tensors):
            tensors = own
            break
    stripped = True
    while tensors and stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key[len(prefix):]: value for key, value in tensors.items()}
                stripped = True
    return tensors


def unwrapped(tensors: Mapping, names: Sequence[str]) -> dict:
    """The weights of a training file, which holds them under the first of `names` that it has; another file's own.
    Without the prefixes of other programs. Raises ValueError for weights that another program packed into few bits."""
    names = (*names, "module")  # DeepSpeed's
    inner = (tensors[name] for name in names if isinstance(tensors.get(name), Mapping) and tensors[name])
    own = without_prefix(next(inner, tensors))
    packed = next((key for key in own if key.endswith((".absmax", ".quant_map", ".qweight"))), None)
    if packed is not None:
        raise ValueError(f"{packed} belongs to weights in 4 bits whose format is not known here. Get the file in bf16, "
                         "float16 or fp8.")
    return own


def signs_of(tensors: Mapping) -> dict:
    """Entries that the keys by which ComfyUI marks a model say: what it predicts, and whether its noise ends in noise
    alone."""
    stated = {"prediction": "v"} if "v_pred" in tensors else {}
    return {**stated, "zero_terminal_snr": True} if "ztsnr" in tensors else stated


def count(keys: Iterable[str], name: str) -> int:
    """Number of entries of the module list `name`, whose keys are name.0.x, name.1.x and so on.

    Raises ValueError where one is missing. Numbers are compared as text: one key with a huge number builds nothing.
    """
    entry = re.compile(rf"{re.escape(name)}\.([^.]+)\.")
    numbers = {match[1] for key in keys if (match := entry.match(key)) and match[1].isdecimal()}
    missing = next((i for i in range(len(numbers)) if str(i) not in numbers), None)
    if missing is not None:
        last = max(numbers, key=lambda number: (len(number), number))
        raise ValueError(f"The file holds {len(numbers)} of {name}, the last of them {name}.{last[:20]}, and no "
                         f"{name}.{missing}: it is incomplete, or of another model.")
    return len(numbers)


def refuse_incomplete(tensors: Mapping, needed: Iterable[str], what: str):
    """Raise ValueError that names the keys that a checkpoint lacks, if it lacks any."""
    if missing := [key for key in needed if key not in tensors]:
        raise ValueError(f"This {what} is incomplete: it has no {', '.join(missing[:6])}"
                         f"{' ...' if len(missing) > 6 else ''}.")


def refuse_contradictions(shapes: Mapping, stated: Mapping):
    """Raise ValueError where entries of a configuration are not what the shapes of the weights say."""
    for name in shapes.keys() & stated.keys():
        if stated[name] != shapes[name]:
            raise ValueError(f"The configuration says {name}={str(stated[name])[:60]}, the weights say {shapes[name]}.")


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], what: str):
    """Load every weight, or raise ValueError that counts and names those that do not fit."""
    check_fit(module, tensors, what)
    module.load_state_dict(tensors, strict=True)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str):
    """Raise ValueError that counts and names the weights that do not fit, if there are any."""
    own = expected_shapes(module)
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    wrong = [f"{key} is {list(tensors[key].shape)}, expected {list(own[key])}"
             for key in own if key in tensors and tensors[key].shape != own[key]]
    complaints = [f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                  for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
                  if names]
    if complaints:
        raise ValueError(f"The weights do not fit {what}. " + "; ".join(complaints) + ".")
    own_dtypes = {key: value.dtype for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    check_values({key: tensors[key] for key in own if own_dtypes.get(key, torch.float32).is_floating_point}, what)


def check_values(tensors: Mapping[str, Tensor], what: str):
    """Raise ValueError that names the tensors that hold something else than numbers of a network: whole, complex or
    true-or-false values, NaN or infinity. Tensors without data are passed over."""
    for key, value in tensors.items():
        if not isinstance(value, Tensor) or value.is_meta:  # quantised: its parts were checked when they were read
            continue
        if not value.is_floating_point():
            raise ValueError(f"{key} of {what} is in {dtype_name(value)}, which holds no weights of a network.")
        if not all_finite(value):
            raise ValueError(f"{key} of {what} holds values that are no numbers (NaN or infinite): the training that "
                             "wrote the file went wrong, or the file is damaged. Get it again, or an earlier one.")


def all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass over memory where all is well."""
    if value.dtype in EXPONENTS:
        exponent = EXPONENTS[value.dtype]
        return not (value.contiguous().view(torch.uint8) & exponent == exponent).any().item()
    if value.element_size() == 1:
        return True
    total = value.sum(dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(value.isfinite().all())  # the sum of large numbers may overflow


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# The sizes that a layer keeps -> the shapes of its weight and of its bias.
LAYER_SHAPES = {
    ("in_features", "out_features"): lambda m: ((m.out_features, m.in_features), (m.out_features,)),
    ("in_channels", "out_channels", "kernel_size", "groups"): lambda m: (
        (m.in_channels, m.out_channels // m.groups, *m.kernel_size) if m.transposed
        else (m.out_channels, m.in_channels // m.groups, *m.kernel_size), (m.out_channels,)),
    ("num_embeddings", "embedding_dim"): lambda m: ((m.num_embeddings, m.embedding_dim), None),
    ("normalized_shape",): lambda m: (m.normalized_shape, m.normalized_shape),
    ("num_groups", "num_channels"): lambda m: ((m.num_channels,), (m.num_channels,)),
    ("num_features",): lambda m: ((m.num_features,), (m.num_features,)),
}


def expected_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the weights of a network by the names that its state dict has, also of those that are not made yet.

    Layers of ComfyUI after 0.3.75 have no weight, or one that is None, until a file is loaded into them, so that the
    memory is taken once: the shapes of those follow from the layer's own sizes. Raises TypeError for such a layer whose
    sizes are in no row of LAYER_SHAPES.
    """
    shapes = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        passing = layer._non_persistent_buffers_set
        own = {**layer._parameters, **{k: v for k, v in layer._buffers.items() if k not in passing}}
        layer_shapes = {key: value.shape for key, value in own.items() if value is not None}
        if "weight" not in layer_shapes:
            layer_shapes |= _not_made_yet(name, layer)
        shapes |= {f"{name}.{key}" if name else key: shape for key, shape in layer_shapes.items()}
    return shapes


def _not_made_yet(name: str, layer: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the weight and bias that a layer gets when a file is loaded; nothing for a layer without a weight."""
    if next(layer.children(), None) is not None:
        return {}
    if not getattr(layer, "affine", True) or not getattr(layer, "elementwise_affine", True):
        return {}  # a norm without weights
    known = (shapes for sizes, shapes in LAYER_SHAPES.items() if all(hasattr(layer, size) for size in sizes))
    shapes = next(known, None)
    if shapes is None and getattr(layer, "weight", layer) is None:
        raise TypeError(f"The layer {name} is a {type(layer).__name__} whose weight is not made before it is loaded, "
                        "and none of its attributes in LAYER_SHAPES says how large it will be.")
    if shapes is None:
        return {}
    weight, bias = shapes(layer)
    layer_shapes = {"weight": torch.Size(weight)}
    if bias is not None and getattr(layer, "comfy_need_lazy_init_bias", False) and getattr(layer, "bias", None) is None:
        layer_shapes["bias"] = torch.Size(bias)
    return layer_shapes


def config_metadata(family: str, entries: Mapping) -> dict[str, str]:
    """Metadata of our exported safetensors: the family and its whole configuration."""
    return {"pixstack.family": family, "pixstack.config": json.dumps(entries)}


def config_tensor(family: str, entries: Mapping) -> dict[str, Tensor]:
    """`config_metadata` as a tensor, which `read_file` takes for it."""
    return metadata_tensor(config_metadata(family, entries))


def metadata_tensor(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Metadata as a tensor among the weights."""
    return {CONFIG_KEY: torch.tensor(list(json.dumps(dict(metadata)).encode()), dtype=torch.uint8)}


def metadata_config(metadata: Mapping[str, str], family: str, kind: type | None = None) -> dict | None:
    """The configuration that our own files carry in their metadata; None in anybody else's file. kind: the dataclass
    whose entries they are. Raises ValueError for a text that is no configuration, or none of that kind."""
    if metadata.get("pixstack.family") != family:
        return None
    entries = from_json(metadata.get("pixstack.config", ""), "The configuration in this file's metadata")
    if not isinstance(entries, dict):
        raise ValueError("The configuration in this file's metadata is no table of entries: the file is damaged.")
    entries = typed.plain(entries, "The configuration in this file's metadata")
    return typed.entries(kind, entries, "The configuration in this file's metadata") if kind else entries
