"""MobileVLM V1 and V2 beside their recorded projectors, between an HF CLIP and an HF LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer.connectors import LDPConfig, LDPv2Config
from models.mobilevlm import MobileVLM
from models.mobilevlm_v2 import MobileVLMV2
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
    vision_count,
)

GOLDEN = ROOT / "tests" / "golden" / "zoo"
BLOCK = {
    "depthwise": "block.0.0",
    "depthwise_norm": "block.0.1",
    "squeeze": "block.1.fc1",
    "excite": "block.1.fc2",
    "pointwise": "block.2.0",
    "pointwise_norm": "block.2.1",
}
V1 = {
    "projector.linears.0": "model.mlp.1",
    "projector.linears.1": "model.mlp.3",
    **{f"blocks.{i}.{ours}": f"model.mb_block.{i + 1}.{theirs}" for i in range(2) for ours, theirs in BLOCK.items()},
}
V2 = {"projector.linears.0": "mlp.mlp.0", "projector.linears.1": "mlp.mlp.2", "positions": "peg.peg.0"}


def mlp(features: torch.Tensor, weights: Tensors, first: str, second: str) -> torch.Tensor:
    """[m, N, c] -> [m, h, y, x]"""
    x = F.gelu(F.linear(features, weights[f"{first}.weight"], weights[f"{first}.bias"]))
    x = F.linear(x, weights[f"{second}.weight"], weights[f"{second}.bias"])
    side = round(x.shape[1] ** 0.5)
    return x.mT.unflatten(2, (side, side))


def channel_norm(x: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    """Over the channels of [m, h, y, x], each pixel by itself."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    scale, shift = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def inverted(x: torch.Tensor, weights: Tensors, name: str, stride: int) -> torch.Tensor:
    """One block of MobileVLM's: depthwise, squeeze and excite, pointwise."""
    kernel = weights[f"{name}.block.0.0.weight"]
    y = F.conv2d(x, kernel, stride=stride, padding=1, groups=len(kernel))
    y = F.hardswish(channel_norm(y, weights, f"{name}.block.0.1"))
    squeeze, excite = (f"{name}.block.1.{part}" for part in ("fc1", "fc2"))
    gate = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), weights[f"{squeeze}.weight"], weights[f"{squeeze}.bias"]))
    y = y * F.hardsigmoid(F.conv2d(gate, weights[f"{excite}.weight"], weights[f"{excite}.bias"]))
    y = channel_norm(F.conv2d(y, weights[f"{name}.block.2.0.weight"]), weights, f"{name}.block.2.1")
    return x + y if stride == 1 else y


def ldp(features: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """[m, N, c] -> [m, N/4, h] by the formula of V1's projector."""
    x = mlp(features, weights, "model.mlp.1", "model.mlp.3")
    x = inverted(inverted(x, weights, "model.mb_block.1", 1), weights, "model.mb_block.2", 2)
    return x.flatten(2).mT


def ldp_v2(features: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """[m, N, c] -> [m, 144, h] by the formula of V2's projector."""
    x = F.adaptive_avg_pool2d(mlp(features, weights, "mlp.mlp.0", "mlp.mlp.2"), 12)
    kernel, bias = weights["peg.peg.0.weight"], weights["peg.peg.0.bias"]
    return (x + F.conv2d(x, kernel, bias, padding=1, groups=len(kernel))).flatten(2).mT


@torch.no_grad()
def parity(
    model_class: Any, case: str, names: dict[str, str], formula: Callable[[torch.Tensor, Tensors], torch.Tensor],
    adapter: Any, image_size: int,
) -> dict[str, float]:
    """A recorded projector alone, and between an HF CLIP and an HF LLaMA of its widths.

    Args:
        model_class: which version.
        case: where it is recorded.
        names: its modules by our names.
        formula: the projector, written out; checked against what is recorded.
        adapter: config of ours.
        image_size: of the pictures; patches have 4 pixels.
    """
    weights, io = (load_file(GOLDEN / case / f"{file}.safetensors") for file in ("weights", "io"))
    letters = [letter for letter in "abc" if f"{letter}.in.features" in io]
    recorded = [(io[f"{letter}.in.features"], io[f"{letter}.out.tokens"]) for letter in letters]
    assert max(difference(formula(x, weights), y) for x, y in recorded) < 2e-6
    width, hidden = recorded[0][0].shape[-1], recorded[0][1].shape[-1]
    language = hf(llama_config(hidden_size=hidden))
    vision = hf(clip_config(hidden_size=width, image_size=image_size))
    squeezing = (".squeeze.weight", ".excite.weight", ".pointwise.weight")
    projector = {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
        for ours, theirs in names.items() for kind in ("weight", "bias") if f"{theirs}.{kind}" in weights
    }
    projector = {name: x.flatten(1) if name.endswith(squeezing) else x for name, x in projector.items()}
    model = assembled(model_class, language, vision, adapter, projector)
    reference = Spliced(language, lambda images: formula(patches(vision, images), weights))
    ours = model.get_mixin("image").projector
    return {
        "recorded projector": max(difference(ours(x), y) for x, y in recorded),
        **beside(model, reference, spliced_batch(adapter.num_tokens((image_size // 4) ** 2), image_size)),
    }


def mlp_count(hidden: int) -> int:
    """Parameters of a projector's MLP."""
    return 1024 * hidden + hidden + hidden * hidden + hidden


def ldp_count(hidden: int) -> int:
    """Parameters of V1's projector; both widths divide by 32, so that a quarter is squeezed."""
    squeezed = hidden // 4
    gate = hidden * squeezed + squeezed + squeezed * hidden + hidden
    return mlp_count(hidden) + 2 * (9 * hidden + 2 * hidden + gate + hidden * hidden + 2 * hidden)


def ldp_v2_count(hidden: int) -> int:
    """Parameters of V2's projector."""
    return mlp_count(hidden) + 9 * hidden + hidden


def sizes(projector: Callable[[int], int], what: str, version: str) -> dict[str, Size]:
    """The two published sizes of a version."""
    source = f"the shapes of MobileLLaMA, of CLIP L/14 at 336 and of {what}"
    small, large = language_count(2048, 5632, 24), language_count(2560, 6912, 32)
    return {
        f"{version}1.7B": Size(small + vision_count() + projector(2048), source),
        f"{version}3B": Size(large + vision_count() + projector(2560), source, "3b.yaml"),
    }


SYSTEMS = [
    System(
        name="MobileVLM",
        key="mobilevlm",
        family="splice",
        paper="2312.16886",
        model="models.mobilevlm:MobileVLM",
        loss="next token of text, not at pictures",
        reference="the recorded projector between HF CLIP and HF LLaMA",
        parity=partial(parity, MobileVLM, "mobilevlm-ldp-v1", V1, ldp, LDPConfig(), 20),
        sizes=sizes(ldp_count, "LDP (18.94M with the smaller one, as we remember the paper)", ""),
        chats=True,
        images=True,
    ),
    System(
        name="MobileVLM V2",
        key="mobilevlm_v2",
        family="splice",
        paper="2402.03766",
        model="models.mobilevlm_v2:MobileVLMV2",
        loss="next token of text, not at pictures",
        reference="the recorded projector between HF CLIP and HF LLaMA",
        parity=partial(parity, MobileVLMV2, "mobilevlm-ldp-v2", V2, ldp_v2, LDPv2Config(), 52),
        sizes=sizes(ldp_v2_count, "LDPv2 (6.32M with the smaller one, as we remember the paper)", "V2 "),
        chats=True,
        images=True,
    ),
]
