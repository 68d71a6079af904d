"""Perceiver resampler: learned latents look at the features layer by layer (arXiv:2204.14198, section 3.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from mixformer.connectors.attention import MultiHeadAttention
from mixformer.connectors.connector import ConnectorConfig, require_choice
from mixformer.connectors.projector import ProjectorConfig
from mixformer.sites import ACTIVATIONS, MLP, LayerNorm, RMSNorm, normal


@dataclass
class PerceiverResamplerConfig(ConnectorConfig):
    """Options of `PerceiverResampler`; the defaults are OpenFlamingo's.

    Attributes:
        num_latents: K.
        depth: layers.
        num_heads: n.
        head_size: d.
        num_kv_heads: g, a divisor of n; None for n.
        hidden_size: width of the latents; None for that of the features or, with `input_projector`, for h.
        inner_hidden_size: of the MLPs; None for four times `hidden_size`.
        norm: `layernorm`, or `rmsnorm`.
        norm_eps: added to the variance.
        activation: of the MLPs.
        gated: whether the MLPs are.
        input_projector: projector of the features before the layers (Idefics2).
        output_projector: projector of the latents after the layers (KOSMOS-1); needed where `hidden_size` is not h.
        num_frames: rows of a learned table that tells the frames of a video apart; 0 for none.
        num_media: rows of a learned table that tells the first image of a row from the second; 0 for none.
    """

    takes_mask: ClassVar[bool] = True

    num_latents: int = 64
    depth: int = 6
    num_heads: int = 8
    head_size: int = 64
    num_kv_heads: int | None = None
    hidden_size: int | None = None
    inner_hidden_size: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    gated: bool = False
    input_projector: ProjectorConfig | None = None
    output_projector: ProjectorConfig | None = None
    num_frames: int = 0
    num_media: int = 0

    def __post_init__(self) -> None:
        require_choice(self, "norm", ("layernorm", "rmsnorm"))
        require_choice(self, "activation", ACTIVATIONS)
        if self.input_projector is not None and self.input_projector.num_tokens(4) != 4:
            raise ValueError(
                "PerceiverResamplerConfig.input_projector must keep the number of features. Leave merge and "
                "tokens_per_feature out of it."
            )

    def num_tokens(self, num_features: int) -> int:
        """`num_latents`, times the tokens that `output_projector` makes of each."""
        projector = self.output_projector
        return self.num_latents if projector is None else projector.num_tokens(self.num_latents)

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> PerceiverResampler:
        """As of `ConnectorConfig`.

        Raises:
            ValueError: latents of another width than what must come out.
        """
        width = self.hidden_size or (in_size if self.input_projector is None else out_size)
        if self.output_projector is None and width != out_size:
            raise ValueError(
                f"The resampler's latents have width {width}, the language model {out_size}. Set output_projector, "
                f"such as ProjectorConfig(), or hidden_size={out_size} and input_projector."
            )
        if self.input_projector is None and width != in_size:
            raise ValueError(
                f"The resampler's latents have width {width}, the features {in_size}. Set input_projector, such as "
                f"ProjectorConfig(), or leave hidden_size out."
            )
        before, after = (
            None if projector is None else projector.build(*sizes)
            for projector, sizes in (
                (self.input_projector, (in_size, width, inner_size, num_features)),
                (self.output_projector, (width, out_size, inner_size, self.num_latents)),
            )
        )
        return PerceiverResampler(self, width, before, after)


class PerceiverLayer(nn.Module):
    """Latents look at the features and at themselves, then go through an MLP, both with residuals.

    Args:
        config: its options.
        size: width of latents and features.
    """

    def __init__(self, config: PerceiverResamplerConfig, size: int) -> None:
        super().__init__()
        inner_size = config.inner_hidden_size or 4 * size
        self.latents_norm = _norm(config, size)
        self.features_norm = _norm(config, size)
        self.attention = MultiHeadAttention(
            size, config.num_heads, config.head_size, config.num_kv_heads, bias=False, output_bias=False
        )
        self.mlp_norm = _norm(config, size)
        self.mlp = MLP(size, inner_size, config.gated, bias=False, activation=config.activation)

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            latents: [m, Q, size].
            features: [m, N, size].
            mask: [m, N + Q], true where latents may look; None for everywhere.

        Returns:
            [m, Q, size].
        """
        queries = self.latents_norm(latents)
        context = torch.cat([self.features_norm(features), queries], dim=1)
        latents = latents + self.attention(queries, context, mask=mask)
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverResampler(nn.Module):
    """[m, N, c] -> [m, K, h].

    Args:
        config: its options.
        size: width of the latents.
        input_projector: of the features before the layers.
        output_projector: of the latents after them.
    """

    def __init__(
        self, config: PerceiverResamplerConfig, size: int, input_projector: nn.Module | None = None,
        output_projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_projector = input_projector
        self.latents = nn.Parameter(normal(config.num_latents, size, std=1.0))
        self.frame_embedding = nn.Parameter(normal(config.num_frames, size, std=1.0)) if config.num_frames else None
        self.media_embedding = nn.Parameter(normal(config.num_media, size, std=1.0)) if config.num_media else None
        self.layers = nn.ModuleList(PerceiverLayer(config, size) for _ in range(config.depth))
        self.norm = _norm(config, size)
        self.output_projector = output_projector

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor | None = None, media_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Resample.

        Args:
            features: [m, N, c], or [m, frames, N, c] of videos.
            mask: [m, N] or [m, frames, N], true where a feature is real; None for all.
            media_ids: [m] how many images precede each one in its row, with `num_media`.

        Returns:
            [m, K, h].

        Raises:
            ValueError: more frames than `num_frames`, or `media_ids` missing.
        """
        x = features if features.dim() == 4 else features[:, None]
        if self.input_projector is not None:
            x = self.input_projector(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.frame_embedding is not None:
            if x.shape[1] > len(self.frame_embedding):
                raise ValueError(f"{x.shape[1]} frames, but num_frames is {len(self.frame_embedding)}.")
            x = x + self.frame_embedding[: x.shape[1], None]
        x = x.flatten(1, 2)
        if self.media_embedding is not None:
            if media_ids is None:
                raise ValueError("The resampler has num_media, so it needs media_ids [m].")
            x = x + self.media_embedding[media_ids][:, None]
        latents = self.latents.expand(len(x), -1, -1)
        if mask is not None:
            mask = torch.cat([mask.flatten(1).bool(), mask.new_ones(latents.shape[:2], dtype=torch.bool)], dim=1)
        for layer in self.layers:
            latents = layer(latents, x, mask)
        latents = self.norm(latents)
        return latents if self.output_projector is None else self.output_projector(latents)


def _norm(config: PerceiverResamplerConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.norm_eps, cast="first")
    return LayerNorm(size, config.norm_eps)
