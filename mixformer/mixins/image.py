"""Picture features in the places of word embeddings (arXiv:2311.03079, section 2.1; arXiv:2304.08485)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixins.image_tokens import ImageTokensMixin


class ImageMixin(ImageTokensMixin):
    """Put the features in the place of word embeddings; options as of `ImageTokensMixin`."""

    @wrap
    def word_embedding_forward(
        self, input_ids: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return self.write(old_impl(input_ids), ctx)
