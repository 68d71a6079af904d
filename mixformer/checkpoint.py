"""Checkpoints: read from and written to folders, in the project's own format and in foreign ones.

The own format is a folder: `config.yaml` (format version, model class, config, the composition with every mixin's
class, options and layers, nested models included), `model.safetensors` or shards of it, and an index that records the
SHA-256 of every shard. Tensors that a foreign file had and the model does not use travel in `source.safetensors`.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file

from mixformer.composition import Classes, decode, describe, recompose
from mixformer.config import TransformerConfig
from mixformer.filling import fill, find_dtype, is_meta, saving, slots_of, tie, without_memory
from mixformer.formats import CONFIG, CONFIGS, MARK, Renamed, flat, foreign_config, foreign_format, recognise
from mixformer.model import BaseModel
from mixformer.quantised import Kind, choose, make_stored_shapes, torchao
from mixformer.shard_writer import write_shards
from mixformer.shards import (
    INDEX,
    SafetensorsFolder,
    TensorSource,
    check_safetensors,
    sha256,
    written_here,
)

if TYPE_CHECKING:
    from models.weights import Rule, Source

SOURCE = "source.safetensors"
VERSION = 1


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    mixins: Mapping[str, type] | None = None,
    trust: bool = False,
    verify: bool = True,
    quantise: str | Mapping[str, str | None] | None = None,
    progress: bool | None = None,
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
        quantise: `int8` or `int4`, or {selector: kind} for parts (see `mixformer.quantised.choose`). Each weight is
            quantised when it has been read.
        progress: show a progress bar; None for a gigabyte or more.

    Returns:
        the model, in evaluation mode.

    Raises:
        ValueError: the folder is no checkpoint, is damaged, asks for untrusted classes, or does not fit its model; it
            cannot be quantised as asked, or torchao is not installed.
    """
    folder = Path(path)
    how = _How(find_dtype(dtype), device, quantise, progress)
    if recognise(folder) == "own":
        model = _read_own(folder, how, overrides, Classes(mixins, trust), verify)
    else:
        model = _read_foreign(folder, how, overrides)
    return model.eval()


@dataclass(frozen=True)
class _How:
    """How weights go into a model; see `from_pretrained`."""

    dtype: torch.dtype | None
    device: torch.device | str
    quantise: str | Mapping[str, str | None] | None
    progress: bool | None

    def kinds(self, model: BaseModel) -> dict[str, Kind]:
        """What is to be quantised, known before a tensor is read."""
        if not self.quantise:
            return {}
        if not is_meta(self.device):
            torchao()
        return choose(model, self.quantise)

    def fill(
        self, model: BaseModel, kinds: Mapping[str, Kind], source: TensorSource, rules: list[Rule],
        ignored: Callable[[str], bool],
    ) -> tuple[list[str], list[str]]:
        return fill(model, source, rules, ignored, self.dtype, self.device, kinds, self.progress)


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
    from mixformer.contents import foreign_contents, own_contents, reader
    from models.weights import HF_FORMATS

    target = Path(folder)
    if format not in ("own", "hf"):
        raise ValueError(f"format '{format}' is not known. Choose 'own' or 'hf'; mixformer convert writes SAT's.")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(f"'{name}' is on the meta device: this model has no weights to save. Load or build some.")
    contents = own_contents(model) if format == "own" else foreign_contents(model, HF_FORMATS, "HF")
    with replacing(target) as new:
        with saving(model):
            write_shards(new, contents.tensors(reader(model)), max_shard_size, always_index=format == "own")
        contents.write_config(new)
        if processor is not None:
            processor.save(new)


# -------------------------------------------------------------------- the own format


def _read_own(
    folder: Path, how: _How, overrides: Mapping[str, Any] | None, classes: Classes, verify: bool
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

    source = SafetensorsFolder(folder, verify=False)
    try:
        model = without_memory(build, how.device)
        make_stored_shapes(model, source.shapes, source.dtypes, source.where)
        kinds = how.kinds(model)
        rules = [Rule(name, (name,)) for name in slots_of(model)]
        with source.verifying() if verify and not is_meta(how.device) else nullcontext():
            how.fill(model, kinds, source, rules, lambda name: False)
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
    for path, value in flat(overrides):
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


def _read_foreign(folder: Path, how: _How, overrides: Mapping[str, Any] | None) -> BaseModel:
    from models.weights import SATFolder, Source
    from models.weights.rules import spelling

    found, content, is_sat = foreign_format(folder)
    stored: TensorSource = SATFolder(folder, content) if is_sat else SafetensorsFolder(folder)
    try:
        weights = Renamed(stored, found.renamed)
        where = folder / ("model_config.json" if is_sat else "config.json")
        config = foreign_config(found, content, weights.shapes, overrides, str(where))
        model = without_memory(lambda place: found.model(config, device=place), how.device)
        rules = found.rules(config)
        absent, unused = how.fill(model, how.kinds(model), weights, rules, found.is_ignored)
        if not is_sat:
            tensors = {} if is_meta(how.device) else {name: weights.read(name).clone() for name in unused}
            kept_dtype = "" if how.dtype is not None else str(model.dtype).removeprefix("torch.")
            spelled = spelling(weights.names)
            set_source(model, Source(found.name, content, dict(overrides or {}), tensors, absent, kept_dtype, spelled))
    finally:
        stored.close()
    return model


# -------------------------------------------------------------------- folders


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
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
            for item in sorted(new.iterdir(), key=lambda item: item.name in CONFIGS):
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
