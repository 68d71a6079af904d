"""KVCache: keys and values of the tokens so far, preallocated and written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mixformer.model import BaseModel


class KVCache:
    """Keys (after `position_fn`) and values per layer, which slots are real tokens, and each row's next position.

    Image tokens share a position, so the next position does not follow from the length; both are kept. `memo`
    holds what a mixin computes once per conversation, such as the keys and values of cross attention.

    Args:
        model: for the number of layers and the head sizes.
        batch_size: b.
        capacity: slots per row; a longer sequence is an error.
        dtype: of keys and values; the model's own by default.
        static: keep shapes fixed (attention runs over the whole capacity), for compiled decoding.
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
        """Slot of the next token: an int, or a 0-dim tensor in a static cache."""
        return self.cursor if self.static else self._length

    def reserve(self, batch_size: int, num_tokens: int) -> int:
        """Check that the next tokens fit; returns the number of key slots that attention will see.

        Raises:
            ValueError: another batch size, or no room.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"The cache was made for {self.batch_size} rows, but the batch has {batch_size}.")
        if self.length + num_tokens > self.capacity:
            raise ValueError(
                f"The cache holds {self.capacity} tokens per row; {self.length} are used and {num_tokens} more do not "
                f"fit. Make it larger: KVCache(model, batch_size, capacity={self.length + num_tokens})."
            )
        return self.num_keys(num_tokens)

    def num_keys(self, num_tokens: int) -> int:
        """Key slots that attention sees once the next tokens are in."""
        return self.capacity if self.static else self._length + num_tokens

    def update(self, layer_index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [b, g, s, d] behind what is there and return all keys and values, [b, g, t, d]."""
        keys, values = self.keys[layer_index], self.values[layer_index]
        num_tokens = k.shape[2]
        if self.static:
            slots = self.cursor + torch.arange(num_tokens, device=k.device)
            keys.index_copy_(2, slots, k.to(keys.dtype))
            values.index_copy_(2, slots, v.to(values.dtype))
            return keys, values
        end = self._length + num_tokens
        keys[:, :, self._length : end] = k
        values[:, :, self._length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mark(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """Which slots are real once the next tokens are in, [b, capacity] bool, or None without any padding."""
        if attention_mask is None and self.valid is None:
            return None
        if self.valid is None:
            self.valid = torch.ones(
                self.batch_size, self.capacity, dtype=torch.bool, device=self.next_position.device
            )
        real = True if attention_mask is None else attention_mask
        self.valid[:, self.length : self.length + num_tokens] = real
        return self.valid

    def advance(self, num_tokens: int, next_position: torch.Tensor | None) -> None:
        """Count the tokens of a finished forward. `next_position` [b] is the id of each row's next token."""
        if self.static:
            self.cursor.add_(num_tokens)
        else:
            self._length += num_tokens
        if next_position is not None:
            self.next_position.copy_(next_position)

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) rows, in the order given: beam search, finished rows."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.next_position = self.next_position.index_select(0, rows)
        self.valid = None if self.valid is None else self.valid.index_select(0, rows)
        self.memo = {
            key: value.index_select(0, rows) if isinstance(value, torch.Tensor) and value.dim() else value
            for key, value in self.memo.items()
        }
        self.batch_size = rows.shape[0]
