"""Attention masks as descriptions, lowered to tensors as late as possible. True means: may attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


class Mask:
    """A description; combine with & and |. Everything is counted in token slots, never in position ids."""

    def __and__(self, other: Mask) -> Mask:
        return _Combined(self, other, torch.logical_and)

    def __or__(self, other: Mask) -> Mask:
        return _Combined(self, other, torch.logical_or)

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Slots of the queries [s] and of the keys [t] -> bool, broadcastable to [b, s, t]."""
        raise TypeError(f"{type(self).__name__} must define allowed(query, key).")


class Full(Mask):
    """Every token attends to every token."""

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.ones(1, query.shape[0], key.shape[0], dtype=torch.bool, device=query.device)


class Causal(Mask):
    """Each token attends to itself and what comes before."""

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key[None, :] <= query[:, None])[None]


class Prefix(Mask):
    """Every token attends to the first tokens of its row.

    Args:
        lengths: [b] prefix lengths in slots.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key[None, None, :] < self.lengths[:, None, None]).expand(-1, query.shape[0], -1)


class WholePrefix(Prefix):
    """The first tokens of each row attend to one another; what others may see is not widened. Arguments as `Prefix`."""

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return super().allowed(query, key) & (query[None, :, None] < self.lengths[:, None, None])


class Padding(Mask):
    """Nobody attends to padding; a padded slot attends to itself so that its softmax stays finite.

    Args:
        valid: [b, t] bool, True on real tokens.
    """

    def __init__(self, valid: torch.Tensor) -> None:
        self.valid = valid

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.valid[:, None, : key.shape[0]] | (key[None, :] == query[:, None])[None]


def checked_padding(input_ids: torch.Tensor | None, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """[b, s] bool, True on real tokens, or None where all are.

    Raises:
        ValueError: a mask of another shape than the ids.
    """
    if input_ids is None or attention_mask.shape != input_ids.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(
            f"attention_mask marks padding and must have the shape of input_ids, {shape}; got "
            f"{tuple(attention_mask.shape)}. Other masks: wrap 'attention_mask_forward'."
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


class Documents(Mask):
    """Tokens attend within their own document.

    Args:
        document_ids: [b, t] int.
    """

    def __init__(self, document_ids: torch.Tensor) -> None:
        self.document_ids = document_ids

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        ids = self.document_ids
        return ids[:, query][:, :, None] == ids[:, key][:, None, :]


class LastImage(Mask):
    """Tokens attend to text, and among images only to the last one at or before them (arXiv:2204.14198, 3.1.3).

    Args:
        image_ids: [b, t] int, k > 0 on the tokens of a row's k-th image, 0 on text.
    """

    def __init__(self, image_ids: torch.Tensor) -> None:
        self.image_ids = image_ids
        self.latest = image_ids.cummax(1).values

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        ids = self.image_ids[:, key][:, None, :]
        return (ids == 0) | (ids == self.latest[:, query][:, :, None])


class _Combined(Mask):
    def __init__(self, first: Mask, second: Mask, operation: object) -> None:
        self.first, self.second, self.operation = first, second, operation

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.operation(self.first.allowed(query, key), self.second.allowed(query, key))  # type: ignore[operator]


@dataclass
class LoweredMask:
    """What attention gets: a boolean tensor, or the knowledge that none is needed.

    Attributes:
        tensor: bool, or a bias added to the scores, broadcastable to [b, n, s, t]; or None.
        is_causal: use SDPA's own causal mask (only when s == t and there is no tensor).
    """

    tensor: torch.Tensor | None = None
    is_causal: bool = False

    def prepend(self, num_keys: int, q: torch.Tensor, k: torch.Tensor) -> LoweredMask:
        """The mask for keys with `num_keys` always visible ones put before them.

        Args:
            num_keys: how many keys were prepended.
            q: [b, n, s, d].
            k: [b, g, t, d], without the prepended keys.
        """
        tensor = self.tensor
        if tensor is None and not self.is_causal:
            return self
        if tensor is None:
            slots = torch.arange(q.shape[2], device=q.device)
            tensor = Causal().allowed(slots, slots)[:, None]
        return LoweredMask(F.pad(tensor, (num_keys, 0), value=tensor.dtype == torch.bool))  # a bias of 0 otherwise


def lower(
    mask: Mask, num_queries: int, num_keys: int, offset: int | torch.Tensor, device: torch.device
) -> LoweredMask:
    """Turn a description into what attention gets.

    Args:
        mask: the description.
        num_queries: s.
        num_keys: t, the slots attended over.
        offset: slot of the first query: tokens already in the cache (an int, or a 0-dim tensor for static caches).
        device: where attention runs.
    """
    if isinstance(offset, int):
        if isinstance(mask, Full):
            return LoweredMask()
        if type(mask) is Causal:
            if num_queries == num_keys:
                return LoweredMask(is_causal=True)
            if num_queries == 1 and offset + 1 == num_keys:
                return LoweredMask()
    query = torch.arange(num_queries, device=device) + offset
    return LoweredMask(mask.allowed(query, torch.arange(num_keys, device=device))[:, None])
