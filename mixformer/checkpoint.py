"""Checkpoints: read from and written to folders, in the project's own format and in foreign ones.

The own format is a folder: `config.yaml` (format version, model class, config, the composition with every mixin's
class, options and layers, nested models included), `model.safetensors` or shards of it, and an index that records the
SHA-256 of every shard. Tensors that a foreign file had and the model does not use travel in `source.safetensors`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
import yaml
from safetensors.torch import load_file

from mixformer.composition import Classes, class_path, decode, describe, encode, make_config, nested_in, recompose
from mixformer.config import TransformerConfig
from mixformer.filling import fill, find_dtype, is_meta, own_tensors, saving, slots_of, tie, tied_names, without_memory
from mixformer.hooks import did_you_mean
from mixformer.model import BaseModel
from mixformer.shards import (
    INDEX,
    SafetensorsFolder,
    TensorSource,
    check_safetensors,
    read_json,
    sha256,
    write_shards,
    write_tensors,
    written_here,
)

if TYPE_CHECKING:
    from models.weights import Format, Source

CONFIG = "config.yaml"
SOURCE = "source.safetensors"
MARK = "mixformer"
VERSION = 1


def recognise(folder: str | os.PathLike[str]) -> str:
    """The format of a checkpoint folder: `own`, or the name of a foreign one, such as `hf-cogvlm`.

    Raises:
        ValueError: it is no checkpoint that can be read.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; a checkpoint is a folder. Pass the folder that holds its config file.")
    if (path / CONFIG).is_file():
        return "own"
    return _foreign_format(path)[0].name


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    mixins: Mapping[str, type] | None = None,
    trust: bool = False,
    verify: bool = True,
) -> Any:
    """Read a model from a folder, in the project's own format, HF's or SAT's.

    Weights go one by one from the files into a model built without memory. Loading is strict.

    Args:
        path: the folder.
        dtype: of floating-point weights; None keeps each one's stored dtype.
        device: where they go. `meta` reads no weights: the files are checked and the model has shapes only.
        overrides: constants that the format lacks, by path in our config (`{"cross_vision.num_layers_run": 23}`) or by
            the name the reference has for them (`{"blocks_run": 23, "head_width": 64, "rope_pretrain_grid": 16}`).
        mixins: {mixin name or class name: class} of classes outside `mixformer` and `models`.
        trust: import such classes by the paths that the checkpoint names; this runs their modules' code.
        verify: check the recorded SHA-256 of every shard (own format).

    Returns:
        the model, in evaluation mode.

    Raises:
        ValueError: the folder is no checkpoint, is damaged, asks for untrusted classes, or does not fit its model.
    """
    folder = Path(path)
    dtype = find_dtype(dtype)
    if recognise(folder) == "own":
        model = _read_own(folder, dtype, device, overrides, Classes(mixins, trust), verify)
    else:
        model = _read_foreign(folder, dtype, device, overrides)
    return model.eval()


