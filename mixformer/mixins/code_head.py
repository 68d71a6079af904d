"""Classes with fixed codes, told apart by distance (LeCun et al., Proc. IEEE 86(11), 1998, section II-B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.mixins.lenet import squash, uniform
from mixformer.sites import Linear

DIGITS = """
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
..###.. ...##.. .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
.##.##. ..###.. ##...## ##...## ...###. ##..... .##.... ##...## ##...## ##...##
##...## .####.. .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
##...## ...##.. .....## .....## .##.##. ######. ##..... ....##. ##...## ##...##
##...## ...##.. ....##. ..####. ##..##. ##...## ######. ....##. .#####. ##...##
##...## ...##.. ...##.. .....## ####### .....## ##...## ...##.. ##...## .######
##...## ...##.. ..##... .....## ....##. .....## ##...## ...##.. ##...## .....##
##...## ...##.. .##.... .....## ....##. .....## ##...## ..##... ##...## .....##
.##.##. ...##.. ##..... ##...## ....##. ##...## ##...## ..##... ##...## ....##.
..###.. .###### ####### .#####. ....##. .#####. .#####. ..##... .#####. .####..
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""
"""Ten pictures of 7 x 12. They are ours: the paper draws its own in figure 3 and prints no numbers."""


def digit_codes() -> torch.Tensor:
    """[10, 84]: the digits row by row, 1 where there is ink and -1 elsewhere."""
    rows = [line.split() for line in DIGITS.split("\n") if line]
    return torch.tensor([[1.0 if dot == "#" else -1.0 for row in rows for dot in row[d]] for d in range(10)])


class CodeHeadMixin(BaseMixin):
    """F6 and the output: squared distances [m, 10] of 84 squashed units to the code of each class.

    The codes are a buffer and never learnt.

    Args:
        scores: give the negative distances, so that the largest is the likeliest, for a cross entropy. That is the
            paper's second criterion (equation 9) without its class of rubbish.
    """

    codes: torch.Tensor
    whole_sequence = True

    def __init__(self, scores: bool = False) -> None:
        super().__init__()
        self.scores = scores

    def build(self, model: Any) -> None:
        codes, size = digit_codes(), model.config.hidden_size
        self.f6 = Linear(size, codes.shape[1])
        self.f6.weight = nn.Parameter(uniform(codes.shape[1], size, fan_in=size))
        self.f6.bias = nn.Parameter(uniform(codes.shape[1], fan_in=size))
        self.register_buffer("codes", codes)

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        x = squash(self.f6(old_impl(hidden_states)[:, 0], ctx))
        distances = (x[:, None] - self.codes).square().sum(-1)
        return -distances if self.scores else distances
