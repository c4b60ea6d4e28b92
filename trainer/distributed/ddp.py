"""Each process has a whole network, and accelerate joins the gradients; also one process by itself."""
from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from ..config.schema import Config
from ..training.optim import Optimizers


class Whole:
    """What the processes of a recipe do together."""

    def __init__(self, recipe: nn.Module, config: Config, accelerator):
        self.recipe, self.config, self.accelerator = recipe, config, accelerator
        self.model = recipe

    def start(self, optimizer: Optimizers, rounds: int, pictures: int):
        """When weights and moments are where the run goes on. rounds: batches a step; pictures: in each of them."""
        placed = bool(self.config.memory.swap_blocks)  # by `offload`
        self.model = self.accelerator.prepare(self.recipe, device_placement=[not placed])

    def backward(self, batch, rounds: int, last: bool) -> Tensor:
        """The part of the loss that a batch has, whose gradients are added; those of all processes meet in the last."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss = mean(self.model(batch), batch) / rounds
            self.accelerator.backward(loss)
        return loss.detach()

    def update(self, optimizer: Optimizers, step: int) -> tuple[Tensor, float]:
        """(norm of the gradients, share of the learning rate). Raises FloatingPointError, before anything has changed,
        where the norm is not finite."""
        norm = optimizer.clip()
        finite(norm, step, self.config)
        return norm, optimizer.step(step)


def mean(losses: Tensor, batch) -> Tensor:
    """The loss of a batch: the mean over its pictures, each as its data set counts. losses: (B,)."""
    return losses.mean() if batch.weights is None else (losses * batch.weights.to(losses)).mean()


def finite(norm: Tensor, step: int, config: Config):
    if not norm.isfinite():
        settings = config.optimizer
        raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}. Lower optimizer.learning_rate="
                                 f"{settings.learning_rate} or raise optimizer.warm_up={settings.warm_up}.")
