"""The loop: how losses are weighted, what is averaged, validated and written, and what stops it."""

import json
import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixformer.mixins import DropoutMixin
from mixformer.objectives import (
    ClassificationObjective,
    ContrastiveObjective,
    LanguageObjective,
    MaskedLanguageObjective,
    SquaredDistanceObjective,
)
from mixformer.train import Stage, Task, TrainConfig, run_stages, train
from mixformer.train.log import RunningMeans, merged_means
from mixformer.train.loop import learning_rate_factor
from mixformer.train.plot import plot, read_curves, ticks
from mixformer.train.stages import TrainSection, run
from models.llama import LLaMA, LLaMAConfig

Batch = dict[str, Any]


def small_model() -> LLaMA:
    config = LLaMAConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
    return LLaMA(config, generator=torch.Generator().manual_seed(3))


def make_batch(seed: int, rows: int = 4, supervised: float = 0.5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (rows, 8), generator=generator)
    learnt = torch.rand(ids.shape, generator=generator) < supervised
    return {"input_ids": ids, "labels": ids.masked_fill(~learnt, -100)}


def joined(*batches: Batch) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def quiet(**options: Any) -> TrainConfig:
    return TrainConfig(**{"progress": False, "warmup_steps": 1, "log_every": 1, **options})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Given(Task):
    """Gives the batches that it is made with, over and over, and others to validate on."""

    def __init__(self, *batches: Batch, held_out: list[Batch] | None = None) -> None:
        self.given, self.held_out = batches, held_out

    def batches(self) -> Iterator[Batch]:
        while True:
            yield from self.given

    def validation(self) -> list[Batch] | None:
        return self.held_out


# ---------------------------------------------------------------- losses of a step


def gradients_of_one_step(model: LLaMA, *batches: Batch, **options: Any) -> dict[str, torch.Tensor]:
    """Gradients as the optimiser meets them: plain descent of rate 1 takes them off the weights."""
    found: dict[str, torch.Tensor] = {}

    class Descent(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda groups, lr, betas: Descent(groups, lr=lr))
        train(model, Given(*batches), quiet(steps=1, accumulate=len(batches), **options))
    return found


def test_batches_of_a_step_with_unequal_label_counts_give_the_gradients_of_one_big_batch() -> None:
    parts = [make_batch(1, supervised=0.9), make_batch(2, supervised=0.1)]
    counts = [int((part["labels"][:, 1:] >= 0).sum()) for part in parts]
    assert counts[0] > 4 * counts[1] > 0
    whole = gradients_of_one_step(small_model(), joined(*parts), clip=1e9)
    apart = gradients_of_one_step(small_model(), *parts, clip=1e9)
    for name, gradient in whole.items():
        torch.testing.assert_close(apart[name], gradient, rtol=0, atol=1e-6)


def test_the_loss_of_a_step_is_divided_by_its_supervised_tokens(tmp_path: Path) -> None:
    parts = [make_batch(1, supervised=0.9), make_batch(2, supervised=0.1)]
    with torch.no_grad():
        expected = LanguageObjective()(small_model(), joined(*parts))["language"].item()
    train(small_model(), Given(*parts), quiet(steps=1, accumulate=2, log_path=str(tmp_path / "log.jsonl")))
    (record,) = lines(tmp_path / "log.jsonl")
    assert record["step_loss"] == pytest.approx(expected, abs=1e-6)
    assert record["total"] == record["language"] == pytest.approx(expected, abs=1e-4)


