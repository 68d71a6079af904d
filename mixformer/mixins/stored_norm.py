"""A final norm that a released file carries and the features leave out (arXiv:2304.08485 on CLIP's tower)."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.sites import Site
from mixformer.transformer import Layer


class StoredNormMixin(BaseMixin):
    """Keep the final norm's weights without running it."""

    def claims_site(self, hook: str, site: Site) -> bool:
        """The final norm alone."""
        return site.name == "final_norm"

    @replace
    def norm_forward(self, site: Site, x: torch.Tensor, layer: Layer | None, ctx: Context) -> torch.Tensor:
        return x
