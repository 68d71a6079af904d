"""Evaluation on files of questions with known answers: resumable, with all that is needed to run it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixformer.data.grounding import Box, format_boxes
from mixformer.data.readers import open_records
from mixformer.data.records import Record, place_images
from mixformer.evaluation.answering import Question, answers, likelihoods
from mixformer.evaluation.metrics import BOX_METRICS, METRICS, applies, perplexity, reference_boxes
from mixformer.prompts import render_prompt
from mixformer.shards import INDEX, read_json, sha256
from mixformer.train.stages import Evaluation

PERPLEXITY = "perplexity"
_GENERATING = ("max_new_tokens", "sample")


@dataclass
class FileEvaluation(Evaluation):
    """Ask a model the questions of JSON-lines files (or others that `mixformer.data.readers` reads) and judge it.

    The last message of the user is asked, with what comes before it. References are `answers` of the line (a list of
    texts), or else the assistant's message after it; perplexity takes the first. Boxes are those in the references, or
    else of `objects`.

    Every answer is appended to a file as soon as it is there, and a run that was stopped goes on behind it. That file's
    name depends on the questions, the weights, the prompt, the seed and the generation options, so that answers of
    different runs never mix; the metrics may be changed without asking again. Pictures are taken to stay the same.

    Attributes:
        files: of questions, relative to where the command runs.
        metrics: any of exact_match, vqa_accuracy, box_accuracy, centre_in_box and perplexity. Each judges the questions
            that have references for it, and is left out for files that have none.
        template: of the prompts; None for the processor's.
        max_new_tokens: of an answer.
        sample: draw answers, with temperature, top_k, top_p, min_p, repetition_penalty; None takes the likeliest.
        seed: of the draws.
        batch_size: questions at a time.
        max_samples: of each file, from its start; None for all.
        answers: folder that answers are kept in.
        checkpoint: folder of the weights, whose hash goes into the results; None hashes the weights in memory.
        progress: show a progress bar.
    """

    files: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    template: str | None = None
    max_new_tokens: int = 256
    sample: dict[str, float] | None = None
    seed: int = 0
    batch_size: int = 8
    max_samples: int | None = None
    answers: str = "runs/evaluation"
    checkpoint: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        known = (*METRICS, PERPLEXITY)
        for name in self.metrics:
            if name not in known:
                raise ValueError(f"FileEvaluation.metrics has no '{name}': choose of {', '.join(known)}.")
        for name in ("files", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"FileEvaluation.{name} is empty: name one or more.")
        for name in ("batch_size", "max_new_tokens", "max_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"FileEvaluation.{name} is {getattr(self, name)}; it must be at least 1.")

    def __call__(self, model: Any, processor: Any) -> dict[str, Any]:
        """Judge the model.

        Args:
            model: a language model.
            processor: of its prompts.

        Returns:
            `checkpoint` (see `checkpoint_hash`), `seed`, `prompt` (family, template and its text), `generation`
            (options), and `files`: for each `sha256` of its questions and references, number of `samples`, the file of
            `answers`, and `scores` {metric: {score, count}}, where count is how many questions were judged, or
            supervised tokens for perplexity.

        Raises:
            ValueError: no processor, a file that cannot be used, a line without a question, a metric that no line, or a
                file that no metric, has references for, a question that the model refuses; named by file and line.
        """
        if processor is None:
            raise ValueError("FileEvaluation needs the model's processor: set `processor:` in the configuration file.")
        config = processor.config
        slot = config.spelling.image_slot if config.place == "slot" else None
        found = {file: self._questions(file, slot) for file in self.files}
        useful = {metric for asked in found.values() for metric in self._metrics_for(asked)}
        for metric in self.metrics:
            if metric not in useful:
                raise ValueError(_no_references(", ".join(found), [metric], sum(map(len, found.values()))))
        chosen = self.template or config.template
        about: dict[str, Any] = {
            "checkpoint": memory_hash(model) if self.checkpoint is None else checkpoint_hash(self.checkpoint),
            "seed": self.seed,
            "prompt": {
                "family": config.family, "template": chosen or config.spelling.default,
                "text": render_prompt("{question}", chosen, config.family),
            },
            "generation": {name: getattr(self, name) for name in _GENERATING},
        }  # fmt: skip
        mode = model.training
        model.eval()
        try:
            files = {file: self._judge(model, processor, file, asked, about) for file, asked in found.items()}
        finally:
            model.train(mode)
        return {**about, "files": files}

    def _questions(self, file: str, slot: str | None) -> list[_Asked]:
        """The file's questions; all that may be wrong with them comes to light before the first is asked."""
        asked = [_asked(record, slot) for record in open_records(file)[: self.max_samples]]
        if PERPLEXITY in self.metrics:
            lacking = next((each for each in asked if not each.references), None)
            if lacking is not None:
                raise ValueError(f"{lacking.where} has no answer to take the perplexity of.")
        if not self._metrics_for(asked):
            raise ValueError(_no_references(file, self.metrics, len(asked)))
        return asked

    def _metrics_for(self, asked: list[_Asked]) -> list[str]:
        """The metrics that some of the questions have references for."""
        return [
            metric for metric in self.metrics
            if metric == PERPLEXITY or any(applies(metric, each.known(metric)) for each in asked)
        ]

    def _judge(
        self, model: Any, processor: Any, file: str, asked: list[_Asked], about: Mapping[str, Any]
    ) -> dict[str, Any]:
        digest = _digest([each.described() for each in asked])
        run = {**about, "file": digest, "processor": asdict(processor.config)}
        records = _Records(Path(self.answers) / f"{Path(file).stem}-{_digest(run)[:16]}.jsonl")
        bar = tqdm(total=len(asked), desc=Path(file).stem, disable=not self.progress)
        with bar, records:
            if any(metric in METRICS for metric in self._metrics_for(asked)):
                self._answer(model, processor, asked, records, bar)
            if PERPLEXITY in self.metrics:
                self._measure(model, processor, asked, records, bar)
        scores = {metric: self._score(metric, asked, records) for metric in self._metrics_for(asked)}
        return {"sha256": digest, "samples": len(asked), "answers": str(records.path), "scores": scores}

    def _answer(self, model: Any, processor: Any, asked: list[_Asked], records: _Records, bar: Any) -> None:
        left = [each for each in enumerate(asked) if "answer" not in records.of(each[0])]
        bar.reset(total=len(asked))
        bar.update(len(asked) - len(left))
        questions = (Question(i, each.where, each.messages, each.images, self.max_new_tokens) for i, each in left)
        options = self.batch_size, self.template, self.sample, self.seed
        for index, answer in answers(model, processor, questions, *options):
            records.add(index, asked[index].where, answer=answer)
            bar.update()

    def _measure(self, model: Any, processor: Any, asked: list[_Asked], records: _Records, bar: Any) -> None:
        left = [index for index in range(len(asked)) if "loss" not in records.of(index)]
        bar.reset(total=len(asked))
        bar.update(len(asked) - len(left))
        for start in range(0, len(left), self.batch_size):
            some = left[start : start + self.batch_size]
            rows = [asked[index].training_row(self.template) for index in some]
            try:
                found = likelihoods(model, processor, rows)
            except ValueError:
                for index, one in zip(some, rows, strict=True):  # one by one, to find out which it is
                    try:
                        likelihoods(model, processor, [one])
                    except ValueError as error:
                        raise ValueError(f"{asked[index].where}: {str(error).removeprefix('sample 0: ')}") from error
                raise
            for index, row in zip(some, found, strict=True):
                loss, number = -float(row.log_probabilities.sum()), len(row.log_probabilities)
                records.add(index, asked[index].where, loss=loss, tokens=number)
                bar.update()

    def _score(self, metric: str, asked: list[_Asked], records: _Records) -> dict[str, Any]:
        if metric == PERPLEXITY:
            found = [records.of(index) for index in range(len(asked))]
            number = sum(record["tokens"] for record in found)
            return {"score": perplexity(sum(record["loss"] for record in found), number), "count": number}
        known = [(index, each.known(metric)) for index, each in enumerate(asked)]
        judged = [(index, references) for index, references in known if applies(metric, references)]
        scores = [METRICS[metric](records.of(index)["answer"], references) for index, references in judged]
        return {"score": sum(scores) / len(scores), "count": len(scores)}


