"""Command lines: `python -m models.<name> --config FILE`, and the verbs of `mixformer`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixformer import hooks
from mixformer.config import (
    RUN_OPTIONS,
    ChatConfig,
    Settings,
    import_class,
    read_settings,
    settings_parser,
    split_overrides,
)
from mixformer.hooks import LAYER_HOOKS, MODEL_HOOKS, SITE_HOOKS


def main(class_path: str, arguments: Sequence[str] | None = None) -> None:
    """Run a job of one model; what `python -m models.<name>` calls.

    Args:
        class_path: module and class, such as `models.cogagent:CogAgent`.
        arguments: instead of the process's own.

    Raises:
        SystemExit: 2 after a user's mistake, whose message goes to stderr.
    """
    front = _front(class_path)
    options, overrides = front.parse_known_args(arguments)
    if options.help:
        _print_help(front, class_path)
        return
    with _Reported(front.prog, options.traceback):
        settings = read_settings(import_class(class_path, "class"), options.config, overrides, (options.job,))
        asked = {"prompt": options.prompt, "image": options.image}
        asked = {name: value for name, value in asked.items() if value is not None}
        settings.chat = dataclasses.replace(settings.chat, **asked)
        JOBS[options.job](settings, options.json)


def console(arguments: Sequence[str] | None = None) -> None:
    """Run a verb of the console script; `python -m mixformer` calls it too.

    Args:
        arguments: instead of the process's own.

    Raises:
        SystemExit: 2 after a user's mistake, whose message goes to stderr.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where classes of one's own lie, as for `python -m`
    parser = argparse.ArgumentParser(
        prog="mixformer", description="Compose transformers out of mixins.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    accounting = _accounting()
    accounting.describe_arguments(verbs.add_parser(
        "describe", help="say what a model is made of and costs, or how two differ; nothing is allocated",
        allow_abbrev=False,
    ))
    accounting.plan_arguments(verbs.add_parser(
        "plan", help="say what memory loading, answering and training take; nothing is allocated", allow_abbrev=False,
    ))
    verb = verbs.add_parser("plot", help="draw the curves of a training run to a PNG", allow_abbrev=False)
    verb.add_argument("run", help="the output of a training run, a folder of logs, or a .jsonl log")
    verb.add_argument("--output", metavar="FILE", help="the picture (default: curves.png beside the logs)")
    merge = importlib.import_module("mixformer.merge")
    merge.add_arguments(
        verbs.add_parser("merge", help="add LoRA updates to the weights, and save the result", allow_abbrev=False)
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was found")
    data_verbs = _data_parser(verbs)
    converting = importlib.import_module("mixformer.conversion.run")
    converting.add_arguments(
        verbs.add_parser("convert", help="write a checkpoint in another format, tensor by tensor", allow_abbrev=False)
    )
    verbs.add_parser("hooks", help="print what every hook receives and returns, as Markdown", allow_abbrev=False)
    options, overrides = parser.parse_known_args(arguments)
    with _Reported(f"mixformer {options.verb}", options.traceback):
        if options.verb == "hooks":
            split_overrides(overrides)
            print(hook_reference(), end="")
            return
        if options.verb == "data":
            if overrides:
                raise ValueError(f"There is no option {overrides[0]}: see mixformer data {options.data_verb} --help.")
            data_verbs[options.data_verb](options)
            return
        if options.verb == "convert":
            converting.convert_command(options, overrides)
            return
        if options.verb == "merge":
            if overrides:
                raise ValueError(f"There is no option {overrides[0]}: see mixformer merge --help.")
            merge.merge_command(options)
            return
        if options.verb == "plot":
            split_overrides(overrides)
            plot = importlib.import_module("mixformer.train.plot").plot
            print(f"saved {plot(options.run, options.output)}")
            return
        if options.verb == "plan":
            accounting.plan_command(options, overrides)
            return
        accounting.describe_command(options, overrides)


def _data_parser(verbs: Any) -> dict[str, Callable[[argparse.Namespace], None]]:
    """Declare `mixformer data check` and `mixformer data show`; what they run."""
    from mixformer.data import check, show

    parts = verbs.add_parser("data", help="look at files to learn from", allow_abbrev=False).add_subparsers(
        dest="data_verb", required=True, metavar="VERB"
    )
    texts = {"check": "say what is wrong with files, with line numbers", "show": "print samples as they are learnt"}
    for name, module in (("check", check), ("show", show)):
        module.add_arguments(parts.add_parser(name, help=texts[name], allow_abbrev=False))
    return {"check": check.check_command, "show": show.show_command}


def _front(class_path: str) -> argparse.ArgumentParser:
    module, _, name = class_path.partition(":")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", usage="%(prog)s [--config FILE] [--job JOB] [--section.key value ...]",
        description=f"Run a job of {name}. Any setting of the file can be overridden: --section.key value.",
        add_help=False, allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and every setting")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; without one, the model's defaults")
    parser.add_argument("--job", choices=list(JOBS), default="chat", help="what to do (default: chat)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was found")
    parser.add_argument("--prompt", help="the question, instead of chat.prompt")
    parser.add_argument("--image", action="append", help="a picture, instead of chat.image; may be repeated")
    return parser


def _print_help(front: argparse.ArgumentParser, class_path: str) -> None:
    parser = settings_parser(import_class(class_path, "class"))
    settings = parser.format_help()
    print(front.format_help())
    print("mixins of the file, added in order after the model is built (null takes one of the model's own out):")
    print("  --mixins.NAME.class_path, --mixins.NAME.init_args.OPTION, --mixins.NAME.layers\n")
    print(settings[settings.index("options:") :] if "options:" in settings else settings)


class _Reported:
    """Turns mistakes of users into a message and exit code 2; other errors keep their traceback."""

    def __init__(self, program: str, traceback: bool) -> None:
        self.program, self.traceback = program, traceback

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) and not self.traceback:
            print(f"{self.program}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{self.program}: stopped", file=sys.stderr)
            raise SystemExit(130) from None


