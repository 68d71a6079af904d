"""Tasks: what stands in their batches, and what they say about files that they cannot use."""

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from examples.make_shapes import COLOURS, SHAPES, write_shapes
from mixformer.data import CausalMaskTransform
from mixformer.data.processor import Processor, ProcessorConfig
from mixformer.images import preprocess_image
from mixformer.tokenizer import load_tokenizer
from mixformer.train import (
    ClassTask,
    ConversationTask,
    FileTask,
    InfillingTask,
    MaskedTextTask,
    PairTask,
    Stage,
    TextTask,
    TrainConfig,
    run_stages,
)
from mixformer.train.loop import model_losses
from mixformer.train.tasks import read_samples, shuffled_batches
from models.llama import LLaMA, LLaMAConfig

SHAPES_FOLDER = Path(__file__).parents[1] / "examples" / "zoo" / "shapes"
FILE = str(SHAPES_FOLDER / "train.jsonl")
LINES = [json.loads(line) for line in Path(FILE).read_text(encoding="utf-8").splitlines()]
TOKENIZER = load_tokenizer(SHAPES_FOLDER)
MASK = TOKENIZER.encode("a<mask>")[-1]


class Model:
    """What a task asks of a model."""

    def __init__(self, *declared: str, **config: Any) -> None:
        self.declared, self.device = declared, torch.device("cpu")
        self.config = type("Config", (), config)()


def make_processor(**settings: Any) -> Processor:
    common = {"family": "caption", "image_size": 28, "image_marks": False, "pad_id": 3, "placeholder_id": 5}
    return Processor(ProcessorConfig(**{**common, **settings}), TOKENIZER)


def make_batches(task: FileTask, number: int = 1, model: Any = None, **settings: Any) -> list[dict[str, Any]]:
    task.prepare(model or Model(), make_processor(**settings))
    return list(islice(task.batches(), number))


def write_lines(folder: Path, *lines: Any, name: str = "data.jsonl") -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(folder / name)


def words(ids: list[int] | torch.Tensor) -> str:
    return TOKENIZER.decode([int(i) for i in ids])


# ---------------------------------------------------------------- the pictures of shapes


def test_the_script_writes_the_committed_data_again(tmp_path: Path) -> None:
    write_shapes(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in SHAPES_FOLDER.iterdir())
    assert (tmp_path / "train.jsonl").read_bytes() == Path(FILE).read_bytes()
    for line in LINES:
        ours, theirs = (np.asarray(Image.open(folder / line["images"][0])) for folder in (tmp_path, SHAPES_FOLDER))
        assert np.array_equal(ours, theirs)
    models = [sentencepiece.SentencePieceProcessor(str(f / "tokenizer.model")) for f in (tmp_path, SHAPES_FOLDER)]
    pieces = [[model.id_to_piece(i) for i in range(model.vocab_size())] for model in models]
    assert pieces[0] == pieces[1] and 90 <= len(pieces[0]) <= 128
    assert sum(path.stat().st_size for path in SHAPES_FOLDER.iterdir()) < 150_000


def test_pictures_show_what_their_captions_say() -> None:
    checked = 0
    for line in LINES:
        relation = next(name for name in ("left of", "right of", "above", "below") if name in line["text"])
        names = [part.removeprefix("a ").split(" ") for part in line["text"].split(f" {relation} ")]
        pixels = np.asarray(Image.open(SHAPES_FOLDER / line["images"][0])).astype(int)
        centres = []
        for size, colour, shape in names:
            there = (pixels == COLOURS[colour]).all(-1)
            assert there.any()
            y, x = np.nonzero(there)
            centres.append((x.mean(), y.mean()))
            if names[0][1] != names[1][1]:  # of two of one colour, neither can be looked at alone
                width, height = x.max() - x.min() + 1, y.max() - y.min() + 1
                filled = there.sum() / (width * height)
                assert width == height == {"small": 9, "large": 15}[size]
                assert shape == ("square" if filled == 1 else "circle" if filled > 0.6 else "triangle")
        if names[0][1] != names[1][1]:
            (x0, y0), (x1, y1) = centres
            beside = abs(x0 - x1) > abs(y0 - y1)
            assert relation == (("left of" if x0 < x1 else "right of") if beside else "above" if y0 < y1 else "below")
            checked += 1
        shapes = [SHAPES.index(name[2]) for name in names]
        ordered = shapes if relation in ("left of", "above") else shapes[::-1]
        assert line["label"] == 3 * ordered[0] + ordered[1]
    assert checked > 30
    assert len({line["text"] for line in LINES}) == len(LINES) == 48


