"""PixelPonder's files: the released `pixelponder-fp32.bin`, training files, and our own safetensors."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .. import typed
from ..flux.checkpoint import NEEDED, complete, from_shapes
from ..flux.config import FluxConfig
from ..known_files import WrongFile, family_of
from ..state_dict import (
    config_metadata,
    count,
    metadata_config,
    refuse_contradictions,
    refuse_incomplete,
    unwrapped,
    without_prefix,
)
from .config import TYPES, PixelPonderConfig, SelectConfig, SelectorConfig

FAMILY = "pixelponder"
STEMS, TOWER, SELECT = "input_hint_block_list_moe", "input_hint_block_share", "select_net."
SELECT_MARK = "attn_block.0.img_attn.qkv.weight"


def read(
    tensors: Mapping,
    metadata: Mapping[str, str] | None = None,
    config: Mapping | None = None,
    select_net: bool = False,
    unused: bool = False,
) -> tuple[PixelPonderConfig, dict[str, Tensor]]:
    """(configuration, weights under the released key names) from the contents of a file (`state_dict.read_file`).

    select_net: keep the released selection network, half of the file, which only `AsRun` needs. unused: keep the
    single-stream blocks whose results never reach FLUX. config: entries that complete and must not contradict what the
    shapes say. Raises ValueError for a file of another family, XLabs' ControlNets among them.
    """
    tensors = unwrapped(tensors, ("state_dict", "model"))
    if family_of(tensors) != "PixelPonder":
        raise WrongFile("This is not a PixelPonder checkpoint.", tensors)
    refuse_incomplete(tensors, (f"{STEMS}.0.0.weight", "pos_embed_input.weight", *NEEDED, f"{TOWER}.8.weight"),
                      "PixelPonder checkpoint")
    ours = metadata_config(metadata or {}, FAMILY, PixelPonderConfig) or {}
    for name, kind in (("trunk", FluxConfig), ("selector", SelectorConfig)):
        typed.entries(kind, ours.get(name) or {}, f"The configuration of the {name} in this file's metadata")
    given = PixelPonderConfig.entries_of(config or {})
    stated = {**ours, **given, "trunk": {**ours.get("trunk", {}), **given["trunk"]}}
    stated["trunk"].pop("single_depth", None)  # a pruned file has fewer
    trunk = FluxConfig(**complete(from_shapes(tensors), stated["trunk"]))
    config_found = PixelPonderConfig(trunk, _types(count(tensors, STEMS), stated.get("types")),
                                     selector=_selector(tensors, stated.get("selector")),
                                     text_tokens=stated.get("text_tokens", PixelPonderConfig.text_tokens))
    if select_net:
        part = {key[len(SELECT):]: value for key, value in tensors.items() if key.startswith(SELECT)}
        if SELECT_MARK not in part:
            raise ValueError("This PixelPonder file was saved without its selection network. Use a selection that does "
                             "not run it, or the file as released.")
        select, _ = read_select_net(part, stated.get("select"))
        config_found = replace(config_found, select=select)
    else:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(SELECT)}
    if not unused:
        config_found = config_found.without_unused()
        dead = tuple(f"single_blocks.{i}." for i in range(config_found.trunk.single_depth, trunk.single_depth))
        tensors = {key: value for key, value in tensors.items() if not key.startswith(dead)}
    return config_found, tensors


def read_select_net(tensors: Mapping, config: Mapping | None = None) -> tuple[SelectConfig, dict[str, Tensor]]:
    """(configuration, weights) of only the selection network, from keys without `select_net.`."""
    refuse_incomplete(tensors, ("pos_embed_input.weight", "attn_block.0.img_attn.norm.query_norm.scale",
                                "attn_block.0.img_mlp.0.weight", "combine_attn_block.0.img_attn.qkv.weight"),
                      "selection network")  # fmt: skip
    hidden, in_channels = tensors["pos_embed_input.weight"].shape
    shapes = dict(
        hidden=hidden,
        in_channels=in_channels,
        heads=hidden // tensors["attn_block.0.img_attn.norm.query_norm.scale"].shape[0],
        mlp_hidden=tensors["attn_block.0.img_mlp.0.weight"].shape[0],
        types=count(tensors, "attn_block"),
        qkv_bias="attn_block.0.img_attn.qkv.bias" in tensors,
    )
    if count(tensors, "combine_attn_block") != 1:
        raise ValueError(f"This selection network combines with {count(tensors, 'combine_attn_block')} blocks, the "
                         "released one with 1.")
    stated = SelectConfig.entries_of(config or {})
    refuse_contradictions(shapes, stated)
    return SelectConfig(**{**shapes, **stated}), dict(tensors)


def read_hint_encoders(tensors: Mapping, types: Mapping[str, int] | None = None) -> tuple[tuple, dict[str, Tensor]]:
    """(kinds of hints, weights) of only the hint encoders; types: name -> index of its stem."""
    part = {key: value for key, value in without_prefix(tensors).items() if key.startswith((f"{STEMS}.", f"{TOWER}."))}
    refuse_incomplete(part, (f"{STEMS}.0.0.weight", f"{TOWER}.8.weight"), "PixelPonder checkpoint")
    return _types(count(part, STEMS), None if types is None else sorted(types, key=types.get)), part


def metadata(config: PixelPonderConfig) -> dict[str, str]:
    """Metadata of our exported safetensors: the family and the whole configuration."""
    return config_metadata(FAMILY, config.as_dict())


def select_net_is_untrained(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the selection network is still as PyTorch initialises it, as the released training code leaves it.

    tensors: a file with `select_net.` keys. None of its parameters receives a gradient there (its picks are argmax and
    topk), so norms are exactly 1 and linear weights inside 1/sqrt(width).
    """
    part = {key: value for key, value in without_prefix(tensors).items() if key.startswith(SELECT)}
    norms = [value for key, value in part.items() if key.endswith("_norm.scale")]
    linears = [part[f"{SELECT}pos_embed_{end}.weight"] for end in ("input", "output")]
    inside = (w.abs().max() <= w.shape[1] ** -0.5 * (1 + 2**-7) for w in linears)  # bfloat16 may have rounded up
    return all(bool((value == 1).all()) for value in norms) and all(map(bool, inside))


def _types(stems: int, names) -> tuple[str, ...]:
    if names is None:
        if stems != len(TYPES):
            raise ValueError(f"This PixelPonder checkpoint has {stems} hint encoders, the release {len(TYPES)} "
                             f"({', '.join(TYPES)}), and its keys do not say what they are for. Give its "
                             "configuration (type2id).")
        return TYPES
    if len(names) != stems:
        raise ValueError(f"The configuration names {len(names)} kinds of hints, the weights have {stems}.")
    return tuple(names)


def _selector(tensors: Mapping[str, Tensor], stated: Mapping | None) -> SelectorConfig | None:
    weight = tensors.get("selector.cond_in.weight")
    if weight is None:
        return None
    selector = SelectorConfig(width=weight.shape[0], depth=count(tensors, "selector.blocks"))
    if stated is not None and SelectorConfig(**stated) != selector:
        raise ValueError(f"The configuration says {SelectorConfig(**stated)}, the weights say {selector}.")
    return selector
