"""`mixformer describe` and `mixformer plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mixformer.accounting.changes import Setup, default_context
from mixformer.accounting.describe import compare, describe
from mixformer.accounting.plan import PlannedStage, make_plan
from mixformer.accounting.targets import reading_of, settings_of, shapes_of
from mixformer.accounting.text import comparison_lines, description, plan_lines
from mixformer.accounting.workload import Workload, takes_images
from mixformer.config import Settings
from mixformer.quantised import Kind
from mixformer.shards import parse_size

TARGET = "a configuration file that has model_class, a checkpoint folder, or module:Class"


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `mixformer describe` takes; a second target comes with the overrides."""
    parser.usage = "mixformer describe TARGET [OTHER] [options] [--section.key value ...]"
    parser.add_argument("target", help=f"{TARGET}; a second one shows how the two differ, and overrides are its own")
    parser.add_argument("--text-tokens", type=int, help="of a row, for operations (default: 128, or as many as fit)")
    parser.add_argument("--images", type=int, help="of a row (default: 1 where the model takes any)")
    parser.add_argument("--batch", type=int, help="rows (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page to look at instead")


def describe_command(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run `mixformer describe`.

    Raises:
        ValueError: a target that cannot be read, or sizes that the model does not take.
    """
    overrides = list(overrides)
    other = overrides.pop(0) if overrides and not overrides[0].startswith("-") else None
    targets = [options.target] if other is None else [options.target, other]
    given = [overrides] if other is None else [[], overrides]
    settings = [settings_of(target, each) for target, each in zip(targets, given, strict=True)]
    summaries = [_described(each, options) for each in settings]
    difference = None if other is None else compare(*summaries)
    if options.html:
        from mixformer.accounting.html import page

        text = page(summaries, targets, difference)
        _write(Path(options.html), text)
        print(f"saved {options.html}")
    elif options.json:
        found = summaries[0] if difference is None else {"first": summaries[0], "second": summaries[1], **difference}
        print(json.dumps(found))
    else:
        lines = description(summaries[0]) if difference is None else comparison_lines(difference, targets)
        print("\n".join(lines))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--html: {path} cannot be written: {error.strerror}. Name a file in a folder that is there."
                         ) from error  # fmt: skip


def _described(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    model = shapes_of(settings)
    given = {name: getattr(options, name) for name in ("text_tokens", "images", "batch")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return describe(model)
    workload = replace(Workload().fitted(model), **given)
    if "text_tokens" not in given:
        workload = replace(workload, text_tokens=workload.fitted(model).text_tokens)
    return describe(model, workload)


def describe_job(settings: Settings, as_json: bool) -> None:
    """`--job describe` of a model's own command."""
    summary = describe(shapes_of(settings))
    print(json.dumps(summary) if as_json else "\n".join(description(summary)))


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `mixformer plan` takes."""
    parser.usage = "mixformer plan TARGET [options] [--section.key value ...]"
    parser.add_argument("target", help=TARGET)
    parser.add_argument("--memory", help="of each device, such as 24GB or 16GiB; says what fits")
    parser.add_argument("--devices", type=int, default=1, help="that train together (default: 1)")
    parser.add_argument("--batch", type=int, help="rows, in training of one device (default: the task's, or 1)")
    parser.add_argument("--context", type=int, help="tokens of a row, pictures' too (default: the task's, or 2048)")
    parser.add_argument("--images", type=int, default=1, help="pictures of a row (default: 1)")
    parser.add_argument(
        "--quantise", metavar="KIND", help="of weights that do not train: int8, int4, or {selector: kind}"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train low-rank updates of the language model only")
    parser.add_argument("--stage", help="of the `train:` section (default: all of them)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def plan_command(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run `mixformer plan`.

    Raises:
        ValueError: a target that cannot be read, a size that is none, or sizes that the model does not take.
    """
    for name in ("devices", "batch", "context", "lora"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1.")
    if options.images < 0:
        raise ValueError(f"--images is {options.images}; it must be at least 0.")
    memory = None if options.memory is None else _memory(options.memory)
    settings = settings_of(options.target, overrides, ("train",))
    quantise = settings.quantise if options.quantise is None else _choices(options.quantise)
    settings.quantise = None  # the plan looks at both, the weights as they are and quantised
    model = shapes_of(settings)
    section = settings.train
    stages = [_planned(stage, model, options) for stage in getattr(section, "stages", [])]
    if options.stage is not None:
        names = [stage.name for stage in stages]
        if options.stage not in names:
            raise ValueError(f"There is no stage '{options.stage}'. The file has: {', '.join(names) or 'none'}.")
        stages = [stage for stage in stages if stage.name == options.stage]
    setup = Setup(
        batch=options.batch or 1, context=options.context or default_context(model, options.images),
        images=options.images if takes_images(model) else 0, devices=options.devices, quantise=quantise,
        lora=options.lora,
    )  # fmt: skip
    plan = make_plan(model, setup, memory, stages, getattr(section, "engine", "auto"), reading_of(settings))
    print(json.dumps(plan.as_dict()) if options.json else "\n".join(plan_lines(plan)))


def _memory(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise ValueError(f"--memory is '{text}', which is no size of a device. Write such as 24GB or 16GiB.") from None


def _choices(text: str) -> Any:
    """One kind, or {selector: kind}."""
    found = yaml.safe_load(text) if text.startswith("{") else text
    for kind in found.values() if isinstance(found, dict) else [found]:
        if kind not in (None, "none"):
            Kind.of(str(kind))
    return found


def _planned(stage: Any, model: Any, options: argparse.Namespace) -> PlannedStage:
    """A stage with the sizes that its task says, where the command line says none."""
    rows, length = getattr(stage.task, "batch_size", None), getattr(stage.task, "max_length", None)
    batch = None if options.batch or rows is None else max(1, rows // options.devices)
    return PlannedStage(stage.name, stage.options(model), batch, None if options.context else length)
