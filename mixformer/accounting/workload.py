"""What a forward is counted for: texts and pictures of given sizes, as tensors on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.host import MixinHost
from mixformer.masks import Mask
from mixformer.mixins import ImageTokensMixin
from mixformer.routes import Routes, Split

READY_FEATURES = 36
"""Regions of a picture for models that take ready features of any number (36 is what bottom-up attention gives)."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a batch. A row is a start token, its pictures and its text.

    Attributes:
        text_tokens: of a row, beside the start token.
        images: pictures of a row.
        batch: rows.

    Raises:
        ValueError: a negative number, or no rows.
    """

    text_tokens: int = 128
    images: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("text_tokens", 0), ("images", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def fitted(self, model: Any) -> Workload:
        """Without pictures if the model takes none, and with as much text as a learned position table has room for."""
        if is_tower(model):
            return replace(self, text_tokens=0)
        fitted = self if takes_images(model) else replace(self, images=0)
        room = longest_row(model)
        if room is not None and fitted.row_length(model) > room:
            fitted = replace(fitted, text_tokens=max(0, room - replace(fitted, text_tokens=0).row_length(model)))
        return fitted

    def row_length(self, model: Any) -> int:
        """Tokens of a row; for a tower, those of a picture."""
        if is_tower(model):
            return int(getattr(model.config, "max_positions", 0))
        return 1 + self.text_tokens + self.images * image_tokens(model)


def is_tower(model: Any) -> bool:
    """Whether a model takes pictures alone."""
    return not model.config.vocab_size


def takes_images(model: Any) -> bool:
    """Whether a model takes pictures."""
    return is_tower(model) or bool({"images", "cross_images"} & model.declared.keys())


def longest_row(model: Any) -> int | None:
    """Tokens that a learned position table has room for; None where nothing limits them, and for towers."""
    config = model.config
    return config.max_positions if config.positions == "learned" and not is_tower(model) else None


def image_tokens(model: Any) -> int:
    """Tokens of a row that each picture takes; 0 where pictures are not in the sequence."""
    mixin = _image_mixin(model)
    if mixin is None:
        return 0
    ready = mixin.adapter_config.num_tokens(READY_FEATURES) if mixin.tower is None else mixin.num_features
    return int(ready + 2 * mixin.marks)


def _image_mixin(model: Any) -> Any:
    return next((mixin for mixin in model.mixins.values() if isinstance(mixin, ImageTokensMixin)), None)


def meta_twin(model: Any) -> Any:
    """A copy of a model whose tensors are on the meta device: nothing is allocated and the model is left alone."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                shape = torch.empty_like(tensor, device="meta")
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_weight else shape
    return copy.deepcopy(model, memo)


def prepared(model: Any, workload: Workload) -> tuple[Context | None, dict[str, Any]]:
    """The plan and the inputs of a batch, for `model.run(plan=plan, **inputs)`; for towers there is no plan.

    Integers are planned on the CPU, as a collator does, and then go to the meta device, where nothing can look at them.

    Args:
        model: on the meta device.
        workload: sizes.

    Raises:
        ValueError: sizes that the model does not take.
    """
    if is_tower(model):
        if not workload.images:
            raise ValueError(f"{type(model).__name__} takes pictures only: count one image at least.")
        return None, {"images": _pictures(model.config, workload.batch * workload.images)}
    room, length = longest_row(model), workload.row_length(model)
    if room is not None and length > room:
        raise ValueError(
            f"A row of {length} tokens (1 to start, {workload.text_tokens} of text, {workload.images} x "
            f"{image_tokens(model)} of images) is longer than the model's table of {room} positions. Take less text."
        )
    if workload.images and not takes_images(model):
        raise ValueError(f"{type(model).__name__} takes no images, but {workload.images} were asked for.")
    ids = torch.zeros(workload.batch, length, dtype=torch.int64)
    for mixin in model.mixins.values():  # heads that pool at the end of a text look for it
        ids[:, -1] = getattr(mixin, "eos_token_id", None) or ids[:, -1]
    inputs = _image_inputs(model, workload, ids) if workload.images else {}
    plan = model.plan(ids, **inputs)
    plan.known_positions = plan.following = None  # they hold only for the very tensors that were planned
    return _on_meta(plan, {}), {name: _on_meta(value, {}) for name, value in inputs.items()}


def _image_inputs(model: Any, workload: Workload, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    num_images, sequence = workload.batch * workload.images, _image_mixin(model)
    if sequence is not None:
        found["token_type_ids"] = torch.zeros_like(ids)
        found["token_type_ids"][:, 1 : 1 + workload.images * image_tokens(model)] = 1
    for name in ("images", "cross_images"):
        owner = None if name not in model.declared else model.mixins[model.declared[name]]
        if owner is None:
            continue
        if name == "cross_images" and sequence is None and workload.images > 1:
            raise ValueError("Each row attends to one cross image where none are in the sequence: count one.")
        config = getattr(owner, "tower_config", None) or _nested_config(owner)
        found[name] = (
            torch.empty(num_images, READY_FEATURES, owner.feature_size, device="meta") if config is None
            else _pictures(config, num_images)
        )
    return found


def _nested_config(mixin: nn.Module) -> Any:
    return next((module.config for module in mixin.modules() if isinstance(module, MixinHost)), None)


def _pictures(config: Any, num_images: int) -> torch.Tensor:
    """[m, c, y, x] of the size that a tower takes."""
    channels = getattr(config, "in_channels", 3)
    return torch.empty(num_images, channels, config.image_size, config.image_size, device="meta")


def _on_meta(value: Any, seen: dict[int, Any]) -> Any:
    """The same with every tensor on the meta device; what is one tensor stays one."""
    if isinstance(value, torch.Tensor):
        return seen.setdefault(id(value), value.to("meta"))
    if isinstance(value, dict):
        return {key: _on_meta(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_on_meta(item, seen) for item in value)
    if isinstance(value, (Context, Routes, Split, Mask)):
        if id(value) not in seen:
            seen[id(value)] = made = copy.copy(value)
            vars(made).update({name: _on_meta(item, seen) for name, item in vars(value).items()})
        return seen[id(value)]
    return value
