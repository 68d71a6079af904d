"""Hook points: what a mixin may take over, and how claims are resolved into plain callables.

Shapes use b batch, s query length, t key length, h hidden, n heads, g key/value heads, d head size, v vocabulary.
Hooks marked [..., h] must not look at leading axes: a router may hand them a subset of the tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mixformer.mixin import BaseMixin
    from mixformer.sites import Site

Function = TypeVar("Function", bound=Callable[..., Any])
Claim = tuple[str, "BaseMixin"]


class HookPoints:
    """The hooks, their arguments and their contracts. Only the signatures and docstrings are used."""

    def word_embedding_forward(self, input_ids, ctx):  # type: ignore[no-untyped-def]
        """[b, s] token ids (None in towers) -> [b, s, h]; the result sets b and s. Default: embedding lookup."""

    def position_embedding_forward(self, position_ids, ctx):  # type: ignore[no-untyped-def]
        """[b, s] -> [b, s, h] added to the embeddings, or None. Default: the learned table, if there is one."""

    def embedding_norm_forward(self, hidden_states, ctx):  # type: ignore[no-untyped-def]
        """[b, s, h] -> [b, s, h], once before layer 0. Default: the configured norm or identity."""

    def attention_mask_forward(self, mask, ctx):  # type: ignore[no-untyped-def]
        """Mask description -> mask description, once per forward. Default: as given."""

    def final_forward(self, hidden_states, ctx):  # type: ignore[no-untyped-def]
        """[..., h] after the final norm -> [..., v]. Default: tied output; the hidden states in towers.

        A mixin that pools over the sequence sets `whole_sequence = True` and gets [b, s, h].
        """

    def layer_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[b, s, h] -> [b, s, h]. Default: the block, in the configured norm order."""

    def attention_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[b, s, h] -> [b, s, h]. Default: the attention hooks in turn; the cache sits after `position_fn`."""

    def qkv_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[..., h] -> q [..., n*d], k [..., g*d], v [..., g*d]. Default: fused projection, split."""

    def position_fn(self, q, k, layer, ctx):  # type: ignore[no-untyped-def]
        """q [b, n, s, d], k [b, g, s, d] -> q, k. Default: unchanged."""

    def attention_fn(self, q, k, v, mask, layer, ctx):  # type: ignore[no-untyped-def]
        """q [b, n, s, d], k and v [b, g, t, d], lowered mask -> [b, n, s, d]. Default: scaled dot product."""

    def attention_output_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[..., n*d] -> [..., h]. Default: the output projection."""

    def cross_attention_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[b, s, h] -> [b, s, h] added by the block, or None. The mixin norms its own input. Default: None."""

    def mlp_forward(self, hidden_states, layer, ctx):  # type: ignore[no-untyped-def]
        """[..., h] -> [..., h]. Default: plain or gated MLP."""

    def linear_forward(self, site, x, layer, ctx):  # type: ignore[no-untyped-def]
        """[..., in] -> [..., out] at one named Linear. `layer` is None outside the layers. Default: that Linear."""

    def norm_forward(self, site, x, layer, ctx):  # type: ignore[no-untyped-def]
        """[..., h] -> [..., h] at one named norm. `layer` is None outside the layers. Default: that norm."""


SITE_HOOKS = {"linear_forward", "norm_forward"}
_BOUND = {"layer", "ctx", "site"}


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


HOOKS: dict[str, list[str]] = {
    name: _parameters(function) for name, function in vars(HookPoints).items() if not name.startswith("_")
}
LAYER_HOOKS = [name for name, arguments in HOOKS.items() if "layer" in arguments]
MODEL_HOOKS = [name for name, arguments in HOOKS.items() if "layer" not in arguments]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """" Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def replace(function: Function) -> Function:
    """Mark a mixin method that takes a hook over. One mixin may replace a given hook of a given layer."""
    function._hook_verb = "replace"  # type: ignore[attr-defined]
    return function


def wrap(function: Function) -> Function:
    """Mark a mixin method that goes around a hook and receives what lies below as `old_impl`."""
    function._hook_verb = "wrap"  # type: ignore[attr-defined]
    return function


def verb_of(mixin: Any, hook: str) -> str | None:
    """'replace', 'wrap' or None: what a mixin (class or instance) does with a hook."""
    return getattr(getattr(mixin, hook, None), "_hook_verb", None)


def check_class(cls: type) -> None:
    """Check the hook methods that a mixin class defines.

    Raises:
        TypeError: a decorated method is no hook, has the wrong arguments, or a hook's name is not decorated.
    """
    for name, member in vars(cls).items():
        verb = getattr(member, "_hook_verb", None)
        if verb is None:
            if name in HOOKS and callable(member):
                raise TypeError(
                    f"{cls.__name__}.{name} has the name of a hook but no decorator, so it would never be called. "
                    f"Put @replace (take the hook over) or @wrap (go around it) above it."
                )
            continue
        if name not in HOOKS:
            raise TypeError(
                f"{cls.__name__}.{name} is decorated with @{verb}, but there is no hook '{name}'."
                f"{did_you_mean(name, list(HOOKS))} The hooks are: {', '.join(HOOKS)}."
            )
        expected = HOOKS[name] + (["old_impl"] if verb == "wrap" else [])
        if _parameters(member) != expected:
            raise TypeError(
                f"{cls.__name__}.{name}({', '.join(['self', *_parameters(member)])}) has the wrong arguments for "
                f"@{verb}. Write: def {name}({', '.join(['self', *expected])})."
            )


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
    num_bound = len(_BOUND.intersection(HOOKS[hook]))
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
