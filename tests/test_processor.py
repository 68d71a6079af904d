"""The processor: recorded sequences, batches of all mixtures, training, checkpoint folders, errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from mixformer.data.processor import Processor, ProcessorConfig, TilingConfig, TrainingSample, load_processor
from mixformer.images import preprocess_image, tile_picture
from mixformer.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "prompts")
ENTRIES = json.loads((GOLDEN / "prompts" / "prompts.json").read_text(encoding="utf-8"))
RED, BLUE = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue"))


def make_processor(entry: dict[str, Any]) -> Processor:
    """The processor that an entry of prompts.json was recorded with."""
    family = entry["family"].removesuffix("-train")
    return Processor(
        ProcessorConfig(
            family=family,
            image_size=entry.get("image_size") or {4: 28, 9: 42}[entry["image_length"]],
            downsample=2 if family == "hf-cogvlm2" else 1,
            pad_id=entry.get("pad_token_id", 0),
            placeholder_id=entry.get("placeholder_id", 0),
        ),
        TOKENIZER,
    )


def small_processor(**settings: Any) -> Processor:
    """Four patches per image."""
    return Processor(ProcessorConfig(**{"image_size": 28, **settings}), TOKENIZER)


def expert_mask(types: list[int]) -> list[int]:
    """boi and patches, not eoi: image tokens that another image token follows (spans here never touch)."""
    return [int(here and there) for here, there in zip(types, [*types[1:], 0], strict=True)]


def test_every_recorded_prompt_gives_the_recorded_tensors() -> None:
    recorded = [entry for entry in ENTRIES if entry["family"] != "sat-train"]
    assert len(recorded) == 288
    for entry in recorded:
        batch = make_processor(entry)(
            entry["query"], RED if entry["image"] else None, entry["template"], entry["history"]
        )
        # Entries with an answer hold it after the prompt.
        prompt_length = entry["labels"].count(-100) if "labels" in entry else None
        types = entry.get("token_type_ids", entry.get("image_embed_mask"))
        assert batch["input_ids"].tolist() == [entry["input_ids"][:prompt_length]]
        assert batch["token_type_ids"].tolist() == [types[:prompt_length]]
        assert batch["attention_mask"].tolist() == [[1] * len(entry["input_ids"][:prompt_length])]
        assert expert_mask(types) == entry.get("expert_mask", entry.get("vision_expert_mask"))
        assert ("images" in batch) == entry["image"]


def test_every_recorded_answer_gives_the_recorded_labels() -> None:
    recorded = [entry for entry in ENTRIES if "answer" in entry]
    assert len(recorded) == 84
    for entry in recorded:
        batch = make_processor(entry).training_batch(
            [
                {
                    "prompt": entry["query"],
                    "answer": entry["answer"],
                    "images": RED if entry["image"] else None,
                    "history": entry["history"],
                    "template": entry["template"],
                }
            ]
        )
        for name in ("input_ids", "token_type_ids", "attention_mask", "labels"):
            assert batch[name].tolist() == [entry[name]]


def test_every_recorded_training_sample_is_padded_and_labelled_alike() -> None:
    recorded = [entry for entry in ENTRIES if entry["family"] == "sat-train"]
    assert len(recorded) == 32
    for entry in recorded:
        sample = TrainingSample(entry["prompt"], entry["caption"], images=RED, template=entry["template"])
        processor, length = make_processor(entry), entry["max_target_length"]
        batch = processor.training_batch([sample], length, pad_to_max_length=True)
        assert batch["input_ids"].tolist() == [entry["input_ids"]]
        assert batch["labels"].tolist() == [entry["labels"]]
        assert batch["token_type_ids"].tolist() == [entry["image_embed_mask"]]


@pytest.mark.parametrize("case", ["cogvlm-hf", "cogagent-hf", "cogvlm-sat", "cogagent-sat", "cogvlm-sat-mp2"])
def test_checkpoint_folders_give_the_recorded_batches(case: str) -> None:
    folder = GOLDEN / case
    texts = json.loads((folder / "case.json").read_text(encoding="utf-8"))["texts"]
    processor = load_processor(folder, tokenizer=GOLDEN / "prompts")
    checked = 0
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}
    for case_name, value in texts.items():
        rows = value if isinstance(value, list) else [value]
        if "query" not in rows[0]:
            continue
        batch = processor(
            [row["query"] for row in rows],
            [None if row["image"] is None else folder / row["image"] for row in rows],
            history=[row["history"] for row in rows],
        )
        types = f"{case_name}.token_type_ids"
        types = types if types in recorded else f"{case_name}.image_embed_mask"
        assert torch.equal(batch["input_ids"], recorded[f"{case_name}.input_ids"])
        assert torch.equal(batch["token_type_ids"], recorded[types])
        if f"{case_name}.attention_mask" in recorded:
            assert torch.equal(batch["attention_mask"], recorded[f"{case_name}.attention_mask"])
        chosen = [i for i in recorded[f"{case_name}.image_index"].tolist() if i >= 0]
        for kind in ("images", "cross_images"):
            assert (kind in batch) == (kind in recorded and bool(chosen))
            if kind in batch:
                torch.testing.assert_close(batch[kind], recorded[kind][chosen], atol=1e-6, rtol=0)
        checked += 1
    assert checked


@pytest.mark.parametrize("case", ["cogvlm-sat", "cogagent-sat"])
def test_sat_training_batches_are_the_recorded_ones(case: str) -> None:
    folder = GOLDEN / case
    content = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    samples = [
        {"prompt": row["prompt"], "answer": row["caption"], "images": folder / row["image"]}
        for row in content["texts"]["c"]
    ]
    processor = load_processor(folder, tokenizer=TOKENIZER)
    batch = processor.training_batch(samples, content.get("max_target_length", 56), pad_to_max_length=True)
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        for name, recorded in (("input_ids",) * 2, ("labels",) * 2, ("token_type_ids", "image_embed_mask")):
            assert torch.equal(batch[name], file.get_tensor(f"c.{recorded}"))
        assert batch["attention_mask"].sum(1).tolist() == file.get_tensor("c.length").tolist()


def test_a_mixed_batch_holds_each_row_as_it_is_alone_padded_left() -> None:
    processor = small_processor(cross_image_size=56)
    prompts, images = ["x", "How many lamps are there?", "Open the menu"], [[RED, BLUE], None, RED]
    batch = processor(prompts, images)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "token_type_ids": torch.int64,
        "images": torch.float32,
        "cross_images": torch.float32,
    }
    width = batch["input_ids"].shape[1]
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = processor(prompt, image)
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][index].tolist() == [0] * (width - length) + [1] * length
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(batch[name][index, width - length :], alone[name][0])
            assert not batch[name][index, : width - length].any()
    assert batch["token_type_ids"].sum(1).tolist() == [12, 0, 6]
    for name, size in (("images", 28), ("cross_images", 56)):
        expected = torch.stack([preprocess_image(picture, size) for picture in (RED, BLUE, RED)])
        assert torch.equal(batch[name], expected)


def test_images_stand_where_the_prompt_marks_them() -> None:
    processor = small_processor(family="sat")
    batch = processor("<EOI> like <EOI>?", [RED, BLUE], template="base")
    like, mark = TOKENIZER.encode(" like "), TOKENIZER.encode("?")
    span = [0] * 6
    assert batch["input_ids"].tolist() == [[1, *span, *like, *span, *mark]]
    assert batch["token_type_ids"].tolist() == [[0, *[1] * 6, *[0] * len(like), *[1] * 6, *[0] * len(mark)]]
    assert torch.equal(batch["images"], torch.stack([preprocess_image(p, 28) for p in (RED, BLUE)]))


def test_text_alone_brings_no_images_and_no_image_tokens() -> None:
    batch = small_processor(cross_image_size=56)("Open the menu")
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert not batch["token_type_ids"].any()


def test_a_text_processor_makes_no_token_types_and_refuses_images() -> None:
    processor = Processor(ProcessorConfig(family="llama"), TOKENIZER)
    batch = processor(["x", "Open the menu"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1].tolist() == [1, *TOKENIZER.encode("Open the menu")]
    with pytest.raises(ValueError, match="reads text only"):
        processor("x", RED)


def test_a_conversation_equals_a_question_with_its_history() -> None:
    processor = small_processor()
    conversation = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "near the top"},
        {"role": "user", "content": "Open it"},
    ]
    expected = processor("Open it", RED, history=[("Where?", "near the top")])["input_ids"]
    assert torch.equal(processor(conversation, RED)["input_ids"], expected)
    prompts: list[Any] = [conversation, "x"]
    several = processor(prompts, [RED, None])["input_ids"]
    assert torch.equal(several[:1], expected)
    learnt = processor.training_batch(
        [{"prompt": [*conversation, {"role": "assistant", "content": "done"}], "images": RED}]
    )
    assert torch.equal(learnt["input_ids"][:, : expected.shape[1]], expected)
    assert learnt["labels"][0, expected.shape[1] :].tolist() == [*TOKENIZER.encode("done"), 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_rows_are_padded_on_the_side_asked_for(side: str) -> None:
    processor = small_processor(pad_id=3)
    samples = [TrainingSample("x", "y", RED), TrainingSample("How many lamps are there?", "three", BLUE)]
    batch = processor.training_batch(samples, padding_side=side)  # type: ignore[arg-type]
    short, width = processor.training_batch(samples[:1]), batch["input_ids"].shape[1]
    length = short["input_ids"].shape[1]
    kept = slice(width - length, width) if side == "left" else slice(0, length)
    padding = slice(0, width - length) if side == "left" else slice(length, width)
    for name, fill in {"input_ids": 3, "attention_mask": 0, "token_type_ids": 0, "labels": -100}.items():
        assert torch.equal(batch[name][0, kept], short[name][0])
        assert batch[name][0, padding].tolist() == [fill] * (width - length)


def test_a_long_answer_is_cut_so_that_eos_still_fits() -> None:
    # The released training code keeps max_length - patches - 5 ids, an image counting as one of them, and adds eos:
    # max_length - 4 tokens of context and answer, then eos.
    processor = small_processor()
    answer = "The bottle is green. " * 9
    context = processor("x", RED)["input_ids"].shape[1]
    batch = processor.training_batch([TrainingSample("x", answer, RED)], max_length=40)
    expected = [*TOKENIZER.encode(answer)[: 40 - 4 - context], 2]
    assert batch["labels"].tolist() == [[-100] * context + expected]
    assert batch["input_ids"].shape == (1, 37)


def test_an_empty_answer_teaches_the_end_alone() -> None:
    labels = small_processor().training_batch([TrainingSample("x", "", RED)])["labels"]
    assert labels[labels != -100].tolist() == [2]


def test_samples_that_cannot_be_learnt_from_are_refused() -> None:
    processor = small_processor()
    good = TrainingSample("x", "y", RED)
    too_long = TrainingSample("How many lamps are there? " * 3, "y", RED)
    with pytest.raises(ValueError, match=r"sample 1: its prompt of .* tokens leaves no room"):
        processor.training_batch([good, too_long], max_length=40)
    with pytest.raises(ValueError, match=r"sample 0: its image span\(s\) of 12 tokens do not fit"):
        processor.training_batch([TrainingSample("x", "y", [RED, BLUE])], max_length=15)
    with pytest.raises(ValueError, match="sample 0: nothing to learn"):
        processor.training_batch([TrainingSample("x")])
    with pytest.raises(ValueError, match="unknown field 'image'"):
        processor.training_batch([{"prompt": "x", "answer": "y", "image": RED}])
    with pytest.raises(ValueError, match="no prompt"):
        processor.training_batch([{"answer": "y"}])
    with pytest.raises(ValueError, match="no samples"):
        processor.training_batch([])
    with pytest.raises(ValueError, match="needs max_length"):
        processor.training_batch([good], pad_to_max_length=True)
    with pytest.raises(ValueError, match="padding_side"):
        processor.training_batch([good], padding_side="top")  # type: ignore[arg-type]


def test_decode_gives_the_text_without_padding_images_and_what_follows_eos() -> None:
    processor = small_processor(pad_id=2)
    batch = processor(["What colour is the bottle?", "x"], [RED, BLUE])
    assert processor.decode(batch["input_ids"][1]) == "Question: x Answer:"
    assert processor.decode([*TOKENIZER.encode("a cat"), 2, 310, 310]) == "a cat"
    text = processor.decode([*batch["input_ids"][1].tolist(), *TOKENIZER.encode("a cat"), 2])
    assert processor.answer(text) == "a cat"
    with pytest.raises(ValueError, match="one row"):
        processor.decode(batch["input_ids"])


def test_a_saved_processor_comes_back_equal(tmp_path: Path) -> None:
    settings = {"family": "hf-cogagent", "template": "vqa", "cross_image_size": 56}
    processor = small_processor(**settings, stop_ids=(2, 7), bos_id=None)
    processor.save(tmp_path)
    for other in (load_processor(tmp_path), pickle.loads(pickle.dumps(processor))):
        assert other.config == processor.config
        for name, tensor in processor("Open the menu", RED).items():
            assert torch.equal(other("Open the menu", RED)[name], tensor)
    assert load_processor(tmp_path, template="chat").config.template == "chat"


def test_released_folders_are_recognised() -> None:
    found = {
        case: load_processor(GOLDEN / case, tokenizer=TOKENIZER).config
        for case in ("cogvlm-hf", "cogvlm2-hf", "cogagent-hf", "llama-hf", "cogvlm-sat", "cogagent-sat")
    }
    summary = {
        case: (c.family, c.template, c.image_size, c.image_length, c.cross_image_size, c.placeholder_id)
        for case, c in found.items()
    }
    assert summary == {
        "cogvlm-hf": ("hf-cogvlm", "chat", 42, 9, None, 0),
        "cogvlm2-hf": ("hf-cogvlm2", "chat", 56, 4, None, 202),
        "cogagent-hf": ("hf-cogagent", "chat", 28, 4, 56, 0),
        "llama-hf": ("llama", None, None, 0, None, 0),
        "cogvlm-sat": ("sat", "chat_old", 42, 9, None, 0),
        "cogagent-sat": ("sat", "chat", 28, 4, 56, 0),
    }
    assert found["cogvlm2-hf"].stop_ids == (2, 201)


@pytest.mark.parametrize(("size", "downsample", "expected"), [(224, 1, 256), (490, 1, 1225), (1344, 2, 2304)])
def test_the_published_sizes_give_the_published_lengths(size: int, downsample: int, expected: int) -> None:
    assert ProcessorConfig(image_size=size, downsample=downsample).image_length == expected
    assert ProcessorConfig(image_size=size, num_image_tokens=32).image_length == 32


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at"):
        load_processor(tmp_path / "absent")
    with pytest.raises(ValueError, match="no checkpoint folder"):
        load_processor(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_processor(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_processor(tmp_path, TOKENIZER)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OtherModel"], "vision_config": {}}))
    with pytest.raises(ValueError, match="describes OtherModel"):
        load_processor(tmp_path, TOKENIZER)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 14}}))
    with pytest.raises(ValueError, match="lacks 'image_size'"):
        load_processor(tmp_path, TOKENIZER)
    content = {"vision_config": {"patch_size": 14, "image_size": 28}, "template_version": "talk"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: family 'hf-cogvlm' has no template 'talk'"):
        load_processor(tmp_path, TOKENIZER)
    assert load_processor(tmp_path, TOKENIZER, template="vqa").config.template == "vqa"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_sise": 28}, "did you mean 'image_size'"),
        ({"image_size": "28"}, "image_size must be a positive whole number"),
        ({"image_size": 30}, "does not divide into patches of 14"),
        ({"image_size": 42, "downsample": 2}, "multiple of 28"),
        ({"cross_image_size": 28}, "comes beside image_size"),
        ({"eos_id": None}, "eos_id must be a token id"),
        ({"family": "sats"}, "no prompt family 'sats'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    (tmp_path / "processor.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=rf"processor\.yaml.*{reason}"):
        load_processor(tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["x", "y"], "images": [RED]}, r"2 prompt\(s\) in a list, but images is a list of 1"),
        ({"prompts": ["x", "y"], "images": RED}, "but images is Image"),
        ({"prompts": ["x"], "history": [None, None]}, "but history is a list of 2"),
        ({"prompts": "x", "history": ["Where?"]}, r"prompt 0: history must be \(question, answer\) pairs"),
        ({"prompts": "x", "template": "talk"}, "has no template 'talk'"),
        ({"prompts": [{"role": "assistant", "content": "x"}]}, "message 0 must be .*'user'"),
        ({"prompts": [{"role": "user", "content": "x"}] * 2}, "message 1 must be .*'assistant'"),
        ({"prompts": [{"role": "user", "content": "x"}], "history": [("a", "b")]}, "brings its own history"),
        (
            {"prompts": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "must end with the user's message",
        ),
        ({"prompts": "x", "images": b"no picture"}, "image of 10 bytes is not a picture"),
    ],
)
def test_calls_that_make_no_sense_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small_processor()(**arguments)


def test_arguments_of_a_wrong_type_are_named() -> None:
    with pytest.raises(TypeError, match="prompts must be text"):
        small_processor()(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images of a prompt must be"):
        small_processor()("x", 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a TrainingSample"):
        small_processor().training_batch(["x"])  # type: ignore[list-item]


def test_coordinates_are_rounded_to_the_grid_in_past_turns_as_well() -> None:
    processor, (off, on) = small_processor(coordinate_grid=10), ("[[123,207,311,489]]", "[[100,200,300,500]]")
    past = {box: [(f"Read {box}", f"It is {box}")] for box in (off, on)}
    rounded, plain = (processor("Why?", history=past[box])["input_ids"] for box in (off, on))
    assert torch.equal(rounded, plain)
    assert not torch.equal(rounded, small_processor()("Why?", history=past[off])["input_ids"])


# ---------------------------------------------------------------- places, marks, tiles and prompts of other systems


def family_processor(family: str, **settings: Any) -> Processor:
    """Four patches per image at id 9, with the sentencepiece tokenizer of the recorded prompts."""
    common = {"family": family, "image_size": 28, "placeholder_id": 9, "image_marks": False}
    return Processor(ProcessorConfig(**{**common, **settings}), TOKENIZER)


def part(batch: dict[str, torch.Tensor], kind: int) -> list[int]:
    """Ids of the tokens of one type."""
    return batch["input_ids"][batch["token_type_ids"] == kind].tolist()


@pytest.mark.parametrize("marks", [False, True])
def test_a_span_has_marks_only_where_the_model_has_them(marks: bool) -> None:
    processor = family_processor("caption", image_marks=marks)
    batch = processor("What?", [RED, BLUE])
    length = 4 + 2 * marks
    assert processor.config.span_length == length
    assert batch["input_ids"].tolist() == [[1, *[9] * 2 * length, *TOKENIZER.encode("What?")]]
    assert part(batch, 1) == [9] * 2 * length


def test_images_stand_before_bos_after_it_or_behind_everything() -> None:
    text, answer = TOKENIZER.encode("What?"), TOKENIZER.encode("a cat")
    orders = {
        "front": [9, 9, 9, 9, 1, *text, *answer, 2], "first": [1, 9, 9, 9, 9, *text, *answer, 2],
        "last": [1, *text, *answer, 2, 9, 9, 9, 9],
    }  # fmt: skip
    for place, expected in orders.items():
        processor = family_processor("caption", image_place=place)
        batch = processor.training_batch([TrainingSample("What?", "a cat", RED)])
        assert batch["input_ids"].tolist() == [expected]
        assert batch["labels"][batch["labels"] >= 0].tolist() == [*answer, 2]
        assert (batch["labels"][batch["token_type_ids"] == 1] == -100).all()
        start = expected.index(2) - len(answer)
        asked = expected[:start] + expected[start + len(answer) + 1 :]
        assert processor("What?", RED)["input_ids"].tolist() == [asked]
        room = len(expected) + 3
        cut = processor.training_batch([TrainingSample("What?", "a cat", RED)], max_length=room)
        assert torch.equal(cut["input_ids"], batch["input_ids"])
        shorter = processor.training_batch([TrainingSample("What?", "a cat", RED)], max_length=room - 1)
        assert shorter["input_ids"].shape[1] == len(expected) - 1


def test_slots_in_the_text_are_ignored_where_images_have_another_place() -> None:
    batch = family_processor("llava", template="base", image_place="first")("is <image> text?", RED)
    assert batch["input_ids"].tolist() == [[1, 9, 9, 9, 9, *TOKENIZER.encode("is <image> text?")]]


def test_llava_splits_its_prompt_at_images_and_ends_past_turns_with_eos() -> None:
    # The released code tokenises what lies between the images piece by piece, and `</s>` is the end token.
    batch = family_processor("llava")("And <image>?", RED, history=[("Hi", "Hello")])
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. "
    )
    texts = (system + "USER: Hi ASSISTANT: Hello", "USER: And ", "? ASSISTANT:")
    first, second, third = (TOKENIZER.encode(text) for text in texts)
    assert batch["input_ids"].tolist() == [[1, *first, 2, *second, 9, 9, 9, 9, *third]]
    opened = family_processor("llava")("And?", [RED, BLUE], history=[("Hi", "Hello")])["input_ids"].tolist()[0]
    pieces = [TOKENIZER.encode(text) for text in (system + "USER: ", "\n", "\nHi ASSISTANT: Hello")]
    span, rest = [9] * 4, TOKENIZER.encode("USER: And? ASSISTANT:")
    assert opened == [1, *pieces[0], *span, *pieces[1], *span, *pieces[2], 2, *rest]


def test_answers_are_tokenised_as_they_stand_behind_the_prompt() -> None:
    sample = TrainingSample("What?", "a red cat", RED)
    batch = family_processor("llava", template="hf").training_batch([sample])
    whole = TOKENIZER.encode("\nWhat? ASSISTANT: a red cat")
    assert batch["input_ids"][0, -len(whole) - 1 :].tolist() == [*whole, 2]
    assert batch["labels"][batch["labels"] >= 0].tolist() == [*TOKENIZER.encode("a red cat"), 2]


def test_prefix_lengths_count_the_tokens_of_the_prompt_and_no_padding() -> None:
    processor = family_processor("caption", prefix_lm=True)
    samples = [TrainingSample("", "a cat", RED), TrainingSample("What is this?", "a bottle", BLUE)]
    asked = 5 + len(TOKENIZER.encode("What is this?"))
    assert processor.training_batch(samples)["prefix_lengths"].tolist() == [5, asked]
    batch = processor(["", "What is this?"], [RED, BLUE])
    assert batch["prefix_lengths"].tolist() == batch["attention_mask"].sum(1).tolist() == [5, asked]
    assert "prefix_lengths" not in family_processor("caption")("", RED)


WIDE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 61, 3), dtype=np.uint8))
TALL = Image.fromarray(np.random.default_rng(4).integers(0, 255, (75, 26, 3), dtype=np.uint8))


def test_all_tiles_of_a_picture_share_one_pair_of_marks() -> None:
    settings = {"image_open": "[", "image_close": "]", "tiles": {"max_tiles": 3}}
    processor = family_processor("caption", **settings)
    batch = processor(["x", "y"], [[WIDE, RED], TALL])
    opening, closing = (TOKENIZER.encode(f"a{mark}")[1:] for mark in "[]")
    spans = [[*opening, *[9] * 4 * count, *closing] for count in (3, 3, 4)]  # two or three tiles, and a thumbnail
    first, second = [1, *spans[0], *spans[1], *TOKENIZER.encode("x")], [1, *spans[2], *TOKENIZER.encode("y")]
    assert batch["input_ids"].tolist() == [first, [0] * (len(first) - len(second)) + second]
    assert batch["token_type_ids"].sum(1).tolist() == [24, 16]
    tiles = [tile for picture in (WIDE, RED, TALL) for tile in tile_picture(picture, 28, 1, 3)]
    assert torch.equal(batch["images"], torch.stack([preprocess_image(tile, 28) for tile in tiles]))
    with pytest.raises(ValueError, match=r"sample 0: its image span\(s\) of 16 tokens do not fit"):
        processor.training_batch([TrainingSample("x", "y", TALL)], max_length=19)


def test_tiled_processors_come_back_equal(tmp_path: Path) -> None:
    processor = family_processor("internvl", tiles=TilingConfig(2, 5, False), image_place="slot", image_fit="crop")
    processor.save(tmp_path)
    assert load_processor(tmp_path).config == processor.config


# ---------------------------------------------------------------- folders of Hugging Face


def byte_tokenizer(folder: Path, specials: list[str], **roles: str) -> Any:
    """A byte-level tokenizer.json with special tokens, as the reference library reads it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(["what is this? USER ASSISTANT User Assistant"] * 4, vocab_size=300, show_progress=False)
    model.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, **roles)
    fast.save_pretrained(folder)
    return fast


