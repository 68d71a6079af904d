"""Low-rank updates of Linears (arXiv:2106.09685, section 4.1), and what selects the Linears that get one."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.hooks import did_you_mean
from mixformer.sites import Linear, Site

LANGUAGE = "language"


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
        wide = x if torch.is_autocast_enabled(x.device.type) else x.to(self.a.dtype)
        delta = (F.linear(F.linear(wide, self.a), self.b) * self.scale).to(x.dtype)
        return F.pad(delta, self.padding) if any(self.padding) else delta

    def add_to(self, weight: torch.Tensor, times: float = 1.0) -> None:
        """Add the update, so many times, to the weight [out, in] of the Linear, in place."""
        wide = torch.promote_types(weight.dtype, self.a.dtype)
        delta = (self.b.to(wide) @ self.a.to(wide)) * (self.scale * times)
        weight[self.rows] = (weight[self.rows].to(wide) + delta).to(weight.dtype)


def selected(selector: str, site: Site) -> bool:
    """Whether a selector selects a site or, behind a colon, a part that it has."""
    glob, _, part = selector.partition(":")
    if part and part not in getattr(site.module, "parts", {}):
        return False
    return "." not in site.name if glob == LANGUAGE else fnmatchcase(f"{site.name}.", f"{glob}.*")


def check_selectors(selectors: Iterable[str], linears: list[Site], model: Any) -> None:
    """Check that each selector selects one of a model's Linears.

    Raises:
        ValueError: one that does not; the nearest one is named, or the nested model that it means.
    """
    for selector in selectors:
        if not any(selected(selector, site) for site in linears):
            names = sorted({site.name for site in linears})
            nested = [path for path, _ in model.nested_models() if selector.startswith(path)]
            near = did_you_mean(selector, [*names, *model.mixins, LANGUAGE])
            remedy = f" That is a model of its own: add a LoRA to it as '{nested[0]}/lora'." if nested else near
            raise ValueError(f"LoRA pattern '{selector}' matches no Linear here. Sites: {', '.join(names)}.{remedy}")
