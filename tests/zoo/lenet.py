"""LeNet-5 beside its formula, map by map."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.lenet import LeNet5
from tests.zoo.harness import Size, System, difference, jittered

Tensors = dict[str, torch.Tensor]

TABLE = """
X...XXX..XXXX.XX
XX...XXX..XXXX.X
XXX...XXX..X.XXX
.XXX..XXXX..X.XX
..XXX..XXXX.XX.X
...XXX..XXXX.XXX
"""
"""Table I of the paper: rows are the maps of S2, columns those of C3."""


def squashed(x: torch.Tensor) -> torch.Tensor:
    """A tanh(S a) with A = 1.7159 and S = 2/3."""
    power = torch.exp(-4 / 3 * x)
    return 1.7159 * (1 - power) / (1 + power)


def halved(x: torch.Tensor, coefficient: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sums of 2 x 2 squares, scaled and moved."""
    total = x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    return squashed(total * coefficient + bias)


def c3(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[m, 6, 14, 14] -> [m, 16, 10, 10], one map after the other; a map's weights follow those of the map before."""
    found, start = [], 0
    for column in range(16):
        seen = [row for row, line in enumerate(TABLE.split()) if line[column] == "X"]
        kernel = weight[start : start + len(seen)][None]
        found.append(squashed(F.conv2d(maps[:, seen], kernel, bias[column : column + 1])))
        start += len(seen)
    assert start == len(weight)
    return torch.cat(found, 1)


def distances(images: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """[m, 1, 32, 32] -> [m, 10] from the weights by our names."""
    stem = {name.removeprefix("mixins.stem."): tensor for name, tensor in weights.items()}
    x = squashed(F.conv2d(images, stem["c1.weight"][:, None], stem["c1.bias"]))
    x = halved(x, stem["s2.coefficient"], stem["s2.bias"])
    x = c3(x, stem["c3.weight"], stem["c3.bias"])
    x = halved(x, stem["s4.coefficient"], stem["s4.bias"])
    x = squashed(x.flatten(1) @ stem["c5.weight"].view(120, 400).T + stem["c5.bias"])
    x = squashed(x @ weights["mixins.head.f6.weight"].T + weights["mixins.head.f6.bias"])
    return torch.stack([((x - code) ** 2).sum(1) for code in weights["mixins.head.codes"]], 1)


@torch.no_grad()
def parity() -> dict[str, float]:
    """Distances of grey and of colour pictures, and the loss, per unit of the code: in sum they are in the hundreds."""
    model, units = jittered(LeNet5()), 84
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    colours = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    labels, expected = torch.tensor([3, 0, 9, 3]), distances(images, model.state_dict())
    grey = distances((colours[:, :1] + colours[:, 1:2] + colours[:, 2:]) / 3, model.state_dict())
    loss = LeNet5.objective(model, {"images": images, "labels": labels})["squared_distance"]
    right = torch.stack([expected[row, label] for row, label in enumerate(labels.tolist())]).mean()
    return {
        "distances": difference(model(images=images) / units, expected / units),
        "distances of colour pictures": difference(model(images=colours) / units, grey / units),
        "loss": difference(loss / units, right / units),
    }


SYSTEM = System(
    name="LeNet-5",
    key="lenet",
    family="tower",
    paper="LeCun et al., Proceedings of the IEEE 86(11), 1998",
    model="models.lenet:LeNet5",
    loss="squared distance to the code of the class",
    reference="the formula, map by map",
    parity=parity,
    sizes={"LeNet-5": Size(60_000, "LeCun et al., section II-B")},
)
