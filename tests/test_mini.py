"""The mini CogAgent: its pages, its tokenizer, how it is taught, and what the committed weights answer."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.browser_pages import HELD_OUT_LAYOUTS, TRAINING_LAYOUTS, read_sheets
from examples.dense_reading import DenseReadingTask, letter_targets, widget_targets
from examples.evaluate import ScreenEvaluation
from examples.questions import CoordinateLoss, ScreenQuestionsTask, coordinate_ids, word_ids
from examples.screen_source import changed_screen
from examples.screens import HELD_OUT_FONT, TRAINING_FONTS, Screen, Widget, draw_screen, read_question, where_question
from examples.words import CHARACTERS, COORDINATES, PAGE_SIZE, UNSEEN_WORDS, WORDS, box_text
from mixformer import from_pretrained, generate, load_processor
from mixformer.data.grounding import intersection_over_union, parse_boxes
from mixformer.train import Stage, TrainConfig, run_stages
from models.cogagent import CogAgent, CogAgentConfig
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
MINI = EXAMPLES / "cogagent-mini"


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(MINI)


@pytest.fixture(scope="module")
def mini() -> Any:
    return from_pretrained(MINI, dtype=torch.float32)


def small_cogagent() -> CogAgent:
    tower = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 16}
    config = CogAgentConfig(
        vocab_size=1148, hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=16, rope_tables="fp32",
        vision=EVA2CLIPEConfig(**tower, image_size=64, patch_size=16),
        cross_vision=EVA2CLIPLConfig(
            **tower, num_layers_run=None, image_size=224, patch_size=32, stem_channels=[4, 8], stem_depth=1,
            stored_head_size=0,
        ),
    )  # fmt: skip
    return CogAgent(config, generator=torch.Generator().manual_seed(1))




# ---------------------------------------------------------------- pages


def test_equal_seeds_draw_equal_pages_and_every_word_stands_on_a_page_once() -> None:
    for seed in range(5):
        first, second = (draw_screen(random.Random(seed)) for _ in range(2))
        assert np.array_equal(first.picture, second.picture) and first.widgets == second.widgets
        words = [widget.word for widget in first.widgets]
        assert len(set(words)) == len(words) >= 3
        assert set(words) <= set(WORDS)


def test_drawn_widgets_lie_on_the_page_and_hold_their_letters() -> None:
    for seed in range(5):
        screen = draw_screen(random.Random(seed))
        assert screen.picture.shape == (PAGE_SIZE, PAGE_SIZE, 3)
        for widget in screen.widgets:
            x0, y0, x1, y1 = widget.box
            assert 0 <= x0 < x1 <= PAGE_SIZE and 0 <= y0 < y1 <= PAGE_SIZE
            inside = [
                letter for letter, (a, b, c, d) in screen.letters
                if x0 <= (a + c) / 2 <= x1 and y0 <= (b + d) / 2 <= y1
            ]  # fmt: skip
            assert "".join(inside) == widget.word


def test_a_changed_page_moves_its_picture_and_its_boxes_alike() -> None:
    picture = np.full((PAGE_SIZE, PAGE_SIZE, 3), 255, np.uint8)
    picture[100:110, 50:80] = 0
    screen = Screen(picture, (Widget("button", "Save", (50, 100, 80, 110)),), (("S", (50, 100, 56, 110)),))
    for seed in range(4):
        moved = changed_screen(screen, random.Random(seed))
        dark = moved.picture[0, 0, 0] == 0
        x0, y0, x1, y1 = (int(edge) for edge in moved.widgets[0].box)
        inside = moved.picture[y0:y1, x0:x1]
        assert (inside == (255 if dark else 0)).all()
        assert (moved.picture == inside[0, 0]).all(-1).sum() == 30 * 10
        assert moved.letters[0][1] == (x0, y0, x0 + 6, y1)


def test_held_out_pages_share_neither_layout_nor_font_nor_words_with_training() -> None:
    assert not set(HELD_OUT_LAYOUTS) & set(TRAINING_LAYOUTS)
    assert HELD_OUT_FONT not in TRAINING_FONTS
    assert not set(UNSEEN_WORDS) & set(WORDS)


def test_at_least_200_held_out_pages_are_committed_in_under_six_megabytes() -> None:
    folder = MINI / "heldout"
    pages, font, words = (read_sheets(folder, part) for part in ("page", "font", "words"))
    assert len(pages) >= 200 and len(font) >= 40 and len(words) >= 40
    assert sum(path.stat().st_size for path in folder.glob("*.png")) < 6_000_000
    assert {widget.word for screen in pages for widget in screen.widgets} <= set(WORDS)
    assert {widget.word for screen in words for widget in screen.widgets} <= set(UNSEEN_WORDS)


# ---------------------------------------------------------------- tokens and targets


def test_a_word_is_one_token_and_a_box_is_four_that_decode_to_the_same_text(processor: Any) -> None:
    tokenizer = processor.tokenizer
    assert all(len(tokenizer.encode(word)) == 1 for word in WORDS)
    assert all(len(tokenizer.encode(word)) > 1 for word in UNSEEN_WORDS)
    box = box_text((3, 50.4, 100.6, 223))
    assert box == "[[013,223,451,996]]"
    assert len(tokenizer.encode(box)) == 4 and tokenizer.decode(tokenizer.encode(box)).strip() == box
    assert len(set(coordinate_ids(tokenizer).flatten().tolist() + word_ids(tokenizer))) == 4 * 224 + len(WORDS)


def test_a_box_in_tokens_is_at_most_half_a_pixel_off() -> None:
    for pixel in np.linspace(0, 223, 50):
        printed = parse_boxes(box_text((pixel, 0, 223, 223)))[0]
        assert abs(printed.pixels(PAGE_SIZE, PAGE_SIZE)[0] - pixel) <= 0.5 + 0.5 * PAGE_SIZE / 1000
    assert len(set(COORDINATES)) == PAGE_SIZE


def test_targets_name_the_widget_that_covers_a_cell_and_the_letter_at_a_place() -> None:
    screen = Screen(
        np.zeros((PAGE_SIZE, PAGE_SIZE, 3), np.uint8), (Widget("link", "Cut", (32, 16, 64, 32)),),
        (("C", (32, 16, 44, 32)), ("u", (44, 16, 54, 32)), ("t", (54, 16, 64, 32))),
    )  # fmt: skip
    words, boxes = widget_targets(screen, 14)
    assert np.argwhere(words).tolist() == [[1, 2], [1, 3]]
    assert boxes[1, 2].tolist() == [32, 16, 64, 32] and boxes[0, 0].tolist() == [-1] * 4
    letters = letter_targets(screen)
    assert "".join(CHARACTERS[index - 1] for index in letters[6, 8:16]) == "CCCuuttt"
    assert letters[3].sum() == 0


def test_a_coordinate_one_pixel_off_costs_less_than_one_far_off_and_other_edges_cost_most(processor: Any) -> None:
    coordinates = coordinate_ids(processor.tokenizer)
    loss = CoordinateLoss(coordinates, processor.tokenizer.vocab_size)

    def cost(token: int) -> float:
        logits = torch.zeros(1, processor.tokenizer.vocab_size)
        logits[0, token] = 5.0
        return float(loss(logits, coordinates[1, 100:101])["coordinates"])

    places = ((1, 100), (1, 101), (1, 150), (2, 100))
    right, near, far, other = (cost(int(coordinates[edge, pixel])) for edge, pixel in places)
    assert right < near < far == pytest.approx(other)


# ---------------------------------------------------------------- teaching


def test_packed_questions_get_the_logits_that_each_gets_alone(processor: Any) -> None:
    model, task = small_cogagent().eval(), ScreenQuestionsTask(batch_size=1, questions=3, browser_pages=0)
    task.prepare(model, processor)
    batch = next(task.batches())
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch)
    task.finish(model)
    shared = 3 + task.num_features
    for number in (1, 2, 3):
        chosen = (batch["question_ids"][0] == 0) | (batch["question_ids"][0] == number)
        row = {name: batch[name][:, chosen] for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            alone = model(**row, images=batch["images"], cross_images=batch["cross_images"])
        torch.testing.assert_close(packed[:, chosen][:, shared:], alone[:, shared:], rtol=0, atol=1e-5)
    answers = [processor.tokenizer.decode([token]) for token in labels[labels >= 0].tolist()]
    assert len(answers) > 3


def test_reading_heads_teach_the_tower_and_leave_no_trace(processor: Any) -> None:
    model = small_cogagent()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = DenseReadingTask("cross.tower", letters=True, batch_size=2, browser_pages=0)
    loop = TrainConfig(steps=2, trainable=["mixins.cross.tower.*"], progress=False)
    results = run_stages(model, [Stage("reading", task, loop)], processor)
    after = model.state_dict()
    assert list(after) == list(before)
    assert {"words", "boxes", "letters"} <= set(results["reading"])
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.startswith("mixins.cross.") for name in changed)


# ---------------------------------------------------------------- the committed weights


def test_the_committed_weights_are_small_and_in_bf16() -> None:
    assert sum(path.stat().st_size for path in MINI.glob("*.safetensors")) < 12_000_000
    assert from_pretrained(MINI).dtype == torch.bfloat16


def answer(model: Any, processor: Any, question: str, picture: Any) -> str:
    tokens = generate(
        model, processor([question], [picture]), max_new_tokens=12, stop_tokens=processor.config.stop_ids
    )
    text: str = processor.decode(tokens[0])
    return text.strip()


def test_the_mini_finds_and_reads_the_widgets_of_the_screenshot(mini: Any, processor: Any) -> None:
    path = EXAMPLES / "screenshot.png"
    widgets = [Widget(kind, word, tuple(box)) for kind, word, box in json.loads(path.with_suffix(".json").read_text())]
    with Image.open(path) as screenshot:
        assert screenshot.width == screenshot.height
    found = read = 0
    for widget in widgets:
        boxes = parse_boxes(answer(mini, processor, where_question(widget).text, path))
        found += bool(boxes) and intersection_over_union(boxes[0].pixels(PAGE_SIZE, PAGE_SIZE), widget.box) > 0.5
        read += answer(mini, processor, read_question(widget).text, path) == widget.word
    assert found >= len(widgets) - 2
    assert read >= len(widgets) - 2


def test_a_part_of_the_held_out_pages_is_grounded_and_read_as_well_as_promised(mini: Any, processor: Any) -> None:
    judge = ScreenEvaluation(str(MINI / "heldout"), parts=("page",), max_pages=8, progress=False)
    scores = judge(mini, processor)["page"]
    assert scores["grounding"] >= 85 and scores["reading"] >= 85
    assert scores["random_widget"] < 20


def test_the_recorded_scores_reach_the_targets_and_beat_every_control() -> None:
    scores = json.loads((MINI / "evaluation.json").read_text())
    assert scores["page"]["pages"] >= 200
    assert scores["page"]["grounding"] >= 85 and scores["page"]["reading"] >= 85
    for control in ("without-cross", "high-resolution"):
        theirs = json.loads((MINI / f"evaluation-{control}.json").read_text())["page"]
        for name in ("grounding", "reading"):
            assert scores["page"][name] > theirs[name] + 20