def test_the_tokenizer_of_the_shapes_knows_every_word_and_the_special_tokens() -> None:
    for line in LINES:
        assert len(TOKENIZER.encode(line["text"])) == len(line["text"].split())
        for message in line["messages"]:
            assert 0 not in TOKENIZER.encode(message["content"])
    assert [TOKENIZER.encode(f"a{text}")[-1] for text in ("<mask>", "<image>", "<img>", "<|im_end|>")] == [4, 5, 7, 10]
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (1, 2, 3)


# ---------------------------------------------------------------- reading and shuffling


def test_samples_come_anew_in_every_round_and_never_twice_in_a_batch() -> None:
    batches = list(islice(shuffled_batches(range(10), 4, random.Random(3)), 15))
    assert all(len(set(batch)) == 4 for batch in batches)
    drawn = [item for batch in batches for item in batch]
    rounds = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(items) == list(range(10)) for items in rounds)
    assert len({tuple(items) for items in rounds}) == 6
    assert list(islice(shuffled_batches(range(10), 4, random.Random(3)), 15)) == batches
    assert list(islice(shuffled_batches(range(10), 4, random.Random(4)), 15)) != batches
    assert sorted(next(shuffled_batches(range(2), 5, random.Random(0)))) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_plain_files_have_one_text_a_line_and_documents_between_empty_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path, "a b", "c d", "", "  e  ", name="data.txt")
    samples = read_samples(file)
    assert [(sample.content["text"], sample.document) for sample in samples] == [("a b", 0), ("c d", 0), ("e", 1)]
    assert samples[2].place == f"{file}, line 4"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 is no JSON object"),
        ({"images": "a.png"}, r"line 2: 'images' must be a list of file names"),
        ({"images": ["a.png"]}, r"line 2 names the picture a\.png, which is not in"),
        ({"label": 3}, r"line 2 has no 'text', only label"),
        ({"text": 3}, r"line 2: 'text' must be of type str, not 3"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: Any, reason: str) -> None:
    file = write_lines(tmp_path, {"text": "a red circle"}, line)
    with pytest.raises(ValueError, match=rf"data\.jsonl, {reason}"):
        make_batches(TextTask(file, batch_size=2))


def test_files_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*absent\.jsonl to learn from"):
        make_batches(TextTask(str(tmp_path / "absent.jsonl")))
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        make_batches(TextTask(write_lines(tmp_path, "", name="empty.jsonl")))
    with pytest.raises(ValueError, match=r"TextTask\.batch_size is 0"):
        TextTask(FILE, 0)
    with pytest.raises(ValueError, match=r"there is none\. Set `processor:`"):
        next(TextTask(FILE).batches())


# ---------------------------------------------------------------- conversations and texts


def test_conversations_teach_the_last_answer_with_its_picture() -> None:
    processor = make_processor(family="llava")
    task = ConversationTask(FILE, 48)
    task.prepare(Model(), processor)
    batch = next(task.batches())
    assert batch["images"].shape == (48, 3, 28, 28)
    answers = Counter(words(row[row >= 0]) for row in batch["labels"])
    assert answers == Counter(line["messages"][1]["content"] for line in LINES)
    by_answer = {line["messages"][1]["content"]: line for line in LINES}
    for ids, labels, picture in zip(batch["input_ids"], batch["labels"], batch["images"], strict=True):
        answer = words(labels[labels >= 0])
        if answers[answer] == 1:
            line = by_answer[answer]
            assert torch.equal(picture, preprocess_image(SHAPES_FOLDER / line["images"][0], 28))
            assert line["messages"][0]["content"] in words(ids[ids != 5])


