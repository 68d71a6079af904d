"""What every connector is: a config that counts tokens and builds a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn


@dataclass
class ConnectorConfig(ABC):
    """Options of a connector, a module that turns a tower's features [m, N, c] into tokens [m, K, h].

    Fields are numbers, strings, lists and other such configs, so that YAML files and checkpoints can hold them.
    With `takes_mask`, the module's forward has a keyword `mask` [m, N], true where a feature is real.
    """

    takes_mask: ClassVar[bool] = False

    @abstractmethod
    def num_tokens(self, num_features: int) -> int:
        """K, the tokens that come out for N features.

        Raises:
            ValueError: the connector cannot take N features.
        """

    @abstractmethod
    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> nn.Module:
        """The module with fresh weights.

        Args:
            in_size: c, width of the features.
            out_size: h of the language model.
            inner_size: width of the language model's MLP.
            num_features: N; 0 where it is not known.
        """


def require_choice(config: Any, key: str, choices: Iterable[str]) -> None:
    """Check an option of a config.

    Raises:
        ValueError: it is not one of the choices.
    """
    value = getattr(config, key)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}.{key} is {value!r}; choose one of {', '.join(choices)}.")


def grid_side(num_features: int, divisor: int = 1, option: str = "") -> int:
    """Side of the square grid that N features are.

    Args:
        num_features: N.
        divisor: what must divide the side.
        option: which option asks for that.

    Raises:
        ValueError: they are no square grid, or the side does not divide.
    """
    side = round(num_features**0.5)
    if side * side != num_features or side % divisor:
        demand = f" that {option}={divisor} divides" if option else ""
        raise ValueError(
            f"{num_features} patches are no square grid{demand}. Change image_size or patch_size of the tower, or "
            f"whether its cls token comes out."
        )
    return side


def to_grid(features: torch.Tensor) -> torch.Tensor:
    """[m, N, c] in row-major order -> [m, y, x, c]."""
    side = grid_side(features.shape[1])
    return features.unflatten(1, (side, side))


def convolve(conv: nn.Module, grid: torch.Tensor) -> torch.Tensor:
    """Run a convolution or a pooling, which want channels first, on [m, y, x, c]."""
    out: torch.Tensor = conv(grid.permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1)
