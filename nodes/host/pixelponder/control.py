"""PixelPonder as a ComfyUI CONTROL_NET: many conditions in one object, residuals that reach FLUX's text tokens too."""
from __future__ import annotations

from dataclasses import dataclass

import comfy.controlnet
import comfy.ldm.common_dit
import comfy.ldm.flux.model
import comfy.utils
import torch
from comfy_execution.progress import get_progress_state
from torch import Tensor
from torch.nn import functional as F

from ....models_impl.flux.config import FluxConfig
from ....models_impl.flux.model import Residuals, pack, positions, residual_index
from ....models_impl.pixelponder.model import HINT_CELL
from ....models_impl.pixelponder.patch_select import Conditions, Selection
from ....models_impl.pixelponder.sampling import GUIDANCE
from ..common.attention import host_attention
from ..common.control import AREA, NetworkControl
from ..common.patcher import is_dynamic
from ..common.prefetch import host_prefetch
from ..common.shown import behind, kept, tell, warn
from .hints import Condition, as_one, cut, hint_for, labels, mask_for, of_area, spread, warn_of_shape
from .map import PICTURES, TALLEST, as_data, draw, masks_of, preview, rows, tiles
from .strategies import plan


class Shown:
    """The selections of the last steps, kept to be shown; copies of a control share them."""

    def __init__(self):
        self.share: Tensor | None = None
        """(B, K, rows, columns) of the pictures of one prompt, all conditions, float32 on the CPU: the last one."""
        self.of_size: dict[tuple[int, int], Tensor] = {}
        """The last one of every (height, width) in latent cells: a second pass at another size leaves the first's."""
        self.steps: dict[tuple[int, int], dict[int, Tensor]] = {}
        """Every step's at which it changed, by size and number from 1, uint8 of 255: for whoever looks back."""
        self.total: dict[tuple[int, int], int] = {}
        """Steps of the sampling, by size."""

    def keep(self, share: Tensor, size: tuple[int, int], step: int, steps: int):
        self.share = self.of_size[size] = share
        before = self.steps.setdefault(size, {})
        if self.total.get(size) != steps or before and step < max(before):  # another sampling
            before.clear()
        before[step], self.total[size] = (255 * share).round().byte(), steps


