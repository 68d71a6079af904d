"""Regions of a picture as tokens behind the text, with positions and a type of their own (arXiv:1908.03557, 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.config import VisionTowerConfig
from mixformer.connectors.connector import ConnectorConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixins.image import ImageMixin


class ImageRegionsMixin(ImageMixin):
    """Projected features of regions, plus the vector of their type, plus that of position 0 in a table of their own.

    With the forward input `image_text_alignment` [m, N, words], positions in the text of the words that each region
    shows (-1 for none), the mean of those words' position embeddings is added. Regions that are only there to fill
    `images` [m, N, c] have 0 in `attention_mask`. Text is counted as if there were no regions. Both tables begin as
    copies of the text's.

    Args:
        tower, adapter, image_token_id, feature_size: as of `ImageTokensMixin`.
        token_types: name of the `TokenTypeMixin` of the text, added before; regions have its second kind.

    Raises:
        ValueError: when added: the model has no learned positions or no such token types.
    """

    inputs = ("token_type_ids", "images", "image_text_alignment")

    def __init__(
        self, tower: VisionTowerConfig | None, adapter: ConnectorConfig | None = None,
        image_token_id: int | None = None, feature_size: int | None = None, token_types: str = "segments",
    ) -> None:
        super().__init__(tower, adapter, False, "none", image_token_id, feature_size)
        self.token_types = token_types

    def build(self, model: Any) -> None:
        super().build(model)
        positions, mixins = model.transformer.position_embeddings, dict(model.mixins.items())
        types: Any = getattr(mixins.get(self.token_types), "table", ())
        if positions is None or len(types) < 2:
            raise ValueError(
                f"Regions start with copies of the text's tables of positions and token types: the model needs "
                f"positions 'learned', and two kinds of tokens in a mixin '{self.token_types}'."
            )
        self.position_table = nn.Parameter(positions.weight.detach().clone())
        self.token_type_table = nn.Parameter(types.detach().clone())

    def plan(self, ctx: Context) -> None:
        super().plan(ctx)
        alignment, images = ctx.inputs.get("image_text_alignment"), ctx.inputs.get("images")
        if alignment is None:
            return
        if images is None or alignment.dim() != 3 or alignment.shape[:2] != images.shape[:2]:
            raise ValueError(
                f"image_text_alignment must be [m, N, words], a list of words for every region of `images`; got shape "
                f"{tuple(alignment.shape)}."
            )
        if int(alignment.max()) >= len(self.position_table):
            raise ValueError(
                f"image_text_alignment names position {int(alignment.max())}; the text has positions up to "
                f"{len(self.position_table) - 1}."
            )

    def encode(self, images: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """As of `ImageTokensMixin`, with the type added."""
        inputs.pop("image_text_alignment", None)
        return super().encode(images, **inputs) + self.token_type_table[1]

    @wrap
    def position_embedding_forward(
        self, position_ids: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        positions, places = old_impl(position_ids), ctx.shared.get(f"{self.name}.places")
        if places is None:
            return positions
        own, words = self.position_table[:1], ctx.inputs.get("image_text_alignment")
        if words is not None:
            shown = (words >= 0).flatten(0, 1)[..., None]
            told = old_impl(words.clamp(min=0).flatten(0, 1)) * shown
            own = own + told.sum(1) / shown.sum(1).clamp(min=1)
        assert ctx.input_ids is not None
        flat = positions.expand(*ctx.input_ids.shape, -1).flatten(0, 1)
        return flat.index_copy(0, places, own.expand(len(places), -1)).view(*ctx.input_ids.shape, -1)
