"""The format that a checkpoint folder is of, and for the formats of others the config and tensors in our terms."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from mixformer.composition import make_config
from mixformer.hooks import did_you_mean
from mixformer.shards import TensorSource, read_json

if TYPE_CHECKING:
    from models.weights import Format

CONFIG = "config.yaml"
CONFIGS = (CONFIG, "config.json", "model_config.json")
MARK = "mixformer"


def recognise(folder: str | os.PathLike[str]) -> str:
    """The format of a checkpoint folder: `own`, or the name of a foreign one, such as `hf-cogvlm`.

    Raises:
        ValueError: it is no checkpoint that can be read.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; a checkpoint is a folder. Pass the folder that holds its config file.")
    configs = [name for name in CONFIGS if (path / name).is_file()]
    if configs[:1] == [CONFIG] and not _is_own_config(path / CONFIG):
        del configs[1:]
    if len(configs) > 1:
        raise ValueError(
            f"{path} holds checkpoints of {len(configs)} formats: {' and '.join(configs)}. Move one of them, with its "
            f"weights, to a folder of its own."
        )
    if configs == [CONFIG]:
        return "own"
    return foreign_format(path)[0].name


def _is_own_config(path: Path) -> bool:
    return re.search(rf"^format: *['\"]?{MARK}\b", path.read_text(encoding="utf-8", errors="replace"), re.M) is not None


def foreign_format(folder: Path) -> tuple[Format, dict[str, Any], bool]:
    """The format of others that a folder is of, the content of its config file, and whether it is SAT's.

    Raises:
        ValueError: no format claims it, or its weights are quantised.
    """
    from models.weights import HF_FORMATS, SAT_FORMATS

    for file, formats, is_sat in (("model_config.json", SAT_FORMATS, True), ("config.json", HF_FORMATS, False)):
        if not (folder / file).is_file():
            continue
        config = read_json(folder / file)
        for found in formats:
            if found.claims(config):
                _check_plain(folder / file, config)
                return found, config, is_sat
        what = config.get("model_class") if is_sat else config.get("model_type") or config.get("architectures")
        known = ", ".join(found.name for found in formats)
        raise ValueError(f"{folder / file} describes {what!r}, which no format claims. Readable: {known}.")
    if list(folder.glob("mp_rank_*_model_states.pt")):
        raise ValueError(
            f"{folder} is one iteration of a SAT checkpoint. Pass the folder above it, with model_config.json."
        )
    names = sorted(item.name for item in folder.iterdir())
    raise ValueError(
        f"{folder} is no checkpoint: it has neither {CONFIG} (own format), config.json (HF) nor model_config.json "
        f"(SAT). It holds: {', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}."
    )


def _check_plain(file: Path, config: dict[str, Any]) -> None:
    by = config.get("quantization_config")
    if isinstance(by, dict):
        raise ValueError(
            f"{file} says that the weights are quantised ({by.get('quant_method', 'no method')}), which is not read. "
            f"Fetch the original weights, and load them with `quantise`."
        )


class Renamed:
    """The tensors of another source under the names that key tables have for them.

    Raises:
        ValueError: two of them get one name.
    """

    def __init__(self, source: TensorSource, rename: Callable[[str], str]) -> None:
        self.names: dict[str, str] = {}
        for name in source.shapes:
            first = self.names.setdefault(rename(name), name)
            if first != name:
                raise ValueError(
                    f"{source.where}: '{first}' and '{name}' are two spellings of one tensor. Files of two versions "
                    f"may have been mixed: fetch the folder again."
                )
        self.shapes = {name: source.shapes[stored] for name, stored in self.names.items()}
        self.dtypes = {name: source.dtypes[stored] for name, stored in self.names.items()}
        files: Mapping[str, str] = getattr(source, "files", {})
        self.files = {name: files[stored] for name, stored in self.names.items() if stored in files}
        self.num_bytes, self.where, self.gives_own = source.num_bytes, source.where, source.gives_own
        self._source = source

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self.names[name])

    def close(self) -> None:
        self._source.close()


def foreign_config(
    found: Format, content: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any] | None,
    where: str,
) -> Any:
    """The config of the model that a folder in a format of others holds.

    Args:
        found: the format.
        content: of the folder's config file.
        shapes: of the tensors, by the names that key tables have for them.
        overrides: constants that the format lacks; see `from_pretrained`.
        where: the config file, for errors.

    Raises:
        ValueError: a key is missing, a value is not possible, or an override is unknown.
    """
    given = _aliased(found, {**content.get(MARK, {}), **(overrides or {})})
    try:
        options = found.read_config(content, shapes)
        for path, value in given:
            *outer, name = path.split(".")
            target = options
            for part in outer:
                target = target.setdefault(part, {})
            target[name] = value
        return make_config(found.model.Config, found.finish(options))  # type: ignore[attr-defined]
    except KeyError as error:
        raise ValueError(f"{where} lacks the key {error}. Fetch the file again, or add the key.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _aliased(found: Format, overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
    paths = []
    for path, value in flat(overrides):
        unknown, known = _unknown_part(found.model.Config, path)  # type: ignore[attr-defined]
        alias = found.aliases.get(path.rpartition(".")[2])
        if unknown is None:
            paths.append((path, value))
        elif alias:
            paths.append((alias, value))
        elif alias is None:
            known += found.aliases
            raise ValueError(
                f"overrides: '{path}' is no option of {found.name}.{did_you_mean(unknown, known)} Known: "
                f"{', '.join(known)}."
            )
    return paths


def _unknown_part(config: Any, path: str) -> tuple[str | None, list[str]]:
    """The part of a path that a config class does not have, and those it has there."""
    known: list[str] = []
    for part in path.split("."):
        known = [field.name for field in fields(config)] if is_dataclass(config) else []
        if part not in known:
            return part, known
        config = get_type_hints(config)[part]
    return None, known


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested options as pairs of path and value: `{"a": {"b": 1}}` gives `("a.b", 1)`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