# ---------------------------------------------------------------- describe, plan


def _describe_settings(settings: Settings, as_json: bool) -> None:
    _accounting().describe_job(settings, as_json)


def _accounting() -> Any:
    return importlib.import_module("mixformer.accounting.command")


# ---------------------------------------------------------------- hooks


def hook_reference() -> str:
    """The hooks as a Markdown page, made from the docstrings of `HookPoints`."""
    kinds = {
        "Model hooks": list(MODEL_HOOKS),
        "Layer hooks": [name for name in LAYER_HOOKS if name not in SITE_HOOKS],
        "Site hooks": [name for name in LAYER_HOOKS if name in SITE_HOOKS],
    }
    notes = {
        "Model hooks": "Run once per forward. A mixin's `layers` do not limit them.",
        "Layer hooks": "Run in every layer, or in those that the mixin was added to.",
        "Site hooks": "Run at every Linear or norm that `claims_site` says yes to; see `SiteMixin`.",
    }
    lines = [
        "# Hooks", "",
        "This page is made from the docstrings of `mixformer.hooks.HookPoints`: `mixformer hooks > docs/hooks.md`.", "",
        *(inspect.getdoc(hooks) or "").split("\n\n", 1)[1].splitlines(), "",
        "`@replace` methods take the arguments shown after `self`; `@wrap` methods take `old_impl` after them and call "
        "it with the tensors only.",
    ]
    for title, names in kinds.items():
        lines += ["", f"## {title}", "", notes[title]]
        for name in names:
            contract = inspect.getdoc(getattr(hooks.HookPoints, name)) or ""
            lines += ["", f"### `{name}({', '.join(hooks.HOOKS[name])})`", "", contract]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- chat


