"""PixelPonder's ControlNet (ControlNetFlux, src/flux/controlnet.py of chfyfr/PixelPonder@3326c73).

A FLUX trunk of two double- and two single-stream blocks. The hint of each condition is embedded by the stem of its kind
and a tower that all kinds share; a selection (`patch_select`) makes one map of all of them, which is added to the image
tokens. The hidden states after the blocks are the residuals: there are no zero-initialised output layers.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.attention import attention as dense_attention
from ..flux.model import FluxTrunk, Residuals, pack
from .accumulate import Selector
from .config import HINT_CHANNELS, PixelPonderConfig
from .patch_select import Conditions, Selection, SelectionInputs
from .select_net import SelectNet

HINT_CELL = 8  # pixels along one side of an embedded cell


def hint_stem(operations, to: dict) -> nn.Sequential:
    """(B, 3, H, W) in [-1, 1] -> (B, 16, H/2, W/2); one for each kind of hint."""
    C = HINT_CHANNELS
    return nn.Sequential(
        operations.Conv2d(3, C, 3, padding=1, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, stride=2, **to), nn.SiLU(),
    )  # fmt: skip


def hint_tower(operations, to: dict) -> nn.Sequential:
    """(B, 16, H/2, W/2) -> (B, 16, H/8, W/8), shared by all kinds, so that their maps can be mixed."""
    C = HINT_CHANNELS
    return nn.Sequential(
        operations.Conv2d(C, C, 3, padding=1, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, stride=2, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, stride=2, **to), nn.SiLU(),
        operations.Conv2d(C, C, 3, padding=1, **to),
    )  # fmt: skip


class HintEncoders(nn.Module):
    """The stems and the tower. They do not depend on the timestep: hints are embedded once per picture."""

    def __init__(self, types: Sequence[str], operations=nn, dtype=None, device=None):
        super().__init__()
        to = dict(dtype=dtype, device=device)
        self.input_hint_block_list_moe = nn.ModuleList(hint_stem(operations, to) for _ in types)
        self.input_hint_block_share = hint_tower(operations, to)

    def encode_hint(self, image: Tensor, index: int) -> Tensor:
        """image: (B, 3, H, W) in [-1, 1]; index of its kind's stem. Returns (B, 16, H/8, W/8), rounded up."""
        return self.input_hint_block_share(self.input_hint_block_list_moe[index](image))


@dataclass(frozen=True)
class ControlOutput:
    """The residuals of one pass of the ControlNet."""

    double: tuple[Tensor, ...]
    """(B, N, D) after each double-stream block."""
    single: tuple[Tensor, ...]
    """(B, N+L, D) after each single-stream block, the image first."""
    selection: Selection

    def residuals(self, strength: float | Tensor = 1.0, dtype: torch.dtype | None = None) -> Residuals:
        """Residuals that FLUX adds, scaled (0.8 in the release when sampling, 1 in training).

        The single ones go as they are, image first, onto a sequence that has the text first: with 512 text and 1024
        image tokens the text receives what belongs to image tokens 0..511, and so on. The weights were trained so.
        Single ones beyond the number of double ones are never used (src/flux/model.py:110-172).
        """
        return Residuals(self.double, self.single[: len(self.double)]).times(strength, dtype)


