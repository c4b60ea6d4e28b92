"""The strategies that choose a condition for each patch, by the names that the node gives them."""
from __future__ import annotations

from ....models_impl.pixelponder.accumulate import Accumulate
from ....models_impl.pixelponder.model import PixelPonder
from ....models_impl.pixelponder.patch_select import Blend, Released, forced_map
from ....models_impl.pixelponder.select_net import AsRun
from .hints import Condition

STRATEGIES = ("released", "as run", "accumulate", "blend")


def plan(name: str, rounds: int, net: PixelPonder, conditions: list[Condition], masks: list, grid: tuple[int, int]):
    """(strategy, forced) of `patch_select`. masks: (1 or B, H, W) or None for each condition; grid: in tokens.

    Raises ValueError for a strategy whose network the checkpoint lacks.
    """
    if name == "blend":
        weights = zip((c.strength for c in conditions), masks, strict=True)
        return Blend([weight if mask is None else weight * mask for weight, mask in weights]), None
    if name == "released":
        return Released(), forced_map(masks, *grid)
    if name == "as run":
        if net.config.select is None:
            raise ValueError("The strategy 'as run' executes the selection network, which was not kept: set "
                             "selection_network in 'Load PixelPonder' to 'keep', or choose another strategy.")
        side = net.config.select.patch_size // 2
        return AsRun(net.select_net), forced_map(masks, grid[0] // side, grid[1] // side)
    if net.config.selector is None:
        raise ValueError("The strategy 'accumulate' needs a selector that was trained for it, which this checkpoint "
                         "does not have (the release has none). Choose 'released' or 'blend'.")
    return Accumulate(net.selector, rounds), forced_map(masks, *grid)
