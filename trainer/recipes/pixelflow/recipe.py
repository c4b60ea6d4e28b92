"""PixelFlow (arXiv 2504.07963): every stage of the cascade in every batch, one velocity loss.

The mean is over each picture's tokens first, then over pictures: a small picture of stage 0 weighs as much as a large
one of the last stage. Classes or captions are dropped for classifier-free guidance.
"""
from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ....kernels.attention import SHORT
from ....kernels.varlen_attention import packed_attention
from ....models_impl import lora, state_dict
from ....models_impl.guard import reading
from ....models_impl.pixelflow import checkpoint, packing, sampling
from ....models_impl.pixelflow.config import PixelFlowConfig
from ....models_impl.pixelflow.model import PixelFlow
from ....models_impl.pixelflow.schedule import CascadeSchedule, guidance_scales
from ....models_impl.pixelflow.stages import TRAIN_TIMESTEPS, Stages, stage_size
from ...config.schema import Config
from ...data.loader import Batch
from ...features import text_encoders
from ...libraries import probing
from ...memory import quantization
from ...memory.activations import casts, fused, kept_bytes, of_network
from ...training import objective
from ...training.groups import Group, groups
from ...training.noise import generator, picture_noise, spread
from ...training.validation import certainty
from .. import adapters
from ..contract import Base, Files
from .settings import new_shape, of_shape, requested, shape_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # where an adapter stands if the settings do not say