def image_processor(name: str, **options: Any) -> Any:
    import importlib

    folder = {"CLIP": "clip", "Idefics2": "idefics2", "GotOcr2": "got_ocr2"}[name]
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return getattr(module, f"{name}ImageProcessorPil")(**options)


def save_config(folder: Path, **content: Any) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def test_a_llava_folder_gives_the_batches_of_its_own_processor(tmp_path: Path) -> None:
    from transformers import LlavaProcessor

    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = byte_tokenizer(tmp_path, ["<s>", "</s>", "<image>", "<pad>"], **roles)
    images = image_processor("CLIP", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = LlavaProcessor(images, fast, 14, "default", num_additional_image_tokens=1)
    theirs.save_pretrained(tmp_path)
    token = fast.convert_tokens_to_ids("<image>")
    vision = {"image_size": 28, "patch_size": 14}
    save_config(tmp_path, model_type="llava", vision_config=vision, image_token_index=token)
    processor = load_processor(tmp_path)
    question = "USER: <image>\nwhat is this? ASSISTANT: a cat USER: what? ASSISTANT:"
    expected = theirs(text=question, images=[WIDE], return_tensors="pt")
    batch = processor("what?", WIDE, history=[("what is this?", "a cat")])
    assert batch["input_ids"].tolist() == [[fast.bos_token_id, *expected["input_ids"][0].tolist()]]
    assert torch.equal(batch["token_type_ids"], (batch["input_ids"] == token).long())
    torch.testing.assert_close(batch["images"], expected["pixel_values"], atol=1e-6, rtol=0)
    assert (processor.config.eos_id, processor.config.pad_id) == (fast.eos_token_id, fast.pad_token_id)
    learnt = processor.training_batch([TrainingSample("what is this?", "a cat", WIDE)])
    whole = theirs(text="USER: <image>\nwhat is this? ASSISTANT: a cat", images=[WIDE])["input_ids"][0]
    assert learnt["input_ids"].tolist() == [[fast.bos_token_id, *whole, fast.eos_token_id]]
    full = {"image_token_index": token, "vision_feature_select_strategy": "full"}  # the cls token stays
    save_config(tmp_path, model_type="llava", vision_config=vision, **full)
    assert load_processor(tmp_path).config.image_length == 5


@pytest.mark.parametrize("split", [False, True])
def test_an_idefics2_folder_gives_the_batches_of_its_own_processor(tmp_path: Path, split: bool) -> None:
    from transformers import Idefics2Processor

    specials = ["<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    fast = byte_tokenizer(tmp_path, specials, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    sizes = {"longest_edge": 56, "shortest_edge": 14}
    theirs = Idefics2Processor(image_processor("Idefics2", size=sizes, do_image_splitting=split), fast, 3)
    theirs.save_pretrained(tmp_path)
    token = fast.convert_tokens_to_ids("<image>")
    vision, perceiver = {"image_size": 56, "patch_size": 14}, {"resampler_n_latents": 3}
    save_config(
        tmp_path, model_type="idefics2", vision_config=vision, perceiver_config=perceiver, image_token_id=token
    )
    processor = load_processor(tmp_path)
    text = "User:<image><image>what is this?<end_of_utterance>\nAssistant: a cat<end_of_utterance>\n"
    expected = theirs(
        text=text + "User: what?<end_of_utterance>\nAssistant:", images=[[WIDE, TALL]], return_tensors="pt"
    )
    batch = processor("what?", [WIDE, TALL], history=[("what is this?", "a cat")])
    assert batch["input_ids"].tolist() == [[fast.bos_token_id, *expected["input_ids"][0].tolist()]]
    assert torch.equal(batch["token_type_ids"], (batch["input_ids"] == token).long())
    torch.testing.assert_close(batch["images"], expected["pixel_values"][0], atol=1e-6, rtol=0)
    assert torch.equal(batch["pixel_attention_mask"], expected["pixel_attention_mask"][0])
    end = fast.convert_tokens_to_ids("<end_of_utterance>")
    assert processor.config.eos_id == end and set(processor.config.stop_ids) == {end, fast.eos_token_id}


def test_an_internvl_folder_gives_tiles_between_one_pair_of_marks(tmp_path: Path) -> None:
    specials = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|endoftext|>"]
    fast = byte_tokenizer(tmp_path, specials, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    options = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4}
    images = image_processor("GotOcr2", **options, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1])
    images.save_pretrained(tmp_path)
    vision, token = {"image_size": [28, 28], "patch_size": [7, 7]}, fast.convert_tokens_to_ids("<IMG_CONTEXT>")
    save_config(
        tmp_path, model_type="internvl", vision_config=vision, downsample_ratio=0.5, image_token_id=token
    )
    batch = load_processor(tmp_path)("what?", [WIDE, TALL], history=[("what is this?", "a cat")])
    expected = images([WIDE, TALL], return_tensors="pt")
    spans = [f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>\n" for count in expected["num_patches"].tolist()]
    text = f"<|im_start|>user\n{spans[0]}{spans[1]}what is this?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    text += "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    assert batch["input_ids"].tolist() == [fast.encode(text)]
    torch.testing.assert_close(batch["images"], expected["pixel_values"], atol=1e-6, rtol=0)


def test_qwen_vl_counts_its_pictures(tmp_path: Path) -> None:
    specials = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    fast = byte_tokenizer(tmp_path, specials, eos_token="<|im_end|>")
    token, end = fast.convert_tokens_to_ids(["<imgpad>", "<|im_end|>"])
    config = ProcessorConfig(
        family="qwen-vl", image_size=56, num_image_tokens=3, image_marks=False, placeholder_id=token, bos_id=None,
        eos_id=end,
    )  # fmt: skip
    batch = Processor(config, load_tokenizer(tmp_path))("what?", [RED, BLUE], history=[("what is this?", "a cat")])
    span = f"<img>{'<imgpad>' * 3}</img>\n"
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    text += f"Picture 1: {span}Picture 2: {span}what is this?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    assert batch["input_ids"].tolist() == [
        fast.encode(text + "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n")
    ]


def test_git_and_clip_folders_crop_their_pictures_and_git_puts_them_before_cls(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "what", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    images = image_processor("CLIP", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(tmp_path)
    save_config(tmp_path, model_type="git", vision_config={"image_size": 32, "patch_size": 16})
    processor = load_processor(tmp_path)
    batch = processor.training_batch([TrainingSample("what?", "a cat", WIDE)])
    assert batch["input_ids"].tolist() == [[0] * 5 + [2, 7, 8, 5, 6, 3]]
    assert batch["token_type_ids"].tolist() == [[1] * 5 + [0] * 6]
    assert batch["labels"].tolist() == [[-100] * 8 + [5, 6, 3]]
    expected = images([WIDE], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["images"], expected, atol=1e-6, rtol=0)
    save_config(tmp_path, model_type="clip", vision_config={"image_size": 32, "patch_size": 16})
    found = load_processor(tmp_path)
    assert torch.equal(found("a cat", WIDE)["images"], batch["images"]) and found.config.image_length == 4
    save_config(tmp_path, model_type="git", vision_config={}, num_image_with_embedding=6)
    with pytest.raises(ValueError, match="reads videos"):
        load_processor(tmp_path)


def test_folders_that_say_too_little_ask_for_a_processor_file(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        r"lacks 'image_token_id'.*processor\.yaml": {"model_type": "llava", "vision_config": {}},
        r"lacks 'image_size'.*processor\.yaml": {"model_type": "llava", "vision_config": {}, "image_token_id": 3},
        r"describes OtherModel.*llava, internvl, idefics2, git.*processor\.yaml": {
            "model_type": "other", "vision_config": {}, "architectures": ["OtherModel"],
        },
    }  # fmt: skip
    for reason, content in cases.items():
        save_config(tmp_path, **content)
        with pytest.raises(ValueError, match=reason):
            load_processor(tmp_path, TOKENIZER)
    save_config(
        tmp_path, model_type="llava", vision_config={"image_size": 28, "patch_size": 14}, image_token_id=3
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "resample": 1}))
    with pytest.raises(ValueError, match=r"Pillow's filter 1"):
        load_processor(tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_fit": "squash"}, "image_fit is 'squash': choose one of stretch"),
        ({"image_place": "middle"}, "choose one of front, first, slot, last"),
        ({"image_place": "slot"}, "needs a family that marks images"),
        ({"image_place": "last", "prefix_lm": True}, "within the prefix"),
        ({"image_fit": "native"}, "give num_image_tokens as well"),
        ({"tiles": {"min_tiles": 3, "max_tiles": 2}}, "1 <= min_tiles <= max_tiles"),
        ({"tiles": {"max_tile": 2}}, "max_tile"),
        ({"tiles": {}, "quarters": True}, "tiles are cut to image_size"),
        ({"tiles": {}, "cross_image_size": 28}, "leave one out"),
        ({"shortest_side": 0}, "shortest_side must be a positive whole number"),
    ],
)
def test_settings_that_do_not_go_together_are_named(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    (tmp_path / "processor.yaml").write_text(yaml.safe_dump({"image_size": 28, **settings}))
    with pytest.raises(ValueError, match=rf"processor\.yaml.*{reason}"):
        load_processor(tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": False}, "do_normalize: False"),
        ({"do_rescale": False}, "do_rescale: False"),
        ({"do_resize": False}, "do_resize: False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 32}}, "the tower reads 32"),
    ],
)
def test_picture_settings_that_cannot_be_followed_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_config(tmp_path, model_type="clip", vision_config={"image_size": 32, "patch_size": 16})
    content = {"size": {"shortest_edge": 32}, "crop_size": 32, "do_center_crop": True, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content | settings))
    with pytest.raises(ValueError, match=rf"{message}.*processor\.yaml"):
        load_processor(tmp_path, TOKENIZER)


def test_sizes_that_are_plain_numbers_are_read_as_their_processor_reads_them(tmp_path: Path) -> None:
    images = image_processor("CLIP", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 32, "crop_size": 32}))
    save_config(tmp_path, model_type="clip", vision_config={"image_size": 32, "patch_size": 16})
    expected = images([WIDE], return_tensors="pt")["pixel_values"]
    found = load_processor(tmp_path, TOKENIZER)("a cat", WIDE)["images"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