class PixelPonderControl(NetworkControl):
    """One PixelPonder with the conditions of one node, which compete; chained ControlNets add up as usual."""

    def __init__(self, net_patcher, dtype: torch.dtype):
        super().__init__(net_patcher)
        self.dtype = dtype  # that it computes in
        self.conditions: tuple[Condition, ...] = ()  # the primary one first
        self.whole_hint: Tensor | None = None  # of all conditions; what a pack put in its place counts instead
        self.strategy, self.rounds = "released", 1
        self.shown = Shown()
        self.node_id: str | None = None  # where previews of the map appear while sampling
        self._forget()

    def _forget(self):
        self._sampling = self._base = None
        self._ranges: list[tuple[float, float]] = []
        self._embeds: dict = {}
        self._chosen: dict = {}
        self._cut: dict = {}
        self._areas: dict = {}
        self._bar = None
        self._seen = None  # which of the guider's prompts is shown
        self._before: tuple[int, ...] = ()  # the conditions that took part in the last step

    # What ComfyUI calls

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        if not self.conditions:
            raise ValueError("This PixelPonder ControlNet has no conditions: connect it to 'Apply PixelPonder', with "
                             "'PixelPonder Condition' for each hint. Core's Apply ControlNet cannot say what kind "
                             "of hint an image is.")
        self._forget()
        self._check_base(model)
        self._sampling, self._base = model.model_sampling, _uncompiled(model.diffusion_model)
        self._base_dtype = model.manual_cast_dtype or model.get_dtype()
        self._ranges = [tuple(map(percent_to_timestep_function, (c.start, c.end))) for c in self.conditions]

    def _check_base(self, model):
        base, trunk = _uncompiled(model.diffusion_model), self.net_patcher.model.config.trunk
        if not isinstance(base, comfy.ldm.flux.model.Flux):
            raise ValueError(f"PixelPonder cannot guide a {type(model).__name__} ({type(base).__name__}): it controls "
                             "FLUX, loaded by ComfyUI's own node or any that makes the same model.")
        theirs = base.params
        for what, ours, actual in (
            ("width", trunk.hidden, theirs.hidden_size),
            ("heads", trunk.heads, theirs.num_heads),
            ("text width", trunk.context_dim, theirs.context_in_dim),
            ("values per token", trunk.in_channels, base.out_channels),
        ):
            if ours != actual:
                its = "FLUX.1" if trunk.hidden == FluxConfig.hidden else "the small FLUX that it was trained with"
                raise ValueError(f"This PixelPonder was trained for a FLUX with {what} {ours}, the model has {actual}: "
                                 f"it is for {its}.")

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        active = self._active(float(t[0]))
        if self.strength == 0 or not active:
            return before
        if self.strategy == "blend" and not any(self.conditions[i].strength for i in active):
            return before
        B, size = len(x_noisy), tuple(x_noisy.shape[-2:])
        hint = self._hint(size, cond.get(AREA))
        key = active, size, B, batched_number, id(hint)
        new = key not in self._chosen
        if new:
            self._chosen[key] = self._choose(*key[:-1], hint, x_noisy.device)
        choose, stepwise = self._chosen[key]
        x = self._sampling.calculate_input(t, x_noisy).to(self.dtype)
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (2, 2))
        trunk = self.net_patcher.model.config.trunk
        context = cond["c_crossattn"].to(x)
        pooled, guidance = cond.get("y"), cond.get("guidance")
        pooled = x.new_zeros(B, trunk.pooled_dim) if pooled is None else pooled[:, : trunk.pooled_dim].to(x)
        guidance = x.new_full((B,), GUIDANCE) if guidance is None else guidance.to(x.device)
        net = self.net_patcher.model
        control = net(
            pack(x), self._sampling.timestep(t).float(), context, pooled, guidance, select=choose,
            img_ids=positions(x.shape[-2] // 2, x.shape[-1] // 2, x.device),
            attention=host_attention(transformer_options),
            before_block=host_prefetch((*net.double_blocks, *net.single_blocks), x.device,
                                       is_dynamic(self.net_patcher)),
        )
        residuals = control.residuals(self.strength, self._base_dtype)
        strengths = [self.conditions[i].strength for i in active]
        if self.strategy != "blend" and strengths != [1.0] * len(strengths):
            residuals = weighted(residuals, strengths, control.selection.share, (x.shape[-2] // 2, x.shape[-1] // 2))
        if stepwise or new or active != self._before:
            share = self._share(control.selection, active, batched_number, transformer_options)
            if share is not None:
                step, steps = _step(float(t[0]), transformer_options)
                self.shown.keep(share, size, step, steps)
                if self.node_id is not None:
                    self._preview(step, steps, stepwise)
        self._before = active
        return self._inject(residuals, before, transformer_options)

    def cleanup(self):
        super().cleanup()
        if self._bar is not None:  # its node has run already, and a preview marks it as running again
            get_progress_state().finish_progress(self.node_id)
        self._forget()

    def copy(self):
        clone = PixelPonderControl(self.net_patcher, self.dtype)
        self.copy_to(clone)
        for name in ("conditions", "whole_hint", "strategy", "rounds", "shown", "node_id"):
            setattr(clone, name, getattr(self, name))
        return clone

    # Conditions and selection

    def _active(self, sigma: float) -> tuple[int, ...]:
        """Which conditions take part at this noise level, in order."""
        start, end = self.timestep_range
        if not end <= sigma <= start:
            return ()
        return tuple(i for i, (start, end) in enumerate(self._ranges) if end <= sigma <= start)

    def _hint(self, size: tuple[int, int], area: tuple | None) -> Tensor:
        """The picture of all hints for a latent of `size`: ours, or the tile that a pack has put in its place, cut from
        `cond_hint_original` or as `cond_hint` in the latent's own size; of a prompt's area, that part of it."""
        tile, hint = self.cond_hint, self.cond_hint_original
        if tile is not None and tuple(tile.shape[-2:]) == tuple(HINT_CELL * side for side in size):
            return tile
        if area is None:
            return hint
        key = id(hint), area
        if key not in self._areas:
            self._areas[key] = hint, of_area(hint, *area)
        return self._areas[key][1]

    def _conditions_of(self, hint: Tensor) -> tuple[Condition, ...]:
        if hint is self.whole_hint:
            return self.conditions
        if id(hint) not in self._cut:
            self._cut[id(hint)] = hint, cut(self.conditions, hint)  # with the hint, so that its id stays its own
        return self._cut[id(hint)][1]

    def _choose(self, active, size, B, batched_number, hint, device):
        """(choose, stepwise) for these conditions and this batch."""
        net, every = self.net_patcher.model, self._embed(size, hint, device)
        conditions = [self._conditions_of(hint)[i] for i in active]
        embeds = [spread(every[i], B, batched_number) for i in active]
        rows = max(map(len, embeds))
        stacked = torch.stack([e.expand(rows, -1, -1, -1) for e in embeds], dim=1)
        kinds = tuple(net.config.type_index(c.kind) for c in conditions)
        masks = [mask_for(c, size) for c in conditions]
        masks = [None if mask is None else spread(mask, B, batched_number) for mask in masks]
        grid = stacked.shape[-2] // 2, stacked.shape[-1] // 2
        strategy, forced = plan(self.strategy, self.rounds, net, conditions, masks, grid)
        return strategy.begin(Conditions(stacked, kinds), forced), strategy.stepwise

    def _embed(self, size: tuple[int, int], hint: Tensor, device) -> list[Tensor]:
        """Every hint (own batch, 16, H, W), H and W even, once per run, size and tile."""
        key = size, id(hint)
        if key not in self._embeds:
            net, embeds = self.net_patcher.model, []
            for number, condition in enumerate(self._conditions_of(hint), 1):
                index = net.config.type_index(condition.kind)
                if hint is self.whole_hint:
                    warn_of_shape(condition, number, size)
                pixels = hint_for(condition, size)
                embeds.append(net.encode_hint((2 * pixels - 1).to(device, self.dtype), index))
            self._embeds[key] = embeds
        return self._embeds[key]

    # The residuals

    def _inject(self, residuals: Residuals, before: dict | None, transformer_options: dict) -> dict:
        """The control dictionary of core's FLUX for the double-stream blocks. Its entries for the single-stream blocks
        reach image tokens only, so those are added after the blocks themselves, text and image alike.
        """
        doubles, singles = len(self._base.double_blocks), len(self._base.single_blocks)
        ours = [residuals.double[residual_index(i, doubles, len(residuals.double))] for i in range(doubles)]
        theirs = (before or {}).get("input", [])
        both = [a if b is None else a + b for a, b in zip(ours, theirs, strict=False)]
        replaced = transformer_options.get("patches_replace", {})
        blocks = dict(replaced.get("dit", {}))
        for i in range(singles):
            key = ("single_block", i)
            residual = residuals.single[residual_index(i, singles, len(residuals.single))]
            blocks[key] = Behind(residual, blocks.get(key))
        # New dictionaries: those that came along may belong to the model, for all of its runs.
        transformer_options["patches_replace"] = {**replaced, "dit": blocks}
        return {"input": both + ours[len(both) :], "middle": [], "output": (before or {}).get("output", [])}

    def _share(self, selection: Selection, active, batched_number: int, transformer_options: dict) -> Tensor | None:
        """One prompt's part of the selection, of all conditions: of the prompts with this control the first that the
        guider names, which is the positive one for nearly all. None: it was another's turn.
        """
        share, kinds = selection.share, transformer_options.get("cond_or_uncond", [0])
        first = min(kinds)
        if self._seen is not None and first > self._seen:
            return None
        self._seen = first
        if len(share) > 1:
            share = share.chunk(batched_number)[kinds.index(first)]
        whole = torch.zeros(len(share), len(self.conditions), *share.shape[2:])
        whole[:, list(active)] = share.float().cpu()
        return whole

    def _preview(self, step: int, steps: int, stepwise: bool):
        """Send the map to the widget of 'PixelPonder Map', and as a picture to the node that applied this, where every
        step has another."""
        share, names = self.shown.share[:1], labels(self.conditions)
        rows, columns = share.shape[-2:]
        tell("map", {"node": self.node_id, "step": step, "steps": steps, "names": names, "rows": rows,
                     "columns": columns, "tiles": as_data(share[0])})
        if stepwise:
            self._bar = self._bar or comfy.utils.ProgressBar(steps, node_id=self.node_id)
            picture = preview(share, names)
            self._bar.update_absolute(step, steps, ("JPEG", picture, max(picture.size)))


@dataclass(frozen=True)
class Behind:
    """A replacement of a single-stream block that runs it, or what replaced it before, and adds a residual."""

    residual: Tensor
    """(B, L+N, D), as it comes from the ControlNet: image first."""
    inner: object = None

    def __call__(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if self.inner is None else self.inner(args, extra)
        # (B, L+N, D), text first; longer where reference pictures follow
        out["img"][:, : self.residual.shape[1]] += self.residual
        return out


def _step(sigma: float, transformer_options: dict) -> tuple[int, int]:
    """Which step of how many this noise level belongs to, from 1."""
    sigmas = transformer_options.get("sample_sigmas")
    steps = 1 if sigmas is None else max(1, len(sigmas) - 1)
    return 1 if sigmas is None else min(steps, max(1, int((sigmas >= sigma).sum()))), steps


def _uncompiled(net):
    """The network itself, where a node has put torch.compile's wrapper in its place."""
    return getattr(net, "_orig_mod", net)


def weighted(residuals: Residuals, strengths: list[float], share: Tensor, grid: tuple[int, int]) -> Residuals:
    """Each image token's residual times the strength of the condition that it is from, text's times the mean of them.

    share: (1 or B, K, rows, columns); grid: (rows, columns) of tokens.
    """
    factor = (share.float() * share.new_tensor(strengths, dtype=torch.float32).view(-1, 1, 1)).sum(dim=1, keepdim=True)
    factor = F.interpolate(factor, grid, mode="nearest").flatten(2).transpose(1, 2)  # (1 or B, N, 1)
    double = tuple(r * factor.to(r) for r in residuals.double)
    mean = factor.mean(dim=1, keepdim=True)
    single = []
    for r in residuals.single:  # image first
        whole = torch.cat((factor, mean.expand(-1, r.shape[1] - factor.shape[1], -1)), dim=1)
        single.append(r * whole.to(r))
    return Residuals(double, tuple(single))


def map_of(control: PixelPonderControl, size: tuple[int, int]) -> Tensor:
    """share (B, K, rows, columns) for latents of `size`: of the last step that ran, or computed here where no step
    changes it, for the conditions that begin first. Nothing wins at a strength of 0.
    """
    if tuple(size) in control.shown.of_size:
        return control.shown.of_size[tuple(size)]
    if control.strength == 0:
        return torch.zeros(1, len(control.conditions), *((side + 1) // 2 for side in size))
    if control.strategy not in ("released", "blend"):
        raise ValueError(f"The map of the strategy {control.strategy!r} is made while sampling, and there was none at "
                         f"{size[1] * HINT_CELL}x{size[0] * HINT_CELL} pixels yet: connect the LATENT that the sampler "
                         "gives. If it is connected, none of its steps lay between start_percent and end_percent.")
    first = min(c.start for c in control.conditions)
    active = [i for i, c in enumerate(control.conditions) if c.start == first]
    masks = [mask_for(control.conditions[i], size) for i in active]
    H, W = (side + side % 2 for side in size)
    nothing = Conditions(torch.zeros(1, len(active), 1, H, W), (0,) * len(active))
    strategy, forced = plan(control.strategy, control.rounds, control.net_patcher.model,
                            [control.conditions[i] for i in active], masks, (H // 2, W // 2))
    share = strategy.begin(nothing, forced)(None).share
    whole = torch.zeros(len(share), len(control.conditions), *share.shape[2:])
    whole[:, active] = share.float()
    return whole


def picture_of(control: PixelPonderControl, size: tuple[int, int], overlay: float) -> tuple[Tensor, list[Tensor]]:
    """The map as a picture (B, height, width, 3) and as a mask (B, 8 H', 8 W') for each condition; see `map_of`."""
    share, hints = map_of(control, size), [hint_for(c, size).cpu() for c in control.conditions]
    height, width = (HINT_CELL * side for side in size)  # an odd latent's hints are padded to whole patches
    pictures = draw(share, hints, labels(control.conditions), overlay, (height, width))
    return pictures, [mask[:, :height, :width] for mask in masks_of(share, *hints[0].shape[-2:])]


def steps_of(control: PixelPonderControl, size: tuple[int, int]) -> dict:
    """What the widget of 'PixelPonder Map' shows: the map of every step at which it changed, over the hints."""
    share = map_of(control, size)
    steps = control.shown.steps.get(tuple(size)) or {0: (255 * share).round().byte()}
    most = max(2, TALLEST // share.shape[-2])
    if len(steps) > most:  # evenly, with the first and the last
        numbers = list(steps)
        steps = {n: steps[n] for n in (numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most))}
    hints = [hint_for(c, size).cpu().movedim(1, -1) for c in control.conditions]
    every = torch.stack([rows(one, len(share)) for one in steps.values()], dim=1)  # (B, S, K, rows, columns)
    return {
        "names": labels(control.conditions), "rows": share.shape[-2], "columns": share.shape[-1],
        "steps": list(steps), "total": control.shown.total.get(tuple(size), 0),
        "tiles": [kept(tiles(one)[None])[0] for one in every[:PICTURES]],
        "hints": [behind(hint, PICTURES) for hint in hints],
    }


def find(conditioning: list) -> PixelPonderControl:
    """The last applied PixelPonder of a conditioning; raises ValueError if it has none."""
    for _, entries in conditioning:
        control = entries.get("control")
        while control is not None:
            if isinstance(control, PixelPonderControl):
                return control
            control = control.previous_controlnet
    raise ValueError("This conditioning has no PixelPonder: connect the positive output of 'Apply PixelPonder'.")


def with_conditions(
    control: PixelPonderControl, conditions: tuple[Condition, ...], strength: float, start: float, end: float,
    strategy: str, rounds: int = 1, node_id: str | None = None,
) -> PixelPonderControl:
    """A copy of `control` with its conditions, those of high priority first; others stay in the order of their chain.

    Raises ValueError for a kind that the checkpoint does not know, for a strategy whose network it lacks.
    """
    if not conditions:
        raise ValueError("PixelPonder needs at least one condition: connect 'PixelPonder Condition'.")
    config = control.net_patcher.model.config
    for condition in conditions:
        config.type_index(condition.kind)
    applied = control.copy()
    applied.conditions = tuple(sorted(conditions, key=lambda c: -c.priority))
    applied.whole_hint = as_one(applied.conditions)
    applied.set_cond_hint(applied.whole_hint, strength, (start, end))
    applied.strategy, applied.rounds, applied.shown, applied.node_id = strategy, rounds, Shown(), node_id
    plan(strategy, rounds, control.net_patcher.model, [], [], (2, 2))  # refuses early what cannot run
    return applied


def warn_of_length(conditioning: list, control: PixelPonderControl):
    """Warn if the text is not of the length that the checkpoint was trained with."""
    config = control.net_patcher.model.config
    wanted = config.text_tokens
    lengths = {tokens.shape[1] for tokens, _ in conditioning if tokens is not None} - {wanted}
    if not lengths:
        return
    remedy = f"Put core's T5TokenizerOptions with min_length {wanted} between the CLIP loader and the prompt."
    if config.trunk.context_dim != FluxConfig.context_dim:
        remedy = "Load its encoder with 'Load T5 Text Encoder', type flux, which pads every text."
    warn(f"PixelPonder was trained with {wanted} text tokens, this prompt has {min(lengths)}, so part of what it adds "
         f"reaches other tokens than in training. {remedy}")
