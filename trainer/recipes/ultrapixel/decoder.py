"""Latents of Stage C to pictures."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ....models_impl import state_dict
from ....models_impl.guard import reading
from ....models_impl.ultrapixel import checkpoint, previewer, sampling
from ....models_impl.ultrapixel.stage_a import StageA
from ....models_impl.ultrapixel.stage_b import StageB
from ...config.schema import Config
from .networks import dtype_of, loaded

STAGE_B_STEPS, STAGE_B_CFG = 10, 1.1  # as released


class Decoder:
    """Latents of Stage C to pictures: Stage B and A where they are named, else the previewer. Loaded for each use."""

    def __init__(self, config: Config):
        self.model, self.dtype = config.model, dtype_of(config)

    def check(self):
        """Raises ValueError if it has nothing to work with."""
        m = self.model
        needed = (m.stage_b, m.stage_a) if m.stage_a else (m.previewer,)
        if gone := [path for path in needed if not path or not Path(path).expanduser().is_file()]:
            raise ValueError("Nothing here makes pictures of Stage C's latents: name model.previewer, or model.stage_b "
                             f"and model.stage_a{f' (there is no {gone[0]})' if gone[0] else ''}.")

    def __call__(self, latent: Tensor, pooled: Tensor, unpooled: Tensor, size: tuple[int, int], seed: int) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1]. size: of Stage B's latents; pooled (B, 1, D), unpooled (1, 1, D)."""
        if not self.model.stage_a:
            with reading(self.model.previewer):
                arguments, tensors = previewer.read(state_dict.read_file(Path(self.model.previewer).expanduser())[0])
                net = previewer.Previewer(**arguments)
                state_dict.load_into(net, tensors, "the previewer")
            return (2 * net.to(latent.device).eval()(latent.float()) - 1).clamp(-1, 1)
        B, device = len(latent), latent.device
        stage_b = loaded(StageB, self.model.stage_b, checkpoint.read_stage_b, self.dtype).to(device)
        generators = [torch.Generator().manual_seed(seed + i + 2 * 2**32) for i in range(B)]

        def noise(*_):
            return torch.stack([torch.randn(stage_b.config.in_channels, *size, generator=g)
                                for g in generators]).to(device)

        semantic = torch.cat([torch.zeros_like(latent), latent]).to(self.dtype)
        vectors = torch.cat([unpooled.expand(B, -1, -1), pooled])

        def predict(x, timestep):
            uncond, cond = stage_b(x.repeat(2, 1, 1, 1).to(self.dtype), timestep.repeat(2), semantic,
                                   vectors).float().chunk(2)
            return sampling.guided(cond, uncond, STAGE_B_CFG)

        diffusion = sampling.CosineDiffusion()
        found = diffusion.sample(predict, noise(), diffusion.steps(STAGE_B_STEPS), noise)
        stage_a = loaded(StageA, self.model.stage_a, checkpoint.read_stage_a, torch.float32).to(device)
        return torch.cat([2 * stage_a.decode(one) - 1 for one in found.split(1)]).clamp(-1, 1)
