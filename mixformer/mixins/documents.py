"""Several documents in one row, none of which sees another (sequence packing, arXiv:2107.02027, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixformer.context import Context
from mixformer.documents import DocumentRows, attend_apart, check_document_ids, document_lengths, document_starts
from mixformer.hooks import wrap
from mixformer.masks import Causal, Documents, LoweredMask, Mask
from mixformer.mixin import BaseMixin
from mixformer.mixins.cross_attention import CrossAttentionMixin
from mixformer.mixins.image_tokens import ImageTokensMixin
from mixformer.routes import items_by_row
from mixformer.transformer import Layer

_SHORTEST = 8  # mean tokens of a document from which attention document by document is faster than with a mask


class DocumentsMixin(BaseMixin):
    """Run the documents of a row as if each had a row of its own: they see themselves alone and count from 0.

    The forward input `document_ids` [b, s] numbers the documents of a row from 1 on; 0 is padding. Without it nothing
    changes. Add this mixin last. On a CPU causal attention runs document by document, elsewhere with a mask. So does
    cross attention everywhere, each document with its own pictures; it is the one thing that has no `dynamic` plan.

    Raises:
        ValueError: when added: the model has a mixin whose inputs or results belong to rows, not to tokens.
    """

    inputs = ("document_ids",)

    def build(self, model: Any) -> None:
        self.crossing: list[str] = []
        pictures = any(isinstance(mixin, ImageTokensMixin) for mixin in model.mixins.values())
        for name, mixin in model.mixins.items():
            crosses, known = "cross_attention_forward" in mixin.hooks(), isinstance(mixin, CrossAttentionMixin)
            if mixin.whole_sequence or (crosses and not (known and pictures)):
                what = "gives one result for each row" if mixin.whole_sequence else "attends to features of whole rows"
                raise ValueError(f"Mixin '{name}' {what}: rows cannot be packed from documents here, so pad instead.")
            self.crossing += [name] * known
        self.attends = not any("attention_fn" in mixin.hooks() for mixin in model.mixins.values())

    def plan(self, ctx: Context) -> None:
        ids = ctx.inputs.get("document_ids")
        if ids is None:
            return
        assert ctx.input_ids is not None and ctx.position_steps is not None
        check_document_ids(ids, ctx.input_ids)
        if ctx.cache is not None:
            raise ValueError("Packed documents cannot be continued: give each a row of its own to use a cache.")
        steps = ctx.position_steps
        counted = steps.cumsum(1)
        counted = counted - (counted - steps).gather(1, document_starts(ids))
        ctx.position_steps = counted.diff(dim=1, prepend=torch.zeros_like(counted[:, :1]))
        for key, places in list(ctx.shared.items()):
            if key.endswith(".places"):
                self._plan_pictures(ids, places.view(len(ctx.shared["image_rows"]), -1), ctx)
        ctx.shared[f"{self.name}.planned"] = frozenset(ctx.shared)
        padded = ctx.valid is None or torch.equal(ctx.valid, ids > 0)
        if self.attends and padded and not ctx.dynamic and ids.device.type == "cpu":
            lengths = document_lengths(ids)
            if len(lengths) * _SHORTEST <= ids.numel():
                ctx.shared[f"{self.name}.lengths"] = lengths

    def _plan_pictures(self, ids: torch.Tensor, spans: torch.Tensor, ctx: Context) -> None:
        owners = ids.flatten()[spans]
        wrong = ((owners != owners[:, :1]).any(1) | (owners[:, 0] == 0)).nonzero().flatten()
        if wrong.numel():
            found = sorted(set(owners[int(wrong[0])].tolist()))
            raise ValueError(f"Picture {int(wrong[0])} of the batch lies in documents {found}; it belongs into one.")
        crossing = [name for name in self.crossing if f"{name}.rows" in ctx.shared]
        if crossing and ctx.dynamic:
            raise ValueError("Cross attention of packed documents has no plan with `dynamic`: plan without it, or pad.")
        if crossing:
            rows = ctx.shared[f"{self.name}.rows"] = DocumentRows.of(ids, spans[:, 0])
            for name in crossing:
                ctx.shared[f"{name}.rows"] = items_by_row(rows.owners, len(rows.slots))

    def before_forward(self, ctx: Context) -> None:
        planned = ctx.shared.get(f"{self.name}.planned")
        for key in ctx.shared:
            if planned is not None and key.endswith((".places", ".rows")) and key not in planned:
                raise ValueError(
                    f"Mixin '{key.split('.')[0]}' was added after '{self.name}'. Take '{self.name}' out with "
                    f"del_mixin and add it again, so that it comes last."
                )

    @wrap
    def attention_mask_forward(self, mask: Mask, ctx: Context, old_impl: Callable[[Mask], Mask]) -> Mask:
        ids, below = ctx.inputs.get("document_ids"), old_impl(mask)
        if ids is None:
            return below
        if type(below) is not Causal:
            ctx.shared.pop(f"{self.name}.lengths", None)
        return below & Documents(ids)

    @wrap
    def attention_fn(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LoweredMask, layer: Layer, ctx: Context,
        old_impl: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        lengths = ctx.shared.get(f"{self.name}.lengths")
        if lengths is None or mask is not ctx.mask or torch.compiler.is_compiling():
            return old_impl(q, k, v, mask)
        causal = LoweredMask(is_causal=True)
        return attend_apart(lambda *qkv: old_impl(*qkv, causal), q, k, v, lengths)

    @wrap
    def cross_attention_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor | None:
        rows: DocumentRows | None = ctx.shared.get(f"{self.name}.rows")
        if rows is None:
            return old_impl(hidden_states)
        found = old_impl(rows.take(hidden_states))
        return None if found is None else rows.put(found, hidden_states)
