"""Where the documents of packed rows begin and end, from `document_ids` [b, s]: 1, 2, ... in each row, 0 on padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mixformer.masks import Documents


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """[b, s] ids -> [b, s] slot of the first token of each token's document."""
    slots = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, slots, 0).cummax(1).values


def check_document_ids(document_ids: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Check that documents are numbered from 1 on, in their order and in one piece.

    Raises:
        ValueError: they are not, or the shape is not that of `input_ids`.
    """
    if document_ids.shape != input_ids.shape:
        shape, expected = tuple(document_ids.shape), tuple(input_ids.shape)
        raise ValueError(f"document_ids {shape} must have the shape of input_ids {expected}.")
    slots = torch.arange(document_ids.shape[1], device=document_ids.device)
    real = document_ids > 0
    firsts = real & (document_starts(document_ids) == slots)
    wrong = (document_ids != firsts.cumsum(1) * real).any(1).nonzero().flatten()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"Row {row} of document_ids is {document_ids[row].tolist()}: number its documents 1, 2, and so on from the "
            f"left, each in one piece, with 0 on padding."
        )


def document_lengths(document_ids: torch.Tensor) -> list[int]:
    """[b, s] ids -> tokens of each document, and of each piece of padding, in the order of the flattened rows."""
    slots = torch.arange(document_ids.shape[1], device=document_ids.device)
    firsts = (document_starts(document_ids) == slots).flatten().nonzero().flatten()
    lengths: list[int] = firsts.diff(append=firsts.new_tensor([document_ids.numel()])).tolist()
    return lengths


def attend_apart(
    attend: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Attention document by document, in which pairs of tokens of two documents cost nothing.

    Args:
        attend: q [1, n, s, d], k and v [1, g, s, d] of a document -> [1, n, s, d].
        q, k, v: [b, n, s, d], [b, g, s, d] of rows.
        lengths: of `document_lengths`.
    """
    parts = zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    found = [attend(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
    return torch.cat(found).view(len(q), q.shape[2], *found[0].shape[1:]).transpose(1, 2)


class DocumentPrefix(Documents):
    """The marked tokens of each document attend to one another; what others may see is not widened.

    Args:
        document_ids: [b, t] int.
        marked: [b, t] bool.
    """

    def __init__(self, document_ids: torch.Tensor, marked: torch.Tensor) -> None:
        super().__init__(document_ids)
        self.marked = marked

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return super().allowed(query, key) & self.marked[:, query][:, :, None] & self.marked[:, key][:, None, :]


@dataclass
class DocumentRows:
    """Some documents as rows of their own, filled up with other tokens.

    Attributes:
        slots: [d, longest] flat slots of their tokens; behind a shorter one come other tokens.
        inside: [n] flat slots of the tokens of these documents, sorted.
        taken: [n] where those stand in the flattened rows.
        owners: [m] row of each picture.
    """

    slots: torch.Tensor
    inside: torch.Tensor
    taken: torch.Tensor
    owners: torch.Tensor

    @classmethod
    def of(cls, document_ids: torch.Tensor, pictures: torch.Tensor) -> DocumentRows:
        """The rows of all documents that have pictures.

        Args:
            document_ids: [b, s].
            pictures: [m] flat slot of one token of each picture, ascending.
        """
        (num_rows, num_tokens), device = document_ids.shape, document_ids.device
        starts = (document_starts(document_ids) + num_tokens * torch.arange(num_rows, device=device)[:, None]).flatten()
        firsts, owners = starts[pictures].unique_consecutive(return_inverse=True)
        inside = torch.isin(starts, firsts).nonzero().flatten()
        within = inside - starts[inside]
        length = int(within.max()) + 1
        slots = (firsts[:, None] + torch.arange(length, device=device)).clamp_max(starts.numel() - 1)
        return cls(slots, inside, torch.searchsorted(firsts, starts[inside]) * length + within, owners)

    def take(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [d, longest, h]."""
        return hidden_states.flatten(0, 1)[self.slots]

    def put(self, results: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """[d, longest, h] -> [b, s, h] as `hidden_states`, 0 outside of these documents."""
        num_rows, num_tokens = hidden_states.shape[:2]
        zeros = results.new_zeros(num_rows * num_tokens, results.shape[-1])
        return zeros.index_copy(0, self.inside, results.flatten(0, 1)[self.taken]).view(num_rows, num_tokens, -1)
