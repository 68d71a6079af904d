"""How a model may be used, and the changes that let it fit into less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixformer.accounting.workload import Workload, image_tokens, is_tower, longest_row, meta_twin, takes_images
from mixformer.mixins import LoRAMixin
from mixformer.mixins.low_rank import LANGUAGE

CONTEXT = 2048
_ADAPTERS = "planned_lora"
_RANK = 8
_CHUNK = 1024
_LEAST_TEXT = 64


@dataclass(frozen=True)
class Setup:
    """How a model is used.

    Attributes:
        batch: rows; in training, of one device.
        context: tokens of a row, those of its pictures among them.
        images: pictures of a row.
        devices: that train together.
        dtype: that the weights are cast to; None for their own.
        quantise: kinds of the weights of Linears, as of `from_pretrained`; what is trained is left. None for none.
        checkpointing: layers are recomputed in the backward pass, in towers as well; None for what the model says.
        lora: rank of low-rank updates of the language model that alone are trained; None for the stage's parameters.
        loss_chunk: tokens whose logits are held at once; None for what the stage says.
    """

    batch: int = 1
    context: int = CONTEXT
    images: int = 1
    devices: int = 1
    dtype: str | None = None
    quantise: str | Mapping[str, str | None] | None = None
    checkpointing: bool | None = None
    lora: int | None = None
    loss_chunk: int | None = None


def default_context(model: Any, images: int) -> int:
    """Tokens of a row where nobody says how many: 2048, more where pictures take them, less where positions end."""
    least = 1 + images * image_tokens(model)
    room = longest_row(model)
    if room is None and not is_tower(model) and model.config.max_positions > least:
        room = model.config.max_positions  # a table that would grow; it tells what the model is made for
    wanted = max(CONTEXT, least + 256)
    return wanted if room is None else min(wanted, room)


def workload_of(model: Any, setup: Setup) -> Workload:
    """The sizes of a batch.

    Raises:
        ValueError: pictures that do not fit into the row.
    """
    images = setup.images if takes_images(model) else 0
    if is_tower(model):
        return Workload(0, max(images, 1), setup.batch)
    text = setup.context - 1 - images * image_tokens(model)
    if text < 0:
        raise ValueError(
            f"{images} image(s) of {image_tokens(model)} tokens do not fit into a context of {setup.context} tokens. "
            f"Take a longer one, or fewer images."
        )
    return Workload(text, images, setup.batch)


Change = Callable[[Any, Setup, Any], "tuple[str, str, Setup] | None"]
"""(model, setup, options of the loop) -> what is changed, how, and the setup then; None where nothing changes."""


def smaller_dtype(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Weights in bfloat16, where some are wider."""
    wide = any(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    if setup.dtype is not None or not wide:
        return None
    return "weights in bfloat16", "dtype: bfloat16", replace(setup, dtype="bfloat16")


def bits_8(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Linears in 8 bits."""
    return None if setup.quantise else ("Linears in 8 bits", "quantise: int8", replace(setup, quantise="int8"))


def bits_4(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Linears in 4 bits."""
    if setup.quantise not in (None, "int8"):
        return None
    return "Linears in 4 bits", "quantise: int4", replace(setup, quantise="int4")


def one_row(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Rows one after the other."""
    if setup.batch == 1:
        return None
    return "one row at a time", "--batch 1; in training accumulate more", replace(setup, batch=1)


def half_context(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Half as much text, as long as some is left."""
    if is_tower(model):
        return None
    workload = workload_of(model, setup)
    if workload.text_tokens // 2 < _LEAST_TEXT:
        return None
    context = setup.context - workload.text_tokens // 2
    return "half as much text", f"--context {context}", replace(setup, context=context)


def chunked_loss(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Logits of some tokens at a time."""
    given = setup.loss_chunk or config.loss_chunk
    if given or model.whole_sequence or not hasattr(model.objective, "chunk"):
        return None
    return "logits in chunks", f"loop.loss_chunk: {_CHUNK}", replace(setup, loss_chunk=_CHUNK)


def checkpointing(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Activations made again in the backward pass."""
    if setup.checkpointing or all(inner.config.checkpoint_activations for inner in _backbones(model)):
        return None
    setting = "model.checkpoint_activations: true, of towers too"
    return "activations recomputed", setting, replace(setup, checkpointing=True)


def lora(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Low-rank updates trained instead of weights."""
    if setup.lora or is_tower(model):
        return None
    return "only a LoRA trained", f"--lora {_RANK}", replace(setup, lora=_RANK)


def twice_the_devices(model: Any, setup: Setup, config: Any) -> tuple[str, str, Setup] | None:
    """Twice as many devices that share the weights."""
    devices = 2 * setup.devices
    return f"{devices} devices", f"--devices {devices}; train.engine: fsdp", replace(setup, devices=devices)


OF_ACTIVATIONS = (chunked_loss, checkpointing, one_row, half_context)


def _backbones(model: Any) -> list[Any]:
    return [model, *(inner for _, inner in model.nested_models())]


def variant_of(model: Any, setup: Setup) -> Any:
    """The model as a setup changes it; a copy on the meta device."""
    twin = meta_twin(model)
    if setup.dtype is not None:
        twin = twin.to(getattr(torch, setup.dtype))
    if setup.checkpointing is not None:
        for inner in _backbones(twin):
            inner.config.checkpoint_activations = setup.checkpointing
    if setup.lora is not None:
        twin.add_mixin(_ADAPTERS, LoRAMixin([LANGUAGE], rank=setup.lora))
    return twin


def config_of(config: Any, setup: Setup) -> Any:
    """The options of the loop as a setup changes them."""
    if setup.loss_chunk is not None:
        config = replace(config, loss_chunk=setup.loss_chunk)
    if setup.lora is not None:
        config = replace(config, trainable=[_ADAPTERS], frozen=[], rate_factors={}, roles=[])
    return config