def _no_references(files: str, metrics: list[str], number: int) -> str:
    return (
        f"{files}: {' and '.join(metrics)} can judge none of its {number} lines. exact_match takes the assistant's "
        f"message or `answers`; vqa_accuracy the `answers` of several people; boxes stand in the texts as "
        f"[[x0,y0,x1,y1]], or are `objects`."
    )


@dataclass(frozen=True)
class _Asked:
    """A sample: the messages up to the question, pictures, what people answered, and boxes as text."""

    where: str
    messages: list[dict[str, str]]
    images: list[Path | bytes]
    references: list[str]
    boxes: str

    def known(self, metric: str) -> list[str]:
        """What a metric compares with."""
        texts = self.references
        return [self.boxes] if metric in BOX_METRICS and self.boxes and not reference_boxes(texts) else texts

    def training_row(self, template: str | None) -> dict[str, Any]:
        images = self.images or None
        return {"prompt": self.messages, "answer": self.references[0], "images": images, "template": template}

    def described(self) -> list[Any]:
        """All of it but where it stands; pictures in files by their names."""
        images = [hashlib.sha256(x).hexdigest() if isinstance(x, bytes) else x.name for x in self.images]
        return [self.messages, images, self.references, self.boxes]


def _asked(record: Record, slot: str | None) -> _Asked:
    messages = place_images(record.get("messages", list), slot)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{record.place}: a message is {{'role': ..., 'content': text}}, not {message!r}.")
    said = [messages.pop()["content"]] if messages and messages[-1].get("role") == "assistant" else []
    if not messages or messages[-1].get("role") != "user":
        raise ValueError(f"{record.place} asks nothing: `messages` must end with the user's, or with an answer to it.")
    given = record.content.get("answers")
    if given is not None and (not isinstance(given, list) or not all(isinstance(text, str) for text in given)):
        raise ValueError(f"{record.place}: 'answers' must be a list of texts, not {given!r}.")
    try:
        boxes = format_boxes(Box(*entry["box"]) for entry in record.objects)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{record.place}: 'objects' must have a `box` of four thousandths each ({error}).") from error
    return _Asked(record.place, messages, record.images, said if given is None else given, boxes)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class _Records:
    """A JSON-lines file that grows by whole lines; the rest of a line that was cut by a kill is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[int, dict[str, Any]] = {}
        self._file = -1

    def __enter__(self) -> _Records:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for record in _parsed(whole, self.path):
            self.found.setdefault(record.pop("index"), {}).update(record)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        return self

    def __exit__(self, *error: Any) -> None:
        os.close(self._file)

    def of(self, index: int) -> dict[str, Any]:
        """What is known of a question."""
        return self.found.get(index, {})

    def add(self, index: int, where: str, **values: Any) -> None:
        """Write a line."""
        self.found.setdefault(index, {}).update(values)
        line = json.dumps({"index": index, "where": where, **values}, ensure_ascii=False) + "\n"
        os.write(self._file, line.encode())


def _parsed(content: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
            record["index"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is damaged. Delete the file, and all is asked again.") from error
        yield record


def checkpoint_hash(folder: str | Path) -> str:
    """SHA-256 over the names and the SHA-256 of the files of weights of a checkpoint.

    The hashes are those that `model.safetensors.index.json` recorded when the checkpoint was written; a folder without
    them is read and hashed.

    Raises:
        ValueError: the folder holds no weights.
    """
    path = Path(folder)
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    digests: dict[str, str] = (index.get("metadata") or {}).get("sha256") or {}
    if not digests:
        files = sorted([*path.glob("*.safetensors"), *path.rglob("*.pt")])
        digests = {file.relative_to(path).as_posix(): sha256(file) for file in files}
    if not digests:
        raise ValueError(f"{path} holds no weights (.safetensors or .pt). Name the folder of a checkpoint.")
    lines = [f"{name} {digest}\n" for name, digest in sorted(digests.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def memory_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
