"""Picture features in the places of placeholder tokens (arXiv:2311.03079, section 2.1; arXiv:2304.08485)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from mixformer.config import VisionTowerConfig
from mixformer.connectors.connector import ConnectorConfig
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.context import Context
from mixformer.mixin import BaseMixin
from mixformer.mixins.blank import blank_picture, nothing_of
from mixformer.ready_features import ready_features
from mixformer.routes import marked_spans
from mixformer.sites import normal

_POSITIONS = ("shared", "counted", "none")


class ImageTokensMixin(BaseMixin):
    """Encode pictures with a tower, project them, and know their places in the sequence; subclasses write them there.

    Places are the tokens where `token_type_ids` is 1 or, without those, the ones that are `image_token_id`. They are
    routed as `image` (a learned eoi counts as text). A span has a fixed size, so adjacent spans stay two.

    `images` [m, N, c] are features that a frozen tower gave before (see `mixformer.data.feature_cache`).

    Args:
        tower: config of the vision tower, a model that turns `images` into features; None if they are features.
        adapter: config of the projector.
        marks: learned boi and eoi tokens around the features of each picture.
        position_ids: the features of a picture have one position id (`shared`), one each (`counted`), or text is
            counted as if there were no pictures (`none`).
        image_token_id: the placeholder's token id, for inputs without `token_type_ids`.
        feature_size: c, where there is no tower.
        synchronised, encoded (attributes): see `mixformer.mixins.blank`.
    """

    inputs: tuple[str, ...] = ("token_type_ids", "images")
    synchronised = encoded = False

    def __init__(
        self, tower: VisionTowerConfig | None, adapter: ConnectorConfig | None = None, marks: bool = True,
        position_ids: str = "shared", image_token_id: int | None = None, feature_size: int | None = None,
    ) -> None:
        super().__init__()
        if position_ids not in _POSITIONS:
            raise ValueError(f"position_ids of pictures are one of {', '.join(_POSITIONS)}, not {position_ids!r}.")
        if (tower is None) == (feature_size is None):
            raise ValueError("Pictures need a tower, or else feature_size, the width of ready features. Give one.")
        self.tower_config, self.adapter_config = tower, adapter or GLUAdapterConfig()
        self.marks, self.position_ids, self.image_token_id = marks, position_ids, image_token_id
        self.feature_size: int = tower.feature_size if tower is not None else feature_size or 0
        self.num_features = 0 if tower is None else self.adapter_config.num_tokens(tower.num_features)
        self.tower: Any = None

    def build(self, model: Any) -> None:
        config, tower = model.config, self.tower_config
        if tower is not None:
            self.tower = tower.build()
            self.inputs = tuple(dict.fromkeys((*type(self).inputs, *self.tower.declared)))
        sizes = self.feature_size, config.hidden_size, config.inner_size
        self.projector = self.adapter_config.build(*sizes, 0 if tower is None else tower.num_features)
        if self.marks:
            self.boi = nn.Parameter(normal(config.hidden_size, std=config.init_std))
            self.eoi = nn.Parameter(normal(config.hidden_size, std=config.init_std))

    def plan(self, ctx: Context) -> None:
        types, images = ctx.inputs.get("token_type_ids"), ctx.inputs.get("images")
        if types is None and images is not None and self.image_token_id is not None and ctx.input_ids is not None:
            types = ctx.input_ids == self.image_token_id
        num_images, num_features = 0 if images is None else images.shape[0], self.num_features
        if images is not None and self.tower is None:
            num_features = self.adapter_config.num_tokens(images.shape[1])
        size = num_features + 2 * self.marks
        what = f"boi, {num_features} features, eoi" if self.marks else f"{num_features} features"
        if types is None or not bool((types != 0).any()):
            if num_images:
                raise ValueError(
                    f"{num_images} image(s) were given, but token_type_ids mark no place for them. Put 1 on the "
                    f"{size} tokens of each image ({what})."
                )
            return
        assert ctx.input_ids is not None
        if types.shape != ctx.input_ids.shape:
            raise ValueError(
                f"token_type_ids {tuple(types.shape)} must have the shape of input_ids {tuple(ctx.input_ids.shape)}."
            )
        images = ctx.require("images")
        spans = marked_spans(types, size, what)
        if num_images != len(spans):
            raise ValueError(
                f"token_type_ids have room for {len(spans)} image(s) ({size} tokens each), but {num_images} were "
                f"given. Images follow the order of their places, row by row."
            )
        if self.position_ids != "counted" and ctx.position_steps is not None:
            still = spans if self.position_ids == "none" else spans[:, 2:-1] if self.marks else spans[:, 1:]
            ctx.position_steps = ctx.position_steps.flatten().scatter(0, still.flatten(), 0).view_as(types)
        ctx.routes.add("image", (spans[:, :-1] if self.marks else spans).flatten(), types.numel())
        ctx.shared["image_rows"] = spans[:, 0] // types.shape[1]
        ctx.shared["image_ends"] = spans[:, -1] % types.shape[1]
        ctx.shared[f"{self.name}.places"] = spans.flatten()

    def before_forward(self, ctx: Context) -> None:
        if f"{self.name}.places" in ctx.shared:
            given = {name: ctx.inputs[name] for name in self.inputs[2:] if name in ctx.inputs}
            ctx.shared[f"{self.name}.features"] = self.encode(ctx.require("images"), **given)
            if self.synchronised:
                self.encoded = True
        elif self.synchronised:
            ctx.shared[f"{self.name}.nothing"] = nothing_of(self.encode(blank_picture(self.tower)))

    def encode(self, images: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """[m, 3, y, x] (or features [m, N, c]) -> [m, K, h], boi and eoi included; inputs as the tower's."""
        features, options = images.to(next(self.projector.parameters()).dtype), {}
        if self.tower is not None and images.dim() == 3:
            masked = self.adapter_config.takes_mask and "pixel_attention_mask" in self.tower.declared
            features = ready_features(images, self.tower, self.name, masked)
        elif self.tower is not None:
            plan = self.tower.plan(images=features, **inputs)
            options = {"mask": plan.valid} if self.adapter_config.takes_mask else {}
            features = self.tower(plan=plan, images=features, **inputs)
            features = features if features.dim() == 3 else features[:, None]
        features = self.projector(features, **options)
        if not self.marks:
            return features
        boi, eoi = (token.expand(len(features), 1, -1) for token in (self.boi, self.eoi))
        return torch.cat([boi, features, eoi], dim=1)

    def write(self, embeddings: torch.Tensor, ctx: Context) -> torch.Tensor:
        """The embeddings [b, s, h] with the features in their places."""
        features = ctx.shared.get(f"{self.name}.features")
        if features is None:
            return embeddings + ctx.shared[f"{self.name}.nothing"] if self.synchronised else embeddings
        flat, places = embeddings.flatten(0, 1), ctx.shared[f"{self.name}.places"]
        return flat.index_copy(0, places, features.flatten(0, 1).to(flat.dtype)).view_as(embeddings)
