"""Token routes: which tokens belong to which modality, as index tensors made once per forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

Selection = tuple[str, ...]
TEXT = "text"
_SHORT_RUN = 16  # tokens; below this, on average, rows are looked up one by one


class Run(NamedTuple):
    """Neighbours of a selection that lie side by side in one part: [start, stop) there, [begin, end) in the part."""

    start: int
    stop: int
    part: int
    begin: int
    end: int


class Split:
    """How a selection falls into parts, and how the parts are put together again.

    On a CPU, where copying long runs costs less than looking every row up, tokens move in runs if runs are long.

    Args:
        places: [tokens of the part] of each part, in the selection.
        order: [tokens], the permutation that puts the concatenated parts back into order.
    """

    def __init__(self, places: tuple[torch.Tensor, ...], order: torch.Tensor) -> None:
        self.places, self.order = places, order
        compiling = torch.compiler.is_compiling()
        self.runs = None if compiling or order.device.type != "cpu" else self._long_runs()

    def _long_runs(self) -> list[Run] | None:
        sizes = [len(places) for places in self.places]
        offsets = [sum(sizes[:part]) for part in range(len(sizes))]
        follows = self.order.diff() == 1
        for offset in offsets[1:]:
            follows &= self.order[1:] != offset
        starts = [0, *((~follows).nonzero().flatten() + 1).tolist()]
        if len(starts) * _SHORT_RUN > len(self.order):
            return None
        runs = []
        for start, stop, first in zip(
            starts, [*starts[1:], len(self.order)], self.order[torch.tensor(starts)].tolist(), strict=True
        ):
            part = max(index for index, offset in enumerate(offsets) if offset <= first)
            begin = first - offsets[part]
            runs.append(Run(start, stop, part, begin, begin + stop - start))
        return runs

    def take(self, x: torch.Tensor, part: int, copied: bool = True) -> torch.Tensor:
        """[tokens, h] -> the rows of one part; without `copied`, a view if they lie side by side."""
        if torch.compiler.is_compiling() or self.runs is None:
            return x.index_select(0, self.places[part])
        rows = [x[run.start : run.stop] for run in self.runs if run.part == part]
        return torch.cat(rows) if copied or len(rows) > 1 else rows[0]

    def put(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of each part -> [tokens, o]."""
        if torch.compiler.is_compiling() or self.runs is None:
            return torch.cat(list(pieces)).index_select(0, self.order)
        return torch.cat([pieces[run.part][run.begin : run.end] for run in self.runs])


