"""The backbone: its weights, and what each hook does when nobody claims it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.config import TransformerConfig
from mixformer.sites import MLP, Embedding, Linear, RMSNorm, make_norm

if TYPE_CHECKING:
    from mixformer.context import Context
    from mixformer.masks import LoweredMask


def residual_std(config: TransformerConfig) -> float:
    """Initial std of projections that write to the residual stream: smaller with depth, so that it stays bounded."""
    return config.init_std / math.sqrt(2 * config.num_layers)


def qkv_parts(config: TransformerConfig) -> dict[str, int]:
    """Row blocks of a fused projection: q [n*d], then k and v [g*d]."""
    kv = config.kv_heads * config.head_width
    return {"q": config.num_heads * config.head_width, "k": kv, "v": kv}


class Attention(nn.Module):
    """Weights of self attention: sites `qkv` (parts q, k, v) and `dense`; `q_norm` and `k_norm` if configured."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        widths = qkv_parts(config)
        size, std = config.hidden_size, config.init_std
        self.qkv = Linear(size, sum(widths.values()), config.bias in ("all", "qkv", "attention"), widths, std)
        has_bias = config.bias in ("all", "except_qkv", "attention")
        self.dense = Linear(widths["q"], size, has_bias, init_std=residual_std(config))
        normed = widths if config.qk_norm_width == "all" else dict.fromkeys("qk", config.head_width)
        self.q_norm = RMSNorm(normed["q"], config.norm_eps, config.norm_cast) if config.qk_norm else None
        self.k_norm = RMSNorm(normed["k"], config.norm_eps, config.norm_cast) if config.qk_norm else None


def make_mlp(config: TransformerConfig) -> MLP:
    """The MLP that the backbone has under this config; experts and connectors make theirs alike."""
    has_bias = config.bias in ("all", "except_qkv", "mlp")
    sizes = (config.hidden_size, config.inner_size)
    return MLP(*sizes, config.gated_mlp, has_bias, config.activation, config.init_std, residual_std(config))


