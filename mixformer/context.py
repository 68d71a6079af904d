"""Context: what travels through one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mixformer.masks import Mask
from mixformer.routes import Routes, route_tokens

if TYPE_CHECKING:
    from mixformer.cache import KVCache
    from mixformer.masks import LoweredMask


class Context:
    """What one forward carries: inputs, positions, mask, cache, token routes and what mixins share.

    Mixins write in two phases, `plan` (integers) and `before_forward` (weights). Layers only read, so that they
    can be recomputed and compiled.

    Attributes:
        input_ids: [b, s] or None in towers.
        attention_mask: [b, s] bool, True on real tokens, or None when there is no padding.
        position_ids: [b, s] ([1, s] where all rows are alike), or None until the plan is complete.
        known_positions: (ids, bound, counted) of position ids that were filled in: none of them reaches the bound, if
            one is known, and with counted each row goes on by one per slot. Void once `position_ids` is another tensor.
        following: (ids, next) likewise, with the position [b] of the token that comes after them, for the cache.
        mask: a mask description during `plan`, lowered before the first layer. Padding is no part of it.
        valid: [b, t] bool, True on the real keys, or None when there is no padding.
        cache: the KVCache or None.
        inputs: the declared extra inputs that were given.
        routes: the token routes.
        selection: names of the routes that the code now running sees, None for all tokens.
        shared: what mixins hand to layers, keyed "{mixin name}.{what}" by convention.
        losses, outputs: auxiliary losses for training; what mixins give beside the logits, such as pooled features.
        dynamic: the plan is for a compiled graph that must serve batches of every size: prefer one general way over
            a faster special case.
    """

    def __init__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        inputs: dict[str, Any] | None = None,
        declared: dict[str, str] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.known_positions: tuple[torch.Tensor, int | None, bool] | None = None
        self.following: tuple[torch.Tensor, torch.Tensor] | None = None
        self._position_steps: torch.Tensor | None = None
        self.mask: Mask | LoweredMask | None = None
        self.valid = attention_mask
        self.cache = cache
        self.inputs: dict[str, Any] = inputs or {}
        self.declared = declared or {}
        self.routes = Routes()
        self.selection: tuple[str, ...] | None = None
        self.shared: dict[str, Any] = {}
        self.losses: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.dynamic = False

    @property
    def position_steps(self) -> torch.Tensor | None:
        """[b, s] int64 during `plan`: by how much each token moves the position on (1 on real tokens by default)."""
        if self._position_steps is None and self.input_ids is not None:
            mask = self.attention_mask
            self._position_steps = torch.ones_like(self.input_ids) if mask is None else mask.long()
        return self._position_steps

    @position_steps.setter
    def position_steps(self, steps: torch.Tensor) -> None:
        self._position_steps = steps

    def fill_positions(self) -> None:
        """Position ids that follow from the steps and the cache, where none were given."""
        cache, usual = self.cache, self._position_steps is None and not self.dynamic
        if cache is not None and not (usual and self.position_ids is None):
            cache.usual_positions = False
        if self.position_ids is not None or self.input_ids is None:
            return
        num_tokens, counted = self.input_ids.shape[1], usual and self.attention_mask is None
        if counted:
            positions = torch.arange(num_tokens, device=self.input_ids.device)[None]
        else:
            assert self.position_steps is not None
            positions = self.position_steps.cumsum(1) - 1
        positions = positions if cache is None else positions + cache.next_position[:, None]
        self.position_ids = positions if counted else positions.clamp_min(0)
        if cache is not None and not counted:
            self.following = self.position_ids, positions[:, -1] + 1
        if usual and not torch.compiler.is_compiling():
            bound = num_tokens if cache is None else cache.capacity if cache.usual_positions else None
            self.known_positions = self.position_ids, bound, counted

    def route(self, x: torch.Tensor, **branches: Callable[[torch.Tensor], Any]) -> Any:
        """Send token groups through branches, `ctx.route(x, text=old_impl, image=expert)`: see `route_tokens`."""
        return route_tokens(self, x, branches)

    def require(self, name: str) -> Any:
        """The forward input `name`.

        Raises:
            ValueError: it was not given, or None.
        """
        value = self.inputs.get(name)
        if value is None:
            raise ValueError(
                f"The forward input '{name}' is missing; mixin '{self.declared.get(name, '?')}' needs it here. "
                f"Pass it: model(..., {name}=...)."
            )
        return value

    def started(self, inputs: dict[str, Any]) -> Context:
        """A copy to run with: the planned integers are shared, what layers are given to read is its own."""
        ctx = Context(self.input_ids, self.attention_mask, self.position_ids, self.cache, inputs, self.declared)
        ctx.mask, ctx.valid, ctx.routes, ctx.shared = self.mask, self.valid, self.routes, dict(self.shared)
        ctx.known_positions, ctx.following = self.known_positions, self.following
        return ctx