class Routes:
    """A partition of the b*s tokens of a batch into named groups; what no group names is `text`.

    Index tensors are sorted flat positions (row * s + slot). A group that is absent costs nothing: a router then
    calls its one present branch on everything.
    """

    def __init__(self) -> None:
        self.groups: dict[str, torch.Tensor] = {}
        self._relative: dict[tuple[Selection, Selection], torch.Tensor] = {}
        self._inverse: dict[tuple[Selection, ...], torch.Tensor] = {}
        self._split: dict[tuple[Selection, ...], Split] = {}

    @property
    def present(self) -> Selection:
        """Names of the groups that have tokens; empty when everything is text and nothing was ever routed."""
        return tuple(self.groups)

    def add(self, name: str, index: torch.Tensor, num_tokens: int) -> None:
        """Give sorted flat positions to a group; they are taken out of `text`.

        Args:
            name: the keyword that routers use, such as `image`.
            index: [tokens] int64, sorted, not yet taken by another group; may be empty.
            num_tokens: b * s.

        Raises:
            ValueError: the name is taken, or tokens belong to another group already.
        """
        if name == TEXT or name in self.groups:
            raise ValueError(f"The token route '{name}' exists already. Give the second modality a name of its own.")
        if index.numel() == 0:
            return
        is_text = torch.ones(num_tokens, dtype=torch.bool, device=index.device)
        for other, taken in self.groups.items():
            if other != TEXT:
                is_text[taken] = False
        if not bool(is_text[index].all()):
            raise ValueError(f"Some tokens of route '{name}' belong to another route already; spans must not overlap.")
        is_text[index] = False
        others = {key: value for key, value in self.groups.items() if key != TEXT}
        text = is_text.nonzero().flatten()
        self.groups = ({TEXT: text} if text.numel() else {}) | others | {name: index}
        self._relative.clear()
        self._inverse.clear()
        self._split.clear()
        self.split(tuple((key,) for key in self.groups), self.present)

    def split(self, parts: tuple[Selection, ...], selection: Selection) -> Split:
        """How to take a selection apart and put it together again."""
        key = (*parts, selection)
        if key not in self._split:
            places = tuple(self.relative(part, selection) for part in parts)
            self._split[key] = Split(places, self.inverse(parts, selection))
        return self._split[key]

    def size(self, selection: Selection) -> int:
        """Number of tokens in a selection."""
        return sum(self.groups[name].shape[0] for name in selection)

    def index(self, selection: Selection) -> torch.Tensor:
        """Sorted flat positions of a selection."""
        if len(selection) == 1:
            return self.groups[selection[0]]
        return torch.cat([self.groups[name] for name in selection]).sort().values

    def relative(self, members: Selection, selection: Selection) -> torch.Tensor:
        """Places of `members` inside the tokens of `selection`."""
        key = (members, selection)
        if key not in self._relative:
            index = self.index(members)
            if len(selection) < len(self.groups):
                index = torch.searchsorted(self.index(selection), index)
            self._relative[key] = index
        return self._relative[key]

    def inverse(self, parts: tuple[Selection, ...], selection: Selection) -> torch.Tensor:
        """The permutation that puts the concatenated parts back into the order of `selection`."""
        key = (*parts, selection)
        if key not in self._inverse:
            self._inverse[key] = torch.cat([self.relative(part, selection) for part in parts]).argsort()
        return self._inverse[key]


def route_tokens(ctx: Any, x: torch.Tensor, branches: dict[str, Callable[[torch.Tensor], Any]]) -> Any:
    """Send each token group of `x` through its branch and put the results back in order.

    Nested calls intersect: inside a branch the selection is that branch's groups. Groups without a branch go with
    `text`. A branch may return a tensor or a tuple of tensors.

    Args:
        ctx: the context that holds the routes and the current selection.
        x: [..., h], one row per token of the current selection.
        branches: one callable per group, [tokens, h] -> [tokens, o]; `text` is required.

    Returns:
        what the branches return, with the leading axes of `x`.

    Raises:
        ValueError: `text` is missing, or `x` does not have as many tokens as the current selection.
    """
    if TEXT not in branches:
        raise ValueError("ctx.route(...) needs a `text` branch, for the tokens that no other branch takes.")
    routes: Routes = ctx.routes
    selection: Selection = routes.present if ctx.selection is None else ctx.selection
    if not selection:
        return branches[TEXT](x)
    owners = {name: (name if name in branches else TEXT) for name in selection}
    parts = tuple(
        tuple(name for name in selection if owners[name] == branch) for branch in branches if branch in owners.values()
    )
    names = [owners[part[0]] for part in parts]
    flat = x.reshape(-1, x.shape[-1])
    if not torch.compiler.is_compiling() and flat.shape[0] != routes.size(selection):
        raise ValueError(
            f"ctx.route got {flat.shape[0]} tokens, but the current selection ({', '.join(selection)}) has "
            f"{routes.size(selection)}. Route the same tokens that the hook received, without dropping or padding."
        )
    if len(parts) == 1:
        return branches[names[0]](x)
    split = routes.split(parts, selection)
    outer = ctx.selection
    results = []
    for name, part, tokens in zip(names, parts, _take(flat, split), strict=True):
        ctx.selection = part
        results.append(branches[name](tokens))
    ctx.selection = outer
    if not isinstance(results[0], tuple):
        return _put(results, split, x)
    widths = {tuple(piece.shape[-1] for piece in pieces) for pieces in results}
    fused = [_side_by_side(pieces) for pieces in results]
    if len(widths) == 1 and all(whole is not None for whole in fused):
        return _put(fused, split, x).split(widths.pop(), dim=-1)
    return tuple(_put(pieces, split, x) for pieces in zip(*results, strict=True))


