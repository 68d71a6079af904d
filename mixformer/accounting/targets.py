"""What a command names, a configuration file, a checkpoint folder or a class, as settings and as a model of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixformer.config import Settings, import_class, read_settings


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


def is_copied(settings: Settings) -> bool:
    """Whether loading converts tensors or puts them together, or makes them; an own folder's are taken as they are."""
    from mixformer.checkpoint import recognise

    return settings.weights is None or settings.dtype is not None or recognise(settings.weights) != "own"


def shapes_of(settings: Settings) -> Any:
    """The model of some settings on the meta device, its tensors of the dtypes that they would be loaded in.

    Where `model:` gives sizes these are built, whatever the `weights` hold; otherwise the folder's own.

    Raises:
        ValueError: the folder does not fit the settings.
    """
    if settings.weights is None or settings.given.get("model"):
        return settings.build_model("meta")
    if not settings.weights.exists():
        raise ValueError(
            f"weights: {settings.weights} does not exist. Fetch or train it first, or look at a fresh "
            f"{settings.model_class.__name__} of the sizes that the configuration gives: --weights null."
        )
    model = settings.load_model("meta")
    dtype = settings.torch_dtype()
    if dtype is not None:
        return model.to(dtype)
    from mixformer.conversion.opened import Opened

    with Opened(settings.weights, mixins=settings._known_classes(), verify=False) as opened:
        stored = {name: tensor.dtype for name, tensor in opened.model.state_dict(keep_vars=True).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(stored.get(name, model.dtype))
    return model
