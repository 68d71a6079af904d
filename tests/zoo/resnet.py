"""ResNet beside HF's, and NF-ResNet beside its formula."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from models.nf_resnet import NFResNet, NFResNetConfig
from models.resnet import ResNet
from tests.zoo.harness import Size, System, difference, jittered, reloaded

Tensors = dict[str, torch.Tensor]


def tiny_hf(**changes: Any) -> Any:
    """A small HF classifier with noise on all parameters and running statistics."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1], "num_labels": 7, **changes}
    return jittered(ResNetForImageClassification(ResNetConfig(**sizes)))


def converted(reference: Any) -> ResNet:
    """Our model of its folder."""
    with TemporaryDirectory() as folder:
        model: ResNet = reloaded(reference, Path(folder))
    return model


@torch.no_grad()
def parity() -> dict[str, float]:
    """Logits of both kinds of blocks and both places of the stride, pooled features, places, and the loss."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    labels, found = torch.tensor([4, 0]), {}
    for kind, early in (("bottleneck", False), ("bottleneck", True), ("basic", False)):
        reference = tiny_hf(layer_type=kind, downsample_in_bottleneck=early)
        model, theirs = converted(reference), reference(images, labels=labels)
        name = f"{kind}, {'published' if early else 'v1.5'}"
        found[f"logits, {name}"] = difference(model(images=images), theirs.logits)
        losses = ResNet.objective(model, {"images": images, "labels": labels})
        found[f"loss, {name}"] = difference(losses["classification"], theirs.loss)
        features = reference.resnet(images)
        head: Any = model.del_mixin("head")
        places = model(images=images)
        found[f"places, {name}"] = difference(places, features.last_hidden_state.flatten(2).mT)
        assert head.pool == "mean"
    return found


def normalizer_free(images: torch.Tensor, weights: Tensors, depths: list[int]) -> torch.Tensor:
    """The features of an NF-ResNet [m, c, y, x], from the weights by our names."""
    gain, alpha = (2 / (1 - 1 / torch.pi)) ** 0.5, 0.2

    def convolve(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        weight, out = weights[f"{name}.weight"], []
        for kernel, factor in zip(weight, weights[f"{name}.gain"].flatten(), strict=True):
            numbers = kernel.flatten()
            centred = numbers - numbers.mean()
            spread = (centred @ centred / len(numbers)).sqrt()
            out.append((factor * centred / (spread * len(numbers) ** 0.5)).view_as(kernel))
        return F.conv2d(x, torch.stack(out), weights[f"{name}.bias"], stride, weight.shape[-1] // 2)

    x, variance = F.max_pool2d(convolve(images, "mixins.stem.stem", 2), 3, 2, 1), 1.0
    for stage, depth in enumerate(depths):
        for index in range(depth):
            block, stride = f"mixins.stem.stages.{stage}.{index}", 2 if stage and not index else 1
            start = gain * x.relu() / variance**0.5
            y = convolve(start, f"{block}.branch.0", 1)
            y = convolve(gain * y.relu(), f"{block}.branch.1", stride)
            y = convolve(gain * y.relu(), f"{block}.branch.2", 1)
            if index == 0:
                x, variance = convolve(start, f"{block}.shortcut", stride), 1.0
            x, variance = x + alpha * y, variance + alpha**2
    return gain * x.relu()


@torch.no_grad()
def nf_parity() -> dict[str, float]:
    """Places, pooled features and logits."""
    depths = [2, 3]
    model = jittered(NFResNet(NFResNetConfig(image_size=40, channels=[8, 16, 24], depths=depths, num_classes=7)))
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    weights = model.state_dict()
    maps = normalizer_free(images, weights, depths)
    logits = maps.mean((2, 3)) @ weights["mixins.head.linear.weight"].T + weights["mixins.head.linear.bias"]
    found = {"logits": difference(model(images=images), logits)}
    model.del_mixin("head")
    return {**found, "places": difference(model(images=images), maps.flatten(2).mT)}


_HF = "HF ResNetForImageClassification, 1000 classes"

SYSTEMS = [
    System(
        name="ResNet",
        key="resnet",
        family="tower",
        paper="1512.03385",
        model="models.resnet:ResNet",
        loss="cross entropy of the class",
        reference="HF ResNet",
        parity=parity,
        sizes={
            "ResNet-18": Size(11_689_512, _HF, "18.yaml"),
            "ResNet-34": Size(21_797_672, _HF, "34.yaml"),
            "ResNet-50": Size(25_557_032, _HF),
            "ResNet-101": Size(44_549_160, _HF, "101.yaml"),
            "ResNet-152": Size(60_192_808, _HF, "152.yaml"),
        },
    ),
    System(
        name="NF-ResNet",
        key="nf_resnet",
        family="tower",
        paper="2101.08692",
        model="models.nf_resnet:NFResNet",
        loss="cross entropy of the class",
        reference="the formula, block by block",
        parity=nf_parity,
        sizes={"NF-ResNet-50": Size(25_557_032, "timm's nf_resnet50 (25.6M), gains and biases in place of norms")},
    ),
]
