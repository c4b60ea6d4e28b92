"""Distribution matching distillation of PixArt (arXiv 2311.18828): one step from white noise, as PixArt-alpha-DMD.

Three copies of one network: the student that draws in one step at recipe.timestep, the guided teacher that knows what
is real, and a follower that learns what the student makes. Of the pictures only the captions are read, but for the
sizes. With recipe.regression every other picture of a batch begins with the noise of a pair that the teacher made
(`pairs`), and is to look as the pair's latent does (`perceptual`). The release begins them all so, and compares the
first half of what one GPU has, of a single picture that one. (train_pixart_dmd.py)
"""
from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl.annotators import hed
from ....models_impl.pixart import sampling
from ....models_impl.pixart.config import VAE_FACTOR
from ...config.schema import Config
from ...features import taesd
from ...memory.activations import kept_bytes
from ...training.groups import Group, groups
from ...training.noise import VALIDATION, batch_noise, generator, spread
from ...training.validation import certainty
from . import perceptual
from .pairs import Pairs
from .settings import installed_heads
from .start import frozen, opened
from .task import PixArtRecipe

MATCHED = (20, 980)  # the timesteps at which the distributions are compared (arXiv 2311.18828, section 4)
FOLLOWED = (1, 999)  # and those at which the follower learns
START, RENOISE, FOLLOW = 0, 2, 3  # kinds of noise
EVERY = 2  # of so many pictures of a batch one is of a pair
PROBED = 64  # pixels along a side of a picture by which memory is estimated


