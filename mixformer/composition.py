"""Describe how a model is composed, as plain data, and make a model so composed again."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from mixformer.config import TransformerConfig
from mixformer.hooks import did_you_mean
from mixformer.mixin import BaseMixin
from mixformer.model import BaseModel

TRUSTED = ("mixformer", "models")
Description = dict[str, Any]


def class_path(cls: type) -> str:
    """Dotted path under which a class can be imported.

    Raises:
        ValueError: it lives in `__main__` or in a function, so nobody else could import it.
    """
    path = _path(cls)
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        where = "__main__" if cls.__module__ == "__main__" else "a function"
        raise ValueError(
            f"{cls.__qualname__} is defined in {where}, where a later run cannot import it. Move it to the top level "
            f"of a module, such as my_mixins.py, and import it from there; load with mixins={{name: {cls.__name__}}} "
            f"or trust=True."
        )
    return path


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Classes:
    """Imports classes by path: from trusted packages, or as given.

    Args:
        given: classes of the caller, by mixin name, class name or class path.
        trust: import from anywhere.
    """

    def __init__(self, given: Mapping[str, type] | None = None, trust: bool = False) -> None:
        self.given, self.trust = dict(given or {}), trust
        for name, cls in self.given.items():
            if not isinstance(cls, type):
                raise TypeError(f"mixins={{'{name}': ...}} must be a class, not {type(cls).__name__}.")

    def find(self, path: str, kind: type | None, name: str = "") -> type:
        """The class of that path.

        Args:
            path: such as `mixformer.mixins.lora.LoRAMixin`.
            kind: what it must be a subclass of; None for a dataclass.
            name: of the mixin, for `given` and for messages.

        Raises:
            ValueError: it is not trusted, cannot be imported, or is no such class.
        """
        if not isinstance(path, str) or "." not in path:
            raise ValueError(f"The checkpoint names no class path for '{name}' ({path!r}); its config.yaml is damaged.")
        cls = self.given.get(name, self.given.get(path, self.given.get(path.rpartition(".")[2])))
        if cls is None:
            if not self.trust and path.split(".")[0] not in TRUSTED:
                what = f"mixins={{'{name or path}': {path.rpartition('.')[2]}}}"
                raise ValueError(
                    f"The checkpoint asks for '{path}', which is outside the trusted packages ({', '.join(TRUSTED)}); "
                    f"importing it runs its code. Pass {what}, or trust=True if you know the file."
                )
            cls = _import(path)
        fits = dataclasses.is_dataclass(cls) if kind is None else isinstance(cls, type) and issubclass(cls, kind)
        if not isinstance(cls, type) or not fits:
            raise ValueError(f"'{path}' is not a {'dataclass' if kind is None else kind.__name__}; it is refused.")
        return cls


def _import(path: str) -> Any:
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
                continue
            raise
        for part in parts[end:]:
            found = getattr(found, part, None)
        if found is not None:
            return found
        break
    raise ValueError(
        f"The class '{path}' cannot be imported. Install or put on the path what defines it, or pass the class: "
        f"mixins={{'{path}': ...}}."
    )


def encode(value: Any, where: str, path: Callable[[type], str] = class_path) -> Any:
    """An option as plain data; dataclasses become {class_path, init_args}.

    Args:
        value: the option.
        where: what it is, for messages.
        path: names a class.

    Raises:
        TypeError: it is neither a number, string, list, dict nor dataclass of such.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(item, where, path) for item in value]
    if isinstance(value, range):
        return list(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}", path) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {
            "class_path": path(type(value)),
            "init_args": {name: encode(item, f"{where}.{name}", path) for name, item in fields.items()},
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold. Options of a mixin are numbers, "
        f"strings, lists, or dataclasses of these."
    )


def decode(value: Any, classes: Classes) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item, classes) for item in value]
    if isinstance(value, dict):
        if set(value) == {"class_path", "init_args"}:
            cls = classes.find(value["class_path"], None)
            return make(cls, {name: decode(item, classes) for name, item in value["init_args"].items()})
        return {name: decode(item, classes) for name, item in value.items()}
    return value


def make(cls: Any, arguments: dict[str, Any]) -> Any:
    """An instance of a dataclass.

    Raises:
        ValueError: an argument it does not have.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in arguments:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no option '{name}'.{did_you_mean(name, known)}")
    return cls(**arguments)


def make_config(cls: type[TransformerConfig], options: Mapping[str, Any]) -> Any:
    """A config from nested options: {"hidden_size": 64, "vision": {"image_size": 28}}.

    Raises:
        ValueError: an option it does not have.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(name)):
            value = make_config(hints[name], value)
        arguments[name] = value
    return make(cls, arguments)


def describe(model: BaseModel) -> dict[str, Description]:
    """{mixin name: {class_path, init_args, layers, nested}} in order; `nested` are those of models in it, by path."""
    return {name: _describe(model, name) for name in model.mixins}


def _describe(model: BaseModel, name: str, path: Callable[[type], str] = class_path) -> Description:
    mixin = model.get_mixin(name)
    options = {key: encode(value, f"Option '{key}' of mixin '{name}'", path) for key, value in mixin.options.items()}
    found: Description = {"class_path": path(type(mixin)), "init_args": options}
    if model.scopes[name] is not None:
        found["layers"] = list(model.scopes[name] or [])
    nested = {
        place: {inner_name: _describe(inner, inner_name, path) for inner_name in inner.mixins}
        for place, inner in nested_in(mixin).items()
    }
    if nested:
        found["nested"] = nested
    return found


def nested_in(mixin: BaseMixin) -> dict[str, BaseModel]:
    """{path: model} of the models a mixin holds; models inside those are theirs."""
    found: dict[str, BaseModel] = {}
    for path, module in mixin.named_modules():
        if isinstance(module, BaseModel) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def recompose(model: BaseModel, wanted: Mapping[str, Description], classes: Classes) -> None:
    """Delete and add mixins until the model is composed as described; mixins that fit already stay.

    Raises:
        ValueError: a class that is not trusted, or options that its class does not take.
    """
    have = {name: _plain(_describe(model, name, _path)) for name in model.mixins}
    same = 0
    for (name, described), (other, target) in zip(have.items(), wanted.items(), strict=False):
        if name != other or described != _plain(target):
            break
        same += 1
    for name in reversed(list(have)[same:]):
        model.del_mixin(name)
    for name, target in list(wanted.items())[same:]:
        cls = classes.find(target.get("class_path", ""), BaseMixin, name)
        options = {key: decode(value, classes) for key, value in (target.get("init_args") or {}).items()}
        try:
            mixin = cls(**options)
        except TypeError as error:
            raise ValueError(
                f"Mixin '{name}': {cls.__name__} does not take the options that the checkpoint has ({error}). Is it "
                f"another version of the class?"
            ) from error
        model.add_mixin(name, mixin, layers=target.get("layers"))
    for name, target in wanted.items():
        inner = nested_in(model.get_mixin(name))
        for path, nested in (target.get("nested") or {}).items():
            if path not in inner:
                raise ValueError(f"Mixin '{name}' holds no model at '{path}', though the checkpoint says so.")
            recompose(inner[path], nested, classes)


def _plain(description: Description) -> Description:
    kept = {key: description.get(key) for key in ("class_path", "init_args", "layers")}
    return {**kept, "init_args": kept["init_args"] or {}}