def test_a_line_that_makes_no_sample_is_named(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for line, reason in (
        ({"messages": good["messages"][:1]}, "nothing to learn"),
        ({"messages": ["a", "b"]}, "nothing to learn"),
        ({"messages": [good["messages"][0], *good["messages"]]}, "message 1 must be"),
    ):
        file = write_lines(tmp_path, good, line)
        with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: {reason}"):
            make_batches(ConversationTask(file, 2))
    with pytest.raises(ValueError, match=r"line \d+: its prompt of \d+ tokens leaves no room"):
        make_batches(ConversationTask(FILE, 48, max_length=14), image_size=14)


def test_texts_are_learnt_whole_after_bos_and_their_picture() -> None:
    (batch,) = make_batches(TextTask(FILE, 48, pictures=True))
    assert Counter(words(row[row >= 0]) for row in batch["labels"]) == Counter(line["text"] for line in LINES)
    assert (batch["input_ids"][:, :5] == torch.tensor([1, 5, 5, 5, 5])).all()
    assert torch.equal(batch["labels"][:, 5:] >= 0, batch["attention_mask"][:, 5:] == 1)
    (batch,) = make_batches(TextTask(FILE, 3), image_size=None)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_random_prefix_is_given_and_the_rest_learnt() -> None:
    batches = make_batches(TextTask(FILE, 24, pictures=True, random_prefix=True, seed=2), 8, prefix_lm=True)
    given = Counter[int]()
    for batch in batches:
        lengths = batch["prefix_lengths"].tolist()
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            assert (labels[:length] == -100).all() and labels[length] >= 0
            assert words(ids[5:]) in {line["text"] for line in LINES}
            given[length - 5] += 1
    assert set(given) == set(range(max(given) + 1)) and max(given) >= 8
    assert min(given[number] for number in range(8)) >= 8  # uniform: 192 draws over 9 or 10 lengths


def test_texts_teach_a_language_model() -> None:
    config = LLaMAConfig(vocab_size=119, hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24)
    model = LLaMA(config, generator=torch.Generator().manual_seed(1))
    loop = TrainConfig(steps=15, learning_rate=5e-2, warmup_steps=3, progress=False)
    batch = make_batches(TextTask(FILE, 48), image_size=None)[0]
    before = model_losses(model, batch)["language"].item()
    run_stages(model, [Stage("text", TextTask(FILE, 16, seed=1), loop)], make_processor(image_size=None))
    assert model_losses(model, batch)["language"].item() < 0.6 * before


# ---------------------------------------------------------------- masked texts


def masked_batches(number: int, model: Any = None, **options: Any) -> list[dict[str, Any]]:
    settings = {"image_place": "last"} if options.get("pictures", "none") != "none" else {"image_size": None}
    return make_batches(MaskedTextTask(FILE, 48, **options), number, model, **settings)


def test_pairs_are_parted_by_segments_and_half_of_them_belong_together() -> None:
    asked = {line["messages"][0]["content"]: {line["messages"][1]["content"]} for line in LINES}
    for line in LINES:
        asked[line["messages"][0]["content"]].add(line["messages"][1]["content"])
    apart = []
    for batch in masked_batches(6, Model("segment_ids"), mask_fraction=1e-6):
        for ids, labels, segments, mask, label in zip(
            *(batch[name] for name in ("input_ids", "labels", "segment_ids", "attention_mask", "next_sentence_labels")),
            strict=True,
        ):
            real = torch.where(labels >= 0, labels, ids)[mask == 1].tolist()
            ends = [place for place, token in enumerate(real) if token == 2]
            assert real[0] == 1 and ends[-1] == len(real) - 1 and len(ends) == 2
            assert segments[mask == 1].tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
            assert not segments[mask == 0].any()
            first, second = words(real[1 : ends[0]]), words(real[ends[0] + 1 : -1])
            assert label or second in asked[first]
            apart.append(int(label))
    assert 0.4 < np.mean(apart) < 0.6


def test_segments_are_left_out_for_models_that_have_none() -> None:
    (batch,) = masked_batches(1, Model("token_type_ids"))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "next_sentence_labels"}


