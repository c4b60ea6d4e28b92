"""What settings that were taken over one by one are to each other, and to the recipe."""
from __future__ import annotations

from ..config.schema import Config
from .prompts import plain
from .rows import Draft
from .sets import PRIOR_SHARE

WORDINGS = 10
MULTIPLES = {"ultrapixel": 32}  # of a sample's sides; of the other families:
MULTIPLE = 16


def settle(draft: Draft, config: Config):
    """config: the draft as it is read, so that what sets inherit is known."""
    weights(draft)
    captions(draft, config)
    pictures(draft, config)
    prior(draft, config)
    sizes(draft)
    tables(draft, config)


def weights(draft: Draft):
    """Two weights of the noise level, and a delta that no schedule can begin from."""
    if draft.get("loss.snr_gamma") and draft.get("loss.debiased"):
        del draft.settings["loss"]["debiased"]
        draft.changed = [line for line in draft.changed if " is loss.debiased = " not in line]
        draft.absent.append(("debiased estimation", True, "loss.snr_gamma is a weight of the noise level already"))
    if (draft.get("loss.snr_gamma") or draft.get("loss.debiased")) and draft.has("recipe.weight"):
        draft.set("recipe.weight", "none")
    delta, schedule = draft.get("loss.huber_delta", 0), draft.get("loss.huber_schedule", "constant")
    if schedule != "constant" and delta >= 1:
        draft.set("loss.huber_schedule", "constant")
        draft.absent.append(("huber schedule", schedule, f"it begins at 1, and loss.huber_delta is {delta:g}"))


def captions(draft: Draft, config: Config):
    """Captions that change at every step, before a frozen encoder."""
    rewords = {name for one in config.data.each for name in one.rewords}
    if not rewords or not config.text.frozen:
        return
    same = rewords == {"template_share"} and all(one.template_share in (0, 1) and len(one.templates) < 2
                                                 for one in config.data.each)
    draft.set("data.caption_variants", 1 if same else WORDINGS)
    if not same:
        draft.changed.append(f"Captions change by {', '.join(sorted(rewords))}: {WORDINGS} wordings of each picture's "
                             "(data.caption_variants) are embedded before the first step, in place of a new one at "
                             "every step.")


def pictures(draft: Draft, config: Config):
    """Pictures that change every time, and features that are kept of each once."""
    changing = {name for one in config.data.each for name in one.varies}
    if changing and config.cache.folder:
        del draft.settings["cache"]
        draft.set("text.cache", config.cache.folder)
        draft.changed.append(f"Pictures change by {', '.join(sorted(changing))}: features are kept of captions only "
                             "(text.cache), and pictures are encoded whenever they are shown.")


def prior(draft: Draft, config: Config):
    """A batch that has room for regularisation pictures."""
    if not config.data.has_prior:
        return
    micro, batch = config.micro_batch_size or 1, config.batch_size
    if batch * PRIOR_SHARE < 1:
        draft.set("batch_size", batch := 2 * micro)
        draft.changed.append(f"batch_size = {batch}: half of every batch are regularisation pictures "
                             "(data.prior_share).")
    if config.data.bucket_group and config.data.bucket_group * PRIOR_SHARE < 1:
        draft.set("data.bucket_group", batch)


def sizes(draft: Draft):
    """Samples of a size that the network takes."""
    multiple = MULTIPLES.get(draft.recipe.partition("_")[0], MULTIPLE)
    for place in (draft.get("samples", {}), *(t for t in draft.get("samples.prompts", []) if isinstance(t, dict))):
        for side in ("height", "width"):
            given = place.get(side) or 0
            if given % multiple:
                place[side] = max(multiple, given // multiple * multiple)
                draft.changed.append(f"A sample's {side} {given} is {place[side]}: sides are multiples of {multiple}.")


def tables(draft: Draft, config: Config):
    """Prompts with settings that this recipe cannot draw by."""
    listed, recipe = draft.get("samples.prompts", []), config.recipe
    distilled = draft.recipe.startswith("flux") and draft.get("init_from")
    for number, one in enumerate(listed if any(isinstance(t, dict) for t in listed) else [], 1):
        key, cfg = f"negative prompt of sample {number}", one.get("cfg", config.samples.cfg)
        if "negative" in one and (distilled or cfg == 1 or not recipe.guides(config)):
            why = "a distilled FLUX is conditioned on its guidance, and knows no negative prompt" if distilled else \
                "it counts nothing at cfg 1" if cfg == 1 else f"{draft.recipe} draws without"
            draft.absent.append((key, one.pop("negative"), why))
        strength = one.get("strength", 1)
        if strength == 1 or not recipe.has_strength or config.adapter.dora and strength != 0:
            one.pop("strength", None)
            if strength != 1:
                draft.absent.append((f"strength of sample {number}", strength, f"{draft.recipe} draws with all of it"))
    if listed and isinstance(listed[0], dict):
        draft.set("samples.prompts", plain(listed))
