"""BaseMixin: one behaviour that can be added to a model and taken out again."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from mixformer.hooks import HOOKS, LAYER_HOOKS, check_class, verb_of

if TYPE_CHECKING:
    from mixformer.context import Context
    from mixformer.sites import Site
    from mixformer.transformer import Layer


class BaseMixin(nn.Module):
    """Owns parameters and claims hooks with `@replace` and `@wrap`.

    `__init__` takes plain options (numbers, strings, nested configs) so that a mixin can be rebuilt from them;
    parameters are made in `build` and `build_layer`, on the model's device and dtype.

    Attributes:
        inputs: extra forward inputs the mixin reads; undeclared names are refused.
        whole_sequence: its `final_forward` needs [b, s, h], not only the positions asked for.
        name: the name under which a model has it; empty while no model does.
    """

    inputs: tuple[str, ...] = ()
    whole_sequence: bool = False
    name: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls)

    def __new__(cls, /, *args: Any, **kwargs: Any) -> BaseMixin:
        mixin = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(mixin, *args, **kwargs)
        except TypeError:  # unpickling makes an empty instance; a wrong call is reported by __init__ itself
            return mixin
        options = dict(list(bound.arguments.items())[1:])
        object.__setattr__(mixin, "_options", options)
        return mixin

    @property
    def options(self) -> dict[str, Any]:
        """The options it was made with, enough to make it again: `type(mixin)(**mixin.options)`."""
        options = dict(self.__dict__.get("_options", {}))
        further = options.pop("kwargs", {})
        return {**options, **further}

    def build(self, model: Any) -> None:
        """Make model-level parameters and submodules (keys `mixins.{name}.*`)."""

    def build_layer(self, layer: Layer) -> nn.Module | None:
        """Make one layer's parameters (they live at `layer.mixins[name]`), or None."""
        return None

    def plan(self, ctx: Context) -> None:
        """Integers only: places, positions, masks, routes, input checks; on the host, before any weights run."""

    def before_forward(self, ctx: Context) -> None:
        """Weights: encoders, tables; after every plan and before the first layer. Fill `ctx.shared` here."""

    def claims_site(self, hook: str, site: Site) -> bool:
        """Whether `linear_forward` / `norm_forward` of this mixin wants that site. Default: all of them."""
        return True

    def depends_on(self) -> set[str]:
        """Names of mixins that must stay while this one is there (say, because it adapts their Linears)."""
        return set()

    def on_attach(self, model: Any) -> None:
        """Called last when added, for the rare mixin that changes the model itself."""

    def on_detach(self, model: Any) -> None:
        """Called first when removed; undo `on_attach`."""

    def saving(self, model: Any) -> AbstractContextManager[None]:
        """Entered while the model is saved, for a mixin whose weights must be put in order for that."""
        return nullcontext()

    @classmethod
    def hooks(cls) -> dict[str, str]:
        """{hook: 'replace' or 'wrap'} of this class."""
        return {hook: verb for hook in HOOKS if (verb := verb_of(cls, hook)) is not None}

    def has_layer_part(self) -> bool:
        """Whether it claims layer hooks or makes per-layer parameters."""
        hooks = self.hooks()
        return type(self).build_layer is not BaseMixin.build_layer or any(hook in LAYER_HOOKS for hook in hooks)
