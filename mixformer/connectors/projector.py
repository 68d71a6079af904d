"""Linear, MLP and gated projectors, with norms and a merge of neighbours where the published ones have them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn as nn

from mixformer.connectors.connector import ConnectorConfig, grid_side, require_choice, to_grid
from mixformer.connectors.pixel_shuffle import VERSIONS, pad_grid, pixel_shuffle
from mixformer.sites import ACTIVATIONS, LayerNorm, Linear


@dataclass
class ProjectorConfig(ConnectorConfig):
    """Options of `Projector`.

    | system | options |
    |---|---|
    | LLaVA (arXiv:2304.08485), VILA (arXiv:2312.07533), PaLM-E, VisualBERT | none |
    | LLaVA-1.5 (arXiv:2310.03744), InternLM-XComposer2 | `depth: 2` |
    | VILA-1.5 | `depth: 2, norm: pre, merge: 2, pad: true` |
    | VILA-1.5 3x3 | `depth: 2, norm: pre, merge: 3, pad: true, narrow: 3` |
    | InternVL-Chat 1.5 (arXiv:2404.16821) | `depth: 2, norm: pre, merge: 2` |
    | GIT (arXiv:2205.14100) | `norm: post` |
    | Frozen (arXiv:2106.13884) | `tokens_per_feature: 2` of a pooled feature |
    | ClipCap's MLP (arXiv:2111.09734) | `depth: 2, activation: tanh, tokens_per_feature: 10` of a pooled feature |
    | Idefics2's modality projection (arXiv:2405.02246) | `depth: 2, gated: true, activation: silu, bias: false` |

    Attributes:
        depth: Linears, with the activation between each two.
        activation: between Linears.
        gated: activation(gate(x)) * up(x) between two Linears instead of activation(up(x)).
        bias: whether Linears have one.
        inner_hidden_size: width between Linears; None for h, or the width of the language model's MLP if gated, or
            half of what comes out if each feature becomes several tokens.
        norm: `pre`: LayerNorm of the (merged) features; `post`: LayerNorm of what comes out; or `none`.
        norm_eps: added to the variance.
        tokens_per_feature: tokens that each feature becomes.
        merge: side of the squares of features that become one token (see `pixel_shuffle`).
        merge_version: order of the merged tokens, `v2` or `v1`.
        pad: fill grids that `merge` does not divide with zeros; such a grid is an error otherwise.
        narrow: above 1, one more Linear before the others divides the width by this; it has a norm of its own
            where `norm` is `pre`.
    """

    depth: int = 1
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    inner_hidden_size: int | None = None
    norm: str = "none"
    norm_eps: float = 1e-5
    tokens_per_feature: int = 1
    merge: int = 1
    merge_version: str = "v2"
    pad: bool = False
    narrow: int = 1

    def __post_init__(self) -> None:
        require_choice(self, "activation", ACTIVATIONS)
        require_choice(self, "norm", ("none", "pre", "post"))
        require_choice(self, "merge_version", VERSIONS)
        for key in ("depth", "tokens_per_feature", "merge", "narrow"):
            if getattr(self, key) < 1:
                raise ValueError(f"ProjectorConfig.{key} is {getattr(self, key)}; it must be at least 1.")
        if self.gated and self.depth != 2:
            raise ValueError(f"ProjectorConfig: a gated projector has depth 2, not {self.depth}.")

    def num_tokens(self, num_features: int) -> int:
        """As of `ConnectorConfig`; with `merge`, features must be a square grid."""
        if self.merge > 1:
            side = grid_side(num_features, 1 if self.pad else self.merge, "" if self.pad else "merge")
            num_features = ((side + self.merge - 1) // self.merge) ** 2
        return num_features * self.tokens_per_feature

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> Projector:
        """As of `ConnectorConfig`.

        Raises:
            ValueError: `narrow` does not divide the width of the features.
        """
        merged = in_size * self.merge**2
        if merged % self.narrow:
            raise ValueError(f"ProjectorConfig.narrow {self.narrow} does not divide the features' width {merged}.")
        several = out_size * self.tokens_per_feature
        default = inner_size if self.gated else out_size if self.tokens_per_feature == 1 else several // 2
        inner = [self.inner_hidden_size or default] * (self.depth - 1)
        narrowed = [merged // self.narrow] if self.narrow > 1 else []
        return Projector(self, [merged, *narrowed, *inner, several])


class Projector(nn.Module):
    """[m, N, c] -> [m, K, h]: (merge), (norm), Linears with activations between them, (norm).

    Args:
        config: its options.
        widths: before, between and after its Linears.
    """

    def __init__(self, config: ProjectorConfig, widths: list[int]) -> None:
        super().__init__()
        self.config = config
        self.linears = nn.ModuleList(Linear(a, b, config.bias) for a, b in pairwise(widths))
        self.gate = Linear(widths[-3], widths[-2], config.bias) if config.gated else None
        normed = widths[: 1 + (config.narrow > 1)] if config.norm == "pre" else []
        self.norms = nn.ModuleList(LayerNorm(size, config.norm_eps) for size in normed)
        size = widths[-1] // config.tokens_per_feature
        self.output_norm = LayerNorm(size, config.norm_eps) if config.norm == "post" else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h].

        Raises:
            ValueError: a grid that does not divide.
        """
        config, x = self.config, features
        if config.merge > 1:
            config.num_tokens(x.shape[1])
            x = pixel_shuffle(pad_grid(to_grid(x), config.merge), config.merge, config.merge_version).flatten(1, 2)
        last = len(self.linears) - 1
        for index, linear in enumerate(self.linears):
            if index < len(self.norms):
                x = self.norms[index](x)
            y = linear(x)
            if self.gate is not None and index == last - 1:
                y = y * ACTIVATIONS[config.activation](self.gate(x))
            elif index < last:
                y = ACTIVATIONS[config.activation](y)
            x = y
        x = x.unflatten(-1, (config.tokens_per_feature, -1)).flatten(1, 2)
        return x if self.output_norm is None else self.output_norm(x)
