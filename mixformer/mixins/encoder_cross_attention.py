"""Cross attention to given features: a decoder's side of an encoder and decoder (arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.mixins.feature_attention import FeatureAttentionMixin


class EncoderCrossAttentionMixin(FeatureAttentionMixin):
    """Let every token attend to `encoder_hidden_states` [b, N, c]; `encoder_attention_mask` [b, N] is 1 on real ones.

    Options as of `FeatureAttentionMixin`. With a cache, give the features with the first chunk only; others that come
    with a later chunk are seen beside them.
    """

    inputs = ("encoder_hidden_states", "encoder_attention_mask")

    def plan(self, ctx: Context) -> None:
        if not set(self.inputs) & ctx.inputs.keys():
            return
        features, mask = ctx.require("encoder_hidden_states"), ctx.inputs.get("encoder_attention_mask")
        assert ctx.input_ids is not None
        rows, shape = len(ctx.input_ids), tuple(features.shape)
        if len(shape) != 3 or shape[0] != rows:
            raise ValueError(f"encoder_hidden_states must be [b, N, c] with b = {rows}, as input_ids; got {shape}.")
        if mask is not None and mask.shape != shape[:2]:
            raise ValueError(f"encoder_attention_mask must be [b, N], here {shape[:2]}; got {tuple(mask.shape)}.")
        ctx.shared[f"{self.name}.masked"] = mask is not None and (ctx.dynamic or not bool(mask.all()))

    def before_forward(self, ctx: Context) -> None:
        masked, valid = ctx.shared.get(f"{self.name}.masked"), None
        if masked is None or ctx.input_ids is None:
            self.give(None, None, ctx)
            return
        features = ctx.require("encoder_hidden_states")
        torch._check(features.shape[0] == ctx.input_ids.shape[0])  # a compiled graph does not know of the plan's checks
        if masked:
            valid = ctx.require("encoder_attention_mask").bool()
            torch._check(valid.shape[0] == features.shape[0])
            torch._check(valid.shape[1] == features.shape[1])
        self.give(features, valid, ctx)
