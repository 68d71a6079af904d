"""VILA beside HF's LLaVA with a linear projector, and, with merged patches, beside recorded projectors and HF LLaMA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer.connectors import ProjectorConfig
from models.vila import VILA
from tests.zoo.harness import ROOT, Size, System, difference
from tests.zoo.llava import (
    Spliced,
    Tensors,
    assembled,
    beside,
    clip_config,
    hf,
    language_count,
    llama_config,
    patches,
    spliced_batch,
    tiny_hf,
    vision_count,
)

GOLDEN = ROOT / "tests" / "golden" / "zoo"
DOWNSAMPLE = {1: "norms.0", 2: "linears.0", 4: "linears.1"}
DOWNSAMPLE_3X3 = {1: "norms.0", 2: "linears.0", 4: "norms.1", 5: "linears.1", 7: "linears.2"}


def downsampled(features: torch.Tensor, weights: Tensors, factor: int, last: int) -> torch.Tensor:
    """[m, N, c] -> [m, K, h] by VILA-1.5's formula: norms and Linears, the latter with GELUs between them.

    Args:
        features: of square pictures.
        weights: `layers.{i}.weight` and `.bias`.
        factor: side of the squares that become one token.
        last: place of the last Linear.
    """
    side = round(features.shape[1] ** 0.5)
    grid, missing = features.unflatten(1, (side, side)), -side % factor
    grid = F.pad(grid, (0, 0, 0, missing, 0, missing))
    corners = [(y, x) for y in range(0, side, factor) for x in range(0, side, factor)]
    x = torch.stack([grid[:, y : y + factor, x : x + factor].flatten(1) for y, x in corners], dim=1)
    for place in range(1, last + 1):
        weight, bias = (weights.get(f"layers.{place}.{kind}") for kind in ("weight", "bias"))
        if weight is None:
            x = F.gelu(x)
        else:
            x = F.linear(x, weight, bias) if weight.dim() == 2 else F.layer_norm(x, weight.shape, weight, bias, 1e-5)
    return x


def merging(case: str, names: dict[int, str], config: ProjectorConfig) -> dict[str, float]:
    """A recorded projector between an HF CLIP and an HF LLaMA of its widths; 25 patches, so that some are missing.

    Args:
        case: where it is recorded.
        names: its modules by our names.
        config: of ours.
    """
    weights, io = (load_file(GOLDEN / case / f"{file}.safetensors") for file in ("weights", "io"))
    last, factor = max(names), config.merge
    recorded = [(io[f"{letter}.in.features"], io[f"{letter}.out.tokens"]) for letter in "abc"]
    assert max(difference(downsampled(x, weights, factor, last), y) for x, y in recorded) < 2e-6
    language = hf(llama_config(hidden_size=16, intermediate_size=24))
    vision = hf(clip_config(hidden_size=6, intermediate_size=10, image_size=20))
    kinds = ("weight", "bias")
    projector = {f"{ours}.{kind}": weights[f"layers.{i}.{kind}"] for i, ours in names.items() for kind in kinds}
    model = assembled(VILA, language, vision, config, projector)
    reference = Spliced(language, lambda images: downsampled(patches(vision, images), weights, factor, last))
    ours = model.get_mixin("image").projector
    return {
        "recorded projector": max(difference(ours(x), y) for x, y in recorded),
        **beside(model, reference, spliced_batch(config.num_tokens(25), 20)),
    }


def linear() -> dict[str, float]:
    """The linear form beside an HF LLaVA without an activation, whose second Linear leaves things as they are."""
    language, vision = hf(llama_config()), hf(clip_config())
    reference = tiny_hf(language.config, vision.config, projector_hidden_act="linear")
    inner = reference.model
    inner.language_model, inner.vision_tower, reference.lm_head = language.model, vision, language.lm_head
    first, second = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
    second.weight.copy_(torch.eye(32))
    second.bias.zero_()
    projector = {"linears.0.weight": first.weight, "linears.0.bias": first.bias}
    model = assembled(VILA, language, vision, ProjectorConfig(), projector)
    return beside(model, reference, spliced_batch(16, 16))


@torch.no_grad()
def parity() -> dict[str, float]:
    """The linear form, and both forms that merge patches."""
    options: dict[str, Any] = {"depth": 2, "norm": "pre", "pad": True}
    forms = {
        "linear": linear(),
        "2 x 2": merging("vila-downsample", DOWNSAMPLE, ProjectorConfig(**options, merge=2)),
        "3 x 3": merging("vila-downsample-3x3", DOWNSAMPLE_3X3, ProjectorConfig(**options, merge=3, narrow=3)),
    }
    return {f"{what}, {form}": value for form, found in forms.items() for what, value in found.items()}


SYSTEM = System(
    name="VILA",
    key="vila",
    family="splice",
    paper="2312.07533",
    model="models.vila:VILA",
    loss="next token of text, not at pictures",
    reference="HF Llava with a linear projector; VILA-1.5's recorded projectors between HF CLIP and HF LLaMA",
    parity=parity,
    sizes={
        "7B": Size(
            language_count(4096, 11008, 32) + vision_count() + 1024 * 4096 + 4096,
            "the shapes of Llama-2-7B, of CLIP L/14 at 336 and of one Linear",
        ),
        "13B": Size(
            language_count(5120, 13824, 40) + vision_count() + 1024 * 5120 + 5120,
            "the shapes of Llama-2-13B, of CLIP L/14 at 336 and of one Linear",
            "13b.yaml",
        ),
    },
    chats=True,
    images=True,
)
