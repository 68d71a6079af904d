"""BaseModel: a backbone and a list of named mixins that can be changed while it lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from mixformer.cache import KVCache
from mixformer.config import TransformerConfig
from mixformer.context import Context
from mixformer.dynamic import mark_dynamic
from mixformer.hooks import did_you_mean
from mixformer.host import MixinHost
from mixformer.masks import Causal, Full, Padding, checked_padding, lower
from mixformer.objectives import Objective, Trained

_OWN_INPUTS = ("input_ids", "attention_mask", "position_ids", "cache")


@dataclass
class Output:
    """What a forward gives.

    Attributes:
        logits: [b, s, v] ([b, 1, v] with `last_only`; the features of a tower).
        hidden: {layer index: [b, s, h] after that layer} for the layers asked for; also "embeddings" and "final".
        losses, outputs: auxiliary losses of mixins, and what they give beside the logits.
    """

    logits: torch.Tensor
    hidden: dict[int | str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class BaseModel(MixinHost):
    """A transformer whose behaviour is its backbone's plus its mixins'.

    Subclasses name their config class in `Config`, what they are trained for in `objective`, what is trained when in
    `stages`, and add their mixins in `compose`.

    Args:
        config: sizes and options.
        device: where parameters are made; `meta` makes shapes only.
        dtype: of parameters; torch's default dtype if None.
        generator: gives the seed of all initial weights. Without one the seed is `torch.initial_seed()`, which is
            read and not advanced. No other random state is touched.
    """

    Config: ClassVar[type[TransformerConfig]] = TransformerConfig
    objective: ClassVar[Objective | None] = None
    stages: ClassVar[dict[str, Trained]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):
            cls.Config.model_class = cls

    def __init__(
        self,
        config: TransformerConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if generator is None:
            seed = torch.initial_seed()
        else:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        device = torch.device(device or torch.get_default_device())
        super().__init__(config or self.Config(), device, dtype or torch.get_default_dtype(), seed)
        self.compose()

    def compose(self) -> None:
        """Add the mixins that make this model. The plain backbone has none."""

    def plan(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        dynamic: bool = False,
        **inputs: Any,
    ) -> Context:
        """Everything about a batch that integers tell: positions, mask, routes. `forward(..., plan=...)` takes it.

        A collator can do this outside a compiled graph; otherwise `forward` does it. Arguments as of `forward`.
        With `dynamic`, sizes that differ from batch to batch are marked, so that a few graphs of `torch.compile`
        serve all batches.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        for name in inputs:
            if name not in self.declared:
                near = did_you_mean(name, [*self.declared, *_OWN_INPUTS])
                declared = ", ".join(self.declared) or "none"
                raise TypeError(f"{type(self).__name__} has no input '{name}'.{near} Its mixins declare: {declared}.")
        if attention_mask is not None:
            attention_mask = checked_padding(input_ids, attention_mask)
        ctx = Context(input_ids, attention_mask, position_ids, cache, given, self.declared)
        ctx.dynamic = dynamic
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [b, s]; got shape {tuple(input_ids.shape)}.")
        ctx.mask = Causal() if self.config.causal else Full()
        if cache is not None and input_ids is not None:
            cache.reserve(*input_ids.shape)
            ctx.valid = cache.mark(attention_mask, input_ids.shape[1])
        for mixin in self.mixins.values():
            mixin.plan(ctx)
        ctx.fill_positions()
        if dynamic:
            mark_dynamic(ctx)
        return ctx

    def run(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        plan: Context | None = None,
        last_only: bool = False,
        hidden_layers: Sequence[int | str] = (),
        **inputs: Any,
    ) -> Output:
        """Run the model and return more than logits.

        Args:
            input_ids: [b, s] token ids; None in towers.
            attention_mask: [b, s], marks padding only (True or 1 on real tokens).
            position_ids: [b, s]; by default they follow from `attention_mask` and the inputs.
            cache: where keys and values are kept; the tokens given come after those in it.
            plan: what `plan` returned for these arguments.
            last_only: logits of the last slot only.
            hidden_layers: layers whose output to return; "embeddings" and "final" (after the final norm) as well.
            **inputs: what the mixins declare.

        Raises:
            TypeError: an input that no mixin declares.
            ValueError: inputs that do not fit each other.
        """
        for place in hidden_layers:
            if place not in ("embeddings", "final", *range(self.config.layers_run)):
                last = self.config.layers_run - 1
                raise ValueError(f"hidden_layers: {place!r} is none of 0 to {last}, 'embeddings' or 'final'.")
        if plan is None:
            ctx = self.plan(input_ids, attention_mask, position_ids, cache, **inputs)
        else:
            ctx = plan.started({name: value for name, value in inputs.items() if value is not None})
        for mixin in self.mixins.values():
            mixin.before_forward(ctx)
        hooks: Any = self.hooks
        hidden_states = hooks.word_embedding_forward(ctx.input_ids, ctx)
        num_tokens = hidden_states.shape[1]
        if ctx.position_ids is None:
            ctx.position_ids = torch.arange(num_tokens, device=hidden_states.device)[None]
        positions = hooks.position_embedding_forward(ctx.position_ids, ctx)
        if positions is not None:
            hidden_states = hidden_states + positions
        hidden_states = hooks.embedding_norm_forward(hidden_states, ctx)
        mask, cache = hooks.attention_mask_forward(ctx.mask, ctx), ctx.cache
        mask = mask & Padding(ctx.valid) if ctx.valid is not None else mask
        num_keys, offset = (num_tokens, 0) if cache is None else (cache.num_keys(num_tokens), cache.offset)
        ctx.mask = lower(mask, num_tokens, num_keys, offset, hidden_states.device)
        hidden: dict[int | str, torch.Tensor] = {"embeddings": hidden_states}
        recomputed = self.config.checkpoint_activations and torch.is_grad_enabled()
        for index, layer in zip(range(self.config.layers_run), self.transformer.layers, strict=False):
            if recomputed:
                hidden_states = checkpoint(_run_apart, layer, hidden_states, ctx, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, ctx)
            if index in hidden_layers:
                hidden[index] = hidden_states
        if self.transformer.final_norm is not None:
            hidden_states = self.transformer.final_norm(hidden_states, ctx)
        hidden["final"] = hidden_states
        if last_only and not self.whole_sequence:
            hidden_states = hidden_states[:, -1:]
        logits = hooks.final_forward(hidden_states, ctx)
        if cache is not None:
            cache.advance(num_tokens, ctx)
        return Output(logits, {key: hidden[key] for key in hidden_layers}, ctx.losses, ctx.outputs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        plan: Context | None = None,
        last_only: bool = False,
        **inputs: Any,
    ) -> torch.Tensor:
        """Logits [b, s, v]; arguments as of `run`."""
        return self.run(
            input_ids, attention_mask, position_ids, cache, plan=plan, last_only=last_only, **inputs
        ).logits


def _run_apart(layer: nn.Module, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
    """A layer with a context of its own: compiled checkpoints may not change what lies outside of them."""
    own = ctx.started(ctx.inputs)
    own.losses, own.outputs = ctx.losses, ctx.outputs
    return layer(hidden_states, own)


BaseModel.Config.model_class = BaseModel
