"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn


class AveragedWeights:
    """A running mean of the trainable parameters: after each step, mean = decay * mean + (1 - decay) * weight.

    The means are fp32 whatever the dtype of the weights, since (1 - decay) of a change is below bf16's resolution.

    Args:
        model: its parameters that require gradients are averaged, from what they are now.
        decay: share of the mean that stays after a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.values = {name: weight.detach().float().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step in."""
        for name, weight in self.parameters.items():
            self.values[name].lerp_(weight.detach().float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Make the model's weights the means, for good."""
        for name, weight in self.parameters.items():
            weight.copy_(self.values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While entered, the model's weights are the means."""
        before = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.parameters.items():
                    weight.copy_(before[name])