class Recipe(Base):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.seed = config.recipe, config, config.seed
        if network and not self.settings.lora:  # a LoRA stands on its base
            shape, tensors = PixelFlowConfig.from_dict(network), {}
        else:
            shape, tensors = starting_point(config)
            shape = replace(shape, resolution=config.data.resolution, num_classes=0 if text else classes,
                            context_dim=text_encoders.width(text) if text else None)
        self.stages = Stages(shape.num_stages)
        self.flow = sampling.CascadeFlow(self.stages)
        self.draws, self.objective = objective.draws(config.noise, "uniform"), objective.objective(config.loss)
        self.text = text
        self.diffusion = PixelFlow(shape).initialise()
        self.diffusion.gradient_checkpointing = config.checkpoint_activations
        if tensors:
            if self.settings.trunk:
                tensors = grafted(self.diffusion, tensors)
            elif text is None and tensors["class_embedder.embedding_table.weight"].shape[0] != classes + 1:
                tensors = {**tensors, **prefixed(self.diffusion, "class_embedder.")}  # other classes: a new table
            state_dict.load_into(self.diffusion, tensors, f"the network of [model] ({config.init_from})")
        if self.settings.lora:
            self.diffusion = quantization.frozen(adapters.attach(self.diffusion, config.adapter, TARGETS), config)
        self.bf16 = config.precision == "bf16"
        self.batch_size = config.batch_size
        self.attend = attend

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        if not config.init_from:
            return []
        try:
            shape = starting_point(config)[0]
        except (ValueError, OSError) as error:
            return [f"init_from={config.init_from}: {error}"]
        problems = mismatches(config, shape) + of_shape(config, shape)
        if problems or not config.recipe.lora:
            return problems
        return adapters.problems(lambda: PixelFlow(shape), config.adapter, TARGETS)

    def groups(self, config: Config) -> list[Group]:
        return groups(self, {"diffusion": 1.0, "text": config.text.learning_rate_multiple})

    def forward(self, batch: Batch) -> Tensor:
        own = slice(batch.positions.start, batch.positions.stop)
        times, dropped = self.draw(batch.step)
        return self.losses(batch, times.rows(own), dropped[own], self.seed)

    def draw(self, step: int) -> tuple[sampling.StageTime, Tensor]:
        """Random draws for the pictures of a whole batch, their times and whether the text or class is dropped (B,);
        they depend only on (seed, step)."""
        rng, B = generator(self.seed, step), self.batch_size
        times = self.flow.draw(B, rng, self.draws, self.settings.stage_weights)
        return times, torch.rand(B, generator=rng) < self.settings.dropout

    def losses(self, batch: Batch, times: sampling.StageTime, dropped: Tensor, seed: int) -> Tensor:
        device = self.diffusion.proj_out_2.weight.device
        images = batch.pictures.to(device).float() / 127.5 - 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            condition = self.condition(batch.captions, batch.labels.to(device), dropped.tolist())

            def noise(k, shape):
                where = [batch.positions[i] for i in (times.stage == k).nonzero().flatten().tolist()]
                return torch.stack([picture_noise(seed, batch.step, p, shape[1:], device) for p in where])

            packed = self.settings.packing == "packed" or (self.settings.packing == "auto" and device.type != "cpu")
            return (self.packed if packed else self.dense)(images, times, noise, condition, self.cells(batch, device))

    def cells(self, batch: Batch, device: torch.device) -> list[Tensor] | None:
        """What the pixels of each picture count at the size of every stage, (B, 1, h, w) each, of masks."""
        if batch.mask is None:
            return None
        stages = self.stages.num_stages
        return [objective.cells(self.config.loss, batch, stage_size(*batch.size, k, stages), device)
                for k in range(stages)]

    def condition(self, captions: list[str], labels: Tensor, dropped: list[bool]) -> dict:
        if self.text is None:
            null = torch.full_like(labels, self.diffusion.config.num_classes)
            return {"class_labels": torch.where(torch.tensor(dropped, device=labels.device), null, labels)}
        given = ["" if drop else c for c, drop in zip(captions, dropped, strict=True)]
        context, mask = text_encoders.encode(self.text, given, labels.device)
        return {"context": context, "mask": mask}

    def dense(self, images, times, noise, condition, cells: list[Tensor] | None = None) -> Tensor:
        # Equal to `packed` picture by picture: a batch of one stage needs no packing.
        losses, order = [], []
        for items, time in times.by_stage():
            small = sampling.shrink(images[items], time.stage, self.stages.num_stages)
            own = noise(time.stage, small.shape)
            given = {name: c[items] for name, c in condition.items()}
            timestep = self.flow.network_timestep(time).to(images.device)
            velocity = self.diffusion(self.flow.add_noise(small, own, time), timestep, **given)
            counts = None if cells is None else cells[time.stage][items]
            losses.append(self.flow.loss(velocity, small, own, time, self.objective, counts))
            order.append(items)
        return torch.cat(losses)[torch.cat(order).argsort()]

    def packed(self, images, times, noise, condition, cells: list[Tensor] | None = None) -> Tensor:
        mask = condition.get("mask")
        lengths = None if mask is None else mask.sum(1).tolist()
        batch = packing.pack(images, times, noise, self.flow, self.diffusion.config.patch_size, lengths, cells)
        if mask is None:
            given = {"class_labels": condition["class_labels"][batch.order]}
        else:
            given = {"context": condition["context"][batch.order][mask[batch.order]]}  # (K, C), padding dropped
        velocity = self.diffusion.forward_packed(batch.x, batch.timestep, batch.layout, **given, attention=self.attend)
        loss = packing.packed_loss(velocity, batch.target, batch.layout, self.objective, batch.cells)
        return loss[batch.order.argsort()]

    def blocks(self) -> list[nn.Module]:
        return list(self.diffusion.transformer_blocks)

    def compile_blocks(self, **how):
        """What depends on the numbers of tokens of single pictures and captions stays outside: there would be a graph
        for each."""
        self.attend = torch.compiler.disable(attend)
        super().compile_blocks(dynamic=True, **how)

    def described(self, step: int) -> list[str]:
        times, dropped = self.draw(step)
        return [f"stage {k}, t {t:.3f}{' (dropped)' if drop else ''}"
                for k, t, drop in zip(*(x.tolist() for x in (*times, dropped)), strict=True)]

    def buckets(self, step: int) -> list[str]:
        """One line per stage."""
        stage, p = self.draw(step)[0].stage, self.diffusion.config.patch_size
        side, last = self.diffusion.config.resolution, self.stages.num_stages - 1
        sizes = [side // 2 ** (last - k) for k in range(last + 1)]
        return [f"stage {k}: {int((stage == k).sum())} pictures of {size}x{size} pixels, {(size // p) ** 2} tokens each"
                for k, size in enumerate(sizes)]

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        shape, stages, bf16 = self.diffusion.config, self.stages.num_stages, self.bf16
        side = shape.resolution // 2 ** (stages - 1) // shape.patch_size  # tokens at stage 0
        weights = self.settings.stage_weights or [1] * stages
        share, tokens = [w / sum(weights) for w in weights], [side * side * 4**k for k in range(stages)]
        mean = sum(s * n for s, n in zip(share, tokens, strict=True))
        inputs = mean * shape.hidden * (2 if bf16 else 4)

        def probe(depth: int, side: int) -> int:  # of one picture, without what autocast keeps of the weights
            small = replace(shape, depth=depth)
            return kept(small, 2, side, bf16) - kept(small, 1, side, bf16)

        found = of_network(probe, (4, 8), mean, shape.depth, inputs, self.diffusion.gradient_checkpointing)
        if cpu and bf16:  # where `attention` multiplies plainly it keeps the scores, as float32 too
            scores = sum(s * n * n for s, n in zip(share, tokens, strict=True) if n * n <= SHORT)
            blocks = 1 if self.diffusion.gradient_checkpointing else shape.depth
            found += blocks * scores * shape.heads * 6
        return pictures * found + casts(self.diffusion, bf16)

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Mean loss of every stage over the held-out pictures; the noise is the same whenever this is called."""
        found, each = {}, 0
        for k in range(self.stages.num_stages):
            losses = []
            for batch in batches:
                B = len(batch.positions)
                t = spread(batch.positions, TRAIN_TIMESTEPS) / TRAIN_TIMESTEPS
                times = sampling.StageTime(torch.full((B,), k), t)
                losses.append(self.losses(batch, times, torch.zeros(B, dtype=torch.bool), -1))
            found[f"stage{k}"] = torch.cat(losses).mean().item()
            each = each + torch.cat(losses) / self.stages.num_stages
        return {"loss": sum(found.values()) / len(found), **certainty(each), **found}

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "") -> Tensor:
        """what: prompts, or indices of classes."""
        device, B = self.diffusion.proj_out_2.weight.device, len(what)
        last = self.stages.num_stages - 1
        policy = "scaled" if self.text is None else "constant"
        guidance = guidance_scales(policy, cfg, self.stages.num_stages)
        schedule = CascadeSchedule.build(self.stages, steps, shift, guidance)
        rng = torch.Generator().manual_seed(seed)
        small = stage_size(height, width, 0, last + 1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            labels = torch.tensor(what if self.text is None else [0] * B, device=device).repeat(2)
            captions = [negative] * B + ["" if self.text is None else w for w in what]
            condition = self.condition(captions, labels, [not negative] * B + [False] * B)

            def predict(x, timestep, stage, scale):
                if scale == 1:
                    given = {name: c[B:] for name, c in condition.items()}
                    return self.diffusion(x, torch.full((B,), timestep, device=device), **given).float()
                v = self.diffusion(x.repeat(2, 1, 1, 1), torch.full((2 * B,), timestep, device=device), **condition)
                return torch.lerp(v[:B].float(), v[B:].float(), scale)

            return self.flow.sample(
                predict, torch.randn(B, 3, *small, generator=rng).to(device), schedule,
                lambda stage, shape: sampling.block_noise(shape, rng).to(device),
            ).clamp(-1, 1)

    def network(self) -> dict:
        return self.diffusion.config.as_dict()

    def files(self) -> Files:
        shape = self.diffusion.config
        if self.settings.lora:
            names = lora.names_of(adapters.shapes(self.diffusion))
            found = (adapters.tensors(self.diffusion, names), {"pixstack.family": "pixelflow_lora"})
            return {"loras/{name}.safetensors": found, **text_encoders.files(self.text)}
        path = f"diffusion_models/{{name}}_{shape.resolution}.safetensors"
        return {path: (self.diffusion.state_dict(), checkpoint.metadata(shape)), **text_encoders.files(self.text)}


def attend(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
    """Norms leave float32 under autocast, which no fused kernel takes."""
    return packed_attention(q.to(v.dtype), k.to(v.dtype), v, lengths_q, lengths_k)


@cache
def kept(shape: PixelFlowConfig, pictures: int, side: int, bf16: bool) -> int:
    """What one forward pass keeps; side: of a picture, in tokens."""
    with probing():
        model, given = PixelFlow(shape), {}
        if shape.text_conditional:
            given["context"] = torch.zeros(pictures, 16, shape.context_dim)
        if shape.num_classes:
            given["class_labels"] = torch.zeros(pictures, dtype=torch.int64)
        x = torch.zeros(pictures, shape.in_channels, side * shape.patch_size, side * shape.patch_size)
        return kept_bytes(model, lambda: model(x, torch.zeros(pictures), **given, attention=fused), bf16)


def starting_point(config: Config) -> tuple[PixelFlowConfig, dict[str, Tensor]]:
    """(shape, weights if any) from init_from and [model]. Where they contradict each other (`mismatches`), init_from
    counts."""
    if not config.init_from:
        return new_shape(config), {}
    path, wanted = Path(config.init_from).expanduser(), requested(config.model)
    with reading(path):
        beside = {**{k: v for k, v in wanted.items() if k == "head_dim"},  # the one size that the weights do not show
                  **PixelFlowConfig.entries_of(checkpoint.config_beside(path) or {})}
        own, tensors = checkpoint.read(*state_dict.read_file(path), beside=beside or None)
    return shape_of({**own.as_dict(), "num_stages": wanted.get("num_stages", own.num_stages)}), tensors


def mismatches(config: Config, found: PixelFlowConfig) -> list[str]:
    """What the file of init_from, whose shape was found, has otherwise than the settings want it."""
    complaints, text = [], config.text.encoder
    wanted = {"in_channels": 3, "out_channels": 3, **requested(config.model)}
    if config.recipe.trunk:
        pass  # what text or classes bring starts anew
    elif text == "small" and found.text_conditional:
        wanted["context_dim"] = config.text.width
    elif text and not found.text_conditional:
        complaints.append(f"init_from={config.init_from} is not text-conditional, and text.encoder={text!r} is set: "
                          "start from a text-conditional checkpoint, leave text.encoder empty and train on classes, "
                          "or set recipe.trunk=true.")
    elif not text and not found.num_classes:
        complaints.append(f"init_from={config.init_from} is not class-conditional, and this run is, because "
                          "text.encoder is empty: start from a class-conditional checkpoint, set text.encoder, "
                          "or set recipe.trunk=true.")
    compared = ("heads", "head_dim", "depth", "patch_size", "attention_bias", "in_channels", "out_channels")
    compared += ("context_dim",) if "context_dim" in wanted else ()
    other = [f"{k}={own} for {wanted[k]}" for k in compared if k in wanted and (own := getattr(found, k)) != wanted[k]]
    if other:
        complaints.append(f"init_from={config.init_from} does not fit [model] and [text]: it has {', '.join(other)}.")
    return complaints


def grafted(model: PixelFlow, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without what text or classes brought to them, and `model`'s own of that."""
    def conditions(key: str) -> bool:
        return any(part in key for part in ("class_embedder.", ".attn2.", ".norm2."))

    common = {key: value for key, value in tensors.items() if not conditions(key)}
    return common | {key: value for key, value in model.state_dict().items() if conditions(key)}


def prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.startswith(prefix)}
