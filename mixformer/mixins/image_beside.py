"""Picture features beside the text's embeddings instead of among them (arXiv:2205.14100, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixformer.config import VisionTowerConfig
from mixformer.connectors.connector import ConnectorConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixins.image_tokens import ImageTokensMixin


class ImageBesideMixin(ImageTokensMixin):
    """Features go to the first layer as the adapter gives them, without word embedding, position or norm of the text.

    Text is counted as if there were no pictures.

    Args:
        tower, adapter, image_token_id, feature_size: as of `ImageTokensMixin`.
    """

    def __init__(
        self, tower: VisionTowerConfig | None, adapter: ConnectorConfig | None = None,
        image_token_id: int | None = None, feature_size: int | None = None,
    ) -> None:
        super().__init__(tower, adapter, False, "none", image_token_id, feature_size)

    @wrap
    def embedding_norm_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return self.write(old_impl(hidden_states), ctx)