def test_gradients_are_clipped_to_the_norm_over_all_parameters(tmp_path: Path) -> None:
    model = small_model()
    whole = gradients_of_one_step(model, make_batch(1), clip=1e9)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in whole.values()))
    clipped = gradients_of_one_step(small_model(), make_batch(1), clip=norm / 4, log_path=str(tmp_path / "log.jsonl"))
    for name, gradient in whole.items():
        torch.testing.assert_close(clipped[name], gradient / 4, rtol=1e-4, atol=1e-7)
    assert lines(tmp_path / "log.jsonl")[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_dropout_is_part_of_the_model_while_it_is_trained(tmp_path: Path) -> None:
    model, batch, rates = small_model(), make_batch(1), []

    class Watching(Given):
        def loss(self, model: Any, batch: Any) -> Any:
            rates.append([mixin.rate for mixin in model.mixins.values() if isinstance(mixin, DropoutMixin)])
            return super().loss(model, batch)

    before = list(model.mixins)
    train(model, Watching(batch), quiet(steps=1, dropout=0.25))
    assert rates == [[0.25]] and list(model.mixins) == before
    dropped = gradients_of_one_step(small_model(), batch, clip=1e9, dropout=0.25)
    whole = gradients_of_one_step(small_model(), batch, clip=1e9)
    assert not any(torch.allclose(dropped[name], whole[name], rtol=0.01) for name in whole)


def test_a_batch_without_labels_weighs_nothing_and_a_step_without_any_is_an_error() -> None:
    empty = make_batch(3, supervised=0.0)
    alone = gradients_of_one_step(small_model(), make_batch(1))
    beside = gradients_of_one_step(small_model(), make_batch(1), empty)
    assert all(torch.equal(beside[name], gradient) for name, gradient in alone.items())
    with pytest.raises(ValueError, match=r"Step 0 has no supervised token.*Its samples: a\.jsonl:3"):
        train(small_model(), Given({**empty, "_samples": ["a.jsonl:3"]}), quiet(steps=1))


def test_tasks_with_a_loss_of_their_own_weigh_every_batch_alike() -> None:
    class Own(Given):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            return super().loss(model, batch)

    parts = [make_batch(1, supervised=0.9), make_batch(2, supervised=0.1)]
    assert [Own().count(small_model(), part) for part in parts] == [1, 1]
    assert Given().count(small_model(), parts[0]) == int((parts[0]["labels"][:, 1:] >= 0).sum())


def test_objectives_count_what_their_losses_are_means_over() -> None:
    labels = torch.tensor([[5, 3, -100, 0], [-100, 6, 1, -100]])
    assert LanguageObjective().count({"labels": labels}) == 4
    assert LanguageObjective(ignored_ids=(0,)).count({"labels": labels}) == 3
    assert MaskedLanguageObjective().count({"labels": labels}) == 5
    assert ContrastiveObjective().count({"images": torch.zeros(3, 3, 2, 2), "input_ids": labels}) == 3
    assert ClassificationObjective().count({"labels": labels[0]}) == 3
    assert SquaredDistanceObjective().count({"labels": labels[1, 1:3]}) == 2


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.5, 1.0, 1.0, 0.6, 0.2]), ("linear", [0.5, 1.0, 1.0, 0.6, 0.2]), ("constant", [0.5, 1, 1, 1, 1])],
)
def test_rates_warm_up_and_fall_to_the_final_one(schedule: str, expected: list[float]) -> None:
    config = quiet(steps=12, warmup_steps=2, final_rate=0.2, schedule=schedule)
    assert [learning_rate_factor(step, config) for step in (0, 1, 2, 7, 12)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_runs_that_share_a_schedule_have_the_rates_of_one(schedule: str) -> None:
    shared: dict[str, Any] = {"warmup_steps": 3, "final_rate": 0.1, "schedule": schedule}
    whole, first = quiet(steps=12, **shared), quiet(steps=5, schedule_steps=12, **shared)
    second = quiet(steps=7, schedule_start=5, **shared)
    parts = [learning_rate_factor(step, config) for config in (first, second) for step in range(config.steps)]
    assert parts == [learning_rate_factor(step, whole) for step in range(12)]


def test_a_linear_rate_is_higher_than_a_cosine_one_late_and_lower_early() -> None:
    linear, cosine = (quiet(steps=100, warmup_steps=1, schedule=name) for name in ("linear", "cosine"))
    assert learning_rate_factor(20, linear) < learning_rate_factor(20, cosine)
    assert learning_rate_factor(80, linear) > learning_rate_factor(80, cosine)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": "step"}, "schedule is 'step'; choose cosine, linear or constant"),
        ({"ema": 1.0}, r"ema is 1\.0; it must lie between"), ({"ema_for": "all"}, "choose validation, saved or both"),
        ({"trackers": ["csv"]}, "choose of tensorboard, wandb"), ({"keep_last": 0}, "keep_last is 0"),
        ({"dropout": 1.0}, "dropout is 1"), ({"steps": 5, "schedule_steps": 4}, "lie within"),
        ({"schedule_start": -1}, "schedule_start is -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**options)


# ---------------------------------------------------------------- averages


def test_the_average_is_the_recursion_over_the_weights_of_every_step() -> None:
    weights: list[torch.Tensor] = []
    task, batches = Given(make_batch(1)), 5

    class Watching(Given):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            weights.append(model.transformer.word_embeddings.weight.detach().clone())
            return super().loss(model, batch)

    plain, averaged = small_model(), small_model()
    train(averaged, Watching(*task.given), quiet(steps=batches, ema=0.7))
    weights_then = list(weights)
    train(plain, task, quiet(steps=batches))
    expected = weights_then[0].double()
    for weight in [*weights_then[1:], plain.transformer.word_embeddings.weight.detach()]:
        expected = 0.7 * expected + 0.3 * weight.double()
    found = averaged.transformer.word_embeddings.weight
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, plain.transformer.word_embeddings.weight)


def test_averages_are_used_for_what_is_asked_only(tmp_path: Path) -> None:
    task = Given(make_batch(1), held_out=[make_batch(2)])
    found = {}
    for use in ("none", "validation", "saved", "both"):
        model = small_model()
        ema = {} if use == "none" else {"ema": 0.9, "ema_for": use}
        result = train(model, task, quiet(steps=4, learning_rate=1e-2, **ema))
        found[use] = result["validation_language"], model.transformer.word_embeddings.weight.detach()
    assert found["none"][0] == found["saved"][0] != found["validation"][0] == found["both"][0]
    assert torch.equal(found["none"][1], found["validation"][1]) and torch.equal(found["saved"][1], found["both"][1])
    assert not torch.equal(found["none"][1], found["saved"][1])
    model = small_model()
    train(model, task, quiet(steps=4, learning_rate=1e-2, ema=0.9))
    with torch.no_grad():
        loss = LanguageObjective()(model, make_batch(2))["language"].item()
    assert found["both"][0] == pytest.approx(loss, abs=1e-6)


# ---------------------------------------------------------------- validation


def test_validation_is_the_mean_over_all_its_tokens_and_does_not_change_the_run(tmp_path: Path) -> None:
    held_out = [make_batch(7, supervised=0.9), make_batch(8, supervised=0.1)]
    plain, validated = small_model(), small_model()
    path = str(tmp_path / "log.jsonl")

    class Noisy(Given):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            assert model.training == torch.is_grad_enabled()
            return {name: value + torch.rand(()) * 0 for name, value in super().loss(model, batch).items()}

        def count(self, model: Any, batch: Any) -> int:
            return LanguageObjective().count(batch)

    torch.manual_seed(1)
    train(plain, Noisy(make_batch(1)), quiet(steps=5))
    after = torch.rand(())
    torch.manual_seed(1)
    task = Noisy(make_batch(1), held_out=held_out)
    result = train(validated, task, quiet(steps=5, validate_every=2, log_path=path))
    assert torch.equal(torch.rand(()), after)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), validated.parameters(), strict=True))
    with torch.no_grad():
        expected = LanguageObjective()(validated, joined(*held_out))["language"].item()
    assert result["validation_language"] == pytest.approx(expected, abs=2e-6)
    records = [record for record in lines(tmp_path / "log.jsonl") if "validation" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    assert set(records[0]["validation"]) == {"language", "total"}


def test_a_second_task_is_validated_on_the_same_batches_each_time() -> None:
    class Endless(Given):
        prepared = finished = 0

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.position = 0

        def prepare(self, model: Any, processor: Any) -> None:
            self.prepared += 1

        def finish(self, model: Any) -> None:
            self.finished += 1

        def batches(self) -> Iterator[Batch]:
            while True:
                self.position += 1
                self.seen.append(self.position)
                yield make_batch(self.position)

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    held_out = Endless()
    loop = quiet(steps=4, validate_every=2, validation_batches=3)
    run_stages(small_model(), [Stage("only", Given(make_batch(1)), loop, validation=held_out)])
    assert held_out.seen == [1, 2, 3, 1, 2, 3] and held_out.prepared == held_out.finished == 1


def test_without_batches_to_validate_on_there_is_no_validation(tmp_path: Path) -> None:
    result = train(small_model(), Given(make_batch(1)), quiet(steps=1, validate_every=1))
    assert set(result) == {"language", "total", "seconds"}
    with pytest.raises(ValueError, match="nothing to validate on"):
        train(small_model(), Given(make_batch(1), held_out=[make_batch(2, supervised=0.0)]), quiet(steps=1))


# ---------------------------------------------------------------- what stops a run


def test_a_loss_that_is_not_finite_names_the_samples_of_its_batch_and_overwrites_nothing(tmp_path: Path) -> None:
    class Failing(Given):
        made = 0

        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            assert "_samples" not in batch
            self.made += 1
            factor = math.inf if self.made == 6 else 1.0
            return {name: value * factor for name, value in super().loss(model, batch).items()}

    first, second = (
        {**make_batch(seed), "_samples": [f"data.jsonl:{seed}{row}" for row in range(2)]} for seed in (1, 2)
    )
    state = tmp_path / "state.pt"
    options = quiet(steps=9, accumulate=2, state_path=str(state), save_every=1, log_path=str(tmp_path / "log.jsonl"))
    model = small_model()
    named = r"at step 2: language inf\..*samples: data\.jsonl:20, data\.jsonl:21\.$"
    with pytest.raises(FloatingPointError, match=named):
        train(model, Failing(first, second), options)
    saved = torch.load(state)
    assert saved["step"] == 2 and all(torch.equal(saved["model"][n], v) for n, v in model.state_dict().items())
    assert [record["step"] for record in lines(tmp_path / "log.jsonl")] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step() -> None:
    class Exploding(Given):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            weight = model.transformer.word_embeddings.weight
            return {"root": (weight - weight.detach()).abs().sum().sqrt()}

    model = small_model()
    before = model.state_dict()["transformer.word_embeddings.weight"].clone()
    with pytest.raises(FloatingPointError, match="gradient norm nan"):
        train(model, Exploding({**make_batch(1), "_samples": ["x:1"]}), quiet(steps=1))
    assert torch.equal(model.state_dict()["transformer.word_embeddings.weight"], before)


def test_trainable_parameters_without_a_gradient_are_listed_after_the_first_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Partial(Given):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            return {"size": model.transformer.word_embeddings.weight.square().mean()}

    train(small_model(), Partial(make_batch(1)), quiet(steps=3, frozen=["*.layers.0.*"]))
    said = capsys.readouterr().err
    unused = [name for name, _ in small_model().named_parameters() if "layers.0" not in name and "embed" not in name]
    assert said.count("got no gradient") == 1 and f"{len(unused)} trainable parameters" in said
    assert all(name in said for name in unused) and "layers.0" not in said
    train(small_model(), Given(make_batch(1)), quiet(steps=1))
    assert "gradient" not in capsys.readouterr().err


# ---------------------------------------------------------------- log


def test_running_means_forget_and_merge_over_processes_as_if_there_were_one() -> None:
    one, parts = RunningMeans(0.5), [RunningMeans(0.5), RunningMeans(0.5)]
    for step in range(1, 4):
        one.update({"a": (0.25 * step + 0.75 * 10, 1.0)})
        parts[0].update({"a": (0.25 * step, 0.25)})
        parts[1].update({"a": (0.75 * 10, 0.75)})
    parts[1].update({"b": (3.0, 1.0)})
    merged = merged_means(part.state_dict() for part in parts)
    assert merged["a"] == pytest.approx(merged_means([one.state_dict()])["a"]) and merged["b"] == 3.0
    expected = (0.25 * (0.25 + 7.5) + 0.5 * (0.5 + 7.5) + 0.75 + 7.5) / 1.75
    assert merged["a"] == pytest.approx(expected)


def test_the_log_counts_real_and_supervised_tokens_a_second(tmp_path: Path) -> None:
    batch = make_batch(1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 6:] = 0
    train(small_model(), Given(batch), quiet(steps=4, log_every=2, log_path=str(tmp_path / "log.jsonl")))
    for record in lines(tmp_path / "log.jsonl"):
        supervised = int((batch["labels"][:, 1:] >= 0).sum())
        ratio = record["tokens_per_second"] / record["supervised_per_second"]
        assert ratio == pytest.approx(24 / supervised, rel=0.01)


def test_trackers_get_the_records_and_a_missing_one_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"tensorboard": {}, "wandb": {}}

    class Writer:
        def __init__(self, log_dir: str) -> None:
            seen["folder"] = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen["tensorboard"].setdefault(step, {})[name] = value

        def close(self) -> None:
            seen["closed"] = seen.get("closed", 0) + 1

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            seen["wandb"].setdefault(step, {}).update(numbers)

        def finish(self) -> None:
            seen["closed"] = seen.get("closed", 0) + 1

    boards: Any = types.ModuleType("torch.utils.tensorboard")
    boards.SummaryWriter = Writer
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **options: seen.update(options) or Run()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", boards)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"log_path": str(tmp_path / "run" / "log.jsonl"), "trackers": ["tensorboard", "wandb"]}
    task = Given(make_batch(1), held_out=[make_batch(2)])
    train(small_model(), task, quiet(steps=2, **options))
    first, last = seen["wandb"][1], seen["wandb"][2]
    assert seen["tensorboard"] == seen["wandb"]
    assert set(last) - set(first) == {"validation/language", "validation/total"}
    assert {"language", "rate", "gradient_norm"} <= set(first) and "step" not in first
    assert (seen["project"], seen["name"], seen["folder"]) == ("run", "log", str(tmp_path / "run" / "log"))
    assert seen["config"]["steps"] == 2 and seen["closed"] == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb, which is not installed: pip install 'mixformer\[wandb\]'"):
        train(small_model(), task, quiet(steps=1, **options))
    with pytest.raises(ValueError, match="takes its name from log_path"):
        train(small_model(), task, quiet(steps=1, trackers=["wandb"]))


