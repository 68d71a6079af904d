"""The training loop: AdamW, accumulation by supervised tokens, validation, logging, and runs that can be resumed."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from mixformer.data.skipped import Skipped
from mixformer.filling import saving
from mixformer.mixins.dropout import DropoutMixin
from mixformer.train.ema import AveragedWeights
from mixformer.train.engine import Engine
from mixformer.train.log import TRACKERS, RunLog, RunningMeans, merged_means, summed_means
from mixformer.train.roles import (
    Role,
    cast_parameters,
    missing_gradients,
    parameter_groups,
    role_table,
    select_parameters,
    trainable_names,
)
from mixformer.train.schedule import SCHEDULES, learning_rate_factor
from mixformer.train.state import (
    StopRequest,
    atomic_save,
    keep_newest,
    kept_random_states,
    newest_state,
    random_states,
    restore_random_states,
    state_file,
)
from mixformer.train.task import (
    GivenBatches,
    Losses,
    LossFunction,
    Task,
    TaskStream,
    model_count,
    model_losses,
    without_samples,
)

__all__ = [
    "AttentionOfProducts", "LossFunction", "Losses", "TrainConfig", "atomic_save", "learning_rate_factor",
    "model_count", "model_losses", "parameter_groups", "select_parameters", "train",
]  # fmt: skip

_DROPOUT = "dropout_while_training"


@dataclass
class TrainConfig:
    """Options of the loop.

    Attributes:
        steps: optimiser steps.
        learning_rate: the highest rate.
        warmup_steps: steps of linear warm-up.
        schedule: of the rate after warm-up: `cosine` or `linear` down to `final_rate`, or `constant`.
        final_rate: fraction of `learning_rate` that the schedule ends at.
        schedule_start: steps of the schedule that were done in an earlier run, on other data or at another size.
        schedule_steps: steps that the schedule is for, if more than those of this run and the earlier ones.
        weight_decay: of matrices; vectors are not decayed.
        betas: of AdamW.
        clip: largest norm of the gradient.
        accumulate: batches per optimiser step; their losses are divided by the supervised tokens of them all.
        trainable: selectors of parameters; all that match are trained, the rest is frozen.
        frozen: selectors of parameters that stay frozen although `trainable` matches them.
        rate_factors: {selector: factor} on the learning rate of some parameters.
        roles: further options of some parameters; later ones win.
        autocast: `bfloat16` for mixed precision, None for none.
        attention_backend: `products` composes attention of matrix products, faster in training on CPUs than torch's
            own kernels; `auto` leaves the choice to torch.
        dropout: share of what attention and MLPs add to the residual stream that is dropped, in the layers of the model
            itself; see `DropoutMixin`, which is part of the model while it is trained.
        loss_chunk: supervised tokens whose logits are held at once, for objectives that can; None for all [b, s, v].
        ema: share of an exponential moving average of the trained weights that stays after a step, such as 0.9999;
            None for no average.
        ema_for: what the average is used for: `validation`, the weights that are `saved` in the end, or `both`.
        validate_every: steps between validations; 0 for the end only. Without batches to validate on, there are none.
        validation_batches: batches of a task that is validated on and gives them without end.
        log_every: steps between lines of the log.
        log_path: JSON-lines file that is appended to.
        trackers: `tensorboard` and `wandb` take the log as well.
        state_path: file with all that a resumed run needs, replaced whole every `save_every` steps and at the end.
        save_every: steps between saves; 0 for the end only, and for SIGTERM and Ctrl-C.
        save_at_end: write the state when all steps are done.
        keep_last: states that are kept; if more than one, each has its step in its name.
        resume: go on from the newest state at `state_path` if there is one.
        progress: show a progress bar, and the table of roles before it.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "cosine"
    final_rate: float = 0.02
    schedule_start: int = 0
    schedule_steps: int | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    trainable: list[str] = field(default_factory=lambda: ["*"])
    frozen: list[str] = field(default_factory=list)
    rate_factors: dict[str, float] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    autocast: str | None = None
    attention_backend: str = "auto"
    dropout: float = 0.0
    loss_chunk: int | None = None
    ema: float | None = None
    ema_for: str = "both"
    validate_every: int = 0
    validation_batches: int = 16
    log_every: int = 20
    log_path: str | None = None
    trackers: list[str] = field(default_factory=list)
    state_path: str | None = None
    save_every: int = 0
    save_at_end: bool = True
    keep_last: int = 1
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "keep_last", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"TrainConfig.autocast is {self.autocast!r}; choose bfloat16, or leave it out.")
        for name, choices in (
            ("attention_backend", ("auto", "products")), ("schedule", SCHEDULES),
            ("ema_for", ("validation", "saved", "both")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                value, known = getattr(self, name), f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"TrainConfig.{name} is {value!r}; choose {known}.")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"TrainConfig.ema is {self.ema}; it must lie between 0 and 1, such as 0.9999.")
        end = self.schedule_start + self.steps
        if self.schedule_start < 0 or (self.schedule_steps is not None and self.schedule_steps < end):
            raise ValueError(
                f"TrainConfig.schedule_start is {self.schedule_start} and schedule_steps {self.schedule_steps}: the "
                f"{self.steps} steps of this run must lie within the schedule."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"TrainConfig.dropout is {self.dropout}; it must be in 0 <= dropout < 1.")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"TrainConfig.trackers has {name!r}; choose of {', '.join(TRACKERS)}.")


