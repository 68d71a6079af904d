"""Sub-LN (arXiv:2210.06423): a norm on what enters the output projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.sites import Linear, Site, SiteMixin, make_norm
from mixformer.transformer import Layer


class SubNormMixin(SiteMixin):
    """Norm the input of the attention's `dense` and of the MLP's `down`."""

    def __init__(self) -> None:
        super().__init__(["dense", "down"])

    def build_layer(self, layer: Layer) -> nn.ModuleDict:
        inner = {"dense": layer.attention.dense.in_features, "down": layer.mlp.down.in_features}
        return nn.ModuleDict({site: make_norm(layer.config, size) for site, size in inner.items()})

    @wrap
    def linear_forward(
        self, site: Site, x: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        return old_impl(layer.mixins[self.name][site.name](x, ctx))


@torch.no_grad()
def magneto_init(model: Any) -> None:
    """Give the layers of a fresh model the initial weights that belong to sub-LN (arXiv:2210.06423, section 2.3).

    They are Xavier-normal, with gain 1 for q and k and sqrt(ln 2L) for all others, for L layers without cross
    attention. The model's own draws are scaled, so that its seed still tells them.
    """
    gain = math.sqrt(math.log(2 * model.config.num_layers))
    for layer in model.transformer.layers:
        for linear in [*layer.attention.modules(), *layer.mlp.modules()]:
            if isinstance(linear, Linear):
                for part, rows in (linear.parts or {"": slice(None)}).items():
                    weight = linear.weight[rows]
                    std = math.sqrt(2 / sum(weight.shape)) * (1.0 if part in ("q", "k") else gain)
                    weight.mul_(std / linear.init_std)
