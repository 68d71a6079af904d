"""Batches whose rows begin alike: a shared system prompt, or questions about one picture, run once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixformer.cache import KVCache
from mixformer.model import BaseModel


@torch.no_grad()
def share_prefix(
    model: BaseModel, batch: Mapping[str, Any], max_new_tokens: int = 256
) -> tuple[KVCache, dict[str, Any]]:
    """Run what all rows of a batch begin with once, for `generate(model, rest, max_new_tokens, cache=cache)`.

    Rows share leading tokens that are equal, with equal pictures; a picture is shared as a whole or not at all, and
    at least the last token of each row remains. In models with cross attention every token sees all pictures of its
    row, so there rows share nothing unless they have the same pictures and share the places of all of them.

    Args:
        model: a language model that runs token by token.
        batch: what the processor returns, padded on the left. Further inputs must be [b, s] for anything to be
            shared.
        max_new_tokens: room for so many tokens per row.

    Returns:
        cache: holds the shared tokens for each row; empty if there are none.
        rest: the batch without them, padded on the left, and without the pictures that were run.

    Raises:
        ValueError: padding elsewhere than on the left.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    ids = given["input_ids"]
    num_rows, width = ids.shape
    mask = given.get("attention_mask")
    lengths = torch.full((num_rows,), width, device=ids.device) if mask is None else mask.bool().sum(1)
    starts = width - lengths
    if mask is not None and not torch.equal(mask.bool(), torch.arange(width, device=ids.device) >= starts[:, None]):
        raise ValueError("attention_mask has padding that is not on the left. Pad prompts on the left.")
    per_token = [name for name, value in given.items() if value.shape == ids.shape and name != "attention_mask"]
    slots = starts[:, None] + torch.arange(max(int(lengths.min()) - 1, 0), device=ids.device)
    heads = {name: given[name].gather(1, slots) for name in per_token}
    length, num_pictures = _common(given, heads)
    if length == 0:
        return KVCache(model, num_rows, width + max_new_tokens), given
    first = {name: head[:1, :length] for name, head in heads.items()}
    rest_width = int(lengths.max()) - length
    real = torch.arange(rest_width, device=ids.device) >= rest_width - (lengths - length)[:, None]
    rest = {name: torch.where(real, given[name][:, width - rest_width :], 0) for name in per_token}
    rest["attention_mask"] = real.long()
    if "images" in given:
        counts = _pictures_per_row(given)
        assert counts is not None
        place = torch.arange(len(given["images"]), device=ids.device)
        remaining = place - (counts.cumsum(0) - counts).repeat_interleave(counts) >= num_pictures
        if num_pictures:
            first["images"] = given["images"][:num_pictures]
        if bool(remaining.any()):
            rest["images"] = given["images"][remaining]
    if "cross_images" in given:
        first["cross_images"] = given["cross_images"][: len(given["cross_images"]) // num_rows]
    one = KVCache(model, 1, length)
    model(**first, cache=one, last_only=True)
    rows = torch.zeros(num_rows, dtype=torch.int64, device=ids.device)
    return one.copy(rows, length + rest_width + max_new_tokens), rest


def _common(given: dict[str, Any], heads: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many leading tokens all rows share, and how many pictures lie in them.

    Args:
        given: the batch.
        heads: {name: [b, k]} the leading tokens of each row without padding, one fewer than the shortest row has.
    """
    num_rows, longest = heads["input_ids"].shape
    others = set(given) - set(heads) - {"attention_mask", "images", "cross_images"}
    if num_rows == 1 or longest == 0 or others:
        return 0, 0
    equal = torch.stack([(head == head[:1]).all(0) for head in heads.values()]).all(0)
    length = int(equal.long().cumprod(0).sum())
    images, cross_images = given.get("images"), given.get("cross_images")
    counts = _pictures_per_row(given)
    if counts is None:
        return 0, 0  # the model says what is wrong
    num_pictures = 0
    if images is not None:
        span = int((given["token_type_ids"] != 0).sum()) // len(images)
        firsts = counts.cumsum(0) - counts
        places = (heads["token_type_ids"][0, :length] != 0).nonzero().flatten()[::span].tolist()
        for index, place in enumerate(places):
            if place + span > length or not bool((images[firsts + index] == images[firsts[0] + index]).all()):
                length = place
                break
            num_pictures += 1
    if cross_images is not None:
        by_row = cross_images.view(num_rows, -1, *cross_images.shape[1:]) if bool((counts == counts[0]).all()) else None
        placed = images is None or num_pictures == int(counts[0])
        if by_row is None or not placed or not bool((by_row == by_row[:1]).all()):
            return 0, 0
    return length, num_pictures


def _pictures_per_row(given: dict[str, Any]) -> torch.Tensor | None:
    """[b] how many pictures each row has, or None if they do not fit their places."""
    ids, images, cross_images = given["input_ids"], given.get("images"), given.get("cross_images")
    types = given.get("token_type_ids", torch.zeros_like(ids))
    marked = (types != 0).sum(1)
    total = int(marked.sum())
    if images is None:
        counts = torch.full_like(marked, 0 if cross_images is None else 1)
        return counts if total == 0 and (cross_images is None or len(cross_images) == len(ids)) else None
    fits = total > 0 and total % len(images) == 0 and not bool((marked % (total // len(images))).any())
    if not fits or (cross_images is not None and len(cross_images) != len(images)):
        return None
    return marked // (total // len(images))