class Layer(nn.Module):
    """One block: weights, and what mixins put into it (`mixins`). What runs is decided by its resolved `hooks`."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.hooks: Any = None
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)
        sandwich, scale, size = config.norm_order == "sandwich", config.layer_scale, config.hidden_size
        self.attention_output_norm = make_norm(config) if sandwich else None
        self.mlp_output_norm = make_norm(config) if sandwich else None
        self.attention_scale = None if scale is None else nn.Parameter(torch.full((size,), scale))
        self.mlp_scale = None if scale is None else nn.Parameter(torch.full((size,), scale))
        self.mixins: Any = nn.ModuleDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hooks": None}

    def forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.hooks.layer_forward(hidden_states, self, ctx)


class Transformer(nn.Module):
    """Embeddings, layers and the final norm, with the defaults of the model-level hooks."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.word_embeddings = _embedding(config.vocab_size, size, config) if config.vocab_size else None
        learned = config.positions == "learned"
        self.position_embeddings = _embedding(config.max_positions, size, config) if learned else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.layers: Any = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = make_norm(config) if config.final_norm else None

    def word_embedding_forward(self, input_ids: torch.Tensor | None, ctx: Context) -> torch.Tensor:
        """Look token ids up."""
        if self.word_embeddings is None:
            raise ValueError("This model has no word embedding; a mixin must replace 'word_embedding_forward'.")
        if input_ids is None:
            raise ValueError("input_ids are missing: model(input_ids, ...) with a [b, s] tensor of token ids.")
        hidden_states = self.word_embeddings(input_ids)
        return hidden_states if self.config.embedding_scale == 1.0 else hidden_states * self.config.embedding_scale

    def position_embedding_forward(self, position_ids: torch.Tensor, ctx: Context) -> torch.Tensor | None:
        """Look positions up in the learned table, or None."""
        return None if self.position_embeddings is None else self.position_embeddings(position_ids)

    def embedding_norm_forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        """The configured norm, or nothing."""
        return hidden_states if self.embedding_norm is None else self.embedding_norm(hidden_states, ctx)

    def attention_mask_forward(self, mask: Any, ctx: Context) -> Any:
        """The mask as it is."""
        return mask

    def final_forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Tied output projection, or the hidden states themselves."""
        if self.word_embeddings is None or not self.config.tied_head:
            return hidden_states
        return F.linear(hidden_states, self.word_embeddings.weight)


def _embedding(rows: int, size: int, config: TransformerConfig) -> nn.Embedding:
    if torch.get_default_device().type == "meta":  # as of `normal`
        return Embedding(rows, size, _weight=torch.empty(rows, size))
    table = Embedding(rows, size)
    nn.init.normal_(table.weight, std=config.init_std)
    return table


def _sublayer(
    x: torch.Tensor, forward: Callable[..., torch.Tensor], norm: nn.Module, output_norm: nn.Module | None,
    scale: torch.Tensor | None, layer: Layer, ctx: Context,
) -> torch.Tensor:
    order = layer.config.norm_order
    if order == "pre" and scale is None:
        return x + forward(norm(x, ctx), layer, ctx)
    y = forward(norm(x, ctx) if order in ("pre", "sandwich") else x, layer, ctx)
    if output_norm is not None:
        y = output_norm(y, ctx)
    elif order == "res_post":
        y = norm(y, ctx)
    y = x + (y if scale is None else y * scale)
    return norm(y, ctx) if order == "post" else y


def layer_forward(hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor:
    """Self attention, then cross attention if a mixin brings one, then the MLP, each with its residual."""
    hooks = layer.hooks
    hidden_states = _sublayer(
        hidden_states, hooks.attention_forward, layer.attention_norm, layer.attention_output_norm,
        layer.attention_scale, layer, ctx,
    )
    cross = hooks.cross_attention_forward(hidden_states, layer, ctx)
    if cross is not None:
        hidden_states = hidden_states + cross
    return _sublayer(
        hidden_states, hooks.mlp_forward, layer.mlp_norm, layer.mlp_output_norm, layer.mlp_scale, layer, ctx
    )


def attention_forward(hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor:
    """The attention hooks in turn; keys are cached after `position_fn`, below every `attention_fn`."""
    hooks, attention = layer.hooks, layer.attention
    q, k, v = hooks.qkv_forward(hidden_states, layer, ctx)
    if attention.q_norm is not None and attention.k_norm is not None:
        q = attention.q_norm(q.unflatten(-1, (-1, *attention.q_norm.shape)), ctx).flatten(-2)
        k = attention.k_norm(k.unflatten(-1, (-1, *attention.k_norm.shape)), ctx).flatten(-2)
    size, (num_rows, num_tokens) = layer.config.head_width, hidden_states.shape[:2]
    q = q.view(num_rows, num_tokens, -1, size).transpose(1, 2)
    k = k.view(num_rows, num_tokens, -1, size).transpose(1, 2)
    v = v.view(num_rows, num_tokens, -1, size).transpose(1, 2)
    q, k = hooks.position_fn(q, k, layer, ctx)
    if ctx.cache is not None:
        k, v = ctx.cache.update(layer.index, k, v)
    out = hooks.attention_fn(q, k, v, ctx.mask, layer, ctx)
    return hooks.attention_output_forward(out.transpose(1, 2).flatten(2), layer, ctx)


def qkv_forward(
    hidden_states: torch.Tensor, layer: Layer, ctx: Context
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused projection, split into q, k and v."""
    return split_qkv(layer.attention.qkv(hidden_states, ctx), layer.config)


def split_qkv(fused: torch.Tensor, config: TransformerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., n*d + 2*g*d] -> q [..., n*d], k [..., g*d], v [..., g*d]."""
    size = config.head_width
    kv = config.kv_heads * size
    q, k, v = torch.split_with_sizes(fused, (config.num_heads * size, kv, kv), -1)
    return q, k, v


def position_fn(
    q: torch.Tensor, k: torch.Tensor, layer: Layer, ctx: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """No positions inside attention."""
    return q, k


def attention_fn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LoweredMask, layer: Layer, ctx: Context
) -> torch.Tensor:
    """Scaled dot product attention; grouped heads share keys and values."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.tensor, is_causal=mask.is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention_output_forward(hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor:
    """The output projection."""
    return layer.attention.dense(hidden_states, ctx)


def cross_attention_forward(hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor | None:
    """No cross attention."""
    return None


def mlp_forward(hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor:
    """The layer's own MLP."""
    return layer.mlp(hidden_states, ctx)


LAYER_DEFAULTS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        layer_forward, attention_forward, qkv_forward, position_fn, attention_fn, attention_output_forward,
        cross_attention_forward, mlp_forward,
    )
}
