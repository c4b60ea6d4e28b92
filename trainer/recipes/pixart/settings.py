"""Settings of the PixArt recipes."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    preset: str = ""
    """A released network: alpha_256, alpha_512, alpha_1024, sigma_256, sigma_512, sigma_1024, sigma_2k, sigma_900m;
    what is set below replaces its values. With init_from it need not be named: the file says what it is."""
    variant: str = ""
    """alpha or sigma, where a file does not tell: they differ in the VAE."""
    depth: int | None = None
    hidden: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    context_dim: int | None = None
    """Width of the text tokens; without it and without a file, that of the text encoder."""
    token_limit: int | None = None
    latent_scale: float | None = None
    """What the VAE's latents are multiplied with."""
    in_channels: int | None = None
    """Channels of the latent."""
    variance: bool | None = None
    """Whether a network that starts from nothing predicts the variance too. The released ones do."""
    position_range: float | None = None
    """32 for every release but alpha's 256 model, which has 16: set 32 to train it on at 512."""
    micro_conditions: bool | None = None
    """Tell the network the size and aspect ratio of its picture. true for a start without it adds the embedders."""
    kv_factor: int = 0
    """Compress keys and values by so many tokens along a side; 0 = as the start has it. What a start lacks begins as a
    mean, so that training goes on where it was ..."""
    kv_sampling: str = "conv"
    kv_layers: list[int] = field(default_factory=list)
    """... in these blocks; empty: in the second half of them."""
    prediction: str | None = None
    """eps or v; other than the start's to teach it that."""
    schedule: str | None = None
    """linear or scaled_linear."""
    zero_terminal_snr: bool | None = None
