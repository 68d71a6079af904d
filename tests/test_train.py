"""The training loop: what it changes, what it leaves, and when it stops."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixformer.train import Stage, Task, TrainConfig, run_stages, select_parameters, train
from mixformer.train.loop import learning_rate_factor
from models.llama import LLaMA, LLaMAConfig


def small_model() -> LLaMA:
    config = LLaMAConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
    return LLaMA(config, generator=torch.Generator().manual_seed(3))


def counting_batches() -> Iterator[torch.Tensor]:
    """Rows that count up modulo 11 from a random start."""
    generator = torch.Generator().manual_seed(5)
    while True:
        start = torch.randint(11, (8, 1), generator=generator)
        yield (start + torch.arange(6)) % 11


def next_token_loss(model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(batch[:, :-1])
    return {"next_token": F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())}


def quiet(**options: Any) -> TrainConfig:
    return TrainConfig(**{"progress": False, "warmup_steps": 2, "log_every": 5, **options})


def test_the_loss_of_a_task_that_can_be_learned_falls_below_a_tenth_of_chance() -> None:
    model = small_model()
    result = train(model, counting_batches(), quiet(steps=60, learning_rate=1e-2), next_token_loss)
    with torch.no_grad():
        loss = next_token_loss(model, next(counting_batches()))["next_token"]
    assert float(loss) < 0.1 * torch.log(torch.tensor(11.0))
    assert result["total"] == result["next_token"]


def test_frozen_parameters_stay_bit_for_bit_and_the_chosen_ones_all_move() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = quiet(steps=3, trainable=["transformer.layers.*"], frozen=["*.layers.0.*"])
    train(model, counting_batches(), config, next_token_loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("transformer.layers.1.")), name


def test_training_leaves_no_gradients_and_no_changed_flags_behind() -> None:
    model = small_model().eval()
    train(model, counting_batches(), quiet(steps=1, trainable=["*.mlp.*"]), next_token_loss)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("option", ["trainable", "frozen", "rate_factors"])
def test_a_selector_that_matches_nothing_is_an_error_that_names_it(option: str) -> None:
    value: Any = {"*.no_such.*": 0.1} if option == "rate_factors" else ["*.no_such.*"]
    with pytest.raises(ValueError, match=r"'\*\.no_such\.\*' matches none"):
        train(small_model(), counting_batches(), quiet(steps=1, **{option: value}), next_token_loss)


def test_freezing_all_that_is_trainable_is_an_error() -> None:
    config = quiet(steps=1, trainable=["*.mlp.*"], frozen=["*"])
    with pytest.raises(ValueError, match="Nothing is left to train"):
        train(small_model(), counting_batches(), config, next_token_loss)


def test_a_selector_chooses_what_its_glob_matches() -> None:
    names = select_parameters(small_model(), ["*.layers.1.mlp.*"])
    assert names == {f"transformer.layers.1.mlp.{part}.weight" for part in ("gate", "up", "down")}


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_weights() -> None:
    model, losses = small_model(), iter([1.0, 1.0, float("nan")])
    seen: list[torch.Tensor] = []

    def loss(model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(model.transformer.word_embeddings.weight.detach().clone())
        return {"bad": next_token_loss(model, batch)["next_token"] * next(losses)}

    with pytest.raises(FloatingPointError, match=r"step 2: bad nan"):
        train(model, counting_batches(), quiet(steps=9), loss)
    assert torch.equal(model.transformer.word_embeddings.weight, seen[-1])
    assert not torch.equal(seen[-1], seen[0])


def test_two_accumulated_half_batches_step_as_one_whole_batch() -> None:
    whole, halves = small_model(), small_model()
    batch = next(counting_batches())
    train(whole, [batch], quiet(steps=1), next_token_loss)
    train(halves, [batch[:4], batch[4:]], quiet(steps=1, accumulate=2), next_token_loss)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_batches_that_run_out_are_an_error() -> None:
    with pytest.raises(ValueError, match="ran out at step 1"):
        train(small_model(), [next(counting_batches())], quiet(steps=2), next_token_loss)


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    config = quiet(steps=12, warmup_steps=2, final_rate=0.2)
    factors = [learning_rate_factor(step, config) for step in (0, 1, 2, 7, 12)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])


def test_the_log_has_a_json_line_every_so_many_steps(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    train(small_model(), counting_batches(), quiet(steps=12, log_path=str(path)), next_token_loss)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all({"rate", "next_token", "total", "seconds"} <= set(line) for line in lines)


def test_a_run_resumed_from_its_state_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    stream = counting_batches()
    batches = [next(stream) for _ in range(6)]
    unbroken, broken = small_model(), small_model()
    train(unbroken, batches, quiet(steps=6), next_token_loss)
    state = str(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="ran out"):
        train(broken, batches[:3], quiet(steps=6, state_path=state, save_every=3), next_token_loss)
    again = small_model()
    train(again, batches[3:], quiet(steps=6, state_path=state, resume=True), next_token_loss)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), again.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


class CountingTask(Task):
    """Counts; notes what happened in which order."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.events: list[str] = []

    def prepare(self, model: Any, processor: Any) -> None:
        self.events.append("prepare")

    def batches(self) -> Iterator[torch.Tensor]:
        return counting_batches()

    def loss(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.events.append("loss")
        losses = next_token_loss(model, batch)
        return {name: value * (float("nan") if self.fails else 1) for name, value in losses.items()}

    def finish(self, model: Any) -> None:
        self.events.append("finish")


def test_a_stage_prepares_trains_and_finishes_even_when_training_fails() -> None:
    good, bad = CountingTask(), CountingTask(fails=True)
    with pytest.raises(FloatingPointError):
        run_stages(small_model(), [Stage("good", good, quiet(steps=2)), Stage("bad", bad, quiet(steps=2))])
    assert good.events == ["prepare", "loss", "loss", "finish"]
    assert bad.events == ["prepare", "loss", "finish"]


def test_stages_of_one_name_and_no_stages_are_errors() -> None:
    stage = Stage("twice", CountingTask(), quiet(steps=1))
    for stages in ([stage, stage], []):
        with pytest.raises(ValueError, match="a name of its own"):
            run_stages(small_model(), stages)


def test_resumed_stages_go_on_after_the_last_one_that_was_kept(tmp_path: Path) -> None:
    def stages() -> list[Stage]:
        return [Stage("first", CountingTask(), quiet(steps=2)), Stage("second", CountingTask(), quiet(steps=2))]

    whole, broken, again = small_model(), small_model(), small_model()
    run_stages(whole, stages())
    run_stages(broken, stages()[:1], logs=tmp_path, keep_stages=True)
    results = run_stages(again, stages(), logs=tmp_path, resume=True)
    assert list(results) == ["second"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