def _chat(settings: Settings, as_json: bool) -> None:
    import torch

    from mixformer.conversation import Conversation

    chat = settings.chat
    if not (settings.model.causal and settings.model.vocab_size):
        name = settings.model_class.__name__
        raise ValueError(f"{name} writes no text, so it cannot chat. Its jobs are train, evaluate and describe.")
    if chat.prompt is None and not chat.interactive:
        raise ValueError("There is no question. Give --prompt TEXT, or chat.prompt in the configuration file.")
    if settings.weights is None:
        raise ValueError(
            "chat needs trained weights. Name a checkpoint folder: --weights FOLDER, or `weights:` in the file."
        )
    processor = settings.load_processor()
    pictures = chat.images
    # Mistakes in the question come to light before the weights are read.
    processor(chat.prompt or "", pictures or None, template=chat.template)
    conversation = Conversation(settings.load_model().eval(), processor, chat.template)
    sampling = None
    if chat.temperature > 0:
        choices = {"temperature": chat.temperature, "top_k": chat.top_k, "top_p": chat.top_p}
        sampling = {name: value for name, value in choices.items() if value is not None}
    generator = torch.Generator(conversation.model.device).manual_seed(settings.seed)
    write = (lambda text: None) if as_json else _write
    for number, prompt in enumerate(_questions(chat), start=1):
        images = pictures if number == 1 else None
        answer = ""
        for piece in conversation.stream(prompt, images, chat.max_new_tokens, sampling, generator=generator):
            write(piece)
            answer += piece
        _conclude(answer.rstrip(), pictures, Path(chat.output), number, as_json)


def _questions(chat: ChatConfig) -> Iterator[str]:
    """The question of the settings, then those of the standard input if it is to be read."""
    if chat.prompt is not None:
        yield chat.prompt
    while chat.interactive:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _conclude(answer: str, pictures: list[str], folder: Path, number: int, as_json: bool) -> None:
    """Print what follows from a whole answer, the `number`-th: its boxes, or all of it as JSON."""
    boxes, saved = _draw(answer, pictures, folder, number)
    if as_json:
        result = {
            "answer": answer, "boxes": [[box.x0, box.y0, box.x1, box.y1] for box in boxes],
            "picture": None if saved is None else str(saved),
        }
        print(json.dumps(result), flush=True)
        return
    print()
    if not answer:
        print("The model ended its answer at once, without any text.", file=sys.stderr)
    for box in boxes:
        print(f"box {box}")
    if saved is not None:
        print(f"saved {saved}")


def _draw(answer: str, pictures: list[str], folder: Path, number: int) -> tuple[list[Any], Path | None]:
    """The boxes of the `number`-th answer, and the first picture with them drawn, saved."""
    from mixformer.data.grounding import draw_boxes, parse_boxes

    boxes = parse_boxes(answer)
    if not boxes or not pictures:
        return boxes, None
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{Path(pictures[0]).stem}{'' if number == 1 else f'-{number}'}.png"
    draw_boxes(pictures[0], boxes).save(target)
    return boxes, target


# ---------------------------------------------------------------- train, evaluate


def _train(settings: Settings, as_json: bool) -> None:
    if settings.train is None or "train" not in settings.given:
        raise ValueError("There is nothing to train on. Add a `train:` section to the configuration file.")
    sizes = set(settings.given.get("model") or ()) - set(RUN_OPTIONS)
    model = settings.build_model() if settings.weights is None or sizes else settings.load_model()
    _report(_training().run(model, settings.load_processor(), settings), as_json)


def _evaluate(settings: Settings, as_json: bool) -> None:
    if settings.weights is None:
        raise ValueError("evaluate needs trained weights: --weights FOLDER, or `weights:` in the file.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate runs in one process, and torchrun started several: start it without torchrun.")
    if "evaluate" not in settings.given:
        raise ValueError("There is nothing to evaluate on. Add an `evaluate:` section to the configuration file.")
    _report(_training().evaluate(settings.load_model().eval(), settings.load_processor(), settings), as_json)


def _training() -> Any:
    return importlib.import_module("mixformer.train")


def _report(result: Any, as_json: bool) -> None:
    if result is None or os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result, default=str))
        return
    for name, value in result.items() if isinstance(result, dict) else enumerate(result):
        print(f"{name}: {value}")


JOBS: dict[str, Callable[[Settings, bool], None]] = {
    "chat": _chat, "train": _train, "evaluate": _evaluate, "describe": _describe_settings,
}
