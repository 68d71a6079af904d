"""LoRA (arXiv:2106.09685) on any site, whole or parts of fused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.sites import Linear, Site, SiteMixin, all_sites, layer_sites, model_sites
from mixformer.transformer import Layer


class Adapter(nn.Module):
    """Low-rank update of a Linear or of a row block of one: scale * b @ a."""

    def __init__(self, linear: Linear, part: str | None, rank: int, scale: float) -> None:
        super().__init__()
        rows = slice(0, linear.out_features) if part is None else linear.parts[part]
        self.rows, self.scale, self.padding = rows, scale, (rows.start, linear.out_features - rows.stop)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(rows.stop - rows.start, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], zero outside its rows."""
        delta = F.linear(F.linear(x, self.a), self.b) * self.scale
        return F.pad(delta, self.padding) if any(self.padding) else delta


class LoRAMixin(SiteMixin):
    """Add low-rank updates to Linears; they start as zero, can be merged, and leave no trace when removed.

    Sites are those present when the mixin is added. `save_pretrained` saves the unmerged weights.

    Args:
        sites: patterns over site names; `qkv:q` adapts the q rows of a fused projection.
        rank: of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: on the adapter's input while training.

    Raises:
        ValueError: rank below one; when added: a pattern that matches no Linear.
    """

    def __init__(self, sites: list[str], rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__(sites)
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}; it must be at least 1.")
        self.rank, self.alpha, self.dropout, self.merged = rank, alpha, dropout, False

    def build(self, model: Any) -> None:
        self.adapters = self._adapters(model_sites(model))
        linears = [site for _, site in all_sites(model) if isinstance(site.module, Linear)]
        for pattern in self.sites:
            if not any(SiteMixin([pattern]).matching_parts(site) for site in linears):
                names = ", ".join(sorted({site.name for site in linears}))
                raise ValueError(f"LoRA pattern '{pattern}' matches no Linear here. Sites: {names}.")
        prefixes = {site.name.split(".")[0] for site in linears if self.matching_parts(site)}
        self._adapted = {prefix for prefix in prefixes if prefix in model.mixins}

    def build_layer(self, layer: Layer) -> nn.ModuleDict | None:
        return self._adapters(layer_sites(layer)) or None

    def _adapters(self, sites: list[Site]) -> nn.ModuleDict:
        scale, adapters = self.alpha / self.rank, nn.ModuleDict()
        for site in sites:
            if isinstance(site.module, Linear) and (parts := self.matching_parts(site)):
                made = {part or "all": Adapter(site.module, part, self.rank, scale) for part in parts}
                adapters[_key(site)] = nn.ModuleDict(made)
        return adapters

    def depends_on(self) -> set[str]:
        return self._adapted

    def _of(self, site: Site, layer: Layer | None) -> Any:
        if layer is None:
            home: Any = self.adapters
        else:
            home = layer.mixins[self.name] if self.name in layer.mixins else {}
        return home[_key(site)].values() if _key(site) in home else ()

    @wrap
    def linear_forward(
        self, site: Site, x: torch.Tensor, layer: Layer | None, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        y = old_impl(x)
        if self.merged:
            return y
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        for adapter in self._of(site, layer):
            y = y + adapter(x)
        return y

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        """Add the updates to the weights; the originals are kept, so that `unmerge` is exact."""
        if self.merged:
            return
        self._originals: list[tuple[Linear, torch.Tensor]] = []
        for layer, site in all_sites(model):
            adapters = list(self._of(site, layer)) if isinstance(site.module, Linear) else []
            if adapters:
                self._originals.append((site.module, site.module.weight.detach().clone()))
            for adapter in adapters:
                site.module.weight[adapter.rows] += (adapter.b @ adapter.a) * adapter.scale
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        if self.merged:
            for linear, weight in self._originals:
                linear.weight.copy_(weight)
            self._originals = []
            self.merged = False

    def on_detach(self, model: Any) -> None:
        self.unmerge()

    @contextmanager
    def saving(self, model: Any) -> Iterator[None]:
        merged = self.merged
        self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge(model)


def _key(site: Site) -> str:
    return site.name.replace(".", "-")
