"""Our models in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), whose benchmarks then judge them.

    pip install mixformer[lmms-eval]
    python -m lmms_eval --model mixformer --model_args pretrained=FOLDER --tasks mme --batch_size 8

lmms-eval finds `model_manifest` through the entry point `lmms_eval.models`, and `Mixformer` through it. The interface
is that of its model guide for models of the kind `simple`: a subclass of `lmms_eval.api.model.lmms` whose requests
carry in `args` (text, generation options, doc_to_visual, doc_id, task, split) for `generate_until` and (text, target,
doc_to_visual, doc_id, task, split) for `loglikelihood`; `task_dict[task][split][doc_id]` is the document, and
`doc_to_visual(document)` its pictures. Where code and guide differ, this follows the code of version 0.7.3: a target is
a text, with the delimiter before it, in tasks of several choices (`multiple_choice`), of which the one with the least
loss counts (api/task.py), and a function of the document in others (`loglikelihood`). lmms-eval is imported only when
`Mixformer` or the manifest is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from PIL import Image

from mixformer.evaluation.answering import Question, answers, likelihoods

MAX_NEW_TOKENS = 256
PLACEHOLDER = "<image>"
_DRAWS = ("temperature", "top_k", "top_p", "repetition_penalty")


class Bridge:
    """What answers the requests of lmms-eval.

    Args:
        pretrained: folder of a checkpoint.
        batch_size: questions at a time.
        device: where the model runs; `cuda` is the GPU of this process where several were launched on a machine.
        dtype: of its parameters; None for the checkpoint's.
        template: of the prompts; None for the processor's.
        seed: of draws, where a task asks for them.
        max_batch_size: given by lmms-eval, and not needed.
    """

    is_simple = True
    task_dict: Mapping[str, Any]

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "cpu", dtype: str | None = None,
        template: str | None = None, seed: int | str = 0, max_batch_size: int | None = None,
    ) -> None:
        self.model_name = str(pretrained)  # what the base class names its cache by
        super().__init__()
        from mixformer import from_pretrained, load_processor

        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a number, at least 1.")
        self.batch_size_per_gpu, self.template, self.seed = int(batch_size), template, int(seed)
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
        self._model, self._processor = from_pretrained(pretrained, dtype, self.device), load_processor(pretrained)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests.

        Of the generation options max_new_tokens, until, do_sample, temperature, top_k, top_p and repetition_penalty
        count; with temperature 0, or do_sample false, the likeliest tokens are taken.

        Raises:
            ValueError: a task that asks for several beams, or what the model refuses.
        """
        found: dict[int, str] = {}
        groups: dict[tuple[tuple[str, float], ...], list[Question]] = {}
        for index, request in enumerate(requests):
            text, options, doc_to_visual, doc_id, task, split = request.args
            if (options.get("num_beams") or 1) > 1:
                raise ValueError(f"{task} asks for {options['num_beams']} beams; mixformer answers with one.")
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            limit = int(options.get("max_new_tokens") or MAX_NEW_TOKENS)
            question = Question(index, f"{task} {split} {doc_id}", _plain(text), pictures, limit)
            groups.setdefault(_draws(options), []).append(question)
        for draws, questions in groups.items():
            plain = self.batch_size_per_gpu, self.template, dict(draws) or None, self.seed
            found.update(answers(self._model, self._processor, questions, *plain))
        return [_until(found[index], request.args[1].get("until")) for index, request in enumerate(requests)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request a number for its target, and whether it is what the likeliest tokens spell.

        The number is the mean loss of the target's tokens where it is one of several choices, as lmms-eval's own models
        have it (the least wins), and the log-probability of the target otherwise. The end token is no part of it.

        Raises:
            ValueError: what the model refuses.
        """
        rows, chosen = [], []
        for request in requests:
            text, target, doc_to_visual, doc_id, task, split = request.args
            chosen.append(not callable(target))
            said = target(self.task_dict[task][split][doc_id]) if callable(target) else target
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            rows.append({"prompt": _plain(text), "answer": said.strip(), "images": pictures, "template": self.template})
        found = []
        for start in range(0, len(rows), self.batch_size_per_gpu):
            found += likelihoods(self._model, self._processor, rows[start : start + self.batch_size_per_gpu])
        results = []
        for row, is_choice in zip(found, chosen, strict=True):
            values = row.log_probabilities[:-1]
            results.append((float(-values.mean() if is_choice else values.sum()), bool(row.is_greedy[:-1].all())))
        return [_whole(result) for result in results]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: tasks of several rounds make their questions of answers.

        Raises:
            ValueError: always.
        """
        raise ValueError("mixformer answers tasks of one round. Leave tasks of several rounds out of --tasks.")

    def _pictures(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[Image.Image] | None:
        visuals = (doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual is not None else None) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                kind = type(visual).__name__
                raise ValueError(f"{task} {split} {doc_id} comes with a {kind}; mixformer reads pictures only.")
        return list(visuals) or None


def _plain(text: str) -> str:
    """The text without marks of pictures, which the processor puts where the model has them."""
    return text.replace(PLACEHOLDER, "").strip()


def _draws(options: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Sampling options; none to take the likeliest tokens."""
    if not options.get("temperature") or options.get("do_sample") is False:
        return ()
    return tuple((name, float(options[name])) for name in _DRAWS if options.get(name))


def _until(answer: str, stops: str | Sequence[str] | None) -> str:
    """The answer up to the first of the texts that end it."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def _whole(result: tuple[float, bool]) -> Any:
    """A pair as it is taken: the evaluator of 0.7.3 makes text of pairs unless they come as a `GenerationResult`."""
    kind = getattr(_imported("lmms_eval.api.instance"), "GenerationResult", None)
    return result if kind is None else kind(text=result)


@cache
def model_class() -> type:
    """The class that lmms-eval runs: `Bridge` on its base class.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    base = _imported("lmms_eval.api.model").lmms
    return type("Mixformer", (Bridge, base), {"__module__": __name__, "__doc__": Bridge.__doc__})


def model_manifest() -> Any:
    """What the entry point gives lmms-eval: the model `mixformer`.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    registry = _imported("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="mixformer", simple_class_path=f"{__name__}.Mixformer")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"lmms-eval is needed for this: pip install mixformer[lmms-eval] ({error})") from error


def __getattr__(name: str) -> Any:
    if name == "Mixformer":
        return model_class()
    raise AttributeError(f"module {__name__} has no attribute '{name}'")
