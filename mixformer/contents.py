"""What a checkpoint folder holds: which tensors of a model go into its files, and what its config file says.

Sizes are enough to know it, so a model on the meta device will do; the tensors are asked for one by one when they are
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from mixformer.checkpoint import CONFIG, MARK, SOURCE, VERSION, source_of
from mixformer.composition import class_path, describe, encode, nested_in
from mixformer.config import TransformerConfig
from mixformer.filling import own_tensors, saving, tied_names
from mixformer.formats import flat, foreign_config
from mixformer.model import BaseModel
from mixformer.shard_writer import write_file

if TYPE_CHECKING:
    from models.weights import Format, Rule, Source

ORIGIN = "mixformer_source"
"""Key of a foreign config file for what is kept of the file of another family that it was converted from."""

CONFIG_FILES = {"own": CONFIG, "hf": "config.json", "sat": "model_config.json"}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint's files: one of ours or a part of it, or one that is carried along.

    Attributes:
        name: as the key table has it.
        rule: what relates it to ours; None for what is carried along.
        carried: that tensor.
    """

    name: str
    rule: Rule | None = None
    carried: torch.Tensor | None = None

    def tensor(self, read: Callable[[Rule], torch.Tensor]) -> torch.Tensor:
        """The tensor as the file has it; `read` gives ours."""
        if self.rule is None:
            assert self.carried is not None
            return self.carried
        return self.rule.to_foreign(read(self.rule))[self.name]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint folder holds.

    Attributes:
        format: `own`, or a foreign one's name.
        parts: {name in the files: what is there}.
        config: content of the config file.
        source: what is kept of a foreign file, for the own format.
    """

    format: str
    parts: dict[str, Part]
    config: dict[str, Any]
    source: Source | None = None

    @property
    def kind(self) -> str:
        """`own`, `hf` or `sat`."""
        return self.format.partition("-")[0]

    def tensors(self, read: Callable[[Rule], torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the files; `read` gives ours."""
        return {name: part.tensor(read) for name, part in self.parts.items()}

    def write_config(self, folder: Path) -> None:
        """Write what makes a folder a checkpoint, after its weights."""
        path = folder / CONFIG_FILES[self.kind]
        if self.kind != "own":
            path.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            return
        if self.source is not None and self.source.tensors:
            kept = self.source.tensors
            self.config["source"]["sha256"] = write_file(folder / SOURCE, kept, kept.__getitem__, hashed=True)
        text = yaml.safe_dump(self.config, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def reader(model: BaseModel) -> Callable[[Rule], torch.Tensor]:
    """What gives a model's tensors, or their defaults, by their rules; to be made and used while it is `saving`."""
    own = own_tensors(model)

    def read(rule: Rule) -> torch.Tensor:
        if rule.own in own:
            return own[rule.own]
        assert rule.default is not None, rule.own
        return rule.default(model)

    return read


def own_contents(model: BaseModel) -> Contents:
    """What a model is in the own format.

    Raises:
        ValueError: a class that cannot be imported by others.
        TypeError: an option of a mixin that is no plain data.
    """
    from models.weights import Rule

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
        content["source"] = _description(source)
    with saving(model):
        parts = {name: Part(name, Rule(name, (name,))) for name in own_tensors(model)}
    return Contents("own", parts, content, source)


def foreign_contents(model: BaseModel, formats: Sequence[Format], family: str) -> Contents:
    """What a model is in the first of several formats that holds it.

    Args:
        model: composed as its class does by default.
        formats: of one family.
        family: its name, for messages.

    Raises:
        ValueError: no format holds the model, its composition or its options.
    """
    written = [found for found in formats if found.write_config is not None]
    fitting = [found for found in written if isinstance(model, found.model)]
    if not fitting:
        raise ValueError(
            f"No {family} format holds a {type(model).__name__}. Those that can: "
            f"{', '.join(dict.fromkeys(found.model.__name__ for found in written))} and nothing added. Use "
            f"format='own'."
        )
    nearest = max(len(each.model.__mro__) for each in fitting)
    fitting = [each for each in fitting if len(each.model.__mro__) == nearest]
    source = source_of(model)
    fitting.sort(key=lambda each: source is None or each.name != source.format)
    _check_composition(model, fitting[0])
    refusals: list[ValueError] = []
    for found in fitting:
        try:
            return _contents(model, found)
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def _contents(model: BaseModel, found: Format) -> Contents:
    from models.weights.rules import respelled

    source = _source_for(model, found)
    parts: dict[str, Part] = {}
    with saving(model):
        left, read = own_tensors(model), reader(model)
        for rule in found.rules(model.config):
            if left.pop(rule.own, None) is None:
                if source is not None and rule.present(source.tensors):
                    continue
                if rule.default is None:
                    raise ValueError(_lacking(model, rule.own, found))
            written = rule.foreign[: rule.num_written] if source is None else set(rule.foreign) - set(source.absent)
            parts.update((name, Part(name, rule)) for name in rule.foreign if name in written)
        if left:
            raise ValueError(
                f"The format {found.name} has no place for '{next(iter(left))}' and {len(left) - 1} more. Use "
                f"format='own'."
            )
        carried = _tables(model, found) if source is None else source.tensors
        for name, tensor in carried.items():
            parts.setdefault(name, Part(name, carried=tensor))
        shapes = {name: tuple(part.tensor(read).shape) for name, part in parts.items()}
    content = _config(model, found, source, shapes)
    spelling = {} if source is None else source.spelling
    return Contents(found.name, {respelled(name, spelling): part for name, part in parts.items()}, content)


def _lacking(model: BaseModel, own: str, found: Format) -> str:
    from mixformer.quantised import QuantisedLinear

    first = tied_names(model).get(own)
    if isinstance(dict(model.named_modules()).get(own.rpartition(".")[0]), QuantisedLinear):
        return f"'{own}' is quantised, and the format {found.name} holds plain weights. Convert the original ones."
    if first is None:
        return f"This {type(model).__name__} has no '{own}', which the format {found.name} needs. Use format='own'."
    return (
        f"'{own}' is tied to '{first}' in this model, which the format {found.name} cannot say. Use format='own', or "
        f"untie them."
    )


def _source_for(model: BaseModel, found: Format) -> Source | None:
    """What is kept of a file in that format: the one the model was read from, or one before it in another family."""
    from models.weights import Source

    source = source_of(model)
    if source is None or source.format == found.name:
        return source
    origin = source.config.get(ORIGIN)
    if not isinstance(origin, dict) or origin.get("format") != found.name:
        return None
    kept = {field.name: origin[field.name] for field in fields(Source) if field.name in origin}
    tables = _tables(model, found, tuple(origin.get("tensors") or ()))
    return Source(**{**kept, "tensors": tables})


def _tables(model: BaseModel, found: Format, names: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """Tensors that a format has and the model does not: from the file of another family, or computed.

    Args:
        model: what has its source.
        found: the format that is written.
        names: in it; None for those that are usual.
    """
    from models.weights import tables

    source, tensors = source_of(model), {}
    given = {rule.own: rule for rule in (tables(source.format, model.config) if source else ())}
    for rule in tables(found.name, model.config):
        wanted = rule.foreign[: rule.num_written] if names is None else [name for name in rule.foreign if name in names]
        stored = given[rule.own].present(source.tensors) if source and rule.own in given else []
        if stored and source:
            table = given[rule.own].to_own([source.tensors[name] for name in stored])
        elif rule.default is not None:
            table = rule.default(model)
        else:
            continue
        tensors.update(dict.fromkeys(wanted, table))
    return tensors


def _description(source: Source) -> dict[str, Any]:
    """A source as plain data, without its tensors."""
    return {field.name: getattr(source, field.name) for field in fields(source) if field.name != "tensors"}


def _check_composition(model: BaseModel, found: Format) -> None:
    plain: BaseModel = found.model(model.config, device="meta")
    have, usual = dict(_classes_of(model)), dict(_classes_of(plain))
    extra = [name for name in have if have[name] != usual.get(name)] + [name for name in usual if name not in have]
    if extra:
        raise ValueError(
            f"The format {found.name} holds a {found.model.__name__} as it is composed by default, and this "
            f"{type(model).__name__} differs in: {', '.join(extra)}. Remove what was added (merge a LoRA first), or "
            f"use format='own'."
        )


def _classes_of(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, tuple[type, Any]]]:
    for name in model.mixins:
        mixin = model.get_mixin(name)
        yield f"{prefix}{name}", (type(mixin), model.scopes[name])
        for path, inner in nested_in(mixin).items():
            yield from _classes_of(inner, f"{prefix}{name}.{path}/")


def _config(model: BaseModel, found: Format, source: Source | None, shapes: Shapes) -> dict[str, Any]:
    """The content of the config file: the one the model was read with where that still says what the model is."""
    from models.weights import settings_from

    assert found.write_config is not None
    where = CONFIG_FILES[found.name.partition("-")[0]]
    dtype, names_dtype = str(model.dtype).removeprefix("torch."), found.name.startswith("hf-")
    if source is not None:
        again = foreign_config(found, source.config, shapes, source.overrides, where)
        if not _differences(again, model.config):
            content = dict(source.config)
            if source.dtype != dtype and names_dtype:
                content["dtype" if "dtype" in content else "torch_dtype"] = dtype
            return content
    kept = source_of(model)
    content = {**(source.config if source else {}), **found.write_config(model.config)}
    content |= {"torch_dtype": dtype} if names_dtype else {}
    content |= settings_from(kept, found.name) if source is None else {}
    if kept is not None and kept.format.partition("-")[0] != found.name.partition("-")[0]:
        origin = {**_description(kept), "tensors": list(kept.tensors)}
        origin["config"] = {name: value for name, value in kept.config.items() if name != ORIGIN}
        content[ORIGIN] = origin
    lacking = {path: value for path, value in flat(asdict(model.config)) if path in found.lacks}
    again = foreign_config(found, content, shapes, lacking, where)
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
    lacking: dict[str, Any], found: Format, content: dict[str, Any], shapes: Shapes, config: Any
) -> bool:
    try:
        plain = dict(flat(asdict(foreign_config(found, content, shapes, None, "config.json"))))
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
