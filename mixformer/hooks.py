"""Hook points: what a mixin may take over, and the two verbs for it.

Shapes use b batch, s query length, t key length, h hidden, n heads, g key/value heads, d head size, v vocabulary.
Hooks marked [..., h] must not look at leading axes: a router may hand them a subset of the tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class HookPoints:
    """The hooks, their arguments and their contracts. Only the signatures and docstrings are used."""

    def word_embedding_forward(self, input_ids, ctx):  # type: ignore[no-untyped-def]
        """[b, s] token ids (None in towers) -> [b, s, h]; the result sets b and s. Default: embedding lookup."""

    def position_embedding_forward(self, position_ids, ctx):  # type: ignore[no-untyped-def]
        """[b, s] -> [b, s, h] added to the embeddings, or None. Default: the learned table, if there is one."""

    def embedding_norm_forward(self, hidden_states, ctx):  # type: ignore[no-untyped-def]
        """[b, s, h] -> [b, s, h], once before layer 0. Default: the configured norm or identity."""

    def attention_mask_forward(self, mask, ctx):  # type: ignore[no-untyped-def]
        """Mask description, padding left out, -> mask description, once per forward. Default: as given."""

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
