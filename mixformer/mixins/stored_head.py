"""Parameters that a released file carries and no forward uses."""

from __future__ import annotations

from typing import Any

from mixformer.mixin import BaseMixin
from mixformer.sites import Linear, make_norm


class StoredHeadMixin(BaseMixin):
    """Keep a tower's final norm and contrastive head, which CogAgent stores and never applies. They are frozen.

    Args:
        out_size: rows of the head.
    """

    def __init__(self, out_size: int) -> None:
        super().__init__()
        self.out_size = out_size

    def build(self, model: Any) -> None:
        self.norm = make_norm(model.config)
        self.head = Linear(model.config.hidden_size, self.out_size)
        self.requires_grad_(False)

    def on_attach(self, model: Any) -> None:
        self._unused(model).requires_grad_(False)

    def on_detach(self, model: Any) -> None:
        self._unused(model).requires_grad_(True)

    @staticmethod
    def _unused(model: Any) -> Any:
        return model.transformer.layers[model.config.layers_run :]
