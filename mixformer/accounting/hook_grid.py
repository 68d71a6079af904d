"""Who owns what: the chain of every hook in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixformer.chains import ordered_claims, shown_chain
from mixformer.hooks import LAYER_HOOKS, MODEL_HOOKS, SITE_HOOKS
from mixformer.sites import layer_sites, model_sites

DEFAULT = "default"


@dataclass(frozen=True)
class HookRow:
    """One hook, or one claimed site of a site hook.

    Attributes:
        hook: its name, with the site behind it where there is one.
        chains: the chain in each layer, innermost first; one chain alone for what runs once per forward. An empty
            one means that the layer has no such site.
        of_layers: whether there is a chain for each layer.
    """

    hook: str
    chains: tuple[tuple[str, ...], ...]
    of_layers: bool


def hook_grid(model: Any) -> list[HookRow]:
    """The chains of all hooks, those of the model first; sites that nobody claims are left out."""
    layers = list(model.transformer.layers)
    active = [_active(model, layer.index) for layer in layers]
    everyone = _active(model, None)
    rows = [HookRow(hook, (_chain(hook, everyone),), False) for hook in MODEL_HOOKS]
    for site in model_sites(model):
        chain = _site_chain(site, everyone)
        if chain != (DEFAULT,):
            rows.append(HookRow(f"{site.hook} {site.name}", (chain,), False))
    if not layers:
        return rows
    for hook in LAYER_HOOKS:
        if hook not in SITE_HOOKS:
            rows.append(HookRow(hook, tuple(_chain(hook, mixins) for mixins in active), True))
    sites: dict[str, dict[int, tuple[str, ...]]] = {}
    for layer, mixins in zip(layers, active, strict=True):
        for site in layer_sites(layer):
            sites.setdefault(f"{site.hook} {site.name}", {})[layer.index] = _site_chain(site, mixins)
    for name, chains in sites.items():
        if any(chain != (DEFAULT,) for chain in chains.values()):
            rows.append(HookRow(name, tuple(chains.get(layer.index, ()) for layer in layers), True))
    return rows


def _active(model: Any, layer: int | None) -> list[tuple[str, Any]]:
    """The mixins that are there in a layer; all of them where there is none."""
    scopes = model.scopes
    return [
        (name, mixin) for name, mixin in model.mixins.items()
        if layer is None or scopes[name] is None or layer in scopes[name]
    ]


def _chain(hook: str, mixins: list[tuple[str, Any]]) -> tuple[str, ...]:
    return tuple(shown_chain(hook, ordered_claims(hook, mixins, "")).split(" <- "))


def _site_chain(site: Any, mixins: list[tuple[str, Any]]) -> tuple[str, ...]:
    return _chain(site.hook, [(name, mixin) for name, mixin in mixins if mixin.claims_site(site.hook, site)])