def test_of_the_chosen_tokens_most_are_masked_and_some_drawn_or_kept() -> None:
    counts, tokens, chosen = Counter[str](), 0, 0
    for batch in masked_batches(40, mask_fraction=0.3, pairs=False):
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        learnt = labels >= 0
        assert not (learnt & (mask == 0)).any() and not torch.isin(labels[learnt], torch.tensor([1, 2])).any()
        tokens += int(mask.sum()) - 2 * len(ids)  # bos and eos are never chosen
        chosen += int(learnt.sum())
        counts["mask"] += int((ids[learnt] == MASK).sum())
        counts["kept"] += int((ids[learnt] == labels[learnt]).sum())
        assert torch.equal(ids[~learnt] == MASK, torch.zeros_like(ids[~learnt], dtype=torch.bool))
        assert all(words(row[m == 1]) in {line["text"] for line in LINES} for row, m in
                   zip(torch.where(learnt, labels, ids), mask, strict=True))
    assert chosen / tokens == pytest.approx(0.3, abs=0.02)
    assert counts["mask"] / chosen == pytest.approx(0.8 + 0.1 / 119, abs=0.02)
    assert counts["kept"] / chosen == pytest.approx(0.1 + 0.1 / 119, abs=0.02)


def test_texts_and_pictures_are_matched_half_of_the_time() -> None:
    pictures = {line["text"]: preprocess_image(SHAPES_FOLDER / line["images"][0], 28) for line in LINES}
    apart = []
    for batch in masked_batches(4, Model("segment_ids"), pictures="images"):
        assert not batch["segment_ids"].any()
        for row, (ids, labels, types, mask) in enumerate(
            zip(*(batch[name] for name in ("input_ids", "labels", "token_type_ids", "attention_mask")), strict=True)
        ):
            assert types[mask == 1].tolist()[-4:] == [1] * 4 and ids[types == 1].tolist() == [5] * 4
            assert (labels[types == 1] == -100).all() and types.sum() == 4
            text = words(torch.where(labels >= 0, labels, ids)[(mask == 1) & (types == 0)])
            together = torch.equal(pictures[text], batch["images"][row])
            assert together == (batch["next_sentence_labels"][row] == 0)
            apart.append(not together)
    assert 0.4 < np.mean(apart) < 0.6


def test_features_are_the_lines_own_or_the_pixels_of_the_patches(tmp_path: Path) -> None:
    (batch,) = masked_batches(1, pictures="features", pairs=False)
    texts = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
    found = words(texts[0][(batch["attention_mask"][0] == 1) & (batch["token_type_ids"][0] == 0)])
    line = next(line for line in LINES if line["text"] == found)
    pixels = preprocess_image(SHAPES_FOLDER / line["images"][0], 28)
    expected = [pixels[:, y : y + 14, x : x + 14].flatten() for y in (0, 14) for x in (0, 14)]
    assert torch.equal(batch["images"][0], torch.stack(expected))
    own = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    file = write_lines(tmp_path, {"text": "a", "features": own})
    (batch,) = make_batches(MaskedTextTask(file, 2, pairs=False, pictures="features"))
    assert batch["images"].tolist() == [own, own]
    file = write_lines(tmp_path, {"text": "a", "features": own[:3]})
    task = MaskedTextTask(file, 2, pairs=False, pictures="features")
    with pytest.raises(ValueError, match=r"line 1: features are \[3, 2\], but the processor has room for 4"):
        make_batches(task)


def test_masking_needs_a_mask_token_and_something_to_pair(tmp_path: Path) -> None:
    task = MaskedTextTask(write_lines(tmp_path, {"text": "a red circle"}))
    with pytest.raises(ValueError, match=r"line 1 and all others have no second sentence"):
        make_batches(task)
    task = MaskedTextTask(write_lines(tmp_path, {"text": "a", "images": []}), pictures="images")
    with pytest.raises(ValueError, match="has one text only"):
        make_batches(task)
    plain = MaskedTextTask(write_lines(tmp_path, "a red", "blue square", "", "above", "below", name="data.txt"), 2)
    (batch,) = make_batches(plain, image_size=None)
    assert batch["next_sentence_labels"].shape == (2,)
    task = MaskedTextTask(FILE)
    golden = Path(__file__).parent / "golden" / "prompts" / "tokenizer.model"
    task.prepare(Model(), Processor(ProcessorConfig(family="caption"), load_tokenizer(golden)))
    with pytest.raises(ValueError, match="no token that masks others"):
        next(task.batches())
    with pytest.raises(ValueError, match="choose none, images or features"):
        MaskedTextTask(FILE, pictures="patches")
    with pytest.raises(ValueError, match="mask_fraction is 1"):
        MaskedTextTask(FILE, mask_fraction=1)


