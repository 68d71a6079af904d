"""Pool a sequence into one vector and put a head on it (arXiv:1810.04805, section 3.1; arXiv:2010.11929, 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import Linear, make_norm

POOLS = ("cls", "mean", "max", "eot")


class PoolHeadMixin(BaseMixin):
    """Pool [b, s, h] to [b, h], then norm, dense with tanh, and projection, whichever there are. Padding is left out.

    Args:
        pool: `cls` takes the first token, `eot` the end-of-text token (see `eos_token_id`); `mean` or `max` over all.
        norm: a norm of the configured kind on the pooled vector.
        dense: a Linear that keeps the width, and tanh (BERT's pooler).
        size: width of the projection, such as the number of classes; its site has the mixin's own name. None for none.
        bias: whether the projection has one.
        result: None: what lies below (a tower's features, say) is pooled and is what the model returns. A name: the
            final hidden states are pooled to `outputs[name]`, and the model returns what it did before.
        eos_token_id: `eot` is the first token of this id; None: the token with the highest id, as in CLIP's releases.

    Raises:
        ValueError: another pool, or an `eos_token_id` that nothing looks for.
    """

    whole_sequence = True

    def __init__(
        self, pool: str = "cls", norm: bool = False, dense: bool = False, size: int | None = None, bias: bool = True,
        result: str | None = None, eos_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"{type(self).__name__}: pool is {pool!r}; choose one of {', '.join(POOLS)}.")
        if eos_token_id is not None and pool != "eot":
            raise ValueError(f"{type(self).__name__}: eos_token_id is only looked for with pool 'eot', not {pool!r}.")
        self.pool, self.has_norm, self.has_dense, self.size, self.bias = pool, norm, dense, size, bias
        self.result, self.eos_token_id = result, eos_token_id

    def build(self, model: Any) -> None:
        size, std = model.config.hidden_size, model.config.init_std
        self.norm = make_norm(model.config) if self.has_norm else None
        self.dense = Linear(size, size, init_std=std) if self.has_dense else None
        self.linear = None if self.size is None else Linear(size, self.size, self.bias, init_std=std)

    def plan(self, ctx: Context) -> None:
        if ctx.cache is not None:
            if self.result is None:
                raise ValueError(
                    f"Mixin '{self.name}' pools whole sequences, and a cache gives them in pieces. Leave `cache` out."
                )
            return
        ids, real = ctx.input_ids, ctx.attention_mask
        if ids is None or (self.pool == "cls" and real is None) or self.pool in ("mean", "max"):
            return
        if self.pool == "cls":
            assert real is not None
            found = real
        elif self.eos_token_id is None:
            found = ids if real is None else ids.masked_fill(~real, -1)
        else:
            found = ids == self.eos_token_id if real is None else (ids == self.eos_token_id) & real
            missing = (~found.any(1)).nonzero()[:, 0].tolist()
            if missing:
                raise ValueError(
                    f"Rows {missing} of input_ids have no end-of-text token {self.eos_token_id}, at which mixin "
                    f"'{self.name}' pools. Put it after each text, truncated ones too."
                )
        ctx.shared[f"{self.name}.places"] = found.long().argmax(1)

    def pooled(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        """[b, s, h] -> [b, size] (or h): the pooled vectors after the head."""
        if self.pool in ("mean", "max"):
            x = _over_real(hidden_states, ctx.valid, self.pool)
        elif f"{self.name}.places" in ctx.shared:
            places = ctx.shared[f"{self.name}.places"]
            x = hidden_states[torch.arange(len(places), device=places.device), places]
        else:
            x = hidden_states[:, 0]
        x = x if self.norm is None else self.norm(x, ctx)
        x = x if self.dense is None else torch.tanh(self.dense(x, ctx))
        return x if self.linear is None else self.linear(x, ctx)

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        if self.result is None:
            return self.pooled(old_impl(hidden_states), ctx)
        if ctx.cache is None:
            ctx.outputs[self.result] = self.pooled(hidden_states, ctx)
        return old_impl(hidden_states)


def _over_real(hidden_states: torch.Tensor, valid: torch.Tensor | None, pool: str) -> torch.Tensor:
    """Mean or maximum over the real tokens, [b, s, h] -> [b, h]."""
    if valid is None:
        return hidden_states.mean(1) if pool == "mean" else hidden_states.amax(1)
    if pool == "max":
        return hidden_states.masked_fill(~valid[..., None], float("-inf")).amax(1)
    weights = valid[..., None].to(hidden_states.dtype)
    return (hidden_states * weights).sum(1) / weights.sum(1)
