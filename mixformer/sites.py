"""Linears, norms and the MLP whose places have names, so that mixins can reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.config import TransformerConfig
from mixformer.mixin import BaseMixin

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "tanh": torch.tanh,
}


def normal(*shape: int, std: float) -> torch.Tensor:
    """Fresh normal weights; shapes only on the meta device, where drawing would import torch's compiler for nothing."""
    made = torch.empty(shape)
    return made if made.is_meta else torch.randn(shape) * std


class Sited(nn.Module):
    """A module that mixins can reach by its site name. `hook` is the resolved chain, or None when unclaimed."""

    hook: Callable[..., Any] | None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "hook": None})


class Linear(Sited, nn.Linear):
    """A Linear that mixins can reach, [..., in] -> [..., out].

    Args:
        in_features: in.
        out_features: out.
        bias: whether it has one.
        parts: sizes of named row blocks of a fused projection, such as {"q": 64, "k": 16, "v": 16}.
        init_std: of fresh weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        parts: dict[str, int] | None = None,
        init_std: float = 0.02,
    ) -> None:
        self.hook = None
        self.init_std = init_std
        ends = torch.tensor([0, *(parts or {}).values()], device="cpu").cumsum(0).tolist()
        self.parts = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(parts or {})}
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Normal weights, zero bias."""
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def plain(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The projection itself, below every mixin."""
        try:  # an attribute of a module costs a microsecond when it is a parameter, an entry of a dict nearly nothing
            own: Any = self._parameters
            return F.linear(x, own["weight"], own["bias"])
        except KeyError:  # parametrized, pruned or sharded: not a plain parameter now
            return F.linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Project [..., in] to [..., out]; pass `ctx` so that mixins on this site can use it."""
        return self.plain(x) if self.hook is None else self.hook(x, ctx)


class Embedding(nn.Embedding):
    """A table that says what does not fit."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., h].

        Raises:
            ValueError: an id that the table has no row for. On a GPU nobody looks: there torch stops the process.
        """
        try:
            return super().forward(ids)
        except IndexError as error:
            raise ValueError(
                f"Ids from {int(ids.min())} to {int(ids.max())} do not fit a table of {self.num_embeddings} rows. "
                f"Token ids must be below the model's vocab_size, positions below its max_positions: was it another "
                f"tokenizer's text, or a longer one than the model can read?"
            ) from error


class LayerNorm(Sited, nn.LayerNorm):
    """A LayerNorm that mixins can reach."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        self.hook = None
        super().__init__(size, eps=eps)

    def plain(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The norm itself, below every mixin."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def forward(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        return self.plain(x) if self.hook is None else self.hook(x, ctx)


class RMSNorm(Sited):
    """Root mean square norm (arXiv:1910.07467) that mixins can reach.

    Args:
        size: h.
        eps: added to the mean square.
        cast: `last` multiplies by the weight in fp32 and casts at the end; `first` casts, then multiplies.
    """

    def __init__(self, size: int, eps: float = 1e-5, cast: str = "last") -> None:
        super().__init__()
        self.hook = None
        self.eps, self.cast, self.shape = eps, cast, (size,)
        self.weight = nn.Parameter(torch.ones(size))

    def plain(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """The norm itself, below every mixin."""
        weight, dtype = self._parameters.get("weight"), x.dtype
        if weight is None:
            weight = self.weight
        if dtype == weight.dtype and (self.cast == "last" or dtype == torch.float32):
            return torch.rms_norm(x, self.shape, weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.cast == "last":
            return (weight.float() * wide).to(dtype)
        return weight * wide.to(dtype)

    def forward(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        return self.plain(x) if self.hook is None else self.hook(x, ctx)


def make_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """The configured norm of the given size (h by default)."""
    size = size or config.hidden_size
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.norm_eps, config.norm_cast)
    return LayerNorm(size, config.norm_eps)


class MLP(nn.Module):
    """Plain or gated MLP: sites `up`, `down` and, if gated, `gate`."""

    def __init__(
        self, hidden_size: int, inner_size: int, gated: bool, bias: bool, activation: str, init_std: float = 0.02,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, inner_size, bias, init_std=init_std) if gated else None
        self.up = Linear(hidden_size, inner_size, bias, init_std=init_std)
        self.down = Linear(inner_size, hidden_size, bias, init_std=output_std or init_std)
        self.activation = activation

    def forward(self, x: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activation(self.up(x, ctx)), ctx)
        return self.down(activation(self.gate(x, ctx)) * self.up(x, ctx), ctx)


@dataclass(frozen=True)
class Site:
    """A named Linear or norm that mixins can reach.

    Attributes:
        name: `qkv`, `mlp.up`'s short name `up`, or `{mixin}.{path}`; inside a nested model, by that model's own hooks.
        module: the Linear or norm itself.
    """

    name: str
    module: Any

    @property
    def hook(self) -> str:
        """`linear_forward` or `norm_forward`."""
        return "linear_forward" if hasattr(self.module, "parts") else "norm_forward"


def layer_sites(layer: nn.Module) -> list[Site]:
    """The sites of one layer, those of its mixins' parts included."""
    found = []
    for path, module in _sited_modules(layer):
        name = path.removeprefix("mixins.") if path.startswith("mixins.") else path.rpartition(".")[2]
        found.append(Site(name, module))
    return found


def model_sites(model: Any) -> list[Site]:
    """The sites outside the layers; those of nested models are reached through the nested model."""
    norms = [(name, getattr(model.transformer, name)) for name in ("embedding_norm", "final_norm")]
    found = [Site(name, norm) for name, norm in norms if norm is not None]
    return found + [Site(_model_site_name(path), module) for path, module in _sited_modules(model.mixins)]


def all_sites(model: Any) -> Iterator[tuple[Any, Site]]:
    """(layer, site) of every site of a model; the layer is None for those outside the layers."""
    for site in model_sites(model):
        yield None, site
    for layer in model.transformer.layers:
        for site in layer_sites(layer):
            yield layer, site


def _model_site_name(path: str) -> str:
    mixin, _, rest = path.partition(".")
    return mixin if rest == "linear" else path


def _sited_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, Sited]]:
    for name, module in root.named_children():
        if hasattr(module, "has_own_sites"):
            continue
        if isinstance(module, Sited):
            yield f"{prefix}{name}", module
        yield from _sited_modules(module, f"{prefix}{name}.")


class SiteMixin(BaseMixin):
    """A mixin that reaches the Linears or norms whose site names match glob patterns.

    Args:
        sites: patterns over site names, such as `qkv`, `qkv:q` (a part of a fused site) or `vision_expert*`.
    """

    def __init__(self, sites: list[str]) -> None:
        super().__init__()
        self.sites = [sites] if isinstance(sites, str) else list(sites)

    def matching_parts(self, site: Site) -> list[str | None]:
        """Parts of the site that a pattern selects; [None] for all of it, [] for nothing."""
        parts: list[str | None] = []
        for pattern in self.sites:
            glob, _, part = pattern.partition(":")
            if fnmatchcase(site.name, glob) and (not part or part in getattr(site.module, "parts", {})):
                parts.append(part or None)
        return [None] if None in parts else sorted(set(parts), key=str)

    def claims_site(self, hook: str, site: Site) -> bool:
        """Only sites that a pattern selects."""
        return bool(self.matching_parts(site))
