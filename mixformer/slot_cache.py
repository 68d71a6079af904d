"""SlotCache: a KVCache whose rows come and go while it is in use."""

from __future__ import annotations

from typing import Any

import torch

from mixformer.cache import KVCache
from mixformer.model import BaseModel


class SlotCache(KVCache):
    """A cache whose rows come and go while it is in use.

    All rows end at the cursor; the slots before a row's own start are empty. Rows may move along the slots, since keys
    are stored after `position_fn` and next positions are kept beside them. The storage has more rows than are in
    use; the model sees the first ones.
    """

    def __init__(self, model: BaseModel) -> None:
        super().__init__(model, 0, 0)
        self.stored_keys, self.stored_values = self.keys, self.values
        self.num_stored = 0
        self.starts: list[int] = []
        self.memos = _Memos()

    @property
    def num_empty(self) -> int:
        """Slots at the front that are empty in every row."""
        return min(self.starts, default=self.length)

    def make_place(self, num_rows: int, length: int) -> None:
        """Make place for more rows, of up to `length` tokens each."""
        end = max(length, self.length) if self.starts else length
        self._arrange(len(self.starts) + num_rows, end, _roomy(end) if end > self.capacity else 0)

    def make_room(self) -> None:
        """Make room for a token in every row, and close the gap at the front before it is long.

        Closing it copies everything, as a few steps of attention read everything, so it has to be worth many steps.
        """
        empty, end = self.num_empty, self.length
        full = end == self.capacity
        if empty > max(16, end // (16 if full else 4)):
            self._arrange(0, end - empty)
        elif full:
            self._arrange(0, end - empty, _roomy(end - empty))

    def _arrange(self, num_rows: int, end: int, capacity: int = 0) -> None:
        """Let the rows in use end at `end`, in storage of at least so many rows and slots."""
        first, by, num_used = self.num_empty, end - self.length, len(self.starts)
        num_rows, capacity = max(num_rows, self.num_stored), max(capacity, self.capacity)
        larger = num_rows > self.num_stored or capacity > self.capacity
        for stored in (self.stored_keys, self.stored_values):
            for index, old in enumerate(stored):
                used = old[:num_used, :, first : self.length]
                if larger:
                    stored[index] = old.new_zeros(num_rows, old.shape[1], capacity, old.shape[3])
                elif by:
                    used = used.clone()
                if larger or by:
                    stored[index][:num_used, :, first + by : end] = used
        self.starts = [start + by for start in self.starts]
        self.num_stored, self.capacity, self._length = num_rows, capacity, end
        self._show()

    def _show(self) -> None:
        """Let the model see the rows in use."""
        self.batch_size = len(self.starts)
        self.keys = [keys[: self.batch_size] for keys in self.stored_keys]
        self.values = [values[: self.batch_size] for values in self.stored_values]
        self.valid = None
        if any(self.starts):
            starts = torch.tensor(self.starts, device=self.next_position.device)
            self.valid = torch.arange(self.capacity, device=starts.device) >= starts[:, None]

    def new_rows(self, model: BaseModel, num_rows: int, length: int, earlier: KVCache | None) -> KVCache:
        """A cache for `length` tokens, those in `earlier` included, that writes into the next free rows."""
        first, start = len(self.starts), self.length - length
        part = KVCache(model, num_rows, 0)
        part.capacity = length
        for stored, shown in ((self.stored_keys, part.keys), (self.stored_values, part.values)):
            for index, tensor in enumerate(stored):
                rows = tensor[first : first + num_rows, :, : self.length]
                rows[:, :, :start] = 0  # what an earlier row left may not be finite, and masked values must be
                shown[index] = rows[:, :, start:]
        if earlier is not None:
            _copy_row(earlier, part)
        return part

    def join(self, part: KVCache, lengths: list[int], num_earlier: int) -> None:
        """Take in the rows of a cache that `new_rows` made, now that it is full.

        Args:
            part: padded on the left, or between its first `num_earlier` tokens and the others.
            lengths: of its rows.
            num_earlier: tokens that were in it from the start.
        """
        for row, length in enumerate(lengths):
            gap = part.capacity - length
            for tensor in (*part.keys, *part.values) if gap and num_earlier else ():
                tensor[row, :, gap : gap + num_earlier] = tensor[row, :, :num_earlier].clone()
        self.memo = self.memos.change(self.memo, list(range(len(self.starts))), part.memo, len(lengths))
        self.next_position = torch.cat([self.next_position, part.next_position])
        self.starts += [self.length - length for length in lengths]
        self.usual_positions = self.usual_positions and part.usual_positions
        self._show()

    def keep(self, order: list[int]) -> None:
        """Keep these rows, in this order. A row stays where it is, or moves to the place of one that goes."""
        moves = [(row, place) for place, row in enumerate(order) if row != place]
        for tensor in (*self.stored_keys, *self.stored_values):
            for row, place in moves:
                tensor[place, :, : self.length] = tensor[row, :, : self.length]
        self.memo = self.memos.change(self.memo, order, {}, 0)
        self.next_position = self.next_position[index_tensor(order, self.next_position)]
        self.starts = [self.starts[row] for row in order]
        self.usual_positions = self.usual_positions or not order
        self._show()


def _copy_row(source: KVCache, target: KVCache) -> None:
    """Put the tokens of a cache of one row into every row of an empty one."""
    num_used = int(source.lengths)
    used = slice(source.length) if source.valid is None else source.valid[0, : source.length]
    for theirs, ours in ((source.keys, target.keys), (source.values, target.values)):
        for old, new in zip(theirs, ours, strict=True):
            new[:, :, :num_used] = old[:, :, : source.length][:, :, used]
    rows = (target.batch_size,)
    target.next_position = source.next_position.expand(rows).clone()
    target.memo = {
        key: value.expand(*rows, *value.shape[1:]) if _has_rows(value) else value for key, value in source.memo.items()
    }
    target.usual_positions = source.usual_positions
    target._length = num_used


class _Memos:
    """The memos of rows that come and go, brought together as `KVCache.memo` says."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # {key: shape of the row's part of a tensor, or the value}
        self.shown: dict[str, Any] = {}

    def change(self, memo: dict[str, Any], order: list[int], given: dict[str, Any], num_given: int) -> dict[str, Any]:
        """The memo of these rows of `memo`, in this order, and of all rows of `given` behind them."""
        rows, new = self._read(memo), {key: _shape_or_value(value) for key, value in given.items()}
        new = next((row for row in rows if row == new), new)
        rows = [rows[place] for place in order] + [new] * num_given
        kinds = list({id(row): row for row in rows}.values())
        shown: dict[str, Any] = {}
        for key in dict.fromkeys(key for row in kinds for key in row):
            like: Any = given.get(key, memo.get(key))
            values = [row[key] for row in kinds if key in row]
            if _has_rows(like):
                size = [max(sizes) for sizes in zip(*values, strict=True)]
                shown[key] = like.new_zeros(len(rows), *size)
                if key in memo:
                    _fill(shown[key], memo[key][index_tensor(order, memo[key])])
                if key in given:
                    _fill(shown[key][len(order) :], given[key])
            elif isinstance(like, bool):
                shown[key] = len(values) == len(kinds) and all(values)
            elif all(value == values[0] for value in values):
                shown[key] = like
            else:
                raise ValueError(f"Rows whose memo '{key}' differs cannot run side by side. Run them one at a time.")
        tensors = [key for key, value in shown.items() if _has_rows(value)]
        if any(row.get(key) != kinds[0].get(key) for key in tensors for row in kinds):
            shown = {key: False if isinstance(value, bool) else value for key, value in shown.items()}
        self.rows, self.shown = rows, shown
        return dict(shown)

    def _read(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows, with what mixins have changed since."""
        changed = [key for key in {**self.shown, **memo} if memo.get(key) is not self.shown.get(key)]
        if not changed:
            return self.rows
        new = {key: _shape_or_value(memo[key]) for key in changed if key in memo}
        return [{key: row[key] for key in row if key not in changed} | new for row in self.rows]


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _shape_or_value(value: Any) -> Any:
    return tuple(value.shape[1:]) if _has_rows(value) else value


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what both have room for, from the start of every axis."""
    common = tuple(slice(min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
    target[common] = source[common]


def index_tensor(numbers: list[int], like: torch.Tensor) -> torch.Tensor:
    """[n] int64 on the device of `like`."""
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _roomy(length: int) -> int:
    """A capacity for so many tokens that leaves room for many more."""
    return length + max(64, length // 4)
