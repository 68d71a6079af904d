"""What is known about a system from outside: its reference, its published sizes, and how far ours is from them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from mixformer.config import import_class, read_settings

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "zoo"
TOLERANCE = 2e-5
"""Largest difference from a reference, fp32."""

FAMILIES = ("base", "tower", "learned prefix", "splice", "joint")


@dataclass(frozen=True)
class Size:
    """A published size.

    Attributes:
        parameters: in total.
        source: where that number comes from: a paper, or the reference's own count.
        config: file in the system's folder; None for the model class's defaults.
    """

    parameters: int
    source: str
    config: str | None = None


@dataclass(frozen=True)
class System:
    """One system of the zoo.

    Attributes:
        name: as its authors write it.
        key: of `examples/zoo/{key}/` and `models/{file}.py`'s configurations.
        family: one of FAMILIES.
        paper: arXiv id, or where it was published.
        model: module and class.
        loss: what is minimised, in a few words.
        reference: what parity was measured against.
        parity: measures it: {what was compared: largest absolute difference}, fp32, all parameters jittered.
        sizes: the published ones, by name.
        chats: whether it generates text from a prompt.
        images: whether it needs a picture for that.
    """

    name: str
    key: str
    family: str
    paper: str
    model: str
    loss: str
    reference: str
    parity: Callable[[], dict[str, float]]
    sizes: dict[str, Size] = field(default_factory=dict)
    chats: bool = False
    images: bool = False

    @property
    def tiny(self) -> Path:
        """The tiny configuration."""
        return CONFIGS / self.key / "tiny.yaml"

    @property
    def model_class(self) -> Any:
        """Its class."""
        return import_class(self.model, "model")

    @property
    def model_file(self) -> Path:
        """The file that composes it."""
        return ROOT / (self.model.partition(":")[0].replace(".", "/") + ".py")

    def build_tiny(self) -> Any:
        """The tiny model, fresh."""
        return read_settings(self.model_class, self.tiny, [], ()).build_model()

    def count(self, size: Size) -> int:
        """Parameters of a size, counted on the meta device."""
        file = None if size.config is None else CONFIGS / self.key / size.config
        model = read_settings(self.model_class, file, [], ()).build_model("meta")
        return sum(parameter.numel() for parameter in model.parameters())


def systems() -> list[System]:
    """All systems, by family and name: `SYSTEM` or `SYSTEMS` of each module beside this one."""
    found: list[System] = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith(("test_", "__")) or module.name == "harness":
            continue
        content = importlib.import_module(f"{__package__}.{module.name}")
        found += getattr(content, "SYSTEMS", [])
        found += [content.SYSTEM] if hasattr(content, "SYSTEM") else []
    return sorted(found, key=lambda system: (FAMILIES.index(system.family), system.name.lower()))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; tensors of one shape.

    Raises:
        AssertionError: the shapes differ, or a value is not finite.
    """
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    assert torch.isfinite(theirs).all() and torch.isfinite(ours).all()
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def jittered(reference: nn.Module, seed: int = 0, scale: float = 0.1) -> Any:
    """The reference in evaluation mode with noise on every parameter and on running statistics.

    Released weights are never zeros and ones; a fresh reference has gates, scales, biases and tokens that are, and
    they would hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in reference.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(scale * torch.rand(buffer.shape, generator=generator))
    return reference.eval()


def reloaded(reference: Any, folder: Path) -> Any:
    """Save an HF model and read the folder with `mixformer.from_pretrained`."""
    from mixformer import from_pretrained

    reference.save_pretrained(folder)
    return from_pretrained(folder)


def copy_weights(model: nn.Module, tensors: dict[str, torch.Tensor], unused: Iterable[str] = ()) -> None:
    """Put every tensor (by our names) into the model; all must be given, none may be left but `unused` ones."""
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(unused)}
    with torch.no_grad():
        model.load_state_dict(tensors, strict=True)
