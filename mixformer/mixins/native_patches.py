"""Pictures of any size and shape for a tower that learned square ones (arXiv:2307.06304; arXiv:2405.02246)."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.mixins.patch_embedding import PatchEmbeddingMixin


class NativePatchesMixin(PatchEmbeddingMixin):
    """Patches whose learned positions follow from where they lie in their picture, as fractions of its sides.

    The model's table holds a square of image_size / patch_size positions per side. Pictures of a batch are padded at
    the right and at the bottom; `pixel_attention_mask` [m, y, x] is true on their own pixels. Patches that are not
    whole are left out: nothing attends to them, and `ctx.valid` [m, N] is false on them.

    Args:
        image_size: side of the square that the table of positions was made for.
        patch_size: side of a patch.
        in_channels: colour channels.
        bias: whether the patch convolution has one.
    """

    inputs = ("images", "pixel_attention_mask")

    def __init__(self, image_size: int, patch_size: int, in_channels: int = 3, bias: bool = True) -> None:
        super().__init__(image_size, patch_size, in_channels, cls_token=False, bias=bias, crop=True)

    def plan(self, ctx: Context) -> None:
        images, mask, size = ctx.require("images"), ctx.inputs.get("pixel_attention_mask"), self.patch_size
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < size:
            raise ValueError(
                f"images must be [m, {self.in_channels}, y, x] of at least {size} x {size} pixels for this tower; got "
                f"{tuple(images.shape)}."
            )
        (num_images, _, *sides), device = images.shape, images.device
        rows, columns = (side // size for side in sides)
        if mask is None:
            whole = torch.ones(num_images, rows, columns, dtype=torch.bool, device=device)
        elif mask.shape != (num_images, *sides):
            raise ValueError(
                f"pixel_attention_mask must have the shape of images without their channels, "
                f"{(num_images, *sides)}; got {tuple(mask.shape)}."
            )
        else:
            pixels = mask[:, : rows * size, : columns * size].bool()
            whole = pixels.unflatten(2, (columns, size)).unflatten(1, (rows, size)).all(4).all(2)
            ctx.valid = whole.flatten(1)
        down, right = whole[:, :, 0], whole[:, 0]
        if not torch.compiler.is_compiling() and not torch.equal(whole, down[:, :, None] & right[:, None]):
            raise ValueError("pixel_attention_mask must mark one rectangle from the top left corner of each picture.")
        places = self._buckets(down)[:, :, None] * (self.image_size // size) + self._buckets(right)[:, None]
        ctx.position_ids = places.masked_fill(~whole, 0).flatten(1)

    def _buckets(self, real: torch.Tensor) -> torch.Tensor:
        """Rows (or columns) [m, r], true on the real ones, in a picture -> rows [m, r] of the table.

        Fractions and bounds are in fp32 as in the released code: what rounding does on a bound was learned so.
        """
        side, num_patches = self.image_size // self.patch_size, real.shape[1]
        fractions = torch.arange(num_patches, device=real.device) * (1.0 / real.sum(1, keepdim=True))
        bounds = torch.arange(1 / side, 1.0, 1 / side, device=real.device)
        return torch.bucketize(fractions.clamp(max=1 - 1e-6), bounds, right=True)
