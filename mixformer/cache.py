"""KVCache: keys and values of the tokens so far, preallocated and written in place."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mixformer.context import Context
    from mixformer.model import BaseModel


class KVCache:
    """Keys (after `position_fn`) and values per layer, which slots are real tokens, and each row's next position.

    Image tokens share a position, so the next position does not follow from the length; both are kept. `memo`
    holds what a mixin computes once per conversation, such as the keys and values of cross attention.

    In `memo`, zero means absent: tensors have the rows first, and where rows of different conversations are brought
    together, a tensor is filled with zeros at the end of every axis up to the largest row's size, and for rows
    without it. A bool holds for all rows; it becomes False where some lack it or anything is filled. Other
    values must be the same for all rows.

    Args:
        model: for the number of layers and the head sizes.
        batch_size: b.
        capacity: slots per row; a longer sequence is an error.
        dtype: of keys and values; the model's own by default.
        static: in compiled graphs keep shapes fixed (attention runs over the whole capacity), so that one graph serves
            every step. Uncompiled forwards attend over what is used.
    """

    def __init__(
        self, model: BaseModel, batch_size: int, capacity: int, dtype: torch.dtype | None = None, static: bool = False
    ) -> None:
        config = model.config
        shape = (batch_size, config.kv_heads, capacity, config.head_width)
        options: Any = {"device": model.device, "dtype": dtype or model.dtype}
        self.keys = [torch.zeros(shape, **options) for _ in range(config.layers_run)]
        self.values = [torch.zeros(shape, **options) for _ in range(config.layers_run)]
        self.batch_size, self.capacity, self.static = batch_size, capacity, static
        self._length = 0
        self.cursor = torch.zeros((), dtype=torch.int64, device=model.device)
        self.valid: torch.Tensor | None = None
        self.next_position = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self.memo: dict[str, Any] = {}
        self.usual_positions = True  # one position per real token so far, so that none reaches the capacity

    @property
    def length(self) -> int:
        """Slots in use, the same for all rows (left padding included)."""
        return int(self.cursor) if self.static else self._length

    @property
    def lengths(self) -> torch.Tensor:
        """[b] real tokens of each row."""
        if self.valid is None:
            return torch.full((self.batch_size,), self.length, device=self.next_position.device)
        return self.valid[:, : self.length].sum(1)

    @property
    def offset(self) -> int | torch.Tensor:
        """Slot of the next token: an int, or a 0-dim tensor in a graph compiled for a static cache."""
        return self.cursor if self._in_static_graph() else self._length

    def _in_static_graph(self) -> bool:
        return self.static and torch.compiler.is_compiling()

    def reserve(self, batch_size: int, num_tokens: int) -> int:
        """Check that the next tokens fit; returns the number of key slots that attention will see.

        Raises:
            ValueError: another batch size, or no room.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"The cache was made for {self.batch_size} rows, but the batch has {batch_size}.")
        if self._in_static_graph():  # how much is used is not known there
            return self.capacity
        self._length = self.length
        if self._length + num_tokens > self.capacity:
            raise ValueError(
                f"The cache holds {self.capacity} tokens per row; {self._length} are used and {num_tokens} more do not "
                f"fit. Make it larger: KVCache(model, batch_size, capacity={self._length + num_tokens})."
            )
        return self.num_keys(num_tokens)

    def num_keys(self, num_tokens: int) -> int:
        """Key slots that attention sees once the next tokens are in."""
        return self.capacity if self._in_static_graph() else self._length + num_tokens

    def update(self, layer_index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [b, g, s, d] behind what is there and return all keys and values, [b, g, t, d]."""
        keys, values = self.keys[layer_index], self.values[layer_index]
        num_tokens = k.shape[2]
        if self._in_static_graph():
            slots = self.cursor + torch.arange(num_tokens, device=k.device)
            keys.index_copy_(2, slots, k.to(keys.dtype))
            values.index_copy_(2, slots, v.to(values.dtype))
            return keys, values
        start, end = self._length, self._length + num_tokens
        keys.narrow(2, start, num_tokens).copy_(k)
        values.narrow(2, start, num_tokens).copy_(v)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def mark(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """Which slots are real once the next tokens are in, [b, capacity] bool, or None without any padding."""
        if attention_mask is None and self.valid is None:
            return None
        if self.valid is None:
            self.valid = torch.ones(
                self.batch_size, self.capacity, dtype=torch.bool, device=self.next_position.device
            )
        if not self._in_static_graph():  # there the slots ahead are real already
            real = True if attention_mask is None else attention_mask
            self.valid[:, self._length : self._length + num_tokens] = real
        return self.valid

    def advance(self, num_tokens: int, ctx: Context) -> None:
        """Count the tokens of a finished forward, at the positions that its context says."""
        if self.static:
            self.cursor.add_(num_tokens)
        if not self._in_static_graph():
            self._length += num_tokens
        known, following = ctx.known_positions, ctx.following
        if known is not None and known[2] and known[0] is ctx.position_ids:
            self.next_position.add_(num_tokens)
        elif following is not None and following[0] is ctx.position_ids:
            self.next_position.copy_(following[1])
        elif ctx.position_ids is not None:
            self.next_position.copy_(ctx.position_ids.amax(1) + 1)

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) rows, in the order given: beam search, finished rows."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.next_position = self.next_position.index_select(0, rows)
        self.valid = None if self.valid is None else self.valid.index_select(0, rows)
        self.memo = _memo_rows(self.memo, rows)
        self.batch_size = rows.shape[0]

    def copy(
        self, rows: torch.Tensor | None = None, capacity: int | None = None, static: bool | None = None
    ) -> KVCache:
        """A cache of its own with the same tokens.

        Args:
            rows: [n] rows to copy, in the order given, some of them several times; None for all.
            capacity: slots per row of the copy; None for as many.
            static: whether the copy is a static cache; None for as this one.

        Raises:
            ValueError: the tokens do not fit into `capacity`.
        """
        if rows is None:
            rows = torch.arange(self.batch_size, device=self.next_position.device)
        made = copy.copy(self)
        made.capacity = self.capacity if capacity is None else capacity
        if made.capacity < self.length:
            raise ValueError(f"{self.length} tokens per row do not fit into a copy with capacity={capacity}.")
        made.batch_size = rows.shape[0]
        made.keys = [made._with_room(keys, rows) for keys in self.keys]
        made.values = [made._with_room(values, rows) for values in self.values]
        made.valid = None if self.valid is None else made._with_room(self.valid, rows)
        made.static = self.static if static is None else static
        made._length = self.length
        made.cursor = torch.full_like(self.cursor, made._length)
        made.next_position = self.next_position.index_select(0, rows)
        made.memo = _memo_rows(self.memo, rows)
        return made

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots per row, if there are fewer. A graph compiled for a static cache is then
        compiled again.
        """
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for tensors in (self.keys, self.values):
            for index, stored in enumerate(tensors):
                tensors[index] = self._with_room(stored)
        self.valid = None if self.valid is None else self._with_room(self.valid)

    def _with_room(self, stored: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """What some rows use of [b, g, t, d] or [b, t], in a tensor whose t is `capacity`."""
        axis = 2 if stored.dim() == 4 else 1
        used = stored.narrow(axis, 0, self.length)
        used = used if rows is None else used.index_select(0, rows)
        shape = [used.shape[0], *stored.shape[1:]]
        shape[axis] = self.capacity
        new = stored.new_ones(shape) if stored.dtype == torch.bool else stored.new_zeros(shape)
        new.narrow(axis, 0, self.length).copy_(used)
        return new

    def crop(self, length: int) -> None:
        """Keep the first `length` slots of every row and drop the rest. 0 empties the cache, `memo` included.

        Drop text only: a dropped token moves the next position of its row back by one, and `memo` stays. Tokens of
        pictures share positions, and cross attention would go on to see theirs; the cache does not know which
        slots are pictures and refuses only what would lead to impossible positions.

        Raises:
            ValueError: `length` is negative or more than is used, or pictures would be cut.
        """
        used = self.length
        if not 0 <= length <= used:
            raise ValueError(f"The cache uses {used} slots per row and cannot be cropped to {length}.")
        if length == 0:
            self.valid = None
            self.memo.clear()
            self.usual_positions = True
            self.next_position.zero_()
        elif length < used:
            valid = self.valid
            if valid is None:
                valid = torch.ones(self.batch_size, used, dtype=torch.bool, device=self.next_position.device)
            next_position = self.next_position - valid[:, length:used].sum(1)
            if bool((next_position < valid[:, :length].any(1)).any()):
                raise ValueError(
                    f"Cropping from {used} to {length} slots would cut into a picture, whose tokens share positions. "
                    f"Crop behind the last picture, or to 0."
                )
            self.next_position.copy_(next_position)
            valid[:, length:] = True
        self._length = length
        if self.static:
            self.cursor.fill_(length)


def _memo_rows(memo: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {
        key: value.index_select(0, rows) if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in memo.items()
    }
