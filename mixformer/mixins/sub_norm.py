"""Sub-LN (arXiv:2210.06423): a norm on what enters the output projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.sites import Site, SiteMixin, make_norm
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
