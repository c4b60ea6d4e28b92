"""PixelPonder (arXiv 2503.06684): one ControlNet of several conditions on a frozen FLUX.

The released objective (train.py of chfyfr/PixelPonder@3326c73): rectified flow through the base, residuals added whole.
`accumulate` learns which condition is selected per patch, through the straight-through gradient that the released
selection lacks; `released` is what that selection amounts to, the first of the shuffled conditions everywhere.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ....models_impl import state_dict
from ....models_impl.flux.model import pack
from ....models_impl.guard import reading
from ....models_impl.pixelponder import checkpoint
from ....models_impl.pixelponder.accumulate import Accumulate
from ....models_impl.pixelponder.config import PixelPonderConfig, SelectorConfig
from ....models_impl.pixelponder.model import ControlOutput, PixelPonder
from ....models_impl.pixelponder.patch_select import Released
from ...config.problems import Problems
from ...config.schema import Config
from ...data import pictures
from ...features.hints import Hints, chosen, seen
from ...memory import quantization
from ...memory.activations import casts
from ...training.groups import Group, groups
from ..contract import Base, Files
from ..flux import task
from ..noised import NoisedBatch


def start(config: Config) -> tuple[PixelPonderConfig, dict[str, Tensor], dict[str, Tensor]]:
    """(shape, the weights of init_from if any, those of the base). Raises ValueError where they do not fit."""
    base, weights = task.read(config.recipe.base)
    model, tensors = config.model, {}
    selector = SelectorConfig(model.selector_width, model.selector_depth)
    if config.init_from:
        with reading(config.init_from):
            shape, tensors = checkpoint.read(*state_dict.read_file(Path(config.init_from).expanduser()))
        for name in ("hidden", "heads", "axes", "context_dim", "pooled_dim", "in_channels"):
            ours, theirs = getattr(shape.trunk, name), getattr(base, name)
            if ours != theirs:
                raise ValueError(f"init_from={config.init_from} has {name}={ours}, recipe.base={config.recipe.base} "
                                 f"{theirs}: it is for another FLUX.")
        selector = shape.selector or selector
    else:
        shape = PixelPonderConfig(replace(base, depth=model.depth, single_depth=model.depth), tuple(model.types))
    learnt = config.recipe.selection == "accumulate"
    shape = replace(shape, selector=selector if learnt else None)
    return shape, {k: v for k, v in tensors.items() if learnt or not k.startswith("selector.")}, weights


class Recipe(Base):
    def __init__(self, config: Config, text: nn.Module | None, classes: int, network: dict | None = None):
        super().__init__()
        self.settings, self.config, self.text = config.recipe, config, text
        self.kinds, self.base = self.settings.kinds(config), None
        if network:
            self.net = PixelPonder(PixelPonderConfig.from_dict(network))
        else:
            shape, tensors, weights = start(config)
            self.net = PixelPonder(shape).initialise(weights)
            if tensors:
                new = {k: v for k, v in self.net.state_dict().items() if k.startswith("selector.")}
                state_dict.load_into(self.net, {**new, **tensors}, f"the PixelPonder of {config.init_from}")
            self.load_base()
        self.net.gradient_checkpointing = config.checkpoint_activations
        self.encoders = self.make_encoders(config)
        vae, *self.hints = self.encoders
        self.flow = task.FluxFlow(config, self.net.config.trunk, text, vae, self.settings.guidance)

    @property
    def whole(self) -> list[str]:
        """The selectors' parts are called one by one, and of the stems not all have a picture."""
        known = dict(self.net.named_children())
        return [f"net.{name}" for name in ("input_hint_block_list_moe", "select_net", "selector") if name in known]

    def load_base(self):
        c = self.config
        self.base = quantization.frozen(task.frozen(c.recipe.base, c.precision == "bf16", c.checkpoint_activations), c)

    @staticmethod
    def make_encoders(config: Config, writer: int = 0) -> list:
        """Latents, and the hints of each kind."""
        return [task.frozen_vae(config, writer), *(
            Hints(kind, kind in config.recipe.annotators, config.recipe.hed, config.cache.folder, writer)
            for kind in config.recipe.kinds(config))]

    @staticmethod
    def file_problems(config: Config) -> list[str]:
        try:
            shape = start(config)[0]
        except (ValueError, OSError) as error:
            return [f"recipe.base={config.recipe.base}, [model], init_from: {error}"]
        unknown = [k for k in config.recipe.kinds(config) if k not in shape.types]
        problems = Problems()
        problems.need(not unknown, f"there is no stem for {', '.join(unknown)}; the network knows "
                                   f"{', '.join(shape.types)} (model.types).")
        return problems + task.shape_problems(config, shape.trunk)

    def groups(self, config: Config) -> list[Group]:
        (all_of,) = groups(self, {"net": 1.0})
        new = ("net.selector.", "net.input_hint_", "net.pos_embed_input.")
        params = {is_new: [(n, p) for n, p in all_of.params if n.startswith(new) == is_new] for is_new in (False, True)}
        return [replace(all_of, params=params[False]),
                replace(all_of, params=params[True], multiple=self.settings.selector_learning_rate_multiple)]

    def draw(self, step: int) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Random draws for a whole batch: sigma (B,), and the kinds that each picture is shown with."""
        sigma, _, rng = self.flow.draw(step, 0.0)
        s, B = self.settings, self.config.batch_size
        most = s.max_conditions or len(self.kinds)
        sets = [chosen(len(self.kinds), s.min_conditions, most, rng) for _ in range(s.choices)]
        return sigma, [sets[i * s.choices // B] for i in range(B)]

    def forward(self, batch) -> Tensor:
        own = slice(batch.positions.start, batch.positions.stop)
        sigma, sets = self.draw(batch.step)
        step = self.flow.noising(batch, sigma[own], self.device, self.config.seed)
        loss = self.losses(batch, step, sets[own])
        shown = {self.kinds[i] for some in sets[own] for i in some}
        return loss + 0 * sum(p.sum() for p in self.idle(shown))

    def idle(self, shown: set[str]) -> list[nn.Parameter]:
        """What no loss depends on where these kinds are shown. Its gradient must be zero, not none: processes that
        train together wait for the gradients of all."""
        stems = zip(self.net.config.types, self.net.input_hint_block_list_moe, strict=True)
        found = [p for kind, stem in stems if kind not in shown for p in stem.parameters()]
        # A selector's text is attended to but asks nothing, and is not carried on.
        return found + [p for n, p in self.net.named_parameters() if n.startswith("selector.blocks.")
                        and (".txt_attn.proj." in n or n.endswith(".txt_attn.norm.query_norm.scale"))]

    @property
    def device(self) -> torch.device:
        return self.net.img_in.weight.device

    def losses(self, batch, step: NoisedBatch, sets: list[tuple[int, ...]]) -> Tensor:
        hints, losses, order = {}, [], []
        for some in dict.fromkeys(sets):
            rows = [i for i, s in enumerate(sets) if s == some]
            for i in some:
                if i not in hints:
                    hints[i] = self.hints[i].pictures(batch, self.device)
            part = step.rows(rows)
            said, _ = self.predict(part.noisy, part.time, part.condition,
                                   self.select([(self.kinds[i], hints[i][rows]) for i in some]))
            losses.append(self.flow.loss(said, part))
            order += rows
        return torch.cat(losses)[torch.tensor(order, device=self.device).argsort()]

    def select(self, hints: list[tuple[str, Tensor]]):
        """What chooses among hints ((kind, (B, 3, H, W) in [-1, 1]), in their order) in every step."""
        strategy = Released()
        if self.settings.selection == "accumulate":
            strategy = Accumulate(self.net.selector, self.settings.rounds)
        with self.flow.autocast(self.device):
            return strategy.begin(self.net.conditions(hints))

    def control(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor], select) -> ControlOutput:
        """What the ControlNet adds to FLUX for latents (B, C, h, w)."""
        with self.flow.autocast(self.device):
            return self.net(pack(x), sigma, **condition, select=select, img_ids=task.ids_of(x))

    def predict(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor],
                select) -> tuple[Tensor, ControlOutput | None]:
        """Velocity of latents (B, C, h, w), and what the ControlNet did; without `select` it does nothing."""
        control = self.control(x, sigma, condition, select) if select else None
        residuals = control.residuals(1.0, self.base.img_in.weight.dtype) if control else None
        return task.velocity(self.base, x, sigma, condition, residuals), control

    def blocks(self) -> list[nn.Module]:
        return [block for net in (self.net, self.base) for block in (*net.double_blocks, *net.single_blocks)]

    def described(self, step: int) -> list[str]:
        sigma, sets = self.draw(step)
        return [f"sigma {s:.3f}, {' > '.join(self.kinds[i] for i in some)}"
                for s, some in zip(sigma.tolist(), sets, strict=True)]

    def buckets(self, step: int) -> list[str]:
        return task.lines(self.config)

    def activation_bytes(self, pictures: int, cpu: bool) -> float:
        return (task.activation_bytes(self.net.config.trunk, self.config, pictures, learns=True)
                + task.activation_bytes(self.base.config, self.config, pictures, learns=False)
                + casts(self.net, self.flow.bf16))

    @torch.no_grad()
    def validate(self, batches: list) -> dict[str, float]:
        """Loss at fixed noise with all kinds at once, and the share of patches for which each of them is selected."""
        shares = []

        def losses(batch, step):
            hints = [(kind, h.pictures(batch, self.device)) for kind, h in zip(self.kinds, self.hints, strict=True)]
            said, control = self.predict(step.noisy, step.time, step.condition, self.select(hints))
            share = control.selection.share.float().flatten(2).mean(-1)  # (1 or B, K)
            shares.append(share.expand(len(said), -1))
            return self.flow.loss(said, step)

        found = self.flow.validate(batches, self.device, losses)
        share = torch.cat(shares).mean(0).tolist()
        return found | {f"share_{kind}": value for kind, value in zip(self.kinds, share, strict=True)}

    @property
    def of_pictures(self) -> bool:
        return bool(self.settings.annotators)

    @torch.no_grad()
    def sample(self, what: list, height: int, width: int, steps: int, shift: float, cfg: float, seed: int,
               negative: str = "", conditions: dict[str, Tensor] | None = None) -> Tensor:
        """conditions: kind -> (B, 3, H, W) uint8, and "" -> pictures, of which recipe.annotators make hints; without
        them those of recipe.hints, where they are for as many prompts. cfg: see `FluxFlow.sample`; shift is not
        read."""
        if self.base is None:
            self.load_base()
            self.base.to(self.device)
        hints, given = [], conditions or {}
        for kind, h in zip(self.kinds, self.hints, strict=True):
            if kind in given:
                hints.append((kind, seen(given[kind].to(self.device))))
            elif "" in given and kind in self.settings.annotators:
                hints.append((kind, seen(h.encode(given[""], self.device)["pixels"].to(self.device))))
        if not hints and len(self.settings.hints) == len(what):
            hints = self.named_hints(height, width)
        select = self.select(hints) if hints else None
        twice = self.select([(kind, hint.repeat(2, 1, 1, 1)) for kind, hint in hints]) if hints else None

        def predict(x, sigma, condition):
            return self.predict(x, sigma, condition, select if len(x) == len(what) else twice)[0]

        return self.flow.sample(predict, what, height, width, steps, cfg, seed, self.device, negative)

    def named_hints(self, height: int, width: int) -> list[tuple[str, Tensor]]:
        """Those of recipe.hints."""
        rows = [[pictures.shown(Path(f).expanduser(), height, width) for f in entry.split(",")]
                for entry in self.settings.hints]
        return [(kind, seen(h.encode(torch.stack(column), self.device)["pixels"].to(self.device)))
                for kind, h, column in zip(self.kinds, self.hints, zip(*rows, strict=True), strict=True)]

    def network(self) -> dict:
        return self.net.config.as_dict()

    def files(self) -> Files:
        shape = replace(self.net.config, text_tokens=self.text.max_length)
        return {"controlnet/{name}.safetensors": (self.net.state_dict(), checkpoint.metadata(shape))}