class AttentionOfProducts(TorchFunctionMode):
    """While entered, scaled dot product attention is two matrix products and a softmax in the dtype of its inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attention_of_products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_of_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` gives, by two matrix products; its arguments."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):  # meta has no autocast
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(q.dtype).transpose(-2, -1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return F.dropout(scores.softmax(-1), dropout_p) @ v.to(q.dtype)


@contextmanager
def _only_trainable(model: nn.Module, chosen: set[str]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mode = model.training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    model.train()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        model.train(mode)


@contextmanager
def _chunked_loss(model: Any, chunk: int | None) -> Iterator[None]:
    """While entered, the model's objective makes its logits `chunk` supervised tokens at a time."""
    if chunk is None:
        yield
        return
    objective: Any = getattr(model, "objective", None)
    if not hasattr(objective, "chunk"):
        raise ValueError(
            f"loss_chunk is {chunk}, but {type(model).__name__} is trained by {type(objective).__name__}, which needs "
            f"all logits: leave it out."
        )
    model.objective = dataclasses.replace(objective, chunk=chunk)
    try:
        yield
    finally:
        del model.objective


@contextmanager
def _dropping(model: Any, rate: float) -> Iterator[None]:
    """While entered, the model has a DropoutMixin, outermost."""
    if not rate:
        yield
        return
    model.add_mixin(_DROPOUT, DropoutMixin(rate))
    try:
        yield
    finally:
        model.del_mixin(_DROPOUT)


def train(
    model: nn.Module, batches: Iterable[Any] | Task, config: TrainConfig, loss: LossFunction = model_losses, *,
    validation: Task | None = None, engine: Engine | None = None,
) -> dict[str, float]:
    """Train the selected parameters; the others are left bit for bit.

    Args:
        model: the model; it is changed in place.
        batches: a task that was prepared, or as many batches as `steps * accumulate`, or more. A resumed run goes on
            in a task where it was; of batches it takes the rest.
        config: options.
        loss: (model, batch) -> named losses, whose sum is minimised, for batches; a task has its own.
        validation: a task to validate on; None for the batches that `batches` itself validates on, if any.
        engine: the processes that train together; one by default.

    Returns:
        the running means of the losses, their `total`, those of the last validation as `validation_{name}`, and
        `seconds`.

    Raises:
        ValueError: a selector that matches nothing, no losses, too few batches, a step without supervised tokens, a
            state of another run.
        FloatingPointError: a loss or gradient that is not finite; the weights are those of the last good step, and
            no state is written.
        SystemExit: 143 after SIGTERM, when the state has been saved.
        KeyboardInterrupt: after Ctrl-C, likewise.
    """
    task = batches if isinstance(batches, Task) else GivenBatches(batches, loss)
    engine = engine or Engine()
    cast_parameters(model, config)
    with ExitStack() as stack:
        stack.enter_context(_only_trainable(model, trainable_names(model, config)))
        stack.enter_context(_chunked_loss(model, config.loss_chunk))
        stack.enter_context(_dropping(model, config.dropout))
        if config.attention_backend == "products":
            stack.enter_context(AttentionOfProducts())
        run = _Run(model, task, config, validation, engine)
        stack.callback(run.log.close)
        return run.to_the_end(stack.enter_context(StopRequest().listening()))