def test_long_pairs_are_cut_where_they_are_longest() -> None:
    for batch in masked_batches(3, max_length=10):
        assert batch["input_ids"].shape[1] <= 10
        assert ((batch["input_ids"] == 2).sum(1) == 2).all()


# ---------------------------------------------------------------- pairs, classes and holes


def test_pairs_of_a_batch_are_texts_with_their_own_pictures() -> None:
    (batch,) = make_batches(PairTask(FILE, 48))
    for ids, mask, picture in zip(batch["input_ids"], batch["attention_mask"], batch["images"], strict=True):
        line = next(line for line in LINES if line["text"] == words(ids))
        tokens = TOKENIZER.encode(line["text"])
        assert ids.tolist() == [1, *tokens, 2] + [3] * (len(ids) - len(tokens) - 2)
        assert mask.sum() == len(tokens) + 2
        assert torch.equal(picture, preprocess_image(SHAPES_FOLDER / line["images"][0], 28))
    with pytest.raises(ValueError, match="has 48 pairs, fewer than a batch of 49"):
        make_batches(PairTask(FILE, 49))
    (batch,) = make_batches(PairTask(FILE, 8, max_length=6))
    assert batch["input_ids"].shape == (8, 6) and (batch["input_ids"][:, -1] == 2).all()


def test_classes_come_with_pictures_of_the_models_size() -> None:
    task = ClassTask(FILE, 48, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25))
    task.prepare(Model(image_size=20), None)
    batch = next(task.batches())
    assert batch["images"].shape == (48, 3, 20, 20) and set(batch) == {"images", "labels"}
    assert Counter(batch["labels"].tolist()) == Counter(line["label"] for line in LINES)
    halves = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for label, picture in zip(batch["labels"].tolist(), batch["images"], strict=True):
        lines = [line for line in LINES if line["label"] == label]
        same = [preprocess_image(SHAPES_FOLDER / line["images"][0], 20, *halves) for line in lines]
        assert any(torch.equal(picture, other) for other in same)
    task = ClassTask(FILE, 2)
    task.prepare(Model(), None)
    with pytest.raises(ValueError, match=r"Model has no image_size of its own: set ClassTask\.image_size"):
        next(task.batches())
    (batch,) = make_batches(ClassTask(FILE, 2))
    assert batch["images"].shape == (2, 3, 28, 28)


def test_one_picture_a_line_where_one_is_needed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = write_lines(tmp_path, {"images": ["a.png", "a.png"], "label": 0, "text": "x"})
    with pytest.raises(ValueError, match=r"line 1 has 2 images"):
        make_batches(ClassTask(file, 1))
    file = write_lines(tmp_path, {"images": ["a.png"], "label": True})
    with pytest.raises(ValueError, match=r"'label' must be of type int, not True"):
        make_batches(ClassTask(file, 1))


def test_holes_are_moved_behind_texts_and_can_be_put_back() -> None:
    marks = ["<mask:0>", "<mask:1>", "<mask:2>"]
    ids = [TOKENIZER.encode(f"a{mark}")[-1] for mark in marks]
    transform, moved = CausalMaskTransform(tuple(ids), max_spans=3), Counter[int]()
    for batch in make_batches(InfillingTask(FILE, 16, sentinels=marks, rate=2.0), 6, image_size=None):
        for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            real = row[mask == 1].tolist()
            assert real[0] == 1 and real[-1] == 2
            assert words(transform.restore(real[1:-1])) in {line["text"] for line in LINES}
            assert labels[mask == 1].tolist() == [-100 if token in ids else token for token in real]
            assert (labels[mask == 0] == -100).all()
            moved[sum(token in ids for token in real) // 2] += 1
    assert set(moved) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"'left of' is [0-9]+ tokens to this tokenizer"):
        make_batches(InfillingTask(FILE, sentinels=["left of"]))
