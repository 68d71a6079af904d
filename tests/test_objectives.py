"""Objectives against their formulas, written out with plain log-softmax."""

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from mixformer.objectives import (
    ClassificationObjective,
    ContrastiveObjective,
    LanguageObjective,
    MaskedLanguageObjective,
    SquaredDistanceObjective,
    Trained,
)
from mixformer.train import Stage, Task, TrainConfig, run_stages
from mixformer.train.loop import model_losses
from models.llama import LLaMA, LLaMAConfig


class Recorded:
    """A model whose output is given; it keeps what it was run on."""

    def __init__(self, logits: torch.Tensor, **outputs: torch.Tensor) -> None:
        self.out = SimpleNamespace(logits=logits, outputs=outputs, losses={"balance": torch.tensor(0.25)})
        self.inputs: dict[str, Any] = {}

    def run(self, **inputs: Any) -> Any:
        self.inputs = inputs
        return self.out


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32) * 3


def log_probability(row: torch.Tensor, index: int) -> float:
    """Natural logarithm of softmax(row)[index], number by number."""
    top = max(row.tolist())
    return float(row[index]) - top - math.log(math.fsum(math.exp(float(x) - top) for x in row))


LOGITS = draw(2, 4, 7)
LABELS = torch.tensor([[5, 3, -100, 0], [-100, 6, 1, -100]])  # the first of a row has no token before it
LEARNT = [(0, 0, 3), (0, 2, 0), (1, 0, 6), (1, 1, 1)]  # row, slot that predicts, label