class _Run:
    """One call of `train`."""

    def __init__(
        self, model: Any, task: Task, config: TrainConfig, validation: Task | None, engine: Engine
    ) -> None:
        self.model, self.task, self.config, self.engine = model, task, config, engine
        self.validation = validation
        self.called = engine.prepare(model)
        groups = parameter_groups(model, config)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.average = None if config.ema is None else AveragedWeights(model, config.ema)
        self.stream = TaskStream(task, engine)
        if validation is not None:
            validation.shard(engine.rank, engine.world_size)
            self.validation_start = validation.state_dict()
        first = engine.rank == 0
        options = dataclasses.asdict(config)
        self.log = RunLog(config.log_path if first else None, config.trackers if first else (), options)
        self.shown = first and config.progress
        self.means, self.validated, self.resumed = RunningMeans(), dict[str, float](), False
        self.started, self.seconds_before = time.perf_counter(), 0.0
        self.device = self.parameters[0].device
        self.tokens = _TokenRate(self.device)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def to_the_end(self, stop: StopRequest) -> dict[str, float]:
        """All steps that are left, and what comes after them."""
        config, first = self.config, self._load()
        if self.shown:
            print(role_table(self.model, config), file=sys.stderr)
        with tqdm(total=config.steps, initial=first, disable=not self.shown) as bar:
            for step in range(first, config.steps):
                losses = self._step(step)
                if step == first and self.engine.rank == 0:
                    self._list_missing_gradients(bar)
                self.optimizer.zero_grad(set_to_none=True)
                bar.update()
                done, last = step + 1, step + 1 == config.steps
                if done % config.log_every == 0 or last:
                    self._write_losses(done, losses, bar)
                if last or (config.validate_every and done % config.validate_every == 0):
                    self._validate(done)
                stopped = self._asked_to_stop(stop) and not last
                if self._saves(done) or stopped:
                    self._save(done)
                if stopped:
                    raise self._stopped(done, stop)
        if self.average is not None and config.ema_for != "validation":
            self.average.copy_to_model()
        validated = {f"validation_{name}": value for name, value in self.validated.items()}
        self._share_skipped()
        skipped = {f"skipped_{kind}": float(number) for kind, number in self.log.counts().items()}
        return {**self._rounded_means(), **validated, **skipped, "seconds": round(self.seconds, 1)}

    def _step(self, step: int) -> dict[str, float]:
        config, engine = self.config, self.engine
        rate = config.learning_rate * learning_rate_factor(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        drawn = [self.stream.draw(step) for _ in range(config.accumulate)]
        counts = [self.task.count(self.model, batch) for batch, _ in drawn]
        supervised = int(engine.total(torch.tensor(sum(counts), device=self.device)))
        if supervised == 0:
            raise ValueError(f"Step {step} has no supervised token: look at the labels of its batches.{_named(drawn)}")
        found: list[Losses] = []
        for index, ((batch, _), count) in enumerate(zip(drawn, counts, strict=True)):
            with engine.accumulating(self.called, index == len(drawn) - 1):
                losses = self._losses(batch, self.task, self.called)
                total = torch.stack([value.float() for value in losses.values()]).sum()
                if total.requires_grad:  # a batch may use nothing that is trained
                    (total * (count / supervised * engine.gradient_scale)).backward()
            found.append({**{name: value.detach() for name, value in losses.items()}, "total": total.detach()})
            self.tokens.add(batch, count)
        weights = [count / supervised for count in counts]
        loss = engine.total(torch.stack([each["total"] * w for each, w in zip(found, weights, strict=True)]).sum())
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(self._not_finite(step, found, drawn))
        norm = engine.clip(self.parameters, config.clip)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(self._not_finite(step, [{"gradient norm": norm}], drawn))
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        absent = dict.fromkeys(self.means.sums, (0.0, 0.0))  # forgotten at the same pace on every process
        self.means.update({**absent, **_weighted(found, weights)})
        return {"rate": rate, "step_loss": float(loss), "gradient_norm": float(norm)}

    def _losses(self, batch: Any, task: Task, model: Any) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast is not None):
            losses = self.engine.losses(model, task.loss, batch)
        if not losses:
            raise ValueError("The batch gave no losses: nothing to minimise. Pass targets, or another `loss`.")
        return losses

    def _not_finite(self, step: int, found: list[Losses], drawn: list[tuple[Any, list[str]]]) -> str:
        bad = [index for index, losses in enumerate(found) if not all(map(_is_finite, losses.values()))]
        if not bad:
            return f"Training stopped at step {step}: another process met a loss that is not finite."
        named = ", ".join(
            f"{name} {float(value):g}" for index in bad for name, value in found[index].items()
            if name != "total" or len(found[index]) == 1
        )
        samples = _named([drawn[index] for index in bad] if len(found) == len(drawn) else drawn)
        return (
            f"Training stopped at step {step}: {named}. The weights are those of the step before, and no state was "
            f"written. Lower the learning rate, or look at this batch.{samples}"
        )

    # ---------------------------------------------------------------- log

    def _rounded_means(self) -> dict[str, float]:
        means = merged_means(self.engine.gather(self.means.state_dict()))
        return {name: round(value, 4) for name, value in means.items()}

    def _write_losses(self, done: int, losses: dict[str, float], bar: Any) -> None:
        means, rates = self._rounded_means(), self.tokens.rates(self.engine)
        self._share_skipped()
        if self.engine.rank == 0:
            self.log.write({"step": done, **losses, **means, **rates, "seconds": round(self.seconds, 1)})
        shown = {"loss": f"{means['total']:.4g}"}
        if "tokens_per_second" in rates:
            shown["tokens/s"] = f"{rates['tokens_per_second']:.0f}"
        bar.set_postfix(shown)

    def _share_skipped(self) -> None:
        """Tell the process that writes the log what the others left out."""
        for samples in self.engine.gather(self.log.news())[1:]:
            for sample in samples if self.engine.rank == 0 else ():
                self.log.skipped(Skipped(*sample))

    def _list_missing_gradients(self, bar: Any) -> None:
        names = missing_gradients(self.model)
        if names:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            bar.write(
                f"{len(names)} trainable parameters got no gradient in the first step: {shown}. They are not used by "
                f"this batch, or by the model at all: freeze them, or look why.", file=sys.stderr,
            )

    # ---------------------------------------------------------------- validation

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        task = self.validation or self.task
        batches = task.validation()
        if batches is None and self.validation is None:
            return
        averaged = self.average is not None and self.config.ema_for != "saved"
        sums = RunningMeans(memory=1.0)
        with kept_random_states(), self.average.applied() if averaged and self.average else nullcontext():
            self.model.eval()
            for batch, new in self.engine.in_step(self._endless(task) if batches is None else batches):
                batch, _ = without_samples(batch)
                losses = self._losses(batch, task, self.called)
                if new:
                    total = torch.stack([value.float() for value in losses.values()]).sum()
                    count = task.count(self.model, batch)
                    sums.update(_weighted([{**losses, "total": total}], [float(count)]))
            self.model.train()
        self.validated = {
            name: round(value, 6) for name, value in merged_means(self.engine.gather(sums.state_dict())).items()
        }
        if not self.validated:
            raise ValueError("There is nothing to validate on: no batch of the validation has a supervised token.")
        if self.engine.rank == 0:
            self.log.write({"step": done, "validation": self.validated, "seconds": round(self.seconds, 1)})

    def _endless(self, task: Task) -> Iterator[Any]:
        """The first batches of a task that gives them without end, the same each time."""
        if self.validation_start is not None:
            task.load_state_dict(self.validation_start)
        stream = iter(task.batches())
        for _ in range(self.config.validation_batches):
            yield next(stream)

    # ---------------------------------------------------------------- state

    def _saves(self, done: int) -> bool:
        config = self.config
        if config.state_path is None:
            return False
        # A state that was gone on from is behind at the end: without a newer one, the rest would be trained again.
        at_end = done == config.steps and (config.save_at_end or self.resumed)
        return at_end or bool(config.save_every and done % config.save_every == 0)

    def _save(self, done: int) -> None:
        config, engine = self.config, self.engine
        if config.state_path is None:
            return
        self._share_skipped()
        numbered = config.keep_last > 1 or engine.state_is_folder
        # The first process takes the means of all: more or fewer processes can go on with them then.
        states = engine.gather(self.means.state_dict())
        self.means.load_state_dict(summed_means(states if engine.rank == 0 else []))
        extra = {
            "rank": engine.rank, "world_size": engine.world_size, "step": done, "trained": self._trained_names(),
            "random": random_states(), "data": self.stream.state_dict(), "means": self.means.state_dict(),
            "validated": self.validated, "seconds": self.seconds,
        }
        averages = None if self.average is None else self.average.values
        with saving(self.model):
            engine.save_state(
                state_file(config.state_path, done, numbered), self.model, self.optimizer, extra, averages
            )
        if engine.rank == 0 and numbered:
            keep_newest(config.state_path, config.keep_last, done)

    def _load(self) -> int:
        config = self.config
        found = newest_state(config.state_path) if config.resume and config.state_path else None
        self.engine.agree(None if found is None else str(found), "state to go on from")
        self.resumed = found is not None
        if found is None:
            if config.resume and config.state_path:
                self.log.rewind(0)
            return 0
        averages = None if self.average is None else self.average.values
        with saving(self.model):
            extra = self.engine.load_state(found, self.model, self.optimizer, averages)
        if extra["trained"] != self._trained_names():
            raise ValueError(
                f"{found} is of a run that trained other parameters ({len(extra['trained'])}, now "
                f"{len(self.parameters)}), or in other groups. Resume with the options that it was started with, or "
                f"name another state_path."
            )
        if extra["data"]["task"] is None and extra.get("world_size", 1) != self.engine.world_size:
            raise ValueError(
                f"{found} is of {extra.get('world_size', 1)} processes, and {type(self.task).__name__} cannot say what "
                f"they learned from: resume with as many, or give it state_dict and load_state_dict."
            )
        self.stream.load_state_dict(extra["data"])
        if self.engine.rank == 0:
            self.means.load_state_dict(extra["means"])
        self.validated, self.seconds_before = dict(extra["validated"]), float(extra["seconds"])
        self.log.rewind(extra["step"])
        if extra.get("rank", 0) == self.engine.rank:  # with more processes than then, the new ones draw on their own
            restore_random_states(extra["random"])
        return int(extra["step"])

    def _trained_names(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for parameter in self.parameters]

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        if self.engine.world_size == 1:
            return stop.asked
        return bool(self.engine.total(torch.tensor(int(stop.asked), device=self.device)))

    def _stopped(self, done: int, stop: StopRequest) -> BaseException:
        by = signal.Signals(stop.number or signal.SIGTERM)
        if self.engine.rank == 0:
            path = self.config.state_path
            left = f"{path} has its state: resume it" if path else "no state_path is set, so its state is lost"
            print(f"Training was stopped by {by.name} after step {done}; {left}.", file=sys.stderr)
        return KeyboardInterrupt() if by == signal.SIGINT else SystemExit(128 + by)


