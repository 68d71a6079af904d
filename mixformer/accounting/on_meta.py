"""Answers for code that looks at values, or at autocast, on the meta device, where there are none."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class OnMeta(TorchFunctionMode):
    """While entered: tensors compared as a whole are equal, a boolean mask selects every row, and autocast is known of.

    Attributes:
        autocast: dtype of mixed precision, or None.
    """

    autocast: torch.dtype | None = None

    def __enter__(self) -> Any:
        asked = torch.is_autocast_enabled

        def is_enabled(*device_type: str) -> bool:
            return self.autocast is not None if device_type == ("meta",) else bool(asked(*device_type))

        # torch knows of no autocast for this device, and raises
        self._patch = patch.object(torch, "is_autocast_enabled", is_enabled)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal and args[0].is_meta:
            return args[0].shape == args[1].shape
        if func is torch.Tensor.__getitem__ and _is_boolean_mask(args[1]):
            return args[0].flatten(0, args[1].dim() - 1).clone()
        return func(*args, **(kwargs or {}))


def _is_boolean_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.is_meta and index.dtype == torch.bool