def test_the_job_logs_beside_its_output_and_shows_roles_loss_speed_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = TrainConfig(steps=2, log_every=1, warmup_steps=1)
    section = TrainSection([Stage("only", Given(make_batch(1)), loop)], output=str(tmp_path / "out"))
    settings = types.SimpleNamespace(train=section, seed=0)
    result = run(small_model(), None, settings)
    assert result["saved"] == str(tmp_path / "out") and (tmp_path / "out" / "config.yaml").exists()
    assert [record["step"] for record in lines(tmp_path / "out-logs" / "only.jsonl")] == [1, 2]
    said = capsys.readouterr().err
    assert "trainable" in said and "loss=" in said and "tokens/s=" in said and "00:00<" in said


# ---------------------------------------------------------------- curves


def write_log(path: Path, steps: range, *further: dict[str, Any]) -> None:
    records = [{"step": step, "rate": 1e-3, "total": 2.0 / step, "seconds": 1.0} for step in steps]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, *further]))


def test_curves_are_read_by_name_and_stages_follow_one_another(tmp_path: Path) -> None:
    write_log(tmp_path / "b.jsonl", range(1, 4), {"step": 3, "validation": {"total": 9.0}})
    write_log(tmp_path / "a.jsonl", range(1, 3))


    os.utime(tmp_path / "b.jsonl", (1, 1))
    panels, stages = read_curves(tmp_path)
    assert stages == [3, 5] and set(panels) == {"losses", "rate"}
    assert panels["losses"]["total"] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 2.0), (5, 1.0)]
    assert panels["losses"]["validation total"] == [(3, 9.0)]