def save_pretrained(
    model: BaseModel,
    folder: str | os.PathLike[str],
    format: str = "own",
    processor: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model to a folder; what was there is replaced only when the new files are complete.

    Args:
        model: with weights in memory.
        folder: new, empty, or a checkpoint that this function wrote; its other files stay.
        format: `own`, or `hf` for the HF layout of the model's family.
        processor: its `save(folder)` is called, to put tokenizer files beside the weights.
        max_shard_size: such as "5GB".

    Raises:
        ValueError: the folder holds something else, a mixin's class cannot be imported by others, or the format has no
            place for what the model has; nothing is written then.
        TypeError: an option of a mixin that is no plain data.
    """
    target = Path(folder)
    if format not in ("own", "hf"):
        raise ValueError(f"format '{format}' is not known. Choose 'own' or 'hf'.")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(f"'{name}' is on the meta device: this model has no weights to save. Load or build some.")
    write = _prepare_own(model, max_shard_size) if format == "own" else _prepare_hf(model, max_shard_size)
    with _replacing(target) as new:
        write(new)
        if processor is not None:
            processor.save(new)


# -------------------------------------------------------------------- the own format


def _read_own(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, overrides: Mapping[str, Any] | None,
    classes: Classes, verify: bool,
) -> BaseModel:
    content = _read_config(folder)
    model_class: Any = classes.find(content["model"], BaseModel)
    classes.given.setdefault(f"{model_class.Config.__module__}.{model_class.Config.__qualname__}", model_class.Config)
    config = decode(content["config"], classes)
    if not isinstance(config, TransformerConfig):
        raise ValueError(f"{folder / CONFIG}: 'config' describes no model config. The file is damaged.")
    if overrides:
        config = _overridden(model_class, config, overrides)

    def build(place: torch.device | str) -> BaseModel:
        model: BaseModel = model_class(config, device=place)
        recompose(model, content["mixins"], classes)
        tie(model, content.get("tied") or {})
        return model

    from models.weights import Rule

    source = SafetensorsFolder(folder, verify and not is_meta(device))
    try:
        model = without_memory(build, device)
        rules = [Rule(name, (name,)) for name in slots_of(model)]
        fill(model, source, rules, lambda name: False, dtype, device)
    finally:
        source.close()
    _keep_source(folder, model, content.get("source"))
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error}). Copy the folder again.") from error
    if not isinstance(content, dict) or content.get("format") != MARK:
        raise ValueError(
            f"{path} is not the config of a checkpoint ('format: {MARK}' is missing). A checkpoint folder is written "
            f"by save_pretrained; a configuration file is passed with --config."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {content.get('version')}; this package reads {VERSION}. Update mixformer."
        )
    for key, kind in {"model": str, "config": dict, "mixins": dict}.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: '{key}' is missing or no {kind.__name__}. The file is damaged; copy it again.")
    return content


def _overridden(model_class: Any, config: TransformerConfig, overrides: Mapping[str, Any]) -> TransformerConfig:
    changed: Any = deepcopy(config)
    for path, value in _flat(overrides):
        *outer, name = path.split(".")
        target: Any = changed
        for part in outer:
            target = getattr(target, part, None)
        if not is_dataclass(target) or name not in [field.name for field in fields(target)]:
            raise ValueError(f"overrides: {type(config).__name__} has no option '{path}'.")
        setattr(target, name, value)
        changed.__post_init__()
    plain, new = (describe(model_class(each, device="meta")) for each in (config, changed))
    if plain != new:
        raise ValueError(
            f"overrides {dict(overrides)} change mixins, which this checkpoint records with their options. Load it "
            f"without, and change the mixin: model.replace_mixin(...)."
        )
    return changed


def _prepare_own(model: BaseModel, max_shard_size: int | str) -> Callable[[Path], None]:
    source = source_of(model)
    content: dict[str, Any] = {
        "format": MARK,
        "version": VERSION,
        "model": class_path(type(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": encode(model.config, "config"),
        "mixins": describe(model),
    }
    tied = {name: first for name, first in tied_names(model).items() if name != first}
    if tied:
        content["tied"] = tied
    if source is not None:
        content["source"] = {field.name: getattr(source, field.name) for field in fields(source)}
        del content["source"]["tensors"]

    def write(folder: Path) -> None:
        with saving(model):
            write_shards(folder, own_tensors(model), max_shard_size, always_index=True)
        if source is not None and source.tensors:
            write_tensors(folder / SOURCE, source.tensors)
            content["source"]["sha256"] = sha256(folder / SOURCE)
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    return write


def _keep_source(folder: Path, model: BaseModel, kept: dict[str, Any] | None) -> None:
    if not isinstance(kept, dict):
        return
    from models.weights import Source

    kept, tensors, path = dict(kept), {}, folder / SOURCE
    digest = kept.pop("sha256", None)
    if digest is not None:
        check_safetensors(path)
        if sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the recorded one. Copy it again.")
        tensors = load_file(path)
    known = {field.name for field in fields(Source)}
    set_source(model, Source(**{name: value for name, value in kept.items() if name in known}, tensors=tensors))


def source_of(model: BaseModel) -> Source | None:
    """What is kept of the foreign file a model was read from, or None."""
    found: Source | None = vars(model).get("source")
    return found


def set_source(model: BaseModel, source: Source | None) -> None:
    """Keep (or forget) what a foreign file had beside the weights."""
    vars(model)["source"] = source


# -------------------------------------------------------------------- foreign formats


def _foreign_format(folder: Path) -> tuple[Format, dict[str, Any], bool]:
    from models.weights import HF_FORMATS, SAT_FORMATS

    for file, formats, is_sat in (("model_config.json", SAT_FORMATS, True), ("config.json", HF_FORMATS, False)):
        if not (folder / file).is_file():
            continue
        config = read_json(folder / file)
        for found in formats:
            if found.claims(config):
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


def _read_foreign(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, overrides: Mapping[str, Any] | None
) -> BaseModel:
    from models.weights import SATFolder, Source
    from models.weights.rules import spelling

    found, content, is_sat = _foreign_format(folder)
    stored: TensorSource = SATFolder(folder, content) if is_sat else SafetensorsFolder(folder)
    try:
        weights = _Renamed(stored, found.renamed)
        where = folder / ("model_config.json" if is_sat else "config.json")
        config = _foreign_config(found, content, weights.shapes, overrides, str(where))
        model = without_memory(lambda place: found.model(config, device=place), device)
        rules = found.rules(config)
        absent, unused = fill(model, weights, rules, found.is_ignored, dtype, device)
        if not is_sat:
            tensors = {} if is_meta(device) else {name: weights.read(name).clone() for name in unused}
            kept_dtype = "" if dtype is not None else str(model.dtype).removeprefix("torch.")
            spelled = spelling(weights.names)
            set_source(model, Source(found.name, content, dict(overrides or {}), tensors, absent, kept_dtype, spelled))
    finally:
        stored.close()
    return model


class _Renamed:
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
        self.num_bytes, self.where, self.gives_own = source.num_bytes, source.where, source.gives_own
        self._source = source

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self.names[name])

    def close(self) -> None:
        self._source.close()


def _foreign_config(
    found: Format, content: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any] | None,
    where: str,
) -> Any:
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
    for path, value in _flat(overrides):
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


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _prepare_hf(model: BaseModel, max_shard_size: int | str) -> Callable[[Path], None]:
    from models.weights import HF_FORMATS

    written = [found for found in HF_FORMATS if found.write_config is not None]
    fitting = [found for found in written if isinstance(model, found.model)]
    if not fitting:
        raise ValueError(
            f"No HF format holds a {type(model).__name__}. Those that can: "
            f"{', '.join(dict.fromkeys(found.model.__name__ for found in written))} and nothing added. Use "
            f"format='own'."
        )
    nearest = max(len(each.model.__mro__) for each in fitting)
    fitting = [each for each in fitting if len(each.model.__mro__) == nearest]
    source = source_of(model)
    fitting.sort(key=lambda each: source is None or each.name != source.format)
    _check_composition(model, fitting[0])
    tensors, content = _as_first_fitting(model, fitting, source)

    def write(folder: Path) -> None:
        with saving(model):
            write_shards(folder, tensors, max_shard_size)
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    return write


def _as_first_fitting(
    model: BaseModel, formats: list[Format], source: Source | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config file in the first of several formats that holds the model."""
    refusals: list[ValueError] = []
    for found in formats:
        try:
            return _as_foreign(model, found, source)
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def _as_foreign(
    model: BaseModel, found: Format, source: Source | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (views of the model's) and the config file of a model in a format."""
    from models.weights.rules import respelled

    source = source if source is not None and source.format == found.name else None
    with saving(model):
        own = own_tensors(model)
        tensors: dict[str, torch.Tensor] = {}
        for rule in found.rules(model.config):
            tensor = own.pop(rule.own, None)
            if tensor is None:
                if source is not None and rule.present(source.tensors):
                    continue
                assert rule.default is not None, rule.own
                tensor = rule.default(model)
            parts = rule.to_foreign(tensor)
            written = list(parts)[: rule.num_written] if source is None else parts.keys() - set(source.absent)
            tensors.update((name, part) for name, part in parts.items() if name in written)
    if own:
        raise ValueError(
            f"The format {found.name} has no place for '{next(iter(own))}' and {len(own) - 1} more. Use format='own'."
        )
    for name, tensor in (source.tensors if source else {}).items():
        tensors.setdefault(name, tensor)
    content = _hf_config(model, found, source, {name: tuple(t.shape) for name, t in tensors.items()})
    spelling = {} if source is None else source.spelling
    return {respelled(name, spelling): tensor for name, tensor in tensors.items()}, content


def _check_composition(model: BaseModel, found: Format) -> None:
    plain: BaseModel = found.model(model.config, device="meta")
    have, usual = dict(_classes_of(model)), dict(_classes_of(plain))
    extra = [name for name in have if have[name] != usual.get(name)] + [name for name in usual if name not in have]
    if extra:
        raise ValueError(
            f"The format {found.name} holds a {found.model.__name__} as it is composed by default, and this one "
            f"differs in: {', '.join(extra)}. Remove what was added (merge a LoRA first), or use format='own'."
        )


def _classes_of(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, tuple[type, Any]]]:
    for name in model.mixins:
        mixin = model.get_mixin(name)
        yield f"{prefix}{name}", (type(mixin), model.scopes[name])
        for path, inner in nested_in(mixin).items():
            yield from _classes_of(inner, f"{prefix}{name}.{path}/")


def _hf_config(
    model: BaseModel, found: Format, source: Source | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    assert found.write_config is not None
    dtype = str(model.dtype).removeprefix("torch.")
    if source is not None:
        again = _foreign_config(found, source.config, shapes, source.overrides, "config.json")
        if not _differences(again, model.config):
            content = dict(source.config)
            if source.dtype != dtype:
                content["dtype" if "dtype" in content else "torch_dtype"] = dtype
            return content
    content = {**(source.config if source else {}), **found.write_config(model.config), "torch_dtype": dtype}
    lacking = {path: value for path, value in _flat(asdict(model.config)) if path in found.lacks}
    again = _foreign_config(found, content, shapes, lacking, "config.json")
    differences = _differences(again, model.config)
    if not differences and _differs_without(lacking, found, content, shapes, model.config):
        content[MARK] = lacking
    if differences:
        raise ValueError(
            f"The format {found.name} cannot hold the value of {', '.join(differences)} that this model has. Use "
            f"format='own'."
        )
    return content


def _differs_without(
    lacking: dict[str, Any], found: Format, content: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], config: Any
) -> bool:
    try:
        plain = dict(_flat(asdict(_foreign_config(found, content, shapes, None, "config.json"))))
    except ValueError:
        return True
    return any(plain[path] != value for path, value in lacking.items())


def _differences(a: Any, b: Any) -> list[str]:
    flat_a, flat_b = _resolved(a), _resolved(b)
    indifferent = {"checkpoint_activations", "init_std"}
    differing = [path for path in {**flat_a, **flat_b} if flat_a.get(path) != flat_b.get(path)]
    return [path for path in differing if path.rpartition(".")[2] not in indifferent]


def _resolved(config: Any, prefix: str = "", inner_size: int = 0) -> dict[str, Any]:
    """Options by path, with what None stands for."""
    found: dict[str, Any] = {}
    is_model = isinstance(config, TransformerConfig)
    meaning = {"inner_hidden_size": config.inner_size if is_model else inner_size}
    if is_model:
        meaning.update(num_kv_heads=config.kv_heads, head_size=config.head_width, num_layers_run=config.layers_run)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found.update(_resolved(value, f"{prefix}{field.name}.", meaning["inner_hidden_size"]))
        else:
            found[prefix + field.name] = meaning.get(field.name) if value is None else value
    return found


# -------------------------------------------------------------------- folders


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when all went well, and vanishes otherwise."""
    target = target.resolve()
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{what}-{mark}") for what in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if target.exists() and not any(target.iterdir()):  # an empty folder, perhaps a mount, is filled: config last
            for item in sorted(new.iterdir(), key=lambda item: item.name in (CONFIG, "config.json")):
                item.rename(target / item.name)
            return
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        if old.exists():
            for item in old.iterdir():  # what is not the checkpoint's, such as logs, stays in the folder
                if not _is_ours(item.name) and not (target / item.name).exists():
                    item.rename(target / item.name)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file. Save to a folder of its own.")
    if not any(target.iterdir()):
        return
    try:
        ours = bool(_read_config(target)) if (target / CONFIG).is_file() else written_here(target)
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(
            f"{target} is not empty and holds no checkpoint written by save_pretrained; it is left as it is. Choose "
            f"another folder, or empty it."
        )


def _is_ours(name: str) -> bool:
    return name in (CONFIG, SOURCE, INDEX, "config.json") or re.fullmatch(r"model.*\.safetensors", name) is not None