class Recipe(PixArtRecipe):
    algorithm = "dmd"

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__(config, text)
        self.net = opened(config, text, network)
        self.follower = deepcopy(self.net)
        # Beside the teacher, with recipe.regression, the judge.
        self.teacher = [] if network else [frozen(deepcopy(self.net), config)]
        self.pairs: Pairs | None = None
        self.prepare()
        self.follower.gradient_checkpointing = config.checkpoint_activations

    def look_at(self, items: list):
        """What recipe.regression needs, before training begins. Raises ValueError for pairs that are missing, and files
        of another kind."""
        s, shape = self.settings, self.net.config
        if not s.regression:
            return
        self.pairs = Pairs(Path(s.pairs).expanduser(), items, self.config.data, shape.in_channels)
        decoder = taesd.read_decoder(Path(s.taesd).expanduser(), shape.latent_scale)
        if (channels := decoder.net.decoder.layers[0].in_channels) != shape.in_channels:
            raise ValueError(f"recipe.taesd={s.taesd!r} draws latents of {channels} channels, and this PixArt makes "
                             f"{shape.in_channels}: name the one that belongs to its VAE.")
        eye = hed.load(Path(s.hed).expanduser()) if s.hed else perceptual.read_lpips(
            Path(s.vgg).expanduser(), Path(s.heads).expanduser() if s.heads else installed_heads())
        self.teacher.append(perceptual.Judge(decoder, eye, shape.latent_scale))

    def groups(self, config: Config) -> list[Group]:
        """The gradients of student and follower are clipped each by itself: their losses have nothing in common."""
        multiple = self.settings.follower_learning_rate_multiple
        return groups(self, {"net": 1.0}) + groups(self, {"follower": multiple}, clipped="follower")

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """For each picture of a whole batch, (B,): the timestep at which the student is judged, and the follower's."""
        rng, B = generator(self.config.seed, step), self.config.batch_size
        return tuple(torch.randint(*span, (B,), generator=rng) for span in (MATCHED, FOLLOWED))

    def described(self, step: int) -> list[str]:
        paired = set(self.paired(range(self.config.batch_size)))
        return [f"{'as the pair of its first caption, ' if i in paired else ''}judged at timestep {a}, followed at {b}"
                for i, (a, b) in enumerate(zip(*(t.tolist() for t in self.draw(step)), strict=True))]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        networks = 2 * super().activation_bytes(pictures, cpu)  # student and follower
        if not self.pairs:
            return networks
        judge = deepcopy(self.teacher[1]).to_empty(device="cpu")
        found, wanted = (torch.zeros(1, self.net.config.in_channels, *[PROBED // VAE_FACTOR] * 2,
                                     requires_grad=learns) for learns in (True, False))
        seen = kept_bytes(judge, lambda: judge(found, wanted), bf16=False)
        return networks + -(-pictures // EVERY) * seen * (max(self.config.data.sides) / PROBED) ** 2

    def paired(self, positions: range) -> list[int]:
        """Which of these pictures of the whole batch are of a pair."""
        return [i for i, position in enumerate(positions) if position % EVERY == 0] if self.pairs else []

    def forward(self, batch) -> Tensor:
        """The loss of the student and that of its follower, summed: neither reaches the other's weights."""
        own = slice(batch.positions.start, batch.positions.stop)
        judged, followed = (t[own] for t in self.draw(batch.step))
        rows = self.paired(batch.positions)
        pairs = [self.pairs.of(batch.items[row], batch.size) for row in rows]
        matching, generated, cond = self.matched(batch, judged, self.config.seed, rows, [noise for noise, _ in pairs])
        d, seed = self.denoising, self.config.seed
        with d.autocast():
            noise = batch_noise(seed, batch.step, batch.positions, generated.shape[1:], d.device, FOLLOW)
            noisy = d.schedule.add_noise(generated.detach(), noise, followed)
            loss = sampling.eps_loss(d.eps(self.follower, noisy, followed, cond), noise)
        loss = loss + matching.loss
        if rows:
            apart = self.apart(generated[rows], torch.stack([latent for _, latent in pairs]))
            # A mean over the pairs only.
            share = self.config.batch_size / len(self.paired(range(self.config.batch_size)))
            loss = loss.index_add(0, torch.tensor(rows, device=d.device), self.settings.regression * share * apart)
        return loss

    def apart(self, generated: Tensor, wanted: Tensor) -> Tensor:
        """How differently the student's latents and those of pairs look, (B,)."""
        device, judge = self.denoising.device, self.teacher[1]
        if next(judge.parameters()).device != device:  # what a dry run imagines of it cannot be moved
            judge.to(device)
        return judge(generated, wanted.to(device))

    def matched(self, batch, timestep: Tensor, seed: int, rows: list[int] = (),
                noises: list[Tensor] = ()) -> tuple[sampling.DmdLoss, Tensor, dict]:
        """(the loss of the student, what it made, the condition of its captions). rows: pictures that begin with these
        noises of pairs, under the first caption and at the size that the teacher made them for."""
        d, s, B = self.denoising, self.settings, len(batch.positions)
        shape = (d.shape.in_channels, *(n // VAE_FACTOR for n in batch.size))
        own, sizes = list(batch.captions), batch.sizes.clone()
        for row in rows:
            own[row], sizes[row] = batch.items[row].texts[0], torch.tensor(batch.size)
        with d.autocast():
            cond, uncond = (d.condition(captions, None, batch.size, sizes) for captions in (own, [""] * B))
            start, noise = (batch_noise(seed, batch.step, batch.positions, shape, d.device, kind)
                            for kind in (START, RENOISE))
            if rows:
                start = start.index_copy(0, torch.tensor(rows, device=d.device), torch.stack(noises).to(d.device))
            first = torch.full((B,), s.timestep)
            generated = d.schedule.denoised(start, d.eps(self.net, start, first, cond), first)
            noisy = d.schedule.add_noise(generated, noise, timestep)
            with torch.no_grad():
                teacher = self.teacher[0] = self.teacher[0].to(d.device)
                real, free = (d.eps(teacher, noisy, timestep, c) for c in (cond, uncond))
                fake = d.eps(self.follower, noisy, timestep, cond)
            return (sampling.dmd_loss(generated, noisy, free + s.guidance * (real - free), fake, timestep, d.schedule),
                    generated, cond)

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """How far the student is from what the teacher makes of it, with fixed noise: a mean absolute difference, for
        the loss itself measures only how far the follower is from the teacher."""
        losses = []
        for batch in batches:
            low, high = MATCHED
            timestep = low + spread(batch.positions, high - low)
            found, generated, _ = self.matched(batch, timestep, VALIDATION)
            losses.append((generated - found.real_denoised).abs().flatten(1).mean(1))
        total = sum(some.sum().item() for some in losses)
        return {"loss": total / sum(len(b.positions) for b in batches), **certainty(torch.cat(losses))}

    def timesteps(self, steps: int) -> list[float]:
        """One step, whatever is asked for."""
        return sampling.one_step(self.settings.timestep)
