"""Stage B, all of its weights, and with it the semantic encoder: from nothing or from a file.

A semantic encoder is good for what Stage B can draw again from its latents, so a new one learns from Stage B's loss
alone and needs no decoder of its own: so was the first of them trained (arXiv 2306.00637; train_stage_B.py of
dome272/Wuerstchen@907d4d3). The norms of its backbone keep the means that they begin with, for those of a batch would
be other ones in every process; its latent is brought to unit variance on export.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....models_impl import previews, state_dict
from ....models_impl.ultrapixel import checkpoint, sampling
from ....models_impl.ultrapixel.config import StageBConfig
from ....models_impl.ultrapixel.effnet import EffnetConfig, EffnetEncoder
from ....models_impl.ultrapixel.stage_a import StageA
from ....models_impl.ultrapixel.stage_b import StageB
from ...config.schema import Config
from ...data import buckets, pictures
from ...data.layouts import Item
from ...features.taesd import mean_of_processes
from ...libraries import probing
from ...memory.activations import casts, fused, kept_bytes
from ...training import objective
from ...training.groups import Group, groups
from ...training.noise import VALIDATION, batch_noise, generator, spread, state_noise, training_noise
from ...training.validation import certainty, quarters
from ..contract import Base, Files
from ..reconstruction import MEMORY
from .decoder import STAGE_B_CFG
from .loss_weight import LossWeight
from .networks import loaded, read
from .settings import PIXELS, STAGE_B_PIXELS, new_stage_b
from .task import T_STEPS, of_unet, read_text, text_problems, text_widths

SEMANTIC_NOISE = 2  # the kind of `noise.picture_noise` that goes on semantic latents
CALIBRATED = 32  # pictures by which the norms of a new encoder begin


@dataclass(frozen=True)
class StageBDraws:
    """Random draws for the pictures of a batch, (B,) each."""

    t: Tensor
    dropped: Tensor
    """Whose caption is taken away."""
    blind: Tensor
    """Whose semantic latent is."""


class Recipe(Base):
    of_pictures = True

    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        shape, tensors = (StageBConfig.from_dict(network["stage_b"]), {}) if network else start(
            config, text_widths(text)[1])
        self.net = StageB(shape)
        if tensors:
            state_dict.load_into(self.net, tensors, f"Stage B ({config.init_from})")
        elif not network:
            self.net.initialise()
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoder, self.teacher = new_encoder(config), []
        self.learned = self.encoder is not None
        for kind, path, reader in ((EffnetEncoder, config.model.encoder, read_effnet),
                                   (StageA, config.vae.path, checkpoint.read_stage_a)):
            if path and not (network and not Path(path).expanduser().is_file()):  # a finished run may be opened without
                self.teacher.append(loaded(kind, path, reader, torch.float32))
        self.register_buffer("square", torch.ones(()))
        self.weight = LossWeight(self.settings.weight, config.batch_size)
        self.diffusion, self.bf16 = sampling.CosineDiffusion(), config.precision == "bf16"
        self.draws, self.objective = objective.draws(config.noise, sampling.DRAWN), objective.objective(config.loss)

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        problems = text_problems(config)
        for name, path, reader in (("init_from", config.init_from, checkpoint.read_stage_b),
                                   ("model.encoder", config.model.encoder, read_effnet),
                                   ("vae.path", config.vae.path, checkpoint.read_stage_a)):
            if not path:
                continue
            try:
                read(path, reader)
            except (ValueError, OSError) as error:
                problems.append(f"{name}={path}: {error}")
        return problems

    def look_at(self, items: list[Item]):
        """The norms of a new encoder begin with the means and deviations of some pictures."""
        if self.learned and not self.square.is_meta:
            height, width = buckets.sizes(self.config.data)[0]
            shown = torch.stack([pictures.shown(item.file, height, width) for item in items[:CALIBRATED]])
            calibrate(self.encoder, self.small(shown.float() / 255))

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"net": 1.0, "encoder": self.settings.encoder_learning_rate_multiple}, of_unet)

    @property
    def device(self) -> torch.device:
        return self.square.device

    def frozen(self, kind: type) -> nn.Module:
        """Raises ValueError for a finished run whose file of it is gone."""
        found = next((net for net in self.teacher if isinstance(net, kind)), None)
        if found is None:
            raise ValueError(f"The files that this run stands on are gone: vae.path={self.config.vae.path}, "
                             f"model.encoder={self.config.model.encoder}. Nothing is drawn without them.")
        return found if next(found.parameters()).device == self.device else found.to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @staticmethod
    def small(image: Tensor) -> Tensor:
        """Pictures as the semantic encoder sees them: 42.67 of Stage B's pixels to a cell are 32 of its own."""
        cells = sampling.sizes(*image.shape[-2:]).stage_c
        return F.interpolate(image, [PIXELS * n for n in cells], mode="bilinear", antialias=True).clamp(0, 1)

    def semantic(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        net = self.encoder if self.learned else self.frozen(EffnetEncoder)
        return net(self.small(image)).float()

    def draw(self, step: int) -> StageBDraws:
        """For a whole batch, by (seed, step) only."""
        rng, B, s = generator(self.config.seed, step), self.config.batch_size, self.settings
        t = self.diffusion.draw(B, rng, self.draws)
        return StageBDraws(t, *(torch.rand(B, generator=rng) < share for share in (s.dropout, s.blind)))

    def losses(self, batch, draws: StageBDraws, seed: int) -> tuple[Tensor, Tensor]:
        """(loss of each picture, half the mean square of its semantic latent), (B,)."""
        image, device = batch.pictures.to(self.device).float() / 255, self.device
        with torch.no_grad():
            clean = self.frozen(StageA).encode(image)
        captions = ["" if drop else c for c, drop in zip(batch.captions, draws.dropped.tolist(), strict=True)]
        drawn, settings = (seed, batch.step, batch.positions), self.config.noise
        noise = training_noise(settings, *drawn, clean.shape[1:], device)
        x = self.diffusion.add_noise(clean, state_noise(settings, noise, *drawn), draws.t)
        cells = objective.cells(self.config.loss, batch, clean.shape[-2:], device)
        with self.autocast():
            semantic = self.semantic(image)
            squares = semantic.square().flatten(1).mean(1)
            if seed != VALIDATION:
                semantic = semantic + self.settings.semantic_noise * batch_noise(
                    *drawn, semantic.shape[1:], device, SEMANTIC_NOISE)
            semantic = semantic * ~draws.blind[:, None, None, None].to(device)
            vectors = read_text(self.text, captions, device)[1]
            eps = self.net(x, self.diffusion.network_timestep(draws.t).to(device), semantic, vectors)
        return self.diffusion.loss(eps, clean, noise, draws.t, self.objective, cells), squares / 2

    def forward(self, batch) -> Tensor:
        own = slice(batch.positions.start, batch.positions.stop)
        draws = self.draw(batch.step)
        draws = StageBDraws(draws.t[own], draws.dropped[own], draws.blind[own])
        loss, squares = self.losses(batch, draws, self.config.seed)
        loss = self.weight(self.diffusion.logsnr(draws.t), loss, batch)
        if self.learned:
            with torch.no_grad():
                self.square.lerp_(mean_of_processes(2 * squares.mean()), MEMORY)
            loss = loss + self.settings.kl * squares
        return loss

    def blocks(self) -> list[nn.Module]:
        return [block for level in (*self.net.down_blocks, *self.net.up_blocks) for block in level]

    def described(self, step: int) -> list[str]:
        draws = self.draw(step)
        return [f"t {t:.3f}{' (caption dropped)' if drop else ''}{' (semantic latent dropped)' if blind else ''}"
                for t, drop, blind in zip(draws.t.tolist(), draws.dropped.tolist(), draws.blind.tolist(), strict=True)]

    def buckets(self, step: int) -> list[str]:
        side = self.config.data.resolution
        cells = sampling.sizes(side, side).stage_c[0]
        return [f"{self.config.batch_size} pictures of {side}x{side} pixels, {(side // STAGE_B_PIXELS) ** 2} patches "
                f"each, and {cells}x{cells} semantic cells"]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        shape, (height, width) = self.net.config, max(buckets.sizes(self.config.data), key=lambda s: s[0] * s[1])
        with probing():
            net, encoder = StageB(shape), EffnetEncoder(self.encoder_shape()).eval()
            net.gradient_checkpointing = self.config.checkpoint_activations
            image = self.small(torch.zeros(1, 3, height, width))
            x, vector = torch.zeros(1, shape.in_channels, height // 4, width // 4), torch.zeros(1, shape.pooled_dim)
            semantic = torch.zeros(1, shape.semantic_channels, *(n // PIXELS for n in image.shape[-2:]))
            kept = kept_bytes(net, lambda: net(x, torch.zeros(1), semantic, vector, attention=fused), self.bf16)
            kept += kept_bytes(encoder, lambda: encoder(image), self.bf16) if self.learned else 0
        return pictures * kept + casts(self.net, self.bf16)

    def encoder_shape(self) -> EffnetConfig:
        return EffnetConfig(blocks=tuple(self.config.model.encoder_blocks))

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """The mean loss of the held-out pictures, whole and by quarters of t."""
        found, ts = [], []
        for batch in batches:
            t = (spread(batch.positions, T_STEPS) + 0.5) / T_STEPS
            no = torch.zeros(len(t), dtype=torch.bool)
            found.append(self.losses(batch, StageBDraws(t, no, no), VALIDATION)[0].cpu())
            ts.append(t)
        loss = torch.cat(found)
        return {"loss": loss.mean().item(), **certainty(loss), **quarters(loss, torch.cat(ts))}

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "", conditions: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures drawn again from their semantic latents and prompts, as the nodes draw them; cfg is the release's.
        conditions: "" -> (B, 3, H, W) uint8; without it recipe.sample_hints."""
        B, device = len(what), self.device
        given = (conditions or {}).get("")
        if given is None:
            files = self.settings.sample_hints
            if not files:
                raise ValueError("recipe.sample_hints names no pictures to draw again.")
            given = torch.stack([pictures.shown(Path(files[i % len(files)]).expanduser(), height, width)
                                 for i in range(B)])
        image = F.interpolate(given.to(device).float() / 255, (height, width), mode="bilinear", antialias=True)
        size = (self.net.config.in_channels, height // 4, width // 4)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]

        def noise(*_):
            return torch.stack([torch.randn(size, generator=g) for g in generators]).to(device)

        with self.autocast():
            semantic = self.semantic(image)
            both = torch.cat([torch.zeros_like(semantic), semantic])
            vectors = read_text(self.text, [*([negative] * B), *what], device)[1]

            def predict(x, timestep):
                eps = self.net(x.repeat(2, 1, 1, 1), timestep.repeat(2), both, vectors).float()
                return sampling.guided(eps[B:], eps[:B], STAGE_B_CFG)

            diffusion = sampling.CosineDiffusion(shift)
            latent = diffusion.sample(predict, noise(), diffusion.steps(steps), noise)
        return (2 * self.frozen(StageA).decode(latent) - 1).clamp(-1, 1)

    def network(self) -> dict:
        return {"stage_b": self.net.config.as_dict()}

    def files(self) -> Files:
        """A new encoder's latents are brought to unit variance, as Stage C draws them."""
        tensors = checkpoint.released_attention_names(self.net.state_dict())
        found = {"diffusion_models/{name}.safetensors": (tensors, checkpoint.metadata(self.net.config))}
        if not self.learned:
            return found
        scale = self.square.sqrt().to(self.device)
        tensors["effnet_mapper.0.weight"] = tensors["effnet_mapper.0.weight"] * scale
        encoder = EffnetEncoder(self.encoder_shape()).eval()
        own = dict(self.encoder.state_dict())
        own["mapper.0.weight"] = own["mapper.0.weight"] / scale
        encoder.load_state_dict(own)
        colours = previews.metadata(lambda shown: encoder((shown + 1) / 2), PIXELS)
        return {**found, "vae/{name}_encoder.safetensors": (own, colours)}


def start(config: Config, pooled: int) -> tuple[StageBConfig, dict[str, Tensor]]:
    """(shape, weights of init_from if any). Raises ValueError for nonsense."""
    if config.init_from:
        return read(config.init_from, checkpoint.read_stage_b)
    return new_stage_b(config, pooled), {}


def read_effnet(tensors, metadata=None):
    return checkpoint.read_effnet(tensors)


def new_encoder(config: Config) -> EffnetEncoder | None:
    """The semantic encoder that learns, its norms as they are; None where one is given."""
    if config.model.encoder:
        return None
    net = EffnetEncoder(EffnetConfig(blocks=tuple(config.model.encoder_blocks))).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


@torch.no_grad()
def calibrate(net: EffnetEncoder, shown: Tensor):
    """Give each norm the mean and the deviation of what reaches it, but for the last, of the latent, which has none.
    shown: (B, 3, H, W) in [0, 1]."""
    norms = [m for m in net.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for one in norms:
        one.momentum = 1.0
        one.train()
    net(shown)
    for one in norms:
        one.momentum = 0.1
        one.eval()
