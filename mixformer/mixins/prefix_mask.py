"""Prefix-LM attention: the prefix sees itself whole, the rest is causal (arXiv:2108.10904, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixformer.context import Context
from mixformer.documents import DocumentPrefix, document_starts
from mixformer.hooks import wrap
from mixformer.masks import Mask, WholePrefix
from mixformer.mixin import BaseMixin


class PrefixMaskMixin(BaseMixin):
    """Let the tokens of each row's prefix attend to one another in both directions.

    With a cache, a prefix must come as a whole in the first chunk of its row; lengths count from the row's first token.

    Args:
        prefix: `images`: the prefix ends with the row's last image token (GIT); `given`: it has as many real tokens as
            the forward input `prefix_lengths` [b] says (SimVLM), or ends with the last image token where that input is
            left out.

    In packed rows (see `DocumentsMixin`) every document has a prefix of its own; `prefix_lengths` are [b, documents].

    Raises:
        ValueError: another kind of prefix.
    """

    def __init__(self, prefix: str = "images") -> None:
        super().__init__()
        if prefix not in ("images", "given"):
            raise ValueError(f"PrefixMaskMixin: prefix is 'images' or 'given', not {prefix!r}.")
        self.prefix = prefix
        self.inputs = ("prefix_lengths",) if prefix == "given" else ()

    def plan(self, ctx: Context) -> None:
        lengths = ctx.inputs.get("prefix_lengths") if self.inputs else None
        if lengths is None:
            return
        assert ctx.input_ids is not None
        rows, num_tokens = ctx.input_ids.shape
        documents = ctx.inputs.get("document_ids")
        if documents is not None:
            ctx.shared[f"{self.name}.within"] = _within_documents(lengths, documents)
            return
        if lengths.shape != (rows,):
            raise ValueError(f"prefix_lengths must be [b], one number a row; got shape {tuple(lengths.shape)}.")
        earlier = 0 if ctx.cache is None else ctx.cache.offset
        real = torch.ones_like(ctx.input_ids) if ctx.valid is None else ctx.valid[:, : earlier + num_tokens]
        counted = real.cumsum(1) + (earlier if ctx.valid is None else 0)
        before = counted[:, -num_tokens] - real[:, -num_tokens].long()
        if bool(((lengths > counted[:, -1]) | ((before > 0) & (lengths > before))).any()):
            raise ValueError(
                f"prefix_lengths {lengths.tolist()} do not fit rows of {counted[:, -1].tolist()} tokens, of which "
                f"{before.tolist()} were there before: a prefix comes as a whole, in the first chunk of its row."
            )
        ctx.shared[f"{self.name}.within"] = counted[:, -num_tokens:] <= lengths[:, None]

    @wrap
    def attention_mask_forward(self, mask: Mask, ctx: Context, old_impl: Callable[[Mask], Mask]) -> Mask:
        within, earlier = ctx.shared.get(f"{self.name}.within"), 0 if ctx.cache is None else ctx.cache.offset
        documents = ctx.inputs.get("document_ids")
        if documents is not None:
            if within is None and "image_rows" in ctx.shared:
                within = _up_to_images(ctx.shared["image_rows"], ctx.shared["image_ends"], documents)
            return old_impl(mask) if within is None else old_impl(mask) | DocumentPrefix(documents, within)
        if within is not None:
            return old_impl(mask) | WholePrefix(within.sum(1) + earlier)
        if "image_rows" not in ctx.shared:
            return old_impl(mask)
        if isinstance(earlier, int) and earlier:
            raise ValueError("Pictures came after tokens that should see them whole: give a prefix in the first chunk.")
        assert ctx.input_ids is not None
        rows, ends = ctx.shared["image_rows"], ctx.shared["image_ends"] + 1
        return old_impl(mask) | WholePrefix(torch.zeros_like(ctx.input_ids[:, 0]).scatter_reduce(0, rows, ends, "amax"))


def _within_documents(lengths: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[b, documents] lengths of prefixes, and [b, s] ids -> [b, s] bool, True on prefixes."""
    rows, most = len(documents), int(documents.max())
    if lengths.dim() != 2 or lengths.shape[0] != rows or lengths.shape[1] < most:
        raise ValueError(
            f"prefix_lengths of packed rows must be [b, documents], here at least ({rows}, {most}); got shape "
            f"{tuple(lengths.shape)}."
        )
    places, real = (documents - 1).clamp_min(0), documents > 0
    counts = torch.zeros_like(lengths).scatter_add(1, places, real.to(lengths.dtype))
    if bool((lengths > counts).any()):
        raise ValueError(f"prefix_lengths {lengths.tolist()} do not fit documents of {counts.tolist()} tokens.")
    slots = torch.arange(documents.shape[1], device=documents.device)
    return (slots - document_starts(documents) < lengths.gather(1, places)) & real


def _up_to_images(rows: torch.Tensor, ends: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[m] row and last slot of each image, and [b, s] ids -> [b, s] bool, True up to the last image of a document."""
    num_rows, num_tokens = documents.shape
    owners = rows * (num_tokens + 1) + documents[rows, ends]
    last = ends.new_zeros(num_rows * (num_tokens + 1)).scatter_reduce(0, owners, ends + 1, "amax")
    slots = torch.arange(num_tokens, device=ends.device)
    return slots < last.view(num_rows, -1).gather(1, documents)
