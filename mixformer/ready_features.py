"""Features that a frozen tower gave before, in the place of its pictures."""

from __future__ import annotations

from typing import Any

import torch


def ready_features(features: torch.Tensor, tower: Any, mixin: str, needs_mask: bool = False) -> torch.Tensor:
    """Check that features can stand in for what a tower would give now.

    Args:
        features: [m, N, c].
        tower: the tower.
        mixin: name of its mixin, for errors.
        needs_mask: whether what reads them must know which are padding, which only the tower tells.

    Returns:
        the features.

    Raises:
        ValueError: another N or c, a tower that is trained, or a mask that is needed.
    """
    size = tower.config.num_features, tower.config.feature_size
    if features.shape[1:] != size:
        raise ValueError(
            f"Mixin '{mixin}' was given {list(features.shape)}, which is neither pictures [m, 3, y, x] nor ready "
            f"features [m, {size[0]}, {size[1]}] of its tower."
        )
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(
            f"The tower of mixin '{mixin}' is trained, but ready features teach it nothing: freeze "
            f"mixins.{mixin}.tower.*, or give pictures."
        )
    if needs_mask:
        raise ValueError(f"The adapter of mixin '{mixin}' must know which features are padding: give it pictures.")
    return features