def test_the_label_of_a_token_is_learnt_one_token_before_it_and_ignored_ones_are_not() -> None:
    model = Recorded(LOGITS)
    losses = LanguageObjective()(model, {"input_ids": LABELS, "labels": LABELS})
    expected = -sum(log_probability(LOGITS[row, slot], label) for row, slot, label in LEARNT) / 4
    assert losses["language"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["balance"].item() == 0.25
    assert set(model.inputs) == {"input_ids"}


def test_ids_that_are_never_learnt_leave_the_mean() -> None:
    losses = LanguageObjective(ignored_ids=(0, 6))(Recorded(LOGITS), {"labels": LABELS})
    expected = -(log_probability(LOGITS[0, 0], 3) + log_probability(LOGITS[1, 1], 1)) / 2
    assert losses["language"].item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_over_the_others_is_the_divergence_from_the_smoothed_target() -> None:
    losses = LanguageObjective(smoothing=0.1)(Recorded(LOGITS), {"labels": LABELS})
    expected = 0.0
    for row, slot, label in LEARNT:
        for index in range(7):
            target = 0.9 if index == label else 0.1 / 6
            expected += target * (math.log(target) - log_probability(LOGITS[row, slot], index)) / 4
    assert losses["language"].item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_over_the_others_is_zero_where_the_prediction_is_the_target() -> None:
    target = torch.full((1, 2, 5), 0.2 / 4)
    target[..., 3] = 0.8
    losses = LanguageObjective(smoothing=0.2)(Recorded(target.log()), {"labels": torch.tensor([[-100, 3]])})
    assert losses["language"].item() == pytest.approx(0.0, abs=1e-6)


def test_smoothing_over_all_gives_the_target_its_share_as_well() -> None:
    losses = LanguageObjective(smoothing=0.1, smooth_over="all")(Recorded(LOGITS), {"labels": LABELS})
    expected = 0.0
    for row, slot, label in LEARNT:
        for index in range(7):
            expected -= (0.1 / 7 + 0.9 * (index == label)) * log_probability(LOGITS[row, slot], index) / 4
    assert losses["language"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", [LanguageObjective(), LanguageObjective(smoothing=0.1)])
def test_a_batch_with_nothing_to_learn_has_loss_zero_and_no_gradient(objective: LanguageObjective) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = objective(Recorded(logits), {"labels": torch.full((2, 4), -100)})["language"]
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_masked_tokens_are_predicted_where_they_stand() -> None:
    sentence = draw(2, 2)
    model = Recorded(LOGITS, sentence=sentence)
    batch = {"input_ids": LABELS, "labels": LABELS, "next_sentence_labels": torch.tensor([0, 1])}
    losses = MaskedLanguageObjective()(model, batch)
    places = [(0, 0, 5), (0, 1, 3), (0, 3, 0), (1, 1, 6), (1, 2, 1)]
    expected = -sum(log_probability(LOGITS[row, slot], label) for row, slot, label in places) / 5
    assert losses["masked_language"].item() == pytest.approx(expected, rel=1e-6)
    expected = -(log_probability(sentence[0], 0) + log_probability(sentence[1], 1)) / 2
    assert losses["next_sentence"].item() == pytest.approx(expected, rel=1e-6)
    assert set(model.inputs) == {"input_ids"}
    assert set(MaskedLanguageObjective()(model, {"labels": LABELS})) == {"masked_language", "balance"}


def test_contrast_is_the_mean_over_texts_and_over_pictures() -> None:
    similarity = draw(3, 3)
    losses = ContrastiveObjective()(Recorded(LOGITS, logits_per_text=similarity), {"images": similarity})
    texts = -sum(log_probability(similarity[i], i) for i in range(3)) / 3
    pictures = -sum(log_probability(similarity[:, i], i) for i in range(3)) / 3
    assert texts != pytest.approx(pictures, rel=1e-2)
    assert losses["contrastive"].item() == pytest.approx((texts + pictures) / 2, rel=1e-6)


def test_classes_are_predicted_and_distances_are_those_to_the_right_code() -> None:
    logits, labels = draw(3, 5), torch.tensor([4, 0, 2])
    losses = ClassificationObjective()(Recorded(logits), {"images": logits, "labels": labels})
    expected = -sum(log_probability(logits[i], label) for i, label in enumerate((4, 0, 2))) / 3
    assert losses["classification"].item() == pytest.approx(expected, rel=1e-6)
    losses = SquaredDistanceObjective()(Recorded(logits), {"images": logits, "labels": labels})
    expected = sum(float(logits[i, label]) for i, label in enumerate((4, 0, 2))) / 3
    assert losses["squared_distance"].item() == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_learnt_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="has no 'labels', only images"):
        ClassificationObjective()(Recorded(LOGITS), {"images": LOGITS})
    with pytest.raises(ValueError, match=r"shape \(2, 3\) do not fit logits of shape \(2, 4, 7\)"):
        LanguageObjective()(Recorded(LOGITS), {"labels": LABELS[:, 1:]})
    with pytest.raises(ValueError, match="Recorded gives no result 'logits_per_text', only logits"):
        ContrastiveObjective()(Recorded(LOGITS), {})
    with pytest.raises(ValueError, match="The batch has 2 texts and 3 pictures"):
        ContrastiveObjective()(Recorded(LOGITS, logits_per_text=torch.zeros(2, 3)), {})
    with pytest.raises(ValueError, match="gives no result 'sentence'"):
        MaskedLanguageObjective()(Recorded(LOGITS), {"labels": LABELS, "next_sentence_labels": LABELS[:, 0]})
    with pytest.raises(ValueError, match=r"smoothing is 1\.0"):
        LanguageObjective(smoothing=1.0)
    with pytest.raises(ValueError, match="choose others or all"):
        LanguageObjective(smooth_over="some")  # type: ignore[arg-type]


class Staged(LLaMA):
    """A model class that says what it learns, and in which stages."""

    objective = LanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {
        "head": Trained(["mixins.head.*"]),
        "rest": Trained(["*"], frozen=["mixins.head.*"]),
    }


class Plain(LLaMA):
    """A model class that says neither."""

    objective = None
    stages: ClassVar[dict[str, Trained]] = {}


class Counting(Task):
    """Rows that count up modulo 11."""

    def batches(self) -> Any:
        ids = (torch.arange(3)[:, None] + torch.arange(6)) % 11
        while True:
            yield {"input_ids": ids, "labels": ids}


def staged_model() -> Staged:
    config = LLaMAConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
    return Staged(config, generator=torch.Generator().manual_seed(3))


def test_a_model_is_trained_by_the_objective_of_its_class() -> None:
    model, batch = staged_model(), next(Counting().batches())
    losses = model_losses(model, batch)
    assert torch.equal(losses["language"], LanguageObjective()(model, batch)["language"])
    plain = Plain(model.config, generator=torch.Generator().manual_seed(3))
    assert model_losses(plain, {"input_ids": batch["input_ids"]}) == {}


def test_a_stage_trains_what_the_class_of_the_model_names() -> None:
    model = staged_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop = TrainConfig(steps=2, progress=False)

    def changed() -> set[str]:
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    head = {name for name in before if name.startswith("mixins.head.")}
    run_stages(model, [Stage("first", Counting(), loop, trains="head")])
    assert changed() == head and head
    model.load_state_dict(before)
    run_stages(model, [Stage("second", Counting(), loop, trains="rest")])
    assert changed() == set(before) - head
    assert loop.trainable == ["*"] and loop.frozen == []


def test_a_stage_that_is_unknown_or_said_twice_is_refused_before_anything_is_trained() -> None:
    model, first = staged_model(), Stage("first", Counting(), TrainConfig(steps=1, progress=False), trains="head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"trains 'tune', which is no stage of Staged: it has head, rest"):
        run_stages(model, [first, Stage("second", Counting(), trains="tune")])
    with pytest.raises(ValueError, match=r"Stage 'second' says what it trains twice"):
        run_stages(model, [first, Stage("second", Counting(), TrainConfig(frozen=["*norm*"]), trains="rest")])
    with pytest.raises(ValueError, match=r"no stage of Plain: it has none"):
        run_stages(Plain(model.config), [first])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
