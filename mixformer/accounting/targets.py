"""What a command names, a configuration file, a checkpoint folder or a class, as settings and as a model of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixformer.accounting.memory import Reading
from mixformer.config import Settings, import_class, read_settings
from mixformer.conversion.opened import Opened
from mixformer.filling import READ_AHEAD


def settings_of(target: str, overrides: Sequence[str] = (), sections: Sequence[str] = ()) -> Settings:
    """The settings that a target names.

    Args:
        target: a configuration file that has `model_class`, a checkpoint folder, or `module:Class`.
        overrides: `--section.key value` arguments.
        sections: which of `train` and `evaluate` to read as well.

    Raises:
        ValueError: there is nothing of that name, it is no configuration, or the folder holds no checkpoint that can
            be read.
    """
    path = Path(target)
    if path.is_dir():
        from mixformer.checkpoint import from_pretrained

        model_class = type(from_pretrained(path, device="meta"))
        return read_settings(model_class, None, [f"--weights={path}", *overrides], sections)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_settings(None, path, overrides, sections)
    if path.suffix == ".json" or "/" in target or (":" not in target and "." not in target):
        raise ValueError(f"{target} does not exist. Name a checkpoint folder, a configuration file, or module:Class.")
    return read_settings(import_class(target, "target"), None, overrides, sections)


def reading_of(settings: Settings) -> Reading:
    """How loading reads: a folder of the own format is read ahead, and what is not converted is taken as it is."""
    from mixformer.checkpoint import recognise

    if settings.weights is None or not settings.weights.exists() or recognise(settings.weights) != "own":
        return Reading()
    with Opened(settings.weights, mixins=settings._known_classes(), verify=False) as opened:
        sizes = {name: tensor.nbytes for name, tensor in opened.model.state_dict(keep_vars=True).items()}
    return Reading(settings.dtype is not None, READ_AHEAD, sizes)


def shapes_of(settings: Settings) -> Any:
    """The model of some settings on the meta device, its tensors of the dtypes that they would be loaded in.

    Where the `weights` are not there yet, the sizes that `model:` gives are taken.

    Raises:
        ValueError: the folder does not fit the settings, or there is neither a folder nor sizes.
    """
    if settings.weights is None:
        return settings.build_model("meta")
    if not settings.weights.exists():
        if settings.given.get("model"):
            return settings.build_model("meta")
        raise ValueError(
            f"weights: {settings.weights} does not exist. Fetch or train it first, or look at a fresh "
            f"{settings.model_class.__name__} of the sizes that the configuration gives: --weights null."
        )
    try:
        model = settings.load_model("meta")
    except ValueError as error:
        if not settings.given.get("model"):
            raise
        raise ValueError(f"{error} To look at the sizes of the configuration alone: --weights null.") from error
    dtype = settings.torch_dtype()
    if dtype is not None:
        return model.to(dtype)
    with Opened(settings.weights, mixins=settings._known_classes(), verify=False) as opened:
        stored = {name: tensor.dtype for name, tensor in opened.model.state_dict(keep_vars=True).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():  # not the codes of quantised weights
            tensor.data = tensor.data.to(stored.get(name, model.dtype))
    return model
