"""Visual experts (arXiv:2311.03079, section 2.1): image tokens have attention and MLP weights of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import MLP, Linear
from mixformer.transformer import Layer, make_mlp, qkv_parts, residual_std, split_qkv

OldImpl = Callable[[torch.Tensor], torch.Tensor]


class AttentionExpert(nn.Module):
    """One layer's expert projections: `qkv` (fused) and `dense`."""

    def __init__(self, layer: Layer, qkv_bias: bool) -> None:
        super().__init__()
        config, widths = layer.config, qkv_parts(layer.config)
        has_bias = layer.attention.dense.bias is not None
        self.qkv = Linear(config.hidden_size, sum(widths.values()), qkv_bias, widths, config.init_std)
        self.dense = Linear(widths["q"], config.hidden_size, has_bias, init_std=residual_std(config))


class VisionExpertAttentionMixin(BaseMixin):
    """Give image tokens q, k, v and output projections of their own; scores are shared with the text.

    Args:
        qkv_bias: whether the expert's fused projection has a bias (CogVLM2: yes, the language one has none).
        from_language: start as a copy of the language weights, as the paper does.
    """

    def __init__(self, qkv_bias: bool = False, from_language: bool = True) -> None:
        super().__init__()
        self.qkv_bias, self.from_language = qkv_bias, from_language

    def build_layer(self, layer: Layer) -> nn.Module:
        expert = AttentionExpert(layer, self.qkv_bias or layer.attention.qkv.bias is not None)
        if self.from_language:
            copy_weights(layer.attention.qkv, expert.qkv)
            copy_weights(layer.attention.dense, expert.dense)
        return expert

    @wrap
    def qkv_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: OldImpl
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        expert = layer.mixins[self.name]
        return ctx.route(hidden_states, text=old_impl, image=lambda x: split_qkv(expert.qkv(x, ctx), layer.config))

    @wrap
    def attention_output_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: OldImpl
    ) -> torch.Tensor:
        expert = layer.mixins[self.name]
        return ctx.route(hidden_states, text=old_impl, image=lambda x: expert.dense(x, ctx))


class VisionExpertFCMixin(BaseMixin):
    """Give image tokens an MLP of their own.

    Args:
        from_language: start as a copy of the language weights, as the paper does.
    """

    def __init__(self, from_language: bool = True) -> None:
        super().__init__()
        self.from_language = from_language

    def build_layer(self, layer: Layer) -> MLP:
        expert = make_mlp(layer.config)
        if self.from_language:
            for name, linear in layer.mlp.named_children():
                copy_weights(linear, getattr(expert, name))
        return expert

    @wrap
    def mlp_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: OldImpl
    ) -> torch.Tensor:
        expert = layer.mixins[self.name]
        return ctx.route(hidden_states, text=old_impl, image=lambda x: expert(x, ctx))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters that both have."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in values:
            parameter.copy_(values[name])
