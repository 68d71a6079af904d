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
from mixformer.mixins.low_rank import Adapter, check_selectors, selected
from mixformer.sites import Linear, Site, SiteMixin, all_sites, layer_sites, model_sites
from mixformer.transformer import Layer


class LoRAMixin(SiteMixin):
    """Add low-rank updates to Linears; they start as zero, can be merged, and leave no trace when removed.

    Sites are those present when the mixin is added. `save_pretrained` saves the unmerged weights. Merging at any step
    of training leaves the adapters and what the optimiser knows of them alone.

    Args:
        sites: selectors of Linears: a mixin (`vision_expert`), a path (`image.projector`), `language` (the backbone's
            own and its head), or globs over site names (`*.qkv`); `qkv:q` adapts the q rows of a fused projection.
        rank: of each update.
        alpha: updates are scaled by alpha / rank.
        rank_stabilized: scale by alpha / sqrt(rank) instead (arXiv:2312.03732).
        dropout: on the adapter's input while training.

    Raises:
        ValueError: rank below one, dropout outside [0, 1); when added: a pattern that matches no Linear.
    """

    def __init__(
        self, sites: list[str], rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rank_stabilized: bool = False
    ) -> None:
        super().__init__(sites)
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}; it must be at least 1.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LoRA dropout is {dropout}; it must be in 0 <= dropout < 1.")
        self.rank, self.alpha, self.dropout, self.merged = rank, alpha, dropout, False
        self.scale = alpha / (rank**0.5 if rank_stabilized else rank)

    def build(self, model: Any) -> None:
        self.adapters = self._adapters(model_sites(model))
        linears = [site for _, site in all_sites(model) if isinstance(site.module, Linear)]
        check_selectors(self.sites, linears, model)
        prefixes = {site.name.split(".")[0] for site in linears if self.matching_parts(site)}
        self._adapted = {prefix for prefix in prefixes if prefix in model.mixins}

    def build_layer(self, layer: Layer) -> nn.ModuleDict | None:
        return self._adapters(layer_sites(layer)) or None

    def _adapters(self, sites: list[Site]) -> nn.ModuleDict:
        adapters = nn.ModuleDict()
        for site in sites:
            if isinstance(site.module, Linear) and (parts := self.matching_parts(site)):
                made = {part or "all": Adapter(site.module, part, self.rank, self.scale) for part in parts}
                adapters[_key(site)] = nn.ModuleDict(made)
        return adapters

    def matching_parts(self, site: Site) -> list[str | None]:
        """Parts of the site that a selector selects; [None] for all of it, [] for nothing."""
        parts = {pattern.partition(":")[2] or None for pattern in self.sites if selected(pattern, site)}
        return [None] if None in parts else sorted(parts, key=str)

    def depends_on(self) -> set[str]:
        return self._adapted

    def adapters_of(self, site: Site, layer: Layer | None) -> dict[str, Adapter]:
        """{part of the site, or "all": its adapter} of a site in a layer, or outside the layers."""
        home: Any = self.adapters if layer is None else {}
        if layer is not None and self.name in layer.mixins:
            home = layer.mixins[self.name]
        return dict(home[_key(site)].items()) if _key(site) in home else {}

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
        for adapter in self.adapters_of(site, layer).values():
            y = y + adapter(x)
        return y

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        """Add the updates to the weights; the originals are kept, so that `unmerge` is exact."""
        if self.merged:
            return
        found: list[tuple[Linear, torch.Tensor, list[Adapter]]] = []
        for layer, site in all_sites(model):
            adapters = list(self.adapters_of(site, layer).values()) if isinstance(site.module, Linear) else []
            if adapters:
                found.append((site.module, site.module.weight.detach().clone(), adapters))
        for linear, _, adapters in found:  # after all were read, which a quantised one refuses
            for adapter in adapters:
                adapter.add_to(linear.weight)
        self._originals, self.merged = found, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; from weights that changed since, the updates are subtracted."""
        for linear, original, adapters in self._originals if self.merged else ():
            merged = original.clone()
            for adapter in adapters:
                adapter.add_to(merged)
            if torch.equal(merged, linear.weight):
                linear.weight.copy_(original)
            else:
                for adapter in adapters:
                    adapter.add_to(linear.weight, -1.0)
        self._originals, self.merged = [], False

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
