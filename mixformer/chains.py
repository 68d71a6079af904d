"""Chains: the claims on each hook resolved into plain callables, and the table that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mixformer.hooks import HOOKS, verb_of

if TYPE_CHECKING:
    from mixformer.mixin import BaseMixin
    from mixformer.sites import Site

Claim = tuple[str, "BaseMixin"]


def conflict(hook: str, where: str, first: Claim, second: Claim) -> ValueError:
    """The error for two replacements of one hook."""
    (name_1, mixin_1), (name_2, mixin_2) = first, second
    return ValueError(
        f"'{hook}' {where} is replaced by two mixins: '{name_1}' ({type(mixin_1).__name__}) and '{name_2}' "
        f"({type(mixin_2).__name__}). Remove one with model.del_mixin('{name_1}'), swap it with "
        f"model.replace_mixin('{name_1}', ...), or make one of them @wrap."
    )


def ordered_claims(hook: str, mixins: Sequence[Claim], where: str) -> list[Claim]:
    """The mixins of a hook's chain, innermost first: the replacement, then the wraps in the order added.

    Raises:
        ValueError: two mixins replace the hook.
    """
    replacements = [claim for claim in mixins if verb_of(claim[1], hook) == "replace"]
    if len(replacements) > 1:
        raise conflict(hook, where, replacements[0], replacements[1])
    return replacements + [claim for claim in mixins if verb_of(claim[1], hook) == "wrap"]


def _around(method: Callable[..., Any], below: Callable[..., Any], num_bound: int) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        bound = arguments[len(arguments) - num_bound :]
        return method(*arguments, lambda *tensors: below(*tensors, *bound))

    return wrapped


def resolve(hook: str, claims: Sequence[Claim], default: Callable[..., Any]) -> Callable[..., Any]:
    """One callable for a chain of claims ordered by `ordered_claims`; `default` itself when there are none."""
    chain = default
    num_bound = len({"layer", "ctx"}.intersection(HOOKS[hook]))
    for _, mixin in claims:
        method = getattr(mixin, hook)
        chain = method if verb_of(mixin, hook) == "replace" else _around(method, chain, num_bound)
    return chain


def resolve_site(hook: str, site: Site, layer: Any, claims: Sequence[Claim], default: Callable[..., Any]) -> Any:
    """The callable (x, ctx) -> y of a claimed site, or None when nobody claims it."""
    chain: Callable[..., Any] | None = None
    for _, mixin in claims:
        method = getattr(mixin, hook)
        if verb_of(mixin, hook) == "replace":
            chain = _site_replace(method, site, layer)
        else:
            chain = _site_around(method, chain or default, site, layer)
    return chain


def _site_replace(method: Callable[..., Any], site: Site, layer: Any) -> Callable[..., Any]:
    return lambda x, ctx: method(site, x, layer, ctx)


def _site_around(method: Callable[..., Any], below: Callable[..., Any], site: Site, layer: Any) -> Callable[..., Any]:
    return lambda x, ctx: method(site, x, layer, ctx, lambda y: below(y, ctx))


class HookTable:
    """The resolved model-level hooks as attributes, and the table that `print(model.hooks)` shows."""

    def __init__(self, chains: dict[str, Callable[..., Any]], rows: list[tuple[str, str, str]]) -> None:
        self.__dict__.update(chains)
        self.rows = rows

    def __str__(self) -> str:
        width = max(len(hook) for hook, _, _ in self.rows)
        scope = max(len(where) for _, where, _ in self.rows)
        return "\n".join(f"{hook:<{width}}  {where:<{scope}}  {chain}" for hook, where, chain in self.rows)

    __repr__ = __str__


def shown_chain(hook: str, claims: Sequence[Claim]) -> str:
    """A chain as text, innermost first: "default <- image", or "head" where a mixin replaces the default."""
    replaced = bool(claims) and verb_of(claims[0][1], hook) == "replace"
    return " <- ".join([*([] if replaced else ["default"]), *(name for name, _ in claims)])


def shown_layers(indices: Sequence[int], num_layers: int) -> str:
    """"all layers", "layers 0-3, 8", "layers 0-28 step 4", or "model" for none."""
    if not indices:
        return "model"
    if len(indices) == num_layers:
        return "all layers"
    steps = {b - a for a, b in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"layers {indices[0]}-{indices[-1]} step {steps.pop()}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return "layers " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