def test_of_a_run_that_was_begun_anew_the_later_lines_count(tmp_path: Path) -> None:
    write_log(tmp_path / "a.jsonl", range(1, 6), {"step": 2, "total": 7.0}, {"step": 3, "total": 8.0})
    assert read_curves(tmp_path / "a.jsonl")[0]["losses"]["total"] == [(1, 2.0), (2, 7.0), (3, 8.0)]


def test_the_picture_shows_every_curve_in_its_colour_where_its_values_are(tmp_path: Path) -> None:
    logs = tmp_path / "run-logs"
    logs.mkdir()
    rising = [{"step": step, "up": float(step), "down": 10.0 - step} for step in range(11)]
    (logs / "only.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rising))
    target = plot(tmp_path / "run")
    assert target == logs / "curves.png"
    with Image.open(target) as picture:
        pixels = picture.convert("RGB").load()
        assert picture.size == (820, 250) and pixels is not None
        left, right, high, low = 64, 630, 30, 220

        def near(x: int, y: int, colour: tuple[int, int, int]) -> bool:
            around = [pixels[x + dx, y + dy] for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
            return any(sum(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 60 for pixel in around)

        blue, red = (0x33, 0x66, 0xCC), (0xDC, 0x39, 0x12)
        for share in (0.2, 0.8):
            x = round(left + share * (right - left))
            y = round(low - share * (low - high)), round(low - (1 - share) * (low - high))
            assert near(x, y[0], blue) and near(x, y[1], red)
            assert not near(x, y[0], red) and not near(x, y[1], blue)


def test_runs_without_logs_or_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no log at"):
        plot(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"ste')
    with pytest.raises(ValueError, match="have no numbers yet"):
        plot(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.00037), (-3.0, 11.2), (0.0, 48000.0), (2.0, 2.0)])
def test_ticks_are_few_and_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert any(math.isclose(step / 10 ** math.floor(math.log10(step) + 1e-9), digit) for digit in (1, 2, 5))