class PixelPonder(FluxTrunk):
    def __init__(self, config: PixelPonderConfig, operations=nn, dtype=None, device=None):
        super().__init__(config.trunk, operations, dtype, device)
        to = dict(dtype=dtype, device=device)
        self.config = config
        self.pos_embed_input = operations.Linear(config.trunk.in_channels, config.trunk.hidden, **to)
        self.input_hint_block_list_moe = nn.ModuleList(hint_stem(operations, to) for _ in config.types)
        self.input_hint_block_share = hint_tower(operations, to)
        if config.select is not None:
            self.select_net = SelectNet(config.select, operations, dtype, device)
        if config.selector is not None:
            self.selector = Selector(config, operations, dtype, device)

    def initialise(self, base: Mapping[str, Tensor]) -> PixelPonder:
        """Start a training as the reference does (load_controlnet, util.py): everything that FLUX has too is copied
        from it (released key names), and the hints begin at zero, and our selector without any preference for a kind.
        Residuals are not zero at the start.
        """
        own = self.state_dict()
        shared = {key: value for key, value in base.items() if key in own}
        wrong = [key for key, value in shared.items() if value.shape != own[key].shape]
        if wrong or "double_blocks.0.img_attn.qkv.weight" not in shared:
            raise ValueError("This FLUX cannot be the base of the ControlNet:  "
                             + (f"{wrong[0]} is {list(shared[wrong[0]].shape)}, expected {list(own[wrong[0]].shape)}."
                                if wrong else "it has no double_blocks.0.img_attn.qkv.weight."))
        self.load_state_dict(shared, strict=False)
        for parameter in self.input_hint_block_share[-1].parameters():
            nn.init.zeros_(parameter)
        if self.config.selector is not None:
            # Embeddings of kinds of size 1 would drown the hints: the selector would give all patches to one kind
            # until it had unlearned that (benchmarks/pixelponder_selection.py).
            nn.init.zeros_(self.selector.type_embedding.weight)
        return self

    def encode_hint(self, image: Tensor, index: int) -> Tensor:
        """See `HintEncoders.encode_hint`."""
        return HintEncoders.encode_hint(self, image, index)

    def conditions(self, hints: Sequence[tuple[str, Tensor]]) -> Conditions:
        """Embed hints, the primary one first. Any number, kinds may repeat.

        hints: (kind, image (B, 3, H, W) in [-1, 1]) of one size, 8 pixels to a latent cell; batches of 1 serve all.
        Raises ValueError for an unknown kind or for sizes that differ.
        """
        if not hints:
            raise ValueError("PixelPonder needs at least one condition.")
        types = tuple(self.config.type_index(kind) for kind, _ in hints)
        sizes = {tuple(image.shape[-2:]) for _, image in hints}
        if len(sizes) > 1:
            raise ValueError("The hints must be of one size, got "
                             + ", ".join(f"{kind} {image.shape[-1]}x{image.shape[-2]}" for kind, image in hints) + ".")
        embeds = [self.encode_hint(image, index) for index, (_, image) in zip(types, hints, strict=True)]
        B = max(len(e) for e in embeds)
        return Conditions(torch.stack([e.expand(B, -1, -1, -1) for e in embeds], dim=1), types)

    def forward(
        self,
        img: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        *,
        select: Callable[[SelectionInputs], Selection],
        img_ids: Tensor,
        txt_ids: Tensor | None = None,
        attention: Callable = dense_attention,
        before_block: Callable[[nn.Module | None], None] = lambda block: None,
    ) -> ControlOutput:
        """Residuals for one step of FLUX; the inputs are those of `flux.model.Flux`.

        select: what `strategy.begin(conditions)` of `patch_select` returned, so that all that the step does not change
        is computed once per picture. before_block: called with each of `double_blocks` and `single_blocks` before it
        runs, so that a host can fetch its weights, and with None after the last.
        """
        img, txt, vec, rope = self.embed(img, timestep, context, pooled, guidance, img_ids, txt_ids)
        selection = select(SelectionInputs(txt, vec, rope, attention))
        hint = pack(selection.map)
        if hint.shape[1] != img.shape[1]:
            H, W = selection.map.shape[-2:]
            raise ValueError(f"The hints are {W * HINT_CELL}x{H * HINT_CELL} pixels, which makes {hint.shape[1]} "
                             f"tokens, but the picture has {img.shape[1]}: resize the hints to it.")
        img = img + self.pos_embed_input(hint.to(img.dtype))
        double, single = [], []
        for block in self.double_blocks:
            before_block(block)
            img, txt = self.run(block, img, txt, vec, rope, attention)
            double.append(img)
        # Image first here, although the rope has the text first: image tokens turn as text did, and the other way
        # round. The reference's order (controlnet.py:143, 192), which the weights were trained with.
        x = torch.cat((img, txt), dim=1)  # (B, N+L, D)
        for block in self.single_blocks:
            before_block(block)
            x = self.run(block, x, vec, rope, attention)
            single.append(x)
        before_block(None)
        return ControlOutput(tuple(double), tuple(single), selection)