class _TokenRate:
    """Tokens a second since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.real = torch.zeros((), dtype=torch.int64, device=self.device)
        self.supervised, self.since = 0, time.perf_counter()

    def add(self, batch: Any, count: int) -> None:
        """Take a batch in; what is no dict with `input_ids` has no tokens that are known of."""
        if not isinstance(batch, dict) or not isinstance(batch.get("input_ids"), torch.Tensor):
            return
        mask = batch.get("attention_mask")
        self.real += batch["input_ids"].numel() if mask is None else mask.sum().to(self.device)
        self.supervised += count

    def rates(self, engine: Engine) -> dict[str, float]:
        """Real tokens and supervised ones a second, over all processes; nothing where there were none."""
        real, supervised = map(sum, zip(*engine.gather((int(self.real), self.supervised)), strict=True))
        seconds = max(time.perf_counter() - self.since, 1e-9)
        self.reset()
        if not real:
            return {}
        per_second = {"tokens_per_second": real / seconds, "supervised_per_second": supervised / seconds}
        return {name: round(value, 1) for name, value in per_second.items()}


def _weighted(found: list[Losses], weights: list[float]) -> dict[str, tuple[float, float]]:
    """{name: (weighted sum, weight)} over the batches that have a loss of that name."""
    sums: dict[str, tuple[float, float]] = {}
    for losses, weight in zip(found, weights, strict=True):
        for name, value in losses.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + weight * float(value), before[1] + weight)
    return sums


def _is_finite(value: torch.Tensor) -> bool:
    return math.isfinite(float(value))


def _named(drawn: list[tuple[Any, list[str]]]) -> str:
    samples = [name for _, names in drawn for name in names]
    return f" Its samples: {', '.join(samples)}." if samples else ""
