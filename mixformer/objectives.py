"""Objectives: what a model class is trained to do, and which parameters its paper trains in which stage.

A model class names its objective and its stages, and `python -m models.<name> --job train` uses them:

    class LLaVA(LLaMA):
        objective = LanguageObjective()
        stages = {"align": Trained(["mixins.image.projector.*"]), "tune": Trained(["*"], ["mixins.image.tower.*"])}

An objective runs the model on a batch and returns named losses, the auxiliary losses of mixins included; training
minimises their sum. Shapes: b rows, s tokens, v vocabulary, m images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
"""Label of tokens that are not learnt."""


class Objective(Protocol):
    """What a model is trained to do."""

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the model on a batch and return the losses by name, means over what `count` counts."""

    def count(self, batch: Mapping[str, Any]) -> int:
        """What a batch has to learn: supervised tokens, or rows. Batches of one step are weighted by it."""


@dataclass(frozen=True)
class Trained:
    """What one stage of training changes.

    Attributes:
        trainable: glob patterns over parameter names; all that match are trained, the rest is frozen.
        frozen: glob patterns of parameters that stay frozen although `trainable` matches them.
    """

    trainable: list[str]
    frozen: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LanguageObjective:
    """Predict the next token: `labels` [b, s] are aligned with the input; the label of a token is learnt one before it.

    Attributes:
        smoothing: probability that the target leaves to other tokens.
        smooth_over: which ones share it: `others` are all but the target, and the loss is the divergence from the
            smoothed target (GIT, arXiv:2205.14100); `all` counts the target among them, as torch's cross entropy does.
        ignored_ids: ids that are not learnt wherever they stand in `labels` (0 in ClipCap, arXiv:2111.09734).
        chunk: supervised tokens whose logits are held at once; the backward pass makes them once more. None makes all
            logits [b, s, v] at once.
    """

    smoothing: float = 0.0
    smooth_over: Literal["others", "all"] = "others"
    ignored_ids: tuple[int, ...] = ()
    chunk: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignored_ids", tuple(self.ignored_ids))
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"LanguageObjective.smoothing is {self.smoothing}; it must be in 0 <= smoothing < 1.")
        if self.smooth_over not in ("others", "all"):
            raise ValueError(f"LanguageObjective.smooth_over is {self.smooth_over!r}; choose others or all.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"LanguageObjective.chunk is {self.chunk}; it must be at least 1, or None.")

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses: `language`, a mean over the labels that are learnt; 0 where there is none.

        Raises:
            ValueError: no labels, labels of another shape than the logits, or a `chunk` and a model whose head needs
                the whole sequence.
        """
        if self.chunk is not None:
            return self._in_chunks(model, batch, self.chunk)
        out, labels = _run(model, batch)
        labels = self._targets(labels)
        losses = self._token_losses(out.logits.flatten(0, 1), labels)
        return {"language": _mean(losses, labels), **out.losses}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Supervised tokens."""
        return int((self._targets(_labels(batch)) != IGNORED_LABEL).sum())

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b * s], what each slot predicts; the last one of a row nothing, so that no logits are copied."""
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
        for ignored in self.ignored_ids:
            labels = labels.masked_fill(labels == ignored, IGNORED_LABEL)
        return labels

    def _token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[n, v] and [n] -> [n], 0 where nothing is learnt."""
        if self.smoothing and self.smooth_over == "others":
            losses = self._divergence(logits.float(), labels.clamp(min=0))
            return losses.masked_fill(labels == IGNORED_LABEL, 0.0)
        return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=self.smoothing)

    def _in_chunks(self, model: Any, batch: Mapping[str, Any], chunk: int) -> dict[str, torch.Tensor]:
        """As `__call__`, but only supervised tokens go through the head, a chunk of them at a time."""
        if model.whole_sequence:
            names = [name for name, mixin in model.mixins.items() if mixin.whole_sequence]
            raise ValueError(
                f"The loss cannot be taken in chunks: all tokens of a sequence are needed at the head, by "
                f"{', '.join(names)}. Leave `chunk` (loss_chunk) out."
            )
        inputs, labels = dict(batch), _labels(batch)
        inputs.pop("labels")
        plan = inputs.pop("plan", None) or model.plan(**inputs)
        out = model.run(**inputs, plan=plan, last_only=True, hidden_layers=("final",))
        hidden_states = out.hidden["final"]
        _require_fit(labels, hidden_states, "hidden states")
        targets = self._targets(labels)
        learnt = targets != IGNORED_LABEL
        hidden_states, targets = hidden_states.flatten(0, 1)[learnt], targets[learnt]
        ctx = plan.started({})

        def summed(rows: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self._token_losses(model.hooks.final_forward(rows[None], ctx)[0], right).sum()

        # Without anything to learn there is one empty chunk, so that the head has its gradient, zero.
        parts = zip(hidden_states.split(chunk), targets.split(chunk), strict=True)
        losses = [checkpoint(summed, rows, right, use_reentrant=False) for rows, right in parts]
        return {"language": torch.stack(losses).sum() / max(1, len(targets)), **out.losses}

    def _divergence(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of the prediction from the smoothed target, [n, v] and [n] -> [n]."""
        log_probabilities = logits.log_softmax(-1)
        right = log_probabilities.gather(-1, labels[:, None])[:, 0]
        share = self.smoothing / (logits.shape[-1] - 1)
        entropy = -(1 - self.smoothing) * math.log(1 - self.smoothing) - self.smoothing * math.log(share)
        return -(1 - self.smoothing - share) * right - share * log_probabilities.sum(-1) - entropy


@dataclass(frozen=True)
class MaskedLanguageObjective:
    """Predict what was masked: `labels` [b, s] hold the right id at masked tokens, -100 elsewhere (arXiv:1810.04805).

    With `next_sentence_labels` [b] (0: the two parts belong together, 1: they do not) the model's result `sentence`
    [b, 2] is trained as well; in VisualBERT (arXiv:1908.03557) the parts are a text and a picture.
    """

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses: `masked_language`, and `next_sentence` where there are labels for it.

        Raises:
            ValueError: no labels, labels of another shape than the logits, or a model without a sentence head.
        """
        sentence_labels = batch.get("next_sentence_labels")
        out, labels = _run(model, {name: value for name, value in batch.items() if name != "next_sentence_labels"})
        losses = F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        found = {"masked_language": _mean(losses, labels.flatten())}
        if sentence_labels is not None:
            found["next_sentence"] = F.cross_entropy(_result(model, out, "sentence").float(), sentence_labels)
        return {**found, **out.losses}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Masked tokens."""
        return int((_labels(batch) != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class ContrastiveObjective:
    """Find the picture of each text and the text of each picture within the batch (CLIP, arXiv:2103.00020, figure 3).

    The model's result `logits_per_text` [b, b] holds the scaled similarity of text i and picture j.
    """

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses: `contrastive`, the mean of both directions.

        Raises:
            ValueError: a model that compares no texts with pictures, or another number of pictures than of texts.
        """
        out = model.run(**batch)
        logits = _result(model, out, "logits_per_text").float()
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(
                f"The batch has {logits.shape[0]} texts and {logits.shape[1]} pictures; text i belongs to picture i, "
                f"so give as many of one as of the other."
            )
        right = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        return {"contrastive": loss, **out.losses}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Pairs."""
        return len(batch["images"])


@dataclass(frozen=True)
class ClassificationObjective:
    """Predict the class: `labels` [m] index the logits [m, classes]."""

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses: `classification`.

        Raises:
            ValueError: no labels, or another number of labels than of logits.
        """
        out, labels = _run(model, batch)
        return {"classification": F.cross_entropy(out.logits.float(), labels), **out.losses}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Pictures with a class."""
        return int((_labels(batch) != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class SquaredDistanceObjective:
    """Bring the output near the code of its class; the model gives squared distances [m, classes] to all codes.

    The first loss of LeNet-5 (LeCun et al., Proceedings of the IEEE 86(11), 1998, section III-C, equation 8).
    """

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses: `squared_distance`, the mean distance to the right code for `labels` [m].

        Raises:
            ValueError: no labels, or another number of labels than of outputs.
        """
        out, labels = _run(model, batch)
        return {"squared_distance": out.logits.float().gather(1, labels[:, None]).mean(), **out.losses}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Pictures."""
        return len(_labels(batch))


def _run(model: Any, batch: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """Run the model on all of a batch but its `labels`; return its output and the labels, one for each output."""
    inputs, labels = dict(batch), _labels(batch)
    inputs.pop("labels")
    out = model.run(**inputs)
    _require_fit(labels, out.logits, "logits")
    return out, labels


def _labels(batch: Mapping[str, Any]) -> torch.Tensor:
    labels: torch.Tensor | None = batch.get("labels")
    if labels is None:
        raise ValueError(f"The batch has no 'labels', only {', '.join(batch) or 'nothing'}: it cannot be learnt from.")
    return labels


def _require_fit(labels: torch.Tensor, results: torch.Tensor, kind: str) -> None:
    if results.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit {kind} of shape {tuple(results.shape)}: every output "
            f"takes one label, {IGNORED_LABEL} where nothing is learnt."
        )


def _mean(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are learnt, without asking the device how many there are."""
    return losses.sum() / (labels != IGNORED_LABEL).sum().clamp(min=1)


def _result(model: Any, out: Any, name: str) -> torch.Tensor:
    if name not in out.outputs:
        raise ValueError(
            f"{type(model).__name__} gives no result '{name}', only {', '.join(out.outputs) or 'logits'}: add the "
            f"mixin that makes it, or train with another objective."
        )
    result: torch.Tensor = out.outputs[name]
    return result