def _side_by_side(pieces: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """The tensor that the pieces are all the columns of, in their order, so that it is moved once; None otherwise."""
    whole = None if torch.compiler.is_compiling() else pieces[0]._base
    if whole is None or whole.dim() != 2 or not whole.is_contiguous():
        return None
    start = whole.storage_offset()
    for piece in pieces:
        beside = piece._base is whole and piece.stride() == whole.stride() and len(piece) == len(whole)
        if not beside or piece.storage_offset() != start:
            return None
        start += piece.shape[-1]
    return whole if start == whole.storage_offset() + whole.shape[-1] else None


def _own_gradient() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _take(x: torch.Tensor, split: Split) -> Iterable[torch.Tensor]:
    """[tokens, h] -> the rows of each part, each moved when it is asked for unless gradients are wanted."""
    if _own_gradient():
        return _Take.apply(x, split)
    return (split.take(x, part, copied=False) for part in range(len(split.places)))


def _put(pieces: Sequence[Any], split: Split, x: torch.Tensor) -> torch.Tensor:
    """The rows of each part -> [..., o] in order, with the leading axes of `x`."""
    merged = _Put.apply(split, *pieces) if _own_gradient() else split.put(pieces)
    return merged.view(*x.shape[:-1], merged.shape[-1])


class _Take(torch.autograd.Function):
    """Its gradient moves each row once, where that of `index_select` adds rows to zeros."""

    @staticmethod
    def forward(x: torch.Tensor, split: Split) -> tuple[torch.Tensor, ...]:
        return tuple(split.take(x, part) for part in range(len(split.places)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.split = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.split.put(grads), None


class _Put(torch.autograd.Function):
    """The inverse of `_Take`."""

    @staticmethod
    def forward(split: Split, *pieces: torch.Tensor) -> torch.Tensor:
        return split.put(pieces)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.split = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        split, needed = ctx.split, enumerate(ctx.needs_input_grad[1:])
        return None, *(split.take(grads[0], part) if need else None for part, need in needed)


def items_by_row(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Which items belong to which row, such as pictures to the rows of a batch.

    Args:
        rows: [m] row of each item, ascending.
        num_rows: b.

    Returns:
        [b, k] indices of each row's items in their order, -1 where a row has fewer than the fullest one's k.
    """
    counts = torch.bincount(rows, minlength=num_rows)
    places = torch.full((num_rows, int(counts.max())), -1, device=rows.device)
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    places[rows, rank] = torch.arange(len(rows), device=rows.device)
    return places


def marked_spans(types: torch.Tensor, size: int, what: str) -> torch.Tensor:
    """Slots of the images of a batch.

    Args:
        types: [b, s], not 0 on image tokens.
        size: tokens of an image.
        what: names them in errors.

    Returns:
        [m, size] slots in the flattened batch.

    Raises:
        ValueError: a span of another size, or with a gap.
    """
    length, counts = types.shape[1], (types != 0).sum(1)
    wrong = (counts % size).nonzero().flatten()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"Row {row} marks {int(counts[row])} image tokens in token_type_ids; each image takes {size} ({what}), so "
            f"the count must be a multiple of {size}. A span may not be cut."
        )
    spans = (types.flatten() != 0).nonzero().view(-1, size)
    broken = (spans[:, -1] - spans[:, 0] != size - 1).nonzero().flatten()
    if broken.numel():
        first = int(spans[int(broken[0]), 0])
        raise ValueError(
            f"Row {first // length}: the image span that starts at slot {first % length} is not {size} tokens in "
            f"one piece. Mark {what} without a gap."
        )
    return spans
